"""The model card of an export: README.md with the hub's front matter, and code that loads it.

`assets/card.jinja` has its words. Nothing in it is guessed: what is not known is left out.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined

from lco_jax.checkpoint.base import HUB, Base, base_of, licence_keys
from lco_jax.checkpoint.hf import DTYPES, Checkpoint
from lco_jax.checkpoint.parts import README, front_matter, parts_of
from lco_jax.checkpoint.sentence_transformers import Usage
from lco_jax.core.files import ASSETS, write_text
from lco_jax.core.lora import LoraConfig
from lco_jax.data.instructions import IN_WORDS
from lco_jax.data.prompts import PROMPT, PROMPTS

_TEMPLATE = ASSETS / "card.jinja"
PAPER = "arxiv:2510.11693"
CLASSES = {  # of transformers, with the vocabulary head, by which PEFT names modules
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen2_5_omni_thinker": "Qwen2_5OmniThinkerForConditionalGeneration",
    "qwen2_5_omni": "Qwen2_5OmniThinkerForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
}
# How the code of a card on a disk names its folder, and the sentence that says so. `at_hub` names
# the repository instead.
_HERE = ('name = "."', "--adapter=.")
# what names the base in the code of an adapter's card
_CODE_FOR_A_BASE = re.compile(r'from_pretrained\(".*", adapter=')
_FLAG_FOR_A_BASE = re.compile(r"--model=.* --adapter=")
_WHERE = "The code below is to be run in this folder.\n"


@dataclass(frozen=True)
class Section:
    """A part of a card: words, and a table if there are rows."""

    heading: str
    words: str = ""
    header: tuple[str, ...] = ()
    rows: Sequence[Sequence[Any]] = ()


@dataclass(frozen=True)
class About:
    """What is known of how an export was made.

    made: a sentence, in which {base} is the base's name. what: the same in a few words, for the
    title. objective: "contrastive", "generative", or "" where it is not known. relation: of a
    merged model to its base, as the hub names it. datasets: ids of the hub. results: the figures
    of `sections` for the front matter.
    """

    made: str = ""
    what: str = "exported"
    objective: str = ""
    relation: str = "finetune"
    datasets: tuple[str, ...] = ()
    sections: tuple[Section, ...] = ()
    results: tuple[EvalResult, ...] = ()


class _Form(NamedTuple):
    """What an export is. kind: merged, adapter or assembled. lora: an adapter's settings. usage:
    how it embeds.
    """

    kind: str
    projected: bool = False
    lora: LoraConfig | None = None
    usage: Usage = Usage()


def merged_card(
    checkpoint: Checkpoint,
    source: str | Path,
    about: About,
    projected: bool,
    usage: Usage | None = None,
) -> str:
    """The card of a merged model.

    checkpoint, source: its base, opened, and as it was given. projected: whether it has a
    projection. usage: how it embeds.
    """
    made = about.made or "This is {base} in another dtype or other files, and nothing else."
    form = _Form("merged", projected, usage=usage or Usage())
    return _card(checkpoint, base_of(source), replace(about, made=made), form)


def adapter_card(
    checkpoint: Checkpoint,
    source: str | Path,
    about: About,
    config: LoraConfig,
    usage: Usage | None = None,
) -> str:
    """The card of an adapter. checkpoint, source: its base, opened, and as it was given. usage: how
    both together embed.
    """
    about = replace(
        about,
        made=about.made or "This is an adapter of {base}.",
        what=f"{about.what} (adapter)",
        relation="adapter",
    )
    form = _Form("adapter", lora=config, usage=usage or Usage())
    return _card(checkpoint, base_of(source), about, form)


def assembled_card(name: str, checkpoint: Checkpoint) -> str:
    """The card of a model that `assemble` made, with its parts. name: of its folder. checkpoint:
    the model.
    """
    base = Base(name, name, None, name)
    about = About(
        "A model made of parts by lco-jax. Whatever is fresh was drawn at random and has learned "
        "nothing yet; the language model answers as it did before.",
        what="assembled",
        objective="generative",
    )
    return _card(checkpoint, base, about, _Form("assembled"))


def at_hub(card: str, repo_id: str, base_id: str = "") -> str:
    """A card whose code loads from the hub what it loaded from its folder.

    base_id: of the base of an adapter, in the place of a folder of this machine.
    """
    if base_id:
        card = _CODE_FOR_A_BASE.sub(f'from_pretrained("{base_id}", adapter=', card)
        card = _FLAG_FOR_A_BASE.sub(f"--model={base_id} --adapter=", card)
    assignment, flag = _HERE
    card = card.replace(assignment, f'name = "{repo_id}"').replace(flag, f"--adapter={repo_id}")
    return card.replace(_WHERE, "")


def write_card(folder: Path, card: str) -> None:
    """Write a card to an export's folder."""
    write_text(folder / README, card)


def _card(checkpoint: Checkpoint, base: Base, about: About, form: _Form) -> str:
    """Front matter and body. checkpoint, base: what the export was made from."""
    of_base, parts = front_matter(checkpoint.folder), parts_of(checkpoint.folder)
    licence = licence_keys(checkpoint.folder, base, of_base, parts)
    head = _front_matter(checkpoint, base, about, form, of_base, licence)
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.filters |= {"cell": _cell, "literal": json.dumps, "quoted": shlex.quote}
    modalities = checkpoint.backbone.modalities
    body = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        **form._asdict(),
        title=_title(base, about),
        about=replace(about, made=about.made.replace("{base}", base.name)),
        base=base,
        base_link=_link(base),
        licence=_licence_in_words(licence),
        parts=parts,
        modalities=modalities,
        size=checkpoint.config.hidden_size,
        dtype=_dtype(checkpoint),
        model_class=CLASSES[checkpoint.backbone.model_type],
        in_sentence_transformers=checkpoint.backbone.in_sentence_transformers,
        prompts={kind: PROMPTS[kind] for kind in (*modalities, "mixed")},
        **_instructions(form.usage),
        # as the inside of an f-string of the code
        prompt_pattern=json.dumps(PROMPT),
        where=_WHERE,
        version=version("lco-jax"),
    )
    return str(ModelCard(f"---\n{head.to_yaml()}\n---\n\n{body}"))


def _instructions(usage: Usage) -> dict[str, Any]:
    """What the template says of instructions."""
    instructions = usage.instructions
    by_default = instructions.prompts.get(instructions.default or "", "")
    return {
        "instructions": instructions,
        "default_instruction": by_default,
        "place_in_words": IN_WORDS[instructions.place],
    }


def _title(base: Base, about: About) -> str:
    return f"{base.name}, {about.what}"


def _front_matter(
    checkpoint: Checkpoint,
    base: Base,
    about: About,
    form: _Form,
    of_base: Mapping[str, Any],
    licence: dict[str, str],
) -> ModelCardData:
    """What the hub reads. A base that is not on the hub hands down what its own card says.

    of_base: the front matter of its own card.
    """
    base_model = base.hub_id or of_base.get("base_model")
    library, pipeline = _programs(checkpoint, about, form)
    return ModelCardData(
        base_model=base_model,
        base_model_relation=about.relation if base_model else None,
        datasets=list(about.datasets) or None,
        language=of_base.get("language"),
        library_name=library,
        pipeline_tag=pipeline,
        tags=_tags(checkpoint, about, form),
        model_name=_title(base, about) if about.results else None,
        eval_results=list(about.results) or None,
        **licence,
    )


def _programs(checkpoint: Checkpoint, about: About, form: _Form) -> tuple[str, str]:
    """The hub's names of the library that loads an export, and of what it does."""
    if about.objective == "generative":
        hears = "audio" in checkpoint.backbone.modalities
        pipeline = "any-to-any" if hears else "image-text-to-text"
    else:
        pipeline = "feature-extraction"
    if form.kind == "adapter":
        return "peft", pipeline
    if checkpoint.backbone.in_sentence_transformers and about.objective != "generative":
        return "sentence-transformers", pipeline
    return "transformers", pipeline


def _tags(checkpoint: Checkpoint, about: About, form: _Form) -> list[str]:
    tags = ["lco-jax", "multimodal", *checkpoint.backbone.modalities]
    if form.lora is not None:
        tags.append("lora")
    if form.kind == "merged" and checkpoint.backbone.in_sentence_transformers:
        tags.append("sentence-transformers")
    if about.objective != "generative":
        tags.append("sentence-similarity")
    return [*tags, PAPER]


def _licence_in_words(keys: dict[str, str]) -> str:
    """ "" if it is not known."""
    name = keys.get("license_name") or keys.get("license", "")
    link = keys.get("license_link")
    return f"[{name}]({link})" if link else name


def _link(base: Base) -> str:
    """A base's name in Markdown, with a link and the commit where it is on the hub."""
    if base.hub_id is None:
        return f"`{base.name}`"
    link = f"[{base.hub_id}]({HUB}/{base.hub_id})"
    return f"{link} at commit `{base.revision[:12]}`" if base.revision else link


def _dtype(checkpoint: Checkpoint) -> str:
    """The dtype that a base's config.json states, if it is one that we write."""
    config = checkpoint.model_config
    stated = config.get("dtype") or config.get("torch_dtype")
    return stated if stated in DTYPES else "bfloat16"


def _cell(value: Any) -> str:
    """A value as a table's cell shows it."""
    if isinstance(value, bool):
        value = "yes" if value else "no"
    elif isinstance(value, float):
        value = f"{value:g}"
    elif isinstance(value, int):
        value = f"{value:,}"
    return str(value).replace("|", "\\|").replace("\n", "⏎")
