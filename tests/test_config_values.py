"""What each key of a configuration may be, and what a user who mistypes one is told."""

import math

import pytest
from flax.traverse_util import flatten_dict

from lco_jax import LcoError
from lco_jax.configs import base
from lco_jax.training import cli
from lco_jax.training.run import check_config
from lco_jax.training.values import ELSEWHERE, RULES


def test_every_key_has_a_rule():
    keys = flatten_dict(base.get_config().to_dict(), sep=".")
    assert {key for key in keys if not key.startswith(ELSEWHERE)} == RULES.keys()


@pytest.mark.parametrize(
    "name", [*sorted(set(cli.names()) - {"lab"}), "base:paper", "base:reference"]
)
def test_what_comes_with_the_package_is_allowed(name):
    check_config(cli.parse(["train", f"--config={name}"], "").config)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("optimizer.learning_rate", (-1e-3, math.nan, math.inf)),
        ("optimizer.weight_decay", (-0.1, math.nan)),
        ("optimizer.beta1", (1.5, 1.0, -0.1, math.nan)),
        ("optimizer.beta2", (1.0, -0.5)),
        ("optimizer.eps", (0.0, -1e-8, math.inf)),
        ("optimizer.clip_norm", (-1.0, math.nan)),
        ("optimizer.warmup_steps", (-1,)),
        ("lora.alpha", (0.0, -16.0, math.nan, math.inf)),
        ("lora.rank", (0, -4)),
        ("lora.dropout", (1.0, -0.1, math.nan)),
        ("lora.targets", ("layers(",)),
        ("train.temperature", (0.0, -0.1, math.nan, math.inf)),
        ("train.epochs", (0.0, -1.0, math.nan, math.inf)),
        ("train.patience", (-1.0, math.inf)),
        ("train.batch_size", (0, -8)),
        ("loss.temperatures", ((0.1, 0.0, 0.1, 0.1),)),
        ("loss.matryoshka", ((0,), (64.5,))),
        ("loss.matryoshka_weights", ((-1.0,),)),
        ("loss.false_negatives", ("gist",)),
        ("loss.false_negative_margin", (math.nan, 3.0)),
        ("loss.hard_weight", (0.0, math.inf)),
        ("loss.teacher", ("mse",)),
        ("loss.coral", (-0.1, math.nan)),
        ("data.sub_batch", (0, 7)),
        ("data.keep_apart", ("negatives",)),
        ("loss.guide", (None,)),
        ("data.sampling_temperature", (0.0,)),
        ("train.chunk_tokens", (-2,)),
        ("data.max_length", (0, -1)),
        ("data.max_negatives", (-2,)),
        ("data.threads", (0,)),
        ("data.on_bad", ("ignore",)),
        ("checkpoint.keep", (0,)),
        ("export.dtype", ("float16", "")),
        ("model.dtype", ("float16",)),
        ("model.tower_dtype", ("bf16",)),
        ("model.quantize", ("int4",)),
        ("model.attention", ("flash",)),
        ("tune.decoder", ("dora",)),
        ("seed", (-1, 2**31)),
        ("mesh.fsdp", (-2,)),
        ("eval.batch_size", (0,)),
    ],
)
def test_a_value_that_no_run_can_have_is_refused_by_key(key, values):
    for value in values:
        config = base.get_config()
        config.update_from_flattened_dict({key: value})
        with pytest.raises(LcoError, match=rf"config\.{key} ") as raised:
            check_config(config)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimizer.learning_rate", 0.0),
        ("optimizer.beta1", 0.0),
        ("lora.dropout", 0.0),
        ("lora.alpha", 1e-3),
        ("data.max_negatives", 0),
        ("data.max_length", None),
        ("train.chunk_tokens", -1),
    ],
)
def test_a_value_at_the_edge_is_taken(key, value):
    config = base.get_config()
    config.update_from_flattened_dict({key: value})
    check_config(config)


def test_a_warm_up_that_is_as_long_as_the_run_is_refused():
    config = base.get_config()
    config.train.steps = config.optimizer.warmup_steps = 10
    with pytest.raises(LcoError, match=r"warmup_steps is 10; it must be less than config\.train"):
        check_config(config)


@pytest.mark.parametrize(
    ("key", "value"), [("loss.false_negatives", "base"), ("model.quantize", "nf4")]
)
def test_what_goes_with_no_decoder_that_is_trained_in_full(key, value):
    config = base.get_config()
    config.update_from_flattened_dict({key: value})
    check_config(config)
    config.tune.decoder = "full"
    with pytest.raises(LcoError, match=rf"config\.{key}.* goes with config\.tune\.decoder = lora"):
        check_config(config)


def test_keys_of_a_config_of_ones_own_that_are_none():
    config = base.get_config()
    config.train.batchsize = 8  # ml_collections takes it
    with pytest.raises(LcoError, match=r"train\.batchsize, which is no key.*'train\.batch_size'"):
        check_config(config)
    config = base.get_config()
    del config.data.threads
    with pytest.raises(LcoError, match=r"has no key 'data\.threads'"):
        check_config(config)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("optimizer.lr", "optimizer.learning_rate"),
        ("lr", "optimizer.learning_rate"),
        ("optimizer.wd", "optimizer.weight_decay"),
        ("lora.r", "lora.rank"),
        ("train.bs", "train.batch_size"),
        ("optimizer.temperature", "train.temperature"),
        ("trian.steps", "train.steps"),
        ("data.sources.bundeld.path", "data.sources.bundled.path"),
    ],
)
def test_a_key_by_another_name(key, meant):
    with pytest.raises(LcoError, match=f"did you mean '{meant}'"):
        cli.parse(["train", "--config=base", f"--config.{key}=1"], "")


def test_a_key_that_is_like_none_lists_those_there_are():
    with pytest.raises(LcoError, match=r"no key 'lora\.init'; lora has .*rank") as raised:
        cli.parse(["train", "--config=base", "--config.lora.init=pissa"], "")
    assert "mean" not in str(raised.value)


@pytest.mark.parametrize("name", ["my-photos", "class", "2024"])
def test_a_source_may_have_any_name(tmp_path, name):
    file = tmp_path / "mine.py"
    file.write_text(
        "from lco_jax.configs import base\n"
        "def get_config():\n"
        "    config = base.get_config()\n"
        f"    config.data.sources = {{{name!r}: {{'kind': 'jsonl', 'path': 'a.jsonl'}}}}\n"
        "    return config\n"
    )
    args = cli.parse(
        ["train", f"--config={file}", f"--config.data.sources.{name}.path=b.jsonl"], ""
    )
    assert args.config.data.sources[name].path == "b.jsonl"


def test_paths_of_the_home_folder(tmp_path, monkeypatch):
    """A shell leaves the ~ of --output=~/x."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text("from lco_jax.configs.base import get_config\n")
    argv = ["train", "--config=~/mine.py", "--output=~/runs/a"]
    monkeypatch.setattr("sys.argv", argv)
    monkeypatch.setattr(cli, "join_processes", lambda args: None)
    assert cli.start("")[1] == tmp_path / "runs" / "a"
