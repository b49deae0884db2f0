"""Scalars and vectors in cells: what is conserved, what is positive, and how large the rest is."""

from __future__ import annotations

import torch
from torch import Tensor

from latentphys.fields import Domain, FieldSpec
from latentphys.sphere import Sphere
from latentphys.validators.check import Check
from latentphys.validators.series import Curve, Series

TOTAL = "|total(t) - total(0)| / integral of |f - mean f| at t = 0, total = integral of f over the domain"
BELOW_ZERO = "-(least value), where any is below zero"
RMS = "root mean square over the domain, mean over frames and trajectories"
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
"""How far a conserved total may drift: a sum of values that are rounded to the stored type each."""


class Values:
    """Collects the checks of one scalar or vector field, snapshot by snapshot.

    Integrals weigh cells by their volume; on a sphere, points by the area that the quadrature gives them.

    Args:
        spec: the field.
        domain: where it lives.
    """

    def __init__(self, spec: FieldSpec, domain: Domain) -> None:
        self.spec = spec
        self._weights = _shares(domain)
        self._dtype = torch.float64
        self._least = float("inf")
        self._totals: list[list[float]] = []
        self._sizes: list[float] = []
        self._rms: list[list[float]] = []

    def update(self, values: Tensor, trajectory: int, frame: int) -> None:
        """Take in one snapshot; the frames of a trajectory in order, from frame 0."""
        self._dtype, values = values.dtype, values.double()
        total = float((values * self._weights).sum())
        if frame == 0:
            self._totals.append([])
            self._rms.append([])
            self._sizes.append(float(((values - total).abs() * self._weights).sum()))
        self._totals[-1].append(total)
        self._rms[-1].append(float((values.square() * self._weights).sum().sqrt()))
        self._least = min(self._least, float(values.min()))

    @property
    def drift(self) -> float:
        """How far the total leaves that of frame 0, against how unevenly it lay; the worst trajectory's."""
        away = [max(abs(total - totals[0]) for total in totals) for totals in self._totals]
        # what is even lies at the size of its total
        sizes = [size or abs(totals[0]) or 1.0 for size, totals in zip(self._sizes, self._totals, strict=True)]
        return max(a / size for a, size in zip(away, sizes, strict=True))

    def checks(self, *, family: str, dtype: str, detail: str) -> list[Check]:
        """``NAME_total_drift`` where it is conserved, ``NAME_below_zero`` where positive (judged), ``NAME_rms``."""
        name, about = self.spec.name, {"family": family, "dtype": dtype, "detail": detail}
        checks = []
        if self.spec.constraint == "conserved":
            allowed = TOLERANCE[self._dtype]
            checks.append(Check.at_most(f"{name}_total_drift", self.drift, allowed, unit="1", operator=TOTAL, **about))
        if self.spec.constraint == "positive":
            below = max(0.0, -self._least)
            checks.append(
                Check.at_most(f"{name}_below_zero", below, 0.0, unit=self.spec.unit, operator=BELOW_ZERO, **about)
            )
        size = sum(sum(row) / len(row) for row in self._rms) / len(self._rms)
        checks.append(Check.info(f"{name}_rms", size, unit=self.spec.unit, operator=RMS, **about))
        return checks

    def series(self, label: str, times: tuple[float, ...]) -> list[Series]:
        """The root mean square over time."""
        curve = Curve.over_trajectories(label, self._rms)
        caption = f"Root mean square of {self.spec.name} over the domain; mean over trajectories, band: their range."
        labels = "time t [s]", f"rms({self.spec.name}) [{self.spec.unit}]"
        title = self.spec.name.replace("_", " ").capitalize()
        return [Series(f"{self.spec.name}_rms", title, times, *labels, (curve,), caption=caption)]


def _shares(domain: Domain) -> Tensor:
    """Share of the whole domain that each value stands for."""
    if isinstance(domain, Sphere):
        return domain.areas / (domain.areas.sum() * domain.nlon)
    return torch.tensor(1 / domain.num_cells, dtype=torch.float64)
