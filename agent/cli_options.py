"""What the commands share: options, settings, and whom they ask. Prints nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from agent.config import NAMES, Settings, load_for_program
from agent.errors import BadSetting

if TYPE_CHECKING:
    from agent.cli_remote import Door, Hub

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
JobName = Annotated[str, typer.Argument(metavar="ID", help="The job's id, from `training-agent jobs`.")]
HubUrl = Annotated[
    str, typer.Option("--hub", metavar="URL", help="Ask this backend, not this machine's agent.")
]
HubKey = Annotated[
    str, typer.Option("--api-key", metavar="KEY", help="Key for --hub; else the setting API_KEY.")
]
JobPath = Annotated[
    Path,
    typer.Argument(metavar="JOB", help="A TrainingConfig in YAML or JSON, raw or normalised."),
]


Checkpoint = Annotated[
    str, typer.Option(metavar="PATH", help="Go on from this checkpoint; `best` for the best one.")
]


AcceptChanges = Annotated[
    bool,
    typer.Option(
        "--accept-changes", help="Go on although data, tokenizer, settings or versions have changed since."
    ),
]


class Given(msgspec.Struct, frozen=True):
    """What went before the command."""

    env_file: Path | None
    overrides: dict[str, str]
    warn: Callable[[str], None]
    """Takes what the settings warn of."""


def given(env_file: Path | None, home: Path | None, sets: list[str], warn: Callable[[str], None]) -> Given:
    """Return the options before the command; raises BadSetting for a --set that is no setting."""
    overrides = {"AGENT_HOME": str(home)} if home is not None else {}
    for item in sets:
        name, equals, value = item.partition("=")
        if not equals or name not in NAMES:
            raise BadSetting(name, "is no setting; --set takes NAME=VALUE", "command line")
        if name == "API_KEY":
            raise BadSetting(name, "is not taken here, where every user of this machine could read it")
        overrides[name] = value
    return Given(env_file, overrides, warn)


def settings_of(context: typer.Context) -> Settings:
    """Return the settings that the command line, the environment and the `.env` give."""
    before: Given = context.obj
    return load_for_program(before.env_file, before.overrides, before.warn)


def backend(context: typer.Context, url: str, api_key: str) -> "Hub":
    """Return the backend at ``url``, else at BACKEND_URL; closed when the program leaves."""
    from agent.cli_remote import Hub

    settings = settings_of(context)

    url = (url or settings.backend_url).rstrip("/")
    if not url:
        raise BadSetting("BACKEND_URL", "is `none`; give --hub URL")
    key = api_key or (settings.api_key.reveal() if settings.api_key is not None else "")
    if not key:
        raise BadSetting("API_KEY", "is not set; give it or --api-key")
    hub = Hub(url, key, allow_plain_http=settings.allow_plain_http)
    # The root's end: a command's own comes before its lines are printed.
    context.find_root().call_on_close(hub.close)
    return hub


def door(context: typer.Context, url: str, api_key: str) -> "Door":
    """Return the backend at ``url`` if one is given, else this machine's agent."""
    from agent.cli_remote import Local

    if url:
        return backend(context, url, api_key)
    local = Local(settings_of(context))
    context.find_root().call_on_close(local.close)
    return local
