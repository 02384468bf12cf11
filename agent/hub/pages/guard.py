"""Who may reach the page: it has buttons, and a browser carries any web site's requests."""

from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


def _name(host: str) -> str:
    return urlsplit(f"//{host}").hostname or ""


class Guard:
    """Refuses names that are not this machine's (DNS rebinding), and other sites' requests."""

    def __init__(self, app: ASGIApp, loopback_only: bool) -> None:
        self._app = app
        self._loopback_only = loopback_only

    def wrong(self, headers: Headers) -> str | None:
        """Return what is wrong with a request, or None."""
        host = headers.get("host", "")
        if self._loopback_only and _name(host) not in LOOPBACK_NAMES:
            return f"This page is served to this machine only, as localhost; not as {host!r}."
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return f"A page of {origin} may not use this one."
        return None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            wrong = self.wrong(Headers(scope=scope))
            if wrong is not None:
                response = PlainTextResponse(wrong, 403)
                if scope["type"] == "websocket":
                    await send({"type": "websocket.close", "code": 1008, "reason": wrong})
                else:
                    await response(scope, receive, send)
                return
        await self._app(scope, receive, send)
