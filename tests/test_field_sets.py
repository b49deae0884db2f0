"""Families with different sets of fields share one latent space; every field keeps its constraint on the whole road."""

import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from small import Road, build_road, train
from torch import Tensor

from latentphys import operators
from latentphys.autoencoders import Autoencoder, Reconstruction
from latentphys.autoencoders.autoencoder import field_type
from latentphys.data import Store, create_store, open_store
from latentphys.families import MHD, Convection, Family, GrayScottPatterns, PassiveScalar
from latentphys.fields import FieldSpec, State
from latentphys.grid import Geometry
from latentphys.rollout import rollout_store
from latentphys.surrogate import Surrogate
from latentphys.training import load_autoencoder, load_dynamics
from latentphys.training.models import chosen_specs, measure_scales, new_autoencoder
from latentphys.validators import validate

FAMILIES: dict[str, tuple[Family, tuple[int, int, int]]] = {
    "mhd": (MHD(spin_up=0.01), (8, 8, 1)),
    "convection": (Convection(spin_up=0.2), (8, 1, 8)),
    "passive_scalar": (PassiveScalar(spin_up=0.05, interval=0.05), (8, 8, 8)),
    "reaction_diffusion": (GrayScottPatterns(spin_up=2.0, interval=2.0), (8, 8, 1)),
}
STEPS = 3
SHORT = ("trainer.num_steps=1", "trainer.test_every=9", "trainer.checkpoint_every=1")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Road:
    """One model of each kind for four families, of which no two have the same fields; read-only."""
    return build_road(tmp_path_factory.mktemp("field_sets"), FAMILIES)


@pytest.fixture(scope="module")
def rollouts(sets: Road, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Store]:
    folder, (dynamics, autoencoder) = tmp_path_factory.mktemp("rollouts"), load_dynamics(sets.dynamics)
    return {
        name: open_store(
            rollout_store(autoencoder, dynamics, sets.store(name), folder / name, num_steps=STEPS, trajectories=[3, 1])
        )
        for name in FAMILIES
    }


def largest(x: Tensor) -> float:
    return float(x.abs().amax())


def total(values: Tensor) -> float:
    """Σ over all cells, rounded once."""
    return math.fsum(values.double().flatten().tolist())


# the autoencoder


def test_the_networks_know_every_type_of_field_once(sets: Road) -> None:
    model = load_autoencoder(sets.autoencoder)
    assert set(model.specs) == {
        "velocity_flux_solenoidal",
        "magnetic_flux_solenoidal",
        "temperature_scalar_none",
        "concentration_scalar_conserved",
        "u_scalar_positive",
        "v_scalar_positive",
    }
    for name in FAMILIES:
        assert dict(model.scale(name).specs) == dict(sets.store(name).specs)
        latents = open_store(sets.latents[name])
        assert set(latents.specs) == {"latent"} and latents.array("latent").shape[2] == model.latent_channels


def test_what_reaches_the_autoencoder_are_the_fields_of_the_stores(
    sets: Road, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training: every component where `FamilyScale.channels` says, of one snapshot, in the units of the store."""
    seen, forward = {}, Autoencoder.forward

    def watched(model: Autoencoder, packed: Tensor, geometry: Geometry, family: str) -> Reconstruction:
        if model.training:
            seen[family] = model.scale(family).split(packed)
        return forward(model, packed, geometry, family)

    monkeypatch.setattr(Autoencoder, "forward", watched)
    options = ("trainer.batch_size=1", "trainer.num_steps=4", "trainer.test_every=9", "trainer.checkpoint_every=9")
    train("autoencoder", list(sets.fields.values()), tmp_path / "run", *options)
    assert set(seen) == set(FAMILIES)
    for name, fields in seen.items():
        store = sets.store(name)
        assert list(fields) == list(store.specs)
        snapshots = [(i, t) for i in range(3) for t in range(store.num_times)]
        found = [
            [at for at in snapshots if torch.equal(values.flatten(), store.read(f, *at).float().flatten())]
            for f, values in fields.items()
        ]
        assert len(found[0]) == 1 and found[0] == found[-1]


def test_each_field_says_something_in_the_latent_and_is_decoded_from_it(sets: Road) -> None:
    model = load_autoencoder(sets.autoencoder)
    for name in FAMILIES:
        store, scale = sets.store(name), model.scale(name)
        where, state = store.geometry(0), {f: store.read(f, 0, 0)[None] for f in store.specs}
        packed = scale.pack(state)
        with torch.no_grad():
            latent = model.encode(packed, where, name)
            decoded = scale.split(model.decode(latent, where, name))
            for changed in store.specs:
                other = scale.pack({f: 1.5 * x if f == changed else x for f, x in state.items()})
                assert largest(model.encode(other, where, name) - latent) > 1e-3
                shifted = scale.split(model.decode(latent + torch.randn_like(latent), where, name))
                assert largest(shifted[changed] - decoded[changed]) > 1e-3 * largest(decoded[changed])


# rollouts


@pytest.mark.parametrize("name", FAMILIES)
def test_a_rollout_has_all_fields_and_every_one_keeps_its_constraint(
    sets: Road, rollouts: dict[str, Store], name: str
) -> None:
    store, reference = rollouts[name], sets.store(name)
    assert dict(store.specs) == dict(reference.specs)
    report, grid = validate(store), store.grid
    assert report["finite"].value == 0.0
    for f, spec in store.specs.items():
        values = store.read(f, 0, slice(None))
        assert values.dtype == torch.float64
        assert values.shape == (STEPS + 1, *reference.read(f, 3, 0).shape)
        assert largest(values[1:] - values[:-1]) > 0
        if spec.constraint == "solenoidal":
            prefix = "" if f == "velocity" else f"{f}_"
            assert (operators.div(values, grid) == 0.0).all() and largest(values) > 0
            assert report[f"{prefix}net_flux_max"].value == 0.0 == report[f"{prefix}solid_flux_max"].value
        if spec.constraint == "positive":
            assert float(values.min()) > 0
            assert report[f"{f}_below_zero"].verdict == "pass"
        if spec.constraint == "conserved":
            assert report[f"{f}_total_drift"].value == 0.0


def test_the_total_of_a_rollout_is_that_of_its_first_state_in_every_bit(sets: Road, rollouts: dict[str, Store]) -> None:
    """Of each trajectory, whose totals differ; to the quantum that of the state it started from."""
    store, reference, name = rollouts["passive_scalar"], sets.store("passive_scalar"), "concentration"
    size = total(reference.read(name, 3, 0).abs())
    for n, trajectory in enumerate((3, 1)):
        totals = [total(values) for values in store.read(name, n, slice(None))]
        assert len(set(totals)) == 1
        assert abs(totals[0] - total(reference.read(name, trajectory, 0))) <= 2**-40 * size


def test_a_total_that_is_not_zero_is_kept_too(sets: Road, tmp_path: Path) -> None:
    """Of a store whose concentrations were all raised, each trajectory's by another amount."""
    raised = Path(shutil.copytree(sets.fields["passive_scalar"], tmp_path / "raised"))
    array = zarr.open_array(str(raised / "concentration"), mode="r+")
    array[...] = np.asarray(array[...]) + np.array([0.1, 1 / 3, -0.7, 5.0]).reshape(4, 1, 1, 1, 1)
    reference, (dynamics, autoencoder) = open_store(raised), load_dynamics(sets.dynamics)
    path = rollout_store(autoencoder, dynamics, reference, tmp_path / "out", num_steps=2, trajectories=[1, 3])
    for n, (trajectory, mean) in enumerate(((1, 1 / 3), (3, 5.0))):
        totals = {total(values) for values in open_store(path).read("concentration", n, slice(None))}
        start = total(reference.read("concentration", trajectory, 0))
        assert len(totals) == 1 and totals.pop() == pytest.approx(start, rel=1e-12)
        assert start == pytest.approx(512 * mean, rel=1e-6)


# which fields


def test_fields_are_those_asked_for(sets: Road) -> None:
    mhd, convection = sets.store("mhd"), sets.store("convection")
    assert list(chosen_specs(mhd)) == list(mhd.specs)
    assert list(chosen_specs(mhd, ["magnetic", "temperature", "velocity"])) == ["magnetic", "velocity"]
    scales = measure_scales([mhd, convection], [[0], [0]], ["temperature", "velocity"])
    assert {family: list(scale.specs) for family, scale in scales.items()} == {
        "mhd": ["velocity"],
        "convection": ["temperature", "velocity"],
    }
    config = {
        "_target_": "latentphys.autoencoders.Autoencoder",
        "latent_channels": 4,
        "widths": [8, 16],
        "num_blocks": [1, 1],
    }
    model = new_autoencoder(config, [mhd, convection], [[0], [0]], fields=["velocity"])
    assert set(model.specs) == {"velocity_flux_solenoidal"}
    assert [model.scale(family).num_components for family in ("mhd", "convection")] == [3, 3]
    for wrong in (["temperature"], ["speed"], []):
        with pytest.raises(ValueError, match=r"Expected fields among .* in .*mhd.zarr, got \['magnetic', 'velocity'\]"):
            chosen_specs(mhd, wrong)
    with pytest.raises(ValueError, match=r"Expected fields of a flow in .*mhd.latent.zarr, got \['latent'\]"):
        chosen_specs(open_store(sets.latents["mhd"]))


@pytest.fixture(scope="module")
def velocity_only(sets: Road, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step with the velocities of two families; read-only."""
    folder = tmp_path_factory.mktemp("velocity_only")
    train("autoencoder", [sets.fields["mhd"], sets.fields["convection"]], folder / "run", *SHORT, "fields=[velocity]")
    return folder / "run"


def test_a_run_goes_on_with_its_own_fields_alone(sets: Road, velocity_only: Path, tmp_path: Path) -> None:
    model = load_autoencoder(velocity_only)
    assert {family: list(scale.specs) for family, scale in model.scales.items()} == {
        "mhd": ["velocity"],
        "convection": ["velocity"],
    }
    stores = [sets.fields["mhd"], sets.fields["convection"]]
    for n, fields in enumerate(("null", "[velocity,temperature]", "[velocity,magnetic]")):
        run = shutil.copytree(velocity_only, tmp_path / str(n))
        with pytest.raises(ValueError, match=r"fields: expected \['velocity'\], got .*choose another run"):
            train("autoencoder", stores, run, *SHORT, "trainer.num_steps=2", f"fields={fields}")


def test_a_known_family_is_tuned_on_the_fields_that_the_model_knows(
    sets: Road, velocity_only: Path, tmp_path: Path
) -> None:
    """Though its store has more of them."""
    tuned = train("autoencoder", [sets.fields["mhd"]], tmp_path / "run", *SHORT, f"finetune.checkpoint={velocity_only}")
    assert list(load_autoencoder(tuned).scale("mhd").specs) == ["velocity"]


def test_new_families_bring_no_new_types_of_fields(sets: Road, velocity_only: Path, tmp_path: Path) -> None:
    tuning = (f"finetune.checkpoint={velocity_only}", "finetune.adapt=scales")
    with pytest.raises(
        ValueError,
        match=r"Expected fields among a flux 'velocity' \[m3/s\] of constraint solenoidal in the new family "
        r"'passive_scalar', got a scalar 'concentration' \[kg/m3\] of constraint conserved; .*fields=\[…\]",
    ):
        train("autoencoder", [sets.fields["passive_scalar"]], tmp_path / "run", *tuning)
    assert not (tmp_path / "run").exists()
    tuned = train("autoencoder", [sets.fields["passive_scalar"]], tmp_path / "run", *tuning, "fields=[velocity]")
    model = load_autoencoder(tuned)
    assert list(model.scale("passive_scalar").specs) == ["velocity"] and set(model.scales) >= {"mhd", "convection"}


@pytest.mark.parametrize("fields", ["[velocity,temperatur]", "[speed]", "velocity"])
def test_names_that_no_store_has_are_refused(sets: Road, tmp_path: Path, fields: str) -> None:
    stores = [sets.fields["mhd"], sets.fields["convection"]]
    with pytest.raises(ValueError, match=r"fields=\[…\] of names among \['magnetic', 'temperature', 'velocity'\], got"):
        train("autoencoder", stores, tmp_path / "run", *SHORT, f"fields={fields}")
    assert not (tmp_path / "run").exists()


def without(store: Store, name: str, path: Path, units: Mapping[str, str] | None = None) -> Store:
    """The first two frames of a store, without a field or with fields in other units."""
    specs = {
        n: FieldSpec(n, s.kind, (units or {}).get(n, s.unit), s.constraint) for n, s in store.specs.items() if n != name
    }
    with create_store(
        path, grid=store.grid, specs=specs, family=store.family, num_trajectories=1, times=store.times[:2]
    ) as out:
        for field in specs:
            for t in range(2):
                out.write(field, 0, t, store.read(field, 0, t))
    return open_store(path)


def test_a_model_refuses_a_store_that_lacks_one_of_its_fields(sets: Road, tmp_path: Path) -> None:
    dynamics, autoencoder = load_dynamics(sets.dynamics)
    cold = without(sets.store("convection"), "temperature", tmp_path / "cold")
    message = r"Expected a scalar 'temperature' \[K\] of constraint none, .*'convection', got only \['velocity'\]"
    with pytest.raises(ValueError, match=message):
        autoencoder.check("convection", cold.grid, cold.specs)
    with pytest.raises(ValueError, match=message):
        rollout_store(autoencoder, dynamics, cold, tmp_path / "out", num_steps=1, trajectories=[0])
    other = without(sets.store("convection"), "", tmp_path / "celsius", {"temperature": "°C"})
    with pytest.raises(ValueError, match=r"\[K\] of constraint none, .* got a scalar 'temperature' \[°C\]"):
        autoencoder.check("convection", other.grid, other.specs)
    more = {**sets.store("convection").specs, "salt": FieldSpec("salt", "scalar", "kg/m3", "conserved")}
    autoencoder.check("convection", cold.grid, more)
    assert not (tmp_path / "out").exists()


# fields without a velocity


def test_two_positive_scalars_alone_train(sets: Road, tmp_path: Path) -> None:
    """And whatever a latent of theirs is, it decodes to positive fields."""
    store = sets.store("reaction_diffusion")
    model = load_autoencoder(train("autoencoder", [store.path], tmp_path / "run", *SHORT))
    assert {field_type(spec) for spec in store.specs.values()} == set(model.specs)
    scale, where = model.scale("reaction_diffusion"), store.geometry(0)
    packed = scale.pack({f: store.read(f, 0, slice(0, 3)) for f in store.specs})
    with torch.no_grad():
        latent = model.encode(packed, where, "reaction_diffusion")
        back = model.decode(latent, where, "reaction_diffusion")
        for size in (1.0, 1e3):
            wild = model.decode(size * torch.randn_like(latent), where, "reaction_diffusion", exact=True)
            assert float(wild.min()) > 0 and bool(torch.isfinite(wild).all())
    for f, field in scale.fields.items():
        error = scale.split(back)[f] - scale.split(packed)[f]
        assert float(error.square().mean().sqrt()) < field.size
    with pytest.raises(ValueError, match="solenoidal velocity in family 'reaction_diffusion' for conservative latents"):
        train("autoencoder", [store.path], tmp_path / "other", *SHORT, "autoencoder/latent=conservative")


# the surrogate


@pytest.fixture(scope="module")
def surrogate(sets: Road) -> Iterator[Surrogate]:
    yield Surrogate.load(sets.dynamics)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_surrogate_keeps_every_field(sets: Road, surrogate: Surrogate, name: str) -> None:
    store = sets.store(name)
    state = surrogate.init(store[2, 0])
    assert set(state.fields) == set(store.specs)
    for solver_works in (False, True, False):
        if solver_works:  # on the last field, in place; its total changes
            last = state.fields[list(store.specs)[-1]]
            last.add_(0.25 * largest(last))
        given = {f: x.clone() for f, x in state.fields.items()}
        state = surrogate.step(state)
        for f, spec in store.specs.items():
            values = state.fields[f]
            assert values.dtype == torch.float64 and largest(values - given[f]) > 0
            if spec.constraint == "solenoidal":
                assert (operators.div(values, state.grid) == 0.0).all()
            if spec.constraint == "positive":
                assert float(values.min()) > 0
            if spec.constraint == "conserved":
                assert total(values) == pytest.approx(total(given[f]), abs=2**-40 * total(given[f].abs()))
                assert solver_works or total(values) == total(given[f])


def test_every_field_of_a_changed_state_counts(sets: Road, surrogate: Surrogate) -> None:
    store = sets.store("convection")
    start = surrogate.init(store[0, 0])
    token = surrogate.snapshot()
    kept = surrogate.step(start)
    warmer = start.fields["temperature"] + 0.1
    changed = surrogate.step(surrogate.restore(token).with_fields(temperature=warmer))
    assert largest(changed.fields["temperature"] - kept.fields["temperature"]) > 0
    with pytest.raises(ValueError, match=r"Expected the fields \[.*\], got \['velocity'\]"):
        surrogate.step(replace(start, fields={"velocity": start.velocity}))
    with pytest.raises(ValueError, match="Expected a finite temperature, got NaN"):
        surrogate.step(start.with_fields(temperature=torch.full_like(warmer, torch.nan)))


def test_a_bare_flux_does_not_stand_for_fields_that_are_none(sets: Road, surrogate: Surrogate) -> None:
    store = sets.store("reaction_diffusion")
    state = surrogate.init(store[0, 0])
    flux = torch.zeros(3, *store.grid.shape, dtype=torch.float64)
    with pytest.raises(
        ValueError, match=r"Expected a State with the fields \['u', 'v'\] of family .*, got a bare flux"
    ):
        surrogate.step(flux)
    with pytest.raises(ValueError, match=r"Expected the fields \['u', 'v'\], got \['velocity'\]"):
        surrogate.init(State({"velocity": flux}, state.place, 0.0, state.parameters, "reaction_diffusion"))
