"""One hub and one agent with the fake trainer, shared by the tests of a file that leave them alive."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.programs import Agent, Hub, together


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hub, Agent]]:
    with together(tmp_path_factory.mktemp("pair")) as both:
        yield both


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A hub alone."""
    started = Hub(tmp_path / "hub").start()
    yield started
    started.stop()
