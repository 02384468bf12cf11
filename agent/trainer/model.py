"""Loading: tokenizer, weights, precision, quantisation and adapter, with a sentence for each way it can fail."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear8bitLt
from peft import LoraConfig
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from agent.trainer.errors import TrainerError
from protocol.failures import FailureReason
from protocol.jobspec import JobSpec, Method, Quantization
from protocol.worker import Limits, Workspace

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")

Note = Callable[[str, str], None]
"""Takes a level (info or warning) and a sentence for the user."""


@dataclass(frozen=True)
class Precision:
    """In what the weights are held and the device computes."""

    weights: torch.dtype
    bf16: bool = False
    """Compute in bfloat16 under autocast."""
    fp16: bool = False

    @property
    def facts(self) -> dict[str, str]:
        computed = "bfloat16" if self.bf16 else "float16" if self.fp16 else _name(self.weights)
        return {"weights": _name(self.weights), "computes_in": computed}


@dataclass
class Loaded:
    """A model ready to be given to a trainer."""

    model: Any
    adapter: LoraConfig | None
    reference: Any = None
    """The model that preference training is held to, where taking the adapter off does not give it."""
    facts: dict[str, str] = field(default_factory=dict)


def choose_precision(spec: JobSpec, limits: Limits, note: Note) -> Precision:
    """Return the precision for this device: the owner's limit before the job's wish before the device's best."""
    training, wish = spec.training, spec.model.dtype
    on_cuda = torch.cuda.is_available()
    if not limits.mixed_precision:
        if wish in ("bfloat16", "float16") or training.bf16 or training.fp16:
            note(
                "warning",
                "The owner of this machine switched 16-bit training off; the job trains in float32.",
            )
        return Precision(torch.float32)
    # A CPU computes bfloat16 correctly but slowly, so there it has to be asked for.
    bf16 = bool(training.bf16) if not on_cuda else training.bf16 is not False and not training.fp16
    if on_cuda and bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        if training.bf16:
            note("warning", "This device does not compute in bfloat16; the job trains in float32.")
        bf16 = False
    fp16 = training.fp16 and on_cuda and not bf16
    if training.fp16 and not on_cuda:
        note("warning", "float16 needs a CUDA device; the job trains in float32.")
    if wish == "auto":
        weights = torch.bfloat16 if bf16 and on_cuda else torch.float32
        if fp16 and (spec.lora is not None):
            weights = torch.float16
        return Precision(weights, bf16, fp16)
    weights = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[wish]
    if weights == torch.float16 and (spec.lora is None or not on_cuda):
        # The gradient scaler refuses float16 gradients, and a CPU has no kernels for them.
        note("warning", "Weights that are trained cannot be held in float16 here; they are held in float32.")
        weights = torch.float32
    return Precision(weights, bf16, fp16)


def load_tokenizer(spec: JobSpec, workspace: Workspace, limits: Limits) -> Any:
    """Return the tokenizer of the job, with the template and the padding that it asks for."""
    source = workspace.tokenizer or workspace.model
    arguments = _source_arguments(source, limits)
    if source == workspace.model:
        wanted = spec.tokenizer.trust_remote_code or spec.model.trust_remote_code
        remote = _remote_code(wanted, limits.remote_code, "tokenizer")
        arguments["revision"] = spec.model.revision
    else:
        # Leave for the model's code is no leave for that of a tokenizer from elsewhere.
        remote = _remote_code(spec.tokenizer.trust_remote_code, limits.tokenizer_code, "tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, trust_remote_code=remote, padding_side=spec.tokenizer.padding_side, **arguments
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _unloadable("tokenizer", source, error) from error
    if spec.tokenizer.chat_template is not None:
        tokenizer.chat_template = spec.tokenizer.chat_template
    if tokenizer.eos_token is None:
        raise TrainerError(
            FailureReason.MODEL,
            f"The tokenizer in {source} names no end-of-sequence token, so the model could not learn to stop. "
            "Set eos_token in its tokenizer_config.json, or name another tokenizer.",
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    spec: JobSpec, workspace: Workspace, limits: Limits, precision: Precision, tokenizer: Any
) -> Loaded:
    """Return the base model with the adapter's configuration. Safetensors only: a pickle is a program."""
    quantization = spec.model.quantization
    if quantization is not None and spec.lora is None:
        raise TrainerError(
            FailureReason.SPEC,
            f"model.quantization: weights held in {quantization.bits} bits cannot be trained themselves. "
            "Add a lora section, or leave quantization out.",
        )
    model = load_base(spec, workspace, limits, precision.weights, _bits(quantization))
    check_vocabulary(tokenizer, model, workspace)
    _keep_differentiable(model)
    facts = dict(precision.facts)
    if quantization is not None:
        held = quantization.quant_type if quantization.bits == 4 else "int8"
        facts["weights"] = held + (" with double quantisation" if quantization.double_quant else "")
    facts["attention"] = str(getattr(model.config, "_attn_implementation", "") or "eager")
    adapter, reference = lora_config(spec, model), None
    if spec.method is Method.DPO and adapter is None:
        reference = load_base(spec, workspace, limits, precision.weights)
        facts["reference"] = "the base model, held beside the one that is trained"
    return Loaded(model, adapter, reference, facts)


def load_base(
    spec: JobSpec,
    workspace: Workspace,
    limits: Limits,
    dtype: torch.dtype,
    bits: BitsAndBytesConfig | None = None,
) -> Any:
    """Load the base model's weights; raises TrainerError with a sentence."""
    source = workspace.model
    remote = _remote_code(spec.model.trust_remote_code, limits.remote_code, "model")
    arguments = _source_arguments(source, limits)
    _refuse_pickles(source)
    if bits is not None:
        arguments |= {"quantization_config": bits, "device_map": {"": _device()}}
    try:
        return AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=remote,
            revision=spec.model.revision,
            **arguments,
        )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise _unloadable("model", source, error) from error


def check_vocabulary(tokenizer: Any, model: Any, workspace: Workspace) -> None:
    """Raise TrainerError if the tokenizer can produce a token that the model has no embedding for."""
    rows = int(model.get_input_embeddings().weight.shape[0])
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= rows:
        raise TrainerError(
            FailureReason.MODEL,
            f"The tokenizer ({workspace.tokenizer or workspace.model}) has {largest + 1} tokens, but the model "
            f"({workspace.model}) has embeddings for {rows}. Use the tokenizer that belongs to the model.",
        )


def lora_config(spec: JobSpec, model: Any) -> LoraConfig | None:
    """Return the adapter that the job asks for; raises TrainerError for modules that the model lacks."""
    lora = spec.lora
    if lora is None:
        return None
    if lora.target_modules != "all-linear":
        names = {name for name, module in model.named_modules() if hasattr(module, "weight")}
        missing = [t for t in lora.target_modules if not any(n == t or n.endswith(f".{t}") for n in names)]
        if missing:
            known = (
                sorted({name.rsplit(".", 1)[-1] for name in names if "proj" in name}) or sorted(names)[:20]
            )
            raise TrainerError(
                FailureReason.SPEC,
                f"lora.target_modules: the model has no module named {', '.join(missing)}. "
                f"It has {', '.join(known)}; or write all-linear.",
            )
        if heads := [t for t in lora.target_modules if t.rsplit(".", 1)[-1] == "lm_head"]:
            raise TrainerError(
                FailureReason.SPEC,
                f"lora.target_modules: {heads[0]} cannot have an adapter, as its weights are multiplied with "
                "directly. Name it in lora.modules_to_save to train it whole.",
            )
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        modules_to_save=lora.modules_to_save or None,
        bias=lora.bias,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
    )


@contextlib.contextmanager
def old_name_allowed() -> Iterator[None]:
    """Silence PEFT 0.21, which asks a model by a name that transformers 5.23 has renamed; both are pinned."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        yield


def _keep_differentiable(model: Any) -> None:
    """Keep quantised layers on a CPU in the form that has a gradient.

    On a CPU with AVX512-BF16 bitsandbytes repacks 4-bit ones at the first evaluation, for a kernel without a backward
    pass; from then on the layers below get no gradient, and nothing but a warning says so.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        if isinstance(module, Linear8bitLt):
            module.register_forward_pre_hook(_keep_scales)


def _keep_scales(module: Any, args: Any) -> None:
    """Give an 8-bit weight its scales back.

    DoRA reads the weight in every pass; on a CPU PEFT 0.21 then puts a copy in its place, which has none.
    """
    if module.weight.CB is not None and module.weight.SCB is None:
        module.weight.SCB = module.state.SCB


def _bits(quantization: Quantization | None) -> BitsAndBytesConfig | None:
    if quantization is None:
        return None
    if quantization.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.quant_type,
        bnb_4bit_compute_dtype=getattr(torch, quantization.compute_dtype),
        bnb_4bit_use_double_quant=quantization.double_quant,
    )


def _device() -> str:
    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"


def _remote_code(wanted: bool, allowed: bool, what: str) -> bool:
    if wanted and not allowed:
        raise TrainerError(
            FailureReason.PERMISSION,
            f"The job wants to run Python code that comes with the {what} (trust_remote_code). "
            f"The owner of this machine has not allowed that for this {what}.",
        )
    return wanted


def _source_arguments(source: str, limits: Limits) -> dict[str, Any]:
    """Return the arguments that belong to where ``source`` is; raises TrainerError if it may not be read."""
    if Path(source).is_absolute():
        if not Path(source).is_dir():
            raise TrainerError(
                FailureReason.MODEL,
                f"There is no model folder {source}. Put the model there, or correct model.name.",
            )
        return {"local_files_only": True}
    if not limits.hub:
        raise TrainerError(
            FailureReason.PERMISSION,
            f"{source} would come from the Hugging Face Hub, which the owner of this machine does not allow. "
            "Use a model in the models folder.",
        )
    return {}  # what is fetched lies where the libraries keep it (HF_HOME), for the next job too


def _refuse_pickles(source: str) -> None:
    folder = Path(source)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
    if pickled:
        raise TrainerError(
            FailureReason.MODEL,
            f"The weights in {source} are pickled ({pickled[0]}); a pickle can run any code, so it is not opened. "
            "Convert them to safetensors, for example with save_pretrained on a machine that you trust them on.",
        )


def _unloadable(what: str, source: str, error: Exception) -> TrainerError:
    lines = str(error).strip().splitlines()
    first = lines[0] if lines else type(error).__name__
    return TrainerError(FailureReason.MODEL, f"The {what} in {source} cannot be loaded: {first}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
