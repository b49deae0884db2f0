"""Porous media and the flow through them: packs, random fields, windows of images, pores that lead through, Darcy."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from latentphys import operators
from latentphys.configuration import compose
from latentphys.data import open_store
from latentphys.families import NavierStokes, Porous, simulate
from latentphys.families.media import (
    Image,
    Medium,
    RandomField,
    Spheres,
    carries_flow,
    gaussian_field,
    sphere_pack,
)
from latentphys.grid import Geometry, Grid
from latentphys.training.models import build


def cube(n: int) -> Grid:
    return Grid((n, n, n), (1 / n,) * 3)


class Recorder(np.random.Generator):
    """Random numbers that remember the centres they proposed."""

    def __init__(self, seed: int) -> None:
        super().__init__(np.random.PCG64(seed))
        self.proposed: list[np.ndarray] = []

    def random(self, *args: object, **kwargs: object) -> np.ndarray:  # type: ignore[override]
        self.proposed.append(super().random(*args, **kwargs))  # type: ignore[call-overload]
        return self.proposed[-1]


@pytest.mark.parametrize("overlap", [0.0, 0.15])
def test_a_pack_is_the_balls_that_kept_their_distance(overlap: float) -> None:
    """Against a periodic k-d tree: all balls but the last are whole; the porosity is met to a voxel."""
    grid, diameter, porosity = Grid((20, 24, 16), (0.05, 0.05, 0.05)), 0.35, 0.75
    rng, lengths = Recorder(3), np.array(grid.lengths)
    solid = sphere_pack(grid, porosity, diameter, rng, overlap=overlap)
    kept: list[np.ndarray] = []
    for centre in (proposal * lengths for proposal in rng.proposed):
        if not kept or cKDTree(kept, boxsize=lengths).query(centre)[0] >= (1 - overlap) * diameter:
            kept.append(centre)
    at = np.stack(np.meshgrid(*((np.arange(n) + 0.5) * 0.05 for n in grid.shape), indexing="ij"), axis=-1)
    whole = np.asarray(cKDTree(kept[:-1], boxsize=lengths).query(at)[0]) < diameter / 2
    last = np.asarray(cKDTree(kept[-1:], boxsize=lengths).query(at)[0])
    rest = solid & ~whole
    assert not (whole & ~solid).any() and rest.sum() > 0 and last[rest].max() < diameter / 2
    assert last[rest].max() <= last[~solid].min()  # a smaller ball about the same centre
    assert 0 <= porosity - (1 - solid.mean()) < 1 / grid.num_cells
    if overlap == 0.0:
        ball = math.pi / 6 * diameter**3 / math.prod(grid.lengths)
        assert whole.mean() == pytest.approx((len(kept) - 1) * ball, rel=0.03)


def test_a_pack_that_cannot_be_says_so() -> None:
    message = (
        r"porosity of 0.20 with spheres of diameter 0.4 m, stopped at 0.\d\d after 50 placements; allow more overlap"
    )
    with pytest.raises(ValueError, match=message):
        sphere_pack(cube(16), 0.2, 0.4, np.random.default_rng(0), overlap=0.0, tries=50)


def surface(solid: np.ndarray) -> float:
    """Surface per volume of a box of side 1 m [1/m]: voxel faces, of which a surface of every direction has 3/2."""
    n = len(solid)
    return 2 / 3 * n * sum(float((solid ^ np.roll(solid, 1, axis)).mean()) for axis in range(3))


def test_the_random_field_has_its_covariance_and_shows_on_every_grid() -> None:
    ell, n = 0.08, 24
    fields = np.stack([gaussian_field((n, n, n), ell, np.random.default_rng(i)) for i in range(24)])
    assert fields.var() == pytest.approx(1.0, abs=0.12) and abs(float(fields.mean())) < 1e-12
    for axis in (1, 2, 3):
        covariance = float((fields * np.roll(fields, 3, axis)).mean())
        assert covariance == pytest.approx(math.exp(-((3 / n) ** 2) / (2 * ell**2)), abs=0.06)
    # cells of the coarse grid have their centres where every third of the fine one has its own
    fine = gaussian_field((3 * n, n, 3 * n), ell, np.random.default_rng(5))
    np.testing.assert_allclose(fine[1::3, :, 1::3], fields[5], rtol=0, atol=1e-12)


@pytest.mark.parametrize("porosity", [0.3, 0.5, 0.7])
def test_a_level_set_has_its_porosity_and_the_surface_of_rices_formula(porosity: float) -> None:
    medium, grid = RandomField((porosity, porosity), (0.06, 0.06)), cube(48)
    drawn = medium.draw(np.random.default_rng(0))
    solids = [medium.solid(grid, drawn, np.random.default_rng(i)) for i in range(4)]
    assert all(abs(1 - s.mean() - porosity) <= 1 / grid.num_cells for s in solids)
    found = np.mean([surface(s) for s in solids])
    assert 6 * (1 - porosity) / drawn["diameter"] == pytest.approx(found, rel=0.05)


def test_what_leads_through_a_sample() -> None:
    grid, open_box = cube(6), np.zeros((6, 6, 6), dtype=bool)
    assert carries_flow(grid, open_box) and not carries_flow(grid, ~open_box)
    wall = open_box.copy()
    wall[:, 2] = True
    assert not carries_flow(grid, wall)
    pipes = ~open_box
    pipes[:, 1, 1] = pipes[1, :, 1] = False
    assert not carries_flow(grid, pipes)
    pipes[1, 1, :] = False
    assert carries_flow(grid, pipes)
    # three pipes that never meet: each axis has a way through, but no pore space has all
    apart = ~open_box
    apart[:, 0, 0] = apart[2, :, 2] = apart[4, 4, :] = False
    assert not carries_flow(grid, apart)
    # a pipe that comes in elsewhere than it left, and closes after three turns round the box
    screw = ~open_box
    for i in range(6):
        screw[i, i, 3] = screw[i, (i + 1) % 6, 3] = False
    screw[1, 1, :] = False
    assert not carries_flow(grid, screw)
    screw[1, :, 3] = False
    assert carries_flow(grid, screw)


class Stubborn(Medium):
    """Blocked so many times before it lets anything through."""

    def __init__(self, blocked: int) -> None:
        self.blocked, self.made = blocked, 0

    def draw(self, rng: np.random.Generator) -> dict[str, Any]:
        return {"porosity": 0.5, "diameter": 0.3}

    def solid(self, grid: Grid, parameters: Mapping[str, Any], rng: np.random.Generator) -> np.ndarray:
        solid = rng.random(grid.shape) < 0.02
        self.made += 1
        if self.made <= self.blocked:
            solid[2] = True
        return solid


def test_a_blocked_medium_is_drawn_anew_and_in_the_end_refused() -> None:
    medium = Stubborn(3)
    family = Porous(medium=medium)
    solid = family.solid(cube(8), family.draw(0, 0), 0, 0)
    assert medium.made == 4 and carries_flow(cube(8), solid)
    message = r"got none in 20 media of porosity 0.50 on \(8, 8, 8\) cells; choose a finer grid or a higher"
    blocked = Porous(medium=Stubborn(100))
    with pytest.raises(ValueError, match=message):
        blocked.solid(cube(8), blocked.draw(0, 0), 0, 0)


@pytest.fixture(scope="module")
def rock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image of 20 × 24 × 28 voxels, 7 in pores and 0 elsewhere, no axis like another."""
    path = tmp_path_factory.mktemp("rock") / "rock.npy"
    field = gaussian_field((20, 24, 28), 0.12, np.random.default_rng(3))
    np.save(path, np.where(field < 0.3, 7, 0).astype(np.uint8))
    return path


def test_a_window_is_a_part_of_the_image_made_periodic(rock: Path) -> None:
    voxels = np.load(rock) != 7
    plain = Image(str(rock), pore=7, window=16, mirrored=False)
    np.testing.assert_array_equal(plain.cut((3, 5, 7)), voxels[3:19, 5:21, 7:23])
    np.testing.assert_array_equal(plain.cut((18, 0, 0))[:4], voxels[[18, 19, 0, 1], :16, :16])
    mirrored = Image(str(rock), pore=7, window=16)
    cut = mirrored.cut((3, 5, 7))
    np.testing.assert_array_equal(cut[:8, :8, :8], voxels[3:11, 5:13, 7:15])
    for axis in range(3):
        np.testing.assert_array_equal(cut, np.flip(cut, axis))
    np.testing.assert_array_equal(mirrored.cut((17, 0, 0))[:6, 0, 0], voxels[[17, 18, 19, 19, 18, 17], 0, 0])


@pytest.mark.parametrize("mirrored", [False, True])
def test_windows_are_drawn_with_their_own_porosity_and_cut_into_any_grid(rock: Path, mirrored: bool) -> None:
    medium = Image(str(rock), pore=7, window=16, mirrored=mirrored)
    drawn = [medium.draw(np.random.default_rng(i)) for i in range(4)]
    assert len({tuple(d["origin"]) for d in drawn}) == 4
    for d in drawn:
        rng = np.random.default_rng(0)
        solid = medium.solid(cube(16), d, rng)
        np.testing.assert_array_equal(solid, medium.cut(d["origin"]))
        assert d["porosity"] == pytest.approx(1 - solid.mean()) and carries_flow(cube(16), solid)
        assert 6 * solid.mean() / d["diameter"] == pytest.approx(surface(solid))
        np.testing.assert_array_equal(medium.solid(cube(32), d, rng), solid.repeat(2, 0).repeat(2, 1).repeat(2, 2))
        coarse = solid.reshape(8, 2, 8, 2, 8, 2).mean((1, 3, 5)) >= 0.5
        np.testing.assert_array_equal(medium.solid(cube(8), d, rng), coarse)


def test_impossible_media_are_refused(rock: Path, tmp_path: Path, unchecked: None) -> None:
    np.save(tmp_path / "slot.npy", np.tile([[[1, 0, 0, 0]]], (8, 8, 2)).astype(np.uint8))
    for make, message in (
        (
            lambda: Spheres(porosity=(0.1, 0.5)),
            r"range of porosities, two numbers with 0.2 < a ≤ b < 1, got \[0.1, 0.5\]",
        ),
        (lambda: Spheres(diameter=(0.3, 1.0)), r"range of sphere diameters, .* 0 < a ≤ b < 1, got \[0.3, 1.0\]"),
        (lambda: Spheres(overlap=1.0), "overlap of spheres in 0 … 1, got 1.0"),
        (lambda: RandomField(porosity=(0.5, 1.0)), "range of porosities, two numbers with 0.1 < a ≤ b < 1"),
        (lambda: RandomField(correlation=(0.0, 0.1)), "range of correlation lengths, .* with 0.01 < a ≤ b < 0.5"),
        (lambda: Image(), r"Expected the path of an image, got none; add family.medium.path="),
        (lambda: Image("a.npy", window=15), "window of at least 4 voxels, an even number where it is mirrored, got 15"),
        (lambda: Porous(medium="spheres"), "Expected a medium: Spheres, RandomField or Image, got 'spheres'"),  # type: ignore[arg-type]
        (lambda: Porous(velocity=0.0), r"Expected a finite superficial velocity \[m/s\] > 0, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"Expected pores in .*rock.npy, got none of value 3; it holds 0 .* 7"):
        Image(str(rock), pore=3, window=16).draw(rng)
    with pytest.raises(ValueError, match=r"lead through a window of 8 voxels of .*slot.npy, got none in 20 windows"):
        Image(str(tmp_path / "slot.npy"), pore=1, window=8).draw(rng)


@pytest.mark.parametrize("medium", ["spheres", "field", "image"])
def test_every_medium_makes_a_data_set_that_knows_its_porosity(medium: str, rock: Path, tmp_path: Path) -> None:
    overrides = [f"family.medium.path={rock}", "family.medium.pore=7", "family.medium.window=10"]
    config = compose(
        "simulate", ["family=porous", f"family/medium={medium}", *(overrides if medium == "image" else [])]
    )
    family = build({**config["family"], "spin_up": 0.005, "interval": 0.005})
    store = open_store(simulate(family, tmp_path / "a", shape=(10, 10, 10), num_trajectories=3, num_frames=2))
    assert set(store.parameters) == {"viscosity", "porosity", "force"}
    porosity = [float(store.geometry(i).fluid.double().mean()) for i in range(3)]
    np.testing.assert_allclose(store.parameters["porosity"], porosity, rtol=0, atol=1.01e-3)
    assert len(set(porosity)) == 3
    for i in range(3):
        flux = store.read("velocity", i, slice(None))
        assert bool((operators.div(flux, store.grid) == 0.0).all()) and float(flux.abs().amax()) > 0


def test_the_force_has_its_mean_and_amplitude() -> None:
    family = Porous(pulsation=0.5)
    parameters = {name: np.array([value]) for name, value in family.draw(1, 0).items()}
    force = np.stack([family.force(parameters, t)[0] for t in np.arange(64) / 64 * family.period])
    np.testing.assert_allclose(force.mean(0), parameters["force_mean"][0], rtol=0, atol=1e-9)
    rms = np.sqrt((force - force.mean(0)).__pow__(2).sum(1).mean())
    assert rms == pytest.approx(0.5 * np.linalg.norm(parameters["force_mean"][0]))
    still = Porous(pulsation=0.0)
    assert np.array_equal(still.force(parameters | {"force_amplitude": np.zeros(1)}, 0.3), parameters["force_mean"])


def test_stokes_flow_is_the_same_problem_with_slower_flow() -> None:
    """The same viscosity and medium; force and disturbance in proportion to U."""
    fast, slow = Porous(), Porous(velocity=1e-3, reynolds=(0.01, 0.04))
    p, q = fast.draw(0, 0), slow.draw(0, 0)
    assert q["viscosity"] == pytest.approx(p["viscosity"]) and q["porosity"] == p["porosity"]
    np.testing.assert_allclose(q["force_mean"], 1e-3 * p["force_mean"], rtol=1e-12)
    geometry = Geometry(cube(8), torch.from_numpy(fast.solid(cube(8), p, 0, 0)))
    first, first_slow = (f.initial(geometry, p, 0, 0)["velocity"] for f in (fast, slow))
    torch.testing.assert_close(first_slow, 1e-3 * first)


def steady_flow(solid: np.ndarray, viscosity: Tensor, force: Tensor) -> Tensor:
    """Superficial velocity (B, 3) [m/s] that forces (B, 3) drive, by time steps until nothing changes."""
    grid = cube(len(solid))
    geometry = Geometry(grid, torch.from_numpy(solid).expand(len(force), *solid.shape))
    solver = NavierStokes(geometry, viscosity, lambda t: force, dtype=torch.float64, tol=1e-4)
    fields, flow = {"velocity": torch.zeros(len(force), 3, *grid.shape, dtype=torch.float64)}, [torch.zeros_like(force)]
    while len(flow) < 2 or float(((flow[-1] - flow[-2]).norm(dim=1) / flow[-1].norm(dim=1)).amax()) > 1e-4:
        fields = solver.advance(fields, 0.0, 0.01)
        flow.append(operators.mean_velocity(fields["velocity"], grid))
        assert len(flow) < 100
    return flow[-1]


def test_darcys_law_and_what_inertia_makes_of_it(unchecked: None) -> None:
    """k = νU/f: one symmetric positive tensor for every small force and every viscosity; less for a large force."""
    field = gaussian_field((8, 8, 8), 0.12, np.random.default_rng(1))
    solid = field > np.quantile(field, 0.6)
    assert carries_flow(cube(8), solid)
    unit = torch.eye(3, dtype=torch.float64)
    strength = torch.tensor([1e-2, 1e-2, 1e-2, 1.0, 3.0, 3e3, 1e4, 3e4]).double()
    direction = torch.cat([unit, unit[:1].expand(5, 3)])
    viscosity = torch.tensor([1.0, 1.0, 1.0, 1.0, 3.0, 1.0, 1.0, 1.0]).double()
    flow = steady_flow(solid, viscosity, strength[:, None] * direction)
    tensor = flow[:3] / 1e-2
    torch.testing.assert_close(tensor, tensor.T, rtol=0, atol=1e-3 * float(tensor.amax()))
    assert bool((torch.linalg.eigvalsh(tensor) > 0).all())
    assert float((tensor - tensor.diag().diag()).abs().amax()) > 1e-2 * float(tensor.amax())  # and not diagonal
    permeability = viscosity * flow[:, 0] / strength
    for linear in (permeability[3], permeability[4]):  # a hundred times the force, three times the viscosity
        assert float(linear / permeability[0]) == pytest.approx(1.0, abs=1e-3)
    # Inertia costs more the faster the flow, f/U − ν/k ∝ U² while it is weak and ∝ U in the end (Forchheimer).
    loss, speed = (1 / permeability - 1 / permeability[0])[5:].log(), flow[5:, 0].log()
    exponents = (loss.diff() / speed.diff()).tolist()
    assert 2.2 > exponents[0] > exponents[1] > 1.0, exponents
