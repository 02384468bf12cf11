"""The hosted platform as it is: plain inserts that nobody numbers, so what is in doubt is read before it is sent again."""

import time
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import msgspec
from loguru import logger

from agent.core.job import Job
from agent.net import hosted
from agent.net.client import ANSWER_WITHIN, IN_ALL, RestClient, RestError, Said, Unclear, Unreached
from agent.net.drain import LOOK_EVERY, READ_BYTES, Drain, Store
from agent.net.hosted import Memo
from agent.net.lines import Lines
from agent.net.poll import recovered, told
from protocol.lifecycle import TERMINAL, JobState, Want
from protocol.messages import Desired, Lane
from protocol.records import JobStatus, LogChunk, Notice, ParametersApplied, Point, Schema
from protocol.rest import JOB, METRICS
from protocol.session import Key

POINTS = 500
"""Points of a batch: an insert of so many is still quick, and what is in doubt is read back in one page."""
LINES = 500
PAGE = 1000
TRIES = 5
"""Times that a write which the platform's database may never take is tried."""
KEEPALIVE = 120.0
"""Seconds without a write after which a running job is confirmed: after 300 the page calls it stale."""
SETTLE = 15.0
"""Seconds after an answer that did not come, in which the platform may still be storing what it was sent."""


class PlatformDrain(Drain):
    """Sends records as the platform's calls, and notices what is done to jobs there."""

    every: ClassVar[Mapping[int, float]] = {Lane.CONTROL: 0.0, Lane.METRICS: 2.0, Lane.LOGS: 5.0}

    def __init__(
        self,
        client: RestClient,
        uplink: Store,
        *,
        settle: float = SETTLE,
        within: float = ANSWER_WITHIN,
        clock: Callable[[], float] = time.monotonic,
        look_every: float = LOOK_EVERY,
    ) -> None:
        super().__init__(client, uplink, clock, look_every)
        self._settle = settle
        self._patience = IN_ALL * within + settle
        """Seconds after which nothing that was asked is stored any more: the answer's, and those to settle."""
        self._memos: dict[str, Memo] = {}
        self._names: dict[int, list[str]] = {}
        self._sure: set[str] = set()
        """Jobs whose last batch of points is known to be stored."""
        self._lines = Lines(client, self._append, self._settle_down, self._counted)
        self._unsettled: dict[str, float] = {}
        """Until when what was sent of a job may still be stored there."""
        self._tries: dict[tuple[str, str], int] = {}
        self._written: dict[str, float] = {}

    def in_doubt(self) -> None:
        self._sure.clear()
        self._lines.sure.clear()

    # What is remembered

    async def _memo(self, job_id: str) -> Memo:
        if job_id not in self._memos:
            text = await self.uplink.noted(f"hosted:{job_id}")
            # A job that was claimed is running there.
            memo = msgspec.json.decode(text, type=Memo) if text else Memo(status="running")
            if (left := min(memo.until - time.time(), self._patience)) > 0:
                # An earlier process had asked, and was killed or stopped before the answer.
                self._unsettled[job_id] = self.clock() + left
            self._memos[job_id] = memo
        return self._memos[job_id]

    async def _keep(self, job_id: str, memo: Memo) -> None:
        """Store what is remembered of a job beside its records."""
        await self.uplink.note({f"hosted:{job_id}": msgspec.json.encode(memo).decode()})

    def _until(self, job_id: str, least: float = 0.0) -> float:
        """Return until when what was sent may still be stored there, by the clock that a next process has too."""
        left = max(least, self._left(job_id))
        return time.time() + left if left > 0 else 0.0

    def _left(self, job_id: str) -> float:
        return self._unsettled.get(job_id, 0.0) - self.clock()

    async def _settled(self, key: Key, seq: int, memo: Memo, **notes: str) -> None:
        memo.until = self._until(key.scope)
        text = msgspec.json.encode(memo).decode()
        await self.uplink.settled(key, seq, {f"hosted:{key.scope}": text, **notes})
        self._memos[key.scope] = memo

    async def _token(self, job_id: str) -> str:
        token = await self.uplink.token(job_id)
        if not token:
            # Only for a job that is there: for any other the jobs route would make a row.
            await self._status(job_id)
            token = await recovered(self.client, job_id)
            await self.uplink.keep_token(job_id, token)
        return token

    async def _call(self, method: str, path: str, job_id: str, body: object) -> dict[str, Any]:
        """Call a route of the job's token. A token that is refused is asked for anew."""
        token, memo = await self._token(job_id), await self._memo(job_id)
        # On the disk before it is sent: who is killed before the answer must know of it.
        memo.until = self._until(job_id, self._patience)
        await self._keep(job_id, memo)
        try:
            answer = await self.client.call(method, path, body, token=token)
        except (Said, Unreached) as refused:
            if isinstance(refused, Said) and refused.status == 401:
                await self.uplink.keep_token(job_id, await recovered(self.client, job_id))
            raise
        except Unclear as error:
            self._doubt(job_id, self._settle if error.late else self._settle / 10)
            memo.until = self._until(job_id)
            await self._keep(job_id, memo)
            raise
        except BaseException:
            # Cancelled: the socket has its turn, or the agent leaves.
            self._doubt(job_id, self._patience)
            raise
        self._written[job_id] = self.clock()
        return answer

    def _doubt(self, job_id: str, seconds: float) -> None:
        self._unsettled[job_id] = max(self._unsettled.get(job_id, 0.0), self.clock() + seconds)

    async def _settle_down(self, job_id: str) -> None:
        """Raise Unreached while the platform may still be storing what nobody answered: other jobs need not wait."""
        if (left := self._left(job_id)) > 0:
            raise Unreached(f"job {job_id}: what was sent last may still be stored", left)
        self._unsettled.pop(job_id, None)

    # Records

    async def batch(self, key: Key) -> int:
        rows = await self.uplink.read(key, 0, READ_BYTES)
        if not rows:
            return self.uplink.heads().get(key, 0)
        if not key.scope:
            # The platform has no place for what concerns no job.
            await self.uplink.settled(key, rows[-1][0], {})
            return rows[-1][0]
        records = [(seq, hosted.record_of(body)) for seq, body in rows]
        if any(record is None for _, record in records):
            logger.warning("job {}: some of its records could not be read any more", key.scope)
        memo = msgspec.json.decode(msgspec.json.encode(await self._memo(key.scope)), type=Memo)
        try:
            match key.lane:
                case Lane.CONTROL:
                    return await self._control(key, records[0][0], records[0][1], memo)
                case Lane.METRICS:
                    return await self._metrics(key, records, memo)
                case _:
                    return await self._logs(key, records, memo)
        except Said as said:
            if said.gone:
                await self._status(key.scope)
            raise

    async def _metrics(self, key: Key, records: list[tuple[int, Any]], memo: Memo) -> int:
        job_id, at = key.scope, records[0][0]
        if job_id not in self._sure:
            known, left = (memo.train, memo.eval), self._left(job_id)
            await self._read_points(job_id, memo)
            # A batch is stored whole or not at all, and only one is ever in doubt: once it is seen, it is there.
            if left > 0 and (memo.train, memo.eval) == known:
                raise Unreached(f"job {job_id}: the points that were sent last may still be stored", left)
        rows: list[dict[str, Any]] = []
        for seq, record in records:
            at = seq
            if isinstance(record, Point):
                row = hosted.row_of(record, await self._schema(key, record.schema_id))
                if memo.fresh(row):
                    rows.append(row)
                    memo.holds(row)
            if len(rows) >= POINTS:
                break
        if rows:
            memo.carried = hosted.carry(rows, memo.carried)
            self._sure.discard(job_id)
            await self._call("POST", METRICS, job_id, {"job_id": job_id, "metrics": rows})
            memo.rows += len(rows)
        self._sure.add(job_id)
        await self._settled(key, at, memo)
        self.sent += len(rows)
        return at

    async def _schema(self, key: Key, schema_id: int) -> list[str]:
        if schema_id not in self._names:
            text = await self.uplink.noted(f"schema:{schema_id}")
            if text:
                self._names[schema_id] = msgspec.json.decode(text, type=list[str])
            else:
                await self._look_ahead(Key(key.epoch, key.scope, Lane.CONTROL))
        return self._names.get(schema_id, [])

    async def _look_ahead(self, key: Key) -> None:
        """Learn the names that stand in the control lane, which may be held up."""
        for _, body in await self.uplink.read(key, 0, READ_BYTES):
            if isinstance(record := hosted.record_of(body), Schema):
                self._names[record.schema_id] = record.names

    async def _read_points(self, job_id: str, memo: Memo) -> None:
        """Learn which points of ours the platform holds; only its last rows can be news."""
        offset = max(0, memo.rows - 50)
        while True:
            page = await self.client.get(f"{METRICS}?job_id={job_id}&limit={PAGE}&offset={offset}")
            rows = page.get("metrics")
            if not isinstance(rows, list):
                raise Unclear(f"job {job_id}: the backend does not say which points it holds")
            for row in rows:
                if isinstance(row, dict) and isinstance(row.get("step"), int):
                    memo.holds(row)
            offset += len(rows)
            if len(rows) < PAGE:
                break
        memo.rows = max(memo.rows, offset)

    async def _logs(self, key: Key, records: list[tuple[int, Any]], memo: Memo) -> int:
        if key.scope in self._lines.notices:
            raise Unreached(f"the log of job {key.scope} waits for a notice that is in doubt")
        at, lines = records[0][0], list[str]()
        for seq, record in records:
            at = seq
            lines += hosted.lines_of(record) if isinstance(record, LogChunk) else []
            if len(lines) >= LINES:
                break
        held = min(memo.ahead, len(lines))
        memo.ahead -= held
        await self._lines.say(key, memo, lines[held:])
        await self._settled(key, at, memo)
        self.sent += len(lines)
        return at

    async def _append(self, job_id: str, lines: list[str]) -> dict[str, Any]:
        return await self._call("POST", f"{JOB}/logs".format(job_id=job_id), job_id, {"logs": lines})

    async def _counted(self, job_id: str, total: int) -> None:
        """Keep how many lines there were before the first of ours."""
        memo = self._memos[job_id]
        memo.lines = total
        await self._keep(job_id, memo)

    # States

    async def _control(self, key: Key, seq: int, record: Any, memo: Memo) -> int:
        job_id = key.scope
        notes: dict[str, str] = {}
        match record:
            case Schema():
                self._names[record.schema_id] = record.names
                notes[f"schema:{record.schema_id}"] = msgspec.json.encode(record.names).decode()
            case JobStatus():
                await self._status_of(job_id, record, memo)
            case Notice():
                await self._lines.notice(key, memo, f"{record.level}: {record.text}")
            case ParametersApplied() if record.refused:
                await self._lines.notice(key, memo, f"warning: {record.refused}")
            case _:
                job = self.uplink.jobs().get(job_id)
                await self._tell(job_id, hosted.fields_of(record, job.values if job else None))
        await self._settled(key, seq, memo, **notes)
        self.sent += 1
        return seq

    async def _status_of(self, job_id: str, record: JobStatus, memo: Memo) -> None:
        if record.attempt and not memo.started:
            await self._tell(job_id, {"started_at": hosted.iso(record.time)})
            memo.started = True
        if record.state not in set(JobState):
            return
        state = JobState(record.state)
        word = hosted.STATUS[state]
        if word != memo.status and not self._on_its_way(job_id, word):
            if state not in TERMINAL and await self._obeyed(job_id, await self._said(job_id), memo):
                return
            await self._patch(job_id, record, word, memo)
        if fields := hosted.fields_of(record):
            await self._tell(job_id, fields)
            memo.error = True
        elif memo.error and state in (JobState.RUNNING, JobState.COMPLETED):
            await self._tell(job_id, {"error_message": None})
            memo.error = False

    def _on_its_way(self, job_id: str, word: str) -> bool:
        """Tell whether the job is about to be what it was set to there: `running` would undo that."""
        job = self.uplink.jobs().get(job_id)
        return word == "running" and job is not None and job.want in (Want.PAUSE, Want.CANCEL)

    async def _patch(self, job_id: str, record: JobStatus, word: str, memo: Memo) -> None:
        body = {"status": word}
        if word == "failed":
            body["error"] = record.failure.sentence if record.failure else record.detail or "Training failed"
        path = f"{JOB}/status".format(job_id=job_id)
        late = job_id in self._unsettled
        try:
            await self._call("PATCH", path, job_id, body)
        except Unclear as error:
            # Its table may know no such status.
            if word != "paused" or not self._give_up(job_id, word, error):
                raise
            return
        self._tries.pop((job_id, word), None)
        memo.status = word
        if late and JobState(record.state) in TERMINAL:
            # An earlier word of ours may have been carried out after this one.
            await self._settle_down(job_id)
            if await self._said(job_id) != word:
                raise Unclear(f"job {job_id}: its end was overtaken by an earlier status")

    async def _tell(self, job_id: str, fields: dict[str, Any]) -> None:
        """Write what only the jobs route can. A value that its table refuses is told apart from a bad hour by tries."""
        if not fields:
            return
        what = ", ".join(fields)
        try:
            await told(self.client, {"job_id": job_id, **fields})
        except Unclear as error:
            if not self._give_up(job_id, what, error):
                raise
        except Said as said:
            if said.status != 400:
                raise
            logger.error("job {}: the platform does not take {}: {}", job_id, what, said)
        self._tries.pop((job_id, what), None)

    def _give_up(self, job_id: str, what: str, error: RestError) -> bool:
        tries = self._tries[job_id, what] = self._tries.get((job_id, what), 0) + 1
        if tries < TRIES:
            return False
        logger.error("job {}: {} given up after {} tries: {}", job_id, what, tries, error)
        del self._tries[job_id, what]
        return True

    # What is done to jobs there

    def seen(self, job: Job) -> bool:
        return job.state not in TERMINAL

    async def look(self, job: Job) -> None:
        job_id, memo = job.job_id, await self._memo(job.job_id)
        said = await self._said(job_id)
        if await self._obeyed(job_id, said, memo):
            return
        quiet = self.clock() - self._written.setdefault(job_id, self.clock())
        swept = said in ("failed", "completed") and self._lives_as(job_id, memo.status)
        if swept:
            logger.warning("job {}: the platform calls it {}, and it lives here: saying so", job_id, said)
        if swept or (quiet >= KEEPALIVE and memo.status == "running"):
            path = f"{JOB}/status".format(job_id=job_id)
            await self._call("PATCH", path, job_id, {"status": memo.status})

    def _lives_as(self, job_id: str, word: str) -> bool:
        """Tell whether the job has not ended, and nothing is on its way that says otherwise than ``word``."""
        job = self.uplink.jobs().get(job_id)
        lives = job is not None and job.state not in TERMINAL and hosted.STATUS[job.state] == word
        return lives and not self._on_its_way(job_id, word)

    async def _said(self, job_id: str) -> str:
        return str((await self._status(job_id)).get("status") or "")

    async def _status(self, job_id: str) -> dict[str, Any]:
        """Read how the job stands there; one that is gone takes no records any more. Raises RestError."""
        try:
            return await self.client.get(f"{JOB}/status".format(job_id=job_id))
        except Said as said:
            # A proxy says that a page is not found, and a host that a deployment is not.
            if said.gone and "job" in said.error.lower():
                logger.warning("job {} is not at the platform any more; it goes on here, unreported", job_id)
                for key in [key for key in self.uplink.heads() if key.scope == job_id]:
                    await self.uplink.dropped(key, "the job was deleted there")
            raise

    async def _obeyed(self, job_id: str, said: str, memo: Memo) -> bool:
        """Do what the platform's status asks of a job; True where it asks for something."""
        job = self.uplink.jobs().get(job_id)
        want = hosted.obey(job, said, memo.status) if job is not None else None
        if job is None or want is None:
            return False
        logger.info("job {}: the platform says {}", job_id, said)
        memo.status = said
        memos = self._memos.setdefault(job_id, memo)
        memos.status = said
        await self._keep(job_id, memos)
        await self.uplink.desired(Desired(job_id, job.observed + 1, want.value))
        return True
