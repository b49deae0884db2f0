"""What a solver and a surrogate must agree on before they exchange a single number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from latentphys.fields import FieldSpec, State
from latentphys.grid import SIDES, Grid
from latentphys.transformer.conditioning import Parameter

SPACING_TOLERANCE = 1e-3
"""Relative difference of cell sizes that still counts as one: what the models' scales take."""
INTERVAL_TOLERANCE = 1e-6
"""Relative difference of times that still counts as one."""


@dataclass(frozen=True)
class Quantity(Parameter):
    """A physical parameter: what `Parameter` says, and

    Args:
        unit: its SI unit; None where the model did not record it.
        required: whether a state must have it. Default: it enters as its mean in training where it is missing.
    """

    unit: str | None = None
    required: bool = False

    def __str__(self) -> str:
        centre, spread = (np.asarray(x) for x in (self.mean, self.std))
        low, high = centre - 2 * spread, centre + 2 * spread
        if self.logarithmic:
            low, high = np.exp(low), np.exp(high)
        unit = "unit not recorded" if self.unit is None else self.unit
        said = "; ".join(f"{a:.4g} … {b:.4g}" for a, b in zip(low, high, strict=True))
        kind = "changes in time" if self.varying else "constant"
        return f"{self.name} [{unit}], {kind}, in training about {said}{' (required)' if self.required else ''}"


@dataclass(frozen=True)
class Contract:
    """Fields, box, time step and parameters of the flows of one family.

    Printed, it is what a solver's author has to know; `check` compares it with what a solver has.

    Args:
        family: the kind of flow.
        grid: the box.
        fields: name, kind, unit and constraint of each, in the order of their channels.
        interval: Δt of one step [s].
        parameters: physical parameters that condition a step.
        compression: cells per axis must be multiples of it.
        fixed: the axes along which the number of cells is that of `grid`. Default: all.
        layout: where fluxes live: ``face_flux`` is the volume flux through each cell's low faces, (3, nx, ny, nz).
    """

    family: str
    grid: Grid
    fields: tuple[FieldSpec, ...]
    interval: float
    parameters: tuple[Quantity, ...] = ()
    compression: int = 1
    fixed: tuple[bool, bool, bool] = (True, True, True)
    layout: str = "face_flux"

    def __str__(self) -> str:
        shape = " × ".join(
            f"{n}" if held else f"{n} (any)" for n, held in zip(self.grid.shape, self.fixed, strict=True)
        )
        sides = zip(SIDES, sum(self.grid.boundaries, ()), strict=True)
        lines = [
            f"family      {self.family}",
            f"Δt          {self.interval:g} s",
            f"cells       {shape}, multiples of {self.compression}",
            f"spacing     {' × '.join(f'{h:g}' for h in self.grid.spacing)} m",
            f"boundaries  {', '.join(f'{side} {boundary}' for side, boundary in sides)}",
            f"layout      {self.layout}",
        ]
        lines += [f"field       {_said(spec)}" for spec in self.fields]
        return "\n".join(lines + [f"parameter   {quantity}" for quantity in self.parameters])

    def mismatches(self, other: State | Contract) -> list[str]:
        """One line for everything that does not agree; none where all does.

        Args:
            other: what a solver has: a state, or a contract of its own, which says units too.
        """
        grid = other.grid
        lines = [] if other.family == self.family else [f"Expected family {self.family!r}, got {other.family!r}."]
        lines += self.box_mismatches(grid)
        if isinstance(other, State):
            return lines + self._fields_of(other) + self._names(other.parameters)
        if other.layout != self.layout:
            lines.append(f"Expected fluxes in the layout {self.layout!r}, got {other.layout!r}.")
        if abs(other.interval / self.interval - 1) > INTERVAL_TOLERANCE:
            lines.append(f"Expected an interval of {self.interval:g} s, got {other.interval:g} s.")
        theirs = {spec.name: spec for spec in other.fields}
        for spec in self.fields:
            got = theirs.get(spec.name)
            if got is None:
                lines.append(f"Expected the field {_said(spec)}, got only {sorted(theirs)}.")
            elif (got.kind, got.unit, got.constraint) != (spec.kind, spec.unit, spec.constraint):
                lines.append(f"Expected the field {_said(spec)}, got {_said(got)}.")
        known = {q.name: q for q in other.parameters}
        for ours in self.parameters:
            mine = known.get(ours.name)
            if mine is not None and None not in (mine.unit, ours.unit) and mine.unit != ours.unit:
                lines.append(f"Expected the parameter {ours.name!r} in {ours.unit}, got it in {mine.unit}.")
            if mine is not None and mine.size != ours.size:
                lines.append(f"Expected the parameter {ours.name!r} of size {ours.size}, got size {mine.size}.")
        return lines + self._names(known)

    def check(self, other: State | Contract) -> None:
        """Refuse a state or contract that does not agree.

        Raises:
            ValueError: every mismatch, a line for each.
        """
        lines = self.mismatches(other)
        if lines:
            raise ValueError("\n".join(lines))

    def box_mismatches(self, grid: Grid) -> list[str]:
        """The lines of `mismatches` about a box."""
        lines = []
        pairs = zip(SIDES, sum(self.grid.boundaries, ()), sum(grid.boundaries, ()), strict=True)
        lines += [f"Expected the boundary {ours!r} on {side}, got {got!r}." for side, ours, got in pairs if ours != got]
        for axis, ours, got in zip("xyz", self.grid.spacing, grid.spacing, strict=True):
            if abs(got / ours - 1) > SPACING_TOLERANCE:
                lines.append(f"Expected a spacing of {ours:g} m along {axis}, got {got:g} m.")
        for axis, ours, got, held in zip("xyz", self.grid.shape, grid.shape, self.fixed, strict=True):
            if held and got != ours:
                lines.append(f"Expected {ours} cells along {axis}, got {got}.")
            elif got > 1 and got % self.compression:
                lines.append(f"Expected a multiple of {self.compression} cells along {axis}, got {got}.")
        return lines

    def _fields_of(self, state: State) -> list[str]:
        lines = []
        for spec in self.fields:
            values, shape = state.fields.get(spec.name), spec.shape(state.domain)
            if values is None:
                lines.append(f"Expected the field {_said(spec)}, got only {sorted(state.fields)}.")
            elif tuple(values.shape[-len(shape) :]) != shape or values.ndim > len(shape) + 1:
                lines.append(f"Expected {spec.name} of shape {shape}, or a batch of it, got {tuple(values.shape)}.")
        return lines

    def _names(self, given: Mapping[str, Any]) -> list[str]:
        known = sorted(q.name for q in self.parameters)
        missing = [q.name for q in self.parameters if q.required and q.name not in given]
        lines = [f"Expected the parameter {name!r}, got none." for name in missing]
        return lines + [f"Expected parameters among {known}, got {name!r}." for name in given if name not in known]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description; `from_dict` reads it back."""
        return {
            "family": self.family,
            "grid": self.grid.to_dict(),
            "fields": [spec.to_dict() for spec in self.fields],
            "interval": self.interval,
            "parameters": [asdict(quantity) for quantity in self.parameters],
            "compression": self.compression,
            "fixed": list(self.fixed),
            "layout": self.layout,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Contract:
        """Read what `to_dict` wrote.

        Raises:
            ValueError: a missing or unknown entry.
        """
        try:
            return cls(
                **{
                    **data,
                    "grid": Grid.from_dict(data["grid"]),
                    "fields": tuple(FieldSpec.from_dict(spec) for spec in data["fields"]),
                    "parameters": tuple(Quantity(**quantity) for quantity in data["parameters"]),
                    "fixed": tuple(data["fixed"]),
                }
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"Expected the entries of a contract, got {sorted(data)}: {error}.") from None


def _said(spec: FieldSpec) -> str:
    return f"{spec.name!r}, a {spec.kind} in {spec.unit}, constraint {spec.constraint}"
