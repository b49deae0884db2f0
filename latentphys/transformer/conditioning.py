"""What the dynamics model is told besides the latents: Δt, physical parameters now and then, and the geometry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from latentphys.autoencoders.layers import extrude, geometry_features, space_to_depth
from latentphys.data import Store
from latentphys.grid import Geometry

NUM_GEOMETRY_CHANNELS = 16


def latent_geometry(geometry: Geometry, compression: int) -> Float[Tensor, "b 16 x y z"]:
    """Share of fluid and mean wall distance in each octant of each latent cell."""
    half = compression // 2
    return space_to_depth(F.avg_pool3d(extrude(geometry_features(geometry), compression), half), 2)


@dataclass(frozen=True)
class Parameter:
    """One physical parameter and how it enters: its size, whether it changes in time, in logarithm or not, scaled."""

    name: str
    size: int
    varying: bool
    logarithmic: bool
    mean: list[float]
    std: list[float]

    def scaled(self, value: Any) -> np.ndarray:
        """The parameter in units of order one, shape (size,)."""
        x = np.asarray(value.cpu() if isinstance(value, Tensor) else value, dtype=np.float64).reshape(-1)
        if x.size != self.size:
            raise ValueError(f"Expected parameter {self.name!r} of size {self.size}, got {x.size} numbers.")
        if self.logarithmic and not (x > 0).all():
            raise ValueError(f"Expected a positive parameter {self.name!r}, got {x.tolist()}.")
        return ((np.log(x) if self.logarithmic else x) - self.mean) / self.std


@dataclass(frozen=True)
class Conditioning:
    """Turns Δt and physical parameters into the numbers that condition the model.

    A parameter that changes in time enters twice, at the beginning and at the end of the step. One that a family does
    not have enters as its mean over the families that do.
    """

    parameters: list[Parameter]

    @classmethod
    def fit(cls, stores: Sequence[Store], trajectories: Sequence[Sequence[int]] | None = None) -> Conditioning:
        """Names, sizes and scales of all parameters in some stores.

        Args:
            trajectories: per store those whose parameters set the scales. Default: all.
        """
        parameters = []
        chosen = trajectories or [range(len(store)) for store in stores]
        for name in sorted({name for store in stores for name in store.parameters}):
            arrays = [
                store.parameters[name][list(some)]
                for store, some in zip(stores, chosen, strict=True)
                if name in store.parameters
            ]
            sizes = {1 if a.ndim == 1 else a.shape[-1] for a in arrays}
            if len(sizes) > 1:
                raise ValueError(f"Expected parameter {name!r} of one size in all stores, got {sorted(sizes)}.")
            size, varying = sizes.pop(), any(a.ndim == 3 for a in arrays)
            values = np.concatenate([a.reshape(-1, size) for a in arrays])
            logarithmic = size == 1 and not varying and bool((values > 0).all())
            values = np.log(values) if logarithmic else values
            std = values.std(0)
            std = np.where(std > 1e-12 * (1 + np.abs(values.mean(0))), std, 1.0)
            parameters.append(Parameter(name, size, varying, logarithmic, values.mean(0).tolist(), std.tolist()))
        return cls(parameters)

    @property
    def num_channels(self) -> int:
        return 1 + sum(p.size * (2 if p.varying else 1) for p in self.parameters)

    def vector(self, now: Mapping[str, Any], then: Mapping[str, Any], dt: float) -> Float[Tensor, " p"]:
        """Conditioning numbers of one sample.

        Args:
            now, then: parameters at t and at t + Δt.
            dt: Δt [s].

        Raises:
            ValueError: a parameter that no family had in training, or one of another size or sign.
        """
        names = {p.name for p in self.parameters}
        unknown = sorted((set(now) | set(then)) - names)
        if unknown:
            raise ValueError(
                f"Expected parameters among {sorted(names)}, got {unknown[0]!r}; the model knows no other."
            )
        parts = [np.array([np.log(dt) / 5])]
        for p in self.parameters:
            for values in (now, then) if p.varying else (now,):
                parts.append(p.scaled(values[p.name]) if p.name in values else np.zeros(p.size))
        return torch.from_numpy(np.concatenate(parts)).float()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Conditioning:
        return cls([Parameter(**p) for p in data["parameters"]])


def store_parameters(store: Store, trajectory: int, time: int) -> dict[str, np.ndarray]:
    """The physical parameters of one trajectory at one snapshot."""
    return {
        name: np.asarray(values[trajectory, time] if values.ndim == 3 else values[trajectory])
        for name, values in store.parameters.items()
    }
