"""The command `lco`: every program of the package under one name.

lco train --config=base
lco embed --model=… --input=… --output=…
lco completion bash > FILE     what a shell needs to complete programs, flags and paths

`python -m lco_jax.train` is the same as `lco train`. It is also `python -m lco_jax train`.
"""

import difflib
import sys
from importlib import import_module

from lco_jax import __version__
from lco_jax.core.errors import DONE, LcoError, run_main

VERBS = {
    "train": "contrastive training of a multimodal LLM, on text or on any modality",
    "pretrain": "generative training, which comes before it",
    "assemble": "a multimodal LLM of parts: a language model, a Whisper, a vision tower",
    "convert": "training runs and adapters to merged models; average several",
    "embed": "a file or folder of inputs to vectors",
    "mine": "training records to the same with hard negatives",
    "evaluate": "benchmarks of mteb, or your own files",
    "search": "a page for searching a folder in a browser",
    "serve": "a server of embeddings, for clients of OpenAI, vLLM and Cohere",
    "generate": "answers of a model, scored",
    "analyze": "how a model's layers see several modalities",
    "plan": "memory and time of a configuration on a machine that you do not have",
}


def main() -> None:
    """Run the program that the command line names."""
    run_main(run)


def run() -> int | None:
    """Print the programs or the version, or hand the other arguments to a program."""
    verb, *rest = sys.argv[1:] or ["--help"]
    if verb in ("--help", "-h", "help"):
        print(usage())
        return DONE
    if verb in ("--version", "version"):
        print(f"lco-jax {__version__}")
        return DONE
    if verb == "completion":
        from lco_jax.completion import script

        print(script(VERBS, *rest))
        return DONE
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, 1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise LcoError(f"lco has no program {verb!r}{meant} (lco --help lists them)")
    sys.argv = [f"lco {verb}", *rest]
    return import_module(f"lco_jax.{verb}").main()


def usage() -> str:
    """What `lco --help` prints."""
    width = max(map(len, VERBS)) + 2
    programs = [f"  lco {verb:{width}}{what}" for verb, what in VERBS.items()]
    return "\n".join(
        [
            f"lco-jax {__version__}: language-centric omnimodal embeddings in JAX",
            "",
            *programs,
            "",
            "lco PROGRAM --help lists the flags of a program.",
            "lco completion bash (zsh, tcsh, fish) prints what completes them in a shell.",
        ]
    )


if __name__ == "__main__":
    main()
