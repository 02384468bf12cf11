"""What all pages have."""

from collections.abc import Iterator
from contextlib import contextmanager

from nicegui import ui

_CSS = """
:root { --nicegui-default-padding: 0; }
body { background: #f5f6f8; }
body.body--dark { background: #14161a; }
.box { background: white; border: 1px solid #e2e5ea; border-radius: 10px; }
.body--dark .box { background: #1d2026; border-color: #2c3038; }
.quiet { color: #6b7280; }
.body--dark .quiet { color: #9aa3b2; }
.number { font-variant-numeric: tabular-nums; }
.log { font: 12px/1.5 ui-monospace, monospace; height: 18rem; background: #0f1115; color: #d6dae1; border-radius: 8px; }
.job-row:hover { background: rgba(90, 110, 160, .08); }
"""


@contextmanager
def frame(title: str) -> Iterator[None]:
    """Lay out a page under the hub's head line."""
    ui.add_css(_CSS)
    ui.page_title(f"{title} - FineTune Lab hub")
    with ui.column().classes("w-full max-w-6xl mx-auto px-4 py-5 gap-4"):
        with ui.row().classes("w-full items-baseline gap-3"):
            ui.link("FineTune Lab hub", "/").classes("text-xl font-semibold no-underline text-inherit")
            ui.label("your machines, your models").classes("quiet text-sm")
        yield


def heading(text: str) -> None:
    ui.label(text).classes("text-xs font-semibold uppercase tracking-wide quiet")
