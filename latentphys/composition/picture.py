"""What α was chosen by, as a picture: scores over α, or the best α over a physical parameter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, StrMethodFormatter

from latentphys.composition.choices import scaled

_DARK, _CHOSEN, _BAND, _EDGE = "#1f3b57", "#c8553d", "#e9eef3", "#b8c4d0"

_SUBS = {False: (1.5, 2, 3, 5, 7), True: (2, 5)}
"""Ticks between the decades of a logarithmic axis: of less than one, and of more."""


def draw(alpha: float, about: Mapping[str, Any], path: Path) -> None:
    """Draw how an α was chosen.

    Args:
        alpha: the chosen one.
        about: of its `Choice`: with a ``curve`` of scores, or with the ``points`` of a fit.
        path: the PNG.
    """
    figure = Figure(figsize=(4.2, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if "curve" in about:
        _scores(axes, alpha, about)
    else:
        _fit(axes, alpha, about)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(which="both", labelsize=8)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(path, dpi=300)


def _scores(axes: Axes, alpha: float, about: Mapping[str, Any]) -> None:
    points = [(point["alpha"], point["score"]) for point in about["curve"] if point["score"] is not None]
    x, y = (np.array(column) for column in zip(*points, strict=True))
    in_bank = np.isin(x, about["bank"])
    axes.axvspan(-1, 1, fc=_BAND, ec=_EDGE, lw=0.6, label="between the endpoints")
    axes.plot(x, y, color=_DARK, lw=1.2)
    axes.plot(x[in_bank], y[in_bank], "o", color=_DARK, ms=3.5, label="bank")
    axes.plot(x[~in_bank], y[~in_bank], "o", color="white", mec=_DARK, ms=3, mew=0.8, label="refinement")
    axes.axvline(alpha, color=_CHOSEN, lw=1, ls="--")
    axes.plot([alpha], [about["score"]], "D", color=_CHOSEN, ms=5, label=f"chosen, α = {alpha:.3g}")
    if y.max() > 10 * y.min() > 0:
        axes.set_yscale("log")
    axes.set_xlabel("α", fontsize=9)
    axes.set_ylabel(f"rollout error over {about['frames']} frames\n(increment variance = 1)", fontsize=9)


def _fit(axes: Axes, alpha: float, about: Mapping[str, Any]) -> None:
    values = np.array([point["value"] for point in about["points"]])
    found = np.array([point["alpha"] for point in about["points"]])
    ends = np.array([*values, about["value"]])
    if about["map"] == "log":
        line = np.geomspace(ends.min(), ends.max(), 100)
        axes.set_xscale("log")
        for axis in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            axis(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_locator(LogLocator(subs=_SUBS[np.ptp(np.log10(ends)) > 1]))
    else:
        line = np.linspace(ends.min(), ends.max(), 100)
    sign, r = "+" if about["b"] >= 0 else "−", "" if about["r"] is None else f", r = {about['r']:.3f}"
    x = "ln p" if about["map"] == "log" else "p"
    label = f"α = {about['a']:.3g} {sign} {abs(about['b']):.3g} {x}{r}".replace("-", "−")
    axes.axhspan(-1, 1, fc=_BAND, ec=_EDGE, lw=0.6, label="between the endpoints")
    axes.plot(line, [about["a"] + about["b"] * scaled(v, about["map"]) for v in line], color=_DARK, lw=1.2, label=label)
    axes.plot(values, found, "o", color=_DARK, ms=3.5, label="best of each calibration flow")
    axes.plot([about["value"]], [alpha], "D", color=_CHOSEN, ms=5, label=f"chosen, α = {alpha:.3g}".replace("-", "−"))
    unit = "" if about["unit"] == "1" else f" [{about['unit']}]"
    axes.set_xlabel(f"p = {about['parameter']}{unit}", fontsize=9)
    axes.set_ylabel("α", fontsize=9)
