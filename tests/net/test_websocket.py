"""The link against a real WebSocket server on loopback, good, bad and odd."""

import time
from typing import Any

import anyio
import pytest

import agent.net.websocket
from agent.net.retry import backoff
from agent.net.websocket import socket_url
from protocol.codec import encode_record
from protocol.failures import Evidence, FailureReason, failure
from protocol.fields import MAX_FRAME
from protocol.messages import (
    SUBPROTOCOL_JSON,
    SUBPROTOCOL_MSGPACK,
    Command,
    Desired,
    Heartbeat,
    Hello,
)
from protocol.records import CommandDone, JobStatus, LogChunk, Notice, Point
from protocol.session import FRAME_TARGET, Key
from tests.net.backend import (
    CONTROL,
    DEADLINE,
    EPOCH,
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


def sentences(count: int) -> list[str]:
    return [f"sentence {number}" for number in range(count)]


@pytest.mark.parametrize(
    ("backend", "socket"),
    [
        ("https://app.finetunelab.ai", "wss://app.finetunelab.ai/api/training/agent/connect"),
        ("http://127.0.0.1:8000/", "ws://127.0.0.1:8000/api/training/agent/connect"),
        ("https://x.org/base/", "wss://x.org/base/api/training/agent/connect"),
    ],
)
async def test_https_becomes_wss(backend: str, socket: str) -> None:
    assert socket_url(backend) == socket


# Carrying


@pytest.mark.parametrize("subprotocol", [SUBPROTOCOL_MSGPACK, SUBPROTOCOL_JSON])
async def test_what_is_appended_arrives_and_is_let_go_once_acknowledged(subprotocol: str) -> None:
    backend, records = Backend(), Records()
    records.say(CONTROL, "before the dial")
    async with serving(backend, subprotocols=(subprotocol,)):
        link = link_to(backend, records)
        async with running(link):
            await backend.until(lambda: backend.texts(CONTROL) == ["before the dial"])
            records.say(METRICS, *sentences(3))
            records.say(CONTROL, "later")
            await backend.until(lambda: records.at == {CONTROL: 2, METRICS: 3})
            assert backend.texts(METRICS) == sentences(3)
            assert backend.texts(CONTROL) == ["before the dial", "later"]
            assert link.states[-1] == ("connected", link.url)  # type: ignore[attr-defined]
    request = backend.requests[0]
    assert request.headers["X-Agent-ID"] == "agent_0123456789abcdef"
    assert request.headers["User-Agent"] == "test/1"
    assert "Sec-WebSocket-Extensions" not in request.headers
    assert backend.hellos[0].attempt == 1


async def test_wishes_and_commands_are_handed_on() -> None:
    async with connected() as (backend, records, _):
        wish, command = Desired("job", 1, "pause"), Command("c", "save_now", "job")
        await backend.push(wish)
        await backend.push(command)
        await backend.push(Heartbeat(5))
        records.say(CONTROL, "x")
        await backend.until(lambda: bool(backend.texts(CONTROL)))
        assert (records.wishes, records.commands) == ([wish], [command])


async def test_no_wish_waits_for_the_journal_to_delete() -> None:
    async with connected() as (backend, records, _):
        records.gate = anyio.Event()
        for number in range(20):
            records.say(METRICS, str(number))
            await backend.until(lambda: len(backend.texts(METRICS)) == number + 1)  # noqa: B023  it is awaited here
        wish = Desired("job", 1, "pause")
        await backend.push(wish)
        await backend.until(lambda: records.wishes == [wish])
        assert records.at[METRICS] == 0
        records.gate.set()
        await backend.until(lambda: records.at[METRICS] == 20)
        # Twenty acknowledgements, of which the newest counted.
        assert records.acks <= 3


async def test_no_append_is_slept_through() -> None:
    """Each is appended as soon as the one before it has arrived, at every place in the writer's round."""
    async with connected() as (backend, records, _):
        for number in range(300):
            records.say(CONTROL, str(number))
            with anyio.fail_after(DEADLINE):
                await backend.until(lambda done=number + 1: len(backend.texts(CONTROL)) == done)  # type: ignore[misc]
        assert backend.texts(CONTROL) == [str(number) for number in range(300)]


async def test_an_append_while_a_frame_is_being_sent_is_not_slept_through() -> None:
    async with connected() as (backend, records, link):
        flush, calls = link._flush, 0

        async def flush_and_append(*arguments: Any) -> None:
            nonlocal calls
            await flush(*arguments)
            calls += CONTROL in records.heads()
            if calls == 2:
                # The first call sent the record; this is the last thing before the writer sleeps.
                records.say(CONTROL, "second")
                link.bye("sleep")

        link._flush = flush_and_append  # type: ignore[method-assign]
        records.say(CONTROL, "first")
        await backend.until(lambda: backend.texts(CONTROL) == ["first", "second"])
        await backend.until(lambda: backend.byes == ["sleep"])


async def test_a_goodbye_is_said_at_once() -> None:
    async with connected() as (backend, _, link):
        link.bye("The agent is being stopped.")
        await backend.until(lambda: backend.byes == ["The agent is being stopped."])


async def test_urgent_records_overtake_a_backlog() -> None:
    backend, records = Backend(), Records()
    backend.terms = {"window_bytes": 1 << 30}
    records.say(LOGS, *("x" * 60_000 for _ in range(300)))
    async with serving(backend), running(link_to(backend, records)):
        await backend.until(lambda: bool(backend.texts(LOGS)))
        records.say(CONTROL, "urgent")
        await backend.until(lambda: backend.texts(CONTROL) == ["urgent"])
        assert len(backend.texts(LOGS)) < 300


@pytest.mark.parametrize("subprotocol", [SUBPROTOCOL_MSGPACK, SUBPROTOCOL_JSON])
async def test_no_frame_of_a_backlog_is_too_large(subprotocol: str) -> None:
    """In JSON a point takes more than twice the bytes that the journal counts."""
    backend, records = Backend(), Records()
    values = [0.1234567890123456 + number for number in range(20)]
    points = [encode_record(Point(1700000000.123, 1, step, 0.123, 7, [*values])) for step in range(3000)]
    records.add(METRICS, *points)
    # And a log of control characters takes six times as many.
    records.add(LOGS, *(LogChunk(1.0, 1, 0, ["\x1b" * size]) for size in [30_000, *[3000] * 40]))
    async with serving(backend, subprotocols=(subprotocol,)), running(link_to(backend, records)):
        await backend.until(lambda: records.at == {METRICS: 3000, LOGS: 41})
    assert FRAME_TARGET - 1000 < backend.largest <= MAX_FRAME
    assert backend.texts(METRICS) == ["Point"] * 3000
    assert len(backend.hellos) == 1


async def test_a_backend_may_set_a_smaller_frame() -> None:
    backend, records = Backend(), Records()
    backend.terms = {"max_frame": 4096}
    records.add(CONTROL, *(Notice(1.0, "info", "x" * size) for size in (3000, 9000, 3000, 10, 10)))
    async with serving(backend), running(link_to(backend, records)):
        await backend.until(lambda: records.at == {CONTROL: 5})
    assert [text if text is None or text[0] == "<" else len(text) for text in backend.texts(CONTROL)] == [
        3000,
        "<oversize>",
        3000,
        10,
        10,
    ]


def failed(weight: int) -> JobStatus:
    """Return the end of a job with evidence that weighs so many bytes."""
    evidence = Evidence(traceback="t" * weight)
    return JobStatus(1.0, 1, "failed", failure=failure(FailureReason.DATA, "Row 57 is broken.", evidence))


@pytest.mark.parametrize("subprotocol", [SUBPROTOCOL_MSGPACK, SUBPROTOCOL_JSON])
async def test_a_state_arrives_without_its_evidence_where_frames_are_small(subprotocol: str) -> None:
    backend, records = Backend(), Records()
    backend.terms = {"max_frame": 4096}
    answer = CommandDone(1.0, "c", "refused", "\x1b" * 5000)
    records.add(CONTROL, Notice(1.0, "info", "before"), failed(9000), answer, Notice(1.0, "info", "behind"))
    async with serving(backend, subprotocols=(subprotocol,)), running(link_to(backend, records)):
        await backend.until(lambda: records.at == {CONTROL: 4})
    assert backend.texts(CONTROL) == ["before", "JobStatus", "CommandDone", "behind"]
    assert len(backend.hellos) == 1


async def test_what_is_hung_up_at_again_and_again_is_not_sent_for_ever() -> None:
    """A gateway on the way takes less than WELCOME says."""
    backend, records = Backend(), Records()
    records.add(CONTROL, failed(50_000), Notice(1.0, "info", "x" * 60_000), Notice(1.0, "info", "behind"))
    records.say(LOGS, *("x" * 3000 for _ in range(40)))
    async with serving(backend, largest=20_000), running(link_to(backend, records)):
        await backend.until(lambda: records.at == {CONTROL: 3, LOGS: 40})
    assert backend.texts(CONTROL) == ["JobStatus", "<oversize>", "behind"]
    assert backend.texts(LOGS) == ["x" * 3000] * 40
    assert len(backend.hellos) < 10


async def test_a_hello_that_is_too_large_names_fewer_streams() -> None:
    backend, records = Backend(), Records()
    for number in range(100):
        records.say(Key(EPOCH, f"job-{number:04}{'x' * 110}", 0), "x")
    async with serving(backend, largest=6_000), running(link_to(backend, records)):
        await backend.until(lambda: all(at == 1 for at in records.at.values()))
    assert len(backend.hellos[0].streams) < 40


async def test_what_the_journal_lost_is_buried_and_the_rest_arrives() -> None:
    backend, records = Backend(), Records()
    records.say(CONTROL, "a")
    records.add(CONTROL, None, None)
    records.say(CONTROL, "b")
    records.add(CONTROL, None)
    async with serving(backend), running(link_to(backend, records)):
        await backend.until(lambda: records.at == {CONTROL: 5})
    assert backend.texts(CONTROL) == ["a", "<corrupt>", "<corrupt>", "b", "<corrupt>"]
    assert records.lost == [(CONTROL, "corrupt")] * 3


async def test_records_that_are_announced_and_not_there_do_not_spin_the_writer() -> None:
    backend, records = Backend(), Records()
    records.say(CONTROL, "a", "b", "c")
    reads = 0

    async def holes(key: Key, after: int, max_bytes: int) -> list[tuple[int, bytes | None]]:
        nonlocal reads
        reads += 1
        await anyio.lowlevel.checkpoint()
        # The second is missing in the middle, and the third at the end.
        return (
            [(1, records.rows[key][0])]
            if after == 0
            else [(4, records.rows[key][3])]
            if len(records.rows[key]) > 3
            else []
        )

    records.read = holes  # type: ignore[method-assign]
    async with serving(backend), running(link_to(backend, records)):
        await backend.until(lambda: records.at == {CONTROL: 3})
        records.say(CONTROL, "d")
        await backend.until(lambda: records.at == {CONTROL: 4})
        assert reads < 10
    assert backend.texts(CONTROL) == ["a", "<trimmed>", "<trimmed>", "d"]


async def test_streams_that_hello_did_not_name_are_opened_where_they_stand() -> None:
    backend, records = Backend(), Records()
    records.say(CONTROL, "a", "b", "c")
    records.at[CONTROL], records.named = 2, False
    backend.stored[CONTROL] = ["a", "b"]
    async with serving(backend), running(link_to(backend, records)):
        await backend.until(lambda: records.at == {CONTROL: 3})
    assert backend.texts(CONTROL) == ["a", "b", "c"]


async def test_more_streams_than_a_hello_holds() -> None:
    backend, records = Backend(), Records()
    keys = [Key(EPOCH, f"job-{number:04}{'x' * 110}", 0) for number in range(1010)]
    for key in keys:
        records.say(key, "x")
    async with serving(backend), running(link_to(backend, records)):
        await backend.until(lambda: all(at == 1 for at in records.at.values()))
    assert len(backend.hellos) == 1
    assert len(backend.hellos[0].streams) == 1000
    assert all(backend.texts(key) == ["x"] for key in keys)


async def test_a_refused_stream_is_dropped_and_the_others_go_on() -> None:
    backend, records = Backend(), Records()
    backend.refuse = "gone"
    gone = Key(EPOCH, "gone", 0)
    records.say(gone, "a")
    async with serving(backend), running(link_to(backend, records)):
        await backend.until(lambda: bool(records.refused))
        assert records.refused == [(gone, "the job was deleted")]
        records.say(gone, "b")
        records.say(CONTROL, "c")
        await backend.until(lambda: records.at[CONTROL] == 1)
    assert backend.texts(gone) == []
    assert len(backend.hellos) == 1


async def test_a_machine_that_is_known_better_is_told_by_another_hello() -> None:
    async with connected() as (backend, records, link):
        link.greet_again()
        await backend.until(lambda: len(backend.hellos) == 2 and is_connected(link))
        records.say(CONTROL, "a")
        await backend.until(lambda: records.at[CONTROL] == 1)
    assert len(backend.hellos) == 2


async def test_a_hello_that_is_not_ready_costs_that_dial_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent.net.websocket, "HELLO_WITHIN", 0.2)
    backend, records = Backend(), Records()
    ready = records.hello

    async def stuck_once() -> Hello:
        if len(backend.requests) == 1:
            await anyio.sleep_forever()
        return await ready()

    records.hello = stuck_once  # type: ignore[method-assign]
    async with serving(backend), running(link_to(backend, records)):
        await backend.until(lambda: len(backend.hellos) == 1)


# Ending


@pytest.mark.parametrize("stalled", [False, True])
async def test_cancelling_ends_at_once_and_leaves_no_socket(stalled: bool) -> None:
    backend, records = Backend(), Records()
    async with serving(backend), BadNetwork("127.0.0.1", backend.port) as net:
        began = 0.0
        link = link_to(backend, records, port=net.port)
        async with running(link):
            await backend.until(lambda: is_connected(link))
            if stalled:
                net.stall()
                records.add(LOGS, *(Notice(1.0, "info", "x" * 60_000) for _ in range(100)))
                await anyio.sleep(0.2)
            began = time.monotonic()
        assert time.monotonic() - began < DEADLINE / 2
        net.heal()
        await backend.until(lambda: bool(backend.closes))


async def test_cancelling_while_dialling_ends_at_once() -> None:
    backend = Backend()
    async with serving(backend), BadNetwork("127.0.0.1", backend.port) as net:
        net.stall()
        link = link_to(backend, Records(), port=net.port)
        async with running(link):
            await anyio.sleep(0.2)
            assert net.connections == 1
            began = time.monotonic()
        assert time.monotonic() - began < DEADLINE / 2
    assert repr(link) == f"<Link {link.url} None, 1 dials>"
