"""The web page (NiceGUI): agents and jobs, live. Nothing here is imported by a hub without a page."""

import secrets
from pathlib import Path
from typing import Any

import nicegui.storage
from fastapi import FastAPI
from nicegui import ui
from starlette.types import ASGIApp, Receive, Scope, Send

from agent.hub.app import bare
from agent.hub.hub import Hub
from agent.hub.pages import job, login, overview
from agent.hub.pages.guard import Guard

MACHINE_PATHS = ("/api/", "/health")


class Doors:
    """Agents and scripts go straight to the routes, browsers to the page.

    The page's session middleware would otherwise keep a session for every REST call.
    """

    def __init__(self, machines: ASGIApp, browsers: ASGIApp, app: FastAPI) -> None:
        self._machines = machines
        self._browsers = browsers
        self.app = app
        """NiceGUI finds its server by this attribute."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["path"].startswith(MACHINE_PATHS):
            await self._machines(scope, receive, send)
        else:
            await self._browsers(scope, receive, send)


def _secret(path: Path) -> str:
    """Return what signs the session cookies; it stays the same, so that a restart logs nobody out."""
    if not path.exists():
        path.write_text(secrets.token_urlsafe(32))
        path.chmod(0o600)
    return path.read_text()


def with_page(hub: Hub, open_to_all: bool) -> Any:
    """Return the application with the page; ``open_to_all``: only this machine can reach it, so no login."""
    nicegui.storage.Storage.path = hub.data_dir / "page"
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    login.add(hub)
    overview.add(hub, open_to_all)
    job.add(hub, open_to_all)
    ui.run_with(
        app,
        title="FineTune Lab hub",
        dark=None,
        show_welcome_message=False,
        storage_secret=_secret(hub.data_dir / "page_secret"),
        session_middleware_kwargs={"same_site": "strict", "max_age": 30 * 86_400},
    )
    return Doors(bare(hub), Guard(app, loopback_only=open_to_all), app)
