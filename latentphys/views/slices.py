"""Planes through the middle of the box: truth, rollout and the error between them, over time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Bool, Float

from latentphys.fields import State
from latentphys.grid import Grid
from latentphys.views import quantities, scene

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage


@dataclass(frozen=True)
class Plane:
    """The velocity on the plane of cells through the middle of the box.

    Args:
        u: velocity [m/s].
        solid: True in solids.
        grid: the box.
        axis: the axis normal to the plane, 0, 1 or 2.
        time: t [s].
    """

    u: Float[np.ndarray, "3 a b"]
    solid: Bool[np.ndarray, "a b"]
    grid: Grid
    axis: int
    time: float

    @property
    def speed(self) -> Float[np.ma.MaskedArray, "a b"]:
        """|u| [m/s], masked in solids."""
        return np.ma.masked_array(np.linalg.norm(self.u, axis=0), self.solid)

    def error(self, truth: Plane) -> Float[np.ma.MaskedArray, "a b"]:
        """|u − u_truth| [m/s], masked in solids."""
        return np.ma.masked_array(np.linalg.norm(self.u - truth.u, axis=0), self.solid)


def plane(state: State, axis: int = 1) -> Plane:
    """Cut a state through the middle.

    Args:
        state: one state.
        axis: the axis normal to the plane; default y.

    Raises:
        ValueError: no such axis.
    """
    if axis not in (0, 1, 2):
        raise ValueError(f"Expected axis 0, 1 or 2, got {axis}.")
    middle = state.grid.shape[axis] // 2
    solid = ~state.geometry.fluid.cpu().numpy()
    return Plane(
        quantities.velocity(state).take(middle, axis + 1), solid.take(middle, axis), state.grid, axis, float(state.time)
    )


def draw(
    axes: Axes,
    values: np.ndarray,
    grid: Grid,
    normal: int,
    colors: str,
    limits: tuple[float, float],
    aspect: Literal["equal", "auto"] = "equal",
) -> AxesImage:
    """Draw numbers on a plane of a box, by default in true proportions; what is masked or no number is grey, as solids.

    Args:
        values: numbers on the plane, (a, b) along the two other axes.
        normal: the axis normal to the plane.
    """
    import matplotlib

    first, second = (a for a in range(3) if a != normal)
    scale, unit = scene.readable(max(grid.lengths), "m")
    width, height = grid.lengths[first] / scale, grid.lengths[second] / scale
    image = axes.imshow(
        values.T,
        origin="lower",
        extent=(0, width, 0, height),
        cmap=matplotlib.colormaps[colors].with_extremes(bad=scene.SOLID_COLOR),
        vmin=limits[0],
        vmax=limits[1],
        interpolation="nearest",
        aspect=aspect,
    )
    for axis, length in ((axes.xaxis, width), (axes.yaxis, height)):
        axis.set_ticks([0, length / 2, length], labels=["0", f"{length / 2:.3g}", f"{length:.3g}"])
    axes.set_xlabel(f"{'xyz'[first]} [{unit}]")
    axes.set_ylabel(f"{'xyz'[second]} [{unit}]")
    axes.label_outer()
    return image


def slices(
    truth: Sequence[State], rollout: Sequence[State] | None = None, axis: int = 1, vrmse: Sequence[float] | None = None
) -> Figure:
    """The speed |u| [m/s] on a mid plane: truth, rollout and the error |u − u_truth|, one row per time.

    Truth and rollout share one colour scale, the errors another; both start at zero. Without a rollout: the truth
    alone, side by side.

    Args:
        truth: states, one per row.
        rollout: states at the same times on the same grid.
        axis: the axis normal to the plane; default y.
        vrmse: error of the whole box at each time, for the titles.

    Raises:
        ValueError: no state, another number of states, or another grid.
    """
    from matplotlib.figure import Figure

    _check(truth, rollout, vrmse)
    true = [plane(state, axis) for state in truth]
    other = [plane(state, axis) for state in rollout] if rollout is not None else []
    speeds = quantities.color_limits([cut.speed.compressed() for cut in (*true, *other)])
    rows, columns = (len(true), 3) if other else (-(-len(true) // 2), min(2, len(true)))
    box = true[0].grid
    width, height = (n for a, n in enumerate(box.lengths) if a != axis)
    panel = 2.3 if other else 3.2
    size = (panel * columns + 0.6, panel * height / width * rows + 0.25 * rows + 1.1)
    figure = Figure(figsize=size, dpi=scene.DPI, layout="compressed")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    bar: dict[str, Any] = {"location": "bottom", "aspect": 40, "pad": 0.02, "shrink": 0.9}
    if other:
        errors = [ours.error(theirs) for ours, theirs in zip(other, true, strict=True)]
        wrong = quantities.color_limits([error.compressed() for error in errors])
        for row, (ours, theirs, error) in enumerate(zip(other, true, errors, strict=True)):
            draw(grid[row, 0], theirs.speed, box, axis, scene.SPEED_COLORS, speeds)
            draw(grid[row, 1], ours.speed, box, axis, scene.SPEED_COLORS, speeds)
            draw(grid[row, 2], error, box, axis, scene.ERROR_COLORS, wrong)
            grid[row, 0].set_title(f"{'truth, ' if row == 0 else ''}t = {theirs.time:.3g} s", fontsize=9)
            grid[row, 1].set_title("rollout" if row == 0 else "", fontsize=9)
            number = "" if vrmse is None else f"VRMSE {vrmse[row]:.3g}"
            grid[row, 2].set_title(", ".join(filter(None, ["error" if row == 0 else "", number])), fontsize=9)
        bar |= {"largest": speeds[1]}
        scene.color_bar(figure, grid[:, :2], scene.SPEED_COLORS, speeds, "speed |u|", "m/s", **bar)
        bar |= {"aspect": 19}
        scene.color_bar(figure, grid[:, 2], scene.ERROR_COLORS, wrong, "|u − u_truth|", "m/s", **bar)
        return figure
    for axes in grid.flat[len(true) :]:
        axes.remove()
    for axes, cut in zip(grid.flat, true, strict=False):
        draw(axes, cut.speed, box, axis, scene.SPEED_COLORS, speeds)
        axes.set_title(f"t = {cut.time:.3g} s", fontsize=9)
    drawn = list(grid.flat[: len(true)])
    scene.color_bar(figure, drawn, scene.SPEED_COLORS, speeds, "speed |u|", "m/s", **bar)
    return figure


def _check(truth: Sequence[State], rollout: Sequence[State] | None, vrmse: Sequence[float] | None) -> None:
    if not truth:
        raise ValueError("Expected at least one state, got none.")
    for name, given in (("rollout states", rollout), ("VRMSE", vrmse)):
        if given is not None and len(given) != len(truth):
            raise ValueError(f"Expected as many {name} as true states, {len(truth)}, got {len(given)}.")
    for state in rollout or ():
        if state.grid != truth[0].grid:
            raise ValueError(f"Expected truth and rollout on one grid, got {truth[0].grid} and {state.grid}.")
