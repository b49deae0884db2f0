"""Files that are damaged, contradict themselves or were made to harm: one line, and nothing half-written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign
import numpy as np
import pytest

from latentphys.data import open_store
from latentphys.data.importing import ImportOptions, import_files
from latentphys.data.importing.h5 import H5File

Change = Callable[[Any], object]


def refused(path: Path, match: str, **settings: Any) -> str:
    """Import a path in vain: one line that matches, and nothing new beside it."""
    before = sorted(path.parent.iterdir())
    with pytest.raises(ValueError, match=match) as info:
        import_files(path, path.parent / "out.zarr", **settings)
    assert sorted(path.parent.iterdir()) == before
    assert "\n" not in str(info.value) and str(info.value).startswith("Expected")
    return str(info.value)


def replace(name: str, change: Callable[[np.ndarray], Any]) -> Change:
    """A change of an array that keeps its attributes."""

    def replaced(file: Any) -> None:
        values, attributes = file[name][...], dict(file[name].attrs)
        del file[name]
        file[name] = change(values)
        file[name].attrs.update(attributes)

    return replaced


def put(name: str, index: tuple[int, ...], value: float) -> Change:
    return lambda file: file[name].__setitem__(index, value)


def attribute(name: str, key: str, value: Any) -> Change:
    return lambda file: file[name].attrs.__setitem__(key, value)


def remove(name: str) -> Change:
    return lambda file: file.__delitem__(name)


def both(*changes: Change) -> Change:
    return lambda file: [change(file) for change in changes]


def damaged(path: Path, change: Change) -> Path:
    with foreign.h5py.File(path, "r+") as file:
        change(file)
    return path


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (remove("dimensions"), "a group 'dimensions' in"),
        (remove("boundary_conditions"), "a group 'boundary_conditions' in"),
        (remove("t2_fields"), "a group 't2_fields' in"),
        (remove("t1_fields/velocity"), "'t1_fields/velocity' in"),
        (remove("dimensions/y"), "'dimensions/y' in"),
        (remove("scalars/heating"), "'scalars/heating' in"),
        (lambda file: file.attrs.__delitem__("n_trajectories"), "an attribute 'n_trajectories'"),
        (
            attribute("/", "n_trajectories", 3),
            r"'t0_fields/pressure' .* \(b = 3, t = 3, .* got shape \(2, 3, 6, 4, 5\)",
        ),
        (attribute("/", "n_trajectories", "two"), "a whole number 'n_trajectories' .* got 'two'"),
        (attribute("/", "n_trajectories", 10**15), "a whole number 'n_trajectories' .* got 1000000000000000"),
        (attribute("/", "n_trajectories", np.inf), "a whole number 'n_trajectories' .* got inf"),
        (attribute("/", "n_spatial_dims", 2), "Expected 2 spatial_dims, .* got .*'z'"),
        (attribute("/", "grid_type", "spherical"), "grid_type 'cartesian' .* got 'spherical'"),
        (attribute("t1_fields/velocity", "dim_varying", [True]), "dim_varying of 3 axes .*velocity"),
        (attribute("boundary_conditions/x_periodic_0", "bc_type", "MOVING"), "bc_type of WALL | .* got 'MOVING'"),
        (put("boundary_conditions/x_periodic_0/mask", (0,), False), "axis 'x' to be periodic at both ends"),
        (replace("t1_fields/velocity", lambda v: v[..., :2]), r"velocity' .* c = 3\), got shape \(2, 3, 6, 4, 5, 2\)"),
        (replace("t0_fields/pressure", lambda v: v[:, :2]), r"pressure' .* t = 3.* got shape \(2, 2, 6, 4, 5\)"),
        (replace("t0_fields/pressure", lambda v: v[:, :, :1]), r"pressure' .* got shape \(2, 3, 1, 4, 5\)"),
        (replace("dimensions/x", lambda v: v**2), "evenly spaced, increasing coordinates in .*dimensions/x"),
        (replace("dimensions/x", lambda v: v[::-1]), "evenly spaced, increasing coordinates in .*dimensions/x"),
        (replace("dimensions/time", lambda v: v[::-1]), r"increasing times in .* got 1 s and then 0.5 s \(frame 1\)"),
        (replace("dimensions/time", lambda v: 0 * v), "increasing times"),
        (replace("dimensions/time", lambda v: v + np.nan), "finite numbers in array 'dimensions/time'"),
        (replace("dimensions/time", lambda v: np.stack([v, v])), "'time' of 1 rows"),
        (replace("scalars/stirring", lambda v: v[:1]), r"scalar 'stirring' of shape \(2,\) .* got \(1,\)"),
        # without the scalar of the same name, which would stand for it
        (
            both(attribute("/", "viscosity", np.nan), attribute("scalars", "field_names", ["stirring"])),
            "finite parameters .* 'viscosity'",
        ),
        (put("t0_fields/pressure", (1, 2, 3, 0, 4), np.nan), "NaN .*'t0_fields/pressure' .*, trajectory 1, frame 2"),
        (put("t1_fields/velocity", (0, 1, 0, 0, 0, 2), np.inf), "'t1_fields/velocity' .* trajectory 0, frame 1"),
        (replace("t0_fields/pressure", lambda v: v.astype("S4")), "real numbers in array 't0_fields/pressure'"),
        (replace("t0_fields/pressure", lambda v: v + 1j), "real numbers .*complex"),
        (replace("t0_fields/pressure", lambda v: v.astype([("a", "f4"), ("b", "f4")])), "real numbers in array"),
        (replace("t0_fields/pressure", lambda v: np.zeros((0, 3, 6, 4, 5))), "numbers in array .* an empty one"),
        (attribute("t0_fields", "field_names", ["pressure", "pressure"]), "each field once .* 'pressure' twice"),
    ],
)
def test_a_file_of_the_well_that_contradicts_itself(tmp_path: Path, change: Change, match: str) -> None:
    refused(damaged(foreign.well(tmp_path / "file"), change), match)


def test_no_fields_at_all(tmp_path: Path) -> None:
    def empty(file: Any) -> None:
        for order in range(3):
            file[f"t{order}_fields"].attrs["field_names"] = []

    refused(damaged(foreign.well(tmp_path / "file"), empty), "at least one field")


@pytest.mark.parametrize(
    ("make", "change", "match"),
    [
        (foreign.pdebench_flow, remove("Vy"), r"beside the density .* got \['Vx'\]"),
        (foreign.pdebench_flow, remove("y-coordinate"), "'y-coordinate' in"),
        (foreign.pdebench_flow, remove("t-coordinate"), "'t-coordinate' in"),
        (foreign.pdebench_flow, replace("t-coordinate", lambda t: t[:2]), "3 or 4 times in 't-coordinate'"),
        (foreign.pdebench_flow, replace("t-coordinate", lambda t: -t), "increasing times in 't-coordinate'"),
        (foreign.pdebench_flow, replace("x-coordinate", lambda x: x[:3]), "6 points in 'x-coordinate'"),
        (foreign.pdebench_flow, replace("pressure", lambda p: p[:1]), r"'pressure' .*\(b = 2, t = 3.* got shape \(1, "),
        (foreign.pdebench_flow, put("Vx", (1, 0, 0, 0), np.nan), "'Vx' of .*, trajectory 1, frame 0"),
        (foreign.pdebench_scalar, replace("tensor", lambda v: v[0]), "'tensor' .* with 3 to 5 axes"),
        (foreign.pdebench_darcy, replace("nu", lambda v: v[1:]), r"'nu' .* got shape \(2, 6, 6\)"),
        (foreign.pdebench_groups, attribute("0001", "config", "a: [1"), "YAML in 'config' of '0001'"),
        (foreign.pdebench_groups, attribute("0001", "config", "text"), "a YAML mapping"),
        (foreign.pdebench_groups, remove("0002/grid/x"), "'0002/grid/x' in"),
        (foreign.pdebench_groups, remove("0002/data"), "'0002/data' in"),
        (foreign.pdebench_incompressible, replace("t", lambda t: t[0]), r"times 't' of shape \(2, 3\)"),
        (foreign.pdebench_incompressible, replace("t", lambda t: 0 * t), "increasing times in 't' of .*trajectory 0"),
        (foreign.pdebench_incompressible, replace("velocity", lambda v: v[..., :1]), "'velocity' .* c = 2"),
        (foreign.dpot, put("data", (0, 0, 2, 1), np.nan), "array 'data' of .*, trajectory 0, frame 2"),
    ],
)
def test_other_layouts_that_contradict_themselves(
    tmp_path: Path, make: Callable[[Path], Path], change: Change, match: str
) -> None:
    refused(damaged(make(tmp_path / "file"), change), match)


@pytest.mark.parametrize("make", [foreign.well, foreign.pdebench_flow, foreign.pdebench_groups, foreign.dpot])
@pytest.mark.parametrize("share", [0.0, 1e-3, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.9999])
def test_files_that_are_cut_off(tmp_path: Path, make: Callable[[Path], Path], share: float) -> None:
    path = make(tmp_path / "file")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    message = refused(path, str(path))
    assert "empty" in message if not share else "HDF5" in message or "begins with" in message


def test_a_damaged_chunk_is_found_where_the_file_has_checksums(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with foreign.h5py.File(path, "w") as file:
        file.create_dataset("data", data=foreign.numbers(6, 4, 3, 2), chunks=(6, 4, 1, 2), fletcher32=True)
        place = file["data"].id.get_chunk_info(1).byte_offset
    whole = bytearray(path.read_bytes())
    whole[place + 8] ^= 1
    path.write_bytes(whole)
    refused(path, "readable HDF5 data, got array 'data' of")


@pytest.mark.parametrize("layout", [{"chunks": (1, 64, 64, 64)}, {}])
def test_claims_without_data_cost_nothing(tmp_path: Path, layout: dict[str, Any]) -> None:
    """Petabytes by their shape, a few kilobytes on disk."""
    path = tmp_path / "file"
    with foreign.h5py.File(path, "w") as file:
        file.create_dataset("data", shape=(100_000, 4096, 4096, 4096), dtype="f8", **layout)
    assert path.stat().st_size < 10_000
    refused(path, r"array 'data' of .* to be complete, got 0 of \d+ (chunks|bytes)", options=ImportOptions(axes="txyz"))


def test_a_run_that_stopped_halfway(tmp_path: Path) -> None:
    """Frames that were never written are not fluid at rest."""
    path = tmp_path / "file"
    with foreign.h5py.File(path, "w") as file:
        data = file.create_dataset("data", shape=(6, 4, 3, 2), dtype="f4", chunks=(6, 4, 1, 2))
        data[:, :, :2] = foreign.numbers(6, 4, 2, 2)
    refused(path, "to be complete, got 2 of 3 chunks of shape")


def test_large_coordinates_and_attributes_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = foreign.well(tmp_path / "file")
    monkeypatch.setattr("latentphys.data.importing.h5.MOST_SMALL_NUMBERS", 5)
    refused(path, "at most 5 numbers in array 'dimensions/x'")
    monkeypatch.setattr("latentphys.data.importing.h5.MOST_ATTRIBUTE_BYTES", 4)
    refused(path, "attributes of '/' .*has the shape")


def test_nothing_is_followed_out_of_a_file(tmp_path: Path) -> None:
    h5py = foreign.h5py
    (tmp_path / "secret").mkdir()
    secret = foreign.dpot(tmp_path / "secret" / "file")
    for name, link in (("external", h5py.ExternalLink(str(secret), "data")), ("missing", h5py.ExternalLink("no", "x"))):
        with h5py.File(tmp_path / name, "w") as file:
            file["data"] = link
        refused(tmp_path / name, "link to another file, which is not followed", format="dpot")
    path = tmp_path / "through"
    with h5py.File(path, "w") as file:
        file["elsewhere"] = h5py.ExternalLink(str(secret), "/")
        file["data"] = h5py.SoftLink("/elsewhere/data")
    refused(path, "link to another file, which is not followed", format="dpot")
    path = tmp_path / "round"
    with h5py.File(path, "w") as file:
        file["data"] = h5py.SoftLink("/data")
    refused(path, "too many links", format="dpot")
    path = tmp_path / "virtual"
    with h5py.File(path, "w") as file:
        layout = h5py.VirtualLayout((6, 4, 3, 2), "f4")
        layout[...] = h5py.VirtualSource(secret, "data", (6, 4, 3, 2))
        file.create_virtual_dataset("data", layout)
    refused(path, "an array kept in other files")
    path, raw = tmp_path / "raw", tmp_path / "secret" / "raw"
    raw.write_bytes(bytes(4 * 144))
    with h5py.File(path, "w") as file:
        file.create_dataset("data", (6, 4, 3, 2), "f4", external=str(raw))
    refused(path, "an array kept in other files")


def test_objects_and_texts_are_not_read(tmp_path: Path) -> None:
    h5py = foreign.h5py
    for i, dtype in enumerate((h5py.string_dtype(), h5py.vlen_dtype(np.float64), h5py.ref_dtype)):
        path = tmp_path / f"file {i}"
        with h5py.File(path, "w") as file:
            file.create_dataset("data", (6, 4, 3, 2), dtype)
        refused(path, "real numbers in array 'data'")


def test_links_within_a_file_are_followed(tmp_path: Path) -> None:
    path = foreign.dpot(tmp_path / "file")
    with foreign.h5py.File(path, "r+") as file:
        file["group/relative"] = foreign.h5py.SoftLink("inner/array")
        file["group/inner/array"] = np.arange(3.0)
        file["soft"] = foreign.h5py.SoftLink("/group/relative")
        file["dangling"] = foreign.h5py.SoftLink("/nothing")
    file = H5File(path)
    assert file.numbers("soft").tolist() == [0, 1, 2] and file.has("soft") and not file.has("dangling")
    with pytest.raises(ValueError, match="'dangling' in .* got none"):
        file.array("dangling")
    with pytest.raises(ValueError, match="an array 'group' in .* got a group"):
        file.array("group")


def test_nothing_there_nothing_known_and_nothing_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(tmp_path / "missing", "got nothing there; check the path")
    path = tmp_path / "file"
    path.write_bytes(b"some text that is no data")
    refused(path, r"files of well \| pdebench \| .* begins with b'some text that i' that none of them recognises")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", "an empty folder that none of them")
    refused(tmp_path / "folder", "got no HDF5 file", format="well")
    foreign.dpot(path)
    refused(path, "a group 'dimensions' in", format="well")
    refused(path, "a file of PDEBench", format="pdebench")

    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    refused(path, "a file that can be read, got .*Permission denied")


def test_several_formats_that_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentphys.data.importing.well.recognises", lambda path: True)
    refused(foreign.dpot(tmp_path / "file"), r"got several that fit \(well, dpot\); say which")


def test_all_stores_or_none(tmp_path: Path) -> None:
    """The second of two grids is damaged: what was there before stays, and so does nothing else."""
    root = tmp_path / "set"
    foreign.well(root / "a", (6, 4))
    damaged(foreign.well(root / "b", (4, 4)), put("t0_fields/pressure", (0, 0, 0, 0), np.nan))
    message = refused(root, "NaN")
    assert str(root / "b") in message
    (old,) = import_files(root / "a", tmp_path / "out.zarr")
    before = open_store(old).attributes["provenance"]["time"]
    with pytest.raises(ValueError, match="NaN"):
        import_files(root, tmp_path / "out.zarr", overwrite=True)
    assert open_store(old).attributes["provenance"]["time"] == before
    assert [p.name for p in tmp_path.iterdir() if p != root] == ["out.zarr"]
    foreign.well(root / "b", (4, 4))
    with pytest.raises(ValueError, match="a new path"):
        import_files(root, tmp_path / "out.zarr")
    assert len(import_files(root, tmp_path / "out.zarr", overwrite=True)) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out-2.zarr", "out.zarr", "set"]


def test_a_rename_that_fails_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "set"
    foreign.well(root / "a", (6, 4))
    foreign.well(root / "b", (4, 4))
    import_files(root / "a", tmp_path / "out.zarr", options=ImportOptions(family="first"))
    rename = Path.rename

    def failing(path: Path, target: Path) -> Path:
        if target.name == "out-2.zarr" and "import" in path.parent.name:
            raise OSError("disk full")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="disk full"):
        import_files(root, tmp_path / "out.zarr", overwrite=True)
    assert open_store(tmp_path / "out.zarr").family == "first"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.zarr", "set"]
