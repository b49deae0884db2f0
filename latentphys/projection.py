"""Orthogonal projection of a flux onto its solenoidal and harmonic parts, in empty boxes and round voxels.

With D = `operators.div`, G = `operators.grad`, the mask M of the free faces and the metric C = face area / cell size,

    P F = M F − C M G φ,        D C M G φ = D M F,

is orthogonal in the kinetic-energy inner product ⟨F, H⟩ = Σ F·H / C, keeps every net flow that no potential can carry,
and lets nothing through walls and solids. An empty box is solved directly (`separable`), voxels by conjugate
gradients with that solver or, where more than a few digits are wanted, with `multigrid` as preconditioner.

φ has no gradient across walls and prescribed inflows, and is zero on open sides, half a cell beyond the last cells,
where C doubles. What such a side lets through is part of the field even where it is not stored: its energy counts, and
the flux given is taken to close the balance of its last cells. A prescribed inflow is taken off before and put back
after, as one solenoidal flux that has it (`inflow_flux`): P above is linear, and its adjoint as cheap as itself.

Reference: Chorin, Math. Comp. 22 (1968).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from latentphys import operators
from latentphys.grid import Geometry
from latentphys.inflow import inflow_flux
from latentphys.pressure import (
    DEFAULT_TOLERANCE,
    LOOSE_TOLERANCE,
    face_conductance,
    free_faces,
    solve,
    subtract_gradient,
)


class Decomposition(NamedTuple):
    """What `decompose` returns: the flux without its gradient part, the potential φ of that part, and the effort."""

    solenoidal: Float[Tensor, "*batch 3 nx ny nz"]
    potential: Float[Tensor, "*batch nx ny nz"]
    num_iterations: int


def project(
    flux: Float[Tensor, "*batch 3 nx ny nz"], geometry: Geometry, tol: float | None = None, max_iterations: int = 1000
) -> Float[Tensor, "*batch 3 nx ny nz"]:
    """The nearest flux, in kinetic energy, whose net per cell is zero and which passes no wall or solid.

    Args:
        flux: any flux [m³/s], FP32 or FP64, on any device; the result has its dtype.
        geometry: the box, its solids and its inflow, batched or not.
        tol: largest ‖net flux‖₂ after against before, per sample. Default 1e-6 (FP32) or 1e-12 (FP64). Good values
            inside a training loss: 1e-2 … 1e-3. An empty box is solved directly whatever this says, in FP32 below 1e-3
            twice, the second time for what the first has left by rounding.
        max_iterations: bound on the conjugate-gradient iterations, ≥ 1.

    Returns:
        The projected flux; differentiable, also twice.

    Raises:
        ValueError: another shape than the grid's, another batch than the geometry's, a dtype other than FP32 and FP64,
            a tolerance outside 0…1, or a bound below 1.
        ConvergenceError: the tolerance was not reached.
    """
    _check(flux, geometry, tol, max_iterations)
    if not geometry.inflow:
        return _Project.apply(flux, geometry, tol, max_iterations, False)
    given = inflow_flux(geometry).to(flux)
    return _Project.apply(flux - given, geometry, tol, max_iterations, False) + given


class _Project(torch.autograd.Function):
    """P, or its adjoint Pᵀ = M (1 − G L⁻¹ D C M) with L = D C M G, each the other's derivative."""

    @staticmethod
    def forward(
        ctx: Any, flux: Tensor, geometry: Geometry, tol: float | None, max_iterations: int, adjoint: bool
    ) -> Tensor:
        ctx.arguments = geometry, tol, max_iterations, not adjoint
        if not adjoint:
            return _project(flux, geometry, tol, None, max_iterations, 0.0).solenoidal
        flux = torch.where(free_faces(geometry, flux.device), flux, 0.0)
        weighted = flux * face_conductance(geometry, flux)
        net = operators.stored_div(weighted, geometry.grid)
        potential = solve(net, weighted, geometry, tol=tol, max_iterations=max_iterations)[0]
        gradient = operators.grad(_close(potential, geometry), geometry.grid)
        return flux - torch.where(free_faces(geometry, flux.device), gradient, 0.0)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        return _Project.apply(grad_output, *ctx.arguments), None, None, None, None


@torch.no_grad()
def decompose(
    flux: Float[Tensor, "*batch 3 nx ny nz"],
    geometry: Geometry,
    tol: float | None = None,
    guess: Float[Tensor, "*batch nx ny nz"] | None = None,
    max_iterations: int = 1000,
    floor: float = 0.0,
) -> Decomposition:
    """`project`, with the potential φ of what it removed [m²/s]; not differentiable.

    Args:
        floor: a net flux small enough whatever `tol` says, ‖net flux‖₂ relative to ‖flux‖₂.
        guess: a potential to start from, such as the one before it in a time loop. Used only where there are solids.
    """
    _check(flux, geometry, tol, max_iterations)
    if not geometry.inflow:
        return _project(flux, geometry, tol, guess, max_iterations, floor)
    given = inflow_flux(geometry).to(flux)
    done = _project(flux - given, geometry, tol, guess, max_iterations, floor)
    return done._replace(solenoidal=done.solenoidal + given)


def _check(flux: Tensor, geometry: Geometry, tol: float | None, max_iterations: int) -> None:
    if flux.dtype not in DEFAULT_TOLERANCE:
        raise ValueError(f"Expected a flux in FP32 or FP64, got {flux.dtype}; convert it first.")
    operators.check_shape(flux, geometry.grid, components=True)
    geometry.check_batch(flux)
    if tol is not None and not 0 <= tol < 1:
        raise ValueError(f"Expected a tolerance from 0 to below 1, got {tol}.")
    if max_iterations < 1:
        raise ValueError(f"Expected at least 1 iteration at most, got {max_iterations}.")


def _project(
    flux: Tensor, geometry: Geometry, tol: float | None, guess: Tensor | None, max_iterations: int, floor: float
) -> Decomposition:
    tol = DEFAULT_TOLERANCE[flux.dtype] if tol is None else tol
    limits: dict[str, Any] = {"tol": tol, "floor": floor, "max_iterations": max_iterations}
    given = torch.where(free_faces(geometry, flux.device), flux, 0.0)
    net = _close(operators.stored_div(given, geometry.grid), geometry)
    potential, iterations = solve(net, given, geometry, guess=guess, **limits)
    twice = flux.dtype == torch.float32 and tol < LOOSE_TOLERANCE
    solenoidal = given.clone() if twice else given
    subtract_gradient(solenoidal, potential, geometry)
    if twice:
        # φ spans the box: its differences lack the digits that its size takes. What they leave is solved for once more.
        left = _close(operators.stored_div(solenoidal, geometry.grid), geometry)
        more, further = solve(left, given, geometry, against=net, **limits)
        subtract_gradient(solenoidal, more, geometry)
        potential, iterations = potential + more, iterations + further
    return Decomposition(solenoidal, potential, iterations)


def _close(net: Tensor, geometry: Geometry) -> Tensor:
    """The net, in place, with what the unstored faces of open high sides make of it: nothing in the last cells."""
    return operators.zero_last_cells(net, [high == "open" for _, high in geometry.ends])
