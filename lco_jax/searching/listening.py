"""Where a server listens: --host and --port, their socket, and its URL."""

import argparse
import socket

from lco_jax.core.errors import explained


def add_listening_flags(parser: argparse.ArgumentParser, port: int) -> None:
    """--host and --port. port: the default."""
    parser.add_argument(
        "--port", type=int, default=port, help=f"0: any that is free (default: {port})"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="the address to listen on (default: 127.0.0.1)"
    )


def listening(args: argparse.Namespace) -> socket.socket:
    """The socket of --host and --port."""
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    cannot = f"--host={args.host} --port={args.port} cannot be listened on"
    with explained(cannot, OSError, OverflowError):
        return socket.create_server((args.host, args.port), family=family)


def address_of(args: argparse.Namespace, listens: socket.socket) -> str:
    """The URL of a server that listens on --host."""
    host = f"[{args.host}]" if ":" in args.host else args.host
    return f"http://{host}:{listens.getsockname()[1]}"
