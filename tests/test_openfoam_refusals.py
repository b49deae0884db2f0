"""Cases, times and states that no round trip can be made of are refused, and nothing is written."""

import re
from pathlib import Path

import pytest
import torch
from foam_case import CYCLIC, HOLES, SHAPE, SPACING, made, moving

from latentphys.fields import State
from latentphys.grid import Geometry, Grid
from latentphys.surrogate.openfoam import read_case, write_time


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[0 3 -1", "[1 0 -1", r"a volume flux phi in m3/s .* got a mass flux in kg/s"),
        ("[0 3 -1", "[0 2 -1", r"m3/s or kg/s in .*phi, got m2/s"),
        ("    x-\n", "    left\n", r"the value on 'x-'"),
        (None, None, r"a volume flux phi in m3/s in .* got only \['p', 'velocity'\]"),
    ],
)
def test_fluxes_of_another_kind_are_refused(tmp_path: Path, old: str | None, new: str, message: str) -> None:
    case = made(tmp_path)
    file = case.path / "0.5" / "phi"
    if old is None:
        file.unlink()
    else:
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message):
        read_case(case.path, family="any")


def test_meshes_that_are_no_boxes_are_refused(tmp_path: Path) -> None:
    case = made(tmp_path, planes={0: [0.0, 0.4, 0.9, 1.5, 2.0]})
    with pytest.raises(ValueError, match="graded or skewed ones along axis x"):
        read_case(case.path, family="any")


def test_walls_within_a_periodic_side_are_refused(tmp_path: Path) -> None:
    """Those of grains on the other side are not: a periodic box has them wherever a grain ends at a side."""
    case = made(tmp_path, patches=CYCLIC, missing=HOLES)
    assert {face[2] for face in case.outer["obstacle"] if face[3][face[2]] in (0, SHAPE[face[2]])} == {0, 1, 2}
    assert all(read_case(case.path, family="any").state.grid.periodic)
    case = made(tmp_path / "baffle", patches=CYCLIC, missing=HOLES, baffle=True)
    with pytest.raises(ValueError, match=r"side x- of .*, got patches {'obstacle': 'no_slip', 'x-': 'periodic'}"):
        read_case(case.path, family="any")


def test_times_and_scalars_that_are_not_there_are_refused(tmp_path: Path) -> None:
    case = made(tmp_path)
    with pytest.raises(ValueError, match=r"with phi, one of \[0.5\], got 0\.$"):
        read_case(case.path, 0.0, family="any")
    with pytest.raises(ValueError, match=r"a scalar of all times of .*, one of \['p'\], got 'T'"):
        read_case(case.path, family="any", scalars={"temperature": "T"})
    state = moving(case)
    with pytest.raises(ValueError, match=r"a time before -1 with U in .*, got only \[0.0, 0.5\]; name one as `like`"):
        write_time(state, case.path, -1.0)
    with pytest.raises(ValueError, match=r"a time 0.25 with U in"):
        write_time(state, case.path, like=0.25)
    with pytest.raises(ValueError, match=r"a field 'k' in .*0.5, got none"):
        write_time(state, case.path, carry=["k"])
    with pytest.raises(ValueError, match=r"a state with the field 'temperature', got \['velocity'\]"):
        write_time(state, case.path, scalars={"temperature": "p"})
    assert sorted(p.name for p in case.path.iterdir()) == ["0", "0.5", "constant", "system"]


@pytest.mark.parametrize(
    ("binary", "old", "new", "message"),
    [
        (False, "    x-\n", "    left\n", r"the patches \['x-'\] in the boundaryField of .*U, got \['left'"),
        (False, "type noSlip", "type $kind", r"patches without macros in .*U"),
        (False, "volVectorField", "volScalarField", r"a volVectorField in .*U, got a volScalarField"),
        (False, "boundaryField", "boundaries", r"'boundaryField' at the end of the entries"),
        (True, "scalar=64", "scalar=32", r"little-endian numbers of 64 bits in .*U, got 'LSB;label=32;scalar=32'"),
        (True, "LSB", "MSB", r"little-endian numbers of 64 bits in .*U, got 'MSB"),
    ],
)
def test_patterns_that_cannot_be_followed_are_refused(
    tmp_path: Path, binary: bool, old: str, new: str, message: str
) -> None:
    case = made(tmp_path, binary=binary)
    state = moving(case)
    file = case.path / "0.5" / "U"
    data = re.sub(rb"nonuniform List.*;(?=\nboundaryField)", b"uniform (0 0 0);", file.read_bytes(), flags=re.DOTALL)
    assert old.encode() in data
    file.write_bytes(data.replace(old.encode(), new.encode()))
    with pytest.raises(ValueError, match=message):
        write_time(state, case.path)
    assert not (case.path / "0.75").exists()


def test_states_of_other_boxes_and_leaking_ones_are_refused(tmp_path: Path) -> None:
    case = made(tmp_path, patches=CYCLIC, missing=HOLES)
    state = moving(case)
    grid = state.grid

    def other(geometry: Geometry) -> State:
        return State({"velocity": torch.zeros(3, *geometry.grid.shape, dtype=torch.float64)}, geometry, 1.0)

    for geometry in (
        Geometry(Grid((4, 3, 3), SPACING), None),
        Geometry(Grid(SHAPE, (0.5, 0.26, 2.0)), state.geometry.solid),
        Geometry(Grid(SHAPE, SPACING, (*grid.boundaries[:2], ("no_slip", "no_slip"))), state.geometry.solid),
        Geometry(grid, None),
    ):
        with pytest.raises(ValueError, match="a state in the box of .* take it from read_case"):
            write_time(other(geometry), case.path)
    with pytest.raises(ValueError, match=r"one flux of shape \(3, 4, 3, 2\), got \(2, 3, 4, 3, 2\)"):
        write_time(state.with_fields(velocity=state.velocity.expand(2, -1, -1, -1, -1)), case.path)
    leaking = state.velocity.clone()
    leaking[0, 2, 2, 0] += 1e-9
    with pytest.raises(ValueError, match=r"net 0.0 in every cell, got another; pass it through exact.conserve"):
        write_time(state.with_fields(velocity=leaking), case.path)
    through_grains = torch.zeros_like(leaking)
    through_grains[0] = 1.0
    with pytest.raises(ValueError, match=r"net 0.0 in every cell"):
        write_time(state.with_fields(velocity=through_grains), case.path)
