"""Frozen matrices in 8 or 4 bits: the numbers are those of bitsandbytes.

They go through `dot`, a scan and a mesh, come from a checkpoint, and stand under LoRA.
"""

import bitsandbytes.functional as bnb
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict
from safetensors.numpy import load_file

from configs.tiny import get_config
from lco_jax import LcoError, OmniEmbedder, make_mesh
from lco_jax.checkpoint import builtin
from lco_jax.checkpoint.hf import load_decoder, load_model, open_checkpoint
from lco_jax.checkpoint.peft import write_peft
from lco_jax.core import lora
from lco_jax.core.quantize import (
    DYNAMIC,
    KINDS,
    NF4,
    Int8Weight,
    Nf4Weight,
    QuantizedWeight,
    _look_up_dynamic,
    _select_dynamic,
    dequantize,
    quantize,
)
from lco_jax.core.sharding import shardings
from lco_jax.core.weights import LoraWeight, dot
from lco_jax.data import pipeline
from lco_jax.data.processor import Processor
from lco_jax.data.sources import JsonlSource
from lco_jax.models.model import Model
from lco_jax.train import train
from lco_jax.training.objective import LossConfig
from lco_jax.training.optimizer import OptimizerConfig, make_optimizer
from lco_jax.training.run import check_config, check_same_run
from lco_jax.training.state import init_state, state_shardings
from lco_jax.training.step import make_train_step

EXACT = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
DTYPES = {"float32": (jnp.float32, torch.float32), "bfloat16": (jnp.bfloat16, torch.bfloat16)}


def draw(*shape, seed=0):
    return 0.02 * np.random.default_rng(seed).standard_normal(shape, np.float32)


def of_bitsandbytes(w):
    codes, state = bnb.quantize_4bit(w, blocksize=64, compress_statistics=True, quant_type="nf4")
    return codes.numpy(), state, bnb.dequantize_4bit(codes, state).float().numpy()


@pytest.mark.parametrize("dtype", DTYPES)
# rows of 448 = 7 blocks and 1088 = 17, in which groups straddle rows
@pytest.mark.parametrize("shape", [(1, 64), (96, 192), (40, 448), (300, 1088)])
def test_nf4_is_bitsandbytes(monkeypatch, shape, dtype):
    values = draw(*shape)
    if shape[0] > 1:
        values[3, :128] = 0  # blocks of zeros
        values[5, 7], values[-1, -1] = 4.0, -9.0  # outliers
    ours, theirs = DTYPES[dtype]
    leaf = jax.jit(lambda w: quantize(w, "nf4"))(jnp.asarray(values, ours))
    source = torch.tensor(values).to(theirs)
    _, state, _ = of_bitsandbytes(source)
    # bitsandbytes' CPU kernel looks absmaxes up in a coarse table. So it may take the second
    # nearest of two that are almost as near.
    apart = np.abs(DYNAMIC[np.asarray(leaf.absmax).ravel()] - DYNAMIC[state.absmax.numpy()])
    assert shape[0] == 1 or (apart.max() < 0.0145 and (apart > 0).mean() < 0.05)

    def nearest(x, blocksize):  # what its CUDA kernel and its torch kernel do
        code = bnb.create_dynamic_map()
        out, absmax = torch.ops.bitsandbytes.quantize_blockwise.default.redispatch(
            EXACT, x, code, blocksize
        )
        return out, bnb.QuantState(absmax=absmax, code=code, blocksize=blocksize, dtype=x.dtype)

    monkeypatch.setattr(bnb, "quantize_blockwise", nearest)
    codes, state, want = of_bitsandbytes(source)
    pairs = np.asarray(leaf.codes).reshape(-1, 1, 32)  # a block's first half is in the high bits
    ours_in_order = np.concatenate([pairs >> 4, pairs & 15], axis=1)
    neighbours = codes.reshape(-1, 1)
    theirs_in_order = np.concatenate([neighbours >> 4, neighbours & 15], axis=1)
    np.testing.assert_array_equal(ours_in_order.ravel(), theirs_in_order.ravel())
    np.testing.assert_array_equal(np.asarray(leaf.absmax).ravel(), state.absmax.numpy())
    rows, blocks = leaf.absmax.shape  # each row has the absmaxes of its groups: one, two or a few
    groups = np.arange(rows) * blocks // 256 + np.arange(leaf.absmax2.size // rows)[:, None]
    theirs_of_rows = state.state2.absmax.numpy()[np.minimum(groups, (rows * blocks - 1) // 256)]
    np.testing.assert_allclose(leaf.absmax2, theirs_of_rows.ravel(), rtol=1e-6, atol=1e-7)
    got = jax.jit(lambda leaf: dequantize(leaf, ours))(leaf)
    assert got.dtype == ours
    np.testing.assert_allclose(np.asarray(got, np.float32), want, rtol=1e-6, atol=1e-8)
    assert shape[0] == 1 or (np.asarray(got)[3, :128] == 0).all()


# groups of blocks that straddle rows, or divide them
@pytest.mark.parametrize("rows", [(24, 448), (3, 40 * 1024)])
def test_a_matrix_is_its_tables_looked_up(rows):
    """To the bit: every code of both tables, and every group's scale at its blocks."""
    shape = (rows[0], rows[1] // 64)
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (rows[0], rows[1] // 2), np.uint8)
    absmax = rng.permutation(
        np.resize(np.arange(256, dtype=np.uint8), shape[0] * shape[1])
    ).reshape(shape)
    group = np.arange(absmax.size).reshape(shape) // 256
    scales = rng.random(group.max() + 1, np.float32)
    scale = scales[group]
    columns = np.unique(group - group[:, :1])
    of_rows = scales[np.minimum(group[:, 0] + columns[:, None], len(scales) - 1)].ravel()
    leaf = Nf4Weight(*(jnp.asarray(x) for x in (codes, absmax, of_rows, np.float32(0.25))))
    exact = (
        DYNAMIC[absmax].astype(np.float64) * scale
    )  # and then rounded once or twice: a compiler may fuse the sum
    for wide in (exact.astype(np.float32) + np.float32(0.25), (exact + 0.25).astype(np.float32)):
        pairs = codes.reshape(*shape, 1, 32)
        values = NF4[np.concatenate([pairs >> 4, pairs & 15], axis=2).reshape(*shape, 64)]
        want = (values * wide[..., None]).reshape(rows)
        if np.array_equal(jax.jit(lambda leaf: dequantize(leaf, jnp.float32))(leaf), want):
            return
    raise AssertionError("neither rounding of the absmax gives the matrix")


def test_what_tpus_do_in_the_place_of_a_gather_gives_the_same_numbers():
    codes = jnp.arange(256, dtype=jnp.uint8)
    np.testing.assert_array_equal(_select_dynamic(codes), DYNAMIC)
    np.testing.assert_array_equal(_look_up_dynamic(codes), DYNAMIC)
    leaf = quantize(jnp.asarray(draw(2, 24, 448)), "nf4")
    program = (
        jax.jit(lambda leaf: dequantize(leaf, jnp.bfloat16))
        .trace(leaf)
        .lower(lowering_platforms=("tpu",))
    )
    assert "gather" not in program.as_text()


def test_sizes():
    leaf = quantize(jnp.asarray(draw(2, 512, 1024)), "nf4")
    assert leaf.shape == (2, 512, 1024)
    shapes = [(x.shape, x.dtype.name) for x in jax.tree.leaves(leaf)]
    assert shapes == [
        ((2, 512, 512), "uint8"),
        ((2, 512, 16), "uint8"),
        ((2, 512), "float32"),
        ((2,), "float32"),
    ]
    assert sum(x.nbytes for x in jax.tree.leaves(leaf)) == 2 * (
        512 * 1024 // 2 + 512 * 16 + 512 * 4 + 4
    )  # 4.156 bits


def test_int8_errs_by_half_a_step():
    w = draw(3, 24, 50)
    w[0, 0], w[1, 2, 3] = 0, 7.0
    leaf = quantize(jnp.asarray(w), "int8")
    assert leaf.values.dtype == jnp.int8
    assert leaf.scales.shape == (3, 24)
    error = np.abs(np.asarray(dequantize(leaf, jnp.float32)) - w)
    assert (error <= np.abs(w).max(-1, keepdims=True) / 254 * 1.0001).all()
    assert (
        np.abs(np.asarray(leaf.values)).max(-1) == np.where(np.abs(w).max(-1) > 0, 127, 0)
    ).all()


@pytest.mark.parametrize("kind", KINDS)
def test_dot_and_its_gradients(kind):
    """Bare and under LoRA: what the dequantised matrix gives."""
    x, a, b = (
        jnp.asarray(100 * draw(*s, seed=i)) for i, s in enumerate([(5, 7, 128), (4, 128), (48, 4)])
    )
    leaf = quantize(jnp.asarray(draw(48, 128)), kind)
    plain = dequantize(leaf, jnp.float32)
    want = x @ plain.T
    np.testing.assert_allclose(
        jax.jit(dot)(x, leaf), want, rtol=1e-6, atol=1e-6 * np.abs(want).max()
    )
    assert dot(x.astype(jnp.bfloat16), leaf).dtype == jnp.bfloat16
    assert np.abs(dot(x.astype(jnp.bfloat16), leaf) - want).max() < 0.02 * np.abs(want).max()

    def loss(x, a, b, base):
        return jnp.sum(jnp.sin(dot(x, LoraWeight(base, a, b, 0.5, 0.0))))

    grads = [jax.jit(jax.grad(loss, (0, 1, 2)))(x, a, b, base) for base in (leaf, plain)]
    for got, wanted in zip(*grads, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("kind", KINDS)
def test_a_scan_over_layers_keeps_no_wide_matrix_for_its_backward_pass(kind):
    stack, x = jnp.asarray(10 * draw(3, 128, 128)), jnp.asarray(draw(2, 128))
    leaf = quantize(stack, kind)
    for i in range(3):  # stacked at once or layer by layer: the same
        one = jax.tree.map(lambda x, i=i: x[i], leaf)
        jax.tree.map(np.testing.assert_array_equal, one, quantize(stack[i], kind))
    run = jax.jit(
        lambda x, stack: jax.lax.scan(lambda x, w: (jnp.tanh(dot(x, w)), None), x, stack)[0]
    )
    (got, back), (want, back_plain) = (
        jax.vjp(lambda x, stack=stack: run(x, stack), x)
        for stack in (leaf, dequantize(leaf, jnp.float32))
    )
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(back(got)[0], back_plain(got)[0], rtol=1e-5, atol=1e-5)

    def floats(tree):
        return max(x.size for x in jax.tree.leaves(tree) if x.dtype == jnp.float32)

    assert floats(back) < 128 * 128 <= floats(back_plain)


def losses(params, decoder, mesh=(1, 1, 1), steps=3):
    """Of a few steps from a fresh adapter over `params`."""
    mesh = make_mesh(*mesh, devices=jax.devices()[: int(np.prod(mesh))])
    checkpoint, config = (
        open_checkpoint("builtin:tiny"),
        lora.LoraConfig(rank=8, alpha=16, dropout=0.1),
    )
    tuned = {"decoder": lora.init(jax.random.key(0), params, config)}
    tx = make_optimizer(OptimizerConfig(learning_rate=1e-3, warmup_steps=1), steps)
    processor = Processor(checkpoint.folder)
    layout = pipeline.Layout(8, 1, processor.tokenizer.prefix)
    records, found = list(JsonlSource("assets:triplets_heldout.jsonl"))[:8], []
    with jax.set_mesh(mesh):
        places = state_shardings(tuned, tx, mesh)
        state = jax.jit(lambda a: init_state(a, tx), out_shardings=places)(tuned)
        step = make_train_step(Model(decoder, {}), tx, config, LossConfig(), 0, mesh, places)
        local = pipeline._prepare(records, layout, processor, None, 1, 0)
        batch = pipeline.global_batch(local, layout, processor.rows, mesh)
        for _ in range(steps):
            state, metrics = step(state, {"decoder": params}, batch)
            found.append(float(metrics["loss"]))
    return np.array(found)


@pytest.mark.slow
def test_a_checkpoint_in_fewer_bits_trains_as_its_numbers_do_on_any_mesh(cache):
    checkpoint = open_checkpoint("builtin:tiny")
    one, mesh = make_mesh(devices=jax.devices()[:1]), make_mesh(2, 2, 2)
    plain, at_once = (
        flatten_dict(load_decoder(checkpoint, one)[1], sep="."),
        jax.jit(quantize, static_argnums=1),
    )
    for kind, leaf_type in {"int8": Int8Weight, "nf4": Nf4Weight}.items():
        model, params = load_model(checkpoint, one, towers=(), remat="none", quantize=kind)
        params = flatten_dict(params["decoder"], sep=".")
        assert {path for path, leaf in params.items() if isinstance(leaf, leaf_type)} == {
            path for path in params if "_proj.weight" in path
        }
        for path, leaf in params.items():  # as if the whole had been quantised at once
            want = at_once(plain[path], kind) if isinstance(leaf, leaf_type) else plain[path]
            jax.tree.map(np.testing.assert_array_equal, leaf, want)
        split = load_decoder(checkpoint, mesh, quantize=kind)[1]
        jax.tree.map(np.testing.assert_array_equal, split, unflatten_dict(params, sep="."))
        places = shardings({"decoder": split}, mesh)["decoder"]
        for array, place in zip(jax.tree.leaves(split), jax.tree.leaves(places), strict=True):
            assert array.sharding.is_equivalent_to(place, array.ndim)
        up = places["layers"]["mlp"]["up_proj"]["weight"]
        assert tuple(jax.tree.leaves(up)[0].spec) == (None, "tensor", "fsdp")
    got = losses(unflatten_dict(params, sep="."), model.decoder)  # of nf4, the last
    widen = jax.jit(lambda leaf: dequantize(leaf, jnp.float32))
    wide = {path: widen(x) if isinstance(x, Nf4Weight) else x for path, x in params.items()}
    np.testing.assert_allclose(got, losses(unflatten_dict(wide, sep="."), model.decoder), rtol=1e-5)
    assert got[-1] < got[0] - 0.05
    np.testing.assert_allclose(losses(split, model.decoder, (2, 2, 2)), got, rtol=1e-5)


@pytest.mark.slow
def test_the_main_job_trains_over_nf4_and_merges_into_the_original(cache, tmp_path):
    config: ConfigDict = get_config()
    config.model.quantize, config.train.steps, config.train.batch_size, config.eval.path = (
        "nf4",
        2,
        4,
        "",
    )
    config.lora.rank, config.optimizer.warmup_steps = 4, 1
    check_config(config)
    train(config, tmp_path)
    merged, source = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", builtin.build())
    )
    update = (
        merged["model.layers.0.mlp.up_proj.weight"] - source["model.layers.0.mlp.up_proj.weight"]
    )
    assert update.any()
    assert np.linalg.matrix_rank(update, tol=1e-5) <= 4  # NF4's error has full rank
    config.model.quantize = "int8"
    with pytest.raises(LcoError, match=r"config\.model\.quantize = 'nf4'"):
        check_same_run(tmp_path, config, 2)


@pytest.mark.parametrize("kind", ["int8", pytest.param("nf4", marks=pytest.mark.slow)])
def test_an_embedder_over_a_quantised_base_with_an_adapter(cache, tmp_path, kind):
    """The adapter beside quantised matrices gives what it gives merged into dequantised ones."""
    mesh, config = (
        make_mesh(1, 2, 2, devices=jax.devices()[:4]),
        lora.LoraConfig(rank=4, alpha=8, dropout=0.1),
    )
    params = load_decoder(open_checkpoint("builtin:tiny"), mesh)[1]
    shapes = lora.init(jax.random.key(0), params, config)
    adapters = jax.tree.map(
        lambda x: 0.1 * np.random.default_rng(0).normal(size=x.shape).astype(np.float32), shapes
    )
    write_peft(tmp_path / "adapter", adapters, config, "builtin:tiny")
    embedder = OmniEmbedder.from_pretrained(
        "builtin:tiny", tmp_path / "adapter", mesh=mesh, quantize=kind
    )
    got = embedder.encode(["one text", "and another one"])
    bare = OmniEmbedder.from_pretrained("builtin:tiny", mesh=mesh, quantize=kind)

    def is_quantized(leaf):
        return isinstance(leaf, QuantizedWeight)

    def widen(leaf):
        return dequantize(leaf, jnp.float32) if is_quantized(leaf) else leaf

    wide = jax.tree.map(widen, bare.params, is_leaf=is_quantized)
    bare.params = {**wide, "decoder": lora.merge(wide["decoder"], adapters, config)}
    assert np.abs(got - bare.encode(["one text", "and another one"])).max() < 1e-5
    exact = OmniEmbedder.from_pretrained("builtin:tiny", tmp_path / "adapter", mesh=mesh)
    assert 1e-4 < np.abs(got - exact.encode(["one text", "and another one"])).max() < 0.2


def test_mistakes_are_named(cases):
    mesh = make_mesh(devices=jax.devices()[:1])
    with pytest.raises(LcoError, match="quantize is 'int4'; it is one of: int8, nf4"):
        load_decoder(open_checkpoint("builtin:tiny"), mesh, quantize="int4")
    with pytest.raises(
        LcoError,
        match=r"layers\.\w+\.\w+_proj\.weight has rows of \d+, and nf4 needs a multiple of 64",
    ):
        load_decoder(open_checkpoint(cases["vl"].path), mesh, quantize="nf4")  # hidden size 96
    params = load_decoder(open_checkpoint(cases["vl"].path), mesh, quantize="int8")[1]
    config = lora.LoraConfig(rank=2)
    assert isinstance(params["layers"]["mlp"]["up_proj"]["weight"], QuantizedWeight)
    with pytest.raises(
        LcoError, match=r"_proj\.weight is quantised, and nothing can be merged into it"
    ):
        lora.merge(params, lora.init(jax.random.key(0), params, config), config)
