"""The REST client: whose word an answer is, and what it holds of one that is no answer."""

import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import anyio
import pytest

from agent.net import client
from agent.net.client import RestClient, RestError, Said, Unclear, Unreached
from agent.net.hosted import Memo
from agent.net.lines import Lines
from agent.net.memos import Memos
from protocol.messages import Lane
from protocol.session import Key
from tests.net.kept import Kept

PAGE = b"<html><head><title>404 Not Found</title></head><body><hr>nginx/1.24.0</body></html>"


class _Canned(BaseHTTPRequestHandler):
    """Answers with one status and body, whatever is asked."""

    status = 200
    body = b"{}"
    endless = 0
    pause = 0.0
    """Bytes that are sent again and again, and seconds between them."""

    def do_GET(self) -> None:
        self.send_response(self.status)
        if not self.endless:
            self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        try:
            self.wfile.write(self.body)
            while self.endless:
                self.wfile.write(bytes(self.endless))
                time.sleep(self.pause)
        except OSError:
            pass  # whoever asked has heard enough

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    _Canned.status, _Canned.body, _Canned.endless, _Canned.pause = 200, b"{}", 0, 0.0
    with ThreadingHTTPServer(("127.0.0.1", 0), _Canned) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def ask(url: str, path: str = "/any", within: float = 5.0, **more: str) -> RestError | None:
    """Ask once and return what came of it."""

    async def one() -> RestError | None:
        rest = RestClient(
            url, key=lambda: "k", agent_id="agent_0123", user_agent="test", answer_within=within
        )
        try:
            with anyio.fail_after(20):
                await rest.call("GET", path, **more)
        except RestError as error:
            return error
        finally:
            await rest.close()
        return None

    return anyio.run(one)


@pytest.mark.parametrize("status", [404, 410])
@pytest.mark.parametrize(
    ("body", "gone"),
    [
        (b'{"error": "Job not found"}', True),
        (PAGE, False),
        (b"The deployment could not be found on Vercel.\n\nDEPLOYMENT_NOT_FOUND", False),
        (b'{"error": {"code": "404", "message": "The deployment could not be found"}}', False),
        (b'{"error": "Not Found", "path": "/any"}', False),
        (b'{"message": "no Route matched with those values"}', False),
        (b'["error"]', False),
        (b"", False),
    ],
)
def test_only_the_backend_itself_says_that_a_job_is_gone(
    url: str, status: int, body: bytes, gone: bool
) -> None:
    _Canned.status, _Canned.body = status, body.replace(b"Not Found", b"Gone") if status == 410 else body
    said = ask(url)
    assert isinstance(said, Said) and (said.status, said.gone) == (status, gone)


def test_an_answer_without_an_end_is_given_up(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "ANSWER_MOST", 1 << 20)
    _Canned.endless = 1 << 16
    error = ask(url)
    # What was asked for may have been done all the same.
    assert isinstance(error, Unclear) and "larger than 1048576 bytes" in str(error)


def test_an_answer_that_comes_byte_by_byte_is_not_waited_for_for_ever(url: str) -> None:
    _Canned.endless, _Canned.pause = 1, 0.01
    error = ask(url, within=0.05)
    assert isinstance(error, Unclear) and error.late


@pytest.mark.parametrize(("path", "token"), [("/a\x00b", "t"), ("/any", "gêne")])
def test_what_fits_no_request_ends_nothing(url: str, path: str, token: str) -> None:
    error = ask(url, path, token=token)
    assert isinstance(error, Unreached) and "cannot be asked" in str(error)


@pytest.mark.parametrize("body", [b'{"total_lines": "many", "logs": []}', b'{"total_lines": 1, "logs": 5}'])
def test_a_page_of_a_log_that_is_none_is_asked_for_again(url: str, body: bytes) -> None:
    _Canned.body = body

    async def main() -> None:
        rest = RestClient(url, key=lambda: "k", agent_id="agent_0123", user_agent="test", answer_within=5.0)
        # Nothing is appended to a log that cannot be read, and nothing is remembered.
        lines = Lines(Memos(rest, Kept("job"), settle=0.0, patience=0.0))
        with pytest.raises(Unclear, match="no page of a log"):
            await lines.say(Key(7, "job", Lane.LOGS), Memo(), ["a line"])
        await rest.close()

    anyio.run(main)
