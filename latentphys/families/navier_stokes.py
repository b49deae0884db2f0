"""Time-dependent incompressible Navier–Stokes on the staggered complex, batched over trajectories.

    ∂u/∂t + ∇·(u u) = −∇p + ν Δu + f,     ∇·u = 0

Second order in space in divergence form (it conserves kinetic energy where u is discretely solenoidal), third-order
low-storage Runge–Kutta in time with a projection in every stage. No-slip holds on walls of the box and on voxel
surfaces by reflection: the velocity is zero half a cell away from the first face along a wall.

References: Harlow & Welch, Phys. Fluids 8 (1965); Le & Moin, J. Comput. Phys. 92 (1991) for the Runge–Kutta scheme.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from latentphys import exact, operators
from latentphys.families.solver import Fields, RungeKutta
from latentphys.grid import Geometry
from latentphys.projection import decompose
from latentphys.separable import box_poisson

CFL = 1.0
"""Δt Σ_a |u_a| / h_a. The scheme is stable to √3 along the imaginary axis."""

DIFFUSION_LIMIT = 2.5
"""Δt times the largest eigenvalue of −νΔ; the scheme is stable to 2.51 along the real axis."""

STORED_TOLERANCE = 1e-9
"""Net flux left to the fixed-point step in recorded states, relative to the flux; below the solver's FP32 rounding."""

Force = Callable[[float], Float[Tensor, "*batch 3"]]


class NavierStokes(RungeKutta):
    """A batch of flows in one box, each with its own solids and viscosity. Its field is ``velocity``, a flux [m³/s].

    Args:
        geometry: the box and its solids, ``batch_shape`` () or (B,).
        viscosity: kinematic viscosity ν [m²/s], a number or one per trajectory (B,).
        force: body force per unit mass at a time, (B, 3) or (3,) [m/s²]. Default: none.
        dtype: FP32 or FP64. Good value: FP32; recorded states are made exactly conservative in FP64 afterwards.
        compiled: fuse the arithmetic with `torch.compile`; pays from about a hundred steps.
        tol: relative tolerance of the projection in voxel geometry.
    """

    def __init__(
        self,
        geometry: Geometry,
        viscosity: float | Float[Tensor, " batch"],
        force: Force | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        compiled: bool = False,
        tol: float = 1e-3,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(dtype, device, compiled)
        if any(sum(geometry.grid.open_sides, ())):
            raise ValueError(
                f"Expected a box of walls and periodic axes, got {geometry.grid.boundaries}; drive the flow by a body "
                "force."
            )
        self.geometry, self.tol, self.force = geometry.to(device), tol, force
        self.viscosity = self.positive("viscosity [m²/s]", viscosity)
        self.areas = geometry.grid.per_face(geometry.grid.face_areas, self.viscosity)
        self.open_faces = self.geometry.open_faces.to(device, dtype)
        self.open_edges = _open_edges(self.geometry).to(device, dtype)
        self.drag = _wall_drag(self.geometry).to(device, dtype)
        self.pressure: Tensor | None = None
        self._fused_correction = self.fused(self._correction)

    def positive(self, name: str, value: float | Tensor) -> Float[Tensor, "batch 1 1 1 1"]:
        """A physical parameter of each trajectory, ready to multiply fields of three components.

        Raises:
            ValueError: a value that is not positive.
        """
        tensor = torch.as_tensor(value, dtype=self.dtype, device=self.device).reshape(-1, 1, 1, 1, 1)
        if not bool((tensor > 0).all()):
            raise ValueError(f"Expected a positive {name}, got {value}.")
        return tensor

    def working(self, fields: Fields) -> Fields:
        return super().working({name: value.contiguous() for name, value in fields.items()})

    def recorded(self, fields: Fields) -> Fields:
        flux = exact.conserve(flux=fields["velocity"], geometry=self.geometry, tol=STORED_TOLERANCE)
        return super().recorded(fields) | {"velocity": flux.cpu()}

    def memory(self) -> Fields:
        return {} if self.pressure is None else {"pressure": self.pressure}

    def remember(self, memory: Fields) -> None:
        pressure = memory.get("pressure")
        self.pressure = None if pressure is None else pressure.to(self.device, self.dtype)

    def signal_speed(self, fields: Fields) -> Float[Tensor, "batch 3 nx ny nz"]:
        """The fastest that anything travels along each axis, beside each face [m/s]."""
        return (fields["velocity"] / self.areas).abs()

    def diffusion_rate(self) -> float:
        """The fastest rate at which anything diffuses away [1/s]."""
        grid = self.geometry.grid
        spectrum = sum(4 / h**2 for h, n in zip(grid.spacing, grid.shape, strict=True) if n > 1)
        spectrum += float(self.drag.amax())
        return float(self.viscosity.amax()) * spectrum

    def stable_step(self, fields: Fields) -> float:
        """The largest stable Δt [s] of the whole batch at this state.

        Both limits are quarter axes of an ellipse inside the scheme's region of stability. Their smaller one is not
        enough: at the corner (−2.5 + 1i) a mode grows by 1.48 in every step.
        """
        spacing = self.geometry.grid.per_face(self.geometry.grid.spacing, self.viscosity)
        advection = float((self.signal_speed(fields) / spacing).sum(-4).amax())
        return 1 / math.hypot(advection / CFL, self.diffusion_rate() / DIFFUSION_LIMIT)

    def drive(self, fields: Fields, time: float) -> Fields:
        if self.force is None:
            return {}
        return {"force": self.force(time).to(self.viscosity)[..., None, None, None]}

    def rates(self, fields: Fields, drive: Fields) -> Fields:
        acceleration = self.momentum(fields["velocity"] / self.areas)
        if drive:
            acceleration = acceleration + drive["force"]
        return {"velocity": acceleration * (self.open_faces * self.areas)}

    def momentum(self, u: Float[Tensor, "batch 3 nx ny nz"]) -> Float[Tensor, "batch 3 nx ny nz"]:
        """−∇·(u u) + νΔu at each face [m/s²], before the projection and without regard to closed faces."""
        return _momentum(u, self.viscosity, self.open_edges, self.drag, self.geometry.grid.spacing)

    def residue(self, fields: Fields) -> Fields:
        if not self.geometry.is_empty:
            return {}
        return {"net": operators.stored_div(fields["velocity"], self.geometry.grid)}

    def constrain(self, fields: Fields, residue: Fields, duration: float) -> Fields:
        flux, geometry = fields["velocity"], self.geometry
        if geometry.is_empty:
            solve = box_poisson(geometry.grid, geometry.ends, self.dtype, self.device)
            return fields | {"velocity": self._fused_correction(flux, solve(residue["net"]))}
        guess = None if self.pressure is None else self.pressure * duration
        flux, potential, _ = decompose(flux, geometry, self.tol, guess=guess)
        self.pressure = potential / duration
        return fields | {"velocity": flux}

    def _correction(self, flux: Tensor, potential: Tensor) -> Tensor:
        """F − C ∇φ on the open faces, in one sweep."""
        faces = [
            conductance * (potential - potential.roll(1, axis - 3))
            for axis, conductance in enumerate(self.geometry.grid.conductances)
        ]
        return flux - torch.stack(faces, dim=1) * self.open_faces


def _momentum(
    u: Tensor, viscosity: Tensor, open_edges: Tensor, drag: Tensor, spacing: tuple[float, float, float]
) -> Tensor:
    """−∇·(u u) + νΔu from stresses in cells (normal) and on edges (tangential).

    Every momentum flux is the product of two means of neighbours less ν times their difference. Edges that touch a wall
    or a solid have no viscous part; the friction there is `drag`.
    """
    nu = viscosity[:, 0]
    stress: dict[tuple[int, int], Tensor] = {}
    for c in range(3):
        a, b = (c + 1) % 3, (c + 2) % 3
        ua, ub = u[:, a], u[:, b]
        ua_below, ub_below = ua.roll(1, b - 3), ub.roll(1, a - 3)
        advection, is_open = 0.25 * (ua + ua_below) * (ub + ub_below), open_edges[:, c]
        stress[a, b] = advection - is_open * (nu / spacing[b] * (ua - ua_below))
        stress[b, a] = advection - is_open * (nu / spacing[a] * (ub - ub_below))
    rates = []
    for a in range(3):
        ua, ua_below = u[:, a], u[:, a].roll(1, a - 3)
        in_cell_below = 0.25 * (ua_below + ua) ** 2 - nu / spacing[a] * (ua - ua_below)
        rate = (in_cell_below - in_cell_below.roll(-1, a - 3)) / spacing[a]
        for b in range(3):
            if b != a:
                rate = rate + (stress[a, b] - stress[a, b].roll(-1, b - 3)) / spacing[b]
        rates.append(rate)
    return torch.stack(rates, dim=1) - viscosity * drag * u


def _open_edges(geometry: Geometry) -> Tensor:
    """True on the edges all four of whose cells are fluid and that lie in no wall, shape (B or 1, 3, nx, ny, nz)."""
    fluid = geometry.fluid
    edges = []
    for axis in range(3):
        a, b = (axis + 1) % 3 - 3, (axis + 2) % 3 - 3
        is_open = fluid & fluid.roll(1, a) & fluid.roll(1, b) & fluid.roll((1, 1), (a, b))
        for dim in (a, b):
            if not geometry.grid.periodic[dim + 3]:
                is_open.select(dim, 0).fill_(False)
        edges.append(is_open)
    return torch.stack(edges, dim=-4).reshape(-1, 3, *geometry.grid.shape)


def _wall_drag(geometry: Geometry) -> Tensor:
    """Friction of no-slip surfaces along each open face [1/m²].

    On each side along another axis two cells lie beside a face. Where both are solid, or the box ends, the surface is
    half a cell away: 2/h². Where one is solid, at a step, the closed face beside is at rest a whole cell away: 1/h².
    """
    grid, open_faces = geometry.grid, geometry.open_faces
    solid = (~geometry.fluid).double()
    drag = torch.zeros_like(open_faces, dtype=torch.float64)
    for a in range(3):
        cells = solid + solid.roll(1, a - 3)
        for b in range(3):
            if a == b:
                continue
            for offset, index, boundary in zip((1, -1), (0, grid.shape[b] - 1), grid.boundaries[b], strict=True):
                beside = cells.roll(offset, b - 3)
                if boundary != "periodic":
                    beside.select(b - 3, index).fill_(2.0 if boundary == "no_slip" else 0.0)
                drag.select(-4, a).add_(beside / grid.spacing[b] ** 2)
    return (drag * open_faces).reshape(-1, 3, *grid.shape)
