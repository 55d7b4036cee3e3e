"""`lco serve` under the load of many clients, beside the same without batches, and beside
sentence-transformers in the plainest FastAPI application.

The servers take turns, so that other load on the machine slows all alike. Clients are of this
process; each sends a short text, waits for its vector, and sends the next. How long texts take
beside a client that sends videos is measured of `builtin:lab`.
"""

import argparse
import asyncio
import base64
import io
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
from tqdm import tqdm

from benchmarks.presets import ON_DEVICE, PRESETS, write_checkpoint
from lco_jax.checkpoint.sentence_transformers import write_modules
from lco_jax.core.errors import LcoError

TEXT_CLIENTS = 4  # beside one that sends videos
START_SECONDS = 1200.0  # to load a model and compile its programs
Body = Callable[[int], dict[str, Any]]


def add_parsers(kinds: Any, common: argparse.ArgumentParser) -> None:
    """`serving`."""
    parser = kinds.add_parser("serving", parents=[common], help="requests a second of lco serve")
    presets = [preset for preset in PRESETS if preset not in ON_DEVICE]
    parser.add_argument("--preset", choices=presets, default="small")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--seconds", type=float, default=10.0, help="of a turn")
    parser.set_defaults(measure=measure, table=table)


class Server:
    """A running server."""

    def __init__(self, name: str, command: list[str], port: int, log: Any):
        self.name, self.port = name, port
        self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def wait(self) -> None:
        """Until it answers."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise LcoError(f"the server {self.name} ended; its last words stand above")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.5)
        raise LcoError(f"the server {self.name} did not start in {START_SECONDS:g} s")

    def end(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait(30)

    def vector(self, text: str) -> np.ndarray:
        """The vector of a text."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/embeddings",
            json.dumps({"input": text}).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=600) as response:
            return np.array(json.load(response)["data"][0]["embedding"])


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Start the servers, compare their vectors, let them take turns."""
    model = folder / "model"
    preset = PRESETS[args.preset]
    write_checkpoint(preset, model)
    template = (model / "chat_template.json").read_text(encoding="utf-8")
    takes = ("text", "image", "video")
    write_modules(model, json.loads(template)["chat_template"], preset.hidden, takes)
    with _running(_commands(model)) as servers:
        result = _compared(args, servers)
    # the preset's tokenizer has no tokens for media
    with _running([("ours", [*_ours("builtin:lab"), "--port"])]) as [server]:
        return {**result, "beside_videos": _beside_videos(args, server)}


@contextmanager
def _running(commands: list[tuple[str, list[str]]]) -> Iterator[list[Server]]:
    """Servers, one for each command, which gets a port as its last argument."""
    servers = []
    with tempfile.TemporaryFile() as log:
        try:
            for name, command in commands:
                port = _free_port()
                servers.append(Server(name, [*command, str(port)], port, log))
                servers[-1].wait()
            yield servers
        except LcoError:
            log.seek(0)
            sys.stderr.write(log.read().decode(errors="replace")[-4000:])
            raise
        finally:
            for server in servers:
                server.end()


def _ours(model: str) -> list[str]:
    return [sys.executable, "-m", "lco_jax.serve", f"--model={model}", "--warm-tokens=64"]


def _commands(model: Path) -> list[tuple[str, list[str]]]:
    ours = _ours(str(model))
    return [
        ("ours", [*ours, "--port"]),
        ("without batches", [*ours, "--batch-size=1", "--port"]),
        ("peer", [sys.executable, "-m", "benchmarks.serving_peer", str(model)]),
    ]


def _compared(args: argparse.Namespace, servers: list[Server]) -> dict[str, Any]:
    vectors = [server.vector("a text that all servers get") for server in servers]
    apart = max(float(np.abs(one - vectors[0]).max()) for one in vectors)
    if apart > 1e-4:
        raise LcoError(f"the servers' vectors differ by {apart:.1e}")
    sides = _in_turns(args, servers)
    compared_at = "16" if 16 in args.clients else str(args.clients[-1])
    rates = {name: side[compared_at]["requests_a_second"] for name, side in sides.items()}
    return {
        **sides,
        "apart": apart,
        "ratio_clients": int(compared_at),
        "ratio": rates["ours"] / rates["peer"],
        "ratio_batches": rates["ours"] / rates["without batches"],
    }


def _in_turns(
    args: argparse.Namespace, servers: list[Server]
) -> dict[str, dict[str, dict[str, float]]]:
    """Server -> number of clients -> what they measured."""
    turns = {server.name: {clients: Turn() for clients in args.clients} for server in servers}
    for i in tqdm(range(args.rounds), desc="serving", unit="round", file=sys.stderr):
        for server in servers if i % 2 == 0 else servers[::-1]:
            for clients in args.clients:
                bodies = [_texts(client) for client in range(clients)]
                turn = asyncio.run(_load(server.port, bodies, args.seconds))
                turns[server.name][clients].add(turn)
    return {
        name: {str(clients): turn.summary() for clients, turn in by_clients.items()}
        for name, by_clients in turns.items()
    }


def _beside_videos(args: argparse.Namespace, server: Server) -> dict[str, Any]:
    """The times of texts alone, and beside a client that sends videos."""
    texts = [_texts(client) for client in range(TEXT_CLIENTS)]
    clip = _clip()

    def video(number: int) -> dict[str, Any]:
        part = {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{clip}"}}
        return {"input": [{"content": [part]}]}

    asyncio.run(_load(server.port, [video], 1.0))  # compiles what videos need
    alone, beside, videos = Turn(), Turn(), 0
    for _ in range(args.rounds):
        alone.add(asyncio.run(_load(server.port, texts, args.seconds)))
        turn, count = asyncio.run(_load_beside(server.port, texts, video, args.seconds))
        beside.add(turn)
        videos += count
    summaries = {"alone": alone.summary(), "beside": beside.summary()}
    ratio = summaries["beside"]["p95_ms"] / summaries["alone"]["p95_ms"]
    return {**summaries, "videos": videos, "p95_ratio": ratio}


def table(result: dict[str, Any]) -> str:
    """Requests a second, and how long they took."""
    lines = ["server           clients  requests/s   p50 ms   p95 ms   p99 ms"]
    for name in ("ours", "without batches", "peer"):
        lines += [_line(name, clients, one) for clients, one in result[name].items()]
    videos = result["beside_videos"]
    lines += [_line("lab, texts", TEXT_CLIENTS, videos["alone"])]
    lines += [_line("  beside videos", TEXT_CLIENTS, videos["beside"])]
    lines.append(
        f"at {result['ratio_clients']} clients: {result['ratio']:.2f} x the peer, "
        f"{result['ratio_batches']:.2f} x without batches; p95 beside {videos['videos']} videos: "
        f"{videos['p95_ratio']:.2f} x; vectors at most {result['apart']:.1e} apart"
    )
    return "\n".join(lines)


def _line(name: str, clients: Any, one: dict[str, float]) -> str:
    times = "".join(f"{one[f'p{part}_ms']:9.1f}" for part in (50, 95, 99))
    return f"{name:<16} {clients:>7} {one['requests_a_second']:>11.1f}{times}"


def _texts(client: int) -> Body:
    return lambda number: {"input": f"client {client} asks for its short text number {number}"}


@dataclass
class Turn:
    """The seconds of each request, and of all together, until the last answer."""

    took: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, other: "Turn") -> None:
        """Another turn."""
        self.took += other.took
        self.seconds += other.seconds

    def summary(self) -> dict[str, float]:
        """Requests a second, and how long they took."""
        parts = {f"p{n}_ms": 1e3 * float(np.percentile(self.took, n)) for n in (50, 95, 99)}
        return {"requests_a_second": len(self.took) / self.seconds, **parts}


async def _load(port: int, bodies: list[Body], seconds: float) -> Turn:
    """Clients that send for so long."""
    began = time.monotonic()
    took = await asyncio.gather(*(_client(port, body, began + seconds) for body in bodies))
    return Turn([one for times in took for one in times], time.monotonic() - began)


async def _load_beside(
    port: int, bodies: list[Body], video: Body, seconds: float
) -> tuple[Turn, int]:
    """The same beside a client that sends videos; also how many it got answers for."""
    end = time.monotonic() + seconds
    others = asyncio.ensure_future(_client(port, video, end))
    turn = await _load(port, bodies, seconds)
    return turn, len(await others)


async def _client(port: int, body: Body, end: float) -> list[float]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    took = []
    while time.monotonic() < end:
        content = json.dumps(body(len(took))).encode()
        began = time.monotonic()
        writer.write(
            b"POST /v1/embeddings HTTP/1.1\r\nhost: localhost\r\n"
            b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(content) + content
        )
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = head.partition(b"content-length:")[2].partition(b"\r\n")[0]
        answer = await reader.readexactly(int(length))
        if not head.startswith(b"http/1.1 200"):
            raise LcoError(f"a server answers {head[:40]!r}: {answer[:200]!r}")
        took.append(time.monotonic() - began)
    writer.close()
    return took


def _clip() -> str:
    """Four seconds of moving noise, as base64."""
    file = io.BytesIO()
    with av.open(file, "w", "mp4") as out:
        stream = out.add_stream("mpeg4", rate=24, width=320, height=240, pix_fmt="yuv420p")
        first = np.random.default_rng(0).integers(0, 256, (240, 320, 3), np.uint8)
        for i in range(96):
            frame = av.VideoFrame.from_ndarray(np.roll(first, 4 * i, axis=1))
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return base64.b64encode(file.getvalue()).decode()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]
