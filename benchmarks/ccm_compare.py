"""Every method of `study_ccm.py` on one problem and seed, trajectory for trajectory the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from ccm_errors import BANK, Trials
from ccm_models import PREFIX, Models
from ccm_problems import Problem
from ccm_stores import POINTS, START, TARGETS
from torch import Tensor

from latentphys.composition import CompositeModel, coordinate
from latentphys.training import load_dynamics

ByPoint = dict[str, float]


class Comparison:
    """Errors by method and point, and the α that methods chose.

    Args:
        models: of one problem and seed.
        composite: of the default endpoints.

    Attributes:
        errors, decoded: method → point → VRMSE of latents over all steps, and of the last decoded frame.
        alphas: method → point → α.
    """

    def __init__(self, models: Models, composite: CompositeModel) -> None:
        self.models, self.composite = models, composite
        self.trials = Trials(models.problem, models.fields, models.latents, composite.autoencoder)
        self.errors: dict[str, ByPoint] = {}
        self.decoded: dict[str, ByPoint] = {}
        self.alphas: dict[str, ByPoint] = {}

    def run(self) -> None:
        """Take all methods in turn."""
        trials, models = self.trials, self.models
        for x in POINTS:
            self._keep("persistence", x, trials.unmoved(trials.rows["test", x]))
        self._keep_model("anchor", models.anchor(), POINTS)
        self._keep_model("told", models.anchor(told=True), POINTS)
        self.bank = trials.bank(self.composite, trials.tests())
        calibration = trials.bank(self.composite, trials.calibrations())
        known = {x: calibration[:, trials.rows["calibration", x]].mean(1) for x in TARGETS}
        shown = {x: torch.tensor(curve) for x, curve in zip(POINTS, self.curves().values(), strict=True)}
        self._choose("low", dict.fromkeys(POINTS, -1.0))
        self._choose("high", dict.fromkeys(POINTS, 1.0))
        self._choose("average", dict.fromkeys(POINTS, 0.0))
        self._choose("coordinate", {x: x for x in POINTS})
        self._choose("other scale", {x: other_scale(models.problem, x) for x in TARGETS})
        self._choose("wrong sign", {x: -x for x in POINTS})
        self._choose("scale", {x: by_others(x, known) for x in TARGETS})
        self._choose_by_prefix()
        self._choose("best fixed", dict.fromkeys(POINTS, fixed(known)))
        self._choose("oracle", {x: best(shown[x]) for x in POINTS})
        for x in TARGETS:
            self._keep_model("tuned on prefix", models.short(x), [x])
            self._keep_model("tuned on target", models.full(x), [x])

    def curves(self) -> dict[str, list[float]]:
        """Point → the error of every α of the bank."""
        return {point(x): self.bank[:, self._test(x)].mean(1).tolist() for x in POINTS}

    def prefixed(self, steps: int) -> Tensor:
        """Which α of the bank has the smallest error over the last observed steps, of each test trajectory."""
        return self.trials.bank(self.composite, self.trials.tests(), START - steps, steps).argmin(0)

    def by_prefix(self, steps: int) -> ByPoint:
        """Errors where each trajectory has the α that so many observed steps ask for."""
        errors = self.bank.gather(0, self.prefixed(steps)[None])[0]
        return {point(x): float(errors[self._test(x)].mean()) for x in POINTS}

    def error(self, composite: CompositeModel, x: float, alpha: float) -> tuple[float, Tensor]:
        """The error of θ(α) at a point, and the forecast."""
        rows = self.trials.rows["test", x]
        forecast = self.trials.forecast(composite.set(alpha).dynamics, rows)
        return float(self.trials.errors(forecast, rows).mean()), forecast

    def _test(self, x: float) -> slice:
        """The rows of a point among those of all tests."""
        rows, first = self.trials.rows["test", x], self.trials.tests().start
        return slice(rows.start - first, rows.stop - first)

    def _keep(self, method: str, x: float, forecast: Tensor) -> None:
        rows = self.trials.rows["test", x]
        self.errors.setdefault(method, {})[point(x)] = float(self.trials.errors(forecast, rows).mean())
        self.decoded.setdefault(method, {})[point(x)] = float(self.trials.decoded(forecast, rows).mean())

    def _keep_model(self, method: str, path: Path, points: Sequence[float]) -> None:
        dynamics = load_dynamics(path)[0]
        for x in points:
            self._keep(method, x, self.trials.forecast(dynamics, self.trials.rows["test", x]))

    def _choose(self, method: str, alphas: Mapping[float, float]) -> None:
        self.alphas[method] = {point(x): alpha for x, alpha in alphas.items()}
        for x, alpha in alphas.items():
            self._keep(method, x, self.error(self.composite, x, alpha)[1])

    def _choose_by_prefix(self) -> None:
        picked = torch.tensor(BANK)[self.prefixed(PREFIX)]
        for x in POINTS:
            own = picked[self._test(x)].tolist()
            forecasts = {alpha: self.error(self.composite, x, alpha)[1] for alpha in set(own)}
            self._keep("prefix", x, torch.stack([forecasts[alpha][n] for n, alpha in enumerate(own)]))
            self.alphas.setdefault("prefix", {})[point(x)] = sum(own) / len(own)


def point(x: float) -> str:
    """The name of a coordinate in results."""
    return f"{x:+g}"


def best(errors: Tensor) -> float:
    """The α of the bank with the smallest error (α,)."""
    return BANK[int(errors.argmin())]


def fixed(errors: Mapping[float, Tensor]) -> float:
    """The one α for all targets whose errors are smallest, each target's in units of its own best one."""
    return best(torch.stack([curve / curve.min() for curve in errors.values()]).mean(0))


def within(alpha: float) -> float:
    """The nearest α in the range of the bank."""
    return min(max(alpha, BANK[0]), BANK[-1])


def by_others(x: float, errors: Mapping[float, Tensor]) -> float:
    """α at x, on the straight line through the best α of all other targets."""
    others = [target for target in errors if target != x]
    b, a = np.polyfit(others, [best(errors[target]) for target in others], 1)
    return within(float(a + b * x))


def other_scale(problem: Problem, x: float) -> float:
    """The coordinate in the parameter itself where x is linear in its logarithm, and the other way round."""
    low, high = problem.value(-1.0), problem.value(1.0)
    return within(coordinate(problem.value(x), low, high, problem.other_scale))
