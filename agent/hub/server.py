"""uvicorn, set up for long sockets with a frame limit, and a stop that says goodbye first."""

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from agent.hub.errors import CannotStart
from agent.hub.hub import Hub
from protocol.fields import MAX_FRAME

LINGER = 5.0
"""Seconds in which the rest of an oversized frame is read and thrown away, at most."""
QUIET = 0.5
"""Seconds without a byte after which the rest has come."""
GOODBYE = 0.2


class Sockets(WebSocketsSansIOProtocol):
    """uvicorn's WebSockets, with one difference.

    After a frame over the limit uvicorn closes the TCP connection at once. What the peer has
    still in flight is then answered with a reset, which destroys the closing frame (1009) on its
    way; so the rest is read and dropped until the peer closes.
    """

    _failed_at: float | None = None

    def handle_parser_exception(self) -> None:
        if self._failed_at is None:
            self._failed_at = self.loop.time()
            sent = self.conn.close_sent
            code, reason = (sent.code, sent.reason) if sent else (1002, "")
            self.queue.put_nowait({"type": "websocket.disconnect", "code": code, "reason": reason})
            self.transport.write(b"".join(self.conn.data_to_send()))
            self.close_sent = True
            if self.read_paused:
                self.read_paused = False
                self.transport.resume_reading()
        # This is called again for all that still comes.
        if self.close_timer is not None:
            self.close_timer.cancel()
        left = self._failed_at + LINGER - self.loop.time()
        self.close_timer = self.loop.call_later(max(0.0, min(QUIET, left)), self.transport.close)

    def eof_received(self) -> None:
        if self._failed_at is not None:
            self.transport.close()


class Server(uvicorn.Server):
    """Tells when it listens, and lets the hub say goodbye before the sockets close."""

    def __init__(self, config: uvicorn.Config, hub: Hub, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._hub = hub
        self._ready = ready
        self._stopping: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            self._ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._asked_to_stop)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def _asked_to_stop(self) -> None:
        if self._stopping is None:
            self._stopping = asyncio.get_running_loop().create_task(self._stop())
        else:
            self.force_exit = True

    async def _stop(self) -> None:
        for line in list(self._hub.lines.values()):
            line.leave("the hub is shutting down")
        await asyncio.sleep(GOODBYE if self._hub.lines else 0)
        self.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket; raises CannotStart."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named: only then does asyncio send at once what it is given, and not hold the body of an
    # answer back until its head is acknowledged, which takes 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise CannotStart(
            f"cannot listen on {host} port {port}: {error.strerror}. Choose another --port."
        ) from None
    return listener


def serve(app: Any, hub: Hub, listener: socket.socket, ready: Callable[[], None]) -> Server:
    """Return a server; run it with `serve([listener])`."""
    config = uvicorn.Config(
        app,
        ws=Sockets,
        ws_max_size=MAX_FRAME,
        ws_per_message_deflate=False,
        # The session has its own heartbeat.
        ws_ping_interval=None,
        lifespan="on",
        log_config=None,
        log_level=logging.WARNING,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=3,
        timeout_keep_alive=30,
    )
    return Server(config, hub, ready)
