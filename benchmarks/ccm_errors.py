"""Forecasts of `study_ccm.py` and their errors: of one model, or of every α in a bank."""

from __future__ import annotations

import torch
from ccm_problems import Problem
from ccm_stores import CALIBRATION, POINTS, START, STEPS, TARGETS, TEST, members
from torch import Tensor

from latentphys.autoencoders import Autoencoder
from latentphys.composition import CompositeModel
from latentphys.data import Store
from latentphys.grid import Geometry
from latentphys.rollout import LatentStepper, rollout
from latentphys.transformer.dynamics import Dynamics
from latentphys.validators.pointwise import vrmse

BANK = tuple(k / 4 for k in range(-12, 13))
"""The α that are tried."""


class Trials:
    """The trajectories that forecasts are compared with, those to choose α by before those to measure errors with.

    Args:
        fields, latents: the pool of one seed.
        autoencoder: which made the latents.
    """

    def __init__(self, problem: Problem, fields: Store, latents: Store, autoencoder: Autoencoder) -> None:
        self.fields, self.autoencoder = fields, autoencoder
        self.chosen: list[int] = []
        self.rows: dict[tuple[str, float], slice] = {}
        for part, points, count in (("calibration", TARGETS, CALIBRATION), ("test", POINTS, TEST)):
            for x in points:
                self.rows[part, x] = slice(len(self.chosen), len(self.chosen) + count)
                self.chosen += members(problem, f"{part}{x:+g}")
        self.truth = torch.stack([latents.read("latent", i, slice(None)) for i in self.chosen])
        self.parameters = [{n: v[i] for n, v in fields.parameters.items()} for i in self.chosen]

    def calibrations(self) -> slice:
        """The rows of all trajectories to choose α by."""
        return slice(0, CALIBRATION * len(TARGETS))

    def tests(self) -> slice:
        """The rows of all trajectories to measure errors on."""
        return slice(CALIBRATION * len(TARGETS), len(self.chosen))

    def forecast(self, dynamics: Dynamics, rows: slice, start: int = START, steps: int = STEPS) -> Tensor:
        """Latents (trajectory, step, …) of a free run from a frame."""
        geometry = Geometry.stack([self.fields.geometry(i) for i in self.chosen[rows]])
        stepper = _Stepper(self.autoencoder, dynamics, geometry, self.fields.family)
        names = {p.name for p in dynamics.conditioning.parameters}
        told = [{n: v for n, v in p.items() if n in names} for p in self.parameters[rows]]
        frames = rollout(stepper, self.truth[rows, start : start + 1], lambda n: told, steps)
        return torch.stack([frame.latent for frame in frames], dim=1)[:, 1:]

    def errors(self, forecast: Tensor, rows: slice, start: int = START) -> Tensor:
        """VRMSE of each trajectory over all its steps, of latents about their mean over the box."""
        truth = self.truth[rows, start + 1 : start + 1 + forecast.shape[1]]
        axes = tuple(range(1, truth.ndim))
        fluctuation = truth - truth.mean((-3, -2, -1), keepdim=True)
        return ((forecast - truth).square().sum(axes) / fluctuation.square().sum(axes)).sqrt()

    def unmoved(self, rows: slice) -> Tensor:
        """The forecast in which nothing moves."""
        return self.truth[rows, START : START + 1].expand(-1, STEPS, -1, -1, -1, -1)

    def decoded(self, forecast: Tensor, rows: slice) -> Tensor:
        """VRMSE of the fields at the end of forecasts, one number per trajectory."""
        geometry = Geometry.stack([self.fields.geometry(i) for i in self.chosen[rows]])
        with torch.no_grad():
            fields = self.autoencoder.decode(forecast[:, -1], geometry, self.fields.family).double()
        scale = self.autoencoder.scale(self.fields.family)
        result = []
        for n, i in enumerate(self.chosen[rows]):
            state = self.fields[i, START + STEPS]
            truth = scale.pack(state.fields).double()
            if "velocity" in state.fields:
                result.append(vrmse(fields[n], truth, state.geometry))
            else:
                deviation = truth - truth.mean((-3, -2, -1), keepdim=True)
                result.append(((fields[n] - truth).square().sum() / deviation.square().sum()).sqrt())
        return torch.stack(result)

    def bank(self, model: CompositeModel, rows: slice, start: int = START, steps: int = STEPS) -> Tensor:
        """Errors (α, trajectory) of every α in the bank."""
        return torch.stack(
            [self.errors(self.forecast(model.set(a).dynamics, rows, start, steps), rows, start) for a in BANK]
        )


class _Stepper(LatentStepper):
    """Takes flows that are encoded already."""

    def encode(self, packed: Tensor) -> Tensor:
        return packed
