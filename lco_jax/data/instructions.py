"""What a model is told of a task beside an input, and where that stands.

A prompt of sentence-transformers is an instruction here: both programs put it at the same place.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

# keys of a source's entry: what its anchors are told, and what its positives and negatives are
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
    """What the model is told of a task beside a content. It stands word for word at its place, with
    the spaces and lines that it begins and ends with.

    place: one of `PLACES`.
    """

    text: str
    place: str


@dataclass(frozen=True)
class Instructions:
    """What a model was taught to be told.

    prompts: name -> text, "" for nothing. place: where each of them stands. default: the name of
    the one for an input that is given none.
    """

    prompts: Mapping[str, str] = field(default_factory=dict)
    place: str = "instead"
    default: str | None = None
