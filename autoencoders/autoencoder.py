"""The autoencoder: fields ↔ latent, every decode with the constraint of each field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from latentphys.autoencoders.bottleneck import Bottleneck, Reconstruction
from latentphys.autoencoders.decoder import Decoder
from latentphys.autoencoders.encoder import Encoder
from latentphys.autoencoders.heads import Heads
from latentphys.autoencoders.layers import extrude, flatten
from latentphys.autoencoders.normaliser import FamilyScale, FieldScale, num_components
from latentphys.autoencoders.place import Place, describe, num_conditions
from latentphys.autoencoders.scalar_heads import ConservedHead
from latentphys.autoencoders.tiles import decode_in_tiles, encode_in_tiles
from latentphys.fields import FieldSpec
from latentphys.grid import Geometry, Grid


def field_type(spec: FieldSpec) -> str:
    """What the networks know a field by: families share the weights of fields of one type."""
    return f"{spec.name}_{spec.kind}_{spec.constraint}"


class Autoencoder(nn.Module):
    """Compresses the fields of several families, each with a set of its own, into one latent space.

    Fields come and go packed (`FamilyScale.pack`): their components one after another, ``(b, c, nx, ny, nz)``, in the
    units of stores. Boxes of one or two dimensions, with axes of one cell, pass as boxes in which nothing changes along
    those axes: the networks see them one patch thick, and what they say is averaged over that thickness before the
    heads.

    Args:
        scales: family → its fields and their scales. Their types are those that the networks are made for.
        latent_channels: channels C of a latent.
        widths, num_blocks, stem, basis: see `Encoder`; ``stem · 2^(levels − 1)`` cells per axis become one latent cell.
        heads: what the constraint of each field is kept by. Default: `Heads()`.
        bottleneck: what bounds and disturbs latents. Default: `Bottleneck()`.

    Attributes:
        tile: cells per axis, at each resolution of the networks, that are worked out at a time in evaluation, so that
            memory stays bounded in large boxes; None for all at once. See `latentphys.autoencoders.tiles`.

    Raises:
        ValueError: levels that do not fit together, or a field that no head is for.
    """

    num_coarse = 0
    """Latent channels that are not learnt."""
    latent_specs: ClassVar[Mapping[str, FieldSpec]] = {}
    """Fields on the latent grid that a latent says as it stands; see `latent_fields`."""
    tile: int | None = None

    def __init__(
        self,
        scales: Mapping[str, FamilyScale],
        latent_channels: int,
        widths: Sequence[int],
        num_blocks: Sequence[int],
        stem: int = 2,
        basis: Literal["patch", "haar"] = "patch",
        heads: Heads | None = None,
        bottleneck: Bottleneck | None = None,
    ) -> None:
        super().__init__()
        if len(widths) != len(num_blocks) or not widths:
            raise ValueError(f"Expected as many widths as num_blocks, got {list(widths)} and {list(num_blocks)}.")
        if stem < 1:
            raise ValueError(f"Expected a stem ≥ 1, got {stem}.")
        if not scales:
            raise ValueError("Expected the scales of at least one family, got none.")
        self.scales = dict(scales)
        self.specs = {field_type(spec): spec for scale in scales.values() for spec in scale.specs.values()}
        self.latent_channels = latent_channels
        self.compression = stem * 2 ** (len(widths) - 1)
        most = max(scale.num_components for scale in scales.values()) * self.compression**3
        if not self.num_coarse < latent_channels <= most:
            raise ValueError(
                f"Expected latent_channels from {self.num_coarse + 1} to {most}, the numbers in a patch of "
                f"{self.compression}³ cells, got {latent_channels}."
            )
        for family, scale in scales.items():
            self.check_specs(family, scale.specs)
        self.heads, self.bottleneck = heads or Heads(), bottleneck or Bottleneck()
        size = (widths, num_blocks, stem, basis, num_conditions(len(self.specs)))
        components = {name: num_components(spec) for name, spec in self.specs.items()}
        channels = {name: self.heads.head(spec).num_channels for name, spec in self.specs.items()}
        self.encoder = Encoder(components, latent_channels - self.num_coarse, *size)
        self.decoder = Decoder(channels, latent_channels, *size)

    def latent_shape(self, grid: Grid) -> tuple[int, int, int]:
        """Latent cells per axis; one along an axis of one cell.

        Raises:
            ValueError: a grid that the compression does not divide.
        """
        if any(n % self.compression for n in grid.shape if n > 1):
            raise ValueError(
                f"Expected a grid divisible by the compression of {self.compression} per axis, got {grid.shape}; "
                f"choose multiples of {self.compression}."
            )
        x, y, z = (max(1, n // self.compression) for n in grid.shape)
        return x, y, z

    def scale(self, family: str) -> FamilyScale:
        """The fields of a family and their scales.

        Raises:
            ValueError: a family that the model was not trained on.
        """
        if family not in self.scales:
            raise ValueError(f"Expected a family of {sorted(self.scales)}, got {family!r}; this model knows no other.")
        return self.scales[family]

    def check(self, family: str, grid: Grid, specs: Mapping[str, FieldSpec]) -> None:
        """Whether the model can take the fields of a family, known or new, in a box.

        Args:
            specs: name → field; a known family may have others beside those that the model takes.

        Raises:
            ValueError: a grid that the compression does not divide, another box than that of a known family, or fields
                of other types.
        """
        if family in self.scales:
            self.scale(family).check(grid)
        self.latent_shape(grid)
        self.check_specs(family, specs)
        if family in self.scales:
            for name, wanted in self.scale(family).specs.items():
                got = specs.get(name)
                if got is None or field_type(got) != field_type(wanted) or got.unit != wanted.unit:
                    said = f"only {sorted(specs)}" if got is None else _said(got)
                    raise ValueError(f"Expected {_said(wanted)}, as this model knows family {family!r}, got {said}.")
            return
        unknown = [spec for spec in specs.values() if field_type(spec) not in self.specs]
        if unknown:
            raise ValueError(
                f"Expected fields among {', '.join(map(_said, self.specs.values()))} in the new family {family!r}, got "
                f"{', '.join(map(_said, unknown))}; train a model with such fields, or choose others with fields=[…]."
            )

    def encode(
        self, packed: Float[Tensor, "b c nx ny nz"], geometry: Geometry, family: str
    ) -> Float[Tensor, "b l x y z"]:
        """The latent of packed fields, in FP32."""
        self.latent_shape(geometry.grid)
        scale = self.scale(family)
        inputs = {name: x.float() for name, x in self._inputs(packed, geometry, scale).items()}
        place = self._place(geometry, scale).to(packed.device)
        if self.tile is not None and not self.training:
            return self.bottleneck(encode_in_tiles(self.encoder, inputs, place, self.tile))
        return self.bottleneck(self.encoder(inputs, place))

    def decode(
        self,
        latent: Float[Tensor, "b l x y z"],
        geometry: Geometry,
        family: str,
        exact: bool = False,
        totals: Mapping[str, Tensor] | None = None,
    ) -> Float[Tensor, "b c nx ny nz"]:
        """The packed fields of any latent, each with its constraint.

        Args:
            exact: FP64, the constraints to the last bit: solenoidal fluxes have a net of 0.0 in every cell; not
                differentiable. Default: FP32.
            totals: name → what a conserved scalar amounts to in each sample, ``(b,)``. Default: what the latent says.
        """
        expected = (self.latent_channels, *self.latent_shape(geometry.grid))
        if tuple(latent.shape[1:]) != expected:
            raise ValueError(f"Expected latents of shape (b, {str(expected)[1:-1]}), got {tuple(latent.shape)}.")
        scale = self.scale(family)
        place = self._place(geometry, scale).to(latent.device)
        names, z = [field_type(spec) for spec in scale.specs.values()], self.decoder_input(latent, geometry, family)
        if self.tile is not None and not self.training:
            raw = decode_in_tiles(self.decoder, z, place, names, self.tile)
        else:
            raw = self.decoder(z, place, names)
        fields = []
        for name, field in zip(names, scale.fields.values(), strict=True):
            channels = flatten(raw[name], geometry.grid.shape)
            total = None if totals is None else totals.get(field.spec.name)
            fields.append(self._finish(channels, latent, geometry, field, exact, total))
        return fields[0] if len(fields) == 1 else torch.cat(fields, dim=1)

    def _finish(
        self, raw: Tensor, latent: Tensor, geometry: Geometry, field: FieldScale, exact: bool, total: Tensor | None
    ) -> Tensor:
        """One field of what the decoder says of it."""
        head = self.heads.head(field.spec)
        if isinstance(head, ConservedHead):
            return head.exact(raw, geometry, field, total) if exact else head(raw, geometry, field, total)
        return head.exact(raw, geometry, field) if exact else head(raw, geometry, field)

    def forward(self, packed: Float[Tensor, "b c nx ny nz"], geometry: Geometry, family: str) -> Reconstruction:
        """Decode of encode, with latent noise in training."""
        latent = self.encode(packed, geometry, family)
        noisy, noise = self.bottleneck.disturb(latent[:, self.num_coarse :])
        noisy = torch.cat([latent[:, : self.num_coarse], noisy], dim=1)
        return Reconstruction(self.decode(noisy, geometry, family), latent, noise)

    def admit(self, latent: Float[Tensor, "b l x y z"], geometry: Geometry, family: str) -> Float[Tensor, "b l x y z"]:
        """The nearest latent that an encoder could say: within the bound of the bottleneck."""
        return self.bottleneck.admit(latent)

    def check_specs(self, family: str, specs: Mapping[str, FieldSpec]) -> None:
        """Refuse fields that this kind of latent is not for, with a ValueError; here it is for all."""

    def learnt_inputs(
        self, packed: Float[Tensor, "b c nx ny nz"], geometry: Geometry, family: str
    ) -> dict[str, Float[Tensor, "b _ px py pz"]]:
        """What the learnt channels are to carry of packed fields: field type → it, as the encoder sees fields."""
        return self._inputs(packed, geometry, self.scale(family))

    def decoder_input(
        self, latent: Float[Tensor, "b l x y z"], geometry: Geometry, family: str
    ) -> Float[Tensor, "b l x y z"]:
        """A latent as the decoder sees it, in FP32: about the mean of the family."""
        return latent.float()

    def channels_of(
        self, packed: Float[Tensor, "b c nx ny nz"], geometry: Geometry, family: str
    ) -> dict[str, Float[Tensor, "b _ px py pz"]]:
        """Field type → what the decoder would have to say for its head to make of it these packed fields."""
        scale = self.scale(family)
        return {
            field_type(field.spec): self.heads.head(field.spec).channels_of(x, geometry, field)
            for field, x in zip(scale.fields.values(), scale.split(packed).values(), strict=True)
        }

    def latent_fields(
        self, latent: Float[Tensor, "b l x y z"], geometry: Geometry, family: str
    ) -> dict[str, Float[Tensor, "b _ x y z"]]:
        """The fields of `latent_specs` that a latent stands for, in FP64; here there are none."""
        return {}

    def _inputs(self, packed: Tensor, geometry: Geometry, scale: FamilyScale) -> dict[str, Tensor]:
        """Normalised fields by type, nothing in solids, axes of one cell a patch thick."""
        return {
            field_type(scale[name].spec): extrude(scale[name].fluctuations(x, geometry), self.compression)
            for name, x in scale.split(packed).items()
        }

    def _place(self, geometry: Geometry, scale: FamilyScale) -> Place:
        names = {field_type(spec) for spec in scale.specs.values()}
        return describe(geometry, [name in names for name in self.specs], self.compression)


def _said(spec: FieldSpec) -> str:
    return f"a {spec.kind} {spec.name!r} [{spec.unit}] of constraint {spec.constraint}"
