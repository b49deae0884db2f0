"""The finish in C++ against `exact.conserve`: the same flux to rounding, and net flux 0.0 bit for bit."""

import ctypes
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from native_finish import COMPILER, Finish, Library, compile_library
from reference import BOUNDARIES, OPEN, box, random_flux, random_geometry, ring
from safetensors.torch import save_file
from torch import Tensor

from latentphys import exact, operators
from latentphys.families.scalar_transport import Total
from latentphys.grid import Boundaries, Geometry, Grid
from latentphys.projection import project
from latentphys.surrogate import include_dir

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs the compiler g++")

NEAR = 1e-10
"""Largest difference of a face from `exact.conserve`'s, relative to the largest flux given: two projections to 1e-13 in
the 2-norm, and two trees along which a face takes up to the sum of the nets behind it. At 32³ it is 1e-11."""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return compile_library(tmp_path_factory.mktemp("native"))


def check(finish: Finish, geometry: Geometry, flux: Tensor) -> Tensor:
    """Conserve, with everything that must hold for any flux."""
    result = finish.conserve(flux)
    assert bool((operators.div(result, geometry.grid) == 0.0).all())
    assert bool((result[~geometry.open_faces] == 0.0).all())
    assert finish.net_flux_max(result) == 0.0
    size = float(geometry.mask(flux).abs().max())
    difference = (result - exact.conserve(geometry=geometry, flux=flux)).abs().max()
    assert float(difference) <= NEAR * size
    return result


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.4, 0.7, 0.97])
@pytest.mark.parametrize("name", list(BOUNDARIES | OPEN))
def test_net_flux_is_zero_in_any_box_and_the_flux_is_the_nearest(library: Library, name: str, fraction: float) -> None:
    grid = box(name)
    geometry = random_geometry(grid, fraction=fraction) if fraction else Geometry(grid)
    finish = library.finish(geometry)
    for _ in range(2):
        result = check(finish, geometry, random_flux(grid))
        assert torch.equal(finish.conserve(result), result) and finish.num_iterations == 0


WALLS: Boundaries = (("no_slip", "no_slip"), ("periodic", "periodic"), ("periodic", "periodic"))
INFLOW: Boundaries = (("inflow", "outflow"), ("periodic", "periodic"), ("periodic", "periodic"))


@pytest.mark.parametrize("boundaries", [BOUNDARIES["periodic"], WALLS, INFLOW])
@pytest.mark.parametrize("shape", [(5, 4, 1), (6, 1, 1), (2, 2, 2), (3, 1, 7), (2, 3, 1)])
def test_boxes_of_one_and_two_dimensions(library: Library, shape: tuple[int, int, int], boundaries: Boundaries) -> None:
    grid = Grid(shape, (0.5, 2.0, 1.0), boundaries)
    for geometry in (Geometry(grid), Geometry(grid, torch.rand(shape) < 0.3)):
        check(library.finish(geometry), geometry, random_flux(grid))


def test_separate_pores_and_closed_cells(library: Library) -> None:
    solid = torch.zeros(9, 6, 5, dtype=torch.bool)
    solid[[0, 4, 6]] = True  # two pores along y and z, three layers and one; and a layer
    solid[7] = True
    solid[7, 2, 2] = False  # a cell that touches the last layer through one face
    solid[5, 1::2] = True
    geometry = Geometry(Grid((9, 6, 5), (1.0, 1.0, 1.0)), solid)
    result = check(library.finish(geometry), geometry, random_flux(geometry.grid))
    assert float(result[1, 1:4].abs().max()) > 0.1
    ringed, _ = ring()
    check(library.finish(ringed), ringed, random_flux(ringed.grid))


def test_what_is_conservative_moves_by_no_more_than_rounding(library: Library) -> None:
    geometry = random_geometry(box("channel", (12, 8, 8)))
    given = project(random_flux(geometry.grid), geometry, tol=1e-14)
    moved = library.finish(geometry).conserve(given) - given
    assert float(moved.abs().max()) <= 1e-11 * float(given.abs().max())


def test_a_gradient_is_removed_and_a_uniform_flow_kept(library: Library) -> None:
    grid = box("periodic", (12, 8, 10), (0.3, 1.0, 2.0))
    gradient = operators.grad(torch.randn(grid.shape, dtype=torch.float64), grid) * grid.per_face(
        grid.conductances, torch.zeros((), dtype=torch.float64)
    )
    uniform = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64).reshape(3, 1, 1, 1).expand(3, *grid.shape)
    result = library.finish(Geometry(grid)).conserve(gradient + uniform)
    assert float((result - uniform).abs().max()) < 1e-10 * float(gradient.abs().max())


def test_what_a_tree_carries_is_exact_after_a_projection_that_left_much(library: Library) -> None:
    grid = box("closed", (32, 32, 32))
    finish, flux = library.finish(Geometry(grid)), 1e-3 * random_flux(grid)
    flux[0] += torch.pi * torch.minimum(torch.arange(32), 32 - torch.arange(32))[:, None, None]
    finish.set(tolerance=0.9)
    assert bool((operators.div(finish.conserve(flux), grid) == 0.0).all()) and finish.num_iterations == 0


@pytest.mark.parametrize("factor", [1e-300, 1e-160, 1e160, 1e300, 2.0**-1070])
def test_fluxes_of_any_size(library: Library, factor: float) -> None:
    geometry = random_geometry(box("mixed"))
    finish, flux = library.finish(geometry), random_flux(geometry.grid)
    result = finish.conserve(flux * factor)
    assert bool((operators.div(result, geometry.grid) == 0.0).all())
    if factor > 1e-300:
        assert float((result / factor - finish.conserve(flux)).abs().max()) < NEAR


def test_nothing_stays_nothing(library: Library) -> None:
    grid = box("duct")
    result = library.finish(Geometry(grid)).conserve(torch.full((3, *grid.shape), -0.0))
    assert torch.equal(result, torch.zeros_like(result)) and not bool(result.signbit().any())
    walls = Geometry(grid, torch.ones(grid.shape, dtype=torch.bool).index_fill(0, torch.tensor([0]), False))
    only_in_solids = torch.where(walls.open_faces, 0.0, random_flux(grid))
    assert not bool(library.finish(walls).conserve(only_in_solids).any())


def test_cells_of_any_proportion(library: Library) -> None:
    grid = Grid((16, 8, 12), (1e-6, 1e-4, 3e-6), BOUNDARIES["channel"])
    for geometry in (Geometry(grid), random_geometry(grid)):
        finish = library.finish(geometry)
        check(finish, geometry, 1e-12 * random_flux(grid))
        assert finish.num_iterations < 60


def test_finer_grids_hardly_take_more_iterations(library: Library) -> None:
    for num_cells, bound in ((8, 25), (16, 35), (32, 40)):
        geometry = random_geometry(box("periodic", (num_cells,) * 3), fraction=0.5)
        finish = library.finish(geometry)
        finish.conserve(random_flux(geometry.grid))
        assert 0 < finish.num_iterations <= bound


def test_warm_starts_save_iterations_and_change_no_zero(library: Library) -> None:
    geometry = random_geometry(box("channel", (16, 12, 8)))
    finish, flux = library.finish(geometry), random_flux(geometry.grid)
    assert finish.set(warm_start=True) == 0
    check(finish, geometry, flux)
    cold = finish.num_iterations
    check(finish, geometry, 3.0 * (flux + 1e-6 * random_flux(geometry.grid)))
    # three times the flux leaves two thirds of the net to a guess of the former size
    assert finish.num_iterations <= cold
    check(finish, geometry, 3.0 * (flux + 1e-6 * random_flux(geometry.grid)))
    assert finish.num_iterations < 0.7 * cold
    check(finish, geometry, random_flux(geometry.grid))
    assert finish.num_iterations <= cold + 2


def test_calls_do_not_know_of_each_other(library: Library) -> None:
    geometry = random_geometry(box("through"))
    finish, one, other = library.finish(geometry), random_flux(geometry.grid), random_flux(geometry.grid)
    first = finish.conserve(one)
    finish.conserve(other)
    assert torch.equal(finish.conserve(one), first)
    assert torch.equal(library.finish(geometry).conserve(one), first)


@pytest.mark.parametrize("name", list(BOUNDARIES | OPEN))
def test_net_flux_max_is_that_of_div(library: Library, name: str) -> None:
    geometry, flux = Geometry(box(name)), random_flux(box(name))
    assert library.finish(geometry).net_flux_max(flux) == float(operators.div(flux, geometry.grid).abs().max())
    flux[0, 2, 1, 1] = torch.nan
    assert np.isnan(library.finish(geometry).net_flux_max(flux))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_refused(library: Library, value: float) -> None:
    geometry = Geometry(box("channel"))
    flux = random_flux(geometry.grid)
    flux[1, 2, 1, 3] = value
    with pytest.raises(ValueError, match="Expected a finite flux, got NaN or infinity"):
        library.finish(geometry).conserve(flux)


def test_sums_beyond_the_range_of_fp64_are_refused(library: Library) -> None:
    geometry = Geometry(box("channel"))
    with pytest.raises(ValueError, match="within FP64's range, got an overflow; scale them first"):
        library.finish(geometry).conserve(random_flux(geometry.grid).clamp(-1, 1) * 1.7e308)


def test_too_few_iterations_are_an_error(library: Library) -> None:
    geometry = random_geometry(box("channel", (16, 16, 16)))
    finish = library.finish(geometry)
    finish.set(max_iterations=3)
    with pytest.raises(ValueError, match="after 3 iterations; allow more iterations or a looser tolerance"):
        finish.conserve(random_flux(geometry.grid))
    finish.set(tolerance=1e-3, max_iterations=30)
    result = finish.conserve(random_flux(geometry.grid))
    assert finish.net_flux_max(result) == 0.0 and finish.num_iterations < 15


@pytest.mark.parametrize(("tolerance", "iterations", "words"), [(-1.0, 10, "a tolerance"), (1e-9, 0, "at least 1 it")])
def test_impossible_settings_are_refused(library: Library, tolerance: float, iterations: int, words: str) -> None:
    finish = library.finish(Geometry(box("channel")))
    assert finish.set(tolerance, iterations) == 1 and f"Expected {words}" in library.error()


SIX = "periodic periodic periodic periodic no_slip free_slip"


@pytest.mark.parametrize(
    ("shape", "spacing", "boundaries", "solid", "words"),
    [
        ((4, 4, 4), (1, 1, 1), SIX.replace("no_slip", "noslip"), None, "got 'noslip'"),
        ((4, 4, 4), (1, 1, 1), "periodic periodic", None, "Expected six boundaries, x- x+ y- y+ z- z+, got 'per"),
        ((4, 4, 4), (1, 1, 1), SIX + " outflow", None, "Expected six boundaries"),
        ((4, 4, 4), (1, 1, 1), SIX.replace("periodic", "outflow", 1), None, "on both sides of axis x or on neither"),
        ((4, 4, 1), (1, 1, 1), SIX, None, "at least 2 cells along each axis, or 1 along a periodic one, got 1 cells"),
        ((4, 0, 4), (1, 1, 1), SIX, None, "at least 2 cells along each axis"),
        ((4, 4, 4), (1, 0, 1), SIX, None, "positive, finite spacings"),
        ((4, 4, 4), (1, 1, np.inf), SIX, None, "positive, finite spacings"),
        ((2048, 2048, 2048), (1, 1, 1), SIX, None, "fewer than 2^31 cells"),
        ((4, 4, 4), (1, 1, 1), SIX, np.ones((4, 4, 4)), "at least one fluid cell, got a box that is solid throughout"),
    ],
)
def test_boxes_that_cannot_be_are_refused(
    library: Library,
    shape: tuple[int, ...],
    spacing: tuple[float, ...],
    boundaries: str,
    solid: np.ndarray | None,
    words: str,
) -> None:
    assert library.create(shape, spacing, boundaries, solid) is None
    assert words in library.error()


def test_a_missing_finish_is_refused(library: Library) -> None:
    assert library.call.latentphys_finish_conserve(None, None, None) == 1
    assert "got NULL; see the error of that call" in library.error()
    assert np.isnan(library.call.latentphys_finish_net_flux_max(None, None))
    library.call.latentphys_finish_destroy(None)


def test_missing_arguments_are_refused(library: Library) -> None:
    sizes, widths = (ctypes.c_int64 * 3)(4, 4, 4), (ctypes.c_double * 3)(1.0, 1.0, 1.0)
    for given in ((None, widths, SIX.encode()), (sizes, None, SIX.encode()), (sizes, widths, None)):
        assert library.call.latentphys_finish_create(*given, None) is None
        assert library.error() == "Expected a shape, a spacing and boundaries, got NULL."
    finish = library.finish(Geometry(box("channel")))
    assert library.call.latentphys_finish_conserve(finish.handle, None, None) == 1
    assert library.error() == "Expected a flux, got NULL."
    assert np.isnan(library.call.latentphys_finish_net_flux_max(finish.handle, None))


@pytest.mark.parametrize("mean", [0.0, 5.0, -3e4])
def test_the_sum_of_a_scalar_is_kept_to_the_last_bit(library: Library, mean: float) -> None:
    geometry = random_geometry(box("mixed"))
    values = torch.where(geometry.fluid, mean + torch.randn(geometry.grid.shape, dtype=torch.float64), 0.0)
    load = geometry.grid.num_cells * (abs(mean) + 8.0)
    quantum = 2.0 ** (np.frexp(load)[1] - 50)
    total = round(float(values.sum()) / quantum) * quantum
    for _ in range(3):
        moved = torch.where(geometry.fluid, values + 0.3 * torch.randn_like(values), 0.0)
        filled = torch.where(geometry.fluid, moved, 7.0)  # what stands in solids is no part of the sum
        kept = library.keep_sum(filled, ~geometry.fluid, total, load)
        assert library.sum_of(kept + torch.where(geometry.fluid, 0.0, 7.0), ~geometry.fluid) == total
        for order in (torch.arange(kept.numel()), *(torch.randperm(kept.numel()) for _ in range(3))):
            assert float(kept.flatten()[order].cumsum(0)[-1]) == total
        shift = (total - moved.sum()) / geometry.fluid.sum()
        expected = Total(*(torch.tensor([x]).reshape(1, 1, 1, 1) for x in (total / quantum, quantum))).kept(
            torch.where(geometry.fluid, moved + shift, 0.0)[None], geometry
        )[0]
        assert float((kept - expected).abs().max()) <= 2 * quantum
        assert not bool(kept[~geometry.fluid].any())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e308])
def test_scalars_without_a_finite_sum_are_refused(library: Library, value: float) -> None:
    values = torch.zeros(64, dtype=torch.float64)
    values[3:9] = value
    with pytest.raises(ValueError, match="Expected a scalar with a finite sum, got NaN or infinity"):
        library.keep_sum(values, torch.zeros(64, dtype=torch.bool), 1.0, 1.0)


def test_safetensors_are_read(library: Library, tmp_path: Path) -> None:
    path = tmp_path / "arrays.safetensors"
    arrays = {
        "a.b": torch.arange(6.0, dtype=torch.float64).reshape(1, 2, 3),
        "x": torch.full((4,), 0.5),
        'say "so"': torch.ones(2, 2, dtype=torch.uint8),
        "none": torch.zeros(0, dtype=torch.float64),
        "one": torch.tensor(2.5, dtype=torch.float64),
    }
    save_file(arrays, path, metadata={"made by": "a, {test}"})
    lines = library.call.describe_safetensors(str(path).encode()).decode().splitlines()
    assert set(lines) == {"a.b F64 1 2 3 = 15", "x F32 4 = 2", 'say "so" U8 2 2 = 4', "none F64 0 = 0", "one F64 = 2.5"}


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    save_file({"x": torch.ones(8, dtype=torch.float64)}, tmp_path / "whole")
    return (tmp_path / "whole").read_bytes()


def lengthened(whole: bytes, old: bytes, new: bytes) -> bytes:
    """Another text in the header, and its length with it."""
    length = int.from_bytes(whole[:8], "little") + len(new) - len(old)
    return length.to_bytes(8, "little") + whole[8:].replace(old, new)


def spoilt(whole: bytes) -> Iterator[tuple[bytes, str]]:
    yield b"", "Expected a safetensors file"
    yield whole[:7], "Expected a safetensors file"
    yield b"\xff" * 8 + whole[8:], "Expected a safetensors file"
    yield whole[:30], "Expected a safetensors file"
    yield whole[:-1], "Expected the whole array 'x'"
    yield whole.replace(b"[8]", b"[9]"), "Expected the whole array 'x'"
    yield whole.replace(b"[8]", b"[-"), "Expected the header"
    yield lengthened(whole, b"[8]", b"[2305843009213693952,8,8]"), "Expected the header"
    yield lengthened(whole, b"[8]", b"[288230376151711745,8]"), "Expected the whole array 'x'"  # 2⁶⁴ + 64 bytes
    yield lengthened(whole, b"[0,64]", b"[0,99999999999999999999999]"), "Expected the header"
    yield whole.replace(b"}", b" "), "Expected the header"
    yield whole.replace(b"[0,64]", b"[64,0]"), "Expected the whole array 'x'"
    yield whole.replace(b'"dtype"', b'"dtype '), "Expected the header"


def test_spoilt_safetensors_are_refused(library: Library, whole: bytes, tmp_path: Path) -> None:
    for n, (data, words) in enumerate(spoilt(whole)):
        path = tmp_path / f"{n}.safetensors"
        path.write_bytes(data)
        assert words in library.call.describe_safetensors(str(path).encode()).decode(), n
    assert "Expected a safetensors file" in library.call.describe_safetensors(b"/nowhere").decode()


FACTS = """schema latentphys.artefact/1
family porous
interval 0.02
grid.shape 16 8 4
grid.spacing 0.1 0.2 0.3
grid.boundaries periodic periodic periodic periodic no_slip free_slip
fields 2
fields.0 velocity flux solenoidal m3/s 0 3
fields.1 salt scalar conserved kg/m3 3 1
parameters 1
parameters.0 force 3 m/s2
"""


def test_facts_are_read_and_gaps_named(library: Library, tmp_path: Path) -> None:
    path = tmp_path / "artefact.txt"
    path.write_text(FACTS)
    said = library.call.describe_artefact(str(path).encode()).decode()
    assert said == "porous 0.02 512 velocity m3/s 3 salt kg/m3 1 force 3"
    for old, new, words in (
        ("interval 0.02\n", "", "Expected a line 'interval'"),
        ("grid.shape 16 8 4", "grid.shape 16 8", "Expected 3 values after 'grid.shape'"),
        ("fields.1 salt scalar", "fields.1 salt", "Expected 6 values after 'fields.1'"),
        ("free_slip", "slippery", "got 'slippery'"),
        ("0.1 0.2", "0.1 x", "Expected 3 values after 'grid.spacing'"),
        ("schema latentphys.artefact/1\n", "", "Expected a line 'schema'"),
        ("artefact/1", "artefact/2", "of schema latentphys.artefact/1, got latentphys.artefact/2 in"),
        ("kg/m3 3 1", "kg/m3 2 1", "Expected the channels of 'salt' behind those before it, 1 of them"),
        ("m3/s 0 3", "m3/s 0 2", "Expected the channels of 'velocity' behind those before it, 3 of them"),
    ):
        path.write_text(FACTS.replace(old, new))
        assert words in library.call.describe_artefact(str(path).encode()).decode()
    assert "got none; export one first" in library.call.describe_artefact(b"/nowhere").decode()


def syntax(language: str, *arguments: str, text: str) -> subprocess.CompletedProcess[str]:
    command = [str(COMPILER), "-x", language, "-Wall", "-Wextra", "-Wpedantic", "-Werror", f"-I{include_dir()}"]
    return subprocess.run([*command, *arguments, "-fsyntax-only", "-"], input=text, capture_output=True, text=True)


def test_the_interface_is_c() -> None:
    process = syntax("c", "-std=c99", text="#include <latentphys/finish.h>\n")
    assert process.returncode == 0, process.stderr


def test_arithmetic_that_hides_nan_is_refused() -> None:
    process = syntax("c++", "-std=c++17", "-ffast-math", text="#include <latentphys/finish.hpp>\n")
    assert process.returncode != 0 and "expected IEEE arithmetic, got -ffast-math" in process.stderr
