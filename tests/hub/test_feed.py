"""News to the pages."""

from agent.hub.feed import MOST_KEPT, Feed
from agent.hub.points import Dot


def dot(step: int) -> Dot:
    return Dot(1, step, 0.0, 0.0, "", {})


def test_a_watch_hears_its_topic_while_it_is_open() -> None:
    feed = Feed()
    with feed.watching("job") as watch:
        feed.tell("other", [dot(1)])
        assert not watch.event.is_set()
        feed.tell("job", [dot(1)], ["line"])
        feed.tell("job", [dot(2)])
        assert watch.event.is_set()
        dots, lines, missed = watch.take()
        assert ([one.step for one in dots], lines, missed) == ([1, 2], ["line"], False)
        assert not watch.event.is_set()
        assert feed.watched("job")
    assert not feed.watched("job")


def test_a_watch_that_falls_behind_is_told_to_read_again() -> None:
    feed = Feed()
    with feed.watching("job") as watch:
        feed.tell("job", [dot(step) for step in range(MOST_KEPT)])
        feed.tell("job", [dot(0)])
        assert watch.take() == ([], [], True)
