"""The generative loss over a large vocabulary: the memory that its parts save, by XLA's count."""

import argparse
from pathlib import Path
from typing import Any


def add_parsers(kinds: Any, common: argparse.ArgumentParser) -> None:
    """`vocabulary`."""
    parser = kinds.add_parser(
        "vocabulary", parents=[common], help="the generative loss, compiled and not run"
    )
    parser.add_argument("--tokens", type=int, default=8192, help="answer tokens of a device")
    parser.add_argument("--vocabulary", type=int, default=152_064, help="Qwen2.5's")
    parser.add_argument("--dim", type=int, default=2048)
    parser.set_defaults(measure=measure, table=table)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Compile the loss with its gradients, in parts and at once."""
    import jax
    import jax.numpy as jnp

    from lco_jax.models import head

    shapes = [
        jax.ShapeDtypeStruct((1, args.tokens, args.dim), jnp.float32),
        jax.ShapeDtypeStruct((args.vocabulary, args.dim), jnp.float32),
        jax.ShapeDtypeStruct((1, args.tokens), jnp.int32),
    ]
    result: dict[str, Any] = {
        "tokens": args.tokens,
        "vocabulary": args.vocabulary,
        "dim": args.dim,
        "gb": {},
    }
    in_parts = head.LOGITS
    for tuned, over in (("head frozen", 0), ("head tuned", (0, 1))):
        for name, logits in (("in parts", in_parts), ("at once", args.tokens * args.vocabulary)):
            head.LOGITS = logits
            # a new function each time: jit must not take a program from its cache
            gradient = jax.value_and_grad(lambda *x: head.token_losses(*x).sum(), over)
            memory = jax.jit(gradient).lower(*shapes).compile().memory_analysis()
            result["gb"][f"{tuned}, {name}"] = memory.temp_size_in_bytes / 1e9
    head.LOGITS = in_parts
    return result


def table(result: dict[str, Any]) -> str:
    """What a reader looks at."""
    head = (
        f"{result['tokens']:,} tokens, vocabulary {result['vocabulary']:,}, D {result['dim']}, "
        "float32, with gradient"
    )
    lines = [f"{name:24}{gb:8.2f} GB of temporaries" for name, gb in result["gb"].items()]
    return "\n".join([result["command"], head, *lines])
