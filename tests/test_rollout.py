"""A rollout store: exactly conservative in every frame, aligned with its reference, the same bits every time."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from small import Road, train

from latentphys import operators
from latentphys.data import Store, create_store, open_store
from latentphys.fields import VELOCITY
from latentphys.rollout import LatentStepper, rollout, rollout_store
from latentphys.training import load_dynamics
from latentphys.transformer.conditioning import latent_geometry, store_parameters

STEPS, START, TRAJECTORIES = 3, 1, [3, 1]
FAMILIES = ("open_channel", "porous")


def roll(road: Road, out: Path, family: str = "porous", reference: Store | None = None, **options: object) -> Store:
    dynamics, autoencoder = load_dynamics(road.dynamics)
    settings: dict = {"num_steps": STEPS, "trajectories": TRAJECTORIES, "start": START, "checkpoint": "c", **options}
    return open_store(rollout_store(autoencoder, dynamics, reference or road.store(family), out, **settings))


@pytest.fixture(scope="module")
def rollouts(road: Road, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Store]:
    folder = tmp_path_factory.mktemp("rollouts")
    return {family: roll(road, folder / family, family) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_aligned_with_its_reference(road: Road, rollouts: dict[str, Store], family: str) -> None:
    store, reference = rollouts[family], road.store(family)
    assert store.attributes["kind"] == "rollout"
    assert store.attributes["rollout"] == {
        "reference": str(reference.path),
        "trajectories": TRAJECTORIES,
        "start": START,
        "stride": 1,
        "checkpoint": "c",
        "num_experts": [4, 4],
        "routing": "block",
    }
    assert store.attributes["provenance"]["exact"] is True
    assert (store.family, store.grid, len(store), store.num_times) == (family, reference.grid, 2, STEPS + 1)
    assert store.array("velocity").dtype == "float64"
    np.testing.assert_array_equal(store.times, reference.times[START : START + STEPS + 1])
    assert store.attributes["parameter_units"] == reference.attributes["parameter_units"]
    for n, i in enumerate(TRAJECTORIES):
        assert torch.equal(store.geometry(n).fluid, reference.geometry(i).fluid)
        for t in range(STEPS + 1):
            now, then = store_parameters(store, n, t), store_parameters(reference, i, START + t)
            assert now.keys() == then.keys() and all(np.array_equal(now[k], then[k]) for k in now)
    store.verify()


@pytest.mark.parametrize("family", FAMILIES)
def test_mass_is_conserved_in_every_bit(rollouts: dict[str, Store], family: str) -> None:
    store = rollouts[family]
    for n in range(len(store)):
        flux = store.read("velocity", n, slice(None))
        closed = ~store.geometry(n).open_faces.expand_as(flux)
        assert (operators.div(flux, store.grid) == 0.0).all()
        assert closed.any() and (flux[closed] == 0.0).all()
        assert (flux[1:] != flux[:-1]).any((-1, -2, -3, -4)).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_frame_is_the_reconstruction(road: Road, rollouts: dict[str, Store], family: str) -> None:
    _, autoencoder = load_dynamics(road.dynamics)
    for n, i in enumerate(TRAJECTORIES):
        state = road.store(family)[i, START]
        with torch.no_grad():
            latent = autoencoder.encode(state.velocity[None], state.geometry, family)
            flux = autoencoder.decode(latent, state.geometry, family, exact=True)[0]
        assert torch.equal(rollouts[family].read("velocity", n, 0), flux)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_second_frame_is_one_step_of_the_model(road: Road, rollouts: dict[str, Store], family: str) -> None:
    dynamics, autoencoder = load_dynamics(road.dynamics)
    reference, i = road.store(family), TRAJECTORIES[0]
    stepper = LatentStepper(autoencoder, dynamics, reference.geometry(i), family)
    latent = stepper.encode(reference.read("velocity", i, START)[None])
    now, then = (store_parameters(reference, i, START + t) for t in (0, 1))
    features = latent_geometry(reference.geometry(i), autoencoder.compression)

    def step(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> torch.Tensor:
        condition = dynamics.conditioning.vector(a, b, dynamics.interval(family))[None]
        with torch.no_grad():
            return dynamics(latent[:, None], condition, features, reference.grid.periodic).latent

    assert torch.equal(rollouts[family].read("velocity", 0, 1), stepper.decode(step(now, then))[0])
    # the force of a channel is constant, so there the order does not matter
    assert torch.equal(step(then, now), step(now, then)) == (family == "open_channel")


@pytest.mark.parametrize("family", FAMILIES)
def test_routing_says_who_took_each_latent_cell(rollouts: dict[str, Store], family: str) -> None:
    array = rollouts[family].array("routing")
    assert array.shape == (2, STEPS + 1, 2, 4, 4, 4) and array.dtype == "int16"
    assert array.metadata.to_dict()["dimension_names"] == ("trajectory", "time", "layer", "px", "py", "pz")
    routing = np.asarray(array[...])
    assert (routing[:, 0] == -1).all()
    assert routing[:, 1:].min() >= 0 and routing[:, 1:].max() < 4
    assert len(np.unique(routing[:, 1:])) > 1


def test_it_is_the_same_every_time(road: Road, rollouts: dict[str, Store], tmp_path: Path) -> None:
    again = roll(road, tmp_path / "again")
    assert again.attributes["checksums"] == rollouts["porous"].attributes["checksums"]
    alone = roll(road, tmp_path / "alone", trajectories=TRAJECTORIES[1:])
    assert torch.equal(alone.read("velocity", 0, slice(None)), again.read("velocity", 1, slice(None)))


def test_several_input_frames(road: Road, tmp_path: Path) -> None:
    """The last of K given frames is frame 0, and all K enter the first step."""
    run = train("dynamics", road.inputs("dynamics"), tmp_path / "run", "dynamics.num_frames=2", "trainer.num_steps=2")
    dynamics, autoencoder = load_dynamics(run)
    reference = road.store("porous")
    store = open_store(
        rollout_store(autoencoder, dynamics, reference, tmp_path / "out", num_steps=2, trajectories=[0], start=1)
    )
    assert store.times.tolist() == reference.times[1:4].tolist()
    stepper = LatentStepper(autoencoder, dynamics, reference.geometry(0), "porous")
    frames = reference.read("velocity", 0, slice(0, 2))[None]
    parameters = [store_parameters(reference, 0, t) for t in range(4)]

    def latents(given: torch.Tensor) -> Iterator[torch.Tensor]:
        return (frame.latent for frame in rollout(stepper, given, lambda n: [parameters[1 + n]], 2))

    for t, latent in enumerate(latents(frames)):
        assert torch.equal(store.read("velocity", 0, t), stepper.decode(latent)[0])
    other = list(latents(frames[:, [1, 1]]))
    assert torch.equal(other[0], next(latents(frames))) and not torch.equal(other[1], list(latents(frames))[1])
    with pytest.raises(ValueError, match="Expected a start and steps within the 6 snapshots"):
        rollout_store(autoencoder, dynamics, reference, tmp_path / "bad", num_steps=1, trajectories=[0], start=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 5}, "within the 6 snapshots of .*porous.zarr .*got 5 steps of 1 snapshots from snapshot 1"),
        ({"num_steps": 0}, "got 0 steps"),
        ({"start": -1}, "from snapshot -1"),
        ({"trajectories": [4]}, r"trajectories from 0 to 3 of .*porous.zarr, got \[4\]"),
        ({"trajectories": [-1]}, r"trajectories from 0 to 3 of .*porous.zarr, got \[-1\]"),
        ({"trajectories": []}, r"trajectories from 0 to 3 of .*porous.zarr, got \[\]"),
    ],
)
def test_what_the_reference_does_not_have_is_refused(road: Road, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        roll(road, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def with_times(reference: Store, path: Path, times: np.ndarray) -> Store:
    with create_store(
        path,
        grid=reference.grid,
        specs={"velocity": VELOCITY},
        family=reference.family,
        num_trajectories=1,
        times=times,
        solid=~reference.geometry(0).fluid[None],
    ) as out:
        for t in range(len(times)):
            out.write("velocity", 0, t, reference.read("velocity", 0, t % reference.num_times))
    return open_store(path)


def test_snapshots_are_matched_to_the_interval(road: Road, tmp_path: Path) -> None:
    reference, dt = road.store("porous"), 0.02
    fine = with_times(reference, tmp_path / "fine", np.arange(6) * dt / 2)
    store = roll(road, tmp_path / "out", reference=fine, num_steps=2, trajectories=[0])
    assert store.attributes["rollout"]["stride"] == 2
    np.testing.assert_allclose(store.times, [0.01, 0.03, 0.05])
    for name, times in (("coarse", np.arange(6) * dt * 2), ("odd", np.arange(6) * dt / 1.5)):
        other = with_times(reference, tmp_path / name, times)
        with pytest.raises(ValueError, match=r"whose distance divides the model's interval of 0.02 s, got 0.0[14]"):
            roll(road, tmp_path / "bad", reference=other, num_steps=1, trajectories=[0])
    uneven = with_times(reference, tmp_path / "uneven", np.array([0, 1, 2, 4, 5, 6]) * dt)
    with pytest.raises(ValueError, match="at even distances, got 0.02 to 0.04 s"):
        roll(road, tmp_path / "bad", reference=uneven, num_steps=1, trajectories=[0])


def test_the_reference_is_never_overwritten(road: Road) -> None:
    with pytest.raises(ValueError, match="another path than the store's own"):
        roll(road, road.fields["porous"], overwrite=True)
    road.store("porous").verify()


def test_a_failed_rollout_leaves_nothing(road: Road, tmp_path: Path) -> None:
    reference = Path(shutil.copytree(road.fields["porous"], tmp_path / "broken"))
    zarr.open_array(str(reference / "velocity"), mode="r+")[TRAJECTORIES[1], START] = np.nan
    with pytest.raises(ValueError, match="Expected a finite flux, got .* NaN or infinite values"):
        roll(road, tmp_path / "out", reference=open_store(reference))
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]
    with pytest.raises(ValueError, match=r"a family of \['open_channel', 'porous'\], got 'pipe'"):
        dynamics, autoencoder = load_dynamics(road.dynamics)
        LatentStepper(autoencoder, dynamics, open_store(reference).geometry(0), "pipe")
    with pytest.raises(ValueError, match=r"a family of \['open_channel', 'porous'\], got 'pipe'"):
        dynamics.interval("pipe")
