"""Our hub by REST: the socket's records under the same numbers, whatever happens on the way."""

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import anyio
import httpx
import pytest

from agent.net.client import RestClient
from agent.net.rest import HubDrain, carry_out
from protocol.failures import Evidence, FailureReason, failure
from protocol.messages import Lane
from protocol.records import Figures, JobStatus
from protocol.rest import RECORDS
from protocol.session import Key
from tests.hub.support import KEY, HubProcess, bearer, control, job_path, logs_of, status_of, submit
from tests.net.kept import AGENT, Kept
from tests.support.network import BadNetwork


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubProcess]:
    with HubProcess(tmp_path_factory.mktemp("hub"), "--no-page") as process:
        yield process


def claimed(client: httpx.Client, agent: str = AGENT) -> Kept:
    """Return the records of a job that an agent has claimed."""
    job_id, token = submit(client)
    assert (
        client.post(f"/api/training/agent/claim/{job_id}", headers={"X-Agent-ID": agent}).status_code == 200
    )
    store = Kept(job_id)
    store.tokens[job_id] = token
    store.status("running")
    return store


async def run(url: str, store: Kept, within: float = 30.0) -> None:
    """Drain until nothing is left."""
    rest = RestClient(url, key=lambda: KEY, agent_id=AGENT, user_agent="test", answer_within=5.0)
    made = HubDrain(rest, store)
    made.aside = (0.02, 0.05)
    made.hurry()
    empty = anyio.Event()
    store.on_change = lambda: None if sum(store.backlog()) else empty.set()
    with anyio.fail_after(within):
        async with anyio.create_task_group() as group:
            group.start_soon(made.run)
            if sum(store.backlog()):
                await empty.wait()
            group.cancel_scope.cancel()
    await rest.close()


def steps(client: httpx.Client, store: Kept) -> list[int]:
    return [point["step"] for point in client.get(job_path(store.job_id, "metrics")).json()["metrics"]]


def test_what_cannot_be_read_any_more_is_buried_and_the_rest_arrives(hub: HubProcess) -> None:
    with hub.client() as client:
        store = claimed(client)
        store.step(1)
        store.add(store.metrics, None, None)
        store.step(4)
        anyio.run(run, hub.url, store)
        assert steps(client, store) == [1, 4]
        notes = str(status_of(client, store.job_id))
        assert "2 points of the curve were lost on the agent's machine (corrupt)" in notes


def test_a_hub_that_lost_what_it_had_acknowledged_is_told_that_it_is_gone(hub: HubProcess) -> None:
    with hub.client() as client:
        store = claimed(client)
        for step in range(1, 8):
            store.step(step)
        store.at[store.metrics] = 5
        anyio.run(run, hub.url, store)
        assert steps(client, store) == [6, 7]
        assert store.lost == [(store.metrics, "trimmed")]


def test_every_answer_says_what_is_wanted(hub: HubProcess) -> None:
    with hub.client() as client:
        store = claimed(client)
        anyio.run(run, hub.url, store)
        before = len(store.wishes)
        control(client, store.job_id, "pause")
        client.patch(job_path(store.job_id, "update-params"), json={"learning_rate": 5e-5})
        store.step(1)
        anyio.run(run, hub.url, store)
        wish = store.wishes[-1]
        assert (len(store.wishes), wish.want, wish.parameters.learning_rate) == (before + 1, "pause", 5e-5)
        store.step(2)
        anyio.run(run, hub.url, store)
        assert len(store.wishes) == before + 1, "the same version is no news"


def test_a_job_that_another_agent_holds_takes_nothing_of_this_one(hub: HubProcess) -> None:
    with hub.client() as client:
        store = claimed(client, "agent_another01")
        store.step(1)
        anyio.run(run, hub.url, store)
        assert {key.lane for key, _ in store.refused} == {0, 1} and steps(client, store) == []
        mine = bearer(store.tokens[store.job_id])
        assert client.post(job_path(store.job_id, "logs"), json={"logs": []}, headers=mine).status_code == 200


class _Front(BaseHTTPRequestHandler):
    """A proxy before the hub; ``refuse`` returns the status and body that it answers itself, or None."""

    target = ""
    refuse: ClassVar[Callable[[str, str, bytes], tuple[int, bytes] | None]]
    passed: ClassVar[list[tuple[str, str]]]
    """Method and path of what came through to the hub."""

    def do_PUT(self) -> None:  # the library's name
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer = type(self).refuse(self.command, self.path, body)
        if answer is None:
            self.passed.append((self.command, self.path))
            kept = {name: value for name, value in self.headers.items() if name.lower() != "host"}
            said = httpx.request(self.command, self.target + self.path, content=body, headers=kept)
            answer = said.status_code, said.content
        self.send_response(answer[0])
        self.send_header("Content-Length", str(len(answer[1])))
        self.end_headers()
        self.wfile.write(answer[1])

    do_PATCH = do_POST = do_PUT  # noqa: N815 - the library's names

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def front(
    hub: HubProcess, refuse: Callable[[str, str, bytes], tuple[int, bytes] | None]
) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yield a proxy's address, and what came through it so far."""
    handler = type("_Handler", (_Front,), {"target": hub.url, "refuse": staticmethod(refuse), "passed": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", handler.passed  # type: ignore[attr-defined]
        server.shutdown()
        thread.join()


def test_a_proxy_that_takes_little_is_given_little(hub: HubProcess) -> None:
    def narrow(method: str, path: str, body: bytes) -> tuple[int, bytes] | None:
        return (413, b"") if len(body) > 900 else None

    with hub.client() as client, front(hub, narrow) as (url, _):
        store = claimed(client)
        for step in range(1, 60):
            store.step(step)
        store.print("x" * 2000)
        store.print("short")
        cause = failure(FailureReason.DATA, "Row 57 is broken.", Evidence(traceback="t" * 3000))
        store.add(store.control, JobStatus(1.0, 1, "failed", failure=cause))
        anyio.run(run, url, store)
        assert steps(client, store) == list(range(1, 60))
        # A state arrives without what explains it.
        assert (status := status_of(client, store.job_id))["status"] == "failed"
        assert status["error"] == "Row 57 is broken." and "traceback" not in str(status)
        # One record alone is too large for the way: its place is marked, and what follows arrives.
        assert logs_of(client, store.job_id)["logs"][-1] == "short"


def test_a_page_that_says_404_in_the_hubs_place_deletes_nothing(hub: HubProcess) -> None:
    pages = [b"<html>404 Not Found</html>", b'{"error": "Not Found"}', b'{"error": {"code": "404"}}'] * 3

    def deploying(method: str, path: str, body: bytes) -> tuple[int, bytes] | None:
        return (404, pages.pop()) if pages else None

    with hub.client() as client, front(hub, deploying) as (url, _):
        store = claimed(client)
        store.step(1)
        store.print("one")
        anyio.run(run, url, store)
        assert not pages and not store.refused
        assert steps(client, store) == [1] and logs_of(client, store.job_id)["logs"] == ["one"]
        # The hub itself may say so.
        gone = Kept("no-such-job")
        gone.tokens["no-such-job"] = "t"
        gone.status("running")
        anyio.run(run, url, gone)
        assert gone.refused


def test_what_is_printed_after_the_token_was_scrubbed_arrives(hub: HubProcess) -> None:
    with hub.client() as client:
        store = claimed(client)
        token = store.tokens[store.job_id]
        store.status("completed")
        anyio.run(run, hub.url, store)
        # All had arrived, so the token was deleted; then the end of the log is read.
        store.tokens.clear()
        store.print("Traceback (most recent call last):", "the last word")
        anyio.run(run, hub.url, store)
        assert logs_of(client, store.job_id)["logs"][-1] == "the last word"
        assert store.tokens == {store.job_id: token}
        # To the agent that another has taken the job from it is not given.
        other = claimed(client, "agent_another01")
        other.tokens.clear()
        other.print("not mine")
        anyio.run(run, hub.url, other)
        assert {key.lane for key, _ in other.refused} == {0, 2} and not other.tokens


def test_a_retry_that_comes_with_a_poll_finds_its_token_again(hub: HubProcess) -> None:
    with hub.client() as client:
        store = claimed(client)
        token = store.tokens.pop(store.job_id)
        said = [
            None,
            [8],
            ["8", "c", "retry"],
            [8, "c-1", "retry", store.job_id],
            [8, "c-2", "save_now", "x"],
        ]

        async def poll(answer: dict[str, Any]) -> None:
            rest = RestClient(hub.url, key=lambda: KEY, agent_id=AGENT, user_agent="test")
            await carry_out(rest, store, answer)
            await rest.close()

        for commands in (said, None, "none"):
            anyio.run(poll, {"commands": commands})
        assert [command.command_id for command in store.commands] == ["c-1", "c-2"]
        assert store.tokens == {store.job_id: token}


def test_what_the_agent_says_of_itself_arrives(hub: HubProcess) -> None:
    own = [Key(7, "", lane) for lane in Lane]
    with hub.client() as client:
        store = claimed(client)
        store.say(own[Lane.CONTROL], "nothing ran here for 60 s")
        store.add(own[Lane.METRICS], *(Figures(1e9 + second, {"cpu_percent": 5.0}) for second in range(20)))
        anyio.run(run, hub.url, store)
        agent = client.get(f"/api/training/agents/{AGENT}").json()["agent"]
        assert agent["figures"] == {"cpu_percent": 5.0}
        assert [note["text"] for note in agent["notes"]] == ["nothing ran here for 60 s"]


def test_a_backend_without_a_place_for_figures_does_not_fill_the_disk_with_them(hub: HubProcess) -> None:
    own = [Key(8, "", lane) for lane in Lane]
    tries: list[bytes] = []

    def older(method: str, path: str, body: bytes) -> tuple[int, bytes] | None:
        if path != RECORDS or len(tries) > 3:
            return None
        tries.append(body)
        return 404, b"Not Found"

    with hub.client() as client, front(hub, older) as (url, _):
        store = claimed(client)
        store.add(own[Lane.METRICS], Figures(1e9, {"cpu_percent": 99.0}))
        store.say(own[Lane.CONTROL], "kept until somebody takes it")
        anyio.run(run, url, store)
        agent = client.get(f"/api/training/agents/{AGENT}").json()["agent"]
        assert agent["figures"] != {"cpu_percent": 99.0}
        assert agent["notes"][-1]["text"] == "kept until somebody takes it"


@pytest.mark.parametrize("status", [403, 500, 404])
def test_points_and_lines_wait_for_a_job_whose_states_are_refused_and_other_jobs_do_not(
    hub: HubProcess, status: int
) -> None:
    with hub.client() as client:
        store, other = claimed(client), claimed(client)
        refused: list[str] = []

        def refuse(method: str, path: str, body: bytes) -> tuple[int, bytes] | None:
            # Until the other job is through, and a few times more.
            if path.endswith(f"{store.job_id}/status") and (
                len(steps(client, other)) < 3 or len(refused) < 6
            ):
                refused.append(path)
                return status, b"not now"
            return None

        for one in (1, 2, 3):
            for held in (store, other):
                held.step(one)
                held.print(f"line {one}")
        both = Kept(store.job_id)
        both.rows, both.at = store.rows | other.rows, store.at | other.at
        both.held, both.tokens = store.held | other.held, store.tokens | other.tokens
        with front(hub, refuse) as (url, passed):
            anyio.run(run, url, both)
        mine = [(method, path.rpartition("/")[2]) for method, path in passed if store.job_id in path]
        looks = [("POST", "logs")]  # an empty append: what is wanted is asked at once
        assert mine[:2] == [*looks, ("PATCH", "status")] and ("PUT", "metrics") in mine[2:]
        assert steps(client, store) == steps(client, other) == [1, 2, 3]
        assert len(refused) >= 6 and not both.refused


@pytest.mark.parametrize("kind", ["hub", "platform"])
def test_a_full_disk_ends_nothing_and_doubles_nothing(tmp_path: Path, kind: str) -> None:
    script = [sys.executable, "-m", "tests.support.full_disk", str(tmp_path), kind]
    try:
        done = subprocess.run(["unshare", "-rm", *script], capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        pytest.skip("needs unshare, to make a small disk")
    if "unshare failed" in done.stderr or "['mount'" in done.stderr:
        pytest.skip("needs the right to mount in a namespace of its own")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["full"] >= 10, "a disk that was not full proves nothing"
    assert told["steps"] == list(range(1, 41))
    assert told["lines"] == [f"line {number}" for number in range(40)]


@pytest.mark.parametrize("seed", range(3))
def test_each_record_is_stored_once_although_the_line_breaks_all_the_time(hub: HubProcess, seed: int) -> None:
    chance = random.Random(seed)
    with hub.client() as client:
        store = claimed(client)
        for step in range(1, 1501):
            store.step(step)
            if step % 3 == 0:
                store.print(f"line {step}")

        async def over_a_bad_line() -> int:
            async with BadNetwork("127.0.0.1", int(hub.url.rpartition(":")[2])) as net:
                made = 0

                async def cut() -> None:
                    nonlocal made
                    while True:
                        await anyio.sleep(chance.uniform(0.001, 0.03))
                        chance.choice([net.cut, net.half_open, net.cut])()
                        made += 1

                async with anyio.create_task_group() as group:
                    group.start_soon(cut)
                    for _ in range(6):
                        # The agent is killed and starts again: only the journal is left.
                        with anyio.move_on_after(chance.uniform(0.02, 0.3)):
                            await run(f"http://127.0.0.1:{net.port}", store)
                    group.cancel_scope.cancel()
                net.cut()
                await run(f"http://127.0.0.1:{net.port}", store)
                return made

        assert anyio.run(over_a_bad_line) > 3
        assert steps(client, store) == list(range(1, 1501))
        assert logs_of(client, store.job_id, limit=2000)["logs"] == [f"line {n}" for n in range(3, 1501, 3)]
