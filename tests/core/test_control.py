"""One meaning for every door: wants, offers, live parameters and commands."""

import json
from typing import Any

import msgspec
import pytest

from agent.core.control import (
    change,
    desire,
    merged,
    new_job,
    news,
    offered,
    order_for,
    parsed,
    retried,
    wanted,
)
from agent.core.effects import Ask, Effect, EndWorker, Report
from agent.core.intake import hear
from agent.core.job import Job
from agent.errors import NotPossible
from protocol.failures import FailureReason, failure
from protocol.jobspec import BadSpec
from protocol.lifecycle import JobState, Want
from protocol.messages import CommandKind, DatasetRef, Desired, Offer
from protocol.records import JobStatus, Notice
from protocol.worker import Cancel, EvaluateNow, Numbered, Parameters, Pause, Saved, SaveNow, SetParameters

S, W = JobState, Want
CONFIG = json.dumps({"model": {"name": "tiny"}, "training": {"method": "cpt"}, "name": "Books"})
SHA = "0123456789abcdef" * 4


def job(state: JobState = S.RUNNING, **fields: Any) -> Job:
    return Job(job_id="j", config=CONFIG, from_backend=True, state=state, attempt=1, **fields)


def wish(want: str, version: int = 1, **fields: Any) -> Desired:
    return Desired("j", version, want, **fields)  # type: ignore[arg-type]


def asked(effects: list[Effect]) -> list[Effect]:
    return [effect for effect in effects if not isinstance(effect, Report)]


def notices(effects: list[Effect]) -> list[str]:
    records = [effect.record for effect in effects if isinstance(effect, Report)]
    return [record.text for record in records if isinstance(record, Notice)]


def observed(effects: list[Effect]) -> list[int]:
    records = [effect.record for effect in effects if isinstance(effect, Report)]
    return [record.observed for record in records if isinstance(record, JobStatus)]


# Offers


def test_an_offer_becomes_a_queued_job() -> None:
    offer = Offer(CONFIG, "books.txt", "token", DatasetRef(SHA, 12), "")
    made = offered(wish("run", offer=offer), order=7, now=5.0)
    assert (made.job_id, made.state, made.order, made.created_at, made.from_backend) == (
        "j",
        S.QUEUED,
        7,
        5.0,
        True,
    )
    assert (made.name, made.model_name, made.method, made.dataset_path) == (
        "Books",
        "tiny",
        "cpt",
        "books.txt",
    )
    assert (made.dataset_sha256, made.dataset_size) == (SHA, 12)
    assert "token" not in repr(msgspec.to_builtins(made)), "the token is no part of a job"


def test_a_job_without_a_name_is_called_by_its_id() -> None:
    assert new_job("j", '{"model": {"name": "m"}}', dataset_path="", name="", order=1, now=0.0).name == "j"


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ("{", "config: not JSON: "),
        ("[]", "config: expected an object."),
        ("[" * 5000, "config: not JSON that can be read: it is nested too deeply."),
        ('{"a": NaN}', "config: not JSON: "),
        ('{"name": "\\ud800", "model": {"name": "m"}}', "config: not JSON: "),
        ("\ud800", "config: not JSON: "),
        ('{"model": {}}', "model.name: give the name of a model"),
    ],
)
def test_an_offer_that_cannot_be_accepted_is_refused_with_a_sentence(config: str, sentence: str) -> None:
    with pytest.raises(BadSpec) as refused:
        new_job("j", config, dataset_path="", name="", order=1, now=0.0)
    assert str(refused.value).startswith(sentence)


def test_a_config_is_read_as_it_is() -> None:
    assert parsed('{"a": [1, 2.5, null, "ü"]}') == {"a": [1, 2.5, None, "ü"]}


# Desired state


def test_only_a_newer_version_counts() -> None:
    old = job(observed=4)
    assert desire(old, wish("cancel", 4), now=1.0) == (old, [])
    assert desire(old, wish("cancel", 3), now=1.0) == (old, [])
    assert desire(old, wish("cancel", 5), now=1.0)[0].state is S.CANCELLING


def test_a_pause_is_carried_out_and_observed() -> None:
    new, effects = desire(job(), wish("pause", 3), now=1.0)
    assert (new.state, new.want, new.want_by, new.observed) == (S.PAUSING, W.PAUSE, "user", 3)
    assert asked(effects) == [Ask("j", Pause())]
    assert observed(effects) == [3]


def test_a_version_is_observed_where_nothing_moves() -> None:
    new, effects = desire(job(), wish("run", 3), now=1.0)
    assert (new.state, new.observed) == (S.RUNNING, 3)
    assert observed(effects) == [3]


def test_a_version_is_observed_where_it_cannot_be_met() -> None:
    new, effects = desire(job(S.COMPLETED), wish("pause", 3), now=1.0)
    assert (new.observed, observed(effects)) == (3, [3])
    assert notices(effects) == ["The job is completed; it cannot be paused."]


def test_a_retry_on_its_way_is_not_complained_about() -> None:
    # The wish and the command of a retry come in either order.
    new, effects = desire(job(S.FAILED), wish("run", 3), now=1.0)
    assert (new.state, notices(effects), observed(effects)) == (S.FAILED, [], [3])


def test_where_to_resume_from_is_kept_for_the_next_attempt() -> None:
    new, _ = desire(job(S.PAUSED, want=W.PAUSE), wish("run", checkpoint="best"), now=1.0)
    assert (new.state, new.checkpoint) == (S.QUEUED, "best")
    kept, _ = desire(job(), wish("pause", checkpoint="best"), now=1.0)
    assert kept.checkpoint == ""


# The owner


@pytest.mark.parametrize("want", ["run", "stop"])
@pytest.mark.parametrize("state", [S.PAUSING, S.PAUSED])
def test_the_owners_pause_stands_against_the_backend(state: JobState, want: str) -> None:
    held = job(state, want=W.PAUSE, want_by="owner")
    new, effects = desire(held, wish(want, 3), now=1.0)
    assert (new.state, new.want, new.want_by, new.observed) == (state, W.PAUSE, "owner", 3)
    assert notices(effects) == ["The owner of the machine paused this job; it goes on when they resume it."]
    assert observed(effects) == [3]


def test_a_pause_of_the_backend_does_not_take_the_owners_over() -> None:
    held = job(S.PAUSED, want=W.PAUSE, want_by="owner")
    same, effects = desire(held, wish("pause", 3), now=1.0)
    assert (same.want_by, notices(effects)) == ("owner", [])
    assert desire(same, wish("run", 4), now=1.0)[0].state is S.PAUSED


def test_the_backend_may_cancel_what_the_owner_paused() -> None:
    held = job(S.PAUSED, want=W.PAUSE, want_by="owner")
    assert desire(held, wish("cancel", 3), now=1.0)[0].state is S.CANCELLED


def test_the_owner_may_resume_what_the_backend_paused_and_the_other_way_round() -> None:
    paused, _ = desire(job(), wish("pause", 3), now=1.0)
    resumed, _ = wanted(msgspec.structs.replace(paused, state=S.PAUSED), W.RUN, by="owner", now=2.0)
    assert (resumed.state, resumed.by) == (S.QUEUED, "owner")
    again, _ = desire(resumed, wish("pause", 4), now=3.0)
    assert again.state is S.PAUSED


# Wants


def test_cancel_while_queued_paused_and_running() -> None:
    assert wanted(job(S.QUEUED), W.CANCEL, by="user", now=1.0)[0].state is S.CANCELLED
    assert wanted(job(S.PAUSED), W.CANCEL, by="user", now=1.0)[0].state is S.CANCELLED
    new, effects = wanted(job(), W.CANCEL, by="user", now=1.0)
    assert new.state is S.CANCELLING
    assert [type(effect) for effect in asked(effects)] == [Ask, EndWorker]
    assert asked(effects)[0] == Ask("j", Cancel())


def test_a_want_said_twice_changes_nothing() -> None:
    once, _ = wanted(job(), W.PAUSE, by="user", now=1.0)
    assert wanted(once, W.PAUSE, by="user", now=2.0) == (once, [])


def test_what_an_ended_job_cannot_do_is_answered() -> None:
    with pytest.raises(NotPossible, match=r"The job is cancelled; it cannot be paused\. Retry it"):
        wanted(job(S.CANCELLED), W.PAUSE, by="user", now=1.0)
    done = job(S.COMPLETED)
    assert wanted(done, W.STOP, by="user", now=1.0)[1] == []


# Retry


@pytest.mark.parametrize("state", [S.FAILED, S.CANCELLED])
def test_an_ended_job_is_queued_again(state: JobState) -> None:
    old = job(state, want=W.CANCEL, failure=failure(FailureReason.DATA, "x"), losses=3)
    new, effects = retried(old, by="user", now=1.0, checkpoint="best")
    assert (new.state, new.want, new.want_by, new.checkpoint, new.failure) == (
        S.QUEUED,
        W.RUN,
        "user",
        "best",
        None,
    )
    assert asked(effects) == []
    # A pause after that is a pause.
    assert wanted(new, W.PAUSE, by="user", now=2.0)[0].state is S.PAUSED


def test_a_retry_after_a_hold_is_not_held() -> None:
    cancelled, _ = wanted(job(S.PAUSED, held="The agent was stopped."), W.CANCEL, by="user", now=1.0)
    queued, _ = retried(cancelled, by="user", now=2.0)
    paused, _ = wanted(queued, W.PAUSE, by="user", now=3.0)
    assert wanted(paused, W.RUN, by="user", now=4.0)[0].state is S.QUEUED


@pytest.mark.parametrize("state", [S.RUNNING, S.PAUSED, S.COMPLETED, S.QUEUED])
def test_only_a_job_that_ended_badly_is_retried(state: JobState) -> None:
    with pytest.raises(NotPossible, match="only a failed or cancelled job can be retried"):
        retried(job(state), by="user", now=1.0)


# The user's word


def test_the_users_word_holds_until_the_next_checkpoint() -> None:
    paused = job(S.PAUSED, want=W.PAUSE)
    new, _ = wanted(paused, W.RUN, by="user", now=1.0, accept_changes=True)
    assert (new.state, new.accept_changes) == (S.QUEUED, True)
    running = msgspec.structs.replace(new, state=S.RUNNING)
    heard = hear(running, Numbered(1, 1, Saved("/c/j/step-4", 4, 0.5, 1, 1.0, "schedule")), now=2.0)
    assert heard is not None
    assert not heard[0].accept_changes
    assert not wanted(paused, W.RUN, by="user", now=1.0)[0].accept_changes


def test_the_users_word_outlives_the_save_of_a_pause() -> None:
    new, _ = wanted(job(S.PAUSING, want=W.PAUSE), W.RUN, by="user", now=1.0, accept_changes=True)
    heard = hear(new, Numbered(1, 1, Saved("/c/j/step-4", 4, 0.5, 1, 1.0, "pause")), now=2.0)
    assert heard is not None
    assert heard[0].accept_changes


def test_the_users_word_is_for_a_start_and_for_nothing_else() -> None:
    assert not wanted(job(), W.RUN, by="user", now=1.0, accept_changes=True)[0].accept_changes
    assert not wanted(job(S.PAUSED), W.CANCEL, by="user", now=1.0, accept_changes=True)[0].accept_changes


def test_a_retry_carries_the_users_word_and_the_next_one_does_not() -> None:
    new, _ = retried(job(S.FAILED), by="user", now=1.0, accept_changes=True)
    assert new.accept_changes
    again, _ = retried(msgspec.structs.replace(new, state=S.FAILED), by="user", now=2.0)
    assert not again.accept_changes


def test_the_backend_passes_the_users_word_on() -> None:
    new, _ = desire(job(S.PAUSED, want=W.PAUSE), wish("run", accept_changes=True), now=1.0)
    assert new.accept_changes


def test_a_job_knows_what_it_branched_from() -> None:
    config = json.dumps({"model": {"name": "m"}, "branch": {"job_id": "run-1"}})
    made = new_job("run-2", config, dataset_path="", name="", order=1, now=1.0)
    assert made.branched_from == "run-1"


# Live parameters


def test_parameters_add_up() -> None:
    one = Parameters(learning_rate=1e-4, save_steps=10)
    assert merged(one, Parameters(learning_rate=1e-5)) == Parameters(learning_rate=1e-5, save_steps=10)
    assert merged(one, Parameters()) == one
    assert news(one, Parameters(learning_rate=1e-4, save_steps=20)) == Parameters(save_steps=20)


def test_a_running_worker_is_told_and_a_waiting_job_remembers() -> None:
    new, effects = change(job(), Parameters(learning_rate=1e-5))
    assert effects == [Ask("j", SetParameters(Parameters(learning_rate=1e-5)))]
    assert new.parameters == Parameters(learning_rate=1e-5)
    waiting, effects = change(job(S.PAUSED), Parameters(learning_rate=1e-5))
    assert (waiting.parameters.learning_rate, effects) == (1e-5, [])
    with pytest.raises(NotPossible, match="its parameters can no longer change"):
        change(job(S.COMPLETED), Parameters(learning_rate=1e-5))


def test_the_backend_repeats_its_parameters_with_every_wish_and_only_news_is_passed_on() -> None:
    both = Parameters(learning_rate=1e-5, save_steps=10)
    first, effects = desire(job(), wish("run", 1, parameters=both), now=1.0)
    assert asked(effects) == [Ask("j", SetParameters(both))]
    # The owner changes one of them; the backend's next wish, with the old values, must not undo it.
    second, _ = change(first, Parameters(learning_rate=3e-5))
    third, effects = desire(second, wish("pause", 2, parameters=both), now=2.0)
    assert asked(effects) == [Ask("j", Pause())]
    assert third.parameters == Parameters(learning_rate=3e-5, save_steps=10)
    _, effects = desire(third, wish("pause", 3, parameters=merged(both, Parameters(save_steps=20))), now=3.0)
    assert asked(effects) == [Ask("j", SetParameters(Parameters(save_steps=20)))]


def test_parameters_for_an_ended_job_serve_its_retry() -> None:
    new, effects = desire(job(S.FAILED), wish("run", 2, parameters=Parameters(batch_size=1)), now=1.0)
    assert (new.observed, asked(effects)) == (2, [])
    assert retried(new, by="user", now=2.0)[0].parameters == Parameters(batch_size=1)


# Commands


def test_commands_need_a_running_worker() -> None:
    assert order_for(CommandKind.SAVE_NOW, "c", job()) == Ask("j", SaveNow("c"))
    assert order_for(CommandKind.EVALUATE_NOW, "c", job()) == Ask("j", EvaluateNow("c"))
    with pytest.raises(NotPossible, match=r"The job is paused; this needs a running one\."):
        order_for(CommandKind.SAVE_NOW, "c", job(S.PAUSED))
    with pytest.raises(NotPossible, match='"retry" is not an order to a trainer'):
        order_for(CommandKind.RETRY, "c", job())


@pytest.mark.parametrize("value", [0.0, -1e-4, 100.1, float("nan"), float("inf")])
def test_a_value_that_no_run_can_have_is_refused_by_both_doors(value: float) -> None:
    bad = Parameters(learning_rate=value, save_steps=5)
    with pytest.raises(NotPossible, match="learning_rate"):
        change(job(), bad)
    after, effects = desire(job(), wish("run", parameters=bad), now=1.0)
    assert after.parameters == Parameters(save_steps=5)
    assert Ask("j", SetParameters(Parameters(save_steps=5))) in effects
    (told,) = [
        effect.record
        for effect in effects
        if isinstance(effect, Report) and isinstance(effect.record, Notice)
    ]
    assert told.text.endswith(f"learning_rate: {value} cannot be set; it must be above 0 and at most 100.")
