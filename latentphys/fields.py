"""What a field is, and the state of a simulation that owns its fields, geometry, time and parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from latentphys.grid import Geometry, Grid

Kind = Literal["flux", "scalar", "vector"]
Constraint = Literal["solenoidal", "irrotational", "conserved", "positive", "none"]
KINDS: tuple[Kind, ...] = ("flux", "scalar", "vector")
CONSTRAINTS: tuple[Constraint, ...] = ("solenoidal", "irrotational", "conserved", "positive", "none")


@dataclass(frozen=True)
class FieldSpec:
    """What one field is.

    Args:
        name: the name of its array, such as ``velocity``.
        kind: ``flux`` (through the low faces, shape (…, 3, x, y, z)), ``scalar`` (in cells, (…, x, y, z)) or ``vector``
            (in cells, (…, 3, x, y, z)).
        unit: SI unit of the stored numbers, such as ``m3/s``.
        constraint: what every value of the field obeys: ``solenoidal | irrotational | conserved | positive | none``.
    """

    name: str
    kind: Kind
    unit: str
    constraint: Constraint = "none"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"Expected a field kind of {' | '.join(KINDS)}, got {self.kind!r}.")
        if self.constraint not in CONSTRAINTS:
            raise ValueError(f"Expected a constraint of {' | '.join(CONSTRAINTS)}, got {self.constraint!r}.")
        if self.constraint in ("solenoidal", "irrotational") and self.kind != "flux":
            raise ValueError(f"Expected kind 'flux' for the {self.constraint} field {self.name!r}, got {self.kind!r}.")

    def shape(self, grid: Grid) -> tuple[int, ...]:
        """Shape of one snapshot on a grid."""
        return grid.shape if self.kind == "scalar" else (3, *grid.shape)

    def to_dict(self) -> dict[str, str]:
        return {"name": self.name, "kind": self.kind, "unit": self.unit, "constraint": self.constraint}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FieldSpec:
        return cls(**data)


VELOCITY = FieldSpec("velocity", "flux", "m3/s", "solenoidal")
"""Incompressible velocity, as the volume flux through each cell's low faces."""


@dataclass(frozen=True, eq=False)
class State:
    """The state of a simulation at one time, for one sample or a batch of them.

    Args:
        fields: name → tensor, ``(*batch, 3, nx, ny, nz)`` for a flux or vector, ``(*batch, nx, ny, nz)`` for a scalar.
        geometry: the box and its solids.
        time: time t [s].
        parameters: physical parameters, name → number or tensor ``(*batch, …)``, such as ``viscosity`` [m²/s].
        family: the kind of flow, such as ``channel``; None where nobody needs to know.
    """

    fields: Mapping[str, Tensor]
    geometry: Geometry
    time: float = 0.0
    parameters: Mapping[str, Any] = field(default_factory=dict)
    family: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "fields", MappingProxyType(dict(self.fields)))
        object.__setattr__(self, "parameters", MappingProxyType(dict(self.parameters)))
        for name, value in self.fields.items():
            if not isinstance(value, Tensor) or tuple(value.shape[-3:]) != self.grid.shape:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"Expected field {name!r} on the grid {self.grid.shape}, got {got}.")

    @property
    def grid(self) -> Grid:
        return self.geometry.grid

    @property
    def velocity(self) -> Tensor:
        """The flux field ``velocity`` [m³/s]."""
        try:
            return self.fields["velocity"]
        except KeyError:
            raise ValueError(f"Expected a field 'velocity' in this state, got {sorted(self.fields)}.") from None

    def with_fields(self, time: float | None = None, **fields: Tensor) -> State:
        """The same state with some fields, and perhaps the time, replaced."""
        return replace(self, fields={**self.fields, **fields}, time=self.time if time is None else time)

    def to(self, device: torch.device | str) -> State:
        """The same state on another device."""
        return replace(
            self,
            fields={name: value.to(device) for name, value in self.fields.items()},
            geometry=self.geometry.to(device),
            parameters={k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.parameters.items()},
        )
