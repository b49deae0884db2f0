"""OpenFOAM cases written by hand: fluxes come to the right faces with the right sign, patches become boundaries."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foam_case import CHANNEL, DUCT, WALLS, Case

from latentphys import operators
from latentphys.data import open_store
from latentphys.data.importing import ImportOptions, import_files, openfoam
from latentphys.data.importing.source import Source
from latentphys.grid import Grid


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
