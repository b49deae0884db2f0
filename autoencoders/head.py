"""What every head is: the last step of a decoder, from what the network says to a field that obeys its constraint."""

from __future__ import annotations

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor, nn

from latentphys.autoencoders.normaliser import FieldScale
from latentphys.fields import Constraint
from latentphys.grid import Geometry


class Head(nn.Module, ABC):
    """Turns the decoder's channels of one field into that field, in its unit.

    Attributes:
        num_channels: channels that it asks of the network.
        constraint: what its fields obey, as `FieldSpec.constraint`.
    """

    num_channels: int
    constraint: Constraint

    @abstractmethod
    def forward(
        self, raw: Float[Tensor, "b c nx ny nz"], geometry: Geometry, scale: FieldScale
    ) -> Float[Tensor, "b f nx ny nz"]:
        """The field in FP32, under autocast too. Differentiable.

        Args:
            raw: the network's channels, of order one.
            geometry: the box and its solids, for all samples or for each.
            scale: the field's mean and size; its box must be the geometry's.

        Returns:
            The field's components: 3 of a flux or vector, 1 of a scalar.

        Raises:
            ValueError: a box that the scale does not know.
        """

    @abstractmethod
    def exact(
        self, raw: Float[Tensor, "b c nx ny nz"], geometry: Geometry, scale: FieldScale
    ) -> Float[Tensor, "b f nx ny nz"]:
        """The same in FP64, the constraint as good as FP64 can have it. Not differentiable."""

    def channels_of(
        self, field: Float[Tensor, "b f nx ny nz"], geometry: Geometry, scale: FieldScale
    ) -> Float[Tensor, "b c nx ny nz"]:
        """Channels of which this head makes an admissible field, to what voxels and softness take of it.

        Unless a head says otherwise they are the field's `FieldScale.fluctuations`.
        """
        return scale.fluctuations(field, geometry)
