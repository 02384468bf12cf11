"""Refusals, faults that a redial cures, and bad networks, against a real WebSocket server on loopback."""

import http
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import msgspec
import pytest
from websockets.asyncio.server import ServerConnection
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

import agent.net.websocket
import protocol.session_agent
from agent.errors import AgentError, IdentityTaken, KeyRefused, NotOurBackend, Refused, VersionRefused
from agent.net.retry import backoff
from agent.net.websocket import Link
from protocol.messages import (
    Close,
    Desired,
    Goaway,
    StreamAck,
    Welcome,
)
from protocol.records import Notice
from tests.net.backend import (
    CONTROL,
    DEADLINE,
    LOGS,
    METRICS,
    Backend,
    Records,
    connected,
    is_connected,
    link_to,
    running,
    serving,
)
from tests.support.network import BadNetwork

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dial again soon: what the waits are is tested where they are made."""
    monkeypatch.setattr(agent.net.websocket, "backoff", lambda: backoff(0.05, 0.2))


# Refusals


def answering(status: int, **headers: str) -> Callable[[ServerConnection, Request], Response]:
    def answer(_: ServerConnection, __: Request) -> Response:
        return Response(status, http.HTTPStatus(status).phrase, Headers(**headers), b"<html>a page</html>")

    return answer


@pytest.mark.parametrize(
    ("status", "headers", "error", "sentence"),
    [
        (401, {}, KeyRefused, "refused the API key (HTTP 401). Make a key with the scope `training`"),
        (403, {}, KeyRefused, "refused the API key (HTTP 403)"),
        (404, {}, NotOurBackend, "has no socket for training agents (HTTP 404). Check BACKEND_URL"),
        (426, {}, NotOurBackend, "has no socket for training agents (HTTP 426)"),
        (200, {}, NotOurBackend, "has no socket for training agents (HTTP 200)"),
        (302, {"Location": "https://login.example/"}, NotOurBackend, "answers with a redirect (HTTP 302) to https://login.example/"),
        (307, {"Location": "/elsewhere"}, NotOurBackend, "a key is not sent there. Set BACKEND_URL to the final address."),
    ],
)  # fmt: skip
async def test_an_answer_that_no_dial_cures_ends_the_dialling(
    status: int, headers: dict[str, str], error: type[AgentError], sentence: str
) -> None:
    backend, records = Backend(), Records()
    async with serving(backend, answer=answering(status, **headers)):
        link = link_to(backend, records)
        with anyio.fail_after(DEADLINE), pytest.raises(error) as refused:
            await link.run()
    assert sentence in str(refused.value)
    assert type(refused.value) is error
    assert len(backend.requests) == 1, "it does not hammer"
    assert link.states[-1] == ("refused", str(refused.value))  # type: ignore[attr-defined]
    assert "wak_" not in str(refused.value)


async def test_a_server_that_speaks_another_subprotocol_is_not_ours() -> None:
    backend = Backend()
    # It must choose one of those offered, or none.
    async with serving(backend, handler=lambda socket: socket.wait_closed(), subprotocols=None):
        with (
            anyio.fail_after(DEADLINE),
            pytest.raises(NotOurBackend, match=r"speaks none of finetunelab\.agent\.v1"),
        ):
            await link_to(backend, Records()).run()


@pytest.mark.parametrize(
    ("code", "error", "sentence"),
    [
        (Close.AUTH, KeyRefused, "refused this agent: said so. Check API_KEY and AGENT_ID"),
        (Close.DISABLED, KeyRefused, "refused this agent"),
        (Close.UNKNOWN_AGENT, KeyRefused, "refused this agent"),
        (Close.OTHER_INSTALL, IdentityTaken, "another install uses this agent's id (said so). Give this machine an AGENT_ID"),
        (Close.VERSION, VersionRefused, "does not speak this agent's protocol (said so). Update the agent."),
        (4599, Refused, "ended the connection for good (code 4599): said so."),
    ],
)  # fmt: skip
async def test_a_close_code_that_forbids_another_dial(
    code: int, error: type[AgentError], sentence: str
) -> None:
    backend = Backend()

    async def close(socket: ServerConnection) -> None:
        await socket.recv()
        await socket.close(code, "said so")

    async with serving(backend, handler=close):
        with anyio.fail_after(DEADLINE), pytest.raises(Refused) as refused:
            await link_to(backend, Records()).run()
    assert type(refused.value) is error
    assert sentence in str(refused.value)
    assert len(backend.requests) == 1


# Faults that a redial cures


@asynccontextmanager
async def odd_once(odd: Callable[[ServerConnection], Any]) -> AsyncIterator[tuple[Backend, Records, Link]]:
    """A backend whose first connection is handled by ``odd``, and which is good after that."""
    backend, records = Backend(), Records()
    records.say(CONTROL, "x")

    async def handle(socket: ServerConnection) -> None:
        if len(backend.requests) == 1:
            try:
                await odd(socket)
            except ConnectionClosed:
                pass
            finally:
                backend.closes.append((socket.close_code, socket.close_reason))
        else:
            await backend.converse(socket)

    async with serving(backend, handler=handle):
        link = link_to(backend, records)
        async with running(link):
            await backend.until(lambda: records.at == {CONTROL: 1})
            yield backend, records, link


def why(link: Link) -> str:
    """Return what was said when the first connection ended."""
    return next(detail for state, detail in link.states if "dialling again" in detail)  # type: ignore[attr-defined]


@pytest.mark.parametrize("code", [1000, 1001, 1011, 1012, 1013, 4000, 4008, 4010, 4029])
async def test_other_close_codes_are_dialled_again(code: int) -> None:
    async def close(socket: ServerConnection) -> None:
        await socket.recv()
        await socket.close(code, "busy")

    async with odd_once(close) as (backend, records, link):
        assert len(backend.requests) == 2
        assert records.dials == 2
        assert backend.hellos[0].attempt == 2
        assert why(link).startswith("busy")


async def test_garbage_is_answered_with_its_code_and_dialled_again() -> None:
    async def garbage(socket: ServerConnection) -> None:
        await socket.recv()
        await socket.send(b"\xc1\xc1")
        await socket.recv()

    async with odd_once(garbage) as (backend, _, _):
        code, reason = backend.closes[0]
        assert code == Close.MALFORMED
        assert reason is not None
        assert reason.startswith("message: ")


async def test_a_frame_of_two_mebibytes_is_refused_and_the_agent_lives_on() -> None:
    async def flood(socket: ServerConnection) -> None:
        await socket.recv()
        await socket.send(b"\x00" * (2 << 20))
        await socket.recv()

    async with odd_once(flood) as (backend, _, link):
        assert backend.closes[0][0] == 1009
        assert "this end hung up" in why(link)


async def test_an_ack_of_what_was_never_sent_is_told_to_the_backend() -> None:
    async def lie(socket: ServerConnection) -> None:
        await socket.recv()
        await socket.send(msgspec.msgpack.encode(Welcome("s", [StreamAck(1, 9)])))
        await socket.recv()

    async with odd_once(lie) as (backend, _, _):
        assert backend.closes[0] == (Close.GAP, "the backend acknowledges 9 of a stream that ends at 1")


async def test_a_message_of_the_future_is_passed_over() -> None:
    async with connected() as (backend, records, _):
        assert backend.socket is not None
        await backend.socket.send(msgspec.msgpack.encode([99, {"new": ["thing"]}]))
        records.say(CONTROL, "x")
        await backend.until(lambda: records.at == {CONTROL: 1})
        assert len(backend.hellos) == 1


async def test_a_silent_server_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    async def silent(socket: ServerConnection) -> None:
        await socket.recv()
        await socket.send(msgspec.msgpack.encode(Welcome("s", [], 0.2)))
        while True:
            await socket.recv()

    async with odd_once(silent) as (_, _, link):
        assert why(link).startswith("nothing was heard for 0.5 s")


async def test_a_server_that_takes_the_upgrade_and_says_nothing_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(protocol.session_agent, "WELCOME_WITHIN", 0.3)

    async def mute(socket: ServerConnection) -> None:
        while True:
            await socket.recv()

    async with odd_once(mute) as (_, _, link):
        assert why(link).startswith("no WELCOME within 0.3 s")


async def test_heartbeats_keep_a_quiet_link() -> None:
    backend, records = Backend(), Records()
    backend.terms = {"heartbeat_s": 0.1}
    async with serving(backend), running(link_to(backend, records)):
        await backend.until(lambda: bool(backend.hellos))
        await anyio.sleep(0.6)
        records.say(CONTROL, "x")
        await backend.until(lambda: records.at == {CONTROL: 1})
    assert len(backend.hellos) == 1


async def test_a_busy_server_is_asked_again_when_it_says() -> None:
    backend, records = Backend(), Records()

    def busy(_: ServerConnection, request: Request) -> Response | None:
        return answering(503, **{"Retry-After": "1"})(_, request) if len(backend.requests) == 1 else None

    async with serving(backend, answer=busy):
        began = time.monotonic()
        async with running(link_to(backend, records)):
            await backend.until(lambda: bool(backend.hellos))
    assert time.monotonic() - began >= 1


async def test_a_backend_that_goes_away_says_when_to_come_back() -> None:
    async def drain(socket: ServerConnection) -> None:
        await socket.recv()
        await socket.send(msgspec.msgpack.encode(Welcome("s", [])))
        await socket.send(msgspec.msgpack.encode(Goaway("restart", 0.5)))
        await socket.close(Close.DRAIN)

    began = time.monotonic()
    async with odd_once(drain):
        assert time.monotonic() - began >= 0.5


async def test_nobody_there_is_dialled_again() -> None:
    backend, records = Backend(), Records()
    async with serving(backend):
        pass
    link = link_to(backend, records)
    async with running(link):
        await backend.until(lambda: link.dials >= 2)
        async with serving(backend):
            await backend.until(lambda: bool(backend.hellos))
    assert "connecting" in {state for state, _ in link.states}  # type: ignore[attr-defined]


async def test_a_defect_of_ours_does_not_cut_the_agent_off() -> None:
    backend, records = Backend(), Records()

    async def broken(message: Desired) -> None:
        raise RuntimeError("a defect")

    records.desired = broken  # type: ignore[method-assign]
    async with serving(backend), running(link_to(backend, records)):
        await backend.until(lambda: bool(backend.hellos))
        await backend.push(Desired("job", 1, "run"))
        await backend.until(lambda: len(backend.hellos) == 2)


# A bad network


async def test_cuts_lose_nothing_and_repeat_nothing() -> None:
    backend, records = Backend(), Records()
    async with serving(backend), BadNetwork("127.0.0.1", backend.port) as net:
        link = link_to(backend, records, port=net.port)
        async with running(link):
            for round_ in range(4):
                for number in range(100):
                    records.say([CONTROL, METRICS, LOGS][number % 3], f"{round_}.{number}")
                    if number == 50:
                        net.cut()
                    await anyio.sleep(0.001)
                await backend.until(
                    lambda: all(records.at[key] == len(rows) for key, rows in records.rows.items())
                )
    sent = [f"{round_}.{number}" for round_ in range(4) for number in range(100)]
    for lane, key in enumerate((CONTROL, METRICS, LOGS)):
        assert backend.texts(key) == [text for text in sent if int(text.split(".")[1]) % 3 == lane]
    assert len(backend.hellos) == 5


async def test_a_dead_link_with_full_buffers_is_left() -> None:
    backend, records = Backend(), Records()
    backend.terms = {"heartbeat_s": 0.3, "window_bytes": 64 << 20, "window_records": 1 << 20}
    async with serving(backend), BadNetwork("127.0.0.1", backend.port) as net:
        link = link_to(backend, records, port=net.port)
        async with running(link):
            await backend.until(lambda: is_connected(link))
            net.stall()
            records.add(LOGS, *(Notice(1.0, "info", "x" * 60_000) for _ in range(300)))
            await backend.until(lambda: link.dials == 2)
            net.heal()
            await backend.until(lambda: records.at == {LOGS: 300})


async def test_half_open_is_noticed() -> None:
    backend, records = Backend(), Records()
    backend.terms = {"heartbeat_s": 0.2}
    async with serving(backend), BadNetwork("127.0.0.1", backend.port) as net:
        link = link_to(backend, records, port=net.port)
        async with running(link):
            await backend.until(lambda: is_connected(link))
            net.half_open()
            records.say(CONTROL, "x")
            await backend.until(lambda: records.at == {CONTROL: 1})
    assert len(backend.hellos) == 2


async def test_damage_on_the_way_is_survived() -> None:
    backend, records = Backend(), Records()
    async with serving(backend), BadNetwork("127.0.0.1", backend.port) as net:
        link = link_to(backend, records, port=net.port)
        async with running(link):
            await backend.until(lambda: is_connected(link))
            net.corrupt(1)
            await backend.push(Desired("job", 1, "pause", reason="r" * 200))
            records.say(CONTROL, "x")
            await backend.until(lambda: records.at == {CONTROL: 1})


async def test_a_slow_line_carries_everything() -> None:
    backend, records = Backend(), Records()
    backend.terms = {"heartbeat_s": 0.5}
    async with serving(backend), BadNetwork("127.0.0.1", backend.port) as net:
        link = link_to(backend, records, port=net.port)
        async with running(link):
            await backend.until(lambda: is_connected(link))
            net.throttle(200_000)
            records.say(LOGS, *("x" * 1000 for _ in range(200)))
            await backend.until(lambda: records.at == {LOGS: 200})
    assert len(backend.hellos) == 1


@pytest.mark.parametrize("status", [http.HTTPStatus.NOT_FOUND, http.HTTPStatus.FORBIDDEN])
def test_a_backend_that_was_ours_before_is_dialled_again_when_something_else_answers(
    monkeypatch: pytest.MonkeyPatch, status: http.HTTPStatus
) -> None:
    monkeypatch.setattr(agent.net.websocket, "TLS_RETRY", 0.05)
    monkeypatch.setattr(agent.net.websocket, "backoff", lambda: backoff(first=0.01, cap=0.02))

    def redeployed(socket: ServerConnection, request: Request) -> Response | None:
        return socket.respond(status, "a proxy's page") if gone else None

    gone: list[bool] = []

    async def test() -> None:
        backend, records = Backend(), Records()
        async with serving(backend, answer=redeployed):
            link = link_to(backend, records)
            async with running(link):
                await backend.until(lambda: backend.session is not None and backend.session.welcomed)
                gone.append(True)
                assert backend.socket is not None
                await backend.socket.close(1001)
                await backend.until(lambda: len(backend.requests) >= 4)
                gone.clear()
                await backend.until(lambda: len(backend.hellos) == 2)

    anyio.run(test)
