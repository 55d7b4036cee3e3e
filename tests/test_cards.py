"""Model cards: what they say, and their code, run word for word."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image

from lco_jax import OmniEmbedder
from lco_jax.checkpoint.base import base_of, licence_keys
from lco_jax.checkpoint.card import About, Section, adapter_card, assembled_card, at_hub
from lco_jax.checkpoint.export import export_merged
from lco_jax.checkpoint.hf import open_checkpoint
from lco_jax.checkpoint.parts import front_matter, licence_of, parts_of
from lco_jax.checkpoint.peft import write_peft
from lco_jax.checkpoint.shapes import abstract_params
from lco_jax.core import lora
from lco_jax.core.files import write_json, written_aside
from lco_jax.training.card import about_run

ROOT = Path(__file__).parent.parent
CONFIG = lora.LoraConfig(rank=4, alpha=8)
RUN = {
    "model": {"path": "builtin:tiny", "dtype": "float32", "quantize": ""},
    "tune": {"decoder": "lora", "towers": "none"},
    "lora": {"rank": 16, "alpha": 32.0, "dropout": 0.05, "use_rslora": False, "targets": "a|b"},
    "data": {
        "sources": {
            "nli": {"kind": "parquet", "path": "owner/all-nli", "files": "train-*.parquet"},
            "mine": {"kind": "jsonl", "path": "/home/me/secret/mine.jsonl", "weight": 2},
        },
        "max_length": 64,
        "max_negatives": -1,
    },
    "train": {"batch_size": 64, "temperature": 0.03, "two_way": False, "ignore_duplicates": True},
    "optimizer": {"learning_rate": 2e-3, "schedule": "cosine"},
    "seed": 0,
    "total_steps": 100,
}
RESULTS = {
    "objective": "contrastive",
    "steps": 100,
    "records": {"nli": 277277, "mine": 5},
    "held_out": {"dev": 128, "stsb-test": 1379},
    "before": {
        "dev": {"recall_at_1": 0.25, "mrr": 0.5, "candidates": 256},
        "stsb-test": {"spearman": 0.535},
    },
    "after": {
        "dev": {"recall_at_1": 0.75, "mrr": 0.875, "candidates": 256},
        "stsb-test": {"spearman": 0.722},
    },
}


def adapters_of(path, seed=0):
    params = abstract_params(open_checkpoint(path).config)
    rng = np.random.default_rng(seed)
    tree = lora.init(jax.random.key(0), params, CONFIG)
    return jax.tree.map(lambda x: (0.1 * rng.normal(size=x.shape)).astype(np.float32), tree)


# ---- what they say


def test_a_runs_card_has_its_data_recipe_and_scores():
    about = about_run(RUN, RESULTS, step=100)
    card = adapter_card(open_checkpoint("builtin:tiny"), "builtin:tiny", about, CONFIG)
    for line in (
        "| nli | parquet | owner/all-nli (train-*.parquet) | 277,277 | by its size |",
        "| mine | jsonl | mine.jsonl | 5 | 2 |",
        "| lora.rank | 16 |",
        "| lora.targets | `a\\|b` |",
        "| optimizer.learning_rate | 0.002 |",
        "| steps | 100 of 100 |",
        "| dev | recall@1 | 128 anchors, 256 candidates | 0.250 | 0.750 |",
        "| dev | MRR | 128 anchors, 256 candidates | 0.500 | 0.875 |",
        "| stsb-test | Spearman | 1,379 pairs | 0.535 | 0.722 |",
        "| text | `⏎Summarize the above text in one word:` |",
        "| several kinds | `⏎Summarize the above in one word:` |",
        "| licence of the base | apache-2.0 |",
    ):
        assert line in card.splitlines()
    assert "/home/me" not in card
    data = ModelCard(card).data
    assert (data.library_name, data.pipeline_tag) == ("peft", "feature-extraction")
    assert (data.license, data.datasets) == ("apache-2.0", ["owner/all-nli"])
    assert {"lora", "text", "image", "arxiv:2510.11693"} <= set(data.tags)
    values = {(one.dataset_type, one.metric_type): one.metric_value for one in data.eval_results}
    assert values == {
        ("dev", "recall_at_1"): 0.75,
        ("dev", "mrr"): 0.875,
        ("stsb-test", "spearman"): 0.722,
    }


@pytest.mark.parametrize(
    ("results", "step"),
    [({}, 100), (RESULTS, 50), ({**RESULTS, "before": {}, "after": {}}, 100)],
    ids=["none yet", "of another step", "nothing held out"],
)
def test_no_figure_that_was_not_measured(results, step):
    about = about_run(RUN, results, step)
    card = adapter_card(open_checkpoint("builtin:tiny"), "builtin:tiny", about, CONFIG)
    assert "## Results" not in card
    assert ModelCard(card).data.eval_results is None
    assert f"| steps | {step} of 100 |" in card


def test_a_runs_card_has_what_was_added_to_the_loss():
    """A temperature for each modality takes the place of the one."""
    loss = {"temperatures": [0.02, 0.03, 0.04, 0.05], "matryoshka": [8, 16], "coral": 0.0}
    rows = dict(about_run({**RUN, "loss": loss}, {}, 50).sections[1].rows)
    assert rows["loss.temperatures"] == (0.02, 0.03, 0.04, 0.05)
    assert rows["loss.matryoshka"] == (8, 16)
    assert not {"train.temperature", "loss.coral"} & rows.keys()
    of_guide = {**loss, "false_negatives": "guide", "guide": "/home/me/vectors/of-mine/"}
    rows = dict(about_run({**RUN, "loss": of_guide}, {}, 50).sections[1].rows)
    assert rows["loss.guide"] == "of-mine"
    rows = dict(about_run(RUN, {}, 50).sections[1].rows)
    assert rows["train.temperature"] == 0.03
    assert rows["train.ignore_duplicates"]


def test_a_generative_runs_card_answers():
    """Also before the run has results; one of an earlier version tells its objective there."""
    results = {"steps": 100, "held_out": {"dev": 8}}
    results |= {"before": {"loss": 5.0}, "after": {"loss": 2.5}}
    told = {"objective": "generative"}
    runs = [({**RUN, **told}, {}), ({**RUN, **told}, results), (RUN, {**results, **told})]
    cards = []
    for run, found in runs:
        about = about_run(run, found, 100)
        cards.append(adapter_card(open_checkpoint("builtin:tiny"), "builtin:tiny", about, CONFIG))
        assert ModelCard(cards[-1]).data.pipeline_tag == "image-text-to-text"
    assert cards[1] == cards[2]
    card = cards[1]
    assert "| dev | loss | 8 answers | 5.000 | 2.500 |" in card
    assert "| dev |" not in cards[0]
    assert "OmniGenerator" in card
    assert "OmniEmbedder" not in card


def licence_of_base(folder, base):
    return licence_keys(folder, base, front_matter(folder), parts_of(folder))


def test_the_licence_of_a_base_comes_from_its_own_card(tmp_path, caplog):
    base = base_of("builtin:tiny")
    assert licence_of_base(tmp_path, base_of(tmp_path)) == {}
    readme = tmp_path / "README.md"
    readme.write_text(
        "---\nlicense: other\nlicense_name: qwen-research\nlicense_link: LICENSE\nlanguage: [en]\n"
        "---\n# Base\n"
    )
    on_hub = base_of("Qwen/Qwen2.5-VL-3B-Instruct")
    assert licence_of_base(tmp_path, on_hub) == {
        "license": "other",
        "license_name": "qwen-research",
        "license_link": "https://huggingface.co/Qwen/Qwen2.5-VL-3B-Instruct/blob/main/LICENSE",
    }
    readme.write_text("---\nlicense: mit\ntags: [\n---\n")
    assert licence_of(tmp_path) is None
    assert licence_of_base(tmp_path, base_of(tmp_path)) == {}
    assert "front matter is not valid YAML" in caplog.text
    readme.unlink()
    parts = {"language model": {"name": "a", "licence": "Apache-2.0"}}
    parts["vision tower"] = {"name": "fresh"}
    write_json(tmp_path / "parts.json", {**parts, "seed": 0})
    assert licence_of_base(tmp_path, base_of(tmp_path)) == {"license": "apache-2.0"}
    parts["audio tower"] = {"name": "b", "licence": "MIT"}
    write_json(tmp_path / "parts.json", parts)
    assert licence_of_base(tmp_path, base_of(tmp_path)) == {}
    assert licence_of_base(tmp_path / "none", base) == {"license": "apache-2.0"}


def test_a_card_inherits_what_is_known_of_its_base(cases, tmp_path):
    (tmp_path / "base").symlink_to(cases["vl"].path)
    folder = tmp_path / "copy"
    export_merged(tmp_path / "base", folder, dtype="float32")
    assert "not known: its files name none" in (folder / "README.md").read_text()
    text = (folder / "README.md").read_text()
    head = "---\nlicense: mit\nbase_model: owner/base\nlanguage: [en, de]\n"
    (folder / "README.md").write_text(text.replace("---\n", head, 1))
    export_merged(folder, tmp_path / "again", dtype="float32")
    data = ModelCard.load(tmp_path / "again" / "README.md").data
    assert (data.license, data.base_model, data.language) == ("mit", "owner/base", ["en", "de"])


def test_a_checkpoint_that_is_open_is_not_opened_again_by_its_name(tmp_path):
    """A hub id that is not in the cache, offline."""
    checkpoint = open_checkpoint("builtin:tiny")
    export_merged("owner/base", tmp_path / "out", dtype="float32", checkpoint=checkpoint)
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert data.base_model == "owner/base"


@pytest.mark.parametrize("family", ["vl", "omni", "omni_full"])
def test_a_card_has_code_for_sentence_transformers_where_it_loads_the_model(
    cases, tmp_path, family
):
    path = cases[family].path
    export_merged(path, tmp_path / "merged", dtype="float32")
    card = (tmp_path / "merged" / "README.md").read_text()
    data, loads = ModelCard(card).data, family != "omni_full"
    assert (tmp_path / "merged" / "modules.json").exists() == loads
    assert data.library_name == ("sentence-transformers" if loads else "transformers")
    assert ("sentence-transformers" in data.tags) == loads
    for text in (card, adapter_card(open_checkpoint(path), path, About(), CONFIG)):
        assert ("import SentenceTransformer" in text) == loads
        assert ("cannot load a full Qwen2.5-Omni" in text) != loads


def test_an_assembled_models_card_lists_its_parts(tmp_path):
    export_merged("builtin:tiny", tmp_path / "model", dtype="float32")
    (tmp_path / "model" / "README.md").unlink()
    note = {"language model": {"name": "a|b", "licence": "MIT"}, "vision tower": {"name": "fresh"}}
    write_json(tmp_path / "model" / "parts.json", note)
    card = assembled_card("model", open_checkpoint(tmp_path / "model"))
    assert "| language model | a\\|b | MIT |" in card
    assert "| vision tower | fresh |  |" in card
    assert ModelCard(card).data.license == "mit"


def test_words_of_others_cannot_break_a_card():
    """A pipe, a new line, a brace or a quote in a name."""
    section = Section("Members", "", ("member",), [("a|b\nc",)])
    about = About("{base} and {adapter} {{", sections=(section,))
    card = adapter_card(open_checkpoint("builtin:tiny"), "builtin:tiny", about, CONFIG)
    assert "| a\\|b⏎c |" in card
    assert "builtin:tiny and {adapter} {{" in card


# ---- bases


def test_what_an_adapters_base_is_called(tmp_path, monkeypatch):
    export_merged("builtin:tiny", tmp_path / "base", dtype="float32")
    monkeypatch.chdir(tmp_path)
    assert base_of("base").location == str(tmp_path / "base")
    assert base_of("gs://bucket/base").location == "gs://bucket/base"
    on_hub = base_of("Qwen/Qwen2.5-VL-3B-Instruct")
    assert (on_hub.location, on_hub.hub_id) == ("Qwen/Qwen2.5-VL-3B-Instruct",) * 2
    tiny = base_of("builtin:tiny")
    assert tiny.hub_id is None
    open_checkpoint(tiny.location)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert base_of("owner/name").hub_id is None  # a folder comes first, as where it is opened


def test_the_commit_of_a_base_on_the_hub(tmp_path, monkeypatch):
    """As huggingface_hub's cache has it."""
    cache = tmp_path / "models--owner--base"
    (cache / "snapshots" / ("a" * 40)).mkdir(parents=True)
    (cache / "snapshots" / ("a" * 40) / "config.json").write_text("{}")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    write_peft(tmp_path / "adapter", adapters_of("builtin:tiny"), CONFIG, "owner/base")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "owner/base"
    assert written["revision"] == "a" * 40


def test_an_adapter_of_a_builtin_that_was_moved(tmp_path):
    write_peft(tmp_path / "first", adapters_of("builtin:tiny"), CONFIG, "builtin:tiny")
    want = OmniEmbedder.from_pretrained("builtin:tiny", tmp_path / "first").encode(["a fox"])
    (tmp_path / "first").rename(tmp_path / "second")
    got = OmniEmbedder.from_pretrained("builtin:tiny", tmp_path / "second").encode(["a fox"])
    np.testing.assert_array_equal(got, want)


# ---- modes


@pytest.mark.parametrize(
    ("mask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750)]
)
def test_modes_are_as_the_umask_says(tmp_path, mask, file_mode, folder_mode):
    earlier = os.umask(mask)
    try:
        export_merged("builtin:tiny", tmp_path / "merged", dtype="float32")
        write_peft(tmp_path / "adapter", adapters_of("builtin:tiny"), CONFIG, "builtin:tiny")
    finally:
        os.umask(earlier)
    for path in [tmp_path / "merged", tmp_path / "adapter", *tmp_path.rglob("*/*")]:
        wanted = folder_mode if path.is_dir() else file_mode
        assert path.stat().st_mode & 0o777 == wanted, path


def test_a_link_in_an_output_folder_keeps_its_target_as_it_is(tmp_path):
    (tmp_path / "private").write_text("")
    (tmp_path / "private").chmod(0o600)
    with written_aside(tmp_path / "out") as aside:
        (aside / "link").symlink_to(tmp_path / "private")
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o600


# ---- their code


def blocks(card):
    """heading -> [(language, code)] of what stands below it."""
    found = {}
    for part in re.split(r"^### ", card, flags=re.MULTILINE)[1:]:
        heading, _, text = part.partition("\n")
        found[heading] = re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return found


def run_block(language, code, folder):
    """Run a block of lco-jax in a folder, in a process of its own; returns what it prints.

    Torch cannot be imported there, as in every process of these tests.
    """
    command = [sys.executable, "-c", code]
    if language == "sh":
        command = ["bash", "-ec", code.replace("python ", f"{sys.executable} ", 1)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Each block has a process of its own, a fork of one that has imported what all import. Where
# torchvision's build does not fit torch's, transformers cannot load a processor of videos.
WITH_TORCH = """
import json, os, sys
from benchmarks.peer import import_torchvision
import_torchvision()
import peft, sentence_transformers, torch, transformers

for folder, code in json.load(sys.stdin):
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        exec(code, {"__name__": "__main__"})
        sys.exit()
    if os.waitpid(child, 0)[1]:
        sys.exit(f"this failed in {folder}:\\n{code}")
"""


def run_with_torch(jobs):
    """Run blocks of others' Python, [(folder, code)]; returns what they print."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    jobs = json.dumps([(str(folder), code) for folder, code in jobs])
    command = [sys.executable, "-c", WITH_TORCH]
    done = subprocess.run(command, input=jobs, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def vectors_of(folders):
    """Run all code of the cards of folders; (folder's name, heading) -> the vectors it makes."""
    with_torch, files = [], {}
    for folder in folders:
        for heading, code in blocks((folder / "README.md").read_text()).items():
            file = files[folder.name, heading] = folder.parent / f"{folder.name} {heading}.npy"
            store = f"import numpy\nnumpy.save({str(file)!r}, numpy.asarray(vectors))\n"
            for language, block in code:
                if language == "sh":
                    run_block(language, block, folder)
                elif "lco_jax" in block:
                    run_block(language, block + store, folder)
                else:
                    with_torch.append((folder, block + store))
    run_with_torch(with_torch)
    return {key: np.load(file) for key, file in files.items()}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vl", "omni", "llava_mistral"])
def test_the_code_of_the_cards_runs_word_for_word(cases, tmp_path, family):
    """sentence-transformers, transformers, PEFT and lco-jax give the same vectors."""
    path = cases[family].path
    adapters = adapters_of(path)
    card = adapter_card(open_checkpoint(path), path, About(), CONFIG)
    write_peft(tmp_path / "adapter", adapters, CONFIG, str(path), card)
    export_merged(path, tmp_path / "merged", {"decoder": adapters}, CONFIG, "float32")
    model = OmniEmbedder.from_pretrained(path, tmp_path / "adapter")
    inputs = ["A dog runs on the beach.", "Stocks fell sharply."]
    want = model.encode([*inputs, Image.new("RGB", (84, 84), "navy")])
    vectors = vectors_of([tmp_path / "merged", tmp_path / "adapter"])
    ran = {key: np.abs(got - want).max() for key, got in vectors.items()}
    assert ran.keys() == {
        ("merged", "sentence-transformers"),
        ("merged", "transformers"),
        ("merged", "lco-jax"),
        ("adapter", "PEFT"),
        ("adapter", "transformers"),
        ("adapter", "lco-jax"),
        ("adapter", "sentence-transformers"),
    }
    assert max(ran.values()) < 1e-5, ran


@pytest.mark.slow
def test_the_code_of_a_generators_cards_runs_word_for_word(cases, tmp_path):
    """transformers, with PEFT for the adapter, gives our answers."""
    path, about = cases["vl"].path, About(objective="generative")
    adapters = adapters_of(path)
    card = adapter_card(open_checkpoint(path), path, about, CONFIG)
    write_peft(tmp_path / "adapter", adapters, CONFIG, str(path), card)
    export_merged(path, tmp_path / "merged", {"decoder": adapters}, CONFIG, "float32", about=about)
    answers, with_torch = [], []
    for kind in ("merged", "adapter"):
        found = blocks((tmp_path / kind / "README.md").read_text())
        assert found.keys() == {"lco-jax", "transformers"}
        ((language, code),) = found["lco-jax"]
        answers.append(run_block(language, code, tmp_path / kind))
        ((_, code),) = found["transformers"]
        with_torch.append((tmp_path / kind, code))
    assert answers[0] == answers[1]
    assert run_with_torch(with_torch) == "".join(answers)


def test_the_code_of_a_card_on_the_hub_names_the_repository():
    card = adapter_card(open_checkpoint("builtin:tiny"), "builtin:tiny", About(), CONFIG)
    there = at_hub(card, "owner/name")
    for code in blocks(there).values():
        for _, block in code:
            assert "owner/name" in block or "../with-adapter" in block
            assert '"."' not in block
            assert "=. " not in block
