"""Stores in The Well's layout: what the published package and this library's importer read back."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from reference import box, random_flux, random_geometry

from latentphys import operators
from latentphys.data import Store, create_store, open_store
from latentphys.data.exporting import export_well
from latentphys.data.importing import import_files
from latentphys.exact import conserve
from latentphys.fields import VELOCITY, FieldSpec
from latentphys.grid import Boundaries, Geometry, Grid

h5py = pytest.importorskip("h5py")

PRESSURE = FieldSpec("pressure", "scalar", "Pa")
FIELD = FieldSpec("field", "vector", "T")
TIMES = [0.0, 0.25, 1.0]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Three trajectories of three snapshots in voxels: a flux, a scalar and a vector."""
    return _made(tmp_path_factory.mktemp("export") / "flow.zarr", random_geometry(box("mixed"), 3))


def _made(path: Path, geometry: Geometry) -> Store:
    torch.manual_seed(1)
    grid = geometry.grid
    force, pump = np.arange(6.0).reshape(3, 2), np.arange(9.0).reshape(3, 3, 1)
    with create_store(
        path,
        grid=grid,
        specs={"velocity": VELOCITY, "pressure": PRESSURE, "field": FIELD},
        family="pores",
        num_trajectories=3,
        times=TIMES,
        parameters={"viscosity": [0.5] * 3, "force": force, "pump": pump},
        parameter_units={"viscosity": "m2/s"},
        solid=geometry.solid,
    ) as out:
        for i in range(3):
            flux = conserve(flux=random_flux(grid, 3), geometry=geometry[i])
            out.write("velocity", i, slice(None), flux)
            out.write("pressure", i, slice(None), torch.randn(3, *grid.shape, dtype=torch.float64))
            out.write("field", i, slice(None), torch.randn(3, 3, *grid.shape, dtype=torch.float64))
    return open_store(path)


def expected(store: Store, name: str, trajectory: int) -> torch.Tensor:
    """A field at cell centres in single precision."""
    values = store.read(name, trajectory, slice(None))
    return (operators.cell_velocity(values, store.grid) if name == "velocity" else values).float()


def test_import_reads_back_what_export_wrote(store: Store, tmp_path: Path) -> None:
    counted: list[int] = []
    split = {"train": [2, 0], "test": [1]}
    root = export_well(store, tmp_path / "set", split=split, progress=counted.append)
    assert sum(counted) == 9
    assert sorted(str(p.relative_to(root)) for p in root.rglob("*.*")) == [
        "data/test/pores.hdf5",
        "data/train/pores.hdf5",
        "stats.yaml",
    ]
    (path,) = import_files(root, tmp_path / "back.zarr")
    back = open_store(path)
    assert (back.grid.shape, back.family, back.times.tolist()) == (store.grid.shape, "pores", TIMES)
    assert np.allclose(back.grid.spacing, store.grid.spacing, rtol=1e-6)
    assert {name: spec.unit for name, spec in back.specs.items()} == {"velocity": "m/s", "pressure": "Pa", "field": "T"}
    assert back.attributes["parameter_units"]["viscosity"] == "m2/s"
    for place, trajectory in enumerate([2, 0, 1]):
        assert torch.equal(back.geometry(place).fluid, store.geometry(trajectory).fluid)
        for name in store.specs:
            assert torch.equal(back.read(name, place, slice(None)), expected(store, name, trajectory)), name
        assert back.parameters["force_1"][place] == store.parameters["force"][trajectory, 1]
        assert back.parameters["pump"][place].tolist() == store.parameters["pump"][trajectory].tolist()
    kinds = {"periodic": "periodic", "no_slip": "no_slip", "free_slip": "no_slip"}
    assert back.grid.boundaries == tuple(
        tuple(kinds.get(side, "outflow") for side in pair) for pair in store.grid.boundaries
    )


def test_statistics_are_those_of_the_training_trajectories(store: Store, tmp_path: Path) -> None:
    root = export_well(store, tmp_path / "set", split={"train": [0, 2], "valid": [1]}, name="tank")
    stats: Any = yaml.safe_load((root / "stats.yaml").read_text())
    assert set(stats) == {a + b for a in ("mean", "std", "rms") for b in ("", "_delta")}
    for name in ("pressure", "velocity", "field"):
        values = torch.stack([expected(store, name, i) for i in (0, 2)]).double().numpy()
        where = (0, 1, 2, 3, 4) if values.ndim == 5 else (0, 1, 3, 4, 5)
        change = np.diff(values, axis=1)
        for suffix, numbers in (("", values), ("_delta", change)):
            assert np.allclose(stats[f"mean{suffix}"][name], numbers.mean(where), rtol=1e-6, atol=1e-9)
            assert np.allclose(stats[f"std{suffix}"][name], numbers.std(where), rtol=1e-6)
            assert np.allclose(stats[f"rms{suffix}"][name], np.sqrt((numbers**2).mean(where)), rtol=1e-6)
    assert "solid" in stats["mean"] and "solid" not in stats["mean_delta"]


def test_flat_data_lose_the_axis_they_do_not_have(tmp_path: Path) -> None:
    grid = Grid((6, 4, 1), (0.5, 0.25, 0.25))
    store = _made(tmp_path / "flat.zarr", Geometry(grid))
    root = export_well(store, tmp_path / "set")
    with h5py.File(root / "data/train/pores.hdf5") as file:
        assert file.attrs["n_spatial_dims"] == 2 and list(file["dimensions"].attrs["spatial_dims"]) == ["x", "y"]
        assert file["t1_fields/field"].shape == (3, 3, 6, 4, 2)
        out_of_plane = file["t0_fields/field_z"][...]
    assert np.array_equal(out_of_plane[1], store.read("field", 1, slice(None))[:, 2, ..., 0].float().numpy())
    (path,) = import_files(root, tmp_path / "back.zarr")
    assert open_store(path).grid == grid


def test_the_two_ends_of_an_axis_may_differ(tmp_path: Path) -> None:
    sides: Boundaries = (("periodic", "periodic"), ("no_slip", "free_slip"), ("inflow", "no_slip"))
    store = _made(tmp_path / "flow.zarr", Geometry(Grid((4, 4, 4), (0.5, 0.25, 0.25), sides)))
    (path,) = import_files(export_well(store, tmp_path / "set"), tmp_path / "back.zarr")
    assert open_store(path).grid.boundaries == (sides[0], ("no_slip", "no_slip"), ("outflow", "no_slip"))


def test_the_published_package_reads_it(store: Store, tmp_path: Path) -> None:
    the_well = pytest.importorskip("the_well.data")
    normalization = pytest.importorskip("the_well.data.normalization")
    root = export_well(store, tmp_path / "set", split={"train": [0, 1], "valid": [2]})
    for norm in (None, normalization.RMSNormalization, normalization.ZScoreNormalization):
        data = the_well.WellDataset(
            path=str(root),
            well_split_name="train",
            n_steps_input=1,
            n_steps_output=2,
            use_normalization=norm is not None,
            normalization_type=norm,
        )
        sample = data[1]
        assert len(data) == 2 and all(bool(torch.isfinite(values).all()) for values in sample.values())
        assert sample["output_fields"].shape == (2, *store.grid.shape, 7)
        codes = {"periodic": 2.0, "no_slip": 0.0, "free_slip": 0.0, "inflow": 1.0, "outflow": 1.0}
        assert sample["boundary_conditions"].tolist() == [[codes[s] for s in pair] for pair in store.grid.boundaries]
        if norm is None:
            names = [name for names in data.metadata.field_names.values() for name in names]
            assert names == ["pressure", "velocity_x", "velocity_y", "velocity_z", "field_x", "field_y", "field_z"]
            assert torch.equal(sample["output_fields"][..., 2], expected(store, "velocity", 1)[1:, 1])
            assert torch.equal(sample["constant_fields"][..., 0].bool(), ~store.geometry(1).fluid)
            assert sample["output_time_grid"].tolist() == TIMES[1:]


def test_splits_and_refusals(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "set"
    with pytest.raises(ValueError, match=r"trajectories 0 … 2 of train .* got .*\[3\]"):
        export_well(store, out, split={"train": [3]})
    with pytest.raises(ValueError, match="trajectories 0 … 2 of train"):
        export_well(store, out, split={"training": [0]})
    with pytest.raises(ValueError, match="a name that a file can have, got '../x'"):
        export_well(store, out, name="../x")

    def failing(*_: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", failing)
        with pytest.raises(OSError, match="disk full"):
            export_well(store, out)
    assert not list(tmp_path.iterdir())
    export_well(store, out)
    with pytest.raises(ValueError, match="a new path"):
        export_well(store, out)
    export_well(store, out, split={"test": [0]}, overwrite=True)
    assert [p.name for p in (out / "data").iterdir()] == ["test"] and [p.name for p in tmp_path.iterdir()] == ["set"]
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="a new path"):
        export_well(store, tmp_path / "mine", overwrite=True)
