"""The backend that is held to the contract: one that is given, or a hub of our own.

`AGENT_TEST_HUB` and `AGENT_TEST_KEY` name a backend and an API key of it. `AGENT_TEST_RESTART` is a command that
restarts it: with `kill` behind it as a crash would, with `stop` as a deployment would. It returns when the backend
is back. Without it the two clauses about that are skipped.
"""

import os
import shlex
import signal
import subprocess
from collections.abc import Iterator

import pytest

from tests.contract.backend import Backend
from tests.contract.clauses import clauses, number_of
from tests.support.programs import KEY, Hub


@pytest.fixture(scope="session")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    """The backend under test."""
    url = os.environ.get("AGENT_TEST_HUB", "").rstrip("/")
    if url:
        command = os.environ.get("AGENT_TEST_RESTART", "")

        def restart(how: str) -> None:
            subprocess.run([*shlex.split(command), how], check=True, timeout=300)

        with Backend(url, os.environ["AGENT_TEST_KEY"], restart if command else None) as given:
            yield given
        return
    hub = Hub(tmp_path_factory.mktemp("contract") / "hub").start()

    def again(how: str) -> None:
        hub.stop(signal.SIGKILL if how == "kill" else signal.SIGTERM)
        hub.start()

    with Backend(hub.url, KEY, again) as ours:
        yield ours
    hub.stop()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Say with a failure which clause it is that does not hold."""
    report: pytest.TestReport = yield  # type: ignore[misc, assignment]
    number = number_of(item.name)
    if report.failed and number is not None:
        report.sections.append((f"clause C{number} of protocol/README.md", clauses()[number]))
    return report  # type: ignore[return-value]
