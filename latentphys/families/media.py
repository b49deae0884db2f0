"""Porous media as voxels of a periodic box of side 1 m: packed spheres, random fields, windows of images.

A medium draws a porosity ε and a grain size d, the diameter of equal spheres with the same solid volume and surface,
d = 6 (1 − ε)/S with the surface S per volume of the box, and then cuts itself into the cells of a grid.

References: Rice, Bell Syst. Tech. J. 24 (1945), and Adler & Taylor, Random Fields and Geometry (2007), for the surface
of a level set; Torquato, Random Heterogeneous Materials (2002), for the media.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool3d

from latentphys.families.family import check_range, uniform
from latentphys.grid import Geometry, Grid
from latentphys.topology import spanning_forests

PLACEMENTS = 20000
"""Spheres proposed before a porosity is given up."""

REDRAWS = 20
"""Media drawn anew before no flow through them is an error."""


class Medium(ABC):
    """A kind of porous medium; every trajectory has one of its own."""

    @abstractmethod
    def draw(self, rng: np.random.Generator) -> dict[str, Any]:
        """``porosity`` ε [1], ``diameter`` d [m], and what else tells one medium of this kind from another."""

    @abstractmethod
    def solid(self, grid: Grid, parameters: Mapping[str, Any], rng: np.random.Generator) -> np.ndarray:
        """Solid voxels, bool (nx, ny, nz), of the medium that `draw` described."""


def carries_flow(grid: Grid, solid: np.ndarray) -> bool:
    """Whether one pore space winds round all three axes, so that a force in any direction drives a flow through it."""
    from scipy.ndimage import label

    if solid.all():
        return False
    labels = np.empty(solid.shape, dtype=np.int32)
    label(~solid, output=labels)
    # A path inside the box between two cells that face each other across its sides is soon found, and enough.
    sides = [np.take(labels, (0, -1), axis=axis).swapaxes(0, axis) for axis in range(3)]
    through = [set(low[low == high].tolist()) for low, high in sides]
    if set.intersection(*through) - {0}:
        return True
    forest = spanning_forests(Geometry(grid, torch.from_numpy(solid)))[0]
    return int(forest.harmonic_ranks.max()) == 3


def sphere_pack(
    grid: Grid,
    porosity: float,
    diameter: float,
    rng: np.random.Generator,
    overlap: float = 0.15,
    tries: int = PLACEMENTS,
) -> np.ndarray:
    """Voxels of equal spheres placed at random in a periodic box until only `porosity` of it is left open.

    A sphere may sink into another by at most `overlap` of the diameter, as sintered grains do. The last one is made
    smaller, so that the porosity is met to a voxel.

    Raises:
        ValueError: the porosity was not reached in `tries` placements; a larger overlap or porosity would.
    """
    lengths, spacing = np.array(grid.lengths), np.array(grid.spacing)
    centres = [(np.arange(n) + 0.5) * h for n, h in zip(grid.shape, spacing, strict=True)]
    solid, wanted = np.zeros(grid.shape, dtype=bool), math.ceil((1 - porosity) * grid.num_cells - 1e-9)
    placed = np.empty((0, 3))
    for _ in range(tries):
        centre = rng.random(3) * lengths
        apart = np.abs(placed - centre)
        apart = np.minimum(apart, lengths - apart)
        if placed.size and np.sqrt((apart**2).sum(1)).min() < (1 - overlap) * diameter:
            continue
        placed = np.vstack([placed, centre])
        distance2 = np.zeros(grid.shape)
        for axis in range(3):
            d = np.abs(centres[axis] - centre[axis])
            d = np.minimum(d, lengths[axis] - d)
            distance2 = distance2 + (d**2).reshape([-1 if a == axis else 1 for a in range(3)])
        ball = (distance2 < (diameter / 2) ** 2) & ~solid
        missing = wanted - int(solid.sum())
        if ball.sum() >= missing:
            nearest = np.argsort(np.where(ball, distance2, np.inf), axis=None, kind="stable")[:missing]
            solid.flat[nearest] = True
            return solid
        solid |= ball
    raise ValueError(
        f"Expected to reach a porosity of {porosity:.2f} with spheres of diameter {diameter:.3g} m, stopped at "
        f"{1 - solid.mean():.2f} after {tries} placements; allow more overlap or a higher porosity."
    )


@dataclass(frozen=True)
class Spheres(Medium):
    """Equal spheres at random places that may sink into each other a little, as sintered grains do.

    Args:
        porosity: range of the fluid share ε.
        diameter: range of the sphere diameter d [m], in a box of side 1 m.
        overlap: how far one sphere may sink into another, in diameters.
    """

    porosity: Sequence[float] = (0.55, 0.75)
    diameter: Sequence[float] = (0.3, 0.42)
    overlap: float = 0.15

    def __post_init__(self) -> None:
        check_range("porosities", self.porosity, 0.2, 1)
        check_range("sphere diameters", self.diameter, 0, 1)
        if not 0 <= self.overlap < 1:
            raise ValueError(f"Expected an overlap of spheres in 0 … 1, got {self.overlap}.")

    def draw(self, rng: np.random.Generator) -> dict[str, Any]:
        return {"porosity": uniform(self.porosity, rng), "diameter": uniform(self.diameter, rng)}

    def solid(self, grid: Grid, parameters: Mapping[str, Any], rng: np.random.Generator) -> np.ndarray:
        return sphere_pack(grid, parameters["porosity"], parameters["diameter"], rng, self.overlap)


def gaussian_field(shape: Sequence[int], correlation: float, rng: np.random.Generator) -> np.ndarray:
    """A smooth periodic Gaussian random field of variance 1 at the centres of the cells of a cube of side 1 m.

    Its covariance is exp(−r²/2ℓ²). The Fourier modes are drawn, so that finer grids show the same field.

    Args:
        correlation: ℓ [m].
    """
    last = math.ceil(5 / (2 * np.pi * correlation))
    modes = np.arange(-last, last + 1)
    along = np.exp(-((2 * np.pi * modes * correlation) ** 2) / 4)
    amplitude = np.einsum("a,b,c->abc", along, along, along)
    amplitude[last, last, last] = 0
    real, imaginary = rng.standard_normal((2, *amplitude.shape))
    waves = [np.exp(2j * np.pi * np.outer((np.arange(n) + 0.5) / n, modes)) for n in shape]
    field = np.einsum("abc,xa,yb,zc->xyz", (real + 1j * imaginary) * amplitude, *waves, optimize=True).real
    return field / np.sqrt((amplitude**2).sum())


@dataclass(frozen=True)
class RandomField(Medium):
    """Pores and grains of any shape: where a smooth Gaussian random field is below a level there is fluid.

    Args:
        porosity: range of the fluid share ε; both phases are connected between about 0.2 and 0.8.
        correlation: range of the length ℓ [m] over which the field's covariance exp(−r²/2ℓ²) decays. Grains are some
            4 ℓ across; a cell should not be wider than ℓ.
    """

    porosity: Sequence[float] = (0.4, 0.7)
    correlation: Sequence[float] = (0.06, 0.1)

    def __post_init__(self) -> None:
        check_range("porosities", self.porosity, 0.1, 1)
        check_range("correlation lengths", self.correlation, 0.01, 0.5)

    def draw(self, rng: np.random.Generator) -> dict[str, Any]:
        porosity, correlation = uniform(self.porosity, rng), uniform(self.correlation, rng)
        surface = 2 / np.pi / correlation * np.exp(-(NormalDist().inv_cdf(porosity) ** 2) / 2)  # Rice's formula
        return {"porosity": porosity, "diameter": 6 * (1 - porosity) / surface, "correlation": correlation}

    def solid(self, grid: Grid, parameters: Mapping[str, Any], rng: np.random.Generator) -> np.ndarray:
        field = gaussian_field(grid.shape, parameters["correlation"], rng)
        return field > np.quantile(field, parameters["porosity"])


@lru_cache(maxsize=1)
def _voxels(
    path: str, pore: float | None, shape: tuple[int, ...] | None, dtype: str | None, axes: str | None
) -> np.ndarray:
    from latentphys.data.importing.voxels import read_voxels

    return read_voxels(path, pore=pore, shape=shape, dtype=dtype, axes=axes)


@dataclass(frozen=True)
class Image(Medium):
    """A window of a segmented image of a sample, another one in each trajectory.

    A sample does not repeat itself. With `mirrored`, half a window is taken and its mirror images fill the rest of the
    box, so that pores go on through every side; without, the window is repeated as it is and pores may end at a side.
    Past the end of an image the window goes on with its mirror image, or from its beginning.

    Args:
        path: a TIFF stack, a folder of slices, a .npy file or a raw file.
        pore: the value of pore space in it.
        window: voxels of the image along each side of the box; even where it is mirrored. A grid of other cells takes
            what fills at least half of each of them.
        mirrored: make it periodic by mirrors.
        shape, dtype, axes: of a raw file, as `read_voxels` takes them.

    Raises:
        ValueError: no path, an impossible window, or, when the first medium is drawn, a file that is none.
    """

    path: str | None = None
    pore: float | None = None
    window: int = 128
    mirrored: bool = True
    shape: Sequence[int] | None = None
    dtype: str | None = None
    axes: str | None = None

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError(
                "Expected the path of an image, got none; add family.medium.path=… and family.medium.pore=…."
            )
        if self.window < 4 or (self.mirrored and self.window % 2):
            raise ValueError(
                f"Expected a window of at least 4 voxels, an even number where it is mirrored, got {self.window}."
            )

    def draw(self, rng: np.random.Generator) -> dict[str, Any]:
        shape = np.array(self.voxels.shape) * (2 if self.mirrored else 1)
        cells = Grid((self.window,) * 3, (1 / self.window,) * 3)
        for _ in range(REDRAWS):
            origin = rng.integers(0, shape)
            solid = self.cut(origin)
            if carries_flow(cells, solid):
                # A surface of every direction has 3/2 the area when cut into voxels.
                faces = sum(int((solid ^ np.roll(solid, 1, axis)).sum()) for axis in range(3))
                grains, surface = float(solid.mean()), 2 / 3 * faces / self.window**2
                return {"porosity": 1 - grains, "diameter": 6 * grains / surface, "origin": origin}
        raise ValueError(
            f"Expected pores that lead through a window of {self.window} voxels of {self.path}, got none in {REDRAWS} "
            "windows; choose a larger one."
        )

    @property
    def voxels(self) -> np.ndarray:
        """The whole image, True where solid."""
        shape = None if self.shape is None else tuple(self.shape)
        return _voxels(str(self.path), self.pore, shape, self.dtype, self.axes)

    def cut(self, origin: Sequence[int] | np.ndarray) -> np.ndarray:
        """The periodic window that begins at a voxel, bool (window, window, window)."""
        indices = []
        for start, n in zip(origin, self.voxels.shape, strict=True):
            if self.mirrored:
                half = np.arange(self.window // 2)
                there = (start + np.concatenate([half, half[::-1]])) % (2 * n)
                indices.append(np.minimum(there, 2 * n - 1 - there))
            else:
                indices.append((start + np.arange(self.window)) % n)
        return self.voxels[np.ix_(*indices)]

    def solid(self, grid: Grid, parameters: Mapping[str, Any], rng: np.random.Generator) -> np.ndarray:
        share = adaptive_avg_pool3d(torch.from_numpy(self.cut(parameters["origin"])).float()[None], grid.shape)[0]
        return (share >= 0.5).numpy()
