"""What the hub says no with: a sentence for the person who must act, and its HTTP status."""


class Refusal(Exception):
    """A request that is answered with ``status`` and a sentence."""

    def __init__(self, status: int, sentence: str, **extra: object) -> None:
        super().__init__(sentence)
        self.status = status
        self.sentence = sentence
        self.extra = extra

    def __str__(self) -> str:
        return self.sentence


class StreamRefused(Exception):
    """A stream that this agent may not append to, for good."""


class StoreFailed(Exception):
    """The database could not commit; nothing of the transaction is kept."""


class CannotStart(Exception):
    """The hub cannot run with these settings; the sentence says why."""
