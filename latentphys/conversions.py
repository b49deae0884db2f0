"""Face fluxes from cell-centred velocities and back: finite volumes in any box, spectral in periodic ones.

The library's velocity is the volume flux through each cell's low faces, F [m³/s]. Most other codes store velocities at
points. Two ways lead from one to the other:

    finite volumes   u at cell centres --mean of two cells, × area--> F --projection--> net 0      second order
    spectral         u at points --∫ of the interpolating trigonometric polynomial over a face--> F       exact

The second order is lost for good: from faces to cells (`operators.cell_velocity`) and back, a wave of wavenumber k
along its own component is damped by (1 + cos kh)/2. The spectral way loses nothing but the Nyquist modes. Fluxes with
net 0.0 to the last bit come out of `exact.conserve`, after either.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from latentphys import operators
from latentphys.exact import conserve
from latentphys.grid import Geometry, Grid
from latentphys.projection import project

Offset = float | tuple[float, float, float]
SPACE = (-3, -2, -1)


def interpolate_to_faces(
    velocity: Float[Tensor, "*batch 3 nx ny nz"], geometry: Geometry
) -> Float[Tensor, "*batch 3 nx ny nz"]:
    """Flux through each open face from the velocity of the two cells beside it, not projected.

    Face a of cell i gets ½ (u_a(i − e_a) + u_a(i)) × its area; its velocity then errs by

        h_a²/8 ∂_a²u_a − h_b²/24 ∂_b²u_a − h_c²/24 ∂_c²u_a + O(h⁴)        (a the normal; b, c in the face)

    against the mean over the face. Walls, solids and the faces between solid and fluid stay closed, so velocities in
    solid cells are never used; on faces between two fluid cells beside a solid nothing changes. On an open low side of
    the box the velocity is extrapolated from two cells, or taken from the outermost one where the second is solid; the
    flux through an open high side is not stored, it closes the balance.

    Args:
        velocity: at cell centres [m/s].
        geometry: the box and its solids.

    Returns:
        The flux [m³/s], differentiable.

    Raises:
        ValueError: another shape than the grid's.
    """
    grid = geometry.grid
    operators.check_shape(velocity, grid, components=True)
    fluid = geometry.fluid.to(velocity.device)
    faces = []
    for axis, periodic in enumerate(grid.periodic):
        u, dim = velocity[..., axis, :, :, :], axis - 3
        below = u.roll(1, dim)
        if not periodic:
            first, second = u.narrow(dim, 0, 1), u.narrow(dim, 1, 1)
            beyond = torch.where(fluid.narrow(dim, 1, 1), 2 * first - second, first)
            below = torch.cat([beyond, u.narrow(dim, 0, grid.shape[axis] - 1)], dim)
        faces.append(0.5 * (below + u))
    return geometry.mask(operators.flux_of(torch.stack(faces, dim=-4), grid))


def flux_from_cells(
    velocity: Float[Tensor, "*batch 3 nx ny nz"], geometry: Geometry, exact: bool = False
) -> Float[Tensor, "*batch 3 nx ny nz"]:
    """The solenoidal flux nearest to the interpolated velocity; second order where the flow is smooth.

    In the norm of kinetic energy the projection cannot add to the error of `interpolate_to_faces`. Round solids, and at
    corners between them, the flow is not smooth and the order is that of the flow. `operators.cell_velocity` is the way
    back.

    Args:
        velocity: at cell centres [m/s]; in solid cells anything.
        geometry: the box and its solids.
        exact: make the net of every cell 0.0 bit for bit, in FP64 and without a gradient. Default: project, to the
            tolerance of `projection.project`, in the type of the velocity.

    Returns:
        The flux [m³/s], nothing through walls and solids, and a prescribed inflow as prescribed.

    Raises:
        ValueError: another shape than the grid's; with `exact`, also non-finite numbers.
    """
    flux = interpolate_to_faces(velocity, geometry)
    return conserve(flux=flux, geometry=geometry) if exact else project(flux, geometry)


def spectral_flux(
    velocity: Float[Tensor, "*batch 3 nx ny nz"], grid: Grid, offset: Offset = 0.5
) -> Float[Tensor, "*batch 3 nx ny nz"]:
    """Integral over each face of the trigonometric polynomial that passes through the samples.

    A mode û_a exp(ik·x) has, through face a of cell i, with b, c the axes in the face, the flux

        û_a h_b h_c sinc(k_b h_b/2) sinc(k_c h_c/2) exp(ik·x_f),        sinc t = sin t / t, x_f the face's centre,

    which is exact for every resolved mode. The net of a cell is then i k·û times a number, so samples with ik·û = 0
    give fluxes with net zero to rounding, unprojected. The Nyquist modes of even axes are dropped: shifted by half a
    cell they are not real. Averages over cells are not samples; their modes are smaller by three sincs.

    Args:
        velocity: samples at (i + offset) h [m/s].
        grid: the box, periodic on all axes.
        offset: place of the sample in its cell, in cells, of all axes or each. Default 0.5, the centre; 0.0 for codes
            with x_i = i h.

    Returns:
        The flux [m³/s], differentiable.

    Raises:
        ValueError: a box that is not periodic, or another shape than the grid's.
    """
    return _multiplied(velocity, grid, offset, inverse=False)


def spectral_velocity(
    flux: Float[Tensor, "*batch 3 nx ny nz"], grid: Grid, offset: Offset = 0.5
) -> Float[Tensor, "*batch 3 nx ny nz"]:
    """Samples of the trigonometric polynomial with these fluxes: the inverse of `spectral_flux` but for Nyquist modes.

    Division by sincs, which are at least 2/π each, so nothing is amplified by more than (π/2)² = 2.5. A flux with net
    zero gives ik·û = 0.

    Args:
        flux: through the low faces [m³/s].
        grid: the box, periodic on all axes.
        offset: where to sample, in cells, as in `spectral_flux`. Default 0.5, the centres.

    Returns:
        The velocity at (i + offset) h [m/s], differentiable.

    Raises:
        ValueError: a box that is not periodic, or another shape than the grid's.
    """
    return _multiplied(flux, grid, offset, inverse=True)


def spectral_solenoidal(velocity: Float[Tensor, "*batch 3 nx ny nz"], grid: Grid) -> Float[Tensor, "*batch 3 nx ny nz"]:
    """The part of sampled velocities with ik·û = 0 (Leray): û − k (k·û)/|k|², without the Nyquist modes of even axes.

    Args:
        velocity: samples [m/s], all three components at the same points, wherever these are in the cells.
        grid: the box, periodic on all axes.

    Returns:
        The solenoidal velocity [m/s], with the same mean; differentiable.

    Raises:
        ValueError: a box that is not periodic, or another shape than the grid's.
    """
    _check_periodic(velocity, grid)
    spectrum = torch.fft.rfftn(velocity, dim=SPACE)
    k = [_along(2 * math.pi / h * f, axis) for axis, (h, f) in enumerate(zip(grid.spacing, _modes(grid), strict=True))]
    wave = torch.stack(torch.broadcast_tensors(*k)).to(velocity)
    square = wave.square().sum(0)
    along = torch.einsum("aijk,...aijk->...ijk", wave.to(spectrum.dtype), spectrum)
    along = along * torch.where(square > 0, 1 / square, 0.0)
    return torch.fft.irfftn((spectrum - wave * along.unsqueeze(-4)) * _resolved(grid).to(velocity), grid.shape, SPACE)


def _multiplied(values: Tensor, grid: Grid, offset: Offset, inverse: bool) -> Tensor:
    """Every mode of every component times the flux of a unit mode, or divided by it."""
    _check_periodic(values, grid)
    offsets: Sequence[float] = offset if isinstance(offset, tuple) else (offset,) * 3
    resolved = _resolved(grid)
    components = []
    for normal, area in enumerate(grid.face_areas):
        transfer = torch.tensor(area, dtype=torch.complex128)
        for axis, (cycles, place) in enumerate(zip(_modes(grid), offsets, strict=True)):
            # the centre of the face is half a cell up on the two axes that lie in it
            shift, width = (0.0, torch.ones_like(cycles)) if axis == normal else (0.5, torch.sinc(cycles))
            transfer = transfer * _along(width * torch.exp(2j * math.pi * (shift - place) * cycles), axis)
        transfer = resolved / transfer if inverse else resolved * transfer
        spectrum = torch.fft.rfftn(values[..., normal, :, :, :], dim=SPACE)
        components.append(torch.fft.irfftn(spectrum * transfer.to(spectrum), grid.shape, SPACE))
    return torch.stack(components, dim=-4)


def _modes(grid: Grid) -> list[Tensor]:
    """Cycles per cell of the modes along each axis, −½ … ½, as `rfftn` orders them; k = 2π/h times these."""
    nx, ny, nz = grid.shape
    double = torch.float64
    return [
        torch.fft.fftfreq(nx, dtype=double),
        torch.fft.fftfreq(ny, dtype=double),
        torch.fft.rfftfreq(nz, dtype=double),
    ]


def _resolved(grid: Grid) -> Tensor:
    """0 for the modes that are at Nyquist along an axis, 1 for all others."""
    x, y, z = (_along((cycles.abs() < 0.5).double(), axis) for axis, cycles in enumerate(_modes(grid)))
    return x * y * z


def _along(values: Tensor, axis: int) -> Tensor:
    return values.reshape([-1 if a == axis else 1 for a in range(3)])


def _check_periodic(values: Tensor, grid: Grid) -> None:
    if not all(grid.periodic):
        raise ValueError(
            f"Expected a box that is periodic along all axes, got boundaries {grid.boundaries}; "
            "use `flux_from_cells` and `operators.cell_velocity` there."
        )
    operators.check_shape(values, grid, components=True)
