"""What the sequences of a stream begin with: a trie of tokens, which the stream has once.

Dimensions: P tokens of the trie.
"""

from dataclasses import dataclass

import numpy as np

Branch = tuple[int, int, int]  # (first token, its column, how many tokens) of tokens in a row
Branches = tuple[Branch, ...]


def common_length(a: np.ndarray, b: np.ndarray) -> int:
    """How many items a and b have in common at their beginning."""
    differ = a[: len(b)] != b[: len(a)]
    return int(differ.argmax()) if differ.any() else len(differ)


@dataclass(frozen=True)
class Prefixes:
    """What sequences begin with, in all a trie of P tokens that begin every stream: one beginning,
    or one for each instruction.

    ids: int32 [P], the tokens. at: for each beginning int32 [n], the indices of its tokens.
    branches: the trie in pieces, each of which is a piece of every row that has its tokens.
    """

    ids: np.ndarray
    at: tuple[np.ndarray, ...]
    branches: Branches

    @classmethod
    def of(cls, *beginnings: np.ndarray) -> "Prefixes":
        """The trie of some beginnings, token ids int32 [n] each."""
        ids: list[int] = []
        at: list[np.ndarray] = []
        branches: list[Branch] = []
        for beginning in beginnings:
            known = cls(np.array(ids, np.int32), tuple(at), ()).shared(beginning)
            new = len(beginning) - len(known)
            if new:
                branches.append((len(ids), len(known), new))
            appended = len(ids) + np.arange(new, dtype=np.int32)
            at.append(np.concatenate([known, appended]))
            ids += beginning[len(known) :].tolist()
        return cls(np.array(ids, np.int32), tuple(at), tuple(branches))

    def __len__(self) -> int:
        return len(self.ids)

    def shared(self, ids: np.ndarray) -> np.ndarray:
        """The indices of the tokens that a sequence begins with, as many as there are: int32."""
        at, length = self._like(ids)
        return at[:length]

    def own(self, ids: np.ndarray) -> int:
        """How many tokens a sequence adds to a stream, at least 1. A few that lack the last token
        of their beginning add one more.
        """
        at, _ = self._like(ids)
        return max(len(ids) - len(at), 1)

    def _like(self, ids: np.ndarray) -> tuple[np.ndarray, int]:
        """The beginning that a sequence has most of, and how many tokens it has of it."""
        best, most = np.zeros(0, np.int32), -1
        for at in self.at:
            length = common_length(ids, self.ids[at])
            if length > most:
                best, most = at, length
        return best, max(most, 0)


def prefix_length(branches: Branches) -> int:
    """How many tokens these are."""
    return sum(length for _, _, length in branches)
