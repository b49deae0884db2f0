"""How far imported data are from solenoidal: what no model trained on them can be held to.

Two operators measure it, for velocities and magnetic fields alike,

    mac        the net flux of each cell, its faces between cells interpolated linearly: second order, any box
    spectral   ik·û of the trigonometric polynomial through the samples: exact, in periodic boxes without solids

and both say: the largest and the root mean square of h |∇·u| / rms(u), and the share of the L2 norm of u that the
orthogonal projection onto solenoidal fields takes away. A solenoidal field sampled at points has zero in one of them at
most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentphys import operators
from latentphys.conversions import interpolate_to_faces
from latentphys.data.importing.source import Source
from latentphys.grid import Geometry
from latentphys.projection import project

OPERATORS = {
    "mac": "operators.div of conversions.interpolate_to_faces",
    "spectral": "ik·û of the samples, without the Nyquist modes of even axes",
    "flux": "operators.div of the stored face fluxes",
}
TOLERANCE = 1e-8
"""Of projections in voxels; what they take away is wanted to a few digits."""


def measured(source: Source, most: int = 64) -> list[tuple[int, int]]:
    """The snapshots (trajectory, frame) that are measured: all, or `most` of them evenly spaced."""
    total = source.num_trajectories * len(source.times)
    places = np.unique(np.linspace(0, total - 1, min(most, total)).round().astype(int))
    return [(int(p) // len(source.times), int(p) % len(source.times)) for p in places]


@torch.no_grad()
def solenoidal_floor(
    source: Source, most: int = 64, progress: Callable[[int], None] = lambda num_frames: None
) -> dict[str, Any]:
    """Measure every vector field and every flux of a source, in FP64.

    Args:
        source: the data.
        most: how many snapshots to measure at most, evenly spaced over all of them.
        progress: called with the number of snapshots measured since the last call.

    Returns:
        Field → operator → numbers, JSON-ready: ``max`` and ``rms`` of h |∇·u| / rms(u), with h the finest spacing, or
        for fluxes of the net flux of a cell relative to the largest |flux|; ``removed``, what projection takes away of
        the L2 norm; ``operator``; ``snapshots``. A field that is zero throughout has zeros.

    Raises:
        ValueError: data that cannot be read.
    """
    places = measured(source, most)
    names = [name for name, spec in source.specs.items() if spec.kind != "scalar"]
    is_spectral = all(source.grid.periodic) and source.solid is None
    sums: dict[str, dict[str, _Sums]] = {
        name: {key: _Sums(key == "flux") for key in _kinds(source.specs[name].kind, is_spectral)} for name in names
    }
    for trajectory, own_places in groupby(places, key=lambda place: place[0]):
        geometry = source.geometry(trajectory)
        for _, frame in own_places:
            for name in names:
                values = torch.from_numpy(source.snapshot(name, trajectory, frame).astype(np.float64))
                for key, sum_ in sums[name].items():
                    sum_.add(*_MEASURE[key](values, geometry))
            progress(1)
    return {
        name: {
            key: {**sum_.summary(), "operator": OPERATORS[key], "snapshots": len(places)} for key, sum_ in own.items()
        }
        for name, own in sums.items()
    }


def report(floor: Mapping[str, Any]) -> list[str]:
    """The floor in words, a line for each field and operator."""
    lines = []
    for name, operators_ in floor.items():
        for key, numbers in operators_.items():
            what = "net flux / largest |flux|" if key == "flux" else "h |div u| / rms(u)"
            removed = f", projection removes {numbers['removed']:.3g} of its norm" if "removed" in numbers else ""
            lines.append(
                f"{name}: {what} rms {numbers['rms']:.3g}, max {numbers['max']:.3g}{removed} "
                f"({key}, {numbers['snapshots']} snapshots)"
            )
    return lines


def _kinds(kind: str, is_spectral: bool) -> list[str]:
    return ["flux"] if kind == "flux" else ["mac", "spectral"] if is_spectral else ["mac"]


class _Sums:
    """Sums over snapshots of what the numbers are made of.

    Args:
        is_flux: measure by the largest value, and not by the root mean square.
    """

    def __init__(self, is_flux: bool) -> None:
        self.is_flux = is_flux
        self.largest = self.square = self.largest_value = self.value_square = self.removed = self.norm = 0.0
        self.count = self.value_count = 0

    def add(self, divergence: Tensor, values: Tensor, removed: float, norm: float) -> None:
        """Add the cells (n,) of a snapshot, its values (3, n), and squared norms of what is removed and of all."""
        self.largest = max(self.largest, float(divergence.abs().amax()))
        self.square += float(divergence.square().sum())
        self.count += divergence.numel()
        self.largest_value = max(self.largest_value, float(values.abs().amax()))
        self.value_square += float(values.square().sum())
        self.value_count += values[0].numel()
        self.removed += removed
        self.norm += norm

    def summary(self) -> dict[str, float]:
        scale = self.largest_value if self.is_flux else math.sqrt(self.value_square / self.value_count)
        over = 1 / scale if scale > 0 else 0.0
        result = {"max": self.largest * over, "rms": math.sqrt(self.square / self.count) * over}
        if not self.is_flux:
            result["removed"] = math.sqrt(self.removed / self.norm) if self.norm > 0 else 0.0
        return result


def _mac(velocity: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor, float, float]:
    grid, fluid = geometry.grid, geometry.fluid
    flux = interpolate_to_faces(velocity, geometry)
    divergence = operators.div(flux, grid) * (grid.finest_spacing / grid.cell_volume)
    weight = 1 / grid.per_face(grid.conductances, flux)
    lost = flux - project(flux, geometry, tol=TOLERANCE)
    removed, norm = (float((x.square() * weight).sum()) for x in (lost, flux))
    return divergence[fluid], velocity[:, fluid], removed, norm


def _spectral(velocity: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor, float, float]:
    grid = geometry.grid
    spectrum = torch.fft.fftn(velocity, dim=(-3, -2, -1))
    waves = []
    for axis, (n, h) in enumerate(zip(grid.shape, grid.spacing, strict=True)):
        cycles = torch.fft.fftfreq(n, dtype=torch.float64)
        along = [-1 if a == axis else 1 for a in range(3)]
        waves.append((2 * math.pi / h * cycles).reshape(along))
        spectrum = spectrum * (cycles.abs() < 0.5).reshape(along)
    k = torch.stack(torch.broadcast_tensors(*waves))
    along_k = (k * spectrum).sum(0)
    divergence = torch.fft.ifftn(1j * along_k).real * grid.finest_spacing
    square = k.square().sum(0)
    removed = (along_k.abs().square() / torch.where(square > 0, square, 1.0)).sum() / grid.num_cells
    return divergence, velocity, float(removed), float(velocity.square().sum())


def _flux(flux: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor, float, float]:
    return operators.div(flux, geometry.grid), flux, 0.0, 1.0


_MEASURE: Mapping[str, Callable[[Tensor, Geometry], Any]] = {"mac": _mac, "spectral": _spectral, "flux": _flux}
