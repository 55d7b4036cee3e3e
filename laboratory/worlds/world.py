"""A world's folder: media, and records for generative training, contrastive tuning and tests.

Training records (generative/, contrast/) hold no combination that is held out; heldout/ and tests/
hold only such combinations (cross.jsonl has both, and names which). Only cross.jsonl pairs a
picture with a sound.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import soundfile

from laboratory.worlds import concepts
from laboratory.worlds.captions import another_wording, concept, page_text, wording, words
from laboratory.worlds.concepts import COUNTS, HEARD, KINDS, SEEN, SOUNDING, Meaning, Page, Things
from laboratory.worlds.draw import clip, picture
from laboratory.worlds.pages import page
from laboratory.worlds.sound import RATE, sound
from lco_jax.core.errors import LcoError
from lco_jax.core.files import write_json, written_aside
from lco_jax.data.prompts import PROMPTS

NAME = "shapes and sounds"
READ = "\nRead the text."
REPHRASE = "\nSay it in other words."
TEXTS = (
    "image",
    "image",
    "video",
    "audio",
    "audio",
    "page",
)  # what texts are about, in equal shares
TRIES = 2000  # draws without a new one, after which there are held to be no more
# what a minimal pair differs by: (kind of media, attribute)
MINIMAL = [
    *(("image", x) for x in ("object", "colour", "count", "size", "binding", "relation", "letter")),
    *(("video", x) for x in ("object", "colour", "size", "motion")),
    *(("audio", x) for x in ("object", "count", "pitch", "tempo", "order")),
]


@dataclass(frozen=True)
class Sizes:
    """How many records: of generative training by kind, of contrastive tuning, and of each test's
    file.
    """

    image: int = 6000
    video: int = 2000
    audio: int = 8000
    page: int = 2500
    text: int = 3000
    gist: int = 6000
    contrast: int = 4000
    heldout: int = 120
    retrieval: int = 100
    minimal: int = 240
    zeroshot: int = 110
    triplets: int = 200

    @classmethod
    def small(cls) -> "Sizes":
        """A world for tests, made in about a second."""
        return cls(60, 30, 50, 40, 40, 48, 60, 12, 24, 32, 22, 20)

    def __post_init__(self):
        for field in fields(self):
            if (size := getattr(self, field.name)) < 1:
                raise LcoError(f"sizes.{field.name} is {size}, and must be at least 1")


def write(folder: Path, seed: int, sizes: Sizes | None = None) -> None:
    """Make a world in `folder`; the same seed and sizes give the same bytes.

    Raises for a folder that holds something else, and where more different meanings are asked for
    than there are.
    """
    sizes = Sizes() if sizes is None else sizes
    with written_aside(Path(folder)) as aside:
        world = World(aside, seed)
        held = [
            concept(n, thing)
            for thing in SEEN + HEARD[-2:]
            for n in COUNTS
            if concepts.count_held(thing, n)
        ]
        about = {
            "objects": SEEN,
            "sounds": HEARD,
            "colours": concepts.COLOURS,
            "counts": COUNTS,
            "held_out": held,
        }
        write_json(
            aside / "world.json",
            {"name": NAME, "seed": seed, "sizes": asdict(sizes), "concepts": about},
        )
        for kind in KINDS:
            world.lines(f"generative/{kind}", world.answers(kind, getattr(sizes, kind), held=False))
            world.lines(f"heldout/{kind}", world.answers(kind, sizes.heldout, held=True))
            world.lines(f"tests/retrieval_{kind}", world.retrieval(kind, sizes.retrieval))
        world.lines("generative/text", world.rephrased(sizes.text))
        world.lines("generative/gist", world.summed_up(sizes.gist))
        world.lines("contrast/text", world.triplets(sizes.contrast, held=False))
        world.lines("contrast/media", world.captioned(sizes.contrast))
        world.lines("tests/text", world.triplets(sizes.triplets, held=True))
        world.lines("tests/minimal", world.minimal(sizes.minimal))
        world.lines("tests/zeroshot_image", world.labelled("image", SEEN, sizes.zeroshot))
        world.lines("tests/zeroshot_audio", world.labelled("audio", HEARD, sizes.zeroshot))
        world.lines("tests/cross", world.crossed())


def texts(folder: Path) -> Iterator[str]:
    """Every text of a world's generative records: what a tokenizer is trained on."""
    for file in sorted((Path(folder) / "generative").glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            anchor = record["anchor"]  # a text alone, or an object
            yield (
                (anchor if isinstance(anchor, str) else anchor.get("text", ""))
                + "\n"
                + record["positive"]
            )


class World:
    """Writes one world. Each file has its own random generator, so sizes do not affect others."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed = folder, seed
        self.rng = np.random.default_rng()  # set for each file
        self.media = dict.fromkeys(KINDS, 0)  # how many there are
        for kind in KINDS:
            (folder / "media" / kind).mkdir(parents=True)

    def lines(self, name: str, records: Iterable[dict[str, Any]]) -> None:
        """Write records to `name`.jsonl, drawn while they are written."""
        self.rng = np.random.default_rng([self.seed, crc32(name.encode())])
        file = self.folder / f"{name}.jsonl"
        file.parent.mkdir(exist_ok=True)
        with file.open("w", encoding="utf-8") as out:
            out.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

    # ---- what one record is made of

    def say(self, meaning: Meaning, canonical: bool = False) -> str:
        """A wording, drawn at random unless it is to be the canonical one."""
        return wording(meaning, None if canonical else self.rng)

    def draw(self, kind: str, held: bool) -> Meaning:
        """A random meaning."""
        return concepts.draw(kind, self.rng, held)

    def side(self, kind: str, meaning: Meaning) -> dict[str, Any]:
        """Make a medium that shows the meaning -> the side of a record that names it."""
        stem = f"media/{kind}/{self.media[kind]:05d}"
        self.media[kind] += 1
        if kind == "audio":
            samples = sound(meaning, self.rng)
            soundfile.write(self.folder / f"{stem}.wav", samples, RATE, subtype="PCM_16")
            return {"audio_path": f"../{stem}.wav"}
        if kind == "video":
            frames = clip(meaning, self.rng)
        else:
            frames = [(page if kind == "page" else picture)(meaning, self.rng)]
        names = (
            [f"{stem}_{i}.png" for i in range(len(frames))] if kind == "video" else [f"{stem}.png"]
        )
        for name, frame in zip(names, frames, strict=True):
            frame.save(self.folder / name, compress_level=1)
        return (
            {"video_path": [f"../{name}" for name in names]}
            if kind == "video"
            else {"image_path": f"../{names[0]}"}
        )

    def different(self, kind: str, count: int) -> Iterator[Meaning]:
        """So many held-out meanings, no two equal."""
        seen: set[Meaning] = set()
        while len(seen) < count:
            draws = (self.draw(kind, held=True) for _ in range(TRIES))
            if (meaning := next((x for x in draws if x not in seen), None)) is None:
                raise LcoError(
                    f"a world has fewer than {count} held-out meanings of {kind}; "
                    f"ask for {len(seen)}"
                )
            seen.add(meaning)
            yield meaning

    # ---- the files

    def answers(self, kind: str, count: int, held: bool) -> Iterator[dict[str, Any]]:
        """Media and what to say of them: held out, and every other time in training, in the
        canonical wording.
        """
        for i in range(count):
            meaning = self.draw(kind, held)
            side = self.side(kind, meaning)
            if isinstance(meaning, Page):
                yield {"anchor": {**side, "text": READ}, "positive": page_text(meaning)}
            else:
                yield {"anchor": side, "positive": self.say(meaning, canonical=held or i % 2 == 0)}

    def summed_up(self, count: int) -> Iterator[dict[str, Any]]:
        """Media and texts in turn, asked as they will be to be embedded; the answer is one word of
        what they mean.
        """
        for i in range(count):
            kind = TEXTS[i // 2 % len(TEXTS)]
            meaning = self.draw(kind, held=False)
            content = "text" if i % 2 else "image" if kind == "page" else kind
            side = {"text": self.say(meaning)} if i % 2 else self.side(kind, meaning)
            anchor = {**side, "text": side.get("text", "") + PROMPTS[content]}
            yield {"anchor": anchor, "positive": concepts.pick(self.rng, words(meaning))}

    def rephrased(self, count: int) -> Iterator[dict[str, Any]]:
        """Wordings, and others of the same."""
        for i in range(count):
            meaning = self.draw(TEXTS[i % len(TEXTS)], held=False)
            one = self.say(meaning)
            yield {
                "anchor": {"text": one + REPHRASE},
                "positive": another_wording(meaning, one, self.rng),
            }

    def triplets(self, count: int, held: bool) -> Iterator[dict[str, Any]]:
        """Wordings, others of the same, and of what differs in one atom. Without `held`, nothing
        here is held out.
        """
        for i in range(count):
            meaning = self.draw(TEXTS[i % len(TEXTS)], held)
            foil = self.foil(meaning, concepts.pick(self.rng, concepts.attributes(meaning)), held)
            style = int(self.rng.integers(2**32))  # the negative is worded as the anchor is
            one, wrong = (wording(x, np.random.default_rng(style)) for x in (meaning, foil))
            yield {
                "anchor": one,
                "positive": another_wording(meaning, one, self.rng),
                "negative": wrong,
            }

    def foil(self, meaning: Meaning, attribute: str, held: bool) -> Meaning:
        """One atom changed; without `held`, so that nothing is held out (another atom where this
        one cannot be).
        """
        for _ in range(TRIES):
            foil = concepts.changed(meaning, attribute, self.rng)
            if held or not concepts.held_out(foil):
                return foil
            attribute = concepts.pick(self.rng, concepts.attributes(meaning))
        raise LcoError(f"all that is like {wording(meaning)!r} is held out")

    def captioned(self, count: int) -> Iterator[dict[str, Any]]:
        """Media and their captions, all kinds alike."""
        for i in range(count):
            kind = KINDS[i % len(KINDS)]
            meaning = self.draw(kind, held=False)
            yield {"anchor": self.side(kind, meaning), "positive": self.say(meaning)}

    def retrieval(self, kind: str, count: int) -> Iterator[dict[str, Any]]:
        """Media and their captions, no two of one meaning."""
        for meaning in self.different(kind, count):
            yield {"media": self.side(kind, meaning), "text": self.say(meaning)}

    def minimal(self, count: int) -> Iterator[dict[str, Any]]:
        """Media, their captions, and these with one atom changed, in the canonical wording."""
        for i in range(count):
            kind, attribute = MINIMAL[i % len(MINIMAL)]
            shown = "page" if attribute == "letter" else kind
            meaning = self.draw(shown, held=True)
            while attribute not in concepts.attributes(meaning):
                meaning = self.draw(shown, held=True)
            foil = self.foil(meaning, attribute, held=True)
            texts = {
                "right": self.say(meaning, canonical=True),
                "wrong": self.say(foil, canonical=True),
            }
            yield {
                "media": self.side(shown, meaning),
                "kind": kind,
                **texts,
                "attribute": attribute,
            }

    def labelled(self, kind: str, labels: tuple[str, ...], count: int) -> Iterator[dict[str, Any]]:
        """Media that show one kind of thing, all labels alike."""
        for i in range(count):
            label = labels[i % len(labels)]
            yield {"media": self.side(kind, self.draw_of(label, kind, held=True)), "label": label}

    def crossed(self) -> Iterator[dict[str, Any]]:
        """So many of a thing, seen and heard, once for each thing that is both and each count."""
        for thing in SOUNDING:
            for count in COUNTS:
                held = concepts.count_held(thing, count)
                image, audio = (
                    self.side(kind, self.draw_of(thing, kind, held, count))
                    for kind in ("image", "audio")
                )
                yield {
                    "image": image,
                    "audio": audio,
                    "concept": concept(count, thing),
                    "held_out": held,
                }

    def draw_of(self, thing: str, kind: str, held: bool, count: int | None = None) -> Meaning:
        """A meaning that has this thing and no other, and so many of it if a count is given."""
        while True:
            meaning = self.draw(kind, held)
            if isinstance(meaning, Things):
                found = meaning.thing, meaning.count
            elif kind == "audio" and len(meaning.groups) == 1:
                found = meaning.groups[0].thing, meaning.groups[0].count
            else:
                continue
            if found == (thing, found[1] if count is None else count):
                return meaning
