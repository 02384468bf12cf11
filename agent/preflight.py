"""A job looked at before it is started: a trainer of its own says what it would need. Nothing of it is kept."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import msgspec

from agent.config import Settings
from agent.core.control import parsed
from agent.core.explain import without_effect
from agent.errors import BadJob, JobFailed
from agent.program import Program
from agent.runtime import workspace as places
from agent.runtime.boot import Plan
from agent.runtime.process import Child
from protocol.codec import UNREADABLE
from protocol.jobspec import BadSpec, JobSpec
from protocol.trainingconfig import job_spec
from protocol.worker import (
    Check,
    Committed,
    Estimate,
    Estimated,
    Failed,
    Note,
    Preparing,
    Workspace,
    encoder,
    event_decoder,
)

Tell = Callable[[str, str], None]
"""Takes a level (info or warning) and a sentence for the user."""
LOG_TAIL = 2000


async def check(
    settings: Settings,
    config: Mapping[str, Any],
    *,
    job_id: str,
    dataset_path: str = "",
    name: str = "",
    tell: Tell = lambda level, text: None,
    module: str = "agent.trainer.entry",
) -> Estimate:
    """Return what a job would need on this machine.

    Raises BadJob for one that cannot be accepted, and JobFailed for one that would fail.
    """
    try:
        spec = job_spec(job_id, parsed(msgspec.json.encode(config).decode()), dataset_path, name)
    except BadSpec as error:
        raise BadJob(str(error)) from None
    if text := without_effect(config):
        tell("warning", text)
    await anyio.Path(settings.agent_home).mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(prefix="check-", dir=settings.agent_home) as folder:
        home = Path(folder)
        program = Program(settings, home, module, None)
        async with program.running() as group:
            await program.watch.look()
            try:
                space = await anyio.to_thread.run_sync(_workspace, settings, spec, home)
            except places.WorkspaceError as error:
                raise BadJob(str(error)) from None
            order = Check(spec, space, program.launching.limits(spec))
            env = program.launching.env(program.watch.devices(program.launching.visible)[0])
            child = Child(Plan(module, str(home / "trainer.log"), env))
            hearing = _Hearing(child, tell)
            child.start()
            child.send(encoder.encode(order))
            try:
                await child.run(hearing.hear, hearing.blame)
            finally:
                with anyio.CancelScope(shield=True):
                    await child.bury(30.0)
            group.cancel_scope.cancel()
        if hearing.failed:
            raise JobFailed(hearing.failed)
        if hearing.estimate is None:
            raise JobFailed(_without_a_word(child, home / "trainer.log"))
        return hearing.estimate


class _Hearing:
    """What the trainer says."""

    def __init__(self, child: Child, tell: Tell) -> None:
        self._child = child
        self._tell = tell
        self.estimate: Estimate | None = None
        self.failed = ""

    async def hear(self, frames: list[bytes]) -> None:
        for raw in frames:
            if self._child.is_heard:
                self._hear(raw)

    def _hear(self, raw: bytes) -> None:
        try:
            numbered = event_decoder.decode(raw)
        except UNREADABLE as error:
            self.failed = f"The trainer sent {len(raw)} bytes that are no event: {error}."
            self._child.kill()
            return
        match numbered.event:
            case Estimated(estimate=estimate):
                self.estimate = estimate
            case Failed(failure=failure):
                self.failed = " ".join(part for part in (failure.sentence, failure.advice) if part)
            case Note(level=level, text=text):
                self._tell(level, text)
            case Preparing(detail=detail):
                self._tell("info", detail)
            case _:
                pass
        if numbered.attempt:
            self._child.send(encoder.encode(Committed(numbered.number)), replaces=True)

    async def blame(self, sentence: str) -> None:
        self.failed = self.failed or sentence


def _workspace(settings: Settings, spec: JobSpec, home: Path) -> Workspace:
    """Return the job's paths, of which nothing is made but the cache."""
    cache = home / "cache"
    cache.mkdir(mode=0o700, exist_ok=True)
    hub, data = settings.allow_hub, spec.data
    own_tokenizer = spec.tokenizer.name if spec.tokenizer.name != spec.model.name else None
    return Workspace(
        checkpoints=str(settings.checkpoints_dir / spec.job_id),
        output=str(settings.models_dir / spec.job_id),
        cache=str(cache),
        model=places.model_source(spec.model.name, settings.models_dir, hub=hub),
        data=places.data_source(data.path, settings.datasets_dir, hub=hub),
        eval_data=places.data_source(data.eval_path, settings.datasets_dir, hub=hub)
        if data.eval_path
        else "",
        tokenizer=places.model_source(own_tokenizer, settings.models_dir, hub=hub) if own_tokenizer else "",
    )


def _without_a_word(child: Child, log: Path) -> str:
    tail = log.read_bytes()[-LOG_TAIL:].decode("utf-8", "replace") if log.exists() else ""
    lines = [line for line in tail.splitlines() if line.strip()]
    code = child.exit_code
    how = f"by signal {-code}" if code is not None and code < 0 else f"with code {code}"
    last = f" It last printed: {lines[-1][:300]}" if lines else ""
    if code == -9:
        last = " Mostly that is the machine, which was out of memory: the job does not fit." + last
    return f"The trainer that looked at the job ended {how} and without a word.{last}"
