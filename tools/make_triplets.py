"""Generate the text triplets that ship with lco-jax (pure standard library, deterministic).

Writes ``lco_jax/assets/triplets_train.jsonl`` (600 records) and ``triplets_heldout.jsonl`` (128 records), one JSON
object per line with the keys ``anchor``, ``positive`` and ``negative``, each ``{"image_path": "", "text": ...}``.

The sentences come from the hand-written grammar below, not from any dataset. A *scene* is a combination of meaning
classes (subject, action, object, place); every class has several paraphrases, and a scene may carry a detail (time,
weather, clothing). The anchor words a scene; the positive words the same scene with other paraphrases and another
sentence frame (it may leave the detail out); the negative changes one or two slots to another class and keeps the
other words. In a ``HARD`` record the positive shares few words with its anchor and the negative many; in an ``EASY``
one it is the other way round, so that counting shared words finds some held-out positives, but far from all.

Checked on every run (``verify``): no text occurs twice; no scene is in both files; no two held-out records share
(action, object, place), and no held-out negative describes another held-out record's, so each held-out anchor has
exactly one right answer; every meaning class has at least 8 training anchors, and every paraphrase and every word of
the held-out file occurs several times in the training file. New in the held-out file are only the combinations.

Usage: ``python tools/make_triplets.py`` writes both files and prints statistics; ``--check`` writes nothing and exits
with status 1 if the committed files differ from what would be written.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import re
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

SEED, N_TRAIN, N_HELDOUT = 10, 600, 128
MIN_CLASS, MIN_PHRASE, MIN_WORD = 8, 4, 4  # how often each must occur in train
# The chances that a positive keeps a phrase and its frame, and that a negative rewords a slot and changes two slots.
HARD, EASY, EASY_SHARE = (0.25, 0.3, 0.2, 0.2), (0.7, 0.8, 0.85, 0.8), 0.53
ASSETS = Path(__file__).resolve().parent.parent / "lco_jax" / "assets"

# "class notes = paraphrase | paraphrase", entries end at "/" or the line's end; "+" marks a grammatical plural, ">" a
# more general phrase, used in positives only. A subject's notes say who it could also be (a negative never swaps
# subjects that share one); "." marks a subject that can wear something.
SUBJECTS = """
woman . f = a woman | a lady / man . m = a man | a guy / girl . g = a girl | a schoolgirl / dog 1 = a dog | a hound
boy . b = a boy | a young lad / oldwoman . f = an old woman | an elderly lady / men mm = +two men | +a pair of guys
oldman . m = an old man | an elderly gentleman / women ff = +two women | +a pair of ladies / cat 2 = a cat | a feline
kids k = +three children | +three kids | a trio of youngsters / family p = a family | +parents with their children
tourists p = +several tourists | a group of travelers / chef . m f = a chef | a cook / sailor . e = a sailor | a seaman
musician . m f = a musician | a performer / band p = a band | a group of musicians / farmer . d = a farmer | a rancher
carpenter . c = a carpenter | a woodworker / workers w = +two workers | +a pair of laborers
teacher . t = a teacher | an instructor / scientist s = a scientist | a researcher / student . u = a student | a pupil
guide . v = a guide | a tour leader / horse 3 = a horse | a pony / monkey 4 = a monkey | an ape
cows 5 = +some cows | a herd of cattle / ducks 6 = +several ducks | a flock of waterfowl
"""
# An action's paraphrase is "gerund ; present tense ; passive participle", the last two optional, "_" is the object.
ACTIONS = """
walk = walking _; walks _ | strolling with _ | out for a walk with _ / bike = cycling; cycles | traveling by bike
feed = feeding _; feeds _; fed | giving food to _ / read = reading _; reads _ | looking through _
eat = eating _; eats _ | enjoying _ / phone = talking on the phone; talks on the phone | making a call
photo = taking pictures of _; takes pictures of _ | photographing _; ; photographed | aiming a camera at _
cook = cooking _; cooks _; cooked | preparing _; ; prepared / buy = buying _; buys _ | paying for _
cut = cutting _; cuts _; cut | slicing _; slices _; sliced / throw = throwing _; throws _ | tossing _
serve = serving _; serves _; served | handing out _ | bringing _ to the guests / run = running; runs | jogging
wash = washing _; washes _; washed | scrubbing _; ; scrubbed | cleaning _ / swim = swimming; swims | taking a dip
soccer = playing soccer; plays soccer | kicking a football | having a soccer match
tennis = playing tennis; plays tennis | hitting tennis balls / dance = dancing; dances | moving to the beat
basketball = playing basketball; plays basketball | shooting hoops / sleep = sleeping; sleeps | taking a nap
lift = lifting weights; lifts weights | using heavy dumbbells / chase = chasing _; chases _; chased | running after _
instrument = playing _; plays _; played | performing on _ | practicing _; ; practiced
sing = singing a song; sings a song | giving a vocal performance / jump = jumping over _; jumps over _ | leaping over _
drink = drinking some water; drinks some water | having a drink / board = boarding _; boards _ | getting on _
repair = repairing _; repairs _; repaired | fixing _ | mending _
build = building _; builds _; built | constructing _; ; constructed | putting together _
paint = painting _; paints _; painted | putting a coat of paint on _ | brushing color onto _
carry = carrying _; carries _; carried | hauling _; ; hauled | moving _; ; moved
wait = waiting for _; waits for _ | standing in line for _ / write = writing that _; writes that _ | noting down that _
hike = hiking up a trail; hikes up a trail | climbing a steep path
explain = explaining that _; explains that _ | saying that _ | pointing out that _
learn = learning that _; learns that _ | finding out that _
"""
OBJECTS = """
dog = a dog | a hound / cat = a cat | a feline / horse = a horse | a pony / ducks = +some ducks | +waterfowl
mouse = a mouse | a small rodent / ball = a ball | >a round toy / frisbee = a frisbee | a flying disc
stones = +stones | +rocks / flowers = +flowers | +blossoms / book = a book | a paperback / map = a map | a chart
letter = a letter | a written note / newspaper = a newspaper | the daily news / icecream = ice cream | a frozen dessert
soup = soup | stew / fish = fish | >seafood / pasta = pasta | +noodles / bread = bread | a loaf of bread
apples = +apples | >fresh fruit / vegetables = +carrots and onions | >+some vegetables / grass = grass | >green plants
dishes = +dishes | +plates and cups / car = a car | an automobile / boat = a boat | a small ship / wood = wood | timber
fence = a fence | a wooden railing / log = a log | a fallen tree / wall = a brick wall | a wall of bricks
shed = a shed | a small hut / boxes = +boxes | +crates / suitcase = a suitcase | a travel bag / bus = a bus | a coach
train = a train | an express / plane = a plane | a flight / piano = the piano | the keyboard
drums = +the drums | the drum kit / violin = the violin | the fiddle / trumpet = the trumpet | the horn
that_ice = ice melts in the heat | frozen water turns liquid when it gets warm
that_earth = the earth goes around the sun | our planet circles a star
that_plants = plants need light to grow | green leaves live on sunshine
that_bees = bees make honey | a sweet food comes from small insects
that_heart = the heart pumps blood | a strong muscle moves blood through the body
that_iron = iron rusts in the rain | wet metal turns brown with time
that_whales = whales are mammals | the biggest animals in the sea are not fish
that_sound = sound needs air | no noise can travel through empty space
"""
# A place's note lists the details that fit there.
PLACES = """
park mnrsw = in the park | in a public garden / river mnrsw = along the river | beside a stream
street mnrsw = on the street | along the road / beach mns = on the beach | by the sea
square mnrsw = in the town square | in the city center / market mrs = at the market | among the market stalls
kitchen mn = in the kitchen | at the kitchen counter / restaurant mn = in a restaurant | at a diner
yard mnrsw = in the backyard | behind the house / gym mn = in the gym | in a sports hall
stadium mns = in the stadium | at the arena / pool mns = at the swimming pool | at the public baths
school m = at school | in the classroom / stage n = on stage | at the theater / home mn = at home | in the living room
church mn = in a church | in a chapel / farm mnrsw = on a farm | on a ranch / field mnrsw = in a field | in a meadow
lake mnrsw = at the lake | by the pond / forest mnrsw = in the forest | in the woods
workshop mn = in a workshop | in a garage / harbor mnrsw = at the harbor | on the dock
station mnrw = at the station | on the platform / airport mn = at the airport | in the terminal
hotel mnrsw = outside a hotel | in front of an inn / mountains mrsw = in the mountains | in the hills
museum m = at the museum | at the exhibition / lab mn = in a laboratory | in a research lab
library m = in the library | among the bookshelves
"""
DETAILS = """
m = early in the morning | at sunrise / n = late at night | after dark / r = in the rain | on a wet day
s = on a sunny day | in bright sunshine / w = in the snow | on a white winter day
c = in a red coat | wearing a scarlet jacket / h = in a black hat | wearing a dark cap
"""
GROUPS = """
ALL = woman man girl boy oldwoman oldman women men kids / SPORT = woman man girl boy women men kids / ANY = mnrswch
CARE = woman man girl boy oldwoman women men / WORK = carpenter farmer sailor workers / SHED = fence boat wall shed
TRIP = woman man oldwoman oldman tourists family / EATERY = kitchen restaurant yard / STOP = street hotel airport
FACTS = that_ice that_earth that_plants that_bees that_heart that_iron that_whales that_sound
WATER = harbor lake river / LEARN = school museum lab library / DAY = mrswch
"""
# What makes sense together: subjects / actions / objects ("-" is none) / places / details.
ACTIVITIES = """
ALL / walk / dog / park river street beach square / ANY ; ALL family / feed / ducks / park river lake / DAY
CARE farmer / feed / dog cat horse / farm yard / ANY ; chef CARE / cook / soup fish pasta vegetables / EATERY / mnh
CARE oldman / read / book newspaper letter / park beach pool yard library home / mnsch
ALL family / eat / icecream bread apples / park street beach square market / msch
ALL family tourists / photo / flowers boat ducks / park river lake harbor / DAY
SPORT oldman tourists / bike / - / park river street forest / mnrsw ; ALL family / eat / soup fish pasta / EATERY / mn
CARE oldman / phone / - / park street square home station airport hotel / mnrsch
chef CARE / cut / bread apples vegetables fish / kitchen restaurant market / mnh
chef woman man girl boy women / serve / soup pasta fish icecream / restaurant market yard / mns
chef CARE / wash / dishes apples vegetables / EATERY / mn ; SPORT / soccer / - / park stadium beach field yard / mnrsw
CARE family chef / buy / bread apples fish flowers vegetables / market square harbor / mrsch
SPORT / tennis basketball / - / park stadium gym yard / mns ; SPORT family / swim / - / pool lake / mns
SPORT oldman / run / - / park river street beach forest stadium / mnrsw ; dog horse ducks / swim / - / lake / mns
SPORT / throw / ball frisbee / park beach field yard / mnsw ; SPORT / throw / stones / lake beach river / mnrsch
woman man women men girl boy / lift / - / gym beach home yard / mns ; TRIP sailor / wait board / boat / WATER / ANY
musician woman man girl boy oldman / instrument / piano violin trumpet / stage church school home / mnch
band musician women men boy girl / instrument / drums violin trumpet / stage street square park / mnsch
band musician ALL / sing / - / stage church school street home park / mnsch
ALL family / dance / - / stage school street home square beach / mns ; TRIP / wait board / plane / airport / mnch
dog cat horse monkey cows ducks / sleep / - / farm field lake forest yard / mnrsw
dog cat horse monkey cows / drink / - / farm river lake forest field / mnrsw
horse cows ducks / eat / grass / farm field lake river / mrsw ; WORK / build / SHED / farm harbor yard workshop / mnsch
dog cat monkey ducks / eat / fish bread apples / farm lake river yard / mrsw
dog cat monkey / chase / ball mouse ducks / farm field yard lake / mnrsw
dog horse / chase / cat / farm field yard street / mnrsw ; WORK women / paint / SHED / farm harbor yard beach / msh
dog cat horse monkey / jump / fence log / farm field forest yard / mnrsw
WORK oldman / repair / SHED car / workshop farm harbor yard / mnch
WORK women / carry / boxes wood stones / workshop farm harbor street forest / ANY
WORK boy women / wash / car boat / workshop harbor yard street / mnsh
TRIP sailor / carry / suitcase / station airport hotel street harbor / ANY
TRIP student / wait board / bus train / station / mnrwch ; TRIP student / wait board / bus / STOP square / ANY
TRIP guide / read / map / station hotel mountains forest square / mrsch
TRIP student guide / hike / - / mountains forest / DAY ; teacher scientist guide / explain / FACTS / LEARN / mch
tourists family guide student / photo / flowers / mountains forest / DAY
student kids scientist / write / FACTS / LEARN / mch ; student kids tourists / learn / FACTS / LEARN / mch
"""
FRAMES = {
    "plain": 5,
    "front": 3,
    "there": 3,
    "seen": 1,
    "photo": 1,
    "present": 7,
    "passive": 7,
    "inner": 2,
}
FRAMES["detail"] = 3


class Core(NamedTuple):
    """What a scene is, without its detail."""

    subject: str
    action: str
    object: str
    place: str


class Phrase(NamedTuple):
    text: str
    plural: bool
    general: bool


def entries(table: str) -> list[tuple[list[str], str]]:
    return [
        (e.split("=")[0].split(), e.split("=")[1].strip())
        for e in re.split(r"[\n/]", table.strip())
    ]


TABLES = dict(
    zip((*Core._fields, "detail"), (SUBJECTS, ACTIONS, OBJECTS, PLACES, DETAILS), strict=True)
)
NOTES = {
    (slot, names[0]): names[1:] for slot, table in TABLES.items() for names, _ in entries(table)
}
PHRASES = {
    (slot, names[0]): [Phrase(p.strip(" +>"), "+" in p, ">" in p) for p in phrases.split("|")]
    for slot, table in TABLES.items()
    for names, phrases in entries(table)
}
Slots = dict[str, tuple[str, int]]  # slot -> (class, which of its paraphrases)
Record = dict[str, tuple[str, Slots]]  # anchor, positive, negative -> (text, slots)
Tails = set[tuple[str, ...]]  # (action, object, place)


def enumerate_scenes() -> dict[Core, str]:
    """Every sensible scene, with the details that fit it."""
    groups, scenes = {names[0]: members.split() for names, members in entries(GROUPS)}, {}
    for line in re.split(r"[\n;]", ACTIVITIES.strip()):
        *slots, fits = [
            [n for w in field.split() for n in groups.get(w, [w])] for field in line.split("/")
        ]
        for core in itertools.starmap(Core, itertools.product(*slots)):
            allowed = NOTES["place", core.place][0] + (
                "ch" if "." in NOTES["subject", core.subject] else ""
            )
            scenes.setdefault(core, "".join(d for d in fits[0] if d in allowed))
    return scenes


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def render(slots: Slots, frame: str) -> str:
    """The sentence, or "" where the frame does not fit these phrases."""
    pick = {slot: PHRASES[slot, name][i] for slot, (name, i) in slots.items() if name != "-"}
    subject, obj, place, detail = (
        pick[s].text if s in pick else "" for s in ("subject", "object", "place", "detail")
    )
    verb, present, passive = [
        *(f.strip().replace("_", obj) for f in pick["action"].text.split(";")),
        "",
        "",
    ][:3]
    worn = slots.get("detail", "-")[0] in ("c", "h")
    if worn:
        subject, detail = f"{subject} {detail}", ""
    be = "are" if pick["subject"].plural else "is"
    obj_be = f"{obj} {'are' if pick['object'].plural else 'is'}" if passive and obj else ""
    there = "there is" if be == "is" or subject.startswith("a ") else "there are"
    s_place = f"{subject} {place}"
    if " that " in verb:  # keep the place away from the end of "... that bees make honey"
        options = {
            "front": f"{place}, {subject} {be} {verb}",
            "there": f"{there} {s_place} {verb}",
            "inner": f"{s_place} {be} {verb}",
            "present": f"{place}, {subject} {present}" if present and be == "is" else "",
        }
        options = {"detail": f"{detail}, {s_place} {be} {verb}"} if detail else options
    else:
        options = {
            "plain": f"{subject} {be} {verb} {place} {detail}",
            "front": f"{place}, {subject} {be} {verb} {detail}",
            "there": f"{there} {subject} {verb} {place} {detail}",
            "seen": f"{subject} can be seen {verb} {place} {detail}",
            "photo": f"the photo shows {subject} {verb} {place} {detail}",
            "present": f"{subject} {present} {place} {detail}" if present and be == "is" else "",
            "passive": f"{obj_be} being {passive} by {s_place} {detail}" if obj_be else "",
            "inner": "" if worn else f"{s_place} {be} {verb} {detail}",
            "detail": f"{detail}, {subject} {be} {verb} {place}" if detail else "",
        }
    if frame in ("front", "inner") and place.split()[0] in ("along", "by", "beside"):
        return ""
    text = " ".join(options.get(frame, "").split())
    if re.search(r"\b(cook|perform).*\b\1", text):  # "a cook is cooking"
        return ""
    return f"{text[0].upper()}{text[1:]}." if 5 <= len(text.split()) <= 20 else ""


class Generator:
    """Draws scenes evenly over the meaning classes and words them; all randomness is one seeded stream."""

    def __init__(self) -> None:
        self.rng, self.scenes = random.Random(SEED), enumerate_scenes()
        self.texts: set[str] = set()  # written so far (this and the next one are never iterated)
        self.vocab: set[str] = set()  # the words that may be used, if any are named
        self.used: Counter[tuple[str, str, int]] = Counter()

    def draw(self, n: int) -> list[Core]:
        """n scenes without repetition, those of the classes that are rarest so far first."""
        pool, seen, chosen = list(self.scenes), Counter(), []
        for _ in range(n):
            tries = [self.rng.randrange(len(pool)) for _ in range(60)]
            best = max(
                tries, key=lambda i: sum(10**9 // (1 + seen[kv]) ** 2 for kv in enumerate(pool[i]))
            )
            chosen.append(pool.pop(best))
            seen.update(enumerate(chosen[-1]))
        return chosen

    def word(self, slot: str, name: str, general: bool = False, avoid: int = -1) -> tuple[str, int]:
        """One paraphrase of a class, preferring those used less so far."""
        phrases = PHRASES.get((slot, name), [])
        allowed = [
            i for i, p in enumerate(phrases) if i != avoid and (general or not p.general)
        ] or [0]
        i = self.rng.choices(allowed, [1 / (1 + self.used[slot, name, i]) for i in allowed])[0]
        self.used[slot, name, i] += 1
        return name, i

    def sentence(self, slots: Slots, frames: dict[str, int]) -> tuple[str, str]:
        fits = [(f, t) for f in frames if (t := render(slots, f)) and t not in self.texts]
        fits = [(f, t) for f, t in fits if not self.vocab or self.vocab.issuperset(words(t))]
        return self.rng.choices(fits, [frames[f] for f, _ in fits])[0] if fits else ("", "")

    def other_scene(self, core: Core, taken: Tails, two: float) -> Core:
        """A sensible scene that differs in one or two slots and is not the same thing said more generally."""
        by_slots: dict[tuple[int, ...], list[Core]] = {}
        who = set(NOTES["subject", core.subject]) - {"."}
        for other in self.scenes:
            diff = tuple(i for i in range(4) if core[i] != other[i])
            same_person = 0 in diff and who.intersection(NOTES["subject", other.subject])
            if (
                1 <= len(diff) <= 2
                and not same_person
                and (other[1:] == core[1:] or other[1:] not in taken)
            ):
                by_slots.setdefault(diff, []).append(other)
        kinds = sorted(by_slots)
        return self.rng.choice(
            by_slots[self.rng.choices(kinds, [two if len(k) == 2 else 1 - two for k in kinds])[0]]
        )

    def record(self, core: Core, taken: Tails) -> Record:
        rng, texts, changes = self.rng, [""], 0
        keep, same_frame, reword, two = EASY if rng.random() < EASY_SHARE else HARD
        while not all(texts) or len(set(texts)) < 3 or changes < 2:
            anchor: Slots = {
                slot: self.word(slot, name) for slot, name in zip(Core._fields, core, strict=True)
            }
            if self.scenes[core] and rng.random() < 0.6:
                anchor["detail"] = self.word("detail", rng.choice(self.scenes[core]))
            positive: Slots = {}
            for slot, (name, i) in anchor.items():
                if slot != "detail" or rng.random() < 0.9:
                    fixed = rng.random() < keep and not any(
                        p.general for p in PHRASES.get((slot, name), [])
                    )
                    positive[slot] = (name, i) if fixed else self.word(slot, name, True, i)
            other, negative = self.other_scene(core, taken, two), dict(anchor)
            for slot, name in zip(Core._fields, other, strict=True):
                if name != anchor[slot][0] or rng.random() < reword:
                    negative[slot] = self.word(slot, name)
            if "detail" in negative and negative["detail"][0] not in self.scenes[other]:
                del negative["detail"]
            frame, first = self.sentence(anchor, FRAMES)
            others = {f: weight for f, weight in FRAMES.items() if f != frame}
            copied = self.sentence(positive, {frame: 1})[1] if rng.random() < same_frame else ""
            second = copied or self.sentence(positive, others)[1]
            changes = sum(pair != positive.get(slot) for slot, pair in anchor.items()) + (
                not copied
            )
            texts = [
                first,
                second,
                self.sentence(negative, FRAMES if rng.random() < reword else {frame: 1})[1],
            ]
        self.texts.update(texts)
        return {
            "anchor": (first, anchor),
            "positive": (second, positive),
            "negative": (texts[2], negative),
        }


def core_of(slots: Slots) -> Core:
    return Core(*(slots[slot][0] for slot in Core._fields))


def word_counts(records: list[Record]) -> Counter[str]:
    return Counter(w for r in records for text, _ in r.values() for w in words(text))


def generate() -> tuple[list[Record], list[Record]]:
    gen = Generator()
    scenes = gen.draw(N_TRAIN + N_HELDOUT)
    left, heldout = Counter(kv for core in scenes for kv in enumerate(core)), {}
    for core in gen.rng.sample(scenes, len(scenes)):
        if (
            len(heldout) < N_HELDOUT
            and core[1:] not in heldout
            and all(left[kv] > MIN_CLASS for kv in enumerate(core))
        ):
            heldout[core[1:]] = core
            left.subtract(enumerate(core))
    train = [gen.record(core, set()) for core in scenes if heldout.get(core[1:]) != core]
    gen.vocab = {w for w, n in word_counts(train).items() if n >= MIN_WORD}
    return train, [gen.record(core, set(heldout)) for core in heldout.values()]


def verify(train: list[Record], heldout: list[Record]) -> None:
    """Raise if one of the promises of the module docstring does not hold."""
    texts = [text for r in train + heldout for text, _ in r.values()]
    classes = Counter((s, v[0]) for r in train for s, v in r["anchor"][1].items())
    phrases = Counter((s, *v) for r in train for _, slots in r.values() for s, v in slots.items())
    rare = [k for k in PHRASES if classes[k] < MIN_CLASS]
    rare += [
        (*k, i)
        for k, all_of in PHRASES.items()
        for i in range(len(all_of))
        if phrases[*k, i] < MIN_PHRASE
    ]
    vocab = word_counts(train)
    rare += [w for w in word_counts(heldout) if vocab[w] < MIN_WORD]
    cores = [core_of(r["anchor"][1]) for r in heldout]
    tails, seen = {c[1:] for c in cores}, {core_of(r["anchor"][1]) for r in train}
    wrong = zip((core_of(r["negative"][1]) for r in heldout), cores, strict=True)
    for message, broken in {
        "a text occurs twice": len(texts) != len(set(texts)),
        "the number of records is wrong": (len(train), len(heldout)) != (N_TRAIN, N_HELDOUT),
        f"too rare in train: {rare}": rare,
        "a held-out scene is in train": seen.intersection(cores),
        "two held-out scenes are alike": len(tails) != len(cores),
        "a held-out negative is right": any(n == c or n[1:] in tails - {c[1:]} for n, c in wrong),
    }.items():
        if broken:
            raise RuntimeError(message)
    print(
        f"{len(PHRASES)} meaning classes, each in >= {min(classes[k] for k in PHRASES)} training anchors"
    )


def report(title: str, records: list[Record]) -> None:
    rows = [[words(r[k][0]) for k in ("anchor", "positive", "negative")] for r in records]
    pos, neg = ([len({*r[0]} & {*r[i]}) / len({*r[0]} | {*r[i]}) for r in rows] for i in (1, 2))
    sizes, n = [len(sentence) for r in rows for sentence in r], len(rows)
    print(
        f"{title}: {n} records, {len(word_counts(records))} distinct words, {min(sizes)}-{max(sizes)} a sentence"
    )
    print(
        f"{title}: word overlap (Jaccard) with the anchor: positives {sum(pos) / n:.2f}, negatives {sum(neg) / n:.2f}; "
        f"the negative's is higher in {sum(b > a for a, b in zip(pos, neg, strict=True)) / n:.1%}"
    )
    bags = [[Counter(sentence) for sentence in r] for r in rows]
    for pool in (
        ([b[1] for b in bags] + [b[2] for b in bags], [b[1] for b in bags])
        if title == "heldout"
        else ()
    ):
        hits = 0
        for i, (anchor, _, _) in enumerate(bags):
            scores = [
                sum(c * bag[w] for w, c in anchor.items()) / math.hypot(*bag.values())
                for bag in pool
            ]
            hits += scores[i] > max(scores[:i] + scores[i + 1 :])
        print(f"{title}: bag-of-words cosine recall@1 over {len(pool)} candidates {hits / n:.1%}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Generate lco_jax/assets/triplets_{train,heldout}.jsonl."
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if the files differ"
    )
    check = parser.parse_args().check
    train, heldout = generate()
    verify(train, heldout)
    for name, records in (("train", train), ("heldout", heldout)):
        rows = (
            {k: {"image_path": "", "text": text} for k, (text, _) in r.items()} for r in records
        )
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        path = ASSETS / f"triplets_{name}.jsonl"
        if check and (not path.is_file() or path.read_bytes() != data):
            print(f"{path} differs from what tools/make_triplets.py generates.", file=sys.stderr)
            return 1
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            aside.write_bytes(data)
            os.replace(aside, path)
        report(name, records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
