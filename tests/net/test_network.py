"""The bad network that other tests stand on."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import anyio
import anyio.streams.buffered
import pytest

from tests.support.network import BadNetwork

pytestmark = pytest.mark.anyio
DEADLINE = 20.0


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@asynccontextmanager
async def echo() -> AsyncIterator[int]:
    """Serve what comes back to whoever sends it."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while block := await reader.read(1000):
                writer.write(block)
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


async def test_it_carries_stalls_heals_and_cuts() -> None:
    async with echo() as port, BadNetwork("127.0.0.1", port) as net:
        stream = await anyio.connect_tcp("127.0.0.1", net.port)
        async with stream:
            with anyio.fail_after(DEADLINE):
                await stream.send(b"hello")
                assert await stream.receive() == b"hello"
            net.stall()
            await stream.send(b"lost for now")
            with pytest.raises(TimeoutError), anyio.fail_after(0.2):
                await stream.receive()
            net.heal()
            with anyio.fail_after(DEADLINE):
                assert await stream.receive() == b"lost for now"
            net.corrupt(1)
            await stream.send(b"abc")
            with anyio.fail_after(DEADLINE):
                assert await stream.receive() == b"a\x22c"
            net.cut()
            with anyio.fail_after(DEADLINE), pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
                await stream.receive()
        await net.refuse()
        with pytest.raises(OSError):
            await anyio.connect_tcp("127.0.0.1", net.port)
        await net.accept()
        async with await anyio.connect_tcp("127.0.0.1", net.port) as again:
            await again.send(b"x")
            assert await again.receive() == b"x"
            net.half_open()
            await again.send(b"to nobody")
            with pytest.raises(TimeoutError), anyio.fail_after(0.2):
                await again.receive()
        assert net.connections == 2


async def test_as_a_program_it_obeys_its_input() -> None:
    async with echo() as port:
        command = [sys.executable, "-m", "tests.support.network", "0", f"127.0.0.1:{port}"]
        async with await anyio.open_process(command, stderr=subprocess.DEVNULL) as process:
            assert process.stdout is not None
            assert process.stdin is not None
            lines = anyio.streams.buffered.BufferedByteReceiveStream(process.stdout)

            async def read() -> str:
                with anyio.fail_after(DEADLINE):
                    return (await lines.receive_until(b"\n", 100)).decode()

            listening = int(await read())
            async with await anyio.connect_tcp("127.0.0.1", listening) as stream:
                await stream.send(b"x")
                assert await stream.receive() == b"x"
                await process.stdin.send(b"throttle 1000000\ncut\n")
                assert [await read(), await read()] == ["done", "done"]
                with (
                    anyio.fail_after(DEADLINE),
                    pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)),
                ):
                    await stream.receive()
            await process.stdin.send(b"refuse\n")
            assert await read() == "done"
            with pytest.raises(OSError):
                await anyio.connect_tcp("127.0.0.1", listening)
            await process.stdin.aclose()
            with anyio.fail_after(DEADLINE):
                assert await process.wait() == 0
