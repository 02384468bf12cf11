"""Commands on a job's checkpoints: list and pin them, and begin a new job with one."""

import json
from typing import Annotated, Any

import typer

from agent.cli_options import AsJson, HubKey, HubUrl, JobName, door

branching = typer.Typer()


@branching.command()
def checkpoints(
    context: typer.Context,
    job_id: JobName,
    pin: Annotated[str, typer.Option(metavar="NAME", help="Never delete this one.")] = "",
    unpin: Annotated[str, typer.Option(metavar="NAME", help="Let this one be deleted in its turn.")] = "",
    hub: HubUrl = "",
    api_key: HubKey = "",
    as_json: AsJson = False,
) -> str:
    """List a job's checkpoints; keep one for good, or no more.

    Example: training-agent checkpoints my-job --pin step-200
    """
    from agent import cli_show
    from agent.errors import BadJob

    if pin and unpin:
        raise BadJob("--pin and --unpin cannot be given at once.")
    asked = door(context, hub, api_key)
    found = asked.pin(job_id, pin or unpin, bool(pin)) if pin or unpin else asked.checkpoints(job_id)
    return json.dumps(found) if as_json else cli_show.checkpoints(found["checkpoints"])


@branching.command()
def branch(
    context: typer.Context,
    job_id: JobName,
    checkpoint: Annotated[
        str, typer.Option(metavar="NAME", help="Begin with this one, or `best`; else with the newest.")
    ] = "",
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="A setting of the config that is to be another."),
    ] = None,
    new_id: Annotated[str, typer.Option("--job-id", help="Id of the new job; else one is made.")] = "",
    name: Annotated[str, typer.Option(help="Name of the new job.")] = "",
    hub: HubUrl = "",
    api_key: HubKey = "",
    as_json: AsJson = False,
) -> str:
    """Begin a new job with a checkpoint of this one and other settings; print its id.

    Example: training-agent branch my-job --checkpoint step-20 --set training.learning_rate=1e-4
    """
    from agent.cli_remote import checked

    body: dict[str, Any] = {"checkpoint": checkpoint, "config_adjustments": _adjustments(sets or [])}
    body |= {"job_id": checked(new_id)} if new_id else {}
    body |= {"name": name} if name else {}
    answer = door(context, hub, api_key).branch(job_id, body)
    return json.dumps(answer) if as_json else str(answer["job_id"])


def _adjustments(sets: list[str]) -> dict[str, Any]:
    """Return the tree that `--set a.b=1` spells; a value that is no JSON is text."""
    from agent.errors import BadJob
    from protocol.branching import dotted
    from protocol.jobspec import BadSpec

    pairs: dict[str, Any] = {}
    for item in sets:
        path, equals, text = item.partition("=")
        if not equals or not all(path.split(".")):
            raise BadJob(f"--set {item}: give PATH=VALUE, such as training.learning_rate=1e-4.")
        try:
            pairs[path] = json.loads(text)
        except ValueError:
            pairs[path] = text
    try:
        return dotted(pairs)
    except BadSpec as error:
        raise BadJob(f"--set {error}") from None
