"""Batches of trajectories as independent jobs: run here, in processes of this machine, or on a dask cluster.

A job depends on the family, its settings and the numbers of its trajectories, and on nothing else: whoever runs it, and
however often it is interrupted, it writes the same bits on the same kind of machine with the same number of threads.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from latentphys.data.part import Part
from latentphys.families.family import Family
from latentphys.families.solver import Fields, Solver
from latentphys.fields import Domain
from latentphys.grid import Geometry, Grid
from latentphys.sphere import Sphere
from latentphys.workers import Progress

Parameters = Mapping[str, Any]


def stack(drawn: Sequence[Parameters]) -> dict[str, np.ndarray]:
    """One array per parameter from the parameters of several trajectories."""
    return {name: np.array([p[name] for p in drawn]) for name in drawn[0]}


def geometries(
    family: Family, domain: Domain, drawn: Sequence[Parameters], seed: int, members: Sequence[int]
) -> Geometry | Sphere:
    """The domain with the solids of some trajectories."""
    if not isinstance(domain, Grid):
        return domain
    solids = [family.solid(domain, p, seed, i) for p, i in zip(drawn, members, strict=True)]
    found = [solid for solid in solids if solid is not None]
    return Geometry(domain, torch.from_numpy(np.stack(found)) if found else None)


@dataclass(frozen=True)
class Job:
    """A batch of trajectories that share Δt.

    Args:
        family: with all its settings.
        seed: of the data set.
        members: the numbers of the trajectories.
        num_frames: snapshots of each.
        device: where to compute.
        compiled: fuse the solver with `torch.compile`.
        threads: CPU threads; None for those there are.
    """

    family: Family
    seed: int
    members: tuple[int, ...]
    num_frames: int
    device: str = "cpu"
    compiled: bool = False
    threads: int | None = None

    @property
    def num_snapshots(self) -> int:
        return len(self.members) * self.num_frames

    def run(self, part: Part, progress: Progress) -> None:
        """Write what the store does not have yet of these trajectories.

        Args:
            part: writes to the store.
            progress: called with the number of snapshots (trajectories × frames) that are there now and were not before
                the last call.
        """
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        kept = [part.resume(i) for i in self.members]
        progress(sum(kept))
        if min(kept) == self.num_frames:
            return
        drawn = [self.family.draw(self.seed, i) for i in self.members]
        geometry = _stored_geometry(part, self.members)
        solver = self.family.solver(geometry, stack(drawn), device=self.device, compiled=self.compiled)
        resting = self._resting_place(part)
        for frame, fields in self._frames(solver, geometry, drawn, resting, min(kept)):
            recorded = solver.recorded(fields)
            for position, i in enumerate(self.members):
                if frame >= kept[position]:
                    for name, values in recorded.items():
                        part.write(name, i, frame, values[position])
            progress(sum(frame >= k for k in kept))
            is_flushed = all(part.flushed(i) == frame + 1 for i in self.members)
            if part.plan.resumable and is_flushed and frame + 1 < self.num_frames:
                for i in self.members:
                    part.checkpoint(i)
                _save(resting, frame, fields, solver.memory())
        resting.unlink(missing_ok=True)

    def _resting_place(self, part: Part) -> Path:
        """Where the state is kept from which an interrupted run goes on."""
        return part.plan.folder / f"state-{self.members[0]:06d}.safetensors"

    def _frames(
        self, solver: Solver, geometry: Geometry | Sphere, drawn: Sequence[Parameters], resting: Path, kept: int
    ) -> Iterator[tuple[int, Fields]]:
        """Number and working state of each recorded frame, from the last state at rest or from the beginning."""
        frame, fields, memory = _load(resting, kept)
        if fields is None:
            own = [geometry if isinstance(geometry, Sphere) else geometry[k] for k in range(len(drawn))]
            first = [
                self.family.initial(place, p, self.seed, i)
                for place, p, i in zip(own, drawn, self.members, strict=True)
            ]
            fields = solver.working({name: torch.stack([f[name] for f in first]) for name in first[0]})
            if self.family.spin_up > 0:
                fields = solver.advance(fields, -self.family.spin_up, self.family.spin_up)
            frame = 0
            yield 0, fields
        else:
            fields = {name: value.to(solver.device) for name, value in fields.items()}
            solver.remember({name: value.to(solver.device) for name, value in memory.items()})
        for later in range(frame + 1, self.num_frames):
            fields = solver.advance(fields, (later - 1) * self.family.interval, self.family.interval)
            yield later, fields


def _stored_geometry(part: Part, members: Sequence[int]) -> Geometry | Sphere:
    """The domain of some trajectories with the solids that the store already has."""
    domain = part.plan.domain
    if isinstance(domain, Sphere):
        return domain
    own = [part.plan.geometry(i) for i in members]
    return Geometry(domain, torch.stack([~g.fluid for g in own if g is not None]) if own[0] is not None else None)


def _save(path: Path, frame: int, fields: Fields, memory: Fields) -> None:
    """All of the state or none: a reader never meets half of it."""
    tensors = {f"fields.{name}": value for name, value in fields.items()}
    tensors |= {f"memory.{name}": value for name, value in memory.items()}
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        save_file({n: v.detach().cpu().contiguous() for n, v in tensors.items()}, partial, {"frame": str(frame)})
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _load(path: Path, kept: int) -> tuple[int, Fields | None, Fields]:
    """The frame of a state at rest, its fields and memory; no fields where there is none that the store reaches to."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            frame = int((file.metadata() or {})["frame"])
        tensors = load_file(path)
    except (OSError, SafetensorError, KeyError, ValueError):
        return 0, None, {}
    if frame >= kept:
        return 0, None, {}
    parts: dict[str, Fields] = {"fields": {}, "memory": {}}
    for name, value in tensors.items():
        kind, _, field = name.partition(".")
        parts[kind][field] = value
    return frame, parts["fields"], parts["memory"]
