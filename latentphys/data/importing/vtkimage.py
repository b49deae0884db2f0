"""What every VTK file of image data comes to: a box of points, and arrays at its points or in its cells.

The formats differ in how they write numbers down; `vtklegacy`, `vtkxml` and `vtkhdf` read them. They raise what they
stumble over, of which `vtk` makes one line. VTK's own readers are not used: where a file is cut off they fill arrays
with what happens to be in memory and say nothing, and damaged headers end the process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

Centring = Literal["cells", "points"]
RESAMPLE = "resample it to image data first (in ParaView: Resample To Image)"
IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)


@dataclass(frozen=True)
class Values:
    """One array: how many components, a function that reads them as (tuple, component), the unit where it is said."""

    components: int
    read: Callable[[], np.ndarray]
    unit: str | None = None

    @staticmethod
    def of(values: np.ndarray) -> Values:
        """An array (tuple, component) that is in memory."""
        return Values(values.shape[1], lambda: values)


Arrays = Mapping[tuple[Centring, str], Values]


@dataclass(frozen=True)
class Image:
    """One time of image data.

    Attributes:
        path: its file.
        points: number of points along x, y, z.
        origin, spacing: the first point and the distance of points [m].
        time: t [s], None where the file does not say.
        arrays: reads the names of the arrays in the file, and each when it is asked for.
    """

    path: Path
    points: tuple[int, int, int]
    origin: tuple[float, float, float]
    spacing: tuple[float, float, float]
    time: float | None
    arrays: Callable[[], Arrays]

    def shape(self, centring: Centring) -> tuple[int, int, int]:
        """Number of values along x, y, z; an axis of one point is one cell thick."""
        return shape(self.points, centring)


def shape(points: Sequence[int], centring: Centring) -> tuple[int, int, int]:
    """Number of values along x, y, z in a box of points; an axis of one point is one cell thick."""
    x, y, z = (n if centring == "points" else max(n - 1, 1) for n in points)
    return x, y, z


def checked_image(
    path: Path,
    points: list[int],
    origin: list[float],
    spacing: list[float],
    time: float | None,
    most: int,
    arrays: Callable[[], Arrays],
    direction: list[float] | None = None,
) -> Image:
    """An image whose numbers make sense, of no more values than the file can hold.

    Raises:
        ValueError: another number of axes, a size of nothing, a turned box, or more values than `most`.
    """
    if len(points) != 3 or len(origin) != 3 or len(spacing) != 3 or min(points) < 1:
        raise ValueError(f"Expected three axes with a point each in {path}, got {points} points; write it again.")
    if not all(map(math.isfinite, (*origin, *spacing))) or any(
        h <= 0 for n, h in zip(points, spacing, strict=True) if n > 1
    ):
        raise ValueError(f"Expected positive spacings in {path}, got {spacing} from {origin}; write it again.")
    if math.prod(shape(points, "cells")) > most:
        raise ValueError(
            f"Expected {points} points in {path}, got a file too small for them; it is cut off or damaged."
        )
    if direction is not None and not (len(direction) == 9 and np.allclose(direction, IDENTITY, rtol=0, atol=1e-9)):
        raise ValueError(f"Expected a box along the axes in {path}, got direction {direction}; {RESAMPLE}.")
    if time is not None and not math.isfinite(time):
        raise ValueError(f"Expected a finite time in {path}, got {time}.")
    (nx, ny, nz), (ox, oy, oz), (dx, dy, dz) = points, origin, spacing
    return Image(path, (nx, ny, nz), (ox, oy, oz), (dx, dy, dz), time, arrays)
