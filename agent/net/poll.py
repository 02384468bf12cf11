"""Jobs without a socket: the heartbeat poll, the claim, and the token of a claim whose answer was lost."""

import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import anyio
import msgspec
from loguru import logger

from agent.net import hosted
from agent.net.client import RestClient, RestError, Said, Unclear, Unreached
from agent.net.drain import Store
from agent.net.rest import carry_out, claim_again
from protocol.jobspec import JobId
from protocol.messages import SUBPROTOCOL_MSGPACK, DatasetRef, Desired, Offer
from protocol.rest import CLAIM, JOB, JOBS, POLL

SLOWEST = 30.0
"""Seconds between polls at most: after 60 the platform shows the agent as offline."""
CLAIMING = "claiming"
"""Note of the job whose claim is on its way, so that a lost answer costs no job."""
PASSED_OVER = 300.0
"""Seconds that a job which is not for this agent is not asked about again."""
OTHERS_BEGIN = 5.0
"""Seconds in which an agent that claimed a job says when it began."""
LISTED_AT_ONCE, LISTED_MOST = 100, 500
"""Waiting jobs in a page of the platform's list, and in all pages that are read of it."""
NO_CONFIG = (
    "it was lost on the way, and the platform says a job's settings no second time. Start the job again."
)
NO_JOB = (msgspec.MsgspecError, LookupError, TypeError, ValueError, OverflowError, RecursionError)
"""What comes of an offer or an answer that is not what it should be."""


def ours(answer: Mapping[str, Any]) -> bool:
    """Tell from the answer to a poll whether the backend takes records as they are on the socket."""
    return answer.get("records") == SUBPROTOCOL_MSGPACK


def is_platform(answer: Mapping[str, Any]) -> bool:
    """Tell whether this is the answer to a poll at all, and not some page."""
    return "job" in answer and "poll_interval_seconds" in answer


class Poller:
    """One agent's polls. They go on while jobs run: they are what shows it as online."""

    def __init__(
        self,
        client: RestClient,
        uplink: Store,
        *,
        interval: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._uplink = uplink
        self._interval = interval
        self._clock = clock
        self._passed: dict[str, float] = {}
        self.others_begin = OTHERS_BEGIN
        self.polls = 0

    async def headers(self) -> dict[str, str]:
        """Return what a poll says of the machine. What a poll leaves out the platform sets to null."""
        machine = await self._uplink.machine()
        said = {
            "X-Agent-Hostname": machine.hostname.encode("ascii", "replace").decode(),
            "X-Agent-Platform": machine.platform,
            "X-Agent-Version": machine.version,
        }
        return {name: value for name, value in said.items() if value}

    async def ask(self) -> dict[str, Any]:
        """Poll once. Raises RestError."""
        self.polls += 1
        return await self._client.get(POLL, await self.headers())

    async def once(self) -> float:
        """Poll, take a job if there is one and room for it; return the seconds until the next. Raises RestError."""
        await self._finish_claim()
        answer = await self.ask()
        if ours(answer):
            await carry_out(self._client, self._uplink, answer)
        offered = answer.get("job")
        if isinstance(offered, dict) and isinstance(offered.get("id"), str):
            await self._consider(offered, ours(answer))
        asked = answer.get("poll_interval_seconds")
        asked = asked if isinstance(asked, int | float) else self._interval
        return float(min(max(self._interval, asked), max(SLOWEST, self._interval)))

    async def _consider(self, offered: dict[str, Any], hub: bool) -> None:
        if hub and offered["id"] in self._uplink.jobs():
            # Also without room: it is running here, and hides all others until it is claimed.
            await self._claim_again(offered["id"])
            return
        if self._uplink.room() <= 0:
            return
        if not await self._is_free(offered, hub):
            # The platform offers the oldest job alone: one that nobody takes would hide all others for ever.
            behind = None if hub else await self._behind()
            if behind is None:
                return
            offered = behind
        await self._uplink.note({CLAIMING: msgspec.json.encode({**offered, "hub": hub}).decode()})
        await self._finish_claim(first=True)

    async def _is_free(self, row: Mapping[str, Any], hub: bool) -> bool:
        """Tell whether a waiting job may be claimed. Raises RestError."""
        job_id = row["id"]
        if job_id in self._uplink.jobs() or self._is_passed(job_id):
            return False
        try:
            msgspec.convert(job_id, JobId)
        except msgspec.ValidationError:
            # It would be part of paths and names of files.
            self._pass_over(job_id, "that is no id of a job")
            return False
        # A poll does not say when a job began, a list of jobs does.
        if not hub and "started_at" not in row and await self._in_the_cloud(job_id):
            self._pass_over(job_id, "it is a job of the cloud: it has begun already")
            return False
        return hub or row.get("started_at") is None

    async def _claim_again(self, job_id: str) -> None:
        """Take up a job that we hold and that the hub offers: it lost it, and has it anew. Raises RestError."""
        if self._is_passed(job_id):
            return
        try:
            await claim_again(self._client, self._uplink, job_id)
        except Said as said:
            if not said.own or said.status == 401:
                raise
            self._pass_over(job_id, str(said))
        # Once is enough: each time has the job say again where it stands.
        self._passed[job_id] = self._clock() + PASSED_OVER

    async def _behind(self) -> dict[str, Any] | None:
        """Return the oldest waiting job of the platform's list that may be claimed; its claim brings the config."""
        rows = list[dict[str, Any]]()
        try:
            for offset in range(0, LISTED_MOST, LISTED_AT_ONCE):
                page = await self._client.get(f"{JOBS}?status=pending&limit={LISTED_AT_ONCE}&offset={offset}")
                jobs = page.get("jobs")
                jobs = jobs if isinstance(jobs, list) else []
                rows += [row for row in jobs if isinstance(row, dict) and isinstance(row.get("id"), str)]
                if len(jobs) < LISTED_AT_ONCE:
                    break
            for row in sorted(rows, key=lambda row: str(row.get("created_at"))):
                if row.get("status") == "pending" and await self._is_free(row, hub=False):
                    return {**row, "listed": True}
        except RestError as error:
            # The poll itself was answered: the agent is seen, and the next one looks again.
            logger.warning("the jobs behind one that is passed over cannot be seen: {}", error)
        return None

    async def _in_the_cloud(self, job_id: str) -> bool:
        """Jobs of rented machines wait in the same table, told from ours only by a time at which they began."""
        stands = await self._client.get(f"{JOB}/status".format(job_id=job_id))
        return stands.get("started_at") is not None

    def _pass_over(self, job_id: str, why: str) -> None:
        logger.info("job {!r} is not claimed: {}", job_id, why)
        self._passed[job_id] = self._clock() + PASSED_OVER

    def _is_passed(self, job_id: str) -> bool:
        return self._clock() < self._passed.get(job_id, 0.0)

    async def _finish_claim(self, first: bool = False) -> None:
        """Claim the noted job, if there is one. A second try means that the answer to the first was lost."""
        kept = await self._uplink.noted(CLAIMING)
        if not kept:
            return
        offered = msgspec.json.decode(kept, type=dict[str, Any])
        job_id = str(offered["id"])
        if job_id not in self._uplink.jobs() and not self._is_passed(job_id):
            answer = await self._claim(offered, first)
            if answer is not None:
                await self._take(offered, answer)
        await self._uplink.note({CLAIMING: ""})

    async def _claim(self, offered: Mapping[str, Any], first: bool) -> dict[str, Any] | None:
        """Return the answer, with the job's token, or None where the job is another's. Raises RestError."""
        job_id = str(offered["id"])
        try:
            answer = await self._client.call(
                "POST", CLAIM.format(job_id=job_id), headers=await self.headers()
            )
        except Said as said:
            # A hub answers the same agent again; the platform says this of whoever has it.
            unknown = said.body.get("code") == "ALREADY_CLAIMED" and not first and not offered.get("hub")
            if unknown and not await self._begun_elsewhere(job_id):
                logger.info("job {}: the answer to its claim was lost; asking for its token", job_id)
                answer = {}
            elif first or unknown or (said.own and said.status != 401):
                self._pass_over(job_id, str(said))
                return None
            else:
                raise
        except Unreached:
            if first:
                # Surely not claimed, and by then somebody else may have it.
                await self._uplink.note({CLAIMING: ""})
            raise
        if not answer.get("job_token"):
            answer = {**answer, "job_token": await recovered(self._client, job_id)}
        return answer

    async def _begun_elsewhere(self, job_id: str) -> bool:
        """Tell whether a job is another agent's: nothing says who claimed it, and only that agent begins it."""
        await anyio.sleep(self.others_begin)
        stands = await self._client.get(f"{JOB}/status".format(job_id=job_id))
        ended = stands.get("status") in ("completed", "failed", "cancelled")
        return bool(ended or stands.get("started_at") or stands.get("current_step"))

    async def _take(self, offered: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
        job_id = str(offered["id"])
        try:
            row = {**offered, **(answer.get("job") or {}), "id": job_id}
            if offered.get("listed") and "config" not in row:
                raise LookupError(NO_CONFIG)
            await self._uplink.desired(wish_of(row, answer))
        except NO_JOB as error:
            # It is ours by now, and nobody else will say what became of it.
            why = f"The backend's answer to this job's claim cannot be read: {error}"
            self._pass_over(job_id, why)
            with suppress(RestError):
                # The page shows this column, and never what stands beside a status.
                await told(self._client, {"job_id": job_id, "error_message": why})
            with suppress(RestError):
                path, body = f"{JOB}/status".format(job_id=job_id), {"status": "failed", "error": why}
                await self._client.call("PATCH", path, body, token=str(answer["job_token"]))
            return
        logger.info("claimed job {}", job_id)


def wish_of(offered: Mapping[str, Any], answer: Mapping[str, Any]) -> Desired:
    """Return what a claimed job is as the socket would bring it. Raises one of `NO_JOB`."""
    config = offered.get("config")
    dataset = answer.get("dataset")
    offer = Offer(
        msgspec.json.encode(config if isinstance(config, dict) else {}).decode(),
        str(offered.get("dataset_path") or ""),
        str(answer["job_token"]),
        msgspec.convert(dataset, DatasetRef) if dataset else None,
        hosted.name_of(offered)[:200],
    )
    version = answer.get("desired_version")
    want = answer.get("want")
    return Desired(
        str(offered["id"]),
        version if isinstance(version, int) and 0 <= version < 1 << 53 else 1,
        want if want in ("run", "pause", "stop", "cancel") else "run",
        offer,
    )


async def recovered(client: RestClient, job_id: str) -> str:
    """Return the token of a job that is ours, by the jobs route; a row without one is given one.

    Only for a job that is known to be there: for any other the route would make a row. Raises RestError.
    """
    row = await told(client, {"job_id": job_id})
    if row.get("job_token"):
        return str(row["job_token"])
    fresh = secrets.token_urlsafe(32)
    await told(client, {"job_id": job_id, "job_token": fresh})
    return fresh


async def told(client: RestClient, fields: dict[str, Any]) -> dict[str, Any]:
    """Write to the jobs route; its 202 says "accepted" and means that nothing is stored. Raises RestError."""
    row = await client.call("POST", JOBS, fields)
    if row.get("persisted") is not True:
        raise Unclear(f"job {fields['job_id']}: the backend did not store what it was told")
    return row
