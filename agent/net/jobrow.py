"""A job's row at the platform: what only its jobs route can write, and what becomes of what that does not store."""

import time
from collections.abc import Callable
from typing import Any

from loguru import logger

from agent.net import hosted
from agent.net.client import RestClient, RestError, Said, Unclear
from protocol.rest import JOBS

REFUSED_FOR = 600.0
"""Seconds for which the platform must refuse something, while it answers otherwise, before that is given up."""
APART = 60.0
"""Seconds that one refusal counts at most: longer than that nobody asked, because the network or the machine was away."""
GIVEN_UP = (
    "The platform does not store {what} of this job ({why}), so its page shows none of it; here it is known."
)


class NotStored(RestError):
    """The platform says by a word of its own that this is not stored. Its network, or a gateway, says no such thing."""

    def __init__(self, why: str, *, final: bool = False) -> None:
        super().__init__(why)
        self.final = final
        """Whether it never will be as it is."""


class Refusals:
    """How long the platform refused one thing while it answered others. Facts in; no clock, no I/O.

    A table that does not take a value is told apart from a bad hour of the whole platform by that alone: it says the
    same of both.
    """

    def __init__(self) -> None:
        self.lasted = 0.0
        self.told = False
        """Whether the user was told that it is given up. The next of its kind is given up at its first refusal."""
        self._last: float | None = None
        self._answers = 0

    def __repr__(self) -> str:
        return f"<Refusals lasted={self.lasted:g}>"

    def again(self, now: float, answers: int) -> bool:
        """Note a refusal, and tell whether that is for good; ``answers``: what else it has answered until now."""
        if self._last is not None and answers > self._answers:
            self.lasted += min(now - self._last, APART)
        self._last, self._answers = now, answers
        return self.lasted >= REFUSED_FOR


class JobRow:
    """Writes to the rows of jobs."""

    def __init__(self, client: RestClient, clock: Callable[[], float] = time.monotonic) -> None:
        self._client = client
        self._clock = clock
        self._refusals: dict[tuple[str, str], Refusals] = {}

    def __repr__(self) -> str:
        return f"<JobRow {self._refusals}>"

    async def put(self, job_id: str, fields: dict[str, Any]) -> dict[str, Any]:
        """Write fields and return the answer. Raises RestError, and NotStored where the platform itself refuses."""
        try:
            answer = await self._client.call("POST", JOBS, hosted.plain({"job_id": job_id, **fields}))
        except Said as said:
            if said.own and said.status == 400:
                raise NotStored(str(said), final=True) from None
            raise
        except Unclear as unclear:
            if unclear.own and unclear.status == 500:
                raise NotStored(str(unclear)) from None
            raise
        if answer.get("persisted") is True:
            return answer
        why = f"job {job_id}: the backend did not store what it was told"
        if answer.get("accepted") is True:
            # Its 202: "accepted", and nothing is stored.
            raise NotStored(why)
        raise Unclear(why)

    async def tell(self, job_id: str, fields: dict[str, Any]) -> str:
        """Write what must arrive. Raises RestError: try again.

        Returns "", or a sentence for the job's log: it is given up, because the platform never stores it.
        """
        what = ", ".join(fields)
        try:
            if fields:
                await self.put(job_id, fields)
        except NotStored as error:
            if not error.final and not self.refused(job_id, what, error):
                raise
            logger.error("job {}: the platform does not store {}: {}", job_id, what, error)
            refusals = self._refusals.setdefault((job_id, what), Refusals())
            if refusals.told:
                return ""
            refusals.told = True
            return GIVEN_UP.format(what=what, why=error)
        self._refusals.pop((job_id, what), None)
        return ""

    async def show(self, job_id: str, fields: dict[str, Any]) -> None:
        """Write figures that newer ones will replace: what is refused is let go. Raises RestError."""
        try:
            if fields:
                await self.put(job_id, fields)
        except NotStored as error:
            logger.info("job {}: its newest figures are not shown: {}", job_id, error)

    def refused(self, job_id: str, what: str, error: RestError) -> bool:
        """Note that the platform itself refused something of a job, and tell whether that is for good."""
        refusals = self._refusals.setdefault((job_id, what), Refusals())
        logger.info("job {}: {} is refused: {}", job_id, what, error)
        return refusals.again(self._clock(), self._client.answered)

    def forget(self, job_id: str, what: str) -> None:
        """It was taken, or is no longer to be."""
        self._refusals.pop((job_id, what), None)
