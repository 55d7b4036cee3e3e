"""The towers beside transformers' own, on the same pixels and mels; and what a long sound costs against short ones."""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lco_jax.core.packing import bucket
from lco_jax.data.tower_rows import ChunkRows, Mel, Patches, PatchRows, TowerRows
from lco_jax.models.registry import BACKBONES

OMNI = BACKBONES["qwen2_5_omni_thinker"]
VISION = {
    "depth": 8, "hidden_size": 320, "intermediate_size": 856, "num_heads": 4, "patch_size": 14,
    "temporal_patch_size": 2, "spatial_merge_size": 2, "window_size": 112, "fullatt_block_indexes": [3, 7],
    "out_hidden_size": 512, "hidden_act": "silu", "in_channels": 3,
}  # fmt: skip
AUDIO = {
    "encoder_layers": 6, "d_model": 384, "encoder_attention_heads": 6, "encoder_ffn_dim": 1536, "n_window": 100,
    "output_dim": 512, "num_mel_bins": 128, "max_source_positions": 1500,
}  # fmt: skip
HZ = 100  # mel frames a second
SCALE = np.array(
    [[255, 0.48, 0.27], [255, 0.46, 0.26], [255, 0.41, 0.28]], np.float32
)  # as of `pixels.read_scale`


def add_parsers(kinds: Any, common: argparse.ArgumentParser) -> None:
    """`media`."""
    parser = kinds.add_parser("media", parents=[common], help="vision and audio towers")
    parser.add_argument("--no-peer", action="store_true")
    parser.set_defaults(measure=measure, table=table)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Images, a video, sounds; then one long sound and as much in short ones, in turns."""
    rng = np.random.default_rng(0)
    picture = lambda size: _patches(rng, (1, size // 14, size // 14))
    sound = lambda seconds: Mel(rng.standard_normal((int(seconds * HZ), 128)).astype(np.float32))
    cases = {
        "images": ("visual", [picture(448) for _ in range(6)] + [picture(252) for _ in range(6)]),
        "video": ("visual", [_patches(rng, (16, 16, 16))]),
        "sounds": ("audio_tower", [sound(seconds) for seconds in (8.0,) * 12 + (3.1, 20.0)]),
    }
    sides = {name: Tower(name) for name in ("visual", "audio_tower")}
    result: dict[str, Any] = {"cases": {}, "exactness": {}}
    for name, (tower, items) in tqdm(cases.items(), desc="media"):
        ours, peer = sides[tower].ours(items), None if args.no_peer else sides[tower].peer(items)
        seconds = _in_turns([ours, *([peer] if peer else [])], args.rounds)
        result["cases"][name] = {
            "items": len(items),
            "seconds": seconds[0],
            "per_second": len(items) / seconds[0],
        }
        if peer:
            result["cases"][name] |= {"peer_seconds": seconds[1], "ratio": seconds[1] / seconds[0]}
            want = np.concatenate(peer())
            result["exactness"][name] = float(
                np.abs(np.concatenate(ours()) - want).max() / np.abs(want).max()
            )
    long, short = [sound(128.0)], [sound(8.0) for _ in range(16)]
    seconds = _in_turns([sides["audio_tower"].ours(x) for x in (long, short)], args.rounds)
    result["long_sound_over_short_ones"] = seconds[0] / seconds[1]
    if not args.no_peer:
        ratios = [case["ratio"] for case in result["cases"].values()]
        result["ratio"] = float(np.exp(np.mean(np.log(ratios))))
    return result


def _in_turns(sides: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """Median seconds of each, taken in turns; the first round is not counted."""
    seconds: list[list[float]] = [[] for _ in sides]
    for i in range(rounds + 1):
        for side, times in zip(sides, seconds, strict=True):
            start = time.perf_counter()
            side()
            times.append(time.perf_counter() - start) if i else None
    return [float(np.median(times)) for times in seconds]


def _patches(rng: np.random.Generator, grid: tuple[int, int, int]) -> Patches:
    pictures = 1 if grid[0] == 1 else 2
    return Patches(
        rng.integers(0, 256, (int(np.prod(grid)), 3, pictures, 196), np.uint8), grid, SCALE
    )


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
            self.rows: TowerRows | None = None  # another for clips than for stills
        else:
            config = configs.Qwen2_5OmniAudioEncoderConfig(**AUDIO)
            config._attn_implementation = "sdpa"
            self.torch = models.Qwen2_5OmniAudioEncoder(config)
            self.rows = ChunkRows(AUDIO["n_window"], AUDIO["num_mel_bins"])
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

    def ours(self, items: Sequence[Any]) -> Callable[[], list[np.ndarray]]:
        """From pixels or mels on the host to each item's tokens on the host."""
        import jax

        run = jax.jit(lambda arguments: self.module.apply({"params": self.params}, **arguments))

        rows = self.rows or PatchRows(8, 2, (3, *items[0].values.shape[2:]))

        def tokens() -> list[np.ndarray]:
            width = rows.width(items)
            packed = rows.assign(items, width)
            filled = rows.fill([(items, packed)], bucket(packed.rows, 4), width)
            out = np.asarray(run(filled))
            return [out.reshape(-1, out.shape[-1])[at] for at in packed.tokens]

        return tokens

    def peer(self, items: Sequence[Any]) -> Callable[[], list[np.ndarray]]:
        """The same with transformers' module; what it reads is laid out beforehand."""
        import torch

        if self.name == "visual":
            pixels = []
            for item in items:
                divisor, mean, std = item.scale.T[:, :, None, None]
                read = (item.values / divisor - mean) / std
                pixels.append(np.broadcast_to(read, (len(read), 3, 2, 196)).reshape(len(read), -1))
            arguments = (
                torch.tensor(np.concatenate(pixels)),
                torch.tensor([item.grid for item in items]),
            )
            counts = [len(item.values) // 4 for item in items]
            call = lambda: self.torch(arguments[0], grid_thw=arguments[1])
        else:
            mel = torch.tensor(np.concatenate([item.values for item in items]).T.copy())
            lengths = torch.tensor([len(item.values) for item in items])
            after = (lengths - 1) // 2 + 1
            counts = ((after - 2) // 2 + 1).tolist()
            call = lambda: self.torch(mel, feature_lens=lengths, aftercnn_lens=after)

        def tokens() -> list[np.ndarray]:
            with torch.no_grad():
                out = call()
            out = (
                getattr(out, "pooler_output", None)
                if self.name == "visual"
                else out.last_hidden_state
            )
            return np.split(out.numpy(), np.cumsum(counts)[:-1])

        return tokens


def table(result: dict[str, Any]) -> str:
    """What a reader looks at."""
    lines = [result["command"]]
    for name, case in result["cases"].items():
        ratio = f", {case['ratio']:.2f} × transformers'" if "ratio" in case else ""
        lines.append(
            f"{name:<8}{case['items']:>4} items: {case['seconds']:.3f} s, {case['per_second']:.1f} a second{ratio}"
        )
    lines.append(
        f"128 s of sound over 16 × 8 s: {result['long_sound_over_short_ones']:.2f} × the time"
    )
    return "\n".join(
        [*lines, *(f"difference: {k} {v:.1e}" for k, v in result["exactness"].items())]
    )
