"""Stores written as VTKHDF, read back by VTK's own reader and by ours."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentphys import operators
from latentphys.data import create_store, open_store
from latentphys.data.exporting.vtk import export_vtkhdf
from latentphys.data.importing import ImportOptions, vtk
from latentphys.data.store import Store
from latentphys.fields import VELOCITY, FieldSpec
from latentphys.grid import Boundaries, Grid

h5py = pytest.importorskip("h5py")

WALLS: Boundaries = (("periodic", "periodic"), ("no_slip", "no_slip"), ("inflow", "outflow"))
TIMES = [0.0, 0.5, 2.0]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Two trajectories with a flux, a scalar, a vector and solids, on a box whose axes all differ."""
    grid = Grid((5, 4, 3), (0.5, 0.25, 2.0), WALLS)
    specs = {s.name: s for s in (VELOCITY, FieldSpec("p", "scalar", "Pa"), FieldSpec("b", "vector", "T"))}
    solid = torch.rand(2, *grid.shape) < 0.2
    with create_store(
        tmp_path / "in.zarr", grid=grid, specs=specs, family="duct", num_trajectories=2, times=TIMES, solid=solid
    ) as out:
        for trajectory in range(2):
            for name, spec in specs.items():
                values = torch.randn(3, *spec.shape(grid), dtype=torch.float64)
                out.write(name, trajectory, slice(None), values)
    return open_store(tmp_path / "in.zarr")


def by_vtk(path: Path, step: int) -> Any:
    """One step through VTK's reader."""
    hdf = pytest.importorskip("vtkmodules.vtkIOHDF")
    reader = hdf.vtkHDFReader()
    reader.SetFileName(str(path))
    reader.UpdateInformation()
    reader.SetStep(step)
    reader.Update()
    return reader.GetNumberOfSteps(), reader.GetTimeValue(), reader.GetOutput()


def test_vtk_reads_cells_times_and_box(store: Store, tmp_path: Path) -> None:
    [path] = export_vtkhdf(store, tmp_path / "one.vtkhdf", trajectory=1)
    assert path == tmp_path / "one.vtkhdf"
    for step, time in enumerate(TIMES):
        number, got, image = by_vtk(path, step)
        assert (number, got) == (3, time)
        assert image.GetDimensions() == (6, 5, 4) and image.GetSpacing() == store.grid.spacing
        u = operators.cell_velocity(store.read("velocity", 1, step), store.grid)
        p, b, solid = store.read("p", 1, step), store.read("b", 1, step), ~store.geometry(1).fluid
        data = image.GetCellData()
        for x, y, z in [(0, 0, 0), (4, 0, 0), (0, 3, 0), (0, 0, 2), (3, 2, 1)]:
            cell = image.ComputeCellId((x, y, z))
            assert data.GetArray("velocity").GetTuple(cell) == tuple(u[:, x, y, z].tolist())
            assert data.GetArray("b").GetTuple(cell) == tuple(b[:, x, y, z].tolist())
            assert data.GetArray("p").GetValue(cell) == float(p[x, y, z])
            assert data.GetArray("solid").GetValue(cell) == int(solid[x, y, z])


def test_the_importer_reads_the_same_back(store: Store, tmp_path: Path) -> None:
    paths = export_vtkhdf(store, tmp_path / "all")
    assert [path.name for path in paths] == ["duct_0.vtkhdf", "duct_1.vtkhdf"]
    for trajectory, path in enumerate(paths):
        [found] = vtk.sources(path, ImportOptions(boundaries=WALLS))
        assert found.grid == store.grid and found.times.tolist() == TIMES
        assert {name: (s.kind, s.unit) for name, s in found.specs.items()} == {
            "velocity": ("vector", "m/s"),
            "p": ("scalar", "Pa"),
            "b": ("vector", "T"),
        }
        assert found.solid is not None
        np.testing.assert_array_equal(~found.solid[0], store.geometry(trajectory).fluid)
        for step in range(3):
            for name in ("p", "b"):
                np.testing.assert_array_equal(found.read(name, 0, step), store.read(name, trajectory, step))


def test_a_plane_stays_one_cell_thick(tmp_path: Path) -> None:
    grid = Grid((4, 3, 1), (0.5, 0.25, 0.25))
    with create_store(
        tmp_path / "in.zarr", grid=grid, specs={"velocity": VELOCITY}, family="plane", num_trajectories=1, times=[1.0]
    ) as out:
        flux = torch.randn(3, *grid.shape, dtype=torch.float64)
        out.write("velocity", 0, 0, flux)
    [path] = export_vtkhdf(open_store(tmp_path / "in.zarr"), tmp_path / "plane.vtkhdf")
    [found] = vtk.sources(path, ImportOptions())
    assert found.grid == grid and found.solid is None
    np.testing.assert_array_equal(found.read("velocity", 0, 0), operators.cell_velocity(flux, grid))


@pytest.mark.parametrize("shape", [(8, 4, 4), (8, 4, 1), (1, 4, 8)])
def test_a_rollout_carries_the_experts_of_each_step(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    """Every cell has the expert of the latent cell that it lies in, in every layer and step."""
    grid, patches = Grid(shape, (0.5, 0.25, 2.0)), [max(1, n // 2) for n in shape]
    routing = np.random.default_rng(0).integers(0, 9, (2, 3, 2, *patches)).astype(np.int16)
    routing[:, 0] = -1
    rollout = {"checkpoint": "model", "num_experts": [9, 9]}
    with create_store(
        tmp_path / "in.zarr",
        grid=grid,
        specs={"velocity": VELOCITY},
        family="plane",
        num_trajectories=2,
        times=TIMES,
        attributes={"rollout": rollout},
        extras={"routing": (routing.shape, "int16", ("trajectory", "time", "layer", "px", "py", "pz"))},
    ) as out:
        for trajectory in range(2):
            out.write("velocity", trajectory, slice(None), torch.randn(3, 3, *shape))
            out.write("routing", trajectory, slice(None), routing[trajectory])
    [path] = export_vtkhdf(open_store(tmp_path / "in.zarr"), tmp_path / "one.vtkhdf", trajectory=1)
    for step in range(3):
        _, _, image = by_vtk(path, step)
        data = image.GetCellData()
        names = {data.GetArrayName(i) for i in range(data.GetNumberOfArrays())}
        assert names == {"velocity", "expert_layer0", "expert_layer1"}
        bounds = np.empty(6)
        for cell in range(image.GetNumberOfCells()):
            image.GetCellBounds(cell, bounds)
            centre = bounds.reshape(3, 2).mean(1)
            place = tuple(int(x) for x in centre / np.array(grid.lengths) * patches)
            for layer in range(2):
                assert data.GetArray(f"expert_layer{layer}").GetValue(cell) == routing[(1, step, layer, *place)]


def test_files_are_there_when_complete_and_not_before(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int] = []

    def interrupt(number: int) -> None:
        done.append(number)
        if len(done) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_vtkhdf(store, tmp_path / "out" / "a.vtkhdf", trajectory=0, progress=interrupt)
    assert not list((tmp_path / "out").iterdir())
    [path] = export_vtkhdf(store, tmp_path / "out" / "a.vtkhdf", trajectory=-1)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="which exists; choose another name or overwrite=True"):
        export_vtkhdf(store, path, trajectory=0)
    assert path.read_bytes() == before
    export_vtkhdf(store, path, trajectory=0, overwrite=True)
    assert path.read_bytes() != before and [p.name for p in path.parent.iterdir()] == ["a.vtkhdf"]


def test_what_cannot_be_exported_is_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a folder for 2 trajectories"):
        export_vtkhdf(store, tmp_path / "a.vtkhdf")
    with pytest.raises(ValueError, match="a trajectory from 0 to 1, got 2"):
        export_vtkhdf(store, tmp_path / "a.vtkhdf", trajectory=2)
    with create_store(
        tmp_path / "latent.zarr",
        grid=Grid((2, 2, 2), (1, 1, 1)),
        specs={"latent": FieldSpec("latent", "scalar", "1")},
        family="duct",
        num_trajectories=1,
        times=[0.0],
        channels=4,
    ) as out:
        out.write("latent", 0, 0, torch.zeros(4, 2, 2, 2))
    with pytest.raises(ValueError, match="got latents"):
        export_vtkhdf(open_store(tmp_path / "latent.zarr"), tmp_path / "b.vtkhdf")
    assert not list(tmp_path.glob("*.vtkhdf"))
