"""Limits of an alarm, from the flows of a store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from latentphys.data import Store
from latentphys.data.regimes import chosen_trajectories
from latentphys.rollout import num_intervals
from latentphys.surrogate.alarm import Alarm, Range
from latentphys.surrogate.contract import Contract
from latentphys.surrogate.measures import energy, latent_moments, main_field, roughness
from latentphys.surrogate.protocol import Factory
from latentphys.transformer.conditioning import store_parameters

SMALLEST_CHANGE = 0.01
"""Relative change of the energy in an interval that is always quiet."""
SMALLEST_RANGE = 0.05
"""Least half width of a range, in the model's scaled units: parameters and latents that do not vary."""


class _Track(NamedTuple):
    """What was measured of one trajectory: rows of time, as it stands in the store and as the model decodes it."""

    energy: Float[Tensor, "t 2"]
    spectrum: Float[Tensor, "t 2"]
    latent: Float[Tensor, "t c2"]
    parameters: list[dict[str, Tensor]]


def calibrate(
    factory: Factory, store: Store, trajectories: Sequence[int] | None, quantile: float, margin: float
) -> Alarm:
    """Limits within which the flows of a store are quiet, as they stand there and as the model decodes them.

    The model steps nothing: the limits are those of true flows. Distances between latents are those of each trajectory
    from the others, so that they are what a flow that is not in the store may have.

    Args:
        factory: what the alarm is for; see `latentphys.surrogate.Surrogate.factory`.
        store: flows of the kind that the surrogate is to step.
        trajectories: those to look at. Default: all.
        quantile: share of the values of a quantity that lie within, before the margin, ≤ 1; where there is a lowest
            value too, each side leaves out half. Good values: 1, or 0.999 of many snapshots.
        margin: factor ≥ 1 by which the limits lie beyond. Good values: 1.5…3.

    Raises:
        ValueError: a quantile or margin out of range, a store that the model cannot take, or flows that say nothing of
            how the energy changes in an interval.
    """
    if not 0 < quantile <= 1 or not margin >= 1:
        raise ValueError(f"Expected a quantile in (0, 1] and a margin ≥ 1, got {quantile} and {margin}.")
    chosen = chosen_trajectories(store, trajectories)
    contract = factory.contract(store.family)
    tracks = [_track(factory, contract, store, i) for i in chosen]
    energies, spectra = torch.cat([t.energy for t in tracks]), torch.cat([t.spectrum for t in tracks])
    changes = torch.cat([_changes(track.energy) for track in tracks])
    if not len(changes):
        raise ValueError(
            f"Expected trajectories of {store.path} with two snapshots in motion one interval apart, got none in "
            f"{chosen}; take longer ones."
        )
    half = (1 - quantile) / 2
    limits = {
        "energy": (_quantile(energies, half) / margin, _quantile(energies, 1 - half) * margin),
        "energy_change": (0.0, max(_quantile(changes, quantile), SMALLEST_CHANGE) * margin),
        "spectrum": (0.0, min(1.0, _quantile(spectra, quantile) * margin)),
        "latent": (0.0, _quantile(torch.cat(_latent_distances(tracks)), quantile) * margin**2),
        "parameters": (0.0, margin),
    }
    about = f"{store.path.name}: {len(chosen)} trajectories, quantile {quantile:g}, margin {margin:g}"
    latent = _latent_range(tracks)
    return Alarm(
        store.family,
        limits,
        (latent[0].tolist(), latent[1].tolist()),
        _parameter_ranges(tracks),
        factory.digest,
        about,
    )


def _track(factory: Factory, contract: Contract, store: Store, trajectory: int) -> _Track:
    stepper = factory.stepper(store.geometry(trajectory), store.family)
    energies, spectra, moments, parameters = [], [], [], []
    for n in range(0, store.num_times, num_intervals(store, stepper.interval)):
        fields = {name: store.read(name, trajectory, n).double() for name in stepper.scale.fields}
        packed = stepper.scale.pack(fields)[None]
        latent = stepper.encode(packed)
        both = torch.cat([packed, stepper.decode(latent, stepper.totals(packed)).cpu()])
        energies.append(energy(main_field(both, stepper)))
        spectra.append(roughness(main_field(both, stepper), store.grid))
        moments.append(latent_moments(latent)[0])
        given = store_parameters(store, trajectory, n)
        known = [q for q in contract.parameters if q.name in given]
        parameters.append({q.name: torch.as_tensor(q.scaled(given[q.name])) for q in known})
    return _Track(torch.stack(energies), torch.stack(spectra), torch.stack(moments), parameters)


def _changes(energies: Float[Tensor, "t 2"]) -> Float[Tensor, " n"]:
    """|ln| of the ratio of each energy to those before it: decoded after decoded, and decoded after true.

    Flows at rest have none.
    """
    logarithms = energies.log()
    decoded = logarithms[1:, 1]
    changes = torch.cat([(decoded - logarithms[:-1, 1]).abs(), (decoded - logarithms[:-1, 0]).abs()])
    return changes[changes.isfinite()]


def _latent_range(tracks: Sequence[_Track]) -> tuple[Tensor, Tensor]:
    moments = torch.cat([track.latent for track in tracks])
    return moments.mean(0), moments.std(0, correction=0).clamp(min=SMALLEST_RANGE)


def _others(tracks: Sequence[_Track], index: int) -> Sequence[_Track]:
    return [track for n, track in enumerate(tracks) if n != index] or tracks


def _latent_distances(tracks: Sequence[_Track]) -> list[Tensor]:
    """Of each trajectory's latents from those of the others; relative to the whole, which is what readings use."""
    result = []
    for n, track in enumerate(tracks):
        centre, half = _latent_range(_others(tracks, n))
        result.append(((track.latent - centre) / half).square().mean(1))
    return result


def _parameter_ranges(tracks: Sequence[_Track]) -> dict[str, Range]:
    """Of each parameter the range that it has, but a spread in training at least; none where it does not vary."""
    ranges = {}
    rows = [row for track in tracks for row in track.parameters]
    for name in sorted({name for row in rows for name in row}):
        values = torch.stack([row[name] for row in rows if name in row])
        low, high = values.amin(0), values.amax(0)
        half = torch.where(high > low, (0.5 * (high - low)).clamp(min=1.0), SMALLEST_RANGE)
        ranges[name] = (0.5 * (low + high)).tolist(), half.tolist()
    return ranges


def _quantile(values: Tensor, q: float) -> float:
    return float(torch.quantile(values.double().flatten(), q))
