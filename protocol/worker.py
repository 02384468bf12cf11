"""Every message between agent and trainer: orders go in, events come out.

On the queue an order is the MessagePack of an `Order`; an event is the MessagePack of
`Numbered`. Both ends decode with the typed decoders below, never with pickle.
"""

from enum import StrEnum

import msgspec

from protocol.failures import Failure
from protocol.jobspec import JobSpec

MAX_EVENT = 1 << 20
"""Bytes of one encoded event; the agent ends a trainer that sends more."""


class Phase(StrEnum):
    """What a job that is preparing is doing."""

    DOWNLOAD = "download"
    CHECK = "check"
    LOAD = "load"
    RESTORE = "restore"


class Workspace(msgspec.Struct, frozen=True, kw_only=True):
    """Absolute paths, all resolved and allowed by the agent."""

    checkpoints: str
    """The job's own folder of checkpoints."""
    output: str
    """The folder that will hold the final model."""
    cache: str
    model: str
    """The base model: a local folder, or a Hub name where the owner allows the Hub."""
    data: str
    """A local file or folder, or a Hub name where the owner allows the Hub."""
    eval_data: str = ""
    tokenizer: str = ""
    branch: str = ""
    """The checkpoint of another job that this one begins with, while it has no good one of its own."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What the owner allows, over any job's wish."""

    gpu_memory_fraction: float = 1.0
    mixed_precision: bool = True
    remote_code: bool = False
    """True only when the owner allowed code from this very model."""
    logging_steps: int = 1
    """Used when the job names none."""
    save_steps: int = 500
    """Used when the job names none."""
    hub: bool = True
    """Whether models and data sets may be fetched from the Hub."""
    verify_resume: int = 0
    """Steps before the checkpoint that are replayed in a fresh process after a resume; 0: none."""
    tokenizer_code: bool = False
    """True only when the owner allowed code from this very tokenizer; counts where a job names one of its own."""
    background_saves: bool = True
    """Periodic checkpoints are copied to host memory and written while training goes on."""
    compress_checkpoints: bool = False
    """Checkpoints are written with zstd, the bytes of the numbers grouped by plane."""


class Parameters(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Live parameters: None leaves a value as it is."""

    learning_rate: float | None = None
    batch_size: int | None = None
    gradient_accumulation_steps: int | None = None
    eval_steps: int | None = None
    save_steps: int | None = None
    logging_steps: int | None = None
    early_stopping_patience: int | None = None
    step_rows: int | None = None
    """Rows of an optimizer step, where a trainer cut it into micro-batches that do not divide it."""


# Orders: agent -> trainer


class Order(msgspec.Struct, frozen=True, array_like=True):
    """Base of every order."""


class Start(Order, frozen=True, array_like=True, tag=1):
    """Train. A warm trainer waits for this; a cold one finds it first on its queue."""

    spec: JobSpec
    attempt: int
    workspace: Workspace
    limits: Limits
    resume_from: str = ""
    """Folder of the checkpoint to continue exactly; empty: the newest good one in the workspace, if any."""
    first_event: int = 1
    """The number of this attempt's first event."""
    stop_at_once: bool = False
    """Load, restore and finish without another step (want `stop` on a paused job)."""
    parameters: Parameters = Parameters()
    accept_changes: bool = False
    """The user has said that a checkpoint may be gone on from although the job's inputs have changed since."""
    applied: list[tuple[int, Parameters]] = []
    """Live parameters as earlier attempts put them in force, each from its step on; replayed at the same steps."""


class Pause(Order, frozen=True, array_like=True, tag=2):
    """Save exactly at the next optimizer step, say `Saved` and `Left`, and leave."""


class Cancel(Order, frozen=True, array_like=True, tag=3):
    """Leave at the next micro-batch without saving."""


class Stop(Order, frozen=True, array_like=True, tag=4):
    """End training at the next step as if it were the last; go on to the final model."""


class SetParameters(Order, frozen=True, array_like=True, tag=5):
    """Apply at the next step boundary; answered by `ParametersSet`."""

    parameters: Parameters


class SaveNow(Order, frozen=True, array_like=True, tag=6):
    """Save at the next step boundary and train on; answered by `Saved`."""

    command_id: str = ""


class EvaluateNow(Order, frozen=True, array_like=True, tag=7):
    """Evaluate at the next step boundary and train on."""

    command_id: str = ""


class Committed(Order, frozen=True, array_like=True, tag=8):
    """Events up to and including ``number`` are in the agent's journal; forget them."""

    number: int


class Check(Order, frozen=True, array_like=True, tag=9):
    """In place of `Start`: say what the job would need (`Estimated`), and leave. Nothing is trained or kept."""

    spec: JobSpec
    workspace: Workspace
    limits: Limits


AnyOrder = Start | Pause | Cancel | Stop | SetParameters | SaveNow | EvaluateNow | Committed | Check


# Events: trainer -> agent


class Event(msgspec.Struct, frozen=True, array_like=True):
    """Base of every event."""


class Warm(Event, frozen=True, array_like=True, tag=1):
    """Imports are done; waiting for `Start`. Numbered 0: it belongs to no attempt."""

    pid: int
    import_seconds: float


class Preparing(Event, frozen=True, array_like=True, tag=2):
    """A job that is preparing has come to ``phase``; ``detail`` is a sentence for the user."""

    phase: Phase
    detail: str = ""


class Ready(Event, frozen=True, array_like=True, tag=3):
    """The first optimizer step is about to run."""

    total_steps: int
    total_epochs: float
    start_step: int
    """Steps already done: 0, or the step of the checkpoint that was restored."""
    train_rows: int
    eval_rows: int
    device: str
    trainable_parameters: int
    all_parameters: int
    batch_size: int
    gradient_accumulation_steps: int
    resumed_from: str = ""
    facts: dict[str, str] = {}
    """Other figures worth showing: dtype, attention, packing, loss on which turns, data format."""


class Metrics(Event, frozen=True, array_like=True, tag=4):
    """One point of the curve: what was measured at optimizer step ``step``.

    Names in ``values`` are those of the platform's charts (`protocol.rest.METRIC_NAMES`);
    a non-finite value is sent as it is.
    """

    step: int
    epoch: float
    time: float
    """Unix seconds when the step ended."""
    values: dict[str, float]
    trend: str = ""


class Saved(Event, frozen=True, array_like=True, tag=5):
    """A checkpoint is complete and proved on disk."""

    path: str
    step: int
    epoch: float
    size: int
    """Bytes."""
    seconds: float
    reason: str
    """schedule, pause, command, best, parent_lost, final"""
    eval_loss: float | None = None
    train_loss: float | None = None
    is_best: bool = False
    command_id: str = ""
    stall: float = 0.0
    """Seconds that training stood still for it; less than ``seconds`` where it was written in the background."""


class Trained(Event, frozen=True, array_like=True, tag=6):
    """Training has ended; the final model is being written."""

    step: int
    why: str
    """steps, stop, early_stopping"""


class Finished(Event, frozen=True, array_like=True, tag=7):
    """The final model is on disk and the process is about to leave with 0."""

    model_path: str
    merged_path: str
    weights_hash: str
    """xxh3-128 over every final tensor's name and bytes, in the order of names."""
    step: int
    values: dict[str, float]
    """final_loss, final_eval_loss, initial_eval_loss, best_eval_loss, best_step, best_epoch, train_seconds, tokens_seen"""
    samples: list[dict[str, str | float]] = []
    """For each sample: prompt, before, after, answer, log_likelihood_before, log_likelihood_after."""


class Left(Event, frozen=True, array_like=True, tag=8):
    """The process leaves on purpose and will say no more.

    ``why``: paused, cancelled, parent_lost; disk_full (it cannot save; the last good checkpoint stands);
    fresh_process (it saved, and wants to go on in a new process whose memory is in one piece).
    """

    why: str
    step: int
    need: int = 0
    """Bytes of disk that it needs before it can go on (disk_full); 0: not known."""


class Failed(Event, frozen=True, array_like=True, tag=9):
    """The process leaves because it cannot go on."""

    failure: Failure


class Note(Event, frozen=True, array_like=True, tag=10):
    """A sentence the user should read: a fall-back, a warning, a thing not done as asked."""

    level: str
    """info or warning"""
    text: str


class ParametersSet(Event, frozen=True, array_like=True, tag=11):
    """Live parameters are in force from optimizer step ``step`` on; ``refused`` says what is not, and why."""

    step: int
    parameters: Parameters
    refused: str = ""
    replayed: bool = False
    """An earlier attempt had put them in force at this step, and this one does so again."""


class Estimate(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a job will need, before it starts. Sizes in GB of 2**30 bytes."""

    device: str
    device_gb: float | None = None
    """Peak of the device's memory; None on a CPU."""
    host_gb: float
    """Peak resident memory of the trainer."""
    disk_gb: float
    """Checkpoints at their most, and the final model."""
    free_device_gb: float | None = None
    free_host_gb: float
    free_disk_gb: float
    step_seconds: float | None = None
    total_seconds: float | None = None
    total_steps: int = 0
    parts: dict[str, float] = {}
    """What the peak is made of, GB by name: weights, gradients, optimizer, activations, ..."""
    advice: list[str] = []
    """Sentences, with figures: what to change, and what that saves."""
    fits: bool = True


class Estimated(Event, frozen=True, array_like=True, tag=12):
    """What the job will need."""

    estimate: Estimate


class Verified(Event, frozen=True, array_like=True, tag=13):
    """Steps ``first`` to ``last`` before the checkpoint were replayed in a fresh process after a resume."""

    first: int
    last: int
    equal: bool
    difference: float = 0.0
    """Largest difference of a loss or a weight."""
    detail: str = ""


AnyEvent = (
    Warm
    | Preparing
    | Ready
    | Metrics
    | Saved
    | Trained
    | Finished
    | Left
    | Failed
    | Note
    | ParametersSet
    | Estimated
    | Verified
)


class Numbered(msgspec.Struct, frozen=True, array_like=True):
    """An event with its attempt and its number within it (1, 2, 3, ...)."""

    attempt: int
    number: int
    event: AnyEvent


encoder = msgspec.msgpack.Encoder()
order_decoder: msgspec.msgpack.Decoder[AnyOrder] = msgspec.msgpack.Decoder(AnyOrder)
event_decoder: msgspec.msgpack.Decoder[Numbered] = msgspec.msgpack.Decoder(Numbered)

LEFTOVERS = "unacknowledged.msgpack"
"""File in the job's checkpoints folder: a MessagePack array of `Numbered` that no agent has committed."""
