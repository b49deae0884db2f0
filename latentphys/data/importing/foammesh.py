"""The mesh of an OpenFOAM case, where it is a box of equal cells: which cell is where, which face of ours each face is.

OpenFOAM numbers cells and faces as it likes; a face's flux counts out of its owner, the cell with the lower number.
Here each cell is found by its centre and each face by its plane, so that fluxes come to the low faces of cells:

    internal face between two cells      low face of the higher one,     + where the owner is the lower one
    face on a low side of the box        low face of its owner,          − (what leaves counts against the axis)
    face on a high side                  not stored; the low face of the first cell where the axis is periodic
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from latentphys.data.importing.foamfile import FoamFile, open_foam

REMEDY = "sample the case on a uniform box mesh (blockMesh without grading, then mapFields)"
UNIFORM = 1e-3
"""How far, in cells, a face may lie from where even spacing puts it: coordinates may be written with few digits."""
MOST_HOLLOW = 64
"""How many cells of the box there may be for each cell of the mesh."""


@dataclass(frozen=True)
class Patch:
    """A boundary patch: its type, its faces as a range of face numbers, the patch it is coupled to, its sides.

    Attributes:
        sides: sides of the box that it covers, axis and 0 (low) or 1 (high); an obstacle in the box has none.
    """

    name: str
    kind: str
    start: int
    size: int
    neighbour: str | None
    sides: frozenset[tuple[int, int]] = frozenset()
    in_box: bool = False

    @property
    def faces(self) -> slice:
        return slice(self.start, self.start + self.size)


@dataclass(frozen=True)
class FoamMesh:
    """A box of equal cells, with or without some missing.

    Attributes:
        shape, spacing, origin: cells, their size [m] and the low corner [m].
        cells: place of each cell in a flattened (nx, ny, nz) array.
        solid: True where the box has no cell, (nx, ny, nz); None where it is full.
        axis: normal of each face.
        owner: the cell that each face's flux leaves.
        low_face: place in a flattened (3, nx, ny, nz) flux of the low face that each face is, −1 for faces on high
            sides of the box and on obstacles.
        sign: +1 for faces whose owner is below them, −1 for those whose owner is above.
        num_internal: number of faces between cells, which come first.
        patches: by name.
    """

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    origin: tuple[float, float, float]
    cells: np.ndarray
    solid: np.ndarray | None
    axis: np.ndarray
    owner: np.ndarray
    low_face: np.ndarray
    sign: np.ndarray
    num_internal: int
    patches: Mapping[str, Patch]


def read_mesh(folder: Path) -> FoamMesh:
    """Read ``constant/polyMesh``.

    Raises:
        ValueError: files that are damaged or contradict one another, cells that are not equal boxes.
    """
    points = open_foam(_find(folder, "points")).numbers(3)
    faces = open_foam(_find(folder, "faces")).faces()
    owner = open_foam(_find(folder, "owner")).numbers(1, whole=True)
    neighbour = open_foam(_find(folder, "neighbour")).numbers(1, whole=True)
    if not faces.size or faces.min() < 0 or faces.max() >= len(points):
        raise ValueError(f"Expected faces between the {len(points)} points in {folder}, got others; make it again.")
    if len(owner) != len(faces) or not 0 < len(neighbour) <= len(faces):
        raise ValueError(
            f"Expected an owner for each of {len(faces)} faces in {folder}, and a neighbour for some, got {len(owner)} "
            f"and {len(neighbour)}; make the mesh again."
        )
    cells_of = np.concatenate([owner, neighbour])
    num_cells = int(cells_of.max()) + 1
    if cells_of.min() < 0 or 6 * num_cells != cells_of.size or (np.bincount(cells_of, minlength=num_cells) != 6).any():
        raise ValueError(f"Expected cells with six faces each in {folder}, got others; {REMEDY}.")

    low, high = points[faces[:, 0]], points[faces[:, 0]]
    for corner in faces[:, 1:].T:
        low, high = np.minimum(low, points[corner]), np.maximum(high, points[corner])
    spacing, origin, shape, axis = _lattice(low, high, num_cells, folder)
    position = (0.5 * (low + high) - origin) / spacing
    centre = np.stack([np.bincount(cells_of, np.concatenate([p, p[: len(neighbour)]])) / 6 for p in position.T], 1)
    index = np.floor(centre).astype(np.int64)
    cells = np.ravel_multi_index(tuple(index.T), shape)
    if np.abs(centre - index - 0.5).max() > 0.01 or np.unique(cells).size != num_cells:
        raise ValueError(f"Expected each cell of the mesh in a place of its own in {folder}, got others; {REMEDY}.")

    level = np.rint(np.take_along_axis(position, axis[:, None], 1)[:, 0]).astype(np.int64)
    is_above = level == np.take_along_axis(index[owner], axis[:, None], 1)[:, 0] + 1
    inner = slice(0, len(neighbour))
    step = index[neighbour] - index[owner[inner]]
    expected = np.where(is_above[inner], 1, -1)[:, None] * np.eye(3, dtype=np.int64)[axis[inner]]
    if (step != expected).any():
        raise ValueError(f"Expected neighbours across each face of the mesh in {folder}, got others; make it again.")
    above = owner.copy()
    above[inner] = np.where(is_above[inner], neighbour, owner[inner])
    num_sites = int(np.prod(shape))
    low_face = axis * num_sites + cells[above]
    low_face[len(neighbour) :][is_above[len(neighbour) :] | (level[len(neighbour) :] != 0)] = -1
    solid: np.ndarray | None = None
    if num_cells < num_sites:
        voxels = np.ones(num_sites, dtype=bool)
        voxels[cells] = False
        solid = voxels.reshape(shape)
    return FoamMesh(
        shape,
        (float(spacing[0]), float(spacing[1]), float(spacing[2])),
        (float(origin[0]), float(origin[1]), float(origin[2])),
        cells,
        solid,
        axis,
        owner,
        low_face,
        np.where(is_above, 1.0, -1.0),
        len(neighbour),
        _patches(_find(folder, "boundary"), len(neighbour), axis, level, shape),
    )


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise ValueError(f"Expected a file {name!r} of the mesh in {folder}, got none; run blockMesh.")


def _lattice(
    low: np.ndarray, high: np.ndarray, num_cells: int, folder: Path
) -> tuple[np.ndarray, np.ndarray, tuple[int, int, int], np.ndarray]:
    """Spacing, low corner and number of cells of the even lattice on which all faces lie, and the faces' normals."""
    extent = high - low
    scale = np.maximum(high.max(0) - low.min(0), np.finfo(np.float64).tiny)
    axis = (extent / scale).argmin(axis=1)
    origin, top = low.min(0), high.max(0)
    spacing, shape = np.empty(3), []
    for a in range(3):
        across = extent[axis != a, a]
        size = float(np.median(across)) if across.size else 0.0
        along = float(top[a] - origin[a]) / size if size > 0 else 0.0
        if not 0.5 < along <= MOST_HOLLOW * num_cells:
            raise ValueError(f"Expected cells that fill a box in {folder}, got a mesh flat along axis {'xyz'[a]}.")
        num = round(along)
        spacing[a] = (top[a] - origin[a]) / num
        shape.append(num)
        planes = (0.5 * (low + high)[axis == a, a] - origin[a]) / spacing[a]
        is_even = planes.size and np.abs(planes - np.rint(planes)).max() <= UNIFORM
        if (
            not is_even
            or np.abs(across / spacing[a] - 1).max() > 2 * UNIFORM
            or (extent[axis == a, a].max() > UNIFORM * spacing[a])
        ):
            raise ValueError(
                f"Expected cells of one size, with faces along the axes, in {folder}, got graded or skewed ones along "
                f"axis {'xyz'[a]}; {REMEDY}."
            )
    if np.prod([float(n) for n in shape]) > MOST_HOLLOW * num_cells:
        raise ValueError(f"Expected cells that fill a box in {folder}, got {num_cells} in a box of {shape}; {REMEDY}.")
    return spacing, origin, (shape[0], shape[1], shape[2]), axis


def _patches(
    path: Path, num_internal: int, axis: np.ndarray, level: np.ndarray, shape: tuple[int, int, int]
) -> dict[str, Patch]:
    file = open_foam(path)
    count = file.count()
    if file.word() != "(":
        raise ValueError(f"Expected a list of patches in {path}, got something else; run blockMesh again.")
    entries: Mapping[str, Any] = file.entries(")")
    patches: dict[str, Patch] = {}
    for name, entry in entries.items():
        start, size = _number(file, entry, "startFace"), _number(file, entry, "nFaces")
        faces = slice(start, start + size)
        if start < num_internal or start + size > axis.size:
            raise ValueError(f"Expected patch {name!r} in {path} among the boundary faces, got faces {start}…{size}.")
        kind, neighbour = " ".join(entry.get("type", ["unknown"])), entry.get("neighbourPatch")
        on_low, on_high = level[faces] == 0, level[faces] == np.array(shape)[axis[faces]]
        sides = {(int(a), 0) for a in np.unique(axis[faces][on_low])}
        sides |= {(int(a), 1) for a in np.unique(axis[faces][on_high])}
        in_box = bool((~on_low & ~on_high).any())
        patches[name] = Patch(
            name, kind, start, size, neighbour[0] if neighbour else None, frozenset(sides), in_box=in_box
        )
    total = sum(patch.size for patch in patches.values())
    if count != len(patches) or total != axis.size - num_internal:
        raise ValueError(
            f"Expected {count} patches with {axis.size - num_internal} faces in {path}, got {len(patches)} with "
            f"{total}; make the mesh again."
        )
    return patches


def _number(file: FoamFile, entry: Any, key: str) -> int:
    words = entry.get(key, [""]) if isinstance(entry, Mapping) else [""]
    if len(words) != 1 or not str(words[0]).isdecimal() or len(words[0]) > 12:
        raise ValueError(f"Expected a whole number {key!r} for each patch in {file.path}, got {words!r}.")
    return int(words[0])
