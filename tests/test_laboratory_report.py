"""The laboratory measures what it says, and its report says what the numbers say."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from scipy.stats import multivariate_normal, pearsonr, spearmanr, ttest_1samp

from laboratory import claims, measure, report, theory
from laboratory import statistics as stats
from laboratory.statistics import MODALITIES
from lco_jax import LcoError
from lco_jax.checkpoint.hf import open_checkpoint
from lco_jax.data.records import as_input, content_key

D = 16
THINGS = ["a red bell", "a blue drum", "two horns", "a green square", "three birds", "a small star"]


def write_world(folder: Path) -> Path:
    """Six things, each with a picture, a sound and two wordings."""
    tests, media = folder / "tests", folder / "media"
    tests.mkdir(parents=True)
    media.mkdir()
    for i in range(len(THINGS)):
        for suffix in ("png", "wav"):
            (media / f"{i}.{suffix}").touch()
    image = [{"image_path": f"../media/{i}.png"} for i in range(len(THINGS))]
    audio = [{"audio_path": f"../media/{i}.wav"} for i in range(len(THINGS))]
    shown = list(zip(image, audio, THINGS, strict=True))
    lines = {
        "retrieval_image": [{"media": a, "text": text} for a, _, text in shown],
        "retrieval_page": [{"media": a, "text": text} for a, _, text in shown],
        "cross": [
            {"image": a, "audio": b, "concept": f"thing {i // 2}", "held_out": i < 2}
            for i, (a, b, _) in enumerate(shown)
        ],
        "text": [
            {"anchor": f"{x}!", "positive": x, "negative": y}
            for x, y in zip(THINGS, THINGS[::-1], strict=True)
        ],
        "minimal": [
            {
                "media": a,
                "kind": "image",
                "right": text,
                "wrong": f"not {text}",
                "attribute": ("colour", "count")[i % 2],
            }
            for i, (a, _, text) in enumerate(shown)
        ],
        "zeroshot_image": [
            {"media": a, "label": f"class {i % 3}"} for i, (a, _, _) in enumerate(shown)
        ],
    }
    for name, rows in lines.items():
        (tests / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("lab") / "world")


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def knowing(seen, vector=None):
    """An encoder that gives a thing's pictures, sounds, and wordings one direction; what is wrong,
    the opposite.
    """
    basis = np.eye(D)

    def one(side):
        content = (
            side["text"]
            if isinstance(side, dict)
            else next(iter(part.get(part["type"]) for part in side))
        )
        if match := re.search(r"(\d+)\.(png|wav)$", content):
            i = int(match[1])
            return basis[i] + 0.1 * basis[6 + i % 3] + 0.1 * basis[9 + i // 2]
        if match := re.fullmatch(r"class (\d)", content):
            return basis[6 + int(match[1])]
        sign = -1 if content.startswith("not ") else 1
        return sign * basis[THINGS.index(content.removeprefix("not ").removesuffix("!"))]

    def encode(sides):
        seen.append([content_key(side) for side in sides])
        return unit(np.stack([one(side) for side in sides]))

    return encode


def test_who_knows_all_finds_all_and_is_asked_everything_once(world):
    seen = []
    found = measure.represent(knowing(seen), world)
    assert len(seen) == 1
    assert len(set(seen[0])) == len(seen[0])
    assert found.keys() == measure.chance(world).keys()
    assert set(found.values()) == {1.0}, found
    assert {
        "text_to_page_ndcg_at_10",
        "audio_to_image.held_out",
        "minimal.colour",
        "zeroshot_image",
    } <= found.keys()
    assert "text_to_image_ndcg_at_10" not in found


def test_held_out_concepts_are_counted_apart(world):
    def deaf_to_two(sides):
        vectors = knowing([])(sides)
        unheard = [bool(re.search(r"/[01]\.wav", str(side))) for side in sides]
        return np.where(np.array(unheard)[:, None], -vectors, vectors)

    found = measure.represent(deaf_to_two, world)
    assert (found["audio_to_image.held_out"], found["audio_to_image.seen"]) == (0, 1)
    assert found["audio_to_image"] == pytest.approx(4 / 6)


def test_who_tells_nothing_apart_finds_nothing(world):
    found = measure.represent(lambda sides: unit(np.ones((len(sides), D))), world)
    assert {
        name: value for name, value in found.items() if value and not name.endswith(("_mrr", "_10"))
    } == {}


def test_chance_is_what_guessing_gives(world):
    rng = np.random.default_rng(0)
    guesses = [
        measure.represent(lambda sides: unit(rng.normal(size=(len(sides), D))), world)
        for _ in range(100)
    ]
    for name, level in measure.chance(world).items():
        values = np.array([guess[name] for guess in guesses])
        assert abs(values.mean() - level) < 4.5 * values.std() / 10, name


def test_once_asks_for_what_it_has_not_seen(world):
    seen = []
    encode = measure.once(knowing(seen))
    found = measure.represent(encode, world)
    assert theory.information(encode, world)["infonce"].keys() == {"image", "page"}
    assert measure.represent(encode, world) == found
    assert len(seen) == 1


def test_a_torn_world_is_told(tmp_path):
    with pytest.raises(LcoError, match="no folder tests"):
        measure.chance(tmp_path)
    (tmp_path / "tests").mkdir()
    assert measure.chance(tmp_path) == {}
    (tmp_path / "tests" / "cross.jsonl").write_text('{"image": "a"}\n')
    with pytest.raises(
        LcoError, match=r"cross.jsonl:1 must be an object that has image, audio, concept"
    ):
        measure.chance(tmp_path)


def test_layers_of_media_and_of_all_captions(world):
    rng = np.random.default_rng(0)
    states = {}

    class Embedder:
        def encode_layers(self, inputs):
            each = [
                states.setdefault(content_key(one), rng.normal(size=(3, D)) + 1) for one in inputs
            ]
            return np.stack(each, axis=1)

    found = measure.by_layer(Embedder(), world, k=3)
    assert found["anisotropy"].keys() == {"image", "page", "text"}
    assert found["mutual_knn"].keys() == found["cka"].keys() == {"image", "page"}
    assert found["chance"] == {"image": 2 / 5, "page": 2 / 5}  # a quarter of six is too few: two
    texts = unit(np.stack([states[content_key(as_input(text))] for text in THINGS] * 2, axis=1))
    cosines = texts @ texts.transpose(0, 2, 1)
    n = cosines.shape[1]
    np.testing.assert_allclose(
        found["anisotropy"]["text"], (cosines.sum((1, 2)) - n) / (n * (n - 1)), rtol=1e-9
    )


def test_generation_is_scored_by_character_and_by_token(tmp_path):
    (tmp_path / "heldout").mkdir()
    (tmp_path / "page.png").touch()
    answers = ["abcd", "never asked for", "ef"]
    rows = [
        {"anchor": {"image_path": "../page.png", "text": f"Read {one}."}, "positive": one}
        for one in answers
    ]
    (tmp_path / "heldout" / "page.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )

    class Generator:
        def generate(self, inputs, max_new_tokens):
            return [f" {one[-1]['text'][5:-1].replace('d', 'x')}\n" for one in inputs]

        def token_losses(self, inputs, answers):
            counts = np.array([len(one) + 1 for one in answers])
            return np.arange(1, 1 + len(inputs)) * counts.astype(np.float32), counts

    found = measure.generate_quality(Generator(), tmp_path, limit=2)
    assert found == {
        "page": {"loss": pytest.approx((5 + 2 * 3) / 8), "exact": 0.5, "cer": pytest.approx(1 / 6)}
    }


def test_infonce_is_a_bound_that_a_perfect_critic_reaches():
    rng = np.random.default_rng(0)
    media = unit(rng.normal(size=(40, 64)))
    assert theory.info_nce(media, media, 0.001) < 1e-9
    np.testing.assert_allclose(theory.info_nce(media, np.ones_like(media) / 8, 0.03), math.log(40))
    texts = unit(media + 0.3 * rng.normal(size=media.shape))
    shares = np.exp(media @ texts.T / 0.1)
    want = -np.log(shares.diagonal() / shares.sum(axis=1)).mean()
    np.testing.assert_allclose(theory.info_nce(media, texts, 0.1), want)


def test_kl_is_that_of_gaussians():
    rng = np.random.default_rng(0)
    base = rng.normal(size=(3, 4))
    tuned = base + 0.3 * rng.normal(size=base.shape)
    p, q = (multivariate_normal(x.ravel(), base.var()) for x in (base, tuned))
    draws = q.rvs(60_000, random_state=0)
    by_drawing = (q.logpdf(draws) - p.logpdf(draws)).mean()
    assert abs(theory.gaussian_kl(base, tuned) - by_drawing) < 0.03
    assert theory.gaussian_kl(base, base) == 0 == theory.projection_kl(np.eye(5))
    with pytest.raises(LcoError, match="no variance"):
        theory.gaussian_kl(np.ones((2, 2)), np.zeros((2, 2)))


def test_kl_of_checkpoints_counts_what_moved(tmp_path):
    base = open_checkpoint("builtin:tiny")
    folder = tmp_path / "tuned"
    folder.mkdir()
    for file in base.folder.iterdir():
        if file.name != "model.safetensors":
            (folder / file.name).symlink_to(file)
    tensors = load_file(base.folder / "model.safetensors")
    keys = base.keys["decoder"]
    matrix, bias = keys["layers.0.mlp.up_proj.weight"], keys["norm.weight"]
    visual = next(key for key in tensors if "visual" in key)
    moved = {matrix: tensors[matrix] * 1.1, bias: tensors[bias] + 0.5, visual: tensors[visual] + 1}
    save_file({**tensors, **moved}, folder / "model.safetensors")
    everything = np.concatenate(
        [tensors[key].ravel() for key in keys.values() if tensors[key].ndim > 1]
    )
    want = (
        theory.gaussian_kl(tensors[matrix], moved[matrix])
        + 0.125 * tensors[bias].size / everything.var()
    )
    assert theory.decoder_kl(base, base) == 0
    np.testing.assert_allclose(theory.decoder_kl(base, open_checkpoint(folder)), want, rtol=1e-4)


def made_up(seeds=3, law=1.0, noise=0.02):
    """Plausible runs, in which what is known before tuning carries over by `law`."""
    rng, runs = np.random.default_rng(5), []

    def noisy(x):
        return float(np.clip(x + noise * rng.normal(), 0, 1))

    for seed in range(seeds):
        for steps, known in ((0, 0.0), (60, 0.25), (120, 0.5), (240, 0.85)):
            known = {
                kind: noisy(known * (1 - 0.12 * i)) if steps else 0.0
                for i, kind in enumerate(MODALITIES)
            }
            ways = (
                ("none", "lora", "full", "projection", "clip") if steps == 240 else ("none", "lora")
            )
            for tune in ways:
                gain = {"none": 0.15, "lora": law, "full": 0.9, "projection": 0.5, "clip": 0.8}[
                    tune
                ]
                there = {kind: noisy(0.01 + 0.95 * gain * value) for kind, value in known.items()}
                scores = {f"text_to_{kind}": value for kind, value in there.items()}
                scores |= {f"{kind}_to_text": noisy(value) for kind, value in there.items()}
                scores |= {
                    "image_to_audio": noisy(gain * known["audio"] * 0.5),
                    "text_to_text": noisy(0.2 + 0.7 * gain),
                }
                scores["audio_to_image"] = noisy(scores["image_to_audio"])
                for i, name in enumerate(("colour", "count", "motion", "relation", "size")):
                    scores[f"minimal.{name}"] = noisy(0.5 + 0.45 * gain * known["image"] - 0.05 * i)
                layers = np.linspace(0.9, 0.5 if tune == "none" else 0.1, 6)
                run = {
                    "seed": seed,
                    "generative_steps": steps,
                    "tune": tune,
                    "representation": scores,
                }
                run["layers"] = {
                    "anisotropy": {
                        kind: [None, *(layers - 0.05 * i)]
                        for i, kind in enumerate((*MODALITIES, "text"))
                    },
                    "mutual_knn": {
                        k: [None, *np.linspace(0.1, 0.1 + 0.5 * there[k], 6)] for k in MODALITIES
                    },
                    "cka": {k: [None, *np.linspace(0, 0.8 * there[k], 6)] for k in MODALITIES},
                }
                bound = {kind: 4.6 * value for kind, value in there.items()}
                run["theory"] = {
                    "infonce": {k: 4.6 - x for k, x in bound.items()},
                    "mi_bound": bound,
                }
                if tune == "none":
                    cost = {k: 2.5 * (1 - x) for k, x in known.items()}
                    run["generative"] = {
                        k: {"loss": cost[k], "exact": x, "cer": 1 - x} for k, x in known.items()
                    }
                else:
                    run["theory"]["kl"] = 1000.0 * (1 + len(tune))
                runs.append(run)
    names = [f"text_to_{k}" for k in MODALITIES] + [f"{k}_to_text" for k in MODALITIES]
    chance = dict.fromkeys([*names, "image_to_audio", "audio_to_image"], 0.01) | {
        "minimal.colour": 0.5,
        "minimal": 0.5,
    }
    worlds = [{"seed": seed, "chance": chance} for seed in range(seeds)]
    return {
        "config": {},
        "command": "python -m laboratory",
        "minutes": 31.2,
        "worlds": worlds,
        "runs": runs,
    }


@pytest.fixture
def undrawn(monkeypatch):
    for name in PICTURES:
        monkeypatch.setattr(
            report.report_plots, f"plot_{name.removesuffix('.png')}", lambda *_: False
        )


PICTURES = {
    f"{name}.png" for name in ("headline", "quality", "scaling", "tuning", "layers", "minimal")
}


def verdicts(results):
    return {
        (claim.text, claim.quantity.split(",")[0]): claim.verdict
        for claim in claims.decide(results)
    }


def test_the_report_is_whole(tmp_path):
    results = made_up()
    results["runs"][0]["representation"]["text_to_image"] = float("nan")
    results["runs"][1]["theory"]["kl"] = np.float32("inf")
    report.write(results, tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert {file.name for file in tmp_path.iterdir()} == PICTURES | {"report.md", "results.json"}
    assert set(re.findall(r"\((\w+\.png)\)", text)) == PICTURES
    assert not re.findall(r"\b(nan|inf|None)\b", text)
    kept = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert kept["runs"][0]["representation"]["text_to_image"] is None
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        assert len({line.count("|") for line in table.splitlines()}) == 1, table


def test_claims_follow_the_numbers():
    found = verdicts(made_up())
    assert "LoRA is better than a linear projection" in {text for text, _ in found}
    assert (
        found.pop(("an untrained base stays at chance when tuned", "chance less recall@1 after"))
        == "held"
    )
    assert set(found.values()) == {claims.HELD}, [
        key for key, value in found.items() if value != claims.HELD
    ]


def test_claims_fail_where_the_numbers_say_so():
    results = made_up()
    for run in results["runs"]:  # before and after change places
        run["tune"] = {"none": "lora", "lora": "none"}.get(run["tune"], run["tune"])
    found = {text: verdict for (text, _), verdict in verdicts(results).items()}
    assert found["text-only contrastive learning lifts text ↔ image retrieval"] == claims.FAILED
    assert found["LoRA is better than a linear projection"] == claims.FAILED
    assert found["anisotropy falls, though tuning sees no video"] == claims.FAILED
    results = made_up(noise=0.3)
    assert claims.UNDECIDED in verdicts(results).values()


def test_what_does_not_vary_is_undecided_and_said(tmp_path, undrawn):
    results = made_up()
    for run in results["runs"]:
        for kind in run.get("generative", {}):
            run["generative"][kind]["exact"] = 0.0
    report.write(results, tmp_path)
    found = {text: verdict for (text, _), verdict in verdicts(results).items()}
    assert found["the better it generates, the better it embeds: page"] == claims.UNDECIDED
    assert "| does not vary |" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_one_seed_decides_nothing_and_is_reported(tmp_path):
    report.write(made_up(seeds=1), tmp_path)
    found = verdicts(made_up(seeds=1))
    assert len(found) == len(verdicts(made_up()))
    assert set(found.values()) == {claims.UNDECIDED}
    assert "±" not in (tmp_path / "report.md").read_text(encoding="utf-8").split("## ", 1)[1]


@pytest.mark.parametrize(
    "absent", ["representation", "generative", "layers", "theory", "worlds", "seconds"]
)
def test_what_is_absent_is_left_out(tmp_path, absent, undrawn):
    results = made_up()
    results.pop(absent, None)
    for run in results["runs"]:
        run.pop(absent, None)
    report.write(results, tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert not re.findall(r"\b(nan|inf|None)\b", text)


def test_a_bare_run_is_reported_and_none_is_refused(tmp_path):
    (tmp_path / "scaling.png").touch()  # of an earlier report
    bare = {"seed": 0, "generative_steps": 9, "tune": "none"}
    report.write({"runs": [bare]}, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"report.md", "results.json"}
    wrong = {
        "no runs": [],
        "run 0 .* has no 'tune'": [{**bare, "tune": None}],
        "two runs": [bare, bare],
    }
    for says, runs in wrong.items():
        with pytest.raises(LcoError, match=says):
            report.write({"runs": runs}, tmp_path)


@pytest.mark.parametrize("measure", [stats.pearson, stats.spearman])
def test_seeds_are_clusters(measure):
    """Ten points of a seed that say the same are no more evidence than one of them."""
    x, y = np.array([0, 1, 2, 3, 4.0]), np.array([0.3, 0.1, 0.9, 0.6, 1.0])
    few, many = (
        stats.Points(*(np.repeat(side, n) for side in (x, y, np.arange(5)))) for n in (1, 10)
    )
    one, ten = stats.correlation(few, measure), stats.correlation(many, measure)
    assert one.mean == pytest.approx(ten.mean)
    assert one.low == pytest.approx(ten.low, abs=0.1)
    assert one.low < one.mean < one.high
    alone = stats.correlation(stats.Points(x, y, np.zeros(5)), measure)
    assert (alone.mean, alone.low, alone.high) == (one.mean, None, None)


def test_correlations_are_scipys():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 4, (2, 6, 9)).astype(float)
    for ours, theirs in ((stats.pearson, pearsonr), (stats.spearman, spearmanr)):
        np.testing.assert_allclose(
            ours(x, y), [theirs(a, b).statistic for a, b in zip(x, y, strict=True)], rtol=1e-9
        )
    assert np.isnan(stats.pearson(np.ones(4), x[0, :4]))


def test_where_nothing_relates_it_is_seldom_held():
    rng, held = np.random.default_rng(0), 0
    for _ in range(150):
        x = np.tile(np.linspace(0.2, 0.8, 4), 3) + 0.03 * rng.normal(size=12)
        found = stats.correlation(stats.Points(x, rng.normal(size=12), np.repeat(np.arange(3), 4)))
        held += found.low > 0
    assert held <= 12  # 2.5 % are meant; more than 8 % would be too many


def test_intervals_are_students():
    values = {0: 0.3, 4: 0.1, 7: 0.55}
    runs = [{"seed": seed, "generative_steps": 0, "tune": "none"} for seed in values]
    found, want = stats.over_seeds(runs, values.get), ttest_1samp([*values.values()], 0)
    np.testing.assert_allclose(found[1:3], want.confidence_interval(0.95))
    assert (found.mean, found.n) == (pytest.approx(0.95 / 3), 3)
