"""OpenFOAM cases written by hand: fluxes come to the right faces with the right sign, patches become boundaries."""

import itertools
import shutil
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentphys import operators
from latentphys.data import open_store
from latentphys.data.importing import ImportOptions, import_files, openfoam
from latentphys.data.importing.source import Source
from latentphys.grid import Grid

SIDES = ("x-", "x+", "y-", "y+", "z-", "z+")
WALLS = dict.fromkeys(SIDES, "wall")
NUMBERS = {"scalar": 1, "vector": 3}


class Case:
    """Writes a case: cells numbered at random, faces in OpenFOAM's order, one patch for each side of the box."""

    def __init__(
        self,
        path: Path,
        shape: tuple[int, int, int] = (4, 3, 2),
        spacing: tuple[float, float, float] = (0.5, 0.25, 2.0),
        patches: Mapping[str, str] = WALLS,
        binary: bool = False,
        missing: Sequence[tuple[int, int, int]] = (),
        planes: Mapping[int, Sequence[float]] | None = None,
        wide: bool = False,
    ) -> None:
        self.path, self.shape, self.binary, self.wide = path, shape, binary, wide
        self.patches = dict(patches)
        rng = np.random.default_rng(1)
        sites = [c for c in itertools.product(*map(range, shape)) if c not in missing]
        self.number = {site: int(n) for site, n in zip(sites, rng.permutation(len(sites)), strict=True)}
        inner: list[Any] = []
        outer: dict[str, list[Any]] = {name: [] for name in (*SIDES, "obstacle")}
        for axis in range(3):
            for corner in itertools.product(*(range(n + (a == axis)) for a, n in enumerate(shape))):
                below = tuple(c - (a == axis) for a, c in enumerate(corner))
                pair: list[Any] = [self.number.get(below), self.number.get(corner)]
                if None not in pair:
                    inner.append((min(pair), max(pair), axis, corner, pair[0] < pair[1]))
                elif pair != [None, None]:
                    owner = pair[0] if pair[0] is not None else pair[1]
                    end = {0: "-", shape[axis]: "+"}.get(corner[axis])
                    name = "obstacle" if end is None else "xyz"[axis] + end
                    outer[name].append((owner, None, axis, corner, pair[0] is not None))
        self.inner = sorted(inner, key=lambda face: face[:2])
        self.outer = {name: faces for name, faces in outer.items() if faces}
        self.faces = self.inner + [face for faces in self.outer.values() for face in faces]
        self.spacing, self.planes = spacing, dict(planes or {})
        self._write_mesh()
        (path / "system").mkdir(parents=True)
        (path / "system" / "controlDict").write_text("FoamFile { format ascii; class dictionary; }\n")

    def _head(self, kind: str, binary: bool | None = None, name: str = "mesh") -> bytes:
        form = "binary" if (self.binary if binary is None else binary) else "ascii"
        arch = f"LSB;label={64 if self.wide else 32};scalar=64"
        return (
            "/*------ C++ ------*\\\n  a comment { with brackets ;\n*/\n"
            f"FoamFile\n{{\n    version 2.0;\n    format {form};\n    class {kind};\n    object {name};\n"
            f'    arch "{arch}"; // and why\n}}\n'
        ).encode()

    def _list(self, values: np.ndarray, code: str = "d") -> bytes:
        values = np.asarray(values)
        if self.binary:
            code = {"d": "d", "i": "q" if self.wide else "i"}[code]
            flat = values.ravel().tolist()
            return f"{len(values)}\n(".encode() + struct.pack(f"<{len(flat)}{code}", *flat) + b")" if flat else b"0"
        text = "\n".join(f"({' '.join(map(repr, v))})" if values.ndim == 2 else repr(v) for v in values.tolist())
        return f"{len(values)}\n(\n{text}\n)".encode() if len(values) else b"0()"

    def _coordinate(self, axis: int, level: int) -> float:
        return float(self.planes[axis][level]) if axis in self.planes else level * self.spacing[axis]

    def _write_mesh(self) -> None:
        mesh = self.path / "constant" / "polyMesh"
        mesh.mkdir(parents=True)
        nx, ny, nz = (n + 1 for n in self.shape)
        corners = list(itertools.product(range(nx), range(ny), range(nz)))
        points = np.array([[self._coordinate(a, c) for a, c in enumerate(corner)] for corner in corners])
        place = {corner: i for i, corner in enumerate(corners)}
        faces = []
        for _, _, axis, corner, is_up in self.faces:
            b, c = ((axis + 1) % 3, (axis + 2) % 3)
            around = []
            for db, dc in ((0, 0), (1, 0), (1, 1), (0, 1)):
                vertex = list(corner)
                vertex[b] += db
                vertex[c] += dc
                around.append(place[tuple(vertex)])
            faces.append(around if is_up else around[::-1])
        (mesh / "points").write_bytes(self._head("vectorField") + self._list(points))
        if self.binary:
            starts = self._list(4 * np.arange(len(faces) + 1), "i")
            text = self._head("faceCompactList") + starts + b"\n" + self._list(np.array(faces).ravel(), "i")
        else:
            rows = "\n".join(f"4({' '.join(map(str, face))})" for face in faces)
            text = self._head("faceList") + f"{len(faces)}\n(\n{rows}\n)\n".encode()
        (mesh / "faces").write_bytes(text)
        owner, neighbour = [f[0] for f in self.faces], [f[1] for f in self.inner]
        (mesh / "owner").write_bytes(self._head("labelList") + self._list(np.array(owner), "i"))
        (mesh / "neighbour").write_bytes(self._head("labelList") + self._list(np.array(neighbour), "i"))
        start, entries = len(self.inner), []
        opposite = {name: name[0] + {"-": "+", "+": "-"}[name[1]] for name in SIDES}
        for name, found in self.outer.items():
            kind = self.patches.get(name, "wall")
            more = f"neighbourPatch {opposite[name]}; transform none;" if kind == "cyclic" else ""
            kind = kind.split()[0]
            entries.append(
                f"{name} {{ type {kind}; inGroups 1({kind}); nFaces {len(found)}; startFace {start}; {more} }}"
            )
            start += len(found)
        body = f"{len(entries)}\n(\n" + "\n".join(entries) + "\n)\n"
        (mesh / "boundary").write_bytes(self._head("polyBoundaryMesh", binary=False) + body.encode())

    def _field(
        self, time: str, name: str, kind: str, dimensions: str, inside: bytes, patches: Mapping[str, bytes]
    ) -> None:
        folder = self.path / time
        folder.mkdir(exist_ok=True)
        body = b"".join(b"    %s\n    {\n%s    }\n" % (patch.encode(), entry) for patch, entry in patches.items())
        text = f"dimensions [{dimensions}];\noriented oriented;\ninternalField ".encode()
        (folder / name).write_bytes(
            self._head(kind, name=name) + text + inside + b";\nboundaryField\n{\n" + body + b"}\n// ****** //\n"
        )

    def _kind(self, patch: str) -> str:
        return self.patches.get(patch, "wall").split()[0]

    def phi(
        self, time: str, flux: np.ndarray, high: Mapping[str, np.ndarray] = {}, dimensions: str = "0 3 -1 0 0 0 0"
    ) -> None:
        """Fluxes through low faces (3, nx, ny, nz), and those through open high sides by name."""

        def value(face: Any) -> float:
            owner, _, axis, corner, is_up = face
            if corner[axis] == self.shape[axis]:
                rest = tuple(c for a, c in enumerate(corner) if a != axis)
                name = f"{'xyz'[axis]}+"
                first = (axis, *(0 if a == axis else c for a, c in enumerate(corner)))
                up = high[name][rest] if name in high else flux[first] if self._kind(name) == "cyclic" else 0.0
            else:
                up = flux[(axis, *corner)]
            return float(up if is_up else -up)

        patches = {}
        for name, faces in self.outer.items():
            empty = self._kind(name) == "empty"
            listed = self._list(np.array([] if empty else [value(f) for f in faces]))
            form = b"nonuniform 0" if empty else b"nonuniform List<scalar> " + listed
            patches[name] = (
                f"        type {'empty' if empty else 'calculated'};\n        value ".encode() + form + b";\n"
            )
        inside = b"nonuniform List<scalar>\n" + self._list(np.array([value(f) for f in self.inner]))
        self._field(time, "phi", "surfaceScalarField", dimensions, inside, patches)

    def cells(self, time: str, name: str, values: np.ndarray, dimensions: str) -> None:
        """A field in cells (nx, ny, nz) or (3, nx, ny, nz)."""
        kind = "scalar" if values.ndim == 3 else "vector"
        rows = np.zeros((len(self.number), NUMBERS[kind]))
        for site, number in self.number.items():
            i, j, k = site
            rows[number] = values[..., i, j, k]
        listed = self._list(rows[:, 0] if kind == "scalar" else rows)
        types = {patch: (self.patches.get(patch, "wall").split() + ["noSlip"])[1] for patch in self.outer}
        patches = {patch: f"        type {kind_of};\n".encode() for patch, kind_of in types.items()}
        inside = f"nonuniform List<{kind}>\n".encode() + listed
        self._field(time, name, f"vol{kind.capitalize()}Field", dimensions, inside, patches)


def source(path: Path, **options: Any) -> Source:
    [found] = openfoam.sources(path, ImportOptions(**options))
    return found


def solenoidal(grid: Grid) -> np.ndarray:
    """The curl of a random potential, with a flow through the box where there can be one."""
    flux = operators.curl(torch.randn(3, *grid.shape, dtype=torch.float64), grid)
    for axis, through in enumerate(grid.through):
        flux[axis] += 0.7 * through
    return flux.numpy()


def written(tmp_path: Path, patches: Mapping[str, str], **options: Any) -> tuple[Case, np.ndarray, Source]:
    case = Case(tmp_path / "case", patches=patches, **options)
    first = np.zeros((3, *case.shape))
    case.cells("0", "U", first, "0 1 -1 0 0 0 0")
    case.cells("0.5", "U", first, "0 1 -1 0 0 0 0")
    case.phi("0.5", first)
    grid = source(case.path).grid
    flux = solenoidal(grid)
    high = operators.high_faces(torch.from_numpy(flux), grid).numpy()
    sides = {f"{'xyz'[a]}+": np.take(high[a], -1, a) for a in range(3) if grid.open_sides[a][1]}
    case.phi("0.5", flux, sides)
    return case, flux, source(case.path)


CHANNEL = WALLS | {"x-": "cyclic", "x+": "cyclic", "y-": "symmetryPlane", "y+": "patch slip"}
DUCT = WALLS | {"x-": "patch fixedValue", "x+": "patch inletOutlet"}


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("patches", [WALLS, CHANNEL, DUCT], ids=["cavity", "channel", "duct"])
def test_fluxes_come_to_their_faces_and_balance(tmp_path: Path, patches: Mapping[str, str], binary: bool) -> None:
    _, flux, found = written(tmp_path, patches, binary=binary)
    got = found.read("velocity", 0, 0)
    np.testing.assert_array_equal(got, flux)
    assert found.layout == "face_flux" and found.specs["velocity"].constraint == "solenoidal"
    net = operators.div(torch.from_numpy(got), found.grid).abs().max()
    assert net < 1e-14 * np.abs(flux).max()


def test_patches_become_boundaries(tmp_path: Path) -> None:
    assert source(written(tmp_path / "a", CHANNEL)[0].path).grid.boundaries == (
        ("periodic", "periodic"),
        ("free_slip", "free_slip"),
        ("no_slip", "no_slip"),
    )
    duct = source(written(tmp_path / "b", DUCT)[0].path).grid
    assert duct.boundaries[0] == ("inflow", "outflow") and duct.spacing == (0.5, 0.25, 2.0)


def test_wide_labels_are_read(tmp_path: Path) -> None:
    _, flux, found = written(tmp_path, WALLS, binary=True, wide=True)
    np.testing.assert_array_equal(found.read("velocity", 0, 0), flux)


def test_empty_patches_make_an_axis_of_one_cell(tmp_path: Path) -> None:
    plane = WALLS | {"z-": "empty", "z+": "empty"}
    _, flux, found = written(tmp_path, plane, shape=(4, 3, 1), binary=True)
    assert found.grid.shape == (4, 3, 1) and found.grid.boundaries[2] == ("periodic", "periodic")
    got = found.read("velocity", 0, 0)
    np.testing.assert_array_equal(got[:2], flux[:2])
    assert not got[2].any()


def test_missing_cells_are_solid(tmp_path: Path) -> None:
    holes = [(1, 1, 0), (1, 1, 1), (2, 1, 0)]
    case = Case(tmp_path / "case", missing=holes, patches=CHANNEL)
    p = np.arange(24.0).reshape(4, 3, 2)
    case.cells("1", "p", p, "0 2 -2 0 0 0 0")
    case.cells("1", "U", np.zeros((3, 4, 3, 2)), "0 1 -1 0 0 0 0")
    found = source(case.path)
    expected = np.zeros((4, 3, 2), dtype=bool)
    expected[tuple(np.transpose(holes))] = True
    assert found.solid is not None
    np.testing.assert_array_equal(found.solid[0], expected)
    np.testing.assert_array_equal(found.read("p", 0, 0), np.where(expected, 0, p))


def test_fields_in_cells_units_times_and_viscosity(tmp_path: Path) -> None:
    case = Case(tmp_path / "case")
    rng = np.random.default_rng(0)
    u, p = rng.standard_normal((3, 4, 3, 2)), rng.standard_normal((4, 3, 2))
    for time in ("0.1", "10", "2"):
        case.cells(time, "U", float(time) * u, "0 1 -1 0 0 0 0")
        case.cells(time, "p", float(time) * p, "1 -1 -2 0 0 0 0")
    text = "FoamFile { format ascii; class dictionary; }\nnu [0 2 -1 0 0 0 0] 0.02;\n"
    (case.path / "constant" / "transportProperties").write_text(text)
    found = source(case.path)
    assert found.layout == "cell_centred" and found.times.tolist() == [0.1, 2.0, 10.0]
    assert {name: (s.kind, s.unit) for name, s in found.specs.items()} == {
        "velocity": ("vector", "m/s"),
        "p": ("scalar", "kg/(m s2)"),
    }
    np.testing.assert_array_equal(found.read("velocity", 0, 1), 2.0 * u)
    np.testing.assert_array_equal(found.read("p", 0, 2), 10.0 * p)
    assert found.parameters["viscosity"].tolist() == [0.02]
    assert source(case.path, units={"p": "Pa"}).specs["p"].unit == "Pa"


def test_the_other_reader_sees_the_same_cells(tmp_path: Path) -> None:
    pyvista = pytest.importorskip("pyvista")
    case = Case(tmp_path / "case", binary=True)
    p = np.random.default_rng(0).standard_normal((4, 3, 2))
    case.cells("1", "p", p, "0 2 -2 0 0 0 0")
    marker = case.path / "case.foam"
    marker.touch()
    control = (
        "FoamFile\n{\n    format ascii;\n    class dictionary;\n}\napplication none;\nstartFrom startTime;\n"
        "startTime 0;\nstopAt endTime;\nendTime 1;\ndeltaT 1;\nwriteControl timeStep;\nwriteInterval 1;\n"
    )
    (case.path / "system" / "controlDict").write_text(control)
    reader = pyvista.OpenFOAMReader(marker)
    reader.cell_to_point_creation = False
    reader.set_active_time_value(1.0)
    mesh = reader.read()["internalMesh"]
    ours = source(case.path).read("p", 0, 0)
    index = np.floor(mesh.cell_centers().points / (0.5, 0.25, 2.0)).astype(int)
    np.testing.assert_allclose(ours[tuple(index.T)], mesh.cell_data["p"], rtol=1e-6)


def test_uniform_and_compact_lists_are_read(tmp_path: Path) -> None:
    case, _, _ = written(tmp_path, WALLS)
    file = case.path / "0.5" / "phi"
    text = file.read_text()
    start, end = text.index("nonuniform"), text.index("boundaryField")
    file.write_text(text[:start] + f"nonuniform List<scalar> {len(case.inner)}{{0}};\n" + text[end:])
    assert not source(case.path).read("velocity", 0, 0).any()
    file.write_text(text[:start] + "uniform 0;\n" + text[end:])
    assert not source(case.path).read("velocity", 0, 0).any()


def test_one_field_can_be_chosen(tmp_path: Path) -> None:
    case, _, _ = written(tmp_path, WALLS)
    found = source(case.path, dataset="U")
    assert list(found.specs) == ["velocity"] and found.specs["velocity"].kind == "vector"
    assert found.times.tolist() == [0.0, 0.5]
    with pytest.raises(ValueError, match="one of the fields"):
        source(case.path, dataset="T")


def test_mass_fluxes_are_no_volume_fluxes(tmp_path: Path) -> None:
    case = Case(tmp_path / "case")
    flux = solenoidal(Grid((4, 3, 2), (0.5, 0.25, 2.0), (("no_slip", "no_slip"),) * 3))
    case.cells("1", "U", np.ones((3, 4, 3, 2)), "0 1 -1 0 0 0 0")
    case.phi("1", flux, dimensions="1 0 -1 0 0 0 0")
    found = source(case.path)
    assert {n: (s.kind, s.unit, s.constraint) for n, s in found.specs.items()} == {
        "mass_flux": ("flux", "kg/s", "none"),
        "cell_velocity": ("vector", "m/s", "none"),
    }
    np.testing.assert_array_equal(found.read("mass_flux", 0, 0), flux)


def test_a_case_becomes_a_store_with_net_zero(tmp_path: Path) -> None:
    case, flux, _ = written(tmp_path, CHANNEL)
    assert openfoam.recognises(case.path)
    [path] = import_files(case.path, tmp_path / "out.zarr")
    store = open_store(path)
    got = store.read("velocity", 0, 0)
    assert not operators.div(got, store.grid).any()
    np.testing.assert_allclose(got, flux, atol=1e-12)
    assert store.times.tolist() == [0.5] and store.attributes["provenance"]["imported"]["times_left_out"] == [0.0]


def test_boundaries_of_the_user_overrule_patches(tmp_path: Path) -> None:
    case, _, _ = written(tmp_path, DUCT)
    given = (("outflow", "outflow"), ("no_slip", "no_slip"), ("no_slip", "no_slip"))
    assert source(case.path, boundaries=given).grid.boundaries == given
    with pytest.raises(ValueError, match="'periodic' asked for"):
        source(case.path, boundaries=(("periodic", "periodic"), *given[1:]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"planes": {0: [0.0, 0.4, 0.9, 1.5, 2.0]}}, "graded or skewed ones along axis x"),
        ({"planes": {2: [0.0, 2.0, 4.02]}}, "graded or skewed ones along axis z"),
        ({"patches": WALLS | {"x-": "patch weird"}}, "got 'x-' of type patch with U of type weird"),
        ({"patches": WALLS | {"x-": "cyclic"}}, "halves of cyclic patches on opposite sides of axis x"),
        ({"patches": WALLS | {"z-": "empty", "z+": "empty"}}, "one cell between empty patches"),
        ({"patches": WALLS | {"obstacle": "patch fixedValue"}, "missing": [(1, 1, 0)]}, "walls round obstacles"),
    ],
)
def test_other_meshes_and_patches_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    case = Case(tmp_path / "case", **options)
    case.cells("1", "U", np.zeros((3, 4, 3, 2)), "0 1 -1 0 0 0 0")
    with pytest.raises(ValueError, match=message):
        source(case.path)


def test_flux_through_walls_and_torn_cyclic_pairs_are_refused(tmp_path: Path) -> None:
    case, flux, _ = written(tmp_path, WALLS)
    leak = flux.copy()
    leak[0, 0, 1, 1] += 1.0
    case.phi("0.5", leak)
    with pytest.raises(ValueError, match=r"no flux through 'x-' in .*phi"):
        source(case.path).read("velocity", 0, 0)
    case, flux, _ = written(tmp_path / "b", CHANNEL)
    case.phi("0.5", flux, {"x+": flux[0, 0] + 0.5})
    with pytest.raises(ValueError, match=r"both halves of the cyclic patch 'x\+'"):
        source(case.path).read("velocity", 0, 0)


def test_cases_in_parts_and_folders_without_times_are_refused(tmp_path: Path) -> None:
    case = Case(tmp_path / "case")
    with pytest.raises(ValueError, match="folders of times with fields"):
        source(case.path)
    (case.path / "processor0").mkdir()
    with pytest.raises(ValueError, match="run reconstructPar first"):
        source(case.path)
    assert not openfoam.recognises(tmp_path) and not openfoam.recognises(case.path / "system" / "controlDict")


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize(
    "name", ["0.5/phi", "0.5/U", *(f"constant/polyMesh/{n}" for n in ("points", "faces", "owner", "boundary"))]
)
def test_files_that_are_cut_off_are_named(tmp_path: Path, name: str, binary: bool) -> None:
    case, _, _ = written(tmp_path, DUCT, binary=binary)
    file = case.path / name
    data = file.read_bytes()
    for size in np.linspace(0, len(data.rstrip()) - 40, 7).astype(int):
        file.write_bytes(data[:size])
        with pytest.raises(ValueError, match="Expected") as error:
            found = source(case.path)
            for field in found.specs:
                found.read(field, 0, 0)
            source(case.path, dataset="U").read("velocity", 0, 1)
        assert "\n" not in str(error.value) and str(case.path) in str(error.value)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("0.5/phi", "List<scalar>\n", "List<scalar>\n9", r"list of 9\d+ numbers in .*phi"),
        ("0.5/phi", "List<scalar>\n", "List<scalar>\n99999999999999", r"length of a list in .*phi"),
        ("0.5/phi", "0 3 -1", "0 2 -1", r"m3/s or kg/s in .*phi, got m2/s"),
        ("0.5/phi", "(\n0.0", "(\nnan", r"finite numbers in .*phi"),
        ("0.5/phi", "(\n0.0", "(\nzero", r"numbers in .*phi"),
        ("constant/polyMesh/faces", "4(", "3(", "four corners"),
        ("constant/polyMesh/owner", "\n(\n", "\n(\n1", "six faces each|cut|damaged"),
        ("constant/polyMesh/boundary", "nFaces 6", "nFaces 5", "patches with"),
        ("constant/polyMesh/boundary", "nFaces 6", "nFaces many", "a whole number 'nFaces'"),
    ],
)
def test_contradictions_are_named(tmp_path: Path, name: str, old: str, new: str, message: str) -> None:
    case = Case(tmp_path / "case")
    case.cells("0.5", "U", np.zeros((3, 4, 3, 2)), "0 1 -1 0 0 0 0")
    case.phi("0.5", np.zeros((3, 4, 3, 2)))
    file = case.path / name
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        source(case.path).read("velocity", 0, 0)


def test_compressed_files_are_read(tmp_path: Path) -> None:
    import gzip

    case, flux, _ = written(tmp_path, WALLS)
    for name in ("0.5/phi", "constant/polyMesh/points"):
        file = case.path / name
        file.with_name(file.name + ".gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    np.testing.assert_array_equal(source(case.path).read("velocity", 0, 0), flux)
    packed = case.path / "0.5" / "phi.gz"
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"OpenFOAM file at .*phi\.gz"):
        source(case.path)


def test_a_mesh_that_moves_is_refused(tmp_path: Path) -> None:
    case, _, _ = written(tmp_path, WALLS)
    shutil.copytree(case.path / "constant" / "polyMesh", case.path / "0.5" / "polyMesh")
    with pytest.raises(ValueError, match="a mesh at rest"):
        source(case.path)
