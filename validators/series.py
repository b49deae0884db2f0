"""Curves for the report: numbers along time or wave number, with their spread over trajectories."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from latentphys.validators.check import finite_or_none


@dataclass(frozen=True)
class Curve:
    """One line of a plot: the mean over trajectories and, where there are several, their range."""

    label: str
    y: tuple[float, ...]
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None

    @classmethod
    def over_trajectories(cls, label: str, values: list[list[float]]) -> Curve:
        """Mean and range of several trajectories' values, ``values[trajectory][point]``."""
        points = list(zip(*values, strict=True))
        mean = tuple(sum(point) / len(point) for point in points)
        if len(values) == 1:
            return cls(label, mean)
        return cls(label, mean, tuple(min(point) for point in points), tuple(max(point) for point in points))


@dataclass(frozen=True)
class Series:
    """One plot.

    Args:
        name: such as ``vrmse``.
        title: what it shows.
        x: the abscissa of every curve.
        x_label, y_label: name, symbol and unit of the axes.
        curves: the lines; labels are ``model``, ``reference``, ``persistence``, ``autoencoder floor``.
        log: both axes logarithmic.
        caption: how it was computed.
    """

    name: str
    title: str
    x: tuple[float, ...]
    x_label: str
    y_label: str
    curves: tuple[Curve, ...]
    log: bool = False
    caption: str = ""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description; points that JSON cannot hold become None."""

        def numbers(values: tuple[float, ...] | None) -> list[float | None] | None:
            return None if values is None else [finite_or_none(float(value)) for value in values]

        curves = [
            {"label": curve.label, "y": numbers(curve.y), "low": numbers(curve.low), "high": numbers(curve.high)}
            for curve in self.curves
        ]
        return {**vars(self), "x": numbers(self.x), "curves": curves}
