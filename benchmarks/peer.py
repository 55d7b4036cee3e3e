"""The peer: the published recipe in PyTorch (transformers and peft), as it is released.

Left padding per side and micro-batch, hidden states of all layers, vocabulary logits of every
token, LoRA on every linear layer of the decoder, the state of the last position, one-way InfoNCE
over positives and hard negatives, AdamW, gradient checkpointing. Negatives come from the complete
batch, as the recipe gathers them over its GPUs.
"""

import contextlib
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from benchmarks.data import read_triplets
from benchmarks.duel import peak_memory, serve

TEMPERATURE, RANK, ALPHA = 0.03, 64, 128
LINEARS = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def import_torchvision() -> None:
    """Import torchvision, or stubs of its operators where its CUDA build meets a CPU build of
    torch."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        import_torchvision.operators = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):  # nothing here calls them
            schema = f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            import_torchvision.operators.define(schema)


def embed(model: torch.nn.Module, sequences: list[list[int]]) -> torch.Tensor:
    """The last position after the final norm, [n, D] float32, unit length; left padding."""
    width = max(map(len, sequences))
    pads = [width - len(ids) for ids in sequences]
    ids = torch.tensor(
        [[0] * pad + ids for pad, ids in zip(pads, sequences, strict=True)], device=DEVICE
    )
    mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads], device=DEVICE)
    out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
    return functional.normalize(out.hidden_states[-1][:, -1].float(), dim=-1)


class Recipe:
    """The model and how it is called."""

    def __init__(self, spec: dict[str, Any]):
        import_torchvision()
        from peft import LoraConfig, PeftModel, get_peft_model
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

        self.spec, self.triplets = spec, read_triplets(Path(spec["data"]))
        self.half = spec["dtype"] == "bfloat16"
        dtype = torch.bfloat16 if self.half else torch.float32
        if spec["checkpoint"]:
            model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
                spec["checkpoint"], dtype=dtype, attn_implementation="sdpa"
            )
        else:
            from benchmarks.presets import PRESETS

            config = Qwen2_5_VLConfig.from_dict(PRESETS[spec["preset"]].config)
            config._attn_implementation = "sdpa"
            with torch.device(DEVICE):
                model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype)
        model.to(DEVICE).requires_grad_(False)
        model.config.use_cache = model.config.text_config.use_cache = False
        if self.half:
            # peft prepares a model in few bits like this: norms, embedding and head stay in float32
            for name, parameter in model.named_parameters():
                if any(part in name for part in ("norm", "embed_tokens", "lm_head")):
                    parameter.data = parameter.data.float()
        training = spec["kind"] == "train"
        if training:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        if spec["adapter"]:
            model = PeftModel.from_pretrained(model, spec["adapter"], is_trainable=True)
        else:
            settings = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEARS, bias="none")
            model = get_peft_model(model, settings)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = spec["dropout"]
        self.model = model.train(training)
        self.trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.done = 0

    def embed(self, sequences: list[list[int]]) -> torch.Tensor:
        """As the function, in the recipe's precision."""
        with torch.autocast(DEVICE, torch.bfloat16) if self.half else contextlib.nullcontext():
            return embed(self.model, sequences)

    def finish(self) -> dict[str, Any]:
        """Memory and versions."""
        return {**peak_memory(), "threads": torch.get_num_threads(), "torch": torch.__version__}


class Training(Recipe):
    """A step a round."""

    def __init__(self, spec: dict[str, Any]):
        super().__init__(spec)
        self.optimizer = torch.optim.AdamW(self.trainable, lr=4e-4, weight_decay=0.0)

    def batch(self) -> list[list[list[int]]]:
        """The next triplets."""
        size = self.spec["batch"]
        return [self.triplets[(self.done * size + i) % len(self.triplets)] for i in range(size)]

    def gradient(self) -> tuple[float, list[torch.Tensor]]:
        """Loss and embeddings of the next batch, with gradients in place."""
        batch, micro = self.batch(), self.spec["micro"]
        size = len(batch)
        parts = [
            [self.embed([triplet[side] for triplet in batch[i : i + micro]]) for side in range(3)]
            for i in range(0, size, micro)
        ]
        anchors, positives, negatives = (torch.cat(side) for side in zip(*parts, strict=True))
        logits = anchors @ torch.cat([positives, negatives]).T / TEMPERATURE
        loss = functional.cross_entropy(logits, torch.arange(size, device=DEVICE))
        loss.backward()
        return loss.item(), [anchors, positives, negatives]

    def round(self) -> dict[str, Any]:
        """Forward, backward, update."""
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        loss, _ = self.gradient()
        torch.nn.utils.clip_grad_norm_(self.trainable, 1.0)
        self.optimizer.step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        tokens = sum(len(ids) for triplet in self.batch() for ids in triplet)
        self.done += 1
        return {"seconds": seconds, "loss": loss, "tokens": tokens}

    def check(self, path: str) -> None:
        """Embeddings and adapter gradients of the first batch."""
        loss, sides = self.gradient()
        named = {}
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                layer, kind, module, factor = name.split("layers.")[1].split(".")[:4]
                named[f"{layer}.{kind}.{module}.{factor[-1]}"] = (
                    parameter.grad.float().cpu().numpy()
                )
        embeddings = torch.stack(sides, dim=1).detach().cpu().numpy()
        np.savez(path, loss=loss, embeddings=embeddings, **named)


class Encoding(Recipe):
    """All texts per round, in batches of eight and in order, as the released examples do."""

    def __init__(self, spec: dict[str, Any]):
        super().__init__(spec)
        self.texts = [ids for triplet in self.triplets for ids in triplet][: spec["batch"]]

    @torch.no_grad()
    def all(self) -> torch.Tensor:
        """Every text's vector."""
        size = self.spec["encode_batch"]
        parts = [self.texts[i : i + size] for i in range(0, len(self.texts), size)]
        return torch.cat([self.embed(part).cpu() for part in parts])

    def round(self) -> dict[str, Any]:
        """Forward passes, vectors on the host."""
        start = time.perf_counter()
        self.all().to(torch.float16)
        return {"seconds": time.perf_counter() - start, "tokens": sum(map(len, self.texts))}

    def check(self, path: str) -> None:
        """The embeddings."""
        np.savez(path, embeddings=self.all().numpy())


if __name__ == "__main__":
    serve({"train": Training, "encode": Encoding}, sys.argv[1])
