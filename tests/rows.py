"""Where packed sequences lie."""

import numpy as np


def row_of(tokens, where, slot):
    """Where in its stream the tokens of a sequence lie."""
    for group in tokens.rows:
        if slot < group.shape[-2]:
            row = group[(*where, slot)]
            assert (np.diff((row >= 0).astype(int)) <= 0).all()  # begun at the left
            return row[row >= 0]
        slot -= group.shape[-2]
    raise AssertionError
