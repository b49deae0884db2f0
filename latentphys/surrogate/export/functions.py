"""The three functions of an artefact, as modules of fixed shapes in which family and geometry are constants.

None of them holds a solver or a Fourier transform of a field: what a decode still lacks is in `finish`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from latentphys.autoencoders import Autoencoder, FamilyScale
from latentphys.autoencoders.autoencoder import field_type
from latentphys.autoencoders.head import Head
from latentphys.autoencoders.helmholtz import FluxHead
from latentphys.autoencoders.layers import flatten
from latentphys.autoencoders.normaliser import FieldScale, present
from latentphys.autoencoders.place import Place, describe
from latentphys.autoencoders.scalar_heads import PointwiseHead
from latentphys.grid import Geometry
from latentphys.routers import MoEFeedForward
from latentphys.surrogate.export.supported import check_exportable
from latentphys.transformer.conditioning import Conditioning, latent_geometry
from latentphys.transformer.dynamics import Dynamics

NAMES = ("encode", "step", "decode")


class Placed(nn.Module):
    """An autoencoder that is told of one box."""

    features: Tensor
    condition: Tensor

    def __init__(self, autoencoder: Autoencoder, geometry: Geometry, family: str) -> None:
        super().__init__()
        self.autoencoder, self.geometry, self.family = autoencoder, geometry, family
        self.scale = autoencoder.scale(family)
        self.types = [field_type(spec) for spec in self.scale.specs.values()]
        place = describe(geometry, [name in self.types for name in autoencoder.specs], autoencoder.compression)
        self.register_buffer("features", place.features)
        self.register_buffer("condition", place.condition)

    @property
    def place(self) -> Place:
        return Place(self.features, self.condition, self.geometry.grid.boundaries)


class Encode(Placed):
    """Packed fields of the family, in the units of stores, to their latent."""

    def forward(self, fields: Float[Tensor, "b f nx ny nz"]) -> Float[Tensor, "b c x y z"]:
        parts = self.autoencoder.learnt_inputs(fields, self.geometry, self.family)
        inputs = {name: x.float() for name, x in parts.items()}
        latent: Tensor = self.autoencoder.bottleneck(self.autoencoder.encoder(inputs, self.place))
        return latent


class Decode(Placed):
    """A latent to packed fields in FP64, before what needs a solver, or knows totals: `finish` does that."""

    def forward(self, latent: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b f nx ny nz"]:
        z = self.autoencoder.decoder_input(latent, self.geometry, self.family)
        said = self.autoencoder.decoder(z, self.place, self.types)
        fields = []
        for name, field in zip(self.types, self.scale.fields.values(), strict=True):
            channels = flatten(said[name], self.geometry.grid.shape).double()
            fields.append(self._in_units(self.autoencoder.heads.head(field.spec), channels, field))
        return fields[0] if len(fields) == 1 else torch.cat(fields, dim=1)

    def _in_units(self, head: Head, channels: Tensor, field: FieldScale) -> Tensor:
        if isinstance(head, FluxHead):
            return head.flux(channels, self.geometry, field)
        if isinstance(head, PointwiseHead):
            return head.field(channels, self.geometry, field)
        there = present(self.geometry, field.spec, channels.device)
        return torch.where(there, field.denormalise(channels, self.geometry.grid), 0.0)


class Step(nn.Module):
    """A latent, and the physical parameters at both ends of Δt, to the latent one Δt later.

    Args:
        names: see `Scaling`.
    """

    features: Tensor

    def __init__(
        self, dynamics: Dynamics, autoencoder: Autoencoder, geometry: Geometry, family: str, names: Sequence[str]
    ) -> None:
        super().__init__()
        self.dynamics, self.autoencoder, self.geometry, self.family = dynamics, autoencoder, geometry, family
        self.scaling = Scaling(dynamics.conditioning, names, dynamics.interval(family))
        self.register_buffer("features", latent_geometry(geometry, autoencoder.compression))

    def forward(
        self, latent: Float[Tensor, "b c x y z"], now: Float[Tensor, "b p"], then: Float[Tensor, "b p"]
    ) -> Float[Tensor, "b c x y z"]:
        features = self.features.expand(latent.shape[0], -1, -1, -1, -1)
        periodic = self.geometry.grid.periodic
        step = self.dynamics(latent[:, None], self.scaling(now, then), features, periodic, self.family)
        return self.autoencoder.admit(step.latent, self.geometry, self.family)


class Scaling(nn.Module):
    """`Conditioning.vector` of tensors: logarithms, means and spreads in FP64, the numbers in FP32.

    Args:
        names: the parameters that `now` and `then` hold, one after another. Others that the model knows enter as they
            do for a family without them.
        interval: Δt [s].
    """

    time: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, conditioning: Conditioning, names: Sequence[str], interval: float) -> None:
        super().__init__()
        self.known = conditioning.parameters
        sizes, start = {p.name: p.size for p in self.known}, 0
        self.where: dict[str, slice] = {}
        for name in names:
            self.where[name] = slice(start, start + sizes[name])
            start += sizes[name]
        self.register_buffer("time", torch.tensor([[math.log(interval) / 5]], dtype=torch.float64))
        for name, lists in (("mean", [p.mean for p in self.known]), ("std", [p.std for p in self.known])):
            self.register_buffer(name, torch.tensor(sum(lists, []), dtype=torch.float64))

    def forward(self, now: Float[Tensor, "b p"], then: Float[Tensor, "b p"]) -> Float[Tensor, "b q"]:
        parts, sizes = [self.time.expand(now.shape[0], -1)], [p.size for p in self.known]
        for p, mean, std in zip(self.known, self.mean.split(sizes), self.std.split(sizes), strict=True):
            for values in (now, then) if p.varying else (now,):
                if p.name not in self.where:
                    parts.append(self.time.new_zeros(1, p.size).expand(values.shape[0], -1))
                    continue
                x = values[:, self.where[p.name]]
                parts.append(((x.log() if p.logarithmic else x) - mean) / std)
        return torch.cat(parts, dim=1).float()


def functions(
    dynamics: Dynamics, autoencoder: Autoencoder, geometry: Geometry, family: str, names: Sequence[str]
) -> dict[str, nn.Module]:
    """`Encode`, `Step` and `Decode` of copies of the models, on their device, by the names in `NAMES`.

    In the copies experts run one by one on the rows that each gets (dispatch ``loop``), whose numbers a graph leaves
    open.

    Args:
        names: the parameters that a step takes, see `Scaling`.

    Raises:
        ValueError: models, or a geometry, that no artefact can hold, or that do not know each other.
    """
    check_exportable(dynamics, autoencoder, geometry, family)
    autoencoder.scale(family).check(geometry.grid)
    autoencoder.latent_shape(geometry.grid)
    device = dynamics.latent_mean.device
    autoencoder, dynamics = deepcopy(autoencoder).eval(), deepcopy(dynamics).eval()
    autoencoder.tile = None
    scale = autoencoder.scale(family)
    placed = (replace(field, profile=field.profile.to(device)) for field in scale.fields.values())
    autoencoder.scales = {family: FamilyScale(*placed)}
    for module in dynamics.modules():
        if isinstance(module, MoEFeedForward):
            module.dispatch = "loop" if module.experts.num_experts > 1 else "dense_static"
    geometry = _on(geometry, device)
    modules = [
        Encode(autoencoder, geometry, family),
        Step(dynamics, autoencoder, geometry, family, names),
        Decode(autoencoder, geometry, family),
    ]
    return {name: module.to(device).eval().requires_grad_(False) for name, module in zip(NAMES, modules, strict=True)}


def _on(geometry: Geometry, device: torch.device) -> Geometry:
    """The geometry with its masks worked out where they are needed, so that they are constants of a graph."""
    moved = Geometry(geometry.grid, None if geometry.solid is None else geometry.solid.to(device))
    for name in ("fluid", "open_faces", "wall_distance"):
        moved.__dict__[name] = getattr(geometry, name).to(device)
    return moved
