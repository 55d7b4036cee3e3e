"""Tokenizer, chat template and processor files of the tiny checkpoints, as the hub has them.

`builtin.build` writes those of Qwen2.5-VL. The other families rename its special tokens, as Omni's
tokenizer does, or bring their own tokenizer.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers

from lco_jax.core.files import ASSETS, read_json, write_json

PINPOINTS = [
    [56, 112],
    [112, 56],
    [112, 112],
    [168, 56],
    [56, 168],
]  # the hub's, with tiles of 56 pixels
CHATML = """\
{%- for message in messages -%}
{%- if SYSTEM and loop.first and message['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}{{- message['content'] -}}
{%- else -%}{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{- 'IMAGE' -}}
{%- elif part['type'] == 'video' -%}{{- 'VIDEO' -}}
{%- elif part['type'] == 'audio' -%}{{- 'AUDIO' -}}
{%- else -%}{{- part['text'] -}}{%- endif -%}
{%- endfor -%}{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""
# these two put a turn's images before its text, whatever their order in the message
INST = """\
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{{- '[INST] ' -}}PARTS{{- ' [/INST]' -}}
{%- else -%}{{- ' ' + message['content'][0]['text'] + '</s> ' -}}
{%- endif -%}{%- endfor -%}"""
VICUNA = """\
{%- for message in messages -%}
{%- if message['role'] != 'system' -%}{{- message['role'].upper() + ': ' -}}{%- endif -%}
PARTS{{- ' ' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"""
PARTS = """\
{%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image>\\n' -}}{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}
{{- part['text'] -}}
{%- endfor -%}"""
OMNI_TOKENS = {  # the same ids under other names
    "<|object_ref_start|>": "<|AUDIO|>", "<|object_ref_end|>": "<|audio_bos|>",
    "<|box_start|>": "<|audio_eos|>",
    "<|vision_start|>": "<|vision_bos|>", "<|vision_end|>": "<|vision_eos|>",
    "<|image_pad|>": "<|IMAGE|>",
    "<|video_pad|>": "<|VIDEO|>",
}  # fmt: skip
OMNI_NAMES = {  # what Omni's processor asks its tokenizer for
    "image_token": "<|IMAGE|>", "audio_token": "<|AUDIO|>", "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>", "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}  # fmt: skip
WHISPER = {
    "feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 128,
    "sampling_rate": 16000,
    "hop_length": 160, "chunk_length": 300, "n_fft": 400, "n_samples": 4800000,
    "nb_max_frames": 30000,
    "padding_side": "right", "padding_value": 0.0, "dither": 0.0, "return_attention_mask": True,
}  # fmt: skip


def write_files(family: str, folder: Path) -> tuple[dict[str, int], int]:
    """Give the folder the files of `family`. Returns ({special token: id}, number of tokens)."""
    if family.startswith("omni"):
        _rename(folder, OMNI_TOKENS)
        _change(folder / "tokenizer_config.json", extra_special_tokens=OMNI_NAMES)
        _change(
            folder / "preprocessor_config.json", processor_class="Qwen2_5OmniProcessor", **WHISPER
        )
        media = [f"<|{kind}_bos|><|{name}|><|{kind}_eos|>" for kind, name in
                 (("vision", "IMAGE"), ("vision", "VIDEO"), ("audio", "AUDIO"))]  # fmt: skip
        write_json(folder / "chat_template.json", {"chat_template": _chatml("true", *media)})
    elif family.startswith("llava"):
        _write_llava(family, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items()}
    return ids, tokenizer.get_vocab_size()


def _chatml(system: str, image: str, video: str = "", audio: str = "") -> str:
    template = CHATML.replace("SYSTEM", system)
    for name, tokens in (("IMAGE", image), ("VIDEO", video), ("AUDIO", audio)):
        template = template.replace(name, tokens, 1)
    return template


def _write_llava(family: str, folder: Path) -> None:
    """Three tokenizers: ChatML without a first token, sentencepiece with `<s>`, bytes with one."""
    template = {
        "llava_qwen2": _chatml("false", "<image>\\n"),
        "llava_mistral": INST,
        "llava_llama": VICUNA,
    }[family]
    template = template.replace("PARTS", PARTS)
    if family == "llava_qwen2":  # the other place that a template may lie in
        _rename(folder, {"<|image_pad|>": "<image>"})
        (folder / "chat_template.json").unlink()
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    else:
        write_json(folder / "chat_template.json", {"chat_template": template})
    if family == "llava_mistral":
        _write_sentencepiece(folder)
    if family == "llava_llama":
        begin = "<|begin_of_text|>"
        _rename(
            folder, {"<|image_pad|>": "<image>", "<|endoftext|>": begin, "<|im_end|>": "<|eot_id|>"}
        )
        _change(
            folder / "tokenizer_config.json",
            bos_token=begin,
            tokenizer_class="PreTrainedTokenizerFast",
        )
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        with_begin = _begins_with(begin, tokenizer.token_to_id(begin))
        tokenizer.post_processor = processors.Sequence(
            [processors.ByteLevel(trim_offsets=False), with_begin]
        )
        tokenizer.save(str(folder / "tokenizer.json"))
    preprocessor = {
        "image_processor_type": "LlavaNextImageProcessor", "processor_class": "LlavaNextProcessor",
        "crop_size": {"height": 56, "width": 56}, "size": {"shortest_edge": 56},
        "do_center_crop": True,
        "do_convert_rgb": True, "do_normalize": True, "do_pad": True, "do_rescale": True,
        "do_resize": True,
        "resample": 3, "aspect_ratio_setting": "anyres", "rescale_factor": 0.00392156862745098,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258,
        0.27577711],
        "image_grid_pinpoints": PINPOINTS,
    }  # fmt: skip
    write_json(folder / "preprocessor_config.json", preprocessor)
    processor = {
        "processor_class": "LlavaNextProcessor", "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "image_token": "<image>", "num_additional_image_tokens": 1,
    }  # fmt: skip
    write_json(folder / "processor_config.json", processor)


def _write_sentencepiece(folder: Path) -> None:
    """A BPE that falls back to bytes and marks spaces by U+2581, as Mistral's and Vicuna's do."""
    lines = (ASSETS / "triplets_train.jsonl").read_text(encoding="utf-8").splitlines()[:200]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    special = ["<unk>", "<s>", "</s>", *byte_tokens]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, show_progress=False, max_token_length=8
    )
    tokenizer.train_from_iterator((word for line in lines for word in line.split(" ")), trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [
        token for token in content["added_tokens"] if token["content"] not in byte_tokens
    ]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = _begins_with("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in ("<image>", "<pad>")]
    )
    for name in ("vocab.json", "merges.txt"):  # of the byte-level one
        (folder / name).unlink()
    tokenizer.save(str(folder / "tokenizer.json"))
    flags = {
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }
    added = {
        str(i): {"content": t.content, **flags}
        for i, t in tokenizer.get_added_tokens_decoder().items()
    }
    config = {
        "add_bos_token": True, "add_eos_token": False, "added_tokens_decoder": added,
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False, "eos_token": "</s>", "legacy": True,
        "model_max_length": 4096,
        "pad_token": "<pad>", "tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>",
    }  # fmt: skip
    write_json(folder / "tokenizer_config.json", config)


def _begins_with(token: str, token_id: int) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=f"{token} $A", pair=None, special_tokens=[(token, token_id)]
    )


def _rename(folder: Path, names: dict[str, str]) -> None:
    for file in (folder / "tokenizer.json", folder / "tokenizer_config.json"):
        text = file.read_text(encoding="utf-8")
        for old, new in names.items():
            text = text.replace(json.dumps(old), json.dumps(new))
        file.write_text(text, encoding="utf-8")


def _change(file: Path, **values: object) -> None:
    write_json(file, {**read_json(file), **values})
