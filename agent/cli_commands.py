"""Commands that look at jobs and steer them. Each returns what `cli.py` prints."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agent.cli_options import AcceptChanges, AsJson, Checkpoint, HubKey, HubUrl, JobName, JobPath, door
from agent.cli_options import backend as backend_of
from protocol.version import AGENT_VERSION, PROTOCOL_VERSION

if TYPE_CHECKING:
    from agent.cli_remote import Door

commands = typer.Typer()


@commands.command()
def submit(
    context: typer.Context,
    job: JobPath,
    data: Annotated[Path | None, typer.Option(help="A data set to send along.")] = None,
    job_id: Annotated[str, typer.Option(help="Id of the job; else the backend makes one.")] = "",
    hub: HubUrl = "",
    api_key: HubKey = "",
    as_json: AsJson = False,
) -> str:
    """Hand a job to the backend, which gives it to an agent; print its id.

    Example: training-agent submit job.yaml --data train.jsonl
    """
    from agent import cli_jobfile
    from agent.cli_remote import checked

    file = cli_jobfile.read(job)
    backend = backend_of(context, hub, api_key)
    dataset_path = backend.upload(data) if data is not None else file.dataset_path
    wanted = job_id or file.job_id
    answer = backend.submit(
        file.config,
        job_id=checked(wanted) if wanted else "",
        dataset_path=dataset_path,
        name=file.name or job.stem,
    )
    return json.dumps(answer) if as_json else str(answer["job_id"])


@commands.command()
def jobs(context: typer.Context, hub: HubUrl = "", api_key: HubKey = "", as_json: AsJson = False) -> str:
    """List the jobs.

    Example: training-agent jobs --json
    """
    from agent import cli_show

    found = door(context, hub, api_key).jobs()
    return json.dumps(found) if as_json else cli_show.table(found)


@commands.command()
def status(
    context: typer.Context,
    job_id: Annotated[str, typer.Argument(metavar="[ID]", help="A job; else the agent itself.")] = "",
    hub: HubUrl = "",
    api_key: HubKey = "",
    as_json: AsJson = False,
) -> str:
    """Show how a job is; without ID, how the agent is.

    Example: training-agent status my-job
    """
    from agent import cli_show

    asked = door(context, hub, api_key)
    found = asked.status(job_id) if job_id else asked.health()
    if as_json:
        return cli_show.pretty(found)
    return cli_show.status(found) if job_id else cli_show.health(found)


@commands.command()
def logs(
    context: typer.Context,
    job_id: JobName,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the job ends.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Show the last so many lines.")] = None,
    hub: HubUrl = "",
    api_key: HubKey = "",
) -> Iterator[str]:
    """Print a job's log.

    Example: training-agent logs -f my-job
    """
    return _log_lines(door(context, hub, api_key), job_id, follow, limit)


def _log_lines(door: "Door", job_id: str, follow: bool, limit: int | None) -> Iterator[str]:
    offset = max(0, door.logs(job_id, 1, 0)["total_lines"] - limit) if limit is not None else 0
    while True:
        # The state is read first, so that what a job says last is printed too.
        ended = door.status(job_id)["status"] in ("completed", "failed", "cancelled") if follow else True
        while found := door.logs(job_id, 1000, offset)["logs"]:
            offset += len(found)
            yield from found
        if ended:
            return
        time.sleep(1)


def _act(
    context: typer.Context,
    job_id: str,
    action: str,
    hub: str,
    api_key: str,
    as_json: bool,
    checkpoint: str = "",
    accept_changes: bool = False,
) -> str:
    answer = door(context, hub, api_key).act(job_id, action, checkpoint, accept_changes)
    return json.dumps(answer) if as_json else str(answer.get("message") or f"{action}: {job_id}")


@commands.command()
def pause(
    context: typer.Context, job_id: JobName, hub: HubUrl = "", api_key: HubKey = "", as_json: AsJson = False
) -> str:
    """Save a job exactly and give the GPU back.

    Example: training-agent pause my-job
    """
    return _act(context, job_id, "pause", hub, api_key, as_json)


@commands.command()
def resume(
    context: typer.Context,
    job_id: JobName,
    checkpoint: Checkpoint = "",
    accept_changes: AcceptChanges = False,
    hub: HubUrl = "",
    api_key: HubKey = "",
    as_json: AsJson = False,
) -> str:
    """Go on with a paused job, exactly where it stood.

    Example: training-agent resume my-job --checkpoint best
    """
    return _act(context, job_id, "resume", hub, api_key, as_json, checkpoint, accept_changes)


@commands.command()
def cancel(
    context: typer.Context, job_id: JobName, hub: HubUrl = "", api_key: HubKey = "", as_json: AsJson = False
) -> str:
    """End a job without saving.

    Example: training-agent cancel my-job
    """
    return _act(context, job_id, "cancel", hub, api_key, as_json)


@commands.command()
def stop(
    context: typer.Context, job_id: JobName, hub: HubUrl = "", api_key: HubKey = "", as_json: AsJson = False
) -> str:
    """End a job early and keep its model.

    Example: training-agent stop my-job
    """
    return _act(context, job_id, "stop", hub, api_key, as_json)


@commands.command()
def retry(
    context: typer.Context,
    job_id: JobName,
    checkpoint: Checkpoint = "",
    accept_changes: AcceptChanges = False,
    hub: HubUrl = "",
    api_key: HubKey = "",
    as_json: AsJson = False,
) -> str:
    """Queue a failed or cancelled job again, from its last good checkpoint.

    Example: training-agent retry my-job --accept-changes
    """
    return _act(context, job_id, "retry", hub, api_key, as_json, checkpoint, accept_changes)


@commands.command()
def schema(
    asyncapi: Annotated[bool, typer.Option("--asyncapi", help="The AsyncAPI 3 document.")] = False,
    write: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Write both documents there.")] = None,
) -> str:
    """Print the JSON Schema of every message and record, for a backend in another language.

    Example: training-agent schema --write protocol
    """
    import protocol.schema as documents

    if write is not None:
        return "\n".join(str(path) for path in documents.write(write))
    return documents.text(documents.async_api() if asyncapi else documents.json_schema()).rstrip()


@commands.command()
def version(as_json: AsJson = False) -> str:
    """Print the versions of the agent and of its protocol.

    Example: training-agent version --json
    """
    if as_json:
        return json.dumps({"version": AGENT_VERSION, "protocol": PROTOCOL_VERSION})
    return f"training-agent {AGENT_VERSION}, protocol {PROTOCOL_VERSION}"
