"""How far reconstructed velocities are from the truth, and whether they conserve."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from latentphys import operators
from latentphys.grid import Geometry, Grid
from latentphys.validators import vrmse
from latentphys.validators.statistics import REFERENCE, Statistics, spectrum_errors

MODEL = "model"


class Scale(Protocol):
    """What turns a flux [m³/s] into velocity fluctuations of unit variance."""

    def normalise(self, x: Tensor, grid: Grid, /) -> Tensor: ...

    def denormalise(self, x: Tensor, grid: Grid, /) -> Tensor: ...


def beside_no_slip(geometry: Geometry) -> Bool[Tensor, "3 nx ny nz"]:
    """True on the open faces next to a no-slip surface that they are normal to no part of: half a cell off a no-slip
    side of the box, or beside a face that a solid closes."""
    grid, open_faces = geometry.grid, geometry.open_faces
    result = torch.zeros_like(open_faces)
    for component in range(3):
        for axis in (axis for axis in range(3) if axis != component):
            for end, boundary in enumerate(grid.boundaries[axis]):
                closed = ~open_faces[component].roll(1 - 2 * end, axis)
                if boundary != "periodic":
                    closed.select(axis, -end).fill_(boundary == "no_slip")
                result[component] |= closed
    return result & open_faces


class Errors:
    """Collects the reconstructions of one family, snapshot by snapshot.

    Args:
        scale: of the family.
    """

    def __init__(self, scale: Scale) -> None:
        self.scale = scale
        self._statistics = Statistics()
        self._vrmse: list[float] = []
        self._square, self._wall_square = (0.0, 0), (0.0, 0)
        self._net = self._solid = self._largest = 0.0

    @torch.no_grad()
    def update(
        self, decoded: Float[Tensor, "3 nx ny nz"], truth: Float[Tensor, "3 nx ny nz"], geometry: Geometry
    ) -> None:
        """Take in one snapshot, both fluxes [m³/s] on the CPU; what flows through closed faces counts for
        ``solid_flux_max`` only."""
        decoded, truth, grid, frame = decoded.double(), truth.double(), geometry.grid, len(self._vrmse)
        self._vrmse.append(float(vrmse(decoded, truth, geometry)))
        error = self.scale.normalise(decoded, grid) - self.scale.normalise(truth, grid)
        self._square = _add(self._square, error, geometry.open_faces)
        self._wall_square = _add(self._wall_square, error, beside_no_slip(geometry))
        self._net = max(self._net, float(operators.div(decoded, grid).abs().amax()))
        self._solid = max(self._solid, float(torch.where(geometry.open_faces, 0.0, decoded).abs().amax()))
        self._largest = max(self._largest, float(truth.abs().amax()))
        for label, flux in ((MODEL, decoded), (REFERENCE, truth)):
            self._statistics.update(label, flux, geometry, frame, first=0)

    def figures(self) -> dict[str, float]:
        """By name:

        ``vrmse``: the mean over snapshots of `validators.vrmse`.
        ``mse_unit``: mean square error of the velocity on open faces, over the variance of its fluctuations.
        ``spectrum_low``, ``…_mid``, ``…_high``: error per band of wave numbers [decades], see `spectrum_errors`.
        ``net_flux_max``: largest |net flux| of a cell [m³/s]; ``net_flux_relative``: over the largest |flux|.
        ``solid_flux_max``: largest |flux| through a closed face [m³/s].
        ``wall_slip``: RMS error of the tangential velocity on the faces of `beside_no_slip`, over the RMS of the
        fluctuations; left out where there is no such face.
        """
        spectra = spectrum_errors(self._statistics.spectra(MODEL), self._statistics.spectra(REFERENCE))
        result = {
            "vrmse": sum(self._vrmse) / len(self._vrmse),
            "mse_unit": self._square[0] / self._square[1],
            **{f"spectrum_{band}": error for band, error in spectra.items()},
            "net_flux_max": self._net,
            "net_flux_relative": self._net / self._largest,
            "solid_flux_max": self._solid,
        }
        if self._wall_square[1]:
            result["wall_slip"] = math.sqrt(self._wall_square[0] / self._wall_square[1])
        return result


def _add(sums: tuple[float, int], error: Tensor, faces: Tensor) -> tuple[float, int]:
    """A sum of squares and its count, with those of some faces more."""
    return sums[0] + float(error[faces].square().sum()), sums[1] + int(faces.sum())
