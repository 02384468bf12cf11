"""One run, harmed once, to its end or to where it does not go on by itself."""

import random
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from protocol.failures import FailureReason
from protocol.worker import AnyEvent, Failed, Finished, Left, Metrics, Trained
from tests.chaos.attempt import Attempt
from tests.chaos.harm import BALLAST, Kind, Paces, Plan, Side
from tests.chaos.jobs import Ground, Stock

ATTEMPTS = 4
"""The agent gives up after three losses without a new checkpoint."""
DEADLINE = 120.0


@dataclass(frozen=True)
class Outcome:
    """What became of a run."""

    harmed: bool
    """Else it was at its end before its moment came."""
    resumed: bool
    same: bool
    attempts: int
    why: str = ""
    """What went wrong, and where it can be looked at; else what was damaged."""


@dataclass
class _End:
    """How an attempt ended."""

    code: int
    last: AnyEvent | None


class Arena:
    """A folder, and a small disk where one can be had."""

    def __init__(self, folder: Path, ground: Ground, disk: Path | None) -> None:
        self.folder, self.ground, self.disk = folder, ground, disk
        self._runs = 0

    def measure(self, side: Side, job: str) -> Paces:
        """Run a job untouched."""
        folder, checkpoints = self._place(small=False)
        attempt = side.begin(self.ground, job, folder, checkpoints, 1)
        steps: list[float] = []
        saves: list[float] = []
        trained = finished = 0.0
        weights, since = "", None
        while not attempt.silent:
            for event in attempt.hear(0.0005):
                now = time.monotonic()
                if isinstance(event, Metrics):
                    steps.append(now)
                elif isinstance(event, Trained):
                    trained = now
                elif isinstance(event, Finished):
                    finished, weights = now, event.weights_hash
                elif isinstance(event, Failed):
                    raise RuntimeError(f"an untouched run failed: {event.failure}")
            saving = side.saving(checkpoints)
            if saving and since is None:
                since = time.monotonic()
            elif not saving and since is not None:
                saves.append(time.monotonic() - since)
                since = None
        if attempt.end() or not weights:
            raise RuntimeError(f"an untouched run did not end; see {folder}")
        shutil.rmtree(folder)
        step = (steps[-1] - steps[0]) / (len(steps) - 1)
        return Paces(
            weights, steps[0] - attempt.began, step, statistics.median(saves or [step]), finished - trained
        )

    def run(self, side: Side, job: str, kind: Kind, paces: Paces, seed: str) -> Outcome:
        """Harm a run once and see how it goes on."""
        rng = random.Random(seed)
        for _ in range(5):
            outcome = self._run(side, job, Plan.make(kind, rng, paces))
            if outcome.harmed:
                return outcome
        return outcome

    def _run(self, side: Side, job: str, plan: Plan) -> Outcome:
        folder, checkpoints = self._place(small=plan.kind.act == "fill")
        outcome = self._attempts(side, job, plan, folder, checkpoints)
        # Ours is kept where it went wrong, to be looked at.
        if outcome.same or not outcome.harmed or isinstance(side, Stock):
            shutil.rmtree(folder)
        return outcome

    def _attempts(self, side: Side, job: str, plan: Plan, folder: Path, checkpoints: Path) -> Outcome:
        for number in range(1, ATTEMPTS + 1):
            attempt = side.begin(self.ground, job, folder, checkpoints, number)
            had_struck = plan.done
            end = self._watch(side, attempt, plan, checkpoints)
            if isinstance(end.last, Finished):
                same = end.last.weights_hash == plan.paces.weights
                return Outcome(
                    plan.done,
                    True,
                    same,
                    number,
                    plan.damaged if same else f"other weights; {plan.damaged}; {folder}",
                )
            if plan.done and not had_struck:
                # What a person would do is done here: nothing after a kill, and room made on a full disk.
                if plan.kind.act == "fill":
                    (checkpoints.parent / BALLAST).unlink()
                    if not _left_for_room(end):
                        return Outcome(True, False, False, number, f"{end.last}; {folder}")
                if plan.kind.damage is not None:
                    plan.damaged = plan.kind.damage(plan.rng, checkpoints, side.prefix)
                if plan.kind.act != "stop":
                    continue
            return Outcome(
                True, False, False, number, f"exit {end.code}, {end.last}; {plan.damaged}; {folder}"
            )
        return Outcome(True, False, False, ATTEMPTS, f"did not end; {folder}")

    def _watch(self, side: Side, attempt: Attempt, plan: Plan, checkpoints: Path) -> _End:
        last: AnyEvent | None = None
        while not attempt.silent:
            for event in attempt.hear(0.5 if plan.done else plan.patience):
                plan.heard(event, time.monotonic())
                if isinstance(event, Failed | Finished | Left):
                    last = event
            over = isinstance(last, Finished) or attempt.silent
            if not (plan.done or over) and plan.due(attempt, lambda: side.saving(checkpoints)):
                plan.strike(attempt, checkpoints)
            if time.monotonic() - attempt.began > DEADLINE:
                attempt.signal(9)
        return _End(attempt.end(), last)

    def _place(self, small: bool) -> tuple[Path, Path]:
        """Return a folder of a run's own, and where its checkpoints go."""
        self._runs += 1
        folder = self.folder / f"run-{self._runs}"
        folder.mkdir()
        if not small:
            return folder, folder / "checkpoints"
        assert self.disk is not None
        for path in self.disk.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return folder, self.disk / "checkpoints"


def _left_for_room(end: _End) -> bool:
    """Tell whether a run on a full disk said so, if it says anything; a stock script has an error and no more."""
    match end.last:
        case Left(why):
            return why == "disk_full"
        case Failed(failure):
            return failure.reason is FailureReason.DISK_FULL
        case _:
            return end.code != 0
