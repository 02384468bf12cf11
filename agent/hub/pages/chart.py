"""The loss, drawn."""

import math
from bisect import insort

from nicegui import ui

from agent.hub.points import Dot

MOST_DRAWN = 1500
"""Points of a line that are sent to the browser; of a longer curve every nth one."""


class _Line:
    """Values by step, of each step the newest attempt's."""

    def __init__(self) -> None:
        self._values: dict[int, tuple[int, float]] = {}
        self._steps: list[int] = []

    def put(self, step: int, attempt: int, value: float) -> bool:
        """Take a value in; return whether it is the newest of its step."""
        old = self._values.get(step)
        if old is not None and old[0] > attempt:
            return False
        self._values[step] = (attempt, value)
        if old is None:
            # Steps nearly always come in order: a long curve is not sorted again for each of them.
            if self._steps and step < self._steps[-1]:
                insort(self._steps, step)
            else:
                self._steps.append(step)
        return True

    def thin(self) -> list[list[float]]:
        """Return at most MOST_DRAWN points, the last one always among them."""
        stride = max(1, math.ceil(len(self._steps) / MOST_DRAWN))
        return [
            [step, self._values[step][1]] for step in self._steps[(len(self._steps) - 1) % stride :: stride]
        ]


class LossChart:
    """Train and evaluation loss over steps; of each step the newest attempt's."""

    def __init__(self) -> None:
        self._lines = {"train_loss": _Line(), "eval_loss": _Line()}
        self._chart = ui.echart(
            {
                "animation": False,
                "color": ["#3b6fe0", "#e08a3b"],
                "grid": {"left": 56, "right": 16, "top": 36, "bottom": 40},
                "legend": {"top": 0, "textStyle": {"color": "#8a93a3"}},
                "tooltip": {"trigger": "axis"},
                "xAxis": {
                    "type": "value",
                    "name": "step",
                    "nameLocation": "middle",
                    "nameGap": 26,
                    "min": "dataMin",
                },
                "yAxis": {"type": "value", "scale": True, "splitLine": {"lineStyle": {"opacity": 0.3}}},
                "dataZoom": [{"type": "inside", "filterMode": "none"}],
                "series": [
                    {
                        "name": "train",
                        "type": "line",
                        "showSymbol": False,
                        "lineStyle": {"width": 1.5},
                        "data": [],
                    },
                    {"name": "evaluation", "type": "line", "symbolSize": 6, "data": []},
                ],
            }
        ).classes("w-full h-80")

    def restart(self) -> None:
        """Forget what was drawn."""
        self._lines = {name: _Line() for name in self._lines}

    def add(self, dots: list[Dot]) -> None:
        """Take points in; draw if they changed anything."""
        changed = False
        for dot in dots:
            for name, line in self._lines.items():
                value = dot.values.get(name)
                if value is not None and math.isfinite(value):
                    changed |= line.put(dot.step, dot.attempt, value)
        if changed:
            for series, line in zip(self._chart.options["series"], self._lines.values(), strict=True):
                series["data"] = line.thin()
            self._chart.update()
