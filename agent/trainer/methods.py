"""One table: method -> trainer; and a job's hyper-parameters in the trainer's own words."""

from typing import Any

import torch
from trl import DPOConfig, SFTConfig

from agent.trainer.control import ControlledMixin, ControlledSFTTrainer
from agent.trainer.errors import TrainerError
from agent.trainer.model import Loaded, Precision, old_name_allowed
from agent.trainer.preference import SMOOTHING, ControlledDPOTrainer
from agent.trainer.saving import Job
from agent.trainer.streaming import Source, Stream
from protocol.failures import FailureReason
from protocol.jobspec import JobSpec, Method
from protocol.worker import Note

METHODS: dict[Method, type[ControlledMixin]] = {
    Method.SFT: ControlledSFTTrainer,
    Method.CPT: ControlledSFTTrainer,
    Method.DPO: ControlledDPOTrainer,
}


def trainer_class(method: Method) -> type[ControlledMixin]:
    """Return the trainer of a method; raises TrainerError for one that is not in the table."""
    try:
        return METHODS[method]
    except KeyError:
        known = ", ".join(METHODS)
        raise TrainerError(
            FailureReason.SPEC, f"method: this agent cannot train with {method}; it can with {known}."
        ) from None


def arguments(
    spec: JobSpec, precision: Precision, folder: str, *, assistant_only: bool
) -> SFTConfig | DPOConfig:
    """Return TRL's configuration of a job. Logging, evaluation and saving are ours and switched off there."""
    try:
        common = _common(spec, precision, folder)
        if spec.method is Method.DPO:
            return DPOConfig(
                **common,
                beta=spec.dpo.beta,
                loss_type=[spec.dpo.loss_type],
                label_smoothing=SMOOTHING if spec.dpo.loss_type == "robust" else 0.0,
                # As in the paper: with dropout the model would be held to a reference that it is not compared with.
                disable_dropout=True,
            )
        return SFTConfig(
            **common,
            packing=spec.training.packing,
            packing_strategy="bfd_split",  # plain bfd drops what is longer than max_length
            assistant_only_loss=assistant_only,
        )
    except ValueError as error:
        raise TrainerError(FailureReason.SPEC, f"training: {str(error).splitlines()[0]}") from error


def _common(spec: JobSpec, precision: Precision, folder: str) -> dict[str, Any]:
    """Return what every method's configuration has."""
    training = spec.training
    # A stream is read by the trainer itself: a bad row must say its number, and the order must not change.
    workers = 0 if spec.data.streaming else training.dataloader_num_workers
    warmup = training.warmup_steps if training.warmup_steps is not None else training.warmup_ratio or 0.0
    return {
        "output_dir": folder,
        "num_train_epochs": training.epochs,
        "max_steps": training.max_steps or -1,
        "learning_rate": training.learning_rate,
        "per_device_train_batch_size": training.batch_size,
        "per_device_eval_batch_size": training.eval_batch_size or training.batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "warmup_steps": warmup,
        "lr_scheduler_type": training.lr_scheduler_type,
        "optim": training.optim,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "adam_beta1": training.adam_beta1,
        "adam_beta2": training.adam_beta2,
        "adam_epsilon": training.adam_epsilon,
        "max_length": training.max_length,
        "train_sampling_strategy": "group_by_length" if training.group_by_length else "random",
        "activation_checkpointing": training.gradient_checkpointing,
        "bf16": precision.bf16,
        "fp16": precision.fp16,
        "seed": training.seed,
        # Else bfloat16 is refused on a machine without a device.
        "use_cpu": not (torch.cuda.is_available() or torch.backends.mps.is_available()),
        "dataloader_num_workers": workers,
        "dataloader_prefetch_factor": training.dataloader_prefetch_factor if workers else None,
        # Pinned memory without a device is a warning and a waste.
        "dataloader_pin_memory": training.dataloader_pin_memory and torch.cuda.is_available(),
        "logging_strategy": "no",
        "logging_nan_inf_filter": False,
        "eval_strategy": "no",
        "save_strategy": "no",
        "prediction_loss_only": True,
        "report_to": "none",
        "disable_tqdm": True,
    }


def build(
    spec: JobSpec,
    loaded: Loaded,
    args: SFTConfig | DPOConfig,
    tokenizer: Any,
    train: Any,
    held_out: Any,
    job: Job,
    source: Source | None = None,
) -> Any:
    """Return the trainer of a job; its rows are tokenised and packed here, those of ``source`` when they come."""
    wanted: dict[str, Any] = {}
    if spec.method is Method.DPO:
        wanted["ref_model"] = loaded.reference
        if spec.lora is not None and spec.lora.dropout:
            note = "lora.dropout has no effect with dpo: the model and its reference are compared without dropout."
            job.inbox.line.say(Note("warning", note))
    with old_name_allowed():
        trainer: Any = trainer_class(spec.method)(
            model=loaded.model,
            args=args,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
            peft_config=loaded.adapter,
            job=job,
            **wanted,
        )
    if source is not None:
        trainer.train_dataset = Stream(trainer.train_dataset, source)
    return trainer
