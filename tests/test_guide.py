"""Another model's vectors as the guide of the loss."""

import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from lco_jax import LcoError, OmniEmbedder, contrastive, mine
from lco_jax.configs import base
from lco_jax.core.packing import Batch
from lco_jax.data.guide import CONTENTS, VECTORS, GuideVectors, dimension_of
from lco_jax.data.pipeline import _in_first_stream
from lco_jax.data.sources import open_file
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
    assert dimension_of(str(guide)) == vectors.shape[1]
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
    with (guide / CONTENTS).open("a") as file:
        file.write('"one more"\n')
    with pytest.raises(LcoError, match=r"contents and \d+ vectors; remove it, and mine again"):
        GuideVectors(str(guide))
    flat = base.get_config().to_dict()
    flat = {f"{a}.{b}": v for a, s in flat.items() if isinstance(s, dict) for b, v in s.items()}
    flat |= {"name": "x", "seed": 0, "loss.false_negatives": "guide"}
    with pytest.raises(LcoError, match=r"goes with config\.loss.false_negatives=guide"):
        check_values(flat)


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
