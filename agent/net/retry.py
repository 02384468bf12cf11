"""When to try again, and after how long."""

import random
import re
import ssl
import sys
from collections.abc import Iterator

from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from agent.errors import (
    IdentityTaken,
    KeyRefused,
    NotOurBackend,
    Refused,
    VersionRefused,
)
from protocol.messages import Close

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
"""Hosts that no proxy stands before."""
RETRY_STATUS = frozenset({408, 425, 429})
"""4xx answers that a later dial may not meet; every 5xx is another."""
RETRY_AFTER_MOST = 3600.0
"""Seconds: a longer wait that a server asks for is a mistake."""
FIRST, GROWTH = 0.8, 3.0
"""Of all agents that lose their backend at one moment, no 100 ms from the second second on may hold more than a
tenth of the dials. The first window is over by then, also for those that notice late; a window that grows by three
makes 0.56 dials a second and agent there. One that doubles from half a second makes 1.45."""
TLS_RETRY = 300.0
"""Seconds between dials while the certificate does not verify: the user must act, a clock may heal."""


def system_trust() -> ssl.SSLContext:
    """Return what requests verify certificates by: the system's authorities, as the socket does, or `SSL_CERT_FILE`'s.

    httpx by itself brings a list of its own, which does not know an authority that the owner has installed.
    """
    return ssl.create_default_context()


def can_retry(error: BaseException) -> bool:
    """Tell whether dialling again with the same settings could work."""
    if isinstance(error, Refused):
        return False
    if isinstance(error, InvalidStatus):
        status = error.response.status_code
        return status >= 500 or status in RETRY_STATUS
    # Start-up cost: httpx is not imported for this; where nobody has, this is no error of its.
    if (httpx := sys.modules.get("httpx")) is not None:
        if isinstance(error, httpx.HTTPStatusError):
            status = error.response.status_code
            return status >= 500 or status in RETRY_STATUS
        if isinstance(error, httpx.TransportError):
            return True
    # A handshake that does not parse was written by a proxy on the way.
    return isinstance(error, OSError | EOFError | TimeoutError | InvalidHandshake | ConnectionClosed)


def refusal(error: BaseException, url: str) -> Refused | None:
    """Return the named error for an answer that dialling again cannot cure, else None."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, InvalidStatus):
        refused = _by_status(error, url)
        if refused is not None:
            refused.status = error.response.status_code
        return refused
    if isinstance(error, ConnectionClosed) and error.rcvd is not None:
        return closed_for_good(error.rcvd.code, error.rcvd.reason, url)
    return None


def _by_status(error: InvalidStatus, url: str) -> Refused | None:
    status = error.response.status_code
    if status in (401, 403):
        return KeyRefused(
            f"{url} refused the API key (HTTP {status}). Make a key with the scope `training` on the platform's page "
            "and set it as API_KEY."
        )
    if 300 <= status < 400:
        return NotOurBackend(
            f"{url} answers with a redirect (HTTP {status}) to {error.response.headers.get('Location', 'elsewhere')}; "
            "a key is not sent there. Set BACKEND_URL to the final address."
        )
    if status < 500 and status not in RETRY_STATUS:
        return NotOurBackend(
            f"{url} has no socket for training agents (HTTP {status}). Check BACKEND_URL: it must be the address of a "
            "FineTune Lab backend or of `training-agent hub`."
        )
    return None


def closed_for_good(code: int, reason: str, url: str) -> Refused | None:
    """Return the named error for a close code that forbids another dial, else None."""
    if code < 4500 or code > 4999:
        return None
    said = reason or "no reason given"
    if code in (Close.AUTH, Close.DISABLED, Close.UNKNOWN_AGENT):
        return KeyRefused(
            f"{url} refused this agent: {said}. Check API_KEY and AGENT_ID on the platform's page."
        )
    if code == Close.OTHER_INSTALL:
        return IdentityTaken(
            f"{url}: another install uses this agent's id ({said}). Give this machine an AGENT_ID of its own."
        )
    if code == Close.VERSION:
        return VersionRefused(f"{url} does not speak this agent's protocol ({said}). Update the agent.")
    return Refused(f"{url} ended the connection for good (code {code}): {said}.")


def owner(reason: str) -> tuple[int, int] | None:
    """Return the (boot, attempt) that a close with 4008 names as the owner of this agent's id."""
    found = re.search(r"\bboot ([0-9]{1,15}) attempt ([0-9]{1,15})\b", reason)
    return (int(found[1]), int(found[2])) if found else None


def backoff(first: float = FIRST, cap: float = 60.0) -> Iterator[float]:
    """Yield waits in seconds, uniform over a window that grows by `GROWTH`, so that agents do not return together."""
    window = first
    while True:
        yield random.uniform(0, window)  # noqa: S311  # spreads load, keeps no secret
        window = min(GROWTH * window, cap)


def retry_after(error: BaseException) -> float:
    """Return the seconds that a refused upgrade asks to wait, 0 where it asks for none."""
    if not isinstance(error, InvalidStatus):
        return 0.0
    said = error.response.headers.get("Retry-After", "")
    # The form with a date is rare, and the clocks need not agree.
    return min(float(said), RETRY_AFTER_MOST) if said.isascii() and said.isdigit() else 0.0


def certificate_fault(error: BaseException) -> bool:
    """Tell whether the server's certificate does not verify: the user must know at once."""
    return isinstance(error, ssl.SSLCertVerificationError)
