"""A tiny omnimodal model that has learned nothing: a thinker-only Qwen2.5-Omni in real Hugging Face
layout.

Its weights are drawn so that it can be trained from scratch. A state after the final norm has root
mean square 1, so the logits of its tied head have the deviation `EMBEDDING · sqrt(hidden)`, 0.55 by
default: the loss begins near log(vocabulary). Matrices have the variance 1 / fan-in, and those that
write to the residual stream 1 / (2 · layers) of it (GPT-2's rule): its size does not grow with
depth.

What made it look at pictures within minutes was their share of a prompt: attention is even at
first, so there is no system turn (a system prompt of twenty tokens hid four of a picture), and
patches are of 7 pixels (16 tokens a picture).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from lco_jax import MediaConfig
from lco_jax.checkpoint import omni
from lco_jax.checkpoint.chat_template import chat_template
from lco_jax.core.files import write_json, written_aside
from lco_jax.data.prompts import PROMPTS, QUESTIONS
from tools.make_tiny import PROMPT, make_tokenizer, tokenizer_config

MEDIA = MediaConfig(
    video_min_pixels=3136
)  # to be loaded with: Omni's own least would enlarge clips thirty times
EMBEDDING = (
    0.04  # deviation of the token embeddings, and about that of what the towers put in their place
)
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *omni.TOKENS.values())


@dataclass(frozen=True)
class Geometry:
    """Sizes. vocabulary: of the BPE, its 256 bytes among it; window: mel frames that the audio
    tower sees at once.
    """

    vocabulary: int = 600
    hidden: int = 192
    layers: int = 3
    heads: int = 6
    kv_heads: int = 2
    mlp: int = 384
    patch: int = 7
    vision_hidden: int = 96
    vision_depth: int = 2
    vision_heads: int = 3
    vision_mlp: int = 256
    audio_hidden: int = 96
    audio_layers: int = 2
    audio_heads: int = 3
    audio_mlp: int = 256
    window: int = 120


def write(folder: Path, texts: Iterable[str], seed: int, geometry: Geometry | None = None) -> None:
    """Make a checkpoint in `folder`, its tokenizer trained on `texts` and our prompts; the same
    input, the same bytes.

    Raises for a folder that holds something else.
    """
    geometry = Geometry() if geometry is None else geometry
    prompts = [*PROMPTS.values(), *QUESTIONS.values(), PROMPT]
    tokenizer = make_tokenizer([*texts, *prompts * 100], geometry.vocabulary, SPECIALS)
    ids = {token: tokenizer.token_to_id(token) for token in SPECIALS}
    config = _config(geometry, ids, tokenizer.get_vocab_size())
    with written_aside(Path(folder)) as aside:
        tokenizer.save(str(aside / "tokenizer.json"), pretty=False)
        write_json(
            aside / "tokenizer_config.json",
            tokenizer_config(ids) | {"extra_special_tokens": omni.TOKENS},
        )
        write_json(aside / "chat_template.json", {"chat_template": chat_template(omni.MARKERS)})
        preprocessor = omni.preprocessor_config(
            geometry.patch, config["audio_config"]["num_mel_bins"]
        )
        write_json(aside / "preprocessor_config.json", preprocessor)
        write_json(aside / "config.json", config)
        ends = {key: config[f"{key}_token_id"] for key in ("bos", "eos", "pad")}
        write_json(
            aside / "generation_config.json",
            {f"{key}_token_id": token for key, token in ends.items()},
        )
        rng = np.random.default_rng(seed)
        tensors = {
            name: omni.draw(name, shape, config, rng, EMBEDDING)
            for name, shape in omni.tensor_shapes(config)
        }
        save_file(tensors, aside / "model.safetensors", metadata={"format": "pt"})


def _config(g: Geometry, ids: dict[str, int], tokens: int) -> dict[str, Any]:
    """What config.json holds."""
    text = {
        "vocab_size": tokens,
        "hidden_size": g.hidden,
        "head_dim": g.hidden // g.heads,
        "intermediate_size": g.mlp,
        "num_hidden_layers": g.layers,
        "num_attention_heads": g.heads,
        "num_key_value_heads": g.kv_heads,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
    }
    vision = omni.VisionSizes(
        g.vision_hidden, g.vision_depth, g.vision_heads, g.vision_mlp, g.patch
    )
    audio = omni.AudioSizes(
        g.audio_hidden, g.audio_layers, g.audio_heads, g.audio_mlp, window=g.window
    )
    ends = {
        "bos_token_id": ids["<|im_start|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    return omni.thinker_config(text, vision.config(g.hidden), audio.config(g.hidden), ids, ends)
