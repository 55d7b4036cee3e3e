"""The laboratory's world of real data, on tiny sets of the same form."""

import json
import re
from collections import Counter, defaultdict

import numpy as np
import pytest
import soundfile
from PIL import Image
from tfds_files import class_label, image_feature, png, write_tfds

from laboratory import worlds
from laboratory.real import DIGITS, KINDS, LABELS, QUESTION, Sizes, small, write
from lco_jax import LcoError
from lco_jax.data.sources import JsonlSource

SPEAKERS = ("anna", "bela", "cleo", "dora")


def image_rows(shape, count):
    """`count` rows of each class; an image's grey says its class."""
    return [
        {"image": png(np.full(shape, 20 * label, np.uint8)), "label": label}
        for _ in range(count)
        for label in range(10)
    ]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """CIFAR-10 with names of its labels, MNIST without, and four speakers."""
    folder = tmp_path_factory.mktemp("data")
    for name, shape, labels in (
        ("cifar10", (32, 32, 3), {"label": LABELS}),
        ("mnist", (28, 28), None),
    ):
        rows = {split: image_rows(shape, count) for split, count in (("train", 3), ("test", 2))}
        sizes = shape if len(shape) == 3 else (*shape, 1)
        features = {"image": image_feature(*sizes), "label": class_label(10)}
        write_tfds(
            folder / "tfds",
            name,
            features,
            rows,
            labels,
            {"cifar10": "3.0.2", "mnist": "3.0.1"}[name],
        )
    (folder / "fsdd").mkdir()
    for digit in range(10):
        for speaker in SPEAKERS:
            for i in range(2):
                soundfile.write(folder / "fsdd" / f"{digit}_{speaker}_{i}.wav", np.zeros(800), 8000)
    return folder


def read(folder, name):
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


def meaning(text):
    """The one (kind, class) that a caption says."""
    said = [
        (name, label)
        for name, kind in KINDS.items()
        for label in kind.names
        if text in every(kind, label)
    ]
    assert len(said) == 1, (text, said)
    return said[0]


def every(kind, label):
    return [*kind.all(label), kind.unseen(label)]


def shown(world, side):
    """The (kind, class) of what a medium is, told from its pixels or its name."""
    if path := side.get("audio_path"):
        return "spoken", DIGITS[int(re.search(r"(\d)_[a-z]+_\d+\.wav$", path)[1])]
    with Image.open(world / "tests" / side["image_path"]) as image:
        assert image.size == (56, 56)
        kind, grey = ("photo" if image.mode == "RGB" else "written"), int(np.asarray(image).flat[0])
    return kind, (LABELS if kind == "photo" else DIGITS)[grey // 20]


@pytest.fixture(scope="module", params=[0, 1])
def world(request, data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("worlds") / "real"
    write(folder, data_dir, request.param, small())
    return folder


def test_captions_say_what_the_media_are(world):
    pairs = [
        (record["anchor"], record["positive"])
        for name in (
            "generative/image",
            "generative/audio",
            "heldout/image",
            "heldout/audio",
            "contrast/media",
        )
        for record in read(world, f"{name}.jsonl")
    ]
    for kind in ("image", "audio"):
        pairs += [
            (record["media"], record["text"])
            for record in read(world, f"tests/retrieval_{kind}.jsonl")
        ]
    for kind in ("image", "digit", "audio"):
        pairs += [
            (record["media"], record["label"])
            for record in read(world, f"tests/zeroshot_{kind}.jsonl")
        ]
    assert all(shown(world, side) == meaning(text) for side, text in pairs)
    for record in read(world, "tests/cross.jsonl"):
        assert shown(world, record["image"]) == ("written", record["concept"])
        assert shown(world, record["audio"]) == ("spoken", record["concept"])


def test_a_tokenizer_can_be_trained_on_its_texts(world):
    found = list(worlds.texts(world))
    assert len(found) == sum(
        len(read(world, f"generative/{kind}.jsonl")) for kind in ("image", "audio", "text", "gist")
    )
    assert any(QUESTION in text for text in found)


def test_texts_mean_the_same_and_negatives_another(world):
    for name in ("contrast/text", "tests/text"):
        for record in read(world, f"{name}.jsonl"):
            assert (
                meaning(record["anchor"])
                == meaning(record["positive"])
                != meaning(record["negative"])
            )
            assert record["anchor"] != record["positive"]
    for record in read(world, "generative/gist.jsonl"):
        assert record["positive"] in (*LABELS, *DIGITS)
        assert record["anchor"]["text"].endswith("in one word:")
    for record in read(world, "generative/text.jsonl"):
        text = record["anchor"].removesuffix(QUESTION)
        assert text not in (record["anchor"], record["positive"])
        assert meaning(text) == meaning(record["positive"])


def test_a_held_out_text_has_one_right_answer(world):
    records = read(world, "tests/text.jsonl")
    candidates = Counter(
        meaning(record[side]) for record in records for side in ("positive", "negative")
    )
    assert set(candidates.values()) == {1}


def test_contrast_mentions_no_held_out_class_and_generation_all(world):
    held = json.loads((world / "world.json").read_text())["held_out"]["classes"]
    held = {(kind, label) for kind, labels in held.items() for label in labels}
    assert len(held) == 6
    everything = {(name, label) for name, kind in KINDS.items() for label in kind.names}
    text, media = read(world, "contrast/text.jsonl"), read(world, "contrast/media.jsonl")
    mentioned = [meaning(value) for record in text for value in record.values()]
    assert set(mentioned) == everything - held  # 48 records of three texts each: all the rest occur
    assert Counter(meaning(r["anchor"]) for r in text) == Counter(
        meaning(r["positive"]) for r in media
    )
    generated = [
        shown(world, r["anchor"])
        for k in ("image", "audio")
        for r in read(world, f"generative/{k}.jsonl")
    ]
    assert set(generated) == everything
    for kind in ("image", "digit", "audio"):
        records = read(world, f"tests/zeroshot_{kind}.jsonl")
        assert all(record["held_out"] == (meaning(record["label"]) in held) for record in records)
    cross = read(world, "tests/cross.jsonl")
    assert all(record["held_out"] == (("written", record["concept"]) in held) for record in cross)


def test_training_and_tests_share_no_speaker_no_photo_and_no_held_out_wording(world):
    media, texts = defaultdict(set), defaultdict(str)
    for path in world.glob("*/*.jsonl"):
        part = "seen" if path.parent.name in ("generative", "contrast") else "unseen"
        content = path.read_text(encoding="utf-8")
        media[part] |= set(re.findall(r'_path": "([^"]+)"', content))
        texts[path.parent.name] += content
    assert not media["seen"] & media["unseen"]
    speaker = re.compile(r"\d_([a-z]+)_\d\.wav")
    speakers = {
        part: {found[1] for path in paths if (found := speaker.search(path))}
        for part, paths in media.items()
    }
    assert (
        set(json.loads((world / "world.json").read_text())["held_out"]["speakers"])
        == speakers["unseen"]
    )
    assert speakers["seen"] == set(SPEAKERS) - speakers["unseen"]
    for kind in KINDS.values():
        for label in kind.names:
            assert kind.unseen(label) not in texts["generative"] + texts["contrast"]
    written = {f"../media/{path.name}" for path in (world / "media").iterdir()}
    assert written == {path for part in media.values() for path in part if path.endswith(".png")}


def test_training_reads_every_file(world):
    for name in ("generative", "heldout", "contrast"):
        for path in sorted((world / name).glob("*.jsonl")):
            assert len(JsonlSource(str(path))) == len(read(world, path.relative_to(world)))


def test_equal_seeds_give_equal_bytes_and_others_do_not(world, data_dir, tmp_path):
    seed = json.loads((world / "world.json").read_text())["seed"]
    for given in (0, 1):
        write(tmp_path / str(given), data_dir, given, small())

    def content(folder):
        return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    assert content(world) == content(tmp_path / str(seed))
    assert content(world) != content(tmp_path / str(1 - seed))


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        (Sizes(photos=9), "'cifar10' (train) has 3 of class"),
        (Sizes(photos=2, written=9), "'mnist' (train) has 3 of class"),
        (Sizes(photos=2, written=2, spoken=9), "FSDD (speakers"),
    ],
)
def test_too_little_data_is_one_sentence_and_leaves_nothing(data_dir, tmp_path, sizes, named):
    with pytest.raises(LcoError, match=re.escape(named)):
        write(tmp_path / "world", data_dir, 0, sizes)
    assert not list(tmp_path.iterdir())


def test_absent_data_is_one_sentence(data_dir, tmp_path):
    with pytest.raises(LcoError, match=r"fsdd/\*\.wav holds no usable record"):
        write(tmp_path / "world", tmp_path / "nowhere", 0, small())
    (tmp_path / "fsdd").symlink_to(data_dir / "fsdd")
    with pytest.raises(LcoError, match="there is no folder"):
        write(tmp_path / "world", tmp_path, 0, small())
