"""The towers beside transformers' own, on the same inputs; and a long sound beside short ones."""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lco_jax.core.bins import bucket
from lco_jax.data.tower_rows import Patches, PatchRows, TowerRows, chunk_rows, chunks_of, fill
from lco_jax.models.registry import BACKBONES

OMNI = BACKBONES["qwen2_5_omni_thinker"]
VISION = {
    "depth": 8, "hidden_size": 320, "intermediate_size": 856, "num_heads": 4, "patch_size": 14,
    "temporal_patch_size": 2, "spatial_merge_size": 2, "window_size": 112,
    "fullatt_block_indexes": [3, 7], "out_hidden_size": 512, "hidden_act": "silu", "in_channels": 3,
}  # fmt: skip
AUDIO = {
    "encoder_layers": 6, "d_model": 384, "encoder_attention_heads": 6, "encoder_ffn_dim": 1536,
    "n_window": 100, "output_dim": 512, "num_mel_bins": 128, "max_source_positions": 1500,
}  # fmt: skip
HZ = 100  # mel frames a second
# as in `pixels.scale_of`
SCALE = np.array([[255, 0.48, 0.27], [255, 0.46, 0.26], [255, 0.41, 0.28]], np.float32)
Medium = Patches | np.ndarray  # pictures, or a mel: float32 [frames, channels]


def add_parsers(kinds: Any, common: argparse.ArgumentParser) -> None:
    """`media`."""
    parser = kinds.add_parser("media", parents=[common], help="vision and audio towers")
    parser.add_argument("--no-peer", action="store_true")
    parser.set_defaults(measure=measure, table=table)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Images, a video, sounds; then one long sound and as much in short ones, in turns."""
    rng = np.random.default_rng(0)
    towers = {name: Tower(name) for name in ("visual", "audio_tower")}
    result: dict[str, Any] = {"cases": {}, "exactness": {}}
    for name, (tower, media) in tqdm(_cases(rng).items(), desc="media"):
        ours = towers[tower].ours(media)
        peer = None if args.no_peer else towers[tower].peer(media)
        seconds = _in_turns([ours, peer] if peer else [ours], args.rounds)
        result["cases"][name] = {
            "items": len(media),
            "seconds": seconds[0],
            "per_second": len(media) / seconds[0],
        }
        if peer:
            ratio = seconds[1] / seconds[0]
            result["cases"][name] |= {"peer_seconds": seconds[1], "ratio": ratio}
            result["exactness"][name] = _difference(ours(), peer())
    long = [_sound(rng, 128.0)]
    short = [_sound(rng, 8.0) for _ in range(16)]
    sides = [towers["audio_tower"].ours(sounds) for sounds in (long, short)]
    seconds = _in_turns(sides, args.rounds)
    result["long_sound_over_short_ones"] = seconds[0] / seconds[1]
    if not args.no_peer:
        ratios = [case["ratio"] for case in result["cases"].values()]
        result["ratio"] = float(np.exp(np.mean(np.log(ratios))))
    return result


def _cases(rng: np.random.Generator) -> dict[str, tuple[str, list[Any]]]:
    """Name -> (tower, media)."""
    images = [_patches(rng, (1, size // 14, size // 14)) for size in (448,) * 6 + (252,) * 6]
    sounds = [_sound(rng, seconds) for seconds in (8.0,) * 12 + (3.1, 20.0)]
    return {
        "images": ("visual", images),
        "video": ("visual", [_patches(rng, (16, 16, 16))]),
        "sounds": ("audio_tower", sounds),
    }


def _patches(rng: np.random.Generator, grid: tuple[int, int, int]) -> Patches:
    pictures = 1 if grid[0] == 1 else 2
    values = rng.integers(0, 256, (int(np.prod(grid)), 3, pictures, 196), np.uint8)
    return Patches(values, grid, SCALE)


def _sound(rng: np.random.Generator, seconds: float) -> np.ndarray:
    return rng.standard_normal((int(seconds * HZ), 128)).astype(np.float32)


def _difference(ours: list[np.ndarray], peer: list[np.ndarray]) -> float:
    want = np.concatenate(peer)
    return float(np.abs(np.concatenate(ours) - want).max() / np.abs(want).max())


def _in_turns(sides: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """Median seconds of each, taken in turns; the first round is not counted."""
    seconds: list[list[float]] = [[] for _ in sides]
    for i in range(rounds + 1):
        for side, times in zip(sides, seconds, strict=True):
            start = time.perf_counter()
            side()
            if i:
                times.append(time.perf_counter() - start)
    return [float(np.median(times)) for times in seconds]


class Tower:
    """Both implementations of a tower, with the same random weights."""

    def __init__(self, name: str):
        import torch

        from benchmarks.peer import import_torchvision

        import_torchvision()
        from transformers.models.qwen2_5_omni import configuration_qwen2_5_omni as configs
        from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as models

        torch.manual_seed(0)
        self.name = name
        if name == "visual":
            config = configs.Qwen2_5OmniVisionEncoderConfig(**VISION)
            config._attn_implementation = "sdpa"
            self.torch = models.Qwen2_5OmniVisionEncoder(config)
        else:
            config = configs.Qwen2_5OmniAudioEncoderConfig(**AUDIO)
            config._attn_implementation = "sdpa"
            self.torch = models.Qwen2_5OmniAudioEncoder(config)
        self.torch.eval().requires_grad_(False)
        self.module, self.params = self._port()

    def _port(self) -> tuple[Any, dict[str, Any]]:
        """Our module, and the torch module's weights under our names."""
        import jax.numpy as jnp
        from flax.traverse_util import unflatten_dict

        from lco_jax.models.qwen_audio import AudioConfig, QwenAudio
        from lco_jax.models.qwen_vision import QwenVision, VisionConfig

        if self.name == "visual":
            module: Any = QwenVision(
                VisionConfig.from_hf({"vision_config": VISION}, "benchmark", fused=False)
            )
        else:
            module = QwenAudio(AudioConfig.from_hf({"audio_config": AUDIO}, "benchmark"))
        leaves: dict[tuple[str, ...], Any] = {}
        stacks: dict[tuple[str, ...], list[np.ndarray]] = {}
        for key, value in self.torch.state_dict().items():
            name = OMNI.name_of(f"{self.name}.{key}")
            if name is None:
                continue
            path = tuple(name.split("."))[1:]
            if path[0] in ("blocks", "layers"):
                stacks.setdefault((path[0], *path[2:]), []).append(value.numpy())
            else:
                leaves[path] = jnp.asarray(value.numpy())
        leaves |= {path: jnp.asarray(np.stack(values)) for path, values in stacks.items()}
        return module, unflatten_dict(leaves)

    def ours(self, media: Sequence[Medium]) -> Callable[[], list[np.ndarray]]:
        """From pixels or mels on the host to each medium's tokens on the host."""
        import jax

        @jax.jit
        def run(arguments: dict[str, Any]) -> Any:
            return self.module.apply({"params": self.params}, **arguments)

        def tokens() -> list[np.ndarray]:
            rows, inputs = self._inputs(media)
            width = rows.width(inputs)
            assigned = rows.assign(inputs, width)
            filled = fill(rows, [(inputs, assigned)], bucket(assigned.num_rows, 4), width)
            out = np.asarray(run(filled))
            out = out.reshape(-1, out.shape[-1])
            return [out[at] for at in assigned.tokens]

        return tokens

    def _inputs(self, media: Sequence[Any]) -> tuple[TowerRows, list[Any]]:
        """The tower's rows, and the media as it reads them."""
        if self.name == "visual":
            return PatchRows(8, 2, (3, *media[0].values.shape[2:])), list(media)
        n_window = AUDIO["n_window"]
        rows = chunk_rows(n_window, AUDIO["num_mel_bins"])
        return rows, [chunks_of(mel, n_window) for mel in media]

    def peer(self, media: Sequence[Medium]) -> Callable[[], list[np.ndarray]]:
        """The same with transformers' module, whose inputs are prepared beforehand."""
        import torch

        call, counts = (
            self._peer_vision(media) if self.name == "visual" else self._peer_audio(media)
        )

        def tokens() -> list[np.ndarray]:
            with torch.no_grad():
                out = call()
            return np.split(out.numpy(), np.cumsum(counts)[:-1])

        return tokens

    def _peer_vision(self, images: Sequence[Any]) -> tuple[Callable[[], Any], list[int]]:
        """(what runs the tower, the tokens of each image)."""
        import torch

        pixels = []
        for image in images:
            divisor, mean, std = image.scale.T[:, :, None, None]
            normalised = (image.values / divisor - mean) / std
            shape = (len(normalised), 3, 2, 196)
            pixels.append(np.broadcast_to(normalised, shape).reshape(len(normalised), -1))
        every = torch.tensor(np.concatenate(pixels))
        grid = torch.tensor([image.grid for image in images])
        counts = [len(image.values) // 4 for image in images]
        return lambda: self.torch(every, grid_thw=grid).pooler_output, counts

    def _peer_audio(self, mels: Sequence[Any]) -> tuple[Callable[[], Any], list[int]]:
        """(what runs the tower, the tokens of each sound)."""
        import torch

        mel = torch.tensor(np.concatenate(mels).T.copy())
        lengths = torch.tensor([len(one) for one in mels])
        after = (lengths - 1) // 2 + 1
        counts = ((after - 2) // 2 + 1).tolist()

        def run() -> Any:
            return self.torch(mel, feature_lens=lengths, aftercnn_lens=after).last_hidden_state

        return run, counts


def table(result: dict[str, Any]) -> str:
    """What a reader looks at."""
    lines = [result["command"]]
    for name, case in result["cases"].items():
        ratio = f", {case['ratio']:.2f} × transformers'" if "ratio" in case else ""
        speed = f"{case['seconds']:.3f} s, {case['per_second']:.1f} a second"
        lines.append(f"{name:<8}{case['items']:>4} items: {speed}{ratio}")
    longer = result["long_sound_over_short_ones"]
    lines.append(f"128 s of sound over 16 × 8 s: {longer:.2f} × the time")
    lines += [f"difference: {name} {x:.1e}" for name, x in result["exactness"].items()]
    return "\n".join(lines)
