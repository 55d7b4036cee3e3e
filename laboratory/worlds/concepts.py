"""What there is in a world, which combinations are held out, and how a meaning is changed by one
atom.

A meaning is a frozen dataclass of atoms (words and numbers); media show it and captions say it.
Every atom occurs in training; about a fifth of the pairs of atoms named in `held_out` occur in
held-out records alone.
"""

from dataclasses import dataclass, replace

import numpy as np

SHAPES = ("circle", "square", "triangle", "cross")
SOUNDING = ("bell", "drum", "horn", "bird")  # have both an icon and a sound
TONES = ("rising tone", "falling tone")
SEEN, HEARD = SHAPES + SOUNDING, SOUNDING + TONES
COLOURS = ("red", "green", "blue", "yellow", "purple", "black")
COUNTS = (1, 2, 3, 4)
SIZES = ("small", "large")
WAYS = ("left of", "above")  # of two things, the one that is left or above is named first
DIRECTIONS = ("left", "right", "up", "down")
PITCHES = ("high", "low")
TEMPI = ("fast", "slow")
SCRIPTS = {  # (consonants, vowels): letters that nobody takes for one of another script
    "latin": ("dkmst", "aou"),
    "cyrillic": ("джшц", "июя"),
    "greek": ("βθλψ", "ιωε"),
    "georgian": ("ბმლკ", "აიე"),
}
KINDS = ("image", "video", "audio", "page")
_ALL = SHAPES + SOUNDING + TONES


@dataclass(frozen=True)
class Things:
    """A picture of one to four equal things."""

    count: int
    size: str
    colour: str
    thing: str


@dataclass(frozen=True)
class One:
    """One of the two things of a picture."""

    colour: str
    thing: str


@dataclass(frozen=True)
class Pair:
    """A picture of two things that differ in colour and kind: `first` is `way` `second`."""

    first: One
    way: str
    second: One


@dataclass(frozen=True)
class Motion:
    """A clip of one thing that moves."""

    size: str
    colour: str
    thing: str
    direction: str


@dataclass(frozen=True)
class Group:
    """Equal sounds, one to four of them."""

    count: int
    pitch: str
    thing: str


@dataclass(frozen=True)
class Sound:
    """One group, or two of different things, one after the other. tempo: of a group of several that
    is alone.
    """

    groups: tuple[Group, ...]
    tempo: str | None


@dataclass(frozen=True)
class Page:
    """One word, or two or three short ones, a line each."""

    words: tuple[str, ...]


Meaning = Things | Pair | Motion | Sound | Page


def held_out(meaning: Meaning) -> bool:
    """Whether it has a combination that training never shows or names; the same for all seeds."""
    if isinstance(meaning, Things):
        return _colour_held(meaning) or count_held(meaning.thing, meaning.count)
    if isinstance(meaning, Pair):
        return _colour_held(meaning.first) or _colour_held(meaning.second)
    if isinstance(meaning, Motion):
        return (
            _colour_held(meaning)
            or (_ALL.index(meaning.thing) + 3 * DIRECTIONS.index(meaning.direction)) % 5 == 0
        )
    if isinstance(meaning, Page):
        return any(word_held(word) for word in meaning.words)
    things = [_ALL.index(group.thing) for group in meaning.groups]
    if len(things) == 2 and (things[0] + 2 * things[1]) % 5 == 0:
        return True
    if meaning.tempo and (things[0] + 1 + 2 * TEMPI.index(meaning.tempo)) % 5 == 0:
        return True
    pitches = (2 * PITCHES.index(group.pitch) for group in meaning.groups)
    if any((thing + pitch) % 5 == 0 for thing, pitch in zip(things, pitches, strict=True)):
        return True
    return any(count_held(group.thing, group.count) for group in meaning.groups)


def count_held(thing: str, count: int) -> bool:
    """Whether so many of a thing are held out, seen or heard. One never is: pairs and clips show
    one of everything.
    """
    return count > 1 and (_ALL.index(thing) + count) % 5 == 0


def word_held(word: str) -> bool:
    """Whether a word is held out: about one in five, by the sum of its letters."""
    return sum(map(ord, word)) % 5 == 0


def _colour_held(one: Things | One | Motion) -> bool:
    return (_ALL.index(one.thing) + 2 * COLOURS.index(one.colour)) % 5 == 0


def draw(kind: str, rng: np.random.Generator, held: bool) -> Meaning:
    """A random meaning of a kind of media, held out or not. All words of a held-out page are."""
    while True:
        meaning = _draw(kind, rng, held)
        if held_out(meaning) == held:
            return meaning


def _draw(kind: str, rng: np.random.Generator, held: bool) -> Meaning:
    if kind == "image" and rng.random() < 0.4:
        (a, b), (c, d) = choose(rng, COLOURS, 2), choose(rng, SEEN, 2)
        return Pair(One(a, c), pick(rng, WAYS), One(b, d))
    if kind == "image":
        return Things(pick(rng, COUNTS), pick(rng, SIZES), pick(rng, COLOURS), pick(rng, SEEN))
    if kind == "video":
        return Motion(pick(rng, SIZES), pick(rng, COLOURS), pick(rng, SEEN), pick(rng, DIRECTIONS))
    if kind == "page":
        lines = pick(rng, (1, 1, 2, 3))  # half of them show one word
        return Page(tuple(word(rng, held, short=lines > 1) for _ in range(lines)))
    if rng.random() < 0.5:
        group = Group(pick(rng, COUNTS), pick(rng, PITCHES), pick(rng, HEARD))
        return Sound((group,), pick(rng, TEMPI) if group.count > 1 else None)
    return Sound(
        tuple(Group(pick(rng, COUNTS[:2]), pick(rng, PITCHES), x) for x in choose(rng, HEARD, 2)),
        None,
    )


def word(rng: np.random.Generator, held: bool, short: bool) -> str:
    """A pseudo-word of 3 or 4 (short) or else 4 or 5 letters in one of the scripts, held out or
    not.
    """
    consonants, vowels = pick(rng, tuple(SCRIPTS.values()))
    pattern = pick(rng, ("cvc", "cvcv") if short else ("cvcv", "cvcvc"))
    while True:
        made = "".join(pick(rng, consonants if letter == "c" else vowels) for letter in pattern)
        if word_held(made) == held:
            return made


def attributes(meaning: Meaning) -> tuple[str, ...]:
    """What `changed` can change of it."""
    if isinstance(meaning, Things):
        return "object", "colour", "count", "size"
    if isinstance(meaning, Pair):
        return "object", "colour", "binding", "relation"
    if isinstance(meaning, Motion):
        return "object", "colour", "size", "motion"
    if isinstance(meaning, Page):
        return ("letter",)
    if len(meaning.groups) == 2:
        return "object", "count", "pitch", "order"
    return ("object", "count", "pitch", "tempo") if meaning.tempo else ("object", "pitch")


def changed(meaning: Meaning, attribute: str, rng: np.random.Generator) -> Meaning:
    """The same meaning but for one atom (or with two atoms exchanged: binding, relation, order)."""
    if isinstance(meaning, Sound):
        return _changed_sound(meaning, attribute, rng)
    if isinstance(meaning, Page):
        return _changed_page(meaning, rng)
    if isinstance(meaning, Pair):
        a, b = meaning.first, meaning.second
        if attribute == "relation":
            return replace(meaning, first=b, second=a)
        if attribute == "binding":
            return replace(
                meaning, first=replace(a, colour=b.colour), second=replace(b, colour=a.colour)
            )
        if attribute == "colour":
            return replace(
                meaning, first=replace(a, colour=_other(rng, COLOURS, a.colour, b.colour))
            )
        return replace(meaning, second=replace(b, thing=_other(rng, SEEN, a.thing, b.thing)))
    field, values = {
        "object": ("thing", SEEN),
        "colour": ("colour", COLOURS),
        "count": ("count", COUNTS),
        "size": ("size", SIZES),
        "motion": ("direction", DIRECTIONS),
    }[attribute]
    return replace(meaning, **{field: _other(rng, values, getattr(meaning, field))})


def _changed_sound(sound: Sound, attribute: str, rng: np.random.Generator) -> Sound:
    groups, several = list(sound.groups), len(sound.groups) == 2
    if attribute == "tempo":
        return replace(sound, tempo=_other(rng, TEMPI, sound.tempo))
    if attribute == "order":
        return replace(sound, groups=(groups[1], groups[0]))
    at = int(rng.integers(len(groups)))
    if attribute == "object":
        new = replace(groups[at], thing=_other(rng, HEARD, *(group.thing for group in groups)))
    elif attribute == "pitch":
        new = replace(groups[at], pitch=_other(rng, PITCHES, groups[at].pitch))
    else:  # one alone has no tempo, so several stay several
        new = replace(
            groups[at], count=_other(rng, COUNTS[:2] if several else COUNTS[1:], groups[at].count)
        )
    groups[at] = new
    return replace(sound, groups=tuple(groups))


def _changed_page(page: Page, rng: np.random.Generator) -> Page:
    """One letter becomes another of its kind and script."""
    words, at = list(page.words), int(rng.integers(len(page.words)))
    place = int(rng.integers(len(words[at])))
    old = words[at][place]
    letters = next(letters for script in SCRIPTS.values() for letters in script if old in letters)
    words[at] = words[at][:place] + _other(rng, letters, old) + words[at][place + 1 :]
    return Page(tuple(words))


def pick(rng: np.random.Generator, values: tuple | str) -> object:
    """One of some values."""
    return values[int(rng.integers(len(values)))]


def choose(rng: np.random.Generator, values: tuple[str, ...], count: int) -> tuple[str, ...]:
    """So many different ones of some values, in random order."""
    return tuple(values[i] for i in rng.permutation(len(values))[:count])


def _other(rng: np.random.Generator, values: tuple | str, *not_these: object) -> object:
    return pick(rng, tuple(value for value in values if value not in not_these))
