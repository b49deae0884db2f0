"""Any field over time: planes through the middle of a box, or maps of a sphere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from latentphys import operators
from latentphys.fields import FieldSpec, State
from latentphys.sphere import Sphere
from latentphys.views import scene, slices

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIGNED_COLORS = "RdBu_r"
"""What has both signs: white at zero."""


@dataclass(frozen=True)
class Quantity:
    """What is drawn of a field: the numbers in cells, their symbol and unit, and their colours."""

    values: Sequence[np.ndarray]
    symbol: str
    unit: str

    @property
    def signed(self) -> bool:
        """Whether zero lies well inside the range, so that it deserves a colour of its own."""
        low, high = self.range
        return low < 0 < high and min(-low, high) > 0.1 * (high - low)

    @property
    def range(self) -> tuple[float, float]:
        """What all but a few in a thousand of the values lie in."""
        numbers = np.concatenate([values[np.isfinite(values)] for values in self.values])
        low, high = (float(q) for q in np.quantile(numbers, (0.002, 0.998)))
        return (low, high) if low < high else (low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0))

    @property
    def limits(self) -> tuple[float, float]:
        """Colour limits, the same for all times."""
        low, high = self.range
        return (-max(-low, high), max(-low, high)) if self.signed else (low, high)

    @property
    def colors(self) -> str:
        return SIGNED_COLORS if self.signed else scene.SPEED_COLORS


def quantity(states: Sequence[State], spec: FieldSpec) -> Quantity:
    """A scalar as it is, a vector or flux as its magnitude; not a number in solids."""
    values = [_cells(state, spec) for state in states]
    if spec.kind == "scalar":
        return Quantity(values, spec.name.replace("_", " "), spec.unit)
    unit = spec.unit if spec.kind == "vector" else {"m3/s": "m/s", "Wb": "T"}.get(spec.unit, f"{spec.unit} / m²")
    return Quantity(values, f"|{spec.name.replace('_', ' ')}|", unit)


def _cells(state: State, spec: FieldSpec) -> np.ndarray:
    values = state.fields[spec.name].detach().cpu().double()
    if spec.kind == "flux":
        values = operators.cell_velocity(values, state.grid)
    cells = values.numpy() if spec.kind == "scalar" else np.linalg.norm(values.numpy(), axis=0)
    if isinstance(state.place, Sphere) or state.geometry.is_empty:
        return cells
    return np.where(state.geometry.fluid.cpu().numpy(), cells, np.nan)


def cuts(states: Sequence[State], spec: FieldSpec) -> Figure:
    """A field at several times: on the plane through the middle of the box, or on the whole sphere.

    The plane is normal to y, or to the axis that is one cell thick.

    Args:
        states: one panel each, all on one domain.
        spec: the field.
    """
    shown = quantity(states, spec)
    return _maps(states, shown) if isinstance(states[0].place, Sphere) else _planes(states, shown)


def _planes(states: Sequence[State], shown: Quantity) -> Figure:
    from matplotlib.figure import Figure

    grid = states[0].grid
    thin = [axis for axis, n in enumerate(grid.shape) if n == 1]
    normal = thin[-1] if thin else 1
    width, height = (length for axis, length in enumerate(grid.lengths) if axis != normal)
    columns = min(2, len(states))
    rows = -(-len(states) // columns)
    aspect = min(2.5, max(0.25, height / width))
    size = (3.2 * columns + 0.6, 3.2 * aspect * rows + 0.25 * rows + 1.1)
    figure = Figure(figsize=size, dpi=scene.DPI, layout="compressed")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes in panels.flat[len(states) :]:
        axes.remove()
    for axes, state, values in zip(panels.flat, states, shown.values, strict=False):
        plane = values.take(grid.shape[normal] // 2, normal)
        proportions: Literal["equal", "auto"] = "equal" if aspect == height / width else "auto"
        slices.draw(axes, plane, grid, normal, shown.colors, shown.limits, proportions)
        axes.set_title(f"t = {state.time:.3g} s", fontsize=9)
    _bar(figure, list(panels.flat[: len(states)]), shown)
    return figure


def _maps(states: Sequence[State], shown: Quantity) -> Figure:
    """Equal-area maps (Mollweide), north up, longitude 180° in the middle."""
    from matplotlib.figure import Figure

    sphere = states[0].place
    assert isinstance(sphere, Sphere)
    longitude = np.linspace(-np.pi, np.pi, sphere.nlon + 1)
    inner = np.pi / 2 - sphere.colatitudes.numpy()
    latitude = np.concatenate([[np.pi / 2], 0.5 * (inner[1:] + inner[:-1]), [-np.pi / 2]])
    columns = min(2, len(states))
    rows = -(-len(states) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.5 * rows + 0.8), dpi=scene.DPI, layout="compressed")
    panels = figure.subplots(rows, columns, squeeze=False, subplot_kw={"projection": "mollweide"})
    for axes in panels.flat[len(states) :]:
        axes.remove()
    style: dict[str, Any] = {"cmap": shown.colors, "vmin": shown.limits[0], "vmax": shown.limits[1]}
    for axes, state, values in zip(panels.flat, states, shown.values, strict=False):
        axes.pcolormesh(longitude, latitude, values, rasterized=True, **style)
        axes.set_title(f"t = {state.time:.3g} s", fontsize=9)
        axes.set_xticks([])
        axes.set_yticks(np.radians([-60, -30, 0, 30, 60]))
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3, linewidth=0.4)
    _bar(figure, list(panels.flat[: len(states)]), shown)
    return figure


def _bar(figure: Figure, panels: Any, shown: Quantity) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    low, high = shown.limits
    largest = max(abs(low), abs(high))
    scale, unit = scene.readable(largest, shown.unit) if shown.unit in ("m/s", "m", "T") else (1.0, shown.unit)
    mappable = ScalarMappable(Normalize(low / scale, high / scale), shown.colors)
    label = shown.symbol if unit == "1" else f"{shown.symbol} [{unit}]"
    figure.colorbar(mappable, ax=panels, label=label, location="bottom", aspect=40, pad=0.02, shrink=0.9, extend="both")
