"""The loss, drawn."""

import math

from nicegui import ui

from agent.hub.points import Dot

MOST_DRAWN = 1500
"""Points of a line that are sent to the browser; of a longer curve every nth one."""


class LossChart:
    """Train and evaluation loss over steps; of each step the newest attempt's."""

    def __init__(self) -> None:
        self._lines: dict[str, dict[int, tuple[int, float]]] = {"train_loss": {}, "eval_loss": {}}
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
        for line in self._lines.values():
            line.clear()

    def add(self, dots: list[Dot]) -> None:
        """Take points in; draw if they changed anything."""
        changed = False
        for dot in dots:
            for name, line in self._lines.items():
                value = dot.values.get(name)
                if value is None or not math.isfinite(value):
                    continue
                old = line.get(dot.step)
                if old is None or old[0] <= dot.attempt:
                    line[dot.step] = (dot.attempt, value)
                    changed = True
        if changed:
            for series, line in zip(self._chart.options["series"], self._lines.values(), strict=True):
                series["data"] = _thin(sorted((step, value) for step, (_, value) in line.items()))
            self._chart.update()


def _thin(points: list[tuple[int, float]]) -> list[list[float]]:
    """Return at most MOST_DRAWN points, the last one always among them."""
    stride = max(1, math.ceil(len(points) / MOST_DRAWN))
    return [list(point) for point in points[(len(points) - 1) % stride :: stride]]
