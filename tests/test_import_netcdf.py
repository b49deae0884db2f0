"""NetCDF files written by other libraries: axes, velocities and times by the CF conventions, and what is no box."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentphys.data import open_store
from latentphys.data.importing import ImportOptions, cf, detect, import_files, netcdf
from latentphys.data.importing.source import Source

netcdf_file = pytest.importorskip("scipy.io").netcdf_file
h5py = pytest.importorskip("h5py")
pytest.importorskip("xarray")
pytest.importorskip("h5netcdf")

SIZES = {"time": 3, "z": 2, "y": 4, "x": 5}
COORDINATES = {
    "time": [0.0, 2.0, 4.0],
    "z": [0.5, 1.5],
    "y": [0.0, 0.25, 0.5, 0.75],
    "x": [10.0, 10.5, 11.0, 11.5, 12.0],
}
RNG = np.random.default_rng(0)
DATA = {name: RNG.standard_normal(tuple(SIZES.values())).astype(np.float32) for name in ("u", "v", "w", "theta")}
Variables = dict[str, tuple[tuple[str, ...], np.ndarray, dict[str, Any]]]


def variables(**changes: Any) -> Variables:
    """Velocities and a temperature on (time, z, y, x), with coordinates; `changes` replaces some."""
    result: Variables = {name: ((name,), np.array(values), {}) for name, values in COORDINATES.items()}
    result |= {name: (tuple(SIZES), DATA[name], {"units": "m s-1"}) for name in ("u", "v", "w")}
    result["theta"] = (tuple(SIZES), DATA["theta"], {"units": "K"})
    return {name: value for name, value in (result | changes).items() if value is not None}


def classic(path: Path, found: Variables, unlimited: str = "") -> Path:
    """Classic NetCDF by SciPy's writer."""
    with netcdf_file(path, "w", version=2) as file:
        for dims, values, _ in found.values():
            for dim, size in zip(dims, values.shape, strict=True):
                if dim not in file.dimensions:
                    file.createDimension(dim, None if dim == unlimited else size)
        for name, (dims, values, attributes) in found.items():
            variable = file.createVariable(name, values.dtype, dims)
            variable[:] = values
            for key, value in attributes.items():
                setattr(variable, key, value)
    return path


def modern(path: Path, found: Variables) -> Path:
    """NetCDF-4 as HDF5 with dimension scales and the mark of its writer."""
    with h5py.File(path, "w") as file:
        file.attrs["_NCProperties"] = np.bytes_("version=2,hdf5=1.14")
        sizes = {d: n for dims, values, _ in found.values() for d, n in zip(dims, values.shape, strict=True)}
        for dim, size in sizes.items():
            scale = file.create_dataset(dim, data=found[dim][1] if dim in found else np.zeros(size, ">f4"))
            scale.make_scale(
                dim if dim in found else f"This is a netCDF dimension but not a netCDF variable. {size:10d}"
            )
        for name, (dims, values, attributes) in found.items():
            variable = file[name] if name in sizes else file.create_dataset(name, data=values)
            for axis, dim in enumerate(dims):
                if name not in sizes:
                    variable.dims[axis].attach_scale(file[dim])
            for key, value in attributes.items():
                variable.attrs[key] = value
    return path


def source(path: Path, **options: Any) -> Source:
    [found] = netcdf.sources(path, ImportOptions(**options))
    return found


def check(found: Source) -> None:
    assert found.grid.shape == (5, 4, 2) and found.grid.spacing == (0.5, 0.25, 1.0)
    assert {n: (s.kind, s.unit) for n, s in found.specs.items()} == {
        "velocity": ("vector", "m/s"),
        "theta": ("scalar", "K"),
    }
    for t in range(3):
        got, theta = found.read("velocity", 0, t), found.read("theta", 0, t)
        for component, name in enumerate("uvw"):
            assert got[component, 3, 1, 0] == DATA[name][t, 0, 1, 3]
            np.testing.assert_array_equal(got[component], DATA[name][t].transpose(2, 1, 0))
        np.testing.assert_array_equal(theta, DATA["theta"][t].transpose(2, 1, 0))


@pytest.mark.parametrize("write", [classic, modern])
def test_axes_velocity_and_units(tmp_path: Path, write: Any) -> None:
    path = write(tmp_path / "any name", variables())
    assert netcdf.recognises(path) and detect(path) == "netcdf"
    check(source(path))
    assert source(path).times.tolist() == [0.0, 2.0, 4.0]


def test_records_of_the_unlimited_dimension(tmp_path: Path) -> None:
    check(source(classic(tmp_path / "a.nc", variables(), unlimited="time")))


def test_files_of_the_netcdf4_writer_of_h5netcdf(tmp_path: Path) -> None:
    xarray = pytest.importorskip("xarray")
    data = xarray.Dataset({name: (list(dims), values, a) for name, (dims, values, a) in variables().items()})
    packed = {"theta": {"dtype": "int16", "scale_factor": 1e-3, "add_offset": 0.5, "_FillValue": -32768}}
    data.to_netcdf(tmp_path / "a.nc", engine="h5netcdf", encoding=packed)
    assert netcdf.recognises(tmp_path / "a.nc")
    found = source(tmp_path / "a.nc")
    np.testing.assert_array_equal(found.read("velocity", 0, 2)[1], DATA["v"][2].transpose(2, 1, 0))
    np.testing.assert_allclose(found.read("theta", 0, 1), DATA["theta"][1].transpose(2, 1, 0), atol=6e-4)


def test_attributes_name_axes_that_names_do_not(tmp_path: Path) -> None:
    names = {"time": "a", "z": "b1", "y": "c1", "x": "d"}
    marks = {
        "a": {"units": "hours since 2020-01-01 00:00:00"},
        "b1": {"axis": "Z", "units": "km"},
        "c1": {"standard_name": "projection_y_coordinate", "units": "m"},
        "d": {"axis": "X", "units": "cm"},
    }
    renamed: Variables = {}
    for name, (dims, values, attributes) in variables().items():
        new = names.get(name, name)
        renamed[new] = (tuple(names[d] for d in dims), values, marks.get(new, attributes))
    for name, standard in (("u", "x_wind"), ("v", "y_wind"), ("w", "upward_air_velocity")):
        dims, values, attributes = renamed.pop(name)
        renamed["q" + name] = (dims, values, attributes | {"standard_name": standard})
    found = source(classic(tmp_path / "a.nc", renamed))
    assert found.grid.spacing == pytest.approx((0.005, 0.25, 1000.0))
    assert found.times.tolist() == [0.0, 7200.0, 14400.0]
    np.testing.assert_array_equal(found.read("velocity", 0, 1)[2], DATA["w"][1].transpose(2, 1, 0))


def test_coordinates_that_descend_are_turned_round(tmp_path: Path) -> None:
    turned = variables(z=(("z",), np.array([1.5, 0.5]), {"positive": "up"}))
    found = source(classic(tmp_path / "a.nc", turned))
    assert found.grid.spacing == (0.5, 0.25, 1.0) and found.about["turned_round"] == ["z"]
    np.testing.assert_array_equal(found.read("theta", 0, 0), DATA["theta"][0, ::-1].transpose(2, 1, 0))


def test_a_plane_has_one_cell_across_and_no_flow_through_it(tmp_path: Path) -> None:
    dims = ("z", "x")
    plane: Variables = {name: ((name,), np.array(COORDINATES[name]), {}) for name in dims}
    plane["u"], plane["w"] = (dims, DATA["u"][0, :, 0], {}), (dims, DATA["w"][0, :, 0], {"units": "m/s"})
    found = source(classic(tmp_path / "a.nc", plane))
    assert found.grid.shape == (5, 1, 2) and found.grid.boundaries[1] == ("periodic", "periodic")
    got = found.read("velocity", 0, 0)
    np.testing.assert_array_equal(got[0, :, 0], DATA["u"][0, :, 0].T)
    np.testing.assert_array_equal(got[2, :, 0], DATA["w"][0, :, 0].T)
    assert not got[1].any() and found.times.tolist() == [0.0]


def test_trajectories_and_dimensions_of_components(tmp_path: Path) -> None:
    values = RNG.standard_normal((2, 3, 5, 4, 2, 3))
    dims = ("realization", "time", "x", "y", "z", "component")
    found = source(
        modern(tmp_path / "a.nc", {"velocity": (dims, values, {"units": "m/s"})}), lengths=(1, 1, 1), time_step=0.5
    )
    assert found.num_trajectories == 2 and found.times.tolist() == [0.0, 0.5, 1.0]
    np.testing.assert_array_equal(found.read("velocity", 1, 2), np.moveaxis(values[1, 2], -1, 0))


def test_axes_of_the_user_for_dimensions_without_names(tmp_path: Path) -> None:
    values = RNG.standard_normal((3, 5, 4, 2))
    path = classic(tmp_path / "a.nc", {"q": (("d0", "d1", "d2", "d3"), values, {})})
    with pytest.raises(ValueError, match="pass what the axes mean"):
        source(path)
    with pytest.raises(ValueError, match="pass the lengths of the box"):
        source(path, axes="t x y z", time_step=1.0)
    with pytest.raises(ValueError, match="times of 3 frames .* pass the time step"):
        source(path, axes="t x y z", lengths=(1, 1, 1))
    found = source(path, axes="t x y z", lengths=(1, 1, 1), time_step=1.0)
    np.testing.assert_array_equal(found.read("q", 0, 1), values[1])


def test_a_file_becomes_a_store(tmp_path: Path) -> None:
    [path] = import_files(classic(tmp_path / "les.nc", variables()), tmp_path / "out.zarr", flux=["velocity"])
    store = open_store(path)
    assert store.family == "les" and store.specs["velocity"].constraint == "solenoidal"
    np.testing.assert_array_equal(store.read("theta", 0, 1).numpy(), DATA["theta"][1].transpose(2, 1, 0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": (("x",), np.array([0, 1, 2, 3, 5.0]), {})}, "evenly spaced.*'x'"),
        ({"x": (("x",), np.array([0, 1, 1, 1, 2.0]), {})}, "evenly spaced.*'x'"),
        ({"x": (("x",), np.array([0, 1, np.nan, 3, 4]), {})}, "finite coordinates along 'x'"),
        ({"x": (("x",), np.arange(5.0), {"units": "degrees_east"})}, "latitudes or longitudes"),
        ({"z": (("z",), np.array([1000.0, 500.0]), {"units": "hPa"})}, "unit of a length, got 'hPa' along 'z'"),
        ({"time": (("time",), np.arange(3.0), {"units": "months since 2000-01-01"})}, "time of fixed length"),
        ({"time": (("time",), np.array([0.0, 2.0, 1.0]), {})}, "increasing times"),
        ({"x": None}, "coordinates along 'x' .* pass the lengths"),
        ({"time": None}, "times of 3 frames"),
        ({"p": (("time", "z", "y", "xu"), np.zeros((3, 2, 4, 6)), {}), "xu": (("xu",), np.arange(6.0), {"axis": "X"})},
         "on the same points.*'xu'"),
    ],
)  # fmt: skip
def test_what_is_no_even_box_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        source(classic(tmp_path / "a.nc", variables(**changes)))
    assert "a.nc" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("write", [classic, modern])
@pytest.mark.parametrize("mark", [np.nan, np.float32(-999)])
def test_missing_values_are_refused(tmp_path: Path, write: Any, mark: float) -> None:
    holes = DATA["theta"].copy()
    holes[1, 0, 2, 2] = mark
    attributes = {"_FillValue": np.float32(-999)}
    found = source(write(tmp_path / "a.nc", variables(theta=(tuple(SIZES), holes, attributes))))
    found.read("theta", 0, 0)
    with pytest.raises(ValueError, match=r"numbers everywhere in 'theta' of .*a\.nc.*frame 1"):
        found.read("theta", 0, 1)


@pytest.mark.parametrize("write", [classic, modern])
def test_files_that_are_cut_off_are_named(tmp_path: Path, write: Any) -> None:
    path = write(tmp_path / "a.nc", variables())
    data = path.read_bytes()
    for size in [0, *np.linspace(1, len(data) - 60, 20).astype(int)]:
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match="Expected") as error:
            found = source(path)
            for name in found.specs:
                found.read(name, 0, 2)
            assert len(found.specs) < 2
        assert "\n" not in str(error.value) and "a.nc" in str(error.value)


def test_sizes_that_are_only_said_take_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.nc"
    with h5py.File(modern(path, variables()), "r+") as file:
        del file["theta"]
        file.create_dataset("theta", shape=(3, 2, 4, 5 * 10**9), chunks=(1, 1, 1, 10**6), dtype="f4")
    with pytest.raises(ValueError, match="Expected"):
        source(path, dataset="theta").read("theta", 0, 0)
    data = classic(path, variables()).read_bytes()
    length = data.index(b"\0\0\0\1x\0\0\0") + 8
    path.write_bytes(data[:length] + b"\x70\0\0\0" + data[length + 4 :])
    with pytest.raises(ValueError, match="Expected"):
        source(path).read("theta", 0, 0)


def test_other_files_are_not_recognised(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.nc", "w") as file:
        file["data"] = np.zeros(3)
    (tmp_path / "b.nc").write_bytes(b"CD")
    assert not netcdf.recognises(tmp_path / "a.nc") and not netcdf.recognises(tmp_path / "b.nc")
    (tmp_path / "c.nc").write_bytes(b"CDF\x05" + bytes(100))
    with pytest.raises(ValueError, match="nccopy -k nc4"):
        source(tmp_path / "c.nc")


@pytest.mark.parametrize(("units", "factor"), [("km", 1e3), ("metres", 1.0), ("", 1.0), ("mm", 1e-3)])
def test_units_of_length(units: str, factor: float) -> None:
    assert cf.metres(units) == factor


@pytest.mark.parametrize(
    ("units", "factor"), [("days since 1970-01-01", 86400.0), ("s", 1.0), ("ms", 1e-3), ("hours", 3600.0)]
)
def test_units_of_time(units: str, factor: float) -> None:
    assert cf.seconds(units) == factor
