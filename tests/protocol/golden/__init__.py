"""One example of each message, and its bytes as they were first written.

The bytes are in files beside this one and are never written again: what a peer of an older
version sends must be read for ever. A message that grew has a further example, `<name>.2`, `<name>.3`
and so on, with what was appended. ``python -m tests.protocol.golden --write`` makes the files of
examples that have none yet, and touches no other.
"""

import math
import re
from pathlib import Path
from typing import Any

import msgspec

from protocol import messages, records, worker
from protocol.failures import Evidence, Failure, FailureReason
from protocol.jobspec import (
    BranchSpec,
    DataSpec,
    DpoSpec,
    JobSpec,
    LoraSpec,
    Method,
    ModelSpec,
    Quantization,
    SampleSpec,
    TrainingSpec,
)
from protocol.messages import DatasetRef, Gpu, JobSeen, Machine, Offer, StreamAck, StreamHead
from protocol.records import AnyRecord
from protocol.worker import AnyEvent, AnyOrder, Estimate, Limits, Parameters, Phase, Workspace

FOLDER = Path(__file__).parent
SHA = "0123456789abcdef" * 4
EPOCH = 2**63 - 25
FAILURE = Failure(
    reason=FailureReason.DATA,
    sentence="train.jsonl, row 57: the text is null.",
    advice="Mend the row.",
    evidence=Evidence(traceback="Traceback\n  ...", log_tail=["a", "b"], exit_code=1, step=3, rows=[57]),
)
MACHINE = Machine(
    "box",
    "linux",
    "Debian 12",
    "3.11.7",
    "1.0.0",
    "AMD EPYC",
    2,
    23.0,
    100.0,
    40.5,
    [Gpu(0, "RTX 4090", 24.0, "GPU-1", "550.1", "12.4", "8.9")],
    ["sft", "cpt"],
    {"eth0": "10.0.0.2"},
    2,
)
ESTIMATE = Estimate(
    device="cuda:0",
    device_gb=9.5,
    host_gb=3.25,
    disk_gb=2.5,
    free_device_gb=23.0,
    free_host_gb=10.0,
    free_disk_gb=40.5,
    step_seconds=0.5,
    total_seconds=50.0,
    total_steps=100,
    parts={"weights": 6.5, "activations": 3.0},
    advice=["4-bit quantisation would save 4.5 GB."],
    fits=True,
)
HEAD = StreamHead(1, EPOCH, "job-1", 0, 5, 9)
RECORDS: dict[str, AnyRecord] = {
    record.__class__.__name__: record
    for record in (
        records.JobStatus(1.5, 2, "failed", 7, "agent", "Row 57 is bad.", "", 3, FAILURE),
        records.JobFacts(
            1.5,
            2,
            100,
            3.0,
            40,
            900,
            100,
            4,
            8,
            2e-4,
            "cuda:0",
            "checkpoint-40",
            10,
            1000,
            {"dtype": "bfloat16"},
        ),
        records.Schema(77, ["grad_norm", "train_loss"]),
        records.Result(
            1.5,
            2,
            "/m/job-1",
            "",
            "ab" * 16,
            100,
            {"final_loss": 1.25},
            [{"prompt": "p", "log_likelihood_before": -3.5}],
        ),
        records.Checkpoint(1.5, 2, "checkpoint-40", 40, 1.2, 1 << 30, 3.5, "schedule", 2.5, None, True),
        records.CommandDone(1.5, "c-1", "refused", "The job is paused; this needs a running one."),
        records.Snapshot(1.5, 2, "running", 41, 1.23, {"train_loss": 2.25}),
        records.Notice(1.5, "warning", "Umlaut: ü, emoji: \U0001f642.", 2),
        records.ParametersApplied(1.5, 2, 41, Parameters(learning_rate=1e-5), "batch_size: too large."),
        records.Point(1.5, 2, 41, 1.23, 77, [None, 2.25], "improving"),
        records.Figures(1.5, {"cpu_percent": 12.5}),
        records.LogChunk(1.5, 2, 4096, ["a line", "\x1b[1mbold\x1b[0m"], 3),
        records.JobEstimate(1.5, 2, ESTIMATE),
        records.ResumeCheck(1.5, 2, 36, 40, False, 1.5e-8, "step 38: 2.25 then, 2.2500001 now"),
    )
}
GROWN_RECORDS: dict[str, AnyRecord] = {
    "Checkpoint.2": msgspec.structs.replace(RECORDS["Checkpoint"], stall=0.25)
}
ODD_POINT = records.Point(1.5, 2, 42, 1.25, 77, [math.inf, math.nan, -math.inf])


def raw(record: AnyRecord) -> msgspec.Raw:
    return msgspec.Raw(msgspec.msgpack.encode(record))


DATA = messages.Data(3, 41, [raw(RECORDS["Point"]), raw(RECORDS["LogChunk"])])
FRAMES: dict[str, messages.AgentMessage | messages.HubMessage] = {
    frame.__class__.__name__: frame
    for frame in (
        messages.Hello(
            "agent_0123456789abcdef",
            "i-1",
            12,
            3,
            EPOCH,
            MACHINE,
            [HEAD],
            [JobSeen("job-1", 2, "running", 7)],
            ["x"],
        ),
        messages.Welcome("s-1", [StreamAck(1, 6)], 20.0, 131_072, 100, 65_536, 1700000000.25),
        DATA,
        messages.Tomb(3, 41, 50, "overflow", 10),
        messages.Ack([StreamAck(1, 6), StreamAck(2, 0)]),
        messages.Desired(
            "job-1",
            8,
            "pause",
            Offer('{"model":{"name":"m"}}', "rows.jsonl", "token", DatasetRef(SHA, 1234, "rows"), "My job"),
            Parameters(learning_rate=1e-5, save_steps=10),
            "best",
            "The user paused it.",
        ),
        messages.Command("c-1", "save_now", "job-1", 1700000000.5, {"offset": 10, "what": "x", "share": 0.5}),
        messages.Heartbeat(9, 1.5, [0, 12, 3]),
        messages.HeartbeatAck(9),
        messages.Goaway("The backend restarts.", 5.0),
        messages.StreamClosed(3, "The job was deleted."),
        messages.Open(HEAD),
        messages.Bye("The machine goes to sleep.", 1700003600.0),
    )
}
GROWN_FRAMES: dict[str, messages.AgentMessage | messages.HubMessage] = {
    "Desired.2": msgspec.structs.replace(FRAMES["Desired"], accept_changes=True)
}
SPEC = JobSpec(
    job_id="job-1",
    name="My job",
    model=ModelSpec(name="m", quantization=Quantization(bits=4)),
    data=DataSpec(path="rows.jsonl", eval_fraction=0.1),
    lora=LoraSpec(r=8, target_modules=["q_proj"]),
    training=TrainingSpec(max_steps=100, bf16=True),
    samples=[SampleSpec(prompt="p", answer="a")],
)
ORDERS: dict[str, AnyOrder] = {
    order.__class__.__name__: order
    for order in (
        worker.Start(
            SPEC,
            2,
            Workspace(checkpoints="/c", output="/o", cache="/k", model="/m", data="/d"),
            Limits(gpu_memory_fraction=0.5),
            "/c/checkpoint-40",
            3,
            True,
            Parameters(batch_size=2),
        ),
        worker.Pause(),
        worker.Cancel(),
        worker.Stop(),
        worker.SetParameters(Parameters(learning_rate=1e-5)),
        worker.SaveNow("c-1"),
        worker.EvaluateNow("c-2"),
        worker.Committed(17),
        worker.Check(
            SPEC,
            Workspace(checkpoints="/c", output="/o", cache="/k", model="/m", data="/d"),
            Limits(gpu_memory_fraction=0.5),
        ),
    )
}
GROWN_ORDERS: dict[str, AnyOrder] = {
    "Start.2": msgspec.structs.replace(
        ORDERS["Start"], limits=Limits(gpu_memory_fraction=0.5, tokenizer_code=True)
    ),
    "Start.3": msgspec.structs.replace(
        ORDERS["Start"],
        spec=msgspec.structs.replace(
            SPEC,
            method=Method.DPO,
            dpo=DpoSpec(beta=0.2, loss_type="ipo"),
            data=DataSpec(path="rows.jsonl", streaming=True),
            training=TrainingSpec(
                max_steps=100,
                metric_for_best="eval_rewards_accuracies",
                load_best_at_end=True,
                deterministic=True,
                on_bad_loss="rewind",
                spike_factor=4.0,
                max_rewinds=2,
            ),
            branch=BranchSpec(job_id="job-0", checkpoint="best"),
        ),
        limits=Limits(verify_resume=5, background_saves=False, compress_checkpoints=True),
        accept_changes=True,
    ),
}
EVENTS: dict[str, AnyEvent] = {
    event.__class__.__name__: event
    for event in (
        worker.Warm(4242, 3.5),
        worker.Preparing(Phase.LOAD, "Loading m."),
        worker.Ready(
            100, 3.0, 40, 900, 100, "cuda:0", 10, 1000, 4, 8, "checkpoint-40", {"dtype": "bfloat16"}
        ),
        worker.Metrics(41, 1.23, 1.5, {"train_loss": 2.25}, "improving"),
        worker.Saved("/c/checkpoint-40", 40, 1.2, 1 << 30, 3.5, "command", 2.5, 2.75, True, "c-1"),
        worker.Trained(100, "steps"),
        worker.Finished("/o", "", "ab" * 16, 100, {"final_loss": 1.25}, [{"prompt": "p", "before": "b"}]),
        worker.Left("paused", 41),
        worker.Failed(FAILURE),
        worker.Note("warning", "No bf16 here; float32 is used."),
        worker.ParametersSet(41, Parameters(learning_rate=1e-5), "batch_size: too large."),
        worker.Estimated(ESTIMATE),
        worker.Verified(36, 40, False, 1.5e-8, "step 38: 2.25 then, 2.2500001 now"),
    )
}
GROWN_EVENTS: dict[str, AnyEvent] = {
    "Saved.2": msgspec.structs.replace(EVENTS["Saved"], stall=0.25),
    "Left.2": worker.Left("disk_full", 41, 300 << 20),
    "ParametersSet.2": worker.ParametersSet(
        41, Parameters(batch_size=2, gradient_accumulation_steps=2, step_rows=3), "", True
    ),
}


def examples() -> dict[str, Any]:
    """Return each example under the name of its files."""
    return {
        **{f"frame.{name}": value for name, value in {**FRAMES, **GROWN_FRAMES}.items()},
        **{f"record.{name}": value for name, value in {**RECORDS, **GROWN_RECORDS}.items()},
        "record.Point.odd": ODD_POINT,
        **{f"order.{name}": value for name, value in {**ORDERS, **GROWN_ORDERS}.items()},
        **{
            f"event.{name}": worker.Numbered(2, 7, value)
            for name, value in {**EVENTS, **GROWN_EVENTS}.items()
        },
    }


def outgrown() -> set[str]:
    """Return the names of the examples whose message has grown since: they are read, and written longer."""
    newest: dict[str, int] = {}
    for name in examples():
        base, number = _split(name)
        newest[base] = max(newest.get(base, 1), number)
    return {name for name in examples() if _split(name)[1] < newest[_split(name)[0]]}


def _split(name: str) -> tuple[str, int]:
    found = re.fullmatch(r"(.+?)\.(\d+)", name)
    return (found[1], int(found[2])) if found else (name, 1)
