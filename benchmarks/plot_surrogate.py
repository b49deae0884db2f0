"""Error against time of the surrogate and the solver, drawn from results of `bench_surrogate.py`.

python benchmarks/plot_surrogate.py surrogate.jsonl docs/images/surrogate_pareto.png
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Okabe & Ito (2008), told apart with any colour vision
SOLVER, SURROGATE, GREY = "#0072B2", "#D55E00", "#6b6b6b"
MARKERS = {"eager": "o", "compiled": "s", "pt2": "D", "onnx": "^", "torchscript": "v"}
HORIZONS = (1, 4, 16)

Line = Mapping[str, Any]


def draw(lines: Sequence[Line], path: Path) -> None:
    """A panel per family and horizon: each contestant a point; the solver's resolutions joined by a line.

    Raises:
        ValueError: no results of the part `pareto`.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    lines = [line for line in lines if line.get("part") == "pareto"]
    families = list(dict.fromkeys(line["family"] for line in lines))
    horizons = [n for n in HORIZONS if any(line["intervals"] == n for line in lines)]
    if not horizons:
        raise ValueError("Expected results of the part `pareto`, got none; run bench_surrogate.py.")
    with rc_context({"font.size": 9, "font.family": "sans-serif", "axes.linewidth": 0.6}):
        figure = Figure(figsize=(2.7 * len(horizons) + 1.2, 2.5 * len(families) + 0.6), layout="constrained")
        grid = figure.subplots(len(families), len(horizons), squeeze=False, sharex=True)
        for row, family in zip(grid, families, strict=True):
            for axes, n in zip(row, horizons, strict=True):
                _panel(axes, [x for x in lines if x["family"] == family and x["intervals"] == n])
                axes.set_title(f"{family.replace('_', ' ')}, {n} interval{'s' * (n > 1)}", fontsize=9, loc="left")
            row[0].set_ylabel("VRMSE")
        handles, labels = grid[0, -1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
        figure.supxlabel("time from the first state to the last [s]", fontsize=9)
        partial = path.with_name(f".{path.stem}.partial-{os.getpid()}{path.suffix}")
        figure.savefig(partial, dpi=200)
    partial.replace(path)


def _panel(axes: Any, lines: Sequence[Line]) -> None:
    at = {line["contestant"]: line for line in lines}
    axes.set_xscale("log")
    axes.margins(x=0.15)
    solver = sorted((int(name.removeprefix("solver_")), at[name]) for name in at if name.startswith("solver_"))
    spread = [[line["vrmse"] - line["vrmse_low"], line["vrmse_high"] - line["vrmse"]] for _, line in solver]
    axes.errorbar(
        [line["seconds"] for _, line in solver],
        [line["vrmse"] for _, line in solver],
        yerr=list(zip(*spread, strict=True)),
        color=SOLVER,
        marker="o",
        markersize=4,
        linewidth=1.2,
        elinewidth=0.7,
        label="solver",
    )
    for factor, line in solver:
        text = "full" if factor == 1 else f"1/{factor}"
        axes.annotate(text, (line["seconds"], line["vrmse"]), (5, 3), textcoords="offset points", fontsize=7.5)
    for name, marker in MARKERS.items():
        if name in at:
            x, y = at[name]["seconds"], at[name]["vrmse"]
            low, high = y - at[name]["vrmse_low"], at[name]["vrmse_high"] - y
            style: dict[str, Any] = {"markersize": 5, "markerfacecolor": "none", "elinewidth": 0.7, "linestyle": "none"}
            axes.errorbar(
                [x], [y], yerr=[[low], [high]], color=SURROGATE, marker=marker, label=f"surrogate, {name}", **style
            )
    top = max(line["vrmse_high"] for line in lines)
    axes.set_ylim(-0.03 * top, 1.08 * top)
    axes.axhline(at["persistence"]["vrmse"], color=GREY, linewidth=0.8, linestyle=(0, (4, 3)), label="persistence")


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("results", type=Path, help="JSON lines of bench_surrogate.py")
    parser.add_argument("out", type=Path, help="the picture")
    options = parser.parse_args()
    draw([json.loads(text) for text in options.results.read_text().splitlines()], options.out)


if __name__ == "__main__":
    main()
