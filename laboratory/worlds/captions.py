"""Meanings in words: one canonical wording each, and a handful of others that say the same and no
more.
"""

import numpy as np

from laboratory.worlds.concepts import Group, Meaning, Motion, Page, Pair, Things, pick

SYNONYMS = {  # the canonical word first; what is not here has one word
    "circle": ("circle", "disc"),
    "cross": ("cross", "plus"),
    "horn": ("horn", "trumpet"),
    "red": ("red", "scarlet"),
    "yellow": ("yellow", "golden"),
    "purple": ("purple", "violet"),
    "small": ("small", "little", "tiny"),
    "large": ("large", "big", "huge"),
    "fast": ("fast", "quick"),
    1: ("a", "one", "1"),
    2: ("two", "2", "a pair of"),
    3: ("three", "3"),
    4: ("four", "4"),
    "left": ("left", "to the left"),
    "right": ("right", "to the right"),
    "up": ("up", "upwards"),
    "down": ("down", "downwards"),
    "left of": ("left of", "to the left of"),
    "above": ("above", "over"),
    "right of": ("right of", "to the right of"),
    "below": ("below", "under"),
    "then": (", then ", ", and then "),
}
OPPOSITE = {"left of": "right of", "above": "below"}
THINGS = (
    "{n} {size} {colour} {thing}",
    "a picture of {n} {size} {colour} {thing}",
    "{n} {colour} {thing}, {size}",
)
PAIR = ("{first} {way} {second}", "a picture of {first} {way} {second}", "{second} {back} {first}")
MOTION = ("{one} moves {direction}", "{one} goes {direction}", "a clip of {one} moving {direction}")
SOUND = ("{sound}", "the sound of {sound}", "you hear {sound}")
TEMPO = ("{n} {pitch} {thing}, {tempo}", "{n} {tempo} {pitch} {thing}")
PAGE = ("a page that says {text}", "a page that reads {text}", "the page says {text}")


def wording(meaning: Meaning, rng: np.random.Generator | None = None) -> str:
    """What says a meaning: the canonical wording, or one drawn at random from all."""

    def one_of(templates: tuple[str, ...]) -> str:
        return templates[0] if rng is None else pick(rng, templates)

    def say(atom: str | int) -> str:
        return one_of(SYNONYMS.get(atom, (atom,)))

    def noun(thing: str, count: int) -> str:
        return say(thing) if count == 1 else _plural(say(thing))

    def group(g: Group) -> str:
        return f"{say(g.count)} {say(g.pitch)} {noun(g.thing, g.count)}"

    if isinstance(meaning, Things):
        words = {"n": say(meaning.count), "size": say(meaning.size), "colour": say(meaning.colour)}
        return one_of(THINGS).format(thing=noun(meaning.thing, meaning.count), **words)
    if isinstance(meaning, Pair):
        first, second = (
            f"a {say(one.colour)} {say(one.thing)}" for one in (meaning.first, meaning.second)
        )
        back = say(OPPOSITE[meaning.way])
        return one_of(PAIR).format(first=first, second=second, way=say(meaning.way), back=back)
    if isinstance(meaning, Motion):
        one = f"a {say(meaning.size)} {say(meaning.colour)} {say(meaning.thing)}"
        return one_of(MOTION).format(one=one, direction=say(meaning.direction))
    if isinstance(meaning, Page):
        return one_of(PAGE).format(text=page_text(meaning))
    if meaning.tempo:
        g = meaning.groups[0]
        words = {"n": say(g.count), "pitch": say(g.pitch), "tempo": say(meaning.tempo)}
        sound = one_of(TEMPO).format(thing=noun(g.thing, g.count), **words)
    else:
        sound = say("then").join(group(g) for g in meaning.groups)
    return one_of(SOUND).format(sound=sound)


def another_wording(meaning: Meaning, not_this: str, rng: np.random.Generator) -> str:
    """A wording drawn at random from all but one."""
    while (other := wording(meaning, rng)) == not_this:
        pass
    return other


def words(meaning: Meaning) -> list[str]:
    """What a meaning may be summed up as in one word: the canonical word of each of its atoms."""
    if isinstance(meaning, Things):
        return [_number(meaning.count), meaning.size, meaning.colour, meaning.thing]
    if isinstance(meaning, Pair):
        return [
            meaning.first.colour,
            meaning.first.thing,
            meaning.second.colour,
            meaning.second.thing,
        ]
    if isinstance(meaning, Motion):
        return [meaning.size, meaning.colour, meaning.thing, meaning.direction]
    if isinstance(meaning, Page):
        return list(meaning.words)
    each = [
        word for g in meaning.groups for word in (_number(g.count), g.pitch, g.thing.split()[0])
    ]
    return each + ([meaning.tempo] if meaning.tempo else [])


def _number(count: int) -> str:
    return "one" if count == 1 else SYNONYMS[count][0]


def concept(count: int, thing: str) -> str:
    """What a picture and a sound have in common, such as "two bells"."""
    return f"{SYNONYMS[count][0]} {thing if count == 1 else _plural(thing)}"


def page_text(page: Page) -> str:
    """What stands on a page, a space for a new line."""
    return " ".join(page.words)


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")
