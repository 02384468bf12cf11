"""Every message on the WebSocket; what its DATA frames carry is in `protocol.records`.

Frames and records are `array_like` structs with an integer tag first. They grow by appending
fields with defaults; an unknown tag is counted and passed over (`protocol.codec.Unknown`).
"""

from enum import IntEnum, StrEnum
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from protocol.fields import MAX_FRAME, Count, Name, Prose, Seq, Word
from protocol.worker import Parameters

SUBPROTOCOL_MSGPACK = "finetunelab.agent.v1.msgpack"
SUBPROTOCOL_JSON = "finetunelab.agent.v1.json"
SUBPROTOCOLS = (SUBPROTOCOL_MSGPACK, SUBPROTOCOL_JSON)
"""Offered by the agent in this order; the server's own order decides."""
CONNECT_PATH = "/api/training/agent/connect"


class Lane(IntEnum):
    """Streams of one scope, most urgent first. Each has its own dense numbers."""

    CONTROL = 0
    METRICS = 1
    LOGS = 2


class Close(IntEnum):
    """Close codes of ours. 4000-4499: dial again; 4500-4999: do not."""

    DRAIN = 4000
    STALE = 4008
    GAP = 4009
    SLOW = 4010
    MALFORMED = 4011
    RATE = 4029
    AUTH = 4501
    DISABLED = 4503
    UNKNOWN_AGENT = 4504
    OTHER_INSTALL = 4505
    VERSION = 4506
    OVERSIZE = 4513


class CommandKind(StrEnum):
    """What can be asked once, where a wanted state does not fit."""

    SAVE_NOW = "save_now"
    EVALUATE_NOW = "evaluate_now"
    SEND_LOG = "send_log"
    RETRY = "retry"


# Parts


class Gpu(msgspec.Struct, frozen=True, array_like=True):
    """One device."""

    index: int
    name: Name
    memory_total_gb: float
    uuid: Name = ""
    driver: Name = ""
    cuda: Name = ""
    compute_capability: Name = ""


class Machine(msgspec.Struct, frozen=True, array_like=True):
    """What the agent runs on, and what it can run."""

    hostname: Name
    platform: Name
    """linux, darwin or windows."""
    os: Name
    python: Name
    version: Name
    """Of the agent."""
    cpu: Name
    cpu_cores: int
    ram_gb: float
    disk_total_gb: float
    disk_free_gb: float
    gpus: Annotated[list[Gpu], Meta(max_length=64)]
    methods: Annotated[list[Name], Meta(max_length=64)]
    network: Annotated[dict[Name, Name], Meta(max_length=64)] = {}
    max_concurrent_jobs: int = 1


class StreamHead(msgspec.Struct, frozen=True, array_like=True):
    """A stream the agent has records of: numbers ``first`` to ``last`` (first > last: none).

    ``sid`` names the stream on this connection only.
    """

    sid: int
    epoch: Annotated[int, Meta(ge=0)]
    scope: Name
    """A job's id, or "" for the agent itself."""
    lane: Annotated[int, Meta(ge=0, le=2)]
    first: Seq
    last: Seq


class JobSeen(msgspec.Struct, frozen=True, array_like=True):
    """How a job stands at the agent."""

    job_id: Name
    attempt: int
    state: Name
    observed: int
    """The newest desired version the agent has acted on."""


class StreamAck(msgspec.Struct, frozen=True, array_like=True):
    """Everything of ``sid`` up to ``seq`` is durable at the receiver."""

    sid: int
    seq: Seq


class DatasetRef(msgspec.Struct, frozen=True, array_like=True):
    """A data set that the backend serves at `GET /api/training/local/{id}/dataset`."""

    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$(?!\n)")]
    size: Count
    name: Name = ""


class Offer(msgspec.Struct, frozen=True, array_like=True):
    """A job as the backend hands it out."""

    config: Annotated[str, Meta(max_length=131_072)]
    """JSON text of the platform's TrainingConfig, raw or normalised."""
    dataset_path: Word = ""
    job_token: Name = ""
    dataset: DatasetRef | None = None
    name: Name = ""
    attempt: Count = 0
    """The newest attempt the backend has heard of: an agent that lost its journal goes on from there."""


# Frames. Tags 7 and 9 stay unused.


class Frame(msgspec.Struct, frozen=True, array_like=True):
    """Base of every frame."""


class Hello(Frame, frozen=True, array_like=True, tag=1):
    """First frame of a connection: who dials, with what, and where it stands."""

    agent_id: Annotated[str, Meta(pattern=r"^agent_[A-Za-z0-9_-]{4,64}$(?!\n)")]
    install_id: Name
    boot: Count
    """Counts starts of the agent; on its disk before the first dial."""
    attempt: Count
    """Counts dials within this boot. The highest (boot, attempt) owns the agent's id."""
    epoch: Annotated[int, Meta(ge=0)]
    """Random per start of the agent, 63 bits."""
    machine: Machine
    streams: Annotated[list[StreamHead], Meta(max_length=4096)]
    jobs: Annotated[list[JobSeen], Meta(max_length=1024)] = []
    features: Annotated[list[Name], Meta(max_length=64)] = []


class Welcome(Frame, frozen=True, array_like=True, tag=2):
    """Answer to HELLO. One DESIRED frame for each job of this agent follows."""

    session_id: Name
    acks: Annotated[list[StreamAck], Meta(max_length=4096)]
    heartbeat_s: Annotated[float, Meta(gt=0, le=3600)] = 15.0
    max_frame: Annotated[int, Meta(ge=4096)] = MAX_FRAME
    window_records: Annotated[int, Meta(ge=1)] = 16_384
    window_bytes: Annotated[int, Meta(ge=4096)] = 524_288
    server_time: float = 0.0


class Data(Frame, frozen=True, array_like=True, tag=3):
    """Records ``lo``, ``lo + 1``, ... of a stream."""

    sid: int
    lo: Annotated[int, Meta(ge=1)]
    records: Annotated[list[msgspec.Raw], Meta(min_length=1, max_length=4096)]


class Tomb(Frame, frozen=True, array_like=True, tag=4):
    """Records ``lo`` to ``hi`` do not exist any more, and why."""

    sid: int
    lo: Annotated[int, Meta(ge=1)]
    hi: Annotated[int, Meta(ge=1)]
    reason: Literal["overflow", "oversize", "trimmed", "corrupt"]
    count: Count


class Ack(Frame, frozen=True, array_like=True, tag=5):
    """Sent after the receiver's commit, never before."""

    acks: Annotated[list[StreamAck], Meta(max_length=4096)]


class Desired(Frame, frozen=True, array_like=True, tag=6):
    """What is wanted of one job. Only the newest ``version`` of a job counts."""

    job_id: Name
    version: Count
    want: Literal["run", "pause", "stop", "cancel"]
    offer: Offer | None = None
    parameters: Parameters = Parameters()
    """All live parameters asked for so far, not only the newest."""
    checkpoint: Word = ""
    """Where to resume from: "" = the newest good one, "best", or the name of a checkpoint of this job."""
    reason: Prose = ""
    accept_changes: bool = False
    """The user's word that the job's next start may go on from a checkpoint although its inputs have changed."""


class Command(Frame, frozen=True, array_like=True, tag=8):
    """Do something once. Void after ``not_after`` (Unix seconds, 0 = never). Answered by a CommandDone record."""

    command_id: Name
    kind: Name
    job_id: Name = ""
    not_after: float = 0.0
    args: Annotated[dict[Name, str | int | float], Meta(max_length=32)] = {}


class Heartbeat(Frame, frozen=True, array_like=True, tag=10):
    """I am here. The receiver answers with the same nonce."""

    nonce: int
    time: float = 0.0
    backlog: Annotated[list[int], Meta(max_length=8)] = []
    """Records not yet acknowledged, per lane."""


class HeartbeatAck(Frame, frozen=True, array_like=True, tag=11):
    """The answer to a heartbeat."""

    nonce: int


class Goaway(Frame, frozen=True, array_like=True, tag=12):
    """The backend is about to close; dial again after ``retry_after_s``."""

    reason: Prose
    retry_after_s: Annotated[float, Meta(ge=0, le=86_400)] = 0.0


class StreamClosed(Frame, frozen=True, array_like=True, tag=13):
    """One stream is refused for good; the connection lives on. The agent drops what it holds of it."""

    sid: int
    reason: Prose


class Open(Frame, frozen=True, array_like=True, tag=14):
    """A stream that HELLO did not name. Its first DATA may follow at once."""

    stream: StreamHead


class Bye(Frame, frozen=True, array_like=True, tag=15):
    """Silence that is planned: shutdown, sleep, drain. ``until`` in Unix seconds, 0 = not known."""

    reason: Prose
    until: float = 0.0


AgentMessage = Hello | Data | Tomb | Heartbeat | HeartbeatAck | Open | Bye
HubMessage = Welcome | Ack | Desired | Command | Heartbeat | HeartbeatAck | Goaway | StreamClosed
