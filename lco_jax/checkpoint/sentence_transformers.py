"""The files that make a merged checkpoint a sentence-transformers model (≥ 6) with the numbers of `OmniEmbedder`."""

from collections.abc import Sequence
from pathlib import Path

from lco_jax.core.files import ASSETS, write_json
from lco_jax.data.prompts import PROMPTS

# Prepended to the chat template that sentence-transformers applies: it puts our prompt after a user's content, as
# `encode` does for strings, unless the content already ends in one. Other users of the checkpoint see the template
# as it was.
_PROMPT_JINJA = ASSETS / "prompt.jinja"
_HIDDEN = {"method": "forward", "method_output_name": "last_hidden_state"}
_MODULES = ("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")


def write_modules(folder: Path, template: str, hidden_size: int, modalities: Sequence[str]) -> None:
    """modules.json and each module's configuration.

    template: the checkpoint's chat template. modalities: what it renders; all of them go through it as messages.
    """
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (name, path) in enumerate(_MODULES)
    ]
    write_json(folder / "modules.json", modules)
    prompt = _PROMPT_JINJA.read_text(encoding="utf-8")
    for name in ("text", "mixed"):
        prompt = prompt.replace(f"{name.upper()}_PROMPT", repr(PROMPTS[name]))
    transformer = {
        "transformer_task": "feature-extraction",
        "modality_config": {**dict.fromkeys(modalities, _HIDDEN), "message": {**_HIDDEN, "format": "structured"}},
        "module_output_name": "token_embeddings",
        "processing_kwargs": {"chat_template": {"add_generation_prompt": True, "chat_template": prompt + template}},
    }
    write_json(folder / "sentence_bert_config.json", transformer)
    pooling = {"word_embedding_dimension": hidden_size, "pooling_mode": "lasttoken", "include_prompt": True}
    write_json(folder / "1_Pooling" / "config.json", pooling)
    (folder / "2_Normalize").mkdir(exist_ok=True)
    general = {"model_type": "SentenceTransformer", "prompts": {}, "default_prompt_name": None}
    write_json(folder / "config_sentence_transformers.json", {**general, "similarity_fn_name": "cosine"})
