"""The tables of what an agent does at each answer to a request, made by giving it that answer.

A real server answers, and the code that polls, claims and appends asks it. What stands in a row was seen.
"""

import re
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from typing import Any

import anyio
import msgspec
from loguru import logger
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from agent.net.client import RestClient, RestError
from agent.net.drain import Drain
from agent.net.platform import PlatformDrain
from agent.net.poll import CLAIMING, Poller
from agent.net.rest import HubDrain
from protocol.messages import SUBPROTOCOL_MSGPACK
from protocol.records import JobFacts
from protocol.rest import HEADER_RANGE, HEADER_TOMB
from protocol.session import Key
from tests.net.kept import AGENT, NAMES, Kept
from tests.support.platform_rows import Served

STATUSES = (
    *(200, 201, 202, 203, 299, 300, 301, 302, 308, 399),
    *range(400, 419),
    *range(421, 432),
    *(451, 499, 500, 501, 502, 503, 504, 507, 520, 599),
)
"""Those that are tried: all that have a meaning in HTTP, and the bounds of what may come. A row's ranges span them."""
JOB_ID = "j1"
PAUSE = 7
"""Seconds of every `Retry-After`."""
CLAIM, PATCH, LOGS = "POST /agent/claim/j1", "PATCH /local/j1/status", "POST /local/j1/logs"
METRICS, JOBS, STATUS = "POST /local/metrics", "POST /local/jobs", "GET /local/j1/status"


def grouped(numbers: Iterable[int], outcome: Callable[[int], tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Return a row for each outcome, with the numbers that have it as ranges in its first cell."""
    found: dict[tuple[str, ...], list[list[int]]] = {}
    last = 0
    for number in numbers:
        spans = found.setdefault(outcome(number), [])
        if spans and spans[-1][1] == last:
            spans[-1][1] = number
        else:
            spans.append([number, number])
        last = number
    return [
        (", ".join(str(lo) if lo == hi else f"{lo}-{hi}" for lo, hi in spans), *cells)
        for cells, spans in found.items()
    ]


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, tuple("---" for _ in head), *rows))


class Stub(Served):
    """A backend that grants everything, but for the answers that a row is about."""

    def __init__(self) -> None:
        super().__init__(0)
        self.asked: list[str] = []
        self.ranges: list[tuple[int, int]] = []
        self.tombs: list[str] = []
        self.hub = False
        self.instead: dict[str, tuple[int, dict[str, Any]]] = {}
        """The next answer of a route; of `always` all answers."""
        self.always = False

    def app(self) -> Starlette:
        methods = ["GET", "POST", "PUT", "PATCH"]
        return Starlette(routes=[Route("/api/training/{rest:path}", self._answer, methods=methods)])

    def fresh(self, *, hub: bool = False) -> None:
        self.asked, self.ranges, self.tombs = [], [], []
        self.hub, self.instead, self.always = hub, {}, False

    async def _answer(self, request: Request) -> Response:
        await request.body()
        name = f"{request.method} /{request.path_params['rest']}"
        self.asked.append(name)
        lo, _, hi = request.headers.get(HEADER_RANGE, "").partition("-")
        if hi:
            self.ranges.append((int(lo), int(hi)))
            self.tombs.append(request.headers.get(HEADER_TOMB, ""))
        status, said = 200, self._granted(int(hi or 0))
        if name in self.instead:
            status, more = self.instead[name] if self.always else self.instead.pop(name)
            said = {**said, **more} if status < 300 else more
        return JSONResponse(said, status, {"Retry-After": str(PAUSE)})

    def _granted(self, hi: int) -> dict[str, Any]:
        job = {"id": JOB_ID, "config": {}, "status": "pending"}
        numbered = {"ack": hi, "desired_version": 1, "want": "run"}
        lists = {"metrics": [], "logs": [], "jobs": [], "total_lines": 0}
        polled = {"job": job, "poll_interval_seconds": 10, "job_token": "t", "persisted": True}
        spoken = {"records": SUBPROTOCOL_MSGPACK} if self.hub else {}
        return {**numbered, **lists, **polled, **spoken, "status": "running"}


@contextmanager
def said() -> Iterator[list[str]]:
    """Collect what stands in the agent's log."""
    lines: list[str] = []
    sink = logger.add(lambda line: lines.append(line.record["message"]), level="INFO")
    try:
        yield lines
    finally:
        logger.remove(sink)


def in_words(line: str, status: int) -> str:
    """Return a line of the log with names in place of what differs from time to time."""
    line = re.sub(r"\b[a-z]+_[a-z_]+(, [a-z_]+)+", "{fields}", line)
    line = re.sub(r"in [\d.]+ s$", "in {n} s", line.replace(f"HTTP {status}", "HTTP {status}"))
    return line.replace("/api/training", "").replace(JOB_ID, "{id}")


def refused(status: int, **more: Any) -> tuple[int, dict[str, Any]]:
    return status, {} if status < 300 else {"error": "{error}", **more}


def asked_of_a_backend(
    outcome: Callable[[Stub, RestClient, int], Awaitable[tuple[str, ...]]], statuses: Iterable[int] = STATUSES
) -> Callable[[int], tuple[str, ...]]:
    """Return what ``outcome`` sees at each status."""
    seen: dict[int, tuple[str, ...]] = {}

    async def ask(stub: Stub) -> None:
        client = RestClient(stub.url, key=lambda: "k", agent_id=AGENT, user_agent="test")
        for status in statuses:
            seen[status] = await outcome(stub, client, status)
        await client.close()

    with Stub() as stub:
        anyio.run(ask, stub)
    return seen.__getitem__


def _store(key_of: Callable[[Kept], Key], begun: Callable[[Kept], object]) -> tuple[Kept, Key]:
    store = Kept(JOB_ID)
    store.tokens[JOB_ID] = "t"
    store.rows.clear()
    store.notes["schema:1"] = msgspec.json.encode(NAMES).decode()
    begun(store)
    return store, key_of(store)


async def _passes(made: Drain, now: list[float], done: Callable[[], bool]) -> float:
    """Let a drain go on until it is ``done``; return for how long it waited at first."""
    made.aside = (0.0, 0.0)
    made.hurry()
    made.in_doubt()
    # What is wanted of the jobs is not asked here.
    made._looked = now[0]
    first = waits = await made._pass()
    for _ in range(20):
        if done():
            break
        now[0] += waits
        made._looked = now[0]
        waits = await made._pass()
    return first


async def _append(stub: Stub, client: RestClient, status: int) -> tuple[str, ...]:
    def four(store: Kept) -> None:
        for step in range(1, 5):
            store.step(step)

    async def once(begin: Callable[[Kept], object]) -> tuple[Kept, float, str]:
        stub.fresh(hub=True)
        stub.instead["PUT /local/j1/metrics"] = refused(status, ack=2)
        store, key = _store(lambda store: store.metrics, begin)
        now = [0.0]
        with said() as lines:
            made = HubDrain(client, store, clock=lambda: now[0])
            wait = await _passes(made, now, lambda: key not in store.rows or not sum(store.backlog()))
        return store, wait, in_words(lines[0], status) if lines else ""

    store, wait, read = await once(four)
    if store.refused:
        return "no: the job is gone, and what is held of the stream is dropped", read
    if len(stub.ranges) == 1:
        return "stored: the `ack` of the answer counts", read
    assert stub.ranges[0] == (1, 4)
    if stub.ranges[1] == (3, 4):
        return "from the `ack` of the answer on", read
    if stub.ranges[1] == (1, 4):
        after = "`Retry-After` or a minute" if wait >= PAUSE else "at most 30 s"
        return f"yes, the same range, after {after}", read
    assert stub.ranges[1] == (1, 2)
    await once(lambda store: store.step(1))
    assert stub.tombs == ["", "oversize"]
    return (
        "by halves; one record alone becomes a tombstone (`oversize`), a state goes without its evidence first",
        read,
    )


def appends_table() -> str:
    """Return the table of answers to an append."""
    rows = grouped(STATUSES, asked_of_a_backend(_append))
    return table(("status", "sends again", "the user reads"), rows)


async def _claim(
    stub: Stub, client: RestClient, status: int, *, hub: bool = False, code: str = ""
) -> tuple[str, ...]:
    cells = []
    read = ""
    for lost in (False, True):
        stub.fresh(hub=hub)
        stub.instead[CLAIM] = refused(status, **({"code": code} if code else {}))
        store = Kept("none")
        if lost:
            store.notes[CLAIMING] = f'{{"id":"{JOB_ID}","config":{{}},"hub":{str(hub).lower()}}}'
        poller = Poller(client, store, interval=10.0)
        poller.others_begin = 0.0
        with said() as lines:
            try:
                await poller.once()
            except RestError as error:
                lines.append(f"poll: {error}")
            token_asked = JOBS in stub.asked
            taken = bool(store.wishes)
            if not taken:
                await poller.once()
        read = read or (in_words(lines[0], status) if status >= 300 else "")
        if taken:
            cells.append("ours; its token is asked for by the jobs route" if token_asked else "ours")
        elif store.wishes:
            cells.append("claimed again at the next poll")
        else:
            cells.append("left alone for 300 s")
    return *cells, read


def claim_table() -> str:
    """Return the table of answers to a claim."""
    rows = grouped(STATUSES, asked_of_a_backend(_claim))

    code = "ALREADY_CLAIMED"
    here, there = (
        asked_of_a_backend(partial(_claim, hub=hub, code=code), [409])(409) for hub in (True, False)
    )
    rows.append((f"409 with `code` `{code}`", *here))
    rows.append(("the same, of the hosted platform", *there))
    return table(("status", "a first claim", "one whose answer was lost", "the user reads"), rows)


HOSTED: dict[str, tuple[Callable[[Kept], Key], Callable[[Kept], object]]] = {
    PATCH: (lambda store: store.control, lambda store: store.status("completed", attempt=0)),
    METRICS: (lambda store: store.metrics, lambda store: store.step(1)),
    LOGS: (lambda store: store.lines, lambda store: store.print("line")),
    JOBS: (
        lambda store: store.control,
        lambda store: store.add(store.control, JobFacts(1e9, 1, 120, 2.5, 0, 90, 10, 4, 2, 2e-4)),
    ),
}
"""A record for each route of the platform."""


async def _hosted(
    route: str, stub: Stub, client: RestClient, status: int, *, deleted: bool = False
) -> tuple[str, ...]:
    key_of, begin = HOSTED[route]
    stub.fresh()
    more = {"persisted": False} if status == HTTPStatus.ACCEPTED else {}
    stub.instead[route] = (status, more) if status < 300 else refused(status)
    if deleted:
        stub.always = True
        stub.instead = dict.fromkeys((route, STATUS), (status, {"error": "Job not found"}))
    store, key = _store(key_of, begin)
    now = [0.0]
    with said() as lines:
        made = PlatformDrain(client, store, settle=0.0, clock=lambda: now[0])
        wait = await _passes(made, now, lambda: key not in store.rows or not sum(store.backlog()))
    read = in_words(lines[0], status) if lines else ""
    if store.refused:
        return "no: the job was deleted; what is held of it is dropped", read
    if stub.asked.count(route) == 1:
        return ("no: written to the log, and passed over" if lines else "stored"), read
    begun = stub.asked.index(route) + 1
    between = stub.asked[begun : stub.asked.index(route, begun)]
    if wait >= PAUSE:
        return "yes, after `Retry-After` or a minute", read
    if JOBS in between:
        return "yes, with a token asked for anew", read
    if any(one.startswith("GET") and one != STATUS for one in between):
        return "yes, once what is there was read back", read
    return "yes", read


def hosted_table() -> str:
    """Return the table of answers to what the hosted platform is told."""
    rows, gone = list[tuple[str, ...]](), set[tuple[str, ...]]()
    for route in HOSTED:
        name = f"`{route.replace(JOB_ID, '{id}')}`"
        rows += [(name, *row) for row in grouped(STATUSES, asked_of_a_backend(partial(_hosted, route)))]
        deleted = partial(_hosted, route, deleted=True)
        gone.add(asked_of_a_backend(deleted, [404])(404))
    assert len(gone) == 1, gone
    rows.append(("any", "404, and so at the job's status, with `job` in the sentence", *gone.pop()))
    return table(("route", "status", "sends again", "the user reads"), rows)
