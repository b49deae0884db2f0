"""The complex: div ∘ curl = 0, grad = −divᵀ, and second order against closed forms."""

import math
from collections.abc import Callable

import pytest
import torch
from reference import (
    BOUNDARIES,
    OPEN,
    abc,
    abc_flux,
    box,
    edge_points,
    face_points,
    order,
    points,
    random_flux,
    two_pi_box,
)
from torch import Tensor

from latentphys import operators
from latentphys.grid import Geometry, Grid

SHAPES = [(5, 4, 7), (2, 3, 2), (6, 9, 5)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("boundaries", BOUNDARIES)
def test_div_curl_is_zero_to_rounding(boundaries: str, shape: tuple[int, int, int]) -> None:
    grid = box(boundaries, shape)
    flux = operators.curl(random_flux(grid, 2), grid)
    assert float(flux.abs().amax()) > 0.5
    assert float(operators.div(flux, grid).abs().amax()) < 1e-14


@pytest.mark.parametrize("boundaries", BOUNDARIES)
def test_div_curl_of_integers_is_exactly_zero(boundaries: str) -> None:
    grid = box(boundaries)
    potential = torch.randint(-1000, 1000, (3, *grid.shape)).double()
    assert bool((operators.div(operators.curl(potential, grid), grid) == 0.0).all())


@pytest.mark.parametrize("boundaries", BOUNDARIES)
def test_nothing_that_curl_makes_flows_through_walls(boundaries: str) -> None:
    grid = box(boundaries)
    flux = operators.curl(random_flux(grid), grid)
    closed = ~Geometry(grid).open_faces
    assert bool((flux[closed] == 0.0).all())
    assert bool((operators.grad(torch.randn(grid.shape), grid)[closed] == 0.0).all())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("boundaries", BOUNDARIES)
def test_grad_is_minus_the_adjoint_of_div(boundaries: str, shape: tuple[int, int, int]) -> None:
    grid = box(boundaries, shape)
    flux = Geometry(grid).mask(random_flux(grid))
    scalar = torch.randn(grid.shape, dtype=torch.float64)
    left = (scalar * operators.div(flux, grid)).sum()
    torch.testing.assert_close(left, -(operators.grad(scalar, grid) * flux).sum())


@pytest.mark.parametrize("boundaries", BOUNDARIES)
def test_vorticity_is_the_adjoint_of_curl(boundaries: str) -> None:
    """⟨F, curl A⟩ in kinetic energy is ⟨ω, A⟩ over the edges' dual faces, away from walls."""
    grid = box(boundaries)
    flux, potential = Geometry(grid).mask(random_flux(grid)), random_flux(grid)
    for axis in range(3):
        for component in range(3):
            if component != axis and not grid.periodic[axis]:
                potential[component].select(axis, 0).zero_()
    length = grid.per_face(grid.spacing, flux)
    area = grid.per_face(grid.face_areas, flux)
    left = (operators.velocity(flux, grid) * length * operators.curl(potential, grid)).sum()
    right = (operators.vorticity(flux, grid) * area * potential).sum()
    torch.testing.assert_close(left, right)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("boundaries", OPEN)
def test_through_open_sides_the_complex_holds_where_all_six_faces_are_stored(
    boundaries: str, shape: tuple[int, int, int]
) -> None:
    grid = box(boundaries, shape)
    potential = torch.randint(-1000, 1000, (2, 3, *grid.shape)).double()
    flux = operators.curl(potential, grid)
    assert bool((operators.div(flux, grid) == 0.0).all()) and bool((flux[:, ~Geometry(grid).open_faces] == 0.0).all())
    last = torch.zeros(grid.shape, dtype=torch.bool)
    for axis, (_, is_open) in enumerate(grid.open_sides):
        if is_open:
            last.select(axis, -1).fill_(True)
    flux, scalar = random_flux(grid), torch.randn(grid.shape, dtype=torch.float64)
    assert bool((operators.div(flux, grid)[last] == 0.0).all())
    assert torch.equal(operators.div(flux, grid)[~last], operators.stored_div(flux, grid)[~last])
    flux, scalar = Geometry(grid).mask(flux), scalar * ~last
    left = (scalar * operators.div(flux, grid)).sum()
    torch.testing.assert_close(left, -(operators.grad(scalar, grid) * flux).sum())


@pytest.mark.parametrize("boundaries", OPEN)
def test_the_high_faces_of_open_sides_close_the_balance(boundaries: str) -> None:
    grid = box(boundaries)
    flux = random_flux(grid, 2)
    high = operators.high_faces(flux, grid)
    net = (high - flux).sum(-4)
    expected = operators.div(flux, grid)
    torch.testing.assert_close(net, expected, rtol=0, atol=1e-14)
    # A corner of two open sides shares by area / cell size.
    if boundaries == "through":
        dx, dy, dz = grid.spacing
        corner = high[:, :, -1, -1, -1]
        torch.testing.assert_close(corner[:, 0] * dx**2, corner[:, 1] * dy**2)
        torch.testing.assert_close(corner[:, 0] * dx**2, corner[:, 2] * dz**2)


def test_a_uniform_flow_through_a_duct_has_no_vorticity_at_its_ends() -> None:
    grid = box("through")
    u = torch.tensor([1.0, -2.0, 0.5]).double().reshape(3, 1, 1, 1).expand(3, *grid.shape)
    flux = operators.flux_of(u, grid)
    assert float(operators.vorticity(flux, grid).abs().amax()) == 0.0
    inner = (slice(None), slice(0, -1), slice(0, -1), slice(0, -1))
    torch.testing.assert_close(operators.cell_velocity(flux, grid)[inner], u[inner])


def error(of: Callable[[Grid], tuple[Tensor, Tensor]], n: int) -> float:
    got, expected = of(two_pi_box((n, 3 * n // 2, 2 * n)))
    return float((got - expected).square().mean().sqrt())


def curl_of_abc(grid: Grid) -> tuple[Tensor, Tensor]:
    """∇×A = u for A = u."""
    edges = torch.stack([abc(a, edge_points(grid, a)) for a in range(3)])
    flux = operators.curl(edges * grid.per_face(grid.spacing, edges), grid)
    return operators.velocity(flux, grid), operators.velocity(abc_flux(grid), grid)


def vorticity_of_abc(grid: Grid) -> tuple[Tensor, Tensor]:
    return operators.vorticity(abc_flux(grid), grid), torch.stack([abc(a, edge_points(grid, a)) for a in range(3)])


def cell_velocity_of_a_wave(grid: Grid) -> tuple[Tensor, Tensor]:
    """u_a = sin(x + 2y + z) + a, which varies along every axis, also along its own."""
    u = torch.stack([torch.sin(x + 2 * y + z) + a for a, (x, y, z) in ((a, face_points(grid, a)) for a in range(3))])
    x, y, z = points(grid, (0.5, 0.5, 0.5))
    centre = torch.stack([torch.sin(x + 2 * y + z) + a for a in range(3)])
    return operators.cell_velocity(operators.flux_of(u, grid), grid), centre


def div_of_a_wave(grid: Grid) -> tuple[Tensor, Tensor]:
    u = torch.stack([torch.sin(x + 2 * y + z) for x, y, z in (face_points(grid, a) for a in range(3))])
    x, y, z = points(grid, (0.5, 0.5, 0.5))
    return operators.div(operators.flux_of(u, grid), grid) / grid.cell_volume, 4 * torch.cos(x + 2 * y + z)


@pytest.mark.parametrize("of", [curl_of_abc, vorticity_of_abc, cell_velocity_of_a_wave, div_of_a_wave])
def test_second_order(of: Callable[[Grid], tuple[Tensor, Tensor]]) -> None:
    fine = order([error(of, n) for n in (16, 32, 64)])
    assert all(1.9 < p < 2.1 for p in fine), fine


def test_the_sampled_abc_flow_is_solenoidal() -> None:
    grid = two_pi_box((8, 6, 10))
    assert float(operators.div(abc_flux(grid), grid).abs().amax()) < 1e-14


def test_grad_of_a_linear_scalar() -> None:
    grid = box("closed")
    x, y, z = points(grid, (0.5, 0.5, 0.5))
    difference = operators.grad(2 * x - 3 * y + z, grid)[:, 1:, 1:, 1:]
    for axis, slope in enumerate((2.0, -3.0, 1.0)):
        torch.testing.assert_close(difference[axis], torch.full_like(difference[axis], slope * grid.spacing[axis]))


def test_a_uniform_velocity_has_its_own_mean_and_energy() -> None:
    grid = box("periodic")
    flux = operators.flux_of(torch.tensor([1.0, -2.0, 0.5]).double().reshape(3, 1, 1, 1).expand(3, *grid.shape), grid)
    torch.testing.assert_close(operators.mean_velocity(flux, grid), torch.tensor([1.0, -2.0, 0.5]).double())
    torch.testing.assert_close(float(operators.kinetic_energy(flux, grid)), 0.5 * (1 + 4 + 0.25))
    assert float(operators.vorticity(flux, grid).abs().amax()) == 0.0
    torch.testing.assert_close(operators.cell_velocity(flux, grid), operators.velocity(flux, grid))


def test_the_energy_of_the_abc_flow() -> None:
    """½⟨u·u⟩ = ½(A² + B² + C²), exactly so on uniform points."""
    grid = two_pi_box((6, 8, 10))
    assert math.isclose(float(operators.kinetic_energy(abc_flux(grid), grid)), 0.5 * (1 + 0.49 + 0.16))
    assert float(operators.mean_velocity(abc_flux(grid), grid).abs().amax()) < 1e-15


def test_a_wall_counts_as_at_rest_for_cell_velocity_and_vorticity() -> None:
    grid = box("channel")
    u = torch.zeros(3, *grid.shape, dtype=torch.float64)
    u[0], u[2, :, :, 1:] = 1.0, 1.0
    flux = operators.flux_of(u, grid)
    assert bool((operators.cell_velocity(flux, grid)[2, :, :, [0, -1]] == 0.5).all())
    torch.testing.assert_close(operators.vorticity(flux, grid)[1, 0, 0, 0], torch.tensor(1 / grid.spacing[2]).double())


@pytest.mark.parametrize("operator", [operators.div, operators.curl])
def test_a_flux_of_another_shape_is_refused(operator: Callable[..., Tensor], unchecked: None) -> None:
    with pytest.raises(ValueError, match=r"\(…, 3, nx, ny, nz\) = \(…, 3, 5, 4, 7\), got \(5, 4, 7\)"):
        operator(torch.zeros(5, 4, 7), box("periodic"))


def test_a_scalar_of_another_shape_is_refused(unchecked: None) -> None:
    with pytest.raises(
        ValueError, match=r"Expected a field of shape \(…, nx, ny, nz\) = \(…, 5, 4, 7\), got \(5, 4, 6\)"
    ):
        operators.grad(torch.zeros(5, 4, 6), box("periodic"))
