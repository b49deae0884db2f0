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
from torch.nn.functional import pad

from latentphys import operators
from latentphys.grid import Geometry
from latentphys.projection import decompose

RUNGE_KUTTA = ((8 / 15, 0.0), (5 / 12, -17 / 60), (3 / 4, -5 / 12))
"""Weights (γ, ζ) of the new and the previous right-hand side in each stage."""

CFL = 1.0
"""Δt Σ_a |u_a| / h_a. The scheme is stable to √3 along the imaginary axis."""

DIFFUSION_LIMIT = 2.5
"""Δt times the largest eigenvalue of −νΔ; the scheme is stable to 2.51 along the real axis."""

Force = Callable[[float], Float[Tensor, "*batch 3"]]


class NavierStokes:
    """A batch of flows in one box, each with its own solids and viscosity.

    Args:
        geometry: the box and its solids, ``batch_shape`` () or (B,).
        viscosity: kinematic viscosity ν [m²/s], a number or one per trajectory (B,).
        dtype: FP32 or FP64. Good value: FP32; saved states are made exactly conservative in FP64 afterwards.
        compiled: fuse the right-hand side with `torch.compile`; pays from about a hundred steps.
        tol: relative tolerance of the projection in voxel geometry.
    """

    def __init__(
        self,
        geometry: Geometry,
        viscosity: float | Float[Tensor, " batch"],
        dtype: torch.dtype = torch.float32,
        compiled: bool = False,
        tol: float = 1e-3,
        device: torch.device | str = "cpu",
    ) -> None:
        if any(sum(geometry.grid.open_sides, ())):
            raise ValueError(
                f"Expected a box of walls and periodic axes, got {geometry.grid.boundaries}; drive the flow by a body "
                "force."
            )
        self.geometry, self.tol = geometry.to(device), tol
        self.viscosity = torch.as_tensor(viscosity, dtype=dtype, device=device).reshape(-1, 1, 1, 1, 1)
        if not bool((self.viscosity > 0).all()):
            raise ValueError(f"Expected a positive viscosity [m²/s], got {viscosity}.")
        self.open_faces = self.geometry.open_faces.to(device, dtype)
        self.open_edges = pad(_open_edges(self.geometry).to(device, dtype), (1,) * 6, mode="circular")
        self.drag = _wall_drag(self.geometry).to(device, dtype)
        self.pressure: Tensor | None = None
        # The C library hands freed memory back, to be faulted in anew at every step, beyond twice the largest block it
        # has seen come and go. This one, which is never touched, raises that to 32 MiB.
        torch.empty(2**24, dtype=torch.uint8)
        self._right_hand_side = torch.compile(_right_hand_side, dynamic=False) if compiled else _right_hand_side

    def stable_step(self, flux: Float[Tensor, "batch 3 nx ny nz"]) -> float:
        """The largest stable Δt [s] of the whole batch at this state.

        Both limits are quarter axes of an ellipse inside the scheme's region of stability. Their smaller one is not
        enough: at the corner (−2.5 + 1i) a mode grows by 1.48 in every step.
        """
        grid = self.geometry.grid
        spacing = grid.per_face(grid.spacing, flux)
        advection = float((operators.velocity(flux, grid).abs() / spacing).sum(-4).amax())
        spectrum = sum(4 / h**2 for h in grid.spacing) + float(self.drag.amax())
        diffusion = float(self.viscosity.amax()) * spectrum
        return 1 / math.hypot(advection / CFL, diffusion / DIFFUSION_LIMIT)

    @torch.no_grad()
    def step(
        self, flux: Float[Tensor, "batch 3 nx ny nz"], force: Force, time: float, dt: float
    ) -> Float[Tensor, "batch 3 nx ny nz"]:
        """One Runge–Kutta step.

        Args:
            flux: volume flux through the low faces [m³/s].
            force: body force per unit mass at a time, (batch, 3) or (3,) [m/s²].
            time: t [s].
            dt: Δt [s]; `stable_step` tells the limit.
        """
        grid = self.geometry.grid
        areas = grid.per_face(grid.face_areas, flux)
        previous = torch.zeros_like(flux)
        for gamma, zeta in RUNGE_KUTTA:
            f = force(time).to(flux)[..., None, None, None]
            rate = self._right_hand_side(
                flux / areas, self.viscosity, f, self.open_faces, self.open_edges, self.drag, grid.spacing
            )
            flux = torch.addcmul(flux, rate, areas, value=gamma * dt)
            if zeta:
                flux.addcmul_(previous, areas, value=zeta * dt)
            stage = (gamma + zeta) * dt
            guess = None if self.pressure is None else self.pressure * stage
            flux, potential, _ = decompose(flux, self.geometry, self.tol, guess=guess)
            self.pressure = potential / stage
            previous = rate
            time += stage
        return flux

    def advance(
        self, flux: Float[Tensor, "batch 3 nx ny nz"], force: Force, time: float, duration: float
    ) -> Float[Tensor, "batch 3 nx ny nz"]:
        """The state `duration` [s] later, in equal steps within the stable limit, which is renewed every few steps."""
        end = time + duration
        while end - time > 1e-9 * duration:
            limit = self.stable_step(flux)
            steps = max(1, int(-(-(end - time) // limit)))
            dt = (end - time) / steps
            for _ in range(min(steps, 8)):
                flux = self.step(flux, force, time, dt)
                time += dt
        if not bool(torch.isfinite(flux).all()):
            raise FloatingPointError(
                f"Expected a finite flow, got NaN or infinity near t = {time:.4g} s; refine the grid or force less."
            )
        return flux


def _right_hand_side(
    u: Tensor,
    viscosity: Tensor,
    force: Tensor,
    open_faces: Tensor,
    open_edges: Tensor,
    drag: Tensor,
    spacing: tuple[float, float, float],
) -> Tensor:
    """−∇·(u u) + νΔu + f on the open faces, from stresses in cells (normal) and on edges (tangential).

    Every momentum flux is the product of two means of neighbours less ν times their difference. Edges that touch a wall
    or a solid have no viscous part; the friction there is `drag`. `open_edges` comes with a ghost layer on every side.
    """
    shape = u.shape[-3:]
    ghost = pad(u, (1,) * 6, mode="circular")
    viscosity, origin = viscosity[:, 0], (0, 0, 0)
    stress: dict[tuple[int, int], Tensor] = {}
    for c in range(3):
        a, b = (c + 1) % 3, (c + 2) % 3
        x, y, z = (0 if axis == c else 1 for axis in range(3))
        extra = (x, y, z)
        ua, ua_below = _window(ghost[:, a], origin, extra), _window(ghost[:, a], _unit(b, -1), extra)
        ub, ub_below = _window(ghost[:, b], origin, extra), _window(ghost[:, b], _unit(a, -1), extra)
        advection = 0.25 * (ua + ua_below) * (ub + ub_below)
        is_open = _window(open_edges[:, c], origin, extra)
        stress[a, b] = advection - is_open * (viscosity / spacing[b] * (ua - ua_below))
        stress[b, a] = advection - is_open * (viscosity / spacing[a] * (ub - ub_below))
    rates = []
    for a in range(3):
        low, high = _window(ghost[:, a], _unit(a, -1), _unit(a)), _window(ghost[:, a], origin, _unit(a))
        rate = -_difference(0.25 * (low + high) ** 2 - viscosity / spacing[a] * (high - low), a) / spacing[a]
        for b in range(3):
            if b != a:
                rate = rate - _difference(stress[a, b].narrow(a - 3, 0, shape[a]), b) / spacing[b]
        rates.append(rate)
    return (torch.stack(rates, dim=1) + force - viscosity[:, None] * drag * u) * open_faces


def _unit(axis: int, size: int = 1) -> tuple[int, int, int]:
    x, y, z = (size if a == axis else 0 for a in range(3))
    return x, y, z


def _window(ghost: Tensor, start: tuple[int, int, int], extra: tuple[int, int, int]) -> Tensor:
    """The cells from `start`, and `extra` more than the box has, of an array with a ghost cell on every side."""
    for dim in range(-3, 0):
        ghost = ghost.narrow(dim, 1 + start[dim], ghost.shape[dim] - 2 + extra[dim])
    return ghost


def _difference(stress: Tensor, axis: int) -> Tensor:
    dim, n = axis - 3, stress.shape[axis - 3] - 1
    return stress.narrow(dim, 1, n) - stress.narrow(dim, 0, n)


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
