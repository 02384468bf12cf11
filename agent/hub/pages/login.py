"""The login of a hub that others can reach: its API key, once per browser."""

from urllib.parse import parse_qs

from nicegui import app
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from agent.hub.hub import Hub
from agent.hub.web import body_of

_FORM = """<!doctype html><html lang="en"><meta charset="utf-8"><title>FineTune Lab hub</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>body{font:16px system-ui,sans-serif;display:grid;place-items:center;min-height:90vh;color-scheme:light dark}
form{display:grid;gap:.8rem;width:min(24rem,90vw)}input,button{font:inherit;padding:.6rem}p{color:#c0392b;margin:0}</style>
<form method="post" action="/login"><h1>FineTune Lab hub</h1>
<label for="key">API key of this hub</label>
<input id="key" name="key" type="password" autocomplete="current-password" autofocus required>
%s<button>Log in</button></form></html>"""


def logged_in(request: Request, open_to_all: bool) -> bool:
    """Tell whether this browser may see the page."""
    return open_to_all or bool(request.session.get("known"))


def add(hub: Hub) -> None:
    """Serve `/login`."""

    async def show(request: Request) -> Response:
        return HTMLResponse(_FORM % "")

    async def enter(request: Request) -> Response:
        fields = parse_qs((await body_of(request, 4096)).decode(errors="replace"))
        if not await hub.keys.known(fields.get("key", [""])[0].strip()):
            return HTMLResponse(_FORM % "<p>That is not a key of this hub.</p>", 401)
        request.session["known"] = True
        return RedirectResponse("/", 303)

    app.add_route("/login", show, methods=["GET"])
    app.add_route("/login", enter, methods=["POST"])
