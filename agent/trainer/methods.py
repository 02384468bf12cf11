"""One table: method -> trainer; and a job's hyper-parameters in the trainer's own words."""

from typing import Any

import torch
from trl import SFTConfig

from agent.trainer.control import ControlledSFTTrainer
from agent.trainer.errors import TrainerError
from agent.trainer.model import Loaded, Precision, old_name_allowed
from agent.trainer.saving import Job
from protocol.failures import FailureReason
from protocol.jobspec import JobSpec, Method

METHODS: dict[Method, type[ControlledSFTTrainer]] = {
    Method.SFT: ControlledSFTTrainer,
    Method.CPT: ControlledSFTTrainer,
}


def trainer_class(method: Method) -> type[ControlledSFTTrainer]:
    """Return the trainer of a method; raises TrainerError for one that is not in the table."""
    try:
        return METHODS[method]
    except KeyError:
        known = ", ".join(METHODS)
        raise TrainerError(
            FailureReason.SPEC, f"method: this agent cannot train with {method}; it can with {known}."
        ) from None


def arguments(spec: JobSpec, precision: Precision, folder: str, *, assistant_only: bool) -> SFTConfig:
    """Return TRL's configuration of a job. Logging, evaluation and saving are ours and switched off there."""
    training = spec.training
    workers = training.dataloader_num_workers
    warmup = training.warmup_steps if training.warmup_steps is not None else training.warmup_ratio or 0.0
    try:
        return SFTConfig(
            output_dir=folder,
            num_train_epochs=training.epochs,
            max_steps=training.max_steps or -1,
            learning_rate=training.learning_rate,
            per_device_train_batch_size=training.batch_size,
            per_device_eval_batch_size=training.eval_batch_size or training.batch_size,
            gradient_accumulation_steps=training.gradient_accumulation_steps,
            warmup_steps=warmup,
            lr_scheduler_type=training.lr_scheduler_type,
            optim=training.optim,
            weight_decay=training.weight_decay,
            max_grad_norm=training.max_grad_norm,
            adam_beta1=training.adam_beta1,
            adam_beta2=training.adam_beta2,
            adam_epsilon=training.adam_epsilon,
            max_length=training.max_length,
            packing=training.packing,
            packing_strategy="bfd_split",  # plain bfd drops what is longer than max_length
            train_sampling_strategy="group_by_length" if training.group_by_length else "random",
            assistant_only_loss=assistant_only,
            activation_checkpointing=training.gradient_checkpointing,
            bf16=precision.bf16,
            fp16=precision.fp16,
            seed=training.seed,
            # Else bfloat16 is refused on a machine without a device.
            use_cpu=not (torch.cuda.is_available() or torch.backends.mps.is_available()),
            dataloader_num_workers=workers,
            dataloader_prefetch_factor=training.dataloader_prefetch_factor if workers else None,
            # Pinned memory without a device is a warning and a waste.
            dataloader_pin_memory=training.dataloader_pin_memory and torch.cuda.is_available(),
            logging_strategy="no",
            logging_nan_inf_filter=False,
            eval_strategy="no",
            save_strategy="no",
            prediction_loss_only=True,
            report_to="none",
            disable_tqdm=True,
        )
    except ValueError as error:
        raise TrainerError(FailureReason.SPEC, f"training: {str(error).splitlines()[0]}") from error


def build(
    spec: JobSpec, loaded: Loaded, args: SFTConfig, tokenizer: Any, train: Any, held_out: Any, job: Job
) -> ControlledSFTTrainer:
    """Return the trainer of a job; its rows are tokenised and packed here."""
    try:
        with old_name_allowed():
            return trainer_class(spec.method)(
                model=loaded.model,
                args=args,
                train_dataset=train,
                eval_dataset=held_out,
                processing_class=tokenizer,
                peft_config=loaded.adapter,
                job=job,
            )
    except ImportError as error:
        raise TrainerError(
            FailureReason.SPEC, f"training.optim: {training_needs(spec)} ({str(error).splitlines()[0]})"
        ) from error


def training_needs(spec: JobSpec) -> str:
    return f"{spec.training.optim} needs a package that is not installed here; use adamw_torch"
