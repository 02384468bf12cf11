"""What is said of a trainer's end: the last lines of its log, and the sentence for the person who must act."""

import os
import signal
from pathlib import Path

from protocol.worker import AnyEvent, Failed, Finished, Left

LOG_TAIL = 16384
TAIL_LINES = 50
MEANINGS = {
    signal.SIGSEGV: "it used memory that is not its own: a defect of a native library, or of the machine's memory",
    signal.SIGBUS: "a file in memory vanished or the shared memory (/dev/shm) or the disk under it is full",
    signal.SIGILL: "it met an instruction that this processor does not know: a library was built for another one",
    signal.SIGFPE: "native code divided by zero",
    signal.SIGABRT: "native code gave up, mostly with a reason at the end of the log",
    signal.SIGXCPU: "it reached a limit of processor time",
    signal.SIGXFSZ: "it reached a limit of the size of a file",
}


def log_tail(log: Path, after: int = 0) -> list[str]:
    """Return the last lines of a log, of what lies beyond byte ``after``."""
    try:
        with log.open("rb") as file:
            file.seek(max(after, os.fstat(file.fileno()).st_size - LOG_TAIL))
            text = file.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return []
    # A progress bar overwrites its line with a bare carriage return.
    return [line for line in text.replace("\r", "\n").split("\n") if line.strip()][-TAIL_LINES:]


def sentence(word: AnyEvent | None, code: int | None, *, blamed: str, forced: bool, released: bool) -> str:
    """Say how a trainer ended: by its last ``word``, else by its exit code, negative for a signal."""
    if blamed:
        said = f"{blamed} It was ended for that."
    elif isinstance(word, Left):
        said = f"The trainer left at step {word.step}: {word.why}."
    elif isinstance(word, Failed):
        said = word.failure.sentence
    elif isinstance(word, Finished):
        said = "The trainer finished."
    elif code is None:
        said = "The trainer could not be ended, not even by SIGKILL; it hangs in a driver or on a disk."
    elif code < 0:
        said = _by_signal(-code, forced)
    elif code == 0:
        said = "The trainer left without a word."
    else:
        said = f"The trainer left with code {code} and without a word; see the end of its log."
    if not released:
        said += " Its memory has not left the device, as far as can be seen."
    return said


def _by_signal(number: int, forced: bool) -> str:
    name = signal.Signals(number).name if number in list(signal.Signals) else f"signal {number}"
    if forced:
        return f"The agent ended the trainer by {name}, since it had not left by itself."
    if number == signal.SIGKILL:
        return (
            "The trainer was killed by SIGKILL, which this agent did not send. Mostly the machine was "
            "out of memory: its kernel log says so."
        )
    meaning = next((f" ({meaning})" for one, meaning in MEANINGS.items() if one == number), "")
    return f"The trainer was ended by {name}{meaning}, which this agent did not send; see the end of its log."
