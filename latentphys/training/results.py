"""A table over runs: the settings in which they differ and what came out; runs that differ in the seed alone are one.

Rows come from `latentphys.info_run.table`: the run, its state and step, settings in which the runs differ, its best
figure, and its last figures on held-out data, which begin with ``test/``.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from latentphys.info_run import is_run

Row = Mapping[str, Any]
SEED = "trainer.seed"
SPREAD = " ±"
"""Ends the name of a figure's spread over seeds, which stands behind the figure."""
_FIRST = ("run", "state", "step")


def find_runs(paths: Sequence[str | Path]) -> list[Path]:
    """The run directories among some folders and below them, each once, in order of their names.

    Raises:
        ValueError: a path without a run.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        below = [file.parent for file in sorted(path.rglob("config.json")) if is_run(file.parent)]
        if not below:
            raise ValueError(f"Expected a run directory or a folder of them, got {path}, without any run in it.")
        found += [run for run in below if run not in found]
    return found


def is_figure(name: str) -> bool:
    """Whether a column is something measured, and no setting."""
    return name == "best" or name.startswith("test/")


def over_seeds(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows that differ in nothing but the seed as one: the mean of each figure over the seeds, and its spread.

    The spread is the standard deviation of a sample (n − 1); there is none of a single run. A run that is not done
    takes no part in means and keeps a row of its own. Rows are as they were where no two differ in the seed alone.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        settings = {k: v for k, v in row.items() if k not in (*_FIRST, SEED) and not is_figure(k)}
        own = "" if row["state"] == "done" else str(row["run"])
        groups.setdefault(json.dumps([settings, own], sort_keys=True, default=str), []).append(row)
    if all(len(group) == 1 for group in groups.values()):
        return [dict(row) for row in rows]
    return [_summary(group) for group in groups.values()]


def _summary(group: Sequence[Row]) -> dict[str, Any]:
    first = group[0]
    summary: dict[str, Any] = {}
    for name, value in first.items():
        if name == SEED:
            summary[SEED] = ", ".join(str(row[SEED]) for row in group)
        elif is_figure(name):
            values = [float(row[name]) for row in group if _is_number(row.get(name))]
            summary[name] = mean(values) if values else None
            summary[name + SPREAD] = stdev(values) if len(values) > 1 else None
        else:
            summary[name] = value
    if len(group) > 1:
        summary["run"] = f"{len(group)} runs such as {first['run']}"
    return summary


def ordered(rows: Sequence[Row], column: str) -> list[dict[str, Any]]:
    """Rows by a column, smallest first; those without a number there come last.

    Raises:
        ValueError: no row has the column.
    """
    columns = _columns(rows)
    if column not in columns:
        raise ValueError(f"Expected a column to sort by out of {', '.join(columns)}, got {column!r}.")
    return [dict(row) for row in sorted(rows, key=lambda row: _key(row.get(column)))]


def _key(value: Any) -> tuple[int, float, str]:
    if _is_number(value) and math.isfinite(value):
        return 0, float(value), ""
    return (1, 0.0, value) if isinstance(value, str) else (2, 0.0, "")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _columns(rows: Sequence[Row]) -> list[str]:
    """All columns: what the run is, settings, figures."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    rank = {name: (0 if name in _FIRST else 2 if is_figure(name) else 1) for name in names}
    return sorted(names, key=lambda name: rank[name])


def as_csv(rows: Sequence[Row]) -> str:
    """Rows as CSV with a header; empty where a row has no value."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _columns(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(dict(row) for row in rows)
    return text.getvalue()


def as_json(rows: Sequence[Row]) -> str:
    """Rows as a JSON array; numbers that are not finite are null."""
    clean = [
        {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()}
        for row in rows
    ]
    return json.dumps(clean, indent=1, default=str) + "\n"


def show(rows: Sequence[Row]) -> None:
    """Print rows as a table; a figure and its spread share a column."""
    from rich.console import Console
    from rich.table import Table

    if not rows:
        return
    table = Table(box=None, pad_edge=False)
    columns = [name for name in _columns(rows) if not name.endswith(SPREAD)]
    for name in columns:
        table.add_column(name, justify="right" if is_figure(name) or name == "step" else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row, name) for name in columns))
    console = Console()
    if not console.is_terminal:  # a file has no margin
        console.width = 10_000
    console.print(table, markup=False)


def _cell(row: Row, name: str) -> str:
    value = row.get(name)
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    spread = row.get(name + SPREAD)
    return text if spread is None else f"{text}{SPREAD} {spread:.2g}"
