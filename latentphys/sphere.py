"""Fields on a sphere in spherical harmonics: scalars, tangential flows, and the Helmholtz split of a flow.

    u = r̂ × ∇ψ + ∇χ        vorticity ζ = r̂·∇×u = ∇²ψ,   divergence δ = ∇·u = ∇²χ,   ∇² = −l(l+1)/a²

A scalar has the shape ``(…, nlat, nlon)``: colatitude θ from north to south, then longitude φ eastwards from 0. A flow
has the shape ``(…, 2, nlat, nlon)`` with the components (u_θ, u_φ), *southward* and eastward: the zonal wind is u_φ and
the meridional wind −u_θ. Coefficients have the shape ``(…, lmax, lmax)``, degree l before order m ≥ 0, of the
orthonormal harmonics with Condon–Shortley phase.

Every derivative is taken of coefficients, so "solenoidal" means here that the coefficients of ∇·u are zero to rounding.
Every tangential flow is the sum of its two parts: a sphere has no harmonic fields (b₁ = 0). A grid holds about twice as
many numbers as the degrees l < lmax that its quadrature tells apart; what lies beyond them is in neither part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Complex, Float
from torch import Tensor

Quadrature = Literal["legendre-gauss", "equiangular"]
QUADRATURES: tuple[Quadrature, ...] = ("legendre-gauss", "equiangular")
DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Sphere:
    """A sphere with a grid of ``nlat × nlon`` points.

    Args:
        nlat: number of colatitudes, ≥ 2.
        nlon: number of longitudes, ≥ 3. Good value: 2 nlat, below which longitude limits the degrees.
        radius: radius a [m], > 0. Default 1.
        quadrature: ``legendre-gauss`` (no points at the poles, lmax = nlat) or ``equiangular`` (points at the poles,
            lmax = (nlat + 1)/2). Default ``legendre-gauss``.

    Raises:
        ValueError: a size, radius or quadrature that no sphere can have.
    """

    nlat: int
    nlon: int
    radius: float = 1.0
    quadrature: Quadrature = "legendre-gauss"

    def __post_init__(self) -> None:
        if self.nlat < 2 or self.nlon < 3:
            raise ValueError(f"Expected nlat ≥ 2 and nlon ≥ 3, got {self.nlat} × {self.nlon}.")
        if not (math.isfinite(self.radius) and self.radius > 0):
            raise ValueError(f"Expected a positive, finite radius [m], got {self.radius}.")
        if self.quadrature not in QUADRATURES:
            raise ValueError(f"Expected a quadrature of {' | '.join(QUADRATURES)}, got {self.quadrature!r}.")

    @property
    def shape(self) -> tuple[int, int]:
        """(nlat, nlon)."""
        return self.nlat, self.nlon

    @property
    def lmax(self) -> int:
        """Number of degrees, l = 0 … lmax − 1: their products are integrated exactly, and m stays below Nyquist."""
        by_latitude = self.nlat if self.quadrature == "legendre-gauss" else (self.nlat + 1) // 2
        return min(by_latitude, (self.nlon + 1) // 2)

    @property
    def colatitudes(self) -> Float[Tensor, " nlat"]:
        """θ from north to south [rad], FP64."""
        return _latitudes(self)[0]

    @property
    def longitudes(self) -> Float[Tensor, " nlon"]:
        """φ eastwards from 0 [rad], FP64."""
        return torch.arange(self.nlon, dtype=torch.float64) * (2 * math.pi / self.nlon)

    @property
    def areas(self) -> Float[Tensor, "nlat 1"]:
        """Area that the quadrature gives each point [m²], FP64; they sum to 4πa²."""
        return (_latitudes(self)[1] * (2 * math.pi * self.radius**2 / self.nlon))[:, None]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description; `from_dict` reads it back."""
        size = {"nlat": self.nlat, "nlon": self.nlon}
        return {"kind": "sphere", **size, "radius": self.radius, "quadrature": self.quadrature}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sphere:
        """Read what `to_dict` wrote.

        Raises:
            ValueError: a missing entry or an impossible sphere.
        """
        try:
            return cls(int(data["nlat"]), int(data["nlon"]), float(data["radius"]), data["quadrature"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"Expected nlat, nlon, radius and quadrature of a sphere, got {dict(data)!r}.") from error


class HelmholtzSplit(NamedTuple):
    """What `decompose` returns: r̂ × ∇ψ and ∇χ [m/s]."""

    rotational: Float[Tensor, "*batch 2 nlat nlon"]
    divergent: Float[Tensor, "*batch 2 nlat nlon"]


def analyse(f: Float[Tensor, "*batch nlat nlon"], sphere: Sphere) -> Complex[Tensor, "*batch lmax lmax"]:
    """Coefficients f_lm = ∫ f Y*_lm dΩ, by quadrature."""
    _check(f, (sphere.nlat, sphere.nlon), "(…, nlat, nlon)")
    return _transforms(sphere, f.dtype, f.device).scalar(f)


def synthesise(coefficients: Complex[Tensor, "*batch lmax lmax"], sphere: Sphere) -> Float[Tensor, "*batch nlat nlon"]:
    """The field Σ f_lm Y_lm on the grid."""
    return _transforms(sphere, coefficients.real.dtype, coefficients.device).scalar_inverse(coefficients)


def analyse_flow(
    u: Float[Tensor, "*batch 2 nlat nlon"], sphere: Sphere
) -> tuple[Complex[Tensor, "*batch lmax lmax"], Complex[Tensor, "*batch lmax lmax"]]:
    """Coefficients of the stream function ψ and the velocity potential χ [m²/s] of a flow; 0 at l = 0."""
    _check(u, (2, sphere.nlat, sphere.nlon), "(…, 2, nlat, nlon)")
    spheroidal, toroidal = _transforms(sphere, u.dtype, u.device).vector(u).unbind(-3)
    return -sphere.radius * toroidal, sphere.radius * spheroidal


def synthesise_flow(
    psi: Complex[Tensor, "*batch lmax lmax"], chi: Complex[Tensor, "*batch lmax lmax"], sphere: Sphere
) -> Float[Tensor, "*batch 2 nlat nlon"]:
    """The flow r̂ × ∇ψ + ∇χ [m/s] on the grid, from coefficients [m²/s]."""
    both = torch.stack([chi, -psi], dim=-3) / sphere.radius
    return _transforms(sphere, psi.real.dtype, psi.device).vector_inverse(both)


def eigenvalues(sphere: Sphere, like: Tensor) -> Float[Tensor, "lmax 1"]:
    """l(l + 1), which −∇² on the unit sphere multiplies coefficients by."""
    l = torch.arange(sphere.lmax, dtype=like.real.dtype, device=like.device)  # noqa: E741
    return (l * (l + 1))[:, None]


def velocity(
    psi: Float[Tensor, "*batch nlat nlon"], chi: Float[Tensor, "*batch nlat nlon"] | None, sphere: Sphere
) -> Float[Tensor, "*batch 2 nlat nlon"]:
    """u = r̂ × ∇ψ + ∇χ [m/s]; without χ it is solenoidal.

    Args:
        psi: stream function ψ [m²/s]; degrees l ≥ lmax are dropped.
        chi: velocity potential χ [m²/s], or None.
        sphere: the sphere and its grid.
    """
    psi_lm = analyse(psi, sphere)
    return synthesise_flow(psi_lm, torch.zeros_like(psi_lm) if chi is None else analyse(chi, sphere), sphere)


def potentials(
    u: Float[Tensor, "*batch 2 nlat nlon"], sphere: Sphere
) -> tuple[Float[Tensor, "*batch nlat nlon"], Float[Tensor, "*batch nlat nlon"]]:
    """Stream function ψ and velocity potential χ [m²/s] of a flow [m/s], each with zero mean."""
    psi, chi = analyse_flow(u, sphere)
    return synthesise(psi, sphere), synthesise(chi, sphere)


def vorticity(u: Float[Tensor, "*batch 2 nlat nlon"], sphere: Sphere) -> Float[Tensor, "*batch nlat nlon"]:
    """ζ = r̂·∇×u [1/s]."""
    psi = analyse_flow(u, sphere)[0]
    return synthesise(-eigenvalues(sphere, psi) / sphere.radius**2 * psi, sphere)


def divergence(u: Float[Tensor, "*batch 2 nlat nlon"], sphere: Sphere) -> Float[Tensor, "*batch nlat nlon"]:
    """δ = ∇·u [1/s]."""
    chi = analyse_flow(u, sphere)[1]
    return synthesise(-eigenvalues(sphere, chi) / sphere.radius**2 * chi, sphere)


def decompose(u: Float[Tensor, "*batch 2 nlat nlon"], sphere: Sphere) -> HelmholtzSplit:
    """The rotational and the divergent part of a flow; orthogonal in `inner`, and together all of it below lmax."""
    psi, chi = analyse_flow(u, sphere)
    zero = torch.zeros_like(psi)
    return HelmholtzSplit(synthesise_flow(psi, zero, sphere), synthesise_flow(zero, chi, sphere))


def project(u: Float[Tensor, "*batch 2 nlat nlon"], sphere: Sphere) -> Float[Tensor, "*batch 2 nlat nlon"]:
    """The nearest solenoidal flow of degrees l < lmax, in the norm of `inner`; differentiable."""
    psi, _ = analyse_flow(u, sphere)
    return synthesise_flow(psi, torch.zeros_like(psi), sphere)


def inner(
    u: Float[Tensor, "*batch 2 nlat nlon"], v: Float[Tensor, "*batch 2 nlat nlon"], sphere: Sphere
) -> Float[Tensor, "*batch"]:
    """⟨u, v⟩ = ∫ u·v dA [m⁴/s²], by quadrature."""
    return (u * v * sphere.areas.to(u)).sum((-3, -2, -1))


class _Transforms(NamedTuple):
    scalar: Any
    scalar_inverse: Any
    vector: Any
    vector_inverse: Any


@lru_cache(maxsize=32)
def _transforms(sphere: Sphere, dtype: torch.dtype, device: torch.device) -> _Transforms:
    """The four transforms of the unit sphere, their tables computed in FP64 and then rounded."""
    th = _torch_harmonics()
    arguments = (sphere.nlat, sphere.nlon, sphere.lmax, sphere.lmax, sphere.quadrature)
    # Tables made while a caller is in inference mode could not be used in training afterwards.
    with torch.inference_mode(False):
        kinds = (th.RealSHT, th.InverseRealSHT, th.RealVectorSHT, th.InverseRealVectorSHT)
        transforms = _Transforms(*(kind(*arguments) for kind in kinds))
        _restore_precision(transforms, _latitudes(sphere)[1])
        return _Transforms(*(transform.to(device, dtype) for transform in transforms))


def _restore_precision(transforms: _Transforms, weights: Tensor) -> None:
    """Give the vector analysis its factor 1/(l(l + 1)) in FP64.

    torch-harmonics 0.9.3 computes it in the default dtype, and a vector round trip in FP64 is then only good to 1e-7.
    The weights follow from the synthesis table, which is in FP64, so nothing changes where they were right already.
    """
    table = transforms.vector_inverse.dpct.transpose(-1, -2)
    l = torch.arange(table.shape[-2], dtype=torch.float64)[:, None]  # noqa: E741
    factor = 2 * math.pi / (l * (l + 1)).clamp(min=1.0)
    exact = table * factor * weights * torch.tensor([1.0, -1.0], dtype=torch.float64).reshape(2, 1, 1, 1)
    given = transforms.vector.weights
    if given.shape != exact.shape or bool((given - exact).abs().amax() > 1e-5 * exact.abs().amax()):
        raise RuntimeError("Expected the tables of torch-harmonics 0.9, got others; install torch-harmonics==0.9.3.")
    transforms.vector.weights = exact.contiguous()


def _latitudes(sphere: Sphere) -> tuple[Tensor, Tensor]:
    """Colatitudes [rad] and their weights, which sum to 2."""
    return _torch_harmonics().quadrature.precompute_latitudes(sphere.nlat, grid=sphere.quadrature)


def _torch_harmonics() -> ModuleType:
    try:
        import torch_harmonics
    except ImportError as error:
        raise ImportError("Expected torch-harmonics, got none; run `pip install latentphys[sphere]`.") from error
    return torch_harmonics


def _check(x: Tensor, shape: tuple[int, ...], name: str) -> None:
    if tuple(x.shape[-len(shape) :]) != shape:
        raise ValueError(f"Expected a field of shape {name} = (…, {str(shape)[1:-1]}), got {tuple(x.shape)}.")
    if x.dtype not in DTYPES:
        raise ValueError(f"Expected a field in FP32 or FP64, got {x.dtype}; convert it first.")
