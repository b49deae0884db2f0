"""Helmholtz heads on spheres and in spherical shells: what a decoder gives becomes solenoidal, whatever it said.

Two things that the network's channels can be:

    velocity     the components of a flow, of which the orthogonal projection keeps the solenoidal part
    potentials   ψ on a sphere, T and S in a shell, of which the flow is made

The projection cannot raise the L² error of a solenoidal target; a potential is amplified by its wavenumber. For a
compressible flow the solenoidal field is the mass flux ρu where ρ does not change in time (anelastic flow); where it
does, ``solenoidal=False`` keeps the divergent part as well.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from latentphys import shell as shells
from latentphys import sphere as spheres
from latentphys.shell import Shell
from latentphys.sphere import Sphere

Channels = Literal["velocity", "potentials"]


class _SphericalHead(nn.Module, ABC):
    num_channels: int

    def __init__(self, channels: Channels, solenoidal: bool, velocity_scale: float) -> None:
        super().__init__()
        if channels not in ("velocity", "potentials"):
            raise ValueError(f"Expected channels of velocity | potentials, got {channels!r}.")
        if not (math.isfinite(velocity_scale) and velocity_scale > 0):
            raise ValueError(f"Expected a positive, finite velocity scale [m/s], got {velocity_scale}.")
        self.channels, self.solenoidal, self.velocity_scale = channels, solenoidal, velocity_scale

    @abstractmethod
    def flow(self, raw: Tensor) -> Tensor:
        """The velocity [m/s] that the network means, in the dtype of its channels."""

    def _flow(self, raw: Tensor, dtype: torch.dtype) -> Tensor:
        if raw.dim() < 3 or raw.shape[self._channel_axis] != self.num_channels:
            raise ValueError(
                f"Expected {self.num_channels} channels ({self.channels}) on axis {self._channel_axis}, "
                f"got a shape of {tuple(raw.shape)}."
            )
        with torch.autocast(raw.device.type, enabled=False):
            return self.flow(raw.to(dtype))

    _channel_axis: int


class SphereHead(_SphericalHead):
    """Turns a decoder's channels on a sphere into a tangential flow.

    Args:
        sphere: the sphere and its grid.
        channels: ``velocity``, 2 channels (u_θ, u_φ) in units of the velocity scale, projected; or ``potentials``,
            1 channel ψ in units of velocity scale × radius, and χ as a second one where not solenoidal.
            Default ``velocity``.
        solenoidal: whether the divergent part is removed. Default True.
        velocity_scale: the velocity [m/s] that channels of size 1 stand for. Default 1.

    Raises:
        ValueError: unknown channels, or a velocity scale that is not positive.
    """

    _channel_axis = -3

    def __init__(
        self, sphere: Sphere, channels: Channels = "velocity", solenoidal: bool = True, velocity_scale: float = 1.0
    ) -> None:
        super().__init__(channels, solenoidal, velocity_scale)
        self.sphere = sphere
        self.num_channels = 1 if channels == "potentials" and solenoidal else 2

    def forward(self, raw: Float[Tensor, "*batch c nlat nlon"]) -> Float[Tensor, "*batch 2 nlat nlon"]:
        """The flow (u_θ, u_φ) [m/s] in FP32, of degrees l < lmax. Differentiable."""
        return self._flow(raw, torch.float32)

    def exact(self, raw: Float[Tensor, "*batch c nlat nlon"]) -> Float[Tensor, "*batch 2 nlat nlon"]:
        """The same in FP64: its spectral divergence is zero to the rounding of FP64."""
        return self._flow(raw, torch.float64)

    def flow(self, raw: Tensor) -> Tensor:
        if self.channels == "velocity":
            u = self.velocity_scale * raw
            if self.solenoidal:
                return spheres.project(u, self.sphere)
            return spheres.synthesise_flow(*spheres.analyse_flow(u, self.sphere), self.sphere)
        parts = (self.velocity_scale * self.sphere.radius * raw).unbind(-3)
        return spheres.velocity(parts[0], None if self.solenoidal else parts[1], self.sphere)


class ShellHead(_SphericalHead):
    """Turns a decoder's channels in a spherical shell into a flow that obeys the shell's walls.

    Args:
        shell: the shell, its grid and its walls.
        channels: ``velocity``, 3 channels (u_r, u_θ, u_φ) in units of the velocity scale, projected; or ``potentials``,
            2 channels T and S in units of velocity scale × outer radius and × its square, and where not solenoidal a
            third one φ, in units of velocity scale × outer radius, whose gradient is added. Default ``velocity``.
        solenoidal: whether the divergent part is removed. Default True.
        velocity_scale: the velocity [m/s] that channels of size 1 stand for. Default 1.

    Raises:
        ValueError: unknown channels, or a velocity scale that is not positive.
    """

    _channel_axis = -4

    def __init__(
        self, shell: Shell, channels: Channels = "velocity", solenoidal: bool = True, velocity_scale: float = 1.0
    ) -> None:
        super().__init__(channels, solenoidal, velocity_scale)
        self.shell = shell
        self.num_channels = 2 if channels == "potentials" and solenoidal else 3

    def forward(self, raw: Float[Tensor, "*batch c nr nlat nlon"]) -> Float[Tensor, "*batch 3 nr nlat nlon"]:
        """The flow (u_r, u_θ, u_φ) [m/s] in FP32, of degrees l < lmax. Differentiable."""
        return self._flow(raw, torch.float32)

    def exact(self, raw: Float[Tensor, "*batch c nr nlat nlon"]) -> Float[Tensor, "*batch 3 nr nlat nlon"]:
        """The same in FP64: its discrete divergence is zero to the rounding of FP64."""
        return self._flow(raw, torch.float64)

    def flow(self, raw: Tensor) -> Tensor:
        if self.channels == "velocity":
            keep = shells.project if self.solenoidal else shells.admit
            return keep(self.velocity_scale * raw, self.shell)
        radius = self.shell.radii[-1]
        parts = (self.velocity_scale * radius * raw).unbind(-4)
        u = shells.velocity(parts[0], radius * parts[1], self.shell)
        return u if self.solenoidal else shells.admit(u + shells.gradient(parts[2], self.shell), self.shell)
