"""The agent's own log: standard error and a rotated file, both redacted.

Levels: error = a bug or a failed job; warning = it worked, but not as asked; info = start, stop,
connect, change of state; debug = every message.
"""

import json
import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loguru import logger

if TYPE_CHECKING:
    from loguru import Record

Redact = Callable[[str], str]

ROTATE_AT = 10 * 1024 * 1024
"""Bytes."""
KEEP_FILES = 5


def unchanged(text: str) -> str:
    """Return ``text``: there is no secret to hide yet."""
    return text


def set_up(
    level: str,
    log_file: Path | None = None,
    *,
    as_json: bool = False,
    redact: Redact = unchanged,
    to_stderr: bool = True,
) -> None:
    """Send what the agent and its libraries log to standard error and to ``log_file``.

    ``redact`` sees every message and traceback before anything is written. May be called again.
    """

    def patch(record: "Record") -> None:
        record["message"] = redact(record["message"])
        problem = record["exception"]
        trace = "".join(traceback.format_exception(*problem)) if problem is not None else ""
        record["extra"]["trace"] = redact(trace)

    logger.remove()
    logger.configure(patcher=patch)
    # diagnose writes the values of local variables, and a key may be among them.
    shared: dict[str, Any] = {"level": level, "diagnose": False, "backtrace": False, "enqueue": False}
    if to_stderr:
        logger.add(sys.stderr, format=_plain, colorize=False, **shared)
    if log_file is not None:
        logger.add(
            log_file,
            format=_json_line if as_json else _plain,
            rotation=ROTATE_AT,
            retention=KEEP_FILES,
            encoding="utf-8",
            opener=_private,
            **shared,
        )
    libraries = logging.WARNING if level != "DEBUG" else logging.INFO
    logging.basicConfig(handlers=[_Forward()], level=libraries, force=True)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _plain(record: "Record") -> str:
    trace = "{extra[trace]}" if record["extra"].get("trace") else ""
    return "{time:YYYY-MM-DDTHH:mm:ss.SSSZZ} {level: <7} {message}\n" + trace


def _json_line(record: "Record") -> str:
    extra = {key: value for key, value in record["extra"].items() if key not in ("trace", "line")}
    line = {
        "time": record["time"].isoformat(),
        "level": record["level"].name.lower(),
        "message": record["message"],
        "where": f"{record['name']}:{record['line']}",
        **({"trace": record["extra"]["trace"]} if record["extra"].get("trace") else {}),
        **({"fields": extra} if extra else {}),
    }
    record["extra"]["line"] = json.dumps(line, default=str)
    return "{extra[line]}\n"


class _Forward(logging.Handler):
    """Hands what libraries log with the standard library to loguru."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            level: str | int = logger.level(record.levelname).name
        except ValueError:
            level = record.levelno
        logger.opt(exception=record.exc_info).log(level, "{}: {}", record.name, record.getMessage())
