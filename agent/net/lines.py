"""The lines of a job's log at the platform, which numbers none: each appended once, by one writer."""

from typing import Any

from agent.net import hosted
from agent.net.client import Unclear, Unreached
from agent.net.hosted import Memo
from agent.net.memos import Memos
from protocol.messages import Lane
from protocol.records import LogChunk
from protocol.rest import JOB
from protocol.session import Key

LINES = 500
"""Lines of a batch, about."""
LOG_CAP = 10_000
"""Lines that the platform keeps of a job."""
NOTICE = "[agent] "
"""Begins a line of the agent's own in a job's log."""
NOTICES = 100
"""Lines of one notice, at most."""
NO_LOGS = "Failed to connect to local training server"
"""What the platform says of a job that has no lines yet."""


class Lines:
    """Appends lines of both lanes; after an append without an answer it reads back first."""

    def __init__(self, memos: Memos) -> None:
        self._memos = memos
        self.sure: set[tuple[str, str]] = set()
        """Jobs and lanes whose last append is known to be stored."""
        self.notices: dict[str, tuple[Key, int]] = {}
        """The last notice of jobs where it is in doubt: its stream, and its number there."""

    def __repr__(self) -> str:
        return f"<Lines sure={self.sure} notices={self.notices}>"

    async def send(self, key: Key, records: list[tuple[int, Any]], memo: Memo) -> tuple[int, int]:
        """Send a batch; return up to which record, and how many lines. Raises RestError."""
        if key.scope in self.notices:
            stream, number = self.notices[key.scope]
            if await self._first(stream) == number:
                raise Unreached(f"the log of job {key.scope} waits for a notice that is in doubt")
            # It was dropped: the job was gone there for a while.
            self.notices.pop(key.scope)
        at, lines = records[0][0], list[str]()
        for seq, record in records:
            at = seq
            lines += hosted.lines_of(record) if isinstance(record, LogChunk) else []
            if len(lines) >= LINES:
                break
        held = min(memo.ahead, len(lines))
        memo.ahead -= held
        await self.say(key, memo, lines[held:])
        return at, len(lines)

    async def say(self, key: Key, memo: Memo, lines: list[str]) -> None:
        """Append lines. Lines of both lanes pass here, one request at a time: two at once would lose some."""
        job_id, known = key.scope, (key.scope, f"lines {key.lane}")
        if memo.lines < 0:
            # Kept before the first of ours is sent: somebody may have written there before.
            memo.lines = (await self._tail(job_id, 1))[0]
            kept = await self._memos.of(job_id)
            kept.lines = memo.lines
            await self._memos.keep(job_id, kept)
        elif known not in self.sure:
            await self._memos.settle_down(job_id)
            lines = lines[await self._held(key, memo, lines) :]
        if lines:
            # In doubt it would be in the way of both lanes: what one has added the other counts.
            both = {one for one in self.sure if one[0] == job_id}
            self.sure -= both
            path = f"{JOB}/logs".format(job_id=job_id)
            answer = await self._memos.call("POST", path, job_id, {"logs": lines})
            total = answer.get("total_logs")
            self.sure |= both
            memo.lines = total if isinstance(total, int) else memo.lines + len(lines)
        self.sure.add(known)

    async def notice(self, key: Key, memo: Memo, text: str) -> None:
        """Say in the job's log what the platform has no other place for."""
        self.notices[key.scope] = key, await self._first(key)
        await self.say(key, memo, [f"{NOTICE}{line}" for line in _lines(text)])
        self.notices.pop(key.scope, None)

    async def _first(self, key: Key) -> int:
        """Return the number of the first record that a stream holds, or 0."""
        rows = await self._memos.uplink.read(key, 0, 1)
        return rows[0][0] if rows else 0

    async def _tail(self, job_id: str, count: int) -> tuple[int, list[str]]:
        """Return how many lines the platform holds of a job, and the last ``count``."""
        path = f"{JOB}/logs".format(job_id=job_id)
        try:
            page = await self._memos.client.get(f"{path}?limit={count}&offset=-{count}")
        except Unclear as error:
            if NO_LOGS not in str(error):
                raise
            return 0, []
        total, lines = page.get("total_lines") or 0, page.get("logs") or []
        if not isinstance(total, int) or not isinstance(lines, list):
            raise Unclear(f"GET {path}: the answer is no page of a log")
        return total, [str(line) for line in lines]

    async def _held(self, key: Key, memo: Memo, lines: list[str]) -> int:
        """Return how many of ``lines``, the next to be sent, the platform holds already."""
        total, tail = await self._tail(key.scope, len(lines) + NOTICES)
        grown = total - memo.lines
        memo.lines = total
        if total >= LOG_CAP:
            # Old lines make room for new ones, and the count says nothing: by what stands at the end.
            if key.lane == Lane.LOGS:
                tail = [line for line in tail if not line.startswith(NOTICE)]
            most = min(len(tail), len(lines))
            return next((n for n in range(most, 0, -1) if tail[-n:] == lines[:n]), 0)
        if key.lane == Lane.LOGS:
            return grown if 0 < grown <= len(lines) and tail[-grown:] == lines[:grown] else 0
        held = len(lines) if grown >= len(lines) and tail[-len(lines) :] == lines else 0
        # What else grew is the head of the job's log.
        memo.ahead += max(0, grown - held)
        return held


def _lines(text: str) -> list[str]:
    return [line for line in text.replace("\x00", "").splitlines() if line.strip()][:NOTICES]
