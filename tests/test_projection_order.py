"""Second order of the projection on manufactured flows, at every kind of side.

u = ∇×A with A tangential zero on the walls, F = u + ∇φ with ∂φ/∂n = 0 where the flux is given and φ = 0 where it is
free: then u is the projection of F. Every field is a product of functions of ξ = x / L, one for each axis. At an open
high side the projection does not see F itself but what closes the balance of the last cells, off by O(h).
"""

import itertools
from collections.abc import Callable

import pytest
import torch
from reference import OPEN, order
from torch import Tensor

from latentphys.grid import SIDES, Boundaries, Boundary, Geometry, Grid
from latentphys.inflow import through_sides
from latentphys.projection import project

P: tuple[Boundary, Boundary] = ("periodic", "periodic")
W: tuple[Boundary, Boundary] = ("no_slip", "free_slip")

Function = Callable[[Tensor], Tensor]


def at_side(x: Tensor, side: str) -> Tensor:
    """Of values in cells, those beside a side."""
    axis, high = divmod(SIDES.index(side), 2)
    return x.select(axis - 3, -high)


def wave(x: Tensor) -> Tensor:
    return 1 + 0.2 * torch.sin(2 * torch.pi * x + 1)


def potential_factor(at_low_wall: bool, at_high_wall: bool) -> Function:
    """Zero on the walls."""
    return lambda x: x**at_low_wall * (1 - x) ** at_high_wall * torch.cos(0.3 + 1.3 * x)


def pressure_factor(free_low: bool, free_high: bool) -> Function:
    """Zero on free ends, flat on the others."""
    if free_low and free_high:
        return lambda x: 4 * x * (1 - x) * (1 + 0.5 * x)
    if free_low:
        return lambda x: pressure_factor(False, True)(1 - x)
    if free_high:
        return lambda x: 1 + 0.5 * x**2 - 1.5 * x**3
    return lambda x: 1 + x**2 * (1.5 - x)


def derivative(function: Function) -> Function:
    return lambda x: torch.func.jvp(function, (x,), (torch.ones_like(x),))[1]


class Manufactured:
    """u and F = u + ∇φ [m/s] in a box of 1 × 1.3 × 0.8 m with some of its inflow sides prescribed."""

    def __init__(self, boundaries: Boundaries, prescribed: tuple[str, ...], n: int) -> None:
        shape, self.lengths = (4 * n, 3 * n, 5 * n), (1.0, 1.3, 0.8)
        dx, dy, dz = (length / size for length, size in zip(self.lengths, shape, strict=True))
        self.grid, self.prescribed = Grid(shape, (dx, dy, dz), boundaries), prescribed
        free = [s not in prescribed for s in SIDES]
        self.phi: list[Function] = []
        self.a: list[list[Function]] = [[], [], []]
        for axis, (pair, is_open) in enumerate(zip(boundaries, self.grid.open_sides, strict=True)):
            periodic = pair[0] == "periodic"
            ends = is_open[0] and free[2 * axis], is_open[1] and free[2 * axis + 1]
            self.phi.append(wave if periodic else pressure_factor(*ends))
            for component in range(3):
                walls = (False, False) if component == axis else (not is_open[0], not is_open[1])
                self.a[component].append(wave if periodic else potential_factor(*walls))

    def at_faces(self, axis: int) -> tuple[Tensor, Tensor]:
        """u and F through all faces normal to an axis, those of the high side too."""
        xi = []
        for a, n in enumerate(self.grid.shape):
            points = torch.arange(n + 1, dtype=torch.float64) if a == axis else torch.arange(n) + 0.5
            xi.append((points.double() / n).reshape([-1 if b == a else 1 for b in range(3)]))

        def d(factors: list[Function], along: int) -> Tensor:
            """∂/∂x_along of a product."""
            parts = [derivative(f)(x) if a == along else f(x) for a, (f, x) in enumerate(zip(factors, xi, strict=True))]
            return parts[0] * parts[1] * parts[2] / self.lengths[along]

        after, before = (axis + 1) % 3, (axis + 2) % 3
        u = d(self.a[before], after) - d(self.a[after], before)
        return u, u + 0.5 * d(self.phi, axis)

    def errors(self) -> tuple[float, float]:
        """L2 and largest error [m/s] of the projection of F, on the stored faces and on the high sides."""
        grid = self.grid
        area = grid.per_face(grid.face_areas, torch.zeros(1).double())
        fields = [self.at_faces(axis) for axis in range(3)]
        u, f = (torch.stack([x[part].narrow(a, 0, grid.shape[a]) for a, x in enumerate(fields)]) for part in (0, 1))
        inflow: dict[str, float | Tensor] = {}
        for axis, high in itertools.product(range(3), range(2)):
            if (side := SIDES[2 * axis + high]) in self.prescribed:
                inflow[side] = fields[axis][0].select(axis, -high) * (-1.0 if high else 1.0)
        geometry = Geometry(grid, None, inflow)
        got = project(f * area, geometry)
        error = (got / area - u) * geometry.open_faces
        # What leaves through the high sides, together where a cell has several.
        left, expected, wet = (torch.zeros(grid.shape, dtype=torch.float64) for _ in range(3))
        for side, through in through_sides(got, geometry).items():
            axis, high = divmod(SIDES.index(side), 2)
            if high:
                at_side(left, side).add_(through)
                at_side(expected, side).add_(fields[axis][0].select(axis, -1) * grid.face_areas[axis])
                at_side(wet, side).add_(grid.face_areas[axis])
        beyond = (left - expected)[wet > 0] / wet[wet > 0]
        every = torch.cat([error.flatten(), beyond])
        return float(error.square().mean().sqrt()), float(every.abs().amax())


ORDERS: dict[str, tuple[Boundaries, tuple[str, ...]]] = {
    "periodic": ((P, P, P), ()),
    "no_slip": ((("no_slip", "no_slip"),) * 3, ()),
    "free_slip": ((("free_slip", "free_slip"),) * 3, ()),
    "outflow low": ((("outflow", "no_slip"), W, P), ()),
    "outflow high": ((W, P, ("no_slip", "outflow")), ()),
    "inflow low": ((P, W, ("inflow", "free_slip")), ()),
    "inflow high": ((("free_slip", "inflow"), P, W), ()),
    "prescribed low": ((("inflow", "outflow"), P, W), ("x-",)),
    "prescribed high": ((W, P, ("outflow", "inflow")), ("z+",)),
    "prescribed both": ((P, ("inflow", "inflow"), W), ("y-", "y+")),
    "bend": (OPEN["bend"], ("y-",)),
    "through": (OPEN["through"], ("x+",)),
    "all open": ((("outflow", "outflow"),) * 3, ()),
}


@pytest.mark.parametrize("case", ORDERS)
def test_second_order_at_every_kind_of_side(case: str) -> None:
    boundaries, prescribed = ORDERS[case]
    errors = [Manufactured(boundaries, prescribed, n).errors() for n in (5, 10, 20)]
    for norm in zip(*errors, strict=True):
        assert all(1.8 < p < 2.3 for p in order(norm)), (norm, order(norm))
