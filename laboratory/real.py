"""A world folder of real things: photos (CIFAR-10), written digits (MNIST), spoken digits (FSDD).

What is held out, and where:

- two *speakers* of FSDD: only in heldout/ and tests/;
- two *digits* and two *photo classes*: in generative/, and nowhere in contrast/;
- one *wording* of each kind: only in tests/text.jsonl;
- test images come from the datasets' test splits.

No record pairs an image with a sound. tests/cross.jsonl asks whether a written and a spoken seven
are one concept.

Sources: Krizhevsky 2009 (CIFAR-10); LeCun, Cortes and Burges (MNIST); Jackson et al., Free Spoken
Digit Dataset.
"""

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from configs.cifar10 import DIGITS, LABELS
from lco_jax.core.errors import LcoError
from lco_jax.core.files import write_json, write_text, written_aside
from lco_jax.data.captions import FilesSource
from lco_jax.data.prompts import PROMPTS
from lco_jax.data.tfds import CaptionedSource

# pixels of a written image's side: four tokens of a tower with patches of 14 that merges 2 x 2
SIDE = 56
QUESTION = "\nSay it in other words."  # asked of a text

Media = dict[str, str]  # a side, such as {"image_path": "../media/photo_test_00001.png"}
Pool = dict[str, list[Media]]  # class -> its media


@dataclass(frozen=True)
class Sizes:
    """How much of what is written. Classes are balanced."""

    photos: int = 600  # of a class, in generative/
    written: int = 400
    spoken: int = 200  # of the training speakers' clips of a digit
    text: int = 2000  # records
    gist: int = 6000
    contrast: int = 2400  # records of either file
    heldout: int = 6  # media of a class
    tests: int = 20  # media of a class, for zero-shot classification and image <-> audio


def small() -> Sizes:
    """Enough for a test of everything."""
    return Sizes(photos=2, written=2, spoken=4, text=40, gist=24, contrast=48, heldout=1, tests=2)


@dataclass(frozen=True)
class Kind:
    """What there are captions of. wordings: the first is canonical, the last is for
    tests/text.jsonl alone.
    """

    medium: str
    test: str  # what its zero-shot test is called
    wordings: Sequence[str]
    names: Mapping[str, Sequence[str]]

    def canonical(self, label: str) -> str:
        return self.wordings[0].format(self.names[label][0])

    def all(self, label: str) -> list[str]:
        """Every caption of a class but the one held out."""
        return [
            wording.format(name) for wording in self.wordings[:-1] for name in self.names[label]
        ]

    def unseen(self, label: str) -> str:
        return self.wordings[-1].format(self.names[label][0])


NOUNS = {label: (f"{'an' if label[0] in 'aeiou' else 'a'} {label}",) for label in LABELS}
SYNONYMS = {
    "airplane": ("a plane",),
    "automobile": ("a car",),
    "ship": ("a boat",),
    "truck": ("a lorry",),
}
NUMBERS = {word: (word, str(digit)) for digit, word in enumerate(DIGITS)}
KINDS = {
    "photo": Kind(
        "image",
        "image",
        (
            "a photo of {}",
            "a picture showing {}",
            "this photo shows {}",
            "an image of {}",
            "{} in a small picture",
            "you can see {} here",
            "what the camera saw was {}",
            "a small photo showing {}",
        ),
        {label: (*names, *SYNONYMS.get(label, ())) for label, names in NOUNS.items()},
    ),
    "written": Kind(
        "image",
        "digit",
        (
            "the handwritten digit {}",
            "a written {}",
            "someone wrote {}",
            "a picture of the digit {}",
            "the number {} in handwriting",
            "a handwritten number, which is {}",
            "a picture of a handwritten {}",
        ),
        NUMBERS,
    ),
    "spoken": Kind(
        "audio",
        "audio",
        (
            "the spoken digit {}",
            "a voice saying {}",
            "someone says {}",
            "a recording of the word {}",
            "the number {} said aloud",
            "a spoken number, which is {}",
            "a recording of someone saying {}",
        ),
        NUMBERS,
    ),
}


def write(folder: Path, data_dir: Path, seed: int = 0, sizes: Sizes | None = None) -> None:
    """Make `folder` a world of real things; the layout is the laboratory's (docs/laboratory.md).

    data_dir: holds tfds/cifar10 and tfds/mnist as array_record files, and
    fsdd/{digit}_{speaker}_{n}.wav; sounds are used where they are. seed: draws what is held out,
    which media are taken and all wordings; equal seeds give equal bytes. Raises `LcoError` where
    data is missing or too little.
    """
    sizes, rng = sizes or Sizes(), np.random.default_rng(seed)
    clips = _clips(data_dir / "fsdd")
    speakers = rng.permutation(sorted(clips)).tolist()
    held = {
        "photo": rng.permutation(LABELS)[:2].tolist(),
        "written": rng.permutation(DIGITS)[:2].tolist(),
    }
    held["spoken"] = held["written"]
    with written_aside(folder) as aside:
        train = {
            "photo": _images(aside, "photo", data_dir, "train", sizes.photos, rng),
            "written": _images(aside, "written", data_dir, "train", sizes.written, rng),
            "spoken": _sounds(clips, speakers[2:], sizes.spoken, rng),
        }
        tests = {
            "photo": _images(aside, "photo", data_dir, "test", sizes.tests, rng),
            "written": _images(aside, "written", data_dir, "test", sizes.tests, rng),
            "spoken": _sounds(clips, speakers[:2], sizes.tests, rng),
        }
        files = (
            _generative(train, sizes, rng)
            | _contrast(train, held, sizes, rng)
            | _tests(tests, held, sizes, rng)
        )
        for name, records in files.items():
            shuffled = (
                records[i] for i in rng.permutation(len(records))
            )  # a reader may take the first so many
            write_text(aside / name, "".join(json.dumps(record) + "\n" for record in shuffled))
        about = {"photo": list(LABELS), "written": list(DIGITS), "spoken": list(DIGITS)}
        world = {"name": "real", "seed": seed, "sizes": asdict(sizes), "concepts": about}
        world["held_out"] = {
            "classes": held,
            "speakers": speakers[:2],
            "meaning": "classes are nowhere in contrast/; speakers are in tests/ alone",
        }
        write_json(aside / "world.json", world)


def _images(
    folder: Path, kind: str, data_dir: Path, split: str, count: int, rng: np.random.Generator
) -> Pool:
    """`count` images of each class, drawn from a TFDS split and written to media/ as png of SIDE x
    SIDE pixels.
    """
    name, labels = {"photo": ("cifar10", LABELS), "written": ("mnist", DIGITS)}[kind]
    # copies of the sets without label.labels.txt have numbers for names
    values = {"label": {key: label for i, label in enumerate(labels) for key in (str(i), label)}}
    source = CaptionedSource(name, "{label}", split, str(data_dir / "tfds"), values=values)
    (folder / "media").mkdir(exist_ok=True)
    pool: Pool = {label: [] for label in labels}
    for row in rng.permutation(len(source)).tolist():
        record = source[row]
        if len(found := pool[record.positive]) == count:
            if all(len(media) == count for media in pool.values()):
                break
            continue
        path = f"media/{kind}_{split}_{row:05d}.png"
        with Image.open(io.BytesIO(record.anchor[0]["image"])) as image:
            image.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / path)
        found.append({"image_path": f"../{path}"})
    return _enough(pool, count, f"the TFDS dataset {name!r} ({split})")


def _clips(folder: Path) -> dict[str, Pool]:
    """speaker -> digit -> clips, as they are in FSDD's folder."""
    digits = {str(i): word for i, word in enumerate(DIGITS)}
    source = FilesSource(
        str(folder / "*.wav"),
        r"(?P<digit>\d)_(?P<speaker>[a-z]+)_\d+\.wav",
        "{digit} {speaker}",
        {"digit": digits},
    )
    clips: dict[str, Pool] = {}
    for record in map(source.__getitem__, range(len(source))):
        digit, speaker = record.positive.split()
        clips.setdefault(speaker, {word: [] for word in DIGITS})[digit].append(
            {"audio_path": record.anchor[0]["audio"]}
        )
    if len(clips) < 3:
        raise LcoError(
            f"{folder} has {len(clips)} speakers, and must have three or more: two are held out"
        )
    return clips


def _sounds(
    clips: dict[str, Pool], speakers: Iterable[str], count: int, rng: np.random.Generator
) -> Pool:
    """`count` clips of each digit by these speakers."""
    speakers = list(speakers)
    pool: Pool = {}
    for digit in DIGITS:
        found = [clip for speaker in speakers for clip in clips[speaker][digit]]
        pool[digit] = [found[i] for i in rng.permutation(len(found))[:count]]
    return _enough(pool, count, f"FSDD (speakers {', '.join(speakers)})")


def _enough(pool: Pool, count: int, where: str) -> Pool:
    for label, media in pool.items():
        if len(media) < count:
            raise LcoError(
                f"{where} has {len(media)} of class {label!r}, "
                f"and the world's sizes ask for {count}"
            )
    return pool


def _generative(
    train: dict[str, Pool], sizes: Sizes, rng: np.random.Generator
) -> dict[str, list[dict[str, Any]]]:
    """The records of generative training.

    Media and what they show: half of the answers are canonical, half are in any wording. Texts, and
    the same in other words. Media and texts in turn, with the prompt for embedding; the answer is
    the class in one word.
    """
    files: dict[str, list[dict[str, Any]]] = {}
    for kind, pool in train.items():
        records = files.setdefault(f"generative/{KINDS[kind].medium}.jsonl", [])
        for label, media in pool.items():
            for i, side in enumerate(media):
                answer = (
                    _one(KINDS[kind].all(label), rng) if i % 2 else KINDS[kind].canonical(label)
                )
                records.append({"anchor": side, "positive": answer})
    meanings = [(kind, label) for kind in KINDS.values() for label in kind.names]
    texts = (_two(*meanings[i], rng) for i in rng.integers(len(meanings), size=sizes.text))
    files["generative/text.jsonl"] = [
        {"anchor": text + QUESTION, "positive": other} for text, other in texts
    ]
    gists = files.setdefault("generative/gist.jsonl", [])
    for i in range(sizes.gist):
        name = list(KINDS)[i // 2 % len(KINDS)]
        label = _one(list(train[name]), rng)
        side = (
            {"text": _one(KINDS[name].all(label), rng)} if i % 2 else _one(train[name][label], rng)
        )
        prompt = PROMPTS["text" if i % 2 else KINDS[name].medium]
        gists.append({"anchor": {**side, "text": side.get("text", "") + prompt}, "positive": label})
    return files


def _contrast(
    train: dict[str, Pool],
    held: Mapping[str, Sequence[str]],
    sizes: Sizes,
    rng: np.random.Generator,
) -> dict[str, list[dict[str, Any]]]:
    """Both files have equally many records of each meaning: kinds in turn, classes (none held out)
    at random.
    """
    texts, media = [], []
    for i in range(sizes.contrast):
        name = list(KINDS)[i % len(KINDS)]
        kind, seen = KINDS[name], [label for label in KINDS[name].names if label not in held[name]]
        label, other = rng.choice(seen, size=2, replace=False).tolist()
        anchor, positive = _two(kind, label, rng)
        texts.append(
            {"anchor": anchor, "positive": positive, "negative": _one(kind.all(other), rng)}
        )
        media.append(
            {"anchor": _one(train[name][label], rng), "positive": _one(kind.all(label), rng)}
        )
    return {"contrast/text.jsonl": texts, "contrast/media.jsonl": media}


def _tests(
    tests: dict[str, Pool],
    held: Mapping[str, Sequence[str]],
    sizes: Sizes,
    rng: np.random.Generator,
) -> dict[str, list[dict[str, Any]]]:
    """heldout/ and tests/. Labels are whole captions, so that a text encoder meets what it was
    tuned on.
    """
    files: dict[str, list[dict[str, Any]]] = {"tests/text.jsonl": []}
    for name, pool in tests.items():
        kind = KINDS[name]
        heldout = files.setdefault(f"heldout/{kind.medium}.jsonl", [])
        retrieval = files.setdefault(f"tests/retrieval_{kind.medium}.jsonl", [])
        zeroshot = files.setdefault(f"tests/zeroshot_{kind.test}.jsonl", [])
        for label, media in pool.items():
            caption, out = kind.canonical(label), label in held[name]
            heldout += [{"anchor": side, "positive": caption} for side in media[: sizes.heldout]]
            retrieval.append({"media": media[0], "text": caption})
            zeroshot += [{"media": side, "label": caption, "held_out": out} for side in media]
        classes = rng.permutation(list(pool)).tolist()
        half = (
            len(classes) // 2
        )  # no class is both an anchor's and a negative's: every text has one right answer
        for label, other in zip(classes[:half], classes[half:], strict=True):
            positive, negative = _one(kind.all(label), rng), _one(kind.all(other), rng)
            record = {"anchor": kind.unseen(label), "positive": positive, "negative": negative}
            files["tests/text.jsonl"].append(record)
    files["tests/cross.jsonl"] = [
        {"image": image, "audio": sound, "concept": digit, "held_out": digit in held["written"]}
        for digit in DIGITS
        for image, sound in zip(tests["written"][digit], tests["spoken"][digit], strict=True)
    ]
    return files


def _one(values: Sequence[Any], rng: np.random.Generator) -> Any:
    return values[rng.integers(len(values))]


def _two(kind: Kind, label: str, rng: np.random.Generator) -> list[str]:
    """Two wordings of one class."""
    return rng.choice(kind.all(label), size=2, replace=False).tolist()
