"""How a duration that a solver offers divides into intervals of a model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from latentphys.surrogate.contract import INTERVAL_TOLERANCE


@dataclass(frozen=True)
class Window:
    """A duration in intervals of a model.

    Args:
        num_steps: how many intervals fit.
        remainder: what is left [s]; 0.0 where they fill it to one part in a million of an interval, all of it where
            none fits.
        interval: Δt [s].
    """

    num_steps: int
    remainder: float
    interval: float

    @classmethod
    def of(cls, duration: float, interval: float) -> Window:
        """Intervals in a duration [s]; ValueError for one that is not positive and finite."""
        if not 0 < duration < math.inf:
            raise ValueError(f"Expected a duration > 0 s, got {duration}.")
        num_steps = math.floor(duration / interval + INTERVAL_TOLERANCE)
        rest = duration - num_steps * interval
        is_rest = not num_steps or rest > INTERVAL_TOLERANCE * interval
        return cls(num_steps, rest if is_rest else 0.0, interval)


def span(num_steps: int | None, duration: float | None, interval: float, is_divisible: bool) -> tuple[int, float]:
    """How many intervals to step, and how many seconds to go beyond them.

    Args:
        num_steps: that many, or
        duration: a time [s]. Default of both: one interval.
        interval: Δt [s].
        is_divisible: whether something takes what is left of a duration.

    Raises:
        ValueError: both, less than one step, or a duration that leaves something which nobody takes.
    """
    if duration is None:
        if num_steps is not None and num_steps < 1:
            raise ValueError(f"Expected num_steps ≥ 1, got {num_steps}.")
        return num_steps or 1, 0.0
    if num_steps is not None:
        raise ValueError(f"Expected num_steps or a duration, got both: {num_steps} and {duration} s.")
    window = Window.of(duration, interval)
    if window.remainder and not is_divisible:
        n = window.num_steps
        nearest = " or ".join(f"{m * interval:g} s" for m in (n, n + 1) if m)
        raise ValueError(
            f"Expected a duration of whole intervals of {interval:g} s, got {duration:g} s; the nearest: {nearest}. Or "
            "give a fallback, which takes the rest."
        )
    return window.num_steps, window.remainder
