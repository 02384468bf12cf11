"""The command `check`: what a job would need, as a table or as JSON. Returns what `cli.py` prints."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from agent.cli_options import AsJson, JobPath, settings_of

if TYPE_CHECKING:
    from protocol.worker import Estimate

checking = typer.Typer()

NAMES = {
    "program": "Python and its libraries",
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer's state",
    "activations": "activations",
    "head": "head over the vocabulary",
    "evaluation": "evaluation",
    "in the step": "the optimizer's step",
    "background save": "copy for background saves",
    "allocator": "lost between blocks",
}


@checking.command()
def check(
    context: typer.Context,
    job: JobPath,
    data: Annotated[Path | None, typer.Option(help="The data set: a file or saved folder.")] = None,
    as_json: AsJson = False,
) -> Iterator[str]:
    """Say what a job would need of memory, disk and time, and whether it fits; train nothing.

    Looks at every row, and measures a step on the first layers of the model. Leaves with 0 if the job fits.

    Example: training-agent check job.yaml --data train.jsonl
    """
    import anyio

    from agent import cli_jobfile
    from agent.cli_remote import checked
    from agent.cli_start import leaf, log_to
    from agent.errors import AgentError, BadJob
    from agent.preflight import check as look

    settings = settings_of(context)
    file = cli_jobfile.read(job)
    dataset_path = file.dataset_path
    if data is not None:
        # Named by the owner at the keyboard, who may allow any folder.
        data = data.resolve()
        settings = msgspec.structs.replace(settings, datasets_dir=data.parent)
        dataset_path = str(data)
    name = checked(file.job_id or cli_jobfile.stable_id(job, file, dataset_path))
    log_to(settings, to_stderr=False)

    def tell(level: str, text: str) -> None:
        if not as_json:
            sys.stderr.write(f"{'warning: ' if level == 'warning' else ''}{text}\n")

    async def run() -> "Estimate":
        return await look(
            settings, file.config, job_id=name, dataset_path=dataset_path, name=file.name, tell=tell
        )

    try:
        found = anyio.run(run)
    except* AgentError as group:
        raise leaf(group) from None
    yield msgspec.json.encode(found).decode() if as_json else table(found)
    if not found.fits:
        raise BadJob(lacks(found))


def table(found: "Estimate") -> str:
    """Return an estimate for people."""
    rows = [("", "needs", "free"), ("memory", _gb(found.host_gb), _gb(found.free_host_gb))]
    if found.device_gb is not None:
        rows.append((found.device, _gb(found.device_gb), _gb(found.free_device_gb)))
    rows.append(("disk", _gb(found.disk_gb), _gb(found.free_disk_gb)))
    width = max(len(row[0]) for row in rows)
    lines = [f"{name:<{width}}  {needs:>9}  {free:>9}".rstrip() for name, needs, free in rows]
    peak = found.host_gb if found.device_gb is None else found.device_gb
    lines += ["", f"At its peak of {_gb(peak)}:"]
    parts = sorted(found.parts.items(), key=lambda part: -part[1])
    if found.device_gb is not None:
        parts = [part for part in parts if part[0] not in ("program", "background save")]
    wide = max((len(NAMES.get(name, name)) for name, _ in parts), default=0)
    lines += [f"  {NAMES.get(name, name):<{wide}}  {_gb(size):>9}" for name, size in parts]
    if found.total_steps:
        lines += ["", f"{found.total_steps} steps" + _time(found)]
    if found.advice:
        lines += ["", "To need less:", *(f"  {sentence}" for sentence in found.advice)]
    lines += ["", "The job fits." if found.fits else "The job does not fit."]
    return "\n".join(lines)


def lacks(found: "Estimate") -> str:
    """Return a sentence on what there is too little of."""
    short = [
        f"{_gb(needs)} of {what} are needed and {_gb(free)} are free"
        for what, needs, free in (
            (f"memory of {found.device}", found.device_gb, found.free_device_gb),
            ("memory", found.host_gb, found.free_host_gb),
            ("disk", found.disk_gb, found.free_disk_gb),
        )
        if needs is not None and free is not None and needs > free
    ]
    more = f" {found.advice[0]}" if found.advice else ""
    return f"the job does not fit: {'; '.join(short)}.{more}"


def _time(found: "Estimate") -> str:
    if found.step_seconds is None:
        return ""
    each = f" of about {found.step_seconds:.2g} s"
    return each + (f": {_duration(found.total_seconds)} in all" if found.total_seconds is not None else "")


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def _gb(size: float | None) -> str:
    return "-" if size is None else f"{size:.2f} GB"
