"""The laboratory's worlds: what records say is what media show, and what is held out is never
trained on.
"""

import json
from collections import Counter
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from laboratory.worlds import Sizes, concepts, draw, texts, world
from laboratory.worlds.captions import concept, page_text, wording, words
from laboratory.worlds.concepts import KINDS, Motion, Page, Pair, Sound, Things
from laboratory.worlds.sound import RATE, sound
from lco_jax.core.errors import LcoError
from lco_jax.data.prompts import PROMPTS
from lco_jax.data.records import file_lookup, parse_record

SIZES = Sizes.small()


class Known:
    """A small world, what each of its media shows and what each of its texts says."""

    def __init__(self, folder):
        self.folder, self.shown, self.said = folder, {}, {}
        with pytest.MonkeyPatch.context() as patch:
            side = world.World.side

            def note_side(self_, kind, meaning):
                made = side(self_, kind, meaning)
                self.shown[str(made)] = meaning
                return made

            def note_wording(meaning, rng=None):
                text = wording(meaning, rng)
                assert self.said.setdefault(text, meaning) == meaning  # no text says two things
                return text

            patch.setattr(world.World, "side", note_side)
            patch.setattr(world, "wording", note_wording)
            patch.setattr(
                "laboratory.worlds.captions.wording", note_wording
            )  # for `another_wording`
            world.write(folder, 3, SIZES)

    def read(self, name):
        return [
            json.loads(line) for line in (self.folder / f"{name}.jsonl").read_text().splitlines()
        ]

    def seen(self, side):
        return self.shown[str({key: value for key, value in side.items() if key != "text"})]


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    return Known(tmp_path_factory.mktemp("worlds") / "world")


def all_bytes(folder):
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def test_a_seed_makes_the_same_bytes(known, tmp_path):
    world.write(tmp_path / "again", 3, SIZES)
    world.write(tmp_path / "other", 4, SIZES)
    assert all_bytes(tmp_path / "again") == all_bytes(known.folder)
    mine, other = all_bytes(known.folder), all_bytes(tmp_path / "other")
    media = [name for name in mine.keys() & other.keys() if name.startswith("media/")]
    assert media
    assert not any(mine[name] == other[name] for name in media)


def test_every_file_has_its_records(known):
    names = [str(file.relative_to(known.folder))[:-6] for file in known.folder.rglob("*.jsonl")]
    counts = {name: len(known.read(name)) for name in names}
    want = {f"generative/{kind}": getattr(SIZES, kind) for kind in (*KINDS, "text", "gist")}
    want |= {f"heldout/{kind}": SIZES.heldout for kind in KINDS}
    want |= {f"tests/retrieval_{kind}": SIZES.retrieval for kind in KINDS}
    want |= {
        "contrast/text": SIZES.contrast,
        "contrast/media": SIZES.contrast,
        "tests/text": SIZES.triplets,
    }
    want |= {"tests/minimal": SIZES.minimal, "tests/cross": 16}
    want |= {f"tests/zeroshot_{kind}": SIZES.zeroshot for kind in ("image", "audio")}
    assert counts == want
    exists = file_lookup(True)
    for folder in ("generative", "heldout", "contrast"):
        for file in (known.folder / folder).glob("*.jsonl"):
            for line in file.read_text().splitlines():
                parse_record(json.loads(line), file.name, str(file.parent), exists)
    media = json.loads((known.folder / "world.json").read_text())
    assert media["sizes"]["image"] == SIZES.image
    assert media["seed"] == 3
    read = list(texts(known.folder))
    assert len(read) == sum(getattr(SIZES, kind) for kind in (*KINDS, "text", "gist"))
    assert any("Read the text." in text for text in read)


def test_a_gist_is_one_word_of_what_is_shown_or_said(known):
    records = known.read("generative/gist")
    asked = {
        record["anchor"]["text"] if record["anchor"]["text"][:10] == "\nSummarize" else None
        for record in records
    }
    assert asked == {None, *(PROMPTS[kind] for kind in ("image", "video", "audio"))}
    for record in records:
        content, _, prompt = record["anchor"]["text"].partition("\nSummarize")
        shown = known.said[content] if content else known.seen(record["anchor"])
        assert record["positive"] in words(shown)
        assert " " not in record["positive"]
        assert not concepts.held_out(shown)
        assert prompt.endswith("in one word:")


def test_answers_and_captions_say_what_is_shown(known):
    for kind in KINDS:
        for split in ("generative", "heldout"):
            canonical = 0
            for record in known.read(f"{split}/{kind}"):
                shown, answer = known.seen(record["anchor"]), record["positive"]
                assert concepts.held_out(shown) == (split == "heldout")
                if kind == "page":
                    assert (answer, record["anchor"]["text"]) == (
                        page_text(shown),
                        "\nRead the text.",
                    )
                else:
                    assert known.said[answer] == shown
                    canonical += answer == wording(shown)
            if kind != "page":
                assert (
                    canonical >= getattr(SIZES, kind) / 2
                    if split == "generative"
                    else SIZES.heldout
                )
        pairs = known.read(f"tests/retrieval_{kind}")
        assert all(known.said[pair["text"]] == known.seen(pair["media"]) for pair in pairs)
        assert (
            len({known.seen(pair["media"]) for pair in pairs})
            == len({pair["text"] for pair in pairs})
            == len(pairs)
        )
        assert all(concepts.held_out(known.seen(pair["media"])) for pair in pairs)
    kinds = Counter()
    for record in known.read("contrast/media"):
        assert known.said[record["positive"]] == known.seen(record["anchor"])
        assert not concepts.held_out(known.seen(record["anchor"]))
        kinds[type(known.seen(record["anchor"]))] += 1
    assert kinds[Page] == kinds[Motion] == kinds[Sound] == kinds[Things] + kinds[Pair]


def flat(meaning):
    return (
        [meaning]
        if not isinstance(meaning, tuple)
        else [atom for part in meaning for atom in flat(part)]
    )


def test_triplets_differ_in_an_atom_and_texts_of_training_name_nothing_held_out(known):
    for name, held in (("contrast/text", False), ("tests/text", True)):
        for record in known.read(name):
            anchor, positive, negative = (
                known.said[record[side]] for side in ("anchor", "positive", "negative")
            )
            assert anchor == positive
            assert record["anchor"] != record["positive"]
            assert concepts.held_out(anchor) == held
            assert held or not concepts.held_out(negative)
            a, b = flat(astuple(anchor)), flat(astuple(negative))
            differ = sum(x != y for x, y in zip(a, b, strict=True))
            assert differ == 1 or (differ > 1 and Counter(a) == Counter(b))  # exchanged
    for record in known.read("generative/text"):
        one, other = (
            record["anchor"]["text"].removesuffix("\nSay it in other words."),
            record["positive"],
        )
        assert one != other
        assert known.said[one] == known.said[other]
        assert not concepts.held_out(known.said[other])


def test_minimal_pairs_labels_and_crossings(known):
    pairs = known.read("tests/minimal")
    assert {(pair["kind"], pair["attribute"]) for pair in pairs} == set(world.MINIMAL)
    for pair in pairs:
        shown = known.seen(pair["media"])
        assert known.said[pair["right"]] == shown != known.said[pair["wrong"]]
        assert concepts.held_out(shown)
    for kind, labels in (("image", concepts.SEEN), ("audio", concepts.HEARD)):
        records = known.read(f"tests/zeroshot_{kind}")
        assert {record["label"] for record in records} == set(labels)
        assert all(
            record["label"] in flat(astuple(known.seen(record["media"]))) for record in records
        )
        assert all(concepts.held_out(known.seen(record["media"])) for record in records)
    crossed = known.read("tests/cross")
    assert len({record["concept"] for record in crossed}) == len(crossed)
    assert {record["held_out"] for record in crossed} == {True, False}
    for record in crossed:
        image, group = known.seen(record["image"]), known.seen(record["audio"]).groups[0]
        assert (
            record["concept"]
            == concept(image.count, image.thing)
            == concept(group.count, group.thing)
        )
        assert record["held_out"] == concepts.count_held(image.thing, image.count)
    for file in known.folder.rglob("*.jsonl"):
        if file.stem != "cross":
            assert not any(
                {"image_path", "audio_path"} <= set(json.dumps(line).split('"'))
                for line in file.open()
            )


@pytest.mark.parametrize("kind", KINDS)
def test_every_atom_is_trained_on_and_a_fifth_or_more_of_the_meanings_is_not(kind):
    rng = np.random.default_rng(0)
    trained = [concepts.draw(kind, rng, held=False) for _ in range(1500)]
    atoms = {atom for meaning in trained for atom in flat(astuple(meaning))}
    if kind == "page":
        letters = {
            letter for script in concepts.SCRIPTS.values() for part in script for letter in part
        }
        assert {letter for word in atoms for letter in word} == letters
    else:
        everything = {
            atom for _ in range(1500) for atom in flat(astuple(concepts.draw(kind, rng, held=True)))
        }
        assert everything <= atoms
    held = np.mean([concepts.held_out(concepts._draw(kind, rng, held=False)) for _ in range(1500)])
    assert kind == "page" or 0.15 < held < 0.6


def test_no_two_meanings_share_a_wording():
    rng, said = np.random.default_rng(0), {}
    for i in range(6000):
        meaning = concepts.draw(KINDS[i % 4], rng, held=i % 8 < 4)
        assert said.setdefault(wording(meaning, rng), meaning) == meaning
        assert said.setdefault(wording(meaning), meaning) == meaning
    assert wording(Things(2, "small", "red", "drum")) == "two small red drums"


# ---- what media show, measured


def blobs(image):
    """Of each blob of ink: its pixels, its centre (x, y) and its width. Nothing is drawn in the
    first row.
    """
    pixels = np.asarray(image, np.int16)
    ink = np.abs(pixels - np.median(pixels[0], axis=0)).max(-1) > 60
    marks, count = ndimage.label(ink, np.ones((3, 3)))
    found = []
    for mark, (rows, columns) in enumerate(ndimage.find_objects(marks, count), 1):
        inside = marks == mark
        centre = (columns.start + columns.stop) / 2, (rows.start + rows.stop) / 2
        width = max(columns.stop - columns.start, rows.stop - rows.start)
        if inside.sum() > 3:
            found.append((pixels[inside], centre, width))
    return found


def colour_of(pixels):
    distance = {name: np.median(np.abs(pixels - rgb).sum(1)) for name, rgb in draw.RGB.items()}
    return min(distance, key=distance.get)


@pytest.mark.parametrize("held", [False, True])
def test_pictures_show_their_counts_colours_sizes_and_relations(held):
    rng = np.random.default_rng(7)
    for _ in range(150):
        meaning = concepts.draw("image", rng, held)
        found = blobs(draw.picture(meaning, rng))
        if isinstance(meaning, Things):
            assert len(found) == meaning.count, meaning
            assert {colour_of(pixels) for pixels, _, _ in found} == {meaning.colour}
            assert all((width > 18) == (meaning.size == "large") for _, _, width in found), meaning
        else:
            (_, a, _), (_, b, _) = found
            axis = meaning.way == "above"
            first, second = sorted(found, key=lambda blob: blob[1][axis])
            assert abs(a[axis] - b[axis]) > abs(a[1 - axis] - b[1 - axis])
            assert [colour_of(first[0]), colour_of(second[0])] == [
                meaning.first.colour,
                meaning.second.colour,
            ]


def test_clips_show_their_motion_colour_and_size():
    rng = np.random.default_rng(8)
    for _ in range(100):
        meaning = concepts.draw("video", rng, held=False)
        found = [blobs(frame) for frame in draw.clip(meaning, rng)]
        assert [len(frame) for frame in found] == [1] * 4
        x, y = np.subtract(found[-1][0][1], found[0][0][1])
        assert {"left": x < -20, "right": x > 20, "up": y < -20, "down": y > 20}[
            meaning.direction
        ], meaning
        assert min(abs(x), abs(y)) < 3
        assert colour_of(found[0][0][0]) == meaning.colour
        assert (found[0][0][2] > 16) == (meaning.size == "large")


def onsets(samples):
    """Seconds at which a sound sets in: after near silence, or with a jump of its envelope."""
    frame = RATE // 200
    level = np.sqrt((samples[: len(samples) // frame * frame].reshape(-1, frame) ** 2).mean(1))
    level = np.maximum(level, 0.02 * level.max())
    rise = np.log(level[4:] / level[:-4])
    peaks, _ = ndimage.label(rise > 0.7)
    return [np.flatnonzero(peaks == peak)[0] / 200 for peak in range(1, peaks.max() + 1)]


def test_sounds_have_their_number_of_events_tempo_and_pitch():
    rng, centres = np.random.default_rng(9), {}
    for _ in range(300):
        meaning = concepts.draw("audio", rng, held=bool(rng.integers(2)))
        samples = sound(meaning, rng)
        assert len(samples) <= 1.2 * RATE
        assert 0.3 < np.abs(samples).max() < 1
        times = onsets(samples)
        assert len(times) == sum(group.count for group in meaning.groups), (meaning, times)
        if meaning.tempo:
            assert (np.diff(times).mean() > 0.22) == (meaning.tempo == "slow")
        if len(meaning.groups) > 1:
            continue
        group = meaning.groups[0]
        power = np.abs(np.fft.rfft(samples)) ** 2
        centres.setdefault((group.thing, group.pitch), []).append(
            np.fft.rfftfreq(len(samples), 1 / RATE)[power.argmax()]
        )
    for thing in concepts.HEARD:
        assert np.median(centres[thing, "high"]) > 1.5 * np.median(centres[thing, "low"]), thing


def test_pages_show_each_line(known):
    for record in known.read("heldout/page"):
        image = Image.open(known.folder / "heldout" / record["anchor"]["image_path"])
        lines = record["positive"].split(" ")
        assert image.size == (112, 56 if len(lines) == 1 else 84)
        ink = np.asarray(image.convert("L")) < 150
        parts = np.array_split(ink, len(lines))
        assert all(part.sum() > 40 for part in parts)
        assert not ink[:, [0, -1]].any()


def test_what_a_world_cannot_have_is_said(tmp_path):
    with pytest.raises(LcoError, match=r"sizes\.audio is 0"):
        Sizes(audio=0)
    small = Sizes(1, 1, 1, 1, 1, 1, 1, retrieval=400)
    with pytest.raises(LcoError, match="fewer than 400 held-out meanings of video"):
        world.write(tmp_path / "world", 0, small)
    assert not any(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(LcoError, match="was not written by lco_jax"):
        world.write(tmp_path / "mine", 0, SIZES)
    assert Path(tmp_path / "mine" / "file").exists()
