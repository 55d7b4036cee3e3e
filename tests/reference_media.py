"""Raw media drawn from a seed, and the golden embeddings of conversations that carry them.

`golden` runs each conversation alone, so nothing is padded, through the checkpoint's processor and
model in transformers, in float32. PIL resizes pixels, as in the runtime; torchvision's resizing
differs by a grey level.

Dimensions: N conversations, D hidden, n tokens of one conversation, T frames, H, W pixels, C
channels.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from PIL import Image

RATE = 16000  # audio samples a second


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, C]: soft blobs of colour on a slope, and a little noise."""
    rng = np.random.default_rng([seed, 1])
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j][..., None]
    pixels = 255 * (
        rng.uniform(0, 0.6, 3) + rng.uniform(0, 0.3, 3) * x + rng.uniform(0, 0.3, 3) * y
    )
    for _ in range(5):
        center, size, colour = (
            rng.uniform(0, 1, 2),
            rng.uniform(0.08, 0.4),
            rng.uniform(-200, 200, 3),
        )
        pixels = pixels + colour * np.exp(-((y - center[0]) ** 2 + (x - center[1]) ** 2) / size**2)
    return np.clip(pixels + rng.normal(0, 8, pixels.shape), 0, 255).astype(np.uint8)


def clip(seed: int, frames: int, height: int, width: int) -> np.ndarray:
    """uint8 [T, H, W, C]: a window that slides over a picture while that fades into another."""
    first, last = (picture(2 * seed + i, 2 * height, width).astype(np.float32) for i in (0, 1))
    out = []
    for i in range(frames):
        fade, down = i / max(frames - 1, 1), height * i // frames
        out.append(((1 - fade) * first + fade * last)[down : down + height])
    return np.stack(out).astype(np.uint8)


def chirp(seed: int, seconds: float) -> np.ndarray:
    """float32 mono in [-1, 1]: rising tones under a slow beat, and noise; the last hop is short."""
    rng = np.random.default_rng([seed, 2])
    t = np.arange(int(seconds * RATE) + 53) / RATE
    wave = rng.normal(0, 0.02, t.shape)
    for _ in range(3):
        start, rise, beat = rng.uniform(80, 900), rng.uniform(200, 3000), rng.uniform(0.5, 3)
        tone = np.sin(2 * np.pi * (start * t + rise * t**2 / (2 * t[-1])))
        wave += 0.2 * tone * (1 + np.sin(2 * np.pi * beat * t))
    return np.clip(wave, -1, 1).astype(np.float32)


def user(*parts: str | dict[str, Any]) -> list[dict[str, Any]]:
    """A conversation of one turn; strings become text parts."""
    return [
        {
            "role": "user",
            "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts],
        }
    ]


def image(seed: int, height: int, width: int, **limits: int) -> dict[str, Any]:
    """A message part. limits: min_pixels, max_pixels."""
    return {"type": "image", "image": picture(seed, height, width), **limits}


def audio(seed: int, seconds: float) -> dict[str, Any]:
    """A message part."""
    return {"type": "audio", "audio": {"array": chirp(seed, seconds), "sampling_rate": RATE}}


def video(
    seed: int, frames: int, height: int, width: int, fps: float, sound: float | None = None
) -> dict[str, Any]:
    """A message part. sound: seconds of audio that the video brings along."""
    value: dict[str, Any] = {"array": clip(seed, frames, height, width), "fps": fps}
    if sound is not None:
        value["audio"] = {"array": chirp(seed, sound), "sampling_rate": RATE}
    return {"type": "video", "video": value}


class Golden(NamedTuple):
    """input_ids: of each conversation, [n]. position_ids: of each, [3, n].

    embeddings: unit vectors, [N, D].
    """

    input_ids: list[np.ndarray]
    position_ids: list[np.ndarray]
    embeddings: np.ndarray


def golden(
    model: torch.nn.Module,
    folder: Path,
    conversations: list[list[dict[str, Any]]],
    *,
    use_audio_in_video: bool = False,
    video_positions: str = "4.57",
    video_limits: tuple[int, int] | None = None,
    together: bool = False,
    pooling: str = "last",
) -> Golden:
    """What transformers makes of conversations whose parts hold raw media.

    use_audio_in_video: interleave the audio of videos that have some with their frames (Omni).
    video_positions: of Qwen2.5-VL: "4.57", which LCO was trained with, or "5", the installed
    release's.
    video_limits: smallest and largest number of pixels of a frame, instead of the checkpoint's.
    together: run one left-padded batch instead of one conversation at a time.
    pooling: the "last" state, or the "mean" of all under the attention mask.
    """
    processor = _processor(str(folder))
    batches = [conversations] if together else [[conversation] for conversation in conversations]
    ids, positions, embeddings = [], [], []
    for batch in batches:
        inputs = _inputs(processor, batch, use_audio_in_video, video_limits)
        if use_audio_in_video:
            inputs["use_audio_in_video"] = True
        if model.config.model_type == "qwen2_5_vl" and video_positions == "4.57":
            inputs["position_ids"] = _positions_of_4_57(inputs, model.config)
        embedding, position = _run(model, inputs, pooling)
        embeddings.append(embedding.numpy())
        for i, mask in enumerate(inputs["attention_mask"].bool()):
            ids.append(inputs["input_ids"][i, mask].numpy())
            positions.append(position[:, i, mask].numpy())
    return Golden(ids, positions, np.concatenate(embeddings))


def answer_losses(
    model: torch.nn.Module, folder: Path, conversation: list[dict[str, Any]], answer: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the loss of each token of an answer and the end of its turn, [tokens]; of the conversation
    alone, the hidden state of its last token at every layer, [L + 1, D])."""
    processor = _processor(str(folder))
    inputs = _inputs(processor, [conversation], False, None)
    model.model.rope_deltas = None  # of an earlier input
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
    turn = processor.apply_chat_template(
        [*conversation, {"role": "assistant", "content": [{"type": "text", "text": answer}]}],
        tokenize=False,
    )
    start = processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert turn.startswith(start)
    spoken = processor.tokenizer(
        turn[len(start) :].rstrip(), add_special_tokens=False, return_tensors="pt"
    )
    labels = torch.cat([torch.full_like(inputs["input_ids"], -100), spoken["input_ids"]], dim=1)
    for key, more in spoken.items():
        inputs[key] = torch.cat([inputs[key], more], dim=1)
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = torch.nn.functional.pad(
            inputs["mm_token_type_ids"], (0, len(more[0]))
        )
    model.model.rope_deltas = None
    logits = model(**inputs, use_cache=False).logits[0]
    losses = torch.nn.functional.cross_entropy(
        logits[:-1], labels[0, 1:], ignore_index=-100, reduction="none"
    )
    return losses[-spoken["input_ids"].shape[1] :], torch.stack(states)[:, 0, -1]


def generated(
    model: torch.nn.Module,
    folder: Path,
    conversation: list[dict[str, Any]],
    new: int,
    ends: list[int],
) -> list[int]:
    """At most `new` tokens that transformers generates greedily, with 5.x's video positions."""
    inputs = _inputs(_processor(str(folder)), [conversation], False, None)
    model.model.rope_deltas = None  # of an earlier input
    out = model.generate(
        **inputs, max_new_tokens=new, do_sample=False, eos_token_id=ends, pad_token_id=ends[0]
    )
    return out[0, inputs["input_ids"].shape[1] :].tolist()


@lru_cache
def _processor(folder: str) -> Any:
    processor = transformers.AutoProcessor.from_pretrained(folder)
    processor.image_processor = transformers.AutoImageProcessor.from_pretrained(
        folder, backend="pil"
    )
    processor.tokenizer.padding_side = "left"
    return processor


def _inputs(
    processor: Any,
    conversations: list[list[dict[str, Any]]],
    use_audio_in_video: bool,
    video_limits: tuple[int, int] | None,
) -> dict[str, torch.Tensor]:
    """The model's inputs from the checkpoint's processor; frames of videos: `_frame_patches`."""
    messages = [message for conversation in conversations for message in conversation]
    parts = [part for m in messages if not isinstance(m["content"], str) for part in m["content"]]
    images = [part for part in parts if part["type"] == "image"]
    videos = [part["video"] for part in parts if part["type"] == "video"]
    # audio in the order of its tokens, and the video that each comes with
    sounds, owners = [], []
    for part in parts:
        if part["type"] == "audio":
            sounds.append(part["audio"]["array"])
            owners.append(None)
        elif part["type"] == "video" and use_audio_in_video and "audio" in part["video"]:
            sounds.append(part["video"]["audio"]["array"])
            owners.append(next(i for i, video in enumerate(videos) if video is part["video"]))
    texts = [
        processor.apply_chat_template(c, tokenize=False, add_generation_prompt=True)
        for c in conversations
    ]
    arguments: dict[str, Any] = {"text": texts, "padding": True, "return_tensors": "pt"}
    if images:
        given = [part["image"] for part in images]
        arguments["images"] = [
            x if isinstance(x, Image.Image) else Image.fromarray(x) for x in given
        ]
        limits = [
            {key: part[key] for key in ("min_pixels", "max_pixels") if key in part}
            for part in images
        ]
        assert all(limit == limits[0] for limit in limits), "the processor takes one limit a call"
        if limits[0]:
            size = processor.image_processor.size
            smallest = limits[0].get("min_pixels", size["shortest_edge"])
            largest = limits[0].get("max_pixels", size["longest_edge"])
            arguments["images_kwargs"] = {
                "size": {"shortest_edge": smallest, "longest_edge": largest}
            }
    if videos:
        arguments["videos"] = [video["array"] for video in videos]
        arguments["videos_kwargs"] = _videos_kwargs(processor, videos, video_limits)
    if sounds:
        arguments |= {"audio": sounds, "audio_kwargs": {"sampling_rate": RATE}}
    if use_audio_in_video:
        arguments |= {"load_audio_from_video": True, "audio_from_video_indices": owners}
    inputs = {
        key: torch.as_tensor(np.asarray(value)) for key, value in processor(**arguments).items()
    }
    if videos:
        patches = [
            _frame_patches(processor.image_processor, video["array"], grid)
            for video, grid in zip(videos, inputs["video_grid_thw"].tolist(), strict=True)
        ]
        inputs["pixel_values_videos"] = torch.cat(patches)
    return inputs


def _videos_kwargs(
    processor: Any, videos: list[dict[str, Any]], limits: tuple[int, int] | None
) -> dict[str, Any]:
    out: dict[str, Any] = {"cap_pixels_per_frame": False, "do_sample_frames": False}
    rates = [video["fps"] for video in videos]
    if "Omni" in type(processor).__name__:
        assert len(set(rates)) == 1, "Omni's processor takes one rate a call"
        out["fps"] = rates[0]
    else:
        out["video_metadata"] = [
            {
                "total_num_frames": len(video["array"]),
                "fps": rate,
                "frames_indices": list(range(len(video["array"]))),
            }
            for video, rate in zip(videos, rates, strict=True)
        ]
    if limits is not None:
        out["size"] = {"shortest_edge": limits[0], "longest_edge": limits[1]}
    return out


def _frame_patches(image_processor: Any, frames: np.ndarray, grid: list[int]) -> torch.Tensor:
    """pixel_values_videos of one video with PIL resizing, which no video processor does.

    The image processor repeats each frame in time. Of its output, one of each pair is taken.
    """
    t, h, w = grid
    size = image_processor.patch_size
    resized = [
        Image.fromarray(frame).resize((w * size, h * size), Image.Resampling.BICUBIC)
        for frame in frames
    ]
    resized += [resized[-1]] * (-len(resized) % 2)
    pixels = image_processor(resized, do_resize=False, return_tensors="pt")["pixel_values"]
    pixels = pixels.view(t, 2, h * w, 3, 2, size, size)[
        :, :, :, :, 0
    ]  # [t, frame of the pair, patch, C, size, size]
    return pixels.permute(0, 2, 3, 1, 4, 5).reshape(t * h * w, -1)


def _run(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor], pooling: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings [N, D] and the positions [3, N, n] that the decoder was given."""
    given: dict[str, Any] = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, arguments, keywords: given.update(keywords), with_kwargs=True
    )
    model.model.rope_deltas = None  # of an earlier input
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True, use_cache=False)
    hook.remove()
    positions = given.get("position_ids")
    if (
        positions is None
    ):  # the decoder counts; padding moves all of a row by as much, which RoPE does not see
        positions = inputs["attention_mask"].cumsum(-1) - 1
    positions = positions.expand(3, *inputs["input_ids"].shape)
    states = out.hidden_states[-1]
    pooled = states[:, -1] if pooling == "last" else mean_of(states, inputs["attention_mask"])
    return torch.nn.functional.normalize(pooled, dim=-1), positions


def mean_of(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean of the states [N, n, D] under an attention mask [N, n]."""
    return (states * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)


def _positions_of_4_57(inputs: dict[str, torch.Tensor], config: Any) -> torch.Tensor:
    """Qwen2.5-VL's positions as transformers 4.57 computed them, [3, N, n], 0 at padding.

    The seconds of a pair of frames are truncated to an integer, and what follows starts after the
    largest position of any axis.
    """
    merge, rate = config.vision_config.spatial_merge_size, config.vision_config.tokens_per_second
    images = iter(inputs["image_grid_thw"].tolist() if "image_grid_thw" in inputs else ())
    videos = iter(inputs["video_grid_thw"].tolist() if "video_grid_thw" in inputs else ())
    seconds = iter(inputs["second_per_grid_ts"].tolist() if "second_per_grid_ts" in inputs else ())
    positions = torch.zeros(3, *inputs["input_ids"].shape, dtype=torch.long)
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        tokens, found, start = inputs["input_ids"][row, mask].tolist(), [], 0
        while len(found) < len(tokens):
            token = tokens[len(found)]
            if token not in (config.image_token_id, config.video_token_id):
                found.append((start, start, start))
                start += 1
                continue
            t, h, w = next(images if token == config.image_token_id else videos)
            step = 0 if token == config.image_token_id else rate * int(next(seconds))
            found += [
                (start + frame * step, start + y, start + x)
                for frame in range(t)
                for y in range(h // merge)
                for x in range(w // merge)
            ]
            start = max(max(position) for position in found) + 1
        positions[:, row, mask] = torch.tensor(found).T
    return positions
