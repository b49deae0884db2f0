"""What the dynamics model is told besides the latents: Δt, physical parameters now and then, and the geometry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

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


class WidenedLinear(nn.Module):
    """A linear map with further inputs, which do nothing at the start.

        y = L(x₁) + V x₂,    V = 0

    Inputs x₂ that are zero leave every bit of L(x₁) as it was, whatever V has become: one product over all inputs
    would add them up in another order.

    Args:
        inner: the map L, plain or widened before.
        channels: of x₂, which stands behind x₁; ≥ 1.
    """

    def __init__(self, inner: nn.Linear | WidenedLinear, channels: int) -> None:
        super().__init__()
        self.inner, self.channels = inner, channels
        self.out_features: int = inner.out_features
        self.added = nn.Linear(channels, self.out_features, bias=False)
        nn.init.zeros_(self.added.weight)

    def forward(self, x: Float[Tensor, "b p"]) -> Float[Tensor, "b d"]:
        return self.inner(x[:, : -self.channels].contiguous()) + self.added(x[:, -self.channels :])


@dataclass(frozen=True)
class Conditioning:
    """Turns Δt and physical parameters into the numbers that condition the model.

    A parameter that changes in time enters twice, at the beginning and at the end of the step. One that a family does
    not have enters as its mean over the families that do.

    Args:
        parameters: all that any family has, each with the scale that it got first.
        added: how many channels each extension brought, the first one first; they stand behind the others.
    """

    parameters: list[Parameter]
    added: list[int] = field(default_factory=list)

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

    def extended(self, stores: Sequence[Store], trajectories: Sequence[Sequence[int]] | None = None) -> Conditioning:
        """The same, and behind it the parameters of some stores that are new.

        Parameters that were there keep their scales; families without the new ones get the numbers they got before, and
        zeros behind these.

        Raises:
            ValueError: a parameter that was there with another size or sign, or one that changes in time now.
        """
        known = {p.name: p for p in self.parameters}
        found = Conditioning.fit(stores, trajectories).parameters
        for store in stores:
            for name in sorted(known.keys() & store.parameters.keys()):
                _check_same(known[name], store)
        new = [p for p in found if p.name not in known]
        channels = Conditioning(new).num_channels - 1
        return Conditioning([*self.parameters, *new], [*self.added, *([channels] if channels else [])])

    @property
    def num_channels(self) -> int:
        return 1 + sum(p.size * (2 if p.varying else 1) for p in self.parameters)

    @property
    def first_channels(self) -> int:
        """Channels before any extension."""
        return self.num_channels - sum(self.added)

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
        return cls([Parameter(**p) for p in data["parameters"]], list(data.get("added", [])))


def _check_same(parameter: Parameter, store: Store) -> None:
    """Refuse values of a known parameter that cannot enter as it does."""
    values = store.parameters[parameter.name]
    size = 1 if values.ndim == 1 else values.shape[-1]
    if size != parameter.size or (values.ndim == 3 and not parameter.varying):
        kind = {True: "changing in time", False: "constant"}
        raise ValueError(
            f"Expected parameter {parameter.name!r} of size {parameter.size}, {kind[parameter.varying]}, as the model "
            f"knows it, got size {size}, {kind[values.ndim == 3]}, in {store.path}; rename it in the store."
        )
    if parameter.logarithmic and not (values > 0).all():
        raise ValueError(
            f"Expected a positive parameter {parameter.name!r}, as the model knows it, got {values.min():g} in "
            f"{store.path}; rename it in the store."
        )


def store_parameters(store: Store, trajectory: int, time: int) -> dict[str, np.ndarray]:
    """The physical parameters of one trajectory at one snapshot."""
    return {
        name: np.asarray(values[trajectory, time] if values.ndim == 3 else values[trajectory])
        for name, values in store.parameters.items()
    }
