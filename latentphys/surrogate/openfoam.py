"""OpenFOAM cases as states for a surrogate, and what it says back into them as further times.

    state, moved = read_case("channel", family="open_channel")      # phi as it is, its net made 0.0
    state = surrogate.init(state)
    state = surrogate.step(state, num_steps=4)
    write_time(state, "channel")                                    # channel/TIME/{phi,U,p}: a solver goes on from it

What a case may look like, and what its patches become, is for `latentphys.data.importing.openfoam` to say: a box of
equal cells, those left out of it solid. The flux is OpenFOAM's own ``phi`` both ways. U is the mean of the fluxes
through opposite faces, which on such a mesh is ``fvc::reconstruct(phi)``.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from latentphys import exact, operators
from latentphys.data.importing import ImportOptions, openfoam
from latentphys.data.importing.foammesh import FoamMesh
from latentphys.fields import State
from latentphys.grid import SIDES, Boundaries, Geometry
from latentphys.inflow import through_sides
from latentphys.surrogate.foamcase import earlier, field_file, has, mesh_of, name_of, same, times_of
from latentphys.surrogate.foamfields import cell_file, face_fluxes, phi_file


class CaseState(NamedTuple):
    """A time of a case, and the largest change that made its flux exact, relative to the largest flux."""

    state: State
    moved: float


def read_case(
    case: str | Path,
    time: float | Literal["latest"] = "latest",
    *,
    family: str,
    parameters: Mapping[str, Any] | None = None,
    scalars: Mapping[str, str] | None = None,
    boundaries: Boundaries | None = None,
    keep_inflow: bool = True,
) -> CaseState:
    """Read a time of a case, as a state whose net flux is 0.0 in every cell.

    Args:
        case: its folder.
        time: t [s] of a time with phi. Default: the last.
        family: which of the model's families the flow is of.
        parameters: physical parameters. Default: ``viscosity`` [m²/s] where the case names one.
        scalars: further fields, the state's name → the file's, as in ``{"temperature": "T"}``. Default: the flow alone.
        boundaries: of the box, where the patches do not say them. Default: the patches'.
        keep_inflow: prescribe for all later states what flows in now. Default: yes. Artefacts take no such boxes.

    Returns:
        The state, and how far its flux was moved: 0.0 where it was exact already.

    Raises:
        ValueError: a mesh that is no uniform box, patches that no box can have, no phi in m³/s, a time or a scalar that
            the case lacks, damaged files.
    """
    [source] = openfoam.sources(Path(case), ImportOptions(family=family, boundaries=boundaries))
    if source.layout != "face_flux" or "velocity" not in source.specs:
        got = "a mass flux in kg/s" if "mass_flux" in source.specs else f"only {sorted(source.specs)}"
        raise ValueError(
            f"Expected a volume flux phi in m3/s in {case}, got {got}; run an incompressible solver on it."
        )
    frame = len(source.times) - 1 if time == "latest" else int(np.abs(source.times - time).argmin())
    at = float(source.times[frame])
    if time != "latest" and not same(at, time):
        raise ValueError(f"Expected a time of {case} with phi, one of {source.times.tolist()}, got {time:g}.")
    names = {source.about["names"].get(n, n): n for n, spec in source.specs.items() if spec.kind == "scalar"}
    fields = {}
    for name, old in (scalars or {}).items():
        if old not in names:
            raise ValueError(f"Expected a scalar of all times of {case}, one of {sorted(names)}, got {old!r}.")
        fields[name] = torch.from_numpy(source.snapshot(names[old], 0, frame))
    given = flux = torch.from_numpy(source.snapshot("velocity", 0, frame))
    geometry, moved = source.geometry(0), 0.0
    if keep_inflow:
        geometry = _with_inflow(geometry, flux)
    if not _is_exact(flux, geometry):
        flux = exact.conserve(flux=given, geometry=geometry)
        moved = float((flux - given).abs().max() / given.abs().max())
    if parameters is None:
        parameters = {name: float(values[0]) for name, values in source.parameters.items()}
    return CaseState(State({"velocity": flux, **fields}, geometry, at, parameters, family), moved)


def write_time(
    state: State,
    case: str | Path,
    time: float | None = None,
    *,
    like: float | None = None,
    scalars: Mapping[str, str] | None = None,
    carry: Sequence[str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a state as a time of a case, which its solver can go on from; the folder appears whole or not at all.

    phi is that of the state to the last bit, and U is worked out from it. The patches of U and of scalars are those of
    an earlier time.

    Args:
        state: one from `read_case`, or what a surrogate made of it.
        case: its folder.
        time: t [s]. Default: the state's.
        like: the earlier time [s]. Default: the last one before `time` that has U.
        scalars: as in `read_case`.
        carry: fields that the solver asks for and the state does not have; they are copied from the earlier time as
            they stand. Default: ``p`` where there is one.
        overwrite: replace a time that is there. Default: refuse.

    Returns:
        The folder of the time.

    Raises:
        ValueError: a batch of states, one of another box, without a scalar, or that is not exactly conservative; a time
            that is there already; no earlier time, or one without a field that is asked for.
    """
    from latentphys.training.durable import whole_folder

    case, at = Path(case), state.time if time is None else time
    state, mesh, times = state.to("cpu"), mesh_of(case), times_of(case)
    flux = _checked(state, mesh, case)
    there = next((folder for t, folder in times.items() if same(t, at)), None)
    if there is not None and not overwrite:
        raise ValueError(
            f"Expected a time that {case} does not have yet, got {at:g}; pass overwrite=True to replace it."
        )
    source = earlier(times, at, like, case)
    path = case / name_of(at) if there is None else there
    cells = {"U": operators.cell_velocity(flux, state.grid)}
    for name, file in (scalars or {}).items():
        if name not in state.fields:
            raise ValueError(f"Expected a state with the field {name!r}, got {sorted(state.fields)}.")
        cells[file] = state.fields[name].double()
    files = {"phi": phi_file(face_fluxes(flux, state.geometry, mesh), mesh, path.name)}
    for name, values in cells.items():
        rows = values.reshape(-1, state.grid.num_cells)[:, mesh.cells].numpy()
        rows = rows.T if values.ndim == 4 else rows[0]
        files[name] = cell_file(field_file(source, name), rows, path.name, [*mesh.patches])
    wanted = ("p",) if carry is None else carry
    copies = [field_file(source, name) for name in wanted if name not in files and (carry or has(source, name))]
    with whole_folder(path) as temporary:
        for name, data in files.items():
            (temporary / name).write_bytes(data)
        for copy in copies:
            shutil.copyfile(copy, temporary / copy.name)
    return path


def _with_inflow(geometry: Geometry, flux: Tensor) -> Geometry:
    """The geometry with the velocity that a flux has through its inflow sides."""
    inflow: dict[str, float | Tensor] = {}
    through = through_sides(flux, geometry)
    for side, boundary in zip(SIDES, sum(geometry.grid.boundaries, ()), strict=True):
        if boundary == "inflow":
            axis, is_high = divmod(SIDES.index(side), 2)
            inward = through[side] * (-1.0 if is_high else 1.0)
            inflow[side] = inward / geometry.grid.face_areas[axis]
    return Geometry(geometry.grid, geometry.solid, inflow) if inflow else geometry


def _is_exact(flux: Tensor, geometry: Geometry) -> bool:
    return not (operators.div(flux, geometry.grid).any() or flux[~geometry.open_faces].any())


def _checked(state: State, mesh: FoamMesh, case: Path) -> Tensor:
    """The flux of a state that is one flow in the box of a case."""
    flux, grid = state.velocity.detach().double(), state.grid
    if flux.shape != (3, *grid.shape):
        raise ValueError(
            f"Expected one flux of shape {(3, *grid.shape)}, got {tuple(flux.shape)}; write each of a batch."
        )
    solid = np.zeros(mesh.shape, dtype=bool) if mesh.solid is None else mesh.solid
    cyclic = {axis for p in mesh.patches.values() if p.kind in ("cyclic", "empty") for axis, _ in p.sides}
    is_same = mesh.shape == grid.shape and np.allclose(mesh.spacing, grid.spacing, rtol=1e-3, atol=0.0)
    if (
        not is_same
        or cyclic != {a for a in range(3) if grid.periodic[a]}
        or (~solid != state.geometry.fluid.numpy()).any()
    ):
        raise ValueError(
            f"Expected a state in the box of {case}, {mesh.shape} cells of {mesh.spacing} m, {int(solid.sum())} solid, "
            f"got one in {grid.shape} cells of {grid.spacing} m; take it from read_case."
        )
    if not _is_exact(flux, state.geometry):
        raise ValueError("Expected a flux with net 0.0 in every cell, got another; pass it through exact.conserve.")
    return flux
