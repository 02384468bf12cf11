"""The check of a resume: the last steps before the checkpoint made once more in a process beside, and compared.

The trainer that has resumed starts this module as a program of its own, at the lowest priority, with a request on
disk. What it is about to read is linked into a folder of its own, so nothing can be deleted from under it.
"""

import contextlib
import ctypes
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import torch
from transformers import TrainerCallback

from agent.trainer import contents, tensorfile
from agent.trainer.checkpoint import FORMAT, BadCheckpoint, Checkpoints, Found, verify
from agent.trainer.inbox import Inbox
from agent.trainer.progress import Progress
from agent.trainer.reading import reading
from agent.trainer.restore import REPLAY, led_to
from agent.trainer.rewind import FILE as SKIPPED
from agent.trainer.snapshot import fits_host_memory
from protocol.codec import UNREADABLE
from protocol.jobspec import JobSpec
from protocol.worker import AnyEvent, AnyOrder, Cancel, Note, Parameters, Pause, Start, Verified

FROM_START = 500
"""Steps up to which a replay goes from the job's beginning, where there is no earlier checkpoint."""
FINISH_WAIT = 120.0
"""Seconds that the end of training waits for a check that is not yet done."""
LISTEN_EVERY = 0.5
DROP_WAIT = 1.0
REQUEST, OUTCOME, LOG = "request.msgpack", "outcome.msgpack", "log"
NEVER = 1_000_000_000
_PR_SET_PDEATHSIG = 1


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be replayed."""

    start: Start
    target: str
    """Folder of the checkpoint that the steps must come to."""
    first: int
    last: int
    threads: int


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it: a verdict, or a sentence on why there is none."""

    verdict: Verified | None = None
    failed: str = ""


class NotPossible(Exception):
    """There is nothing to replay from; ``str()`` is a clause that says why."""


# In the trainer that has resumed


class Checking(TrainerCallback):  # type: ignore[misc]
    """Starts the check when training has made a step again, and says what comes of it."""

    def __init__(self, start: Start, found: Found, marks: dict[str, str], inbox: Inbox) -> None:
        self._start, self._found, self._marks, self._inbox = start, found, marks, inbox
        self._folder = Path(start.workspace.checkpoints) / REPLAY
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        self._dropped = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self._thread is None:
            self._thread = threading.Thread(target=self._check, name="replay", daemon=True)
            self._thread.start()
        return control

    def finish(self) -> None:
        """Wait for the verdict, within reason; training is over."""
        if self._thread is None:
            return
        until = time.monotonic() + FINISH_WAIT
        while self._thread.is_alive() and time.monotonic() < until:
            self._thread.join(LISTEN_EVERY)
            self._inbox.leave_unless_finishing()
        if self._thread.is_alive():
            why = "training ended before the check did"
            self._inbox.line.say(Note("info", f"The resume was not checked: {why}."))
        self.drop()

    def drop(self) -> None:
        """End a check that is still being made; the process is about to leave."""
        self._dropped = True
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
        if self._thread is not None:
            # It may be reading a large checkpoint, and a pause does not wait for that.
            self._thread.join(DROP_WAIT)

    def _check(self) -> None:
        """Prepare and run the replay, and say its verdict; this thread lives as long as it does."""
        try:
            request = self._prepare()
            (self._folder / REQUEST).write_bytes(msgspec.msgpack.encode(request))
            told = self._run()
        except NotPossible as why:
            told = Note("info", f"The resume was not checked: {why}.")
        except OSError as error:
            told = Note("warning", f"The resume could not be checked: {error}.")
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)
        if not self._dropped:
            self._inbox.line.say(told)

    def _prepare(self) -> Request:
        """Link what is read into a folder of its own. Raises NotPossible."""
        earlier = self._earlier()
        self._room()
        shutil.rmtree(self._folder, ignore_errors=True)
        return self._request(earlier)

    def _earlier(self) -> Found | None:
        """Return the checkpoint to replay from; None for the job's beginning. Raises NotPossible."""
        manifest, wanted = self._found.manifest, self._start.limits.verify_resume
        if manifest.job_id != self._start.spec.job_id:
            raise NotPossible("it is the checkpoint of another job that this one begins with")
        if manifest.format != FORMAT:
            raise NotPossible("the checkpoint was saved by an older agent")
        if manifest.inputs != self._marks:
            raise NotPossible("what the run is made of has changed since the checkpoint")
        store = Checkpoints(self._found.path.parent, manifest.job_id)
        names = [path.name.removeprefix("step-") for path in store.folder.glob("step-*")]
        steps = [int(name) for name in names if name.isdecimal()]
        for step in sorted((one for one in steps if one <= manifest.step - wanted), reverse=True):
            path = store.path(step)
            with contextlib.suppress(BadCheckpoint):
                found = verify(path, manifest.job_id)
                if found.manifest.inputs == manifest.inputs and led_to(manifest, found.manifest):
                    return found
        if manifest.step > FROM_START or manifest.lineage:
            raise NotPossible(f"no good checkpoint is left from {wanted} steps before it or earlier")
        return None

    def _room(self) -> None:
        """Raise NotPossible where a second process would take the memory that training needs."""
        if torch.cuda.is_available():
            free, _ = torch.cuda.mem_get_info()
            needed = int(1.1 * torch.cuda.max_memory_reserved()) + (1 << 29)
            if free < needed:
                raise NotPossible(
                    f"the replay needs about {needed / (1 << 30):.1f} GB of the device's memory and "
                    f"{free / (1 << 30):.1f} GB are free"
                )
        if not fits_host_memory(_resident()):
            raise NotPossible("the machine's memory does not hold the trainer twice")

    def _request(self, earlier: Found | None) -> Request:
        start, target = self._start, self._folder / "target" / self._found.path.name
        _link(self._found.path, target)
        place = self._folder / "run"
        place.mkdir(parents=True)
        skipped = self._found.path.parent / SKIPPED
        if skipped.exists():
            shutil.copy2(skipped, place / SKIPPED)
        origin = ""
        if earlier is not None:
            origin = str(self._folder / "from" / earlier.path.name)
            with reading(earlier.path):
                _link(earlier.path, Path(origin))
        workspace = msgspec.structs.replace(
            start.workspace,
            checkpoints=str(place),
            output=str(self._folder / "output"),
            cache=str(self._folder / "cache"),
            branch="",
        )
        limits = msgspec.structs.replace(start.limits, verify_resume=0, background_saves=False)
        again = msgspec.structs.replace(
            start,
            spec=_plain(start.spec),
            workspace=workspace,
            limits=limits,
            resume_from=origin,
            stop_at_once=False,
            parameters=Parameters(),
            accept_changes=True,
        )
        return Request(
            start=again,
            target=str(target),
            first=(earlier.manifest.step if earlier is not None else 0) + 1,
            last=self._found.manifest.step,
            threads=torch.get_num_threads(),
        )

    def _run(self) -> Verified | Note:
        """Run the replay to its end, and return its verdict."""
        with (self._folder / LOG).open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "agent.trainer.replay", str(self._folder), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                    "OMP_WAIT_POLICY": "PASSIVE",
                },
            )
            if self._dropped:
                self._process.kill()
            self._process.wait()
        return self._verdict()

    def _verdict(self) -> Verified | Note:
        try:
            outcome = msgspec.msgpack.decode((self._folder / OUTCOME).read_bytes(), type=Outcome)
        except (FileNotFoundError, *UNREADABLE):
            tail = (self._folder / LOG).read_text(errors="replace").strip().rpartition("\n")[2][-300:]
            return Note(
                "warning", f"The resume could not be checked: the replay ended by itself. {tail}".strip()
            )
        if outcome.verdict is None:
            return Note("warning", f"The resume could not be checked: {outcome.failed}")
        return outcome.verdict


def _plain(spec: JobSpec) -> JobSpec:
    """Return the job without what leaves the steps as they are: evaluations, samples, saves on the way."""
    training = msgspec.structs.replace(
        spec.training,
        save_steps=NEVER,
        logging_steps=NEVER,
        eval_strategy="no",
        early_stopping_patience=None,
        load_best_at_end=False,
        on_bad_loss="fail",
        spike_factor=None,
    )
    return msgspec.structs.replace(spec, training=training, samples=[])


def _link(source: Path, target: Path) -> None:
    def link(one: str, other: str) -> str:
        try:
            os.link(one, other)
        except FileNotFoundError:
            raise
        except OSError:  # a disk without links
            shutil.copy2(one, other)
        return other

    shutil.copytree(source, target, copy_function=link)


def _resident() -> int:
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) * (1 if sys.platform == "darwin" else 1024)


# In the process beside


class _Silence:
    """The line of a replay: nobody hears it, and it ends the run when the last step is made."""

    def __init__(self, last: int, parent: int) -> None:
        self.inbox = Inbox(self)
        self.notes: list[str] = []
        self._last, self._parent = last, parent

    def say(self, event: AnyEvent) -> None:
        if isinstance(event, Note):
            self.notes.append(event.text)

    def orders(self) -> list[AnyOrder]:
        if os.getppid() != self._parent:
            return [Cancel()]
        return [Pause()] if self.inbox.step >= self._last else []

    @property
    def parent_gone(self) -> bool:
        return False

    def flush(self, timeout: float) -> bool:
        return True


def replay(request: Request, parent: int) -> Outcome:
    """Make the steps once more, and compare."""
    from agent.trainer import run

    line = _Silence(request.last, parent)
    run.train(request.start, line, line.inbox, reports_beside=False)
    made = Path(request.start.workspace.checkpoints) / Path(request.target).name
    if not made.is_dir():
        told = line.notes[-1] if line.notes else ""
        return Outcome(failed=f"the replay did not come to step {request.last}. {told}".strip())
    return Outcome(verdict=compare(request, made))


def compare(request: Request, made: Path) -> Verified:
    """Return what is equal of the checkpoint that was saved and the one that was made again."""
    saved = Path(request.target)
    before, now = dict(Progress.load(saved).trail), dict(Progress.load(made).trail)
    steps = [step for step in sorted(before.keys() & now.keys()) if request.first <= step <= request.last]
    losses = {step: _apart(before[step], now[step]) for step in steps}
    apart = {name: _largest(saved, made, name) for name in _stems(saved)}
    equal = not any(losses.values()) and not any(apart.values()) and _stems(saved) == _stems(made)
    if equal:
        detail = f"The losses of {len(steps)} steps, the weights and the optimizer's state are the same."
    else:
        odd = next((step for step in steps if losses[step]), None)
        parts = [f"step {odd}'s loss is the first: {before[odd]:.9g} then, {now[odd]:.9g} now"] if odd else []
        parts += [f"{name} by at most {value:.3g}" for name, value in apart.items() if value]
        detail = f"They differ: {'; '.join(parts) or 'in what was saved'}."
    return Verified(
        first=request.first,
        last=request.last,
        equal=equal,
        difference=max([*losses.values(), *apart.values()], default=0.0),
        detail=detail,
    )


def _stems(folder: Path) -> list[str]:
    """Return the names of the weights and of the optimizer's state."""
    found = verify(folder).manifest.files
    stems = {
        name.removesuffix(end)
        for name in found
        for end in (tensorfile.PLAIN, tensorfile.PLANES)
        if name.endswith(end)
    }
    return sorted(stems - {contents.RANDOM})


def _largest(saved: Path, made: Path, stem: str) -> float:
    """Return the largest difference of a number; infinity where the tensors are not the same ones."""
    before, now = tensorfile.read(saved, stem), tensorfile.read(made, stem)
    if before.keys() != now.keys():
        return math.inf
    largest = 0.0
    for name, old in before.items():
        new = now[name]
        if old.shape != new.shape or old.dtype != new.dtype:
            return math.inf
        if bytes(tensorfile.raw(old)) != bytes(tensorfile.raw(new)):
            gap = (old.double() - new.double()).abs().max().item()
            largest = max(largest, gap if math.isfinite(gap) else math.inf)
    return largest


def _apart(one: float, other: float) -> float:
    if one == other or (math.isnan(one) and math.isnan(other)):
        return 0.0
    gap = abs(one - other)
    return gap if math.isfinite(gap) else math.inf


def main() -> int:
    """Do what the request in the folder says; return the exit code."""
    folder, parent = Path(sys.argv[1]), int(sys.argv[2])
    if sys.platform == "linux":
        # The trainer may be killed, and nobody else knows of this process.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return 1
    os.nice(19)
    from agent.trainer.entry import failure_of

    request = msgspec.msgpack.decode((folder / REQUEST).read_bytes(), type=Request)
    torch.set_num_threads(request.threads)
    try:
        outcome = replay(request, parent)
    except Exception as error:  # noqa: BLE001  the outermost frame: whatever happened becomes a sentence
        outcome = Outcome(failed=failure_of(error).sentence)
    partial = folder / f"{OUTCOME}.partial"
    partial.write_bytes(msgspec.msgpack.encode(outcome))
    partial.replace(folder / OUTCOME)
    return 0


if __name__ == "__main__":
    sys.exit(main())
