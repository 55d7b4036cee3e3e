"""LoRA over parameter trees: init, attach, merge, and the dropout that belongs to it."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from lco_jax import LcoError, OmniEmbedder
from lco_jax.checkpoint.hf import load_decoder, open_checkpoint
from lco_jax.checkpoint.peft import read_peft, write_peft
from lco_jax.core import lora
from lco_jax.core.sharding import make_mesh
from lco_jax.core.weights import LoraWeight, dot, dots, dropout, fold_in
from lco_jax.models.model import Model


@pytest.fixture(scope="module")
def model(cases):
    return load_decoder(open_checkpoint(cases["vl"].path), make_mesh(devices=jax.devices()[:1]))


def random_adapters(params, config):
    shapes = jax.eval_shape(lambda: lora.init(jax.random.key(0), params, config))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: 0.1 * rng.normal(size=x.shape).astype(np.float32), shapes)


def test_default_targets_are_every_linear_of_the_decoder(model):
    paths = lora.target_paths(model[1], lora.LoraConfig())
    names = {path.split(".")[-2] for path in paths}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_init_adapts_nothing_and_is_what_peft_draws(model):
    params = model[1]
    config = lora.LoraConfig(rank=4, alpha=8)
    adapters = lora.init(jax.random.key(0), params, config)
    for pair in jax.tree.leaves(adapters, is_leaf=lambda x: isinstance(x, dict) and "a" in x):
        a, b = pair["a"], pair["b"]
        bound = a.shape[-1] ** -0.5
        assert (np.asarray(b) == 0).all()
        assert 0.95 * bound < np.abs(a).max() <= bound
        assert abs(float(a.std()) - bound / 3**0.5) < 0.1 * bound
        assert a.dtype == b.dtype == jnp.float32
    q, k = adapters["layers"]["self_attn"]["q_proj"], adapters["layers"]["self_attn"]["k_proj"]
    assert not np.array_equal(q["weight"]["a"], k["weight"]["a"])


def test_adapter_equals_merged(cases, model, tmp_path):
    """Attached factors, merged matrices and a loaded adapter folder give one embedding."""
    decoder, params = model
    config = lora.LoraConfig(rank=4, alpha=8)
    adapters = random_adapters(params, config)
    mesh = make_mesh(devices=jax.devices()[:1])
    from_pretrained = partial(
        OmniEmbedder.from_pretrained, cases["vl"].path, mesh=mesh, modalities=["text"]
    )
    base = from_pretrained()
    plain = base.encode(reference.TEXTS)
    attached = lora.attach(params, adapters, config)
    embedder = OmniEmbedder(Model(decoder, {}), {"decoder": attached}, base.processor, mesh)
    want = embedder.encode(reference.TEXTS)
    assert np.abs(want - plain).max() > 1e-2

    base.params = {"decoder": jax.jit(partial(lora.merge, config=config))(params, adapters)}
    merged = base.encode(reference.TEXTS)
    assert np.abs(merged - want).max() < 1e-5
    write_peft(tmp_path / "adapter", adapters, config, "base")
    loaded = from_pretrained(adapter=tmp_path / "adapter").encode(reference.TEXTS)
    assert np.abs(loaded - want).max() < 1e-5


def test_peft_round_trip(model, tmp_path):
    config = lora.LoraConfig(
        rank=4, alpha=7, dropout=0.1, targets=r"layers\.self_attn\.[qv]_proj", use_rslora=True
    )
    adapters = random_adapters(model[1], config)
    write_peft(tmp_path / "adapter", adapters, config, "some/base")
    back, read = read_peft(tmp_path / "adapter")
    jax.tree.map(np.testing.assert_array_equal, back, jax.device_get(adapters))
    assert (read.rank, read.alpha, read.dropout, read.use_rslora) == (4, 7, 0.1, True)
    assert read.scale == 3.5
    assert lora.target_paths(model[1], read) == lora.target_paths(model[1], config)


def test_gradient_is_of_the_adapter_alone_and_dot_is_what_it_says():
    rng = np.random.default_rng(0)
    x, base, a, b = (
        jnp.array(rng.normal(size=s), jnp.float32) for s in ((5, 8), (6, 8), (3, 8), (6, 3))
    )
    w = LoraWeight(base, a, b, 0.5, 0.0)
    np.testing.assert_allclose(dot(x, w), x @ (base + 0.5 * b @ a).T, atol=1e-5)
    assert dot(x.astype(jnp.bfloat16), w).dtype == jnp.bfloat16


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
def test_gradients_of_the_factors(dtype, tolerance):
    """They are float32, and those of the plain product, up to the rounding of bfloat16."""
    rng = np.random.default_rng(0)
    x, base, a, b = (
        jnp.array(rng.normal(size=s), jnp.float32) for s in ((2, 50, 8), (60, 8), (3, 8), (60, 3))
    )

    def loss(x, a, b, dtype):
        w = LoraWeight(base.astype(dtype), a, b, 0.5, 0.0)
        return jnp.sum(jnp.sin(dot(x.astype(dtype), w).astype(jnp.float32)))

    def plain(x, a, b):
        return jnp.sum(jnp.sin(x @ base.T + 0.5 * (x @ a.T) @ b.T))

    got = jax.jit(jax.grad(lambda *args: loss(*args, dtype), argnums=(0, 1, 2)))(x / 10, a, b)
    for value, want in zip(got, jax.grad(plain, argnums=(0, 1, 2))(x / 10, a, b), strict=True):
        assert value.dtype == jnp.float32
        assert np.linalg.norm(value - want) < tolerance * np.linalg.norm(want)


def test_dropout_is_a_function_of_the_token_not_of_its_place():
    keys = jnp.arange(4000, dtype=jnp.uint32) * 7
    x = jnp.ones((4000, 64))
    seed, rate = jnp.uint32(3), 0.2
    dropped = np.asarray(dropout(x, fold_in(keys, seed), rate))
    order = np.random.default_rng(0).permutation(4000)
    np.testing.assert_array_equal(
        np.asarray(dropout(x, fold_in(keys[order], seed), rate)), dropped[order]
    )
    zero = dropped == 0
    spread = 4 * (rate * (1 - rate) / zero.size) ** 0.5
    assert abs(zero.mean() - rate) < spread
    np.testing.assert_allclose(dropped[~zero], 1 / (1 - rate), rtol=1e-6)
    # independent along tokens, channels and seeds: no column, row or other draw is special
    assert np.abs(zero.mean(0) - rate).max() < 5 * (rate * (1 - rate) / 4000) ** 0.5
    assert np.abs(zero.mean(1) - rate).max() < 6 * (rate * (1 - rate) / 64) ** 0.5
    other = np.asarray(dropout(x, fold_in(keys, jnp.uint32(4)), rate)) == 0
    assert abs((zero & other).mean() - rate**2) < 4 * (rate**2 / zero.size) ** 0.5
    assert abs((zero[:-1] & zero[1:]).mean() - rate**2) < 4 * (rate**2 / zero.size) ** 0.5
    assert abs((zero[:, :-1] & zero[:, 1:]).mean() - rate**2) < 4 * (rate**2 / zero.size) ** 0.5


def test_each_step_layer_and_input_drops_other_elements():
    keys, rate = jnp.arange(500, dtype=jnp.uint32), 0.2
    x = jnp.ones((500, 64))
    masks = []
    for step, layer, where in itertools.product((0, 7), (0, 1), range(4)):
        own = fold_in(fold_in(fold_in(keys, step), layer), where)
        masks.append(np.asarray(dropout(x, own, rate)) == 0)
    size = masks[0].size
    for one, other in itertools.combinations(masks, 2):
        assert abs((one & other).mean() - rate**2) < 5 * (rate**2 / size) ** 0.5


@pytest.mark.parametrize("outputs", [6, 20])  # narrower and wider than the input
def test_adapters_of_one_input_drop_the_same_elements(outputs):
    rng = np.random.default_rng(0)
    shapes = (5, 12), (outputs, 12), (3, 12), (outputs, 3), (2, 12), (outputs, 2)
    x, base, a1, b1, a2, b2 = (jnp.array(rng.normal(size=s), jnp.float32) for s in shapes)
    weights = [LoraWeight(base, a1, b1, 0.5, 0.3), LoraWeight(base, a2, b2, 2.0, 0.3), base]
    keys = jnp.arange(5, dtype=jnp.uint32)
    dropped = dropout(x, keys, 0.3)
    want = [x @ base.T + 0.5 * (dropped @ a1.T) @ b1.T, x @ base.T + 2 * (dropped @ a2.T) @ b2.T]
    got = dots(x, weights, keys)
    np.testing.assert_allclose(got, [*want, x @ base.T], atol=1e-5)
    for one, w in zip(got, weights, strict=True):
        np.testing.assert_allclose(dot(x, w, keys), one, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"targets": "nothing"}, "matches no module; there are: .*self_attn.q_proj"),
        ({"targets": "["}, "not a regular expression"),
        ({"targets": ".*norm"}, "is no linear layer"),
        ({"rank": 0}, "at least 1"),
        ({"dropout": 1.0}, "must lie in"),
    ],
)
def test_mistakes_are_named(model, settings, says):
    with pytest.raises(LcoError, match=says):
        lora.target_paths(model[1], lora.LoraConfig(**settings))
