"""The hosted platform as it is: plain inserts that nobody numbers, so what is in doubt is read before it is sent again."""

import time
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from loguru import logger

from agent.core.job import Job
from agent.net import hosted, predictions
from agent.net.client import ANSWER_WITHIN, IN_ALL, RestClient, Said, Unclear
from agent.net.curve import Curve
from agent.net.drain import LOOK_EVERY, READ_BYTES, Drain, Store
from agent.net.hosted import Memo
from agent.net.jobrow import GIVEN_UP, JobRow
from agent.net.lines import Lines
from agent.net.memos import Memos
from protocol.lifecycle import TERMINAL, JobState, Want
from protocol.messages import Desired, Lane
from protocol.records import JobFacts, JobStatus, Notice, ParametersApplied, Result, Schema
from protocol.session import Key

KEEPALIVE = 120.0
"""Seconds without a write after which a running job is confirmed: after 300 the page calls it stale."""
SETTLE = 15.0
"""Seconds after an answer that did not come, in which the platform may still be storing what it was sent."""
NEWS, NEWS_AT = "hosted-news", "hosted-news-at"
"""Notes of the agent's own news that no job was there to be told with, and of the newest that was told."""
NEWS_MOST = 2000
NO_PAUSE = (
    "The platform does not store that this job is paused ({why}), so its page goes on showing it as running."
)


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
        patience = IN_ALL * within + settle
        self._memos = Memos(client, uplink, settle=settle, patience=patience, clock=clock)
        self._row = JobRow(client, clock)
        self._curve = Curve(self._memos, self._row)
        self._lines = Lines(self._memos)
        self._news: str | None = None

    def in_doubt(self) -> None:
        self._curve.in_doubt()
        self._lines.sure.clear()

    # Records

    async def batch(self, key: Key) -> int:
        rows = await self.uplink.read(key, 0, READ_BYTES)
        if not rows:
            return self.uplink.heads().get(key, 0)
        records = [(seq, hosted.record_of(body)) for seq, body in rows]
        if not key.scope:
            return await self._of_the_agent(key, records)
        if any(record is None for _, record in records):
            logger.warning("job {}: some of its records could not be read any more", key.scope)
        memo = await self._memos.draft(key.scope)
        try:
            match key.lane:
                case Lane.CONTROL:
                    return await self._control(key, records[0][0], records[0][1], memo)
                case Lane.METRICS:
                    at, count = await self._curve.send(key, records, memo)
                case _:
                    at, count = await self._lines.send(key, records, memo)
        except Said as said:
            if said.gone:
                await self._memos.status(key.scope)
            raise
        await self._memos.settled(key, at, memo)
        self.sent += count
        return at

    async def _of_the_agent(self, key: Key, records: list[tuple[int, Any]]) -> int:
        """The platform has no place for what concerns no job: warnings are told with those that live.

        What is no warning, a sleep say, is told with the jobs that it concerns where it is noticed.
        """
        at = records[-1][0]
        begun, told = f"{key.epoch}:", await self.uplink.noted(NEWS_AT)
        after = int(told.removeprefix(begun)) if told.startswith(begun) else 0
        texts = [
            record.text
            for seq, record in records
            if seq > after and isinstance(record, Notice) and record.level == "warning"
        ]
        if texts:
            news = " ".join(one for one in (await self._waiting_news(), *texts) if one)[-NEWS_MOST:]
            live = [job.job_id for job in self.uplink.jobs().values() if job.state not in TERMINAL]
            self._news = "" if live else news
            await self.uplink.announce(
                dict.fromkeys(live, news), {NEWS: self._news, NEWS_AT: f"{key.epoch}:{at}"}
            )
        await self.uplink.settled(key, at, {})
        return at

    async def _waiting_news(self) -> str:
        if self._news is None:
            self._news = await self.uplink.noted(NEWS)
        return self._news

    # States

    async def _control(self, key: Key, seq: int, record: Any, memo: Memo) -> int:
        job_id = key.scope
        notes: dict[str, str] = {}
        if news := await self._waiting_news():
            await self.uplink.announce({job_id: news}, {NEWS: ""})
            self._news = ""
        given_up = ""
        match record:
            case Schema():
                notes |= self._curve.learn(record)
            case JobStatus():
                given_up = await self._status_of(job_id, record, memo)
            case Notice():
                await self._lines.notice(key, memo, f"{record.level}: {record.text}")
            case ParametersApplied() if record.refused:
                await self._lines.notice(key, memo, f"warning: {record.refused}")
            case _:
                if isinstance(record, JobFacts):
                    memo.begun = (record.attempt, record.start_step)
                job = self.uplink.jobs().get(job_id)
                given_up = await self._row.tell(job_id, hosted.fields_of(record, job.values if job else None))
                if isinstance(record, Result):
                    given_up = await self._predict(job_id, record, int(job.epoch) if job else 0) or given_up
        if given_up:
            await self.uplink.announce({job_id: given_up}, {})
        await self._memos.settled(key, seq, memo, **notes)
        self.sent += 1
        return seq

    async def _predict(self, job_id: str, result: Result, epoch: int) -> str:
        """Send a job's samples; return what of them is given up, as a sentence."""
        what = "the samples"
        try:
            self.sent += await predictions.send(self._memos, job_id, result, epoch=epoch)
        except Unclear as error:
            if not (_refused(error) and self._row.refused(job_id, what, error)):
                raise
            logger.error("job {}: the platform does not store {}: {}", job_id, what, error)
            return GIVEN_UP.format(what=what, why=error)
        self._row.forget(job_id, what)
        return ""

    async def _status_of(self, job_id: str, record: JobStatus, memo: Memo) -> str:
        """Tell a status; return what of it is given up, as a sentence."""
        given_up = ""
        if record.attempt and not memo.started:
            given_up = await self._row.tell(job_id, {"started_at": hosted.iso(record.time)})
            memo.started = True
        if record.state not in set(JobState):
            return given_up
        state = JobState(record.state)
        word = hosted.STATUS[state]
        memo.refused = ""
        if word != memo.status and not self._on_its_way(job_id, word):
            if state not in TERMINAL and await self._obeyed(job_id, await self._memos.said(job_id), memo):
                return given_up
            await self._patch(job_id, record, word, memo)
        if fields := hosted.fields_of(record):
            given_up = await self._row.tell(job_id, fields) or given_up
            memo.error = True
        elif memo.error and state in (JobState.RUNNING, JobState.COMPLETED):
            given_up = await self._row.tell(job_id, {"error_message": None}) or given_up
            memo.error = False
        if state in TERMINAL:
            # Nobody looks at the job any more.
            await self._curve.refresh(job_id, memo, now=True)
        return given_up

    def _on_its_way(self, job_id: str, word: str) -> bool:
        """Tell whether the job is about to be what it was set to there: `running` would undo that."""
        job = self.uplink.jobs().get(job_id)
        return word == "running" and job is not None and job.want in (Want.PAUSE, Want.CANCEL)

    async def _patch(self, job_id: str, record: JobStatus, word: str, memo: Memo) -> None:
        more: dict[str, str] = {}
        if word == "failed":
            more["error"] = record.failure.sentence if record.failure else record.detail or "Training failed"
        late = self._memos.doubted(job_id)
        try:
            await self._memos.patch(job_id, word, **more)
        except Unclear as error:
            if word != "paused" or not _refused(error):
                raise
            # Its table may know no such status. What comes after this does not wait for that: see `look`.
            memo.refused = word
            return
        memo.status = word
        if late and JobState(record.state) in TERMINAL:
            # An earlier word of ours may have been carried out after this one.
            await self._memos.settle_down(job_id)
            if await self._memos.said(job_id) != word:
                raise Unclear(f"job {job_id}: its end was overtaken by an earlier status")

    # What is done to jobs there

    def seen(self, job: Job) -> bool:
        return job.state not in TERMINAL

    async def look(self, job: Job) -> None:
        job_id, memo = job.job_id, await self._memos.of(job.job_id)
        said = await self._memos.said(job_id)
        if await self._obeyed(job_id, said, memo):
            return
        if memo.owes:
            await self._curve.refresh(job_id, memo)
            await self._memos.keep(job_id, memo)
        if memo.refused:
            await self._say_again(job_id, memo)
            return
        quiet = self.clock() - self._memos.written.setdefault(job_id, self.clock())
        swept = said in ("failed", "completed") and self._lives_as(job_id, memo.status)
        if swept:
            logger.warning("job {}: the platform calls it {}, and it lives here: saying so", job_id, said)
        # A pause that could not be told yet is not contradicted.
        confirm = quiet >= KEEPALIVE and memo.status == "running" and self._lives_as(job_id, "running")
        if swept or confirm:
            await self._memos.patch(job_id, memo.status)

    async def _say_again(self, job_id: str, memo: Memo) -> None:
        """Tell a status once more that was refused, for as long as it may have been a bad hour."""
        word = memo.refused
        if self._lives_as(job_id, word):
            try:
                await self._memos.patch(job_id, word)
            except Unclear as error:
                if not _refused(error):
                    raise
                if not self._row.refused(job_id, word, error):
                    return
                logger.error("job {}: the platform does not take the status {}: {}", job_id, word, error)
                await self.uplink.announce({job_id: NO_PAUSE.format(why=error)}, {})
            else:
                memo.status = word
        memo.refused = ""
        self._row.forget(job_id, word)
        await self._memos.keep(job_id, memo)

    def _lives_as(self, job_id: str, word: str) -> bool:
        """Tell whether the job has not ended, and nothing is on its way that says otherwise than ``word``."""
        job = self.uplink.jobs().get(job_id)
        lives = job is not None and job.state not in TERMINAL and hosted.STATUS[job.state] == word
        return lives and not self._on_its_way(job_id, word)

    async def _obeyed(self, job_id: str, said: str, memo: Memo) -> bool:
        """Do what the platform's status asks of a job; True where it asks for something."""
        job = self.uplink.jobs().get(job_id)
        want = hosted.obey(job, said, memo.status) if job is not None else None
        if job is None or want is None:
            return False
        logger.info("job {}: the platform says {}", job_id, said)
        kept = await self._memos.of(job_id)
        memo.status = kept.status = said
        await self._memos.keep(job_id, kept)
        await self.uplink.desired(Desired(job_id, job.observed + 1, want.value))
        return True


def _refused(error: Unclear) -> bool:
    """Tell whether the platform itself says that it does not store what it was told, and no gateway does."""
    return error.own and error.status == 500
