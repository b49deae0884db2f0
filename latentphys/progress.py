"""Progress bars for long work: one look everywhere, plain lines where there is no terminal."""

from __future__ import annotations

from typing import Any


def progress_bar(show: bool = True, *columns: str) -> Any:
    """A rich progress display; further columns are rich's format strings over a task's fields."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description:<22}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        *(TextColumn(column) for column in columns),
        console=Console(stderr=True),
        disable=not show,
    )
