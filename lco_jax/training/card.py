"""What the model cards of a run tell: its data, its recipe, and scores before and after."""

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from huggingface_hub import EvalResult

from lco_jax.checkpoint.base import hub_id_of
from lco_jax.checkpoint.card import About, Section
from lco_jax.training.instructions import instructions_of_run, pooling_of_run
from lco_jax.training.objective import LossConfig

Config = Mapping[str, Any]
METRICS = {  # key in results.json -> its name, and how it was measured
    "recall_at_1": (
        "recall@1",
        "recall@1 is the share of anchors whose own positive is nearer, by cosine, than every "
        "other candidate; the candidates are all positives and negatives of the file",
    ),
    "mrr": ("MRR", "MRR is the mean of 1 / the rank of an anchor's positive among the candidates"),
    "spearman": (
        "Spearman",
        "Spearman is the rank correlation of the cosines of pairs with people's scores",
    ),
    "loss": ("loss", "the loss is in nats for each token of the held-out answers"),
}
_MADE = {
    "contrastive": "{base}, tuned for embeddings by a contrastive loss, with lco-jax.",
    "generative": "{base}, trained with lco-jax to give the answers of its records.",
}
_SHOWN = {  # of the configuration; a run of an earlier version may lack some
    "train": ("batch_size", "temperature", "two_way", "ignore_duplicates"),
    "data": ("max_length", "max_negatives"),
}
_METHODS = {
    "lora": "LoRA of the decoder's matrices",
    "full": "every parameter of the decoder",
    "projection": "a matrix behind the frozen model",
    "none": "nothing of the decoder",
}


def about_run(config: Config, results: Mapping[str, Any], step: int) -> About:
    """What is known of a run whose parameters of `step` are exported.

    config: the run's config.json. results: the content of its results.json, or {} if it has none
    yet. Scores of another step are left out.
    """
    # a run of an earlier version has it in its results alone
    objective = config.get("objective") or results.get("objective", "")
    sections = [_data(config, results), _recipe(config, step)]
    scores: tuple[EvalResult, ...] = ()
    if results.get("steps") == step and results.get("after"):
        sections.append(_scores(config, results))
        scores = _eval_results(results)
    what = {"contrastive": "tuned for embeddings", "generative": "trained to answer"}
    sources = _sources(config).values()
    paths = [str(one.get("path", "")) for one in sources if one["kind"] == "parquet"]
    datasets = {hub_id_of(path) for path in paths} - {None}
    return About(
        made=_MADE.get(objective, "{base}, tuned with lco-jax."),
        what=what.get(objective, "tuned"),
        objective=objective,
        datasets=tuple(sorted(datasets)),
        sections=tuple(sections),
        results=scores,
    )


def _sources(config: Config) -> Mapping[str, Mapping[str, Any]]:
    return config["data"]["sources"]


def _data(config: Config, results: Mapping[str, Any]) -> Section:
    """The sources; names of files, and no paths of this machine."""
    counts = results.get("records", {})
    rows = []
    for name, source in _sources(config).items():
        weight = source.get("weight", "by its size")
        rows.append((name, source["kind"], _what(source), counts.get(name, ""), weight))
    header = ("source", "kind", "what", "records", "weight")
    return Section("Data", header=header, rows=rows)


def _what(source: Mapping[str, Any]) -> str:
    """A source's data set, files or hub id."""
    given = str(source.get("path") or source.get("name") or source.get("glob") or "")
    given = given.rpartition(":")[2] if given.startswith("assets:") else given
    if source.get("kind") == "parquet" and hub_id_of(given):
        files = source.get("files")
        return f"{given} ({files})" if files else given
    if source.get("kind") == "tfds":
        return f"{given} ({source['split']})" if source.get("split") else given
    return PurePosixPath(given).name


def _recipe(config: Config, step: int) -> Section:
    """The values that matter, by their keys."""
    rows = _trained(config)
    rows.append(("steps", f"{step:,} of {config['total_steps']:,}"))
    loss = LossConfig.of(config)
    unused = ("train.temperature",) if loss.temperatures else ()  # those of the modalities are used
    for part, keys in _SHOWN.items():
        there = [key for key in keys if key in config[part] and f"{part}.{key}" not in unused]
        rows += [(f"{part}.{key}", config[part][key]) for key in there]
    rows += _added(loss)
    rows += [(f"optimizer.{key}", value) for key, value in config["optimizer"].items()]
    rows += [("model.dtype", config["model"]["dtype"]), ("seed", config["seed"])]
    rows += _usage(config)
    if config["model"]["quantize"]:
        rows.append(("model.quantize", f"{config['model']['quantize']}, in training"))
    words = "The values that matter, by the keys of lco-jax's configuration."
    return Section("Recipe", words, ("key", "value"), rows)


def _added(loss: LossConfig) -> list[tuple[str, Any]]:
    """What the loss has beside the paper's."""
    values = {key: getattr(loss, key) for key in loss.added}
    if loss.guide:
        values["guide"] = PurePosixPath(loss.guide).name  # no path of this machine
    return [(f"loss.{key}", value) for key, value in values.items()]


def _usage(config: Config) -> list[tuple[str, Any]]:
    """Pooling and the place of instructions, where they are not the paper's."""
    pooling, instructions = pooling_of_run(config), instructions_of_run(config)
    rows: list[tuple[str, Any]] = []
    if pooling != "last":
        rows.append(("model.pooling", pooling))
    if instructions.prompts:
        rows.append(("instructions.place", instructions.place))
    return rows


def _trained(config: Config) -> list[tuple[str, Any]]:
    """Which parameters were trained, and how."""
    tune, lora = config["tune"], config["lora"]
    rows: list[tuple[str, Any]] = [("trained", _METHODS[tune["decoder"]])]
    if tune["towers"] != "none":
        rows.append(("towers trained, too", tune["towers"]))
    if tune["decoder"] == "lora":
        rows += [(f"lora.{key}", lora[key]) for key in ("rank", "alpha", "dropout", "use_rslora")]
        rows.append(("lora.targets", f"`{lora['targets']}`"))
    return rows


def _scores(config: Config, results: Mapping[str, Any]) -> Section:
    """Each score before and after."""
    rows, used = [], set()
    for name, metric, before, after, measured_on in _each_score(results):
        rows.append((name, METRICS[metric][0], measured_on, f"{before:.3f}", f"{after:.3f}"))
        used.add(metric)
    how = "; ".join(words for key, (_, words) in METRICS.items() if key in used)
    form = config["model"]["dtype"]
    if config["model"]["quantize"]:
        form += f", its frozen matrices in {config['model']['quantize']}"
    words = (
        f"On data held out from training, by the run itself: of the model as it trained ({form}), "
        f"before the first step and after the last. What they mean: {how}."
    )
    return Section("Results", words, ("held out", "metric", "of", "before", "after"), rows)


def _each_score(results: Mapping[str, Any]) -> list[tuple[str, str, float, float, str]]:
    """(file, metric, before, after, what it was measured on) of every score."""
    held_out = results.get("held_out", {})
    before, after = results["before"], results["after"]
    if "loss" in after:  # of a generative run: one number for all files
        files, answers = ", ".join(held_out), sum(held_out.values())
        return [(files, "loss", before["loss"], after["loss"], f"{answers:,} answers")]
    found = []
    for name, scores in after.items():
        for metric in scores.keys() & METRICS.keys():
            unit = "pairs" if metric == "spearman" else "anchors"
            counted = f"{held_out[name]:,} {unit}" if name in held_out else ""
            if "candidates" in scores:
                counted += f", {scores['candidates']:,} candidates"
            found.append((name, metric, before[name][metric], scores[metric], counted))
    order = list(METRICS)
    return sorted(found, key=lambda one: (list(after).index(one[0]), order.index(one[1])))


def _eval_results(results: Mapping[str, Any]) -> tuple[EvalResult, ...]:
    """The scores after, as the hub's front matter has them."""
    found = []
    for name, metric, _, after, measured_on in _each_score(results):
        task = {"spearman": "sentence-similarity", "loss": "text-generation"}.get(metric)
        found.append(
            EvalResult(
                task_type=task or "feature-extraction",
                dataset_type=name,
                dataset_name=f"{name} (held out, {measured_on})",
                metric_type=metric,
                metric_name=METRICS[metric][0],
                metric_value=round(after, 6),
            )
        )
    return tuple(found)
