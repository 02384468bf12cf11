"""Finds the process that trains a job of a running agent."""

from pathlib import Path

import psutil

from tests.support.programs import Agent


def trainer_of(agent: Agent, job: str) -> psutil.Process | None:
    """Return the child of the agent whose prints go to the job's log."""
    assert agent.process is not None
    for child in psutil.Process(agent.process.pid).children():
        try:
            if Path(f"/proc/{child.pid}/fd/1").readlink().name == f"{job}.log":
                return child
        except OSError:
            continue
    return None
