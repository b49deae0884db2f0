"""Files in the published layouts become stores that hold the same numbers, boxes, times and parameters."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import foreign
import numpy as np
import pytest

from latentphys.data import Store, open_store
from latentphys.data.importing import FORMATS, ImportOptions, detect, import_files
from latentphys.data.importing.boxes import box, spacing
from latentphys.data.importing.h5 import hdf5_files, is_hdf5
from latentphys.grid import Boundaries, Boundary

PERIODIC: tuple[Boundary, Boundary] = ("periodic", "periodic")
NO_SLIP: tuple[Boundary, Boundary] = ("no_slip", "no_slip")
OUTFLOW: tuple[Boundary, Boundary] = ("outflow", "outflow")


def imported(path: Path, out: Path, **settings: Any) -> Store:
    """The only store of the files at a path."""
    stores = import_files(path, out / "store.zarr", **settings)
    assert stores == [out / "store.zarr"] and [p.name for p in out.glob("*.zarr*")] == ["store.zarr"]
    store = open_store(stores[0])
    store.verify()
    return store


def array(path: Path, name: str) -> np.ndarray:
    with foreign.h5py.File(path) as file:
        return np.asarray(file[name])


def snapshots(store: Store, name: str) -> np.ndarray:
    """All of a field (trajectory, time, [axis,] x, y, z)."""
    return np.stack([store.read(name, i, slice(None)).numpy() for i in range(len(store))])


def assert_vector(store: Store, name: str, expected: np.ndarray) -> None:
    """A field holds components (…, c) that fill the first axes of its vectors, and zeros after them."""
    values, number = snapshots(store, name), expected.shape[-1]
    expected = np.moveaxis(expected, -1, 2)
    assert np.array_equal(values[:, :, :number].reshape(expected.shape), expected)
    assert not values[:, :, number:].any()


@pytest.mark.parametrize("shape", [(6,), (6, 4), (6, 4, 5)])
def test_well_fields_of_every_order_and_dimension(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = foreign.well(tmp_path / "no ending", shape)
    store, d = imported(path, tmp_path), len(shape)
    assert store.grid.shape == shape + (1,) * (3 - d)
    assert store.family == "stirred_tank" and store.attributes["layout"] == "cell_centred"
    assert store.times.tolist() == [0.0, 0.5, 1.0]
    assert np.array_equal(snapshots(store, "pressure").reshape(2, 3, *shape), foreign.numbers(2, 3, *shape, seed=2))
    assert_vector(store, "velocity", foreign.numbers(2, 3, *shape, d, seed=1))
    names = [f"stress_{a}{b}" for i, a in enumerate("xyz"[:d]) for b in "xyz"[i:d]]
    assert sorted(store.specs) == sorted([*names, "lid", "pressure", "profile", "velocity"])
    assert all(store.array(name).dtype == np.float32 for name in store.specs)
    stress = array(path, "t2_fields/stress")
    for name in names:
        i, j = ("xyz".index(letter) for letter in name[-2:])
        assert np.array_equal(snapshots(store, name).reshape(2, 3, *shape), stress[..., i, j])


def test_well_fields_that_do_not_vary_are_repeated(tmp_path: Path) -> None:
    path = foreign.well(tmp_path / "file")
    store = imported(path, tmp_path)
    lid, profile = array(path, "t0_fields/lid"), array(path, "t0_fields/profile")
    assert np.array_equal(snapshots(store, "lid"), np.broadcast_to(lid, (2, 3, 6, 4, 5)))
    assert np.array_equal(snapshots(store, "profile"), np.broadcast_to(profile, (2, 3, 6, 4, 5)))


def test_well_parameters_of_files_trajectories_and_frames(tmp_path: Path) -> None:
    store = imported(foreign.well(tmp_path / "file"), tmp_path)
    assert {name: values.shape for name, values in store.parameters.items()} == {
        "viscosity": (2,),
        "stirring": (2,),
        "heating": (2, 3, 1),
    }
    assert store.parameters["viscosity"].tolist() == [0.25, 0.25]
    assert store.parameters["stirring"].tolist() == [0.0, 1.0]
    assert store.parameters["heating"][1, :, 0].tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        (("periodic", "PERIODIC", "Periodic"), (PERIODIC, PERIODIC, PERIODIC)),
        (("wall", "WALL", "open"), (NO_SLIP, NO_SLIP, OUTFLOW)),
        ((None, "wall", ("WALL", "OPEN")), (OUTFLOW, NO_SLIP, ("no_slip", "outflow"))),
        ((("open", "wall"), ("wall", None), None), (("outflow", "no_slip"), ("no_slip", "outflow"), OUTFLOW)),
    ],
)
def test_well_boundaries(tmp_path: Path, kinds: Sequence[Any], expected: Boundaries) -> None:
    """Types in any case; open where no mask says otherwise."""
    store = imported(foreign.well(tmp_path / "file", kinds=kinds), tmp_path)
    assert store.grid.boundaries == expected
    assert np.allclose(store.grid.lengths, foreign.LENGTHS, rtol=1e-6)


def test_well_masks_count_at_the_ends_only_and_as_a_whole_for_walls(tmp_path: Path) -> None:
    path = foreign.well(tmp_path / "file", kinds=(None, None, None))
    with foreign.h5py.File(path, "r+") as file:
        for name, kind in (("box", "wall"), ("gate", "periodic")):
            group = file.create_group(f"boundary_conditions/{name}")
            group.attrs.update({"associated_dims": ["x", "y"], "bc_type": kind})
            mask = np.zeros((6, 4), dtype=bool)
            if kind == "wall":
                mask[0], mask[3], mask[:, 0] = True, True, True  # the plane in the middle is no side of the box
            else:
                mask[[0, -1], 1] = True
            group["mask"] = mask
    # one point makes x periodic, over the wall; the high y side has two points of wall among six, and stays open
    assert imported(path, tmp_path).grid.boundaries == (PERIODIC, ("no_slip", "outflow"), OUTFLOW)


def test_a_single_name_for_the_associated_axis(tmp_path: Path) -> None:
    path = foreign.well(tmp_path / "file", kinds=("wall", "wall", "wall"))
    with foreign.h5py.File(path, "r+") as file:
        for group in file["boundary_conditions"].values():
            group.attrs["associated_dims"] = str(group.attrs["associated_dims"][0])
    assert imported(path, tmp_path).grid.boundaries == (NO_SLIP, NO_SLIP, NO_SLIP)


def test_a_tree_of_the_well_is_one_store_for_each_grid(tmp_path: Path) -> None:
    """Training files first, numbers in names as numbers, other shapes and counts, and files that are no data."""
    root = tmp_path / "tank"
    for name, shape, count, seed in (
        ("test/a.h5", (6, 4), 1, 30),
        ("train/run_10.hdf5", (6, 4), 2, 10),
        ("train/run_2.hdf5", (6, 4), 1, 20),
        ("valid/b.hdf5", (4, 4), 3, 40),
    ):
        foreign.well(root / "data" / name, shape, count, seed=seed)
    (root / "stats.yaml").write_text("mean: {}")
    stores = import_files(root, tmp_path / "tank.zarr")
    assert [p.name for p in stores] == ["tank.zarr", "tank-2.zarr"]
    first, second = map(open_store, stores)
    assert (len(first), first.grid.shape, len(second), second.grid.shape) == (4, (6, 4, 1), 3, (4, 4, 1))
    expected = [foreign.numbers(count, 3, 6, 4, seed=seed + 2) for seed, count in ((20, 1), (10, 2), (30, 1))]
    assert np.array_equal(snapshots(first, "pressure")[..., 0], np.concatenate(expected))
    listed = first.attributes["provenance"]["imported"]["trajectories"]
    assert [(Path(path).name, count) for path, count in listed] == [("run_2.hdf5", 1), ("run_10.hdf5", 2), ("a.h5", 1)]


def test_trajectories_with_times_of_their_own_go_to_stores_of_their_own(tmp_path: Path) -> None:
    path = foreign.well(tmp_path / "file", (6, 4), 3, times=[[0, 1, 2], [0, 2, 4], [0, 1, 2]])
    stores = [open_store(p) for p in import_files(path, tmp_path / "out.zarr")]
    assert [store.times.tolist() for store in stores] == [[0, 1, 2], [0, 2, 4]]
    pressure = array(path, "t0_fields/pressure")
    assert np.array_equal(snapshots(stores[0], "pressure")[..., 0], pressure[[0, 2]])
    assert np.array_equal(snapshots(stores[1], "pressure")[..., 0], pressure[[1]])
    assert stores[0].parameters["stirring"].tolist() == [0.0, 2.0]


def test_boxes_of_their_own_too(tmp_path: Path) -> None:
    path = foreign.well(tmp_path / "file", (6, 4))
    with foreign.h5py.File(path, "r+") as file:
        y = file["dimensions/y"][...]
        del file["dimensions/y"]
        file["dimensions/y"] = np.stack([y, 2 * y])
        file["dimensions/y"].attrs.update({"sample_varying": True, "time_varying": False})
    spacings = [open_store(p).grid.spacing[1] for p in import_files(path, tmp_path / "out.zarr")]
    assert np.allclose(spacings, [0.5, 1.0], rtol=1e-6)


@pytest.mark.parametrize("shape", [(6,), (6, 4), (4, 4, 4)])
def test_pdebench_compressible_flow(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """One time more than frames; components of the velocity in arrays of their own."""
    path = foreign.pdebench_flow(tmp_path / "file", shape)
    store = imported(path, tmp_path)
    assert_vector(store, "velocity", np.stack([array(path, f"V{axis}") for axis in "xyz"[: len(shape)]], -1))
    assert np.array_equal(snapshots(store, "density").reshape(2, 3, *shape), array(path, "density"))
    assert np.allclose(store.times, [0, 1 / 3, 2 / 3], atol=1e-7) and store.grid.boundaries == (PERIODIC,) * 3
    assert np.allclose(store.grid.lengths[: len(shape)], 1.0, rtol=1e-6)
    parameters = {name: values.tolist() for name, values in store.parameters.items()}
    assert parameters == {"eta": [0.01, 0.01], "zeta": [0.01, 0.01], "M": [0.1, 0.1]}


def test_pdebench_scalars_and_darcy_flow(tmp_path: Path) -> None:
    path = foreign.pdebench_scalar(tmp_path / "scalar")
    assert np.array_equal(snapshots(imported(path, tmp_path), "tensor")[..., 0, 0], array(path, "tensor"))
    path = foreign.pdebench_darcy(tmp_path / "darcy")
    store = imported(path, tmp_path, overwrite=True)
    assert store.family == "darcy_flow" and store.times.tolist() == [0.0] and len(store) == 3
    assert np.array_equal(snapshots(store, "tensor")[..., 0], array(path, "tensor"))
    assert np.array_equal(snapshots(store, "nu")[:, 0, ..., 0], array(path, "nu"))


def test_pdebench_groups(tmp_path: Path) -> None:
    """A trajectory per group, with numbers of its configuration as parameters where they are physics."""
    path = foreign.pdebench_groups(tmp_path / "file", channels=2)
    store = imported(path, tmp_path)
    assert len(store) == 3 and np.allclose(store.grid.lengths[:2], 5.0)
    for channel in range(2):
        expected = np.stack([array(path, f"{i:04d}/data")[..., channel] for i in range(3)])
        assert np.array_equal(snapshots(store, f"data_{channel}")[..., 0], expected)
    assert sorted(store.parameters) == ["dam_radius", "gravity"]
    assert np.allclose(store.parameters["dam_radius"], [0.3, 0.4, 0.5])
    assert store.grid.boundaries == (OUTFLOW, OUTFLOW, PERIODIC)


def test_pdebench_incompressible_flow(tmp_path: Path) -> None:
    path = foreign.pdebench_incompressible(tmp_path / "file")
    store = imported(path, tmp_path, options=ImportOptions(lengths=(3.0, 2.0)))
    assert_vector(store, "velocity", array(path, "velocity"))
    assert_vector(store, "force", np.repeat(array(path, "force")[:, None], 3, axis=1))
    assert np.array_equal(snapshots(store, "particles")[..., 0], array(path, "particles")[..., 0])
    assert store.grid.boundaries == (NO_SLIP, NO_SLIP, PERIODIC) and store.grid.spacing == (0.5, 0.5, 0.5)


def test_dpot_samples_in_one_file_or_in_one_each(tmp_path: Path) -> None:
    stacked = foreign.dpot(tmp_path / "stacked", (3, 6, 4, 5, 2))
    store = imported(stacked, tmp_path, options=ImportOptions(time_step=0.1, lengths=(6.0, 2.0)))
    expected = array(stacked, "data").transpose(4, 0, 3, 1, 2)[..., None]
    assert np.array_equal(np.stack([snapshots(store, f"data_{c}") for c in range(2)]), expected)
    assert np.allclose(store.times, 0.1 * np.arange(5)) and store.grid.spacing == (1.0, 0.5, 0.5)
    for i in (0, 1, 2, 10):
        foreign.dpot(tmp_path / "samples" / f"data_{i}.hdf5", (6, 4, 1, 3), seed=i)
    named = ImportOptions(fields=("velocity", "velocity", "pressure"), family="swirl")
    store = imported(tmp_path / "samples", tmp_path, options=named, overwrite=True)
    assert (len(store), store.family, sorted(store.specs)) == (4, "swirl", ["pressure", "velocity"])
    last = array(tmp_path / "samples/data_10.hdf5", "data").transpose(2, 0, 1, 3)[None]
    assert np.array_equal(snapshots(store, "velocity")[3:, :, :2, ..., 0], np.moveaxis(last[..., :2], -1, 2))
    assert np.array_equal(snapshots(store, "pressure")[3:, ..., 0], last[..., 2])


def test_any_hdf5_file_with_its_axes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    values = foreign.numbers(4, 2, 6, 5, 3, 3).astype(np.float64)
    with foreign.h5py.File(path, "w") as file:
        file["run/u"] = values
        file["run/p"] = values[..., 0]
        file["run/alias"] = foreign.h5py.SoftLink("u")
    sides: Boundaries = (("periodic", "periodic"), ("no_slip", "free_slip"), ("inflow", "outflow"))
    options = ImportOptions(dataset="run/alias", axes="t b x z y c", fields=("velocity",) * 3, boundaries=sides)
    store = imported(path, tmp_path, options=options)
    assert np.array_equal(snapshots(store, "velocity"), values.transpose(1, 0, 5, 2, 4, 3))
    assert store.grid.shape == (6, 3, 5) and store.grid.boundaries == sides
    assert store.array("velocity").dtype == np.float64
    with pytest.raises(ValueError, match=r"array to read .* its arrays: run/p \(4, 2, 6, 5, 3\), run/u \(4, 2, 6"):
        import_files(path, tmp_path / "other.zarr")
    with pytest.raises(ValueError, match="one axis of 'run/p' .* for each of 5, got 'txyz'"):
        import_files(path, tmp_path / "other.zarr", options=ImportOptions(dataset="run/p", axes="t x y z"))
    with pytest.raises(ValueError, match="axes out of b t x y z c"):
        import_files(path, tmp_path / "other.zarr", options=ImportOptions(dataset="run/p", axes="t b q y z"))
    with pytest.raises(ValueError, match="at most three components of a vector, got 4 named 'u'"):
        four = foreign.dpot(tmp_path / "four", (6, 4, 3, 4))
        import_files(four, tmp_path / "other.zarr", options=ImportOptions(fields=("u",) * 4))
    with pytest.raises(ValueError, match="names of 3 components"):
        options = ImportOptions(dataset="run/u", axes="t b x y z c", fields=("velocity",))
        import_files(path, tmp_path / "other.zarr", options=options)


def test_formats_are_told_by_content(tmp_path: Path) -> None:
    made = {
        foreign.well(tmp_path / "a.vtk"): "well",
        foreign.pdebench_flow(tmp_path / "b.nc"): "pdebench",
        foreign.pdebench_darcy(tmp_path / "c"): "pdebench",
        foreign.pdebench_scalar(tmp_path / "d.raw"): "pdebench",
        foreign.pdebench_groups(tmp_path / "e"): "pdebench",
        foreign.pdebench_incompressible(tmp_path / "f"): "pdebench",
        foreign.dpot(tmp_path / "g"): "dpot",
    }
    with foreign.h5py.File(tmp_path / "h", "w", userblock_size=1024) as file:
        file["u"] = np.zeros((4, 4))
    made[tmp_path / "h"] = "hdf5"
    assert {path: detect(path) for path in made} == made
    assert is_hdf5(tmp_path / "h") and hdf5_files(tmp_path) == sorted(made)
    with pytest.raises(ValueError, match="a format of well .* got 'welt'"):
        import_files(tmp_path / "a.vtk", tmp_path / "out.zarr", format="welt")
    assert {"well", "pdebench", "dpot", "hdf5"} <= set(FORMATS)


def test_spacing_and_boxes() -> None:
    assert spacing(np.array([0.1, 0.2, 0.3], dtype=np.float32).astype(float), "x") == pytest.approx(0.1, rel=1e-6)
    long = (np.arange(4096, dtype=np.float32) + 0.5) / np.float32(4096) + np.float32(7)
    assert spacing(long.astype(np.float64), "x") == pytest.approx(1 / 4096, rel=1e-3)
    for bad in ([0.0, 1.0, 2.001], [2.0, 1.0, 0.0], [0.0, 0.0, 0.0]):
        with pytest.raises(ValueError, match="evenly spaced, increasing coordinates in 'x'"):
            spacing(np.array(bad), "'x'")
    assert spacing(np.array([0.0, 1.0, 2.0001]), "x") == pytest.approx(1.0, rel=1e-3)
    grid = box((8, 4), None, (PERIODIC, NO_SLIP), ImportOptions(), "file")
    assert grid.shape == (8, 4, 1) and grid.spacing == (0.125,) * 3 and grid.periodic == (True, False, True)
    with pytest.raises(ValueError, match="2 lengths for file, got 3"):
        box((8, 4), None, (PERIODIC, NO_SLIP), ImportOptions(lengths=(1, 1, 1)), "file")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"time_step": 5.0}, "'well' nothing but lengths, units, family and boundaries to be said, got time_step"),
        ({"pore": 1.0, "axes": "x y z"}, "got axes, pore; leave"),
        ({"units": {"presure": "Pa"}}, "units of the fields .*pressure.* got one of 'presure'"),
        ({"family": "../other"}, "a family that files can be named after, got '../other'"),
        ({"family": ""}, "a family that files can be named after, got ''"),
    ],
)
def test_what_would_be_passed_over_is_refused(tmp_path: Path, said: dict[str, Any], message: str) -> None:
    path = foreign.well(tmp_path / "file")
    with pytest.raises(ValueError, match=message):
        import_files(path, tmp_path / "out.zarr", options=ImportOptions(**said))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_fields_that_have_names_get_no_others(tmp_path: Path) -> None:
    path = foreign.pdebench_flow(tmp_path / "file")
    with pytest.raises(ValueError, match="no names of fields for .*file, whose arrays have some"):
        import_files(path, tmp_path / "out.zarr", options=ImportOptions(fields=("a", "b")))


def test_no_name_of_a_file_leads_out_of_the_store_or_into_its_own(tmp_path: Path) -> None:
    with foreign.written(tmp_path / "file") as file:
        file["u"] = foreign.numbers(1, 2, 6, 5, 4, 5)
    names = ("..", "zarr.json", "../x", "trajectory", "Δt")
    store = imported(tmp_path / "file", tmp_path, options=ImportOptions(dataset="u", axes="b t x y z c", fields=names))
    assert set(store.specs) == {"field", "zarr.json_field", "_x", "trajectory_field", "Δt"}


def test_what_a_killed_import_left_is_not_in_the_way(tmp_path: Path) -> None:
    left = tmp_path / f".store.zarr.import-{os.getpid()}"
    (left / "store.zarr").mkdir(parents=True)
    (out,) = import_files(foreign.well(tmp_path / "file"), tmp_path / "store.zarr")
    assert len(open_store(out)) == 2 and (left / "store.zarr").is_dir()
