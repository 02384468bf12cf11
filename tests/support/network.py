"""A bad network: a TCP proxy that can cut, stall, go half open, throttle, corrupt, and let no socket through.

In a test: ``async with BadNetwork("127.0.0.1", port) as net``, dial ``net.port``, and call
``net.cut()`` and the like. As a program, ``python -m tests.support.network PORT HOST:PORT`` takes
the same words on its standard input, one a line.
"""

import asyncio
import sys
from contextlib import suppress
from typing import Self

BLOCK = 16 * 1024


class _Pipe:
    """One connection: a task for each direction."""

    def __init__(self, near: asyncio.StreamWriter, far: asyncio.StreamWriter) -> None:
        self.near = near
        self.far = far
        self.deaf = False
        """Half open: what comes is swallowed, and the end is not told that nobody listens."""

    def abort(self) -> None:
        self.near.transport.abort()
        self.far.transport.abort()


class BadNetwork:
    """Carries connections from ``port`` to ``host:target``, as well as it is told to."""

    def __init__(self, host: str, target: int, port: int = 0) -> None:
        self.port = port
        self.target = (host, target)
        self.connections = 0
        """How many were made so far."""
        self.bytes_up = 0
        self._pipes: set[_Pipe] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._rate: float | None = None
        self._damage = 0
        self._heads = False
        self._sockets = True
        self._closed = False

    async def __aenter__(self) -> Self:
        await self.accept()
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._closed = True
        await self.refuse()
        self.cut()
        self.heal()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def accept(self) -> None:
        """Take connections, again on the same port."""
        if self._server is None:
            self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port)
            self.port = self._server.sockets[0].getsockname()[1]

    async def refuse(self) -> None:
        """Take no more connections; those that are there live on."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def cut(self) -> None:
        """End every connection at both ends, with what is on the way."""
        for pipe in list(self._pipes):
            pipe.abort()

    def stall(self) -> None:
        """Carry nothing more, either way, and tell nobody: buffers fill, new connections are taken and hang."""
        self._flowing.clear()

    def half_open(self) -> None:
        """End every connection at the far end only; the near end goes on writing to nobody."""
        for pipe in self._pipes:
            pipe.deaf = True
            pipe.far.transport.abort()

    def throttle(self, bytes_per_second: float) -> None:
        """Carry no more than this, in each direction of each connection."""
        self._rate = bytes_per_second

    def corrupt(self, blocks: int = 1, *, heads: bool = False) -> None:
        """Turn over a bit in each of the next ``blocks`` blocks that go towards the near end.

        It is in the middle of the block; with ``heads`` in its first byte, where no frame or answer can hide it.
        (What lies inside a frame is for TLS to guard: a plain socket has no checksum that sees it.)
        """
        self._damage += blocks
        self._heads = heads

    def no_sockets(self) -> None:
        """End every connection that is to become a WebSocket, as some proxies do; those that are open live on."""
        self._sockets = False

    def heal(self) -> None:
        """Carry everything as fast as it comes."""
        self._sockets = True
        self._rate = None
        self._damage = 0
        self._flowing.set()

    async def _connected(self, reader: asyncio.StreamReader, near: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._flowing.wait()
            try:
                far_reader, far = await asyncio.open_connection(*self.target)
            except OSError:
                near.transport.abort()
                return
            pipe = _Pipe(near, far)
            self._pipes.add(pipe)
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._carry(pipe, reader, far, up=True))
                    group.create_task(self._carry(pipe, far_reader, near, up=False))
            finally:
                self._pipes.discard(pipe)
                pipe.abort()
        except asyncio.CancelledError:
            # At the end of the test; a server's own task that ends cancelled is reported as a defect.
            near.transport.abort()
        finally:
            self._tasks.discard(task)

    async def _carry(
        self, pipe: _Pipe, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, up: bool
    ) -> None:
        with suppress(ConnectionError):
            while block := await reader.read(BLOCK):
                await self._flowing.wait()
                if pipe.deaf:
                    continue
                if up and not self._sockets and b"upgrade: websocket" in block.lower():
                    pipe.abort()
                    return
                if up:
                    self.bytes_up += len(block)
                elif self._damage:
                    self._damage -= 1
                    at = 0 if self._heads else len(block) // 2
                    block = block[:at] + bytes([block[at] ^ 0x40]) + block[at + 1 :]
                writer.write(block)
                await writer.drain()
                if self._rate is not None:
                    await asyncio.sleep(len(block) / self._rate)
        if pipe.deaf:
            # The near end is kept in the belief that somebody is there.
            await asyncio.Event().wait()
        with suppress(OSError, RuntimeError):
            writer.write_eof()


async def main(arguments: list[str]) -> None:
    """Obey the words on standard input until it ends."""
    host, _, target = arguments[1].rpartition(":")
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    async with BadNetwork(host, int(target), int(arguments[0])) as net:
        print(net.port, flush=True)
        while line := (await lines.readline()).decode().split():
            match line:
                case ["accept"]:
                    await net.accept()
                case ["refuse"]:
                    await net.refuse()
                case ["throttle", rate]:
                    net.throttle(float(rate))
                case ["corrupt", blocks]:
                    net.corrupt(int(blocks))
                case ["corrupt", blocks, "heads"]:
                    net.corrupt(int(blocks), heads=True)
                case ["cut" | "stall" | "half_open" | "no_sockets" | "heal" as word]:
                    getattr(net, word)()
                case _:
                    print(
                        "accept refuse cut stall half_open no_sockets heal throttle N corrupt N [heads]",
                        file=sys.stderr,
                    )
            print("done", flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
