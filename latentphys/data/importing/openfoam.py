"""OpenFOAM cases on a uniform box mesh: `phi`, the flux the solver itself conserves, and fields in cells.

What is taken:

    phi [m3/s]      → flux ``velocity``, solenoidal, as it is; then U is left out, since it is not solenoidal
    phi [kg/s]      → flux ``mass_flux`` without a constraint, and U as vector ``cell_velocity``: a compressible flow
    U without phi   → vector ``velocity`` in cells
    other vol(Scalar|Vector)Field → scalars and vectors in cells, under their names

Frames are the times that have phi (or U where no time has phi); time 0 mostly has none and is left out. Cells that the
box has and the mesh lacks are solid. Patches become boundaries: cyclic → periodic, wall → no_slip, symmetry and slip →
free_slip, empty → an axis one cell thick and periodic, and of the rest those with a fixed U → inflow, with a free one →
outflow. Moving walls become no_slip: their motion along themselves is not kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latentphys.data.importing.boxes import field_name, frames
from latentphys.data.importing.foamfile import FoamFile, open_foam, unit_of
from latentphys.data.importing.foammesh import FoamMesh, Patch, read_mesh
from latentphys.data.importing.source import ImportOptions, Source
from latentphys.fields import VELOCITY, FieldSpec
from latentphys.grid import SIDES, Boundary, Grid

CLASSES = {"volScalarField": 1, "volVectorField": 3, "surfaceScalarField": 1}
INFLOWS = (
    "fixedvalue",
    "uniformfixedvalue",
    "codedfixedvalue",
    "flowrateinlet",
    "surfacenormalfixed",
    "pressureinletvelocity",
    "mapped",
    "timevaryingmapped",
    "turbulent",
    "atmboundarylayerinlet",
    "cylindricalinlet",
)
OUTFLOWS = (
    "zerogradient",
    "fixedgradient",
    "inletoutlet",
    "outletinlet",
    "pressureinletoutlet",
    "flowrateoutlet",
    "advective",
    "wavetransmissive",
    "freestream",
)
"""How the types of U on patches begin, in lower case."""
HALVES = 1e-4
"""How far the two halves of a cyclic pair may differ, in the largest flux: fluxes are often written with six digits."""


def recognises(path: Path) -> bool:
    """Whether this is the folder of an OpenFOAM case: it has system/controlDict and a mesh, whole or in parts."""
    is_case = (path / "system" / "controlDict").is_file()
    return is_case and ((path / "constant" / "polyMesh").is_dir() or (path / "processor0").is_dir())


def sources(path: Path, options: ImportOptions) -> list[Source]:
    """A case as one trajectory.

    Args:
        path: the folder of the case.
        options: `boundaries` overrule those of the patches; `dataset` takes one field only, such as ``U`` or ``phi``;
            `units` and `family` as everywhere.

    Raises:
        ValueError: a case in parts, a mesh that is no uniform box, patches that a box cannot have, no time with
            fields, or files that are damaged.
    """
    mesh = _mesh(path)
    times = _times(path)
    flow, fields = _chosen(times, options, path)
    chosen = {t: found for t, found in times.items() if set(flow) <= set(found) or not flow}
    common = set.intersection(*(set(found) for found in chosen.values()))
    last = chosen[max(chosen)]
    names = [name for name in (*flow, *fields) if name in common]
    files = {name: open_foam(last[name]) for name in names}
    specs, raw = {}, {}
    for name, file in files.items():
        spec = _spec(name, file, "phi" in names, options)
        specs[spec.name], raw[spec.name] = spec, name
    patch_types = _types_of_u(last)
    grid, about = _grid(mesh, patch_types, options, path)
    order = sorted(chosen)

    def read(name: str, trajectory: int, frame: int) -> np.ndarray:
        file = chosen[order[frame]][raw[name]]
        if specs[name].kind == "flux":
            return _flux(file, mesh, grid)
        return _in_cells(file, mesh, 3 if specs[name].kind == "vector" else 1)

    viscosity = _viscosity(path)
    about = {
        **about,
        "names": {new: old for new, old in raw.items() if new != old},
        "left_out": sorted({name for found in times.values() for name in found} - set(names)),
        "times_left_out": sorted(set(times) - set(chosen)),
        "origin": list(mesh.origin),
    }
    return [
        Source(
            format="openfoam",
            paths=[path],
            family=options.family or field_name(path.resolve().name),
            grid=grid,
            times=frames(np.array(order), str(path)),
            num_trajectories=1,
            specs=specs,
            read=read,
            parameters={} if viscosity is None else {"viscosity": np.array([viscosity])},
            parameter_units={} if viscosity is None else {"viscosity": "m2/s"},
            solid=None if mesh.solid is None else mesh.solid[None],
            layout="face_flux" if "phi" in names else "cell_centred",
            about=about,
        )
    ]


def _mesh(path: Path) -> FoamMesh:
    folder = path / "constant" / "polyMesh"
    parts = sorted(path.glob("processor*"))
    if parts and not any(_value(p.name) for p in path.iterdir() if p.is_dir()):
        raise ValueError(f"Expected a whole case at {path}, got one in {len(parts)} parts; run reconstructPar first.")
    if not (path / "system" / "controlDict").is_file() or not folder.is_dir():
        raise ValueError(f"Expected an OpenFOAM case with system/controlDict and constant/polyMesh at {path}.")
    return read_mesh(folder)


def _value(name: str) -> float | None:
    """The time that a folder's name means; None where it is no time."""
    try:
        value = float(name)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _times(path: Path) -> dict[float, dict[str, Path]]:
    """Files of fields by time and name."""
    result: dict[float, dict[str, Path]] = {}
    for folder in path.iterdir():
        time = _value(folder.name) if folder.is_dir() else None
        if time is None:
            continue
        if (folder / "polyMesh").exists():
            raise ValueError(
                f"Expected a mesh at rest in {path}, got one of its own at time {folder.name}; run mapFields."
            )
        found = {p.name.removesuffix(".gz"): p for p in folder.iterdir() if p.is_file() and p.name[0] not in ".#"}
        result[time] = {name: p for name, p in found.items() if not name.endswith(("_0", "~", ".orig", ".bak"))}
    if not any(result.values()):
        raise ValueError(f"Expected folders of times with fields in {path}, got none; run the solver first.")
    return result


def _chosen(
    times: Mapping[float, Mapping[str, Path]], options: ImportOptions, path: Path
) -> tuple[list[str], list[str]]:
    """Names of the fields that carry the flow, which every frame must have, and of the others."""
    kinds: dict[str, str] = {}
    for found in times.values():
        for name in set(found) - set(kinds):
            kinds[name] = open_foam(found[name]).kind
    known = [name for name, kind in sorted(kinds.items()) if kind in CLASSES]
    cells = [name for name in known if kinds[name] != "surfaceScalarField"]
    if options.dataset is not None:
        if options.dataset not in (*cells, "phi"):
            raise ValueError(f"Expected one of the fields {[*cells, 'phi']} of {path}, got {options.dataset!r}.")
        return [options.dataset], []
    flow = ["phi"] if "phi" in known else ["U"] if "U" in known else []
    if not known:
        raise ValueError(f"Expected fields in {path}, got only files of {sorted(set(kinds.values()))}.")
    if flow == ["phi"]:
        file = next(found["phi"] for found in times.values() if "phi" in found)
        is_volume = unit_of(open_foam(file).entries().get("dimensions", []), file) == "m3/s"
        return flow, [name for name in cells if name != "U" or not is_volume]
    return flow, [name for name in cells if name not in flow]


def _spec(name: str, file: FoamFile, has_phi: bool, options: ImportOptions) -> FieldSpec:
    unit = unit_of(file.entries().get("dimensions", []), file.path)
    if file.kind not in CLASSES:
        raise ValueError(f"Expected a field of {' | '.join(CLASSES)} in {file.path}, got a {file.kind}.")
    if name == "phi":
        if unit not in ("m3/s", "kg/s"):
            raise ValueError(f"Expected fluxes in m3/s or kg/s in {file.path}, got {unit}.")
        return VELOCITY if unit == "m3/s" else FieldSpec("mass_flux", "flux", "kg/s")
    stored = ("cell_velocity" if has_phi else "velocity") if name == "U" else field_name(name)
    unit = options.units.get(name) or options.units.get(stored) or unit
    return FieldSpec(stored, "vector" if CLASSES[file.kind] == 3 else "scalar", unit)


def _types_of_u(found: Mapping[str, Path]) -> dict[str, str]:
    """The type of U on each patch, in lower case, where there is a U."""
    if "U" not in found:
        return {}
    patches = open_foam(found["U"]).entries().get("boundaryField", {})
    return {name: " ".join(entry.get("type", [])).lower() for name, entry in patches.items() if isinstance(entry, dict)}


def _boundary(patch: Patch, types: Mapping[str, str], path: Path) -> Boundary:
    kind, flow = patch.kind.lower(), types.get(patch.name, "")
    if kind in ("cyclic", "empty"):
        return "periodic"
    if kind.startswith("symmetry") or flow.endswith("slip") and flow != "noslip":
        return "free_slip"
    if kind in ("wall", "mappedwall") or flow == "noslip":
        return "no_slip"
    if kind in ("patch", "mappedpatch"):
        if flow.startswith(INFLOWS):
            return "inflow"
        if flow.startswith(OUTFLOWS):
            return "outflow"
    raise ValueError(
        f"Expected a patch whose type says what flows through it, got {patch.name!r} of type {patch.kind} with U of "
        f"type {flow or 'unknown'} in {path}; pass the boundaries of the box."
    )


def _grid(mesh: FoamMesh, types: Mapping[str, str], options: ImportOptions, path: Path) -> tuple[Grid, dict[str, Any]]:
    """The box with the boundaries of its patches, or the user's, which must be periodic where the mesh is."""
    sides: dict[tuple[int, int], dict[str, Patch]] = {}
    for patch in mesh.patches.values():
        if patch.in_box and patch.kind != "wall":
            raise ValueError(
                f"Expected walls round obstacles in {path}, got patch {patch.name!r} of type {patch.kind}."
            )
        if patch.kind == "empty" and any(mesh.shape[axis] != 1 for axis, _ in patch.sides):
            raise ValueError(f"Expected one cell between empty patches in {path}, got {mesh.shape} cells.")
        for side in patch.sides:
            sides.setdefault(side, {})[patch.name] = patch
    given = options.boundaries
    named: dict[str, Boundary] = {}
    pairs: list[tuple[Boundary, Boundary]] = []
    for axis in range(3):
        couples = [{p.name for p in sides.get((axis, end), {}).values() if p.kind == "cyclic"} for end in (0, 1)]
        others = {mesh.patches[name].neighbour for name in couples[0]}
        if others != couples[1]:
            raise ValueError(
                f"Expected the halves of cyclic patches on opposite sides of axis {'xyz'[axis]} in {path}, got "
                f"{sorted(couples[0])} and {sorted(couples[1])}."
            )
        pair: list[Boundary] = []
        for end in (0, 1):
            is_periodic = any(p.kind in ("cyclic", "empty") for p in sides.get((axis, end), {}).values())
            if given is not None and (given[axis][end] == "periodic") == is_periodic:
                pair.append(given[axis][end])
                continue
            here = sides.get((axis, end), {})
            if is_periodic:
                here = {n: p for n, p in here.items() if p.kind != "wall" or not _is_before_solid(p, axis, end, mesh)}
            kinds = {name: _boundary(p, types, path) for name, p in here.items()}
            if given is not None or len(set(kinds.values())) != 1:
                raise ValueError(
                    f"Expected one kind of boundary on side {SIDES[2 * axis + end]} of {path}, got patches {kinds}"
                    f"{f' and {given[axis][end]!r} asked for' if given else '; pass the boundaries of the box'}."
                )
            pair.append(next(iter(kinds.values())))
            named |= kinds
        pairs.append((pair[0], pair[1]))
    try:
        grid = Grid(mesh.shape, mesh.spacing, (pairs[0], pairs[1], pairs[2]))
    except ValueError as error:
        raise ValueError(f"{error} (in {path})") from error
    moving = [p.name for p in mesh.patches.values() if p.kind == "wall" and types.get(p.name, "noslip") != "noslip"]
    return grid, {"patches": named, "walls_taken_to_be_at_rest": sorted(moving)}


def _is_before_solid(wall: Patch, axis: int, end: int, mesh: FoamMesh) -> bool:
    """Whether the faces of a wall on a periodic side are those of grains on the other side of the box."""
    index, low_or_high = np.unravel_index(mesh.cells[mesh.owner[wall.faces]], mesh.shape), (0, mesh.shape[axis] - 1)
    is_here = (mesh.axis[wall.faces] == axis) & (mesh.sign[wall.faces] == (-1, 1)[end])
    is_here &= index[axis] == low_or_high[end]
    beyond = [np.full_like(i, low_or_high[1 - end]) if a == axis else i for a, i in enumerate(index)]
    return mesh.solid is not None and bool(mesh.solid[tuple(i[is_here] for i in beyond)].all())


def _internal(file: FoamFile, entries: Mapping[str, Any], size: int, components: int) -> np.ndarray:
    return _values(file, entries.get("internalField", []), size, components, "internalField")


def _values(file: FoamFile, words: Sequence[Any], size: int, components: int, what: str) -> np.ndarray:
    """``uniform number`` or ``nonuniform list`` as numbers (size,) or (size, components)."""
    shape = (size,) if components == 1 else (size, components)
    if words[:1] == ["nonuniform"] and len(words) == 2:
        if words[1].shape != shape and not (words[1].size == size == 0):
            raise ValueError(f"Expected {what} of shape {shape} in {file.path}, got {words[1].shape}.")
        return words[1].reshape(shape)
    if words[:1] == ["uniform"]:
        try:
            numbers = np.array([float(word) for word in words[1:] if word not in "()"])
        except ValueError:
            numbers = np.array([np.nan])
        if numbers.size == components and np.isfinite(numbers).all():
            return np.broadcast_to(numbers[0] if components == 1 else numbers, shape)
    raise ValueError(
        f"Expected {what} in {file.path} to be 'uniform' or 'nonuniform' with {components} finite numbers each, got "
        f"{str(words)[:80]}."
    )


def _in_cells(path: Path, mesh: FoamMesh, components: int) -> np.ndarray:
    """A field in cells (nx, ny, nz) or (3, nx, ny, nz); 0 in solids."""
    file = open_foam(path)
    if CLASSES.get(file.kind) != components:
        raise ValueError(f"Expected a field of {components} components in {path}, got a {file.kind}.")
    values = _internal(file, file.entries(), mesh.cells.size, components)
    placed = np.zeros((components, int(np.prod(mesh.shape))))
    placed[:, mesh.cells] = values.reshape(-1, components).T
    return placed.reshape(mesh.shape if components == 1 else (3, *mesh.shape))


def _flux(path: Path, mesh: FoamMesh, grid: Grid) -> np.ndarray:
    """Fluxes through faces, placed on the low faces of our cells, (3, nx, ny, nz)."""
    file = open_foam(path)
    if file.kind != "surfaceScalarField":
        raise ValueError(f"Expected fluxes through faces in {path}, got a {file.kind}.")
    entries = file.entries()
    patches = entries.get("boundaryField", {})
    phi = np.zeros(mesh.axis.size)
    phi[: mesh.num_internal] = _internal(file, entries, mesh.num_internal, 1)
    for patch in mesh.patches.values():
        if patch.kind != "empty" and patch.size:
            entry = patches.get(patch.name, {})
            phi[patch.faces] = _values(file, entry.get("value", []), patch.size, 1, f"the value on {patch.name!r}")
    placed = np.zeros(3 * int(np.prod(mesh.shape)))
    along = phi * mesh.sign
    stored = mesh.low_face >= 0
    placed[mesh.low_face[stored]] = along[stored]
    flux = placed.reshape(3, *mesh.shape)
    _check_sides(flux, along, mesh, grid, path)
    return flux


def _check_sides(flux: np.ndarray, along: np.ndarray, mesh: FoamMesh, grid: Grid, path: Path) -> None:
    """Nothing through walls, and through both halves of a periodic pair the same."""
    allowed = HALVES * float(np.abs(along).max(initial=0.0))
    for patch in mesh.patches.values():
        through, where = along[patch.faces], patch.faces
        if patch.in_box or not any(grid.open_sides[axis][end] or grid.periodic[axis] for axis, end in patch.sides):
            got = float(np.abs(through).max(initial=0.0))
            if got > allowed:
                raise ValueError(f"Expected no flux through {patch.name!r} in {path}, got up to {got:.3g}.")
        elif patch.kind == "cyclic" and any(end == 1 for _, end in patch.sides):
            axis = int(mesh.axis[where][0])
            index = list(np.unravel_index(mesh.cells[mesh.owner[where]], mesh.shape))
            index[axis] = np.zeros_like(index[axis])
            got = float(np.abs(flux[(axis, *index)] - through).max())
            if got > allowed:
                raise ValueError(
                    f"Expected one flux through both halves of the cyclic patch {patch.name!r} in {path}, got "
                    f"differences up to {got:.3g}."
                )


def _viscosity(path: Path) -> float | None:
    """ν [m²/s] where the case names one number for it."""
    for name in ("transportProperties", "physicalProperties"):
        file = path / "constant" / name
        if file.is_file():
            words = open_foam(file).entries().get("nu")
            number = words[-1] if isinstance(words, list) and words else ""
            value = _value(number)
            if value is not None and value > 0:
                return value
    return None
