"""SmolLM2 on SNLI's triplets, by us and by the published recipe in torch: STS-B before and after.

Each adapter is trained by `lco_jax.train` or by `laboratory.recipe`, and all are measured by the
same programs. What is there is not made again.
"""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from tqdm import tqdm

from laboratory.shared import claim, finished, once
from lco_jax.checkpoint.hf import open_checkpoint
from lco_jax.checkpoint.peft import read_adapter
from lco_jax.configs import smollm2
from lco_jax.core import lora
from lco_jax.core.errors import LcoError
from lco_jax.core.files import write_json
from lco_jax.embedder import OmniEmbedder
from lco_jax.evaluation.sts import agreement, open_pairs
from lco_jax.job import say
from lco_jax.train import train

WAYS = ("ours", "recipe")


def experiment(config: ConfigDict, workdir: Path, command: str) -> dict[str, Any]:
    """Run or go on; writes results.json into `workdir` and returns its content."""
    claim(workdir, config)
    embedder = OmniEmbedder.from_pretrained("builtin:smollm2", modalities=["text"])
    score = partial(_score, config, embedder, embedder.params)
    results: dict[str, Any] = {"command": command, "before": once(workdir / "before.json", score)}
    results["runs"] = []
    with tqdm(total=len(WAYS) * len(config.seeds), desc="sentences", unit="run") as bar:
        for seed in config.seeds:
            for way in WAYS:
                folder = workdir / f"seed-{seed}" / way
                bar.set_postfix_str(f"seed {seed}: {way}")
                if not (folder / "adapter" / "adapter_config.json").exists():
                    _train(way, seed, folder)
                found = once(folder / "scores.json", partial(score, folder / "adapter"))
                results["runs"].append({"seed": seed, "way": way, "scores": found})
                bar.update()
    write_json(workdir / "results.json", results)
    for run in results["runs"]:
        say(f"seed {run['seed']}, {run['way']}: {run['scores']}")
    return results


def _train(way: str, seed: int, folder: Path) -> None:
    """Train one adapter."""
    if way == "ours":
        settings = smollm2.get_config()
        settings.seed, settings.eval.sts = seed, ""
        finished(train(settings, folder))
        return
    command = [sys.executable, "-m", "laboratory.recipe", "--config=smollm2"]
    command += [f"--config.seed={seed}", f"--output={folder}"]
    environment = {**os.environ}
    environment.pop("OMP_NUM_THREADS", None)  # the laboratory's own: torch takes every core
    if subprocess.run(command, env=environment).returncode:
        raise LcoError(f"{' '.join(command)} failed; what it printed says why")


def _score(
    config: ConfigDict, embedder: OmniEmbedder, base: dict[str, Any], adapter: Path | None = None
) -> dict[str, float]:
    """{file: Spearman's correlation}, of the base or with an adapter."""
    embedder.params = base
    if adapter is not None:
        tuned, settings = read_adapter(adapter, open_checkpoint("builtin:smollm2"))
        decoder = lora.merge(base["decoder"], tuned["decoder"], settings)
        embedder.params = {**base, "decoder": decoder}
    pairs = dict(map(open_pairs, config.sts))
    return {
        name: agreement(partial(embedder.encode, max_length=64), some).spearman
        for name, some in pairs.items()
    }
