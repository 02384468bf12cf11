"""Our own hub by REST, where no socket can be had: the socket's records, under the same numbers."""

from collections.abc import Mapping
from typing import Any, Literal

import msgspec
from loguru import logger

from agent.core.job import Job
from agent.core.outbox import lean
from agent.net.client import RestClient, RestError, Said, Unclear
from agent.net.drain import READ_BYTES, Drain, Store
from protocol.lifecycle import TERMINAL
from protocol.messages import Command, CommandKind, Desired, Lane
from protocol.rest import CLAIM, HEADER_RANGE, HEADER_STREAM, HEADER_TOMB, JOB, RECORDS
from protocol.session import Key
from protocol.worker import Parameters

ROUTES = {
    Lane.CONTROL: ("PATCH", f"{JOB}/status"),
    Lane.METRICS: ("PUT", f"{JOB}/metrics"),
    Lane.LOGS: ("POST", f"{JOB}/logs"),
}


class _Wish(msgspec.Struct):
    """What every answer to an append says."""

    desired_version: int
    want: Literal["run", "pause", "stop", "cancel"]
    parameters: Parameters = Parameters()
    checkpoint: str = ""
    reason: str = ""
    accept_changes: bool = False


async def claim_again(client: RestClient, uplink: Store, job_id: str, old: str = "") -> None:
    """Take up a job that is held here and that the hub has anew: it was submitted again, under another token.

    Nothing is done where the claim brings but the token that is ``old``. Raises RestError.
    """
    answer = await client.call("POST", CLAIM.format(job_id=job_id))
    token = str(answer.get("job_token") or "")
    if not token:
        raise Unclear(f"job {job_id}: its claim was answered without a token")
    if token == old:
        return
    logger.info("job {}: the hub has it anew; going on with its reports", job_id)
    await uplink.keep_token(job_id, token)
    if (wish := _wish_of(job_id, answer)) is not None:
        await uplink.desired(wish)
    # Whatever the job has said of itself is not there.
    await uplink.buried(Key(0, job_id, Lane.CONTROL), "trimmed")


async def token_of(client: RestClient, uplink: Store, job_id: str) -> str:
    """Return the job's token. Scrubbed at the job's end, it is given again to whom the job belongs. Raises RestError."""
    token = await uplink.token(job_id)
    if not token:
        answer = await client.call("POST", CLAIM.format(job_id=job_id))
        token = str(answer.get("job_token") or "")
        if not token:
            raise Unclear(f"job {job_id}: its claim was answered without a token")
        await uplink.keep_token(job_id, token)
    return token


async def carry_out(client: RestClient, uplink: Store, answer: Mapping[str, Any]) -> None:
    """Do what the answer to a poll commands: once by its id, and answered in the agent's own stream."""
    commands = answer.get("commands")
    for said in commands if isinstance(commands, list) else []:
        try:
            command = msgspec.convert(said, Command)
        except msgspec.ValidationError as error:
            logger.warning("a command of the backend cannot be read: {}", error)
            continue
        again = command.kind == CommandKind.RETRY and command.job_id in uplink.jobs()
        try:
            # On the socket DESIRED brings it before; data sets are fetched with it.
            if again:
                await token_of(client, uplink, command.job_id)
            await uplink.commanded(command)
            # The last word of the job's end may have been acknowledged between the two, and the token scrubbed.
            if again:
                await token_of(client, uplink, command.job_id)
        except RestError as error:
            logger.info("the token of job {} cannot be had now: {}", command.job_id, error)


class HubDrain(Drain):
    """Appends with stream and range; the answer carries the position, so that a repeat is stored once."""

    in_order = True
    _most: dict[Key, int]

    def in_doubt(self) -> None:
        self._most = {}

    async def batch(self, key: Key) -> int:
        last = self.uplink.heads().get(key)
        if last is None:
            # Gone with another stream that this pass came to before.
            return self._at.get(key, 0)
        rows = await self.uplink.read(key, 0, self._most.get(key, READ_BYTES))
        if not rows:
            return last
        try:
            token = await token_of(self.client, self.uplink, key.scope) if key.scope else ""
            try:
                return await self._next(key, token, rows)
            except Said as said:
                if not (key.scope and said.own and said.status == 401):
                    raise
                await claim_again(self.client, self.uplink, key.scope, token)
                raise
        except Said as said:
            if key.scope and (said.gone or said.body.get("code") == "ALREADY_CLAIMED"):
                logger.warning("the backend takes no more of {}: {}", key.scope, said)
                await self.uplink.dropped(key, str(said))
                return last
            raise

    async def _next(self, key: Key, token: str, rows: list[tuple[int, bytes | None]]) -> int:
        first = rows[0][0]
        good: list[bytes] = []
        for _, body in rows:
            if body is None:
                break
            good.append(body)
        if good:
            return await self._append(key, token, first, good)
        lost = next((at for at, (_, body) in enumerate(rows) if body is not None), len(rows))
        return await self._bury(key, token, first, first + lost - 1, "corrupt")

    async def _append(self, key: Key, token: str, first: int, bodies: list[bytes]) -> int:
        raw = msgspec.msgpack.encode([msgspec.Raw(body) for body in bodies])
        try:
            return await self._send(key, token, first, first + len(bodies) - 1, raw)
        except Said as said:
            if said.status != 413:
                raise
            if len(bodies) == 1:
                whole = bodies[0]
                less = lean(whole, lambda body: len(body) < len(whole)) if key.lane == Lane.CONTROL else None
                if less is None:
                    return await self._bury(key, token, first, first, "oversize")
                # The state itself must arrive; what explains it stays here.
                return await self._append(key, token, first, [less])
            # Some proxies take less than the hub: by halves to what passes.
            self._most[key] = sum(map(len, bodies)) // 2
            return first - 1

    async def _bury(self, key: Key, token: str, lo: int, hi: int, reason: str) -> int:
        at = await self._send(key, token, lo, hi, msgspec.msgpack.encode([]), reason)
        await self.uplink.buried(key, reason)
        return at

    async def _send(self, key: Key, token: str, lo: int, hi: int, raw: bytes, tomb: str = "") -> int:
        method, path = ROUTES[Lane(key.lane)] if key.scope else ("POST", RECORDS)
        headers = {HEADER_STREAM: f"{key.epoch}/{key.lane}", HEADER_RANGE: f"{lo}-{hi}"}
        if tomb:
            headers[HEADER_TOMB] = tomb
        try:
            answer = await self.client.call(
                method, path.format(job_id=key.scope), token=token, headers=headers, content=raw
            )
        except Said as said:
            have = said.body.get("ack")
            if said.status == 409 and isinstance(have, int):
                if have < lo - 1:
                    # It has lost what it had acknowledged, and here it is deleted.
                    return await self._bury(key, token, have + 1, lo - 1, "trimmed")
                return await self._acked(key, have, 0)
            if not key.scope and key.lane != Lane.CONTROL and said.status != 413:
                # Figures of the machine are the least of it: they must not fill the disk for a backend without a
                # place for them. What it says in lane 0 waits for the socket.
                return await self._acked(key, hi, 0)
            raise
        have = answer.get("ack")
        at = await self._acked(key, have if isinstance(have, int) else lo - 1, hi - lo + 1)
        if key.scope:
            await self._heed(key.scope, answer)
        return at

    async def _acked(self, key: Key, have: int, count: int) -> int:
        at = min(have, self.uplink.heads().get(key, have))
        await self.uplink.acked(key, at)
        self.sent += count
        return at

    def seen(self, job: Job) -> bool:
        return job.state not in TERMINAL

    async def look(self, job: Job) -> None:
        token = await token_of(self.client, self.uplink, job.job_id)
        path = f"{JOB}/logs".format(job_id=job.job_id)
        await self._heed(job.job_id, await self.client.call("POST", path, {"logs": []}, token=token))

    async def _heed(self, job_id: str, answer: Mapping[str, object]) -> None:
        """Act on what is wanted of the job, which every answer says."""
        job, wish = self.uplink.jobs().get(job_id), _wish_of(job_id, answer)
        if job is not None and wish is not None and wish.version > job.observed:
            await self.uplink.desired(wish)


def _wish_of(job_id: str, answer: Mapping[str, object]) -> Desired | None:
    try:
        said = msgspec.convert(answer, _Wish)
    except msgspec.ValidationError as error:
        logger.warning("job {}: what is wanted of it cannot be read: {}", job_id, error)
        return None
    return Desired(
        job_id,
        said.desired_version,
        said.want,
        None,
        said.parameters,
        said.checkpoint,
        said.reason,
        said.accept_changes,
    )
