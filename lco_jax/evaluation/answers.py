"""How far answers are from their references: exact match, and error rates of characters and words.

An error rate is the number of edits (insertions, deletions, substitutions: Levenshtein 1966) that
turn the reference into the answer, over the reference's length. It may exceed 1. jiwer counts the
edits: case matters, Unicode is not normalised, white space at the ends is stripped. For the word
error rate, any amount of white space between words is one space.
"""

from collections.abc import Sequence

import jiwer

from lco_jax.core.errors import LcoError


def score(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """The scores of N answers, as fractions.

    "records": N. "exact_match". "cer" and "wer": means of the records' error rates. "corpus_cer"
    and "corpus_wer": all edits over the length of all references. Raises where there are no
    records, and for a reference of white space alone, which has no error rate.
    """
    answers = [text.strip() for text in answers]
    references = [text.strip() for text in references]
    if not references:
        raise LcoError("there are no references; an error rate needs something to compare with")
    if "" in references:
        where = f"reference {references.index('')}"
        raise LcoError(f"{where} is white space alone; an error rate needs a text to compare with")
    pairs = list(zip(references, answers, strict=True))
    equal = sum(reference == answer for reference, answer in pairs)
    scores = {
        "records": len(pairs),
        "exact_match": equal / len(pairs),
    }
    for name, error_rate in (
        ("cer", jiwer.cer),
        ("wer", jiwer.wer),
    ):
        rates = [error_rate(reference, answer) for reference, answer in pairs]
        scores[name] = sum(rates) / len(rates)
        scores[f"corpus_{name}"] = error_rate(references, answers)
    return scores
