"""Fields are normalised once, at the boundary of the autoencoder, by scales of the training trajectories alone.

A flow in units eight times smaller has numbers eight times larger, and nothing else may change: latents stay as they
are, bit for bit, and every flux that comes back is eight times as large. A second normalisation, or one that is left
out, in training, encoding, rollout or surrogate would show.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small import NUM_TRAJECTORIES, Road, train

from latentphys import operators
from latentphys.autoencoders import Autoencoder, FieldScale
from latentphys.data import Store, compute_statistics, create_store, open_store
from latentphys.rollout import rollout_store
from latentphys.surrogate import Models, Surrogate
from latentphys.training import encode_store, load_autoencoder, load_dynamics
from latentphys.training.checkpoint import open_checkpoint
from latentphys.transformer.dynamics import Dynamics

FAMILY = "open_channel"
TRAINING = list(range(NUM_TRAJECTORIES - 1))


def copied(store: Store, path: Path, flux: Callable[[int], float], parameter: Callable[[int], float]) -> Path:
    """The same store with the fluxes and the parameters of each trajectory times a factor."""
    factors = torch.tensor([parameter(i) for i in range(len(store))]).numpy()
    solid = np.asarray(store.array("solid")[...]) if "solid" in store.attributes["checksums"] else None
    with create_store(
        path,
        grid=store.grid,
        specs=store.specs,
        family=store.family,
        num_trajectories=len(store),
        times=store.times,
        parameters={name: (values.T * factors).T for name, values in store.parameters.items()},
        solid=solid,
    ) as out:
        for i in range(len(store)):
            out.write("velocity", i, slice(None), store.read("velocity", i, slice(None)) * flux(i))
    return path


@dataclass(frozen=True)
class Chain:
    """Everything that follows from one field store."""

    store: Store
    autoencoder: Autoencoder
    latents: Store
    dynamics: Dynamics
    rollout: Store
    runs: tuple[Path, Path]


def chain(store: Store, folder: Path) -> Chain:
    autoencoder = train("autoencoder", [store.path], folder / "autoencoder", "trainer.num_steps=2")
    latents = encode_store(load_autoencoder(autoencoder), store, folder / "latent.zarr", checkpoint=str(autoencoder))
    dynamics = train("dynamics", [latents], folder / "dynamics", "trainer.num_steps=2")
    model, coder = load_dynamics(dynamics)
    rolled = rollout_store(coder, model, store, folder / "rollout.zarr", num_steps=2, trajectories=[0, 3])
    return Chain(store, coder, open_store(latents), model, open_store(rolled), (autoencoder, dynamics))


@pytest.fixture(scope="module")
def plain(road: Road, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    folder = tmp_path_factory.mktemp("plain")
    store = road.store(FAMILY)
    return chain(open_store(copied(store, folder / "a.zarr", lambda i: 1.0, lambda i: 1.0)), folder)


@pytest.fixture(scope="module")
def eightfold(plain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    folder = tmp_path_factory.mktemp("eightfold")
    return chain(open_store(copied(plain.store, folder / "a.zarr", lambda i: 8.0, lambda i: 1.0)), folder)


def all_of(store: Store, name: str) -> torch.Tensor:
    return torch.stack([store.read(name, i, slice(None)) for i in range(len(store))])


def test_other_units_give_the_same_weights_and_latents(plain: Chain, eightfold: Chain) -> None:
    for run, other in zip(plain.runs, eightfold.runs, strict=True):
        weights, theirs = (load_file(path / "model.safetensors") for path in (run, other))
        assert all(torch.equal(weights[name], theirs[name]) for name in weights)
    latents = all_of(plain.latents, "latent")
    assert latents.std() > 0.1 and torch.equal(latents, all_of(eightfold.latents, "latent"))


def test_other_units_scale_a_rollout_and_nothing_else(plain: Chain, eightfold: Chain) -> None:
    flux = all_of(plain.rollout, "velocity")
    assert flux.abs().amax() > 0 and torch.equal(8 * flux, all_of(eightfold.rollout, "velocity"))
    assert torch.equal(all_of(plain.rollout, "routing"), all_of(eightfold.rollout, "routing"))


def test_a_rollout_starts_from_the_latents_that_were_encoded(plain: Chain) -> None:
    """Encoding for training, for a rollout and for a solver is one and the same; so is decoding."""
    latent = plain.latents.read("latent", 0, 0)[None]
    decoded = plain.autoencoder.decode(latent, plain.store.geometry(0), plain.store.family, exact=True)
    first = plain.rollout.read("velocity", 0, 0)
    torch.testing.assert_close(decoded[0], first, rtol=0.0, atol=1e-5 * float(first.abs().amax()))  # another batch
    assert torch.equal(Surrogate(Models(plain.dynamics, plain.autoencoder)).init(plain.store[0, 0]).velocity, first)


def test_other_units_scale_a_surrogate(plain: Chain, eightfold: Chain) -> None:
    ends = []
    for one in (plain, eightfold):
        surrogate = Surrogate(Models(one.dynamics, one.autoencoder))
        ends.append(surrogate.step(surrogate.init(one.store[1, 0]), num_steps=2).velocity)
    assert torch.equal(8 * ends[0], ends[1])


def test_training_data_have_mean_zero_and_unit_size_where_the_network_sees_them(plain: Chain) -> None:
    """What reaches the encoder, caught there: a second normalisation would leave another size."""
    seen: list[torch.Tensor] = []
    hook = plain.autoencoder.encoder.register_forward_pre_hook(lambda module, inputs: seen.extend(inputs[0].values()))
    with torch.no_grad():
        for i in TRAINING:
            plain.autoencoder.encode(plain.store.read("velocity", i, slice(None)), plain.store.geometry(i), FAMILY)
    hook.remove()
    u = torch.cat(seen).double()
    assert u.square().mean().sqrt() == pytest.approx(1.0, rel=1e-5)
    assert u.mean((0, 2, 3)).abs().amax() < 1e-5


def test_what_is_held_out_sets_no_scale(plain: Chain, tmp_path: Path) -> None:
    def last(factor: float) -> Callable[[int], float]:
        return lambda i: factor if i == NUM_TRAJECTORIES - 1 else 1.0

    other = chain(open_store(copied(plain.store, tmp_path / "b.zarr", last(64.0), last(100.0))), tmp_path)
    assert (
        other.store.statistics()["velocity"]["fluctuation_std"] > 5 * plain.autoencoder.scales[FAMILY]["velocity"].size
    )
    for run, theirs in zip(plain.runs, other.runs, strict=True):
        mine = open_checkpoint(run).extra
        assert {"scales"} <= set(mine) or {"conditioning"} <= set(mine)
        assert open_checkpoint(theirs).extra == mine
        weights, others = (load_file(path / "model.safetensors") for path in (run, theirs))
        assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_the_scale_is_the_mean_and_spread_of_the_training_trajectories(plain: Chain) -> None:
    scale = plain.autoencoder.scales[FAMILY]["velocity"]
    flux = all_of(plain.store, "velocity")[TRAINING].double()
    profile = flux.mean((0, 1, 3, 4), keepdim=True)[0, 0]
    torch.testing.assert_close(scale.profile, profile, rtol=1e-12, atol=1e-18)
    fluctuation = operators.velocity(flux - profile, plain.store.grid)
    assert scale.size == pytest.approx(float(fluctuation.square().mean().sqrt()), rel=1e-12)


def test_a_resumed_run_keeps_its_scales(plain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not measured again, and other data are refused."""
    run = tmp_path / "autoencoder"
    train("autoencoder", [plain.store.path], run, "trainer.num_steps=1")
    before = open_checkpoint(run).extra
    other = copied(plain.store, tmp_path / "b.zarr", lambda i: 2.0, lambda i: 1.0)
    monkeypatch.setattr("latentphys.training.models.compute_statistics", None)
    with pytest.raises(ValueError, match="Expected the data that .* was trained on"):
        train("autoencoder", [other], run, "trainer.num_steps=2")
    train("autoencoder", [plain.store.path], run, "trainer.num_steps=2")
    assert open_checkpoint(run).step == 2 and open_checkpoint(run).extra == before


def test_normalise_and_denormalise_are_inverse(plain: Chain) -> None:
    grid, flux = plain.store.grid, plain.store.read("velocity", 0, 0).double()
    scale = FieldScale.from_statistics(grid, compute_statistics(plain.store)["velocity"])
    back = scale.denormalise(scale.normalise(flux, grid), grid)
    torch.testing.assert_close(back, flux, rtol=1e-13, atol=1e-13 * float(flux.abs().amax()))
    with pytest.raises(ValueError, match="fluctuations of 'velocity' of a positive size, got 0.0"):
        FieldScale(grid, scale.profile, 0.0)
