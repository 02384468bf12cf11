"""One job: what each trigger makes of it, and what it asks the shell to do."""

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.core.control import wanted
from agent.core.effects import Ask, Effect, EndWorker, Report, StartWorker
from agent.core.job import (
    CANCEL_GRACE,
    FAULT_GRACE,
    FRESH_ALLOWED,
    LOSSES_ALLOWED,
    MEMORY_CALM,
    MEMORY_PAUSES,
    Job,
    fresh,
    hold,
    lost,
    react,
    report,
    rest,
    settle,
    short_of_memory,
    status,
    step,
    unhold,
)
from protocol.failures import Evidence, FailureReason, failure
from protocol.lifecycle import HAS_WORKER, TERMINAL, IllegalTransition, JobState, Trigger, Want
from protocol.records import JobStatus, Notice
from protocol.worker import Cancel, Pause, Stop
from tests.core.simulation import check

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
    check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(20))
def test_a_hundred_thousand_schedules(block: int) -> None:
    for seed in range(block * 5000, (block + 1) * 5000):
        check(seed)


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


@pytest.mark.parametrize("state", [S.PREPARING, S.RUNNING, S.PAUSING, S.FINISHING])
def test_a_worker_that_left_for_a_full_disk_leaves_a_paused_job_that_waits_for_room(state: JobState) -> None:
    new, effects = rest(job(state, step=57, saved_step=40), "disk", "It is full.", room=300, now=1.0)
    assert (new.state, new.want, new.by, new.held_for, new.room) == (S.PAUSED, W.RUN, "disk", "disk", 300)
    assert new.detail == new.held == "It is full. The last good checkpoint is 17 steps back."
    assert new.losses == 0 and asked(effects) == [], "nobody is left to be asked"
    assert told(effects)[-1].by == "disk"
    again, effects = unhold(new, now=2.0, why="There is room.")
    assert (again.state, again.by, again.held, again.held_for, again.room) == (S.QUEUED, "disk", "", "", 0)
    assert [one.text for one in notices(effects)] == ["There is room."] == again.notes


def notices(effects: list[Effect]) -> list[Notice]:
    return [one.record for one in effects if isinstance(one, Report) and isinstance(one.record, Notice)]


def test_a_pause_that_found_the_disk_full_is_a_pause_of_whoever_asked_for_it() -> None:
    new, _ = rest(job(S.PAUSING, want=W.PAUSE, by="user", step=5), "disk", "It is full.", room=9, now=1.0)
    assert (new.state, new.by, new.held) == (S.PAUSED, "user", "")
    assert new.detail == "It is full. The last good checkpoint is 5 steps back."
    assert unhold(new, now=2.0)[0].state is S.PAUSED


def test_room_for_a_job_that_somebody_has_paused_since_changes_nothing_and_is_no_news() -> None:
    waiting, _ = rest(job(), "disk", "It is full.", room=300, now=1.0)
    paused, _ = wanted(waiting, W.PAUSE, by="user", now=2.0)
    new, effects = unhold(paused, now=3.0, why="There is room.")
    assert (new.state, new.held, effects, new.notes) == (S.PAUSED, "", [], [])


@pytest.mark.parametrize(("by", "state"), [("user", S.QUEUED), ("owner", S.QUEUED), ("agent", S.PAUSED)])
def test_whoever_resumes_by_hand_goes_before_what_the_job_waits_for(by: str, state: JobState) -> None:
    waiting, _ = rest(job(), "disk", "It is full.", room=300, now=1.0)
    new, _ = wanted(waiting, W.RUN, by=by, now=2.0)
    assert new.state is state
    stopped = job(S.PAUSED, held="The agent was stopped.")
    assert wanted(stopped, W.RUN, by="user", now=2.0)[0].state is S.PAUSED, "that is no wait of the job's"


def test_a_job_that_waits_for_room_is_not_the_agents_to_hold_too() -> None:
    waiting, _ = hold(job(), "Full.", now=1.0, cause="memory", room=9)
    assert hold(waiting, "The agent was stopped.", now=2.0) == (waiting, [])


def test_a_job_that_fills_the_memory_again_and_again_stays_paused() -> None:
    new = job()
    for number in range(1, MEMORY_PAUSES + 2):
        new, effects = short_of_memory(new, "Full.", room=9, now=float(number))
        assert asked(effects) == [Ask("j", Pause())] and new.by == "memory"
        assert ("goes on by itself" in new.detail) is (number <= MEMORY_PAUSES)
        new, _ = react(new, T.RELEASED, now=float(number))
        assert new.room == (9 if number <= MEMORY_PAUSES else 0)
        if new.room:
            new = msgspec.structs.replace(unhold(new, now=float(number))[0], state=S.RUNNING)
    assert "stays paused until somebody resumes it" in new.held
    by_hand, _ = wanted(new, W.RUN, by="owner", now=9.0)
    assert (by_hand.state, by_hand.memory_pauses) == (S.QUEUED, 0)
    calm = job(memory_pauses=MEMORY_PAUSES, memory_paused_at=1.0)
    assert short_of_memory(calm, "Full.", room=9, now=MEMORY_CALM + 2)[0].room == 9, "long ago"
    assert short_of_memory(new, "Full.", room=9, now=9.0) == (new, [])


def test_a_fresh_process_is_another_attempt_and_no_loss() -> None:
    new, effects = fresh(job(step=7, saved_step=7, losses=2), now=1.0)
    assert (new.state, new.losses) == (S.QUEUED, 2)
    assert "fresh process" in told(effects)[0].detail
    paused, _ = fresh(job(S.PAUSING, want=W.PAUSE, step=7), now=1.0)
    assert paused.state is S.PAUSED


def test_a_worker_that_asks_for_fresh_processes_for_ever_is_the_end() -> None:
    new = job(step=7)
    for _ in range(FRESH_ALLOWED):
        new = msgspec.structs.replace(fresh(new, now=1.0)[0], state=S.RUNNING)
    elsewhere, _ = fresh(msgspec.structs.replace(new, step=8), now=1.0)
    assert elsewhere.state is S.QUEUED
    new, _ = fresh(new, now=1.0)
    assert new.failure is not None and "at step 7 and came no further" in new.failure.sentence


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


def test_the_last_loss_gives_the_failure_its_name_and_all_are_evidence() -> None:
    new, _ = lost(job(step=9), now=1.0, why="One.")
    new = msgspec.structs.replace(new, state=S.RUNNING)
    new, _ = lost(new, now=1.0, why="Two.")
    new = msgspec.structs.replace(new, state=S.RUNNING)
    seen = Evidence(log_tail=["last"])
    new, _ = lost(new, now=1.0, why="Three.", reason=FailureReason.HOST_MEMORY, evidence=seen)
    assert new.failure is not None and new.failure.reason is FailureReason.HOST_MEMORY
    assert new.failure.evidence == Evidence(log_tail=["last"], exits=["One.", "Two.", "Three."], step=9)


def test_standing_still_twice_without_progress_is_the_end() -> None:
    stalled = FailureReason.STALLED
    once, _ = lost(job(step=9, saved_step=5), now=1.0, why="Still.", reason=stalled)
    assert (once.state, once.losses, once.stalled_step) == (S.QUEUED, 1, 9)
    further, _ = lost(
        msgspec.structs.replace(once, state=S.RUNNING, step=12), now=2.0, why="Still.", reason=stalled
    )
    assert further.state is S.QUEUED, "it had come further"
    again, _ = lost(
        msgspec.structs.replace(once, state=S.RUNNING, step=7), now=2.0, why="Still.", reason=stalled
    )
    assert again.failure is not None and again.failure.reason is stalled
    assert "stood still twice" in again.failure.sentence


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
