"""OpenFOAM cases through a surrogate and back: the same flux bit for bit, on every face, with the solver's patches."""

import gzip
import runpy
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from foam_case import (
    BACK,
    CASES,
    CYCLIC,
    DUCT,
    FULL,
    HOLES,
    SHAPE,
    SPACING,
    WALLS,
    Case,
    Pores,
    made,
    moving,
    nets,
    numbers,
)
from reference import random_flux
from torch import Tensor

from latentphys import exact, operators
from latentphys.data.importing import foammesh
from latentphys.data.importing.foamfile import open_foam
from latentphys.fields import State
from latentphys.grid import SIDES, Grid
from latentphys.surrogate import Surrogate
from latentphys.surrogate.openfoam import read_case, write_time
from latentphys.training import durable

if TYPE_CHECKING:
    from small import Road


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_what_is_written_is_read_bit_for_bit(tmp_path: Path, options: Mapping[str, Any]) -> None:
    case = made(tmp_path, **options)
    state = moving(case)
    assert state.velocity.abs().max() > 0.1
    assert write_time(state, case.path) == case.path / "0.75"
    back, moved = read_case(case.path, family="any")
    assert torch.equal(back.velocity, state.velocity) and moved == 0.0 and back.time == 0.75
    assert not operators.div(back.velocity, back.grid).any()
    assert back.grid == state.grid and torch.equal(back.geometry.fluid, state.geometry.fluid)
    assert sorted(p.name for p in (case.path / "0.75").iterdir()) == ["U", "p", "phi"]
    assert not list(case.path.glob(".*"))


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_every_cell_balances_by_openfoams_own_rule(tmp_path: Path, options: Mapping[str, Any]) -> None:
    case = made(tmp_path, **options)
    state = moving(case, keep_inflow=False)
    write_time(state, case.path)
    assert not nets(case, "0.75").any()
    if "missing" in options:
        walls = [face in case.outer["obstacle"] for face in case.faces]
        assert any(walls) and not numbers(case, "0.75")[walls].any()


@pytest.mark.parametrize("axis", range(3))
def test_a_uniform_flow_points_the_same_way_on_every_face(tmp_path: Path, axis: int) -> None:
    """Out of the owner where the owner is below: both halves of a cyclic pair say so, with opposite signs."""
    case = made(tmp_path, patches=CYCLIC)
    state = read_case(case.path, family="any").state
    flux = torch.zeros_like(state.velocity)
    flux[axis] = speed = 3.0 + 2.0**-50  # finer than the fixed point of `exact.conserve`: it must not be rounded again
    write_time(state.with_fields(1.0, velocity=flux), case.path)
    for value, (_, _, normal, _, owner_is_below) in zip(numbers(case, "1"), case.faces, strict=True):
        assert value == (0.0 if normal != axis else speed if owner_is_below else -speed)
    back, moved = read_case(case.path, family="any")
    assert torch.equal(back.velocity, flux) and moved == 0.0


@pytest.mark.parametrize("options", FULL.values(), ids=FULL)
def test_velocities_in_cells_are_means_of_faces(tmp_path: Path, options: Mapping[str, Any]) -> None:
    case = made(tmp_path, **options)
    state = moving(case)
    write_time(state, case.path)
    file = open_foam(case.path / "0.75" / "U")
    values = file.entries()["internalField"][1]
    expected = operators.cell_velocity(state.velocity, state.grid).numpy()
    for (i, j, k), number in case.number.items():
        assert np.array_equal(values[number], expected[:, i, j, k])
    assert (file.header["format"] == ["binary"]) == case.binary


def test_patches_stay_as_the_solver_wrote_them(tmp_path: Path) -> None:
    case = made(tmp_path, patches=DUCT)
    file = case.path / "0.5" / "U"
    text = file.read_text()
    words = "type fixedValue;\n        value nonuniform List<vector> 2((1 0 0)(1.5 0 0)); // a profile"
    file.write_text(text.replace("type fixedValue;", words))
    tail = file.read_text().partition("boundaryField")[2]
    write_time(moving(case), case.path)
    assert (case.path / "0.75" / "U").read_text().partition("boundaryField")[2] == tail
    assert words in tail
    assert (case.path / "0.75" / "p").read_bytes() == (case.path / "0.5" / "p").read_bytes()
    phi = open_foam(case.path / "0.75" / "phi")
    assert phi.header["location"] == ["0.75"] and phi.header["object"] == ["phi"]
    entries = phi.entries()
    assert entries["dimensions"] == ["[", "0", "3", "-1", "0", "0", "0", "0", "]"] and entries["oriented"] == [
        "oriented"
    ]


def test_fluxes_have_the_types_of_constrained_patches(tmp_path: Path) -> None:
    case = made(tmp_path, patches=CASES["plane"]["patches"], shape=(4, 3, 1))
    write_time(moving(case), case.path)
    patches = open_foam(case.path / "0.75" / "phi").entries()["boundaryField"]
    assert {name: entry["type"][0] for name, entry in patches.items()} == {
        **dict.fromkeys(("x-", "x+"), "cyclic"),
        "y-": "symmetryPlane",
        "y+": "calculated",
        **dict.fromkeys(("z-", "z+"), "empty"),
    }


def test_fluxes_with_few_digits_are_made_exact(tmp_path: Path) -> None:
    """Reading moves each face by about the rounding of its text, says how far, and moves it once only."""
    case = made(tmp_path, patches=CYCLIC, missing=HOLES)
    flux = moving(case).velocity.numpy()
    case.phi("0.5", np.round(flux, 4))
    state, moved = read_case(case.path, 0.5, family="any")
    assert not operators.div(state.velocity, state.grid).any()
    change = np.abs(state.velocity.numpy() - np.round(flux, 4)).max() / np.abs(flux).max()
    assert 1e-6 < moved < 1e-3 and moved == pytest.approx(change, rel=1e-3)
    write_time(state.with_fields(2.0), case.path)
    again, unmoved = read_case(case.path, family="any")
    assert torch.equal(again.velocity, state.velocity) and unmoved == 0.0


def through(flux: Tensor, side: str) -> Tensor:
    return flux[0, 0] if side == "x-" else operators.high_faces(flux, Grid(SHAPE, SPACING, OPEN[side]))[0, -1]


OPEN: dict[str, Any] = {
    "x-": (("inflow", "outflow"), ("no_slip",) * 2, ("no_slip",) * 2),
    "x+": (("outflow", "inflow"), ("no_slip",) * 2, ("no_slip",) * 2),
}


@pytest.mark.parametrize(("patches", "side"), [(DUCT, "x-"), (BACK, "x+")])
def test_what_flows_in_is_kept(tmp_path: Path, patches: Mapping[str, str], side: str) -> None:
    case = made(tmp_path, patches=patches)
    write_time(moving(case), case.path)
    state = read_case(case.path, family="any").state
    assert state.grid.boundaries == OPEN[side] and set(state.geometry.inflow) == {side}
    inflow = through(state.velocity, side)
    later = exact.conserve(flux=random_flux(state.grid), geometry=state.geometry)
    torch.testing.assert_close(through(later, side), inflow, rtol=0, atol=1e-12)
    write_time(state.with_fields(1.0, velocity=later), case.path)
    back = read_case(case.path, family="any").state
    assert torch.equal(back.velocity, later)
    faces = [a == 0 and corner[0] == (0 if side == "x-" else SHAPE[0]) for _, _, a, corner, _ in case.faces]
    outward = numbers(case, "1")[faces] * (-1 if side == "x-" else 1)
    torch.testing.assert_close(torch.from_numpy(outward), inflow.flatten(), rtol=0, atol=1e-12)
    assert not read_case(case.path, family="any", keep_inflow=False).state.geometry.inflow


def test_scalars_go_both_ways_and_other_fields_are_copied(tmp_path: Path) -> None:
    case = made(tmp_path, patches=CYCLIC, missing=HOLES)
    t = np.random.default_rng(1).random(SHAPE)
    case.cells("0.5", "T", t, "0 0 0 1 0 0 0")
    case.cells("0.5", "k", t, "0 2 -2 0 0 0 0")
    names = {"temperature": "T"}
    state = read_case(case.path, family="any", scalars=names).state
    fluid = state.geometry.fluid.numpy()
    assert set(state.fields) == {"velocity", "temperature"}
    np.testing.assert_array_equal(state.fields["temperature"].numpy(), np.where(fluid, t, 0))
    later = state.with_fields(1.0, temperature=state.fields["temperature"] / 3)
    write_time(later, case.path, scalars=names, carry=["k"])
    assert sorted(p.name for p in (case.path / "1").iterdir()) == ["T", "U", "k", "phi"]
    back = read_case(case.path, family="any", scalars=names).state
    assert torch.equal(back.fields["temperature"], later.fields["temperature"])
    write_time(later, case.path, 2.0, like=0.5, scalars={"temperature": "p"})
    np.testing.assert_array_equal(*(open_foam(case.path / f).entries()["internalField"][1] for f in ("1/T", "2/p")))
    entries = open_foam(case.path / "1" / "T").entries()
    assert entries["dimensions"][1:-1] == ["0", "0", "0", "1", "0", "0", "0"]


def test_compressed_files_serve_as_patterns(tmp_path: Path) -> None:
    case = made(tmp_path)
    for name in ("U", "p"):
        file = case.path / "0.5" / name
        file.with_name(f"{name}.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    state = moving(case)
    folder = write_time(state, case.path)
    assert sorted(p.name for p in folder.iterdir()) == ["U", "p.gz", "phi"]
    assert open_foam(folder / "U").header["object"] == ["U"]
    assert torch.equal(read_case(case.path, family="any").state.velocity, state.velocity)


@pytest.mark.parametrize(("time", "name"), [(0.1 + 0.2, "0.3"), (1 / 3, "0.333333333"), (12.0, "12"), (1e-7, "1e-07")])
def test_folders_are_named_as_times(tmp_path: Path, time: float, name: str) -> None:
    case = made(tmp_path)
    state = moving(case)
    assert write_time(state, case.path, time, like=0.5).name == name
    assert read_case(case.path, time, family="any").state.time == pytest.approx(time, rel=1e-9)


def test_a_time_is_replaced_only_where_asked(tmp_path: Path) -> None:
    case = made(tmp_path)
    state = moving(case)
    (case.path / "0.5").rename(case.path / "0.50")
    before = (case.path / "0.50" / "phi").read_bytes()
    with pytest.raises(ValueError, match=r"a time that .* does not have yet, got 0.5; pass overwrite=True"):
        write_time(state, case.path, 0.5)
    assert (case.path / "0.50" / "phi").read_bytes() == before
    assert write_time(state, case.path, 0.5, overwrite=True) == case.path / "0.50"
    assert torch.equal(read_case(case.path, family="any").state.velocity, state.velocity)
    assert not list(case.path.glob(".*")) and not (case.path / "0.5").exists()


def test_a_write_that_is_cut_short_leaves_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = made(tmp_path)
    state = moving(case)

    def fail(*_: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(durable, "sync_tree", fail)
        with pytest.raises(OSError, match="No space"):
            write_time(state, case.path)
    assert not (case.path / "0.75").exists()
    assert read_case(case.path, family="any").state.time == 0.5
    write_time(state, case.path)
    assert torch.equal(read_case(case.path, family="any").state.velocity, state.velocity)


def test_a_mesh_is_read_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, other = made(tmp_path), made(tmp_path / "other", shape=(3, 3, 2))
    state = moving(case)
    write_time(state, case.path, 1.0)

    def fail(folder: Path) -> foammesh.FoamMesh:
        raise AssertionError(folder)

    with monkeypatch.context() as patched:
        patched.setattr("latentphys.surrogate.foamcase.read_mesh", fail)
        write_time(state, case.path, 2.0)
    shutil.rmtree(case.path / "constant")
    shutil.copytree(other.path / "constant", case.path / "constant", copy_function=shutil.copy)
    with pytest.raises(ValueError, match="a state in the box of"):
        write_time(state, case.path, 3.0)


def test_parameters_are_those_of_the_case_or_the_users(tmp_path: Path) -> None:
    case = made(tmp_path)
    assert dict(read_case(case.path, family="any").state.parameters) == {}
    text = "FoamFile { format ascii; class dictionary; }\nnu 0.02;\n"
    (case.path / "constant" / "transportProperties").write_text(text)
    state = read_case(case.path, family="any").state
    assert dict(state.parameters) == {"viscosity": 0.02} and state.family == "any"
    assert dict(read_case(case.path, family="any", parameters={"force": 1.0}).state.parameters) == {"force": 1.0}


def test_boundaries_can_be_said_where_patches_do_not(tmp_path: Path) -> None:
    case = made(tmp_path, patches=WALLS | {"z+": "patch weird"})
    with pytest.raises(ValueError, match="U of type weird .* pass the boundaries of the box"):
        read_case(case.path, family="any")
    given: Any = (("no_slip", "no_slip"), ("no_slip", "no_slip"), ("no_slip", "free_slip"))
    state = read_case(case.path, family="any", boundaries=given).state
    assert state.grid.boundaries == given
    assert write_time(state.with_fields(1.0), case.path).name == "1"


def case_of(state: State, folder: Path) -> Case:
    """A case with a state of a store at time 0.5, cells left out where it is solid."""
    patches = {"periodic": "cyclic", "no_slip": "wall", "free_slip": "symmetryPlane"}
    kinds = {side: patches[b] for side, b in zip(SIDES, sum(state.grid.boundaries, ()), strict=True)}
    missing = [(int(i), int(j), int(k)) for i, j, k in (~state.geometry.fluid).nonzero()]
    kind = Pores if all(state.grid.periodic) else Case
    case = kind(folder / "case", shape=state.grid.shape, spacing=state.grid.spacing, patches=kinds, missing=missing)
    case.cells("0.5", "U", np.zeros((3, *case.shape)), "0 1 -1 0 0 0 0")
    case.phi("0.5", state.velocity.double().numpy())
    return case


@pytest.mark.parametrize("family", ["open_channel", "porous"])
def test_a_surrogate_steps_a_case(
    road: "Road", tmp_path: Path, family: str, unchecked: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the example writes is what the surrogate says of the flow that was read."""
    case = case_of(road.store(family)[3, 0], tmp_path)
    surrogate = Surrogate.load(road.dynamics)
    dt = surrogate.families[family]
    parameters = {"viscosity": 0.02, "force": [1.0, 0.0, 0.0]}
    main = runpy.run_path(str(Path(__file__).parent.parent / "examples" / "openfoam_round_trip.py"))["main"]
    command = [str(case.path), str(road.dynamics), "--family", family, "--steps", "2"]
    command += ["--parameter", "viscosity=0.02", "--parameter", "force=1,0,0"]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("t = 0.5 s read; phi moved by ") and len(lines) == 3
    state = surrogate.init(read_case(case.path, 0.5, family=family, parameters=parameters).state)
    for n, line in enumerate(lines[1:], 1):
        state = surrogate.step(state)
        back, moved = read_case(case.path, 0.5 + n * dt, family=family)
        assert torch.equal(back.velocity, state.velocity) and moved == 0.0
        assert not nets(case, f"{0.5 + n * dt:g}").any()
        assert "|net flux| 0.0 m3/s" in line and line.endswith(str(case.path / f"{0.5 + n * dt:g}"))
    with pytest.raises(SystemExit) as error:
        main([*command, "--time", "0.5"])
    assert error.value.code == 2 and "pass overwrite=True" in capsys.readouterr().err
    assert main([*command, "--time", "0.5", "--overwrite"]) == 0
