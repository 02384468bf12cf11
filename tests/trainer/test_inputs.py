"""What has changed since a checkpoint was saved is found, and refused or accepted by the user's word."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.trainer import fingerprints, inputs
from agent.trainer.checkpoint import Found, Manifest
from agent.trainer.errors import TrainerError
from agent.trainer.inputs import Weight
from agent.trainer.progress import Place, Progress
from protocol.failures import FailureReason
from protocol.jobspec import (
    BranchSpec,
    DataSpec,
    JobSpec,
    LoraSpec,
    Method,
    ModelSpec,
    Quantization,
    TokenizerSpec,
    TrainingSpec,
)
from protocol.worker import Finished, Note, Parameters, Pause, Ready
from tests.trainer.conftest import PLAIN_TEMPLATE, Jobs, build_tokenizer, chat_rows, write_jsonl

SPEC = JobSpec(
    job_id="run-1",
    model=ModelSpec(name="m"),
    data=DataSpec(path="rows.jsonl"),
    lora=LoraSpec(r=8),
    training=TrainingSpec(max_steps=16),
)
OTHERS: dict[str, Any] = {
    "epochs": 2.0, "max_steps": 32, "learning_rate": 1e-3, "batch_size": 2, "eval_batch_size": 2,
    "gradient_accumulation_steps": 2, "warmup_steps": 3, "warmup_ratio": 0.5, "max_length": 512,
    "lr_scheduler_type": "cosine", "optim": "sgd", "weight_decay": 0.1, "max_grad_norm": 0.5, "adam_beta1": 0.8,
    "adam_beta2": 0.98, "adam_epsilon": 1e-6, "logging_steps": 3, "eval_strategy": "epoch", "eval_steps": 7,
    "save_steps": 7, "save_total_limit": 9, "gradient_checkpointing": True, "packing": True,
    "group_by_length": True, "assistant_only_loss": True, "bf16": True, "fp16": True, "seed": 7,
    "dataloader_num_workers": 1, "dataloader_prefetch_factor": 2, "dataloader_pin_memory": False,
    "early_stopping_patience": 2, "early_stopping_threshold": 0.1, "metric_for_best": "perplexity",
    "load_best_at_end": True, "deterministic": True, "on_bad_loss": "rewind", "spike_factor": 3.0, "max_rewinds": 9,
}  # fmt: skip
"""For every hyper-parameter another value than SPEC has."""


def marks_of(spec: JobSpec, **changes: str) -> dict[str, str]:
    plain = msgspec.structs.replace(spec, job_id="job", branch=None)
    return {
        "spec": msgspec.json.encode(plain).decode(),
        **dict.fromkeys(("rows", "eval_rows", "template", "tokenizer", "weights", "precision"), "a"),
        **changes,
    }


def saved(spec: JobSpec = SPEC, *, job_id: str = "run-1", **changes: Any) -> Found:
    manifest = Manifest(
        job_id=job_id,
        step=4,
        epoch=0.5,
        attempt=1,
        reason="pause",
        time=1.0,
        versions={**fingerprints.versions(), **changes.pop("versions", {})},
        inputs=marks_of(spec),
    )
    return Found(Path("/c/run-1/step-4"), manifest, 1)


def changed(**training: Any) -> JobSpec:
    return msgspec.structs.replace(SPEC, training=msgspec.structs.replace(SPEC.training, **training))


def check(
    spec: JobSpec, found: Found | None = None, *, accept: bool = False, **marks: str
) -> tuple[list[str], Progress]:
    """Return the notes, and the progress as it is brought to what was accepted."""
    progress = Progress(
        place=Place(epoch=1, rows=12, micro=1, step_rows=1, stream_rows=48, digest="d"),
        parameters=Parameters(learning_rate=5e-5, save_steps=3),
        best_value=1.5,
        best_eval_loss=1.5,
        best_step=4,
        ended="stop",
    )
    notes: list[str] = []
    inputs.check(
        found or saved(),
        spec,
        marks_of(spec, **marks),
        progress,
        lambda level, text: notes.append(f"{level}: {text}"),
        accept=accept,
    )
    return notes, progress


def refused(act: Callable[[], Any]) -> str:
    with pytest.raises(TrainerError) as caught:
        act()
    assert caught.value.reason is FailureReason.CHECKPOINT
    return caught.value.sentence


def test_where_nothing_has_changed_nothing_is_said() -> None:
    assert check(SPEC)[0] == []
    assert set(OTHERS) == set(TrainingSpec.__struct_fields__)


@pytest.mark.parametrize("name", OTHERS)
def test_no_changed_setting_goes_by_in_silence(name: str) -> None:
    spec = changed(**{name: OTHERS[name]})
    (one,) = inputs.differences(saved(), spec, marks_of(spec))
    assert one.name == f"training.{name}"
    old = getattr(SPEC.training, name)
    assert one.what == f"training.{name} was {old} and is {OTHERS[name]}"
    quiet = name in inputs.NOT_THE_STEPS
    assert one.weight is (Weight.NOTED if quiet else Weight.WORD)
    if quiet:
        assert check(spec)[0] == [f"warning: {one.what} since the checkpoint step-4."]
        return
    assert one.what in refused(lambda: check(spec))
    assert check(spec, accept=True)[0] == [f"warning: {one.what}: accepted; {one.then}."]


@pytest.mark.parametrize(
    ("mark", "clause"),
    [
        ("rows", "the data set has other rows"),
        ("template", "the chat template is another"),
        ("tokenizer", "the tokenizer has another vocabulary, other merges or other special tokens"),
    ],
)
def test_other_data_needs_the_word_and_begins_the_epoch_anew(mark: str, clause: str) -> None:
    sentence = refused(lambda: check(SPEC, **{mark: "b"}))
    assert sentence.startswith(f"Not all is as it was when the checkpoint step-4 was saved: {clause}.")
    assert "--accept-changes" in sentence
    notes, progress = check(SPEC, accept=True, **{mark: "b"})
    assert notes[0].endswith("accepted; training goes on with the new, from the beginning of the epoch.")
    # In another order, so that what a rewind left out of the old one is not left out of this.
    assert progress.place == Place(epoch=1, rows=0, micro=1, step_rows=1, order=1)


def test_other_rows_to_evaluate_on_need_the_word_and_move_nothing() -> None:
    assert "the evaluation's data set has other rows" in refused(lambda: check(SPEC, eval_rows="b"))
    notes, progress = check(SPEC, accept=True, eval_rows="b")
    assert notes[0].endswith("accepted; evaluations are made on the new rows from here on.")
    assert progress.place.rows == 12


def test_another_template_is_not_taken_for_other_rows(jobs: Jobs) -> None:
    jobs.run("job", {3: [Pause()]}, training={"assistant_only_loss": False})
    other = TokenizerSpec(chat_template=PLAIN_TEMPLATE.replace("<|end|>", "<|end|>\n"))
    sentence = refused(
        lambda: jobs.run("job", attempt=2, training={"assistant_only_loss": False}, tokenizer=other)
    )
    assert "saved: the chat template is another. " in sentence


def test_more_rows_of_so_many_epochs_are_another_course_of_the_learning_rate(
    jobs: Jobs, tmp_path: Path
) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", chat_rows(16))
    epochs = {"epochs": 2.0, "max_steps": None, "batch_size": 4}
    jobs.run("job", {3: [Pause()]}, rows=rows, training=epochs)
    write_jsonl(rows, chat_rows(32))
    line = jobs.run("job", attempt=2, rows=rows, training=epochs, accept_changes=True)
    assert line.of(Ready)[0].total_steps == 16
    # Half of two epochs of 16 rows are behind, and a quarter of two of 32.
    assert "The learning rate goes from 0.005 to 0.0075 after step 4." in [n.text for n in line.of(Note)]
    assert line.points[5]["learning_rate"] == pytest.approx(1e-2 * 12 / 16)


def test_all_that_changed_is_listed_at_once() -> None:
    spec = changed(learning_rate=1e-3, seed=7, logging_steps=3)
    sentence = refused(lambda: check(spec, rows="b"))
    assert "the data set has other rows; training.learning_rate was 0.0002 and is 0.001; " in sentence
    assert "training.seed was 42 and is 7" in sentence
    assert "logging_steps" not in sentence
    assert len(check(spec, accept=True, rows="b")[0]) == 4


@pytest.mark.parametrize(
    ("spec", "marks", "clause"),
    [
        (SPEC, {"weights": "b"}, "the base model is another (was m and is m)"),
        (msgspec.structs.replace(SPEC, lora=LoraSpec(r=4)), {}, "lora.r was 8 and is 4"),
        (msgspec.structs.replace(SPEC, lora=None), {}, "the run was an adapter's training and is a full fine-tuning"),
        (msgspec.structs.replace(SPEC, method=Method.DPO), {}, "the method was sft and is dpo"),
        (
            msgspec.structs.replace(SPEC, model=ModelSpec(name="m", quantization=Quantization(bits=4))),
            {},
            'model.quantization was None and is {"bits":4}',
        ),
    ],
)  # fmt: skip
def test_what_no_training_can_bridge_is_refused_whatever_is_accepted(
    spec: JobSpec, marks: dict[str, str], clause: str
) -> None:
    branch = msgspec.structs.replace(spec, job_id="run-2", branch=BranchSpec(job_id="run-1"))
    for one, accept in ((spec, False), (spec, True), (branch, False)):
        assert f"does not fit this job: {clause}." in refused(lambda: check(one, accept=accept, **marks))  # noqa: B023


def test_a_model_that_was_only_moved_is_the_same() -> None:
    assert check(msgspec.structs.replace(SPEC, model=ModelSpec(name="elsewhere/m")))[0] == []


@pytest.mark.parametrize("name", ["torch", "trl", "code"])
def test_another_version_of_what_computes_needs_the_word(name: str) -> None:
    now = fingerprints.versions()[name]
    found = saved(versions={name: "0.1"})
    clause = "the agent's training code is another" if name == "code" else f"{name} was 0.1 and is {now}"
    assert clause in refused(lambda: check(SPEC, found))
    (note,) = check(SPEC, found, accept=True)[0]
    assert note.endswith("accepted; results may differ in their last digits.")


@pytest.mark.parametrize(("name", "old"), [("device", "H200"), ("threads", "64"), ("agent", "0.9.0")])
def test_another_machine_and_another_number_of_ours_are_noted(name: str, old: str) -> None:
    now = fingerprints.versions()[name]
    (note,) = check(SPEC, saved(versions={name: old}))[0]
    assert note == f"warning: {name.capitalize()} was {old} and is {now} since the checkpoint step-4."


def test_the_mark_of_the_code_is_that_of_what_decides_a_step() -> None:
    here = {path.stem for path in Path(fingerprints.__file__).parent.glob("*.py")}
    # A module that is gone or renamed must not stay listed, or a new one takes its place unseen.
    assert not fingerprints.BESIDE - here
    assert not {"steps", "batches", "control", "methods", "model", "data", "run"} & fingerprints.BESIDE


def test_what_is_not_used_may_have_any_version() -> None:
    full = msgspec.structs.replace(SPEC, lora=None)
    assert check(full, saved(full, versions={"peft": "0.1", "bitsandbytes": "0.1"}))[0] == []


def test_a_checkpoint_of_an_older_agent_needs_the_word() -> None:
    old = Manifest(
        job_id="run-1", step=4, epoch=0.5, attempt=1, reason="pause", time=1.0, inputs={"data": "x"}
    )
    found = Found(Path("/c/run-1/step-4"), old, 1)
    assert "it was saved by an agent that kept no mark of: eval_rows, precision, rows" in refused(
        lambda: check(SPEC, found)
    )
    assert len(check(SPEC, found, accept=True)[0]) == 1


def test_settings_of_a_newer_agent_cannot_be_read() -> None:
    found = saved()
    found.manifest.inputs["spec"] = '{"job_id":"x","model":{"name":"m"},"magic":1}'
    assert "whose settings this one cannot read" in refused(lambda: check(SPEC, found, accept=True))


def test_a_setting_changed_by_hand_goes_before_one_set_while_it_ran() -> None:
    assert check(SPEC)[1].parameters == Parameters(learning_rate=5e-5, save_steps=3)
    progress = check(changed(save_steps=9, batch_size=2), accept=True)[1]
    assert progress.parameters == Parameters(learning_rate=5e-5)
    assert progress.place == Place(epoch=1, rows=12, micro=0, step_rows=0, stream_rows=48, digest="d")
    assert progress.best_step == 4


def test_a_branch_may_change_and_leaves_the_other_jobs_end_behind() -> None:
    branch = msgspec.structs.replace(
        changed(learning_rate=1e-3), job_id="run-2", branch=BranchSpec(job_id="run-1", checkpoint="step-4")
    )
    notes, progress = check(branch)
    assert notes == [
        "info: training.learning_rate was 0.0002 and is 0.001: accepted; it is put in force at the next step, "
        "and the schedule keeps its shape."
    ]
    assert (progress.best_value, progress.best_eval_loss, progress.best_step) == (None, None, 0)
    assert progress.ended == ""
    assert progress.place.rows == 12


@pytest.mark.parametrize(
    ("spec", "marks"),
    [(changed(metric_for_best="perplexity"), {}), (SPEC, {"eval_rows": "b"}), (SPEC, {"rows": "b"})],
)
def test_a_best_by_another_measure_is_no_best(spec: JobSpec, marks: dict[str, str]) -> None:
    progress = check(spec, accept=True, **marks)[1]
    assert (progress.best_value, progress.best_step) == (None, 0)
    assert check(SPEC)[1].best_step == 4


def test_the_checkpoint_of_another_job_is_not_taken_for_ones_own() -> None:
    sentence = refused(lambda: check(SPEC, saved(job_id="run-0"), accept=True))
    assert "was made by the job run-0, not by run-1" in sentence
    assert '"branch": {"job_id": "run-0", "checkpoint": "step-4"}' in sentence


def test_a_tokenizer_is_told_by_its_content(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    mark = fingerprints.tokenizer_mark(AutoTokenizer.from_pretrained(tmp_path))
    assert fingerprints.tokenizer_mark(AutoTokenizer.from_pretrained(tmp_path)) == mark
    file = tmp_path / "tokenizer.json"
    tree = json.loads(file.read_text())
    merges = tree["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]
    file.write_text(json.dumps(tree))
    assert fingerprints.tokenizer_mark(AutoTokenizer.from_pretrained(tmp_path)) != mark


def test_a_base_model_is_told_by_its_weights(tmp_path: Path, tiny_model: Path) -> None:
    copy = tmp_path / "moved"
    shutil.copytree(tiny_model, copy)
    mark = fingerprints.weights_mark(str(tiny_model), None)
    assert fingerprints.weights_mark(str(copy), None) == mark
    weights = copy / "model.safetensors"
    body = bytearray(weights.read_bytes())
    body[-2:] = b"\x01\x02"
    weights.write_bytes(body)
    assert fingerprints.weights_mark(str(copy), None) != mark


def test_a_changed_learning_rate_is_refused_and_then_really_used(jobs: Jobs) -> None:
    other = {"learning_rate": 1e-3}
    first = jobs.run("job", {3: [Pause()]})
    sentence = refused(lambda: jobs.run("job", attempt=2, training=other))
    assert "training.learning_rate was 0.01 and is 0.001" in sentence
    line = jobs.run("job", attempt=3, training=other, accept_changes=True)
    # Linear over 8 steps: the shape at step 5 is that of a run never touched.
    rates = [line.points[step]["learning_rate"] for step in range(5, 9)]
    assert rates == pytest.approx([1e-3 * left / 8 for left in (4, 3, 2, 1)])
    assert first.points[4]["learning_rate"] == pytest.approx(1e-2 * 5 / 8)
    assert "The learning rate goes from 0.005 to 0.0005 after step 4." in [n.text for n in line.of(Note)]
    assert isinstance(line.last, Finished)


def test_a_longer_run_goes_on_as_if_it_had_always_been_so_long(jobs: Jobs) -> None:
    jobs.run("job", {3: [Pause()]})
    sentence = refused(lambda: jobs.run("job", attempt=2, training={"max_steps": 16}))
    assert "training.max_steps was 8 and is 16" in sentence
    line = jobs.run("job", attempt=3, training={"max_steps": 16}, accept_changes=True)
    rates = [line.points[step]["learning_rate"] for step in (5, 6, 16)]
    assert rates == pytest.approx([1e-2 * 12 / 16, 1e-2 * 11 / 16, 1e-2 / 16])
    assert "The learning rate goes from 0.005 to 0.0075 after step 4." in [n.text for n in line.of(Note)]


def test_another_optimizer_begins_without_a_state(jobs: Jobs) -> None:
    jobs.run("job", {3: [Pause()]})
    line = jobs.run("job", {5: [Pause()]}, attempt=2, training={"optim": "sgd"}, accept_changes=True)
    assert line.points[5]["learning_rate"] == pytest.approx(1e-2 * 4 / 8)
    (note,) = [note.text for note in line.of(Note) if "optim" in note.text]
    assert note.endswith("accepted; it begins with no state of its own, as at the start of a run.")
    # The checkpoint made since is its own, and is gone on from as ever.
    later = jobs.run("job", attempt=3, training={"optim": "sgd"})
    assert (later.of(Ready)[0].start_step, later.of(Note)) == (6, [])


def test_other_rows_are_refused_and_then_trained_on(jobs: Jobs, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", chat_rows(24))
    jobs.run("job", {3: [Pause()]}, rows=rows)
    write_jsonl(rows, chat_rows(24, seed=1))
    assert "the data set has other rows" in refused(lambda: jobs.run("job", attempt=2, rows=rows))
    line = jobs.run("job", attempt=3, rows=rows, accept_changes=True)
    assert line.of(Ready)[0].start_step == 4
    assert isinstance(line.last, Finished)


def test_a_changed_weight_decay_does_not_stay_that_of_the_checkpoint(jobs: Jobs) -> None:
    jobs.run("job", {3: [Pause()]}, training={"max_steps": 6})
    shutil.copytree(jobs.checkpoints(), jobs.folder / "elsewhere" / "job" / "checkpoints")
    with_the_old = jobs.run("job", attempt=2, training={"max_steps": 6})
    jobs.folder /= "elsewhere"
    decayed = {"max_steps": 6, "weight_decay": 50.0}
    line = jobs.run("job", attempt=2, training=decayed, accept_changes=True)
    assert line.points[5]["train_loss"] == with_the_old.points[5]["train_loss"]
    assert line.points[6]["train_loss"] != with_the_old.points[6]["train_loss"]
