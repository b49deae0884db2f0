"""Run a family of flows and write it to a store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentphys import exact
from latentphys.data import create_store
from latentphys.families.family import Family
from latentphys.families.navier_stokes import NavierStokes
from latentphys.fields import VELOCITY
from latentphys.grid import Geometry

Parameters = Mapping[str, Any]

STORED_TOLERANCE = 1e-9
"""Net flux left to the fixed-point step in recorded frames, relative to the flux; below the solver's FP32 rounding."""


def stack(drawn: Sequence[Parameters]) -> dict[str, np.ndarray]:
    """One array per parameter from the parameters of several trajectories."""
    return {name: np.array([p[name] for p in drawn]) for name in drawn[0]}


def frames(
    family: Family,
    geometry: Geometry,
    drawn: Sequence[Parameters],
    first: Tensor,
    num_frames: int,
    device: str = "cpu",
    compiled: bool = False,
) -> Iterator[Tensor]:
    """Advance a batch of trajectories from their first states at t = −spin_up.

    Args:
        geometry: of the batch, (B, …) or shared.
        drawn: the parameters of each trajectory.
        first: flux (B, 3, nx, ny, nz) [m³/s].

    Yields:
        At every recorded time the exactly conservative flux (B, 3, nx, ny, nz) [m³/s], FP64, on the CPU.
    """
    batch = stack(drawn)
    solver = NavierStokes(geometry, torch.from_numpy(batch["viscosity"]), compiled=compiled, device=device)

    def force(time: float) -> Tensor:
        return torch.from_numpy(family.force(batch, time))

    flux, time = first.to(device, torch.float32), -family.spin_up
    for frame in range(num_frames):
        target = frame * family.interval
        if target > time:
            flux = solver.advance(flux, force, time, target - time)
        time = target
        yield exact.conserve(flux=flux, geometry=solver.geometry, tol=STORED_TOLERANCE).cpu()


def simulate(
    family: Family,
    out: str | Path,
    *,
    shape: Sequence[int],
    num_trajectories: int,
    num_frames: int,
    seed: int = 0,
    batch_size: int = 8,
    device: str = "cpu",
    compiled: bool = False,
    overwrite: bool = False,
    provenance: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] = lambda num_frames: None,
) -> Path:
    """Simulate trajectories of a family and write them to a Zarr store.

    Args:
        out: the store to make.
        shape: cells per axis (nx, ny, nz).
        num_trajectories, num_frames: how many, and how many frames of each.
        seed: of the data set; every trajectory depends on it and on its own index only.
        batch_size: trajectories advanced together; they share Δt.
        compiled: fuse the solver with `torch.compile`.
        progress: called with the number of trajectory-frames done since the last call.

    Raises:
        ValueError: an existing path without `overwrite`, or a shape the family cannot have.
    """
    if num_trajectories < 1 or num_frames < 2 or batch_size < 1:
        raise ValueError(
            f"Expected ≥ 1 trajectory of ≥ 2 frames in batches of ≥ 1, got {num_trajectories} of {num_frames} "
            f"in batches of {batch_size}."
        )
    if len(shape) != 3:
        raise ValueError(f"Expected a shape of three axes, such as [32, 32, 32], got {list(shape)}.")
    grid = family.grid(shape)
    times = np.arange(num_frames) * family.interval
    drawn = [family.draw(seed, i) for i in range(num_trajectories)]
    solids = [family.solid(grid, p, seed, i) for i, p in enumerate(drawn)]
    solid = None if solids[0] is None else torch.from_numpy(np.stack([s for s in solids if s is not None]))
    everywhere = Geometry(grid, solid)
    forces = np.stack([family.force(stack(drawn), t) for t in times], axis=1)
    writer = create_store(
        out,
        grid=grid,
        specs={VELOCITY.name: VELOCITY},
        family=family.name,
        num_trajectories=num_trajectories,
        times=times,
        parameters=stack([family.recorded(p) for p in drawn]) | {"force": forces},
        solid=None if solid is None else solid.numpy(),
        parameter_units={**family.parameter_units, "force": "m/s2"},
        provenance={"seed": seed, "exact": True, **(provenance or {})},
        overwrite=overwrite,
    )
    with writer:
        for start in range(0, num_trajectories, batch_size):
            members = range(start, min(start + batch_size, num_trajectories))
            geometry = everywhere[start : members.stop]
            first = torch.stack([family.initial(everywhere[i], drawn[i], seed, i) for i in members])
            run = frames(family, geometry, drawn[start : members.stop], first, num_frames, device, compiled)
            for t, fluxes in enumerate(run):
                for i, flux in zip(members, fluxes, strict=True):
                    writer.write("velocity", i, t, flux)
                progress(len(members))
    return Path(out)
