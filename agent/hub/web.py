"""Requests in, answers out: bounded bodies, JSON, and refusals as `{"error": sentence}`."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from agent.hub.errors import Refusal, StoreFailed, StreamRefused
from agent.hub.hub import Hub
from protocol.codec import UNREADABLE

log = logging.getLogger("agent.hub")

T = TypeVar("T")
MOST_BODY = 8 * 1024 * 1024
"""Bytes of a JSON or MessagePack body."""

_encoder = msgspec.json.Encoder()


class Json(Response):
    """JSON; a number that is not finite is null."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return _encoder.encode(content)


Handler = Callable[[Request, Hub], Awaitable[Response]]


def handler(do: Handler) -> Callable[[Request], Awaitable[Response]]:
    """Give ``do`` the hub, and turn what it raises into answers."""

    async def answer(request: Request) -> Response:
        try:
            return await do(request, request.app.state.hub)
        except Refusal as refusal:
            return Json({"error": refusal.sentence, **refusal.extra}, refusal.status)
        except StreamRefused as refused:
            return Json({"error": str(refused)}, 410)
        except StoreFailed as failed:
            log.error("%s", failed)
            return Json({"error": f"{failed}. Try again later."}, 503, {"Retry-After": "10"})

    return answer


async def body_of(request: Request, limit: int = MOST_BODY) -> bytes:
    """Return the whole body; raises Refusal 413 before more than ``limit`` bytes are held."""
    too_much = Refusal(413, f"The body is larger than {limit} bytes.")
    said = request.headers.get("content-length", "")
    if said.isdigit() and int(said) > limit:
        raise too_much
    parts = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise too_much
        parts.append(part)
    return b"".join(parts)


async def json_of(request: Request) -> dict[str, Any]:
    """Return a JSON object; raises Refusal 400."""
    raw = await body_of(request)
    if not raw:
        raise Refusal(400, "Empty request body")
    try:
        value = msgspec.json.decode(raw)
    except UNREADABLE as error:
        raise Refusal(400, f"Invalid JSON in request body: {error}") from None
    if not isinstance(value, dict):
        raise Refusal(400, "The body must be a JSON object.")
    return value


def shaped(value: dict[str, Any], kind: type[T]) -> T:
    """Return ``value`` as a struct; raises Refusal 400 with the path of what does not fit."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        text, _, where = str(error).partition(" - at `$.")
        raise Refusal(400, f"{where.rstrip('`')}: {text}." if where else f"{text}.") from None


def whole(request: Request, name: str, default: int, most: int, least: int = 0) -> int:
    """Return a number from the query string, brought within its limits."""
    text = request.query_params.get(name)
    if text is None:
        return default
    try:
        return max(least, min(most, int(text)))
    except ValueError:
        raise Refusal(400, f"{name}: expected a whole number, found {text!r}.") from None
