"""The platform's TrainingConfig, raw or normalised, to a JobSpec.

Raw is what the page edits and the job row holds; normalised has `lora` at its top. Where the
two spellings of a LoRA value disagree, the one that a user edits (`training.lora_r`, ...)
wins. A key that no part of the platform knows is refused with its path: a slip must not
silently train something else.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import msgspec

from protocol.jobspec import RUNNABLE, BadSpec, JobSpec, LoraSpec, Method

_MODEL = {"name", "trust_remote_code", "torch_dtype", "dtype", "device_map", "revision"}
_TOKENIZER = {"name", "trust_remote_code", "padding_side", "add_eos_token", "chat_template"}
_SAME = {
    "learning_rate",
    "batch_size",
    "eval_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "max_steps",
    "logging_steps",
    "eval_steps",
    "save_steps",
    "save_total_limit",
    "lr_scheduler_type",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "gradient_checkpointing",
    "packing",
    "group_by_length",
    "assistant_only_loss",
    "bf16",
    "fp16",
    "seed",
    "dataloader_num_workers",
    "dataloader_prefetch_factor",
    "dataloader_pin_memory",
    "early_stopping_patience",
    "early_stopping_threshold",
}
_SAME |= {"deterministic", "on_bad_loss", "spike_factor", "max_rewinds"}
_OURS = {
    "method",
    "num_epochs",
    "num_train_epochs",
    "warmup_steps",
    "warmup_ratio",
    "evaluation_strategy",
    "eval_strategy",
    "use_lora",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_config",
    "quantization",
}
_OURS |= {"beta", "loss_type", "use_streaming", "metric_for_best_model", "load_best_model_at_end"}
_PASSED_OVER = {
    # Known to the platform, and without effect on what is trained here.
    "save_strategy",
    "pretokenize",
    "max_prompt_length",
    "ppo_epochs",
    "clip_range",
    "clip_range_value",
    "vf_coef",
    "entropy_coef",
    "response_length",
    "local_rollout_forward_batch_size",
    "response_template",
    "disable_dropout",
    "distributed",
    "checkpoint_resume",
    "tokenizer_padding_side",
    "job_name",
    "package_name",
    "gpu_memory_gb",
}
_TOP = {
    "model",
    "tokenizer",
    "training",
    "data",
    "lora",
    "quantization",
    "output",
    "samples",
    "branch",
    "seed",
    "eval_split",
    "name",
    "job_name",
    "jobName",
    "metadata",
    "provider",
    "tools",
    "evaluation",
    "tensorboard",
    "predictions",
    "checkpoint_resume",
    "dataset_path",
    "output_dir",
    "hardware",
    "system",
    "error",
    "id",
    "description",
    "version",
    "template_type",
}
_DATA = {
    "strategy",
    "generation_type",
    "max_samples",
    "train_split",
    "eval_split",
    "dataset_format",
    "split",
    "eval_path",
    "path",
    "seed",
}
_LORA = {
    "r",
    "alpha",
    "dropout",
    "lora_alpha",
    "lora_dropout",
    "lora_r",
    "target_modules",
    "bias",
    "task_type",
    "modules_to_save",
    "use_rslora",
    "use_dora",
}
_QUANT = {
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_quant_type",
    "bnb_4bit_compute_dtype",
    "bnb_4bit_use_double_quant",
}
_METRICS = {"loss": "eval_loss", "eval_rewards/accuracies": "eval_rewards_accuracy"}
_FORMATS = {
    "sft": "auto",
    "auto": "auto",
    "chatml": "messages",
    "messages": "messages",
    "sharegpt": "sharegpt",
    "alpaca": "alpaca",
    "prompt_completion": "prompt_completion",
    "rlhf": "prompt_completion",
    "raw_text": "text",
    "text": "text",
    "jsonl": "auto",
    "openorca": "auto",
    "unnatural": "auto",
    "dpo": "preference",
    "preference": "preference",
}


def _section(config: Mapping[str, Any], key: str, path: str) -> dict[str, Any]:
    value = config.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise BadSpec(path, f"expected an object, found {type(value).__name__}.")
    return dict(value)


def _known(section: Mapping[str, Any], names: set[str], path: str) -> None:
    for key in section:
        if key not in names:
            near = get_close_matches(str(key), names, n=1)
            hint = f' Did you mean "{near[0]}"?' if near else ""
            raise BadSpec(f"{path}.{key}" if path else str(key), f"no such setting.{hint}")


def _present(section: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: section[name] for name in names if section.get(name) is not None}


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def job_spec(job_id: str, config: Mapping[str, Any], dataset_path: str = "", name: str = "") -> JobSpec:
    """Return the job that ``config`` describes.

    Raises BadSpec, whose sentence names the path of what is wrong. ``dataset_path`` goes before
    the config's own.
    """
    if not isinstance(config, Mapping):
        raise BadSpec("config", f"expected an object, found {type(config).__name__}.")
    _known(config, _TOP, "")
    training = _section(config, "training", "training")
    _known(training, _SAME | _OURS | _PASSED_OVER, "training")
    data = _section(config, "data", "data")
    _known(data, _DATA, "data")
    tree: dict[str, Any] = {
        "job_id": job_id,
        "name": str(
            _first(name or None, config.get("name"), config.get("job_name"), training.get("job_name")) or ""
        ),
        "method": _method(training.get("method")),
        "model": _model(config, training),
        "tokenizer": _tokenizer(config),
        "data": _data(config, data, training, dataset_path),
        "training": _training(config, training),
        "output": _section(config, "output", "output"),
        "samples": config.get("samples") or [],
    }
    if config.get("branch") is not None:
        tree["branch"] = _section(config, "branch", "branch")
    if tree["method"] == Method.DPO:
        kinds = training.get("loss_type")
        kind = kinds[0] if isinstance(kinds, list) and len(kinds) == 1 else kinds
        tree["dpo"] = _present({"beta": training.get("beta"), "loss_type": kind}, {"beta", "loss_type"})
    lora, written = _lora(config, training)
    if lora is not None:
        tree["lora"] = lora
    elif tree["model"].get("quantization"):
        raise BadSpec(
            "training.quantization",
            "a quantised model cannot be fine-tuned in full; set training.use_lora to true, or both load_in flags to false.",
        )
    try:
        return msgspec.convert(tree, JobSpec)
    except msgspec.ValidationError as error:
        raise _located(error, written | _written(config, training, data)) from None


def _written(
    config: Mapping[str, Any], training: Mapping[str, Any], data: Mapping[str, Any]
) -> dict[str, str]:
    """Return where the user wrote what a JobSpec calls otherwise."""
    model = _section(config, "model", "model")
    quant = "training.quantization" if training.get("quantization") else "quantization"
    held_out = "data.eval_split" if data.get("eval_split") is not None else "eval_split"
    epochs = "num_epochs" if training.get("num_epochs") is not None else "num_train_epochs"
    strategy = "evaluation_strategy" if training.get("evaluation_strategy") is not None else "eval_strategy"
    return {
        "training.epochs": f"training.{epochs}",
        "training.eval_strategy": f"training.{strategy}",
        "training.seed": "training.seed" if training.get("seed") is not None else "seed",
        "dpo.beta": "training.beta",
        "dpo.loss_type": "training.loss_type",
        "training.metric_for_best": "training.metric_for_best_model",
        "training.load_best_at_end": "training.load_best_model_at_end",
        "data.eval_fraction": held_out,
        "data.path": "dataset_path" if data.get("path") is None else "data.path",
        "model.dtype": "model.dtype" if model.get("dtype") is not None else "model.torch_dtype",
        "model.quantization.quant_type": f"{quant}.bnb_4bit_quant_type",
        "model.quantization.compute_dtype": f"{quant}.bnb_4bit_compute_dtype",
        "model.quantization.double_quant": f"{quant}.bnb_4bit_use_double_quant",
    }


def _located(error: msgspec.ValidationError, written: Mapping[str, str]) -> BadSpec:
    """Turn msgspec's `... - at `$.training.batch_size`` into path and sentence."""
    text, _, where = str(error).partition(" - at `$")
    path = where.rstrip("`").lstrip(".")
    return BadSpec(written.get(path, path), f"{text}.")


def _method(value: Any) -> str:
    method = str(value or Method.SFT).lower()
    if method not in set(Method):
        known = ", ".join(RUNNABLE)
        raise BadSpec("training.method", f'unknown method "{value}"; this agent can run: {known}.')
    if method not in RUNNABLE:
        known = ", ".join(RUNNABLE)
        raise BadSpec("training.method", f'"{method}" cannot be run by this agent yet; it can run: {known}.')
    return method


def _model(config: Mapping[str, Any], training: Mapping[str, Any]) -> dict[str, Any]:
    section = _section(config, "model", "model")
    _known(section, _MODEL, "model")
    if not section.get("name"):
        raise BadSpec("model.name", "give the name of a model or the folder it lies in.")
    model = _present(section, {"name", "trust_remote_code", "revision"})
    dtype = _first(section.get("dtype"), section.get("torch_dtype"))
    if dtype is not None:
        model["dtype"] = dtype
    quant = _section(training, "quantization", "training.quantization") or _section(
        config, "quantization", "quantization"
    )
    _known(quant, _QUANT, "training.quantization")
    if quant.get("load_in_4bit") or quant.get("load_in_8bit"):
        # Both flags may be set by the page; 4-bit is what its templates mean then.
        four = bool(quant.get("load_in_4bit"))
        model["quantization"] = {"bits": 4 if four else 8}
        names = {
            "bnb_4bit_quant_type": "quant_type",
            "bnb_4bit_compute_dtype": "compute_dtype",
            "bnb_4bit_use_double_quant": "double_quant",
        }
        for theirs, ours in names.items():
            if quant.get(theirs) is not None:
                model["quantization"][ours] = quant[theirs]
    return model


def _tokenizer(config: Mapping[str, Any]) -> dict[str, Any]:
    section = _section(config, "tokenizer", "tokenizer")
    _known(section, _TOKENIZER, "tokenizer")
    return _present(section, _TOKENIZER)


def _data(
    config: Mapping[str, Any], data: Mapping[str, Any], training: Mapping[str, Any], dataset_path: str
) -> dict[str, Any]:
    tree = _present(data, {"split", "eval_path"})
    # Streamed rows are not counted, so without a last step they are read as a table.
    tree["streaming"] = bool(training.get("use_streaming") and training.get("max_steps"))
    tree["path"] = dataset_path or str(_first(data.get("path"), config.get("dataset_path")) or "")
    if data.get("max_samples"):
        tree["max_samples"] = data["max_samples"]
    held_out = _first(data.get("eval_split"), config.get("eval_split"))
    if held_out is None and data.get("train_split") is not None:
        share = data["train_split"]
        if not isinstance(share, int | float) or not 0 < share <= 1:
            raise BadSpec("data.train_split", "expected a number above 0 and at most 1.")
        held_out = round(1 - share, 9)
    if held_out is not None:
        tree["eval_fraction"] = held_out
    form = str(data.get("dataset_format") or "auto").lower()
    if form not in _FORMATS:
        raise BadSpec(
            "data.dataset_format", f'unknown format "{form}"; known are: {", ".join(sorted(_FORMATS))}.'
        )
    tree["format"] = _FORMATS[form]
    return tree


def _lora(
    config: Mapping[str, Any], training: Mapping[str, Any]
) -> tuple[dict[str, Any] | None, dict[str, str]]:
    """Return the adapter, None for none, and for each of its values the path where it was written."""
    top = _section(config, "lora", "lora")
    _known(top, _LORA, "lora")
    nested = _section(training, "lora_config", "training.lora_config")
    _known(nested, _LORA, "training.lora_config")
    asked = training.get("use_lora")
    if asked is not None and not isinstance(asked, bool):
        raise BadSpec("training.use_lora", "expected true or false.")
    if asked is False or (asked is None and not top and not nested and training.get("lora_r") is None):
        return None, {}
    tree: dict[str, Any] = {}
    written: dict[str, str] = {}
    places = (("training", training), ("training.lora_config", nested), ("lora", top))
    for name in LoraSpec.__struct_fields__:
        for path, section in places:
            # At the top of `training` only the spelling with the prefix is LoRA's.
            spellings = (f"lora_{name}",) if section is training else (name, f"lora_{name}")
            spelled = next((key for key in spellings if section.get(key) not in (None, [])), None)
            if spelled is not None:
                tree[name], written[f"lora.{name}"] = section[spelled], f"{path}.{spelled}"
                break
    for path, section in places[1:]:
        task = section.get("task_type")
        if task not in (None, "CAUSAL_LM"):
            raise BadSpec(f"{path}.task_type", f'"{task}" cannot be trained here; only CAUSAL_LM can.')
    return tree, written


def _training(config: Mapping[str, Any], training: Mapping[str, Any]) -> dict[str, Any]:
    tree = _present(training, _SAME)
    epochs = _first(training.get("num_epochs"), training.get("num_train_epochs"))
    if epochs is not None:
        tree["epochs"] = epochs
    # Templates carry both; a ratio that is not zero scales with the run and goes first.
    if training.get("warmup_ratio"):
        tree["warmup_ratio"] = training["warmup_ratio"]
    elif training.get("warmup_steps") is not None:
        tree["warmup_steps"] = training["warmup_steps"]
    strategy = _first(training.get("evaluation_strategy"), training.get("eval_strategy"))
    if strategy is not None:
        tree["eval_strategy"] = strategy
    if metric := training.get("metric_for_best_model"):
        tree["metric_for_best"] = _METRICS.get(str(metric), metric)
    if training.get("load_best_model_at_end") is not None:
        tree["load_best_at_end"] = training["load_best_model_at_end"]
    if tree.get("seed") is None and config.get("seed") is not None:
        tree["seed"] = config["seed"]
    if tree.get("dataloader_num_workers") == 0:
        tree.pop("dataloader_prefetch_factor", None)
    return tree
