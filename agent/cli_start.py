"""The way into the agent's program, shared by the command line and by `start` with nothing to parse.

A container or a service runs the bare `start`, and then no command-line library is loaded: it would take half
as long as the whole way to the first dial, and a sixth of the memory of an idle agent.
"""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from agent.config import Settings, dialable, load_for_program
from agent.errors import AgentError, Exit

EARLY = 130
"""Exit code of a command that a signal ended before its time."""


if TYPE_CHECKING:
    from agent.runtime.redact import Redactor


def warn(sentence: str) -> None:
    """Tell the user on standard error."""
    sys.stderr.write(f"warning: {sentence}\n")


def guarded(program: Callable[[], int | None], *, debug: bool) -> int:
    """Return the program's exit code; an error becomes one sentence on standard error."""
    try:
        return program() or Exit.OK
    except AgentError as error:
        if debug:
            raise
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except Exception as error:
        if debug:
            raise
        sys.stderr.write(
            f"error: a defect of the agent ({type(error).__name__}: {error}). "
            "Run it again with --debug before the command and please report what it shows.\n"
        )
        return Exit.INTERNAL


def log_to(settings: Settings, *, to_stderr: bool = True) -> "Redactor":
    """Set up the agent's log in its home; return what hides secrets in it, to learn of later ones."""
    from agent import logs
    from agent.runtime.redact import Redactor

    settings.agent_home.mkdir(mode=0o700, parents=True, exist_ok=True)
    secrets = [settings.api_key] if settings.api_key is not None else []
    redactor = Redactor([secret.reveal() for secret in (*secrets, *settings.trainer_environment.values())])
    logs.set_up(
        settings.log_level,
        settings.agent_home / "agent.log",
        as_json=settings.log_json,
        redact=redactor.redact,
        to_stderr=to_stderr,
    )
    return redactor


def run(settings: Settings) -> int:
    """Run the agent until it is told to stop; return its exit code."""
    import anyio

    from agent.app import run_agent

    dialable(settings)
    redactor = log_to(settings)
    try:
        return anyio.run(lambda: run_agent(settings, redactor=redactor))
    except* AgentError as group:
        raise leaf(group) from None


def leaf(group: BaseExceptionGroup[AgentError]) -> AgentError:
    """Return the first error of a group."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, AgentError)
    return error


def main() -> None:
    """Run `start` with no options, as containers and services do, and leave with its exit code."""
    try:
        code = guarded(lambda: run(load_for_program(warn=warn)), debug=False)
    except KeyboardInterrupt:
        code = EARLY
    sys.exit(code)
