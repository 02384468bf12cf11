"""Whether a running trainer still makes steps: how long they usually take, and how long ago the last was heard of."""

from collections import deque
from statistics import median

from protocol.worker import AnyEvent, Failed, Finished, Left, Metrics, ParametersSet, Ready, Saved, Trained

KEPT = 32
"""Points over which the usual time of a step is taken."""
NO_STEP_YET = 12.0
"""Times the shortest limit, for a trainer of which no usual time is known: a first step may compile kernels."""
NO_SAVE_YET = 2.0
"""Times the shortest limit, for a save as long as none was seen."""
SLACK = 3.0
"""An evaluation or a save may last so many times the longest that was seen."""


class Pace:
    """One attempt's. Times are seconds of a clock that stands while the machine sleeps."""

    def __init__(self, factor: float, shortest: float) -> None:
        self._factor = factor
        self._shortest = shortest
        self._running = False
        self._since = 0.0
        self._step = 0
        self._gap = 1
        """Steps from one point to the next."""
        self._times: deque[float] = deque(maxlen=KEPT)
        self._evaluation = 0.0
        self._save = 0.0
        self._eval_rows = 0
        self._rows = 1

    def __repr__(self) -> str:
        return f"<Pace running={self._running} step={self._step} usual={self.usual}>"

    @property
    def usual(self) -> float | None:
        """Seconds that an optimizer step usually takes; None before any was seen."""
        return median(self._times) if self._times else None

    def heard(self, event: AnyEvent, now: float) -> None:
        """Take in what the trainer said."""
        match event:
            case Ready():
                self._running, self._step = True, event.start_step
                self._eval_rows = event.eval_rows
                self._rows = max(1, event.batch_size * event.gradient_accumulation_steps)
            case Trained() | Finished() | Left() | Failed():
                self._running = False
            case Metrics():
                self._point(event, now - self._since)
            case Saved():
                # ``stall`` is what training stood still for; a save in the background stops nothing.
                self._save = max(self._save, event.stall or event.seconds)
            case ParametersSet(parameters=parameters):
                self._gap = max(self._gap, parameters.logging_steps or 1)
            case _:
                pass
        self._since = now

    def alive(self, now: float) -> None:
        """Note that nothing can be heard for a reason that is not the trainer's."""
        self._since = now

    def overdue(self, now: float) -> str:
        """Return a sentence on a trainer that has not been heard of for too long; "" for all others."""
        limit = self.limit()
        silent = now - self._since
        if not self._running or silent <= limit:
            return ""
        usual = self.usual
        known = "no step has ended yet" if usual is None else f"a step usually takes {usual:.3g} s"
        return (
            f"Training stood still after step {self._step}: nothing was heard for {silent:.0f} s, and {known} "
            f"({limit:.0f} s are allowed)."
        )

    def limit(self) -> float:
        """Return how many seconds may pass between two words of the trainer."""
        usual = self.usual
        if usual is None:
            return NO_STEP_YET * self._shortest
        # Nothing is heard during an evaluation; before the first one, forward passes over all its rows are allowed for.
        unseen = usual * self._eval_rows / self._rows
        evaluation = SLACK * (self._evaluation or unseen)
        save = SLACK * self._save if self._save else NO_SAVE_YET * self._shortest
        return max(self._shortest, usual * (self._gap + self._factor) + evaluation + save)

    def _point(self, point: Metrics, seconds: float) -> None:
        steps = point.step - self._step
        evaluated = any(name.startswith("eval_") for name in point.values)
        if evaluated:
            stepping = (self.usual or 0.0) * max(0, steps)
            self._evaluation = max(self._evaluation, seconds - stepping)
        elif steps > 0:
            self._times.append(seconds / steps)
            self._gap = steps
        self._step = point.step
