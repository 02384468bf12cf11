"""What errors of libraries, of the driver and of the system mean, in sentences for the person who must act.

The libraries are known by the names of their errors and by their words, so that none has to be imported.
"""

import errno
import re
import shutil
from pathlib import Path

from protocol.failures import FailureReason

R = FailureReason
Told = tuple[FailureReason, str, str]
"""Reason, sentence, and advice ("" for the reason's general one)."""

WORDS: list[tuple[str, FailureReason, str, str]] = [
    # From the particular to the general: the first that is found counts.
    (
        r"CUDA out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED",
        R.DEVICE_MEMORY,
        "The device's memory did not suffice: {first} Lower training.batch_size (and raise "
        "gradient_accumulation_steps), lower max_length, or turn gradient_checkpointing on.",
        "",
    ),
    (
        r"DataLoader worker .*killed by signal: Killed",
        R.HOST_MEMORY,
        "A process that reads rows was killed, mostly because the machine was out of memory: {first}",
        "Lower training.dataloader_num_workers (0 has none beside the trainer), or close other programs.",
    ),
    (
        r"DataLoader worker .*(Bus error|shared memory)|unable to (allocate|open) shared memory",
        R.HOST_MEMORY,
        "The shared memory of the machine is full (/dev/shm has {shm}): {first}",
        "Set training.dataloader_num_workers to 0, or give the container more (--shm-size, --ipc=host).",
    ),
    (
        r"can't allocate memory|Cannot allocate memory|std::bad_alloc",
        R.HOST_MEMORY,
        "The machine's memory did not suffice: {first} Lower training.batch_size or max_length, "
        "or close other programs.",
        "",
    ),
    (
        r"device-side assert|Assertion `.*(t >= 0 && t < n_classes|index out of bounds|srcIndex < srcSelectDimSize)",
        R.MODEL,
        "A number out of its range reached the device (device-side assert): mostly a token beyond the model's "
        "vocabulary, because tokenizer and model do not belong together. {first}",
        "Leave tokenizer.name out, or name the model's own; look at rows with unusual characters.",
    ),
    (
        r"requires bitsandbytes|No module named 'bitsandbytes'",
        R.MODEL,
        "bitsandbytes, which quantises the model, is not installed: {first}",
        "Install it where the agent is installed, or leave model.quantization out.",
    ),
    (
        r"libbitsandbytes|Native code method attempted|bitsandbytes.*(CUDA|functional|library|backend|version|install)|CUDA Setup failed|"
        r"[Bb]itsandbytes (is|was) not",
        R.DRIVER,
        "bitsandbytes, which quantises the model, finds no CUDA library for this machine: {first}",
        "Install the bitsandbytes of this CUDA version, or leave model.quantization out.",
    ),
    (
        r"no kernel image is available|not compatible with the current PyTorch installation",
        R.DRIVER,
        "This PyTorch was not built for this GPU: {first}",
        "Install the PyTorch of a CUDA version that knows this GPU, or take another GPU (DEVICES).",
    ),
    (
        r"CUDA driver version is insufficient|Found no NVIDIA driver|driver on your system is too old",
        R.DRIVER,
        "The NVIDIA driver is missing or older than this PyTorch needs: {first}",
        "Update the driver, then restart the machine.",
    ),
    (
        r"uncorrectable ECC|hardware error|fallen off the bus|CUDA error: (device|an) .*lost",
        R.DRIVER,
        "The GPU reported an error of its hardware: {first}",
        "Reset the card (nvidia-smi --gpu-reset) or restart the machine; if it comes back, have it tested.",
    ),
    (
        r"CUBLAS_STATUS_NOT_INITIALIZED|CUDNN_STATUS_NOT_INITIALIZED",
        R.DEVICE_MEMORY,
        "A library of the GPU could not begin, mostly because its memory is full: {first}",
        "",
    ),
    (
        r"CUBLAS_STATUS_|CUDNN_STATUS_|cuDNN error|CUFFT_|CUSOLVER_|NCCL error|HIP error|CUDA error|CUDA driver error",
        R.DRIVER,
        "The device reported an error: {first}",
        "",
    ),
    (
        r"gated repo|Access to model .* is restricted|GatedRepoError",
        R.MODEL,
        "The Hub keeps this model or data set behind a consent that your account has not given: {first}",
        "Accept its licence on the Hub's page, and pass a token of that account on: PASS_TO_TRAINER=HF_TOKEN.",
    ),
    (
        r"401 Client Error|Invalid username or password|Invalid credentials|token .* (is )?(invalid|expired)",
        R.PERMISSION,
        "The Hub refuses the token that the trainer has: {first}",
        "Make a new token on the Hub and pass it on: PASS_TO_TRAINER=HF_TOKEN.",
    ),
    (
        r"403 (Client Error|Forbidden)",
        R.PERMISSION,
        "The Hub lets this account not at what the job names: {first}",
        "Ask for access on the Hub's page, and pass a token of that account on: PASS_TO_TRAINER=HF_TOKEN.",
    ),
    (
        r"429 Client Error|Too Many Requests",
        R.DATA,
        "The Hub has had too many requests from here: {first}",
        "Retry the job later, or fetch the model into MODELS_DIR first.",
    ),
    (
        r"OfflineModeIsEnabled|offline mode is enabled|couldn't connect to|LocalEntryNotFound|Cannot reach|"
        r"Temporary failure in name resolution|Name or service not known|Network is unreachable|"
        r"Max retries exceeded|Connection (refused|reset|aborted|timed out)|ConnectError|ConnectTimeout",
        R.MODEL,
        "The Hub could not be reached, and what the job names is not on this machine: {first}",
        "Connect the machine, or put the model into MODELS_DIR and the data into DATASETS_DIR.",
    ),
    (
        r"not a valid model identifier|Repository Not Found|RevisionNotFound|EntryNotFound|DatasetNotFound|404 Client",
        R.MODEL,
        "The Hub has nothing under that name, or it is private: {first}",
        "Check the name and the revision; for a private one pass a token on: PASS_TO_TRAINER=HF_TOKEN.",
    ),
    (
        r"data did not match any variant|backend tokenizer|[Cc]onverting from (SentencePiece|Tiktoken)|"
        r"(sentencepiece|tiktoken|protobuf).*(install|not found|required)",
        R.MODEL,
        "The tokenizer's files cannot be read by these libraries: {first}",
        "Use the model's newest tokenizer.json, or name a tokenizer that goes with it (tokenizer.name).",
    ),
    (
        r"Error while deserializing header|HeaderTooLarge|InvalidHeader|MetadataIncompleteBuffer|SafetensorError",
        R.MODEL,
        "A file of weights is damaged, cut short or not what its name says: {first}",
        "Fetch it again; a file of some hundred bytes is a pointer of Git LFS and not the weights.",
    ),
    (
        r"size mismatch for|Error\(s\) in loading state_dict",
        R.MODEL,
        "The weights do not fit the model's own configuration: {first}",
        "",
    ),
    (
        r"requires the following packages|No module named|cannot import name|(You need to|Please) (install|have) ",
        R.MODEL,
        "A Python package that the model or the job needs is not installed: {first}",
        "Install it where the agent is installed, or choose a model that does without.",
    ),
]
"""(pattern, reason, sentence, advice); ``{first}`` is the error's first line."""

KINDS: dict[str, tuple[FailureReason, str]] = {
    "TemplateSyntaxError": (R.TEMPLATE, "The chat template cannot be read: {first}"),
    "UndefinedError": (R.TEMPLATE, "The chat template asks for what a row does not have: {first}"),
    "TemplateError": (R.TEMPLATE, "The chat template refuses a row: {first}"),
    "ArrowInvalid": (R.DATA, "The data set cannot be read: {first}"),
    "DatasetGenerationError": (R.DATA, "The data set cannot be read: {first}"),
    "UnicodeDecodeError": (R.DATA, "A file of the data set is not UTF-8 text: {first}"),
    "ZstdError": (R.CHECKPOINT, "A compressed checkpoint cannot be read: {first}"),
}

SCARCE = (R.DISK_FULL, R.DEVICE_MEMORY, R.HOST_MEMORY)
"""What makes other errors on its way up: it counts although nobody names it as the cause."""

REFUSED = {
    errno.EACCES: "this user may not do that there",
    errno.EPERM: "this user may not do that there",
    errno.EROFS: "the disk is mounted read-only",
    errno.ENOENT: "it is not there, or not any more",
    errno.ENOTDIR: "a part of its path is no folder",
    errno.ESTALE: "the network disk under it has gone",
    errno.ENODEV: "the disk under it has gone",
    errno.ENXIO: "the disk under it has gone",
    errno.EIO: "the disk under it answers with errors",
    errno.EMFILE: "too many files are open at once (ulimit -n)",
}
"""What the system's refusals mean."""


def explain(error: BaseException) -> Told:
    """Return reason, sentence and advice for an error that is not ours. Looks at what caused it, too."""
    for one in _chain(error):
        told = _known(one)
        if told is not None and (one in _causes(error) or told[0] in SCARCE):
            return told
    if str(error).startswith("DataLoader worker"):  # and its cause is none that is known
        advice = "Set training.dataloader_num_workers to 0 to see the error itself."
        return R.SIGNAL, f"A process that reads rows ended: {_first(error)}", advice
    return (
        R.INTERNAL,
        f"The trainer met an error that it has no answer for, {type(error).__name__}: {_first(error)} "
        "The job's log and its checkpoints are kept.",
        "",
    )


def _known(error: BaseException) -> Told | None:
    kind, text, first = type(error).__name__, str(error).strip(), _first(error)
    if kind == "OutOfMemoryError":
        return R.DEVICE_MEMORY, WORDS[0][2].format(first=first), ""
    if isinstance(error, MemoryError):
        return R.HOST_MEMORY, f"The machine's memory did not suffice: {first} Close other programs.", ""
    if isinstance(error, OSError) and error.errno is not None:
        told = _of_system(error)
        if told is not None:
            return told
    if "No space left on device" in text or "os error 28" in text:
        return R.DISK_FULL, f"The disk is full: {first} Free some space, then resume the job.", ""
    for pattern, reason, sentence, advice in WORDS:
        if re.search(pattern, f"{kind}: {text}", re.DOTALL):
            return reason, sentence.format(first=first, shm=_shared_memory()), advice
    if kind in KINDS:
        reason, sentence = KINDS[kind]
        return reason, sentence.format(first=first), ""
    if kind == "AcceleratorError":
        return R.DRIVER, f"The device reported an error: {first}", ""
    return None


def _of_system(error: OSError) -> Told | None:
    """Return what a refusal of the system means."""
    where = str(error.filename) if isinstance(error.filename, str | bytes | Path) else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        folder = Path(where).parent if where else None
        there = f" ({folder})" if folder else ""
        return R.DISK_FULL, f"The disk is full{there}. Free some space, then resume the job.", ""
    if error.errno == errno.ENOMEM:
        return (
            R.HOST_MEMORY,
            f"The machine's memory did not suffice: {_first(error)} Close other programs.",
            "",
        )
    meaning = REFUSED.get(error.errno or 0)
    if meaning is None or not where:
        return None
    return (
        R.PERMISSION,
        f"{where} cannot be used: {meaning}. What was saved before is untouched.",
        "Let the user whom the agent runs as read and write there, or mount the disk again; then retry the job.",
    )


def _causes(error: BaseException) -> list[BaseException]:
    """Return the error and what it is said to come of."""
    found = [error]
    while (cause := found[-1].__cause__) is not None and cause not in found:
        found.append(cause)
    return found


def _chain(error: BaseException) -> list[BaseException]:
    """Return the error, what it is said to come of, and what else was being dealt with."""
    found = _causes(error)
    for one in found:
        context = one.__context__
        if context is not None and context not in found:
            found.append(context)
    return found


def _first(error: BaseException) -> str:
    text = str(error).strip()
    first = text.splitlines()[0][:500] if text else "no further words"
    return first if first.endswith((".", "!", "?")) else f"{first}."


def _shared_memory() -> str:
    place = Path("/dev/shm")  # noqa: S108  it is asked for its size alone
    if not place.exists():
        return "no such place"
    usage = shutil.disk_usage(place)
    return f"{usage.free / (1 << 20):.0f} of {usage.total / (1 << 20):.0f} MB free"
