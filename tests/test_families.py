"""Families of flows: packs of spheres, draws, first states, and the data sets made of them."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

from latentphys import operators
from latentphys.data import open_store
from latentphys.families import Family, OpenChannel, Porous, simulate
from latentphys.families.channel import reichardt
from latentphys.families.porous import sphere_pack
from latentphys.grid import Geometry, Grid


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
    """Against a periodic k-d tree; the pack is as dense as asked for, by less than the last ball."""
    grid, diameter, porosity = Grid((20, 24, 16), (0.05, 0.05, 0.05)), 0.35, 0.75
    rng, lengths = Recorder(3), np.array(grid.lengths)
    solid = sphere_pack(grid, porosity, diameter, rng, overlap=overlap)
    kept: list[np.ndarray] = []
    for centre in (proposal * lengths for proposal in rng.proposed):
        if not kept or cKDTree(kept, boxsize=lengths).query(centre)[0] >= (1 - overlap) * diameter:
            kept.append(centre)
    at = np.stack(np.meshgrid(*((np.arange(n) + 0.5) * 0.05 for n in grid.shape), indexing="ij"), axis=-1)
    assert np.array_equal(solid, cKDTree(kept, boxsize=lengths).query(at)[0] < diameter / 2)
    ball = math.pi / 6 * diameter**3 / math.prod(grid.lengths)
    assert porosity - 1.1 * ball < 1 - solid.mean() <= porosity
    if overlap == 0.0:
        assert solid.mean() == pytest.approx(len(kept) * ball, rel=0.03)


def test_a_pack_that_cannot_be_says_so() -> None:
    grid = Grid((16, 16, 16), (1 / 16,) * 3)
    message = (
        r"porosity of 0.20 with spheres of diameter 0.4 m, stopped at 0.\d\d after 50 placements; allow more overlap"
    )
    with pytest.raises(ValueError, match=message):
        sphere_pack(grid, 0.2, 0.4, np.random.default_rng(0), overlap=0.0, tries=50)


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        (OpenChannel, {"lengths": (1.0, 1.0, 2.0)}, "Expected a depth of 1 .* got 2.0"),
        (
            OpenChannel,
            {"reynolds": (200.0, 100.0)},
            r"range of Re_τ, two numbers with 0 < a ≤ b < inf, got \[200.0, 100.0\]",
        ),
        (OpenChannel, {"reynolds": (100.0,)}, r"range of Re_τ, two numbers with .* got \[100.0\]"),
        (Porous, {"porosity": (0.1, 0.5)}, r"range of porosities, two numbers with 0.2 < a ≤ b < 1, got \[0.1, 0.5\]"),
        (
            Porous,
            {"diameter": (0.3, 1.0)},
            r"range of sphere diameters, two numbers with 0 < a ≤ b < 1, got \[0.3, 1.0\]",
        ),
        (Porous, {"reynolds": (0.0, 1.0)}, "Expected a range of Re, two numbers with 0 < a ≤ b < inf, got"),
    ],
)
def test_impossible_families_are_refused(family: type, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        family(**arguments)


FAMILIES = [OpenChannel(reynolds=(150.0, 210.0), spin_up=0.01), Porous(spin_up=0.01)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trajectory_depends_on_the_seed_and_its_index_alone(family: Family) -> None:
    grid = family.grid((8, 8, 8))

    def drawn(seed: int, trajectory: int) -> list[np.ndarray]:
        parameters = family.draw(seed, trajectory)
        solid = family.solid(grid, parameters, seed, trajectory)
        geometry = Geometry(grid, None if solid is None else torch.from_numpy(solid))
        first = family.initial(geometry, parameters, seed, trajectory).numpy()
        return [*(np.asarray(p) for p in parameters.values()), geometry.fluid.numpy(), first]

    same = zip(drawn(5, 2), drawn(5, 2), strict=True)
    assert all(np.array_equal(a, b) for a, b in same)
    for other in (drawn(5, 3), drawn(6, 2)):
        assert not np.array_equal(drawn(5, 2)[0], other[0]) and not np.array_equal(drawn(5, 2)[-1], other[-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_state_is_an_admissible_flow_of_the_family(family: Family) -> None:
    grid, parameters = family.grid((8, 10, 12)), family.draw(0, 0)
    solid = family.solid(grid, parameters, 0, 0)
    geometry = Geometry(grid, None if solid is None else torch.from_numpy(solid))
    flux = family.initial(geometry, parameters, 0, 0)
    u = operators.velocity(flux, grid)
    assert float(operators.div(flux, grid).abs().amax()) < 1e-9 * float(flux.abs().amax())
    assert bool((flux[~geometry.open_faces] == 0.0).all())
    if isinstance(family, OpenChannel):
        z = (torch.arange(12, dtype=torch.float64) + 0.5) / 12
        u[0] -= reichardt(z / parameters["viscosity"])
    speed = float(u.square().sum(0)[geometry.fluid].mean().sqrt())
    assert speed == pytest.approx(family.disturbance, rel=1e-6)  # type: ignore[attr-defined]


def test_the_force_of_the_porous_family_has_its_mean_and_amplitude() -> None:
    family = Porous(pulsation=0.5)
    parameters = {name: np.array([value]) for name, value in family.draw(1, 0).items()}
    force = np.stack([family.force(parameters, t)[0] for t in np.arange(64) / 64 * family.period])
    np.testing.assert_allclose(force.mean(0), parameters["force_mean"][0], rtol=0, atol=1e-9)
    rms = np.sqrt((force - force.mean(0)).__pow__(2).sum(1).mean())
    assert rms == pytest.approx(0.5 * np.linalg.norm(parameters["force_mean"][0]))
    still = Porous(pulsation=0.0)
    assert np.array_equal(still.force(parameters | {"force_amplitude": np.zeros(1)}, 0.3), parameters["force_mean"])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_data_set_is_exact_reproducible_and_says_where_it_comes_from(family: Family, tmp_path: Path) -> None:
    done: list[int] = []

    def made(name: str, batch_size: int) -> Path:
        return simulate(
            family,
            tmp_path / name,
            shape=(8, 6, 10),
            num_trajectories=3,
            num_frames=3,
            seed=7,
            batch_size=batch_size,
            provenance={"note": "x"},
            progress=done.append,
        )

    store, again, singly = (open_store(made(*arguments)) for arguments in (("a", 2), ("b", 2), ("c", 1)))
    assert store.family == family.name and len(store) == 3 and sum(done) == 3 * 9
    provenance = store.attributes["provenance"]
    assert provenance["seed"] == 7 and provenance["exact"] is True and provenance["note"] == "x"
    np.testing.assert_allclose(store.times, np.arange(3) * family.interval)
    assert store.parameters["force"].shape == (3, 3, 3) and store.parameters["viscosity"].shape == (3,)
    for i in range(3):
        flux, geometry = store.read("velocity", i, slice(None)), store.geometry(i)
        assert flux.dtype == torch.float64 and float(flux.abs().amax()) > 0
        assert bool((operators.div(flux, store.grid) == 0.0).all())
        assert bool((flux[:, ~geometry.open_faces] == 0.0).all())
        assert torch.equal(flux, again.read("velocity", i, slice(None)))
        # Trajectories of a batch share Δt: the physics is the same, the last bits are not.
        assert torch.equal(geometry.fluid, singly.geometry(i).fluid)
        other = singly.read("velocity", i, slice(None))
        torch.testing.assert_close(flux, other, rtol=0, atol=0.02 * float(flux.abs().amax()))
        drawn = family.draw(7, i)
        assert float(store.parameters["viscosity"][i]) == drawn["viscosity"]
    with pytest.raises(
        ValueError, match=r"Expected a new path, got .*, which exists; choose another name or overwrite"
    ):
        made("a", 2)


def test_a_data_set_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected ≥ 1 trajectory of ≥ 2 frames in batches of ≥ 1, got 1 of 1"):
        simulate(OpenChannel(), tmp_path / "a", shape=(4, 4, 4), num_trajectories=1, num_frames=1)
    assert not (tmp_path / "a").exists()
