"""The data of `study_ccm.py`: a pool of trajectories in every regime, and excerpts of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ccm_problems import PROBLEMS, Problem

from latentphys.cli import main as latentphys
from latentphys.data import Store, create_store, open_store
from latentphys.families import Family, Solver, simulate
from latentphys.families.family import Parameters
from latentphys.families.solver import Fields
from latentphys.grid import Geometry, Grid
from latentphys.sphere import Sphere

TARGETS = (-2.0, -1.5, -0.5, 0.5, 1.5, 2.0)
"""Coordinates of the targets: two between the endpoints, at ∓1, and two beyond each of them."""
POINTS = tuple(sorted((*TARGETS, -1.0, 1.0)))
"""Where errors are measured: at the targets and in the endpoints' own regimes."""
START, STEPS = 8, 8
"""The frame that forecasts start from, and how far they go; what is observed lies before it."""
FRAMES = START + STEPS + 1
CALIBRATION, TEST = 2, 4
"""Trajectories of each point that α is chosen by, and that errors are measured on."""
AUTOENCODER_SEED = 1000


class Mixture(Family):
    """One family whose trajectories have settings of their own."""

    def __init__(self, members: Sequence[Family]) -> None:
        first = members[0]
        self.members, self.interval, self.spin_up = list(members), first.interval, first.spin_up
        self.name, self.specs, self.parameter_units = first.name, first.specs, first.parameter_units  # type: ignore[misc]

    def grid(self, shape: Sequence[int]) -> Any:
        return self.members[0].grid(shape)

    def draw(self, seed: int, trajectory: int) -> dict[str, Any]:
        return self.members[trajectory].draw(seed, trajectory)

    def solid(self, grid: Grid, parameters: Mapping[str, Any], seed: int, trajectory: int) -> np.ndarray | None:
        return self.members[trajectory].solid(grid, parameters, seed, trajectory)

    def initial(self, geometry: Geometry | Sphere, parameters: Mapping[str, Any], seed: int, trajectory: int) -> Fields:
        return self.members[trajectory].initial(geometry, parameters, seed, trajectory)

    def solver(self, geometry: Geometry | Sphere, parameters: Parameters, **options: Any) -> Solver:
        return self.members[0].solver(geometry, parameters, **options)

    def recorded(self, parameters: Parameters, times: np.ndarray) -> dict[str, np.ndarray]:
        return self.members[0].recorded(parameters, times)


def plan(problem: Problem) -> dict[str, list[float]]:
    """What a pool of trajectories holds: part → the coordinate of each of its trajectories, one part after another.

    The last trajectory of what is trained on is held out by training.
    """
    parts = {"anchor": np.linspace(-1, 1, problem.num_anchor).tolist() + [0.0]}
    parts |= {"low": [-1.0] * (problem.num_tuning + 1), "high": [1.0] * (problem.num_tuning + 1)}
    for x in POINTS:
        parts[f"test{x:+g}"] = [x] * TEST
        if x in TARGETS:
            parts |= {f"calibration{x:+g}": [x] * CALIBRATION, f"train{x:+g}": [x] * (problem.num_tuning + 1)}
    return parts


def members(problem: Problem, part: str) -> list[int]:
    """The trajectories of a part in the pool."""
    parts = plan(problem)
    first = sum(len(parts[name]) for name in list(parts)[: list(parts).index(part)])
    return list(range(first, first + len(parts[part])))


def make_autoencoder(name: str, work: Path) -> Path:
    """The linear code of a family, fitted to trajectories of all regimes; returns its run."""
    problem, store, run = PROBLEMS[name], work / name / "code.zarr", work / name / "autoencoder"
    if not store.is_dir():
        _simulate(problem, np.linspace(-2, 2, 13).tolist(), AUTOENCODER_SEED, store)
    if not (run / "last.json").is_file():
        settings = ["trainer.num_steps=1", "trainer.learning_rate=0", "trainer.warmup=0", "trainer.batch_size=1"]
        settings += [f"autoencoder.latent_channels={problem.latent_channels}", "autoencoder.widths=[8,8]"]
        settings += ["autoencoder.num_blocks=[1,1]", f"stores=[{store}]", f"run={run}", "held_out=1"]
        if latentphys(["train", "autoencoder", *settings]):
            raise ValueError(f"Expected the code of {name} to be fitted, got an error; see above.")
    return run


def make_pool(name: str, seed: int, work: Path) -> tuple[Store, Store]:
    """Fields and latents of all parts for one seed."""
    problem, folder = PROBLEMS[name], work / name / f"seed-{seed}"
    fields, latents = folder / "pool.zarr", folder / "pool.latent.zarr"
    if not fields.is_dir():
        _simulate(problem, [x for part in plan(problem).values() for x in part], seed, fields)
    if not latents.is_dir() and latentphys(["encode", str(work / name / "autoencoder"), str(fields), str(latents)]):
        raise ValueError(f"Expected the encoding of {name} to succeed, got an error; see above.")
    return open_store(fields), open_store(latents)


def _simulate(problem: Problem, coordinates: Sequence[float], seed: int, out: Path) -> None:
    family = Mixture([problem.family(x) for x in coordinates])
    simulate(family, out, shape=problem.shape, num_trajectories=len(coordinates), num_frames=FRAMES, seed=seed)


def excerpt(fields: Store, latents: Store, trajectories: Sequence[int], frames: slice, told: bool, out: Path) -> Path:
    """Some trajectories of a pool as stores of their own; returns that of the latents, whose source is the other.

    Args:
        told: keep the physical parameters, which a model is then conditioned on. Without, nothing tells the regime.
    """
    source, path = (out.with_name(f"{out.name}.{kind}.zarr") for kind in ("fields", "latent"))
    if path.is_dir():
        return path
    about = {"source": str(source.resolve()), "checkpoint": latents.attributes["checkpoint"]}
    parameters = {name: values[list(trajectories)] for name, values in fields.parameters.items()} if told else {}
    solids = [~fields.geometry(i).fluid for i in trajectories]
    solid = torch.stack(solids) if any(bool(s.any()) for s in solids) else None
    _copy(fields, trajectories, frames, source, parameters=parameters, solid=solid)
    channels = latents.attributes["channels"]
    _copy(latents, trajectories, frames, path, dtype="float32", layout="latent", channels=channels, attributes=about)
    return path


def _copy(store: Store, trajectories: Sequence[int], frames: slice, out: Path, **about: Any) -> None:
    writer = create_store(
        out,
        grid=store.grid,
        specs=store.specs,
        family=store.family,
        num_trajectories=len(trajectories),
        times=store.times[frames] - store.times[frames][0],
        overwrite=out.is_dir(),
        **about,
    )
    with writer:
        for n, i in enumerate(trajectories):
            for name in store.specs:
                for t, values in enumerate(store.read(name, i, frames)):
                    writer.write(name, n, t, values)
