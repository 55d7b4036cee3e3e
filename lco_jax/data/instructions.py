"""Instructions: words about the task beside an input, and where they stand.

A prompt of sentence-transformers is an instruction here: both programs put it at the same place.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

# keys of a source's entry: the instruction of its anchors, and that of its positives and negatives
INSTRUCTIONS = ("query_instruction", "document_instruction")
# Where an instruction stands: in the place of the prompt after a content; in a system turn; before
# the content; after it, before the prompt
PLACES = ("instead", "system", "before", "after")
IN_WORDS = {
    "instead": "in the place of the prompt after each input",
    "system": "in a system turn before each input",
    "before": "before each input",
    "after": "after each input, before the prompt",
}


@dataclass(frozen=True)
class Instruction:
    """Words about the task beside a content. They stand word for word at its place, with
    the spaces and lines that they begin and end with.

    place: one of `PLACES`.
    """

    text: str
    place: str


@dataclass(frozen=True)
class Instructions:
    """The instructions that a model was trained with.

    prompts: name -> text, "" for nothing. place: where each of them stands. default: the name of
    the one for an input that is given none.
    """

    prompts: Mapping[str, str] = field(default_factory=dict)
    place: str = "instead"
    default: str | None = None


# of anchors; of positives and negatives
SideInstructions = tuple[Instruction | None, Instruction | None]
