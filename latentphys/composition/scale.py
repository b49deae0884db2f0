"""α as a function of a physical parameter: from what checkpoints say of themselves, or fitted to calibration flows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from latentphys.composition.checkpoints import ROLES, digest
from latentphys.composition.choices import Choice, coordinate, scaled
from latentphys.composition.live import CompositeModel
from latentphys.composition.prefix import BANK, TOLERANCE, Prefix, search
from latentphys.data import Store
from latentphys.data.regimes import chosen_trajectories, constants
from latentphys.training import manifest
from latentphys.training.checkpoint import Checkpoint


@dataclass(frozen=True)
class Fit:
    """α = a + b x, by least squares, with x a parameter or its logarithm.

    Args:
        parameter: its name.
        map: ``linear | log``.
        a, b: intercept and slope.
        r: correlation of x and the best α; None where one of them is constant. Of two points it is ±1.
        points: ``value``, ``alpha``, ``score``, ``store`` and ``trajectories`` of each calibration flow.
        unit: of the parameter.
    """

    parameter: str
    map: str
    a: float
    b: float
    r: float | None
    points: Sequence[Mapping[str, Any]]
    unit: str = "1"

    @classmethod
    def of(cls, parameter: str, map: str, points: Sequence[Mapping[str, Any]], unit: str = "1") -> Fit:
        """The fit to points.

        Raises:
            ValueError: fewer than two values of the parameter, or a logarithm of what is not positive.
        """
        x = np.array([scaled(point["value"], map) for point in points])
        alpha = np.array([point["alpha"] for point in points], dtype=np.float64)
        if len(set(x.tolist())) < 2:
            raise ValueError(
                f"Expected calibration flows at two or more values of {parameter!r}, got {len(set(x.tolist()))}; add "
                "stores at other values."
            )
        b, a = np.polyfit(x, alpha, 1).tolist()
        r = float(np.corrcoef(x, alpha)[0, 1]) if float(np.ptp(alpha)) > 0 else None
        return cls(parameter, map, a, b, r, list(points), unit)

    def alpha(self, value: float) -> float:
        """α of a value of the parameter."""
        return self.a + self.b * scaled(value, self.map)

    def choice(self, value: float) -> Choice:
        """α of a value, with the fit that says so."""
        return Choice(self.alpha(value), "scale", {"value": value, **asdict(self)})

    @classmethod
    def read(cls, path: str | Path, sources: Sequence[Checkpoint]) -> Fit:
        """The fit of an earlier composition of the same three checkpoints, from its folder or its composition.json.

        Raises:
            ValueError: no fit there, or one of other checkpoints.
        """
        file = Path(path) / "composition.json" if Path(path).is_dir() else Path(path)
        try:
            about = manifest.read_json(file)
            found = about["found"]
            fit = cls(*(found[name] for name in ("parameter", "map", "a", "b", "r", "points", "unit")))
            hashes = [about[role]["sha256"] for role in ROLES]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"Expected a composition with --scale, got {file}, which holds no fit.") from None
        for role, expected, source in zip(ROLES, hashes, sources, strict=True):
            if digest(source) != expected:
                raise ValueError(f"Expected a fit of {source.path} as {role}, got that of other weights in {file}.")
        return fit


def calibrate(
    model: CompositeModel,
    stores: Sequence[Store],
    parameter: str,
    map: str = "linear",
    *,
    trajectories: Sequence[int] | None = None,
    frames: int = 4,
    bank: Sequence[float] = BANK,
    tolerance: float = TOLERANCE,
    progress: Callable[[int], None] = lambda done: None,
) -> Fit:
    """Fit α to the best one of each value that a parameter has in some stores; see `search` for the other arguments.

    Args:
        stores: of fields. Trajectories of one store at one value are scored together.
        parameter: one number for each trajectory, in one unit.

    Raises:
        ValueError: a parameter that the stores do not have, or in several units, or only one value of it.
    """
    groups = [(store, _by_value(store, parameter, trajectories)) for store in stores]
    units = sorted({store.attributes["parameter_units"][parameter] for store in stores})
    if len(units) > 1:
        raise ValueError(f"Expected one unit of {parameter!r} in all stores, got {units}. Convert them to one unit.")
    points = []
    for store, trajectories_at in groups:
        for value, some in sorted(trajectories_at.items()):
            best = search(model, Prefix.read(model, store, some, frames), bank, tolerance, progress)
            points.append(
                {"value": value, "alpha": best.alpha, **{k: best.about[k] for k in ("score", "store", "trajectories")}}
            )
    return Fit.of(parameter, map, points, units[0] if units else "1")


def _by_value(store: Store, parameter: str, trajectories: Sequence[int] | None) -> dict[float, list[int]]:
    """Value of a parameter → the trajectories at it."""
    known = constants(store)
    if parameter not in known:
        raise ValueError(
            f"Expected a parameter of {store.path} that is one number for each trajectory, {sorted(known)}, got "
            f"{parameter!r}. Name one of these."
        )
    groups: dict[float, list[int]] = {}
    for i in chosen_trajectories(store, trajectories):
        groups.setdefault(float(known[parameter][i]), []).append(i)
    return groups


def from_metadata(
    sources: Sequence[Checkpoint],
    parameter: str,
    value: float,
    map: str = "linear",
    low_at: float | None = None,
    high_at: float | None = None,
) -> Choice:
    """α of a parameter's value, with the endpoints at −1 and +1.

    Args:
        sources: anchor, low and high endpoint.
        low_at, high_at: the parameter of an endpoint. Default: the mean over its training trajectories, geometric for
            the map ``log``, which its checkpoint has.

    Raises:
        ValueError: a checkpoint that does not say it, or endpoints at one value.
    """
    low, high = (
        trained_at(source, parameter, map, option) if given is None else given
        for source, given, option in zip(sources[1:], (low_at, high_at), ("--low-at", "--high-at"), strict=True)
    )
    about = {"parameter": parameter, "value": value, "map": map, "low_at": low, "high_at": high}
    return Choice(coordinate(value, low, high, map), "metadata", about)


def trained_at(source: Checkpoint, parameter: str, map: str, option: str) -> float:
    """The mean of a parameter over the trajectories that a checkpoint was trained on."""
    regimes = source.extra.get("regimes", {})
    found = {family: known[parameter] for family, known in regimes.items() if parameter in known}
    values = {about["geometric_mean" if map == "log" else "mean"] for about in found.values()}
    if len(values) == 1:
        value = values.pop()
        if value is not None and math.isfinite(value):
            return float(value)
    if not regimes:
        got = "a checkpoint that does not say what it was trained on"
    elif not found:
        got = f"only {sorted({name for known in regimes.values() for name in known})}"
    elif len(values) > 1:
        got = f"one for each of {sorted(found)}"
    else:
        got = "values that have no logarithm" if map == "log" else "one that is not finite"
    raise ValueError(f"Expected the {parameter} of the training data in {source.path}, got {got}; pass {option}.")
