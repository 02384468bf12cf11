"""Who is let in, who owns an agent's id, and how a departure is shown."""

import json
import time

import anyio
import httpx
import msgspec
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.typing import Subprotocol

from protocol.messages import SUBPROTOCOL_MSGPACK
from protocol.records import Figures
from tests.hub.support import (
    HubProcess,
    an_agent,
    until_away,
)
from tests.support.scripted_agent import ScriptedAgent


def test_a_wrong_key_is_refused_before_the_socket_opens(hub: HubProcess) -> None:
    async def main() -> None:
        agent = an_agent(hub)
        agent.key = "wak_" + "x" * 32
        with pytest.raises(InvalidStatus) as refused:
            async with agent.dial():
                pass
        assert refused.value.response.status_code == 401
        assert json.loads(refused.value.response.body) == {"error": "Invalid API key"}

    anyio.run(main)


def test_an_unknown_subprotocol_is_refused_with_a_sentence(hub: HubProcess) -> None:
    async def main() -> None:
        with pytest.raises(InvalidStatus) as refused:
            async with an_agent(hub).dial(subprotocols=[Subprotocol("agent.v99.xml")]):
                pass
        assert refused.value.response.status_code == 400
        assert SUBPROTOCOL_MSGPACK in json.loads(refused.value.response.body)["error"]

    anyio.run(main)


def test_the_higher_boot_takes_over_and_the_loser_is_told(hub: HubProcess, client: httpx.Client) -> None:
    async def main() -> None:
        old = an_agent(hub)
        new = ScriptedAgent(hub.url, hub.key, old.agent_id)
        new.boot = 2
        async with old.connected(), new.connected():
            code, reason = await old.until_closed()
            assert code == 4008
            assert "boot 2 attempt 1" in reason
            # The older one dials again and must not take the id back.
            late = ScriptedAgent(hub.url, hub.key, old.agent_id)
            late.attempt = 7
            async with late.connected(welcomed=False):
                code, reason = await late.until_closed()
            assert code == 4008
            assert "boot 2 attempt 1" in reason
            assert new.closed is None
        await until_away(client, new)
        # Nor may it once the newer one is away for a moment.
        async with late.connected(welcomed=False):
            assert (await late.until_closed())[0] == 4008
        async with new.connected():
            pass

    anyio.run(main)


def test_the_header_and_hello_name_one_agent(hub: HubProcess) -> None:
    async def main() -> None:
        agent = an_agent(hub)
        headers = {"Authorization": f"Bearer {hub.key}", "X-Agent-ID": "agent_another"}
        async with agent.dial(additional_headers=headers) as socket:
            await socket.send(msgspec.msgpack.encode(agent.hello()))
            with pytest.raises(ConnectionClosed) as closed:
                await socket.recv()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 4011
        assert "agent_another" in closed.value.rcvd.reason

    anyio.run(main)


def test_another_install_cannot_take_the_id(hub: HubProcess) -> None:
    async def main() -> None:
        agent = an_agent(hub)
        async with agent.connected():
            thief = ScriptedAgent(hub.url, hub.key, agent.agent_id, install_id="install-2")
            thief.boot = 99
            async with thief.connected(welcomed=False):
                code, reason = await thief.until_closed()
            assert code == 4505
            assert "box" in reason
            assert agent.closed is None

    anyio.run(main)


def test_a_planned_silence_is_explained(hub: HubProcess, client: httpx.Client) -> None:
    async def main() -> None:
        agent = an_agent(hub)
        async with agent.connected():
            assert agent.session is not None
            agent.session.bye("the machine goes to sleep", time.time() + 3600)
            agent.add(Figures(1.0, {"x": 1.0}))
            await agent.until_acked()
        seen = await until_away(client, agent)
        assert seen["status"] == "offline"
        assert seen["presence"].startswith("silent until")
        assert seen["presence"].endswith("the machine goes to sleep")

    anyio.run(main)
