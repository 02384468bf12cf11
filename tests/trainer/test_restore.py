"""Which checkpoint a job goes on from, and one that begins with another job's."""

from pathlib import Path

import msgspec
import pytest

from agent.trainer import run
from agent.trainer.checkpoint import MANIFEST, Ancestor, Found, Manifest, make_manifest, seal, verify
from agent.trainer.errors import TrainerError
from agent.trainer.restore import lineage
from protocol.failures import FailureReason
from protocol.jobspec import BranchSpec, JobSpec, LoraSpec, ModelSpec
from protocol.worker import Cancel, Finished, Note, Parameters, Pause, Ready
from tests.trainer.conftest import Jobs, RecordingLine, curve


def branched(
    jobs: Jobs, name: str, step: int, script: dict[int, list[object]] | None = None, **changes: object
) -> RecordingLine:
    """Run a job that begins with a checkpoint of run-1."""
    branch = BranchSpec(job_id="run-1", checkpoint=f"step-{step}")
    start = jobs.start(name, branch=branch, **changes)
    parent = str(jobs.checkpoints("run-1") / f"step-{step}")
    start = msgspec.structs.replace(start, workspace=msgspec.structs.replace(start.workspace, branch=parent))
    line = RecordingLine(dict(script or {}))
    assert run.train(start, line, reports_beside=False) == 0
    return line


def test_a_branch_with_nothing_changed_ends_as_its_parent(jobs: Jobs) -> None:
    lora = LoraSpec(r=4, dropout=0.1)
    parent = jobs.run("run-1", training={"save_steps": 4}, lora=lora)
    line = branched(jobs, "run-2", 4, training={"save_steps": 2}, lora=lora)
    (ready,) = line.of(Ready)
    assert ready.start_step == 4
    assert ready.facts["branched_from"] == "run-1 step-4"
    assert line.last.weights_hash == parent.last.weights_hash
    later = {step: values for step, values in curve(parent).items() if step > 4}
    assert curve(line) == later
    mine = verify(jobs.checkpoints("run-2") / "step-6").manifest
    theirs = verify(jobs.checkpoints("run-1") / "step-4").manifest
    assert mine.lineage == [Ancestor("run-1", "step-4", 4, theirs.check)]
    assert mine.job_id == "run-2"


def test_a_branch_of_a_branch_names_both() -> None:
    spec = JobSpec(job_id="run-3", model=ModelSpec(name="m"), branch=BranchSpec(job_id="run-2"))
    older = Ancestor("run-1", "step-4", 4, "a")
    manifest = make_manifest("run-2", 6, 1.0, 1, "schedule")
    found = Found(Path("/c/run-2/step-6"), msgspec.structs.replace(manifest, lineage=[older], check="b"), 1)
    assert lineage(found, spec) == [older, Ancestor("run-2", "step-6", 6, "b")]
    own = msgspec.structs.replace(manifest, job_id="run-3", lineage=[older])
    assert lineage(Found(Path("/c/run-3/step-8"), own, 1), spec) == [older]
    assert lineage(None, spec) == []


def test_a_branch_goes_its_own_way_and_on_from_its_own_checkpoints(jobs: Jobs) -> None:
    parent = jobs.run("run-1", {3: [Pause()]})
    other = {"learning_rate": 1e-3, "max_steps": 12, "weight_decay": 0.5}
    untouched = branched(jobs, "run-2", 4, training=other)
    # The linear schedule of twelve steps with the new peak, at the steps that are left.
    rates = [untouched.points[step]["learning_rate"] for step in range(5, 13)]
    assert rates == pytest.approx([1e-3 * left / 12 for left in range(8, 0, -1)])
    assert [note.level for note in untouched.of(Note)] == ["info"] * 4

    branched(jobs, "run-3", 4, {6: [Pause()]}, training=other)
    line = branched(jobs, "run-3", 4, training=other, attempt=2)
    assert line.of(Ready)[0].start_step == 7
    assert not line.of(Note)
    assert line.last.weights_hash == untouched.last.weights_hash != parent.last
    assert verify(jobs.checkpoints("run-3") / "step-12").manifest.lineage[0].job_id == "run-1"


def test_a_branch_of_an_ended_job_trains_on(jobs: Jobs) -> None:
    stops = {
        "early_stopping_patience": 1,
        "early_stopping_threshold": 100.0,
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    parent = jobs.run("run-1", training=stops, eval_fraction=0.25)
    end = parent.last.step
    assert end < 8
    line = branched(jobs, "run-2", end, training={**stops, "early_stopping_patience": 9}, eval_fraction=0.25)
    assert line.last.step == 8


def test_a_parents_live_parameters_stay_unless_the_branch_says_otherwise(jobs: Jobs) -> None:
    from protocol.worker import SetParameters

    jobs.run("run-1", {1: [SetParameters(Parameters(learning_rate=5e-3))], 3: [Pause()]})
    same = branched(jobs, "run-2", 4)
    assert same.points[5]["learning_rate"] == pytest.approx(5e-3 * 4 / 8)
    other = branched(jobs, "run-3", 4, training={"learning_rate": 2e-3})
    assert other.points[5]["learning_rate"] == pytest.approx(2e-3 * 4 / 8)


def test_a_branch_whose_own_checkpoints_are_bad_begins_again_where_it_branched_off(jobs: Jobs) -> None:
    jobs.run("run-1", {3: [Pause()]})
    branched(jobs, "run-2", 4, {6: [Pause()]})
    (jobs.checkpoints("run-2") / "step-7" / "model.safetensors").unlink()
    line = branched(jobs, "run-2", 4, attempt=2)
    assert line.of(Ready)[0].start_step == 4
    assert line.of(Note)[1].text.endswith("so the job starts again where it branched off.")
    assert isinstance(line.last, Finished)


def test_a_bad_checkpoint_is_not_branched_from(jobs: Jobs) -> None:
    jobs.run("run-1", {3: [Pause()]})
    (jobs.checkpoints("run-1") / "step-4" / "model.safetensors").unlink()
    with pytest.raises(TrainerError) as caught:
        branched(jobs, "run-2", 4)
    assert caught.value.reason is FailureReason.CHECKPOINT
    assert "its file model.safetensors is missing. Branch from another one." in caught.value.sentence


def test_what_a_killed_check_left_is_cleared(jobs: Jobs) -> None:
    jobs.run("job", {3: [Cancel()]}, training={"save_steps": 2})
    left = jobs.checkpoints() / ".replay" / "run"
    left.mkdir(parents=True)
    jobs.run("job", attempt=2, training={"save_steps": 2})
    assert not left.exists()


def of_a_newer_agent(checkpoint: Path, number: int = 99) -> None:
    """Make a checkpoint one that this version of the agent cannot read."""
    told = msgspec.json.decode((checkpoint / MANIFEST).read_bytes(), type=Manifest)
    (checkpoint / MANIFEST).write_bytes(
        msgspec.json.encode(seal(msgspec.structs.replace(told, format=number)))
    )


def test_a_job_whose_checkpoints_only_a_newer_agent_reads_does_not_begin_anew(jobs: Jobs) -> None:
    untouched = jobs.run("untouched")
    jobs.run("job", {3: [Pause()]})
    of_a_newer_agent(jobs.checkpoints() / "step-4")
    with pytest.raises(TrainerError) as caught:
        jobs.run("job", attempt=2)
    assert caught.value.reason is FailureReason.CHECKPOINT
    assert caught.value.sentence == (
        "The job cannot go on from its checkpoint step-4: it was written by a newer version of the agent (format 99; "
        "this one reads up to 2). It is untouched."
    )
    assert "Update the agent" in caught.value.advice
    assert not jobs.output().exists()
    # Once the agent is updated, all is as it was.
    of_a_newer_agent(jobs.checkpoints() / "step-4", 2)
    line = jobs.run("job", attempt=3)
    assert line.of(Ready)[0].start_step == 4
    assert line.last.weights_hash == untouched.last.weights_hash


def test_beside_a_good_one_that_of_a_newer_agent_is_kept(jobs: Jobs) -> None:
    training = {"save_steps": 2, "save_total_limit": 1}
    untouched = jobs.run("untouched", training=training)
    jobs.run("job", {5: [Pause()]}, training={"save_steps": 2})
    of_a_newer_agent(jobs.checkpoints() / "step-6")
    line = jobs.run("job", attempt=2, training=training)
    assert line.of(Ready)[0].start_step == 4
    assert line.last.weights_hash == untouched.last.weights_hash
    kept = jobs.checkpoints() / "kept-step-6-attempt-1"
    of_a_newer_agent(kept, 2)
    assert verify(kept, "job").manifest.step == 6


def test_a_branch_does_not_begin_anew_where_its_own_is_of_a_newer_agent(jobs: Jobs) -> None:
    jobs.run("run-1", {3: [Pause()]})
    branched(jobs, "run-2", 4, {6: [Pause()]})
    of_a_newer_agent(jobs.checkpoints("run-2") / "step-7")
    with pytest.raises(TrainerError, match="newer version"):
        branched(jobs, "run-2", 4, attempt=2)
    assert (jobs.checkpoints("run-2") / "step-7").is_dir()
