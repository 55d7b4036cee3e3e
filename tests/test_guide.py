"""Another model's vectors as the guide of the loss."""

import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from lco_jax import LcoError, OmniEmbedder, contrastive, mine
from lco_jax.checkpoint.hf import open_checkpoint
from lco_jax.configs import base
from lco_jax.core.files import fingerprint
from lco_jax.core.packing import Batch
from lco_jax.data.guide import INPUT_STATE, GuideVectors, guide_dimension, open_guide
from lco_jax.data.guide_files import CONTENTS, VECTORS
from lco_jax.data.pipeline import _in_first_stream
from lco_jax.data.sources import open_file
from lco_jax.job import batches_of, fingerprints, open_data
from lco_jax.training.finished import _files
from lco_jax.training.run import check_same_run, claim_workdir
from lco_jax.training.values import check_values


@pytest.fixture
def records(tmp_path):
    """A file of two dozen records; some share anchors."""
    path = tmp_path / "records.jsonl"
    texts = [f"{count} {thing}" for count in ("one", "two", "three") for thing in ("dogs", "cats")]
    with path.open("w") as file:
        for i in range(24):
            line = {
                "anchor": f"{texts[i % 6]} run",
                "positive": f"{texts[i % 6]} move {i}",
                "negative": texts[(i + 1) % 6],
            }
            file.write(json.dumps(line) + "\n")
    return path


@pytest.fixture
def guide(tmp_path, records, run_command, monkeypatch, load):
    """The folder of vectors of builtin:tiny, of all contents of the records."""
    monkeypatch.setattr(OmniEmbedder, "from_pretrained", load)
    run = functools.partial(run_command, mine)
    folder = tmp_path / "guide"
    flags = [f"--input={records}", f"--vectors={folder}", "--max-length=64"]
    assert run(*flags, f"--output={tmp_path / 'mined.jsonl'}")[0] == 0
    return folder


def losses(records, output, **loss):
    config = base.get_config()
    config.model.path = "builtin:tiny"
    config.data.sources = {"a": {"kind": "jsonl", "path": str(records)}}
    config.eval.path, config.export.merged = "", False
    config.train.batch_size, config.train.steps, config.optimizer.warmup_steps = 8, 3, 1
    config.loss.update(loss)
    contrastive.train(config, output)
    return [json.loads(line) for line in (output / "metrics.jsonl").open()]


def test_the_model_before_tuning_as_a_guide_is_base(tmp_path, records, guide):
    """Vectors that were computed before, by `lco mine`, guide as those of a second forward pass."""
    folder = {"false_negatives": "guide", "guide": str(guide), "false_negative_margin": 0.01}
    read = losses(records, tmp_path / "read", **folder)
    run = losses(records, tmp_path / "run", false_negatives="base", false_negative_margin=0.01)
    plain = losses(records, tmp_path / "plain")
    for key in ("loss", "false_negatives"):
        np.testing.assert_allclose([one[key] for one in read], [one[key] for one in run], rtol=1e-5)
    assert read[0]["false_negatives"] > 0
    assert abs(read[0]["loss"] - plain[0]["loss"]) > 1e-3


def test_a_guide_knows_contents_whatever_their_record(records, guide):
    found = GuideVectors(str(guide))
    vectors = np.load(guide / VECTORS)
    contents = [json.loads(line) for line in (guide / CONTENTS).open()]
    assert guide_dimension(str(guide)) == vectors.shape[1]
    for number in (0, 5, len(contents) - 1):
        np.testing.assert_array_equal(found(contents[number], ""), vectors[number])
    assert found.rows([]).shape == (0, vectors.shape[1])
    found.check(open_file(records))
    with pytest.raises(
        LcoError, match=r"here: .*has no vector of a content; make it with lco mine"
    ):
        found("nobody said this", "here")


def test_what_is_no_guide_is_named(tmp_path, guide):
    with pytest.raises(LcoError, match=r"holds no contents.jsonl; lco mine --model=GUIDE"):
        GuideVectors(str(tmp_path))
    flat = base.get_config().to_dict()
    flat = {f"{a}.{b}": v for a, s in flat.items() if isinstance(s, dict) for b, v in s.items()}
    flat |= {"name": "x", "seed": 0, "loss.false_negatives": "guide"}
    with pytest.raises(LcoError, match=r"goes with config\.loss.false_negatives=guide"):
        check_values(flat)


def changed_texts(folder):
    """As many contents, and one is another."""
    text = (folder / CONTENTS).read_text()
    (folder / CONTENTS).write_text(text.replace("dogs", "cows"))


def vectors_of_others(folder):
    np.save(folder / VECTORS, np.zeros((3, 128), np.float32))


def torn(folder):
    (folder / CONTENTS).write_bytes((folder / CONTENTS).read_bytes()[:-9])
    record = folder / f"{VECTORS}.json"
    found = json.loads(record.read_text())
    found["work"][INPUT_STATE] = fingerprint([(CONTENTS, (folder / CONTENTS).stat())])
    record.write_text(json.dumps(found))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed_texts, "were not made of the contents that are there now; remove the folder"),
        (vectors_of_others, "were not made of the contents"),
        (lambda folder: (folder / VECTORS).write_bytes(b""), "vectors.npy cannot be read"),
        (lambda folder: np.save(folder / VECTORS, np.zeros(3)), "vectors.npy holds no vectors"),
        (lambda folder: (folder / f"{VECTORS}.json").unlink(), "vectors.npy.json does not exist"),
        (torn, r"contents.jsonl:\d+ is damaged; remove the folder, and mine again"),
    ],
)
def test_a_guide_of_others_or_a_damaged_one_is_named(guide, change, words):
    change(guide)
    with pytest.raises(LcoError, match=words):
        GuideVectors(str(guide))


@pytest.fixture
def unreadable(tmp_path, records, run_command, monkeypatch, load):
    """A file of records, the second of which has a picture that is none, and their guide."""
    (tmp_path / "bad.png").write_bytes(b"no picture")
    lines = records.read_text().splitlines()[:8]
    lines[1] = json.dumps({"anchor": "x", "positive": {"image": "bad.png"}})
    path, folder = tmp_path / "some.jsonl", tmp_path / "skipping"
    path.write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(OmniEmbedder, "from_pretrained", load)
    flags = [f"--input={path}", f"--vectors={folder}", "--on-error=skip"]
    assert run_command(mine, *flags, f"--output={tmp_path / 'some.mined.jsonl'}")[0] == 0
    return path, folder


def test_a_medium_that_could_not_be_read_is_no_missing_vector(unreadable, caplog):
    path, folder = unreadable
    source = open_file(path)
    found = GuideVectors(str(folder))
    with pytest.raises(LcoError, match=r"jsonl:2: .* a medium that could not be read .*on_bad=s"):
        found.check(source)
    assert found.check(source, "skip") == 1
    assert open_guide(str(folder), {"a": source}, "skip") is not None
    assert "a: 1 records are skipped" in caplog.text


@pytest.mark.parametrize("mended", [False, True])
def test_a_batch_skips_what_the_guide_could_not_read(tmp_path, unreadable, cache, mended):
    """Also where the medium can be read by now."""
    path, folder = unreadable
    if mended:
        Image.fromarray(np.zeros((28, 28, 3), np.uint8)).save(tmp_path / "bad.png")
    config = base.get_config()
    config.loss.update({"false_negatives": "guide", "guide": str(folder)})
    config.train.batch_size, config.data.on_bad = 8, "skip"
    config.data.sources = {"a": {"kind": "jsonl", "path": str(path)}}
    sources, processor, layout = open_data(config, open_checkpoint("builtin:tiny"))
    batch = batches_of(config, sources, layout, processor)[0]
    assert len(batch.skipped) == 1
    assert len(set(batch.record.tolist())) == 7
    assert np.isfinite(batch.guide).all()


def test_a_run_knows_its_guide(tmp_path, guide, records):
    """One that was made again is another, for a run that resumes or has ended."""
    config = base.get_config()
    config.loss.update({"false_negatives": "guide", "guide": str(guide)})
    sources = {"a": open_file(records)}
    before = fingerprints(config, sources)
    claim_workdir(tmp_path, config, 3, before)
    check_same_run(tmp_path, config, 3, before)
    assert set(_files(config)) >= {guide / CONTENTS, guide / VECTORS}
    vectors_of_others(guide)
    with pytest.raises(LcoError, match=r"^config\.loss\.guide has changed since the run in"):
        check_same_run(tmp_path, config, 3, fingerprints(config, sources))


@pytest.mark.parametrize("trailing", [(), (5,)])
def test_tables_of_processes_are_joined(trailing):
    """Record p + i · P is in row i of the first stream of process p; vectors go with it."""
    processes, shards, records, sides = 2, 2, 6, 3
    whole = np.arange(records * sides * max(np.prod(trailing), 1), dtype=np.float32)
    whole = whole.reshape(records, sides, *map(int, trailing))
    parts = [_in_first_stream(whole[me::processes], shards) for me in range(processes)]
    split = jnp.asarray(np.concatenate(parts, axis=1))
    table = jnp.zeros((records // processes, processes * shards, sides), jnp.int32)
    batch = Batch(None, table, table, {}, guide=split)
    np.testing.assert_array_equal(batch.gathered(processes).guide, whole)
