"""C1 to C15: the upgrade, HELLO, and who owns an agent's id."""

import json

import anyio
import pytest
from websockets.exceptions import InvalidHandshake, InvalidStatus

from protocol.codec import Codec
from protocol.messages import (
    SUBPROTOCOL_JSON,
    SUBPROTOCOL_MSGPACK,
    SUBPROTOCOLS,
    Heartbeat,
    HeartbeatAck,
    Welcome,
)
from protocol.records import Notice
from protocol.rest import HEADER_AGENT
from tests.contract.backend import Backend, Line, Someone

REFUSED = (401, 403)


def test_c01_an_upgrade_needs_a_key(backend: Backend) -> None:
    async def main() -> None:
        agent = Someone()
        for key in (None, "wak_" + "0" * 32, ""):
            headers = {HEADER_AGENT: agent.agent_id}
            if key is not None:
                headers["Authorization"] = f"Bearer {key}"
            with pytest.raises(InvalidStatus) as refused:
                async with backend.dial(agent, additional_headers=headers):
                    pass
            assert refused.value.response.status_code in REFUSED

    anyio.run(main)


def test_c02_a_key_in_the_address_opens_nothing(backend: Backend) -> None:
    async def main() -> None:
        agent = Someone()
        for name in ("api_key", "key", "token", "authorization"):
            with pytest.raises(InvalidStatus) as refused:
                async with backend.dial(
                    agent, query=f"?{name}={backend.key}", additional_headers={HEADER_AGENT: agent.agent_id}
                ):
                    pass
            assert refused.value.response.status_code in REFUSED

    anyio.run(main)


def test_c03_one_of_the_subprotocols_offered_is_chosen(backend: Backend) -> None:
    async def main() -> None:
        async with backend.dial(Someone(), SUBPROTOCOLS) as socket:
            assert socket.subprotocol in SUBPROTOCOLS
        async with backend.dial(Someone(), (SUBPROTOCOL_MSGPACK,)) as socket:
            assert socket.subprotocol == SUBPROTOCOL_MSGPACK
        # Those of tomorrow are passed over.
        async with backend.dial(Someone(), ("finetunelab.agent.v9", SUBPROTOCOL_MSGPACK)) as socket:
            assert socket.subprotocol == SUBPROTOCOL_MSGPACK

    anyio.run(main)


def test_c04_without_a_subprotocol_in_common_there_is_no_conversation(backend: Backend) -> None:
    async def main() -> None:
        for offered in ((), ("graphql-ws",)):
            try:
                async with backend.dial(Someone(), offered) as socket:
                    assert socket.subprotocol is None
            except InvalidStatus as refused:
                assert 400 <= refused.response.status_code < 500
            except InvalidHandshake:
                pass

    anyio.run(main)


def test_c05_frames_are_not_compressed(backend: Backend) -> None:
    async def main() -> None:
        async with backend.dial(Someone(), compression="deflate") as socket:
            assert socket.response is not None
            assert "Sec-WebSocket-Extensions" not in socket.response.headers

    anyio.run(main)


def test_c06_welcome_is_the_first_word(backend: Backend) -> None:
    async def main() -> None:
        agent = Someone()
        backend.job_of(agent)
        async with backend.line(agent) as line:
            with anyio.fail_after(10):
                await line.say(agent.hello())
                await line.hear(Welcome)
            first = next(one for one in line.heard if not isinstance(one, Heartbeat | HeartbeatAck))
            assert isinstance(first, Welcome)

    anyio.run(main)


def test_c07_welcome_names_each_stream_of_hello(backend: Backend) -> None:
    async def main() -> None:
        agent = Someone()
        job = backend.job_of(agent)
        heads = [
            agent.head(sid, scope, lane, 5)
            for sid, (scope, lane) in enumerate(
                ((scope, lane) for scope in ("", job.id) for lane in range(3)), 11
            )
        ]
        async with backend.greeted(agent, *heads) as (line, positions):
            assert positions == {head.sid: 0 for head in heads}
            await line.data(14, 1, Notice(1.0, "info", "one"), Notice(1.0, "info", "two"))
            await line.acked(14, 2)
        async with backend.greeted(agent, *heads) as (_, positions):
            assert positions == {head.sid: 2 if head.sid == 14 else 0 for head in heads}

    anyio.run(main)


def test_c08_nothing_comes_before_hello(backend: Backend) -> None:
    async def main() -> None:
        async with backend.line(Someone()) as line:
            await line.data(1, 1, Notice(1.0, "info", "too early"))
            assert (await line.closed())[0] == 4011

    anyio.run(main)


def test_c09_there_is_one_hello(backend: Backend) -> None:
    async def main() -> None:
        agent = Someone()
        async with backend.greeted(agent) as (line, _):
            await line.say(agent.hello())
            assert (await line.closed())[0] == 4011

    anyio.run(main)


def test_c10_hello_and_the_header_name_one_agent(backend: Backend) -> None:
    async def main() -> None:
        async with backend.line(Someone()) as line:
            await line.say(Someone().hello())
            assert (await line.closed())[0] == 4011

    anyio.run(main)


@pytest.mark.slow
def test_c11_hello_comes_within_ten_seconds(backend: Backend) -> None:
    async def main() -> None:
        async with backend.line(Someone()) as line:
            # A slow agent is let in: it is the silent one that is not.
            await line.stays(5)
            await line.closed()

    anyio.run(main)


def test_c12_the_highest_pair_owns_the_id(backend: Backend) -> None:
    async def main() -> None:
        agent = Someone(boot=3, attempt=5)
        head = agent.head(1, last=9)
        async with backend.greeted(agent, head) as (older, _), backend.greeted(agent, head) as (newer, _):
            code, reason = await older.closed()
            assert code == 4008
            assert "boot 3 attempt 7" in reason
            await _still_owns(newer)
            # A start of the agent counts before all dials of the one before.
            agent.boot, agent.attempt = 4, 0
            async with backend.greeted(agent) as (newest, _):
                assert (await newer.closed())[0] == 4008
                await newest.lives()

    anyio.run(main)


async def _still_owns(line: Line) -> None:
    await line.data(1, 1, Notice(1.0, "info", "still here"))
    await line.acked(1, 1)


def test_c13_a_late_dial_does_not_take_over(backend: Backend) -> None:
    async def main() -> None:
        agent = Someone(boot=7, attempt=40)

        async def late(boot: int, attempt: int) -> None:
            old = Someone(agent.agent_id, boot=boot, attempt=attempt - 1, epoch=agent.epoch)
            async with backend.line(old) as line:
                await line.say(old.hello(old.head(1, last=1)))
                code, reason = await line.closed()
                assert code == 4008
                assert "boot 7 attempt 41" in reason
                assert not any(isinstance(one, Welcome) for one in line.heard)

        async with backend.greeted(agent, agent.head(1, last=1)) as (owner, _):
            for pair in ((7, 41), (7, 3), (6, 99)):
                await late(*pair)
            await _still_owns(owner)
        # Nor while the owner is away for a moment.
        await late(7, 40)

    anyio.run(main)


def test_c14_another_install_is_refused(backend: Backend) -> None:
    async def main() -> None:
        agent = Someone()
        async with backend.greeted(agent, agent.head(1, last=1)) as (owner, _):
            copy = Someone(agent.agent_id, "install-2", boot=9)
            async with backend.line(copy) as line:
                await line.say(copy.hello())
                assert (await line.closed())[0] == 4505
            await _still_owns(owner)

    anyio.run(main)


def test_c15_json_says_the_same(backend: Backend) -> None:
    async def main() -> None:
        agent = Someone()
        try:
            async with backend.greeted(agent, agent.head(1, last=1), subprotocol=SUBPROTOCOL_JSON) as (
                line,
                positions,
            ):
                assert positions == {1: 0}
                record = [8, 1.5, "info", "in words"]
                await line.socket.send(json.dumps([3, 1, 1, [record]]))
                await line.acked(1, 1)
                frame = await _text_of_a_beat(line)
                assert Codec(SUBPROTOCOL_JSON).decode_hub(frame) == HeartbeatAck(77)
        except InvalidStatus:
            pytest.skip("this backend speaks MessagePack alone")

    anyio.run(main)


async def _text_of_a_beat(line: Line) -> str:
    await line.socket.send("[10,77]")
    with anyio.fail_after(10):
        while True:
            frame = await line.socket.recv()
            assert isinstance(frame, str), "JSON travels in text messages"
            if frame.startswith("[11"):
                return frame
