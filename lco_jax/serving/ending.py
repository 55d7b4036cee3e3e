"""uvicorn's server, which ends in order: what was accepted is answered first."""

import asyncio
import logging
import signal
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from lco_jax.searching.connections import Connection
from lco_jax.searching.server import http_config
from lco_jax.serving.app import Api

CONNECTIONS = 1024  # that are open at a time
IDLE_SECONDS = 75  # after which a connection without requests is closed
logger = logging.getLogger(__name__)


class _Connection(Connection):
    most = CONNECTIONS


class ApiServer(uvicorn.Server):
    """Answers on sockets until SIGTERM or Ctrl-C. Its method `run` does.

    Then new requests are refused, those that are under way are answered, and it ends, after
    the seconds of the API's limits at the latest. A second signal ends it at once.
    """

    def __init__(self, app: Starlette, api: Api):
        more = {"timeout_keep_alive": IDLE_SECONDS}
        more["timeout_graceful_shutdown"] = 10  # for who still reads an answer
        super().__init__(http_config(app, _Connection, **more))
        self.api = api
        self._ending: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end. It is not kept for uvicorn, which would let it kill the process."""
        if self.api.is_ending:
            self.force_exit = self.should_exit = True
            return
        self.api.is_ending = True
        logger.info("%s: %d requests are under way", signal.Signals(sig).name, self.api.under_way)

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second: whether it is time to end."""
        if self.api.is_ending and self._ending is None:
            self._ending = asyncio.ensure_future(self._end())
        return await super().on_tick(counter)

    async def _end(self) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + self.api.limits.seconds
        while self.api.under_way and loop.time() < end:
            await asyncio.sleep(0.05)
        self.should_exit = True
