"""Legacy VTK files (.vtk) of STRUCTURED_POINTS, text or binary (big-endian).

# vtk DataFile Version 3.0 / title / ASCII | BINARY / DATASET STRUCTURED_POINTS
DIMENSIONS nx ny nz   ORIGIN …   SPACING …
CELL_DATA n | POINT_DATA n, then SCALARS, VECTORS, FIELD and the like, x fastest
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from urllib.parse import unquote

import numpy as np

from latentphys.data.importing.vtkimage import RESAMPLE, Arrays, Centring, Image, Values, checked_image, shape

MAGIC = b"# vtk DataFile Version"
HEAD = 2**16
TYPES = {
    "char": "i1",
    "signed_char": "i1",
    "unsigned_char": "u1",
    "short": "i2",
    "unsigned_short": "u2",
    "int": "i4",
    "unsigned_int": "u4",
    "long": "i8",
    "unsigned_long": "u8",
    "vtktypeint64": "i8",
    "vtktypeuint64": "u8",
    "vtkidtype": "i4",
    "float": "f4",
    "double": "f8",
}
FIXED = {"VECTORS": 3, "NORMALS": 3, "TENSORS": 9, "TENSORS6": 6}
_LINE = re.compile(rb"\s*([^\n]*)\n?")
_BLANK = re.compile(rb"\n[ \t\r]*\n|\Z")


class LegacyFile:
    """A legacy file, read from front to end; `at` is the place of the next byte."""

    def __init__(self, path: Path, data: bytes) -> None:
        self._path, self._data, self.at = path, data, 0
        *_, form = (self.line() for _ in range(3))
        self._is_binary = form.upper() == "BINARY"

    def line(self) -> str:
        """The next line that is not blank; empty at the end. Metadata on the way are passed over."""
        while True:
            match = _LINE.match(self._data, self.at)
            assert match is not None
            self.at = match.end()
            line = match[1].decode("utf-8", "replace").strip()
            if line != "METADATA":
                return line
            blank = _BLANK.search(self._data, self.at - 1)
            assert blank is not None
            self.at = blank.end()

    def numbers(self, tuples: str | int, components: str | int, kind: str) -> np.ndarray:
        """The next numbers, (tuple, component)."""
        shape = whole(tuples), whole(components)
        size = shape[0] * shape[1]
        if kind.lower() not in TYPES:
            raise ValueError(f"Expected arrays of numbers in {self._path}, got one of {kind[:40]!r}; leave it out.")
        if self._is_binary:
            dtype = np.dtype(">" + TYPES[kind.lower()])
            values = np.frombuffer(self._data, dtype, min(size, (len(self._data) - self.at) // dtype.itemsize), self.at)
            self.at += values.nbytes
        else:
            words = self._data[self.at :].split(None, size)
            self.at = len(self._data) - (len(words.pop()) if len(words) > size else 0)
            values = np.fromiter(map(float, words), np.float64, len(words))
        if values.size != size:
            raise ValueError(f"{values.size} of {size} numbers of an array")
        return values.reshape(shape)

    def field(self, number: str) -> dict[str, np.ndarray]:
        """The arrays of a FIELD, by name."""
        result = {}
        for _ in range(whole(number)):
            name, components, tuples, kind = self.line().split()
            result[unquote(name)] = self.numbers(tuples, components, kind)
        return result


def whole(text: str | int) -> int:
    if not str(text).isdecimal():
        raise ValueError(f"{str(text)[:40]!r} for a number of values")
    return int(text)


def read(path: Path) -> Image:
    """The box of a file; its arrays when they are asked for.

    Raises:
        ValueError: another kind of grid, or a header that is damaged.
    """
    with path.open("rb") as stream:
        file = LegacyFile(path, stream.read(HEAD))
    dataset = file.line()
    if dataset.upper().split() != ["DATASET", "STRUCTURED_POINTS"]:
        got = dataset[:60] or "nothing"
        raise ValueError(f"Expected image data (STRUCTURED_POINTS) in {path}, got {got}; {RESAMPLE}.")
    time = None
    found: dict[str, list[float]] = {}
    while len(found) < 3:
        line = file.line()
        key, *words = line.split() or [""]
        if key.upper() == "FIELD":
            values = file.field(words[-1]).get("TimeValue")
            time = float(values.flat[0]) if values is not None else time
        elif key.upper() in ("DIMENSIONS", "ORIGIN", "SPACING", "ASPECT_RATIO") and len(words) == 3:
            found[key.upper().replace("ASPECT_RATIO", "SPACING")] = [float(word) for word in words]
        else:
            raise ValueError(f"{line[:60]!r} for DIMENSIONS, ORIGIN and SPACING")
    points = [int(n) if n.is_integer() else 0 for n in found["DIMENSIONS"]]
    most = 8 * path.stat().st_size  # a bit takes an eighth of a byte
    return checked_image(
        path, points, found["ORIGIN"], found["SPACING"], time, most, lambda: _arrays(path, file.at, points)
    )


def _arrays(path: Path, at: int, points: list[int]) -> Arrays:
    """Every array of the file, in memory."""
    file = LegacyFile(path, path.read_bytes())
    file.at = at
    result: dict[tuple[Centring, str], Values] = {}
    centring: Centring | None = None
    size = 0
    while line := file.line():
        key, *words = line.split()
        key = key.upper()
        if key in ("POINT_DATA", "CELL_DATA"):
            centring = "points" if key == "POINT_DATA" else "cells"
            size = math.prod(shape(points, centring))
            if words != [str(size)]:
                raise ValueError(f"{line[:60]!r} for {size} values")
            continue
        found: dict[str, np.ndarray] = {}
        if centring is None or len(words) < 2:
            raise ValueError(f"{line[:60]!r} for CELL_DATA or POINT_DATA and arrays")
        if key == "FIELD":
            found = file.field(words[1])
        elif key == "LOOKUP_TABLE":
            file.numbers(words[1], 4, "unsigned_char")
        elif key in ("SCALARS", *FIXED):
            if key == "SCALARS":
                start = file.at
                if not file.line().upper().startswith("LOOKUP_TABLE"):
                    file.at = start
            components = FIXED.get(key) or (words[2] if len(words) > 2 else 1)
            found = {unquote(words[0]): file.numbers(size, components, words[1])}
        else:
            raise ValueError(f"{line[:60]!r} for SCALARS, VECTORS or FIELD")
        result |= {(centring, name): Values.of(values) for name, values in found.items() if len(values) == size}
    return result
