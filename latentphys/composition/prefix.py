"""α from the first frames of some flows: the one whose rollout in latent space comes nearest to them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentphys.composition.choices import Choice
from latentphys.composition.live import CompositeModel
from latentphys.data import Store
from latentphys.data.regimes import chosen_trajectories
from latentphys.grid import Geometry
from latentphys.rollout import LatentStepper, Parameters, num_intervals
from latentphys.transformer.conditioning import store_parameters

BANK: tuple[float, ...] = tuple(np.linspace(-2, 2, 17).tolist())
TOLERANCE = 0.01
"""Of a refined α."""
BATCH = 16
"""Trajectories that are rolled out together."""
FLAT = 1e-6
"""Relative spread of scores below which they say nothing."""


@dataclass(frozen=True, eq=False)
class Prefix:
    """The first frames of some flows of one family, as latents.

    Args:
        batches: of flows: what steps them, their latents (b, K, c, x, y, z), and the parameters of each frame.
        about: which flows, ready for JSON.
    """

    batches: Sequence[tuple[LatentStepper, Tensor, Sequence[Sequence[Parameters]]]]
    about: dict[str, Any]

    @classmethod
    @torch.no_grad()
    def read(
        cls, model: CompositeModel, store: Store, trajectories: Sequence[int] | None = None, frames: int = 4
    ) -> Prefix:
        """Encode the first frames of some trajectories, once for every α.

        Args:
            store: of fields.
            trajectories: which ones. Default: all.
            frames: K, one interval of the model apart: those that it looks at, and at least one more.

        Raises:
            ValueError: too few frames, or more than the store has, no such trajectories, or a store that the models do
                not know.
        """
        chosen = chosen_trajectories(store, trajectories)
        least, stride = model.dynamics.num_frames + 1, num_intervals(store, model.dynamics.interval(store.family))
        if frames < least or (frames - 1) * stride >= store.num_times:
            most = (store.num_times - 1) // stride + 1
            raise ValueError(
                f"Expected {least} to {most} frames, {stride} snapshots of {store.path} apart, got {frames}."
            )
        scale = model.autoencoder.scale(store.family)
        model.autoencoder.check(store.family, store.grid, store.specs)
        times, batches = range(0, frames * stride, stride), []
        for first in range(0, len(chosen), BATCH):
            some = chosen[first : first + BATCH]
            geometry = Geometry.stack([store.geometry(i) for i in some])
            stepper = LatentStepper(model.autoencoder, model.dynamics, geometry, store.family)
            latents, parameters = [], []
            for time in times:
                packed = [scale.pack({name: store.read(name, i, time) for name in scale.fields}) for i in some]
                latents.append(stepper.encode(torch.stack(packed)))
                parameters.append([store_parameters(store, i, time) for i in some])
            batches.append((stepper, torch.stack(latents, 1), parameters))
        return cls(batches, {"store": str(store.path.resolve()), "trajectories": chosen, "frames": frames})


@torch.no_grad()
def score(model: CompositeModel, prefix: Prefix, alpha: float) -> float:
    """Mean squared error of latents that θ(α) rolls out from the first frames, in units of their increments' spread.

    1 is one step of persistence. The mean is over flows, steps, channels and cells; ∞ where a rollout is not finite.
    """
    model.set(alpha)
    total, num = 0.0, 0
    for stepper, latents, parameters in prefix.batches:
        k, scale = model.dynamics.num_frames, model.dynamics.increment_std
        window = latents[:, :k]
        for n in range(k, latents.shape[1]):
            latent = stepper.step(window, parameters[n - 1], parameters[n]).latent
            window = torch.cat([window[:, 1:], latent[:, None]], dim=1)
            total += float(((latent - latents[:, n]) / scale).double().square().sum())
            num += latent.numel()
            if not math.isfinite(total):
                return math.inf
    return total / num


def search(
    model: CompositeModel,
    prefix: Prefix,
    bank: Sequence[float] = BANK,
    tolerance: float = TOLERANCE,
    progress: Callable[[int], None] = lambda done: None,
) -> Choice:
    """The α of the least score: the best of a bank, refined between its neighbours.

    The refinement is Brent's: golden sections, and parabolas where they do better.

    Args:
        bank: values of α to score, ≥ 2 different ones.
        tolerance: of the refined α.
        progress: called with the numbers of α scored since the last call.

    Raises:
        ValueError: a bank or a tolerance that is none, or scores that are all infinite, or all the same.
    """
    from scipy.optimize import minimize_scalar

    alphas = sorted(set(map(float, bank)))
    if len(alphas) < 2 or not all(map(math.isfinite, alphas)) or not tolerance > 0:
        raise ValueError(
            f"Expected a bank of two or more finite alphas and a tolerance above 0, got {list(bank)} and {tolerance}."
        )
    found: dict[float, float] = {}

    def measured(alpha: float) -> float:
        found[float(alpha)] = score(model, prefix, float(alpha))
        progress(1)
        return found[float(alpha)]

    scores = [measured(alpha) for alpha in alphas]
    finite = [s for s in scores if math.isfinite(s)]
    if not finite or (len(finite) == len(scores) and max(scores) - min(scores) <= FLAT * max(scores)):
        what = "the same one everywhere" if finite else "none that is finite"
        raise ValueError(
            f"Expected scores that depend on alpha on {prefix.about['store']}, got {what}; give more frames, another "
            "bank, or alpha itself."
        )
    best = scores.index(min(scores))
    if best in (0, len(alphas) - 1):
        warnings.warn(
            f"alpha = {alphas[best]:g}, the best of the bank, lies at its end; the least score may lie beyond.",
            stacklevel=2,
        )
    bounds = alphas[max(0, best - 1)], alphas[min(len(alphas) - 1, best + 1)]
    minimize_scalar(measured, bounds=bounds, method="bounded", options={"xatol": tolerance / 2})
    alpha = min(found, key=lambda a: (found[a], abs(a)))
    curve = sorted(found.items())
    about = {
        **prefix.about,
        "bank": alphas,
        "tolerance": tolerance,
        "score": found[alpha],
        "curve": [{"alpha": a, "score": s if math.isfinite(s) else None} for a, s in curve],
    }
    return Choice(alpha, "prefix", about)
