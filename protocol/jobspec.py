"""What a job is: typed, closed data. Nothing in it is code, and an unknown key is refused with its path."""

from enum import StrEnum
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, inspect

Text = Annotated[str, Meta(max_length=4096)]
Positive = Annotated[int, Meta(ge=1, le=1_000_000_000)]
Natural = Annotated[int, Meta(ge=0, le=1_000_000_000)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
JobId = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$(?!\n)")]
"""Names a folder on the owner's disk, so it can hold no separator and not begin with a dot.

`$` alone would let a line break at the end pass.
"""


class Method(StrEnum):
    """Every training method the platform names."""

    SFT = "sft"
    CPT = "cpt"
    DPO = "dpo"
    ORPO = "orpo"
    RLHF = "rlhf"


RUNNABLE = (Method.SFT, Method.CPT, Method.DPO)
"""The methods that this agent's trainer can run today; said in HELLO."""


class DataFormat(StrEnum):
    """The shape of a row; AUTO looks at every row, not at the first alone."""

    AUTO = "auto"
    MESSAGES = "messages"
    SHAREGPT = "sharegpt"
    ALPACA = "alpaca"
    PROMPT_COMPLETION = "prompt_completion"
    PREFERENCE = "preference"
    """prompt, chosen and rejected, for DPO."""
    TEXT = "text"


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of every part of a job."""


class Quantization(Part, frozen=True, kw_only=True):
    """How the base model's weights are held (bitsandbytes)."""

    bits: Literal[4, 8]
    quant_type: Literal["nf4", "fp4"] = "nf4"
    compute_dtype: Literal["float16", "bfloat16", "float32"] = "bfloat16"
    double_quant: bool = False


class ModelSpec(Part, frozen=True, kw_only=True):
    """The base model."""

    name: Annotated[str, Meta(min_length=1, max_length=1024)]
    """A Hub name, or a folder under MODELS_DIR (absolute, or relative to it)."""
    revision: Text | None = None
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """auto = bfloat16 where the device computes in it, else float32."""
    trust_remote_code: bool = False
    quantization: Quantization | None = None


class TokenizerSpec(Part, frozen=True, kw_only=True):
    """The tokenizer; the model's own unless named."""

    name: Text | None = None
    trust_remote_code: bool = False
    padding_side: Literal["left", "right"] = "right"
    add_eos_token: bool | None = None
    chat_template: Annotated[str, Meta(max_length=200_000)] | None = None


class DataSpec(Part, frozen=True, kw_only=True):
    """Where the rows come from and how they are cut."""

    path: Text = ""
    """A file or saved `datasets` folder under DATASETS_DIR, or a Hub name; empty: the backend serves it."""
    split: Text = "train"
    """Of a Hub data set or a saved folder that has several."""
    eval_path: Text | None = None
    format: DataFormat = DataFormat.AUTO
    max_samples: Positive | None = None
    eval_fraction: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    """Share of the rows that is held out; cut with the job's seed before anything is shuffled."""
    streaming: bool = False
    """Read the rows while training, and keep no table of them; needs ``training.max_steps``."""


class LoraSpec(Part, frozen=True, kw_only=True):
    """A low-rank adapter in place of full fine-tuning."""

    r: Annotated[int, Meta(ge=1, le=4096)] = 16
    alpha: Annotated[float, Meta(gt=0, le=65536)] = 32
    dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    target_modules: list[Text] | Literal["all-linear"] = "all-linear"
    modules_to_save: list[Text] = []
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    use_dora: bool = False


class DpoSpec(Part, frozen=True, kw_only=True):
    """Direct preference optimisation (arXiv 2305.18290)."""

    beta: Annotated[float, Meta(gt=0, le=100)] = 0.1
    """How strongly the model is held to the one it began as."""
    loss_type: Literal["sigmoid", "ipo", "hinge", "robust", "apo_zero", "sppo_hard"] = "sigmoid"


class BranchSpec(Part, frozen=True, kw_only=True):
    """The checkpoint of another job that this one begins with: its weights, optimizer and place in the data."""

    job_id: JobId
    checkpoint: Text = ""
    """Its name, "best", or empty for the newest good one."""


Scheduler = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
]


class TrainingSpec(Part, frozen=True, kw_only=True):
    """Hyper-parameters, in the platform's names. None = the owner's setting, or the device decides."""

    epochs: Annotated[float, Meta(gt=0, le=100_000)] = 1.0
    max_steps: Positive | None = None
    """Optimizer steps; when given it decides in place of ``epochs``."""
    learning_rate: Annotated[float, Meta(gt=0, le=100)] = 2e-4
    batch_size: Annotated[int, Meta(ge=1, le=65536)] = 1
    """Rows of a micro-batch, per device."""
    eval_batch_size: Annotated[int, Meta(ge=1, le=65536)] | None = None
    gradient_accumulation_steps: Annotated[int, Meta(ge=1, le=65536)] = 1
    warmup_steps: Natural | None = None
    warmup_ratio: Annotated[float, Meta(ge=0, lt=1)] | None = None
    max_length: Annotated[int, Meta(ge=8, le=4_194_304)] = 1024
    """Tokens of a sequence."""
    lr_scheduler_type: Scheduler = "linear"
    optim: Text = "adamw_torch"
    weight_decay: Annotated[float, Meta(ge=0, le=100)] = 0.0
    max_grad_norm: Annotated[float, Meta(ge=0, le=1e6)] = 1.0
    adam_beta1: Annotated[float, Meta(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Meta(ge=0, lt=1)] = 0.999
    adam_epsilon: Annotated[float, Meta(ge=0, le=1)] = 1e-8
    logging_steps: Positive | None = None
    eval_strategy: Literal["no", "steps", "epoch"] = "no"
    eval_steps: Positive = 100
    save_steps: Positive | None = None
    save_total_limit: Annotated[int, Meta(ge=1, le=1000)] = 3
    gradient_checkpointing: bool = False
    packing: bool = False
    group_by_length: bool = False
    assistant_only_loss: bool | None = None
    """None = where the template can mark the assistant's turns."""
    bf16: bool | None = None
    fp16: bool = False
    seed: Annotated[int, Meta(ge=0, le=2**32 - 1)] = 42
    dataloader_num_workers: Annotated[int, Meta(ge=0, le=64)] = 0
    dataloader_prefetch_factor: Annotated[int, Meta(ge=1, le=64)] | None = None
    dataloader_pin_memory: bool = True
    early_stopping_patience: Positive | None = None
    early_stopping_threshold: Annotated[float, Meta(ge=0, le=1e6)] = 0.0
    metric_for_best: Annotated[str, Meta(max_length=64)] = "eval_loss"
    """The measure of an evaluation by which the best checkpoint is chosen and early stopping counts."""
    load_best_at_end: bool = False
    """Make the final model of the best checkpoint also where training ran to its last step."""
    deterministic: bool = False
    """On a GPU: deterministic kernels only, so that a resumed run is equal bit for bit. Costs speed."""
    on_bad_loss: Literal["fail", "rewind"] = "fail"
    """On a loss that is no number, or a spike: end, or go back to the last good checkpoint and skip its rows."""
    spike_factor: Annotated[float, Meta(gt=1, le=1e6)] | None = None
    """A loss beyond this many times the recent mean is a spike; None: only NaN and infinity count."""
    max_rewinds: Annotated[int, Meta(ge=1, le=1000)] = 3


def not_within(name: str, value: float) -> str:
    """Return what a number of TrainingSpec must be where ``value`` is not that, and "" where it is."""
    try:
        msgspec.convert({name: value}, TrainingSpec)
    except msgspec.ValidationError:
        part = inspect.type_info(TrainingSpec)
        assert isinstance(part, inspect.StructType)
        found = next(field.type for field in part.fields if field.name == name)
        kinds = found.types if isinstance(found, inspect.UnionType) else (found,)
        one = next(kind for kind in kinds if isinstance(kind, inspect.IntType | inspect.FloatType))
        low = f"at least {one.ge:.12g}" if one.gt is None else f"above {one.gt:.12g}"
        return f"{low} and at most {one.le:.12g}"
    return ""


class OutputSpec(Part, frozen=True, kw_only=True):
    """What is left on disk at the end."""

    merge_adapter: bool = False
    """Also write the base model in bfloat16 with the adapter merged in, under ``merged/``."""


class SampleSpec(Part, frozen=True, kw_only=True):
    """A prompt to answer, and a held-out answer to weigh, before and after training."""

    prompt: Text
    answer: Text = ""


class JobSpec(Part, frozen=True, kw_only=True):
    """A fine-tuning job."""

    job_id: JobId
    name: Annotated[str, Meta(max_length=512)] = ""
    method: Method = Method.SFT
    model: ModelSpec
    tokenizer: TokenizerSpec = TokenizerSpec()
    data: DataSpec = DataSpec()
    lora: LoraSpec | None = None
    dpo: DpoSpec = DpoSpec()
    training: TrainingSpec = TrainingSpec()
    output: OutputSpec = OutputSpec()
    samples: Annotated[list[SampleSpec], Meta(max_length=16)] = []
    branch: BranchSpec | None = None


class BadSpec(ValueError):
    """A job that cannot be accepted; the sentence names the path and what to do."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(path, why)
        self.path = path
        self.why = why

    def __str__(self) -> str:
        return f"{self.path}: {self.why}" if self.path else self.why
