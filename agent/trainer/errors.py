"""What can go wrong in a trainer, in sentences for the person who must act."""

from protocol.failures import Evidence, Failure, FailureReason, failure


class TrainerError(Exception):
    """The job cannot go on; ``str()`` says what is wrong, where, and what to do."""

    def __init__(
        self,
        reason: FailureReason,
        sentence: str,
        *,
        rows: list[int] | None = None,
        step: int | None = None,
        advice: str = "",
    ) -> None:
        super().__init__(reason, sentence)
        self.reason = reason
        self.sentence = sentence
        self.rows = rows or []
        self.step = step
        self.advice = advice
        """With this job's figures; empty: the agent makes it of what it knows of the job."""

    def __str__(self) -> str:
        return self.sentence

    def failure(self) -> Failure:
        """Return what is told to the agent."""
        evidence = (
            Evidence(rows=self.rows[:32], step=self.step) if self.rows or self.step is not None else None
        )
        return failure(self.reason, self.sentence, evidence, self.advice)
