"""One HTTP client for the REST side: what may have been done is told from what was surely not done."""

import logging
from collections.abc import Callable, Mapping
from http.client import responses
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import anyio
import msgspec

from agent.net.retry import LOOPBACK, RETRY_AFTER_MOST, system_trust
from protocol.codec import UNREADABLE
from protocol.rest import HEADER_AGENT

if TYPE_CHECKING:
    import httpx

# httpx is imported with the first request: it takes longer than the rest of the way to the first dial.

CONNECT_WITHIN = 10.0
ANSWER_WITHIN = 30.0
"""Seconds for an answer; the platform's own limit for a write is 25."""
IN_ALL = 2
"""Times that for the whole exchange: a line that lets a byte through now and then must not hold it for ever."""
ANSWER_MOST = 32 << 20
"""Bytes of an answer. The largest that is asked for is a page of a log."""
JSON = "application/json"
MSGPACK = "application/msgpack"


class RestError(Exception):
    """A request that did not come to an answer that can be used; ``str()`` says why."""


class Unreached(RestError):
    """Nothing was sent, or the server refused before it did anything: it can simply be sent again."""

    def __init__(self, why: str, retry_after: float = 0.0) -> None:
        super().__init__(why)
        self.retry_after = retry_after


class Unclear(RestError):
    """It may have been done: no answer came, or one that a gateway on the way may have written."""

    def __init__(self, why: str, status: int = 0, *, late: bool = False, own: bool = False) -> None:
        super().__init__(why)
        self.status = status
        self.own = own
        """As of `Said`."""
        self.late = late
        """The server may be at it still: it was given up by whoever waited."""


class Said(RestError):
    """The server says no, with a status below 500."""

    def __init__(self, status: int, error: str, body: Mapping[str, Any], *, own: bool = False) -> None:
        super().__init__(f"HTTP {status}: {error}")
        self.status = status
        self.error = error
        self.body = body
        self.own = own
        """The backend's own sentence, and not the page of a proxy or of a host where it is not at the moment."""

    @property
    def gone(self) -> bool:
        """Whether the backend says that what was asked for is not there any more: not to be asked again."""
        return self.own and self.status in (404, 410)


class RestClient:
    """Requests to one backend. Use with ``async with``, or close it."""

    def __init__(
        self,
        backend_url: str,
        *,
        key: Callable[[], str],
        agent_id: str,
        user_agent: str,
        answer_within: float = ANSWER_WITHIN,
    ) -> None:
        self.base = backend_url.rstrip("/")
        self.calls = 0
        """Requests made with the API key, which the platform counts: 100 a minute."""
        self.answered = 0
        """Requests that were answered with a plain yes."""
        self._key = key
        self._headers = {HEADER_AGENT: agent_id, "User-Agent": user_agent, "Accept": JSON}
        self._within = answer_within
        self._client: httpx.AsyncClient | None = None

    async def close(self) -> None:
        """Hang up."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    async def get(self, path: str, headers: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Ask with the API key. Raises RestError."""
        return await self.call("GET", path, headers=headers)

    async def call(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        token: str = "",
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
    ) -> dict[str, Any]:
        """Send one request and return its JSON object. Without ``token`` the API key goes with it.

        ``content`` is a body of records, in place of a JSON ``body``. Raises RestError.
        """
        import httpx

        if self._client is None:
            # A line for every request would be all that is left to read of the agent's log.
            logging.getLogger("httpx").setLevel(logging.WARNING)
            direct = urlsplit(self.base).hostname in LOOPBACK
            self._client = httpx.AsyncClient(
                headers=self._headers,
                verify=system_trust(),
                timeout=httpx.Timeout(self._within, connect=CONNECT_WITHIN),
                follow_redirects=False,
                trust_env=not direct,
            )
        sent = dict(headers or {})
        if not token:
            self.calls += 1
        sent["Authorization"] = f"Bearer {token or self._key()}"
        data = content
        if content is not None:
            sent["Content-Type"] = MSGPACK
        elif body is not None:
            data = msgspec.json.encode(body)
            sent["Content-Type"] = JSON
        elif method != "GET":
            data = b""
        url, what = self.base + path, f"{method} {path}"
        try:
            with anyio.fail_after(IN_ALL * self._within):
                async with self._client.stream(method, url, content=data, headers=sent) as answer:
                    found = _read(answer, await _whole(answer, what), what)
                    self.answered += answer.status_code == 200
                    return found
        except (httpx.InvalidURL, UnicodeEncodeError) as error:
            # An id or a token that fits no request: a fault of whoever made it, and of no other job.
            raise Unreached(f"{what} cannot be asked: {_said(error)}") from None
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            raise Unreached(f"{self.base} cannot be reached: {_said(error)}") from None
        except (httpx.HTTPError, TimeoutError) as error:
            late = isinstance(error, httpx.TimeoutException | TimeoutError)
            raise Unclear(f"{what} got no answer: {_said(error)}", late=late) from None


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__


async def _whole(answer: "httpx.Response", what: str) -> bytes:
    """Return the body. Raises Unclear before more than `ANSWER_MOST` bytes of it are held."""
    parts, size = list[bytes](), 0
    async for part in answer.aiter_bytes():
        size += len(part)
        if size > ANSWER_MOST:
            raise Unclear(f"{what}: the answer is larger than {ANSWER_MOST} bytes", answer.status_code)
        parts.append(part)
    return b"".join(parts)


def _read(answer: "httpx.Response", content: bytes, what: str) -> dict[str, Any]:
    status = answer.status_code
    try:
        body = msgspec.json.decode(content)
    except UNREADABLE:
        body = None
    said = body.get("error") if isinstance(body, dict) else None
    error = str(said or "")
    # "Not Found" and nothing else is what a framework says of any path that it does not know.
    own = isinstance(said, str) and said not in ("", responses.get(status))
    if status == 429:
        # Counted before anything is done. The platform names no time; its window is a minute.
        raise Unreached(f"{what}: too many requests", _seconds(answer.headers.get("Retry-After", ""), 60.0))
    if status >= 500:
        raise Unclear(f"{what}: HTTP {status} {error}".rstrip(), status, late=status == 504, own=own)
    if status >= 300:
        raise Said(status, error or answer.reason_phrase, body if isinstance(body, dict) else {}, own=own)
    if not isinstance(body, dict):
        # A proxy wrote it: a page to log in to the network, say.
        raise Unclear(f"{what}: the answer is no JSON object", status)
    return {**body, "http_status": status}


def _seconds(text: str, default: float) -> float:
    return min(float(text), RETRY_AFTER_MOST) if text.isascii() and text.isdigit() else default
