"""Δt, parameters and geometry enter the dynamics model as numbers of order one, in closed form."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import box, random_flux

from latentphys.data import Store, create_store, open_store
from latentphys.fields import VELOCITY
from latentphys.grid import Geometry
from latentphys.transformer.conditioning import Conditioning, Parameter, latent_geometry, store_parameters

FORCE = np.arange(12.0).reshape(2, 3, 2) ** 2
GRID = box("periodic", (2, 2, 2))


def store(path: Path, **parameters: np.ndarray) -> Store:
    with create_store(
        path,
        grid=GRID,
        specs={"velocity": VELOCITY},
        family=path.name,
        num_trajectories=2,
        times=[0.0, 0.1, 0.2],
        parameters=parameters,
    ) as out:
        for i in range(2):
            out.write("velocity", i, slice(None), random_flux(GRID, 3))
    return open_store(path)


@pytest.fixture
def stores(tmp_path: Path) -> list[Store]:
    """One with all kinds of parameter, one with fewer."""
    a = store(tmp_path / "a", viscosity=np.array([0.01, 0.1]), angle=np.array([[-1.0, 2.0], [3.0, 2.0]]), force=FORCE)
    return [a, store(tmp_path / "b", viscosity=np.array([1.0, 10.0]), tilt=np.array([-0.5, 0.5]))]


def test_scales_are_mean_and_spread_over_all_stores(stores: list[Store]) -> None:
    fitted = {p.name: p for p in Conditioning.fit(stores).parameters}
    assert list(fitted) == ["angle", "force", "tilt", "viscosity"]
    logs = np.log([0.01, 0.1, 1.0, 10.0])
    viscosity = fitted["viscosity"]
    assert (viscosity.size, viscosity.varying, viscosity.logarithmic) == (1, False, True)
    np.testing.assert_allclose([viscosity.mean, viscosity.std], [[logs.mean()], [logs.std()]])
    assert not fitted["tilt"].logarithmic  # of both signs
    assert fitted["angle"].mean == [1.0, 2.0] and fitted["angle"].std == [2.0, 1.0]  # a constant is not divided by 0
    force = fitted["force"]
    assert (force.size, force.varying, force.logarithmic) == (2, True, False)
    np.testing.assert_allclose(force.mean, FORCE.reshape(-1, 2).mean(0))


def test_the_vector_in_closed_form(stores: list[Store]) -> None:
    """log Δt / 5, then by name: a constant once, a varying one now and then; what a family lacks as its mean, 0."""
    conditioning = Conditioning.fit(stores)
    assert conditioning.num_channels == 1 + 2 + 2 * 2 + 1 + 1
    now, then = (store_parameters(stores[0], 1, t) for t in (0, 2))
    mean, std = FORCE.reshape(-1, 2).mean(0), FORCE.reshape(-1, 2).std(0)
    logs = np.log([0.01, 0.1, 1.0, 10.0])
    expected = [
        math.log(0.1) / 5,
        *(1.0, 0.0),
        *((FORCE[1, 0] - mean) / std),
        *((FORCE[1, 2] - mean) / std),
        0.0,
        (np.log(0.1) - logs.mean()) / logs.std(),
    ]
    vector = conditioning.vector(now, then, 0.1)
    assert vector.dtype == torch.float32
    np.testing.assert_allclose(vector.numpy(), expected, rtol=1e-6, atol=1e-7)


def test_a_state_says_the_same_as_the_store(stores: list[Store]) -> None:
    conditioning = Conditioning.fit(stores)
    by_state = [stores[0][1, t].parameters for t in (0, 2)]
    by_store = [store_parameters(stores[0], 1, t) for t in (0, 2)]
    assert torch.equal(
        conditioning.vector(by_state[0], by_state[1], 0.1), conditioning.vector(by_store[0], by_store[1], 0.1)
    )


def test_json_and_back_is_bit_equal(stores: list[Store]) -> None:
    conditioning = Conditioning.fit(stores)
    copy = Conditioning.from_dict(json.loads(json.dumps(conditioning.to_dict())))
    assert copy == conditioning
    assert Conditioning.from_dict(Conditioning([]).to_dict()).vector({}, {}, 1.0).tolist() == [0.0]


def test_misuse_is_refused(stores: list[Store], tmp_path: Path) -> None:
    conditioning = Conditioning.fit(stores)
    with pytest.raises(ValueError, match=r"parameters among \['angle', .*, got 'viscocity'; the model knows no other"):
        conditioning.vector({"viscocity": 0.1}, {}, 0.1)
    with pytest.raises(ValueError, match="parameter 'angle' of size 2, got 3 numbers"):
        conditioning.vector({"angle": [1.0, 2.0, 3.0]}, {}, 0.1)
    with pytest.raises(ValueError, match=r"a positive parameter 'viscosity', got \[0.0\]"):
        conditioning.vector({"viscosity": 0.0}, {}, 0.1)
    other = store(tmp_path / "c", angle=np.array([1.0, 2.0]))
    with pytest.raises(ValueError, match=r"parameter 'angle' of one size in all stores, got \[1, 2\]"):
        Conditioning.fit([stores[0], other])


@pytest.mark.parametrize("value", [3.0, np.float32(3.0), np.array([3.0]), torch.tensor(3.0), torch.tensor([3])])
def test_numbers_of_any_kind_are_taken(value: object) -> None:
    assert Parameter("x", 1, False, False, [1.0], [4.0]).scaled(value).tolist() == [0.5]


def test_latent_geometry_is_the_mean_of_each_octant() -> None:
    grid = box("channel", (8, 4, 4))
    solid = torch.zeros(grid.shape, dtype=torch.bool)
    solid[4:6, :2, 2:] = True  # one octant of the second latent cell: x low, y low, z high
    where = Geometry(grid, solid)
    features = latent_geometry(where, 4)
    assert features.shape == (1, 16, 2, 1, 1)
    fluid, distance = features[0, :8, :, 0, 0], features[0, 8:, :, 0, 0]
    assert fluid[:, 0].tolist() == [1.0] * 8
    assert fluid[:, 1].tolist() == [1.0, 0.0] + [1.0] * 6
    octant = where.wall_distance[:2, 2:, :2].mean() * 2 / min(grid.lengths)
    assert distance[2, 0].item() == pytest.approx(float(octant))
