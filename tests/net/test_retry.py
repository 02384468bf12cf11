"""When to try again, and after how long."""

import itertools
import ssl
from collections.abc import Callable

import httpx
import pytest
from websockets.datastructures import Headers
from websockets.exceptions import (
    ConnectionClosedError,
    InvalidHandshake,
    InvalidMessage,
    InvalidStatus,
    InvalidUpgrade,
)
from websockets.frames import Close as CloseFrame
from websockets.http11 import Response

from agent.errors import Exit, IdentityTaken, KeyRefused, NotOurBackend, Refused, VersionRefused
from agent.net.retry import backoff, can_retry, certificate_fault, closed_for_good, refusal, retry_after
from protocol.messages import Close

URL = "wss://app.example/api/training/agent/connect"


def status(code: int, **headers: str) -> InvalidStatus:
    return InvalidStatus(Response(code, "", Headers(**headers)))


def http_status(code: int) -> httpx.HTTPStatusError:
    request = httpx.Request("GET", "https://app.example")
    return httpx.HTTPStatusError("x", request=request, response=httpx.Response(code, request=request))


def closed(code: int | None) -> ConnectionClosedError:
    frame = CloseFrame(code, "said so") if code is not None else None
    return ConnectionClosedError(frame, None)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError(),
        ConnectionResetError(),
        TimeoutError(),
        EOFError(),
        OSError(-2, "Name or service not known"),
        ssl.SSLCertVerificationError("self-signed certificate"),
        InvalidMessage("did not receive a valid HTTP response"),
        InvalidUpgrade("Upgrade", "h2c"),
        closed(None),
        closed(1012),
        httpx.ConnectError("x"),
        httpx.ReadTimeout("x"),
        *(made(code) for made in (status, http_status) for code in (408, 425, 429, 500, 502, 503, 504, 599)),
    ],
    ids=repr,
)  # fmt: skip
def test_what_may_heal_is_tried_again(error: Exception) -> None:
    assert can_retry(error)
    assert refusal(error, URL) is None


@pytest.mark.parametrize("made", [status, http_status])
@pytest.mark.parametrize("code", [200, 301, 302, 400, 401, 403, 404, 410, 426])
def test_what_a_person_must_mend_is_not(made: Callable[[int], Exception], code: int) -> None:
    assert not can_retry(made(code))


@pytest.mark.parametrize(
    "error", [RuntimeError("x"), KeyError("x"), KeyRefused("x"), ExceptionGroup("x", [OSError()])]
)
def test_a_defect_is_no_network(error: Exception) -> None:
    assert not can_retry(error)


def test_a_refusal_stays_what_it_is() -> None:
    error = KeyRefused("x")
    assert refusal(error, URL) is error
    assert refusal(RuntimeError("x"), URL) is None


@pytest.mark.parametrize(
    ("code", "kind", "exit_code"),
    [
        (401, KeyRefused, Exit.REFUSED),
        (403, KeyRefused, Exit.REFUSED),
        (404, NotOurBackend, Exit.NOT_OURS),
        (400, NotOurBackend, Exit.NOT_OURS),
        (200, NotOurBackend, Exit.NOT_OURS),
        (308, NotOurBackend, Exit.NOT_OURS),
    ],
)
def test_an_answer_that_no_dial_cures_has_its_name_and_exit_code(
    code: int, kind: type[Refused], exit_code: Exit
) -> None:
    refused = refusal(status(code, Location="https://login.example"), URL)
    assert type(refused) is kind
    assert refused.exit_code is exit_code
    assert URL in str(refused)
    assert str(refused).endswith(".")


@pytest.mark.parametrize(
    ("code", "kind", "exit_code"),
    [
        (Close.AUTH, KeyRefused, Exit.REFUSED),
        (Close.DISABLED, KeyRefused, Exit.REFUSED),
        (Close.UNKNOWN_AGENT, KeyRefused, Exit.REFUSED),
        (Close.OTHER_INSTALL, IdentityTaken, Exit.REFUSED),
        (Close.VERSION, VersionRefused, Exit.NOT_OURS),
        (Close.OVERSIZE, Refused, Exit.REFUSED),
        (4999, Refused, Exit.REFUSED),
    ],
)
def test_the_range_of_a_close_code_decides(code: int, kind: type[Refused], exit_code: Exit) -> None:
    refused = closed_for_good(code, "said so", URL)
    assert type(refused) is kind
    assert refused.exit_code is exit_code
    assert "said so" in str(refused)
    assert type(refusal(closed(code), URL)) is kind
    assert "no reason given" in str(closed_for_good(code, "", URL))


def test_an_old_agent_obeys_a_code_that_it_does_not_know() -> None:
    assert closed_for_good(4499, "", URL) is None
    assert closed_for_good(4500, "", URL) is not None
    assert closed_for_good(5000, "", URL) is None
    assert all((closed_for_good(code, "", URL) is not None) == (code >= 4500) for code in Close)


def test_waits_double_to_a_cap_and_are_spread() -> None:
    rounds = [list(itertools.islice(backoff(), 12)) for _ in range(200)]
    windows = [0.8, 2.4, 7.2, 21.6, 60, 60, 60, 60, 60, 60, 60, 60]
    for place, window in enumerate(windows):
        waits = [waits[place] for waits in rounds]
        assert 0 <= min(waits) < window / 5
        assert window * 4 / 5 < max(waits) <= window


@pytest.mark.parametrize(
    ("said", "seconds"),
    [("7", 7.0), ("0", 0.0), ("999999", 3600.0), ("Wed, 21 Oct 2026 07:28:00 GMT", 0.0), ("-5", 0.0), ("nan", 0.0)],
)  # fmt: skip
def test_what_a_busy_server_asks_for(said: str, seconds: float) -> None:
    assert retry_after(status(503, **{"Retry-After": said})) == seconds
    assert retry_after(status(503)) == 0.0
    assert retry_after(OSError()) == 0.0


def test_a_certificate_that_does_not_verify_is_told_apart() -> None:
    assert certificate_fault(ssl.SSLCertVerificationError("x"))
    assert not certificate_fault(ssl.SSLError("x"))
    assert not certificate_fault(InvalidHandshake("x"))
