"""VTK image data written by hand and by VTK itself: axes, centring, times, and every way of writing numbers down."""

import base64
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentphys.data import open_store
from latentphys.data.importing import ImportOptions, import_files, vtk
from latentphys.data.importing.source import Source

SHAPE = (4, 3, 2)
SPACING = (0.5, 0.25, 2.0)
RNG = np.random.default_rng(0)
U = RNG.standard_normal((3, *SHAPE))
P = RNG.standard_normal(SHAPE)


def source(path: Path, **options: Any) -> Source:
    [found] = vtk.sources(path, ImportOptions(**options))
    return found


def x_fastest(values: np.ndarray) -> list[Any]:
    """Numbers one after another as VTK counts, written out as loops; a vector's components side by side."""
    nx, ny, nz = values.shape[-3:]
    places = [(i, j, k) for k in range(nz) for j in range(ny) for i in range(nx)]
    rows = values.reshape(-1, nx, ny, nz)
    return [float(row[place]) for place in places for row in rows]


def legacy(
    path: Path,
    u: np.ndarray = U,
    p: np.ndarray = P,
    binary: bool = False,
    where: str = "CELL",
    time: float | None = None,
) -> Path:
    """A legacy file with a vector U and a field array p; text or big-endian doubles."""

    def numbers(values: list[Any]) -> bytes:
        return struct.pack(f">{len(values)}d", *values) if binary else " ".join(map(repr, values)).encode()

    nx, ny, nz = (n + (where == "CELL") for n in p.shape)
    text = (
        b"# vtk DataFile Version 3.0\nby hand\n"
        + (b"BINARY" if binary else b"ASCII")
        + b"\nDATASET STRUCTURED_POINTS\n"
    )
    if time is not None:
        text += b"FIELD FieldData 1\nTimeValue 1 1 double\n" + numbers([time]) + b"\n"
    text += f"DIMENSIONS {nx} {ny} {nz}\nORIGIN 1 2 3\nSPACING 0.5 0.25 2\n{where}_DATA {p.size}\n".encode()
    text += b"VECTORS U double\n" + numbers(x_fastest(u)) + b"\nFIELD more 1\np 1 %d double\n" % p.size
    path.write_bytes(text + numbers(x_fastest(p)) + b"\n")
    return path


def vti(
    path: Path, mode: str = "ascii", p: np.ndarray = P, time: float | None = None, extra: str = "", **changes: str
) -> Path:
    """A .vti file with the cell array p: as text, base64, compressed base64, or raw after the XML."""
    raw = struct.pack(f"<{p.size}d", *x_fastest(p))
    appended, compressor, form = b"", "", f'format="{"ascii" if mode == "ascii" else "binary"}"'
    body = " ".join(map(repr, x_fastest(p)))
    if mode == "base64":
        body = base64.b64encode(struct.pack("<I", len(raw))).decode() + base64.b64encode(raw).decode()
    elif mode == "joined":
        body = base64.b64encode(struct.pack("<I", len(raw)) + raw).decode()
    elif mode in ("zlib", "zlib without its end"):
        compressor = 'compressor="vtkZLibDataCompressor"'
        blocks = [zlib.compress(raw[:100]), zlib.compress(raw[100:])] if len(raw) == 192 else []
        blocks = blocks if mode == "zlib" else [blocks[0], blocks[1][:-4]]
        head = struct.pack("<5I", 2, 100, 92, *map(len, blocks))
        body = base64.b64encode(head).decode() + base64.b64encode(b"".join(blocks)).decode()
    elif mode == "raw":
        form, body = 'format="appended" offset="3"', ""
        appended = b'<AppendedData encoding="raw">\n_abc' + struct.pack("<I", len(raw)) + raw + b"\n</AppendedData>"
    ends = " ".join(f"0 {n}" for n in p.shape)
    box = {"WholeExtent": ends, "Origin": "1 2 3", "Spacing": "0.5 0.25 2"} | changes
    field = (
        ""
        if time is None
        else (
            '<FieldData><DataArray type="Float64" Name="TimeValue" NumberOfTuples="1" format="ascii">'
            f"{time}</DataArray></FieldData>"
        )
    )
    text = (
        f'<?xml version="1.0"?>\n<VTKFile type="ImageData" version="0.1" byte_order="LittleEndian" {compressor}>\n'
        f"<ImageData {' '.join(f'{k}={v!r}' for k, v in box.items())}>{field}<Piece Extent={ends!r}>\n{extra}<CellData>"
        f'<DataArray type="Float64" Name="p" {form}>\n{body}\n</DataArray></CellData></Piece></ImageData>\n'
    )
    path.write_bytes(text.encode() + appended + b"</VTKFile>\n")
    return path


def vtkhdf(path: Path, times: list[float] | None = None, **attributes: Any) -> Path:
    """A VTKHDF file as the specification has it; p doubles from step to step, U is written once."""
    h5py = pytest.importorskip("h5py")
    p = np.array(x_fastest(P)).reshape(SHAPE[::-1])
    u = np.array(x_fastest(U)).reshape(*SHAPE[::-1], 3)
    with h5py.File(path, "w") as file:
        root = file.create_group("VTKHDF")
        root.attrs.create("Type", np.bytes_(attributes.pop("Type", "ImageData")))
        extent = np.array([0, 4, 0, 3, 0, 2])
        defaults = {
            "Version": np.array([2, 0]),
            "WholeExtent": extent,
            "Origin": np.ones(3),
            "Spacing": np.array(SPACING),
        }
        for name, value in {**defaults, "Direction": np.eye(3).ravel(), **attributes}.items():
            root.attrs[name] = value
        if times is None:
            root["CellData/p"], root["CellData/U"] = p, u
        else:
            root["CellData/p"], root["CellData/U"] = np.stack([p * 2**i for i in range(len(times))]), u[None]
            root["Steps/Values"], root["Steps/CellDataOffsets/U"] = np.array(times), np.zeros(len(times), dtype=int)
            root["Steps"].attrs["NSteps"] = len(times)
    return path


@pytest.mark.parametrize("binary", [False, True])
def test_legacy_files(tmp_path: Path, binary: bool) -> None:
    found = source(legacy(tmp_path / "any.name", binary=binary, time=0.25))
    assert found.grid.shape == SHAPE and found.grid.spacing == SPACING and found.times.tolist() == [0.25]
    assert {name: (s.kind, s.unit) for name, s in found.specs.items()} == {
        "velocity": ("vector", "m/s"),
        "p": ("scalar", "1"),
    }
    np.testing.assert_array_equal(found.read("velocity", 0, 0), U)
    np.testing.assert_array_equal(found.read("p", 0, 0), P)
    assert found.about["origin"] == [1.0, 2.0, 3.0]


def test_values_at_points_count_as_cells_around_them(tmp_path: Path) -> None:
    found = source(legacy(tmp_path / "a.vtk", where="POINT"))
    assert found.grid.shape == SHAPE and found.grid.lengths == (2.0, 0.75, 4.0)
    assert found.about["centring"] == "points"
    np.testing.assert_array_equal(found.read("velocity", 0, 0), U)


@pytest.mark.parametrize("mode", ["ascii", "base64", "joined", "zlib", "raw"])
def test_xml_files(tmp_path: Path, mode: str) -> None:
    found = source(vti(tmp_path / "a", mode, time=0.5))
    np.testing.assert_array_equal(found.read("p", 0, 0), P)
    assert found.times.tolist() == [0.5] and found.grid.spacing == SPACING


def test_damage_in_encoded_numbers_is_found(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 of 92 bytes in block 1"):
        source(vti(tmp_path / "a.vti", "zlib without its end")).read("p", 0, 0)
    raw = vti(tmp_path / "a.vti", "raw").read_bytes()
    for length in (184, 200):
        (tmp_path / "a.vti").write_bytes(raw.replace(struct.pack("<I", 192), struct.pack("<I", length)))
        with pytest.raises(ValueError, match="of 192 bytes"):
            source(tmp_path / "a.vti").read("p", 0, 0)
    data = vti(tmp_path / "b.vti", "base64").read_bytes()
    middle = data.index(b"</DataArray>") - 100
    for wrong in (b"A", b"=", b"!", "ä".encode()):
        (tmp_path / "b.vti").write_bytes(data[:middle] + wrong + data[middle:])
        with pytest.raises(ValueError, match=r"with 'p' that can be read at .*b\.vti"):
            source(tmp_path / "b.vti").read("p", 0, 0)
    for old, new, message in (
        (b'"binary"', b'"binray"', "the format 'binray'"),
        (b"LittleEndian", b"little", "byte_order LittleEndian .*'little'"),
        (b"<VTKFile ", b'<VTKFile header_type="Int8" ', "header_type UInt32 .*'Int8'"),
        (b"<VTKFile ", b'<VTKFile compressor="zip" ', "compressor vtkZLibDataCompressor .*'zip'"),
    ):
        (tmp_path / "b.vti").write_bytes(data.replace(old, new))
        with pytest.raises(ValueError, match=message):
            source(tmp_path / "b.vti").read("p", 0, 0)


def test_lz4_without_vtk_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = vti(tmp_path / "a.vti", "zlib")
    path.write_bytes(path.read_bytes().replace(b"ZLib", b"LZ4"))
    monkeypatch.setitem(sys.modules, "vtkmodules.util.numpy_support", None)
    with pytest.raises(ValueError, match=r"got none; install latentphys\[viz\]"):
        source(path).read("p", 0, 0)


def test_readers_of_vtk_agree_on_files_written_by_hand(tmp_path: Path) -> None:
    pytest.importorskip("pyvista")
    from vtkmodules.util.numpy_support import vtk_to_numpy
    from vtkmodules.vtkIOHDF import vtkHDFReader
    from vtkmodules.vtkIOLegacy import vtkStructuredPointsReader
    from vtkmodules.vtkIOXML import vtkXMLImageDataReader

    paths: list[Any] = [
        (vti(tmp_path / mode, mode), vtkXMLImageDataReader) for mode in ("ascii", "base64", "zlib", "raw")
    ]
    paths += [(legacy(tmp_path / f"{binary}", binary=binary), vtkStructuredPointsReader) for binary in (False, True)]
    paths += [(vtkhdf(tmp_path / "hdf"), vtkHDFReader)]
    for path, kind in paths:
        reader, found = kind(), source(path)
        reader.SetFileName(str(path))
        reader.Update()
        image = reader.GetOutputDataObject(0)
        assert image.GetSpacing() == found.grid.spacing and list(image.GetOrigin()) == found.about["origin"]
        cells = image.GetCellData()
        for name, array in (("p", "p"), ("velocity", "U")):
            if name in found.specs:
                theirs = vtk_to_numpy(cells.GetArray(array))
                np.testing.assert_array_equal(theirs.ravel(), x_fastest(found.read(name, 0, 0)))


@pytest.mark.parametrize("mode", ["Ascii", "Binary", "Appended"])
@pytest.mark.parametrize("compressor", ["None", "ZLib", "LZMA", "LZ4"])
def test_files_of_the_xml_writer_of_vtk(tmp_path: Path, mode: str, compressor: str) -> None:
    pyvista = pytest.importorskip("pyvista")
    from vtkmodules.vtkIOXML import vtkXMLImageDataWriter

    image = pyvista.ImageData(dimensions=(5, 4, 3), spacing=SPACING, origin=(1, 2, 3))
    image.cell_data["U"] = np.array(x_fastest(U), dtype=np.float32).reshape(-1, 3)
    image.cell_data["solid"] = np.array(x_fastest(P > 0), dtype=np.uint8)
    image.point_data["other"] = np.arange(60)
    image.field_data["TimeValue"] = [0.5]
    for encode, wide in ((False, 32), (True, 64)):
        writer, path = vtkXMLImageDataWriter(), tmp_path / f"{encode}.vti"
        writer.SetInputData(image)
        writer.SetFileName(str(path))
        getattr(writer, f"SetDataModeTo{mode}")()
        getattr(writer, f"SetCompressorTypeTo{compressor}")()
        getattr(writer, f"SetHeaderTypeToUInt{wide}")()
        writer.SetEncodeAppendedData(encode)
        writer.SetBlockSize(96)
        writer.Write()
        found = source(path)
        np.testing.assert_allclose(found.read("velocity", 0, 0), U.astype(np.float32), rtol=1e-6)
        assert found.solid is not None and np.array_equal(found.solid[0], P > 0)
        assert found.times.tolist() == [0.5] and found.about["left_out"] == ["other"]


@pytest.mark.parametrize("binary", [False, True])
def test_files_of_the_legacy_writer_of_vtk(tmp_path: Path, binary: bool) -> None:
    pyvista = pytest.importorskip("pyvista")
    image = pyvista.ImageData(dimensions=(5, 4, 3), spacing=SPACING)
    image.cell_data["U"] = np.array(x_fastest(U)).reshape(-1, 3)
    image.cell_data["a b"] = np.array(x_fastest(P))
    image.cell_data.active_vectors_name = "U"
    image.point_data["tags"] = np.arange(60, dtype=np.int16)
    image.GetCellData().GetArray("U").GetRange(-1)
    image.save(tmp_path / "a.vtk", binary=binary)
    assert b"METADATA" in (tmp_path / "a.vtk").read_bytes()
    found = source(tmp_path / "a.vtk")
    np.testing.assert_allclose(found.read("velocity", 0, 0), U, rtol=1e-6)
    np.testing.assert_allclose(found.read("a_b", 0, 0), P, rtol=1e-6)


def test_vtkhdf_with_and_without_steps(tmp_path: Path) -> None:
    found = source(vtkhdf(tmp_path / "a"))
    np.testing.assert_array_equal(found.read("p", 0, 0), P)
    found = source(vtkhdf(tmp_path / "b", times=[0.5, 1.0, 4.0]))
    assert found.times.tolist() == [0.5, 1.0, 4.0] and found.grid.spacing == SPACING
    for step in range(3):
        np.testing.assert_array_equal(found.read("p", 0, step), P * 2**step)
        np.testing.assert_array_equal(found.read("velocity", 0, step), U)


def test_numbered_files_are_frames_in_natural_order(tmp_path: Path) -> None:
    for number in (2, 10, 1):
        legacy(tmp_path / f"flow_{number}.vtk", p=number * P)
    (tmp_path / "notes.txt").write_text("not VTK")
    assert vtk.recognises(tmp_path)
    found = source(tmp_path, time_step=0.1)
    np.testing.assert_allclose(found.times, [0.0, 0.1, 0.2])
    assert [float(found.read("p", 0, i)[0, 0, 0] / P[0, 0, 0]) for i in range(3)] == pytest.approx([1, 2, 10])
    assert found.about["files_left_out"] == ["notes.txt"]
    with pytest.raises(ValueError, match="times of 3 files .* pass the time step"):
        source(tmp_path)
    legacy(tmp_path / "other_1.vtk")
    with pytest.raises(ValueError, match=r"one series .*'flow', 'other'"):
        source(tmp_path, time_step=0.1)


def test_times_come_from_files_and_collections(tmp_path: Path) -> None:
    for i, time in enumerate((0.0, 0.3, 0.4)):
        vti(tmp_path / f"a{i}.vti", p=(i + 1) * P, time=time)
    assert source(tmp_path).times.tolist() == [0.0, 0.3, 0.4]
    entries = "".join(f'<DataSet timestep="{t}" part="0" file="a{i}.vti"/>' for t, i in ((5, 1), (2, 2)))
    text = f'<VTKFile type="Collection"><Collection>{entries}</Collection></VTKFile>'
    (tmp_path / "a.pvd").write_text(text)
    for path in (tmp_path / "a.pvd", tmp_path):
        found = source(path)
        assert found.times.tolist() == [2.0, 5.0]
        np.testing.assert_array_equal(found.read("p", 0, 0), 3 * P)
    (tmp_path / "a.pvd").write_text(text.replace("a2.vti", "gone.vti"))
    with pytest.raises(ValueError, match="a file that exists"):
        source(tmp_path / "a.pvd")


def test_an_axis_of_one_point_is_one_cell_thick(tmp_path: Path) -> None:
    flat = legacy(tmp_path / "a.vtk", u=U[..., :1], p=P[..., :1])
    flat.write_bytes(flat.read_bytes().replace(b"DIMENSIONS 5 4 2", b"DIMENSIONS 5 4 1"))
    given = (("no_slip", "no_slip"), ("no_slip", "free_slip"), ("no_slip", "no_slip"))
    grid = source(flat, boundaries=given).grid
    assert grid.shape == (4, 3, 1) and grid.boundaries == (*given[:2], ("periodic", "periodic"))


def test_options_name_what_files_do_not(tmp_path: Path) -> None:
    found = source(legacy(tmp_path / "a.vtk"), lengths=(4.0, 3.0, 2.0), units={"p": "Pa"}, family="jet", dataset="p")
    assert found.grid.spacing == (1.0, 1.0, 1.0) and found.family == "jet"
    assert list(found.specs) == ["p"] and found.specs["p"].unit == "Pa"
    with pytest.raises(ValueError, match=r"one of the arrays \['U', 'p'\]"):
        source(tmp_path / "a.vtk", dataset="T")


def test_a_series_becomes_a_store(tmp_path: Path) -> None:
    for i in range(2):
        legacy(tmp_path / f"in{i}.vtk", p=(i + 1) * P, time=0.5 * i, binary=True)
    [path] = import_files(tmp_path, tmp_path / "out.zarr")
    store = open_store(path)
    assert store.times.tolist() == [0.0, 0.5]
    np.testing.assert_array_equal(store.read("p", 0, 1).numpy(), 2 * P)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"STRUCTURED_POINTS", b"UNSTRUCTURED_GRID", "image data .*UNSTRUCTURED_GRID; resample"),
        (b"STRUCTURED_POINTS", b"RECTILINEAR_GRID", "image data .*RECTILINEAR_GRID; resample"),
        (b"DIMENSIONS 5 4 3", b"DIMENSIONS 99999 99999 99999", "too small"),
        (b"DIMENSIONS 5 4 3", b"DIMENSIONS 5 4 0", "three axes with a point each"),
        (b"DIMENSIONS 5 4 3", b"DIMENSIONS 5 4", "DIMENSIONS"),
        (b"SPACING 0.5", b"SPACING -1", "positive spacings"),
        (b"CELL_DATA 24", b"CELL_DATA 23", "'CELL_DATA 23' for 24 values"),
        (b"p 1 24", b"p 9999 99999999999", "numbers of an array"),
        (b"p 1 24 double", b"p 1 24 string", "arrays of numbers .*'string'; leave it out"),
        (b"VECTORS U double", b"VECTORS U double extra\nPOLYGONS 1 2 3", "is damaged"),
        (b"DIMENSIONS 5", b"FIELD FieldData 1\nTimeValue 0 1 double\nDIMENSIONS 5", "is damaged"),
    ],
)
@pytest.mark.parametrize("binary", [False, True])
def test_legacy_files_that_are_wrong(tmp_path: Path, old: bytes, new: bytes, message: str, binary: bool) -> None:
    path = legacy(tmp_path / "a.vtk", binary=binary)
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))
    with pytest.raises(ValueError, match=message) as error:
        source(path).read("p", 0, 0)
    assert "a.vtk" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"Direction": "0 1 0 1 0 0 0 0 1"}, "box along the axes .*resample"),
        ({"WholeExtent": "0 99999 0 99999 0 99999"}, "one piece"),
        ({"WholeExtent": "a b"}, "to float: 'a'; it is damaged"),
        ({"Spacing": "1 1 nan"}, "positive spacings"),
        (
            {"extra": '<CellData><DataArray type="Float64" Name="q" format="ascii">1 2</DataArray></CellData>'},
            "24 numbers",
        ),
        ({"extra": '<PointData><DataArray type="String" Name="q" format="ascii">1</DataArray></PointData>'}, ""),
    ],
)
def test_xml_files_that_are_wrong(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    path = vti(tmp_path / "a.vti", **changes)  # type: ignore[arg-type]
    if not message:
        assert source(path).about["left_out"] == ["q"]
        return
    with pytest.raises(ValueError, match=message) as error:
        source(path).read("q" if "extra" in changes else "p", 0, 0)
    assert "a.vti" in str(error.value)


def test_other_kinds_of_xml_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.vtu"
    for kind in ("UnstructuredGrid", "RectilinearGrid", "PImageData"):
        path.write_text(f'<VTKFile type="{kind}"></VTKFile>')
        assert vtk.recognises(path)
        with pytest.raises(ValueError, match=f"image data .*{kind}; resample"):
            source(path)
    path.write_text('<!DOCTYPE a [<!ENTITY b "c">]><VTKFile type="ImageData"></VTKFile>')
    with pytest.raises(ValueError, match="document type"):
        source(path)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"Type": "UnstructuredGrid"}, "VTKHDF ImageData .*resample"),
        ({"WholeExtent": np.array([0, 5, 0, 3, 0, 2])}, r"of shape \(step, \(2, 3, 5\)"),
        ({"Spacing": np.array([1.0, 1.0])}, "three axes"),
        ({"Direction": np.array([0.0, 1, 0, 1, 0, 0, 0, 0, 1])}, "box along the axes"),
        ({"WholeExtent": np.array([0, 10**6, 0, 10**6, 0, 10**6])}, "too small"),
    ],
)
def test_vtkhdf_files_that_are_wrong(tmp_path: Path, attributes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        source(vtkhdf(tmp_path / "a.vtkhdf", times=[0.0, 1.0], **attributes)).read("p", 0, 0)


def test_files_that_are_cut_off_or_empty_are_named(tmp_path: Path) -> None:
    makers: list[Any] = [lambda p: legacy(p), lambda p: legacy(p, binary=True), lambda p: vtkhdf(p, times=[0.0, 1.0])]
    makers += [lambda p, mode=mode: vti(p, mode) for mode in ("ascii", "base64", "zlib", "raw")]
    for number, make in enumerate(makers):
        path = make(tmp_path / f"{number}")
        data = path.read_bytes()
        for size in [0, *np.linspace(1, len(data) - 25, 12).astype(int)]:
            path.write_bytes(data[:size])
            with pytest.raises(ValueError, match="Expected") as error:
                found = source(path)
                for name in found.specs:
                    found.read(name, 0, len(found.times) - 1)
                assert "p" not in found.specs, f"{size} of {len(data)} bytes were enough for file {number}"
            assert "\n" not in str(error.value) and path.name in str(error.value)


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    bad = P.copy()
    bad[1, 1, 1] = np.nan
    for make in (legacy, vti):
        with pytest.raises(ValueError, match=r"finite numbers in 'p' of .*bad"):
            source(make(tmp_path / "bad", p=bad)).read("p", 0, 0)


def test_boxes_that_change_within_a_series_are_refused(tmp_path: Path) -> None:
    legacy(tmp_path / "a1.vtk")
    legacy(tmp_path / "a2.vtk", u=U[:, :3], p=P[:3])
    with pytest.raises(ValueError, match=r"one box for all times.*a2\.vtk"):
        source(tmp_path, time_step=1.0)
    found = legacy(tmp_path / "a2.vtk")
    found.write_bytes(found.read_bytes().replace(b"SPACING 0.5", b"SPACING 0.6"))
    with pytest.raises(ValueError, match=r"one box for all times.*a2\.vtk"):
        source(tmp_path, time_step=1.0)


def test_other_files_are_not_recognised(tmp_path: Path) -> None:
    (tmp_path / "a.vtk").write_text("hello")
    (tmp_path / "b.vti").write_bytes(b"")
    assert not any(vtk.recognises(path) for path in (*tmp_path.iterdir(), tmp_path, tmp_path / "gone"))
    with pytest.raises(ValueError, match="got something else"):
        source(tmp_path / "a.vtk")
