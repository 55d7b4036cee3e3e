"""Compare an assembled model with its parts, in torch: python -m laboratory.compare.

    python -m laboratory.compare --model=runs/parts --language=SmolLM2.gguf --sound=1.wav

It prints three things, and ends with status 1 where one of them does not hold:
- greedy answers: of the language model, of the assembled one in transformers, and of ours;
- the largest difference of logits between the language model and the assembled one, relative to
  the largest logit;
- the largest difference of hidden states between transformers and ours, of every layer, for text
  and for sound, relative to the largest state of the layer.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.peer import import_torchvision

import_torchvision()  # before transformers looks for it

from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer  # noqa: E402
from transformers import Qwen2_5OmniThinkerForConditionalGeneration as Thinker  # noqa: E402

from lco_jax.core.errors import run_main  # noqa: E402
from lco_jax.data.audio import load_audio  # noqa: E402
from lco_jax.data.media import MediaConfig  # noqa: E402
from lco_jax.generator import OmniGenerator  # noqa: E402

QUESTIONS = (
    "What is the capital of France?",
    "Name three colours of the rainbow.",
    "What is gravity? Answer in one sentence.",
)
ANSWER_TOKENS = 24
BOUND = 1e-5


def main() -> int:
    """Compare; 1 if something differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="the assembled folder")
    parser.add_argument("--language", type=Path, required=True, help="what it was made of")
    parser.add_argument("--sound", type=Path, help="a file of sound, for the audio tower")
    args = parser.parse_args()
    ours = OmniGenerator.from_pretrained(args.model)
    assembled = Thinker.from_pretrained(args.model, dtype=torch.float32).eval()
    problems = [
        *compare_answers(args.language, args.model, assembled, ours),
        *compare_states(args.model, assembled, ours, args.sound),
    ]
    print("\n".join(problems) or "all equal")
    return 1 if problems else 0


def load_language(path: Path) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder or a .gguf, as transformers reads it."""
    where: dict[str, Any] = {"pretrained_model_name_or_path": path}
    if path.suffix == ".gguf":
        where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(**where)


@torch.no_grad()
def compare_answers(path: Path, folder: Path, assembled: Any, ours: OmniGenerator) -> list[str]:
    """What differs in answers, token ids and logits."""
    language, tokenizer = load_language(path)
    theirs = AutoTokenizer.from_pretrained(folder)
    problems = []
    said_by_us = ours.generate(list(QUESTIONS), ANSWER_TOKENS, prompt="")
    for question, mine in zip(QUESTIONS, said_by_us, strict=True):
        chat = [{"role": "user", "content": question}]
        said = []
        texts = []
        for model, reader in ((language, tokenizer), (assembled, theirs)):
            text = reader.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            ids = reader(text, return_tensors="pt").input_ids
            answer = model.generate(ids, max_new_tokens=ANSWER_TOKENS, do_sample=False)
            said.append(reader.decode(answer[0, ids.shape[1] :], skip_special_tokens=True))
            texts.append(ids)
        print(f"{question}\n  {said[0]!r}")
        if len({*said, mine}) > 1:
            problems.append(f"{question}: {said[0]!r}, {said[1]!r}, ours {mine!r}")
        if not torch.equal(*texts):
            problems.append(f"{question}: the token ids differ")
            continue
        first = language(texts[0]).logits
        second = assembled(texts[0]).logits[..., : first.shape[-1]]
        difference = float((first - second).abs().max() / first.abs().max())
        print(f"  logits differ by {difference:.1e} at most")
        if difference > BOUND:
            problems.append(f"{question}: logits differ by {difference:.1e}")
    return problems


@torch.no_grad()
def compare_states(
    folder: Path, assembled: Any, ours: OmniGenerator, sound: Path | None
) -> list[str]:
    """Which hidden states differ by more than `BOUND`."""
    processor = AutoProcessor.from_pretrained(folder)
    problems = []
    inputs: dict[str, Any] = {"text": "A man is playing a guitar on a stage."}
    if sound is not None:
        inputs["sound"] = {"audio": str(sound)}
    for name, one in inputs.items():
        states = ours.encode_layers([one], prompt="")[:, 0]  # [L + 1, D]
        content: Any = one
        media = {}
        if name == "sound":
            content = [{"type": "audio", "audio": str(sound)}]
            media = {"audio": [load_audio(str(sound), str(sound), MediaConfig())]}
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        batch = processor(text=text, return_tensors="pt", **media)
        found = assembled(**batch, output_hidden_states=True).hidden_states
        wanted = np.stack([layer[0, -1].numpy() for layer in found])
        differences = np.abs(states - wanted).max(axis=1) / np.abs(wanted).max(axis=1)
        tokens = batch["input_ids"].shape[1]
        print(f"{name}: {tokens} tokens, states of {len(states)} layers: {differences.max():.1e}")
        for layer in np.flatnonzero(differences > BOUND):
            problems.append(f"{name}, layer {layer}: differs by {differences[layer]:.1e}")
    return problems


if __name__ == "__main__":
    run_main(main)
