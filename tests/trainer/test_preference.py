"""Our loss on preference pairs against TRL's own, and what is measured and told of such a training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from agent.trainer.errors import TrainerError
from agent.trainer.preference import MEASURES, ControlledDPOTrainer
from protocol.failures import FailureReason
from protocol.jobspec import DpoSpec, LoraSpec, Method
from protocol.worker import Note, Pause, Ready
from tests.trainer.conftest import Jobs

LOSSES = ("sigmoid", "ipo", "hinge", "robust", "apo_zero", "sppo_hard")


@pytest.fixture
def pairs(tmp_path: Path, tiny_model: Path, pair_file: Path) -> Jobs:
    """Runs jobs on preference pairs."""
    return Jobs(tmp_path, tiny_model, pair_file)


def trained(pairs: Jobs, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> tuple[Any, Any]:
    """Return the trainer of a job that has gone a few steps, and a batch of its held-out pairs."""
    made: list[Any] = []
    built = ControlledDPOTrainer.__init__

    def keep(self: Any, *args: Any, **kwargs: Any) -> None:
        built(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(ControlledDPOTrainer, "__init__", keep)
    name = "adapter" if changes.get("lora") else "full"
    pairs.run(name, method=Method.DPO, eval_fraction=0.2, training={"max_steps": 3}, **changes)
    (trainer,) = made
    return trainer, trainer._prepare_inputs(next(iter(trainer.get_eval_dataloader())))


def gradient(trainer: Any, loss: torch.Tensor) -> torch.Tensor:
    trainer.model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


# TRL asks a model by a name that transformers has renamed; our own loss does not.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
@pytest.mark.parametrize("lora", [None, LoraSpec(r=4)])
def test_the_losses_are_those_of_trl(lora: LoraSpec | None, pairs: Jobs, monkeypatch: Any) -> None:
    trainer, batch = trained(pairs, monkeypatch, lora=lora)
    rival = super(ControlledDPOTrainer, trainer)
    # TRL's own head also measures what it logs.
    from trl.trainer.utils import add_fused_lm_head

    base = trainer.model.get_base_model() if isinstance(trainer.model, PeftModel) else trainer.model
    add_fused_lm_head(base, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    for kind in LOSSES:
        trainer.args.loss_type = trainer.loss_types = [kind]
        trainer.label_smoothing = 0.1 if kind == "robust" else 0.0
        ours = trainer.compute_loss(trainer.model, dict(batch))
        theirs = rival.compute_loss(trainer.model, dict(batch))
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(gradient(trainer, ours), gradient(trainer, theirs), rtol=1e-5, atol=1e-7)
    logged = trainer._metrics["train" if trainer.model.training else "eval"]
    weighed = {
        name: (total / count).item() for name, (total, count) in trainer._weigh(trainer.model, batch).items()
    }
    for ours, theirs in zip(MEASURES, ("chosen", "rejected", "margins", "accuracies"), strict=True):
        assert weighed[f"eval_{ours}"] == pytest.approx(logged[f"rewards/{theirs}"][-1], abs=1e-6)


def test_the_loss_is_the_mean_over_the_pairs_of_a_step(pairs: Jobs, monkeypatch: Any) -> None:
    trainer, batch = trained(pairs, monkeypatch)
    count = batch["input_ids"].shape[0] // 2
    whole = trainer.compute_loss(trainer.model, dict(batch))
    parts = [[0], list(range(1, count))]
    cut = []
    for rows in parts:
        both = rows + [row + count for row in rows]
        cut.append({name: value[both] for name, value in batch.items()})
    pairs_of_step = trainer._get_num_items_in_batch(cut, None)
    assert pairs_of_step == count
    shares = [trainer.compute_loss(trainer.model, part, num_items_in_batch=pairs_of_step) for part in cut]
    torch.testing.assert_close(sum(shares), whole)
    assert trainer.loss_is_scaled_for_ga


def test_the_reference_is_the_base_model(pairs: Jobs, tiny_model: Path, monkeypatch: Any) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    for lora in (None, LoraSpec(r=4)):
        trainer, batch = trained(pairs, monkeypatch, lora=lora)
        mask, ids = batch["completion_mask"][:, 1:], batch["input_ids"]
        with torch.no_grad():
            logits = base(input_ids=ids, attention_mask=batch["attention_mask"]).logits[:, :-1]
        likely = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        expected = (likely * mask).sum(1).chunk(2)
        given = {"input_ids": ids, "attention_mask": batch["attention_mask"]}
        found = trainer._reference(given, ids.masked_fill(batch["completion_mask"] == 0, -100))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
        monkeypatch.undo()


def test_the_curve_counts_pairs_and_shows_rewards(pairs: Jobs) -> None:
    line = pairs.run(
        method=Method.DPO,
        dpo=DpoSpec(beta=0.5),
        lora=LoraSpec(r=4, dropout=0.5),
        eval_fraction=0.25,
        training={"eval_strategy": "steps", "eval_steps": 4},
    )
    first, last = line.points[1], line.points[8]
    assert {*MEASURES, *(f"eval_{name}" for name in MEASURES)} <= last.keys()
    assert first["train_loss"] == pytest.approx(0.6931, abs=1e-4), "nothing is preferred yet: log 2"
    assert last["rewards_margin"] == pytest.approx(
        last["rewards_chosen"] - last["rewards_rejected"], abs=1e-5
    )
    facts = line.of(Ready)[0].facts
    assert (facts["data_format"], facts["loss"]) == ("preference", "sigmoid, beta 0.5")
    assert facts["loss_on"] == "the chosen and the rejected answer"
    assert any("lora.dropout has no effect with dpo" in note.text for note in line.of(Note))


def test_rewards_of_a_point_that_spans_a_pause_are_whole(pairs: Jobs) -> None:
    wanted = {"method": Method.DPO, "lora": LoraSpec(r=4), "training": {"logging_steps": 3}}
    untouched = pairs.run("untouched", **wanted)
    pairs.run("paused", {3: [Pause()]}, delay=3, **wanted)
    resumed = pairs.run("paused", attempt=2, **wanted)
    rewards = {name: value for name, value in untouched.points[6].items() if name in MEASURES}
    assert {name: resumed.points[6][name] for name in MEASURES} == rewards


def test_pairs_are_grouped_by_their_longer_side(pairs: Jobs) -> None:
    training = {"group_by_length": True, "eval_strategy": "steps", "eval_steps": 4}
    wanted = {"method": Method.DPO, "lora": LoraSpec(r=4), "eval_fraction": 0.25, "training": training}
    assert pairs.run(**wanted).last.values["best_eval_loss"] > 0


def refusal(jobs: Jobs, **changes: Any) -> str:
    with pytest.raises(TrainerError) as caught:
        jobs.run(**changes)
    assert caught.value.reason in (FailureReason.SPEC, FailureReason.DATA)
    return str(caught.value)


def test_method_and_data_must_fit(pairs: Jobs, chat_file: Path, pair_file: Path) -> None:
    assert "Set the method to dpo, or give other data." in refusal(pairs)
    assert "row 1: the method dpo needs preference pairs" in refusal(pairs, method=Method.DPO, rows=chat_file)
    assert "training.packing: the two sides" in refusal(pairs, method=Method.DPO, training={"packing": True})
