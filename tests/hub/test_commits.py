"""How much of what comes by REST shares a commit: whoever waits for a word waits for the commit that runs, too."""

import threading
from collections.abc import Callable
from pathlib import Path

import anyio
import anyio.to_thread
import httpx
import msgspec
import pytest

from agent.hub.app import bare
from agent.hub.auth import Keys
from agent.hub.hub import Hub
from agent.hub.store import RECORDS_IN_A_COMMIT, Store
from protocol.codec import encode_record
from protocol.records import Figures, Point
from protocol.rest import CLAIM, HEADER_AGENT, HEADER_RANGE, HEADER_STREAM, JOB, JOBS, METRICS, RECORDS
from tests.hub.support import CONFIG, KEY, bearer

OWN = {"Authorization": f"Bearer {KEY}", HEADER_AGENT: "agent_rest0001"}
Send = Callable[[httpx.AsyncClient, str, dict[str, str], int], httpx.Request]


def packed(
    url: str, method: str, headers: dict[str, str], lane: int, epoch: int, one: bytes
) -> httpx.Request:
    body = msgspec.msgpack.encode([msgspec.Raw(one)] * RECORDS_IN_A_COMMIT)
    numbers = {HEADER_STREAM: f"{epoch}/{lane}", HEADER_RANGE: f"1-{RECORDS_IN_A_COMMIT}"}
    kind = {"Content-Type": "application/msgpack"}
    return httpx.Request(method, url, content=body, headers=headers | numbers | kind)


def points(client: httpx.AsyncClient, job_id: str, token: dict[str, str], number: int) -> httpx.Request:
    many = [{"step": number * 1000 + step, "epoch": 0} for step in range(RECORDS_IN_A_COMMIT)]
    return client.build_request("POST", METRICS, json={"job_id": job_id, "metrics": many}, headers=token)


def raw(client: httpx.AsyncClient, job_id: str, token: dict[str, str], number: int) -> httpx.Request:
    url = str(client.base_url.join(f"{JOB}/metrics".format(job_id=job_id)))
    return packed(url, "PUT", token, 1, number + 1, encode_record(Point(1.0, 1, 1, 0.1, 1, [0.5])))


def own(client: httpx.AsyncClient, job_id: str, token: dict[str, str], number: int) -> httpx.Request:
    url = str(client.base_url.join(RECORDS))
    return packed(url, "POST", OWN, 1, number + 1, encode_record(Figures(1.0, {"cpu_percent": 1.0})))


@pytest.mark.parametrize("send", [points, raw, own])
def test_an_append_counts_for_as_many_records_as_it_holds(tmp_path: Path, send: Send) -> None:
    async def test() -> None:
        store = Store(tmp_path / "hub.sqlite3")
        app = bare(Hub(store, Keys(store, KEY), tmp_path))
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://hub", headers=OWN
        ) as client:
            wanted = {"config": CONFIG, "dataset_path": "d.jsonl"}
            job = (await client.post(JOBS, json=wanted)).json()
            await client.post(CLAIM.format(job_id=job["job_id"]))
            go = threading.Event()
            store.submit(lambda db: go.wait(10))
            answers: list[int] = []

            async def append(number: int) -> None:
                request = send(client, job["job_id"], bearer(job["job_token"]), number)
                answers.append((await client.send(request)).status_code)

            async with anyio.create_task_group() as group:
                for number in range(3):
                    group.start_soon(append, number)
                with anyio.fail_after(10):
                    while len(store._behind) < 3:  # noqa: ASYNC110 - a queue of the store tells nobody
                        await anyio.sleep(0.01)
                before = store.commits
                go.set()
            assert answers == [200] * 3
            # One for the write that held the others up.
            assert store.commits - before == 1 + 3
        await anyio.to_thread.run_sync(store.close)

    anyio.run(test)
