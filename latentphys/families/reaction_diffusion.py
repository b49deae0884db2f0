"""Reaction and diffusion of dissolved substances, and the Gray–Scott family of patterns.

    ∂c_i/∂t = D_i Δc_i + R_i(c)

Strang's splitting: half a step of reaction, a step of diffusion, half a step of reaction. Diffusion by the seven-point
Laplacian is exact in time, in the eigenbasis of the box; its kernel is that of a random walk between cells, and is
nowhere negative. Reactions go by Shu & Osher's third-order Runge–Kutta scheme, a mean of Euler steps. So what one
Euler step of the reactions keeps non-negative, the whole step does.

References: Strang, SIAM J. Numer. Anal. 5 (1968); Shu & Osher, J. Comput. Phys. 77 (1988); Pearson, Science 261 (1993).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from latentphys.families.family import (
    Family,
    Parameters,
    all_round,
    box,
    check_number,
    check_range,
    coloured,
    generator,
    uniform,
)
from latentphys.families.solver import Fields, Solver
from latentphys.fields import FieldSpec
from latentphys.grid import Geometry, Grid
from latentphys.separable import Separable
from latentphys.sphere import Sphere

STEP = 0.5
"""Δt times the fastest rate of the reactions. At 1 a pattern is off by 3 % after 200 s, at ½ by 1 %; 2 would keep it
positive."""


class Kinetics(ABC):
    """Reactions among the fields; pure tensor arithmetic."""

    @abstractmethod
    def rates(self, fields: Fields) -> Fields:
        """R [1/s times the unit of the field], by field."""

    @abstractmethod
    def fastest(self, fields: Fields) -> Tensor:
        """A bound on the rates of change [1/s]: Euler steps up to its inverse are stable, and keep fields positive."""


def per_cell(value: float | Tensor) -> Float[Tensor, "batch 1 1 1"]:
    """A number, or one per trajectory (B,), ready to multiply scalars."""
    return torch.as_tensor(value, dtype=torch.float64).reshape(-1, 1, 1, 1)


@dataclass(frozen=True)
class GrayScott(Kinetics):
    """U + 2V → 3V, V → P in a stirred tank: R_u = −u v² + F (1 − u), R_v = u v² − (F + k) v.

    Args:
        feed: F [1/s], a number or one per trajectory (B,), > 0.
        kill: k [1/s], the same.

    Reference: Gray & Scott, Chem. Eng. Sci. 38 (1983).
    """

    feed: float | Tensor
    kill: float | Tensor

    def rates(self, fields: Fields) -> Fields:
        u, v = fields["u"], fields["v"]
        feed, kill = per_cell(self.feed).to(u), per_cell(self.kill).to(u)
        made = u * v * v
        return {"u": feed * (1 - u) - made, "v": made - (feed + kill) * v}

    def fastest(self, fields: Fields) -> Tensor:
        u, v = fields["u"], fields["v"]
        feed, kill = per_cell(self.feed).to(u), per_cell(self.kill).to(u)
        return feed + kill + v * (v + 2 * u)


@dataclass(frozen=True)
class Fisher(Kinetics):
    """Logistic growth, R_u = r u (1 − u), whose fronts travel at 2 √(r D).

    Args:
        growth: r [1/s], a number or one per trajectory (B,), > 0.

    Reference: Fisher, Ann. Eugen. 7 (1937).
    """

    growth: float | Tensor

    def rates(self, fields: Fields) -> Fields:
        u = fields["u"]
        return {"u": per_cell(self.growth).to(u) * u * (1 - u)}

    def fastest(self, fields: Fields) -> Tensor:
        u = fields["u"]
        return per_cell(self.growth).to(u) * (1 + 2 * u)


class ReactionDiffusion(Solver):
    """A batch of reacting solutions in one box; its fields are concentrations in cells, those that `diffusivity` names.

    Args:
        grid: a box of walls, which nothing passes, and periodic axes.
        diffusivity: D [m²/s] of each field, ≥ 0, a number or one per trajectory (B,).
        kinetics: the reactions.
        dtype: FP32 or FP64. Good value: FP32.
        compiled: fuse the reactions with `torch.compile`.

    Raises:
        ValueError: open sides, or a negative diffusivity.
    """

    def __init__(
        self,
        grid: Grid,
        diffusivity: Mapping[str, float | Tensor],
        kinetics: Kinetics,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        compiled: bool = False,
    ) -> None:
        super().__init__(dtype, device)
        if any(sum(grid.open_sides, ())):
            raise ValueError(f"Expected a box of walls and periodic axes, got {grid.boundaries}; close its sides.")
        for name, value in diffusivity.items():
            if not bool((torch.as_tensor(value) >= 0).all()):
                raise ValueError(f"Expected a diffusivity ≥ 0 [m²/s] of {name!r}, got {value}.")
        self.grid, self.kinetics = grid, kinetics
        self.diffusivity = {name: per_cell(value).to(self.device, dtype) for name, value in diffusivity.items()}
        x, y, z = (1 / h**2 for h in grid.spacing)
        self.laplacian = Separable(
            grid, Geometry(grid).ends, (x, y, z), lambda minus: minus, dtype=dtype, device=self.device
        )
        self._react = torch.compile(self._reacted, dynamic=False) if compiled else self._reacted
        self._spectra: tuple[float, Fields] = (0.0, {})

    def stable_step(self, fields: Fields) -> float:
        """The largest Δt [s] of the whole batch that the reactions allow; diffusion is exact at any."""
        return STEP / float(self.kinetics.fastest(fields).amax())

    @torch.no_grad()
    def step(self, fields: Fields, time: float, dt: float) -> Fields:
        half = torch.tensor(0.5 * dt, dtype=self.dtype, device=self.device)
        fields = self._react(fields, half)
        # rounding of the transforms leaves some −1e-8 of the largest value where nothing is (FP32)
        fields = {name: self.laplacian(value, self._decay(dt)[name]).clamp(min=0.0) for name, value in fields.items()}
        return self._react(fields, half)

    def _decay(self, dt: float) -> Fields:
        """exp(−D Δt λ) of every mode, by field."""
        if self._spectra[0] != dt:
            decay = {name: torch.exp(-dt * value * self.laplacian.symbol) for name, value in self.diffusivity.items()}
            self._spectra = (dt, decay)
        return self._spectra[1]

    def _reacted(self, fields: Fields, dt: Tensor) -> Fields:
        """Shu & Osher's scheme; all three stages are means of Euler steps of `dt`."""
        after = fields
        for kept in (0.0, 3 / 4, 1 / 3):
            rates = self.kinetics.rates(after)
            after = {
                name: kept * fields[name] + (1 - kept) * (value + dt * rates[name]) for name, value in after.items()
            }
        return after


@dataclass(frozen=True)
class GrayScottPatterns(Family):
    """A family of Gray–Scott patterns: spots that divide, worms and spirals, depending on feed and kill rate.

    Steady patterns and the uniform states meet near k = √F/2 − F, beyond which the well-mixed tank has no steady state
    but the empty one, (u, v) = (1, 0).

    Args:
        feed: range of the feed rate F [1/s].
        excess: range of k − (√F/2 − F) [1/s].
        diffusivity: range of the diffusivity D_u of u [m²/s], in a box of side 1 m.
        ratio: D_u / D_v.
        sides: ``periodic``, or ``closed``: insulating walls all round.
        interval: time between frames [s].
        spin_up: time before the first frame [s].
    """

    name: ClassVar[str] = "reaction_diffusion"
    specs: ClassVar[Mapping[str, FieldSpec]] = {name: FieldSpec(name, "scalar", "1", "positive") for name in ("u", "v")}
    parameter_units: ClassVar[Mapping[str, str]] = {
        "feed": "1/s",
        "kill": "1/s",
        "diffusivity_u": "m2/s",
        "diffusivity_v": "m2/s",
    }

    feed: Sequence[float] = (0.018, 0.026)
    excess: Sequence[float] = (-0.002, 0.001)
    diffusivity: Sequence[float] = (6e-5, 1.2e-4)
    ratio: float = 2.0
    sides: Literal["periodic", "closed"] = "periodic"
    interval: float = 30.0
    spin_up: float = 60.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("feed rates", self.feed, 0, 0.0625)
        check_range("excess kill rates", self.excess, -0.01, 0.02)
        check_range("diffusivities", self.diffusivity, 0, np.inf)
        check_number("ratio of diffusivities", self.ratio, 0)
        all_round(self.sides)

    def grid(self, shape: Sequence[int]) -> Grid:
        return box(shape, boundaries=all_round(self.sides))

    def draw(self, seed: int, trajectory: int) -> dict[str, Any]:
        rng = generator(seed, trajectory, 0)
        feed, diffusivity = uniform(self.feed, rng), uniform(self.diffusivity, rng)
        return {
            "feed": feed,
            "kill": np.sqrt(feed) / 2 - feed + uniform(self.excess, rng),
            "diffusivity_u": diffusivity,
            "diffusivity_v": diffusivity / self.ratio,
        }

    def initial(self, geometry: Geometry | Sphere, parameters: Mapping[str, Any], seed: int, trajectory: int) -> Fields:
        """Clouds of every size, about a fifth of the box, in which half of u has gone and left ¼ of v."""
        assert isinstance(geometry, Geometry)
        noise = coloured(generator(seed, trajectory, 1).standard_normal(geometry.grid.shape), -2.5)
        cloud = torch.sigmoid(8 * (noise / noise.std() - 0.8))
        return {"u": 1 - 0.5 * cloud, "v": 0.25 * cloud}

    def solver(
        self,
        geometry: Geometry | Sphere,
        parameters: Parameters,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        compiled: bool = False,
    ) -> ReactionDiffusion:
        assert isinstance(geometry, Geometry)
        values = {name: torch.as_tensor(parameters[name], dtype=dtype, device=device) for name in self.parameter_units}
        return ReactionDiffusion(
            geometry.grid,
            {"u": values["diffusivity_u"], "v": values["diffusivity_v"]},
            GrayScott(values["feed"], values["kill"]),
            dtype=dtype,
            device=device,
            compiled=compiled,
        )
