"""The tables themselves: every pair has one answer, every job can end, every want ends in its state."""

from collections.abc import Iterator
from itertools import product

import pytest

from protocol.lifecycle import (
    HAS_WORKER,
    IGNORED,
    TERMINAL,
    TRANSITIONS,
    WANTS,
    IllegalTransition,
    JobState,
    Trigger,
    Want,
    advance,
    cannot,
    pursue,
)

S, T, W = JobState, Trigger, Want

DESIGN = """
queued: slot_free preparing, pause paused, cancel cancelled, fault failed | resume saved released worker_lost
preparing: worker_ready running, pause pausing, cancel cancelling, worker_lost queued, fault failed | resume saved
running: pause pausing, trained finishing, cancel cancelling, worker_lost queued, fault failed | resume saved worker_ready
pausing: released paused, worker_lost paused, trained finishing, cancel cancelling, fault failed \
| pause resume saved worker_ready
paused: resume queued, cancel cancelled, fault failed | pause saved released trained worker_ready worker_lost
cancelling: released cancelled, worker_lost cancelled, fault cancelled | *
finishing: finished completed, cancel cancelling, worker_lost queued, fault failed | pause resume saved trained
completed: | *
failed: retry queued | *
cancelled: retry queued | *
"""
"""The table as the design states it, written out a second time on purpose."""


def stated() -> Iterator[tuple[JobState, Trigger, JobState | None]]:
    for line in DESIGN.strip().splitlines():
        name, _, rest = line.partition(":")
        moves, _, late = rest.partition("|")
        state = S(name)
        moved = [move.split() for move in moves.split(",") if move.strip()]
        for trigger, to in moved:
            yield state, T(trigger), S(to)
        taken = {T(trigger) for trigger, _ in moved}
        for trigger in T:
            if trigger not in taken and ("*" in late or trigger in late.split()):
                yield state, trigger, None


def test_the_tables_are_those_of_the_design() -> None:
    moves = {(state, trigger): to for state, trigger, to in stated() if to is not None}
    late = {(state, trigger) for state, trigger, to in stated() if to is None}
    assert moves == TRANSITIONS
    assert late == set(IGNORED)


@pytest.mark.parametrize(("state", "trigger"), list(product(S, T)))
def test_every_pair_has_exactly_one_answer(state: JobState, trigger: Trigger) -> None:
    assert not ((state, trigger) in TRANSITIONS and (state, trigger) in IGNORED)
    if (state, trigger) in TRANSITIONS:
        assert advance(state, trigger) is TRANSITIONS[state, trigger]
    elif (state, trigger) in IGNORED:
        assert advance(state, trigger) is state
    else:
        with pytest.raises(IllegalTransition) as refused:
            advance(state, trigger)
        assert str(refused.value) == f"a job that is {state} cannot take {trigger}"


def reachable(
    start: JobState, table: dict[tuple[JobState, Trigger], JobState] = TRANSITIONS
) -> set[JobState]:
    seen, ahead = {start}, [start]
    while ahead:
        state = ahead.pop()
        for (origin, _), to in table.items():
            if origin is state and to not in seen:
                seen.add(to)
                ahead.append(to)
    return seen


def test_every_state_can_be_reached() -> None:
    assert reachable(S.QUEUED) == set(S)


@pytest.mark.parametrize("state", [state for state in S if state not in TERMINAL])
def test_every_live_state_can_end_in_each_way_but_what_was_decided(state: JobState) -> None:
    # A retry begins another life.
    first_life = {pair: to for pair, to in TRANSITIONS.items() if pair[1] is not T.RETRY}
    ends = reachable(state, first_life) & TERMINAL
    assert ends == ({S.CANCELLED} if state is S.CANCELLING else {S.FAILED, S.CANCELLED, S.COMPLETED})


def test_a_completed_job_stays_completed() -> None:
    assert reachable(S.COMPLETED) == {S.COMPLETED}


def test_only_a_state_that_may_have_a_worker_takes_a_workers_end_seriously() -> None:
    moved = {state for (state, trigger) in TRANSITIONS if trigger is T.WORKER_LOST}
    assert moved == HAS_WORKER


def test_every_want_has_a_word_in_every_state_and_its_trigger_is_legal() -> None:
    assert set(WANTS) == set(product(S, W))
    for (state, want), trigger in WANTS.items():
        assert pursue(state, want) is trigger
        if trigger is not None:
            assert (state, trigger) in TRANSITIONS


OF_ITS_OWN = {
    S.QUEUED: [T.SLOT_FREE],
    S.PREPARING: [T.WORKER_READY],
    S.RUNNING: [T.TRAINED],
    S.PAUSING: [T.RELEASED, T.TRAINED],
    S.CANCELLING: [T.RELEASED],
    S.FINISHING: [T.FINISHED],
}
"""What happens to a job in good health when nobody asks anything of it."""


@pytest.mark.parametrize(("start", "want"), list(product([one for one in S if one not in TERMINAL], W)))
def test_every_want_ends_in_its_state(start: JobState, want: Want) -> None:
    """Whatever happens first of what can happen, the job comes to rest where it was wanted."""
    ends: set[JobState] = set()

    def go(state: JobState, steps: int) -> None:
        assert steps < 20, f"{want} of a job that is {start} never ends"
        if (trigger := pursue(state, want)) is not None:
            go(advance(state, trigger), steps + 1)
        elif state in OF_ITS_OWN:
            for happening in OF_ITS_OWN[state]:
                go(advance(state, happening), steps + 1)
        else:
            ends.add(state)

    go(start, 0)
    late = set() if start in (S.QUEUED, S.PAUSED) else {S.COMPLETED}
    if start is S.CANCELLING:
        assert ends == {S.CANCELLED}
    elif want is W.PAUSE:
        # A job whose last step is done while it was asked to pause is as good as complete.
        assert ends <= {S.PAUSED} | late
        assert ends
    else:
        assert ends == ({S.CANCELLED} if want is W.CANCEL else {S.COMPLETED})


@pytest.mark.parametrize("happening", [T.WORKER_LOST, T.FAULT])
@pytest.mark.parametrize("want", list(W))
def test_a_want_outlives_a_lost_worker(want: Want, happening: Trigger) -> None:
    """One loss in each state: the job still ends where it was wanted, or failed by the fault."""
    for start in HAS_WORKER:
        state = advance(start, happening)
        for _ in range(20):
            trigger = pursue(state, want) or next(iter(OF_ITS_OWN.get(state, [])), None)
            if trigger is None:
                break
            state = advance(state, trigger)
        wanted = {W.PAUSE: S.PAUSED, W.CANCEL: S.CANCELLED}.get(want, S.COMPLETED)
        if start is S.CANCELLING:
            wanted = S.CANCELLED
        elif happening is T.FAULT:
            wanted = S.FAILED
        assert state is wanted


def test_what_a_terminal_state_cannot_do_is_answered_with_a_sentence() -> None:
    for state, want in product(S, W):
        sentence = cannot(state, want)
        met = (state, want) in {(S.COMPLETED, W.STOP), (S.COMPLETED, W.RUN), (S.CANCELLED, W.CANCEL)}
        assert (sentence is None) == (state not in TERMINAL or met)
    assert cannot(S.FAILED, W.RUN) == (
        "The job is failed; it cannot be resumed. Retry it to go on from its last good checkpoint."
    )
    assert cannot(S.COMPLETED, W.PAUSE) == "The job is completed; it cannot be paused."
