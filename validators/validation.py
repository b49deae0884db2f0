"""Validate a store: one pass over its snapshots, all arithmetic in FP64, memory for a few snapshots at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from latentphys.data.store import Store
from latentphys.fields import State
from latentphys.grid import Geometry
from latentphys.sphere import Sphere
from latentphys.validators.check import Check
from latentphys.validators.conservation import NET_FLUX, SOLID_FLUX, Conservation, prefix
from latentphys.validators.pointwise import FLOOR, MODEL, VRMSE, Pointwise
from latentphys.validators.scalars import Values
from latentphys.validators.series import Series
from latentphys.validators.statistics import REFERENCE, Statistics

FINITE = "count of NaN and infinite values, every field"


@dataclass(frozen=True)
class Validation:
    """What one store was found to be.

    Args:
        family: its family of flows.
        subject: what was validated, in one phrase.
        extent: over how much: trajectories, frames and cells.
        checks: the judged numbers.
        series: the curves.
    """

    family: str
    subject: str
    extent: str
    checks: tuple[Check, ...]
    series: tuple[Series, ...]

    def __getitem__(self, name: str) -> Check:
        """The check of that name."""
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(f"Expected one of {', '.join(check.name for check in self.checks)}, got {name!r}.")


@dataclass(frozen=True)
class Alignment:
    """Which snapshot of the reference each snapshot of a rollout is to be held against.

    Frame t of trajectory i belongs to ``reference[trajectories[i], start + stride * t]``.
    """

    trajectories: tuple[int, ...]
    start: int = 0
    stride: int = 1

    @classmethod
    def of(cls, store: Store, reference: Store) -> Alignment:
        """From the store's ``rollout`` attributes; snapshot by snapshot where it has none.

        Raises:
            ValueError: stores of different grids, or a reference that is too short or has too few trajectories.
        """
        if store.grid != reference.grid:
            raise ValueError(
                f"Expected a reference on the store's grid {store.grid.to_dict()}, got {reference.grid.to_dict()}; "
                "pass the reference that the rollout started from."
            )
        rollout = store.attributes.get("rollout", {})
        trajectories = tuple(int(i) for i in rollout.get("trajectories", range(store.num_trajectories)))
        aligned = cls(trajectories, int(rollout.get("start", 0)), int(rollout.get("stride", 1)))
        last = aligned.start + aligned.stride * (store.num_times - 1)
        if len(trajectories) != store.num_trajectories or max(trajectories) >= reference.num_trajectories:
            raise ValueError(
                f"Expected a reference trajectory for each of {store.num_trajectories} trajectories, "
                f"got {list(trajectories)} of {reference.num_trajectories}; pass the rollout's own reference."
            )
        if last >= reference.num_times:
            raise ValueError(
                f"Expected a reference up to frame {last}, got {reference.num_times}; roll out fewer steps."
            )
        if store.num_times < 2:
            raise ValueError("Expected a rollout of at least one step to hold against a reference, got frame 0 only.")
        return aligned


def is_exact(store: Store, name: str = "velocity") -> bool:
    """Whether the store claims fluxes that balance bit for bit: float64, with ``provenance["exact"]`` true."""
    return store.array(name).dtype == "float64" and store.attributes.get("provenance", {}).get("exact") is True


def validate(
    store: Store,
    reference: Store | None = None,
    reconstruct: Callable[[State], Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Validation:
    """Measure a store in FP64: that it is finite and keeps what its fields promise, and how far it is from a reference.

    Args:
        store: ground truth, an import, a rollout or the flux of conservative latents, in a box or on a sphere.
            Solenoidal fluxes are held to their net per cell, all fluxes to closed faces, conserved scalars to their
            total and positive ones to their sign.
        reference: what a rollout is held against; None for a store that stands alone. Needs a velocity flux.
        reconstruct: one State (without a batch axis) to the flux of its decoded latent (3, nx, ny, nz) [m³/s]: the
            autoencoder, whose error is the floor of a rollout. Applied to the reference, or without one to the store.
        progress: called with (done, total) snapshots.

    Returns:
        the checks, ``finite`` first, and the curves. Where a value is not finite nothing else is measured: the judged
        checks fail, the rest is left out.

    Raises:
        ValueError: a store of latents alone; with a reference or a model, a store without a solenoidal velocity flux; a
            reference on another grid, in another geometry or too short.
    """
    has_flow = _is_flow(store, alone=reference is None and reconstruct is None)
    specs = {n: spec for n, spec in store.specs.items() if not (_holds_latents(store) and spec.kind != "flux")}
    alignment = None if reference is None else Alignment.of(store, reference)
    label = store.path.stem if reference is None else MODEL
    about = {"family": store.family, "dtype": ", ".join(sorted({str(store.array(n).dtype) for n in specs}))}
    size = f"{' x '.join(map(str, store.domain.shape))} {'points' if isinstance(store.domain, Sphere) else 'cells'}"
    extent = f"{store.num_trajectories} trajectories of {store.num_times} frames of {size}"
    first = 0 if reference is None else 1
    fluxes = {n: Conservation(spec, is_exact(store, n)) for n, spec in specs.items() if spec.kind == "flux"}
    values = {n: Values(spec, store.domain) for n, spec in specs.items() if spec.kind != "flux"}
    pointwise, statistics = Pointwise(), Statistics()

    snapshots = list(product(range(store.num_trajectories), range(store.num_times)))
    for done, (trajectory, frame) in enumerate(snapshots, 1):
        state = store[trajectory, frame]
        bad = sum(int((~torch.isfinite(value)).sum()) for value in state.fields.values())
        if bad:
            where = f"in trajectory {trajectory}, frame {frame}, the first to hold any; those after it were not read"
            judged = _unmeasured(bad, where, list(fluxes.values()), reference is not None, about)
            return Validation(store.family, _subject(store), extent, judged, ())
        for name, conservation in fluxes.items():
            conservation.update(state.fields[name], state.geometry, trajectory, frame)
        for name, collected in values.items():
            collected.update(state.fields[name], trajectory, frame)
        if has_flow:
            flux, geometry, truth = state.velocity, state.geometry, state
            statistics.update(label, flux, geometry, frame, first)
            if reference is not None and alignment is not None:
                truth = reference[alignment.trajectories[trajectory], alignment.start + alignment.stride * frame]
                _check_same_solid(geometry, truth.geometry, trajectory)
                statistics.update(REFERENCE, truth.velocity, geometry, frame, first)
            decoded = None if reconstruct is None else reconstruct(truth).detach().cpu()
            if decoded is not None:
                statistics.update(FLOOR, decoded, geometry, frame, first)
            pointwise.update(None if reference is None else flux, truth.velocity, decoded, geometry, frame)
        if progress is not None:
            progress(done, len(snapshots))

    times = tuple(float(t - store.times[0]) for t in store.times)
    checks = [Check.at_most("finite", 0.0, 0.0, unit="values", operator=FINITE, detail=extent, **about)]
    series: list[Series] = []
    for conservation in fluxes.values():
        checks += conservation.checks(detail=extent, **about)
    if has_flow:
        checks += pointwise.checks(**about)
        checks += statistics.checks(model=label, reference=None if reference is None else REFERENCE, **about)
        series += [*pointwise.series(times), *statistics.series(times)]
    for collected in values.values():
        checks += collected.checks(detail=extent, **about)
        series += collected.series(label, times)
    return Validation(store.family, _subject(store), extent, tuple(checks), tuple(series))


def _is_flow(store: Store, alone: bool) -> bool:
    """Whether there is a solenoidal velocity flux, which can be held against a reference and a model."""
    spec = store.specs.get("velocity")
    is_flow = spec is not None and (spec.kind, spec.constraint) == ("flux", "solenoidal")
    if not is_flow and (_holds_latents(store) or not alone):
        found = ", ".join(f"{s.name} ({s.kind}, {s.constraint})" for s in store.specs.values())
        raise ValueError(
            f"Expected a solenoidal flux field 'velocity', got {found}; decode latents, import velocities as fluxes."
        )
    return is_flow


def _holds_latents(store: Store) -> bool:
    return store.attributes.get("channels") is not None


def _subject(store: Store) -> str:
    """What a store is, in one phrase."""
    rollout = store.attributes.get("rollout")
    if rollout is None:
        return store.path.name
    return f"{store.path.name}: rollout of {rollout['checkpoint']} from {Path(rollout['reference']).name}"


def _unmeasured(
    bad: int, where: str, fluxes: Sequence[Conservation], has_reference: bool, about: dict[str, str]
) -> tuple[Check, ...]:
    """The checks of a store with a value that is not finite: every judged one fails."""
    checks = [Check.at_most("finite", bad, 0.0, unit="values", operator=FINITE, detail=where, **about)]
    judged = []
    for spec in (conservation.spec for conservation in fluxes):
        if spec.constraint == "solenoidal":
            judged.append((f"{prefix(spec)}net_flux_max", spec.unit, NET_FLUX))
        judged.append((f"{prefix(spec)}solid_flux_max", spec.unit, SOLID_FLUX))
    if has_reference:
        judged += [("vrmse_1_step", "1", VRMSE), ("vrmse_rollout", "1", VRMSE)]
    for name, unit, operator in judged:
        detail = "not measured: a value is not finite"
        checks.append(Check.at_most(name, math.nan, 0.0, unit=unit, operator=operator, detail=detail, **about))
    return tuple(checks)


def _check_same_solid(geometry: Geometry, reference: Geometry, trajectory: int) -> None:
    a, b = geometry.solid, reference.solid
    if (a is None) != (b is None) or (a is not None and b is not None and not torch.equal(a, b)):
        raise ValueError(
            f"Expected the solid voxels of the reference in trajectory {trajectory}, got others; "
            "pass the reference that the rollout started from."
        )
