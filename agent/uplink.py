"""Between the link and the desk: records out of the journal, wishes and commands into the desk."""

import time
from collections.abc import Awaitable, Callable, Mapping

import anyio
import msgspec
from loguru import logger

from agent.core.control import desire, offered, order_for, retried
from agent.core.job import Job, note, status
from agent.desk import JobDesk
from agent.errors import NotPossible, UnknownJob
from agent.ledger import Batch
from agent.runtime.journal import JournalFull, Tx
from protocol.codec import decode_record, encode_record
from protocol.failures import FailureReason, failure
from protocol.fields import Values
from protocol.jobspec import BadSpec, JobId
from protocol.lifecycle import TERMINAL, JobState, Want
from protocol.messages import Command, CommandKind, Desired, Hello, JobSeen, Lane, Machine, StreamHead
from protocol.records import AnyRecord, CommandDone, Notice, Snapshot
from protocol.session import Key

READ_RECORDS = 2048
REFUSED = (
    "The backend takes no more reports of this job ({reason}), so from here on none are kept for it; curve, log, "
    "checkpoints and model stay on this machine. If the job was deleted there, cancel it here. If the backend came back "
    "from a backup, submit it there again under the same id."
)
SNAPSHOT_BEHIND = 64
"""Points not acknowledged beyond which a snapshot goes first after a reconnect."""


class JournalUplink:
    """Implements `agent.core.ports.Uplink` on the journal and the desk."""

    def __init__(
        self,
        desk: JobDesk,
        *,
        agent_id: str,
        install_id: str,
        boot: int,
        machine: Callable[[], Awaitable[Machine]],
        send_log: Callable[[str, int], Awaitable[None]],
        keep_secret: Callable[[str], None],
        at_once: int = 1,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._desk = desk
        self._agent_id = agent_id
        self._install_id = install_id
        self._boot = boot
        self._machine = machine
        self._send_log = send_log
        self._keep_secret = keep_secret
        self._at_once = at_once
        self.before_hello: Callable[[], Awaitable[None]] = _at_once_ready
        """Waits until nobody else sends these records; the socket takes them over with HELLO."""
        self._clock = clock
        self._dials = 0
        self._ahead = 0.0
        """Seconds by which the backend's clock is ahead of ours."""
        self._connected = False
        self._refused: set[Key] = set()
        """Streams refused on this connection; what is added to them goes with the next acknowledgement."""
        self._told: set[str] = set()
        self._repeated: dict[str, tuple[Key, int]] = {}
        """The record with which the state of each job was last said again."""
        self._said_again: dict[str, str] = {}
        """Tokens of jobs that have ended, for the retry that may follow: in the journal they are scrubbed."""

    async def hello(self) -> Hello:
        await self.before_hello()
        self._dials += 1
        streams = await self._desk.ledger.journal.read(lambda rows: rows.streams())
        heads = [
            StreamHead(sid, stream.epoch, stream.scope, stream.lane, stream.first, stream.last)
            for sid, stream in enumerate(streams, start=1)
        ]
        jobs = [
            JobSeen(job.job_id, job.attempt, job.state, job.observed)
            for job in self._desk.jobs.values()
            if job.from_backend and job.state not in TERMINAL
        ]
        box, epoch = await self._machine(), self._desk.ledger.epoch
        self._connected = True
        return Hello(self._agent_id, self._install_id, self._boot, self._dials, epoch, box, heads, jobs)

    def ended(self) -> None:
        self._connected = False
        # Who takes over asks anew: what was refused here may be taken there.
        self._refused.clear()

    async def outrun(self, boot: int, attempt: int) -> None:
        if (boot, attempt) <= (self._boot, self._dials):
            return
        logger.warning(
            "start {} of this agent is known to the backend and this is start {}: its disk was restored from an older "
            "image; counting on from there",
            boot,
            self._boot,
        )
        self._boot, self._dials = boot + 1, 0
        await self._desk.ledger.journal.write(lambda tx: tx.set_meta("boot", str(boot + 1)))

    async def read(self, key: Key, after: int, max_bytes: int) -> list[tuple[int, bytes | None]]:
        return await self._desk.ledger.journal.read(
            lambda rows: rows.records(key.epoch, key.scope, key.lane, after, READ_RECORDS, max_bytes)
        )

    def heads(self) -> Mapping[Key, int]:
        return self._desk.ledger.heads

    def backlog(self) -> list[int]:
        return [self._desk.ledger.backlog[lane][0] for lane in Lane]

    async def acked(self, key: Key, seq: int) -> None:
        await self._trim(key, seq)

    async def dropped(self, key: Key, reason: str) -> None:
        if self._connected:
            # By REST each append is answered for itself.
            self._refused.add(key)
        await self._trim(key, self._desk.ledger.heads.get(key, 0), gone=True)
        if not key.scope or key.scope in self._told:
            return
        self._told.add(key.scope)
        try:
            await self._desk.transact(lambda batch: self._tell_refused(batch, key.scope, reason))
        except JournalFull as error:
            logger.warning("job {}: {}", key.scope, error)

    def _tell_refused(self, batch: Batch, job_id: str, reason: str) -> None:
        """Have the owner read it with the job, and the backend's user with the agent."""
        now, sentence = self._clock(), REFUSED.format(reason=reason)
        told = Notice(now, "warning", f"Job {job_id}: {sentence}")
        self._desk.ledger.append(batch, "", Lane.CONTROL, told)
        if (job := self._desk.jobs.get(job_id)) is not None:
            self._desk.take(batch, (note(job, "warning", sentence, now=now)[0], []))

    async def buried(self, key: Key, reason: str) -> None:
        # What is too large for the backend would be so again.
        if key.lane != Lane.CONTROL or reason == "oversize":
            return
        try:
            # A schema may have been among what it will never have, and points without names are worth little.
            again: list[AnyRecord] = [*await self._desk.ledger.schemas(key.scope)]
            if (job := self._desk.jobs.get(key.scope)) is not None:
                # Where it stands may have been among it, too.
                again.append(status(job, self._clock()))
            await self._desk.append(key.scope, Lane.CONTROL, again)
        except JournalFull as error:
            logger.warning("what was lost of job {} cannot be said again: {}", key.scope, error)

    async def _trim(
        self, key: Key, seq: int, notes: Mapping[str, str] | None = None, *, gone: bool = False
    ) -> None:
        if seq and not gone:
            # It takes them after all.
            self._refused.discard(key)
        job = self._desk.jobs.get(key.scope)
        # A job that has ended may have printed what is not even in the journal yet.
        open_ = key.scope in self._desk.held or key.scope in self._desk.ledger.open_logs
        ended = job is not None and job.state in TERMINAL and not open_

        ledger = self._desk.ledger
        upto = {key: seq} | {one: ledger.heads[one] for one in self._refused if one in ledger.heads}
        lost = {*self._refused, key} if gone else self._refused.copy()
        await ledger.trim(upto, gone=lost, notes=notes, ended=[key.scope] if ended else [])

    # What the REST side asks beyond that; see `agent.net.drain.Store`

    def jobs(self) -> Mapping[str, Job]:
        return {job_id: job for job_id, job in self._desk.jobs.items() if job.from_backend}

    def room(self) -> int:
        if self._desk.draining:
            return 0
        idle = (*TERMINAL, JobState.PAUSED)
        return self._at_once - sum(job.state not in idle for job in self._desk.jobs.values())

    async def machine(self) -> Machine:
        return await self._machine()

    async def token(self, job_id: str) -> str:
        found = await self._desk.ledger.journal.read(lambda rows: rows.get_secret(job_id, "job_token"))
        return found or ""

    async def keep_token(self, job_id: str, token: str) -> None:
        self._keep_secret(token)
        job = self._desk.jobs.get(job_id)
        if job is not None and job.state in TERMINAL:
            self._said_again[job_id] = token
        await self._desk.ledger.journal.write(lambda tx: tx.put_secret(job_id, "job_token", token))

    async def noted(self, name: str) -> str:
        return await self._desk.ledger.journal.read(lambda rows: rows.get_meta(f"rest:{name}")) or ""

    async def note(self, notes: Mapping[str, str]) -> None:
        def keep(tx: Tx) -> None:
            for name, value in notes.items():
                tx.set_meta(f"rest:{name}", value)

        await self._desk.ledger.journal.write(keep)

    async def settled(self, key: Key, seq: int, notes: Mapping[str, str]) -> None:
        await self._trim(key, seq, {f"rest:{name}": value for name, value in notes.items()})

    async def announce(self, told: Mapping[str, str], notes: Mapping[str, str], *, warn: bool = True) -> None:
        now = self._clock()

        def append(batch: Batch) -> None:
            for job_id, text in told.items():
                attempt = self._desk.jobs[job_id].attempt if job_id in self._desk.jobs else 0
                notice = Notice(now, "warning" if warn else "info", text, attempt)
                self._desk.ledger.append(batch, job_id, Lane.CONTROL, notice)

        def keep(tx: Tx) -> None:
            for name, value in notes.items():
                tx.set_meta(f"rest:{name}", value)

        await self._desk.transact(append, also=keep)

    async def welcomed(self, server_time: float) -> None:
        self._ahead = server_time - self._clock() if server_time else 0.0
        if self._desk.ledger.backlog[Lane.METRICS][0] < SNAPSHOT_BEHIND:
            return
        streams = await self._desk.ledger.journal.read(lambda rows: rows.streams())
        behind = {one.scope for one in streams if one.lane == Lane.METRICS and one.first <= one.last}
        for job in list(self._desk.jobs.values()):
            # Also of one that has ended meanwhile: its history may take a while.
            if job.from_backend and job.job_id in behind:
                values: Values = {**job.values}
                snapshot = Snapshot(self._clock(), job.attempt, job.state, job.step, job.epoch, values)
                await self._desk.append(job.job_id, Lane.CONTROL, [snapshot])

    async def desired(self, message: Desired) -> None:
        try:
            msgspec.convert(message.job_id, JobId)
        except msgspec.ValidationError:
            # It names files and folders. Not even refused: a refusal is a job under that id.
            logger.warning(
                "the backend offers a job {!r}, which cannot be a job id, so it is ignored: letters, digits, "
                '"_", "." and "-" only, the first a letter or digit, 128 at most',
                message.job_id[:80],
            )
            return
        now = self._clock()
        self._refused = {key for key in self._refused if key.scope != message.job_id}
        self._told.discard(message.job_id)
        if message.job_id in self._desk.jobs:
            await self._keep_token(message)
            job = self._desk.job(message.job_id)
            if message.version < job.observed or (job.state in TERMINAL and message.version == job.observed):
                # Of a live job only a backend that comes from a backup says that; of an ended one whoever lost its end.
                await self._say_again(job)
            try:
                await self._desk.change(message.job_id, lambda job: desire(job, message, now=now))
            except NotPossible as error:
                logger.warning("job {}: {}", message.job_id, error)
            return
        if message.offer is None:
            logger.warning(
                "job {}: {} is wanted of it, and it was never offered", message.job_id, message.want
            )
            return
        if message.want == "cancel":
            await self._refuse(message, JobState.CANCELLED, "")
            return
        try:
            job = offered(message, order=self._desk.next_order(), now=now)
        except BadSpec as error:
            await self._refuse(message, JobState.FAILED, str(error))
            return
        if message.offer.job_token:
            self._keep_secret(message.offer.job_token)
        secrets = {"job_token": message.offer.job_token} if message.offer.job_token else {}
        logger.info("took job {} ({})", job.job_id, job.name)
        await self._desk.add(job, secrets=secrets)
        await self._desk.change(job.job_id, lambda job: desire(job, message, now=now))

    async def _say_again(self, job: Job) -> None:
        """Say where a job of the backend's stands, unless it was and is on its way: what asks may ask for ever."""
        ledger = self._desk.ledger
        before = self._repeated.get(job.job_id)
        if not job.from_backend or (before is not None and await ledger.on_its_way(*before)):
            return
        await self._desk.append(job.job_id, Lane.CONTROL, [status(job, self._clock())])
        key = Key(ledger.epoch, job.job_id, Lane.CONTROL)
        self._repeated[job.job_id] = key, ledger.heads.get(key, 0)

    async def _keep_token(self, message: Desired) -> None:
        """Take the token again for a job whose token was scrubbed at its end and that is to go on."""
        token = message.offer.job_token if message.offer else ""
        job = self._desk.job(message.job_id)
        if token and (job.state not in TERMINAL or message.want == "run"):
            # Also for one that has ended: a retry follows, and it may have to fetch its data.
            await self.keep_token(job.job_id, token)

    async def _refuse(self, message: Desired, state: JobState, sentence: str) -> None:
        """Answer an offer that never becomes a job here."""
        assert message.offer is not None
        token = message.offer.job_token
        if token:
            # Where only REST works, the refusal itself needs it.
            self._keep_secret(token)
        job = Job(
            job_id=message.job_id,
            config=message.offer.config,
            name=message.offer.name,
            order=self._desk.next_order(),
            from_backend=True,
            created_at=self._clock(),
            completed_at=self._clock(),
            state=state,
            want=Want.CANCEL if state is JobState.CANCELLED else Want.RUN,
            observed=message.version,
            by="agent" if sentence else "user",
            detail=sentence,
            failure=failure(FailureReason.SPEC, sentence) if sentence else None,
        )
        await self._desk.add(job, secrets={"job_token": token} if token else {})

    async def commanded(self, message: Command) -> None:
        # Begun is done, or nobody could tell whether it was: a connection that breaks must not fall between.
        with anyio.CancelScope(shield=True):
            await self._command(message)

    async def _command(self, message: Command) -> None:
        known = await self._desk.ledger.journal.write(lambda tx: tx.command_begin(message.command_id))
        if known is not None:
            # Begun before: the answer was lost, or a crash fell between and nobody knows.
            unknown = CommandDone(self._clock(), message.command_id, "unknown")
            answer = decode_record(known) if known else unknown
            if isinstance(answer, CommandDone):
                await self._desk.append("", Lane.CONTROL, [answer])
            return
        now = self._clock()
        if message.not_after and now + self._ahead > message.not_after:
            done = CommandDone(now, message.command_id, "expired", "It arrived after its time.")
        else:
            done = await self._carry_out(message, now)
        body = encode_record(done)
        await self._desk.ledger.journal.write(lambda tx: tx.command_end(message.command_id, body))
        await self._desk.append("", Lane.CONTROL, [done])

    async def _carry_out(self, message: Command, now: float) -> CommandDone:
        try:
            kind = CommandKind(message.kind)
        except ValueError:
            why = f'This agent does not know "{message.kind}".'
            return CommandDone(now, message.command_id, "refused", why)
        try:
            if (job := self._desk.jobs.get(message.job_id)) is not None and not job.from_backend:
                raise NotPossible(f"Job {job.job_id} was given to this agent by its owner.")
            if kind is CommandKind.RETRY:
                checkpoint = str(message.args.get("checkpoint", ""))
                accept = bool(message.args.get("accept_changes", 0))
                await self._desk.change(
                    message.job_id,
                    lambda job: retried(
                        job, by="user", now=now, checkpoint=checkpoint, accept_changes=accept
                    ),
                    also=self._with_token(message.job_id),
                )
            elif kind is CommandKind.SEND_LOG:
                offset = int(message.args.get("offset", 0))
                if offset < 0:
                    raise NotPossible(f"A log begins at offset 0; {offset} is before it.")
                await self._send_log(message.job_id, offset)
            else:
                await self._desk.change(
                    message.job_id, lambda job: (job, [order_for(kind, message.command_id, job)])
                )
        except (NotPossible, UnknownJob, ValueError, OverflowError) as error:
            return CommandDone(now, message.command_id, "refused", str(error))
        except OSError as error:
            why = f"The job's log cannot be read: {error.strerror}."
            return CommandDone(now, message.command_id, "refused", why)
        return CommandDone(now, message.command_id, "done")

    def _with_token(self, job_id: str) -> Callable[[Tx], None]:
        """Return what gives a job its token back in the transaction that retries it.

        What arrives between DESIRED and the command has the token that came with DESIRED scrubbed.
        """
        token = self._said_again.pop(job_id, "")

        def keep(tx: Tx) -> None:
            if token:
                tx.put_secret(job_id, "job_token", token)

        return keep


async def _at_once_ready() -> None:
    """Stand in where the socket is the only way."""
