"""Analytic fields and random geometries on the staggered grid, shared by the tests of the physics."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from latentphys import operators
from latentphys.autoencoders.normaliser import FamilyScale, FieldScale
from latentphys.grid import Boundaries, Geometry, Grid

PERIODIC = ("periodic", "periodic")
BOUNDARIES: dict[str, Boundaries] = {
    "periodic": (("periodic", "periodic"), ("periodic", "periodic"), ("periodic", "periodic")),
    "channel": (("periodic", "periodic"), ("periodic", "periodic"), ("no_slip", "free_slip")),
    "closed": (("no_slip", "no_slip"), ("free_slip", "free_slip"), ("free_slip", "no_slip")),
    "mixed": (("free_slip", "no_slip"), ("periodic", "periodic"), ("no_slip", "no_slip")),
    "first": (("periodic", "periodic"), ("free_slip", "free_slip"), ("no_slip", "free_slip")),
}
OPEN: dict[str, Boundaries] = {
    "duct": (("inflow", "outflow"), ("no_slip", "no_slip"), ("periodic", "periodic")),
    "bend": (("no_slip", "outflow"), ("inflow", "free_slip"), ("free_slip", "outflow")),
    "through": (("outflow", "inflow"), ("outflow", "outflow"), ("inflow", "outflow")),
}
"""Boxes that something flows into and out of."""
SHAPE = (5, 4, 7)
SPACING = (0.7, 1.3, 0.4)


def box(boundaries: str, shape: tuple[int, int, int] = SHAPE, spacing: tuple[float, float, float] = SPACING) -> Grid:
    """A box that no axis can be mistaken in: other sizes, other spacings."""
    return Grid(shape, spacing, (BOUNDARIES | OPEN)[boundaries])


def two_pi_box(shape: Sequence[int]) -> Grid:
    """A periodic box of side 2π."""
    nx, ny, nz = shape
    return Grid((nx, ny, nz), (2 * math.pi / nx, 2 * math.pi / ny, 2 * math.pi / nz))


def points(grid: Grid, offset: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Coordinates at an offset from the low corner of every cell, in cells; broadcastable, FP64."""
    x, y, z = (
        ((torch.arange(n, dtype=torch.float64) + o) * h).reshape([-1 if a == axis else 1 for a in range(3)])
        for axis, (n, o, h) in enumerate(zip(grid.shape, offset, grid.spacing, strict=True))
    )
    return x, y, z


def face_points(grid: Grid, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """Centres of the low faces normal to an axis."""
    return points(grid, [0.0 if a == axis else 0.5 for a in range(3)])


def edge_points(grid: Grid, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """Centres of the low edges parallel to an axis."""
    return points(grid, [0.5 if a == axis else 0.0 for a in range(3)])


def abc(component: int, at: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """A component of the Arnold–Beltrami–Childress flow (1, 0.7, 0.4) in a box of side 2π: ∇×u = u, ∇·u = 0."""
    following, previous = at[(component + 1) % 3], at[(component + 2) % 3]
    a = (1.0, 0.7, 0.4)
    u = a[component] * previous.sin() + a[(component + 2) % 3] * following.cos()
    return u + 0.0 * at[component]


def abc_flux(grid: Grid) -> Tensor:
    """The ABC flow as a flux through the low faces [m³/s]; its discrete divergence is zero."""
    return operators.flux_of(torch.stack([abc(a, face_points(grid, a)) for a in range(3)]), grid)


def taylor_green(grid: Grid, normal: int) -> Tensor:
    """The 2D Taylor–Green vortex in the plane normal to an axis of a 2π box, as a flux [m³/s]; decays as exp(−2νt)."""
    a, b = (normal + 1) % 3, (normal + 2) % 3
    u = torch.zeros(3, *grid.shape, dtype=torch.float64)
    at_a, at_b = face_points(grid, a), face_points(grid, b)
    u[a] = at_a[a].sin() * at_a[b].cos()
    u[b] = -at_b[a].cos() * at_b[b].sin()
    return operators.flux_of(u, grid)


def poiseuille(z: Tensor, depth: float, force: float, viscosity: float) -> Tensor:
    """Laminar open-channel flow over a no-slip bed: u = (F/ν)(zH − z²/2) [m/s]."""
    return force / viscosity * (z * depth - z**2 / 2)


def random_flux(grid: Grid, *batch: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*batch, 3, *grid.shape, dtype=dtype)


def random_geometry(grid: Grid, *batch: int, fraction: float = 0.4) -> Geometry:
    """Independent solid voxels: pores of every kind, isolated cells among them."""
    solid = torch.rand(*batch, *grid.shape) < fraction
    solid[..., 0, 0, 0] = False
    solid[..., 1, 1, 1] = True
    return Geometry(grid, solid)


def ring(shape: tuple[int, int, int] = (7, 8, 8)) -> tuple[Geometry, tuple[int, slice, slice]]:
    """A square ring in the middle of a closed box, which touches no wall, and the index of the faces in its hole."""
    grid = Grid(shape, (1.0, 1.0, 1.0), (("no_slip", "no_slip"),) * 3)
    solid = torch.zeros(shape, dtype=torch.bool)
    solid[3, 2:6, 2:6] = True
    solid[3, 3:5, 3:5] = False
    return Geometry(grid, solid), (3, slice(3, 5), slice(3, 5))


def order(errors: Sequence[float]) -> list[float]:
    """Measured orders of convergence from the errors on grids (or steps) halved each time."""
    return [math.log2(coarse / fine) for coarse, fine in zip(errors, errors[1:], strict=False)]


def velocity_scale(grid: Grid, profile: Tensor | None = None, size: float = 1.0) -> FamilyScale:
    """A family that is one incompressible velocity: its mean flux [m³/s], by default none, and its size [m/s]."""
    return FamilyScale(FieldScale(grid, torch.zeros(3, 1, 1, 1) if profile is None else profile, size))
