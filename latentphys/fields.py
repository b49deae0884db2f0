"""What a field is, and the state of a simulation that owns its fields, geometry, time and parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from latentphys.grid import Geometry, Grid
from latentphys.sphere import Sphere

Domain = Grid | Sphere
"""What a field lives on: a box of cells, or a sphere."""

Kind = Literal["flux", "scalar", "vector"]
Constraint = Literal["solenoidal", "irrotational", "conserved", "positive", "none"]
KINDS: tuple[Kind, ...] = ("flux", "scalar", "vector")
CONSTRAINTS: tuple[Constraint, ...] = ("solenoidal", "irrotational", "conserved", "positive", "none")


def domain_from_dict(data: Mapping[str, Any]) -> Domain:
    """Read what `Grid.to_dict` or `Sphere.to_dict` wrote.

    Raises:
        ValueError: another kind of domain, a missing entry, or an impossible grid or sphere.
    """
    kind = data.get("kind", "box")
    if kind not in ("box", "sphere"):
        raise ValueError(f"Expected a domain of kind box | sphere, got {kind!r}.")
    return Sphere.from_dict(data) if kind == "sphere" else Grid.from_dict(data)


@dataclass(frozen=True)
class FieldSpec:
    """What one field is.

    Args:
        name: the name of its array, such as ``velocity``.
        kind: ``flux`` (through the low faces of a box, shape (…, 3, x, y, z)), ``scalar`` (in cells, (…, x, y, z), or
            at the points of a sphere, (…, nlat, nlon)) or ``vector`` (in cells, (…, 3, x, y, z), or southward and
            eastward on a sphere, (…, 2, nlat, nlon)).
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

    def shape(self, domain: Domain) -> tuple[int, ...]:
        """Shape of one snapshot.

        Raises:
            ValueError: a flux on a sphere, which has no faces.
        """
        if self.kind == "flux" and isinstance(domain, Sphere):
            raise ValueError(f"Expected a scalar or vector on a sphere, got the flux {self.name!r}; use kind 'vector'.")
        return domain.shape if self.kind == "scalar" else (len(domain.shape), *domain.shape)

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
        fields: name → tensor, ``(*batch, 3, nx, ny, nz)`` for a flux or vector, ``(*batch, nx, ny, nz)`` for a scalar;
            on a sphere ``(*batch, 2, nlat, nlon)`` and ``(*batch, nlat, nlon)``.
        place: the box and its solids, or a sphere.
        time: time t [s].
        parameters: physical parameters, name → number or tensor ``(*batch, …)``, such as ``viscosity`` [m²/s].
        family: the kind of flow, such as ``open_channel``; None where nobody needs to know.
    """

    fields: Mapping[str, Tensor]
    place: Geometry | Sphere
    time: float = 0.0
    parameters: Mapping[str, Any] = field(default_factory=dict)
    family: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "fields", MappingProxyType(dict(self.fields)))
        object.__setattr__(self, "parameters", MappingProxyType(dict(self.parameters)))
        for name, value in self.fields.items():
            shape = self.domain.shape
            if not isinstance(value, Tensor) or tuple(value.shape[-len(shape) :]) != shape:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"Expected field {name!r} on the grid {shape}, got {got}.")

    @property
    def domain(self) -> Domain:
        return self.place if isinstance(self.place, Sphere) else self.place.grid

    @property
    def geometry(self) -> Geometry:
        """The box and its solids; a ``ValueError`` on a sphere."""
        if isinstance(self.place, Sphere):
            raise ValueError(f"Expected a state in a box, got one on {self.place}; use `domain`.")
        return self.place

    @property
    def grid(self) -> Grid:
        """The box; a ``ValueError`` on a sphere."""
        return self.geometry.grid

    @property
    def velocity(self) -> Tensor:
        """The field ``velocity``: a flux [m³/s] in a box, a vector [m/s] on a sphere and of cell-centred stores."""
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
            place=self.place if isinstance(self.place, Sphere) else self.place.to(device),
            parameters={k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.parameters.items()},
        )
