"""What a trainer says, and what its end means."""

from typing import Any

import msgspec
import pytest

from agent.core.effects import Effect, EndWorker, Report
from agent.core.intake import gone, hear
from agent.core.job import NOTES_KEPT, Job
from agent.core.outbox import WORD
from protocol.failures import FailureReason, failure
from protocol.lifecycle import HAS_WORKER, TERMINAL, IllegalTransition, JobState, Want
from protocol.messages import Lane
from protocol.records import AnyRecord, Checkpoint, JobFacts, JobStatus, Notice, ParametersApplied, Result
from protocol.worker import (
    AnyEvent,
    Failed,
    Finished,
    Left,
    Metrics,
    Note,
    Numbered,
    Parameters,
    ParametersSet,
    Phase,
    Preparing,
    Ready,
    Saved,
    Trained,
    Warm,
)
from tests.protocol.golden import EVENTS

S, W = JobState, Want
NOW = 9.0
FAULT = failure(FailureReason.DATA, "Row 57 has no text.")


def job(state: JobState = S.RUNNING, **fields: Any) -> Job:
    return Job(job_id="j", config="{}", state=state, attempt=2, **fields)


def after(event: AnyEvent, old: Job) -> tuple[Job, list[AnyRecord], list[Effect]]:
    """The job after its next event, with the records and the other effects."""
    outcome = hear(old, Numbered(old.attempt, old.heard + 1, event), now=NOW)
    assert outcome is not None
    new, effects = outcome
    assert new.heard == old.heard + 1
    for effect in effects:
        if isinstance(effect, Report):
            assert effect.lane is Lane.CONTROL
    records = [effect.record for effect in effects if isinstance(effect, Report)]
    return new, records, [effect for effect in effects if not isinstance(effect, Report)]


def states(records: list[AnyRecord]) -> list[str]:
    return [record.state for record in records if isinstance(record, JobStatus)]


@pytest.mark.parametrize("event", EVENTS.values(), ids=list(EVENTS))
def test_an_event_of_an_older_attempt_or_one_heard_before_is_old_news(event: AnyEvent) -> None:
    old = job(heard=5)
    assert hear(old, Numbered(1, 6, event), now=NOW) is None
    assert hear(old, Numbered(2, 5, event), now=NOW) is None
    assert hear(old, Numbered(2, 1, event), now=NOW) is None


@pytest.mark.parametrize("state", [S.QUEUED, S.PAUSED])
@pytest.mark.parametrize("event", EVENTS.values(), ids=list(EVENTS))
def test_where_no_worker_can_be_nothing_it_says_counts(state: JobState, event: AnyEvent) -> None:
    # A job that failed and was retried while its old process still had seconds to leave.
    old = job(state, values={"train_loss": 1.0})
    new, records, effects = after(event, old)
    assert (new.state, new.step, new.values, records, effects) == (state, 0, {"train_loss": 1.0}, [], [])


@pytest.mark.parametrize("state", sorted(TERMINAL))
@pytest.mark.parametrize("event", EVENTS.values(), ids=list(EVENTS))
def test_nothing_moves_a_job_that_has_ended(state: JobState, event: AnyEvent) -> None:
    new, records, effects = after(event, job(state))
    assert (new.state, states(records), effects) == (state, [], [])
    assert not any(isinstance(record, Result) for record in records)


def test_a_phase_is_told_only_while_the_job_prepares() -> None:
    new, records, _ = after(Preparing(Phase.LOAD, "Loading."), job(S.PREPARING))
    assert (new.phase, new.detail) == ("load", "Loading.")
    assert isinstance(records[0], JobStatus)
    assert records[0].phase == "load"
    assert after(Preparing(Phase.LOAD), job(S.PAUSING))[1] == []


def test_ready_is_running_and_its_facts_go_first() -> None:
    ready = EVENTS["Ready"]
    assert isinstance(ready, Ready)
    new, records, effects = after(ready, job(S.PREPARING, step=57, checkpoint="best", learning_rate=1e-4))
    assert [type(record) for record in records] == [JobFacts, JobStatus]
    assert isinstance(records[0], JobFacts)
    assert (records[0].attempt, records[0].start_step, records[0].learning_rate) == (2, 40, 1e-4)
    assert (new.state, new.step, new.saved_step, new.total_steps, new.checkpoint) == (
        S.RUNNING,
        40,
        40,
        100,
        "",
    )
    assert effects == []
    late, records, _ = after(ready, job(S.PAUSING))
    assert late.state is S.PAUSING, "the pause was asked for while it loaded"
    assert states(records) == []


def test_metrics_are_remembered_by_name() -> None:
    one, records, _ = after(Metrics(3, 0.5, 1.0, {"train_loss": 2.0}, "improving"), job())
    two, _, _ = after(Metrics(4, 0.6, 2.0, {"eval_loss": 3.0}), one)
    assert (two.step, two.epoch, two.values) == (4, 0.6, {"train_loss": 2.0, "eval_loss": 3.0})
    assert (two.trend, records) == ("improving", [])


@pytest.mark.parametrize("path", ["/c/checkpoint-40", "/c/checkpoint-40/", "C:\\c\\checkpoint-40"])
def test_a_checkpoint_renews_patience_and_is_told_by_its_name(path: str) -> None:
    new, [record], _ = after(Saved(path, 40, 1.0, 5, 0.1, "schedule", 2.5, None, True), job(losses=2))
    assert (new.losses, new.saved_step) == (0, 40)
    assert isinstance(record, Checkpoint)
    assert (record.name, record.step, record.eval_loss, record.is_best) == ("checkpoint-40", 40, 2.5, True)


def test_trained_and_finished() -> None:
    trained, records, _ = after(Trained(100, "steps"), job())
    assert (trained.state, trained.step, trained.detail, states(records)) == (
        S.FINISHING,
        100,
        "steps",
        ["finishing"],
    )
    finished = EVENTS["Finished"]
    done, records, effects = after(finished, trained)
    assert done.state is S.COMPLETED
    assert [type(record) for record in records] == [Result, JobStatus], (
        "the result is there when it is complete"
    )
    assert (done.model_path, done.weights_hash, done.completed_at, effects) == ("/o", "ab" * 16, NOW, [])


def test_a_job_that_was_done_before_its_pause_reached_it_is_complete() -> None:
    trained, _, _ = after(Trained(100, "steps"), job(S.PAUSING, want=W.PAUSE))
    assert trained.state is S.FINISHING
    assert after(Finished("/m", "", "h", 100, {}), trained)[0].state is S.COMPLETED


def test_what_finished_before_its_cancel_reached_it_is_cancelled_all_the_same() -> None:
    old = job(S.CANCELLING, want=W.CANCEL)
    new, records, _ = after(Trained(100, "steps"), old)
    new, records, _ = after(Finished("/m", "", "h", 100, {}), new)
    assert (new.state, records, new.model_path) == (S.CANCELLING, [], "")
    assert gone(new, 2, left="", why="x", now=NOW)[0].state is S.CANCELLED


def test_a_model_out_of_nowhere_is_a_defect() -> None:
    with pytest.raises(IllegalTransition):
        after(Finished("/m", "", "h", 100, {}), job())


def test_a_failure_is_told_with_its_reason() -> None:
    new, [record], effects = after(Failed(FAULT), job())
    assert (new.state, new.failure, new.by) == (S.FAILED, FAULT, "agent")
    assert isinstance(record, JobStatus)
    assert record.failure == FAULT
    assert [type(effect) for effect in effects] == [EndWorker]
    assert after(Failed(FAULT), job(S.CANCELLING, want=W.CANCEL))[0].state is S.CANCELLED


def test_notes_are_kept_cut_and_bounded() -> None:
    old = job()
    for number in range(NOTES_KEPT + 5):
        old, [record], _ = after(Note("warning" if number % 2 else "info", f"note {number}"), old)
        assert isinstance(record, Notice)
        assert record.level == ("warning" if number % 2 else "info")
    assert len(old.notes) == NOTES_KEPT
    assert old.notes[-1] == f"note {NOTES_KEPT + 4}"
    assert isinstance(record, Notice)
    long, [record], _ = after(Note("loud", "x" * 1_000_000), old)
    assert len(long.notes[-1]) <= WORD
    assert isinstance(record, Notice)
    assert record.level == "info", "a level that is none is the quieter one"


def test_parameters_in_force_are_told_and_shown() -> None:
    set_ = ParametersSet(41, Parameters(batch_size=8, learning_rate=1e-5), "save_steps: no.")
    new, [record], _ = after(set_, job(batch_size=4, gradient_accumulation_steps=2))
    assert (new.batch_size, new.gradient_accumulation_steps) == (8, 2)
    assert isinstance(record, ParametersApplied)
    assert (record.step, record.refused) == (41, "save_steps: no.")


def test_what_was_put_in_force_is_kept_for_the_next_attempt() -> None:
    first, second = Parameters(learning_rate=1e-5), Parameters(batch_size=2, gradient_accumulation_steps=4)
    old = job(parameters=Parameters(learning_rate=1e-5, batch_size=4))
    new, _, _ = after(ParametersSet(41, second), after(ParametersSet(7, first), old)[0])
    assert new.applied == [(7, first), (41, second)]
    # The micro-batch that was found to fit is what the next attempt begins with; the rate is the user's.
    assert new.parameters == Parameters(learning_rate=1e-5, batch_size=2, gradient_accumulation_steps=4)
    assert after(ParametersSet(41, second, "", True), new)[0].applied == new.applied
    there_and_back = after(ParametersSet(41, first), after(ParametersSet(41, second), new)[0])[0]
    assert [given for step, given in there_and_back.applied if step == 41] == [second, second, first]
    assert after(ParametersSet(50, Parameters(), "No."), new)[0].applied == new.applied


def test_leaving_and_being_warm_mean_nothing_by_themselves() -> None:
    for event in (Left("paused", 4), Warm(1, 2.0)):
        new, records, effects = after(event, job(S.PAUSING))
        assert (new.state, records, effects) == (S.PAUSING, [], [])


# The end of a process


def ended(old: Job, left: str = "", **more: Any) -> Job:
    return gone(old, 2, left=left, why="It ended.", now=NOW, **more)[0]


def test_a_pause_is_a_pause_only_when_the_process_is_gone() -> None:
    new = ended(job(S.PAUSING, want=W.PAUSE, detail="The disk is full."), "paused")
    assert (new.state, new.detail) == (S.PAUSED, "The disk is full.")


def test_a_process_that_ends_without_a_word_is_lost() -> None:
    new = ended(job())
    assert (new.state, new.losses, new.detail) == (S.QUEUED, 1, "It ended.")
    assert ended(job(S.PAUSING, want=W.PAUSE)).state is S.PAUSED


def test_an_agents_restart_is_no_sign_against_the_job() -> None:
    assert ended(job(losses=2), "parent_lost").state is S.QUEUED
    assert ended(job(losses=2), "parent_lost").losses == 2
    assert ended(job(losses=2), "paused").losses == 2


def test_what_had_to_be_ended_for_its_deeds_has_failed() -> None:
    fault = failure(FailureReason.INTERNAL, "It sent a pickle.")
    new = ended(job(), "", failure=fault)
    assert (new.state, new.failure) == (S.FAILED, fault)
    assert ended(job(S.CANCELLING, want=W.CANCEL), "", failure=fault).state is S.CANCELLED


@pytest.mark.parametrize("state", [one for one in S if one not in HAS_WORKER])
def test_the_end_of_a_process_whose_job_went_on_without_it_is_no_news(state: JobState) -> None:
    # Failed, and retried at once: the old process ends when the job is queued already.
    fault = failure(FailureReason.INTERNAL, "It sent a pickle.")
    old = job(state)
    assert gone(old, 2, left="", why="x", now=NOW, failure=fault) == (old, [])


def test_the_end_of_an_older_attempt_is_no_news() -> None:
    old = job()
    assert gone(old, 1, left="", why="x", now=NOW) == (old, [])


def test_what_the_config_asks_for_in_vain_is_told_once() -> None:
    ready = EVENTS["Ready"]
    config = (
        '{"predictions": {"enabled": true, "sample_count": 5}, "tensorboard": {"enabled": false},'
        ' "training": {"distributed": {"num_gpus": 2}, "checkpoint_resume": null}}'
    )
    waiting = Job(job_id="j", config=config, state=S.PREPARING, attempt=2)
    new, records, _ = after(ready, waiting)
    (told,) = [record for record in records if isinstance(record, Notice)]
    assert (
        told.text
        == "Asked for in the job's config, and not done by this agent: predictions, training.distributed."
    )
    assert new.notes == [told.text]
    streamed = '{"training": {"use_streaming": true, "max_steps": null}}'
    assert after(ready, msgspec.structs.replace(waiting, config=streamed))[0].notes == [
        "Asked for in the job's config, and not done by this agent: training.use_streaming "
        "(training.max_steps must say when to end, so the rows are a table)."
    ]
    ended = '{"training": {"use_streaming": true, "max_steps": 5}}'
    assert not after(ready, msgspec.structs.replace(waiting, config=ended))[0].notes
    again = msgspec.structs.replace(new, state=S.PREPARING, attempt=3, heard=0)
    assert not [record for record in after(ready, again)[1] if isinstance(record, Notice)]
    assert not after(ready, msgspec.structs.replace(waiting, config="{}"))[0].notes
