"""Where a server listens: the socket of --host and --port, and its URL."""

import argparse
import socket

from lco_jax.core.errors import explained


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
