"""The agent's own log: redacted, private, rotated, and without values of variables."""

import json
import logging
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from loguru import logger

from agent import logs


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    logger.remove()
    logger.configure(patcher=lambda record: None)
    root.handlers[:], root.level = before[0], before[1]


def hide(text: str) -> str:
    return text.replace("wak_hidden", "[secret]")


def test_secrets_are_hidden_in_messages_tracebacks_and_of_libraries(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "agent.log"
    logs.set_up("INFO", file, redact=hide)
    logger.info("dialling with {}", "wak_hidden")
    try:
        inner = "wak_hidden"
        raise ValueError(f"refused {inner}")
    except ValueError:
        logger.exception("failed")
    logging.getLogger("library").warning("key %s", "wak_hidden")
    logging.getLogger("library").info("not shown")
    for text in (file.read_text(), capsys.readouterr().err):
        assert "wak_hidden" not in text
        assert "dialling with [secret]" in text
        assert "ValueError: refused [secret]" in text
        assert "library: key [secret]" in text
        assert "not shown" not in text


def test_the_file_is_its_owners(tmp_path: Path) -> None:
    logs.set_up("INFO", tmp_path / "agent.log", to_stderr=False)
    logger.info("x")
    assert stat.S_IMODE((tmp_path / "agent.log").stat().st_mode) == 0o600


def test_the_level_is_obeyed(tmp_path: Path) -> None:
    logs.set_up("WARNING", tmp_path / "agent.log", to_stderr=False)
    logger.info("quiet")
    logger.warning("heard")
    assert [line.split()[-1] for line in (tmp_path / "agent.log").read_text().splitlines()] == ["heard"]


def test_lines_of_json(tmp_path: Path) -> None:
    logs.set_up("INFO", tmp_path / "agent.log", as_json=True, to_stderr=False, redact=hide)
    logger.bind(job="j1").info("with {{braces}} and {}", "wak_hidden")
    try:
        raise ValueError("wak_hidden")
    except ValueError:
        logger.exception("failed")
    first, second = [json.loads(line) for line in (tmp_path / "agent.log").read_text().splitlines()]
    assert (first["level"], first["message"], first["fields"]) == (
        "info",
        "with {braces} and [secret]",
        {"job": "j1"},
    )
    assert "ValueError: [secret]" in second["trace"]


def test_the_file_is_rotated_and_old_ones_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "ROTATE_AT", 2000)
    logs.set_up("INFO", tmp_path / "agent.log", to_stderr=False)
    for _ in range(300):
        logger.info("x" * 80)
    files = list(tmp_path.iterdir())
    assert 2 <= len(files) <= logs.KEEP_FILES + 1
    assert all(file.stat().st_size < 2200 for file in files)
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)
