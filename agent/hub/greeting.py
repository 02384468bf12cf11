"""Who owns an agent's id, and what an agent is told when it says hello."""

from dataclasses import dataclass, field

from agent.hub import jobs
from agent.hub.errors import StreamRefused
from agent.hub.ingest import WHOLE, owned, position
from agent.hub.model import Agent
from agent.hub.store import Db
from agent.hub.tables import find_agent, find_job, live_jobs_of, save_agent, save_job
from protocol.messages import Close, Command, Desired, Hello
from protocol.session import Key

FORGOTTEN = 600.0
"""Seconds after which another install may take an id over that nobody uses."""
ROLLED_BACK = 120.0
"""Seconds of absence after which a lower (boot, attempt) is a restored disk and not a late arrival."""


@dataclass
class Greeting:
    """The answer to a HELLO."""

    refused: tuple[int, str] | None = None
    acks: dict[Key, int] = field(default_factory=dict)
    closed: dict[Key, str] = field(default_factory=dict)
    desired: list[Desired] = field(default_factory=list)
    commands: list[Command] = field(default_factory=list)


def greet(db: Db, hello: Hello, keys: list[Key], now: float, connected: bool) -> Greeting:
    """Decide whether this dial owns the agent's id; if so write it down and say what is durable and wanted."""
    agent = find_agent(db, hello.agent_id)
    if agent is not None and agent.install_id:
        away = now - agent.last_seen
        if agent.install_id != hello.install_id:
            if connected or away < FORGOTTEN:
                return Greeting(
                    (
                        Close.OTHER_INSTALL,
                        f"another install uses {hello.agent_id} on {agent.hostname}; give this one its own id",
                    )
                )
        elif (hello.boot, hello.attempt) <= (agent.boot, agent.attempt) and (connected or away < ROLLED_BACK):
            return Greeting(
                (Close.STALE, f"boot {agent.boot} attempt {agent.attempt} has taken over this agent's id")
            )
    agent = agent or Agent(id=hello.agent_id, registered_at=now, last_seen=now)
    machine = hello.machine
    agent.install_id, agent.boot, agent.attempt = hello.install_id, hello.boot, hello.attempt
    agent.machine, agent.features = machine, hello.features
    agent.hostname, agent.platform, agent.version = machine.hostname, machine.platform, machine.version
    agent.last_seen, agent.disconnected_at = now, None
    agent.bye, agent.bye_until = "", 0.0
    save_agent(db, agent)
    answer = Greeting()
    for scope in {key.scope for key in keys} | {seen.job_id for seen in hello.jobs}:
        job = find_job(db, scope)
        if job is not None and job.agent_id is None and job.live:
            # Submitted again to a hub that comes from a backup: who has it already goes on, and what it holds is kept.
            job.agent_id = agent.id
            save_job(db, job)
    for key in keys:
        try:
            owned(db, agent.id, key.scope)
        except StreamRefused as refused:
            answer.closed[key] = str(refused)
        else:
            answer.acks[key] = position(db, agent.id, key)
    _wanted(db, agent, hello, answer)
    return answer


def _wanted(db: Db, agent: Agent, hello: Hello, answer: Greeting) -> None:
    for seen in hello.jobs:
        job = find_job(db, seen.job_id)
        if job is None or job.agent_id != agent.id or seen.observed > WHOLE:
            continue
        if not job.taken or seen.observed > job.observed:
            job.taken = True
            job.observed = max(job.observed, seen.observed)
            save_job(db, job)
    answer.desired = [jobs.desired(job) for job in live_jobs_of(db, agent.id)]
    answer.commands = jobs.open_commands(db, agent.id)


def parted(db: Db, agent_id: str, now: float, bye: str = "", until: float = 0.0) -> None:
    """Note when an agent was last heard of, and why it will be silent if it said so."""
    agent = find_agent(db, agent_id)
    if agent is None:
        return
    agent.last_seen = now
    if bye:
        agent.bye, agent.bye_until = bye, until
    else:
        agent.disconnected_at = now
    save_agent(db, agent)
