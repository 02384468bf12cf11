"""The server inside the agent's loop: its port, its address file, its end."""

import contextlib
import signal
import socket
from pathlib import Path

import anyio
import httpx
from loguru import logger

from agent.local import ADDRESS_FILE
from agent.local.server import serve
from tests.local.desk import served


async def answer(scope, receive, send):  # type: ignore[no-untyped-def]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"here"})


def test_it_serves_until_cancelled_and_leaves_no_address(tmp_path: Path) -> None:
    async def main() -> str:
        async with served(answer, tmp_path) as url:
            async with httpx.AsyncClient(trust_env=False) as client:
                assert (await client.get(url)).text == "here"
            return url

    url = anyio.run(main)
    assert not (tmp_path / ADDRESS_FILE).exists()
    port = int(url.rsplit(":", 1)[1])
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_its_end_closes_connections_that_are_kept(tmp_path: Path) -> None:
    async def main() -> bytes:
        async with served(answer, tmp_path) as url:
            port = int(url.rsplit(":", 1)[1])
            stream = await anyio.connect_tcp("127.0.0.1", port)
            await stream.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            got = await stream.receive()
            # Half of a request, which no time-out for idle connections ends.
            await stream.send(b"GET / HT")
            await anyio.sleep(0.1)
        async with stream:
            with anyio.fail_after(20), contextlib.suppress(anyio.EndOfStream, anyio.BrokenResourceError):
                while True:
                    got += await stream.receive()
        return got

    assert b"here" in anyio.run(main)


def test_a_port_in_use_is_a_warning_and_no_end(tmp_path: Path) -> None:
    said: list[str] = []
    sink = logger.add(lambda message: said.append(message.record["message"]), level="WARNING")
    try:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            anyio.run(serve, answer, "127.0.0.1", port, tmp_path / ADDRESS_FILE)
        anyio.run(serve, answer, "no.such.host.invalid", 0, None)
    finally:
        logger.remove(sink)
    assert said[0].startswith(f"no local API: 127.0.0.1:{port} cannot be had (Address already in use)")
    assert len(said) == 2 and "no.such.host.invalid" in said[1]
    assert not (tmp_path / ADDRESS_FILE).exists()


def test_it_leaves_the_signals_alone(tmp_path: Path) -> None:
    async def main() -> None:
        before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        async with served(answer, tmp_path):
            assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before

    anyio.run(main)
