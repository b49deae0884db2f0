"""Advance flows in latent space, and write what comes out to a store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from latentphys.autoencoders import Autoencoder
from latentphys.data import Store, create_store
from latentphys.data.regimes import chosen_trajectories
from latentphys.grid import Geometry
from latentphys.routers.telemetry import routing_map
from latentphys.transformer.conditioning import latent_geometry, store_parameters
from latentphys.transformer.dynamics import Dynamics

Parameters = Mapping[str, Any]


class Frame(NamedTuple):
    """One frame of a rollout: its latent, and which expert took each latent cell in the step that made it."""

    latent: Float[Tensor, "b c x y z"]
    routing: Tensor | None


class LatentStepper:
    """A batch of flows of one family in latent space.

    Args:
        autoencoder, dynamics: the models, in evaluation mode.
        geometry: the box and the solids of every flow, or a batch of solids, one for each.
        family: which kind of flow.

    It computes where the autoencoder is; what it is given may be elsewhere.

    Raises:
        ValueError: a family or grid that the models do not know.
    """

    def __init__(self, autoencoder: Autoencoder, dynamics: Dynamics, geometry: Geometry, family: str) -> None:
        self.scale = autoencoder.scale(family)
        self.scale.check(geometry.grid)
        autoencoder.latent_shape(geometry.grid)
        self.autoencoder, self.dynamics, self.geometry, self.family = autoencoder, dynamics, geometry, family
        self.interval = dynamics.interval(family)
        self._features = latent_geometry(geometry, autoencoder.compression)

    @property
    def device(self) -> torch.device:
        return self.dynamics.latent_mean.device

    @property
    def latent_mean(self) -> Float[Tensor, "c 1 1 1"]:
        """Mean of each latent channel in training."""
        return self.dynamics.latent_mean

    @property
    def latent_std(self) -> Float[Tensor, "c 1 1 1"]:
        """Spread of each latent channel in training."""
        return self.dynamics.latent_std

    def check_parameters(self, parameters: Parameters) -> None:
        """Refuse parameters of one flow that the model does not know or cannot take, with a ValueError."""
        self.dynamics.conditioning.vector(parameters, parameters, self.interval)

    @torch.no_grad()
    def encode(self, packed: Float[Tensor, "b f nx ny nz"]) -> Float[Tensor, "b c x y z"]:
        """The latent of the packed fields of the family."""
        return self.autoencoder.encode(packed.to(self.device), self.geometry, self.family)

    @torch.no_grad()
    def decode(
        self, latent: Float[Tensor, "b c x y z"], totals: Mapping[str, Tensor] | None = None
    ) -> Float[Tensor, "b f nx ny nz"]:
        """Packed fields in FP64, with their constraints to the last bit: a solenoidal flux has a net of 0.0 everywhere.

        Args:
            totals: see `totals`. Default: what the latent says.
        """
        held = None if totals is None else {name: total.to(self.device) for name, total in totals.items()}
        return self.autoencoder.decode(latent, self.geometry, self.family, exact=True, totals=held)

    def totals(self, packed: Float[Tensor, "b f nx ny nz"]) -> dict[str, Float[Tensor, " b"]]:
        """What conserved scalars amount to, by name: what every later state is to amount to as well."""
        return self.scale.totals(packed, self.geometry)

    @torch.no_grad()
    def step(
        self, latents: Float[Tensor, "b k c x y z"], now: Sequence[Parameters], then: Sequence[Parameters]
    ) -> Frame:
        """The frame one interval after the last of K, given each flow's parameters at both ends of the interval."""
        vector = self.dynamics.conditioning.vector
        condition = torch.stack([vector(a, b, self.interval) for a, b in zip(now, then, strict=True)]).to(latents)
        features = self._features.to(latents).expand(len(latents), -1, -1, -1, -1)
        step = self.dynamics(latents, condition, features, self.geometry.grid.periodic, self.family)
        cells = (latents.shape[-3], latents.shape[-2], latents.shape[-1])
        latent = self.autoencoder.admit(step.latent, self.geometry, self.family)
        return Frame(latent, routing_map([r.ids for r in step.routings], cells))


def rollout(
    stepper: LatentStepper,
    frames: Float[Tensor, "b k f nx ny nz"],
    parameters: Callable[[int], Sequence[Parameters]],
    num_steps: int,
) -> Iterator[Frame]:
    """Frames 0 … num_steps: the encoded last of the K given ones, then every one from those before.

    Args:
        frames: K snapshots of each flow, packed, one interval apart, oldest first.
        parameters: each flow's parameters at frame n.
    """
    latents = torch.stack([stepper.encode(frame) for frame in frames.unbind(1)], dim=1)
    yield Frame(latents[:, -1], None)
    for n in range(num_steps):
        frame = stepper.step(latents, parameters(n), parameters(n + 1))
        latents = torch.cat([latents[:, 1:], frame.latent[:, None]], dim=1)
        yield frame


def rollout_store(
    autoencoder: Autoencoder,
    dynamics: Dynamics,
    store: Store,
    out: str | Path,
    *,
    num_steps: int,
    trajectories: Sequence[int],
    start: int = 0,
    checkpoint: str = "",
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda num_frames: None,
) -> Path:
    """Roll out trajectories of a store and write a rollout store: exactly conservative fields and the routing.

    Args:
        num_steps: intervals to advance.
        trajectories: which trajectories of the store to start from.
        start: the snapshot to start from, at least K − 1 for a model of K frames.
        checkpoint: recorded as provenance.
        progress: called with the number of frames written since the last call.

    Raises:
        ValueError: a store too short for the steps asked for, without the trajectories, or one the models do not know.
    """
    if Path(out).resolve() == store.path.resolve():
        raise ValueError(
            f"Expected another path than the store's own, got {out}; the rollout would replace its reference."
        )
    chosen = chosen_trajectories(store, trajectories)
    stride = num_intervals(store, dynamics.interval(store.family))
    first = start - (dynamics.num_frames - 1) * stride
    if num_steps < 1 or first < 0 or start + num_steps * stride >= store.num_times:
        raise ValueError(
            f"Expected a start and steps within the {store.num_times} snapshots of {store.path} (their parameters "
            f"drive the rollout), got {num_steps} steps of {stride} snapshots from snapshot {start}."
        )
    autoencoder.check(store.family, store.grid, store.specs)
    scale = autoencoder.scale(store.family)
    grid, latent_shape = store.grid, autoencoder.latent_shape(store.grid)
    depth = len(dynamics.transformer.routers())
    times = store.times[start : start + num_steps * stride + 1 : stride]
    picked = {
        name: values[chosen][:, start : start + num_steps * stride + 1 : stride] if values.ndim == 3 else values[chosen]
        for name, values in store.parameters.items()
    }
    geometries = [store.geometry(i) for i in chosen]
    writer = create_store(
        out,
        grid=grid,
        specs=scale.specs,
        family=store.family,
        num_trajectories=len(chosen),
        times=times,
        parameters=picked,
        parameter_units=store.attributes["parameter_units"],
        solid=None if all(g.is_empty for g in geometries) else torch.stack([~g.fluid for g in geometries]),
        provenance={"exact": True, "checkpoint": checkpoint},
        attributes={
            "rollout": {
                "reference": str(store.path),
                "trajectories": chosen,
                "start": start,
                "stride": stride,
                "checkpoint": checkpoint,
                "num_experts": [router.num_experts for router in dynamics.transformer.routers()],
                "routing": "block" if dynamics.transformer.router is None else "function",
            }
        },
        extras={
            "routing": (
                (len(chosen), num_steps + 1, depth, *latent_shape),
                "int16",
                ("trajectory", "time", "layer", "px", "py", "pz"),
            )
        },
        overwrite=overwrite,
    )
    with writer:
        for n, (i, geometry) in enumerate(zip(chosen, geometries, strict=True)):
            stepper = LatentStepper(autoencoder, dynamics, geometry, store.family)
            frames = slice(first, start + 1, stride)
            initial = scale.pack({name: store.read(name, i, frames) for name in scale.fields})[None]
            totals = stepper.totals(initial[:, -1])
            run = rollout(stepper, initial, partial(_parameters, store, i, start, stride), num_steps)
            for t, frame in enumerate(run):
                for name, values in scale.unpack(stepper.decode(frame.latent, totals)[0]).items():
                    writer.write(name, n, t, values)
                unrouted = torch.full((depth, *latent_shape), -1, dtype=torch.int16)
                writer.write("routing", n, t, unrouted if frame.routing is None else frame.routing[0])
                progress(1)
    return Path(out)


def _parameters(store: Store, trajectory: int, start: int, stride: int, frame: int) -> list[Parameters]:
    return [store_parameters(store, trajectory, start + frame * stride)]


def num_intervals(store: Store, interval: float) -> int:
    """How many snapshots of a store make one interval of a model.

    Raises:
        ValueError: snapshots at uneven times, or whose distance does not divide the interval.
    """
    spacings = np.diff(store.times) if store.num_times > 1 else np.array([interval])
    spacing = float(spacings[0])
    if not np.allclose(spacings, spacing, rtol=1e-6, atol=0.0):
        raise ValueError(
            f"Expected snapshots of {store.path} at even distances, got {spacings.min():g} to {spacings.max():g} s."
        )
    stride = round(interval / spacing)
    if stride < 1 or abs(stride * spacing / interval - 1) > 1e-6:
        raise ValueError(
            f"Expected snapshots of {store.path} whose distance divides the model's interval of {interval:g} s, "
            f"got {spacing:g} s."
        )
    return stride
