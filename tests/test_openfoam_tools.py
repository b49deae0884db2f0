"""OpenFOAM itself reads what a surrogate wrote: its checks pass, its divergence is zero, its solver goes on from there.

Skipped where OpenFOAM is not installed (Debian: ``apt-get install openfoam``).
"""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from latentphys import operators
from latentphys.data.importing.foamfile import open_foam
from latentphys.fields import State
from latentphys.grid import SIDES, Grid
from latentphys.surrogate import Surrogate
from latentphys.surrogate.openfoam import read_case, write_time

if TYPE_CHECKING:
    from small import Road

TOOLS = ("blockMesh", "subsetMesh", "checkMesh", "icoFoam", "postProcess", "foamToVTK")
pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, TOOLS)) or not (os.environ.get("WM_PROJECT_DIR") or Path("/usr/share/openfoam").is_dir()),
    reason="OpenFOAM is not installed",
)
HEADER = "FoamFile {{ version 2.0; format ascii; class {kind}; object {name}; }}\n"
CORNERS = ("0 4 7 3", "1 2 6 5", "0 1 5 4", "3 7 6 2", "0 3 2 1", "4 5 6 7")
"""Corners of the sides of a block, in the order of `SIDES`."""
PATCHES = {"periodic": ("cyclic", "cyclic"), "no_slip": ("wall", "noSlip"), "free_slip": ("symmetryPlane",) * 2}
"""Boundary of a side → the type of its patch, and of U on it."""
INTERVAL = 0.002


def run(tool: str, case: Path, *arguments: str) -> str:
    """What a tool of OpenFOAM prints; it must end well."""
    environment = {"WM_PROJECT_DIR": "/usr/share/openfoam", **os.environ}
    done = subprocess.run(
        [tool, "-case", str(case), *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def write(path: Path, kind: str, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(HEADER.format(kind=kind, name=path.name) + text)


def case_like(state: State, case: Path, form: str) -> Path:
    """A case for icoFoam on the box of a state, at rest in time 0."""
    grid = state.grid
    box = [tuple(length * bit for length, bit in zip(grid.lengths, bits, strict=True)) for bits in BITS]
    vertices = " ".join(f"({x!r} {y!r} {z!r})" for x, y, z in box)
    sides, u, p = [], [], []
    for side, corners, boundary in zip(SIDES, CORNERS, sum(grid.boundaries, ()), strict=True):
        name, other = side.replace("-", "0").replace("+", "1"), side.translate(str.maketrans("-+", "10"))
        kind, flow = PATCHES[boundary]
        more = f"neighbourPatch {other};" if kind == "cyclic" else ""
        sides.append(f"{name} {{ type {kind}; {more} faces (({corners})); }}")
        u.append(f"{name} {{ type {flow}; }}")
        p.append(f"{name} {{ type {'zeroGradient' if kind == 'wall' else flow}; }}")
    nx, ny, nz = grid.shape
    write(
        case / "system" / "blockMeshDict",
        "dictionary",
        f"vertices ({vertices}); blocks (hex (0 1 2 3 4 5 6 7) ({nx} {ny} {nz}) simpleGrading (1 1 1));\n"
        f"boundary ({' '.join(sides)} grains {{ type wall; faces (); }});\n",
    )
    write(
        case / "system" / "controlDict",
        "dictionary",
        f"application icoFoam; startFrom latestTime; startTime 0; stopAt nextWrite; endTime 9; deltaT {INTERVAL};\n"
        f"writeControl timeStep; writeInterval 2; writeFormat {form}; writePrecision 17; timePrecision 6;\n",
    )
    write(
        case / "system" / "fvSchemes",
        "dictionary",
        "ddtSchemes { default Euler; } gradSchemes { default Gauss linear; } divSchemes { default Gauss linear; }\n"
        "laplacianSchemes { default Gauss linear orthogonal; } interpolationSchemes { default linear; }\n"
        "snGradSchemes { default orthogonal; }\n",
    )
    write(
        case / "system" / "fvSolution",
        "dictionary",
        'solvers { "p.*" { solver PCG; preconditioner none; tolerance 1e-9; relTol 0; }\n'
        "U { solver smoothSolver; smoother symGaussSeidel; tolerance 1e-9; relTol 0; } }\n"
        "PISO { nCorrectors 2; nNonOrthogonalCorrectors 0; pRefCell 0; pRefValue 0; }\n",
    )
    write(case / "constant" / "transportProperties", "dictionary", "nu 0.01;\n")
    run("blockMesh", case)
    if not state.geometry.is_empty:
        fluid = state.geometry.fluid.numpy().transpose(2, 1, 0).nonzero()
        labels = " ".join(map(str, np.ravel_multi_index(fluid, (nz, ny, nx))))
        write(case / "constant" / "polyMesh" / "sets" / "fluid", "cellSet", f"{len(fluid[0])} ({labels})\n")
        run("subsetMesh", case, "fluid", "-patch", "grains", "-overwrite")
    walls = "grains { type %s; }"
    for name, kind, dimensions, value, patches in (
        ("U", "Vector", "0 1 -1 0 0 0 0", "(1 0.2 0)", [*u, walls % "noSlip"]),
        ("p", "Scalar", "0 2 -2 0 0 0 0", "0", [*p, walls % "zeroGradient"]),
    ):
        text = f"dimensions [{dimensions}]; internalField uniform {value};\nboundaryField {{ {' '.join(patches)} }}\n"
        write(case / "0" / name, f"vol{kind}Field", text)
    return case


BITS = ((0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (1, 1, 1), (0, 1, 1))


def courant(flux: torch.Tensor, grid: Grid) -> float:
    """The largest Courant number by OpenFOAM's definition: half of all |phi| of a cell · Δt / volume."""
    total = (flux.abs() + operators.high_faces(flux, grid).abs()).sum(-4)
    return 0.5 * float(total.max()) * INTERVAL / grid.cell_volume


def velocities(case: Path, time: str) -> Mapping[str, np.ndarray]:
    """Centres of cells and U in them, as foamToVTK writes them."""
    pyvista = pytest.importorskip("pyvista")
    run("foamToVTK", case, "-time", time, "-fields", "(U)")
    [file] = (case / "VTK").glob("*/internal.vtu")
    mesh = pyvista.read(file)
    return {"centre": np.asarray(mesh.cell_centers().points), "U": np.asarray(mesh.cell_data["U"])}


@pytest.mark.parametrize(("family", "form"), [("open_channel", "binary"), ("porous", "ascii")])
def test_a_solver_goes_on_from_what_a_surrogate_wrote(road: "Road", tmp_path: Path, family: str, form: str) -> None:
    stored = road.store(family)[3, 0]
    case = case_like(stored, tmp_path / "case", form)
    run("icoFoam", case)
    start, moved = read_case(case, family=family)
    assert start.time == 2 * INTERVAL and 0 < moved < 1e-6
    assert torch.equal(start.geometry.fluid, stored.geometry.fluid)
    surrogate = Surrogate.load(road.dynamics)
    state = surrogate.step(surrogate.init(start), num_steps=2)
    time = write_time(state, case).name

    assert "Mesh OK." in run("checkMesh", case, "-time", time)
    run("postProcess", case, "-time", time, "-func", "div(phi)")
    assert open_foam(case / time / "div(phi)").entries()["internalField"] == ["uniform", "0"]
    printed = run("icoFoam", case)
    assert f"Create mesh for time = {time}" in printed
    found = re.search(r"Courant Number mean: \S+ max: (\S+)", printed)
    assert found and float(found[1]) == pytest.approx(courant(state.velocity, state.grid), rel=1e-12)
    later, _ = read_case(case, family=family)
    assert later.time == pytest.approx(state.time + 2 * INTERVAL)
    change = (later.velocity - state.velocity).norm() / state.velocity.norm()
    assert 0 < change < 1

    seen = velocities(case, time)
    i, j, k = np.floor(seen["centre"] / state.grid.spacing).astype(int).T
    ours = operators.cell_velocity(state.velocity, state.grid).numpy()[:, i, j, k].T
    np.testing.assert_allclose(seen["U"], ours, rtol=0, atol=1e-6 * np.abs(ours).max())


def test_a_state_of_a_store_starts_a_solver(road: "Road", tmp_path: Path) -> None:
    """No time of the solver's own is needed: the patches of time 0 serve."""
    stored = road.store("porous")[2, 3]
    case = case_like(stored, tmp_path / "case", "ascii")
    flux = stored.velocity.double()
    assert write_time(stored.with_fields(velocity=flux), case, 0.5) == case / "0.5"
    printed = run("icoFoam", case)
    found = re.search(r"Courant Number mean: \S+ max: (\S+)", printed)
    assert found and float(found[1]) == pytest.approx(courant(flux, stored.grid), rel=1e-12)
