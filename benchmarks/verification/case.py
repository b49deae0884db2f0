"""What a verification case returns: rows of a table, and curves to draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Row:
    """One number held against a reference.

    Args:
        quantity: what, with its symbol and unit, such as ``K of a cubic array, c = 0.216 [1]``.
        value, reference: the number here and there.
        tolerance: how far it may be off: relative to |reference|, or absolute where the reference is 0.
        source: where the reference comes from: author, year and equation or table, or ``closed form``.
        settings: resolution, dtype and whatever else the number depends on.
    """

    quantity: str
    value: float
    reference: float
    tolerance: float
    source: str
    settings: str

    @property
    def error(self) -> float:
        """Relative to |reference|, absolute where that is 0."""
        return (self.value - self.reference) / (abs(self.reference) or 1.0)

    @property
    def passed(self) -> bool:
        return abs(self.error) <= self.tolerance


@dataclass(frozen=True)
class Line:
    """One line of a plot; reference lines are drawn as markers."""

    label: str
    x: np.ndarray
    y: np.ndarray
    is_reference: bool = False


@dataclass(frozen=True)
class Plot:
    """One panel: a comparison of curves."""

    title: str
    xlabel: str
    ylabel: str
    lines: Sequence[Line]
    xscale: str = "linear"
    yscale: str = "linear"


@dataclass(frozen=True)
class Result:
    """What a case found."""

    rows: Sequence[Row]
    plots: Sequence[Plot] = field(default_factory=list)


@dataclass(frozen=True)
class Case:
    """One verification.

    Args:
        family: the family's name.
        name: a few words.
        run: from a device (``cpu`` or ``cuda``) and a size (``small``: the whole table in about ten minutes on two
            cores; ``large``: what a GPU is for) to the result.
    """

    family: str
    name: str
    run: Callable[[str, str], Result]
