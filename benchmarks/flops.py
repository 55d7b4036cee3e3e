"""What a step computes, counted: multiply-adds of matrix products, two FLOPs each. Norms and the like are left out.

Dimensions: D hidden, F MLP width, L layers, r LoRA rank, T tokens of all streams, S last tokens, W width of rows.
"""

from dataclasses import dataclass

from lco_jax.models.config import DecoderConfig


@dataclass(frozen=True)
class Work:
    """What is computed, padding included. tokens: T; last: S; rows: how many of each width W."""

    tokens: int
    last: int
    rows: dict[int, int]


RECOMPUTED = {  # the matrix products that a layer's backward pass repeats under each policy
    "full": ("q", "k", "v", "attention", "o", "gate", "up"),
    "attention": ("o", "gate", "up"),
    "gate": ("o", "up"),
    "mlp": ("o",),
    "none": (),
}


def _products(c: DecoderConfig, rank: int) -> dict[str, tuple[float, float]]:
    """FLOPs a token of each matrix product's frozen part, and of its adapter."""
    query, key = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    sizes = {"q": (c.hidden_size, query), "k": (c.hidden_size, key), "v": (c.hidden_size, key),
             "o": (query, c.hidden_size), "gate": (c.hidden_size, c.intermediate_size),
             "up": (c.hidden_size, c.intermediate_size), "down": (c.intermediate_size, c.hidden_size)}  # fmt: skip
    return {name: (2.0 * i * o, 2.0 * rank * (i + o)) for name, (i, o) in sizes.items()}


def forward_flops(c: DecoderConfig, rank: int, work: Work) -> float:
    """One forward pass."""
    return sum(
        _layer(c, rank, work, last)[0] * n for last, n in ((False, c.num_layers - 1), (True, 1))
    )


def step_flops(c: DecoderConfig, rank: int, work: Work, policy: str) -> float:
    """Forward, what is recomputed, and backward: no gradient of the frozen matrices, both of the adapters' factors."""
    total = 0.0
    for last, layers in ((False, c.num_layers - 1), (True, 1)):
        forward, parts = _layer(c, rank, work, last)
        backward = sum(base + 2 * adapter for base, adapter in parts.values())
        again = sum(sum(parts[name]) for name in RECOMPUTED[policy])
        total += layers * (forward + backward + again)
    return total


def _layer(
    c: DecoderConfig, rank: int, work: Work, last: bool
) -> tuple[float, dict[str, tuple[float, float]]]:
    """(a layer's forward pass, its parts): (frozen, adapter) of each product; attention's gradient costs it twice."""
    few = work.last if last else work.tokens
    tokens = dict.fromkeys(("q", "o", "gate", "up", "down"), few) | {
        "k": work.tokens,
        "v": work.tokens,
    }
    parts = {name: (base * tokens[name], adapter * tokens[name])
             for name, (base, adapter) in _products(c, rank).items()}  # fmt: skip
    pairs = sum(n * width * (1 if last else width) for width, n in work.rows.items())
    parts["attention"] = (0.0, 4.0 * pairs * c.num_heads * c.head_dim)
    return sum(base + adapter for base, adapter in parts.values()), parts
