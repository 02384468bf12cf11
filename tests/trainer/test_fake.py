import math
import signal
from pathlib import Path

import anyio
import pytest

from protocol.failures import FailureReason
from protocol.worker import Failed, Finished, Limits, Metrics, Ready, Saved, Trained
from tests.support.children import Watch, clean_env, start_order, supervised


def played(folder: Path, name: str, *, attempt: int = 1, **training: int) -> Watch:
    """Run an attempt to its end and return what was told."""

    async def go() -> Watch:
        async with supervised() as watch:
            order = start_order(folder, name, attempt=attempt, **training)
            await watch.supervisor.start("job", order, env=clean_env(), log=folder / "job.log")
            await watch.exited(attempt)
            return watch

    return anyio.run(go)


def test_words_it_does_not_know_are_a_failure_that_names_them(tmp_path: Path) -> None:
    watch = played(tmp_path, "fake stepp=1")
    (failed,) = watch.events(Failed)
    assert failed.failure.reason is FailureReason.SPEC
    assert "stepp" in failed.failure.sentence


def test_it_fails_when_told_to_and_says_why(tmp_path: Path) -> None:
    watch = played(tmp_path, "fail_at=3 nan_at=2", max_steps=5)
    (failed,) = watch.events(Failed)
    assert failed.failure.sentence == "The fake was told to fail at step 3."
    losses = [point.values["train_loss"] for point in watch.events(Metrics)]
    assert len(losses) == 2
    assert math.isnan(losses[1])


def test_a_crash_goes_on_from_the_last_checkpoint_in_the_next_attempt(tmp_path: Path) -> None:
    words = "crash_at=8 until_attempt=1"
    watch = played(tmp_path, words, max_steps=12, save_steps=3, save_total_limit=1)
    (crash,) = [fact for fact in watch.facts if hasattr(fact, "exit_code")]
    assert crash.exit_code == 70
    assert [saved.step for saved in watch.events(Saved)] == [3, 6]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-6"]
    again = played(tmp_path, words, attempt=2, max_steps=12, save_steps=3)
    (ready,) = again.events(Ready)
    assert ready.start_step == 6
    (finished,) = again.events(Finished)
    untouched = played(tmp_path / "other", "", max_steps=12)
    assert [finished] == [
        type(finished)(
            **{name: getattr(event, name) for name in event.__struct_fields__}
            | {"model_path": finished.model_path}
        )
        for event in untouched.events(Finished)
    ]


def test_one_that_hangs_ends_by_force_alone(tmp_path: Path) -> None:
    async def go() -> None:
        async with supervised() as watch:
            order = start_order(tmp_path, "hang_at=3", max_steps=5)
            await watch.supervisor.start("job", order, env=clean_env(), log=tmp_path / "job.log")
            await watch.heard(Metrics, lambda point: point.step == 2)
            await watch.supervisor.end("job", grace=0.05)
            assert (await watch.exited()).signal == signal.SIGTERM

    anyio.run(go)


def test_a_stop_at_once_finishes_without_a_step(tmp_path: Path) -> None:
    import msgspec

    async def go() -> None:
        async with supervised() as watch:
            order = msgspec.structs.replace(
                start_order(tmp_path, max_steps=5), stop_at_once=True, limits=Limits()
            )
            await watch.supervisor.start("job", order, env=clean_env(), log=tmp_path / "job.log")
            await watch.exited()
            assert watch.events(Metrics) == []
            assert [event.why for event in watch.events(Trained)] == ["stop"]
            assert len(watch.events(Finished)) == 1

    anyio.run(go)


@pytest.mark.parametrize("state", ["", "{}}"])
def test_a_checkpoint_that_cannot_be_read_is_named(tmp_path: Path, state: str) -> None:
    bad = tmp_path / "checkpoints" / "step-4"
    bad.mkdir(parents=True)
    (bad / "state.json").write_text(state)
    watch = played(tmp_path, "")
    (failed,) = watch.events(Failed)
    assert failed.failure.reason is FailureReason.CHECKPOINT
    assert str(bad) in failed.failure.sentence
