"""How far answers are from what they should be: exact match, and the error rates of characters and words.

An error rate is the edits (insertions, deletions, substitutions: Levenshtein 1966) that turn the reference into the
answer, over the reference's length, so it may exceed 1. Counted by jiwer, case sensitive, Unicode as it is; white space
at the ends is stripped, and between words any amount of it is one space for the rate of words alone.
"""

from collections.abc import Sequence

import jiwer

from lco_jax.core.errors import LcoError


def score(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """The scores of N answers, as fractions: "exact_match"; "cer" and "wer", the mean of the records' rates, and
    "corpus_cer" and "corpus_wer", all edits over the length of all references; and "records", N.

    Raises for no records, and for a reference of white space alone, which has no rate.
    """
    answers, references = ([text.strip() for text in texts] for texts in (answers, references))
    if not references or not all(references):
        where = (
            f"reference {references.index('')} is white space alone"
            if references
            else "there are no references"
        )
        raise LcoError(f"{where}; an error rate needs something to be measured against")
    pairs = list(zip(references, answers, strict=True))
    scores = {"records": len(pairs), "exact_match": sum(a == b for a, b in pairs) / len(pairs)}
    for name, rate in (("cer", jiwer.cer), ("wer", jiwer.wer)):
        scores[name] = sum(rate(*pair) for pair in pairs) / len(pairs)
        scores[f"corpus_{name}"] = rate(references, answers)
    return scores
