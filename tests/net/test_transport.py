"""The two ways together: while one has the records the other sends none."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import anyio
import httpx
import msgspec
import pytest

from agent.core.ports import Uplink
from agent.errors import KeyRefused, NotOurBackend
from agent.net.choice import Transport
from agent.net.client import RestClient
from agent.net.retry import backoff
from agent.net.websocket import Link
from protocol.lifecycle import JobState
from protocol.messages import Hello, Machine
from tests.hub.support import KEY, HubProcess, job_path, submit
from tests.net.kept import AGENT, Kept
from tests.support.platform import KEY as PLATFORM_KEY
from tests.support.platform import Platform
from tests.support.upgrades import NoUpgrades


class Watched(RestClient):
    """Counts the requests that are under way, and those that come while the socket has the records."""

    busy = 0
    intruders = 0
    taken: Callable[[], bool]

    async def call(self, method: str, path: str, *args: Any, **more: Any) -> dict[str, Any]:
        self.busy += 1
        self.intruders += self.taken()
        try:
            return await super().call(method, path, *args, **more)
        finally:
            self.busy -= 1


class Gated(Kept):
    """Records that wait for their turn before HELLO."""

    before_hello: Callable[[], Awaitable[None]]
    rest: Watched
    together = 0

    async def hello(self) -> Hello:
        await self.before_hello()
        self.together += self.rest.busy
        return await super().hello()


def transport(
    url: str, store: Gated, setting: str = "auto", key: str = KEY
) -> tuple[Transport, list[tuple[str, str]]]:
    news: list[tuple[str, str]] = []

    def link(records: Uplink, on_state: Callable[[str, str], None]) -> Link:
        return Link(
            records,
            backend_url=url,
            key=lambda: key,
            agent_id=AGENT,
            heartbeat=5.0,
            on_state=on_state,
            user_agent="test",
        )

    store.rest = Watched(url, key=lambda: key, agent_id=AGENT, user_agent="test")
    made = Transport(
        store,
        store.rest,
        setting=setting,
        poll_interval=2.0,
        make_link=link,
        on_state=lambda state, detail: news.append((state, detail)),
    )
    store.before_hello = made.socket_turn
    store.rest.taken = lambda: made.rules.socket in ("opening", "open")
    store.on_change = made.wake
    made.hub.hurry()
    return made, news


def test_rest_is_still_before_hello_and_while_the_session_lives(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.net.websocket.backoff", lambda: backoff(0.2, 0.5))
    with HubProcess(tmp_path_factory.mktemp("hub"), "--no-page") as hub, hub.client() as client:
        job_id, token = submit(client)
        headers: Mapping[str, str] = {"X-Agent-ID": AGENT}
        assert client.post(f"/api/training/agent/claim/{job_id}", headers=headers).status_code == 200
        store = Gated(job_id)
        store.tokens[job_id] = token
        anyio.run(_ways, hub, client, store)
        points = client.get(job_path(job_id, "metrics")).json()["metrics"]
        assert [point["step"] for point in points] == list(range(1, len(store.rows[store.metrics]) + 1))
        assert store.together == 0 and store.rest.intruders == 0


async def _ways(hub: HubProcess, client: httpx.Client, store: Gated) -> None:
    async with NoUpgrades("127.0.0.1", int(hub.url.rpartition(":")[2])) as net:
        net.manner = "abort"
        made, _ = transport(f"http://127.0.0.1:{net.port}", store)

        async def points() -> None:
            for step in range(1, 10_000):
                store.step(step)
                made.wake()
                await anyio.sleep(0.005)

        async def until(what: Callable[[], bool]) -> None:
            with anyio.fail_after(60):
                # Two programs and a proxy are watched at once: nothing here could be waited for.
                while not what():  # noqa: ASYNC110
                    await anyio.sleep(0.02)

        async with anyio.create_task_group() as group:
            group.start_soon(made.run)
            group.start_soon(points)
            await until(lambda: made.by_rest and store.at[store.metrics] > 50)
            net.manner = "pass"
            await until(lambda: made.rules.socket == "open")
            at = store.at[store.metrics]
            await until(lambda: store.at[store.metrics] > at + 50)
            net.manner = "abort"
            net.cut()
            await until(lambda: made.by_rest)
            at = store.at[store.metrics]
            await until(lambda: store.at[store.metrics] > at + 50)
            net.manner = "pass"
            await until(lambda: made.rules.socket == "open")
            group.cancel_scope.cancel()
        made, _ = transport(hub.url, store)
        async with anyio.create_task_group() as group:
            group.start_soon(made.run)
            await until(lambda: sum(store.backlog()) == 0)
            group.cancel_scope.cancel()


@pytest.mark.parametrize("setting", ["auto", "poll"])
def test_a_key_that_nobody_knows_ends_it_by_either_way(setting: str) -> None:
    with Platform() as platform:
        made, news = transport(platform.url, Gated("none"), setting, key="wak_" + "x" * 32)

        async def run() -> None:
            with anyio.fail_after(30):
                await made.run()

        with pytest.raises(KeyRefused, match="API_KEY"):
            anyio.run(run)
        assert news[-1][0] == "refused"


class Awkward(Gated):
    """Records on a bad day: now and then nobody can say what machine this is."""

    broken = 0

    async def machine(self) -> Machine:
        if self.broken:
            self.broken -= 1
            raise RuntimeError("the driver is gone")
        return await super().machine()


@pytest.mark.parametrize("setting", ["auto", "poll"])
def test_no_bad_hour_of_the_platform_and_no_defect_ends_the_agent(
    setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.net.choice.backoff", lambda *_: backoff(0.02, 0.05))
    monkeypatch.setattr("agent.net.choice.ABSENT_FIRST", 0.02)
    with Platform() as platform:
        platform.fault("poll", *["401"] * 8)
        store = Awkward("none")
        store.broken = 1
        made, news = transport(platform.url, store, setting)
        made.poller._interval = 0.01
        platform.poll_seconds = 0

        async def run() -> None:
            async def polled(times: int) -> None:
                enough = platform.seen["poll"] + times
                # A server in a thread is watched: nothing here could be waited for.
                while platform.seen["poll"] < enough or not made.by_rest:  # noqa: ASYNC110
                    await anyio.sleep(0.02)

            with anyio.fail_after(30):
                async with anyio.create_task_group() as group:
                    group.start_soon(made.run)
                    await polled(10)
                    assert news[-1][0] == "connected"
                    store.broken = 3
                    platform.fault("poll", *["401", "page", "401", "502", "401", "401"] * 2)
                    await polled(20)
                    group.cancel_scope.cancel()

        anyio.run(run)
        assert "refused" not in [state for state, _ in news]
        # Told as what a poll met: what is sent meanwhile went on.
        assert any("the driver is gone" in detail for _, detail in news)


def test_the_setting_websocket_never_polls() -> None:
    with Platform() as platform:
        made, _ = transport(platform.url, Gated("none"), "websocket")

        async def run() -> None:
            with anyio.fail_after(30):
                await made.run()

        with pytest.raises(NotOurBackend):
            anyio.run(run)
        assert platform.seen["poll"] == 0


def test_a_planned_silence_is_said_in_the_log_of_each_job_that_is_waited_for() -> None:
    with Platform() as platform:
        one = platform.submit({}, status="running", agent_id=AGENT)
        other, ended = (platform.submit({}, status="running", agent_id=AGENT) for _ in range(2))
        store = Gated(one)
        for job_id, state in ((other, JobState.PAUSED), (ended, JobState.COMPLETED)):
            store.held[job_id] = msgspec.structs.replace(store.held[one], job_id=job_id, state=state)
        for job_id, row in platform.rows.items():
            store.tokens[job_id] = str(row["job_token"])
        made, _ = transport(platform.url, store, "poll", key=PLATFORM_KEY)

        async def run() -> None:
            with anyio.fail_after(30):
                async with anyio.create_task_group() as group:
                    # Before anybody polls there is no way to say it, and nothing to keep for later.
                    await made.bye("nobody hears this")
                    group.start_soon(made.run)
                    while not made.by_rest:  # noqa: ASYNC110 - a server in a thread
                        await anyio.sleep(0.01)
                    await made.bye("The agent is being stopped.")
                    while sum(store.backlog()):  # noqa: ASYNC110
                        await anyio.sleep(0.01)
                    group.cancel_scope.cancel()

        anyio.run(run)
        assert platform.log == {one: ["[agent] info: The agent is being stopped."]}
