"""The orders that have come and are not yet obeyed."""

from typing import Protocol

from protocol.worker import (
    AnyEvent,
    AnyOrder,
    Cancel,
    EvaluateNow,
    Parameters,
    Pause,
    SaveNow,
    SetParameters,
    Stop,
)


class Speaker(Protocol):
    """The line to the agent, as far as training needs it; see `agent.trainer.line.Line`."""

    def say(self, event: AnyEvent) -> None: ...

    def orders(self) -> list[AnyOrder]: ...

    @property
    def parent_gone(self) -> bool: ...


class Leaving(Exception):
    """The process is to end on purpose. ``why``: paused, cancelled or parent_lost."""

    def __init__(self, why: str, step: int) -> None:
        super().__init__(why, step)
        self.why = why
        self.step = step


class Inbox:
    """What is wanted of the trainer. Looked at between micro-batches; the line itself never waits."""

    def __init__(self, line: Speaker) -> None:
        self.line = line
        self.step = 0
        """Optimizer steps done, for those who leave."""
        self.pause = False
        self.stop = False
        self.lost = False
        """The agent is gone, as was seen at the last look: within one step the answer must not change."""
        self.fresh = False
        """This process is to be followed by a fresh one."""
        self.saves: list[str] = []
        self.evaluations: list[str] = []
        self.parameters: list[Parameters] = []

    def __repr__(self) -> str:
        return f"Inbox(step={self.step}, pause={self.pause}, stop={self.stop})"

    def listen(self) -> None:
        """Take in what has come. Raises Leaving at once for a cancel: nothing is kept of a cancelled step."""
        for order in self.line.orders():
            match order:
                case Cancel():
                    raise Leaving("cancelled", self.step)
                case Pause():
                    self.pause, self.stop = True, False
                case Stop():
                    self.pause, self.stop = False, True
                case SaveNow(command_id):
                    self.saves.append(command_id)
                case EvaluateNow(command_id):
                    self.evaluations.append(command_id)
                case SetParameters(parameters):
                    self.parameters.append(parameters)
                case _:  # a second Start, or Committed, which the line keeps to itself
                    pass
        self.lost = self.lost or self.line.parent_gone

    @property
    def leaving(self) -> str:
        """Why the process must save and leave, or nothing."""
        if self.lost:
            return "parent_lost"
        if self.pause:
            return "paused"
        return "fresh_process" if self.fresh else ""

    def leave_if_told(self) -> None:
        """Raise Leaving if the job is to go now; for places where there is nothing to save."""
        self.listen()
        if self.leaving:
            raise Leaving(self.leaving, self.step)

    def leave_unless_finishing(self) -> None:
        """Raise Leaving while the final model is made: a pause is too late then, a cancel is not."""
        self.listen()
        if self.lost:
            raise Leaving("parent_lost", self.step)
