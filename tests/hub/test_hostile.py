"""Whatever comes through the socket, the hub closes that connection with a reason and serves the others."""

import random
from collections import Counter

import anyio
import httpx
import pytest
from websockets.exceptions import ConnectionClosed

from protocol.codec import Codec
from protocol.messages import SUBPROTOCOLS, Close
from protocol.rest import CLAIM, HEADER_AGENT
from protocol.session import Key
from tests.hub.support import HubProcess, an_agent, submit
from tests.support.fuzz import BY_AGENT, TREES, Fuzz, packed, tree_of

CONNECTIONS = 40
CLOSES = {*map(int, Close), 1009}


def job_of(client: httpx.Client, agent_id: str) -> str:
    """Return a job that this agent holds, so that its streams are taken."""
    job_id, _ = submit(client)
    claimed = client.post(CLAIM.format(job_id=job_id), headers={HEADER_AGENT: agent_id})
    assert claimed.status_code == 200
    return job_id


@pytest.mark.parametrize("subprotocol", SUBPROTOCOLS, ids=["msgpack", "json"])
def test_hostile_frames_do_not_hurt_the_hub(hub: HubProcess, client: httpx.Client, subprotocol: str) -> None:
    seed = random.getrandbits(32)
    print(f"seed {seed}")
    fuzz = Fuzz(seed, subprotocol)
    codec = Codec(subprotocol)
    trees = [*map(tree_of, BY_AGENT), *TREES]
    closes: Counter[int] = Counter()

    async def one(number: int) -> None:
        agent = an_agent(hub, subprotocol=subprotocol)
        job_id = job_of(client, agent.agent_id)
        for scope in ("", job_id):
            for lane in range(3):
                agent.records[Key(agent.epoch, scope, lane)] = [b"\x90"]
        hello = codec.encode(agent.hello()) if number % 4 else packed(fuzz.tree(trees[0]), fuzz.as_json)
        frames = [fuzz.sound(codec, by_hub=False) for _ in range(number % 7)]
        async with agent.dial() as socket:
            try:
                for frame in (hello, *frames, fuzz.frame(trees), b"\xc1"):
                    # Raw bytes may be no text: then it is the socket that refuses them.
                    await socket.send(frame.decode("utf-8", "replace") if fuzz.as_json else frame)
                while True:
                    await socket.recv()
            except ConnectionClosed as closed:
                assert closed.rcvd is not None, "the hub hung up without a word"
                assert closed.rcvd.code in CLOSES and closed.rcvd.reason, closed
                closes[closed.rcvd.code] += 1

    async def main() -> None:
        for number in range(CONNECTIONS):
            with anyio.fail_after(30):
                await one(number)
        good = an_agent(hub, subprotocol=subprotocol)
        async with good.connected():
            assert good.closed is None

    anyio.run(main)
    assert closes[Close.MALFORMED] and closes[Close.GAP]
    assert client.get("/health").json()["status"] == "ok"
    log = hub.log.read_text()
    assert "Traceback" not in log, log[-4000:]
