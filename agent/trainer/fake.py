"""The same process, queues and messages as the real trainer, without torch.

The job's `training.max_steps` steps are made in no time, or as slowly and as badly as words in the job's
*name* ask for: ``fake step=0.05 fail_at=7``. See `Manner` for the words. The curve depends on seed, step and
learning rate alone, so that a paused and resumed job must show the one of a job never touched.
"""

import hashlib
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from agent.trainer.line import EventQueue, Line, OrderQueue
from protocol.failures import FailureReason, failure
from protocol.worker import (
    AnyOrder,
    Cancel,
    Committed,
    EvaluateNow,
    Failed,
    Finished,
    Left,
    Metrics,
    Note,
    Parameters,
    ParametersSet,
    Pause,
    Phase,
    Preparing,
    Ready,
    Saved,
    SaveNow,
    SetParameters,
    Start,
    Stop,
    Trained,
    Warm,
)

ROWS = 64


class Manner(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the fake behaves: the words ``key=value`` of the job's name. 0 = never."""

    step: float = 0.0
    """Seconds of a step."""
    prepare: float = 0.0
    save: float = 0.0
    """Seconds that a save takes."""
    finish: float = 0.0
    fail_at: int = 0
    """Say `Failed` at this step and leave with 1."""
    crash_at: int = 0
    """Leave by os._exit(70) without a word."""
    kill_at: int = 0
    """SIGKILL itself."""
    hang_at: int = 0
    """Neither step nor obey from here on."""
    nan_at: int = 0
    disk_at: int = 0
    """Leave for a full disk, without a checkpoint, at this step; beyond the last one, where the model is written."""
    need_mb: int = 0
    """Say so much disk with it."""
    fresh_at: int = 0
    """Save, and leave for a fresh process."""
    stall_at: int = 0
    """Work on without ever coming to an end of this step; obeys no more."""
    stop_at: int = 0
    """Be stopped as by somebody's SIGSTOP."""
    signal_at: int = 0
    signal: str = "SIGSEGV"
    """The signal that it ends by at ``signal_at``."""
    eat_mb: int = 0
    """Megabytes of memory that each step takes and keeps."""
    eat_most_mb: int = 1024
    reason: str = "data"
    """The reason that ``fail_at`` gives."""
    until_attempt: int = 1_000_000_000
    """The last attempt that behaves badly (fail, crash, kill, hang, nan, disk, fresh, stall, stop, signal, eat)."""
    shout_every: int = 0
    """Print a line at every so many steps."""
    deaf: int = 0
    """1 = ignore Cancel, Pause and Stop, and SIGTERM."""
    grandchild: int = 0
    """1 = start a process that sleeps in the trainer's session, 2 = one in a session of its own."""


class State(msgspec.Struct):
    """What a checkpoint holds."""

    step: int = 0
    learning_rate: float = 0.0
    digest: str = ""
    """Grows out of every step done: equal at the end only if each step was done once and in order."""


class _Leave(Exception):
    """The process is to leave; ``event`` is the last word."""

    def __init__(self, event: Left | Failed, code: int = 0) -> None:
        self.event = event
        self.code = code


def main(orders: OrderQueue, events: EventQueue) -> int:
    """Wait for `Start`, train as told, and return the exit code."""
    line = Line(orders, events, parent_pid=os.getppid())
    line.say(Warm(os.getpid(), 0.0))
    start: AnyOrder | None = None
    while not isinstance(start, Start):
        start = line.wait_order()
        if start is None or isinstance(start, Cancel):
            return 0
    line.begin(start.attempt, start.first_event, start.workspace.checkpoints)
    try:
        words = [word for word in start.spec.name.split() if "=" in word]
        manner = msgspec.convert(dict(word.split("=", 1) for word in words), Manner, strict=False)
        Fake(line, start, manner).run()
    except _Leave as leave:
        line.say(leave.event)
        return leave.code
    except msgspec.ValidationError as error:
        line.say(
            Failed(failure(FailureReason.SPEC, f"The words in the job's name are not the fake's: {error}"))
        )
        return 1
    finally:
        line.close()
    return 0


class Fake:
    """One attempt at a job."""

    def __init__(self, line: Line, start: Start, manner: Manner) -> None:
        self.line = line
        self.start = start
        self.manner = manner
        self.training = start.spec.training
        self.total = self.training.max_steps or max(1, round(20 * self.training.epochs))
        self.logging_steps = self.training.logging_steps or start.limits.logging_steps
        self.save_steps = self.training.save_steps or start.limits.save_steps
        self.eval_steps = self.training.eval_steps if self.training.eval_strategy == "steps" else 0
        self.folder = Path(start.workspace.checkpoints)
        self.state = State(learning_rate=self.training.learning_rate)
        self.bad = start.attempt <= manner.until_attempt
        self.stopped = start.stop_at_once
        self.evaluate_now = False
        self.trained = False
        self.eaten: list[bytearray] = []

    def run(self) -> None:
        """Train to the end and write the final model."""
        self.behave()
        self.line.say(Preparing(Phase.LOAD, "The fake loads nothing."))
        resumed_from = self.restore()
        self.set_parameters(self.start.parameters)
        self.idle(self.manner.prepare)
        self.line.say(
            Ready(
                total_steps=self.total,
                total_epochs=self.training.epochs,
                start_step=self.state.step,
                train_rows=ROWS,
                eval_rows=8 if self.eval_steps else 0,
                device="cpu",
                trainable_parameters=1,
                all_parameters=1,
                batch_size=self.training.batch_size,
                gradient_accumulation_steps=self.training.gradient_accumulation_steps,
                resumed_from=resumed_from,
                facts=self.facts(),
            )
        )
        while self.state.step < self.total and not self.stopped:
            self.idle(self.manner.step)
            if not self.stopped:
                self.one_step()
        self.line.say(Trained(self.state.step, "stop" if self.stopped else "steps"))
        self.finish()

    def behave(self) -> None:
        """Become as deaf and as fertile as the job's name asks for."""
        if self.manner.deaf:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if self.manner.grandchild:
            sleeper = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
            apart = self.manner.grandchild > 1
            child = subprocess.Popen(sleeper, start_new_session=apart)
            self.line.say(Note("info", f"grandchild {child.pid}"))

    def facts(self) -> dict[str, str]:
        """Say under what limits and in what environment it runs, as the real trainer obeys them."""
        limits = msgspec.structs.asdict(self.start.limits)
        shown = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "TMPDIR")
        return {
            "trainer": "fake",
            "accept_changes": str(self.start.accept_changes),
            "environment": " ".join(sorted(os.environ)),
            **{name: str(value) for name, value in limits.items()},
            **{name: os.environ.get(name, "") for name in shown},
        }

    def one_step(self) -> None:
        """Do one optimizer step and say what it gave."""
        state, manner = self.state, self.manner
        state.step += 1
        step = state.step
        state.digest = hashlib.blake2b(
            f"{state.digest} {step} {state.learning_rate}".encode(), digest_size=16
        ).hexdigest()
        if self.bad:
            self.misbehave(step)
        if manner.shout_every and step % manner.shout_every == 0:
            print(f"step {step} of {self.total}")  # noqa: T201  (the job's own output, for tests of logs)
        if step % self.logging_steps == 0 or step == self.total:
            loss = math.nan if self.bad and step == manner.nan_at else self.loss()
            values = {
                "train_loss": loss,
                "train_perplexity": math.exp(loss),
                "learning_rate": state.learning_rate,
                "grad_norm": 1 / step,
            }
            self.line.say(Metrics(step, self.epoch(), time.time(), values))
        if self.evaluate_now or (self.eval_steps and step % self.eval_steps == 0):
            self.evaluate_now = False
            values = {"eval_loss": self.loss() + 0.1, "perplexity": math.exp(self.loss() + 0.1)}
            self.line.say(Metrics(step, self.epoch(), time.time(), values))
        if self.bad and step == manner.fresh_at:
            self.save("fresh_process")
            self.line.say(Note("warning", "The fake goes on in a fresh process."))
            raise _Leave(Left("fresh_process", step))
        if step % self.save_steps == 0 and step < self.total:
            self.save("schedule")

    def misbehave(self, step: int) -> None:
        """Do the bad thing that is due at this step, if any."""
        manner = self.manner
        if step == manner.fail_at:
            told = failure(FailureReason(manner.reason), f"The fake was told to fail at step {step}.")
            raise _Leave(Failed(told), 1)
        if step == manner.disk_at:
            raise _Leave(Left("disk_full", step, manner.need_mb << 20))
        if step == manner.signal_at:
            # faulthandler answers some of them with a traceback, and lets the default follow.
            os.kill(os.getpid(), signal.Signals[manner.signal])
        if step == manner.stop_at:
            os.kill(os.getpid(), signal.SIGSTOP)
        while step == manner.stall_at:
            sum(range(10_000))
            time.sleep(0.01)
        if manner.eat_mb and len(self.eaten) * manner.eat_mb < manner.eat_most_mb:
            # Written to, so that it is really there.
            self.eaten.append(bytearray(b"x") * (manner.eat_mb << 20))
        if step == manner.crash_at:
            os._exit(70)
        if step == manner.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        while step == manner.hang_at:
            signal.pause()

    def loss(self) -> float:
        """Return the loss at this step: falling, with a wiggle, the same in every run."""
        wiggle = int(self.state.digest[:4] or "0", 16) / 0xFFFF - 0.5
        return 0.5 + 2.0 * math.exp(-self.state.step / 25) + 0.05 * wiggle

    def epoch(self) -> float:
        """Return how many times the data was seen."""
        return self.training.epochs * self.state.step / self.total

    def idle(self, seconds: float) -> None:
        """Let ``seconds`` pass and obey the orders that come meanwhile, and at least those that have come."""
        until = time.monotonic() + seconds
        for order in self.line.orders():
            self.obey(order)
        while (left := until - time.monotonic()) > 0 and not self.stopped:
            if self.line.parent_gone:
                break
            came = self.line.wait_order(left)
            if came is not None:
                self.obey(came)
        if self.line.parent_gone:
            self.save("parent_lost")
            raise _Leave(Left("parent_lost", self.state.step))

    def obey(self, order: AnyOrder) -> None:
        """Do as one order says."""
        if (self.manner.deaf and isinstance(order, Pause | Cancel | Stop)) or (
            self.trained and isinstance(order, Pause)
        ):
            return
        match order:
            case Pause():
                self.save("pause")
                raise _Leave(Left("paused", self.state.step))
            case Cancel():
                raise _Leave(Left("cancelled", self.state.step))
            case Stop():
                self.stopped = True
            case SetParameters(parameters=parameters):
                refused = self.set_parameters(parameters)
                self.line.say(ParametersSet(self.state.step + 1, parameters, refused))
            case SaveNow(command_id=command_id):
                self.save("command", command_id)
            case EvaluateNow():
                self.evaluate_now = True
            case Start() | Committed():
                self.line.say(Note("warning", "A job is running here; a second Start was not obeyed."))

    def set_parameters(self, wanted: Parameters) -> str:
        """Apply live parameters; the answer says what was refused."""
        if wanted.learning_rate is not None:
            self.state.learning_rate = wanted.learning_rate
        self.logging_steps = wanted.logging_steps or self.logging_steps
        self.save_steps = wanted.save_steps or self.save_steps
        self.eval_steps = wanted.eval_steps or self.eval_steps
        return "" if wanted.batch_size is None else "batch_size: the fake has no batches."

    def save(self, reason: str, command_id: str = "") -> None:
        """Write a checkpoint, whole or not at all, and say so."""
        began = time.monotonic()
        time.sleep(self.manner.save)
        target = self.folder / f"step-{self.state.step}"
        partial = self.folder / f".partial-{self.state.step}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        data = msgspec.json.encode(self.state)
        (partial / "state.json").write_bytes(data)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        for old in self.checkpoints()[self.training.save_total_limit :]:
            shutil.rmtree(old)
        self.line.say(
            Saved(
                str(target),
                self.state.step,
                self.epoch(),
                len(data),
                time.monotonic() - began,
                reason,
                command_id=command_id,
            )
        )

    def checkpoints(self) -> list[Path]:
        """Return the folders of the checkpoints, the newest first."""
        return sorted(self.folder.glob("step-*"), key=lambda path: -int(path.name.removeprefix("step-")))

    def restore(self) -> str:
        """Go back to the checkpoint that was asked for, or the newest; return its folder, or nothing."""
        named = [Path(self.start.resume_from)] if self.start.resume_from else self.checkpoints()
        if not named:
            return ""
        self.line.say(Preparing(Phase.RESTORE, f"From {named[0].name}."))
        try:
            self.state = msgspec.json.decode((named[0] / "state.json").read_bytes(), type=State)
        except (OSError, msgspec.DecodeError) as error:
            told = failure(FailureReason.CHECKPOINT, f"{named[0]} cannot be restored: {error}")
            raise _Leave(Failed(told), 1) from error
        return str(named[0])

    def finish(self) -> None:
        """Write the final model and say so."""
        self.trained, self.stopped = True, False
        self.idle(self.manner.finish)
        if self.bad and self.manner.disk_at > self.total:
            raise _Leave(Left("disk_full", self.state.step, self.manner.need_mb << 20))
        output = Path(self.start.workspace.output)
        output.mkdir(parents=True, exist_ok=True)
        (output / "model.json").write_bytes(msgspec.json.encode(self.state))
        self.line.say(
            Finished(
                model_path=str(output),
                merged_path="",
                weights_hash=self.state.digest,
                step=self.state.step,
                values={"final_loss": self.loss(), "train_seconds": self.state.step * self.manner.step},
            )
        )
