"""The states of a job: the one table that agent, hub, local API and page go by."""

from enum import StrEnum


class JobState(StrEnum):
    """Where a job stands."""

    QUEUED = "queued"
    PREPARING = "preparing"
    RUNNING = "running"
    PAUSING = "pausing"
    PAUSED = "paused"
    CANCELLING = "cancelling"
    FINISHING = "finishing"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Trigger(StrEnum):
    """What can happen to a job."""

    SLOT_FREE = "slot_free"
    WORKER_READY = "worker_ready"
    PAUSE = "pause"
    RESUME = "resume"
    CANCEL = "cancel"
    SAVED = "saved"
    RELEASED = "released"
    TRAINED = "trained"
    FINISHED = "finished"
    WORKER_LOST = "worker_lost"
    FAULT = "fault"
    RETRY = "retry"


class Want(StrEnum):
    """What somebody wants of a job. A level, not an event: saying it twice changes nothing."""

    RUN = "run"
    PAUSE = "pause"
    STOP = "stop"
    """End early and keep the best."""
    CANCEL = "cancel"


class IllegalTransition(Exception):
    """A trigger that the table has no answer for: a defect of ours, never of a peer."""

    def __init__(self, state: JobState, trigger: Trigger) -> None:
        super().__init__(state, trigger)
        self.state = state
        self.trigger = trigger

    def __str__(self) -> str:
        return f"a job that is {self.state} cannot take {self.trigger}"


_S, _T, _W = JobState, Trigger, Want

TERMINAL = frozenset({_S.COMPLETED, _S.FAILED, _S.CANCELLED})
HAS_WORKER = frozenset({_S.PREPARING, _S.RUNNING, _S.PAUSING, _S.CANCELLING, _S.FINISHING})
"""States in which a trainer process may be alive and hold a device."""

TRANSITIONS: dict[tuple[JobState, Trigger], JobState] = {
    (_S.QUEUED, _T.SLOT_FREE): _S.PREPARING,
    (_S.QUEUED, _T.PAUSE): _S.PAUSED,
    (_S.QUEUED, _T.CANCEL): _S.CANCELLED,
    (_S.QUEUED, _T.FAULT): _S.FAILED,
    (_S.PREPARING, _T.WORKER_READY): _S.RUNNING,
    (_S.PREPARING, _T.PAUSE): _S.PAUSING,
    (_S.PREPARING, _T.CANCEL): _S.CANCELLING,
    (_S.PREPARING, _T.WORKER_LOST): _S.QUEUED,
    (_S.PREPARING, _T.FAULT): _S.FAILED,
    (_S.RUNNING, _T.PAUSE): _S.PAUSING,
    (_S.RUNNING, _T.TRAINED): _S.FINISHING,
    (_S.RUNNING, _T.CANCEL): _S.CANCELLING,
    (_S.RUNNING, _T.WORKER_LOST): _S.QUEUED,
    (_S.RUNNING, _T.FAULT): _S.FAILED,
    (_S.PAUSING, _T.RELEASED): _S.PAUSED,
    (_S.PAUSING, _T.WORKER_LOST): _S.PAUSED,
    (_S.PAUSING, _T.TRAINED): _S.FINISHING,
    (_S.PAUSING, _T.CANCEL): _S.CANCELLING,
    (_S.PAUSING, _T.FAULT): _S.FAILED,
    (_S.PAUSED, _T.RESUME): _S.QUEUED,
    (_S.PAUSED, _T.CANCEL): _S.CANCELLED,
    (_S.PAUSED, _T.FAULT): _S.FAILED,
    (_S.CANCELLING, _T.RELEASED): _S.CANCELLED,
    (_S.CANCELLING, _T.WORKER_LOST): _S.CANCELLED,
    (_S.CANCELLING, _T.FAULT): _S.CANCELLED,
    (_S.FINISHING, _T.FINISHED): _S.COMPLETED,
    (_S.FINISHING, _T.CANCEL): _S.CANCELLING,
    (_S.FINISHING, _T.WORKER_LOST): _S.QUEUED,
    (_S.FINISHING, _T.FAULT): _S.FAILED,
    (_S.FAILED, _T.RETRY): _S.QUEUED,
    (_S.CANCELLED, _T.RETRY): _S.QUEUED,
}

_LATE: dict[JobState, frozenset[Trigger]] = {
    _S.QUEUED: frozenset({_T.RESUME, _T.SAVED, _T.RELEASED, _T.WORKER_LOST}),
    _S.PREPARING: frozenset({_T.RESUME, _T.SAVED}),
    _S.RUNNING: frozenset({_T.RESUME, _T.SAVED, _T.WORKER_READY}),
    _S.PAUSING: frozenset({_T.PAUSE, _T.RESUME, _T.SAVED, _T.WORKER_READY}),
    _S.PAUSED: frozenset({_T.PAUSE, _T.SAVED, _T.RELEASED, _T.TRAINED, _T.WORKER_READY, _T.WORKER_LOST}),
    _S.CANCELLING: frozenset(Trigger) - {_T.RELEASED, _T.WORKER_LOST, _T.FAULT},
    _S.FINISHING: frozenset({_T.PAUSE, _T.RESUME, _T.SAVED, _T.TRAINED}),
    _S.COMPLETED: frozenset(Trigger),
    _S.FAILED: frozenset(Trigger) - {_T.RETRY},
    _S.CANCELLED: frozenset(Trigger) - {_T.RETRY},
}

IGNORED: frozenset[tuple[JobState, Trigger]] = frozenset(
    (state, trigger) for state, late in _LATE.items() for trigger in late
)
"""Late news: true once, and of no consequence now."""


def advance(state: JobState, trigger: Trigger) -> JobState:
    """Return the state after ``trigger``; the same state if it is late news.

    Raises IllegalTransition for a pair that neither table names.
    """
    if (state, trigger) in IGNORED:
        return state
    try:
        return TRANSITIONS[state, trigger]
    except KeyError:
        raise IllegalTransition(state, trigger) from None


WANTS: dict[tuple[JobState, Want], Trigger | None] = {
    (_S.QUEUED, _W.RUN): None,
    (_S.QUEUED, _W.PAUSE): _T.PAUSE,
    (_S.QUEUED, _W.STOP): None,
    (_S.QUEUED, _W.CANCEL): _T.CANCEL,
    (_S.PREPARING, _W.RUN): None,
    (_S.PREPARING, _W.PAUSE): _T.PAUSE,
    (_S.PREPARING, _W.STOP): None,
    (_S.PREPARING, _W.CANCEL): _T.CANCEL,
    (_S.RUNNING, _W.RUN): None,
    (_S.RUNNING, _W.PAUSE): _T.PAUSE,
    (_S.RUNNING, _W.STOP): None,
    (_S.RUNNING, _W.CANCEL): _T.CANCEL,
    (_S.PAUSING, _W.RUN): None,
    (_S.PAUSING, _W.PAUSE): None,
    (_S.PAUSING, _W.STOP): None,
    (_S.PAUSING, _W.CANCEL): _T.CANCEL,
    (_S.PAUSED, _W.RUN): _T.RESUME,
    (_S.PAUSED, _W.PAUSE): None,
    (_S.PAUSED, _W.STOP): _T.RESUME,
    (_S.PAUSED, _W.CANCEL): _T.CANCEL,
    (_S.CANCELLING, _W.RUN): None,
    (_S.CANCELLING, _W.PAUSE): None,
    (_S.CANCELLING, _W.STOP): None,
    (_S.CANCELLING, _W.CANCEL): None,
    (_S.FINISHING, _W.RUN): None,
    (_S.FINISHING, _W.PAUSE): None,
    (_S.FINISHING, _W.STOP): None,
    (_S.FINISHING, _W.CANCEL): _T.CANCEL,
} | {(state, want): None for state in TERMINAL for want in Want}
"""What to do now for a want; None = wait, or nothing is left to do.

`stop` is carried to the worker as an order; the worker answers with `trained`.
"""

_REACHED: dict[JobState, Want] = {_S.COMPLETED: _W.STOP, _S.CANCELLED: _W.CANCEL}


def pursue(state: JobState, want: Want) -> Trigger | None:
    """Return the trigger that brings a job nearer to ``want``, or None to wait."""
    return WANTS[state, want]


def cannot(state: JobState, want: Want) -> str | None:
    """Return the sentence that answers a want which a terminal state cannot meet, else None."""
    if state not in TERMINAL or _REACHED.get(state) is want or (state, want) == (_S.COMPLETED, _W.RUN):
        return None
    past = {_W.RUN: "resumed", _W.PAUSE: "paused", _W.STOP: "stopped", _W.CANCEL: "cancelled"}[want]
    sentence = f"The job is {state}; it cannot be {past}."
    return (
        sentence if state is _S.COMPLETED else f"{sentence} Retry it to go on from its last good checkpoint."
    )
