"""Errors point by point: the variance-scaled RMS error of a rollout, beside persistence and the autoencoder's floor."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from latentphys import operators
from latentphys.data.statistics import homogeneous_axes
from latentphys.grid import Geometry
from latentphys.validators.check import Check
from latentphys.validators.series import Curve, Series

MODEL, PERSISTENCE, FLOOR = "model", "persistence", "autoencoder floor"
LATER = "mean over frames >= 1"
VRMSE = "sqrt(sum |u-v|^2 / sum |v-<v>|^2), face velocities on open faces, <v> = instantaneous mean over "
WELL = "VRMSE as The Well: per component of cell velocity, variance over the whole box; mean of the three"


def mean_axes(geometry: Geometry) -> tuple[int, ...]:
    """Spatial axes over which a reference mean is taken: the homogeneous ones, or all three where there is none."""
    return homogeneous_axes(geometry.grid, not geometry.is_empty) or (0, 1, 2)


def vrmse(
    prediction: Float[Tensor, "*batch 3 nx ny nz"], reference: Float[Tensor, "*batch 3 nx ny nz"], geometry: Geometry
) -> Float[Tensor, "*batch"]:
    """Variance-scaled RMS error of a flow, per snapshot, in FP64.

        VRMSE = sqrt( Σ|u − v|² / Σ|v − ⟨v⟩|² )

    u is the predicted and v the reference velocity on the open faces, summed over faces and components; ⟨v⟩ is the mean
    of each component over the homogeneous axes at that instant: in a channel the plane-averaged profile, in a porous
    box the mean over the open faces. 0 is perfect, 1 is as good as knowing that mean.

    Stricter than The Well's VRMSE (`vrmse_well`) wherever there is a mean profile: that one divides by the variance
    over the whole box, which contains the profile, so a model that knows nothing else looks good; here it scores 1.

    Args:
        prediction: fluxes [m³/s].
        reference: fluxes [m³/s].
        geometry: the box they live in.

    Returns:
        one number per snapshot; 0 where both sums vanish, infinity where only the reference's does.
    """
    _check_same_shape(prediction, reference)
    grid = geometry.grid
    open_faces = geometry.open_faces.to(reference.device)
    v = operators.velocity(geometry.mask(reference.double()), grid)
    error = operators.velocity(geometry.mask(prediction.double() - reference.double()), grid)
    dims = [axis - 3 for axis in mean_axes(geometry)]
    mean = v.sum(dims, keepdim=True) / open_faces.sum(dims, keepdim=True).clamp(min=1)
    fluctuation = torch.where(open_faces, v - mean, 0.0)
    return _ratio(error.square().sum((-4, -3, -2, -1)), fluctuation.square().sum((-4, -3, -2, -1))).sqrt()


def vrmse_well(
    prediction: Float[Tensor, "*batch 3 nx ny nz"], reference: Float[Tensor, "*batch 3 nx ny nz"], geometry: Geometry
) -> Float[Tensor, "*batch"]:
    """VRMSE as The Well defines it, for comparison with published figures, in FP64.

        mean over components a of sqrt( ⟨(u_a − v_a)²⟩ / ⟨(v_a − ⟨v_a⟩)²⟩ )

    on the velocity at the cell centres, ⟨·⟩ over the whole box, solids included. The Well adds ε = 1e-7 to the
    variance; it is left out because it carries a unit and would swamp slow flows.

    Args:
        prediction: fluxes [m³/s].
        reference: fluxes [m³/s].
        geometry: the box they live in.

    Reference: Ohana et al. 2024, The Well, arXiv:2412.00568, appendix on metrics.
    """
    _check_same_shape(prediction, reference)
    u, v = (operators.cell_velocity(flux.double(), geometry.grid) for flux in (prediction, reference))
    space = (-3, -2, -1)
    return _ratio((u - v).square().mean(space), v.var(space, correction=0)).sqrt().mean(-1)


def _check_same_shape(prediction: Tensor, reference: Tensor) -> None:
    if prediction.shape != reference.shape:
        wanted, got = tuple(reference.shape), tuple(prediction.shape)
        raise ValueError(f"Expected a prediction of the reference's shape {wanted}, got {got}.")


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(numerator == 0, 0.0, numerator / denominator)


class Pointwise:
    """Collects the VRMSE of one rollout, snapshot by snapshot: ``errors[label][trajectory][frame]``."""

    def __init__(self) -> None:
        self.errors: dict[str, list[list[float]]] = {}
        self.well: list[list[float]] = []
        self.operator = ""
        self._first = torch.zeros(0)

    def update(
        self,
        model: Float[Tensor, "3 nx ny nz"] | None,
        reference: Float[Tensor, "3 nx ny nz"],
        reconstruction: Float[Tensor, "3 nx ny nz"] | None,
        geometry: Geometry,
        frame: int,
    ) -> None:
        """Take in one frame [m³/s]; the frames of a trajectory in order, from frame 0."""
        if frame == 0:
            self._first, self.operator = reference, VRMSE + ", ".join("xyz"[axis] for axis in mean_axes(geometry))
        if model is not None:
            self._append(self.errors.setdefault(MODEL, []), vrmse(model, reference, geometry), frame)
            self._append(self.errors.setdefault(PERSISTENCE, []), vrmse(self._first, reference, geometry), frame)
            self._append(self.well, vrmse_well(model, reference, geometry), frame)
        if reconstruction is not None:
            self._append(self.errors.setdefault(FLOOR, []), vrmse(reconstruction, reference, geometry), frame)

    @staticmethod
    def _append(rows: list[list[float]], value: Tensor, frame: int) -> None:
        if frame == 0:
            rows.append([])
        rows[-1].append(float(value))

    def checks(self, *, family: str, dtype: str) -> list[Check]:
        """The model against persistence (judged), then the baselines and The Well's figures for information."""
        about = {"family": family, "unit": "1", "operator": self.operator, "dtype": dtype}
        checks = []
        if MODEL in self.errors:
            model, held = self.errors[MODEL], self.errors[PERSISTENCE]
            for name, average, span in (("1_step", _one_step, "frame 1"), ("rollout", _rollout, LATER)):
                wins = sum(average([m]) < average([p]) for m, p in zip(model, held, strict=True))
                detail = f"{span}; below persistence in {wins} of {len(model)} trajectories"
                checks.append(Check.below(f"vrmse_{name}", average(model), average(held), detail=detail, **about))
                held_detail = f"{span}; frame 0 of the reference held"
                checks.append(Check.info(f"vrmse_persistence_{name}", average(held), detail=held_detail, **about))
                well = {**about, "operator": WELL}
                checks.append(Check.info(f"vrmse_well_{name}", average(self.well), detail=span, **well))
        if FLOOR in self.errors:
            rows = self.errors[FLOOR]
            floor, span = (_rollout(rows), LATER) if len(rows[0]) > 1 else (_first(rows), "frame 0")
            detail = f"{span}; the autoencoder's reconstruction of the reference"
            checks.append(Check.info("vrmse_autoencoder_floor", floor, detail=detail, **about))
        return checks

    def series(self, times: tuple[float, ...]) -> list[Series]:
        """Growth of the error with lead time: model, persistence and the autoencoder's floor, as far as measured."""
        if not self.errors:
            return []
        curves = tuple(Curve.over_trajectories(label, rows) for label, rows in self.errors.items())
        caption = (
            f"VRMSE = {self.operator}; mean over trajectories, band: their range. The dotted line at 1 is the error of "
            "a prediction that knows the mean <v> of the reference and nothing else."
        )
        return [Series("vrmse", "Growth of the error", times, "lead time t [s]", "VRMSE [1]", curves, caption=caption)]


def _first(errors: list[list[float]]) -> float:
    return sum(row[0] for row in errors) / len(errors)


def _one_step(errors: list[list[float]]) -> float:
    return sum(row[1] for row in errors) / len(errors)


def _rollout(errors: list[list[float]]) -> float:
    return sum(sum(row[1:]) / (len(row) - 1) for row in errors) / len(errors)
