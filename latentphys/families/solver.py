"""What a solver of a family is, and the Runge–Kutta scheme that most of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

Fields = dict[str, Tensor]
"""Name → a batch of fields, ``(B, 3, nx, ny, nz)`` or ``(B, nx, ny, nz)``; on a sphere ``(B, [2,] nlat, nlon)``."""

RUNGE_KUTTA = ((8 / 15, 0.0), (5 / 12, -17 / 60), (3 / 4, -5 / 12))
"""Weights (γ, ζ) of the new and the previous rates in each stage."""

STEPS_BETWEEN_LIMITS = 8
"""Steps of equal Δt before the stable limit is worked out anew."""


class Solver(ABC):
    """Advances a batch of trajectories that share Δt.

    Args:
        dtype: of the working state, FP32 or FP64.
        device: where it is.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"Expected a solver in FP32 or FP64, got {dtype}.")
        self.dtype, self.device = dtype, torch.device(device)

    @abstractmethod
    def stable_step(self, fields: Fields) -> float:
        """The largest stable Δt [s] of the whole batch at this state."""

    @abstractmethod
    def step(self, fields: Fields, time: float, dt: float) -> Fields:
        """The state one step later.

        Args:
            fields: the state; it is not changed.
            time: t [s].
            dt: Δt [s]; `stable_step` tells the limit.
        """

    def working(self, fields: Fields) -> Fields:
        """A first state, FP64, as this solver works on it."""
        return {name: value.to(self.device, self.dtype) for name, value in fields.items()}

    def recorded(self, fields: Fields) -> Fields:
        """The state as a store keeps it: FP64, on the CPU, its constraints met exactly."""
        return {name: value.double().cpu() for name, value in fields.items()}

    def memory(self) -> Fields:
        """What the next step depends on besides the state, such as a pressure to start from."""
        return {}

    def remember(self, memory: Fields) -> None:  # noqa: B027
        """Take up the memory of another solver of the same batch."""

    def advance(self, fields: Fields, time: float, duration: float) -> Fields:
        """The state `duration` [s] later, in equal steps within the stable limit, which is renewed every few steps.

        Raises:
            FloatingPointError: NaN or infinity at the end.
        """
        end = time + duration
        while end - time > 1e-9 * duration:
            limit = self.stable_step(fields)
            steps = max(1, int(-(-(end - time) // limit)))
            dt = (end - time) / steps
            for _ in range(min(steps, STEPS_BETWEEN_LIMITS)):
                fields = self.step(fields, time, dt)
                time += dt
        for name, value in fields.items():
            if not bool(torch.isfinite(value).all()):
                raise FloatingPointError(
                    f"Expected a finite {name}, got NaN or infinity near t = {time:.4g} s; refine the grid or force "
                    "less."
                )
        return fields


class RungeKutta(Solver):
    """Third-order low-storage Runge–Kutta, stable to √3 along the imaginary and to 2.51 along the real axis.

    A subclass gives the `rates`; where the state obeys a constraint, it also gives `constrain`.

    Args:
        compiled: fuse the arithmetic of a stage with `torch.compile`; pays from about a hundred steps.

    Reference: Le & Moin, J. Comput. Phys. 92 (1991).
    """

    def __init__(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", compiled: bool = False
    ) -> None:
        super().__init__(dtype, device)
        # The C library hands freed memory back, to be faulted in anew at every step, beyond twice the largest block it
        # has seen come and go. This one, which is never touched, raises that to 32 MiB.
        torch.empty(2**24, dtype=torch.uint8)
        self.compiled = compiled
        self._fused_stage = self.fused(self._stage)

    def fused(self, function: Any) -> Any:
        """The function as one kernel, where this solver is compiled."""
        return torch.compile(function, dynamic=False) if self.compiled else function

    @abstractmethod
    def rates(self, fields: Fields, drive: Fields) -> Fields:
        """Time derivative of every field, in tensor arithmetic alone, for `torch.compile` fuses it.

        Args:
            drive: what `drive` returned for this stage.
        """

    def drive(self, fields: Fields, time: float) -> Fields:
        """What acts in a stage from outside, worked out beforehand and not fused, such as a force at a time."""
        return {}

    def residue(self, fields: Fields) -> Fields:
        """What `constrain` needs of the state of a stage and is cheap to work out while it is at hand; fused."""
        return {}

    def constrain(self, fields: Fields, residue: Fields, duration: float) -> Fields:
        """The state of a stage made to obey its constraints; the stage lasted `duration` [s]."""
        return fields

    def _stage(
        self, fields: Fields, previous: Fields | None, drive: Fields, new: Tensor, old: Tensor
    ) -> tuple[Fields, Fields, Fields]:
        """The fields of a stage before their constraints, their rates, and the residue."""
        rates = self.rates(fields, drive)
        after = {name: value + new * rates[name] for name, value in fields.items()}
        if previous is not None:
            after = {name: value + old * previous[name] for name, value in after.items()}
        return after, rates, self.residue(after)

    @torch.no_grad()
    def step(self, fields: Fields, time: float, dt: float) -> Fields:
        previous = None
        for gamma, zeta in RUNGE_KUTTA:
            # as tensors, for a number would be compiled into the kernel
            new, old = torch.tensor([gamma * dt, zeta * dt], dtype=self.dtype, device=self.device)
            fields, previous, residue = self._fused_stage(fields, previous, self.drive(fields, time), new, old)
            duration = (gamma + zeta) * dt
            fields = self.constrain(fields, residue, duration)
            time += duration
        return fields
