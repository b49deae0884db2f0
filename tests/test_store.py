"""What is written is what is read; nothing half-written, corrupt or foreign passes for a store."""

import copy
import json
import multiprocessing
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from latentphys.data import SCHEMA, Store, StoreWriter, create_store, open_store, plan
from latentphys.fields import VELOCITY, FieldSpec
from latentphys.grid import Boundaries, Grid
from latentphys.sphere import Sphere

CHANNEL: Boundaries = (("periodic", "periodic"), ("periodic", "periodic"), ("no_slip", "free_slip"))
GRID = Grid((6, 4, 5), (0.5, 0.25, 0.1), CHANNEL)
PRESSURE = FieldSpec("pressure", "scalar", "Pa")
SPECS = {"velocity": VELOCITY, "pressure": PRESSURE}
TIMES = [0.0, 0.1, 0.3, 0.7]


def make(path: Path, **changes: object) -> StoreWriter:
    """A prepared store of two trajectories of four snapshots."""
    settings = {"grid": GRID, "specs": SPECS, "family": "channel", "num_trajectories": 2, "times": TIMES, **changes}
    return create_store(path, **settings)  # type: ignore[arg-type]


def data(seed: int = 0, **shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random fields with two trajectories of four snapshots."""
    generator = torch.Generator().manual_seed(seed)
    shapes = shapes or {"velocity": (3, 6, 4, 5), "pressure": (6, 4, 5)}
    return {n: torch.randn(2, 4, *s, dtype=torch.float64, generator=generator) for n, s in shapes.items()}


def dimensions(store: Store, name: str) -> tuple[str, ...]:
    metadata: Any = store.array(name).metadata
    return metadata.dimension_names


def fill(store: StoreWriter, fields: dict[str, torch.Tensor]) -> None:
    for name, values in fields.items():
        for trajectory, of_trajectory in enumerate(values):
            store.write(name, trajectory, slice(None), of_trajectory)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with solids and parameters."""
    solid = torch.zeros(2, 6, 4, 5, dtype=torch.bool)
    solid[1, 2:4, 1, 2:] = True
    parameters = {
        "viscosity": [1e-3, 2e-3],
        "force": np.arange(6.0).reshape(2, 3),
        "inflow": np.arange(8.0).reshape(2, 4, 1),
    }
    units = {"viscosity": "m2/s"}
    path = tmp_path_factory.mktemp("original") / "flow.zarr"
    with make(path, solid=solid, parameters=parameters, parameter_units=units, provenance={"seed": 7}) as out:
        fill(out, data())
    return path


@pytest.fixture
def path(original: Path, tmp_path: Path) -> Path:
    """A copy of the store to do with as one likes."""
    return Path(shutil.copytree(original, tmp_path / original.name))


def test_round_trip_is_exact(path: Path) -> None:
    store, fields = open_store(path), data()
    assert (store.grid, store.specs, store.family) == (GRID, SPECS, "channel")
    assert (len(store), store.num_times, store.times.tolist()) == (2, 4, TIMES)
    for name, values in fields.items():
        assert torch.equal(store.read(name, 1, 2), values[1, 2])
        assert torch.equal(store.read(name, -1, slice(1, 4, 2)), values[1, 1:4:2])
    store.verify()


def test_state_has_the_time_geometry_and_parameters_of_its_snapshot(path: Path) -> None:
    store = open_store(path)
    state = store[1, 3]
    assert state.time == 0.7 and state.parameters["viscosity"] == 2e-3
    assert state.parameters["force"].tolist() == [3, 4, 5] and state.parameters["inflow"].tolist() == [7]
    assert torch.equal(state.velocity, data()["velocity"][1, 3])
    assert int((~state.geometry.fluid).sum()) == 6
    assert store.geometry(0).is_empty and store[0, 0].geometry.is_empty


SPHERE = Sphere(5, 8, radius=3.0)
WIND = FieldSpec("wind", "vector", "m/s")
HEIGHT = FieldSpec("height", "scalar", "m")


def test_a_store_on_a_sphere_round_trips(tmp_path: Path) -> None:
    import xarray

    fields = data(wind=(2, 5, 8), height=(5, 8))
    with make(tmp_path / "s", grid=SPHERE, specs={"wind": WIND, "height": HEIGHT}) as out:
        fill(out, fields)
    store = open_store(tmp_path / "s")
    store.verify()
    assert store.domain == SPHERE and "5×8" in repr(store)
    assert torch.equal(store.read("wind", 1, slice(None)), fields["wind"][1])
    state = store[1, 2]
    assert state.domain == SPHERE and torch.equal(state.fields["height"], fields["height"][1, 2])
    with pytest.raises(ValueError, match="Expected a store in a box, got .* on Sphere"):
        _ = store.grid
    with xarray.open_zarr(tmp_path / "s", consolidated=False) as dataset:
        assert dataset["wind"].dims == ("trajectory", "time", "axis", "colatitude", "longitude")
        assert dataset["height"].dims == ("trajectory", "time", "colatitude", "longitude")
        assert dataset["colatitude"].attrs["units"] == dataset["longitude"].attrs["units"] == "rad"
        np.testing.assert_allclose(dataset["longitude"], np.arange(8) * np.pi / 4)
        assert np.array_equal(dataset["colatitude"], SPHERE.colatitudes) and (dataset["colatitude"][0] < 0.5).all()
        assert np.array_equal(dataset["wind"][1, 3], fields["wind"][1, 3])


def test_statistics_on_a_sphere_are_weighted_by_area(tmp_path: Path) -> None:
    fields = data(height=(5, 8))
    with make(tmp_path / "s", grid=SPHERE, specs={"height": HEIGHT}) as out:
        fill(out, fields)
    expected = (fields["height"] * SPHERE.areas).sum((-2, -1)).mean() / (4 * np.pi * 9)
    np.testing.assert_allclose(open_store(tmp_path / "s").statistics()["height"]["mean"], [expected], rtol=1e-12)


def test_group_attributes_say_where_the_data_come_from(path: Path) -> None:
    attributes = open_store(path).attributes
    assert (attributes["schema"], attributes["kind"], attributes["layout"]) == (SCHEMA, "fields", "face_flux")
    assert set(attributes["provenance"]) == {"version", "command", "time", "seed"}
    assert attributes["parameter_units"] == {"viscosity": "m2/s", "force": "1", "inflow": "1"}


def test_xarray_reads_named_dimensions_and_coordinates_without_this_library(path: Path) -> None:
    import xarray

    with xarray.open_zarr(path, consolidated=False) as dataset:
        assert dataset["velocity"].dims == ("trajectory", "time", "axis", "x", "y", "z")
        assert dataset["solid"].dims == ("trajectory", "x", "y", "z")
        assert dataset["velocity"].attrs["units"] == "m3/s" and dataset["time"].attrs["units"] == "s"
        np.testing.assert_allclose(dataset["y"], [0.125, 0.375, 0.625, 0.875])
        snapshot = dataset["velocity"].sel(time=0.3).isel(trajectory=1)
        assert np.array_equal(snapshot.values, data()["velocity"][1, 2].numpy())
        parameters = xarray.open_zarr(path, group="parameters", consolidated=False)
        assert parameters["inflow"].dims == ("trajectory", "time", "inflow_component")
        assert parameters["force"].dims == ("trajectory", "force_component")


def test_snapshots_come_in_any_order_and_shards_are_written_once(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "SHARD_BYTES", 2 * 3 * 120 * 8)
    fields, set_item = data(), zarr.Array.__setitem__
    writes: list[tuple[int, slice]] = []

    def counted(array: zarr.Array, index: tuple[int, slice], values: np.ndarray) -> None:
        writes.append(index)
        set_item(array, index, values)

    monkeypatch.setattr(zarr.Array, "__setitem__", counted)
    with make(tmp_path / "single.zarr", specs={"velocity": VELOCITY}) as out:
        writes.clear()
        for time in (3, 0, 2, 1):
            for trajectory in (1, 0):
                out.write("velocity", trajectory, time, fields["velocity"][trajectory, time])
    assert sorted((i, t.start) for i, t in writes) == [(0, 0), (0, 2), (1, 0), (1, 2)]
    store = open_store(tmp_path / "single.zarr")
    store.verify()
    assert store.array("velocity").shards == (1, 2, 3, 6, 4, 5) and store.array("velocity").chunks[1] == 1
    assert torch.equal(store.read("velocity", 1, slice(None)), fields["velocity"][1])
    assert store.attributes["checksums"]["velocity"] == open_store(path).attributes["checksums"]["velocity"]


def test_uneven_last_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "SHARD_BYTES", 3 * 120 * 8)
    values = torch.randn(5, 6, 4, 5, dtype=torch.float64)
    with make(tmp_path / "a", specs={"pressure": PRESSURE}, num_trajectories=1, times=range(5)) as out:
        out.write("pressure", 0, slice(None), values)
    store = open_store(tmp_path / "a")
    assert store.array("pressure").shards == (1, 3, 6, 4, 5)
    assert torch.equal(store.read("pressure", 0, slice(None)), values)
    store.verify()


def test_latent_store_has_channels(tmp_path: Path) -> None:
    latent = FieldSpec("latent", "vector", "1")
    values = data(latent=(16, 6, 4, 5))
    with make(tmp_path / "latent.zarr", specs={"latent": latent}, channels=16, dtype="float32") as out:
        fill(out, values)
    store = open_store(tmp_path / "latent.zarr")
    assert store.attributes["kind"] == "latent" and store.read("latent", 0, 0).dtype == torch.float32
    assert dimensions(store, "latent") == ("trajectory", "time", "channel", "x", "y", "z")
    assert torch.equal(store[0, 1].fields["latent"], values["latent"][0, 1].float())
    assert store.statistics()["latent"]["mean"].shape == (16,)


def test_rollout_store_keeps_its_reference_and_routing(tmp_path: Path) -> None:
    rollout = {"reference": "a.zarr", "trajectories": [3, 5], "start": 0, "stride": 2, "checkpoint": "b"}
    routing = torch.randint(-1, 4, (2, 4, 2, 3, 2, 1), dtype=torch.int16)
    extras = {"routing": (tuple(routing.shape), "int16", ("trajectory", "time", "layer", "px", "py", "pz"))}
    with make(tmp_path / "r", attributes={"rollout": rollout}, extras=extras) as out:
        fill(out, data() | {"routing": routing})
    store = open_store(tmp_path / "r")
    assert store.attributes["kind"] == "rollout" and store.attributes["rollout"] == rollout
    assert torch.equal(store.read("routing", 1, slice(None)), routing[1])
    assert dimensions(store, "routing")[2:] == ("layer", "px", "py", "pz")
    store.verify()


def test_bfloat16_and_float32_values_are_widened(tmp_path: Path) -> None:
    values = torch.randn(4, 6, 4, 5).bfloat16()
    with make(tmp_path / "a", specs={"pressure": PRESSURE}, num_trajectories=1) as out:
        out.write("pressure", 0, slice(None), values)
    assert torch.equal(open_store(tmp_path / "a").read("pressure", 0, slice(None)), values.double())


def test_missing_snapshots_are_named_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"all 2 traj.*got 0 complete.*missing is 'pressure' at trajectory 0, time 0"):  # noqa: SIM117
        with make(tmp_path / "a") as out:
            fill(out, {"velocity": data()["velocity"]})
            out.write("pressure", 1, 0, data()["pressure"][1, 0])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), make(tmp_path / "a") as out:
        fill(out, data())
        assert [p.name for p in tmp_path.iterdir()] == [f".a.partial-{os.getpid()}"]
        raise error
    assert not list(tmp_path.iterdir())


def test_existing_paths_are_refused_or_replaced_at_the_end(path: Path) -> None:
    with pytest.raises(ValueError, match=r"Expected a new path.*overwrite=True"):
        make(path)
    with make(path, overwrite=True) as out:
        fill(out, data(seed=1))
        assert torch.equal(open_store(path).read("velocity", 0, 0), data()["velocity"][0, 0])
    assert torch.equal(open_store(path).read("velocity", 0, 0), data(seed=1)["velocity"][0, 0])
    assert "solid" not in zarr.open_group(path, mode="r") and [p.name for p in path.parent.iterdir()] == [path.name]


def test_only_stores_are_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="Expected a store to overwrite at"):
        make(tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").exists()


def test_a_box_that_is_empty_in_every_trajectory_stores_no_voxels(tmp_path: Path) -> None:
    with make(tmp_path / "a", solid=np.zeros((2, 6, 4, 5), dtype=bool)) as out:
        fill(out, data())
    assert not (tmp_path / "a" / "solid").exists() and open_store(tmp_path / "a").geometry(1).is_empty


PLAIN = torch.zeros(3, 6, 4, 5)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("speed", 0, 0, PLAIN), r"Expected one of \['pressure', 'routing', 'velocity'\].*got 'speed'"),
        (("velocity", 2, 0, PLAIN), "trajectory below 2 and a time below 4 for 'velocity', got trajectory 2, time 0"),
        (("velocity", 0, 4, PLAIN), "got trajectory 0, time 4"),
        (("velocity", 0, 0, PLAIN[:2]), r"'velocity' of shape \(3, 6, 4, 5\), got \(2, 6, 4, 5\)"),
        (("velocity", 0, slice(None), PLAIN), r"of shape \(4, 3, 6, 4, 5\), got \(3, 6, 4, 5\)"),
        (("velocity", 1, 2, PLAIN / 0), "NaN or Inf in 'velocity' at trajectory 1, time 2"),
        (("velocity", 1, 2, PLAIN.double() + 1e300), "finite numbers that float32 can hold"),
        (("routing", 0, 0, torch.full((1, 2, 2, 2), 40000)), "numbers that int16 can hold, got others in 'routing'"),
    ],
)
def test_bad_values_are_refused(tmp_path: Path, arguments: tuple, match: str) -> None:
    extras = {"routing": ((2, 4, 1, 2, 2, 2), "int16", ("trajectory", "time", "layer", "px", "py", "pz"))}
    with pytest.raises(ValueError, match=match), make(tmp_path / "a", dtype="float32", extras=extras) as out:
        out.write(*arguments)


def test_nan_inside_a_slice_names_its_own_time(tmp_path: Path) -> None:
    values = data()["velocity"][0]
    values[2, 1, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="'velocity' at trajectory 0, time 2"), make(tmp_path / "a") as out:
        out.write("velocity", 0, slice(None), values)


def test_a_snapshot_is_written_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="each snapshot once, got 'velocity' at trajectory 0, time 1"):  # noqa: SIM117
        with make(tmp_path / "a") as out:
            out.write("velocity", 0, 1, PLAIN)
            out.write("velocity", 0, 1, PLAIN)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"times": [0.0, 0.2, 0.2]}, "strictly increasing, finite times"),
        ({"num_trajectories": 0}, "at least one trajectory, got 0"),
        ({"dtype": "float16"}, "dtype float64 or float32.*'float16'"),
        ({"specs": {}}, "at least one field"),
        ({"specs": {"u": VELOCITY}}, "field under its own name.*'u'"),
        ({"specs": {"x": FieldSpec("x", "scalar", "m")}}, "none of .*'solid'.*got 'x'"),
        ({"parameters": {"viscosity": [1.0]}}, r"\(2,\), \(2, k\) or \(2, 4, k\) for parameter 'viscosity'.*\(1,\)"),
        ({"parameters": {"viscosity": [1.0, np.nan]}}, "finite numbers .* for parameter 'viscosity'"),
        ({"parameter_units": {"nu": "m2/s"}}, "units of the parameters .*'nu'"),
        (
            {"solid": np.zeros((6, 4, 5), dtype=bool)},
            r"solid voxels of shape \(2, 6, 4, 5\), got torch.bool \(6, 4, 5\)",
        ),
        ({"grid": SPHERE}, "scalar or vector on a sphere, got the flux 'velocity'"),
        (
            {"grid": SPHERE, "specs": {"height": HEIGHT}, "solid": np.zeros((2, 5, 8), dtype=bool)},
            "no solid voxels on a sphere",
        ),
        ({"solid": np.zeros((2, 6, 4, 5))}, r"boolean solid voxels .* got torch.float64"),
        ({"extras": {"e": ((2, 4, 1), "int16", ("trajectory", "time"))}}, "extra array 'e' with dimensions"),
        ({"extras": {"velocity": ((2, 4), "int16", ("trajectory", "time"))}}, "name of its own, got 'velocity'"),
        ({"attributes": {"schema": "mine"}}, "beside the store's own, got 'schema'"),
        ({"provenance": {"seed": {1, 2}}}, "plain numbers, texts, lists and dicts"),
    ],
)
def test_contradictory_arguments_are_refused(tmp_path: Path, changes: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make(tmp_path / "a", **changes)
    assert not list(tmp_path.iterdir())


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected a store at .*nowhere, got nothing there"):
        open_store(tmp_path / "nowhere")
    (tmp_path / "file.zarr").write_text("text")
    with pytest.raises(ValueError, match="Expected a Zarr v3 group at"):
        open_store(tmp_path / "file.zarr")
    zarr.create_array(tmp_path / "array.zarr", data=np.zeros(3))
    with pytest.raises(ValueError, match="Expected a Zarr v3 group at"):
        open_store(tmp_path / "array.zarr")
    zarr.create_group(tmp_path / "group.zarr")
    with pytest.raises(ValueError, match="got a Zarr group without a schema"):
        open_store(tmp_path / "group.zarr")


def edit(path: Path, change: dict) -> None:
    metadata = json.loads((path / "zarr.json").read_text())
    metadata["attributes"] = {k: v for k, v in {**metadata["attributes"], **change}.items() if v is not ...}
    (path / "zarr.json").write_text(json.dumps(metadata))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"schema": "latentphys.store/9"}, "Expected schema 'latentphys.store/1', the one .* got 'latentphys.store/9'"),
        ({"statistics": ...}, "Expected a finished store at .*, got no statistics"),
        ({"specs": {}}, "Expected at least one field in the specs of .*, got none"),
        ({"specs": {"b": {"name": "b", "kind": "flux", "unit": "T m2"}}}, "Expected an array 'b' in .*'velocity'"),
        ({"num_trajectories": 3}, r"array 'velocity' of shape \(3, 4, 3, 6, 4, 5\) .* got \(2, 4, 3, 6, 4, 5\)"),
        ({"specs": {"pressure": {"name": "pressure", "kind": "flux", "unit": "Pa"}}}, r"'pressure' of shape .*, got"),
        ({"grid": SPHERE.to_dict()}, "scalar or vector on a sphere, got the flux 'velocity'"),
        ({"grid": {"shape": [6, 4]}}, "Expected a grid with shape, spacing and boundaries"),
    ],
)
def test_foreign_or_inconsistent_stores_are_refused(path: Path, change: dict, match: str) -> None:
    edit(path, change)
    with pytest.raises(ValueError, match=match):
        open_store(path)


def test_voxels_of_another_shape_or_none_at_all_are_refused(path: Path) -> None:
    shutil.rmtree(path / "solid")
    with pytest.raises(ValueError, match="Expected an array 'solid'"):
        open_store(path)
    zarr.open_group(path).create_array("solid", data=np.zeros((2, 6, 4, 4), dtype=bool))
    with pytest.raises(ValueError, match=r"array 'solid' of shape \(2, 6, 4, 5\)"):
        open_store(path)


def test_indices_outside_are_refused(path: Path) -> None:
    store = open_store(path)
    with pytest.raises(ValueError, match="Expected a trajectory from 0 to 1, got 2"):
        store.read("velocity", 2, 0)
    with pytest.raises(ValueError, match="Expected a time from 0 to 3, got -5"):
        store[0, -5]
    with pytest.raises(ValueError, match=r"Expected store\[trajectory, time\], got store\[0\]"):
        store[0]


def shard(path: Path, name: str, trajectory: int) -> Path:
    [file] = [f for f in (path / name / "c" / str(trajectory)).rglob("*") if f.is_file()]
    return file


@pytest.mark.parametrize("name", ["velocity", "pressure", "solid"])
def test_verify_finds_a_flipped_byte(path: Path, name: str) -> None:
    file = shard(path, name, 1)
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 4
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"in array '{name}', trajectory 1 of .*make or copy it again"):
        open_store(path).verify()


@pytest.mark.parametrize("damage", ["truncated", "lost"])
def test_verify_finds_truncated_and_lost_shards(path: Path, damage: str) -> None:
    file = shard(path, "velocity", 0)
    content = file.read_bytes()
    file.unlink()
    if damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="array 'velocity', trajectory 0 of"):
        open_store(path).verify()


def test_a_lost_shard_does_not_read_as_fluid_at_rest(path: Path) -> None:
    shard(path, "velocity", 0).unlink()
    with pytest.raises(ValueError, match="Expected a shard .*, got none or an empty one; make or copy it again"):
        open_store(path).read("velocity", 0, 0)


def test_verify_finds_changed_parameters(path: Path) -> None:
    zarr.open_group(path)["parameters/viscosity"][1] = 3e-3  # type: ignore[index]
    with pytest.raises(ValueError, match="array 'parameters/viscosity', trajectory 1"):
        open_store(path).verify()


def test_another_process_gets_the_path_and_opens_its_own_handles(path: Path) -> None:
    store = open_store(path)
    assert store.__reduce__() == (open_store, (str(path),))
    reopened = copy.copy(store)
    assert reopened.array("velocity") is not store.array("velocity")
    assert torch.equal(reopened.read("velocity", 0, 1), store.read("velocity", 0, 1))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this system")
def test_a_forked_worker_reads_what_its_parent_has_open(path: Path) -> None:
    store = open_store(path)
    before = store.read("velocity", 0, 0)
    worker = multiprocessing.get_context("fork").Process(
        target=lambda: sys.exit(0 if torch.equal(store.read("velocity", 0, 0), before) else 3)
    )
    worker.start()
    worker.join(timeout=30)
    worker.kill()
    assert worker.exitcode == 0


def test_a_lazy_array_has_the_stored_numbers(path: Path) -> None:
    store = open_store(path)
    lazy = store.lazy("velocity")
    assert lazy.shape == (2, 4, 3, 6, 4, 5)
    np.testing.assert_allclose(lazy.mean((0, 1)).compute(), data()["velocity"].mean((0, 1)), rtol=1e-13, atol=1e-15)
