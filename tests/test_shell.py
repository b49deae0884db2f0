"""Flows on spheres and in shells: closed forms, the operators they are solenoidal in, the splits, walls and heads."""

import math
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import spherical_jn
from torch import Tensor
from torch.autograd import gradcheck

from latentphys import shell as shells
from latentphys import sphere as spheres
from latentphys.autoencoders.spherical import ShellHead, SphereHead
from latentphys.radial import Scheme, differentiation, gauss_lobatto, quadrature_weights
from latentphys.shell import Coefficients, Shell, Wall
from latentphys.sphere import Quadrature, Sphere

QUADRATURES: tuple[Quadrature, ...] = ("legendre-gauss", "equiangular")
SCHEMES: tuple[Scheme, ...] = ("chebyshev", "finite_difference")
WALLS: tuple[tuple[Wall, Wall], ...] = (
    ("open", "open"),
    ("impermeable", "open"),
    ("no_slip", "no_slip"),
    ("free_slip", "no_slip"),
    ("free_slip", "free_slip"),
)
DTYPES = (torch.float32, torch.float64)
ROUNDING = {torch.float32: 2e-6, torch.float64: 1e-14}
RADIUS = 2.5
INNER, OUTER = 0.7, 2.0


def largest(x: Tensor) -> float:
    return float(x.abs().amax())


def ball(nlat: int = 12, quadrature: Quadrature = "legendre-gauss") -> Sphere:
    return Sphere(nlat, 2 * nlat, RADIUS, quadrature)


def shell_of(
    num_levels: int = 9, walls: tuple[Wall, Wall] = ("open", "open"), scheme: Scheme = "chebyshev", nlat: int = 8
) -> Shell:
    """A shell whose finite-difference levels are unequal as well."""
    radii = gauss_lobatto(INNER, OUTER, num_levels)
    if scheme == "finite_difference":
        t = np.linspace(0, 1, num_levels)
        radii = tuple(INNER + (OUTER - INNER) * (t + 0.12 * np.sin(2 * math.pi * t) * t))
    return Shell(nlat, 2 * nlat, radii, walls, scheme)


def angles(sphere: Sphere) -> tuple[Tensor, Tensor]:
    return sphere.colatitudes[:, None], sphere.longitudes[None, :]


def levels(shell: Shell) -> Tensor:
    return torch.tensor(shell.radii, dtype=torch.float64)[:, None, None]


def relative_divergence(u: Tensor, grid: Sphere | Shell) -> float:
    """max|∇·u| against what differentiating the largest velocity on the finest scale of the grid would give."""
    if isinstance(grid, Sphere):
        return largest(spheres.divergence(u, grid)) / (largest(u) * grid.lmax / grid.radius)
    steepest = np.abs(differentiation(np.array(grid.radii), grid.scheme)).sum(1).max()
    return largest(shells.divergence(u, grid)) / (largest(u) * (grid.sphere.lmax / grid.radii[0] + steepest))


# --- the sphere ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quadrature", QUADRATURES)
def test_flow_of_a_tesseral_harmonic(quadrature: Quadrature) -> None:
    """f = sin²θ cosθ cos 2φ has degree 3; r̂ × ∇f and ∇f from its derivatives."""
    sphere = ball(16, quadrature)
    theta, phi = angles(sphere)
    f = theta.sin() ** 2 * theta.cos() * (2 * phi).cos()
    by_theta = (2 * theta.sin() * theta.cos() ** 2 - theta.sin() ** 3) * (2 * phi).cos() / RADIUS
    by_phi = -2 * theta.sin() * theta.cos() * (2 * phi).sin() / RADIUS
    rotational, divergent = torch.stack([-by_phi, by_theta]), torch.stack([by_theta, by_phi])
    close: dict[str, Any] = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(spheres.velocity(f, None, sphere), rotational, **close)
    torch.testing.assert_close(spheres.velocity(0 * f, f, sphere), divergent, **close)
    torch.testing.assert_close(spheres.vorticity(rotational, sphere), -12 * f / RADIUS**2, **close)
    torch.testing.assert_close(spheres.divergence(divergent, sphere), -12 * f / RADIUS**2, **close)
    assert largest(spheres.vorticity(divergent, sphere)) < 1e-12


def test_rigid_rotation_is_zonal_and_eastward() -> None:
    sphere = ball()
    theta, phi = angles(sphere)
    u = spheres.velocity(-3.0 * RADIUS**2 * theta.cos() + 0 * phi, None, sphere)
    expected = torch.stack([0 * theta + 0 * phi, 3.0 * RADIUS * theta.sin() + 0 * phi])
    torch.testing.assert_close(u, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(spheres.vorticity(u, sphere), 6.0 * theta.cos() + 0 * phi, rtol=0, atol=1e-11)
    assert float(spheres.inner(u, u, sphere)) == pytest.approx(8 * math.pi / 3 * 9 * RADIUS**4, rel=1e-13)


def random_flow(sphere: Sphere, dtype: torch.dtype = torch.float64) -> Tensor:
    """A flow of degrees below lmax with both parts."""
    psi, chi = (torch.randn(2, sphere.nlat, sphere.nlon, dtype=dtype) for _ in range(2))
    return spheres.velocity(psi, chi, sphere)


def vector_round_trip(transform: Any, inverse: Any, lmax: int) -> float:
    """Error of coefficients → flow → coefficients, relative to the largest coefficient."""
    coefficients = torch.randn(2, lmax, lmax, dtype=torch.complex128).tril()
    coefficients[..., 0, :] = 0.0
    coefficients[..., :, 0] = coefficients[..., :, 0].real.to(torch.complex128)
    return largest(transform(inverse(coefficients)) - coefficients) / largest(coefficients)


def test_vector_transforms_are_precise_in_fp64() -> None:
    transforms = spheres._transforms(Sphere(64, 128), torch.float64, torch.device("cpu"))
    assert vector_round_trip(transforms.vector, transforms.vector_inverse, 64) < 2e-12


@pytest.mark.xfail(strict=True, reason="torch-harmonics computes 1/(l(l+1)) in FP32; drop _restore_precision if not")
def test_torch_harmonics_is_precise_by_itself() -> None:
    import torch_harmonics as th

    arguments = (64, 128, 64, 64, "legendre-gauss")
    assert vector_round_trip(th.RealVectorSHT(*arguments), th.InverseRealVectorSHT(*arguments), 64) < 2e-12


def test_restoring_the_precision_changes_nothing_that_is_precise() -> None:
    """With FP64 as the default dtype torch-harmonics makes precise tables, as it might always do one day."""
    import torch_harmonics as th

    torch.set_default_dtype(torch.float64)
    try:
        precise = th.RealVectorSHT(16, 32, grid="legendre-gauss").weights
    finally:
        torch.set_default_dtype(torch.float32)
    restored = spheres._transforms(Sphere(16, 32), torch.float64, torch.device("cpu")).vector.weights
    torch.testing.assert_close(restored, precise, rtol=1e-14, atol=1e-16)


def test_other_tables_of_torch_harmonics_are_refused() -> None:
    transforms = spheres._transforms.__wrapped__(Sphere(6, 12), torch.float64, torch.device("cpu"))
    transforms.vector.weights = 2 * transforms.vector.weights
    with pytest.raises(RuntimeError, match="Expected the tables of torch-harmonics 0.9, got others; install"):
        spheres._restore_precision(transforms, spheres._latitudes(Sphere(6, 12))[1])


@pytest.mark.parametrize("quadrature", QUADRATURES)
def test_helmholtz_split(quadrature: Quadrature) -> None:
    sphere = ball(13, quadrature)
    u = random_flow(sphere)
    rotational, divergent = spheres.decompose(u, sphere)
    torch.testing.assert_close(rotational + divergent, u, rtol=0, atol=1e-12 * largest(u))
    sizes = spheres.inner(u, u, sphere)
    assert largest(spheres.inner(rotational, divergent, sphere) / sizes) < 1e-14
    assert relative_divergence(rotational, sphere) < 1e-14
    assert largest(spheres.vorticity(divergent, sphere)) < 1e-12 * largest(u)
    psi, chi = spheres.potentials(u, sphere)
    torch.testing.assert_close(spheres.velocity(psi, None, sphere), rotational, rtol=0, atol=1e-12 * largest(u))
    torch.testing.assert_close(spheres.velocity(0 * chi, chi, sphere), divergent, rtol=0, atol=1e-12 * largest(u))


@pytest.mark.parametrize("quadrature", QUADRATURES)
def test_a_sphere_has_no_harmonic_flow(quadrature: Quadrature) -> None:
    """The ranks of the two parts add up to that of all flows below lmax: b₁ = 0 is left over."""
    sphere = Sphere(5, 10, RADIUS, quadrature)
    basis = torch.eye(100, dtype=torch.float64).reshape(100, 2, 5, 10)
    rotational, divergent = spheres.decompose(basis, sphere)
    everything = spheres.synthesise_flow(*spheres.analyse_flow(basis, sphere), sphere)
    ranks = [int(torch.linalg.matrix_rank(part.reshape(100, 100))) for part in (rotational, divergent, everything)]
    single = sphere.lmax**2 - 1
    assert ranks == [single, single, 2 * single]


@pytest.mark.parametrize("sphere", [ball(), ball(12, "equiangular"), Sphere(8, 14), Sphere(8, 9), Sphere(9, 6)])
def test_sphere_projection_is_orthogonal(sphere: Sphere) -> None:
    """Also on grids with too few longitudes for their latitudes, odd and even."""
    u, v = torch.randn(2, 3, 2, sphere.nlat, sphere.nlon, dtype=torch.float64)
    once, other = spheres.project(u, sphere), spheres.project(v, sphere)
    assert largest(once) > 0.5
    torch.testing.assert_close(spheres.project(once, sphere), once, rtol=0, atol=1e-13)
    size = (spheres.inner(u, u, sphere) * spheres.inner(v, v, sphere)).sqrt()
    assert largest((spheres.inner(once, v, sphere) - spheres.inner(u, other, sphere)) / size) < 1e-14
    assert largest(spheres.inner(u - once, other, sphere) / size) < 1e-14


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quadrature", QUADRATURES)
def test_projected_noise_is_solenoidal(quadrature: Quadrature, dtype: torch.dtype) -> None:
    sphere = ball(16, quadrature)
    u = spheres.project(torch.randn(2, 3, 2, 16, 32, dtype=dtype), sphere)
    assert u.dtype == dtype and largest(u) > 0.5
    assert relative_divergence(u, sphere) < ROUNDING[dtype]


@pytest.mark.parametrize("quadrature", QUADRATURES)
def test_areas_cover_the_sphere(quadrature: Quadrature) -> None:
    sphere = ball(9, quadrature)
    assert float(sphere.areas.sum()) * sphere.nlon == pytest.approx(4 * math.pi * RADIUS**2, rel=1e-14)
    ends = (0.0, math.pi) if quadrature == "equiangular" else (None, None)
    assert (float(sphere.colatitudes[0]) == ends[0]) == (quadrature == "equiangular")
    assert float(sphere.colatitudes[0]) < float(sphere.colatitudes[-1])


def test_tables_made_in_inference_mode_serve_training() -> None:
    sphere, shell = Sphere(4, 8, 1.75), Shell(4, 8, gauss_lobatto(1.0, 1.75, 5))
    u, v = torch.randn(2, 4, 8), torch.randn(3, 5, 4, 8)
    with torch.inference_mode():
        spheres.project(u, sphere)
        shells.project(v, shell)
    u.requires_grad_()
    v.requires_grad_()
    (spheres.project(u, sphere).square().sum() + shells.project(v, shell).square().sum()).backward()
    assert u.grad is not None and largest(u.grad) > 0.1
    assert v.grad is not None and largest(v.grad) > 0.1


def test_everything_imports_without_torch_harmonics() -> None:
    statement = (
        "import sys; sys.modules['torch_harmonics'] = None\n"
        "import latentphys.shell, latentphys.autoencoders.spherical\n"
        "from latentphys.sphere import Sphere\n"
        "try: Sphere(4, 8).areas\n"
        "except ImportError as error: print(error)"
    )
    printed = subprocess.run([sys.executable, "-c", statement], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "Expected torch-harmonics, got none; run `pip install latentphys[sphere]`."


# --- the shell: closed forms --------------------------------------------------------------------------------------


def cartesian(ux: Tensor, uy: Tensor, uz: Tensor, shell: Shell) -> Tensor:
    """Components along r̂, θ̂, φ̂ of a vector field given along x, y, z."""
    theta, phi = angles(shell.sphere)
    radial = theta.sin() * (phi.cos() * ux + phi.sin() * uy) + theta.cos() * uz
    southward = theta.cos() * (phi.cos() * ux + phi.sin() * uy) - theta.sin() * uz
    return torch.stack([radial, southward, phi.cos() * uy - phi.sin() * ux])


def position(shell: Shell) -> tuple[Tensor, Tensor, Tensor]:
    theta, phi = angles(shell.sphere)
    r = levels(shell)
    return r * theta.sin() * phi.cos(), r * theta.sin() * phi.sin(), r * theta.cos() + 0 * phi


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rigid_rotation_about_an_oblique_axis(scheme: Scheme) -> None:
    """u = Ω × x has T = r Ω·x, no S, and ∇×u = 2Ω; both schemes differentiate r² exactly."""
    shell = shell_of(scheme=scheme)
    x, y, z = position(shell)
    wx, wy, wz = 0.3, -1.1, 0.7
    toroidal = levels(shell) * (wx * x + wy * y + wz * z)
    u = shells.velocity(toroidal, 0 * toroidal, shell)
    expected = cartesian(wy * z - wz * y, wz * x - wx * z, wx * y - wy * x, shell)
    torch.testing.assert_close(u, expected, rtol=0, atol=1e-13)
    spin = cartesian(2 * wx + 0 * x, 2 * wy + 0 * x, 2 * wz + 0 * x, shell)
    torch.testing.assert_close(shells.curl(u, shell), spin, rtol=0, atol=1e-11)
    exact = 8 * math.pi / 15 * (wx**2 + wy**2 + wz**2) * (OUTER**5 - INNER**5)
    if scheme == "chebyshev":
        assert float(shells.inner(u, u, shell)) == pytest.approx(exact, rel=1e-13)


def test_finite_differences_are_centred() -> None:
    stencil = differentiation(np.array([1.0, 1.5, 2.0, 2.5, 3.0]), "finite_difference")
    expected = [[-3, 4, -1, 0, 0], [-1, 0, 1, 0, 0], [0, -1, 0, 1, 0], [0, 0, -1, 0, 1], [0, 0, 1, -4, 3]]
    np.testing.assert_allclose(stencil, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_radial_weights_integrate(scheme: Scheme) -> None:
    """A straight line exactly by the trapezoidal rule, degree 8 by Clenshaw–Curtis on 9 levels."""
    radii = np.array(shell_of(9, scheme=scheme).radii)
    weights, degree = quadrature_weights(radii, scheme), 8 if scheme == "chebyshev" else 1
    assert weights.min() > 0
    exact = (OUTER ** (degree + 1) - INNER ** (degree + 1)) / (degree + 1)
    assert float(weights @ radii**degree) == pytest.approx(exact, rel=1e-13)


def dipole_error(num_levels: int, scheme: Scheme) -> float:
    """B = (2 cosθ, sinθ, 0)/r³ from S = cosθ/r."""
    shell = shell_of(num_levels, scheme=scheme, nlat=3)
    theta, phi = angles(shell.sphere)
    r = levels(shell)
    expected = torch.stack([2 * theta.cos() / r**3, theta.sin() / r**3, 0 * theta / r]) + 0 * phi
    poloidal = theta.cos() / r + 0 * phi
    return largest(shells.velocity(0 * poloidal, poloidal, shell) - expected)


def test_finite_differences_are_of_second_order_on_unequal_levels() -> None:
    errors = [dipole_error(n, "finite_difference") for n in (17, 33, 65)]
    assert all(1.8 < math.log2(coarse / fine) < 2.2 for coarse, fine in pairwise(errors))


def test_chebyshev_converges_geometrically() -> None:
    """The pole at r = 0 lies on a Bernstein ellipse of ρ = 3.94: each level gains that factor."""
    errors = [dipole_error(n, "chebyshev") for n in (7, 11, 15)]
    middle, half = (OUTER + INNER) / 2, (OUTER - INNER) / 2
    rho = middle / half + math.sqrt((middle / half) ** 2 - 1)
    for coarse, fine in pairwise(errors):
        assert 0.75 < math.log(coarse / fine) / (4 * math.log(rho)) < 1.05
    assert dipole_error(25, "chebyshev") < 1e-11


@pytest.mark.parametrize("power", [3, -4])
def test_potential_fields_of_degree_three(power: int) -> None:
    """∇(r^p Y) is harmonic for p = 3 and −4: it is the poloidal field of S = p r^(p+1) Y/12, and has no curl."""
    shell = shell_of(29)
    theta, phi = angles(shell.sphere)
    harmonic = theta.sin() ** 2 * theta.cos() * (2 * phi).cos()
    r = levels(shell)
    u = shells.velocity(0 * r * harmonic, power * r ** (power + 1) * harmonic / 12, shell)
    gradient = shells.gradient(r**power * harmonic, shell)
    radial = power * r ** (power - 1) * harmonic
    torch.testing.assert_close(u, gradient, rtol=0, atol=1e-11 * largest(u))
    torch.testing.assert_close(u[0], radial, rtol=0, atol=1e-12 * largest(u))
    assert largest(shells.curl(u, shell)) < 1e-9 * largest(u)


def test_beltrami_field_of_spherical_bessel_functions() -> None:
    """S = r j₂(kr) Y and T = k S, the decay modes of a conducting ball, make ∇×u = k u."""
    k, errors = 4.0, []
    for num_levels in (9, 13, 17):
        shell = shell_of(num_levels)
        theta, phi = angles(shell.sphere)
        r = levels(shell)
        poloidal = r * torch.from_numpy(spherical_jn(2, k * r.numpy())) * theta.sin() * theta.cos() * phi.sin()
        u = shells.velocity(k * poloidal, poloidal, shell)
        errors.append(largest(shells.curl(u, shell) - k * u) / largest(k * u))
    assert errors[0] < 0.1
    assert all(fine < 1e-3 * coarse for coarse, fine in pairwise(errors))


# --- the shell: identities ----------------------------------------------------------------------------------------


def random_shell_field(shell: Shell, dtype: torch.dtype = torch.float64) -> Tensor:
    toroidal, poloidal = torch.randn(2, 2, *shell.shape, dtype=dtype)
    return shells.velocity(toroidal, poloidal, shell)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("walls", WALLS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_shell_fields_are_solenoidal(scheme: Scheme, walls: tuple[Wall, Wall], dtype: torch.dtype) -> None:
    """From potentials and from the projection of noise; neither smooth nor resolved along the radius."""
    shell = shell_of(9, walls, scheme)
    noise = torch.randn(2, 3, *shell.shape, dtype=dtype)
    for u in (random_shell_field(shell, dtype), shells.project(noise, shell)):
        assert u.dtype == dtype and largest(u) > 0.5
        assert relative_divergence(u, shell) < ROUNDING[dtype]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_divergence_of_curl_and_curl_of_gradient_vanish(scheme: Scheme) -> None:
    shell = shell_of(scheme=scheme)
    omega = shells.curl(torch.randn(3, *shell.shape, dtype=torch.float64), shell)
    assert relative_divergence(omega, shell) < 1e-14
    gradient = shells.gradient(torch.randn(*shell.shape, dtype=torch.float64), shell)
    steepest = np.abs(differentiation(np.array(shell.radii), scheme)).sum(1).max()
    assert largest(shells.curl(gradient, shell)) < 1e-13 * largest(gradient) * steepest


@pytest.mark.parametrize("scheme", SCHEMES)
def test_divergence_sees_compression(scheme: Scheme) -> None:
    """∇·x = 3; r² r has degree 3, which the parabola only follows to second order."""
    shell = shell_of(17, scheme=scheme)
    divergence = shells.divergence(cartesian(*position(shell), shell), shell)
    tolerance = 1e-11 if scheme == "chebyshev" else 0.1
    torch.testing.assert_close(divergence, torch.full_like(divergence, 3.0), rtol=0, atol=tolerance)


@pytest.mark.parametrize("walls", WALLS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_potentials_give_the_field_back(scheme: Scheme, walls: tuple[Wall, Wall]) -> None:
    shell = shell_of(9, walls, scheme)
    u = random_shell_field(shell)
    again = shells.velocity(*shells.potentials(u, shell), shell)
    torch.testing.assert_close(again, u, rtol=0, atol=1e-12 * largest(u))
    toroidal, poloidal = shells.potentials(u, shell)
    omega = shells.curl(u, shell)[..., 0, :, :, :]
    vorticity = spheres.synthesise(
        spheres.eigenvalues(shell.sphere, omega) * spheres.analyse(toroidal, shell.sphere), shell.sphere
    )
    torch.testing.assert_close(omega * levels(shell) ** 2, vorticity, rtol=0, atol=1e-11 * largest(vorticity))


# --- the shell: walls and net fluxes ------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [random_shell_field, lambda s: shells.project(torch.randn(3, *s.shape), s)])
@pytest.mark.parametrize("walls", WALLS[1:])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_walls(scheme: Scheme, walls: tuple[Wall, Wall], make: Callable[[Shell], Tensor]) -> None:
    """Nothing passes (0.0), nothing slips (0.0), or nothing shears, on the side that says so."""
    shell = shell_of(9, walls, scheme)
    u = make(shell)
    derivative = torch.from_numpy(differentiation(np.array(shell.radii), scheme)).to(u)
    shear = torch.einsum("ij,...jab->...iab", derivative, u[..., 1:, :, :, :] / levels(shell).to(u))
    for k, wall in ((0, walls[0]), (-1, walls[1])):
        radial, tangential, sheared = u[..., 0, k, :, :], u[..., 1:, k, :, :], shear[..., k, :, :]
        assert (largest(radial) == 0.0) == (wall != "open")
        assert (largest(tangential) == 0.0) == (wall == "no_slip")
        rounding = 100 * torch.finfo(u.dtype).eps * largest(u) * largest(derivative)
        assert (largest(sheared) < rounding) == (wall == "free_slip")


@pytest.mark.parametrize("walls", WALLS)
def test_what_obeys_the_walls_is_not_changed(walls: tuple[Wall, Wall]) -> None:
    """A fifth-power bubble at both ends obeys every wall, through every derivative that a wall asks for."""
    shell = shell_of(25, walls, nlat=4)
    theta, phi = angles(shell.sphere)
    r = levels(shell)
    bubble = ((r - INNER) * (OUTER - r)) ** 5 * theta.sin() * phi.cos()
    coefficients = spheres.analyse(bubble, shell.sphere)
    made = shells.solenoidal(coefficients, coefficients, shell)
    torch.testing.assert_close(made.psi, -coefficients, rtol=0, atol=1e-10 * largest(coefficients))
    torch.testing.assert_close(made.radial, 2 / r**2 * coefficients, rtol=0, atol=1e-10 * largest(made.radial))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rigid_rotation_obeys_walls_without_shear(scheme: Scheme) -> None:
    shell = shell_of(9, ("free_slip", "free_slip"), scheme)
    x, y, _ = position(shell)
    rotation = cartesian(-y, x, 0 * x, shell)
    for keep in (shells.project, shells.admit):
        torch.testing.assert_close(keep(rotation, shell), rotation, rtol=0, atol=1e-12)


def test_no_net_flux_through_any_sphere() -> None:
    shell = shell_of()
    toroidal, poloidal = torch.randn(2, *shell.shape, dtype=torch.float64) + 5.0
    t, s = (spheres.analyse(x, shell.sphere) for x in (toroidal, poloidal))
    assert largest(s[:, 0, 0]) > 5.0
    assert largest(shells.solenoidal(t, s, shell).radial[:, 0, 0]) == 0.0
    for u in (shells.velocity(toroidal, poloidal, shell), shells.project(torch.randn(3, *shell.shape) + 1.0, shell)):
        through = shells.net_flux(u.abs(), shell)
        assert largest(shells.net_flux(u, shell) / through) < ROUNDING[u.dtype]


def test_a_point_source_is_solenoidal_and_of_no_potential() -> None:
    """r̂/r², the one harmonic field with a flux through the shell (b₂ = 1): 4π through every sphere."""
    shell = shell_of()
    r = levels(shell)
    source = torch.zeros(3, *shell.shape, dtype=torch.float64)
    source[0] = 1 / r**2
    assert largest(shells.divergence(source, shell)) < 1e-12
    torch.testing.assert_close(shells.net_flux(source, shell), torch.full((9,), 4 * math.pi, dtype=torch.float64))
    assert largest(shells.project(source, shell)) < 1e-13 * largest(source)
    assert largest(shells.potentials(source, shell)[1]) < 1e-13


# --- the shell: projections ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("walls", WALLS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_shell_projection_is_the_dense_least_squares_solution(scheme: Scheme, walls: tuple[Wall, Wall]) -> None:
    """Against the weighted least-squares fit by all fields that potentials on the grid can make."""
    shell = Shell(3, 6, shell_of(6, scheme=scheme).radii, walls, scheme)
    num = 2 * math.prod(shell.shape)
    potentials = torch.eye(num, dtype=torch.float64).reshape(num, 2, *shell.shape)
    fields = shells.velocity(potentials[:, 0], potentials[:, 1], shell).flatten(1).T
    one = torch.eye(fields.shape[0], dtype=torch.float64).reshape(-1, 3, *shell.shape)
    weight = shells.inner(one, one, shell).sqrt()
    u = torch.randn(3, *shell.shape, dtype=torch.float64)
    left, values, _ = torch.linalg.svd(weight[:, None] * fields, full_matrices=False)
    left = left[:, values > 1e-9 * values[0]]
    expected = (left @ (left.T @ (weight * u.flatten()))) / weight
    torch.testing.assert_close(shells.project(u, shell).flatten(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("keep", [shells.project, shells.admit])
@pytest.mark.parametrize("walls", WALLS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_shell_projections_are_orthogonal(
    scheme: Scheme, walls: tuple[Wall, Wall], keep: Callable[[Tensor, Shell], Tensor]
) -> None:
    shell = shell_of(9, walls, scheme)
    u, v = torch.randn(2, 3, *shell.shape, dtype=torch.float64)
    once, other = keep(u, shell), keep(v, shell)
    torch.testing.assert_close(keep(once, shell), once, rtol=0, atol=1e-12 * largest(once))
    size = float((shells.inner(u, u, shell) * shells.inner(v, v, shell)).sqrt())
    assert abs(float(shells.inner(once, v, shell) - shells.inner(u, other, shell))) < 1e-13 * size
    solenoidal = random_shell_field(shell)
    torch.testing.assert_close(keep(solenoidal, shell), solenoidal, rtol=0, atol=1e-12 * largest(solenoidal))


def test_admitted_fields_keep_their_divergence() -> None:
    shell = shell_of(9, ("no_slip", "impermeable"))
    u = shells.admit(torch.randn(3, *shell.shape, dtype=torch.float64), shell)
    assert relative_divergence(u, shell) > 1e-3
    assert largest(u[:, 0]) == 0.0 and largest(u[0, -1]) == 0.0 and largest(u[1:, -1]) > 0.1


def test_coefficients_of_a_field_give_it_back() -> None:
    shell = shell_of(scheme="finite_difference")
    u = shells.admit(torch.randn(2, 3, *shell.shape, dtype=torch.float64), shell)
    coefficients = shells.to_coefficients(u, shell)
    assert isinstance(coefficients, Coefficients) and coefficients.chi.shape == (2, 9, 8, 8)
    torch.testing.assert_close(shells.from_coefficients(coefficients, shell), u, rtol=0, atol=1e-12)


# --- the heads ----------------------------------------------------------------------------------------------------

SMALL = Sphere(5, 10, RADIUS)
SMALL_SHELL = Shell(4, 8, gauss_lobatto(INNER, OUTER, 6), ("no_slip", "free_slip"))
HEADS = [
    SphereHead(SMALL),
    SphereHead(SMALL, "potentials", velocity_scale=0.1),
    ShellHead(SMALL_SHELL),
    ShellHead(SMALL_SHELL, "potentials", velocity_scale=0.1),
]
COMPRESSIBLE = [
    SphereHead(SMALL, solenoidal=False),
    SphereHead(SMALL, "potentials", solenoidal=False),
    ShellHead(SMALL_SHELL, solenoidal=False),
    ShellHead(SMALL_SHELL, "potentials", solenoidal=False),
]


def grid_of(head: SphereHead | ShellHead) -> Sphere | Shell:
    return head.sphere if isinstance(head, SphereHead) else head.shell


def raw_for(head: SphereHead | ShellHead, *batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
    space = (head.sphere.nlat, head.sphere.nlon) if isinstance(head, SphereHead) else head.shell.shape
    return torch.randn(*batch, head.num_channels, *space, dtype=dtype)


@pytest.mark.parametrize("head", HEADS)
def test_heads_are_solenoidal_whatever_the_channels(head: SphereHead | ShellHead) -> None:
    raw = raw_for(head, 2)
    trained, exact = head(raw), head.exact(raw)
    assert (trained.dtype, exact.dtype) == DTYPES
    assert largest(exact) > 0.05
    assert relative_divergence(trained, grid_of(head)) < ROUNDING[torch.float32]
    assert relative_divergence(exact, grid_of(head)) < ROUNDING[torch.float64]
    torch.testing.assert_close(trained.double(), exact, rtol=0, atol=1e-5 * largest(exact))


@pytest.mark.parametrize("head", COMPRESSIBLE)
def test_compressible_heads_keep_the_divergent_part(head: SphereHead | ShellHead) -> None:
    u = head.exact(raw_for(head, 2))
    assert relative_divergence(u, grid_of(head)) > 1e-2
    if isinstance(head, ShellHead):
        assert largest(u[..., :, 0, :, :]) == 0.0 and largest(u[..., 0, -1, :, :]) == 0.0
        torch.testing.assert_close(shells.admit(u, head.shell), u, rtol=0, atol=1e-12 * largest(u))
    else:
        parts = spheres.decompose(u, head.sphere)
        assert min(map(largest, parts)) > 0.5
        torch.testing.assert_close(parts.rotational + parts.divergent, u, rtol=0, atol=1e-12)


@pytest.mark.parametrize("head", [*HEADS, *COMPRESSIBLE])
def test_gradients_of_heads(head: SphereHead | ShellHead) -> None:
    weights = torch.randn_like(head.exact(raw_for(head, 1)))
    raw = raw_for(head, 1, dtype=torch.float64).requires_grad_()
    assert gradcheck(lambda x: (weights * head.exact(x).square()).sum(), raw, fast_mode=True)


def test_heads_measure_in_their_velocity_scale() -> None:
    """ψ = −cosθ in units of scale × radius is a jet of one scale, and T = r² cosθ/R² in a shell likewise."""
    theta, phi = angles(SMALL)
    jet = SphereHead(SMALL, "potentials", velocity_scale=30.0).exact((-theta.cos() + 0 * phi)[None])
    torch.testing.assert_close(jet[1], 30.0 * theta.sin() + 0 * phi, rtol=0, atol=1e-12)
    shell = shell_of(nlat=4)
    theta, phi = angles(shell.sphere)
    toroidal = (levels(shell) / OUTER) ** 2 * theta.cos() + 0 * phi
    poloidal = levels(shell) ** 2 / OUTER**2 * theta.cos() + 0 * phi
    u = ShellHead(shell, "potentials", velocity_scale=30.0).exact(torch.stack([toroidal, poloidal]))
    rotation = 30.0 * theta.sin() * levels(shell) / OUTER + 0 * phi
    torch.testing.assert_close(u[2], rotation, rtol=0, atol=1e-12)
    torch.testing.assert_close(u[0], 60.0 * theta.cos() + 0 * rotation, rtol=0, atol=1e-11)


@pytest.mark.parametrize("head", [HEADS[0], HEADS[2]])
def test_a_linear_decoder_learns_through_the_head(head: SphereHead | ShellHead) -> None:
    """Fits solenoidal fields; every decode on the way is solenoidal to rounding, under autocast too."""
    targets = head(raw_for(head, 3))
    decoder = torch.nn.Linear(3, math.prod(raw_for(head).shape))
    optimiser = torch.optim.Adam(decoder.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            u = head(decoder(torch.eye(3)).reshape(3, *raw_for(head).shape))
        assert u.dtype == torch.float32
        assert relative_divergence(u.detach(), grid_of(head)) < ROUNDING[torch.float32]
        loss = (u - targets).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.02 * losses[0]


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 8), "Expected nlat ≥ 2 and nlon ≥ 3, got 1 × 8"),
        ((4, 2), "Expected nlat ≥ 2 and nlon ≥ 3, got 4 × 2"),
        ((4, 8, 0.0), "Expected a positive, finite radius"),
        ((4, 8, math.inf), "Expected a positive, finite radius"),
        ((4, 8, 1.0, "healpix"), "Expected a quadrature of legendre-gauss | equiangular, got 'healpix'"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_impossible_spheres(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sphere(*arguments)


LOBATTO = gauss_lobatto(1.0, 2.0, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 8, LOBATTO), "Expected nlat ≥ 2"),
        ((4, 8, LOBATTO[:4]), "Expected at least 5 radii, got 4"),
        ((4, 8, LOBATTO[::-1]), "Expected positive, finite radii .* that increase"),
        ((4, 8, (0.0, *LOBATTO[1:])), "Expected positive, finite radii"),
        ((4, 8, LOBATTO, ("solid", "open")), "Expected an inner and an outer wall of open | impermeable"),
        ((4, 8, LOBATTO, ("open",)), "Expected an inner and an outer wall"),
        ((4, 8, LOBATTO, ("open", "open"), "spline"), "Expected a scheme of chebyshev | finite_difference"),
        ((4, 8, (1.0, 1.2, 1.4, 1.6, 1.8)), "Expected Gauss–Lobatto radii .*, or use the scheme 'finite_difference'"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_impossible_shells(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shell(*arguments)


@pytest.mark.usefixtures("unchecked")
def test_fields_of_other_shapes_and_dtypes() -> None:
    shell = shell_of()
    with pytest.raises(ValueError, match=r"shape \(…, nlat, nlon\) = \(…, 5, 10\), got \(10, 5\)"):
        spheres.velocity(torch.zeros(10, 5), None, SMALL)
    with pytest.raises(ValueError, match=r"shape \(…, 2, nlat, nlon\) = \(…, 2, 5, 10\), got \(3, 5, 10\)"):
        spheres.project(torch.zeros(3, 5, 10), SMALL)
    with pytest.raises(ValueError, match="Expected a field in FP32 or FP64, got torch.bfloat16; convert it first"):
        spheres.project(torch.zeros(2, 5, 10, dtype=torch.bfloat16), SMALL)
    for call in (shells.project, shells.net_flux):
        with pytest.raises(ValueError, match=r"\(…, 3, nr, nlat, nlon\) = \(…, 3, 9, 8, 16\), got \(9, 8, 16\)"):
            call(torch.zeros(9, 8, 16), shell)
    with pytest.raises(ValueError, match=r"\(…, nr, nlat, nlon\) = \(…, 9, 8, 16\), got \(8, 8, 16\)"):
        shells.velocity(torch.zeros(8, 8, 16), torch.zeros(8, 8, 16), shell)
    with pytest.raises(ValueError, match=r"Expected 2 channels \(velocity\) on axis -3, got a shape of \(1, 5, 10\)"):
        SphereHead(SMALL)(torch.zeros(1, 5, 10))
    with pytest.raises(ValueError, match="Expected channels of velocity | potentials, got 'curl'"):
        SphereHead(SMALL, "curl")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Expected a positive, finite velocity scale"):
        ShellHead(shell, velocity_scale=0.0)
