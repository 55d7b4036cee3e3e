"""One's own data: how it is named, what is held out of it, and training from Python."""

import gzip
import json
import random
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import jax
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from lco_jax import LcoError, make_mesh, train
from lco_jax.configs import base
from lco_jax.core.files import ASSETS, read_json
from lco_jax.data.given import sources_of
from lco_jax.data.held_out import split, wanted
from lco_jax.data.records import content_key
from lco_jax.data.scan import ListSource, fingerprint
from lco_jax.data.sources import JsonlSource, open_source
from lco_jax.job import open_sources
from lco_jax.training import cli
from lco_jax.training.objective import LossConfig
from lco_jax.training.run import check_same_run, claim_workdir
from lco_jax.training.state import warmup_steps

CONFIGS = sorted(set(cli.names()) - {"lab"})  # that one is the laboratory's
HUB = "hf://datasets/sentence-transformers/all-nli/triplet/train-*.parquet"


def pair(i, **more):
    return {"anchor": f"dog {i}", "positive": f"a dog runs {i}", **more}


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def my_file(tmp_path):
    return write(tmp_path / "my.jsonl", map(pair, range(100)))


def parsed(*flags):
    return cli.parse(["train", *map(str, flags)], "").config


# ---- names


@pytest.mark.parametrize(
    ("given", "sources"),
    [
        ("my.jsonl", {"my": {"kind": "jsonl", "path": "my.jsonl"}}),
        ("a/my data.jsonl.gz", {"my_data": {"kind": "jsonl", "path": "a/my data.jsonl.gz"}}),
        ("shards/x-*.jsonl", {"x": {"kind": "jsonl", "path": "shards/x-*.jsonl"}}),
        ("shards/*.parquet", {"shards": {"kind": "parquet", "path": "shards/*.parquet"}}),
        ("gs://bucket/my.jsonl", {"my": {"kind": "jsonl", "path": "gs://bucket/my.jsonl"}}),
        ("assets:lab/text.jsonl", {"text": {"kind": "jsonl", "path": "assets:lab/text.jsonl"}}),
        ("tfds:snli", {"snli": {"kind": "tfds", "name": "snli"}}),
        ("tfds:snli:1.1.0", {"snli": {"kind": "tfds", "name": "snli:1.1.0"}}),
        (
            HUB,
            {
                "all_nli": {
                    "kind": "parquet",
                    "path": "sentence-transformers/all-nli",
                    "files": "triplet/train-*.parquet",
                }
            },
        ),
        (
            "one.jsonl, two.parquet",
            {
                "one": {"kind": "jsonl", "path": "one.jsonl"},
                "two": {"kind": "parquet", "path": "two.parquet"},
            },
        ),
        (
            [Path("snli/train.jsonl"), "mnli/train.jsonl"],
            {
                "snli_train": {"kind": "jsonl", "path": "snli/train.jsonl"},
                "mnli_train": {"kind": "jsonl", "path": "mnli/train.jsonl"},
            },
        ),
    ],
)
def test_data_by_name(given, sources):
    found = sources_of(given, "--data")
    assert found == sources
    assert list(found) == list(sources)


def test_a_file_whose_name_has_a_comma_is_one(tmp_path):
    file = write(tmp_path / "dogs, cats.jsonl", map(pair, range(3)))
    assert sources_of(str(file), "--data") == {"dogs_cats": {"kind": "jsonl", "path": str(file)}}


def test_a_folder_holds_files_of_one_kind(tmp_path):
    folder = tmp_path / "mine"
    for name in ("a.jsonl", "b/c.jsonl"):
        write(folder / name, [pair(name)])
    found = sources_of(folder, "--data")
    assert list(found) == ["mine"]
    assert len(open_source("mine", found["mine"])) == 2
    table = pa.Table.from_pylist([pair(1, negative="a cat")])
    pyarrow.parquet.write_table(table, folder / "d.parquet")
    with pytest.raises(LcoError, match=r"holds .jsonl and .parquet files; name one kind, as in"):
        sources_of(folder, "--data")
    for file in folder.rglob("*.jsonl"):
        file.unlink()
    assert len(open_source("mine", sources_of(folder, "--data")["mine"])) == 1


@pytest.mark.parametrize("name", ["my data", "g[1]", "all*"])
def test_what_lies_beside_the_files_of_a_folder_is_not_read(tmp_path, name):
    """Copies that editors and notebooks keep; and a folder's name may be like a pattern."""
    folder = tmp_path / name
    for file in ("train.jsonl", "more/b.jsonl"):
        write(folder / file, [pair(file)])
    with gzip.open(folder / "more" / "c.jsonl.gz", "wt") as packed:
        packed.write(json.dumps(pair("c")))
    beside = ("train.jsonl~", "train.jsonlines", ".ipynb_checkpoints/train.jsonl", ".old.jsonl")
    for file in (*beside, ".hidden/d.parquet"):
        write(folder / file, [pair(file)])
    (source,) = sources_of(folder, "--data").values()
    assert source == {"kind": "jsonl", "path": str(folder)}
    anchors = [record.anchor for record in open_source("mine", source)]
    assert anchors == ["dog more/b.jsonl", "dog c", "dog train.jsonl"]


def test_hidden_parquet_files_of_a_folder_are_not_read(tmp_path):
    for name in ("a.parquet", "b.parquet/part.parquet", ".hidden/c.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pyarrow.parquet.write_table(pa.Table.from_pylist([pair(name)]), tmp_path / name)
    (source,) = sources_of(tmp_path, "--data").values()
    anchors = [record.anchor for record in open_source("mine", source)]
    assert anchors == ["dog a.parquet", "dog b.parquet/part.parquet"]


def test_a_folder_of_no_lines(tmp_path):
    write(tmp_path / "train.jsonl~", [pair(1)])
    with pytest.raises(LcoError, match=r"the folder holds no \.jsonl file"):
        open_source("mine", {"kind": "jsonl", "path": str(tmp_path)})


@pytest.mark.parametrize("name", ["test.jsonl", "data/validation-0.jsonl", "held_out.jsonl"])
def test_a_folder_with_a_test_set_is_not_trained_on_as_a_whole(tmp_path, name):
    write(tmp_path / "contest.jsonl", [pair(1)])
    sources_of(tmp_path, "--data")
    write(tmp_path / name, [pair(2)])
    with pytest.raises(LcoError, match=f"holds {name} beside files to train on; name the files"):
        sources_of(tmp_path, "--data")


def test_a_json_file_describes_a_source(tmp_path):
    spec = {"kind": "files", "glob": "x/*.png", "pattern": r"(?P<a>\w+)\.png", "caption": "{a}"}
    file = tmp_path / "photos.json"
    file.write_text(json.dumps(spec))
    assert sources_of(file, "--data") == {"photos": spec}
    file.write_text(json.dumps(pair(1)))
    with pytest.raises(LcoError, match=r"photos\.json: it describes no source.*into a \.jsonl"):
        sources_of(file, "--data")
    with pytest.raises(LcoError, match=r"^--data=assets:lab/x\.json: .*assets/lab/x\.json does no"):
        sources_of("assets:lab/x.json", "--data")
    with pytest.raises(LcoError, match=r"^--eval=assets:tiny_shapes\.json: .*describes no source"):
        sources_of("assets:tiny_shapes.json", "--eval")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("", "--data is empty; give a .jsonl or .parquet file"),
        ("nowhere", "--data=nowhere: there is no such file or folder; give a .jsonl"),
        ("owner/name", "no such file or folder; a hub dataset is hf://datasets/owner/name/FILES"),
        ("hf://datasets/owner/name", "name the parquet files, too, as in hf://datasets/OWNER"),
        ("pairs.csv", "--data=pairs.csv: it is none of these: a .jsonl"),
        ("gs://bucket/folder", "it is none of these: a .jsonl"),
        ("dog.png", "a medium alone is no record"),
        ("a.jsonl,a.jsonl", "--data=a.jsonl,a.jsonl holds two files of one name"),
        ("folder", "--data=folder: the folder holds no .jsonl or .parquet file; media need texts"),
        ("empty", "--data=empty: the folder holds no .jsonl or .parquet file"),
    ],
)
def test_what_is_no_data_is_one_sentence(tmp_path, monkeypatch, given, says):
    monkeypatch.chdir(tmp_path)
    for name in ("folder", "empty"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (4, 4)).save("folder/a.png")
    with pytest.raises(LcoError) as raised:
        sources_of(given, "--data")
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


# ---- the flags


@pytest.mark.parametrize("name", [*CONFIGS, "pretrain:ocr", "qwen2_5_vl_7b:reference"])
def test_the_flags_replace_data_and_evaluation_of_any_configuration(name, my_file, tmp_path):
    config = parsed(f"--config={name}", f"--data={my_file}")
    assert config.data.sources.to_dict() == {"my": {"kind": "jsonl", "path": str(my_file)}}
    assert (config.eval.path, config.eval.sts, config.eval.share) == ("", "", 0.05)
    assert len(open_sources(config).training["my"]) == 90
    held_out = write(tmp_path / "heldout.jsonl", [pair("x")])
    config = parsed(f"--config={name}", f"--data={my_file}", f"--eval={held_out}")
    assert (config.eval.path, config.eval.sts, config.eval.share) == (str(held_out), "", 0.0)
    assert len(open_sources(config).training["my"]) == 100


@pytest.mark.parametrize("nothing", ["none", ""])
def test_nothing_can_be_held_out(my_file, nothing):
    config = parsed("--config=smollm2", "--eval", nothing, "--data", my_file)
    assert (config.eval.path, config.eval.sts, config.eval.share) == ("", "", 0.0)


def test_other_held_out_records_for_the_data_of_a_configuration(my_file):
    config = parsed("--config=base", f"--eval={my_file}")
    assert config.data.sources.bundled.path == "assets:lab/train.jsonl"
    assert (config.eval.path, config.eval.share) == (str(my_file), 0.0)


def test_keys_of_the_data_that_is_given(my_file):
    """Without quotes, and together with what the configuration would have measured."""
    keys = ("--config.data.sources.my.path=b.jsonl", "--config.eval.share=0.2")
    config = parsed("--config=smollm2", *keys, f"--data={my_file}", "--config.eval.sts=builtin:x")
    assert (config.data.sources.my.path, config.eval.share) == ("b.jsonl", 0.2)
    assert config.eval.sts == "builtin:x"
    with pytest.raises(LcoError, match=r"no key 'data\.sources\.snli\.path'"):
        parsed("--config=smollm2", f"--data={my_file}", "--config.data.sources.snli.path=x")


def test_a_name_with_a_comma_is_measured_alone(my_file, tmp_path):
    """Names of held-out data stand between commas in the configuration."""
    comma = write(tmp_path / "dogs, cats.jsonl", [pair("x")])
    for given in (comma, [comma]):
        path = cli.configured("base", my_file, given, {}).eval.path
        assert list(sources_of(path, "config.eval.path")) == ["dogs_cats"]
    with pytest.raises(LcoError, match=r"--eval=.*dogs, cats\.jsonl: a name with a comma stands a"):
        cli.configured("base", my_file, [comma, my_file], {})


@pytest.mark.parametrize("flag", ["--data", "--eval"])
def test_a_wrong_flag_is_named(my_file, flag):
    with pytest.raises(LcoError, match=f"{flag}=nowhere: there is no such file or folder"):
        parsed("--config=base", f"{flag}=nowhere")


def test_a_warm_up_is_no_longer_than_the_data_allow():
    """The published recipes, made for 276,000 triplets, keep theirs."""
    config = base.get_config("paper")
    assert warmup_steps(config, 2 * 276_000 // 768) == 100
    assert warmup_steps(config, 13) == 2
    assert warmup_steps(config, 1) == 0
    config.train.steps = 101
    assert warmup_steps(config, 101) == 100


# ---- what is held out


def texts(source):
    return sorted((record.anchor, record.positive) for record in source)


@pytest.mark.parametrize(
    ("different", "share", "count"),
    [
        (19, 0.05, 0),
        (20, 0.05, 4),
        (49, 0.05, 9),
        (50, 0.05, 10),
        (200, 0.05, 10),
        (1000, 0.05, 50),
        (1000, 0.3, 300),
        (100_000, 0.05, 500),
    ],
)
def test_how_many_are_held_out(different, share, count):
    assert wanted(different, share) == count


def test_a_share_is_held_out_and_not_trained_on(my_file):
    whole = JsonlSource(my_file)
    training, held_out = split({"my": whole}, 0.05)
    assert (len(training["my"]), len(held_out["my"])) == (90, 10)
    assert sorted(texts(training["my"]) + texts(held_out["my"])) == texts(whole)
    assert [record.where for record in training["my"]] == sorted(
        (record.where for record in training["my"]), key=lambda where: int(where.split(":")[-1])
    )


def test_the_same_records_are_held_out_in_any_order_place_and_file(tmp_path, my_file):
    """Also of media, which records name by their places in the folder."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    records = [{**pair(i), "positive": {"image_path": "a.png", "text": f"{i}"}} for i in range(60)]
    found = []
    for folder in (tmp_path, tmp_path / "moved"):
        file = write(folder / "a.jsonl", random.Random(folder.name).sample(records, 60))
        Image.new("RGB", (4, 4)).save(folder / "a.png")
        held_out = split({"a": JsonlSource(file)}, 0.05).held_out["a"]
        found.append(sorted(record.anchor for record in held_out))
    assert found[0] == found[1]
    assert len(found[0]) == 10
    more = write(tmp_path / "more.jsonl", map(pair, range(110)))
    few, many = (split({"a": JsonlSource(file)}, 0.1).held_out["a"] for file in (my_file, more))
    assert len({*texts(few)} & {*texts(many)}) > 7  # new records take few others' places


@pytest.mark.parametrize(
    "copy",
    [
        lambda record: record,
        lambda record: {"positive": record["positive"], "anchor": record["anchor"]},
        lambda record: {**record, "negative": "another"},
        lambda record: {"anchor": record["positive"], "positive": record["anchor"]},
        lambda record: {**record, "anchor": f" {record['anchor'].upper()} "},
        lambda record: {**record, "anchor": {"text": record["anchor"]}},
    ],
)
def test_equal_records_are_never_on_both_sides(tmp_path, copy):
    """Neither within a source nor between sources; and of copies one is measured."""
    records = list(map(pair, range(100)))
    one = write(tmp_path / "one.jsonl", records + [copy(record) for record in records])
    two = write(tmp_path / "two.jsonl", [copy(record) for record in records[:50]])
    training, held_out = split({"one": JsonlSource(one), "two": JsonlSource(two)}, 0.1)

    def numbers(sources):
        pairs = [texts(source) for source in sources.values()]
        return [one[0].split()[-1].lower() for pair in pairs for one in pair]

    out = numbers(held_out)
    assert len(out) == len(set(out)) == 10
    assert not {*out} & {*numbers(training)}
    assert {*out} | {*numbers(training)} == {str(i) for i in range(100)}


def test_small_sources_are_trained_on_as_a_whole(tmp_path, my_file):
    small = JsonlSource(write(tmp_path / "small.jsonl", map(pair, range(200, 219))))
    assert split({"small": small}, 0.4).training["small"] is small
    training, held_out = split({"small": small, "my": JsonlSource(my_file)}, 0.4)
    assert training["small"] is small
    assert held_out.keys() == {"my"}


def test_a_source_of_copies_alone_is_named(tmp_path, my_file):
    held_out = split({"my": JsonlSource(my_file)}, 0.05).held_out["my"]
    record = {"anchor": held_out[0].anchor, "positive": held_out[0].positive}
    copies = JsonlSource(write(tmp_path / "copies.jsonl", [record]))
    with pytest.raises(LcoError, match=r"leaves nothing of config\.data\.sources\.copies"):
        split({"my": JsonlSource(my_file), "copies": copies}, 0.05)


def test_what_is_left_knows_what_its_records_have(tmp_path):
    """A teacher's scores: the loss asks for them before the first record is read."""
    file = tmp_path / "taught.jsonl"
    lines = [
        json.dumps({"anchor": f"a{i}", "positive": f"p{i}", "teacher_scores": [0.5]})
        for i in range(40)
    ]
    file.write_text("\n".join(lines))
    whole = JsonlSource(file)
    (rest,) = split({"taught": whole}, 0.2).training.values()
    assert len(rest) < len(whole)
    assert rest.has_teacher


@pytest.mark.parametrize(
    ("version", "of_rest"), [("100 rows", "100 rows, without 10 that are held out"), ("", "")]
)
def test_a_source_that_is_not_scanned_holds_out_rows(my_file, version, of_rest):
    """What cannot be told from other data stays so."""
    rows = ListSource(list(JsonlSource(my_file)))
    rows.version = version
    training, held_out = split({"rows": rows}, 0.05)
    assert len(held_out["rows"]) == 10
    assert fingerprint(training["rows"]) == of_rest


def test_the_records_of_a_file_in_order(tmp_path):
    """Read at once they are those that are read one by one."""
    for name in ("a", "b"):
        write(tmp_path / f"{name}.jsonl", [pair(f"{name}{i}") for i in range(3)])
    source = JsonlSource(tmp_path / "*.jsonl")
    alone = [source[index] for index in range(len(source))]
    assert [content_key(record.anchor) for record in source] == [one.anchor for one in alone]
    assert [record.where for record in source] == [one.where for one in alone]
    with pytest.raises(IndexError):
        source[6]


# ---- runs


def test_a_run_keeps_what_it_holds_out(tmp_path, my_file):
    flags = ("--config=tiny", f"--data={my_file}", "--config.train.steps=20")
    config, home = parsed(*flags), tmp_path / "run"
    found = {name: fingerprint(one) for name, one in open_sources(config).training.items()}
    claim_workdir(home, config, 20, found)
    saved = read_json(home / "config.json")
    assert saved["eval"]["share"] == 0.05
    assert saved["data_was"]["my"].startswith("100 records with digest ")
    assert saved["data_was"]["my"].endswith(", without 10 that are held out")
    check_same_run(home, config, 20, found)
    with pytest.raises(LcoError, match=r"config\.eval\.share = 0\.05, and this one has 0\.0"):
        check_same_run(home, parsed(*flags, "--eval=none"), 20)
    write(my_file, map(pair, range(1, 101)))
    changed = {name: fingerprint(one) for name, one in open_sources(config).training.items()}
    with pytest.raises(LcoError, match=r"config\.data\.sources\.my has changed since"):
        check_same_run(home, config, 20, changed)


def test_a_run_of_an_earlier_version_held_nothing_out_and_added_nothing_to_the_loss(tmp_path):
    config = base.get_config()
    claim_workdir(tmp_path, config, 9)
    saved = read_json(tmp_path / "config.json")
    del saved["eval"]["share"], saved["loss"]
    del saved["data"]["sub_batch"], saved["data"]["keep_apart"]
    del saved["data"]["sampling_temperature"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    check_same_run(tmp_path, config, 9)
    assert LossConfig.of(saved) == LossConfig.of(config)  # for `lco convert`, too
    config.loss.matryoshka = (64,)
    with pytest.raises(LcoError, match=r"holds a run with config\.loss\.matryoshka = \[\]"):
        check_same_run(tmp_path, config, 9)


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr("lco_jax.job.make_mesh", lambda **_: make_mesh(devices=jax.devices()[:1]))


@pytest.fixture
def until_the_checkpoint(monkeypatch, one_device):
    """A job ends before it opens a checkpoint."""

    class Reached(Exception):
        pass

    def reached(*_, **__):
        raise Reached

    monkeypatch.setattr("lco_jax.job.open_checkpoint", reached)
    return Reached


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({}, "10 of the records are held out, and never trained on (config.eval.share is 0.05)"),
        (
            {"eval__path": "assets:lab/text.jsonl"},
            "not measured, since the data are your own: text of the package",
        ),
    ],
)
def test_what_is_measured_is_said(until_the_checkpoint, my_file, tmp_path, capsys, keys, says):
    with pytest.raises(until_the_checkpoint):
        train("base", tmp_path / "run", data=my_file, **keys)
    assert says in capsys.readouterr().out


@pytest.mark.parametrize("numbers", [range(19), [1] * 100], ids=["few", "equal"])
def test_that_too_few_are_there_is_said(until_the_checkpoint, tmp_path, capsys, numbers):
    few = write(tmp_path / "few.jsonl", map(pair, numbers))
    with pytest.raises(until_the_checkpoint):
        train("base", tmp_path / "run", data=few)
    says = "nothing is held out of the data: no source has 20 different records, which it takes"
    assert says in capsys.readouterr().out


def test_bundled_texts_are_never_measured_beside_other_data(
    until_the_checkpoint, my_file, tmp_path, capsys
):
    """Also where a configuration of one's own keeps what base measures."""
    config = base.get_config()
    config.data.sources = {"mine": {"kind": "jsonl", "path": str(my_file)}}
    with pytest.raises(until_the_checkpoint):
        train(config, tmp_path / "run")
    assert "since the data are your own: text, image, audio of the" in capsys.readouterr().out
    with pytest.raises(until_the_checkpoint):
        train("base", tmp_path / "run")
    assert "not measured" not in capsys.readouterr().out


def test_a_teacher_without_scores_is_refused_before_the_checkpoint_is_opened(
    until_the_checkpoint, my_file, tmp_path
):
    with pytest.raises(LcoError, match=r"config\.loss\.teacher is 'kl', and no record has teacher"):
        train("base", tmp_path / "run", data=my_file, loss__teacher="kl")
    taught = write(tmp_path / "taught.jsonl", [pair(i, teacher_scores=[0.5]) for i in range(40)])
    with pytest.raises(until_the_checkpoint):
        train("base", tmp_path / "run", data=taught, loss__teacher="kl")


@pytest.mark.parametrize(
    ("lines", "shared"),
    [
        (map(pair, range(90, 120)), "10 of its 30"),
        (map(pair, range(100)), "100 of its 100"),
        (map(pair, range(100, 110)), None),
    ],
)
def test_held_out_records_that_are_trained_on_are_named(
    until_the_checkpoint, my_file, tmp_path, caplog, lines, shared
):
    apart = write(tmp_path / "apart.jsonl", lines)
    with pytest.raises(until_the_checkpoint):
        train("base", tmp_path / "run", data=my_file, eval=apart)
    found = [line for line in caplog.messages if "are trained on, too" in line]
    assert len(found) == (shared is not None)
    if shared:
        assert found[0].startswith(f"apart: {shared} records")


def test_two_held_out_sets_have_two_names(until_the_checkpoint, my_file, tmp_path):
    config = parsed("--config=base", f"--data={my_file}", f"--config.eval.path={my_file}")
    with pytest.raises(LcoError, match="both have 'my', and scores go by names"):
        train(config, tmp_path / "run")


def test_configurations_say_what_they_should_reach():
    """The published numbers, and that there are none of our own."""
    scores = read_json(ASSETS / "published.json")["MIEB(lite)"]["models"]
    reach = {
        "qwen2_5_vl_3b": "66.3",
        "qwen2_5_omni_3b": "66.3",
        "qwen2_5_vl_7b": f"{scores['LCO-Embedding-VL-7B (text only)']} on MIEB(lite)",
        "qwen2_5_omni_7b": f"{scores['LCO-Embedding-Omni-7B (multimodal)']} on MIEB(lite)",
        "llava_next_8b": "no table of this model is at hand",
    }
    for name, number in reach.items():
        words = " ".join(import_module(f"lco_jax.configs.{name}").__doc__.split())
        assert "Published (arXiv 2510.11693)" in words
        assert number in words
        assert "never on the real weights" in words
        assert f"lco train --config={name} --data=my.jsonl --eval=heldout.jsonl" in words


# ---- from Python

FORMS = (
    "from lco_jax import train",
    "import lco_jax.train",
    "from lco_jax.train import train, main",
    "import lco_jax; lco_jax.train",
    "import importlib; importlib.import_module('lco_jax.train').main",
    "from lco_jax import pretrain",
)


@pytest.mark.slow
@pytest.mark.parametrize("first", FORMS)
def test_train_is_the_function_in_every_order_of_imports(first):
    check = "import lco_jax; assert lco_jax.train is sys.modules['lco_jax.train'].train"
    steps = ["import sys", first, check, *FORMS, check, *reversed(FORMS), check]
    steps.append("assert callable(train) and callable(main) and callable(pretrain)")
    subprocess.run([sys.executable, "-c", "\n".join(steps)], check=True)


def test_what_is_asked_for_is_the_function_without_jax():
    """The package itself stays light: processes that decode media import it."""
    code = (
        "import sys, lco_jax; assert 'jax' not in sys.modules; from lco_jax import train, LcoError"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_keywords_are_keys_of_the_configuration(my_file):
    given = base.get_config()
    keys = {"train__steps": 7, "optimizer.learning_rate": 1e-5, "seed": 3, "lora__alpha": 8}
    config = cli.configured(given, [my_file], None, keys)
    assert (config.train.steps, config.optimizer.learning_rate, config.seed) == (7, 1e-5, 3)
    assert config.lora.alpha == 8.0
    assert config.data.sources.my.path == str(my_file)
    assert given.to_dict() == base.get_config().to_dict()
    same = parsed("--config=base", f"--data={my_file}", "--config.train.steps=7", "--config.seed=3")
    config = cli.configured("base", my_file, None, {"train__steps": 7, "seed": 3})
    assert config.to_dict() == same.to_dict()
    sources = {"mine": {"kind": "jsonl", "path": "a.jsonl"}}
    assert cli.configured("base", sources).data.sources.to_dict() == sources


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"train__stps": 3}, "train__stps=3: the config has no key 'train.stps'.*'train.steps'"),
        ({"learning_rate": 3}, "no key 'learning_rate'.*'optimizer.learning_rate'"),
        ({"train": {"steps": 3}}, "train is a section of the config; set its keys, as in train__"),
        ({"train__steps": "many"}, "train__steps='many' is wrong"),
        ({"train__steps": -3}, "config.train.steps is -3"),
        ({"data": "nowhere"}, "--data=nowhere: there is no such file"),
        ({"data": [pair(1)]}, "--data is a list; name files: records go into a .jsonl, one a line"),
        ({"data": {"mine": {"kind": "csv"}}}, r"config\.data\.sources\.mine\.kind is 'csv'"),
        ({"eval": "nowhere"}, "--eval=nowhere: there is no such file"),
        ({"config": "bse"}, "--config=bse: there is no such file"),
        ({"config": 7}, "config is a int; give a name, a file or a ConfigDict"),
    ],
)
def test_a_mistake_raises_and_ends_nothing(one_device, tmp_path, arguments, says):
    with pytest.raises(LcoError, match=says) as raised:
        train(**{"config": "base", "output": tmp_path / "run"} | arguments)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_training_from_python_on_ones_own_data(one_device, tmp_path):
    lines = (ASSETS / "triplets_train.jsonl").read_text().splitlines(keepends=True)[:60]
    data = tmp_path / "my data.jsonl"
    data.write_text("".join(lines))
    keys = {"train__batch_size": 8, "train__steps": 2, "optimizer__warmup_steps": 1}
    run = train("tiny", tmp_path / "run", data=data, lora__rank=4, export__merged=False, **keys)
    assert run["steps"] == 2
    assert run["before"].keys() == run["after"].keys() == {"my_data"}
    assert dict(run) == read_json(tmp_path / "run" / "results.json")
    assert (run.adapter, run.merged) == (tmp_path / "run" / "adapter", None)
    assert run.embedder().encode(["a dog"]).shape == run.embedder().encode(["a cat"]).shape
    again = train("tiny", tmp_path / "run", data=data, lora__rank=4, export__merged=False, **keys)
    assert again == run
