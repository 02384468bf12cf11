"""One job: what each trigger makes of it, and what it asks the shell to do."""

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.core.effects import Ask, Effect, EndWorker, Report, StartWorker
from agent.core.job import (
    CANCEL_GRACE,
    FAULT_GRACE,
    LOSSES_ALLOWED,
    Job,
    hold,
    lost,
    react,
    report,
    settle,
    status,
    step,
    unhold,
)
from protocol.failures import FailureReason, failure
from protocol.lifecycle import HAS_WORKER, TERMINAL, IllegalTransition, JobState, Trigger, Want
from protocol.records import JobStatus
from protocol.worker import Cancel, Pause, Stop
from tests.core.simulation import World

S, T, W = JobState, Trigger, Want
FAULT = failure(FailureReason.DATA, "Row 57 has no text.")


def job(state: JobState = S.RUNNING, **fields: Any) -> Job:
    return Job(job_id="j", config="{}", state=state, attempt=fields.pop("attempt", 1), **fields)


def asked(effects: list[Effect]) -> list[Effect]:
    """The effects that are not reports."""
    return [effect for effect in effects if not isinstance(effect, Report)]


def told(effects: list[Effect]) -> list[JobStatus]:
    return [
        effect.record
        for effect in effects
        if isinstance(effect, Report) and isinstance(effect.record, JobStatus)
    ]


# The whole, from seeds


@given(st.integers(0, 2**32))
@settings(max_examples=250, deadline=None, database=None)
def test_whatever_happens_a_job_comes_to_rest_where_it_was_wanted(seed: int) -> None:
    world = World(seed)
    world.run(150)
    ends = {
        W.RUN: {S.COMPLETED},
        W.STOP: {S.COMPLETED},
        # A job that was done before the pause reached it is complete.
        W.PAUSE: {S.PAUSED, S.COMPLETED},
        W.CANCEL: {S.CANCELLED},
    }[world.job.want]
    assert world.job.state in ends | {S.FAILED} or world.job.state is S.CANCELLED
    if world.job.state is S.FAILED:
        assert world.job.failure is not None
        assert world.job.failure.reason in (FailureReason.DATA, FailureReason.LOST)
    assert world.process is None
    assert world.states[-1:] in ([], [world.job.state]), "the last thing told is how it stands"


@pytest.mark.slow
def test_many_seeds() -> None:
    for seed in range(20_000):
        World(seed).run(150)


# step


def test_a_start_is_a_new_attempt() -> None:
    new, effects = step(job(S.QUEUED, heard=9, failure=FAULT), T.SLOT_FREE, now=5.0, by="agent")
    assert (new.state, new.attempt, new.heard, new.failure, new.started_at) == (S.PREPARING, 2, 0, None, 5.0)
    assert effects == [report(new, 5.0), StartWorker("j")]
    again, _ = step(msgspec.structs.replace(new, state=S.QUEUED), T.SLOT_FREE, now=9.0)
    assert (again.started_at, again.attempt) == (5.0, 3)


def test_a_pause_asks_the_worker_and_says_nothing_false() -> None:
    new, effects = step(job(), T.PAUSE, now=1.0, by="user")
    assert (new.state, new.by) == (S.PAUSING, "user")
    assert asked(effects) == [Ask("j", Pause())]
    assert told(effects)[0].state == "pausing"


def test_a_cancel_asks_first_and_then_sees_the_worker_out() -> None:
    _, effects = step(job(), T.CANCEL, now=1.0)
    assert asked(effects) == [Ask("j", Cancel()), EndWorker("j", CANCEL_GRACE)]
    new, effects = step(job(S.QUEUED), T.CANCEL, now=1.0)
    assert (new.state, new.completed_at, asked(effects)) == (S.CANCELLED, 1.0, [])


def test_a_fault_keeps_its_reason_and_ends_the_worker_if_there_is_one() -> None:
    new, effects = step(job(), T.FAULT, now=1.0, by="agent", failure=FAULT)
    assert (new.state, new.failure, new.detail) == (S.FAILED, FAULT, "Row 57 has no text.")
    assert asked(effects) == [EndWorker("j", FAULT_GRACE)]
    assert told(effects)[0].failure == FAULT
    assert asked(step(job(S.QUEUED), T.FAULT, now=1.0, failure=FAULT)[1]) == []


def test_a_retry_forgets_what_went_wrong() -> None:
    old = job(S.FAILED, want=W.CANCEL, failure=FAULT, losses=2, completed_at=3.0, held="disk", attempt=4)
    new, effects = step(old, T.RETRY, now=5.0, by="user")
    assert (new.state, new.want, new.failure, new.losses) == (S.QUEUED, W.RUN, None, 0)
    assert (new.completed_at, new.held, new.attempt) == (None, "", 4)
    assert asked(effects) == []


@pytest.mark.parametrize("state", sorted(TERMINAL))
def test_an_end_lets_go_of_the_hold(state: JobState) -> None:
    trigger = {S.COMPLETED: T.FINISHED, S.FAILED: T.FAULT, S.CANCELLED: T.RELEASED}[state]
    origin = {S.COMPLETED: S.FINISHING, S.FAILED: S.PAUSING, S.CANCELLED: S.CANCELLING}[state]
    new, _ = step(job(origin, held="The agent was stopped."), trigger, now=7.0, failure=FAULT)
    assert (new.state, new.held, new.completed_at) == (state, "", 7.0)


def test_late_news_changes_nothing() -> None:
    old = job(S.PAUSED, by="user", detail="x")
    assert step(old, T.WORKER_LOST, now=1.0, by="agent", detail="y") == (old, [])


def test_what_the_table_does_not_know_is_a_defect() -> None:
    with pytest.raises(IllegalTransition):
        step(job(S.RUNNING), T.FINISHED, now=1.0)


def test_the_status_says_how_the_job_stands() -> None:
    old = job(S.PREPARING, phase="load", detail="Loading.", observed=4, by="user", step=7)
    assert status(old, 2.0) == JobStatus(2.0, 1, "preparing", 4, "user", "Loading.", "load", 7)
    new, effects = step(old, T.WORKER_READY, now=3.0)
    assert (new.phase, new.detail, new.by) == ("", "", "user")
    assert told(effects)[0].phase == ""


# settle and react


def test_a_resume_that_comes_while_pausing_waits_for_the_pause() -> None:
    old = job(S.PAUSING, want=W.RUN)
    assert settle(old, now=1.0) == (old, [])
    new, effects = react(old, T.RELEASED, now=2.0)
    assert new.state is S.QUEUED
    assert [one.state for one in told(effects)] == ["paused", "queued"]


def test_a_stop_is_asked_of_a_running_worker_once_in_an_attempt() -> None:
    new, effects = settle(job(S.RUNNING, want=W.STOP), now=1.0)
    assert effects == [Ask("j", Stop())]
    assert settle(new, now=2.0)[1] == []
    later = msgspec.structs.replace(new, attempt=2)
    assert settle(later, now=3.0)[1] == [Ask("j", Stop())]


@pytest.mark.parametrize("state", [S.QUEUED, S.PREPARING, S.PAUSING, S.FINISHING])
def test_a_stop_waits_where_nothing_runs_yet(state: JobState) -> None:
    old = job(state, want=W.STOP)
    assert settle(old, now=1.0) == (old, [])


def test_a_stop_of_a_preparing_job_is_asked_when_it_runs() -> None:
    new, effects = react(job(S.PREPARING, want=W.STOP), T.WORKER_READY, now=1.0)
    assert new.state is S.RUNNING
    assert asked(effects) == [Ask("j", Stop())]


def test_a_paused_job_that_is_to_stop_runs_once_more() -> None:
    new, _ = settle(job(S.PAUSED, want=W.STOP), now=1.0)
    assert new.state is S.QUEUED


def test_a_lost_worker_of_a_job_that_is_to_pause_or_end_starts_no_other() -> None:
    paused, _ = react(job(S.RUNNING, want=W.PAUSE), T.WORKER_LOST, now=1.0)
    assert paused.state is S.PAUSED
    cancelled, _ = react(job(S.RUNNING, want=W.CANCEL), T.WORKER_LOST, now=1.0)
    assert cancelled.state is S.CANCELLED


# hold


@pytest.mark.parametrize("state", [S.PREPARING, S.RUNNING])
def test_a_hold_pauses_and_leaves_alone_what_is_wanted(state: JobState) -> None:
    new, effects = hold(job(state), "The disk is full.", now=1.0)
    assert (new.state, new.want, new.held, new.by, new.detail) == (
        S.PAUSING,
        W.RUN,
        "The disk is full.",
        "agent",
        "The disk is full.",
    )
    # One that has not stepped has nothing to save: it is not waited for long.
    seen_out = [EndWorker("j", 10.0)] if state is S.PREPARING else []
    assert asked(effects) == [Ask("j", Pause()), *seen_out]
    rested, _ = react(new, T.RELEASED, now=2.0)
    assert rested.state is S.PAUSED, "what is held does not go on by itself"
    again, _ = unhold(rested, now=3.0)
    assert (again.state, again.held) == (S.QUEUED, "")


def test_a_hold_of_a_job_that_the_user_paused_does_not_resume_it() -> None:
    new, effects = hold(job(S.PAUSING, want=W.PAUSE), "The agent was stopped.", now=1.0)
    assert effects == []
    rested, _ = react(new, T.RELEASED, now=2.0)
    assert unhold(rested, now=3.0)[0].state is S.PAUSED


@pytest.mark.parametrize("state", [one for one in S if one not in (S.PREPARING, S.RUNNING, S.PAUSING)])
def test_there_is_nothing_to_hold_elsewhere(state: JobState) -> None:
    old = job(state)
    assert hold(old, "x", now=1.0) == (old, [])


def test_a_held_job_can_be_cancelled() -> None:
    held = job(S.PAUSED, held="disk", want=W.CANCEL)
    assert settle(held, now=1.0)[0].state is S.CANCELLED


# lost


def test_a_lost_worker_is_another_attempt_and_says_how_far_back() -> None:
    new, _ = lost(job(step=57, saved_step=40), now=1.0, why="It was killed.")
    assert (new.state, new.losses) == (S.QUEUED, 1)
    assert new.detail == "It was killed. Going on from the last good checkpoint, 17 steps back."
    paused, _ = lost(job(S.PAUSING, want=W.PAUSE, step=57, saved_step=40), now=1.0, why="It was killed.")
    assert paused.state is S.PAUSED
    assert paused.detail == "It was killed. Paused at the last good checkpoint, 17 steps back."
    exact, _ = lost(job(step=40, saved_step=40), now=1.0, why="It was killed.")
    assert exact.detail == "It was killed."


@pytest.mark.parametrize("state", [S.PREPARING, S.RUNNING, S.FINISHING])
def test_patience_ends_after_three_losses_without_a_checkpoint(state: JobState) -> None:
    new, _ = lost(job(state, losses=LOSSES_ALLOWED - 1), now=1.0, why="It was killed.")
    assert new.state is S.FAILED
    assert new.failure is not None
    assert new.failure.reason is FailureReason.LOST
    assert new.failure.sentence == (
        "The trainer was lost 3 times without a new checkpoint; the last time: It was killed."
    )


def test_a_loss_that_is_the_agents_own_does_not_count() -> None:
    new, _ = lost(job(losses=LOSSES_ALLOWED - 1), now=1.0, why="The agent was restarted.", counts=False)
    assert (new.state, new.losses) == (S.QUEUED, LOSSES_ALLOWED - 1)


def test_a_pause_is_no_failure_however_often_the_worker_was_lost() -> None:
    new, _ = lost(job(S.PAUSING, want=W.PAUSE, losses=5), now=1.0, why="x")
    assert new.state is S.PAUSED


def test_every_state_with_a_worker_survives_its_loss() -> None:
    for state in HAS_WORKER:
        lost(job(state), now=1.0, why="x")
    assert repr(job()) == "<Job j running want=run attempt=1 step=0>"
