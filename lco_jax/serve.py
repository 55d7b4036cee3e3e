"""Serve a model's embeddings over HTTP, in the forms that clients of OpenAI, vLLM and Cohere speak.

    python -m lco_jax.serve --model=LCO-Embedding/LCO-Embedding-Omni-3B --dtype=bfloat16
    curl localhost:8000/v1/embeddings --json '{"input": ["a text", "another"]}'

An API key is asked for if LCO_API_KEY has one. With --input and --index, the page of `lco search`
is served, too, of the same model. Needs the extra `serve`.
"""

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lco_jax.checkpoint.hf import open_checkpoint
from lco_jax.core.errors import DONE, LcoError, explained, run_main
from lco_jax.core.extras import install_line
from lco_jax.core.files import local_path
from lco_jax.core.shapes import keep_compiled
from lco_jax.data.inputs import Preparation
from lco_jax.data.media import MediaConfig
from lco_jax.data.tower_rows import Processed
from lco_jax.embedder import OmniEmbedder
from lco_jax.flags import (
    MEDIA_A_UNIT,
    add_corpus_flags,
    check_least,
    load_embedder,
    media_config,
    new_parser,
    say_prompts,
    usage_settings,
    workers,
)
from lco_jax.search import (
    Started,
    about_index,
    add_index_flags,
    check_index_flags,
    page_line,
    prepare,
    query_prompt,
)
from lco_jax.searching.listening import add_listening_flags, address_of, listening

if TYPE_CHECKING:  # these need the extra
    from starlette.applications import Starlette

    from lco_jax.serving.app import Api
    from lco_jax.serving.contents import PromptRoom
    from lco_jax.serving.engine import Engine
    from lco_jax.serving.metrics import Metrics

KEY = "LCO_API_KEY"
logger = logging.getLogger(__name__)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = new_parser("serve", __doc__)
    add_listening_flags(parser, port=8000)
    parser.add_argument(
        "--served-name",
        action="append",
        help="what clients call the model, by default as --model does; may be given several times",
    )
    parser.add_argument(
        "--warm-tokens",
        type=int,
        default=512,
        help="compile at the start what texts of up to so many tokens need (default: 512; 0: none)",
    )
    parser.add_argument(
        "--allow-private",
        action="store_true",
        help="with --allow-remote, also fetch from this machine's own networks",
    )
    page = parser.add_argument_group(
        "the page of lco search",
        "It needs --input and --index. The other flags are those of the index, go with these two "
        "alone, and change no answer of the API.",
    )
    page.add_argument("--input", type=local_path, help="a folder of media, a .jsonl or a .txt")
    page.add_argument(
        "--index",
        dest="output",  # as lco search calls it
        type=local_path,
        help="the folder of its index",
    )
    add_index_flags(page)
    _add_limits(parser)
    add_corpus_flags(parser, on_error="skip", part_size=MEDIA_A_UNIT)
    return parser


def _add_limits(parser: argparse.ArgumentParser) -> None:
    limits = parser.add_argument_group("limits")
    for flag, default, about in (
        ("--max-upload", 100_000_000, "bytes of a request"),
        ("--max-held", 500_000_000, "bytes of all requests that are under way"),
        ("--max-inputs", 2048, "inputs of a request"),
        ("--max-texts", 4096, "texts under way; then requests are refused with 429"),
        ("--max-media", 128, "the same of inputs with media"),
        ("--timeout", 120, "seconds until a request is given up"),
    ):
        limits.add_argument(flag, type=int, default=default, help=f"{about} (default: {default:,})")


def main() -> int:
    """Load the model, compile its programs, then serve until SIGTERM or Ctrl-C."""
    args = make_parser().parse_args()
    with explained(f"serve needs more packages: {install_line('serve')}", ImportError):
        from lco_jax.searching.server import LOOPBACK
        from lco_jax.serving.ending import ApiServer
    _check(args)
    media = media_config(args)
    key = os.environ.get(KEY, "")
    hosts = LOOPBACK if args.host in LOOPBACK else ("*",)
    if "*" in hosts and not key:
        logger.warning("--host=%s without %s: whoever reaches it may use it", args.host, KEY)
    with listening(args) as socket_:  # before the model is loaded
        started = _indexed(args)
        embedder = _opened(args, media) if started is None else started.embedder
        api = make_api(args, embedder, media, key)
        page = None if started is None else _page(args, started, api, media, hosts)
        address = address_of(args, socket_)
        # what the command is asked for, however much else is said
        print(f"{api.names[0]}: {address}/v1/embeddings", flush=True)
        if started is not None:
            print(page_line(started, address), flush=True)
        ApiServer(api.app(hosts, page), api).run(sockets=[socket_])
        api.engine.close()
    return DONE


def _opened(args: argparse.Namespace, media: MediaConfig) -> OmniEmbedder:
    keep_compiled()
    checkpoint = open_checkpoint(args.model)
    usage_settings(args, checkpoint)  # raises for a prompt that the model does not have
    say_prompts(args, checkpoint, queries=False)
    return load_embedder(args, checkpoint, media, None)


def _indexed(args: argparse.Namespace) -> Started | None:
    """The index of the page, brought up to date, and the model; None without a page."""
    if args.input is None:
        return None
    return prepare(args, "--index")


def _page(
    args: argparse.Namespace, started: Started, api: "Api", media: MediaConfig, hosts: Sequence[str]
) -> "Starlette":
    """The search page, whose queries go through the server's engine."""
    from lco_jax.searching.server import Server
    from lco_jax.serving.page import EngineQueries

    prompt = query_prompt(args, started.embedder)
    queries = EngineQueries(api.engine, args.timeout, prompt, started.storage.dimension)
    about = about_index(args, started)
    return Server(started.library, queries, about, args.max_upload, media).app(tuple(hosts))


def _check(args: argparse.Namespace) -> None:
    if (args.input is None) != (args.output is None):
        raise LcoError("the page needs both --input, what is searched, and --index, its index")
    if args.input is None:
        _check_no_index_flags(args)
    numbers = ("max_upload", "max_held", "max_inputs", "max_texts", "max_media", "timeout")
    check_least(args, dict.fromkeys(numbers, 1))
    check_index_flags(args)
    if args.warm_tokens < 0:
        raise LcoError(f"--warm-tokens={args.warm_tokens}: it must be at least 0")


def _check_no_index_flags(args: argparse.Namespace) -> None:
    """Raise for a flag of the index, which is not there."""
    flags = argparse.ArgumentParser()
    add_index_flags(flags)
    for name, default in vars(flags.parse_args([])).items():
        if getattr(args, name) != default:
            flag = name.replace("_", "-")
            raise LcoError(f"--{flag} is of the page's index; give --input and --index, too")


def make_api(
    args: argparse.Namespace, embedder: OmniEmbedder, media: MediaConfig, key: str = ""
) -> "Api":
    """The handlers, with a model whose programs are compiled. media: caps on what is fetched."""
    from lco_jax.serving.app import Api, Limits
    from lco_jax.serving.contents import Reader
    from lco_jax.serving.fetching import Fetcher
    from lco_jax.serving.metrics import Metrics

    preparation = embedder.preparation(args.prompt_name, args.prompt, args.max_length)
    empty = _prepared(preparation)
    metrics = Metrics()
    prompts = _prompts(args, embedder)  # before the engine starts: one may be too long
    engine = _engine(args, embedder, preparation, empty, metrics)
    fetch = Fetcher(media, args.allow_private) if args.allow_remote else None
    tokenizer = embedder.tokenizer.tokenizer
    reader = Reader(embedder.modalities, tokenizer, _room(embedder, empty), fetch, prompts)
    limits = Limits(args.max_upload, args.max_inputs, args.timeout, args.max_held)
    return Api(engine, reader, metrics, _names(args), limits, key)


def _prompts(args: argparse.Namespace, embedder: OmniEmbedder) -> "dict[str, PromptRoom]":
    """Cohere's `input_type` -> the prompt for it, of a model that has one; none with --prompt."""
    from lco_jax.serving.contents import PromptRoom

    if args.prompt is not None or args.prompt_name is not None:
        return {}
    names = {
        "search_query": embedder.query_prompt,
        "search_document": embedder.document_prompt,
    }
    prompts = {}
    for kind, name in names.items():
        if name is not None:
            preparation = embedder.preparation(name)
            room = _room(embedder, _prepared(preparation))
            prompts[kind] = PromptRoom(preparation.prompt, room)
    return prompts


def _engine(
    args: argparse.Namespace,
    embedder: OmniEmbedder,
    preparation: Preparation,
    empty: Processed,
    metrics: "Metrics",
) -> "Engine":
    """The engine, once all programs that it needs for texts are compiled. empty: an empty text."""
    from lco_jax.serving.engine import Engine
    from lco_jax.serving.shapes import PassShapes, warm_up

    longest = embedder.processor.max_tokens
    shapes = PassShapes(len(empty), longest)
    engine = Engine(
        embedder,
        preparation,
        shapes,
        metrics,
        workers=workers(args, media=len(embedder.modalities) > 1),
        batch_size=args.batch_size,
        most={"text": args.max_texts, "media": args.max_media},
    )
    warmed = min(args.warm_tokens, longest)
    compiled = warm_up(embedder, shapes, empty, warmed)
    logger.info("%d programs are ready, for texts of up to %d tokens", compiled, warmed)
    return engine


def _prepared(preparation: Preparation) -> Processed:
    """An empty text, as the model reads it."""
    [text] = preparation([({"text": ""}, "an empty text")])
    if isinstance(text, LcoError):
        raise text
    return text


def _room(embedder: OmniEmbedder, empty: Processed) -> int:
    """How many tokens a text may have. empty: an empty text with the same prompt."""
    return embedder.processor.max_tokens - len(empty)


def _names(args: argparse.Namespace) -> Sequence[str]:
    """What clients may call the model."""
    if args.served_name:
        return args.served_name
    return list(dict.fromkeys([args.model, Path(args.model).name]))


if __name__ == "__main__":
    run_main(main)
