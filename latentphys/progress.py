"""Progress bars for long work: one look everywhere, plain lines where there is no terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def progress_bar(show: bool = True, *columns: str) -> Any:
    """A rich progress display; further columns are rich's format strings over a task's fields."""
    from rich.console import Console, RenderableType
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    class Bar(Progress):
        def get_renderables(self) -> Iterator[RenderableType]:
            # without a terminal the bar is one line at the end: none for work that was refused before it began
            tasks = [task for task in self.tasks if self.console.is_terminal or task.completed]
            if tasks:
                yield self.make_tasks_table(tasks)

    return Bar(
        TextColumn("{task.description:<22}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        *(TextColumn(column) for column in columns),
        console=Console(stderr=True),
        disable=not show,
    )
