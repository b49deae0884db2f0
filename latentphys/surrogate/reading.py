"""What an alarm said, and what was done about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Limits = Mapping[str, tuple[float, float]]
"""Quantity → (lowest, highest) value that is quiet."""


class AlarmWarning(UserWarning):
    """A flow that a surrogate is asked for, or makes, is beyond the limits of its alarm."""


class AlarmError(RuntimeError):
    """The same where the surrogate was told to raise; it stands where it stood before the call."""


@dataclass(frozen=True)
class Reading:
    """What an alarm measured of some flows at one time.

    Args:
        time: t [s].
        values: quantity → its value for each flow.
        limits: quantity → (lowest, highest) value that is quiet.
    """

    time: float
    values: Mapping[str, tuple[float, ...]]
    limits: Limits

    @property
    def rings(self) -> tuple[tuple[str, ...], ...]:
        """For each flow the quantities that are beyond their limits; NaN always is."""
        num_flows = len(next(iter(self.values.values())))
        return tuple(tuple(name for name in self.values if not self._is_quiet(name, n)) for n in range(num_flows))

    @property
    def is_ringing(self) -> bool:
        return any(self.rings)

    def _is_quiet(self, name: str, flow: int) -> bool:
        low, high = self.limits[name]
        return low <= self.values[name][flow] <= high

    def __str__(self) -> str:
        lines = []
        for flow, names in enumerate(self.rings):
            lines += [
                f"flow {flow} at t = {self.time:g} s: {name} {self.values[name][flow]:.4g} beyond "
                f"{self.limits[name][0]:.4g} … {self.limits[name][1]:.4g}"
                for name in names
            ]
        return "; ".join(lines) or f"{len(self.rings)} flow(s) quiet at t = {self.time:g} s"


@dataclass(frozen=True)
class Intervention:
    """A ring of the alarm, or a call of the fallback.

    Args:
        time, duration: the interval, from t [s], or, without a duration, a state at t.
        flow: which one of the batch.
        quantities: what rang; none where the fallback took the rest of a duration.
        is_fallback: whether the fallback was called.
    """

    time: float
    duration: float
    flow: int
    quantities: tuple[str, ...]
    is_fallback: bool
