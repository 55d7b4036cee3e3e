"""`lco_jax.convert soup`: averages of adapters and of models."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import peft
import pytest
import reference
import torch
from safetensors.numpy import load_file, save_file
from test_export import load, tokens_of

from lco_jax import LcoError, OmniEmbedder, convert
from lco_jax.checkpoint import soup
from lco_jax.checkpoint.export import export_merged
from lco_jax.checkpoint.hf import open_checkpoint
from lco_jax.checkpoint.peft import read_peft, write_peft
from lco_jax.checkpoint.shapes import abstract_params
from lco_jax.core import lora
from lco_jax.evaluation import local_tasks

ROOT = Path(__file__).parents[1]
WEIGHTS = [0.5, 0.2, 0.3]
# ranks, scales and targets all differ; the last adapts the first layer alone
CONFIGS = [
    lora.LoraConfig(rank=4, alpha=8),
    lora.LoraConfig(rank=2, alpha=3, use_rslora=True, targets=r"layers\.self_attn\.\w+_proj"),
    lora.LoraConfig(rank=3, alpha=1, targets=r"layers\.(self_attn\.q|mlp\.down)_proj"),
]


def draw_adapter(path, config, seed, layers=None, size=0.1):
    adapters = lora.init(jax.random.key(0), abstract_params(open_checkpoint(path).config), config)
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: (size * rng.normal(size=x.shape)).astype(np.float32)[:layers], adapters
    )


@pytest.fixture(scope="module")
def ingredients(cases, tmp_path_factory):
    """Folders of three adapters of the vl case."""
    out = tmp_path_factory.mktemp("soup")
    for i, config in enumerate(CONFIGS):
        write_peft(
            out / str(i),
            draw_adapter(cases["vl"].path, config, i, 1 if i == 2 else None),
            config,
            "base",
        )
    return [out / str(i) for i in range(3)]


def deltas(adapter):
    """{(layer, module): scale · B A}, dense, float64."""
    tree, config = adapter
    found = soup.layer_tensors(tree)
    return {
        (layer, module): config.scale * b.astype(np.float64) @ a for layer, module, a, b in found
    }


def test_an_average_of_adapters_is_that_of_their_deltas(cases, ingredients):
    adapters = soup.read_adapters(ingredients, open_checkpoint(cases["vl"].path))
    average = soup.average_adapters(adapters, WEIGHTS)
    assert average[1].rank == 4 + 2 + 3
    parts, whole = [deltas(adapter) for adapter in adapters], deltas(average)
    assert whole.keys() == parts[0].keys() > parts[1].keys()
    for key, delta in whole.items():
        want = sum(weight * part.get(key, 0) for weight, part in zip(WEIGHTS, parts, strict=True))
        assert np.abs(want).max() > 1e-3
        assert np.abs(delta - want).max() < 1e-6


@pytest.mark.parametrize("rank", [1, 5, 9, 12])
def test_a_lower_rank_is_numpys_svd_of_the_dense_delta(cases, ingredients, rank):
    adapters = soup.read_adapters(ingredients, open_checkpoint(cases["vl"].path))
    average = soup.average_adapters(adapters, WEIGHTS)
    reduced, spectra = soup.reduce_rank(average, rank)
    errors = soup.rank_errors(spectra, rank)
    cut, square_errors, squares = deltas(reduced), [], []
    for (layer, module), delta in deltas(average).items():
        left, values, right = np.linalg.svd(delta, full_matrices=False)
        np.testing.assert_allclose(spectra[f"{layer}.{module}"], values[:9], atol=1e-6 * values[0])
        best = (left[:, :rank] * values[:rank]) @ right[:rank]
        assert np.abs(cut[layer, module] - best).max() < 1e-6
        squares.append((delta**2).sum())
        square_errors.append(((delta - best) ** 2).sum())
        error = np.sqrt(square_errors[-1] / squares[-1])
        assert abs(errors["matrices"][f"{layer}.{module}"] - error) < 1e-6
    assert abs(errors["overall"] - np.sqrt(sum(square_errors) / sum(squares))) < 1e-6
    assert errors["max"] == max(errors["matrices"].values())
    assert (errors["overall"] > 0.05) == (rank < 9)
    assert reduced[1].rank == rank


def test_weights():
    assert soup.normalized_weights(None, 4) == [0.25] * 4
    assert soup.normalized_weights([0.5, 0.25, 0.25], 3) == [0.5, 0.25, 0.25]
    assert soup.normalized_weights([2, 1, 1], 3) == [0.5, 0.25, 0.25]  # divided by their sum
    for weights, says in (
        ([1], "1 numbers for 2"),
        ([1, -1], "none may be negative"),
        ([0, 0], "not all zero"),
    ):
        with pytest.raises(LcoError, match=says):
            soup.normalized_weights(weights, 2)


def test_the_greedy_soup_keeps_what_does_not_lower_the_score():
    """Scores of subsets by hand: 2 is best; 0 lowers, 3 changes nothing, 1 helps."""
    alone, gain = [0.6, 0.5, 0.7, 0.55], {0: -0.1, 1: 0.05, 3: 0.0}
    asked = []

    def score(chosen):
        asked.append(chosen)
        return alone[chosen[0]] if len(chosen) == 1 else 0.7 + sum(gain[i] for i in chosen[1:])

    kept, steps = soup.greedy(4, score)
    assert kept == [2, 3, 1]
    assert asked == [[0], [1], [2], [3], [2, 0], [2, 3], [2, 3, 1]]
    assert [(step["index"], step["kept"]) for step in steps] == [
        (2, True),
        (0, False),
        (3, True),
        (1, True),
    ]
    assert soup.greedy(1, lambda chosen: 0.0)[0] == [0]


def test_models_that_do_not_agree_are_named(cases, tmp_path):
    path = cases["vl"].path
    with pytest.raises(LcoError, match=r"differ in config\.json"):
        soup.average_models([str(path), str(cases["vl_tied"].path)], [0.5, 0.5])
    for name in ("other", "words"):
        export_merged(path, tmp_path / name, dtype="float32")
    file = tmp_path / "words" / "tokenizer_config.json"
    (tmp_path / "words" / "chat_template.jinja").write_text(
        "another: {{ messages[0].content[0].text }}"
    )
    assert file.exists()
    with pytest.raises(LcoError, match="differ in tokenizer: the chat template"):
        soup.average_models([str(path), str(tmp_path / "words")], [0.5, 0.5])
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    key = next(key for key in tensors if key.endswith("norm.weight"))
    tensors[key] = tensors[key].astype(np.int32)
    save_file(tensors, tmp_path / "other" / "model.safetensors")
    with pytest.raises(LcoError, match=rf"differ in tensors: {key} is .*int32"):
        soup.average_models([str(path), str(tmp_path / "other")], [0.5, 0.5])


def test_an_adapter_of_another_model_does_not_fit(ingredients):
    with pytest.raises(LcoError, match=r"0: layers\.\S+ has shape .* does not fit"):
        soup.read_adapters(ingredients, open_checkpoint("builtin:tiny"))


@pytest.mark.slow
def test_a_soup_of_adapters_is_the_soup_of_their_merged_models(
    cases, ingredients, tmp_path, monkeypatch
):
    """Weights, embeddings, and what peft makes of it."""
    path = cases["vl"].path
    for i, folder in enumerate(ingredients):
        tree, config = read_peft(folder)
        export_merged(path, tmp_path / f"m{i}", {"decoder": tree}, config, "float32")
    weights = [*map(str, (5, 2, 3))]
    command = [
        sys.executable,
        "-m",
        "lco_jax.convert",
        "soup",
        "--dtype=float32",
        "--weights",
        *weights,
    ]
    models = [str(tmp_path / f"m{i}") for i in range(3)]
    extra = [f"--model={path}", "--adapters", *ingredients, "--merge", f"--out={tmp_path / 'a'}"]
    subprocess.run([*command, *map(str, extra)], cwd=ROOT, check=True, timeout=120)
    extra = ["--models", *models, f"--out={tmp_path / 'm'}", "--max-shard-size=0.0002"]
    monkeypatch.setattr(sys, "argv", [*command[2:], *extra])
    assert convert.main() == 0
    ours, theirs = (open_checkpoint(tmp_path / name).tensors for name in ("a-merged", "m"))
    assert set(ours) == set(theirs)
    assert max(np.abs(ours.read(key) - theirs.read(key)).max() for key in ours) < 1e-6
    assert json.loads((tmp_path / "a" / "soup.json").read_text())["adapters"][0]["weight"] == 0.5
    assert f"| {tmp_path.name}/m1 | 0.2 |" in (tmp_path / "m" / "README.md").read_text()
    for name in ("a", "a-merged"):
        assert "A soup of 3 adapters" in (tmp_path / name / "README.md").read_text()
    embedder = OmniEmbedder.from_pretrained(path, adapter=tmp_path / "a")
    got, want = (
        embedder.encode(reference.TEXTS),
        OmniEmbedder.from_pretrained(tmp_path / "m").encode(reference.TEXTS),
    )
    assert np.abs(got - want).max() < 1e-5
    tuned = peft.PeftModel.from_pretrained(
        load("vl", path, dtype=torch.float32), tmp_path / "a"
    ).eval()
    peer = reference.embed(tuned, tokens_of(embedder.tokenizer)).detach().numpy()
    assert np.abs(peer - want).max() < 1e-5


@pytest.mark.slow
def test_a_greedy_soup_from_the_command_line(tmp_path, monkeypatch, capsys):
    """The soup leaves out an adapter that ruins the model and keeps a good one that comes twice."""
    for i, size in enumerate((0.02, 0.5, 0.02)):
        config = lora.LoraConfig(rank=4, alpha=4)
        write_peft(
            tmp_path / str(i),
            draw_adapter("builtin:tiny", config, i % 2, size=size),
            config,
            "builtin:tiny",
        )
    lines = (ROOT / "lco_jax/assets/triplets_heldout.jsonl").read_text().splitlines()[:60]
    (tmp_path / "dev.jsonl").write_text("\n".join(lines))
    adapters = [str(tmp_path / str(i)) for i in range(3)]
    command = [
        "soup",
        "--model=builtin:tiny",
        "--adapters",
        *adapters,
        "--greedy",
        "--kind=retrieval",
        "--rank=3",
    ]
    options = [
        f"--validate={tmp_path / 'dev.jsonl'}",
        "--dtype=float32",
        f"--out={tmp_path / 'out'}",
    ]
    monkeypatch.setattr(sys, "argv", ["convert", *command, *options])
    assert convert.main() == 0
    report = json.loads((tmp_path / "out" / "soup.json").read_text())
    steps = {step["adapter"]: step for step in report["greedy"]}
    assert not steps[adapters[1]]["kept"]
    assert steps[adapters[1]]["alone"] < min(steps[adapters[i]]["alone"] for i in (0, 2))
    weights = [part["weight"] for part in report["adapters"]]
    assert weights == [0.5, 0.0, 0.5]
    assert report["rank"] == 3
    assert 0.1 < report["relative_error"]["overall"] < report["relative_error"]["max"] < 1
    assert (tmp_path / "out" / "spectrum.png").exists()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "A soup of 2 adapters" in card
    assert f"| {tmp_path.name}/2 | 0.5 |" in card
    assert f"{tmp_path.name}/1" not in card
    assert f"ndcg_at_10 on dev.jsonl, which is {steps[adapters[2]]['together']:.4f}" in card
    out = capsys.readouterr().out
    assert "relative error of the delta" in out
    alone = OmniEmbedder.from_pretrained("builtin:tiny", adapter=adapters[0])
    again = local_tasks.evaluate(alone.encode, "retrieval", tmp_path / "dev.jsonl").numbers[
        "ndcg_at_10"
    ]
    # scored as the adapter is when loaded as any other
    assert abs(again - steps[adapters[0]]["alone"]) < 1e-6


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--model=a", "--adapter=b"], "a soup is of"),
        (["--model=a", "--adapters", "b", "--models", "c"], "a soup is of"),
        (["--models", "a", "b", "--rank=3"], "go with --adapters"),
        (["--model=a", "--adapters", "b", "--rank=0"], "--rank is 0"),
        (["--model=a", "--adapters", "b", "--greedy"], "--greedy needs --validate and --kind"),
        (["--model=a", "--adapters", "b", "c", "--weights", "1"], "1 numbers for 2"),
    ],
)
def test_flags_that_do_not_go_together(monkeypatch, args, says):
    monkeypatch.setattr(sys, "argv", ["convert", "soup", "--out=x", *args])
    with pytest.raises(LcoError, match=says):
        convert.main()
    monkeypatch.setattr(sys, "argv", ["convert", "--out=x", "--model=a", "--weights", "1"])
    with pytest.raises(LcoError, match="--weights goes with soup"):
        convert.main()
