"""The instructions of a run's contents, and what its exports say of them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lco_jax.checkpoint.hf import Checkpoint
from lco_jax.checkpoint.sentence_transformers import Usage
from lco_jax.checkpoint.usage import usage_of, with_dimension
from lco_jax.core.errors import LcoError
from lco_jax.data.instructions import INSTRUCTIONS, Instruction, Instructions, SideInstructions

Config = Mapping[str, Any]
ROLES = ("query", "document")
_NONE = {"query": "", "document": "", "place": "before"}  # of a run of an earlier version


def usage_of_run(config: Config, checkpoint: Checkpoint, truncate_dim: int | None = None) -> Usage:
    """How a model that a run has trained is to be used: as it was trained.

    checkpoint: its base. truncate_dim: how many of the first numbers vectors have; None: as many as
    config.export.truncate_dim says, or else the base.
    """
    usage = replace(
        usage_of(checkpoint, None, pooling_of_run(config)), instructions=instructions_of_run(config)
    )
    width = truncate_dim or config.get("export", {}).get("truncate_dim")
    return with_dimension(usage, width, checkpoint)


def pooling_of_run(config: Config) -> str:
    """Which states an embedding is made of."""
    return config["model"].get("pooling", "last")


def instructions_of_run(config: Config) -> Instructions:
    """The prompts of a run's exports.

    "query" and "document" are those of all sources, or the configuration's where sources differ;
    "SOURCE-query" and "SOURCE-document" are a source's own. An input for which none is named is
    taken for a document.
    """
    by_source = _texts(config)
    texts = {text for pair in by_source.values() for text in pair}
    if texts <= {""}:
        return Instructions()
    given = _given(config)
    prompts = {}
    for side, role in enumerate(ROLES):
        of_all = {pair[side] for pair in by_source.values()}
        prompts[role] = of_all.pop() if len(of_all) == 1 else given[role]
        for name, pair in by_source.items():
            if pair[side] != prompts[role]:
                prompts[f"{name}-{role}"] = pair[side]
    return Instructions(prompts, given["place"], "document" if prompts["document"] else None)


def instructions_by_source(config: Config) -> dict[str, SideInstructions]:
    """The instructions of each source; {} where a run has none."""
    place, by_source = _given(config)["place"], _texts(config)
    if not any(map(any, by_source.values())):
        return {}
    return {
        name: (_instruction(query, place), _instruction(document, place))
        for name, (query, document) in by_source.items()
    }


def instructions_of_held_out(config: Config, name: str) -> SideInstructions:
    """The instructions of held-out records: those of the source of this name, or the exports'."""
    instructions = instructions_of_run(config)
    found = []
    for role in ROLES:
        text = instructions.prompts.get(f"{name}-{role}", instructions.prompts.get(role, ""))
        found.append(_instruction(text, instructions.place))
    query, document = found
    return query, document


def _instruction(text: str, place: str) -> Instruction | None:
    """The instruction of a text; None of an empty one."""
    return Instruction(text, place) if text else None


def refuse_embedding_keys(config: Config) -> None:
    """Raise for pooling, instructions and keep_apart in generative training, whose anchors ask for
    themselves and which makes no embeddings.
    """
    if config["model"]["pooling"] != "last":
        raise LcoError("config.model.pooling goes with lco_jax.train; pretrain pools nothing")
    if config["data"]["keep_apart"]:
        raise LcoError(
            "config.data.keep_apart goes with lco_jax.train; in pretrain records do not meet"
        )
    if instructions_by_source(config):
        raise LcoError(
            "config.instructions, and those of config.data.sources, go with lco_jax.train; a "
            "record of lco_jax.pretrain has its question in its anchor"
        )


def _given(config: Config) -> Mapping[str, str]:
    return config.get("instructions", _NONE)


def _texts(config: Config) -> dict[str, tuple[str, str]]:
    """(for queries, for documents) of each source."""
    given = _given(config)
    found = {}
    for name, source in config["data"]["sources"].items():
        of_source = []
        for role, key in zip(ROLES, INSTRUCTIONS, strict=True):
            own = source.get(key)
            of_source.append(given[role] if own is None else own)
        query, document = of_source
        found[name] = query, document
    return found
