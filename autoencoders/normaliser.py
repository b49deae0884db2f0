"""Fields in units of order one, scaled once at the boundary between physics and networks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from latentphys import operators
from latentphys.grid import Grid


@dataclass(frozen=True, eq=False)
class FamilyScale:
    """The box of one family, its mean flux and the size of its fluctuations.

    One scale serves all components, so that scaling neither makes nor hides a divergence.

    Args:
        grid: the box that the model is trained on; another one must have its boundaries and spacings.
        profile: mean flux [m³/s] over the homogeneous axes of a box, broadcastable to (3, nx, ny, nz).
        velocity: RMS of the velocity about it [m/s], > 0.
    """

    grid: Grid
    profile: Float[Tensor, "3 px py pz"]
    velocity: float

    def __post_init__(self) -> None:
        if not self.velocity > 0:
            raise ValueError(f"Expected a positive velocity scale [m/s], got {self.velocity}; is the flow at rest?")

    def check(self, grid: Grid) -> None:
        """Whether the model can be used on a grid.

        Raises:
            ValueError: other boundaries or spacings, or a mean profile that does not fit the shape.
        """
        trained = self.grid
        if grid.boundaries != trained.boundaries:
            raise ValueError(f"Expected the boundaries this model knows, {trained.boundaries}, got {grid.boundaries}.")
        if any(abs(a / b - 1) > 1e-3 for a, b in zip(grid.spacing, trained.spacing, strict=True)):
            raise ValueError(f"Expected the spacing this model knows, {trained.spacing} m, got {grid.spacing} m.")
        if any(p not in (1, n) for n, p in zip(grid.shape, self.profile.shape[1:], strict=True)):
            raise ValueError(f"Expected the grid of this model's mean profile, {trained.shape}, got {grid.shape}.")

    def normalise(self, flux: Float[Tensor, "*b 3 nx ny nz"], grid: Grid) -> Float[Tensor, "*b 3 nx ny nz"]:
        """Flux [m³/s] to velocity fluctuations of order one."""
        self.check(grid)
        return operators.velocity(flux - self.profile.to(flux), grid) / self.velocity

    def denormalise(self, x: Float[Tensor, "*b 3 nx ny nz"], grid: Grid) -> Float[Tensor, "*b 3 nx ny nz"]:
        """The inverse of `normalise`."""
        self.check(grid)
        return operators.flux_of(x * self.velocity, grid) + self.profile.to(x)

    def to_dict(self) -> dict[str, Any]:
        return {"grid": self.grid.to_dict(), "profile": self.profile.tolist(), "velocity": self.velocity}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FamilyScale:
        profile = torch.tensor(data["profile"], dtype=torch.float64)
        return cls(Grid.from_dict(data["grid"]), profile, float(data["velocity"]))

    @classmethod
    def from_statistics(cls, grid: Grid, statistics: Mapping[str, Any]) -> FamilyScale:
        """From the statistics that a store keeps of a flux field."""
        profile = torch.as_tensor(statistics["profile"], dtype=torch.float64)
        return cls(grid, profile, float(statistics["fluctuation_std"]))
