"""Solenoidal fields in a spherical shell: toroidal and poloidal potentials, and the operators they are exact in.

    u = ∇×(T r̂) + ∇×∇×(S r̂),        T [m²/s], S [m³/s]

Any vector field has on every sphere of radius r a radial part and the stream function and potential of its tangential
part, u = u_r r̂ + (1/r)(r̂ × ∇₁ψ + ∇₁χ), with ∇₁ on the unit sphere and ∇₁² = −l(l+1). In these coefficients, with
L = l(l+1) and one matrix D for ∂/∂r,

    u of (T, S):   u_r = L S/r²,                           ψ = −T,            χ = D S
    ∇φ:            u_r = D φ,                              ψ = 0,             χ = φ
    ∇×u:           u_r = −L ψ/r²,                          ψ = D χ − u_r,     χ = −D ψ
    ∇·u:           (1/r²) (D r² u_r − L χ)

so that ∇·u of (T, S) is (L D S − L D S)/r² = 0 for *any* matrix D: it is the rounding of two equal numbers. In the same
way ∇·∇×u = 0 and ∇×∇φ = 0. And back: S = r² u_r/L, T = r² r̂·∇×u/L = −ψ.

Scalars have the shape ``(…, nr, nlat, nlon)`` with radius outwards, vectors ``(…, 3, nr, nlat, nlon)`` with components
(u_r, u_θ, u_φ); the grid on each sphere is that of `latentphys.sphere`. L vanishes at l = 0: no net flux passes any
sphere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Complex, Float
from torch import Tensor

from latentphys.radial import SCHEMES, Scheme, differentiation, gauss_lobatto, null_space, quadrature_weights
from latentphys.sphere import Quadrature, Sphere, analyse, analyse_flow, eigenvalues, synthesise, synthesise_flow

Wall = Literal["open", "impermeable", "no_slip", "free_slip"]
WALLS: tuple[Wall, ...] = ("open", "impermeable", "no_slip", "free_slip")


@dataclass(frozen=True)
class Shell:
    """A spherical shell with a grid of ``nr × nlat × nlon`` points.

    Args:
        nlat: number of colatitudes, ≥ 2.
        nlon: number of longitudes, ≥ 3. Good value: 2 nlat.
        radii: radius of each level [m], increasing, ≥ 5 of them, the first and last on the boundaries. `gauss_lobatto`
            gives those of the scheme ``chebyshev``.
        walls: what the inner and the outer boundary impose on the fields made here: ``open`` nothing; ``impermeable``
            u_r = 0; ``no_slip`` u = 0; ``free_slip`` u_r = 0 and no shear stress, ∂(u_θ/r)/∂r = ∂(u_φ/r)/∂r = 0.
        scheme: ``chebyshev``, the derivative of the polynomial through all levels, or ``finite_difference``, that of
            the parabola through three neighbours (second order, also on unequal radii). Default ``chebyshev``.
        quadrature: the grid on each sphere, as for `Sphere`.

    Raises:
        ValueError: radii, walls or a scheme that no shell can have.
    """

    nlat: int
    nlon: int
    radii: tuple[float, ...]
    walls: tuple[Wall, Wall] = ("open", "open")
    scheme: Scheme = "chebyshev"
    quadrature: Quadrature = "legendre-gauss"

    def __post_init__(self) -> None:
        radii = tuple(float(r) for r in self.radii)
        object.__setattr__(self, "radii", radii)
        object.__setattr__(self, "walls", tuple(self.walls))
        if len(radii) < 5:
            raise ValueError(f"Expected at least 5 radii, got {len(radii)}.")
        if not (radii[0] > 0 and math.isfinite(radii[-1]) and bool(np.all(np.diff(radii) > 0))):
            raise ValueError(f"Expected positive, finite radii [m] that increase, got {radii}.")
        if len(self.walls) != 2 or any(wall not in WALLS for wall in self.walls):
            raise ValueError(f"Expected an inner and an outer wall of {' | '.join(WALLS)}, got {self.walls}.")
        if self.scheme not in SCHEMES:
            raise ValueError(f"Expected a scheme of {' | '.join(SCHEMES)}, got {self.scheme!r}.")
        if self.scheme == "chebyshev":
            nodes = gauss_lobatto(radii[0], radii[-1], len(radii))
            if not np.allclose(nodes, radii, rtol=0, atol=1e-9 * (radii[-1] - radii[0])):
                raise ValueError(
                    "Expected Gauss–Lobatto radii for the scheme 'chebyshev', got others; take them from "
                    "`gauss_lobatto`, or use the scheme 'finite_difference'."
                )
        _ = self.sphere

    @property
    def sphere(self) -> Sphere:
        """The unit sphere with the grid of every level."""
        return Sphere(self.nlat, self.nlon, 1.0, self.quadrature)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(nr, nlat, nlon)."""
        return len(self.radii), self.nlat, self.nlon


class Coefficients(NamedTuple):
    """A vector field on every level: u = u_r r̂ + (1/r)(r̂ × ∇₁ψ + ∇₁χ); u_r [m/s], ψ and χ [m²/s]."""

    radial: Complex[Tensor, "*batch nr lmax lmax"]
    psi: Complex[Tensor, "*batch nr lmax lmax"]
    chi: Complex[Tensor, "*batch nr lmax lmax"]


def to_coefficients(u: Float[Tensor, "*batch 3 nr nlat nlon"], shell: Shell) -> Coefficients:
    """Harmonic coefficients of a vector field [m/s] on every level."""
    _check(u, shell, components=True)
    tangential = u[..., 1:, :, :, :].transpose(-4, -3) * _radial(shell, u).radius[..., None]
    return Coefficients(analyse(u[..., 0, :, :, :], shell.sphere), *analyse_flow(tangential, shell.sphere))


def from_coefficients(coefficients: Coefficients, shell: Shell) -> Float[Tensor, "*batch 3 nr nlat nlon"]:
    """The vector field [m/s] on the grid."""
    radial = synthesise(coefficients.radial, shell.sphere)
    tangential = synthesise_flow(coefficients.psi, coefficients.chi, shell.sphere)
    tangential = (tangential / _radial(shell, radial).radius[..., None]).transpose(-4, -3)
    return torch.cat([radial.unsqueeze(-4), tangential], dim=-4)


def solenoidal(
    toroidal: Complex[Tensor, "*batch nr lmax lmax"], poloidal: Complex[Tensor, "*batch nr lmax lmax"], shell: Shell
) -> Coefficients:
    """The field of (T, S), from and to coefficients; T [m²/s] and S [m³/s] are first made to obey the walls.

    They change by the least in ∫|T|² dr and ∫|S|² dr; what obeys the walls is not changed.
    """
    table = _radial(shell, toroidal)
    toroidal, poloidal = _along(table.obey_tangential, toroidal), _along(table.obey_poloidal, poloidal)
    radial = eigenvalues(shell.sphere, poloidal) / table.radius**2 * poloidal
    return Coefficients(radial, -toroidal, _along(table.poloidal_to_chi, poloidal))


def velocity(
    toroidal: Float[Tensor, "*batch nr nlat nlon"], poloidal: Float[Tensor, "*batch nr nlat nlon"], shell: Shell
) -> Float[Tensor, "*batch 3 nr nlat nlon"]:
    """u = ∇×(T r̂) + ∇×∇×(S r̂) [m/s]: solenoidal, and obeying the walls.

    Args:
        toroidal: T [m²/s]; degrees l ≥ lmax are dropped.
        poloidal: S [m³/s]; likewise.
        shell: the shell, its grid and its walls.
    """
    t, s = (analyse(_check(x, shell), shell.sphere) for x in (toroidal, poloidal))
    return from_coefficients(solenoidal(t, s, shell), shell)


def potentials(
    u: Float[Tensor, "*batch 3 nr nlat nlon"], shell: Shell
) -> tuple[Float[Tensor, "*batch nr nlat nlon"], Float[Tensor, "*batch nr nlat nlon"]]:
    """T = r² r̂·∇×u/L [m²/s] and S = r² u_r/L [m³/s] of a solenoidal field, each with zero mean on every sphere."""
    radial, psi, _ = to_coefficients(u, shell)
    factor = _radial(shell, u).radius ** 2 / eigenvalues(shell.sphere, u).clamp(min=1.0)
    factor = factor * (eigenvalues(shell.sphere, u) > 0)
    return synthesise(-psi, shell.sphere), synthesise(factor * radial, shell.sphere)


def divergence(u: Float[Tensor, "*batch 3 nr nlat nlon"], shell: Shell) -> Float[Tensor, "*batch nr nlat nlon"]:
    """∇·u = (1/r²)(D r² u_r + ∇₁²χ) [1/s]; the radial part is taken point by point, of all that u_r holds."""
    chi = to_coefficients(u, shell).chi
    table = _radial(shell, u)
    radial = _along(table.derivative, table.radius**2 * u[..., 0, :, :, :])
    return (radial - synthesise(eigenvalues(shell.sphere, chi) * chi, shell.sphere)) / table.radius**2


def curl(u: Float[Tensor, "*batch 3 nr nlat nlon"], shell: Shell) -> Float[Tensor, "*batch 3 nr nlat nlon"]:
    """∇×u [1/s]; its `divergence` is zero to rounding."""
    radial, psi, chi = to_coefficients(u, shell)
    table = _radial(shell, u)
    vortical = Coefficients(
        -eigenvalues(shell.sphere, psi) / table.radius**2 * psi,
        _along(table.derivative, chi) - radial,
        -_along(table.derivative, psi),
    )
    return from_coefficients(vortical, shell)


def gradient(scalar: Float[Tensor, "*batch nr nlat nlon"], shell: Shell) -> Float[Tensor, "*batch 3 nr nlat nlon"]:
    """∇φ; its `curl` is zero to rounding."""
    phi = analyse(_check(scalar, shell), shell.sphere)
    derivative = _along(_radial(shell, scalar).derivative, phi)
    return from_coefficients(Coefficients(derivative, torch.zeros_like(phi), phi), shell)


def project(u: Float[Tensor, "*batch 3 nr nlat nlon"], shell: Shell) -> Float[Tensor, "*batch 3 nr nlat nlon"]:
    """The nearest field of some (T, S) that obeys the walls, in the norm of `inner`; differentiable.

    T = −ψ, made to obey the walls, and S solves, degree by degree, (L w/r² + Dᵀ w D) S = w u_r + Dᵀ w χ, the normal
    equations of min Σ_k w_k r_k² |u − u(S)|² with the weights w of `inner`.
    """
    radial, psi, chi = to_coefficients(u, shell)
    matrices = _projector(shell, u.dtype, u.device).to(chi.dtype)
    poloidal = torch.einsum("lij,...jlm->...ilm", matrices, torch.cat([radial, chi], dim=-3))
    return from_coefficients(solenoidal(-psi, poloidal, shell), shell)


def admit(u: Float[Tensor, "*batch 3 nr nlat nlon"], shell: Shell) -> Float[Tensor, "*batch 3 nr nlat nlon"]:
    """The nearest field of degrees l < lmax that obeys the walls, solenoidal or not, in the norm of `inner`."""
    radial, psi, chi = to_coefficients(u, shell)
    table = _radial(shell, u)
    closed = [k for k, wall in _walls(shell) if wall != "open"]
    within = torch.ones_like(table.radius).index_fill(0, torch.tensor(closed, device=u.device, dtype=torch.long), 0.0)
    admitted = (_along(table.obey_tangential, x) for x in (psi, chi))
    return from_coefficients(Coefficients(within * radial, *admitted), shell)


def inner(
    u: Float[Tensor, "*batch 3 nr nlat nlon"], v: Float[Tensor, "*batch 3 nr nlat nlon"], shell: Shell
) -> Float[Tensor, "*batch"]:
    """⟨u, v⟩ = ∫ u·v dV [m⁵/s²], by quadrature on the grid: Clenshaw–Curtis or trapezoidal along r."""
    table = _radial(shell, u)
    volumes = table.weights[:, None, None] * table.radius**2 * shell.sphere.areas.to(u)
    return (u * v * volumes).sum((-4, -3, -2, -1))


def net_flux(u: Float[Tensor, "*batch 3 nr nlat nlon"], shell: Shell) -> Float[Tensor, "*batch nr"]:
    """Flux ∮ u_r dA out through the sphere of each level [m³/s]."""
    area = _radial(shell, u).radius ** 2 * shell.sphere.areas.to(u)
    return (_check(u, shell, components=True)[..., 0, :, :, :] * area).sum((-2, -1))


class _Radial(NamedTuple):
    """Tables along the radius; `obey_tangential` acts on T, ψ and χ, `obey_poloidal` on S."""

    radius: Tensor  # (nr, 1, 1)
    weights: Tensor  # (nr,)
    derivative: Tensor  # (nr, nr), and so the rest
    obey_tangential: Tensor
    obey_poloidal: Tensor
    poloidal_to_chi: Tensor


def _radial(shell: Shell, like: Tensor) -> _Radial:
    return _radial_tables(shell, like.real.dtype, like.device)


@lru_cache(maxsize=32)
def _radial_tables(shell: Shell, dtype: torch.dtype, device: torch.device) -> _Radial:
    radii, derivative, weights = _levels(shell)
    obey = [basis @ basis.T * weights for basis in _bases(shell)]
    to_chi = derivative.copy()
    for k, wall in _walls(shell):
        if wall == "no_slip":
            to_chi[k] = 0.0  # there it would be the rounding of zero
    # Tensors made while a caller is in inference mode could not be used in training afterwards.
    with torch.inference_mode(False):
        tables = (radii[:, None, None], weights, derivative, *obey, to_chi)
        return _Radial(*(torch.tensor(table, dtype=dtype, device=device) for table in tables))


@lru_cache(maxsize=32)
def _projector(shell: Shell, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "lmax nr 2*nr"]:
    """Per degree, the matrix that takes u_r and χ, one after the other, to the S of `project`; zero at l = 0."""
    radii, derivative, weights = _levels(shell)
    basis = _bases(shell)[1]
    matrices = np.zeros((shell.sphere.lmax, len(radii), 2 * len(radii)))
    for degree in range(1, shell.sphere.lmax):
        normal = degree * (degree + 1) * np.diag(weights / radii**2) + derivative.T @ (weights[:, None] * derivative)
        inverse = basis @ np.linalg.solve(basis.T @ normal @ basis, basis.T)
        matrices[degree] = inverse @ np.hstack([np.diag(weights), derivative.T * weights])
    return torch.tensor(matrices, dtype=dtype, device=device)


def _levels(shell: Shell) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Radii [m], the matrix D of d/dr [1/m], and the weights of ∫ dr [m]."""
    radii = np.array(shell.radii)
    return radii, differentiation(radii, shell.scheme), quadrature_weights(radii, shell.scheme)


def _walls(shell: Shell) -> tuple[tuple[int, Wall], tuple[int, Wall]]:
    return (0, shell.walls[0]), (len(shell.radii) - 1, shell.walls[1])


def _bases(shell: Shell) -> tuple[np.ndarray, np.ndarray]:
    """Columns that span the T, and the S, that obey the walls; orthonormal in ∫ dr."""
    radii, derivative, weights = _levels(shell)
    identity = np.eye(len(radii))
    tangential, poloidal = [], []
    for k, wall in _walls(shell):
        if wall == "no_slip":
            tangential.append(identity[k])
        elif wall == "free_slip":
            tangential.append(derivative[k] / radii**2)  # ∂(χ/r²)/∂r, by the same D
        if wall != "open":
            poloidal.append(identity[k])
    poloidal += [row @ derivative for row in tangential]
    return null_space(tangential, weights), null_space(poloidal, weights)


def _along(matrix: Tensor, x: Tensor) -> Tensor:
    """A matrix applied along the levels of ``(…, nr, a, b)``."""
    return torch.einsum("ij,...jab->...iab", matrix.to(x.dtype), x)


def _check(x: Tensor, shell: Shell, components: bool = False) -> Tensor:
    shape = (3, *shell.shape) if components else shell.shape
    if tuple(x.shape[-len(shape) :]) != shape:
        name = "(…, 3, nr, nlat, nlon)" if components else "(…, nr, nlat, nlon)"
        raise ValueError(f"Expected a field of shape {name} = (…, {str(shape)[1:-1]}), got {tuple(x.shape)}.")
    return x
