"""The stream of records, the batches that processes make of it, and texts that are cut."""

import json
from itertools import chain, product

import jax
import numpy as np
import pytest
import reference
from rows import row_of

from lco_jax import LcoError, make_mesh
from lco_jax.checkpoint import builtin
from lco_jax.checkpoint.hf import open_checkpoint
from lco_jax.configs import base
from lco_jax.core.packing import TokenSequence, fill, pack_stream
from lco_jax.core.prefixes import Prefixes
from lco_jax.core.stream_shapes import Shape, padded_shape
from lco_jax.data import mixture, pipeline
from lco_jax.data.pipeline import Layout, ahead, local_batches
from lco_jax.data.processor import Processor
from lco_jax.data.prompts import ChatTokenizer, as_messages
from lco_jax.data.record_stream import record_stream
from lco_jax.data.records import Record
from lco_jax.data.scan import ListSource
from lco_jax.data.sources import JsonlSource
from lco_jax.job import batches_of, open_layout

PREFIX = Prefixes.of(np.zeros(0, np.int32))
LAYOUT = Layout(batch_size=8, max_negatives=2, prefix=PREFIX)


@pytest.fixture(scope="module")
def tokenizer(cache):
    return ChatTokenizer(builtin.build())


@pytest.fixture(scope="module")
def processor(cache):
    return Processor(builtin.build())


def numbered(n, name="r", negatives=1):
    """n records of distinct texts; every third has no negative."""
    return ListSource(
        [
            Record(
                f"{name} {i} anchor",
                f"{name} {i} positive",
                tuple(f"{name} {i} negative {j}" for j in range(negatives if i % 3 else 0)),
                f"{name}:{i}",
            )
            for i in range(n)
        ]
    )


def order(sources, weights, seed, count):
    stream = record_stream(sources, weights, seed)
    return [stream[i].where for i in range(count)]


def test_stream_is_a_function_of_the_seed():
    sources, weights = {"a": numbered(200, "a"), "b": numbered(300, "b")}, {"a": 1.0, "b": 2.0}
    first = order(sources, weights, 0, 200)
    assert order(sources, weights, 0, 200) == first
    for seed in (1, 2, 2**31):
        assert order(sources, weights, seed, 200) != first


def test_every_epoch_is_another_permutation():
    n, epochs = 50, 4
    seen = np.array(order({"a": numbered(n)}, {"a": 1.0}, 0, n * epochs)).reshape(epochs, n)
    for epoch in seen:
        assert sorted(epoch) == sorted(f"r:{i}" for i in range(n))
    assert len({tuple(epoch) for epoch in seen}) == epochs
    assert (seen[0] != [f"r:{i}" for i in range(n)]).any()


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (3.0, 1.0, 0.5), (0.05, 0.15, 0.8)])
def test_mixture_weights_are_respected(weights):
    sources = {"a": numbered(250, "a"), "b": numbered(900, "b"), "c": numbered(500, "c")}
    names = [where[0] for where in order(sources, dict(zip("abc", weights, strict=True)), 0, 2000)]
    share = np.array([names.count(name) for name in "abc"]) / len(names)
    assert np.abs(share - np.array(weights) / sum(weights)).max() < 0.02


def test_sources_of_a_mixture_keep_their_epochs():
    seen = order({"a": numbered(7, "a"), "b": numbered(500, "b")}, {"a": 1.0, "b": 3.0}, 0, 400)
    of_a = np.array([where for where in seen if where[0] == "a"][:98]).reshape(14, 7)
    assert (np.sort(of_a) == [f"a:{i}" for i in range(7)]).all()
    assert len({tuple(epoch) for epoch in of_a}) > 7


def test_sub_batches_are_of_one_source():
    """Of 16 records four times four; both sources stand in most batches."""
    sources = {"a": numbered(40, "a"), "b": numbered(60, "b")}
    stream = record_stream(sources, {"a": 1.0, "b": 1.0}, 0, run=4, batch_size=16)
    names = np.array([stream[i].where[0] for i in range(16 * 20)]).reshape(20, 4, 4)
    assert (names == names[:, :, :1]).all()
    assert np.mean([len(set(batch.flat)) == 2 for batch in names]) > 0.5


@pytest.mark.parametrize(
    ("temperature", "weights"), [(1.0, [100.0, 25.0]), (2.0, [10.0, 5.0]), (1e9, [1.0, 1.0])]
)
def test_sources_without_a_weight_are_drawn_by_their_size(temperature, weights):
    config = base.get_config()
    config.data.sampling_temperature = temperature
    config.data.sources = {"a": {"kind": "jsonl"}, "b": {"kind": "jsonl"}, "c": {"weight": 7.0}}
    sources = {"a": numbered(100), "b": numbered(25), "c": numbered(3)}
    found = mixture.weights_of(config.data, sources)
    np.testing.assert_allclose(list(found.values()), [*weights, 7.0], rtol=1e-6)


@pytest.mark.parametrize("weight", [0.0, -1.0, "much"])
def test_a_weight_must_be_positive(weight):
    with pytest.raises(LcoError, match="weight"):
        record_stream({"a": numbered(7, "a"), "b": numbered(9, "b")}, {"a": weight, "b": 1.0}, 0)[0]


# ---- the batches of a process


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def by_sequence(local):
    """{(record, side): token ids}; each pair must occur once."""
    sequences = {
        (int(record), int(side)): ids.tolist()
        for record, side, ids in zip(
            local.record, local.side, [one.input_ids for one in local.inputs], strict=True
        )
    }
    assert len(sequences) == len([one.input_ids for one in local.inputs])
    return sequences


def dropout_keys(local):
    """{(record, side): the dropout key of every token}, as `global_batch` sets them."""
    identity = local.record * pipeline.MAX_SIDES + local.side
    stream = pack_stream(
        [TokenSequence(one.input_ids, one.position_ids) for one in local.inputs], PREFIX
    )
    tokens, _ = fill([stream], [identity], padded_shape(stream.need, Shape()), PREFIX)
    return {
        (int(record), int(side)): tokens.token_keys[0, at].tolist()
        for record, side, at in zip(local.record, local.side, stream.at, strict=True)
    }


def process_batches(monkeypatch, processor, processes, me, seed=0):
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    monkeypatch.setattr(jax, "process_index", lambda: me)
    stream = record_stream({"a": numbered(21, negatives=2)}, {"a": 1.0}, seed)
    return ahead(local_batches(stream, LAYOUT, processor, None), 2)


def test_a_batch_holds_every_text_of_its_records(monkeypatch, processor):
    stream = record_stream({"a": numbered(21, negatives=2)}, {"a": 1.0}, 0)
    for k, local in enumerate(take(process_batches(monkeypatch, processor, 1, 0), 4)):
        records = [stream[i] for i in range(8 * k, 8 * k + 8)]
        want = {
            (i, j): processor.tokenizer([as_messages(text, "")])[0].tolist()
            for i, record in enumerate(records)
            for j, text in enumerate(record.sides)
        }
        assert by_sequence(local) == want


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_batch_that_one_would_read(monkeypatch, processor, processes):
    all_at_once = take(process_batches(monkeypatch, processor, 1, 0), 6)
    shares = [
        take(process_batches(monkeypatch, processor, processes, me), 6) for me in range(processes)
    ]
    for k, local in enumerate(all_at_once):
        for view in (by_sequence, dropout_keys):
            parts = [view(share[k]) for share in shares]
            assert sum(len(part) for part in parts) == len(view(local))
            assert {key: value for part in parts for key, value in part.items()} == view(local)
        assert len({tuple(keys) for keys in dropout_keys(local).values()}) == len(
            [one.input_ids for one in local.inputs]
        )


def test_the_batch_must_divide_by_the_processes(monkeypatch, processor):
    with pytest.raises(LcoError, match="8 does not divide by the 3 processes"):
        process_batches(monkeypatch, processor, 3, 0)


def test_the_stream_resumes_where_it_stood(monkeypatch, processor):
    """Also on another number of processes, and from the JSON that a checkpoint stores."""
    want = [by_sequence(local) for local in take(process_batches(monkeypatch, processor, 1, 0), 9)]
    for stop in (0, 1, 4):
        iterator = process_batches(monkeypatch, processor, 1, 0)
        take(iterator, stop)
        state = json.loads(json.dumps(iterator.get_state()))
        again = process_batches(monkeypatch, processor, 1, 0)
        take(again, 2)  # whatever was read before does not matter
        again.set_state(state)
        assert [by_sequence(local) for local in take(again, 9 - stop)] == want[stop:]
        halves = [process_batches(monkeypatch, processor, 2, me) for me in range(2)]
        for half in halves:
            half.set_state(state)
        assert [
            by_sequence(x) | by_sequence(y)
            for x, y in zip(*(take(h, 3) for h in halves), strict=True)
        ] == want[stop : stop + 3]


def test_max_negatives_limits_what_is_read(processor):
    source = numbered(9, negatives=3)
    for most in (0, 1, 3):
        layout = Layout(batch_size=9, max_negatives=most, prefix=PREFIX)
        local = local_batches(record_stream({"a": source}, {"a": 1.0}, 0), layout, processor, None)[
            0
        ]
        assert np.bincount(local.side).tolist() == [9, 9] + [6] * most


def test_texts_are_cut_before_the_template(processor):
    record = Record("a long anchor with many more words than five in it", "short", (), "mem:0")
    layout = Layout(batch_size=1, max_negatives=0, prefix=PREFIX)
    local = local_batches(
        record_stream({"a": ListSource([record])}, {"a": 1.0}, 0), layout, processor, 5
    )[0]
    first_five = processor.tokenizer.tokenizer.decode(
        processor.tokenizer.tokenizer(record.anchor).input_ids[:5]
    )
    want = processor.tokenizer([as_messages(first_five, ""), as_messages("short", "")])
    assert [ids.tolist() for ids in [one.input_ids for one in local.inputs]] == [
        ids.tolist() for ids in want
    ]


def test_a_text_beyond_the_context_is_named(processor):
    records = list(numbered(8))
    records[5] = Record("a", "b", ("word " * 40_000,), "corpus.jsonl:17")
    batches = local_batches(
        record_stream({"a": ListSource(records)}, {"a": 1.0}, 0), LAYOUT, processor, None
    )
    with pytest.raises(LcoError) as error:
        next(ahead(batches, 2))
    assert "corpus.jsonl:17" in str(error.value)


@pytest.mark.parametrize(
    ("mesh", "chunk_tokens"), [((1, 1, 1), 0), ((2, 2, 2), 0), ((4, 2, 1), 60), ((1, 1, 1), 200)]
)
def test_a_global_batch_has_every_sequence_in_its_slot(processor, mesh, chunk_tokens):
    layout = Layout(
        batch_size=12, max_negatives=2, prefix=processor.tokenizer.prefix, chunk_tokens=chunk_tokens
    )
    stream = record_stream({"a": numbered(40, negatives=2)}, {"a": 1.0}, 0)
    local = local_batches(stream, layout, processor, None)[0]
    mesh = make_mesh(*mesh, devices=jax.devices()[: int(np.prod(mesh))])
    batch = pipeline.global_batch(local, layout, processor.rows, mesh)
    tokens, want = batch.tokens.map(np.asarray), by_sequence(local)
    chunks, streams, length = tokens.input_ids.shape
    assert streams == mesh.shape["data"] * mesh.shape["fsdp"]
    assert (chunks > 1) == bool(chunk_tokens)
    slots = tokens.last_tokens.shape[-1]
    seen = np.zeros((chunks, streams, length), bool)
    for (record, side), index in np.ndenumerate(np.asarray(batch.sequences)):
        assert (index >= 0) == ((record, side) in want)
        if index >= 0:
            (chunk, stream), slot = divmod(int(index) // slots, streams), int(index) % slots
            at = row_of(tokens, (chunk, stream), slot)
            assert tokens.input_ids[chunk, stream, at].tolist() == want[record, side]
            assert tokens.last_tokens[chunk, stream, slot] == at[-1]
            assert tokens.position_ids[chunk, stream, at].T.tolist() == [list(range(len(at)))] * 3
            seen[chunk, stream, at] = True
    own = sum(len(ids) - len(layout.prefix) for ids in want.values())
    assert seen.sum() == own + chunks * streams * len(
        layout.prefix
    )  # the prefix once a stream, everything else once
    assert ((tokens.home >= 0) == seen).all()


# ---- the cut


@pytest.mark.parametrize("max_length", [1, 4, 16, 64, None])
@pytest.mark.parametrize("text", [*reference.TEXTS, "🙂🙃 emoji 👩‍👩‍👧", "word " * 100, ""])
def test_cut_is_the_references(tokenizer, text, max_length):
    """Tokenize, keep n tokens, decode; a shorter text stays the same, byte for byte."""
    ids = tokenizer.tokenizer(text).input_ids
    short = max_length is None or len(ids) <= max_length
    want = text if short else tokenizer.tokenizer.decode(ids[:max_length])
    assert tokenizer.cut(text, max_length) == want
    as_reference = tokenizer.tokenizer.decode(
        ids[:max_length]
    )  # it decodes short texts too: same tokens
    assert np.array_equal(
        tokenizer([as_messages(want, "")])[0], tokenizer([as_messages(as_reference, "")])[0]
    )


@pytest.mark.parametrize("max_length", [0, -1])
def test_cut_to_nothing_is_an_error(tokenizer, max_length):
    """-1 must not silently drop the last token."""
    with pytest.raises(LcoError, match="max_length"):
        tokenizer.cut("a few words", max_length)


# ---- a record stands once in a batch


def lines(path, contents):
    text = "".join(json.dumps({"anchor": x, "positive": f"a {x}"}) + "\n" for x in contents)
    path.write_text(text)
    return JsonlSource(path)


def anchors(stream, batch, size):
    return [stream[batch * size + i].anchor for i in range(size)]


@pytest.mark.parametrize(("records", "size"), [(7, 7), (8, 7), (21, 8), (100, 64)])
def test_a_batch_has_a_record_once_where_epochs_meet(records, size):
    sources = {"a": numbered(records)}
    drawn = record_stream(sources, {"a": 1.0}, 0)
    stream = record_stream(sources, {"a": 1.0}, 0, batch_size=size)
    changed = 0
    for batch in range(60):
        before, now = anchors(drawn, batch, size), anchors(stream, batch, size)
        assert len(set(now)) == size
        if len(set(before)) == size:
            assert now == before
        changed += now != before
    assert changed == 0 if records == size else changed > 0


def test_it_is_a_function_of_the_position():
    """Read anew, from any place, in any order, it is the same."""
    sources = {"a": numbered(10)}
    forwards = record_stream(sources, {"a": 1.0}, 3, batch_size=8)
    expected = [forwards[i].where for i in range(400)]
    backwards = record_stream(sources, {"a": 1.0}, 3, batch_size=8)
    assert [backwards[i].where for i in reversed(range(400))] == expected[::-1]
    halves = [backwards[start::2] for start in range(2)]  # of two processes
    assert [halves[i % 2][i // 2].where for i in range(400)] == expected


def test_equal_lines_are_one_record(tmp_path):
    source = lines(tmp_path / "a.jsonl", [f"dog {i // 2}" for i in range(40)])
    stream = record_stream({"a": source}, {"a": 1.0}, 0, batch_size=8)
    for batch in range(40):
        assert len(set(anchors(stream, batch, 8))) == 8


@pytest.mark.parametrize("run", [1, 8])
def test_a_batch_of_several_sources_has_a_record_once(tmp_path, run):
    """Also one that stands in both."""
    sources = {
        "a": lines(tmp_path / "a.jsonl", [f"dog {i}" for i in range(9)]),
        "b": lines(tmp_path / "b.jsonl", [f"dog {i}" for i in range(5, 20)]),
    }
    stream = record_stream(sources, {"a": 1.0, "b": 1.0}, 0, run, batch_size=8)
    for batch in range(40):
        assert len(set(anchors(stream, batch, 8))) == 8


def labelled(positives, name="a"):
    """Records with these positives and anchors of their own."""
    pairs = [(f"{name} {i}", positive) for i, positive in enumerate(positives)]
    return ListSource([Record(*pair, (), f"{name}:{i}") for i, pair in enumerate(pairs)])


@pytest.mark.parametrize("run", [1, 4])
@pytest.mark.parametrize("apart", ["positives", "contents"])
def test_equal_positives_are_kept_apart(run, apart):
    """Of 30 positives that each stand five times, and across sources; and no anchor is one."""
    sources = {
        "a": labelled([f"label {i % 30}" for i in range(150)]),
        "b": labelled([f"label {i % 40}" for i in range(80)], "b"),
        "c": labelled([f"a {i}" for i in range(60)], "c"),
    }
    weights = {"a": 1.0, "b": 1.0, "c": 1.0}
    numbers = mixture.content_numbers(sources, apart)
    made = [
        record_stream(sources, weights, 0, run, 16, numbers=given)
        for given in (numbers, numbers, {})
    ]
    once, again, free = ([stream[i] for i in range(16 * 30)] for stream in made)
    assert [one.where for one in once] == [one.where for one in again]
    backwards = [made[1][i].where for i in reversed(range(16 * 30))]
    assert backwards[::-1] == [one.where for one in once]
    crowded = 0
    for start in range(0, 16 * 30, 16):
        batch = once[start : start + 16]
        contents = [side for one in batch for side in one.sides[apart == "positives" :]]
        assert len(set(contents)) == len(contents)
        drawn = [
            side for one in free[start : start + 16] for side in one.sides[apart == "positives" :]
        ]
        crowded += len(set(drawn)) < len(drawn)
        assert [one.where[0] for one in batch] == [one.where[0] for one in free[start : start + 16]]
    assert crowded > 20


def test_few_positives_are_as_far_apart_as_can_be():
    """Eight of three labels: each stands in every batch, no record stands twice, and it is said."""
    sources = {"a": labelled([f"label {i % 3}" for i in range(12)])}
    numbers = mixture.content_numbers(sources, "positives")
    stream = record_stream(sources, {"a": 1.0}, 0, batch_size=8, numbers=numbers)
    for batch in range(20):
        records = [stream[batch * 8 + i] for i in range(8)]
        assert len({one.where for one in records}) == 8
        assert len({one.positive for one in records}) == 3
    (said,) = mixture.repeats(sources, {"a": 1.0}, 8, True, numbers)
    assert said.startswith("a: 8 records in a batch, and only 3 different positives")
    assert mixture.repeats(sources, {"a": 1.0}, 3, True, numbers) == []


def test_few_anchors_are_said():
    """The column that is short is named; ignore_duplicates helps with positives alone."""
    records = [Record(f"label {i % 3}", f"text {i}", (), f"a:{i}") for i in range(40)]
    sources = {"a": ListSource(records)}
    numbers = mixture.content_numbers(sources, "contents")
    for ignores in (False, True):
        (said,) = mixture.repeats(sources, {"a": 1.0}, 8, True, numbers, ignores)
        assert said.startswith("a: 8 records in a batch, and only 3 different anchors: a batch")
        assert "ignore_duplicates" not in said
    swapped = {"a": ListSource([Record(r.positive, r.anchor, (), r.where) for r in records])}
    numbers = mixture.content_numbers(swapped, "contents")
    (said,) = mixture.repeats(swapped, {"a": 1.0}, 8, True, numbers)
    assert "only 3 different positives" in said
    assert "config.train.ignore_duplicates" in said
    assert mixture.repeats(swapped, {"a": 1.0}, 8, True, numbers, True) == []


@pytest.mark.parametrize("apart", ["", "positives", "contents"])
def test_the_configuration_keeps_contents_apart(monkeypatch, processor, apart):
    """Also in the shares of two processes, which together have the batch of one."""
    records = [Record(f"question {i % 20}", f"label {i % 12}", (), f"a:{i}") for i in range(60)]
    sources = {"a": ListSource(records)}
    config = base.get_config()
    config.train.batch_size, config.data.keep_apart = 8, apart
    config.data.sources = {"a": {"kind": "jsonl", "path": "unread.jsonl"}}
    by_where = {record.where: record for record in records}

    def shares(processes):
        found = []
        for me in range(processes):
            monkeypatch.setattr(jax, "process_count", lambda: processes)
            monkeypatch.setattr(jax, "process_index", lambda me=me: me)
            batches = batches_of(config, sources, LAYOUT, processor)
            found.append([batches[number].where for number in range(10)])
        return found

    (whole,) = shares(1)
    assert [list(chain(*zip(*pair, strict=True))) for pair in zip(*shares(2), strict=True)] == [
        list(batch) for batch in whole
    ]
    crowded = {"anchor": 0, "positive": 0}
    for batch, side in product(whole, crowded):
        crowded[side] += len({getattr(by_where[where], side) for where in batch}) < 8
    assert (crowded["positive"] == 0) == (apart != "")
    assert (crowded["anchor"] == 0) == (apart == "contents")


def test_a_batch_that_is_larger_than_the_data_has_every_record(tmp_path):
    source = lines(tmp_path / "a.jsonl", ["dog", "cat", "cow", "cat"])
    stream = record_stream({"a": source}, {"a": 1.0}, 0, batch_size=8)
    assert set(anchors(stream, 0, 8)) == {"dog", "cat", "cow"}
    said = mixture.repeats({"a": source}, {"a": 1.0}, 8, one_source=True)
    assert said[0].startswith("a: 1 of its 4 records repeat an earlier one")
    assert said[1].startswith("a: 8 records in a batch, and only 3 different ones: 5 stand there")
    assert mixture.repeats({"a": source}, {"a": 1.0}, 3, one_source=True) == said[:1]
    few = {"a": lines(tmp_path / "b.jsonl", ["dog", "cat"]), "b": numbered(30)}
    assert mixture.repeats(few, {"a": 1.0, "b": 3.0}, 8, one_source=False) == []
    assert len(mixture.repeats(few, {"a": 1.0, "b": 3.0}, 8, one_source=True)) == 1


def test_a_batch_of_one_needs_negatives(cache):
    config = base.get_config()
    config.train.batch_size = 1
    checkpoint = open_checkpoint("builtin:tiny")
    with pytest.raises(LcoError, match="batch_size is 1, and no record has a negative"):
        open_layout(config, {"a": numbered(7, negatives=0)}, checkpoint)
    open_layout(config, {"a": numbered(7, negatives=1)}, checkpoint)
    open_layout(config, {"a": numbered(7, negatives=0)}, checkpoint, generative=True)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), True, -1.0])
def test_weights_are_numbers(weight):
    sources = {"a": numbered(7), "b": numbered(9)}
    with pytest.raises(LcoError, match=r"a\.weight is .*; it must be a number above 0"):
        record_stream(sources, {"a": weight, "b": 1.0}, 0)
