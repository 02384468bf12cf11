import multiprocessing
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from agent.runtime.bytequeue import ByteQueue, make_queue
from agent.runtime.leftovers import read_leftovers
from agent.trainer import line as line_module
from agent.trainer.line import Line
from protocol.worker import (
    LEFTOVERS,
    MAX_EVENT,
    Cancel,
    Committed,
    Note,
    Numbered,
    Order,
    Pause,
    Warm,
    encoder,
    event_decoder,
)

SOON = 30.0
"""Seconds after which a wait has failed."""


class Agent:
    """The agent's ends of both queues, in this process."""

    def __init__(self) -> None:
        ctx = multiprocessing.get_context("spawn")
        self.orders: ByteQueue = make_queue(ctx)
        self.events: ByteQueue = make_queue(ctx)

    def hear(self) -> Numbered:
        return event_decoder.decode(self.events.get())

    def texts(self, count: int) -> list[str]:
        """Hear so many notes, committing each."""
        texts = []
        for _ in range(count):
            numbered = self.hear()
            assert isinstance(numbered.event, Note)
            texts.append(numbered.event.text)
            self.order(Committed(numbered.number))
        return texts

    def order(self, order: Order) -> None:
        self.orders.put(encoder.encode(order))

    def die(self) -> None:
        self.orders.close_writer()
        self.events.close_reader()


@pytest.fixture
def agent() -> Iterator[Agent]:
    agent = Agent()
    yield agent
    agent.die()


def say(line: Line, *texts: str) -> None:
    for text in texts:
        line.say(Note("info", text))


def left(folder: Path) -> list[tuple[int, int, str]]:
    return [
        (numbered.attempt, numbered.number, numbered.event.text)
        for numbered, _ in read_leftovers(folder)
        if isinstance(numbered.event, Note)
    ]


def test_events_are_numbered_within_their_attempt(agent: Agent, tmp_path: Path) -> None:
    line = Line(agent.orders, agent.events)
    line.say(Warm(1, 0.5))
    assert agent.hear() == Numbered(0, 0, Warm(1, 0.5))
    line.begin(3, 7, str(tmp_path))
    say(line, "a", "b")
    assert agent.hear() == Numbered(3, 7, Note("info", "a"))
    assert agent.hear() == Numbered(3, 8, Note("info", "b"))
    assert not line.flush(0.01)
    agent.order(Committed(7))
    agent.order(Committed(8))
    assert line.flush(SOON)
    line.close()
    assert list(tmp_path.iterdir()) == []


def test_orders_are_taken_in_order(agent: Agent) -> None:
    line = Line(agent.orders, agent.events)
    assert line.orders() == []
    assert line.wait_order(0.01) is None
    agent.order(Pause())
    agent.order(Committed(1))
    agent.order(Cancel())
    assert line.wait_order(SOON) == Pause()
    assert line.wait_order(SOON) == Cancel()
    agent.order(Pause())
    while not (orders := line.orders()):
        pass
    assert orders == [Pause()]


def test_an_order_that_cannot_be_read_is_told_and_the_next_is_obeyed(agent: Agent, tmp_path: Path) -> None:
    line = Line(agent.orders, agent.events)
    line.begin(1, 1, str(tmp_path))
    agent.orders.put(b"\x91\x63")
    agent.order(Cancel())
    assert line.wait_order(SOON) == Cancel()
    assert "could not be read" in agent.texts(1)[0]


def test_the_end_of_the_agent_is_noticed_by_those_who_wait(agent: Agent) -> None:
    line = Line(agent.orders, agent.events)
    assert not line.parent_gone
    death = threading.Timer(0.05, agent.die)
    death.start()
    assert line.wait_order(SOON) is None
    assert line.parent_gone
    death.join()


def test_another_parent_is_a_dead_agent(agent: Agent) -> None:
    assert Line(agent.orders, agent.events, parent_pid=1 << 30).parent_gone


def test_what_was_not_committed_is_left_on_disk_after_what_was_left_before(
    agent: Agent, tmp_path: Path
) -> None:
    line = Line(agent.orders, agent.events)
    line.begin(1, 1, str(tmp_path / "new"))
    say(line, "a", "b", "c")
    assert agent.texts(1) == ["a"]
    agent.die()
    assert line.wait_order(SOON) is None
    line.close()
    line.close()
    # Whether the commit of "a" was read before the end is open; nothing after it may be missing.
    assert left(tmp_path / "new")[-2:] == [(1, 2, "b"), (1, 3, "c")]

    again = Agent()
    line = Line(again.orders, again.events)
    line.begin(2, 1, str(tmp_path / "new"))
    again.die()
    say(line, *(str(number) for number in range(20)))  # no small array any more
    line.close()
    assert left(tmp_path / "new")[-22:] == [(1, 2, "b"), (1, 3, "c")] + [
        (2, number + 1, str(number)) for number in range(20)
    ]
    assert [path.name for path in (tmp_path / "new").iterdir()] == [LEFTOVERS]
    data = (tmp_path / "new" / LEFTOVERS).read_bytes()
    assert isinstance(msgspec.msgpack.decode(data, type=list[Numbered]), list)


@pytest.mark.parametrize("disk", ["has room", "is full"])
def test_with_the_agent_silent_events_go_to_disk_and_all_arrive_in_order(
    agent: Agent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: str
) -> None:
    monkeypatch.setattr(line_module, "KEEP_BYTES", 50_000)
    folder = tmp_path / "leftovers"
    if disk == "is full":
        folder.write_text("no folder can be made here")
    line = Line(agent.orders, agent.events)
    line.begin(1, 1, str(folder))
    texts = [f"{number} " + "x" * 2000 for number in range(1500)]  # three times what the pipe holds
    say(line, *texts)
    assert line._kept_bytes <= 50_000
    if disk == "has room":
        assert [path.name[:7] for path in folder.iterdir()] == [".unsent"]
    assert agent.texts(1500) == texts
    assert line.flush(SOON)
    say(line, "last")
    assert agent.texts(1) == ["last"]
    line.close()
    if disk == "has room":
        assert list(folder.iterdir()) == []


def test_the_order_holds_while_the_agent_now_and_then_makes_room(agent: Agent, tmp_path: Path) -> None:
    line = Line(agent.orders, agent.events)
    line.begin(1, 1, str(tmp_path))
    texts = [f"{number} " + "x" * 3000 for number in range(3000)]
    heard: list[str] = []
    listener = threading.Thread(target=lambda: heard.extend(agent.texts(3000)))
    for number, text in enumerate(texts):
        say(line, text)
        if number == 400:  # the pipe is full: the thread that sends is waiting
            listener.start()
    listener.join(SOON)
    assert heard == texts


def test_what_lies_in_the_overflow_is_left_behind_too(
    agent: Agent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_module, "KEEP_BYTES", 1000)
    line = Line(agent.orders, agent.events)
    line.begin(1, 1, str(tmp_path))
    texts = [str(number) * 20 for number in range(300)]
    say(line, *texts)
    agent.die()
    line.close()
    assert [text for _, _, text in left(tmp_path)] == texts
    assert [path.name for path in tmp_path.iterdir()] == [LEFTOVERS]


def test_an_agent_that_commits_nothing_is_waited_for_only_so_long(
    agent: Agent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_module, "CLOSE_LIMIT", 0.05)
    line = Line(agent.orders, agent.events)
    line.begin(1, 1, str(tmp_path))
    say(line, "a")
    line.close()
    assert left(tmp_path) == [(1, 1, "a")]


def test_an_event_too_large_to_send_is_replaced_by_a_sentence(agent: Agent, tmp_path: Path) -> None:
    line = Line(agent.orders, agent.events)
    line.begin(1, 1, str(tmp_path))
    say(line, "x" * MAX_EVENT, "next")
    first, second = agent.texts(2)
    assert "too large to send" in first
    assert second == "next"
