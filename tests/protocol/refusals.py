"""The tables of `protocol/README.md` that say what an agent does at each close code, status and refusal.

They are made by asking the agent's own code about every one. ``python -m tests.protocol.refusals`` writes them
into the file.
"""

import re
from pathlib import Path

import httpx
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosedError, InvalidStatus
from websockets.frames import Close as CloseFrame
from websockets.http11 import Response

import protocol
from agent.errors import Refused
from agent.net import client
from agent.net.choice import Polls
from agent.net.retry import can_retry, closed_for_good
from agent.net.websocket import decided, wrong_subprotocol
from protocol.messages import Close
from tests.protocol import answers
from tests.protocol.answers import grouped, table

README = Path(protocol.__file__).parent / "README.md"
URL = "{address}"
WHEN = {
    1000: "a backend that gives no reason",
    1001: "the backend leaves",
    1002: "the backend's library found a fault in the stream of bytes; also no HELLO within 10 s",
    1006: "the connection was lost without a closing frame",
    1009: "a frame was larger than the backend takes",
    1011: "a fault in the backend",
    1012: "a deployment",
    1013: "the backend cannot store now",
    Close.DRAIN: "a deployment, after GOAWAY",
    Close.STALE: "a newer (boot, attempt) owns the id; the reason names it as `boot <n> attempt <n>`",
    Close.GAP: "a record came before those in front of it",
    Close.SLOW: "the agent does not take what is sent",
    Close.MALFORMED: "a frame cannot be read, or comes where it may not",
    Close.RATE: "too much at once; say in the reason what",
    Close.AUTH: "the key was revoked",
    Close.DISABLED: "the agent was switched off by its user",
    Close.UNKNOWN_AGENT: "the agent was deleted by its user",
    Close.OTHER_INSTALL: "another install uses the id",
    Close.VERSION: "no version in common",
    Close.OVERSIZE: "a frame larger than allowed, again and again",
}
"""When a backend sends a code; the one column that no code of the agent knows."""


def _dialled(error: Exception, was_ours: bool) -> tuple[str, str]:
    """Return what an agent does about an upgrade that did not come about, and what its user reads."""
    judged = decided(error, URL, was_ours=was_ours)
    if isinstance(judged, Refused):
        return f"no; exit code {int(judged.exit_code)}", str(judged)
    assert was_ours or can_retry(error)
    when = {0.0: "yes", 7.0: "yes; `Retry-After` in seconds is obeyed"}
    said = str(error).rstrip(".")
    return when.get(judged, f"yes, after {judged:g} s at least"), f"{said}; dialling again in {{n}} s"


def _upgrade(status: int, was_ours: bool = False) -> tuple[str, ...]:
    headers = Headers({"Location": "{location}", "Retry-After": "7"})
    again, said = _dialled(InvalidStatus(Response(status, "", headers)), was_ours)
    return again, said.replace(str(status), "{status}")


def upgrade_table() -> str:
    """Return the table of answers to the upgrade that are no conversation."""
    return _upgrades(was_ours=False)


def upgrade_later_table() -> str:
    """Return the same for an agent that was welcomed before."""
    return _upgrades(was_ours=True)


def _upgrades(was_ours: bool) -> str:
    other = ("101 with another subprotocol or none", *_dialled(wrong_subprotocol(URL), was_ours))
    rows = grouped(range(200, 600), lambda status: _upgrade(status, was_ours))
    return table(("status", "dials again", "the user reads"), [other, *rows])


def _closed(code: int) -> tuple[str, ...]:
    refused = closed_for_good(code, "{reason}", URL)
    if refused is None:
        assert can_retry(ConnectionClosedError(CloseFrame(code, ""), None))
        return "yes", "{reason}; dialling again in {n} s"
    return f"no; exit code {int(refused.exit_code)}", str(refused).replace(str(code), "{code}")


def close_codes_table() -> str:
    """Return the table of close codes."""
    rows = []
    for code in sorted(WHEN):
        name = Close(code).name.lower() if code in set(Close) else ""
        rows.append((str(int(code)), name, WHEN[code], *_closed(code)))
    known = set(Close)
    for lo, hi in ((4000, 4499), (4500, 4999)):
        others = {_closed(code) for code in range(lo, hi + 1) if code not in known}
        assert len(others) == 1, others
        rows.append((f"other {lo}-{hi}", "", "a code of a newer backend", *others.pop()))
    return table(("code", "name", "sent when", "dials again", "the user reads"), rows)


def _poll(status: int) -> tuple[str, ...]:
    try:
        answer = httpx.Response(status, json={"error": "{error}"})
        client._read(answer, answer.content, "GET {route}")
    except client.RestError as error:
        try:
            Polls(URL).failed(error, 0.0, no_socket=True)
        except Refused as refused:
            return f"no; exit code {int(refused.exit_code)}", str(refused).replace(str(status), "{status}")
        return "yes", f"poll: {error}".replace(str(status), "{status}")
    return "polled", ""


def poll_table() -> str:
    """Return the table of answers to an agent's first poll, where a poll is all that it has."""
    return table(("status", "polls again", "the user reads"), grouped(range(200, 600), _poll))


def _rows(status: int) -> tuple[str, ...]:
    request = httpx.Request("GET", "https://backend.example")
    error = httpx.HTTPStatusError("", request=request, response=httpx.Response(status, request=request))
    if status < 300:
        return ("taken; size and sha256 are checked", "")
    if can_retry(error):
        return (
            "yes, up to 8 times in a row without a byte",
            "data set transfer broke off (HTTP {status}); going on",
        )
    return (
        "no: the job fails with reason `data`",
        "The data set of job {id} could not be fetched from {address}: HTTP {status}.",
    )


def dataset_table() -> str:
    """Return the table of answers to the fetch of a data set."""
    return table(("status", "asks again", "the user reads"), grouped(range(200, 600), _rows))


TABLES = {
    "upgrade": upgrade_table,
    "upgrade-later": upgrade_later_table,
    "close-codes": close_codes_table,
    "appends": answers.appends_table,
    "poll": poll_table,
    "claim": answers.claim_table,
    "hosted": answers.hosted_table,
    "dataset": dataset_table,
}


def between(name: str, text: str) -> str:
    """Return what stands between the markers of a table."""
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, re.DOTALL)
    assert found is not None, f"no markers for {name}"
    return found[1]


def write() -> None:
    """Put the tables into the file."""
    text = README.read_text(encoding="utf-8")
    for name, made in TABLES.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        text = text.replace(f"{begin}{between(name, text)}{end}", f"{begin}{made()}{end}")
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
