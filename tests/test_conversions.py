"""Face fluxes against cell-centred velocities: orders of convergence, closed forms, and nets of zero."""

import math

import numpy as np
import pytest
import torch
from reference import BOUNDARIES, OPEN, box, order, points, random_geometry
from torch import Tensor
from torch.autograd import gradcheck
from waves import Wave

from latentphys import operators
from latentphys.conversions import (
    flux_from_cells,
    interpolate_to_faces,
    spectral_flux,
    spectral_solenoidal,
    spectral_velocity,
)
from latentphys.grid import Geometry, Grid
from latentphys.resolution import restrict

SHAPES = [(6, 5, 8), (5, 6, 7), (2, 4, 3)]
OFFSETS = [0.5, 0.0, (0.1, 0.5, 0.8)]


def largest(x: Tensor) -> float:
    return float(x.abs().amax())


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def random_samples(grid: Grid, *batch: int) -> Tensor:
    return torch.randn(*batch, 3, *grid.shape, dtype=torch.float64)


def sizes(boundaries: str) -> list[Grid]:
    """One box, its cells halved twice."""
    return [box(boundaries, (8 * n, 6 * n, 10 * n), (1 / (8 * n), 1.3 / (6 * n), 0.8 / (10 * n))) for n in (1, 2, 4)]


# finite volumes


@pytest.mark.parametrize("boundaries", BOUNDARIES)
def test_interpolation_errs_by_the_factor_of_its_closed_form(boundaries: str) -> None:
    """Every mode keeps its shape: cos(kh/2) from the mean of two cells, one sinc less for each axis in the face."""
    grid = sizes(boundaries)[0]
    wave = Wave(grid)
    got = operators.velocity(interpolate_to_faces(wave.samples(), Geometry(grid)), grid)
    for axis, (k, h) in enumerate(zip(wave.k, grid.spacing, strict=True)):
        others = math.prod(d for a, d in enumerate(wave.dampings) if a != axis)
        expected = wave.face_means()[axis] * math.cos(k * h / 2) / others
        torch.testing.assert_close(got[axis], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("boundaries", [*BOUNDARIES, "duct"])
@pytest.mark.parametrize("projected", [False, True])
def test_fluxes_from_cells_are_second_order(boundaries: str, projected: bool) -> None:
    grids = sizes(boundaries)
    errors, worst = [], []
    for grid in grids:
        wave, geometry = Wave(grid), Geometry(grid)
        convert = flux_from_cells if projected else interpolate_to_faces
        difference = operators.velocity(convert(wave.samples(), geometry), grid) - wave.face_means()
        errors.append(rms(difference))
        worst.append(largest(difference))
    assert all(1.9 < p < 2.1 for p in order(errors)) and all(1.85 < p < 2.2 for p in order(worst))


@pytest.mark.parametrize("boundaries", BOUNDARIES)
def test_there_and_back_is_second_order(boundaries: str) -> None:
    errors = []
    for grid in sizes(boundaries):
        u = Wave(grid).samples()
        errors.append(rms(operators.cell_velocity(flux_from_cells(u, Geometry(grid)), grid) - u))
    assert all(1.9 < p < 2.1 for p in order(errors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fluxes_from_cells_balance_round_solids(dtype: torch.dtype) -> None:
    geometry = random_geometry(box("mixed"), 2)
    u = random_samples(geometry.grid, 2).to(dtype)
    flux = flux_from_cells(u, geometry)
    assert flux.dtype == dtype and largest(flux) > 0.1
    assert largest(operators.div(flux, geometry.grid)) < {torch.float32: 1e-5, torch.float64: 1e-11}[dtype]
    exact = flux_from_cells(u, geometry, exact=True)
    assert exact.dtype == torch.float64 and largest(operators.div(exact, geometry.grid)) == 0.0
    torch.testing.assert_close(exact.to(dtype), flux, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-11)
    assert bool((exact[~geometry.open_faces] == 0.0).all())


def test_velocities_in_solids_are_never_used() -> None:
    geometry = random_geometry(box("channel"))
    u = random_samples(geometry.grid)
    empty = torch.where(geometry.fluid, u, math.nan)
    assert torch.equal(interpolate_to_faces(empty, geometry), interpolate_to_faces(u, geometry))


def test_faces_between_fluid_cells_beside_a_solid_are_those_of_the_empty_box() -> None:
    grid = box("channel")
    solid = torch.zeros(grid.shape, dtype=torch.bool)
    solid[2, 1, 3] = True
    u, geometry = random_samples(grid), Geometry(grid, solid)
    got, free = interpolate_to_faces(u, geometry), interpolate_to_faces(u, Geometry(grid))
    closed = ~geometry.open_faces & Geometry(grid).open_faces
    assert int(closed.sum()) == 6 and bool((got[closed] == 0.0).all())
    assert torch.equal(got[~closed], free[~closed])


@pytest.mark.parametrize("boundaries", OPEN)
def test_open_sides_stay_open_and_a_prescribed_inflow_is_kept(boundaries: str) -> None:
    grid = box(boundaries)
    geometry, u = random_geometry(grid), random_samples(grid)
    flux = flux_from_cells(u, geometry, exact=True)
    assert largest(operators.div(flux, grid)) == 0.0
    for axis, (low, high) in enumerate(grid.open_sides):
        if low:
            assert largest(flux.select(-4, axis).select(axis - 3, 0)) > 0.01
        if high:
            assert largest(operators.high_faces(flux, grid).select(-4, axis).select(axis - 3, -1)) > 0.01
    raw = operators.velocity(interpolate_to_faces(u, Geometry(grid)), grid)
    if boundaries == "duct":
        torch.testing.assert_close(raw[0, 0], 1.5 * u[0, 0] - 0.5 * u[0, 1])
        beside, lone = geometry.fluid[0], ~geometry.fluid[1]
        inside = operators.velocity(interpolate_to_faces(u, geometry), grid)[0, 0]
        torch.testing.assert_close(inside[beside & lone], u[0, 0][beside & lone])
        driven = Geometry(grid, inflow={"x-": 0.8})
        inflow = operators.velocity(flux_from_cells(u, driven), grid)[0, 0]
        torch.testing.assert_close(inflow, torch.full_like(inflow, 0.8))


# spectral


class Modes:
    """u(x) = Σ_m a_m cos(k_m·x + p_m) with random resolved waves, up to the highest below Nyquist along every axis."""

    def __init__(self, grid: Grid, num_modes: int = 6, solenoidal: bool = True) -> None:
        self.grid = grid
        highest = torch.tensor([(n - 1) // 2 for n in grid.shape])
        waves = (torch.rand(num_modes, 3) * (2 * highest + 1)).floor().to(torch.int64) - highest
        waves[0] = highest
        self.k = waves.double() * 2 * math.pi / torch.tensor(grid.lengths, dtype=torch.float64)
        self.phase = 2 * math.pi * torch.rand(num_modes, dtype=torch.float64)
        self.amplitude = torch.randn(num_modes, 3, dtype=torch.float64)
        if solenoidal:
            self.amplitude = torch.linalg.cross(self.k, self.amplitude)

    def at(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        total = torch.zeros(3, *torch.broadcast_shapes(x.shape, y.shape, z.shape), dtype=torch.float64)
        for (kx, ky, kz), phase, amplitude in zip(self.k, self.phase, self.amplitude, strict=True):
            total += amplitude.reshape(3, 1, 1, 1) * torch.cos(kx * x + ky * y + kz * z + phase)
        return total

    def samples(self, offset: float | tuple[float, float, float]) -> Tensor:
        return self.at(*points(self.grid, offset if isinstance(offset, tuple) else [offset] * 3))

    def face_integrals(self) -> Tensor:
        """By Gauss's quadrature, 10 × 10 points on each face: no sinc in it."""
        places, weights = np.polynomial.legendre.leggauss(10)
        flux = torch.zeros(3, *self.grid.shape, dtype=torch.float64)
        for axis, area in enumerate(self.grid.face_areas):
            for i, first in zip(places, weights, strict=True):
                for j, second in zip(places, weights, strict=True):
                    place = [float(0.5 + 0.5 * i), float(0.5 + 0.5 * j)]
                    place.insert(axis, 0.0)
                    flux[axis] += first * second / 4 * area * self.at(*points(self.grid, place))[axis]
        return flux


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_spectral_fluxes_are_the_integrals_over_the_faces(
    shape: tuple[int, int, int], offset: float | tuple[float, float, float]
) -> None:
    modes = Modes(Grid(shape, (0.7, 1.3, 0.4)), solenoidal=False)
    u, flux = modes.samples(offset), modes.face_integrals()
    torch.testing.assert_close(spectral_flux(u, modes.grid, offset), flux, rtol=0, atol=1e-13)
    torch.testing.assert_close(spectral_velocity(flux, modes.grid, offset), u, rtol=0, atol=1e-13)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_spectrally_solenoidal_samples_give_nets_of_zero(
    shape: tuple[int, int, int], offset: float | tuple[float, float, float]
) -> None:
    grid = Grid(shape, (0.7, 1.3, 0.4))
    u = spectral_solenoidal(random_samples(grid, 2), grid)
    flux = spectral_flux(u, grid, offset)
    assert largest(operators.div(flux, grid)) < 1e-14 < 1e-2 < largest(flux)
    torch.testing.assert_close(spectral_velocity(flux, grid, offset), u, rtol=0, atol=1e-14)
    assert largest(operators.div(spectral_flux(random_samples(grid), grid, offset), grid)) > 0.1


def test_nothing_is_lost_but_the_nyquist_modes() -> None:
    grid = Grid((6, 4, 5), (0.7, 1.3, 0.4))
    u = random_samples(grid)
    spectrum = torch.fft.fftn(u, dim=(1, 2, 3))
    spectrum[:, 3] = spectrum[:, :, 2] = 0.0
    kept = torch.fft.ifftn(spectrum, dim=(1, 2, 3)).real
    for offset in (0.5, 0.0):
        back = spectral_velocity(spectral_flux(u, grid, offset), grid, offset)
        torch.testing.assert_close(back, kept, rtol=0, atol=1e-14)
    checkerboard = (-1.0) ** torch.arange(6, dtype=torch.float64).reshape(-1, 1, 1).expand(3, *grid.shape)
    assert largest(spectral_flux(checkerboard, grid)) < 1e-15


def test_the_solenoidal_part_is_the_orthogonal_projection() -> None:
    modes = Modes(Grid((6, 5, 8), (0.7, 1.3, 0.4)))
    u = modes.samples(0.5)
    torch.testing.assert_close(spectral_solenoidal(u, modes.grid), u, rtol=0, atol=1e-13)
    gradient = Modes(modes.grid)
    gradient.amplitude = gradient.k
    assert largest(spectral_solenoidal(gradient.samples(0.0), modes.grid)) < 1e-13 * largest(gradient.k)
    uniform = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64).reshape(3, 1, 1, 1).expand(u.shape)
    torch.testing.assert_close(spectral_solenoidal(uniform, modes.grid), uniform, rtol=0, atol=1e-15)


def test_spectral_errors_fall_faster_than_any_power() -> None:
    """A smooth flow with infinitely many modes, against what a fine grid's fluxes sum to."""

    def flux(n: int) -> tuple[Tensor, Grid]:
        grid = Grid((n, n, n), (1 / n, 1 / n, 1 / n))
        x, y, z = (2 * math.pi * c for c in points(grid, [0.5] * 3))
        u = torch.stack(torch.broadcast_tensors((y + z).sin().exp(), (z - x).cos().exp(), (x + y).sin().exp()))
        return spectral_flux(u, grid), grid

    fine, grid = flux(48)
    errors = [largest(operators.velocity(flux(n)[0] - restrict(fine, grid, 48 // n), flux(n)[1])) for n in (6, 12, 24)]
    assert errors[0] > 1e-3 and errors[1] < 1e-2 * errors[0] and errors[2] < 1e-12


def test_single_precision_stays_single() -> None:
    grid = Grid((6, 5, 8), (0.7, 1.3, 0.4))
    u = spectral_solenoidal(random_samples(grid).float(), grid)
    flux = spectral_flux(u, grid)
    assert u.dtype == flux.dtype == spectral_velocity(flux, grid).dtype == torch.float32
    assert largest(operators.div(flux, grid)) < 2e-6
    torch.testing.assert_close(spectral_velocity(flux, grid), u, rtol=0, atol=1e-5)


def test_gradients() -> None:
    grid, walled = Grid((3, 2, 4), (0.7, 1.3, 0.4)), random_geometry(box("mixed", (3, 2, 4)))
    u = random_samples(grid).requires_grad_()
    assert gradcheck(lambda u: flux_from_cells(u, walled), u)
    for convert in (spectral_flux, spectral_velocity, spectral_solenoidal):
        assert gradcheck(lambda u, convert=convert: convert(u, grid), u)


@pytest.mark.parametrize("convert", [spectral_flux, spectral_velocity, spectral_solenoidal])
def test_spectral_conversions_refuse_walls_and_other_shapes(convert: object, unchecked: None) -> None:
    assert callable(convert)
    with pytest.raises(ValueError, match="periodic along all axes, got .*no_slip.*; use `flux_from_cells`"):
        convert(torch.zeros(3, 5, 4, 7), box("channel"))
    with pytest.raises(ValueError, match=r"Expected a field of shape .*, got \(3, 5, 4, 6\)"):
        convert(torch.zeros(3, 5, 4, 6), box("periodic"))
    with pytest.raises(ValueError, match=r"Expected a field of shape .*, got \(3, 5, 4, 6\)"):
        interpolate_to_faces(torch.zeros(3, 5, 4, 6), Geometry(box("channel")))
