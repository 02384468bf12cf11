"""What is remembered of jobs at the platform, and the calls of their tokens: what may be in doubt is on the disk first."""

import time
from collections.abc import Callable
from typing import Any

import msgspec
from loguru import logger

from agent.net import hosted
from agent.net.client import RestClient, Said, Unclear, Unreached
from agent.net.drain import Store
from agent.net.hosted import Memo
from agent.net.poll import recovered
from protocol.rest import JOB
from protocol.session import Key


class Memos:
    """The memos of all jobs. One request at a time goes through `call`."""

    def __init__(
        self,
        client: RestClient,
        uplink: Store,
        *,
        settle: float,
        patience: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.client = client
        self.uplink = uplink
        self.clock = clock
        self._settle = settle
        self._patience = patience
        """Seconds after which nothing that was asked is stored any more: the answer's, and those to settle."""
        self._memos: dict[str, Memo] = {}
        self._unsettled: dict[str, float] = {}
        """Until when what was sent of a job may still be stored there."""
        self.written: dict[str, float] = {}
        """When something of a job was last written there."""

    def __repr__(self) -> str:
        return f"<Memos {self._memos}>"

    # What is remembered

    async def of(self, job_id: str) -> Memo:
        """Return the memo of a job as it is kept."""
        if job_id not in self._memos:
            text = await self.uplink.noted(f"hosted:{job_id}")
            # A job that was claimed is running there.
            memo = msgspec.json.decode(text, type=Memo) if text else Memo(status="running")
            if (left := min(memo.until - time.time(), self._patience)) > 0:
                # An earlier process had asked, and was killed or stopped before the answer.
                self._unsettled[job_id] = self.clock() + left
            self._memos[job_id] = memo
        return self._memos[job_id]

    async def draft(self, job_id: str) -> Memo:
        """Return a copy, which counts once it is settled."""
        return msgspec.json.decode(msgspec.json.encode(await self.of(job_id)), type=Memo)

    async def keep(self, job_id: str, memo: Memo) -> None:
        """Store what is remembered of a job beside its records."""
        await self.uplink.note(self.note(job_id, memo))

    def note(self, job_id: str, memo: Memo) -> dict[str, str]:
        """Return a memo as a note of the journal."""
        return {f"hosted:{job_id}": msgspec.json.encode(memo).decode()}

    async def settled(self, key: Key, seq: int, memo: Memo, **notes: str) -> None:
        """Take the records up to ``seq`` for delivered, and a draft for what is remembered."""
        memo.until = self._until(key.scope)
        await self.uplink.settled(key, seq, self.note(key.scope, memo) | notes)
        self._memos[key.scope] = memo

    # What is in doubt

    def left(self, job_id: str) -> float:
        """Return for how many seconds what was sent of a job may still be stored there."""
        return self._unsettled.get(job_id, 0.0) - self.clock()

    def doubted(self, job_id: str) -> bool:
        """Tell whether something that was sent of a job was not answered, and not waited for yet."""
        return job_id in self._unsettled

    async def settle_down(self, job_id: str) -> None:
        """Raise Unreached while the platform may still be storing what nobody answered: other jobs need not wait."""
        if (left := self.left(job_id)) > 0:
            raise Unreached(f"job {job_id}: what was sent last may still be stored", left)
        self._unsettled.pop(job_id, None)

    def _until(self, job_id: str, least: float = 0.0) -> float:
        """Return until when what was sent may still be stored there, by the clock that a next process has too."""
        left = max(least, self.left(job_id))
        return time.time() + left if left > 0 else 0.0

    def _doubt(self, job_id: str, seconds: float) -> None:
        self._unsettled[job_id] = max(self._unsettled.get(job_id, 0.0), self.clock() + seconds)

    # Calls

    async def call(self, method: str, path: str, job_id: str, body: object) -> dict[str, Any]:
        """Call a route of the job's token. A token that is refused is asked for anew. Raises RestError."""
        token, memo = await self._token(job_id), await self.of(job_id)
        # On the disk before it is sent: who is killed before the answer must know of it.
        memo.until = self._until(job_id, self._patience)
        await self.keep(job_id, memo)
        try:
            answer = await self.client.call(method, path, hosted.plain(body), token=token)
        except (Said, Unreached) as refused:
            if isinstance(refused, Said) and refused.status == 401:
                await self.uplink.keep_token(job_id, await recovered(self.client, job_id))
            raise
        except Unclear as error:
            self._doubt(job_id, self._settle if error.late else self._settle / 10)
            memo.until = self._until(job_id)
            await self.keep(job_id, memo)
            raise
        except BaseException:
            # Cancelled: the socket has its turn, or the agent leaves.
            self._doubt(job_id, self._patience)
            raise
        self.written[job_id] = self.clock()
        return answer

    async def _token(self, job_id: str) -> str:
        token = await self.uplink.token(job_id)
        if not token:
            # Only for a job that is there: for any other the jobs route would make a row.
            await self.status(job_id)
            token = await recovered(self.client, job_id)
            await self.uplink.keep_token(job_id, token)
        return token

    async def patch(self, job_id: str, status: str, **more: str) -> None:
        """Set the job's status there. Raises RestError."""
        path = f"{JOB}/status".format(job_id=job_id)
        await self.call("PATCH", path, job_id, {"status": status, **more})

    async def said(self, job_id: str) -> str:
        """Return the job's status there. Raises RestError."""
        return str((await self.status(job_id)).get("status") or "")

    async def status(self, job_id: str) -> dict[str, Any]:
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
