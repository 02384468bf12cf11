"""What an agent said before it left: stored, and told to the pages, whatever one of its frames comes to."""

from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import msgspec
import pytest
from starlette.websockets import WebSocket

from agent.hub import ingest
from agent.hub.agents import Connection
from agent.hub.auth import Keys
from agent.hub.hub import Hub
from agent.hub.model import Job
from agent.hub.store import Db, Store
from agent.hub.tables import add_job
from protocol.codec import Codec, encode_record
from protocol.messages import SUBPROTOCOL_MSGPACK, Lane
from protocol.records import LogChunk
from protocol.session import Key
from tests.hub.support import KEY

AGENT = "agent_parting01"
CODEC = Codec(SUBPROTOCOL_MSGPACK)


async def unheard(message: object = None) -> dict[str, object]:
    raise AssertionError("nothing is said on a connection that has ended")


def test_a_frame_that_breaks_takes_no_news_of_others_with_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        store = Store(tmp_path / "hub.sqlite3")
        hub = Hub(store, Keys(store, KEY), tmp_path)

        def begin(db: Db) -> None:
            for name in ("bad", "good"):
                add_job(db, Job(id=name, agent_id=AGENT, token="t", config="{}", created_at=0, updated_at=0))
            # As a block of the disk that went bad, or a row of another version: it cannot be read.
            db.execute("UPDATE jobs SET doc=x'c1' WHERE id='bad'")

        await store.write(begin)
        scope = {"type": "websocket", "headers": []}
        connection = Connection(hub, WebSocket(scope, unheard, unheard), CODEC, None)  # type: ignore[arg-type]
        connection.agent_id = AGENT
        line = msgspec.Raw(encode_record(LogChunk(1.0, 1, 0, ["the last line"])))
        for name in ("bad", "good"):
            key = Key(1, name, Lane.LOGS)
            said: dict[str, Any] = {"key": key, "lo": 1, "records": [line], "codec": CODEC, "now": 1.0}
            await connection._queue(key, partial(ingest.apply, agent_id=AGENT, **said))
        with hub.feed.watching("good") as watch:
            await connection._parted()
            assert watch.lines == ["the last line"]
        await anyio.to_thread.run_sync(store.close)

    anyio.run(test)
    assert f"after {AGENT} had left" in caplog.text
    assert "MessagePack data is malformed" in caplog.text
