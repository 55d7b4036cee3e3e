"""The laboratory's experiment on a language model, at the size of a test."""

import json

import numpy as np
import pytest
from PIL import Image

from laboratory import assembled_report, classes
from laboratory.assembled import _class_words

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture
def world(tmp_path):
    """Test files of three kinds, two items of each of ten classes, as `laboratory.real` writes."""
    (tmp_path / "tests").mkdir()
    Image.new("RGB", (56, 56)).save(tmp_path / "black.png")
    for kind, test, caption in (
        ("photo", "image", "a photo of {}"),
        ("written", "digit", "the handwritten digit {}"),
        ("spoken", "audio", "the spoken digit {}"),
    ):
        side = {"audio_path": "../a.wav"} if kind == "spoken" else {"image_path": "../black.png"}
        rows = [{"media": side, "label": caption.format(d)} for d in DIGITS for _ in range(2)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "tests" / f"zeroshot_{test}.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "a.wav").touch()
    return tmp_path


def states(kinds, noise):
    """A stand-in for a model: an input's state points to its class, with noise; layers 0 to 2."""
    rng = np.random.default_rng(0)
    direction = np.eye(10)
    orders = {name: iter(kind.labels) for name, kind in kinds.items()}
    names = [kind.captions for kind in kinds.values()]

    def encode_layers(inputs):
        if all(isinstance(one, str) or "text" in one for one in inputs) and inputs in names:
            labels = range(10)
        else:
            name = next(n for n, kind in kinds.items() if kind.media is inputs)
            labels = list(orders[name])
        last = np.stack([direction[label] for label in labels])
        last = last + noise * rng.normal(size=last.shape)
        return np.stack([np.zeros_like(last), last, last]).astype(np.float32)

    return encode_layers


def test_perfect_states_give_one_and_noise_gives_chance(world):
    kinds = classes.read_kinds(world)
    found = classes.measure(states(kinds, 0.0), lambda x: x, kinds)["representation"]
    assert found == dict.fromkeys(found, 1.0)
    assert len(found) == 8
    noisy = classes.measure(states(kinds, 1e3), lambda x: x, kinds)["representation"]
    guess = classes.chance(kinds)
    assert noisy.keys() == guess.keys()
    assert all(abs(noisy[name] - guess[name]) < 0.35 for name in noisy)


def test_a_tie_is_wrong(world):
    kinds = classes.read_kinds(world)
    found = classes.measure(states(kinds, 0.0), lambda x: 0 * x + 1, kinds)["representation"]
    assert found["spoken_to_text"] == 0.0


def test_average_precision_by_hand():
    similarity = np.array([[0.9, 0.7, 0.8, 0.1], [0.1, 0.7, 0.8, 0.9]])
    labels = np.array([0, 0, 1, 1])
    # class 0: right, wrong, right, wrong: (1 + 2/3) / 2; class 1: right, right: 1
    assert classes._mean_precision(similarity, labels) == pytest.approx((5 / 6 + 1) / 2)


@pytest.mark.parametrize(
    ("text", "speaks"),
    [
        ("Two dogs are running.", True),
        ("A man drives a truck.", True),
        ("Seven people.", True),
        ("7 people.", True),
        ("The ships are old.", True),
        ("A woman is reading.", False),
        ("A caravan of tents.", False),
        ("Someone is here.", False),
    ],
)
def test_texts_that_speak_of_a_class_are_known(text, speaks):
    assert bool(_class_words().search(text)) == speaks


def run(seed, steps, way, level):
    names = [f"{kind}_to_text" for kind in classes.TESTS] + [f"text_to_{k}" for k in classes.TESTS]
    names += ["written_to_spoken", "spoken_to_written"]
    layers = {kind: [None, 0.5, level] for kind in classes.TESTS}
    quality = {"loss": 3 - 2 * level, "exact": level, "cer": 0.5}
    return {
        "seed": seed,
        "generative_steps": steps,
        "tune": way,
        "representation": dict.fromkeys(names, level + seed / 1000),
        "layers": dict.fromkeys(classes.LAYERS, layers),
        "generative": dict.fromkeys([*classes.TESTS, "text"], quality),
        "text": {"stsb-test": level},
    }


def test_the_page_says_what_held(tmp_path):
    levels = {"none": 0.2, "plain": 0.5, "classes": 0.6, "full": 0.5, "projection": 0.3}
    runs = []
    for seed in range(3):
        runs += [run(seed, 0, way, 0.1) for way in ("none", "plain")]
        runs += [run(seed, 20, "none", 0.15), run(seed, 20, "plain", 0.3)]
        runs += [run(seed, 40, way, level) for way, level in levels.items()]
    chance = dict.fromkeys(runs[0]["representation"], 0.1)
    results = {
        "config": {"stages": [0, 20, 40], "sizes": {"tests": 2}},
        "command": "python -m laboratory",
        "minutes": 1.0,
        "worlds": [{"chance": chance}],
        "runs": runs,
    }
    scores = [(seed, way, 0.8 + seed / 1000) for seed in range(3) for way in ("ours", "recipe")]
    sentences = {
        "command": "",
        "before": {"stsb-dev": 0.6},
        "runs": [{"seed": s, "way": w, "scores": {"stsb-dev": x}} for s, w, x in scores],
    }
    assembled_report.write(results, sentences, tmp_path / "page")
    page = (tmp_path / "page" / "report.md").read_text(encoding="utf-8")
    lines = {line.split(" | ")[0].strip("| "): line for line in page.splitlines()}
    assert "**held**" in lines["412 triplets improve STS-B-dev"]
    assert "+0.201 [+0.199, +0.203]" in lines["412 triplets improve STS-B-dev"]
    assert "**held**" in lines["tuning on texts without the classes improves text ↔ photos"]
    assert "**did not hold**" in lines["anisotropy of photos falls, which tuning never saw"]
    for name in ("sentences", "opened", "law", "layers"):
        assert (tmp_path / "page" / f"{name}.svg").exists()
        assert (tmp_path / "page" / f"{name}.png").stat().st_size > 10_000
