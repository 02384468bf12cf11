"""Who may call the local API: token, Host and Origin."""

import hmac
import os
import secrets
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agent.local import TOKEN_FILE
from agent.setting_values import is_address, is_loopback

OPEN_PATHS = frozenset({"/health"})

PAGE_PATHS = ("/health", "/api/training/checkpoints/")
"""What the backend's page reads from the browser, beside `force-start`."""


def local_token(home: Path) -> str:
    """Return the token in ``home``; make it, for its owner's eyes only, if there is none."""
    path = home / TOKEN_FILE
    try:
        token = path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        token = ""
    if not token:
        token = secrets.token_urlsafe(32)
        # Written beside and moved, so that a crash leaves no half of a token.
        draft = path.with_name(f"{TOKEN_FILE}.{os.getpid()}")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as stream:
            stream.write(token + "\n")
        draft.replace(path)
    path.chmod(0o600)
    return token


class Guard:
    """The gate before every route."""

    def __init__(self, app: ASGIApp, *, token: str, open_: bool, backend_url: str, host: str) -> None:
        self._app = app
        self._token = token.encode()
        self._open = open_
        self._host = host
        parts = urlsplit(backend_url)
        self._page = f"{parts.scheme}://{parts.netloc}".lower() if parts.netloc else ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = Headers(scope=scope)
        method, path = str(scope["method"]), str(scope["path"])
        origin = headers.get("origin", "").lower()
        known = self._knows(headers)
        refusal: Response | None = None
        if not known and not self._is_ours(headers.get("host", "")):
            # A name that resolves to this machine may be an attacker's: a browser would count
            # his page and this API as one site (DNS rebinding).
            refusal = _refuse(403, "Call the agent by its address or as localhost.")
        elif origin and not self._may_read(origin, method, path, headers):
            refusal = _refuse(403, f"Pages of {origin} may not call this.")
        elif origin and method == "OPTIONS":
            refusal = _preflight(headers)
        elif not known and not self._open and not (path in OPEN_PATHS and method in ("GET", "HEAD")):
            refusal = _refuse(
                401, f"Send the token in AGENT_HOME/{TOKEN_FILE} as `Authorization: Bearer <token>`."
            )
            refusal.headers["WWW-Authenticate"] = "Bearer"
        if not origin:
            await (refusal or self._app)(scope, receive, send)
            return

        async def send_with_cors(message: Message) -> None:
            if message["type"] == "http.response.start" and origin == self._page:
                allow = [(b"access-control-allow-origin", origin.encode()), (b"vary", b"Origin")]
                message = {**message, "headers": [*message.get("headers", []), *allow]}
            await send(message)

        await (refusal or self._app)(scope, receive, send_with_cors)

    def _knows(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self._token)

    def _is_ours(self, host_header: str) -> bool:
        try:
            name = urlsplit(f"//{host_header}").hostname or ""
        except ValueError:
            return False
        return is_loopback(name) or is_address(name) or name == self._host.lower()

    def _may_read(self, origin: str, method: str, path: str, headers: Headers) -> bool:
        if not self._page or origin != self._page:
            return False
        wanted = headers.get("access-control-request-method", "") if method == "OPTIONS" else method
        if path.endswith("/force-start") and wanted == "POST":
            return True
        return wanted in ("GET", "HEAD") and path.startswith(PAGE_PATHS)


def _refuse(status: int, sentence: str) -> Response:
    return JSONResponse({"error": sentence}, status)


def _preflight(headers: Headers) -> Response:
    answer = Response(status_code=204)
    answer.headers["Access-Control-Allow-Methods"] = "GET, POST"
    answer.headers["Access-Control-Allow-Headers"] = "Authorization, Content-Type"
    answer.headers["Access-Control-Max-Age"] = "600"
    if headers.get("access-control-request-private-network") == "true":
        answer.headers["Access-Control-Allow-Private-Network"] = "true"
    return answer
