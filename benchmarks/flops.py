"""What a step computes: multiply-adds of matrix products, two FLOPs each; no norms and the like.

Dimensions: D hidden, F MLP width, L layers, r LoRA rank, T tokens of all streams, S last tokens,
W width of rows.
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


def forward_flops(c: DecoderConfig, rank: int, work: Work) -> float:
    """The FLOPs of one forward pass."""
    layer = _forward(_layer(c, rank, work))
    last_layer = _forward(_layer(c, rank, work, last=True))
    return (c.num_layers - 1) * layer + last_layer


def step_flops(c: DecoderConfig, rank: int, work: Work, policy: str) -> float:
    """The FLOPs of a forward pass, of what is recomputed, and of a backward pass.

    Frozen matrices have no gradient; both factors of an adapter have one.
    """
    layer = _step(_layer(c, rank, work), policy)
    last_layer = _step(_layer(c, rank, work, last=True), policy)
    return (c.num_layers - 1) * layer + last_layer


Products = dict[str, tuple[float, float]]  # FLOPs of a product's frozen part and of its adapter


def _forward(products: Products) -> float:
    return sum(frozen + adapter for frozen, adapter in products.values())


def _step(products: Products, policy: str) -> float:
    backward = sum(frozen + 2 * adapter for frozen, adapter in products.values())
    recomputed = sum(sum(products[name]) for name in RECOMPUTED[policy])
    return _forward(products) + backward + recomputed


def _layer(c: DecoderConfig, rank: int, work: Work, last: bool = False) -> Products:
    """The products of a layer's forward pass. Few tokens pass all of the last one.

    Attention's gradient costs twice its forward pass, as an adapter's does.
    """
    products: Products = {}
    for name, (inputs, outputs) in _sizes(c).items():
        tokens = work.last if last and name not in ("k", "v") else work.tokens
        products[name] = 2.0 * inputs * outputs * tokens, 2.0 * rank * (inputs + outputs) * tokens
    pairs = sum(count * width * (1 if last else width) for width, count in work.rows.items())
    products["attention"] = 0.0, 4.0 * pairs * c.num_heads * c.head_dim
    return products


def _sizes(c: DecoderConfig) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of each matrix of a layer."""
    query, key = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    return {
        "q": (c.hidden_size, query),
        "k": (c.hidden_size, key),
        "v": (c.hidden_size, key),
        "o": (query, c.hidden_size),
        "gate": (c.hidden_size, c.intermediate_size),
        "up": (c.hidden_size, c.intermediate_size),
        "down": (c.intermediate_size, c.hidden_size),
    }
