"""Progress bars for long work: one look everywhere, plain lines where there is no terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def progress_bar(show: bool = True, *columns: str) -> Any:
    """A rich progress display; further columns are rich's format strings over a task's fields,
    which take several lines where they have to."""
    from rich.console import Console, RenderableType
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column

    class Bar(Progress):
        """Without a terminal the bar is a line at the end, and no line for work that was refused before it began."""

        def shown(self) -> list[Task]:
            return [task for task in self.tasks if self.console.is_terminal or task.completed]

        def get_renderables(self) -> Iterator[RenderableType]:
            if self.shown():
                yield self.make_tasks_table(self.shown())

        def stop(self) -> None:
            if self.shown():
                super().stop()
            else:
                self.live.stop()

    return Bar(
        TextColumn("{task.description:<22}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        *(TextColumn(column, table_column=Column(overflow="fold")) for column in columns),
        console=Console(stderr=True),
        disable=not show,
    )
