"""The line that is drawn."""

from agent.hub.pages.chart import MOST_DRAWN, _Line


def test_the_newest_attempt_is_drawn_and_steps_ascend() -> None:
    line = _Line()
    for step in (1, 2, 3, 5):
        assert line.put(step, 1, float(step))
    assert line.put(4, 1, 4.0)
    assert line.put(3, 2, 30.0)
    assert not line.put(3, 1, 3.0)
    assert line.thin() == [[1, 1.0], [2, 2.0], [3, 30.0], [4, 4.0], [5, 5.0]]


def test_a_long_line_is_thinned_and_keeps_its_end() -> None:
    line = _Line()
    for step in range(MOST_DRAWN * 3 + 1):
        line.put(step, 1, float(step))
    thin = line.thin()
    assert len(thin) <= MOST_DRAWN
    assert thin[-1][0] == MOST_DRAWN * 3
