"""Measures of alignment equal independent computations; what is not defined is named."""

import json
import re

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import NearestNeighbors

from lco_jax import LcoError, OmniEmbedder, analyze
from lco_jax.analysis import measures
from lco_jax.analysis.measures import Side, measure_layers
from lco_jax.analysis.pairs import draw_pairs
from lco_jax.analysis.token_cost import token_cost
from lco_jax.checkpoint.hf import open_checkpoint
from lco_jax.checkpoint.peft import write_peft
from lco_jax.checkpoint.shapes import abstract_params
from lco_jax.core import lora
from lco_jax.data.sources import JsonlSource

K, N = 7, 45


@pytest.fixture(scope="module")
def states():
    """Two sides of other sizes that have something in common."""
    rng = np.random.default_rng(0)
    common = rng.normal(size=(N, 12))
    a = common @ rng.normal(size=(12, 40)) + rng.normal(size=(N, 40)) + 1.5
    b = common @ rng.normal(size=(12, 31)) + 2 * rng.normal(size=(N, 31)) - 0.5
    return a, b


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def neighbours(x):
    found = (
        NearestNeighbors(n_neighbors=K, metric="cosine").fit(x).kneighbors(return_distance=False)
    )
    return [set(row.tolist()) for row in found]


def hsic(x, y):
    """Equation 5 of Song et al. 2012, as it stands."""
    n, one = len(x), np.ones(len(x))
    x, y = x - np.diag(np.diag(x)), y - np.diag(np.diag(y))
    terms = (
        np.trace(x @ y)
        + one @ x @ one * (one @ y @ one) / ((n - 1) * (n - 2))
        - 2 / (n - 2) * (one @ x @ y @ one)
    )
    return terms / (n * (n - 3))


def by_definition(a, b):
    near_a, near_b = neighbours(a), neighbours(b)
    centre = np.eye(N) - 1 / N
    kernels = [centre @ unit(x) @ unit(x).T @ centre for x in (a, b)]
    cosines = [cosine_similarity(x) for x in (a, b)]
    own = [
        np.array([[j in near[i] for j in range(N)] for i in range(N)]) for near in (near_a, near_b)
    ]
    both = own[0] & own[1]
    local = [np.where(both, c, 0.0) for c in cosines]
    alone = [np.where(mine, c, 0.0) for mine, c in zip(own, cosines, strict=True)]
    bases = []
    for x in (a, b):
        columns = unit(x) - unit(x).mean(axis=0)
        left, values, _ = np.linalg.svd(columns / columns.std(axis=0), full_matrices=False)
        bases.append(left[:, :10] * values[:10])
    correlations = canonical_correlations(*bases)
    return {
        "mutual_knn": np.mean([len(near_a[i] & near_b[i]) / K for i in range(N)]),
        "cycle_knn": np.mean([any(i in near_a[j] for j in near_b[i]) for i in range(N)]),
        "cka": np.sum(kernels[0] * kernels[1])
        / np.sqrt(np.sum(kernels[0] ** 2) * np.sum(kernels[1] ** 2)),
        "unbiased_cka": hsic(*kernels)
        / np.sqrt(hsic(kernels[0], kernels[0]) * hsic(kernels[1], kernels[1])),
        "cknna": hsic(*local) / np.sqrt(hsic(alone[0], alone[0]) * hsic(alone[1], alone[1])),
        "svcca": correlations.mean(),
    }


def canonical_correlations(x, y):
    """By the generalised eigenvalue problem of the covariances."""
    xx, yy, xy = x.T @ x, y.T @ y, x.T @ y
    return np.sqrt(
        np.linalg.eigvals(np.linalg.solve(xx, xy) @ np.linalg.solve(yy, xy.T)).real.clip(0, 1)
    )


def test_measures_equal_their_definitions(states):
    a, b = states
    found = {
        measure.__name__: measure(Side(a, "a", K), Side(b, "b", K))
        for measure in measures.ALIGNMENT
    }
    wanted = by_definition(a, b)
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert abs(value - wanted[name]) < 1e-6, name
    cosines = cosine_similarity(a)
    mean = cosines[~np.eye(N, dtype=bool)].mean()
    assert abs(measures.anisotropy(Side(a, "a", K)) - mean) < 1e-6
    other = a[:, ::-1] + 1
    gap = measures.modality_gap(Side(a, "a", K), Side(other, "b", K))
    assert (
        abs(gap - np.sqrt(np.square(unit(a).mean(axis=0) - unit(other).mean(axis=0)).sum())) < 1e-6
    )


def test_a_side_is_aligned_with_itself_turned_and_scaled(states):
    a, _ = states
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(40, 40)))[0]
    turned = 3 * a @ turn
    for measure in measures.ALIGNMENT:
        if measure not in (
            measures.svcca,
            measures.cycle_knn,
        ):  # columns are standardised; neighbours are not mutual
            assert abs(measure(Side(a, "a", K), Side(turned, "b", K)) - 1) < 1e-6, measure.__name__


def test_what_is_not_defined_is_told(states):
    a, b = states[0], states[0][::-1]
    constant, twins = np.ones_like(a), a.copy()
    twins[5] = twins[9]
    layers = measure_layers(
        np.stack([constant, twins, a]), np.stack([b, b, b]), ("image", "text"), K
    )
    json.dumps(layers, allow_nan=False)
    gaps = {(gap["layer"], gap["measure"]): gap["reason"] for gap in layers["undefined"]}
    assert "image states are all the same" in gaps[0, "cka"]
    assert "2 of the image states equal another" in gaps[1, "mutual_knn"]
    assert layers["cka"][0] is None
    assert layers["cka"][1] is not None
    assert all(layer < 2 for layer, _ in gaps)
    with pytest.raises(LcoError, match="4 pairs and 7 neighbours"):
        Side(a[:4], "image", K)
    with pytest.raises(LcoError, match="zero or not finite"):
        _ = Side(np.zeros_like(a), "image", K).unit


def test_the_cost_of_a_token_and_its_interval():
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 9, 400)
    before = rng.normal(3, 0.5, 400) * counts
    after = before + rng.normal(0.1, 0.2, 400) * counts
    cost = token_cost({"before": (before, counts), "after": (after, counts)}, seed=0)
    assert cost["before"]["nats_per_token"] == pytest.approx(before.sum() / counts.sum())
    difference = cost["difference"]
    assert difference["nats_per_token"] == pytest.approx((after - before).sum() / counts.sum())
    mean = difference["nats_per_token"]
    error = (
        np.sqrt((((after - before) - mean * counts) ** 2).sum()) / counts.sum()
    )  # of a ratio, by the delta method
    assert difference["low"] == pytest.approx(mean - 1.96 * error, abs=0.2 * error)
    assert difference["high"] == pytest.approx(mean + 1.96 * error, abs=0.2 * error)
    json.dumps(token_cost({"before": (before + 1000 * counts, counts)}, seed=0), allow_nan=False)
    with pytest.raises(LcoError, match="1 of 400 captions after are not finite"):
        token_cost(
            {
                "before": (before, counts),
                "after": (np.where(np.arange(400) == 7, np.inf, after), counts),
            },
            seed=0,
        )


def write_pairs(folder, count):
    rng = np.random.default_rng(0)
    with open(folder / "pairs.jsonl", "w") as file:
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (56, 56, 3), dtype=np.uint8)).save(
                folder / f"{i}.png"
            )
            record = {
                "anchor": {"image_path": f"{i}.png", "text": ""},
                "positive": {"text": f"Noise, number {i}."},
            }
            file.write(json.dumps(record) + "\n")
    return folder / "pairs.jsonl"


@pytest.fixture
def adapter(tmp_path, cache):
    """One that moves every layer."""
    config, rng = lora.LoraConfig(rank=4, alpha=8), np.random.default_rng(0)
    tree = lora.init(
        jax.random.key(0), abstract_params(open_checkpoint("builtin:tiny").config), config
    )
    tree = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), tree)
    write_peft(tmp_path / "adapter", tree, config, "builtin:tiny")
    return tmp_path / "adapter"


@pytest.mark.slow
def test_from_pairs_to_pictures(tmp_path, run_command, adapter):
    """Before and after; every number is that of the model's own states."""
    data = write_pairs(tmp_path, 16)
    where = (f"--input={data}", f"--adapter={adapter}", f"--output={tmp_path / 'out'}")
    code, out, err = run_command(analyze, "--k=3", *where)
    assert code == 0, err
    assert "16 pairs of image and text" in out
    found = json.loads((tmp_path / "out" / "analysis.json").read_text(), parse_constant=pytest.fail)
    model = OmniEmbedder.from_pretrained("builtin:tiny", adapter)
    pairs = draw_pairs(JsonlSource(data), "", "", 16, seed=0)
    wanted = measure_layers(
        model.encode_layers(pairs.a), model.encode_layers(pairs.b), pairs.names, 3
    )
    for measure in measures.ALIGNMENT:
        name = measure.__name__
        assert (
            found["before"][name][0] is found["after"][name][0] is None
        )  # the last token, which is always the same
        assert found["after"][name][1:] == pytest.approx(wanted[name][1:], abs=1e-6)
        assert found["before"][name][1:] != found["after"][name][1:]
    cost = found["generator"]
    change = cost["after"]["nats_per_token"] - cost["before"]["nats_per_token"]
    assert cost["difference"]["nats_per_token"] == pytest.approx(change)
    assert cost["difference"]["low"] < change < cost["difference"]["high"]
    for name in ("anisotropy", "alignment", "gap", "space", "generator"):
        assert Image.open(tmp_path / "out" / f"{name}.png").size[0] > 500


def test_what_no_model_hears_is_told_before_it_is_loaded(tmp_path, run_command):
    records = {"pairs": [{"anchor": f"text {i}", "positive": f"other {i}"} for i in range(12)]}
    records["captions"] = [{"anchor": {"audio_path": "a.wav"}, "positive": "a bark"}]
    (tmp_path / "a.wav").touch()
    for name, lines in records.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = [
        f"--{flag}={tmp_path / name}.jsonl"
        for flag, name in (("input", "pairs"), ("captions", "captions"))
    ]
    code, _, err = run_command(analyze, *flags, f"--output={tmp_path / 'out'}")
    assert code == 2
    assert re.search("--captions=.* holds audio, and builtin:tiny takes text, image, video", err), (
        err
    )


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--k=1",), "--k=1: it must be at least 2"),
        (("--limit=5",), "--limit=5: it must be at least 12"),
        ((), "has 3 pairs of image and text .*; --k=10 takes at least 12"),
        (("--b=audio",), "has 0 pairs of image and audio"),
    ],
)
def test_mistakes_are_told_in_a_sentence(tmp_path, run_command, args, says):
    code, _, err = run_command(
        analyze, f"--input={write_pairs(tmp_path, 3)}", *args, f"--output={tmp_path / 'out'}"
    )
    assert code == 2
    assert re.search(says, err), err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
