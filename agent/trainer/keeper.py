"""The writing of one job's checkpoints: beside training or in its way, with room made and refusals told."""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.trainer.checkpoint import Checkpoints, FileRecord, Found, Manifest
from agent.trainer.disk import MB, NoRoom, free_bytes, has_room, need_room, refusals_told
from agent.trainer.errors import TrainerError
from agent.trainer.healing import is_out_of_memory, reason_of, words_of
from agent.trainer.inbox import Speaker
from agent.trainer.snapshot import Content, Copying, HostBuffer, Writer, fits_host_memory, ready_now
from protocol.worker import Limits, Note, Saved

logger = logging.getLogger("agent.trainer")

PERIODIC = {"schedule", "best", "command"}
"""Saves after which training goes on: they may be written behind its back."""


@dataclass(frozen=True)
class Save:
    """A checkpoint that is to be written, as things stood at its step."""

    manifest: Manifest
    content: Content
    reasons: list[tuple[str, str]]
    """Each with the id of the command it answers, or nothing."""
    is_best: bool
    keep: set[Path]
    """Checkpoints that must stay."""
    limit: int
    began: float

    @property
    def periodic(self) -> bool:
        return all(reason in PERIODIC for reason, _ in self.reasons)

    @property
    def what(self) -> str:
        return f"the checkpoint at step {self.manifest.step}"


class Keeper:
    """Writes checkpoints, one at a time. NoRoom comes out of `check`, `wait` and `save`, in the thread that trains."""

    def __init__(
        self,
        store: Checkpoints,
        line: Speaker,
        limits: Limits,
        static: Callable[[], dict[str, bytes]],
        good: int = 0,
    ) -> None:
        self.store = store
        self._line = line
        self._limits = limits
        self._static = static
        """Makes the files that every checkpoint has alike."""
        self._made: dict[str, bytes] | None = None
        self._good = good
        """Step of the newest checkpoint that a later attempt can go on from; 0: there is none."""
        self._writer = Writer()
        self._buffer = HostBuffer()
        self._copying: Copying | None = None
        self._said_small_memory = False
        self.check = self._writer.check
        self.wait = self._writer.wait
        self.close = self._writer.close

    def __repr__(self) -> str:
        return f"Keeper({self.store!r}, {self._writer!r}, {self._buffer!r})"

    def save(self, save: Save) -> None:
        """Write a checkpoint; where training goes on after it, in the background.

        `before_step` must then be called before the next step of the optimizer.
        """
        self.wait()
        if not (save.periodic and self._limits.background_saves and self._has_memory_for(save.content)):
            self._write(save, None)
            return
        copying = Copying(time.monotonic() - save.began)
        ready = ready_now()

        def work() -> None:
            try:
                held = self._held(save, ready)
                if held is None:
                    # From training's own tensors, so the optimizer waits until they are written.
                    self._write(save, None)
            finally:
                copying.done()
            if held is not None:
                self._write(held, copying)

        self._copying = copying
        self._writer.start(work)

    def before_step(self) -> None:
        """Wait until the copy of what the optimizer is about to change is made; raises what a write failed with."""
        if self._copying is not None:
            self._copying.wait()
            self._copying = None
        self.check()

    def check_disk(self, size: int, model_size: int, limit: int, in_use: set[Path]) -> None:
        """Find out before the first step what would end the job at its first checkpoint, of about ``size`` bytes."""
        store = self.store
        store.in_use = in_use
        store.make_room(lambda: has_room(store.folder, size))
        need_room(store.folder, "a checkpoint of this job", size)
        here = len(list(store.folder.glob("step-*")))
        needed = size * (max(0, limit - here) + 1) + model_size
        free = free_bytes(store.folder)
        if free < needed:
            self._note(
                "warning",
                f"The disk of {store.folder} has {free / MB:.0f} MB free, but {limit} checkpoints of about "
                f"{size / MB:.0f} MB, another while it is written, and the final model need {needed / MB:.0f} MB. "
                "Older checkpoints are deleted when there is no room; when that is not enough, the job pauses.",
            )

    def _has_memory_for(self, content: Content) -> bool:
        lacking = self._buffer.lacks(content)
        if not lacking or fits_host_memory(lacking):
            return True
        self._say_small_memory(lacking)
        return False

    def _say_small_memory(self, lacking: int) -> None:
        if not self._said_small_memory:
            self._said_small_memory = True
            self._note(
                "info",
                f"Checkpoints are written while training waits: a copy of {lacking / MB:.0f} MB does not fit into "
                "this machine's memory beside everything else.",
            )

    # In whichever thread writes

    def _held(self, save: Save, ready: Any) -> Save | None:
        """Return the save with a copy of its tensors; None where there is no memory for one, though it seemed so."""
        lacking = self._buffer.lacks(save.content)
        try:
            return dataclasses.replace(save, content=self._buffer.hold(save.content, ready))
        except (RuntimeError, MemoryError, OSError) as error:
            if not is_out_of_memory(error):
                raise
            logger.warning("no memory for a copy of %s: %s", save.what, words_of(error))
        if ready is not None:
            ready.synchronize()
        self._say_small_memory(lacking)
        return None

    def _write(self, save: Save, copying: Copying | None) -> None:
        """Write a checkpoint, delete those beyond the limit, and say Saved; without a copy, training waits for it."""
        store = self.store
        store.in_use = save.keep
        try:
            found = self._put(save)
        except TrainerError as error:
            if isinstance(error, NoRoom):
                raise
            if not save.periodic:
                sentence = f"{error.sentence} {self._lost(save.manifest.step)}".strip()
                raise TrainerError(error.reason, sentence, advice=error.advice) from error
            # Nothing is lost yet, and by the next one the folder may be writable again.
            self._note(
                "warning", f"{error.sentence} Training goes on, and tries again at the next checkpoint."
            )
            return
        self._good = save.manifest.step
        try:
            store.retain(save.limit)
        except OSError as error:
            self._note("warning", f"An old checkpoint in {store.folder} cannot be deleted: {error.strerror}.")
        seconds = time.monotonic() - save.began
        stall = seconds if copying is None else copying.stall
        manifest = save.manifest
        for reason, command in save.reasons:
            self._line.say(
                Saved(
                    path=str(found.path),
                    step=manifest.step,
                    epoch=manifest.epoch,
                    size=found.size,
                    seconds=seconds,
                    reason=reason,
                    eval_loss=manifest.eval_loss,
                    train_loss=manifest.train_loss,
                    is_best=save.is_best,
                    command_id=command,
                    stall=stall,
                )
            )
        logger.info(
            "saved %s in %.2f s, training stood for %.2f s", found.path.name, seconds, stall or seconds
        )

    def _lost(self, step: int) -> str:
        """Return what it means that ``step`` cannot be saved, though the process leaves."""
        if not self._good:
            return "There is no good checkpoint, so the job will begin anew."
        steps = step - self._good
        if not steps:
            return ""
        count = "the step after it is" if steps == 1 else f"the {steps} steps after it are"
        return f"The last good checkpoint is of step {self._good}: {count} lost, and will be made again."

    def _put(self, save: Save) -> Found:
        """Put a checkpoint on the disk. Makes the folder again where it has vanished, and room where there is none."""
        store = self.store
        if self._made is None:
            # Here, so that no step waits for it: a large vocabulary takes its time.
            with _memory_told(save.what):
                self._made = self._static()
        content = Content(save.content.tensors, {**self._made, **save.content.files})

        def fill(folder: Path) -> Mapping[str, FileRecord]:
            return content.write(folder, compress=self._limits.compress_checkpoints, pulse=self._writer.pulse)

        again = False
        while True:
            try:
                with refusals_told(store.folder, save.what, content.size), _memory_told(save.what):
                    if store.restore():
                        self._note(
                            "warning",
                            f"The folder {store.folder} had vanished with its checkpoints, and was made again.",
                        )
                    store.make_room(lambda: has_room(store.folder, content.size))
                    need_room(store.folder, save.what, content.size)
                    return store.save(save.manifest, fill)
            except NoRoom:
                # The disk can be fuller than it says (a quota): older ones go, one by one.
                if not store.make_room(lambda: False, most=1):
                    raise
            except TrainerError:
                if again or store.folder.exists():
                    raise
                again = True  # it vanished while it was written to

    def _note(self, level: str, text: str) -> None:
        self._line.say(Note(level, text))


@contextlib.contextmanager
def _memory_told(what: str) -> Iterator[None]:
    """Turn a lack of memory into a sentence: training must not take it for one of its own, which it would heal."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainerError(
            reason_of(error),
            f"{what[0].upper()}{what[1:]} could not be written: memory ran out ({words_of(error)}). "
            "Earlier checkpoints are kept.",
        ) from error
