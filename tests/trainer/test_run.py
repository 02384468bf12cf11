"""A job from its spec to its final model, in this process."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from agent.runtime.supervisor import LEAVE_LIMIT
from agent.trainer import run
from agent.trainer.errors import TrainerError
from agent.trainer.line import CLOSE_LIMIT
from agent.trainer.model import old_name_allowed
from agent.trainer.output import weights_hash
from protocol.failures import FailureReason
from protocol.jobspec import LoraSpec, Method, OutputSpec, Quantization, SampleSpec
from protocol.worker import (
    Cancel,
    Finished,
    Left,
    Metrics,
    Note,
    Pause,
    Phase,
    Preparing,
    Ready,
    Saved,
    Trained,
)
from tests.trainer.conftest import Jobs, RecordingLine, chat_rows, text_rows

Write = Callable[..., Path]

CHARTS = {
    "train_loss",
    "train_perplexity",
    "learning_rate",
    "grad_norm",
    "samples_per_second",
    "tokens_per_second",
    "tokens_seen",
    "epoch",
    "progress",
    "eta_seconds",
    "elapsed_seconds",
    "epochs_without_improvement",
}


def refused(act: Callable[[], Any]) -> tuple[FailureReason, str]:
    with pytest.raises(TrainerError) as caught:
        act()
    return caught.value.reason, caught.value.sentence


def test_a_full_run_says_what_it_does_and_leaves_a_model(jobs: Jobs) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    training = {"eval_strategy": "steps", "eval_steps": 3, "max_steps": 18}
    samples = [SampleSpec(prompt="red green", answer="cat dog")]
    line = jobs.run("job", training=training, eval_fraction=0.25, samples=samples)

    assert [event.phase for event in line.of(Preparing)] == [Phase.CHECK, Phase.LOAD]
    (ready,) = line.of(Ready)
    assert (ready.total_steps, ready.total_epochs, ready.start_step) == (18, 2.0, 0)
    assert (ready.train_rows, ready.eval_rows, ready.batch_size) == (36, 12, 4)
    assert ready.trainable_parameters == ready.all_parameters > 0
    assert {"weights", "computes_in", "attention", "adapter"} <= ready.facts.keys()

    points = line.points
    assert list(points) == list(range(19))
    assert points[0].keys() >= {"eval_loss", "perplexity"}
    for step in range(1, 19):
        assert points[step].keys() >= CHARTS
        assert ("eval_loss" in points[step]) == (step % 3 == 0)
    assert points[6]["train_perplexity"] == pytest.approx(math.exp(points[6]["train_loss"]))
    assert points[6]["perplexity"] == pytest.approx(math.exp(points[6]["eval_loss"]))
    assert points[9]["progress"] == 50.0
    assert points[9]["epoch"] == 1.0
    assert [event.trend for event in line.of(Metrics)][4:9:4] == ["insufficient_data", "improving"]

    end = line.last
    assert isinstance(end, Finished)
    assert line.of(Trained) == [Trained(18, "steps")]
    assert end.values["final_eval_loss"] < end.values["initial_eval_loss"] == points[0]["eval_loss"]
    assert end.values["best_eval_loss"] == min(
        v["eval_loss"] for s, v in points.items() if s and "eval_loss" in v
    )
    assert end.values["final_loss"] == points[18]["train_loss"]
    (sample,) = end.samples
    assert sample["log_likelihood_after"] > sample["log_likelihood_before"]
    assert {"prompt", "before", "after", "answer"} <= sample.keys()

    model = AutoModelForCausalLM.from_pretrained(end.model_path, dtype="auto", use_safetensors=True)
    AutoTokenizer.from_pretrained(end.model_path)
    assert model.config.use_cache
    assert weights_hash(Path(end.model_path)) == end.weights_hash
    assert not list(jobs.output().parent.glob(".*"))
    assert not list(jobs.output().rglob("*.bin"))


def test_real_tokens_are_counted_packed_or_not(jobs: Jobs) -> None:
    once = {"batch_size": 4, "max_steps": 12}
    padded = jobs.run("padded", training=once)
    packed = jobs.run("packed", training={"packing": True, "batch_size": 64, "max_steps": 1})
    assert packed.points[1]["tokens_seen"] == padded.points[12]["tokens_seen"]
    assert "rows in" in packed.of(Ready)[0].facts["packing"]


def test_losses_are_those_of_the_stock_trainer(jobs: Jobs, chat_file: Path) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    line = jobs.run(
        "ours", training={"gradient_accumulation_steps": 2, "batch_size": 2, "assistant_only_loss": False}
    )
    args = SFTConfig(
        output_dir=str(jobs.folder / "stock"),
        max_steps=8,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        max_length=64,
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        activation_checkpointing=False,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        optim="adamw_torch",
        seed=42,
    )
    rows = [json.loads(text) for text in chat_file.read_text().splitlines()]
    stock = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(jobs.model, dtype=torch.float32),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(jobs.model),
    )
    stock.train()
    theirs = {log["step"]: log for log in stock.state.log_history if "loss" in log}
    for step, values in line.points.items():
        assert values["train_loss"] == theirs[step]["loss"]
        assert values["grad_norm"] == theirs[step]["grad_norm"]
        assert values["tokens_seen"] == theirs[step]["num_tokens"]


def test_an_adapter_is_left_alone_and_merged(jobs: Jobs) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    line = jobs.run(
        "job",
        lora=LoraSpec(r=4),
        quantization=Quantization(bits=4),
        output=OutputSpec(merge_adapter=True),
        training={"max_steps": 3},
    )
    end = line.last
    base = AutoModelForCausalLM.from_pretrained(jobs.model, dtype=torch.bfloat16)
    merged = AutoModelForCausalLM.from_pretrained(end.merged_path, dtype="auto")
    assert merged.dtype == torch.bfloat16
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = base(ids).logits
    with old_name_allowed():
        with_adapter = PeftModel.from_pretrained(base, end.model_path)(ids).logits
    assert (with_adapter - plain).abs().max() > 0.01
    # Merged weights are rounded to bfloat16 once more.
    assert (merged(ids).logits - with_adapter).abs().max() < 0.1 * (with_adapter - plain).abs().max() + 0.05
    assert line.of(Ready)[0].facts["weights"] == "nf4"
    assert line.of(Ready)[0].trainable_parameters < line.of(Ready)[0].all_parameters


def test_plain_text_is_continued_pre_training(jobs: Jobs, text_file: Path) -> None:
    line = jobs.run(
        "job", method=Method.CPT, rows=text_file, samples=[SampleSpec(prompt="the cat", answer=" runs")]
    )
    assert isinstance(line.last, Finished)
    assert line.points[8]["train_loss"] < line.points[1]["train_loss"]


def test_a_method_of_another_agent_is_refused_before_anything_is_read(jobs: Jobs) -> None:
    reason, sentence = refused(lambda: jobs.run("job", method=Method.ORPO, base="/nowhere"))
    assert reason is FailureReason.SPEC
    assert "orpo" in sentence


def test_an_orphan_touches_nothing(jobs: Jobs) -> None:
    unfinished = jobs.checkpoints() / "step-4.tmp"
    rows = jobs.folder / "job" / "cache" / "rows-job"
    for folder in (unfinished, rows):
        folder.mkdir(parents=True)
    line = RecordingLine({})
    line.parent_gone = True
    assert run.train(jobs.start("job"), line) == 0
    assert line.events == [Left("parent_lost", 0)]
    assert unfinished.is_dir()
    assert rows.is_dir()


def test_a_cancel_is_obeyed_before_anything_is_looked_at(jobs: Jobs) -> None:
    line = RecordingLine({})
    line._waiting = [Cancel()]
    assert run.train(jobs.start("job", method=Method.DPO), line) == 0
    assert line.events == [Left("cancelled", 0)]


def test_a_cancel_is_obeyed_among_the_rows(jobs: Jobs, jsonl: Write) -> None:
    class Cancelled(RecordingLine):
        def say(self, event: Any) -> None:
            super().say(event)
            if event == Preparing(Phase.CHECK, "Checking every row of the data set."):
                self._waiting = [Cancel()]

    bad = jsonl([*chat_rows(1), {"text": None}])
    line = Cancelled({})
    assert run.train(jobs.start("job", rows=bad), line) == 0
    assert line.last == Left("cancelled", 0)


def test_the_agent_waits_longer_for_one_that_leaves_than_that_takes() -> None:
    assert run.FLUSH_LIMIT + CLOSE_LIMIT + 30 < LEAVE_LIMIT


def test_the_newest_good_checkpoint_is_taken_and_the_torn_one_named(jobs: Jobs) -> None:
    untouched = jobs.run("untouched")
    jobs.run("job", {6: [Cancel()]}, training={"save_steps": 2})
    newest = jobs.checkpoints() / "step-6" / "model.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    line = jobs.run("job", attempt=2, training={"save_steps": 2})
    assert line.of(Ready)[0].start_step == 4
    assert line.of(Ready)[0].resumed_from == str(jobs.checkpoints() / "step-4")
    (note,) = line.of(Note)
    assert "step-6 was passed over: the contents of its file model.safetensors" in note.text
    assert line.last.weights_hash == untouched.last.weights_hash


def test_without_a_good_checkpoint_the_job_begins_anew_and_says_so(jobs: Jobs) -> None:
    jobs.run("job", {3: [Pause()]})
    (jobs.checkpoints() / "step-4" / "training" / "optimizer.json").unlink()
    line = jobs.run("job", attempt=2)
    assert line.of(Ready)[0].start_step == 0
    assert [note.level for note in line.of(Note)] == ["warning", "warning"]
    assert "starts from its beginning" in line.of(Note)[1].text


def test_a_named_checkpoint_must_be_good(jobs: Jobs) -> None:
    reason, sentence = refused(lambda: jobs.run("job", resume_from=str(jobs.folder / "step-9")))
    assert reason is FailureReason.CHECKPOINT
    assert "cannot be used: it has no manifest" in sentence


def test_a_job_can_go_back_to_a_named_checkpoint(jobs: Jobs) -> None:
    first = jobs.run("job", training={"save_steps": 2})
    again = jobs.run(
        "job", attempt=2, resume_from=str(jobs.checkpoints() / "step-4"), training={"save_steps": 2}
    )
    assert again.of(Ready)[0].start_step == 4
    assert again.last.weights_hash == first.last.weights_hash


def test_checkpoints_are_kept_as_the_job_says(jobs: Jobs) -> None:
    line = jobs.run("job", training={"save_steps": 2, "save_total_limit": 2})
    assert sorted(path.name for path in jobs.checkpoints().glob("step-*")) == ["step-6", "step-8"]
    assert [(saved.step, saved.reason) for saved in line.of(Saved)] == [
        (2, "schedule"),
        (4, "schedule"),
        (6, "schedule"),
        (8, "final"),
        (8, "schedule"),
    ]
    assert not list(jobs.checkpoints().glob(".*"))


def test_a_harmless_change_is_noted(jobs: Jobs) -> None:
    jobs.run("job", {3: [Pause()]})
    line = jobs.run("job", attempt=2, training={"save_steps": 3})
    assert [note.text for note in line.of(Note)] == [
        "training.save_steps was None and is 3 since the checkpoint step-4."
    ]
    assert isinstance(line.last, Finished)


def test_rows_that_are_all_prompt_are_refused(jobs: Jobs, jsonl: Write) -> None:
    rows = jsonl([{"prompt": "red green blue " * 30, "completion": "one"}] * 4)
    reason, sentence = refused(lambda: jobs.run("job", rows=rows, training={"max_length": 8}))
    assert reason is FailureReason.DATA
    assert "Raise training.max_length" in sentence


def test_an_older_model_is_replaced_whole(jobs: Jobs) -> None:
    jobs.run("job", training={"max_steps": 1})
    (jobs.output() / "stale.txt").write_text("old")
    shutil.rmtree(jobs.checkpoints())
    jobs.run("job", attempt=2, training={"max_steps": 1})
    assert not (jobs.output() / "stale.txt").exists()
    assert not list(jobs.output().parent.glob(".*"))


def test_nothing_of_the_rows_is_left_in_the_cache(jobs: Jobs) -> None:
    jobs.run("job", training={"max_steps": 1})
    cache = jobs.folder / "job" / "cache"
    assert not cache.exists() or not list(cache.iterdir())


def test_text_rows_are_told_apart_from_chats(jobs: Jobs, jsonl: Write) -> None:
    line = jobs.run("job", rows=jsonl(text_rows(8)), training={"max_steps": 1})
    assert line.of(Ready)[0].train_rows == 8
