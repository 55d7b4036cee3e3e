"""Where packed sequences are."""

import numpy as np


def row_of(tokens, where, slot):
    """The indices in the stream of the tokens of the sequence in a slot."""
    for group in tokens.rows:
        if slot < group.shape[-2]:
            row = group[(*where, slot)]
            assert (np.diff((row >= 0).astype(int)) <= 0).all()  # from the left
            return row[row >= 0]
        slot -= group.shape[-2]
    raise AssertionError
