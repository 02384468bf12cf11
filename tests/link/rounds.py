"""A round: two jobs run, several harms are done, and when the dust has settled both ends are compared."""

import random
import signal
from contextlib import suppress
from functools import partial

import httpx

from tests.link.harm import Harm
from tests.link.oracle import (
    Tally,
    check_curve,
    check_log,
    check_points,
    check_records,
    check_states,
    curve_hash,
    hub_curve,
    hub_log,
    log_file,
    said_curve,
)
from tests.link.stand import Stand, pause
from tests.support.programs import fake_config, wait_until

ENDLESS = 1_000_000
"""Steps: the job is told to stop."""


class Rounds:
    """Rounds on one stand, from one seed."""

    def __init__(self, stand: Stand, seed: str, *, long: bool, only: str = "") -> None:
        self.stand = stand
        self.rng = random.Random(seed)
        self.harm = Harm(stand, self.rng, long=long, only=only)
        self.tally = Tally()
        self.done = 0
        self._ended: dict[str, str] = {}
        self._retries: dict[str, int] = {}

    def round(self, harms: int) -> list[str]:
        """Do a round with so many harms; return their names."""
        hub = self.stand.hub
        self.done += 1
        step = self.rng.choice([0.004, 0.02])
        # One job fails and is begun again by a command; the other one runs all the while.
        failing = hub.submit(
            fake_config("fail_at=5 until_attempt=1 shout_every=1", steps=20, save_steps=3),
            job_id=f"failing-{self.done}",
        )
        hub.wait_state(failing, "failed")
        job = hub.submit(
            fake_config(f"step={step} shout_every=3", steps=ENDLESS, save_steps=25), job_id=f"job-{self.done}"
        )
        hub.wait_step(job, 3)
        names: list[str] = []
        retry_at = self.rng.randrange(harms)
        for number in range(harms):
            act = self.rng.choice(["", "rate", "pause"])

            def meanwhile(act: str = act, number: int = number) -> None:
                if number == retry_at:
                    hub.control(failing, "retry")
                if act == "rate":
                    self._set_rate(job)
                elif act:
                    hub.control(job, act)

            names.append(self.harm.one(job, meanwhile))
            pause(self.rng.uniform(0.0, 1.0))
            if act == "pause":
                hub.control(job, "resume")
        self._settle(job, failing)
        return names

    def _settle(self, job: str, failing: str) -> None:
        """Let the jobs end and everything arrive; compare both ends."""
        stand, hub = self.stand, self.stand.hub
        # A job that was harmed has to come back before it is told to stop, so that it is seen to come back.
        reached = max((said.step for said in stand.said(job)), default=0)
        hub.wait_step(job, reached + 5)
        hub.control(job, "stop")
        for one in (job, failing):
            hub.wait_state(one, "completed")
            self._ended[one] = "completed"
        self._retries[failing] = 1
        for one in (job, failing):
            # A state goes before the points and lines that it stands behind.
            with suppress(AssertionError):
                wait_until(partial(self._alike, one), f"{one} at the hub", within=60, every=0.3)
            check_curve(stand, one, self.tally)
            check_points(stand, one, self.tally)
            check_log(stand, one, self.tally)
        assert stand.agent.stop(signal.SIGTERM) == 0, (
            f"the agent did not leave in peace; see {stand.agent.log}"
        )
        check_records(stand, self.tally)
        check_states(stand, self.tally, self._ended, self._retries)
        self._ended, self._retries = {}, {}
        stand.agent.start()

    def _alike(self, job: str) -> bool:
        stand = self.stand
        return curve_hash(said_curve(stand, job)) == curve_hash(hub_curve(stand, job)) and log_file(
            stand, job
        ) == hub_log(stand, job)

    def _set_rate(self, job: str) -> None:
        rate = self.rng.choice([1e-3, 3e-4, 1e-4, 5e-5])
        answer = self.stand.hub.http.patch(
            f"{self.stand.hub.url}/api/training/local/{job}/update-params", json={"learning_rate": rate}
        )
        assert answer.status_code == httpx.codes.OK, answer.text


def report(rounds: Rounds, seconds: float) -> str:
    """Return what was done and what was counted."""
    counts, harm = rounds.tally.counts, rounds.harm.done
    lines = [
        f"{rounds.done} rounds in {seconds:.0f} s, {sum(harm.values())} faults: "
        + ", ".join(f"{name} {count}" for name, count in sorted(harm.items())),
        f"records made {counts['records']}, lost {counts['lost']}, doubled {counts['doubled']}, "
        f"out of order {counts['out of order']}, buried {counts['buried']}, "
        f"still to be sent {counts['still to be sent']}",
        f"points {counts['points']}, missing {counts['points missing']}; log lines {counts['lines']}, states {counts['states']}, "
        f"commands {counts['commands']}, answered again {counts['answered again']}",
    ]
    return "\n".join([*lines, *rounds.tally.wrong])
