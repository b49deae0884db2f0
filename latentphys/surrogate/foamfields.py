"""Fields as OpenFOAM writes them, to the last bit: fluxes by faces, other fields by cells.

Numbers have as many digits (at most 17) as it takes to read the same FP64 number back, so that a flux whose net is 0.0
in every cell still has it when a solver reads it.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from latentphys.data.importing.foamfile import open_foam
from latentphys.data.importing.foammesh import FoamMesh
from latentphys.grid import SIDES, Geometry
from latentphys.inflow import through_sides

CONSTRAINTS = ("cyclic", "empty", "symmetry", "symmetryPlane")
"""Patches on which every field is of the type of the patch."""

_HEADER = """\
/*--------------------------------*- C++ -*----------------------------------*\\
  Written by latentphys.
\\*---------------------------------------------------------------------------*/
FoamFile
{{
    version     2.0;
    format      {form};
{arch}    class       {kind};
    location    "{time}";
    object      {name};
}}
// * * * * * * * * * * * * * * * * * * * * * * * * * * * * * * * * * * * * * //

"""


def face_fluxes(flux: Float[Tensor, "3 nx ny nz"], geometry: Geometry, mesh: FoamMesh) -> Float[np.ndarray, " faces"]:
    """Flux out of the owner of each face [m³/s], from those through low faces.

    The high half of a cyclic pair has what its low half has, an open high side what `through_sides` says; through walls
    and obstacles nothing flows.
    """
    high = torch.zeros_like(flux)
    for axis, is_periodic in enumerate(geometry.grid.periodic):
        if is_periodic:
            high[axis].select(axis, -1).copy_(flux[axis].select(axis, 0))
    for side, through in through_sides(flux, geometry).items():
        axis, is_high = divmod(SIDES.index(side), 2)
        if is_high:
            high[axis].select(axis, -1).copy_(through)
    stored = mesh.low_face >= 0
    site = mesh.axis * geometry.grid.num_cells + mesh.cells[mesh.owner]
    along = np.where(mesh.sign > 0, high.numpy().reshape(-1)[site], 0.0)
    along[stored] = flux.numpy().reshape(-1)[mesh.low_face[stored]]
    return along * mesh.sign + 0.0  # no -0.0 in the file


def phi_file(outward: Float[np.ndarray, " faces"], mesh: FoamMesh, time: str) -> bytes:
    """The file of ``phi``.

    Args:
        outward: what `face_fluxes` returns.
        time: name of the folder that the file is for.
    """
    patches = []
    for patch in mesh.patches.values():
        kind = patch.kind if patch.kind in CONSTRAINTS else "calculated"
        values = outward[patch.faces] if kind != "empty" else outward[:0]
        body = f"        type            {kind};\n        value           nonuniform List<scalar> "
        patches.append(f"    {patch.name}\n    {{\n{body}".encode() + _text(values) + b";\n    }\n")
    inner = _text(outward[: mesh.num_internal])
    head = _HEADER.format(form="ascii", arch="", kind="surfaceScalarField", time=time, name="phi")
    return (
        f"{head}dimensions      [0 3 -1 0 0 0 0];\n\noriented        oriented;\n\n".encode()
        + (b"internalField   nonuniform List<scalar> \n" + inner + b";\n\nboundaryField\n{\n")
        + b"".join(patches)
        + b"}\n\n\n// ************************************************************************* //\n"
    )


def cell_file(like: Path, values: np.ndarray, time: str, patches: Collection[str]) -> bytes:
    """A field in cells: the file `like` with other numbers in the cells, its patches as they stand.

    Args:
        like: a file of the same field that a solver has written, in either format and compressed or not.
        values: one number or vector for each cell of the mesh, (cells,) or (cells, 3).
        time: name of the folder that the file is for.
        patches: names of the patches that it must have.

    Raises:
        ValueError: another kind of field, patches that are not there or have macros, or binary numbers that are not of
            64 bits.
    """
    kind = "scalar" if values.ndim == 1 else "vector"
    file = open_foam(like)
    if file.kind != f"vol{kind.capitalize()}Field":
        raise ValueError(f"Expected a vol{kind.capitalize()}Field in {like}, got a {file.kind}.")
    dimensions = " ".join(file.entries("boundaryField").get("dimensions", []))
    start = file.at
    known = file.entries("}") if file.word() == "{" else {}
    if missing := [name for name in patches if name not in known]:
        raise ValueError(
            f"Expected the patches {missing} in the boundaryField of {like}, got {sorted(known)}; start from a time "
            "that a solver has written."
        )
    if "$" in str(known):
        raise ValueError(f"Expected patches without macros in {like}, got '$'; start from a time a solver has written.")
    is_binary = file.header.get("format") == ["binary"]
    arch = " ".join(file.header.get("arch", ["LSB;label=32;scalar=64"]))
    if is_binary and not (arch.startswith("LSB") and "scalar=64" in arch):
        raise ValueError(
            f"Expected text or little-endian numbers of 64 bits in {like}, got {arch!r}; set writeFormat to ascii and "
            "run foamFormatConvert."
        )
    head = _HEADER.format(
        form="binary" if is_binary else "ascii",
        arch=f'    arch        "{arch}";\n' if is_binary else "",
        kind=file.kind,
        time=time,
        name=like.name.removesuffix(".gz"),
    )
    listed = f"{len(values)}\n(".encode() + values.astype("<f8").tobytes() + b")" if is_binary else _text(values)
    return f"{head}dimensions      {dimensions};\n\ninternalField   nonuniform List<{kind}> \n".encode() + (
        listed + b";\n\nboundaryField" + file.data[start:]
    )


def _text(values: np.ndarray) -> bytes:
    """``N(…)`` with the shortest texts that read back to the same numbers."""
    if not len(values):
        return b"0()"
    rows = map(repr, values.tolist()) if values.ndim == 1 else ("({!r} {!r} {!r})".format(*v) for v in values.tolist())
    return f"{len(values)}\n(\n{chr(10).join(rows)}\n)\n".encode()
