"""Checkpoints of real runs: written beside training, put back exactly, and never in the way of one another."""

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from agent.trainer import contents, disk, keeper, run, saving, snapshot
from agent.trainer.checkpoint import MANIFEST, Checkpoints, verify
from agent.trainer.errors import TrainerError
from agent.trainer.model import old_name_allowed
from agent.trainer.output import weights_hash
from agent.trainer.snapshot import Content, HostBuffer
from protocol.failures import FailureReason
from protocol.jobspec import LoraSpec
from protocol.worker import Cancel, Finished, Left, Metrics, Note, Pause, Ready, Saved, SaveNow
from tests.support.mounts import needs_mounts
from tests.trainer.conftest import Jobs, RecordingLine, curve

ROOT = Path(__file__).parents[2]
LORA = LoraSpec(r=4, dropout=0.2)
EVERY_2 = {"eval_strategy": "steps", "eval_steps": 2}
WORSE = {**EVERY_2, "learning_rate": 0.6, "lr_scheduler_type": "constant", "max_steps": 12}
"""At such a rate an early evaluation is the best."""


class Acting(RecordingLine):
    """Does something to the disk when the point of a step is said, and the save of the step before is over."""

    def __init__(
        self, script: dict[int, list[Any]], acts: dict[int, Callable[[], None]], saved: bool = False
    ) -> None:
        super().__init__(script)
        self._over = saved
        self._acts = acts
        self._said = threading.Condition()

    def say(self, event: Any) -> None:
        with self._said:
            super().say(event)
            self._said.notify()
            if isinstance(event, Metrics) and event.step in self._acts:
                assert self._said.wait_for(lambda: self._saved(event.step - 1), 60)
                self._acts.pop(event.step)()

    def _saved(self, step: int) -> bool:
        return self._over or any(
            (isinstance(event, Saved) and event.step == step)
            or (isinstance(event, Note) and f"at step {step} " in event.text)
            for event in self.events
        )


def act(
    jobs: Jobs,
    acts: dict[int, Callable[[], None]],
    script: dict[int, list[Any]] | None = None,
    **changes: Any,
) -> RecordingLine:
    """Run a job while something is done to it."""
    line = Acting(dict(script or {}), acts)
    jobs.line = line
    assert run.train(jobs.start("job", **changes), line, reports_beside=False) == 0
    return line


def notes(line: RecordingLine) -> list[str]:
    return [note.text for note in line.of(Note)]


def steps(jobs: Jobs, name: str = "job") -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in jobs.checkpoints(name).glob("step-*"))


# Beside training


def test_a_checkpoint_in_the_background_is_of_its_own_step(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However late it is copied and written: nothing of a later step gets in."""
    copies, write = HostBuffer._copies, Content.write
    late = threading.Event()

    def copy_late(self: HostBuffer, content: Content) -> Any:
        late.wait(0.3)  # several steps of this model
        return copies(self, content)

    def write_late(self: Content, folder: Path, **how: Any) -> Any:
        late.wait(0.3)
        return write(self, folder, **how)

    monkeypatch.setattr(HostBuffer, "_copies", copy_late)
    monkeypatch.setattr(Content, "write", write_late)
    untouched = jobs.run("untouched", lora=LORA, eval_fraction=0.25, training=EVERY_2)
    cut = jobs.run(
        "job", {5: [Cancel()]}, lora=LORA, eval_fraction=0.25, training={**EVERY_2, "save_steps": 3}
    )
    (saved,) = [one for one in cut.of(Saved) if one.reason == "schedule"]
    assert (saved.step, saved.train_loss) == (3, cut.points[3]["train_loss"])
    assert 0.3 <= saved.stall < saved.seconds
    shutil.rmtree(jobs.checkpoints() / "step-2")
    for path in jobs.checkpoints().glob("step-*"):
        if path.name != "step-3":
            shutil.rmtree(path)
    resumed = jobs.run("job", attempt=2, lora=LORA, eval_fraction=0.25, training=EVERY_2)
    assert resumed.of(Ready)[0].start_step == 3
    before = {step: values for step, values in curve(cut).items() if step <= 3}
    assert before | curve(resumed) == curve(untouched)
    assert resumed.last.weights_hash == untouched.last.weights_hash


def test_a_save_that_comes_too_soon_waits_and_is_not_left_out(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, late = Content.write, threading.Event()

    def write_late(self: Content, folder: Path, **how: Any) -> Any:
        late.wait(0.1)
        return write(self, folder, **how)

    monkeypatch.setattr(Content, "write", write_late)
    line = jobs.run("job", {3: [SaveNow("c1")]}, training={"save_steps": 2})
    assert [(one.step, one.reason, one.command_id) for one in line.of(Saved)] == [
        (2, "schedule", ""),
        (4, "schedule", ""),
        (4, "command", "c1"),
        (6, "schedule", ""),
        (8, "final", ""),
        (8, "schedule", ""),
    ]
    ended = line.of(Saved)[-1]
    assert ended.stall == ended.seconds
    assert steps(jobs) == [4, 6, 8]


@pytest.mark.parametrize("why", ["setting", "memory"])
def test_saves_are_made_at_once_where_there_is_no_room_for_a_copy(
    why: str, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why == "memory":
        monkeypatch.setattr(keeper, "fits_host_memory", lambda needed: False)
    line = jobs.run("job", training={"save_steps": 2}, background_saves=why == "memory")
    assert all(saved.stall == saved.seconds for saved in line.of(Saved))
    told = [text for text in notes(line) if "does not fit into this machine's memory" in text]
    assert len(told) == (why == "memory")


def test_memory_that_is_not_to_be_had_after_all_is_not_the_optimizers_lack(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted: dict[str, Any] = {"lora": LORA, "training": {"save_steps": 2}}
    untouched = jobs.run("untouched", **wanted)

    def refused(size: int) -> torch.Tensor:
        raise RuntimeError(f"DefaultCPUAllocator: can't allocate memory: you tried to allocate {size} bytes.")

    monkeypatch.setattr(snapshot, "_fresh", refused)
    line = jobs.run("job", **wanted)
    assert line.last.weights_hash == untouched.last.weights_hash
    for step in (4, 6):
        one, other = (verify(jobs.checkpoints(name) / f"step-{step}") for name in ("job", "untouched"))
        weights = [name for name in one.manifest.files if name.endswith(".safetensors")]
        assert weights and all(one.manifest.files[name] == other.manifest.files[name] for name in weights)
    assert len([text for text in notes(line) if "does not fit into this machine's memory" in text]) == 1


def test_a_bug_in_the_writing_thread_ends_the_job(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: HostBuffer, content: Content) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setattr(HostBuffer, "_copies", broken)
    with pytest.raises(RuntimeError, match="broken"):
        jobs.run("job", training={"save_steps": 2})


# Put back exactly


@pytest.mark.parametrize(
    "optim",
    [
        "adamw_torch_fused",
        "adafactor",
        "sgd",
        "adamw_8bit",
        pytest.param("paged_adamw_8bit", marks=pytest.mark.filterwarnings("ignore:Paged optimizers")),
    ],
)
def test_every_optimizer_goes_on_exactly(optim: str, jobs: Jobs) -> None:
    wanted = {"training": {"optim": optim, "max_steps": 5, "lr_scheduler_type": "cosine"}}
    untouched = jobs.run("untouched", **wanted)
    jobs.run("job", {2: [Pause()]}, **wanted)
    resumed = jobs.run("job", attempt=2, **wanted)
    assert resumed.of(Ready)[0].start_step == 3
    assert resumed.last.weights_hash == untouched.last.weights_hash


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_compressed_checkpoint_goes_on_exactly_and_is_smaller(lora: LoraSpec | None, jobs: Jobs) -> None:
    wanted: dict[str, Any] = {"lora": lora, "training": {"save_steps": 2}}
    untouched = jobs.run("untouched", **wanted)
    jobs.run("job", {4: [Pause()]}, compress_checkpoints=True, **wanted)
    plain = verify(jobs.checkpoints("untouched") / "step-4")
    small = verify(jobs.checkpoints() / "step-4")
    assert small.size < plain.size
    assert not list(small.path.rglob("*.safetensors"))
    # The setting may change on the way: each checkpoint says itself what it is.
    resumed = jobs.run("job", attempt=2, **wanted)
    assert resumed.of(Ready)[0].start_step == 5
    assert resumed.last.weights_hash == untouched.last.weights_hash


def test_a_checkpoint_of_format_1_goes_on_exactly(jobs: Jobs) -> None:
    """As the first release wrote it: with torch.save, for optimizer, scheduler and random state."""
    wanted: dict[str, Any] = {"lora": LORA, "training": {"max_steps": 6}}
    untouched = jobs.run("untouched", **wanted)
    jobs.run("job", {2: [Pause()]}, **wanted)
    found = verify(jobs.checkpoints() / "step-3")
    folder = found.path
    torch.save(contents.take(folder, contents.OPTIMIZER), folder / "optimizer.pt")
    torch.save(contents.take(folder, contents.SCHEDULE)["scheduler"], folder / "scheduler.pt")
    torch.save(contents.take(folder, contents.RANDOM), folder / "rng_state.pth")
    shutil.rmtree(folder / "training")
    (folder / MANIFEST).unlink()
    old = saving.msgspec.structs.replace(found.manifest, format=1, files={})
    Checkpoints(jobs.checkpoints()).save(
        old, lambda into: shutil.copytree(folder, into, dirs_exist_ok=True) and None
    )
    resumed = jobs.run("job", attempt=2, **wanted)
    assert resumed.of(Ready)[0].start_step == 3
    assert resumed.last.weights_hash == untouched.last.weights_hash


def test_nothing_in_a_checkpoint_is_a_pickle_and_others_load_it(jobs: Jobs, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    jobs.run("full", training={"max_steps": 1})
    jobs.run("lora", lora=LORA, training={"max_steps": 1})
    full, adapter = (jobs.checkpoints(name) / "step-1" for name in ("full", "lora"))
    for folder in (full, adapter):
        endings = {path.suffix for path in folder.rglob("*") if path.is_file()}
        assert endings <= {".json", ".safetensors", ".msgpack", ".jinja"}
    model = AutoModelForCausalLM.from_pretrained(full)
    AutoTokenizer.from_pretrained(full)
    model.save_pretrained(tmp_path / "again")
    assert weights_hash(tmp_path / "again") == weights_hash(full)
    base = AutoModelForCausalLM.from_pretrained(jobs.model)
    with old_name_allowed():
        loaded = PeftModel.from_pretrained(base, adapter)
    loaded.save_pretrained(tmp_path / "adapter")
    assert weights_hash(tmp_path / "adapter") == weights_hash(adapter)


# What stays


def test_the_final_model_can_be_the_best_of_a_run_that_went_to_its_end(jobs: Jobs) -> None:
    wanted: dict[str, Any] = {"training": WORSE, "eval_fraction": 0.25}
    last = jobs.run("last", **wanted)
    best_step = last.last.values["best_step"]
    assert best_step < 12
    best = jobs.run("best", **{**wanted, "training": {**wanted["training"], "load_best_at_end": True}})
    assert isinstance(best.last, Finished)
    assert best.last.weights_hash == weights_hash(jobs.checkpoints("last") / f"step-{best_step:.0f}")
    assert best.last.weights_hash != last.last.weights_hash
    assert best.last.values["final_eval_loss"] == best.last.values["best_eval_loss"]


def test_the_best_outlives_the_limit(jobs: Jobs) -> None:
    training = {**WORSE, "save_steps": 1, "save_total_limit": 1}
    line = jobs.run("job", training=training, eval_fraction=0.25)
    assert steps(jobs) == [line.last.values["best_step"], 12]
    newest = verify(jobs.checkpoints() / "step-12")
    assert newest.manifest.best_step == line.last.values["best_step"]


# Disks


def test_a_full_disk_pauses_the_job_and_loses_nothing(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    untouched = jobs.run("untouched", training={"save_steps": 2})
    full = {5: lambda: monkeypatch.setattr(disk, "SLACK", 1 << 60)}
    line = act(jobs, full, training={"save_steps": 2})
    assert isinstance(line.last, Left)
    # Training learns of it at the next boundary, or where it must wait for the write.
    assert line.last.why == "disk_full" and 6 <= line.last.step <= 8
    assert line.last.need > 1 << 60
    # Older ones went first, and the newest good one stayed.
    assert steps(jobs) == [4]
    (note,) = line.of(Note)
    assert "no room for the checkpoint at step 6" in note.text and str(jobs.checkpoints()) in note.text
    monkeypatch.setattr(disk, "SLACK", 0)
    resumed = jobs.run("job", attempt=2, training={"save_steps": 2})
    assert resumed.of(Ready)[0].start_step == 4
    assert resumed.last.weights_hash == untouched.last.weights_hash


def test_a_disk_that_is_full_before_the_start_is_said_before_the_first_step(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "SLACK", 1 << 60)
    line = jobs.run("job")
    assert isinstance(line.last, Left) and (line.last.why, line.last.step) == ("disk_full", 0)
    assert not line.of(Ready)
    assert "no room for a checkpoint of this job" in notes(line)[0]


def test_on_a_short_disk_a_resume_leaves_the_best(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    training = {**WORSE, "save_steps": 1, "save_total_limit": 12}
    paused = jobs.run("job", {7: [Pause()]}, training=training, eval_fraction=0.25)
    best = verify(jobs.checkpoints() / f"step-{paused.last.step}").manifest.best_step
    assert 0 < best < paused.last.step - 1
    monkeypatch.setattr(disk, "SLACK", 1 << 60)
    again = jobs.run("job", attempt=2, training=training, eval_fraction=0.25)
    assert again.last.why == "disk_full"
    assert steps(jobs) == [best, paused.last.step]


def test_a_disk_too_small_for_all_that_is_kept_is_said_at_the_start(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "free_bytes", lambda folder: 2_000_000)
    line = jobs.run("job", training={"save_total_limit": 5, "max_steps": 1})
    assert isinstance(line.last, Finished)
    assert "has 2 MB free, but 5 checkpoints of about 1 MB" in notes(line)[0]


def test_no_room_for_the_final_model_pauses_the_job_at_its_end(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    untouched = jobs.run("untouched")
    final = jobs.output().parent

    def room(folder: Path, needed: int) -> bool:
        return folder != final

    monkeypatch.setattr(disk, "has_room", room)
    line = jobs.run("job")
    assert line.last.why == "disk_full" and line.last.step == 8
    assert "no room for the final model" in notes(line)[-1]
    assert steps(jobs) == [8] and not jobs.output().exists()
    monkeypatch.setattr(disk, "has_room", lambda folder, needed: True)
    again = jobs.run("job", attempt=2)
    assert again.of(Ready)[0].start_step == 8
    assert again.last.weights_hash == untouched.last.weights_hash


def test_a_folder_that_vanishes_is_made_again(jobs: Jobs) -> None:
    folder = jobs.checkpoints()
    folder.mkdir(parents=True)
    (folder / ".training-agent-job").write_text("job")
    line = act(jobs, {5: lambda: shutil.rmtree(folder)}, training={"save_steps": 2})
    assert isinstance(line.last, Finished)
    assert notes(line) == [f"The folder {folder} had vanished with its checkpoints, and was made again."]
    assert steps(jobs) == [6, 8]
    assert (folder / ".training-agent-job").read_text() == "job"


def test_a_folder_that_vanishes_while_it_is_written_to_is_made_again(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, doomed = Content.write, [jobs.checkpoints()]

    def vanish_first(self: Content, folder: Path, **how: Any) -> Any:
        if doomed:
            shutil.rmtree(doomed.pop())
        return write(self, folder, **how)

    monkeypatch.setattr(Content, "write", vanish_first)
    line = jobs.run("job", training={"save_steps": 3, "max_steps": 4})
    assert isinstance(line.last, Finished)
    assert steps(jobs) == [3, 4]
    assert "had vanished" in notes(line)[0]


def test_a_folder_that_cannot_be_written_for_a_while_does_no_harm(jobs: Jobs) -> None:
    folder, aside = jobs.checkpoints(), jobs.checkpoints().with_name("aside")

    def take() -> None:
        folder.rename(aside)
        folder.write_text("in the way")  # read-only would not stop root

    def give_back() -> None:
        folder.unlink()
        aside.rename(folder)

    line = act(jobs, {3: take, 5: give_back}, training={"save_steps": 2})
    assert isinstance(line.last, Finished)
    (note,) = notes(line)
    assert "The checkpoint at step 4 cannot be written to" in note
    assert "Training goes on, and tries again" in note
    assert steps(jobs) == [2, 6, 8]


def test_a_pause_that_cannot_be_kept_is_a_sentence(jobs: Jobs) -> None:
    folder, aside = jobs.checkpoints(), jobs.checkpoints().with_name("aside")

    def take() -> None:
        folder.rename(aside)
        folder.write_text("in the way")

    with pytest.raises(TrainerError) as caught:
        act(jobs, {5: take}, {5: [Pause()]}, training={"save_steps": 2})
    assert caught.value.reason is FailureReason.PERMISSION
    assert caught.value.sentence == (
        f"The checkpoint at step 6 cannot be written to {folder}: File exists. Let the user whom the agent runs as "
        "write there, or mount the disk again. The last good checkpoint is of step 4: the 2 steps after it are lost, "
        "and will be made again."
    )
    assert caught.value.advice == (
        "Once the agent can write there again, retry the job: it goes on from its last good checkpoint."
    )
    assert sorted(path.name for path in aside.iterdir()) == ["step-2", "step-4"]


def test_an_end_that_cannot_be_kept_says_how_far_the_job_falls_back(jobs: Jobs) -> None:
    jobs.run("job", {3: [Pause()]})
    folder, aside = jobs.checkpoints(), jobs.checkpoints().with_name("aside")

    def fails(attempt: int) -> str:
        def take() -> None:
            folder.rename(aside)
            folder.write_text("in the way")

        line = Acting({}, {6: take}, saved=True)
        with pytest.raises(TrainerError, match="The checkpoint at step 8 cannot be written") as caught:
            run.train(jobs.start("job", attempt=attempt), line, reports_beside=False)
        return caught.value.sentence

    assert "The last good checkpoint is of step 4: the 4 steps after it are lost" in fails(2)
    folder.unlink()
    shutil.rmtree(aside)
    assert "There is no good checkpoint, so the job will begin anew." in fails(3)


def test_a_disk_that_turns_read_only_costs_the_steps_after_the_last_checkpoint(tmp_path: Path) -> None:
    command = [*needs_mounts(), sys.executable, "-m", "tests.support.read_only_disk", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["reason"] == "permission"
    assert "cannot be written to" in said["sentence"] and ": Read-only file system." in said["sentence"]
    assert "The last good checkpoint is of step 2: the 5 steps after it are lost" in said["sentence"]
    assert said["advice"].startswith("Once the agent can write there again, retry the job")
    assert (said["saved"], said["left"], said["start_step"], said["same"]) == ([2], ["step-2"], 2, True)


@pytest.mark.parametrize("which", ["checkpoints", "output"])
def test_a_place_that_cannot_be_written_is_found_before_the_first_step(
    which: str, jobs: Jobs, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    start = jobs.start("job")
    place = str(tmp_path / "file" / "job")
    space = saving.msgspec.structs.replace(start.workspace, **{which: place})
    line = RecordingLine({})
    with pytest.raises(TrainerError, match="cannot be written to") as caught:
        run.train(saving.msgspec.structs.replace(start, workspace=space), line)
    assert caught.value.reason is FailureReason.PERMISSION
    assert not line.of(Ready)


def test_a_checkpoint_of_another_job_is_not_taken_and_not_destroyed(jobs: Jobs) -> None:
    jobs.run("other", training={"max_steps": 2})
    shutil.copytree(jobs.checkpoints("other"), jobs.checkpoints())
    line = jobs.run("job", training={"max_steps": 2})
    assert line.of(Ready)[0].start_step == 0
    assert notes(line)[0] == ("Checkpoint step-2 was passed over: it is a checkpoint of another job (other).")
    assert verify(jobs.checkpoints() / "step-2", "job")
    assert verify(jobs.checkpoints() / "kept-step-2-attempt-1", "other")
