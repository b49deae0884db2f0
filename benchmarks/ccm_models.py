"""The models of `study_ccm.py`: an anchor, endpoints and fine-tuned models, trained by the library's own trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from ccm_problems import PROBLEMS
from ccm_stores import START, excerpt, make_pool, members
from torch import Tensor

from latentphys.composition import CompositeModel
from latentphys.configuration import compose
from latentphys.training import train_dynamics

SMALL = ("dynamics=tiny", "dynamics.dim=64", "dynamics.depth=2", "dynamics.hidden=128")
NOISE = 0.05
"""On input latents in training: forecasts are short."""
RATE = 3e-4
"""Learning rate of fine-tuning."""
PREFIX = 4
"""Steps that a short prefix shows."""


@dataclass(frozen=True)
class Tuning:
    """How endpoints are fine-tuned: factors on learning rate and steps, optimiser, and a shift of the seed."""

    rate: float = 1.0
    steps: float = 1.0
    optimizer: str = "adamw"
    order: int = 0


DEFAULT = "default"
TUNINGS = {
    DEFAULT: Tuning(),
    "other order of batches": Tuning(order=1000),
    "learning rate / 3": Tuning(rate=1 / 3),
    "learning rate × 3": Tuning(rate=3.0),
    "steps / 2": Tuning(steps=0.5),
    "steps × 2": Tuning(steps=2.0),
    "SOAP": Tuning(optimizer="soap"),
}


class Models:
    """All models of one problem and seed, each trained when it is first asked for and found again later.

    Args:
        name: of the problem.
        steps: optimiser steps of the anchor, and of whatever starts from it.
        work: the study's folder, where the problem's autoencoder is.
    """

    def __init__(self, name: str, seed: int, steps: tuple[int, int], work: Path) -> None:
        self.problem, self.seed, self.steps = PROBLEMS[name], seed, steps
        self.fields, self.latents = make_pool(name, seed, work)
        self.folder = work / name / f"seed-{seed}"
        self.runs = self.folder / f"steps-{steps[0]}-{steps[1]}"

    def anchor(self, told: bool = False) -> Path:
        """The model of all regimes between the endpoints, which is told the regime or is not."""
        store = self.excerpt("anchor", slice(None), told)
        settings = [*self.problem.model, *SMALL, f"trainer.num_steps={self.steps[0]}"]
        return self._train("anchor-told" if told else "anchor", store, settings, self.seed)

    def endpoint(self, side: str, tuning: str = DEFAULT) -> Path:
        """The anchor fine-tuned to one of its ends, ``low`` or ``high``."""
        store = self.excerpt(side)
        return self._tune(f"{side}-{list(TUNINGS).index(tuning)}", store, TUNINGS[tuning])

    def full(self, x: float) -> Path:
        """The anchor fine-tuned on training trajectories of a target, as long as an endpoint."""
        return self._tune(f"full{x:+g}", self.excerpt(f"train{x:+g}"))

    def short(self, x: float) -> Path:
        """The anchor fine-tuned on the prefixes of a target's test trajectories, a third as long as an endpoint."""
        store = self.excerpt(f"test{x:+g}", slice(START - PREFIX, START + 1), held_out=True)
        return self._tune(f"prefix{x:+g}", store, Tuning(steps=1 / 3))

    def composite(self, tuning: str = DEFAULT) -> CompositeModel:
        """θ(α) of the anchor and its endpoints."""
        return CompositeModel(self.anchor(), self.endpoint("low", tuning), self.endpoint("high", tuning))

    def excerpt(self, part: str, frames: slice = slice(None), told: bool = False, held_out: bool = False) -> Path:
        """Latents of a part of the pool; with its first trajectory once more at the end, for training to hold out."""
        chosen = members(self.problem, part)
        chosen = [*chosen, chosen[0]] if held_out else chosen
        name = f"{part}{'-told' if told else ''}{'-prefix' if held_out else ''}"
        return excerpt(self.fields, self.latents, chosen, frames, told, self.folder / name)

    def _tune(self, run: str, store: Path, tuning: Tuning = Tuning()) -> Path:
        steps = max(1, round(self.steps[1] * tuning.steps))
        settings = ["experiment=ccm", f"finetune.checkpoint={self.anchor()}", f"trainer.num_steps={steps}"]
        settings += [f"trainer.learning_rate={RATE * tuning.rate:g}", f"trainer.optimizer={tuning.optimizer}"]
        return self._train(run, store, settings, self.seed + tuning.order + 1)

    def _train(self, run: str, store: Path, settings: Sequence[str], seed: int) -> Path:
        path = self.runs / run
        if (path / "finished").is_file():
            return path
        settings = [*settings, f"stores=[{store}]", f"run={path}", f"dynamics_training.input_noise={NOISE}"]
        config = compose("train", ["trainer=dynamics", "held_out=1", *settings])
        never = config["trainer"]["num_steps"]
        config["trainer"] |= {"seed": seed, "test_every": never, "checkpoint_every": never, "log_every": never}
        train_dynamics(config)
        (path / "finished").touch()
        return path


def direction(model: CompositeModel) -> Tensor:
    """Δ₋ as one vector."""
    ends = []
    for alpha in (-1.0, 1.0):
        model.set(alpha)
        ends.append(torch.cat([p.detach().flatten().double() for p in model.dynamics.parameters()]))
    return (ends[1] - ends[0]) / 2
