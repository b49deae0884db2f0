"""OpenFOAM cases on boxes of cells, written by hand."""

import itertools
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from reference import random_flux

from latentphys import exact
from latentphys.data.importing.foamfile import open_foam
from latentphys.fields import State
from latentphys.grid import Geometry
from latentphys.surrogate.openfoam import read_case

SIDES = ("x-", "x+", "y-", "y+", "z-", "z+")
WALLS = dict.fromkeys(SIDES, "wall")
CHANNEL = WALLS | {"x-": "cyclic", "x+": "cyclic", "y-": "symmetryPlane", "y+": "patch slip"}
DUCT = WALLS | {"x-": "patch fixedValue", "x+": "patch inletOutlet"}
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


CYCLIC = dict.fromkeys(SIDES, "cyclic")
SHAPE, SPACING = (4, 3, 2), (0.5, 0.25, 2.0)
HOLES = [(1, 1, 0), (1, 1, 1), (2, 1, 0), (3, 0, 1)]
BACK = WALLS | {"x-": "patch inletOutlet", "x+": "patch fixedValue"}
CASES: dict[str, dict[str, Any]] = {
    "cavity": {"patches": WALLS},
    "channel": {"patches": CHANNEL},
    "porous": {"patches": CYCLIC, "missing": HOLES},
    "duct": {"patches": DUCT, "missing": HOLES[:2]},
    "duct_back": {"patches": BACK},
    "plane": {"patches": CHANNEL | {"z-": "empty", "z+": "empty"}, "shape": (4, 3, 1)},
    "binary": {"patches": CHANNEL, "binary": True},
    "wide": {"patches": WALLS, "binary": True, "wide": True},
}
FULL = {name: options for name, options in CASES.items() if name != "plane"}


class Pores(Case):
    """A case of periodic pores: faces on a side that a solid lies beyond belong to the wall of the grains.

    Args:
        baffle: put a wall on a side between fluid and fluid, too.
    """

    def __init__(self, path: Path, baffle: bool = False, **options: Any) -> None:
        self.baffle = baffle
        super().__init__(path, **options)

    def _write_mesh(self) -> None:
        for name in SIDES:
            faces = self.outer.pop(name)
            for face in faces:
                _, _, axis, corner, _ = face
                inside = tuple(c - (a == axis and c > 0) for a, c in enumerate(corner))
                beyond = tuple(
                    (0 if corner[a] else self.shape[a] - 1) if a == axis else c for a, c in enumerate(inside)
                )
                is_wall = beyond not in self.number or (self.baffle and face is faces[0])
                self.outer.setdefault("obstacle" if is_wall else name, []).append(face)
        self.faces = self.inner + [face for faces in self.outer.values() for face in faces]
        super()._write_mesh()


def made(folder: Path, **options: Any) -> Case:
    """A case at rest, at the times 0 and 0.5."""
    case = (Pores if options.get("patches") == CYCLIC else Case)(folder / "case", **options)
    rest = np.zeros((3, *case.shape))
    for time in ("0", "0.5"):
        case.cells(time, "U", rest, "0 1 -1 0 0 0 0")
        case.cells(time, "p", np.random.default_rng(2).random(case.shape), "0 2 -2 0 0 0 0")
    case.phi("0.5", rest)
    return case


def moving(case: Case, **options: Any) -> State:
    """A random flow in a case, at t = 0.75 s."""
    state = read_case(case.path, family="any", **options).state
    geometry = Geometry(state.grid, state.geometry.solid)
    flux = random_flux(state.grid)
    flux[2] *= state.grid.shape[2] > 1
    return state.with_fields(0.75, velocity=exact.conserve(flux=flux, geometry=geometry))


def numbers(case: Case, time: str) -> np.ndarray:
    """phi as it stands in the file, face by face; nan on empty patches."""
    entries = open_foam(case.path / time / "phi").entries()
    parts = [entries["internalField"][1]]
    for name, faces in case.outer.items():
        listed = entries["boundaryField"][name]["value"][1]
        parts.append(listed if len(listed) else np.full(len(faces), np.nan))
    return np.concatenate(parts)


def nets(case: Case, time: str) -> np.ndarray:
    """What flows out of each cell by OpenFOAM's rule: out of a face's owner, into its neighbour."""
    phi, net = numbers(case, time), np.zeros(len(case.number))
    for value, (owner, neighbour, *_) in zip(phi, case.faces, strict=True):
        if not np.isnan(value):
            net[owner] += value
            if neighbour is not None:
                net[neighbour] -= value
    return net
