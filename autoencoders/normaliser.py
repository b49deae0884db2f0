"""Fields in units of order one, scaled once at the boundary between physics and networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from latentphys import operators
from latentphys.fields import VELOCITY, FieldSpec
from latentphys.grid import Geometry, Grid


def num_components(spec: FieldSpec) -> int:
    """Numbers per place of a field in a box."""
    return 1 if spec.kind == "scalar" else 3


def present(geometry: Geometry, spec: FieldSpec, device: torch.device | str) -> Bool[Tensor, "*#samples #c nx ny nz"]:
    """Where a field has values: a flux on open faces, others in fluid cells."""
    where = geometry.open_faces if spec.kind == "flux" else geometry.fluid.unsqueeze(-4)
    return where.to(device)


@dataclass(frozen=True, eq=False)
class FieldScale:
    """The box of one field of a family, its mean and the size of its fluctuations.

    One size serves all components, so that scaling neither makes nor hides a divergence.

    Args:
        grid: the box that the model is trained on; another one must have its boundaries and spacings.
        profile: mean over the homogeneous axes of a box, in the unit of the field, broadcastable to (c, nx, ny, nz)
            with c the field's components: 3 of a flux or vector, 1 of a scalar.
        size: RMS of the fluctuations about it, > 0: of the velocity through the faces [m/s] for a flux, in the unit of
            the field for others.
        spec: which field. Default: an incompressible velocity.
    """

    grid: Grid
    profile: Float[Tensor, "c px py pz"]
    size: float
    spec: FieldSpec = VELOCITY

    def __post_init__(self) -> None:
        if not self.size > 0:
            raise ValueError(
                f"Expected fluctuations of {self.spec.name!r} of a positive size, got {self.size}; "
                "is the field at rest, or the same everywhere? Leave such a field out."
            )
        if len(self.profile) != self.num_components:
            raise ValueError(
                f"Expected a profile of {self.num_components} components for the {self.spec.kind} {self.spec.name!r}, "
                f"got {len(self.profile)}."
            )

    @property
    def num_components(self) -> int:
        return num_components(self.spec)

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

    def normalise(self, x: Float[Tensor, "*b c nx ny nz"], grid: Grid) -> Float[Tensor, "*b c nx ny nz"]:
        """The field to fluctuations of order one; a flux [m³/s] becomes a velocity on the way."""
        self.check(grid)
        x = x - self.profile.to(x)
        return (operators.velocity(x, grid) if self.spec.kind == "flux" else x) / self.size

    def fluctuations(self, x: Float[Tensor, "b c nx ny nz"], geometry: Geometry) -> Float[Tensor, "b c nx ny nz"]:
        """The same, 0 where the field has no values: through walls and in solids."""
        return torch.where(present(geometry, self.spec, x.device), self.normalise(x, geometry.grid), 0.0)

    def denormalise(self, x: Float[Tensor, "*b c nx ny nz"], grid: Grid) -> Float[Tensor, "*b c nx ny nz"]:
        """The inverse of `normalise`."""
        self.check(grid)
        x = x * self.size
        return (operators.flux_of(x, grid) if self.spec.kind == "flux" else x) + self.profile.to(x)

    def to_dict(self) -> dict[str, Any]:
        return {
            "grid": self.grid.to_dict(),
            "profile": self.profile.tolist(),
            "size": self.size,
            "spec": self.spec.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FieldScale:
        profile = torch.tensor(data["profile"], dtype=torch.float64)
        return cls(Grid.from_dict(data["grid"]), profile, float(data["size"]), FieldSpec.from_dict(data["spec"]))

    @classmethod
    def from_statistics(cls, grid: Grid, statistics: Mapping[str, Any], spec: FieldSpec = VELOCITY) -> FieldScale:
        """From the statistics that a store keeps of a field."""
        profile = torch.as_tensor(statistics["profile"], dtype=torch.float64)
        return cls(grid, profile, float(statistics["fluctuation_std"]), spec)


class FamilyScale:
    """The fields of one family in one box, each with its scale.

    Models see them packed: their components one after another as the channels of one tensor, ``(b, c, nx, ny, nz)``. A
    family that is one flux is packed as it is.

    Args:
        fields: in the order of their channels, in one box.

    Raises:
        ValueError: no fields, two of one name, or fields in different boxes.
    """

    def __init__(self, *fields: FieldScale) -> None:
        names = [field.spec.name for field in fields]
        if not fields or len(set(names)) != len(names):
            raise ValueError(f"Expected fields of different names, got {names}.")
        if any(field.grid != fields[0].grid for field in fields):
            raise ValueError(f"Expected fields in one box, got {sorted({str(field.grid) for field in fields})}.")
        self.fields = {field.spec.name: field for field in fields}

    @property
    def grid(self) -> Grid:
        return next(iter(self.fields.values())).grid

    @property
    def specs(self) -> dict[str, FieldSpec]:
        return {name: field.spec for name, field in self.fields.items()}

    @cached_property
    def channels(self) -> dict[str, slice]:
        """Where each field stands among the packed channels."""
        result, start = {}, 0
        for name, field in self.fields.items():
            result[name] = slice(start, start + field.num_components)
            start += field.num_components
        return result

    @property
    def num_components(self) -> int:
        """Packed channels."""
        return sum(field.num_components for field in self.fields.values())

    def __getitem__(self, name: str) -> FieldScale:
        return self.fields[name]

    def check(self, grid: Grid) -> None:
        """See `FieldScale.check`."""
        for field in self.fields.values():
            field.check(grid)

    def pack(self, fields: Mapping[str, Tensor]) -> Float[Tensor, "*b c nx ny nz"]:
        """Fields as they stand in a `State`, as one tensor.

        Raises:
            ValueError: a field that is missing.
        """
        missing = sorted(set(self.fields) - set(fields))
        if missing:
            raise ValueError(f"Expected the fields {list(self.fields)}, got {sorted(fields)} without {missing}.")
        parts = [fields[n].unsqueeze(-4) if f.spec.kind == "scalar" else fields[n] for n, f in self.fields.items()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-4)

    def split(self, packed: Float[Tensor, "*b c nx ny nz"]) -> dict[str, Float[Tensor, "*b f nx ny nz"]]:
        """The channels of each field, views of the packed ones; a scalar keeps its axis of one component."""
        if packed.shape[-4] != self.num_components:
            raise ValueError(
                f"Expected {self.num_components} channels, the components of {list(self.fields)}, "
                f"got {packed.shape[-4]}."
            )
        return {name: packed[..., where, :, :, :] for name, where in self.channels.items()}

    def unpack(self, packed: Float[Tensor, "*b c nx ny nz"]) -> dict[str, Tensor]:
        """The inverse of `pack`: fields as they stand in a `State`, scalars without an axis of components."""
        parts = self.split(packed)
        return {n: x.squeeze(-4) if self.fields[n].spec.kind == "scalar" else x for n, x in parts.items()}

    def normalise(self, packed: Float[Tensor, "*b c nx ny nz"], grid: Grid) -> Float[Tensor, "*b c nx ny nz"]:
        """Every field as `FieldScale.normalise` has it."""
        parts = [self.fields[name].normalise(x, grid) for name, x in self.split(packed).items()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-4)

    def denormalise(self, packed: Float[Tensor, "*b c nx ny nz"], grid: Grid) -> Float[Tensor, "*b c nx ny nz"]:
        """The inverse of `normalise`."""
        parts = [self.fields[name].denormalise(x, grid) for name, x in self.split(packed).items()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-4)

    def totals(self, packed: Float[Tensor, "b c nx ny nz"], geometry: Geometry) -> dict[str, Float[Tensor, " b"]]:
        """∫ c dV of the conserved scalars among packed fields [unit·m³], by name; see `ConservedHead`."""
        return {
            name: torch.where(present(geometry, self[name].spec, x.device), x.double(), 0.0).sum((-4, -3, -2, -1))
            * geometry.grid.cell_volume
            for name, x in self.split(packed).items()
            if self[name].spec.constraint == "conserved"
        }

    def to_dict(self) -> list[dict[str, Any]]:
        return [field.to_dict() for field in self.fields.values()]

    @classmethod
    def from_dict(cls, data: Sequence[Mapping[str, Any]]) -> FamilyScale:
        """Read what `to_dict` wrote."""
        return cls(*(FieldScale.from_dict(field) for field in data))
