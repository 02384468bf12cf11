"""What is said of a trainer's end."""

import signal
from pathlib import Path

import pytest

from agent.runtime.ending import LOG_TAIL, TAIL_LINES, log_tail, sentence
from protocol.failures import FailureReason, failure
from protocol.worker import AnyEvent, Failed, Finished, Left


def said(word: AnyEvent | None = None, code: int | None = 0, blamed: str = "", forced: bool = False) -> str:
    return sentence(word, code, blamed=blamed, forced=forced, released=True)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (-signal.SIGSEGV, "SIGSEGV (it used memory that is not its own"),
        (-signal.SIGBUS, "/dev/shm"),
        (-signal.SIGILL, "instruction that this processor does not know"),
        (-signal.SIGABRT, "SIGABRT (native code gave up"),
        (-signal.SIGKILL, "SIGKILL, which this agent did not send"),
        (-signal.SIGHUP, "ended by SIGHUP, which"),
        (-64, "SIGRTMAX"),
        (-63, "signal 63"),
        (0, "without a word"),
        (3, "code 3"),
        (None, "not even by SIGKILL"),
    ],
)
def test_an_end_without_a_word_is_named(code: int | None, words: str) -> None:
    assert words in said(code=code)


def test_a_last_word_goes_before_the_code_and_blame_before_all() -> None:
    assert said(Left("paused", 5), -9) == "The trainer left at step 5: paused."
    assert said(Failed(failure(FailureReason.DATA, "Row 57.")), 1) == "Row 57."
    assert said(Finished("/m", "", "h", 3, {})) == "The trainer finished."
    assert said(Left("paused", 5), -9, "It sent a pickle.") == "It sent a pickle. It was ended for that."
    assert "The agent ended the trainer by SIGTERM" in said(code=-15, forced=True)
    assert "memory has not left" in sentence(None, 0, blamed="", forced=False, released=False)


def test_the_end_of_a_log_is_its_last_lines_without_what_progress_bars_wrote_over(tmp_path: Path) -> None:
    log = tmp_path / "j.log"
    assert log_tail(log) == []
    log.write_text("x" * (LOG_TAIL + 5) + "\n\n1%\r2%\r\nlast\n")
    assert log_tail(log)[-3:] == ["1%", "2%", "last"]
    before = log.stat().st_size
    with log.open("a") as more:
        more.write("".join(f"{number}\n" for number in range(TAIL_LINES + 7)))
    assert log_tail(log, before)[-1] == str(TAIL_LINES + 6)
    assert len(log_tail(log)) == TAIL_LINES
    assert log_tail(log, log.stat().st_size) == []
