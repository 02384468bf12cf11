"""Every error of ours that a person may read, and the exit codes.

AgentError
  BadSetting          a setting that cannot be obeyed                    exit 3
  Refused             the backend refuses this agent for good            exit 4
    KeyRefused        wrong, revoked or missing API key                  exit 4
    NotOurBackend     no agent socket of ours at that address            exit 5
    VersionRefused    no common protocol version                         exit 5
    IdentityTaken     another install uses this agent's id               exit 4
  AlreadyRunning      another agent holds this AGENT_HOME                exit 7
  UnknownJob          no job of that id                                  exit 8
  NotPossible         the job's state does not allow it                  exit 9
  BadJob              a job that cannot be accepted                      exit 10
  JobFailed           `run`: the job ended badly                         exit 11
  Unreachable         the agent or hub that a command needs is not there exit 12
"""

from enum import IntEnum


class Exit(IntEnum):
    """What the process leaves with. 2 is the command line's own, for wrong usage."""

    OK = 0
    INTERNAL = 1
    SETTINGS = 3
    REFUSED = 4
    NOT_OURS = 5
    ALREADY_RUNNING = 7
    UNKNOWN_JOB = 8
    NOT_POSSIBLE = 9
    BAD_JOB = 10
    JOB_FAILED = 11
    UNREACHABLE = 12


class AgentError(Exception):
    """Base of all errors of ours; ``str()`` is a sentence: what is wrong, where, what to do."""

    exit_code = Exit.INTERNAL

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence)
        self.sentence = sentence

    def __str__(self) -> str:
        return self.sentence


class BadSetting(AgentError):
    """A setting that cannot be obeyed."""

    exit_code = Exit.SETTINGS

    def __init__(self, name: str, why: str, source: str = "") -> None:
        super().__init__(f"{name}: {why}" + (f" ({source})" if source else ""))
        self.name = name
        self.why = why
        self.source = source


class Refused(AgentError):
    """The backend refuses this agent, and dialling again cannot cure it."""

    exit_code = Exit.REFUSED
    status = 0
    """The HTTP status that said so; 0 where it was something else."""


class KeyRefused(Refused):
    """The API key is wrong, revoked or lacks the scope."""


class IdentityTaken(Refused):
    """Another install uses this agent's id."""


class NotOurBackend(Refused):
    """There is no agent socket of ours at that address."""

    exit_code = Exit.NOT_OURS


class VersionRefused(Refused):
    """The two ends have no protocol version in common."""

    exit_code = Exit.NOT_OURS


class AlreadyRunning(AgentError):
    """Another agent holds this AGENT_HOME."""

    exit_code = Exit.ALREADY_RUNNING


class UnknownJob(AgentError):
    """No job of that id is known here."""

    exit_code = Exit.UNKNOWN_JOB

    def __init__(self, job_id: str) -> None:
        super().__init__(f'There is no job "{job_id}" on this agent.')
        self.job_id = job_id


class NotPossible(AgentError):
    """The job stands where this cannot be done."""

    exit_code = Exit.NOT_POSSIBLE


class BadJob(AgentError):
    """A job that cannot be accepted."""

    exit_code = Exit.BAD_JOB


class JobFailed(AgentError):
    """A job that `run` waited for ended badly."""

    exit_code = Exit.JOB_FAILED


class Unreachable(AgentError):
    """The agent or hub that a command talks to is not there."""

    exit_code = Exit.UNREACHABLE
