"""The numbers behind the pictures: speed, vortices and solids, in cells and at the corners of cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float
from scipy.ndimage import gaussian_filter

from latentphys import operators
from latentphys.fields import State
from latentphys.grid import Geometry, Grid

# Less smears throats between grains shut or open, more shows the stairs of the voxels.
_SMOOTHING = 0.7

Wall = Literal["mirror", "flip"]


def velocity(state: State) -> Float[np.ndarray, "3 nx ny nz"]:
    """Velocity at cell centres [m/s].

    Raises:
        ValueError: a batch of states, or one without a velocity.
    """
    flux = state.velocity
    if flux.ndim != 4:
        raise ValueError(f"Expected one state with a flux of 4 axes, got {tuple(flux.shape)}; pick a sample first.")
    u = operators.cell_velocity(flux.detach().cpu().double(), state.grid)
    return u.numpy()


def speed(state: State) -> Float[np.ndarray, "nx ny nz"]:
    """Magnitude of the velocity at cell centres |u| [m/s]."""
    return np.linalg.norm(velocity(state), axis=0)


def solid(geometry: Geometry) -> Float[np.ndarray, "nx ny nz"]:
    """1 in solids and 0 in fluid."""
    return (~geometry.fluid).double().cpu().numpy()


def _padded(cells: np.ndarray, grid: Grid, wall: Wall) -> np.ndarray:
    """The cells with one more layer on each side: the other end's, or what the wall makes of the nearest."""
    for axis, (low, high) in enumerate(grid.boundaries):
        width = [(0, 0)] * cells.ndim
        width[axis - 3] = (1, 1)
        cells = np.pad(cells, width, mode="wrap" if low == "periodic" else "edge")
        for side, boundary in ((0, low), (-1, high)):
            if wall == "flip" and boundary == "no_slip":
                np.moveaxis(cells, axis - 3, 0)[side] *= -1
    return cells


def corners(cells: np.ndarray, grid: Grid, wall: Wall = "mirror") -> np.ndarray:
    """Cell values at the corners of the cells, the mean of the eight around each: (…, nx + 1, ny + 1, nz + 1).

    Pictures need values up to the sides of the box. With wall "flip" they vanish on no-slip sides, as a velocity does.
    """
    values = _padded(cells, grid, wall)
    for axis in (-3, -2, -1):
        n = values.shape[axis]
        values = 0.5 * (values.take(range(n - 1), axis) + values.take(range(1, n), axis))
    return values


def corner_velocity(state: State) -> Float[np.ndarray, "3 cx cy cz"]:
    """Velocity at the nx + 1, ny + 1, nz + 1 corners of the cells [m/s]; zero on no-slip sides."""
    return corners(velocity(state), state.grid, wall="flip")


def corner_solid(geometry: Geometry) -> Float[np.ndarray, "cx cy cz"]:
    """Share of solid round each corner of a cell, smoothed a little so that its level 0.5 is a smooth surface."""
    mode: list[Literal["wrap", "nearest"]] = ["wrap" if p else "nearest" for p in geometry.grid.periodic]
    return corners(gaussian_filter(solid(geometry), _SMOOTHING, mode=mode), geometry.grid)


def q_criterion(state: State) -> Float[np.ndarray, "nx ny nz"]:
    """Q = ½(‖Ω‖² − ‖S‖²) [1/s²]: positive where rotation outweighs strain, the core of a vortex.

    Equals −½ tr(∇u ∇u) for a solenoidal velocity (Hunt, Wray & Moin 1988).
    """
    grid = state.grid
    u = _padded(velocity(state), grid, wall="flip")
    inner = (slice(1, -1),) * 3
    gradient = [[np.gradient(u[i], grid.spacing[j], axis=j)[inner] for j in range(3)] for i in range(3)]
    q: np.ndarray = -0.5 * sum(gradient[i][j] * gradient[j][i] for i in range(3) for j in range(3))
    return np.where(state.geometry.fluid.cpu().numpy(), q, 0.0)


def in_fluid(cells: np.ndarray, geometry: Geometry) -> np.ndarray:
    """The values of fluid cells, one after another."""
    return cells[geometry.fluid.cpu().numpy()]


def color_limits(values: Sequence[np.ndarray]) -> tuple[float, float]:
    """One colour scale for several sets of magnitudes: zero to what one number in 500 exceeds.

    A few extreme cells must not take all the colours.
    """
    numbers = np.concatenate(values)
    high = float(np.quantile(numbers, 0.998)) if numbers.size else 0.0
    return 0.0, high if high > 0 else 1.0
