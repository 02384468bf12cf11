"""Hyper-parameters in the trainer's words."""

from pathlib import Path
from typing import Any

import pytest
import torch

from agent.trainer.control import ControlledSFTTrainer
from agent.trainer.errors import TrainerError
from agent.trainer.methods import arguments, trainer_class
from agent.trainer.model import Precision
from protocol.failures import FailureReason
from protocol.jobspec import DataSpec, DpoSpec, JobSpec, Method, ModelSpec, TrainingSpec


def convert(folder: Path, **training: Any) -> Any:
    spec = JobSpec(job_id="job", model=ModelSpec(name="m"), training=TrainingSpec(**training))
    return arguments(spec, Precision(torch.float32), str(folder), assistant_only=False)


def test_fine_tuning_and_pre_training_share_a_trainer() -> None:
    assert trainer_class(Method.SFT) is trainer_class(Method.CPT) is ControlledSFTTrainer


def test_a_method_that_cannot_be_run_is_refused_with_those_that_can() -> None:
    with pytest.raises(TrainerError) as caught:
        trainer_class(Method.ORPO)
    assert caught.value.reason is FailureReason.SPEC
    assert caught.value.sentence == ("method: this agent cannot train with orpo; it can with sft, cpt, dpo.")


def test_an_optimizer_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainerError) as caught:
        convert(tmp_path, optim="adamant")
    assert caught.value.reason is FailureReason.SPEC
    assert "adamant" in caught.value.sentence


def test_every_setting_arrives(tmp_path: Path) -> None:
    args = convert(
        tmp_path,
        epochs=2.5,
        max_steps=7,
        learning_rate=3e-4,
        batch_size=3,
        gradient_accumulation_steps=5,
        warmup_steps=4,
        max_length=99,
        lr_scheduler_type="cosine",
        weight_decay=0.1,
        max_grad_norm=0.5,
        adam_beta1=0.8,
        adam_beta2=0.9,
        adam_epsilon=1e-6,
        gradient_checkpointing=True,
        packing=True,
        group_by_length=True,
        seed=5,
        dataloader_num_workers=1,
        dataloader_prefetch_factor=3,
    )
    assert (args.num_train_epochs, args.max_steps, args.learning_rate) == (2.5, 7, 3e-4)
    assert (args.per_device_train_batch_size, args.per_device_eval_batch_size) == (3, 3)
    assert (args.gradient_accumulation_steps, args.get_warmup_steps(100), args.max_length) == (5, 4, 99)
    assert (args.lr_scheduler_type, args.weight_decay, args.max_grad_norm) == ("cosine", 0.1, 0.5)
    assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon) == (0.8, 0.9, 1e-6)
    assert (args.activation_checkpointing, args.packing, args.packing_strategy) == (True, True, "bfd_split")
    assert (args.train_sampling_strategy, args.seed) == ("group_by_length", 5)
    assert (args.dataloader_num_workers, args.dataloader_prefetch_factor) == (1, 3)
    assert (args.logging_nan_inf_filter, args.report_to) == (False, [])


def test_the_settings_of_preference_training_arrive(tmp_path: Path) -> None:
    def made(**dpo: Any) -> Any:
        spec = JobSpec(
            job_id="job", model=ModelSpec(name="m"), method=Method.DPO, dpo=DpoSpec(beta=0.3, **dpo)
        )
        return arguments(spec, Precision(torch.float32), str(tmp_path), assistant_only=True)

    args = made(loss_type="ipo")
    assert (args.beta, args.loss_type, args.label_smoothing) == (0.3, ["ipo"], 0.0)
    assert (args.max_length, args.disable_dropout) == (1024, True)
    # Without a share of wrong labels "robust" would be "sigmoid".
    assert made(loss_type="robust").label_smoothing == 0.1


def test_a_stream_is_read_by_the_trainer_itself(tmp_path: Path) -> None:
    spec = JobSpec(
        job_id="job",
        model=ModelSpec(name="m"),
        data=DataSpec(streaming=True),
        training=TrainingSpec(max_steps=1, dataloader_num_workers=4, dataloader_prefetch_factor=2),
    )
    args = arguments(spec, Precision(torch.float32), str(tmp_path), assistant_only=False)
    assert (args.dataloader_num_workers, args.dataloader_prefetch_factor) == (0, None)


def test_warm_up_may_be_a_share(tmp_path: Path) -> None:
    assert convert(tmp_path, warmup_ratio=0.25).get_warmup_steps(40) == 10
    assert convert(tmp_path).get_warmup_steps(40) == 0
