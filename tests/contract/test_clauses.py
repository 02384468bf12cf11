"""Every clause has a scenario, every scenario a clause, and a backend that does not keep one fails it."""

import ast
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve
from websockets.typing import Subprotocol

from protocol.codec import Codec
from protocol.messages import SUBPROTOCOL_MSGPACK, Goaway, Heartbeat, Welcome
from tests.contract.backend import Backend, Job, Someone
from tests.contract.clauses import clauses, number_of
from tests.contract.test_connecting import test_c06_welcome_is_the_first_word as c06
from tests.contract.test_connecting import test_c11_hello_comes_within_ten_seconds as c11
from tests.contract.test_wanted import test_c41_silence_ends_a_connection as c41


def scenarios() -> list[int]:
    found = []
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and (number := number_of(node.name)) is not None:
                found.append(number)
    return found


def test_every_clause_has_one_scenario_and_every_scenario_its_clause() -> None:
    assert sorted(scenarios()) == sorted(clauses())


def test_a_clause_is_a_sentence() -> None:
    for number, sentence in clauses().items():
        assert sentence.endswith("."), f"C{number}: {sentence}"


class SocketAlone(Backend):
    """A backend without routes."""

    def job_of(self, agent: Someone, **fields: Any) -> Job:
        return Job("j", "t")


@contextmanager
def saying(*messages: Any, stays: bool = False) -> Iterator[Backend]:
    """A backend that answers HELLO with these frames and closes."""
    codec = Codec(SUBPROTOCOL_MSGPACK)

    def converse(socket: ServerConnection) -> None:
        try:
            if messages:
                socket.recv()
            for message in messages:
                socket.send(codec.encode(message))
            if stays:
                socket.recv()
        except ConnectionClosed:
            pass

    with serve(converse, "127.0.0.1", 0, subprotocols=[Subprotocol(SUBPROTOCOL_MSGPACK)]) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with SocketAlone(f"http://127.0.0.1:{server.socket.getsockname()[1]}", "k", None) as backend:
                yield backend
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(("scenario", "said"), [(c11, []), (c41, [Welcome("s", [])])])
def test_who_hangs_up_at_once_is_found_out(scenario: Callable[[Backend], None], said: list[Any]) -> None:
    with saying(*said) as backend, pytest.raises(AssertionError, match="closed after less than"):
        scenario(backend)


def test_heartbeats_alone_may_come_before_welcome() -> None:
    with saying(Heartbeat(1), Welcome("s", []), stays=True) as backend:
        c06(backend)
    with saying(Goaway("later"), Welcome("s", []), stays=True) as backend, pytest.raises(AssertionError):
        c06(backend)
