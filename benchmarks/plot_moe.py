"""The time of the sparse layer against the number of experts, drawn from results of `bench_moe.py`.

python benchmarks/plot_moe.py moe.jsonl docs/images/moe_time.svg
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe & Ito (2008), told apart with any colour vision
COLORS = {1: "#0072B2", 2: "#D55E00", 4: "#009E73"}
GREY, BLACK = "#6b6b6b", "#1a1a1a"
PANEL_POINTS, LABEL_POINTS = 200.0, 10.0
"""Height of a panel, and what a label at the end of a curve takes of it [pt]."""

TITLES = {"forward": "Forward", "forward_backward": "Forward and backward"}

Line = Mapping[str, Any]


def draw(lines: Sequence[Line], path: Path) -> None:
    """One panel per pass: k = 1, 2, 4 and the dense layers of the same active width, beside loops and every expert.

    Raises:
        ValueError: no results of the layer.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    layers = [line for line in lines if "contestant" in line]
    if not any(line["contestant"].startswith("top") for line in layers):
        raise ValueError("Expected results of the layer, got none; run bench_moe.py with `--parts layer`.")
    with rc_context({"svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif", "axes.linewidth": 0.6}):
        figure = Figure(figsize=(7.6, 3.7), layout="constrained")
        for axes, way in zip(figure.subplots(1, 2), TITLES, strict=True):
            _panel(axes, [line for line in layers if line["pass"] == way])
            axes.set_title(TITLES[way], fontsize=10, loc="left")
        about = layers[0]
        sizes = f"{about['tokens']:,} tokens, D = {about['dim']}, F = {about['hidden']}, {about['dtype']}"
        figure.supxlabel(f"number of experts E        ({sizes})", fontsize=9)
        partial = path.with_name(f".{path.stem}.partial-{os.getpid()}{path.suffix}")
        figure.savefig(partial, dpi=200, metadata={"Date": None} if path.suffix == ".svg" else None)
    partial.replace(path)


def _panel(axes: Axes, lines: Sequence[Line]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    experts = sorted({line["experts"] for line in lines})
    labels: list[tuple[float, str, str]] = []
    dense: list[float] = []
    for k, color in COLORS.items():
        own = _curve(lines, f"top{k}")
        if not own:
            continue
        axes.plot(*zip(*own, strict=True), color=color, marker="o", markersize=3.5, linewidth=1.6, zorder=3)
        labels.append((own[-1][1], f"top-{k}", color))
        dense.append(median(line["dense_ms"] for line in lines if line["contestant"] == f"top{k}"))
        axes.plot(experts, [dense[-1]] * len(experts), color=color, linestyle=(0, (4, 3)), linewidth=0.9)
    loop = _curve(lines, "loop_top1")
    if loop:
        axes.plot(*zip(*loop, strict=True), color=GREY, marker="s", markersize=2.5, linewidth=0.9)
        labels.append((loop[-1][1], "loop, top-1", GREY))
    beside: dict[str, Any] = {"fontsize": 8.5, "textcoords": "offset points"}
    axes.annotate("dense layer of width kF", (experts[0], dense[-1]), (0, -10), color=GREY, **beside)
    for x, y in _curve(lines, "all_experts"):
        axes.plot([x], [y], color=BLACK, marker="D", markersize=4)
        axes.annotate("every expert run", (x, y), (-6, 0), ha="right", va="center", color=BLACK, **beside)
    axes.set_xlim(experts[0] * 0.85, experts[-1] * 3.4)
    low, high = axes.get_ylim()
    lowest = -math.inf
    for y, text, color in sorted(labels):
        height = PANEL_POINTS * math.log(y / low) / math.log(high / low)
        lowest = max(height, lowest + LABEL_POINTS)
        axes.annotate(text, (experts[-1], y), (6, lowest - height), va="center", color=color, **beside)
    axes.set_xticks(experts, [str(n) for n in experts])
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()
    axes.set_ylabel("time [ms]")
    axes.grid(axis="y", alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _curve(lines: Sequence[Line], contestant: str) -> list[tuple[int, float]]:
    return sorted((line["experts"], line["ms"]) for line in lines if line["contestant"] == contestant)


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    options.add_argument("results", type=Path, help="JSON lines of bench_moe.py")
    options.add_argument("figure", type=Path, help="SVG, PDF or PNG")
    chosen = options.parse_args()
    draw([json.loads(line) for line in chosen.results.read_text().splitlines()], chosen.figure)
