"""Uploads, by huggingface_hub's own client, to a stand-in of the hub."""

import json
import sys

import jax
import numpy as np
import pytest
from hub import TOKEN, Hub
from huggingface_hub import constants

from lco_jax import LcoError, convert, push_to_hub
from lco_jax.checkpoint import builtin
from lco_jax.checkpoint.card import About, adapter_card
from lco_jax.checkpoint.export import export_merged
from lco_jax.checkpoint.hf import open_checkpoint
from lco_jax.checkpoint.peft import write_peft
from lco_jax.checkpoint.shapes import abstract_params
from lco_jax.core import lora

CONFIG = lora.LoraConfig(rank=2, alpha=4)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The stand-in, at which the client uploads without xet; its token is in the environment."""
    with Hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def some_adapters():
    params = abstract_params(open_checkpoint(builtin.build()).config)
    return jax.tree.map(np.asarray, lora.init(jax.random.key(0), params, CONFIG))


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """A merged model and an adapter whose base is on the hub."""
    folder = tmp_path_factory.mktemp("exports")
    export_merged("builtin:tiny", folder / "merged", dtype="float32")
    adapters = some_adapters()
    card = '---\ntags:\n- lora\n---\n\nname = "."\n'
    write_peft(folder / "adapter", adapters, CONFIG, "Qwen/Qwen2.5-VL-3B-Instruct", card)
    write_peft(folder / "of-here", adapters, CONFIG, str(folder / "merged"))
    (folder / "run" / "checkpoints").mkdir(parents=True)
    (folder / "empty").mkdir()
    return folder


def test_a_merged_model_is_uploaded_whole_with_its_card(hub, exports):
    local = (exports / "merged" / "README.md").read_bytes()
    address = push_to_hub(exports / "merged", "owner/name", private=True)
    assert address == f"{hub.url}/owner/name"
    assert hub.private == {"owner/name"}
    files = hub.repositories["owner/name"]
    there = {
        file.relative_to(exports / "merged").as_posix()
        for file in (exports / "merged").rglob("*")
        if file.is_file() and not file.name.startswith(".")
    }
    assert files.keys() == there
    for name in there - {"README.md"}:
        assert files[name] == (exports / "merged" / name).read_bytes(), name
    card = files["README.md"].decode()
    assert 'name = "owner/name"' in card
    assert 'name = "."' not in card
    assert "in this folder" not in card
    assert (exports / "merged" / "README.md").read_bytes() == local  # as it was


def test_again_and_an_adapter(hub, exports):
    for _ in range(2):
        push_to_hub(exports / "adapter", "owner/name")
    files = hub.repositories["owner/name"]
    assert files.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    config = json.loads(files["adapter_config.json"])
    assert config["base_model_name_or_path"] == "Qwen/Qwen2.5-VL-3B-Instruct"
    assert not hub.private


@pytest.mark.parametrize("objective", ["contrastive", "generative"])
def test_a_base_on_this_machine_is_not_named_on_the_hub(hub, exports, tmp_path, objective):
    """Whoever pushes has put the hub id of the base into adapter_config.json, as is advised."""
    base = str(tmp_path / "my base")
    (tmp_path / "my base").symlink_to(exports / "merged")
    card = adapter_card(open_checkpoint(base), base, About(objective=objective), CONFIG)
    assert base in card
    write_peft(tmp_path / "adapter", some_adapters(), CONFIG, base, card)
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace(base, "owner/base"))
    push_to_hub(tmp_path / "adapter", "owner/name")
    card = hub.repositories["owner/name"]["README.md"].decode()
    assert base not in card
    assert 'from_pretrained("owner/base", adapter=name)' in card
    if objective == "contrastive":
        assert "--model=owner/base --adapter=owner/name --output" in card


@pytest.mark.parametrize(
    ("folder", "repo_id", "message"),
    [
        ("run", "owner/name", "is a training run; its exports are in merged/ and adapter/"),
        ("empty", "owner/name", "holds no export"),
        ("absent", "owner/name", "holds no export"),
        ("of-here", "owner/name", "which others do not have; push the merged model"),
        ("adapter", "name", "names no owner; give owner/name"),
        ("adapter", "owner/a/b", "is no name of a repository"),
        ("adapter", "owner/sp ace", "is no name of a repository"),
    ],
)
def test_a_mistake_is_found_before_the_hub_is_asked(hub, exports, folder, repo_id, message):
    with pytest.raises(LcoError, match=message):
        push_to_hub(exports / folder, repo_id)
    assert hub.requests == []


def test_no_token(hub, exports, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(LcoError, match="no token for the hub: run `hf auth login`, or set HF_TOK"):
        push_to_hub(exports / "adapter", "owner/name")
    assert hub.requests == []


def test_a_token_that_is_refused(hub, exports):
    with pytest.raises(LcoError, match="the hub cannot be asked: Invalid user token"):
        push_to_hub(exports / "adapter", "owner/name", token="hf_old")


@pytest.mark.parametrize("repo_id", ["taken/there", "taken/new"])
def test_no_rights(hub, exports, repo_id):
    """Of a repository that is there and readable, and of one that would have to be made."""
    message = rf"{repo_id} cannot be made or written on the hub: .*403"
    with pytest.raises(LcoError, match=message):
        push_to_hub(exports / "adapter", repo_id)
    assert not any("preupload" in path for path in hub.requests)


def test_no_network(hub, exports, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(LcoError, match="the hub cannot be asked: "):
        push_to_hub(exports / "adapter", "owner/name")


def test_offline(hub, exports, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(LcoError, match=r"the hub cannot be asked: .*offline"):
        push_to_hub(exports / "adapter", "owner/name")


def test_an_upload_that_fails(hub, exports):
    hub.fails = "/commit/"
    with pytest.raises(LcoError, match="was not uploaded completely to owner/name; try again: "):
        push_to_hub(exports / "adapter", "owner/name")


# ---- lco convert


def run_convert(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, flags)])
    return convert.main()


def test_convert_and_push(hub, monkeypatch, tmp_path, capsys):
    flags = ["--model=builtin:tiny", f"--output={tmp_path / 'out'}", "--push=owner/tiny"]
    assert run_convert(monkeypatch, *flags, "--private") == 0
    assert f"{hub.url}/owner/tiny" in capsys.readouterr().out
    files = hub.repositories["owner/tiny"]
    assert files["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert hub.private == {"owner/tiny"}


def test_what_is_there_is_pushed(hub, exports, monkeypatch, tmp_path):
    """An export; then a run's two."""
    run_convert(monkeypatch, f"--input={exports / 'adapter'}", "--push=owner/a")
    assert "adapter_config.json" in hub.repositories["owner/a"]
    for kind in ("adapter", "merged"):
        (tmp_path / kind).symlink_to(exports / kind)
    (tmp_path / "checkpoints").mkdir()
    run_convert(monkeypatch, f"--input={tmp_path}", "--push=owner/b")
    assert "config.json" in hub.repositories["owner/b"]
    run_convert(monkeypatch, f"--input={tmp_path}", "--push=owner/c", "--push-what=both")
    assert "config.json" in hub.repositories["owner/c"]
    assert "adapter_config.json" in hub.repositories["owner/c-adapter"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model=builtin:tiny"], "give --output, the folder to write, or --push"),
        (["--model=builtin:tiny", "--push=owner/x"], "--push goes with --input alone"),
        (["--model=builtin:tiny", "--output=o", "--private"], "go with --push"),
        (["--model=builtin:tiny", "--output=o", "--push=x"], "names no owner"),
        (
            ["--model=builtin:tiny", "--output=o", "--push=owner/x", "--push-what=adapter"],
            "--push-what=adapter: there is only merged",
        ),
        (
            ["--model=builtin:tiny", "--output=o", "--push=owner/x", "--push-what=both"],
            "--push-what=both: there is only one export",
        ),
        (
            ["soup", "--model=builtin:tiny", "--adapters", "A", "--output=o", "--push=owner/x"],
            "the base of o is builtin:tiny, which others do not have",
        ),
        (["soup", "--models", "A"], "a soup needs --output"),
        (["--input=o", "--push=owner/x", "--merge"], "--merge goes with soup"),
        (["--input=o", "--push=owner/x", "--dtype=float32"], "--dtype, .* go with --output"),
        (["--input=o", "--push=owner/x", "--max-shard-size=1"], "shard-size and .* go with"),
        (["--input=o", "--push=owner/x", "--truncate-dim=8"], "--truncate-dim go with --output"),
    ],
)
def test_mistakes_of_convert(hub, monkeypatch, tmp_path, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LcoError, match=message):
        run_convert(monkeypatch, *flags)
    assert list(tmp_path.iterdir()) == []
    assert hub.requests == []


@pytest.mark.parametrize("more", [["--push=owner/x"], []], ids=["pushed", "written"])
def test_a_model_is_no_run(hub, exports, monkeypatch, tmp_path, more):
    """Its config.json is no run's."""
    flags = [f"--input={exports / 'merged'}", f"--output={tmp_path / 'o'}", *more]
    with pytest.raises(LcoError, match="merged is no training run; give a model as --model"):
        run_convert(monkeypatch, *flags)
    assert hub.requests == []


def test_the_help_of_convert_has_the_defaults():
    shown = " ".join(convert.make_parser().format_help().split())
    assert "of models (default: bfloat16)" in shown
    assert "of one file (default: 5)" in shown
