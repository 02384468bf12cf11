"""A resume is checked by replaying the steps before it in a process beside."""

import os
import signal
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.trainer import replay, tensorfile
from agent.trainer.checkpoint import MANIFEST, Checkpoints, Found, Manifest, _record, seal
from agent.trainer.inbox import Inbox
from agent.trainer.restore import REPLAY, led_to
from protocol.jobspec import LoraSpec
from protocol.worker import Left, Note, Parameters, ParametersSet, Pause, SetParameters, Verified
from tests.trainer.conftest import Jobs, RecordingLine

TRAINING = {"save_steps": 2, "max_steps": 10}


def resumed(jobs: Jobs, attempt: int = 2, **changes: Any) -> RecordingLine:
    return jobs.run("job", attempt=attempt, training=TRAINING, verify_resume=2, **changes)


def test_a_resume_is_found_equal_and_its_end_is_that_of_an_untouched_run(jobs: Jobs) -> None:
    untouched = jobs.run("untouched", training=TRAINING, lora=LoraSpec(r=4, dropout=0.1))
    jobs.run("job", {5: [Pause()]}, training=TRAINING, lora=LoraSpec(r=4, dropout=0.1))
    line = resumed(jobs, lora=LoraSpec(r=4, dropout=0.1))
    (check,) = line.of(Verified)
    assert check == Verified(
        5, 6, True, 0.0, "The losses of 2 steps, the weights and the optimizer's state are the same."
    )
    assert line.last.weights_hash == untouched.last.weights_hash
    assert not (jobs.checkpoints() / REPLAY).exists()
    # The replay deletes nothing and keeps nothing.
    assert {path.name for path in jobs.checkpoints().glob("step-*")} == {"step-6", "step-8", "step-10"}


def request_of(jobs: Jobs, **changes: Any) -> replay.Request:
    """The request that a resumed attempt would make, with what it reads linked in place."""
    return checking_of(jobs, **changes)._prepare()


def checking_of(jobs: Jobs, k: int = 2, **changes: Any) -> replay.Checking:
    start = jobs.start("job", attempt=2, training=TRAINING, verify_resume=k, **changes)
    found, _ = Checkpoints(jobs.checkpoints(), "job").newest_good()
    assert found is not None
    return replay.Checking(start, found, found.manifest.inputs, Inbox(RecordingLine({})))


def spoil(checkpoint: Path, stem: str) -> None:
    """Move one number of a checkpoint by a quarter, and make its manifest good again."""
    from safetensors.torch import save_file

    tensors = tensorfile.read(checkpoint, stem)
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors[name].view(-1)[0] += 0.25
    save_file(tensors, checkpoint / f"{stem}.safetensors")
    manifest = verify_loosely(checkpoint)
    (checkpoint / MANIFEST).write_bytes(msgspec.json.encode(manifest))


def verify_loosely(checkpoint: Path) -> Manifest:
    told = msgspec.json.decode((checkpoint / MANIFEST).read_bytes(), type=Manifest)
    files = {name: _record(checkpoint / name) for name in told.files}
    return seal(msgspec.structs.replace(told, files=files))


def test_a_checkpoint_that_was_not_come_by_honestly_is_found_out(jobs: Jobs) -> None:
    jobs.run("job", {5: [Pause()]}, training=TRAINING)
    spoil(jobs.checkpoints() / "step-6", "training/optimizer")
    request = request_of(jobs)
    assert (request.first, request.last) == (5, 6)
    # In this process: what a fresh one adds is seen above.
    verdict = replay.replay(request, os.getppid()).verdict
    assert verdict is not None
    assert not verdict.equal
    assert verdict.difference == pytest.approx(0.25, abs=1e-3)
    assert verdict.detail == "They differ: training/optimizer by at most 0.25."


def test_without_an_earlier_checkpoint_it_goes_from_the_beginning(jobs: Jobs) -> None:
    jobs.run("job", {3: [Pause()]}, training={"max_steps": 10})
    request = request_of(jobs, k=3)
    assert (request.first, request.last, request.start.resume_from) == (1, 4, "")
    verdict = replay.replay(request, os.getppid()).verdict
    assert verdict is not None
    assert verdict.equal


def test_a_live_parameter_is_set_again_at_its_step(jobs: Jobs) -> None:
    told = jobs.run(
        "job", {4: [SetParameters(Parameters(learning_rate=1e-3))], 7: [Pause()]}, training=TRAINING
    )
    (taken,) = told.of(ParametersSet)
    applied = [(taken.step, taken.parameters)]
    request = request_of(jobs, k=4, applied=applied, parameters=taken.parameters)
    assert (request.first, request.last) == (5, 8)
    assert request.first < taken.step <= request.last
    verdict = replay.replay(request, os.getppid()).verdict
    assert verdict is not None
    assert verdict.equal, verdict.detail


def test_it_does_not_go_from_a_checkpoint_that_the_run_had_gone_back_behind(jobs: Jobs) -> None:
    training = {**TRAINING, "save_total_limit": 9}
    jobs.run("job", {4: [Pause()]}, training=training)
    back = str(jobs.checkpoints() / "step-2")
    other = {3: [SetParameters(Parameters(learning_rate=1e-3))], 6: [Pause()]}
    told = jobs.run("job", other, attempt=2, resume_from=back, training=training)
    (taken,) = told.of(ParametersSet)
    abandoned = Checkpoints(jobs.checkpoints()).path(5)
    assert verify_loosely(abandoned).attempt == 1
    request = request_of(jobs, applied=[(taken.step, taken.parameters)], parameters=taken.parameters)
    assert (request.first, request.last) == (5, 7)
    verdict = replay.replay(request, os.getppid()).verdict
    assert verdict is not None
    assert verdict.equal, verdict.detail


@pytest.mark.parametrize(
    ("begun", "led", "not_led"),
    [
        # Attempt 2 went back to step 2, and attempt 5 went on from its step 6.
        (
            [(1, 0), (2, 2), (5, 6)],
            [(1, 1), (1, 2), (2, 4), (2, 6), (5, 7)],
            [(1, 3), (1, 5), (2, 7), (3, 4), (4, 6), (0, 1), (6, 7)],
        ),
        # Older agents did not say it.
        ([], [(1, 3), (5, 7)], [(6, 7)]),
        ([(4, 6), (5, 7)], [(1, 3), (3, 6), (4, 6), (5, 8)], [(1, 7), (4, 8), (6, 7)]),
    ],
)
def test_which_checkpoints_led_to_another(
    begun: list[tuple[int, int]], led: list[tuple[int, int]], not_led: list[tuple[int, int]]
) -> None:
    def made(attempt: int, step: int) -> Manifest:
        return Manifest(job_id="job", step=step, epoch=1.0, attempt=attempt, reason="schedule", time=1.0)

    target = msgspec.structs.replace(made(5, 8), begun=begun)
    assert [led_to(target, made(*one)) for one in led] == [True] * len(led)
    assert [led_to(target, made(*one)) for one in not_led] == [False] * len(not_led)


@pytest.mark.parametrize(
    ("change", "clause"),
    [
        ({"inputs": {"spec": "other"}}, "what the run is made of has changed since the checkpoint"),
        ({"job_id": "other"}, "it is the checkpoint of another job that this one begins with"),
        ({"format": 1}, "the checkpoint was saved by an older agent"),
        ({"step": 5000}, "no good checkpoint is left from 2000 steps before it or earlier"),
    ],
)
def test_what_cannot_be_replayed_is_said(jobs: Jobs, change: dict[str, Any], clause: str) -> None:
    folder = jobs.checkpoints() / "step-4"
    folder.mkdir(parents=True)
    manifest = Manifest(
        job_id="job", step=4, epoch=1.0, attempt=1, reason="pause", time=1.0, inputs={"spec": "a"}
    )
    found = Found(folder, msgspec.structs.replace(manifest, **change), 1)
    line = RecordingLine({})
    start = jobs.start("job", attempt=2, verify_resume=2000)
    checking = replay.Checking(start, found, {"spec": "a"}, Inbox(line))
    checking.on_step_end(None, None, None)
    checking.on_step_end(None, None, None)
    checking.finish()
    assert line.events == [Note("info", f"The resume was not checked: {clause}.")]


def test_a_pause_ends_the_check_at_once(jobs: Jobs) -> None:
    jobs.run("job", {5: [Pause()]}, training=TRAINING)
    checking = checking_of(jobs)
    checking.on_step_end(None, None, None)
    while checking._process is None:
        assert checking._thread is not None
        checking._thread.join(0.01)
    checking.drop()
    assert checking._process.returncode == -signal.SIGKILL
    assert not (jobs.checkpoints() / REPLAY).exists()
    # And in a run that is paused in the middle of it nothing is said of it.
    line = resumed(jobs, script={7: [Pause()]})
    assert isinstance(line.last, Left)
    assert not line.of(Verified)
    assert not line.of(Note)
