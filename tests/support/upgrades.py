"""A proxy on the way to the backend that lets everything pass but WebSockets, as some firms' proxies do."""

import asyncio
import threading
from typing import Any, Self

from tests.support.network import BLOCK, BadNetwork, _Pipe


class NoUpgrades(BadNetwork):
    """Carries requests; what it does to an upgrade is in ``manner``: pass, abort, refuse (403) or swallow."""

    manner = "pass"
    refused = 0

    async def _carry(
        self, pipe: _Pipe, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, up: bool
    ) -> None:
        if up:
            head = await reader.read(BLOCK)
            if b"upgrade: websocket" in head.lower() and self.manner != "pass":
                self.refused += 1
                if self.manner == "swallow":
                    await asyncio.Event().wait()
                if self.manner == "refuse":
                    pipe.near.write(
                        b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                    )
                    await pipe.near.drain()
                    # The answer is to be read before the connection ends.
                    await asyncio.sleep(0.2)
                pipe.abort()
                return
            writer.write(head)
        await super()._carry(pipe, reader, writer, up=up)


class ProxyThread:
    """Runs such a proxy in a thread of its own, for tests that wait on real processes."""

    def __init__(self, target: int, manner: str = "pass") -> None:
        self.net = NoUpgrades("127.0.0.1", target)
        self.net.manner = manner
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._do(self.net.__aenter__())
        return self

    def __exit__(self, *exc: object) -> None:
        self._do(self.net.__aexit__(None, None, None))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.net.port}"

    def cut(self) -> None:
        """End every connection."""
        self._loop.call_soon_threadsafe(self.net.cut)

    def _do(self, what: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(what, self._loop).result(timeout=20)
