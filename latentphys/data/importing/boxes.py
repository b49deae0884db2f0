"""Grids, times and field descriptions from what files say: coordinates, boundaries, names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from latentphys.data.creation import RESERVED
from latentphys.data.importing.source import ImportOptions
from latentphys.fields import FieldSpec
from latentphys.grid import Boundary, Grid

UNIFORM = 1e-4
"""Largest departure of a coordinate from an even spacing, in spacings."""

UNITS = {
    "velocity": "m/s",
    "momentum": "kg/(m2 s)",
    "vorticity": "1/s",
    "pressure": "Pa",
    "density": "kg/m3",
    "temperature": "K",
    "magnetic_field": "T",
    "force": "m/s2",
}
"""Units of fields in files that name none; dimensionless numbers are taken as numbers in these."""


def spacing(coordinates: np.ndarray, where: str) -> float:
    """Distance between evenly spaced points [m]; 0 for a single one.

    Raises:
        ValueError: coordinates that do not increase evenly, to 1e-4 of a spacing beyond their rounding.
    """
    if coordinates.ndim != 1:
        raise ValueError(f"Expected one row of coordinates in {where}, got shape {coordinates.shape}.")
    number = len(coordinates)
    if number < 2:
        return 0.0
    h = float(coordinates[-1] - coordinates[0]) / (number - 1)
    even = coordinates[0] + h * np.arange(number)
    rounding = 4 * float(np.finfo(np.float32).eps) * float(np.abs(coordinates).max())
    if h <= 0 or float(np.abs(coordinates - even).max()) > UNIFORM * h + min(rounding, 0.1 * h):
        raise ValueError(
            f"Expected evenly spaced, increasing coordinates in {where}, got steps from "
            f"{np.diff(coordinates).min():.6g} to {np.diff(coordinates).max():.6g}; interpolate the data first."
        )
    return h


def box(
    shape: Sequence[int],
    spacings: Sequence[float] | None,
    boundaries: Sequence[tuple[Boundary, Boundary]],
    options: ImportOptions,
    where: str,
) -> Grid:
    """The grid of data on one to three axes; axes that they lack are periodic and one cell thick.

    Such a cell is as thick as the finest of the others, so that cells stay close to cubes. Every sample is the value
    of a cell around it, wherever the file says its points are.

    Args:
        shape: number of samples along each axis the data have.
        spacings: distance of samples along each [m]; None where the files do not say: cubes, the longest edge 1 m.
        boundaries: the pair of each, where the user does not say.
        options: `lengths` and `boundaries` overrule what is given.
        where: the file, for messages.

    Raises:
        ValueError: lengths or boundaries for another number of axes, or an impossible grid.
    """
    number = len(shape)
    if not 1 <= number <= 3:
        raise ValueError(f"Expected data on one to three axes of space, got {number} in {where}.")
    if options.lengths is not None:
        if len(options.lengths) != number:
            raise ValueError(f"Expected {number} lengths for {where}, got {len(options.lengths)}.")
        spacings = [length / n for length, n in zip(options.lengths, shape, strict=True)]
    if spacings is None:
        spacings = [1.0 / max(shape)] * number
    if options.boundaries is not None:
        boundaries = options.boundaries[:number]
    varying = [h for n, h in zip(shape, spacings, strict=True) if n > 1]
    if not varying:
        raise ValueError(f"Expected an axis with more than one cell in {where}, got shape {tuple(shape)}.")
    thickness = min(varying)
    cells = [n for n in shape] + [1] * (3 - number)
    sizes = [h if n > 1 else thickness for n, h in zip(shape, spacings, strict=True)] + [thickness] * (3 - number)
    sides: list[Any] = [pair if n > 1 else ("periodic", "periodic") for n, pair in zip(shape, boundaries, strict=True)]
    sides += [("periodic", "periodic")] * (3 - number)
    try:
        return Grid((cells[0], cells[1], cells[2]), (sizes[0], sizes[1], sizes[2]), (sides[0], sides[1], sides[2]))
    except ValueError as error:
        raise ValueError(f"{error} (in {where})") from error


def frames(times: np.ndarray, where: str) -> np.ndarray:
    """Times t [s] of the frames of a trajectory, checked.

    Raises:
        ValueError: no times, or times that do not increase.
    """
    if times.ndim != 1 or not times.size:
        raise ValueError(f"Expected one row of times in {where}, got shape {times.shape}.")
    back = np.flatnonzero(np.diff(times) <= 0)
    if back.size:
        i = int(back[0])
        raise ValueError(
            f"Expected increasing times in {where}, got {times[i]:.6g} s and then {times[i + 1]:.6g} s (frame {i + 1})."
        )
    return np.asarray(times, dtype=np.float64)


def even_times(number: int, options: ImportOptions) -> np.ndarray:
    """Times t [s] of frames in files without times: a `time_step` apart, or a second."""
    return np.arange(number) * (1.0 if options.time_step is None else options.time_step)


def field_name(name: str) -> str:
    """A name that a store's array can have: none of Zarr's own, and no dimension's."""
    plain = "_".join("".join(c if c.isalnum() or c in "-." else " " for c in name).split()).lstrip(".") or "field"
    taken = RESERVED | {"trajectory", "axis", "channel", "zarr.json"}
    return f"{plain}_field" if plain in taken else plain


def spec(name: str, is_vector: bool, options: ImportOptions, unit: str | None = None) -> FieldSpec:
    """The description of a field, with the unit that the user or the file says, or that of quantities of its name."""
    name = field_name(name)
    unit = options.units.get(name, unit or UNITS.get(name, "1"))
    return FieldSpec(name, "vector" if is_vector else "scalar", unit)
