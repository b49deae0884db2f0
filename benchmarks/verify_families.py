"""Every family held against numbers that nobody here made: closed forms, published tables, other people's solvers.

    python benchmarks/verify_families.py                      # the whole table, on two cores
    python benchmarks/verify_families.py --only mhd
    python benchmarks/verify_families.py --docs docs          # also writes docs/verification.md and its plots
    python benchmarks/verify_families.py --size large --device cuda

Each line is one number, here and there, with its error and the tolerance it is held to. The exit status is 1 if any is
off by more.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from machine import Results, describe, parser
from verification.case import Case, Plot, Result, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FAMILIES = (
    "open_channel",
    "porous",
    "convection",
    "passive_scalar",
    "mhd",
    "turbulence",
    "reaction_diffusion",
    "acoustics",
    "shallow_water_sphere",
)


def cases(only: str) -> list[Case]:
    """The cases whose family or name holds a text, in the order of the families."""
    found = [case for family in FAMILIES for case in import_module(f"verification.{family}").CASES]
    return [case for case in found if only in case.family or only in case.name]


def run(arguments: argparse.Namespace) -> int:
    results = Results("verify_families", arguments)
    done: list[tuple[Case, Result, float]] = []
    for case in cases(arguments.only):
        begin = time.perf_counter()
        result = case.run(arguments.device, arguments.size)
        done.append((case, result, time.perf_counter() - begin))
        results.say(f"{case.family}: {case.name} ({done[-1][2]:.0f} s)")
        for row in result.rows:
            results.add(row.quantity, figures(row) | {"family": case.family}, indent="  ")
    rows = [row for _, result, _ in done for row in result.rows]
    failed = [row for row in rows if not row.passed]
    if arguments.docs is not None:
        write_page(done, arguments)
    results.say(f"{len(rows) - len(failed)} of {len(rows)} within their tolerance; {sum(t for *_, t in done):.0f} s")
    return int(bool(failed))


def figures(row: Row) -> dict[str, object]:
    """A row as a JSON line has it."""
    return {
        "value": row.value,
        "reference": row.reference,
        "error": row.error,
        "tolerance": row.tolerance,
        "verdict": "pass" if row.passed else "FAIL",
        "source": row.source,
        "settings": row.settings,
    }


def write_page(done: Sequence[tuple[Case, Result, float]], arguments: argparse.Namespace) -> None:
    """The table and the plots as a page of the documentation."""
    about = describe(arguments.device)
    where = about.get("gpu") or f"{about['threads']} threads of {about['cpu']}"
    command = f"python benchmarks/verify_families.py --docs docs --size {arguments.size} --device {arguments.device}"
    lines = [
        "# Verification of the families",
        "",
        "Every family held against numbers that nobody here made. An error is relative to the reference, or absolute",
        "where that is 0. This page is written by",
        "",
        f"    {command}",
        "",
        f"here on {where}, PyTorch {about['torch']}, Python {platform.python_version()}, in "
        f"{sum(seconds for *_, seconds in done):.0f} s. Larger cases: `--size large --device cuda`.",
        "",
    ]
    images = arguments.docs / "images"
    images.mkdir(parents=True, exist_ok=True)
    for family in dict.fromkeys(case.family for case, *_ in done):
        own = [(case, result, seconds) for case, result, seconds in done if case.family == family]
        lines += [f"## {family.replace('_', ' ').capitalize()}", ""]
        lines += [
            "| quantity | here | reference | error | tolerance | settings | source |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in (row for _, result, _ in own for row in result.rows):
            numbers = [f"{row.value:.5g}", f"{row.reference:.5g}", _error(row), _percent(row, row.tolerance)]
            entries = [row.quantity, *numbers, row.settings, row.source]
            lines.append("| " + " | ".join(entry.replace("|", "\\|") for entry in entries) + " |")
        plots = [plot for _, result, _ in own for plot in result.plots]
        if plots:
            name = f"verification_{family}.png"
            draw(plots, images / name)
            lines += ["", f"![{'; '.join(plot.title for plot in plots)}](images/{name})"]
        lines.append("")
    page = arguments.docs / "verification.md"
    partial = page.with_name(f".{page.name}.partial-{os.getpid()}")
    partial.write_text("\n".join(lines))
    partial.replace(page)


def _error(row: Row) -> str:
    text = _percent(row, row.error)
    return text if row.passed else f"**{text}**"


def _percent(row: Row, error: float) -> str:
    is_absolute = row.reference == 0 or 0 < abs(error) < 1e-5
    text = f"{error:.1e}" if is_absolute else f"{100 * error:.2g}\u00a0%"
    return text.replace("-", "−")


def draw(plots: Sequence[Plot], path: Path) -> None:
    """The panels side by side, two in a row."""
    from matplotlib.figure import Figure

    columns = min(2, len(plots))
    rows = -(-len(plots) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.5 * rows), dpi=160, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat[len(plots) :]:
        axes.remove()
    for axes, plot in zip(panels.flat, plots, strict=False):
        _panel(axes, plot)
    partial = path.with_name(f".{path.stem}.partial-{os.getpid()}.png")
    figure.savefig(partial)
    partial.replace(path)


def _panel(axes: Axes, plot: Plot) -> None:
    # Okabe & Ito (2008), told apart with any colour vision
    colors = iter(("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00") * 4)
    for line in plot.lines:
        if line.is_reference:
            style = {"linestyle": "none", "marker": "o", "markersize": 4, "markerfacecolor": "none"}
            style |= {"linestyle": "--", "marker": ""} if len(line.x) > 40 else {}
            axes.plot(line.x, line.y, color="#1a1a1a", label=line.label, zorder=3, **style)  # type: ignore[arg-type]
        else:
            axes.plot(line.x, line.y, color=next(colors), label=line.label, linewidth=1.5)
    axes.set(title=plot.title, xlabel=plot.xlabel, ylabel=plot.ylabel, xscale=plot.xscale, yscale=plot.yscale)
    axes.title.set_fontsize(10)
    axes.legend(fontsize=8, frameon=False)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    options = parser("Hold every family against numbers that nobody here made.")
    options.add_argument("--size", choices=("small", "large"), default="small", help="(default %(default)s)")
    options.add_argument("--only", default="", metavar="TEXT", help="only cases whose family or name holds this")
    options.add_argument("--docs", type=Path, metavar="DIR", help="write verification.md and images/ into this folder")
    chosen = options.parse_args()
    if chosen.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit(f"Expected a device that PyTorch can use, got {chosen.device!r}.")
    sys.exit(run(chosen))
