"""Where α of a composition comes from, apart from measurements: given, or from a physical parameter."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAPS = ("linear", "log")
FAR = 2.0
"""|α| beyond which nothing that endpoints say is likely to hold."""


@dataclass(frozen=True)
class Choice:
    """An α, and how it was found.

    Args:
        alpha: α; −1 is the low endpoint, +1 the high one, and what lies beyond is extrapolation.
        how: ``given | metadata | scale | prefix``.
        about: all that led to it, ready for JSON.

    Raises:
        ValueError: an α that is not finite.
    """

    alpha: float
    how: str
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not math.isfinite(self.alpha):
            raise ValueError(f"Expected a finite alpha, got {self.alpha}. Give a number, such as 0.5.")
        if abs(self.alpha) > FAR * (1 + 1e-9):
            warnings.warn(
                f"alpha = {self.alpha:g} is far beyond the endpoints at −1 and +1; expect little of it.", stacklevel=3
            )

    @property
    def range(self) -> str:
        """Whether α lies between the endpoints, in words."""
        return (
            "interpolation"
            if abs(self.alpha) <= 1
            else f"extrapolation, {abs(self.alpha):.3g} × as far as the endpoints"
        )

    def to_dict(self) -> dict[str, Any]:
        return {"how": self.how, "range": self.range, **self.about}

    @property
    def is_drawn(self) -> bool:
        """Whether something was measured that a picture can show."""
        return self.how in ("prefix", "scale") and ("bank" in self.about or "points" in self.about)

    def draw(self, path: Path) -> None:
        """Draw what was measured, where anything was; else nothing."""
        if self.is_drawn:
            from latentphys.composition.picture import draw

            draw(self.alpha, self.about, path)


def coordinate(value: float, low: float, high: float, map: str = "linear") -> float:
    """α of a parameter's value: −1 at the low endpoint's, +1 at the high one's, linear in it or in its logarithm.

    Raises:
        ValueError: an unknown map, values that are not finite, endpoints at one value, or a logarithm of what is not
            positive.
    """
    x, a, b = (scaled(v, map) for v in (value, low, high))
    if a == b:
        raise ValueError(f"Expected endpoints at two values of the parameter, got {low:g} for both.")
    return (2 * x - a - b) / (b - a)


def scaled(value: float, map: str) -> float:
    """A value as a map takes it."""
    if map not in MAPS:
        raise ValueError(f"Expected a map of {' | '.join(MAPS)}, got {map!r}.")
    if not math.isfinite(value):
        raise ValueError(f"Expected a finite value of the parameter, got {value}.")
    if map == "log" and value <= 0:
        raise ValueError(
            f"Expected a positive value of the parameter for its logarithm, got {value:g}; use --map linear."
        )
    return math.log(value) if map == "log" else float(value)
