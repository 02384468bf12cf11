"""The local API on its port, inside the agent's own event loop."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import anyio
import uvicorn
from loguru import logger
from starlette.types import ASGIApp

from agent.local import ADDRESS_FILE

__all__ = ["ADDRESS_FILE", "serve"]

MAX_CONNECTIONS = 128


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to the agent."""
        yield


async def serve(app: ASGIApp, host: str, port: int, address_file: Path | None = None) -> None:
    """Serve until cancelled. A port that cannot be had is a warning: the agent goes on without.

    ``address_file`` (AGENT_HOME/local_api) holds the URL while it is up, for the command line.
    """
    try:
        listener = await _listen(host, port)
    except OSError as error:
        logger.warning(
            "no local API: {}:{} cannot be had ({}); the command line cannot reach this agent. Set PORT",
            host,
            port,
            error.strerror or error,
        )
        return
    url = _url(listener)
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=1,
    )
    server = _Server(config)
    with listener, _announced(url, address_file):
        logger.info("local API: {}", url)
        try:
            await server.serve(sockets=[listener])
        finally:
            # Uvicorn closes nothing when its task is cancelled.
            with anyio.CancelScope(shield=True), anyio.move_on_after(2):
                if server.started:
                    await server.shutdown(sockets=[listener])


@contextlib.contextmanager
def _announced(url: str, address_file: Path | None) -> Iterator[None]:
    if address_file is None:
        yield
        return
    address_file.write_text(url + "\n", encoding="ascii")
    try:
        yield
    finally:
        address_file.unlink(missing_ok=True)


async def _listen(host: str, port: int) -> socket.socket:
    found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        # On Windows the same option would let two programs share the port.
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def _url(listener: socket.socket) -> str:
    address, port = listener.getsockname()[:2]
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)  # noqa: S104 - it is replaced
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"
