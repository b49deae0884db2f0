"""Legacy VTK files (.vtk) of STRUCTURED_POINTS, text or binary (big-endian).

# vtk DataFile Version 3.0 / title / ASCII | BINARY / DATASET STRUCTURED_POINTS
DIMENSIONS nx ny nz   ORIGIN …   SPACING …
CELL_DATA n | POINT_DATA n, then SCALARS, VECTORS, FIELD and the like, x fastest
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from latentphys.data.importing.vtkimage import RESAMPLE, Arrays, Centring, Image, Values, checked_image, known

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
FIXED = {"vectors": 3, "normals": 3, "tensors": 9, "tensors6": 6}
_LINE = re.compile(rb"\s*([^\n]*)\n?")
_WORD = re.compile(rb"\s*(\S+)")


class LegacyFile:
    """A legacy file, read from front to end."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path, self.data, self.at = path, data, 0
        lines = [self.line() for _ in range(2)]
        self.is_binary = self.line().upper() == "BINARY"
        if not lines[0].encode().startswith(MAGIC) or lines[1] is None:
            raise ValueError(f"Expected a legacy VTK file at {path}, got something else.")

    def fail(self, expected: str, got: str) -> ValueError:
        return ValueError(f"Expected {expected} in {self.path}, got {got}; the file is cut off or damaged.")

    def line(self) -> str:
        """The next line that is not blank, as text; empty at the end."""
        match = _LINE.match(self.data, self.at)
        assert match is not None
        self.at = match.end()
        return match[1].decode("utf-8", "replace").strip()

    def numbers(self, size: int, kind: str) -> np.ndarray:
        """The next `size` numbers.

        Raises:
            ValueError: fewer, or a type that is not a number's.
        """
        if kind.lower() not in TYPES:
            raise ValueError(f"Expected an array of numbers in {self.path}, got one of type {kind!r}; leave it out.")
        if not self.is_binary:
            return self._text(size)
        dtype = np.dtype(">" + TYPES[kind.lower()])
        end = self.at + size * dtype.itemsize
        if end > len(self.data):
            raise self.fail(f"{size} numbers of an array", f"{(len(self.data) - self.at) // dtype.itemsize}")
        values = np.frombuffer(self.data, dtype, size, self.at)
        self.at = end
        return values

    def _text(self, size: int) -> np.ndarray:
        if 2 * size > len(self.data) - self.at + 1:
            raise self.fail(f"{size} numbers of an array", "a file too short for them")
        words: list[bytes] = []
        while len(words) < size:
            # a number takes at least two characters, so this many cannot reach beyond the last one
            end = min(len(self.data), self.at + 2 * (size - len(words)))
            while end < len(self.data) and not self.data[end - 1 : end].isspace():
                end += 1
            found = self.data[self.at : end].split()
            words += found
            if not found and end >= len(self.data):
                raise self.fail(f"{size} numbers of an array", str(len(words)))
            self.at = end
        if len(words) > size:
            raise self.fail(f"{size} numbers of an array", str(len(words)))
        try:
            return np.array(words).astype(np.float64)
        except ValueError as error:
            raise self.fail("numbers", str(error)) from error

    def whole(self, text: str) -> int:
        if not text.isdecimal() or len(text) > 12:
            raise self.fail("a number of values", repr(text[:40]))
        return int(text)


def read(path: Path) -> Image:
    """The box of a file; its arrays when they are asked for.

    Raises:
        ValueError: another kind of grid, or a header that is damaged.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        file = LegacyFile(path, stream.read(HEAD))
    words = file.line().split()
    if [word.upper() for word in words] != ["DATASET", "STRUCTURED_POINTS"]:
        got = " ".join(words)[:60] or "nothing"
        raise ValueError(f"Expected image data (STRUCTURED_POINTS) in {path}, got {got}; {RESAMPLE}.")
    time = None
    found: dict[str, list[float]] = {}
    while len(found) < 3:
        words = file.line().split()
        key = words[0].upper() if words else ""
        if key == "FIELD" and len(words) == 3:
            for name, values in _field(file, file.whole(words[2])).items():
                time = float(values.flat[0]) if name == "TimeValue" else time
        elif key in ("DIMENSIONS", "ORIGIN", "SPACING", "ASPECT_RATIO") and len(words) == 4:
            try:
                found["SPACING" if key == "ASPECT_RATIO" else key] = [float(word) for word in words[1:]]
            except ValueError as error:
                raise file.fail(f"three numbers for {key}", " ".join(words[1:])) from error
        elif key == "METADATA":
            _skip_metadata(file)
        else:
            raise file.fail("DIMENSIONS, ORIGIN and SPACING", " ".join(words)[:60] or "the end of the file")
    points = [int(n) if n.is_integer() and abs(n) < 2**31 else 0 for n in found["DIMENSIONS"]]
    # a bit takes an eighth of a byte
    return checked_image(
        path, points, found["ORIGIN"], found["SPACING"], time, 8 * size, lambda: _arrays(path, file.at, points)
    )


def _arrays(path: Path, at: int, points: list[int]) -> Arrays:
    """Every array of the file."""
    file = LegacyFile(path, path.read_bytes())
    file.at = at
    sizes = {"POINT_DATA": int(np.prod(points)), "CELL_DATA": int(np.prod([max(n - 1, 1) for n in points]))}
    result: dict[tuple[Centring, str], Values] = {}
    centring: Centring | None = None
    size = 0
    while line := file.line():
        words = line.split()
        key = words[0].upper()
        if key in sizes and len(words) == 2:
            centring, size = "points" if key == "POINT_DATA" else "cells", file.whole(words[1])
            if size != sizes[key]:
                raise file.fail(f"{sizes[key]} values of {key} for {points} points", str(size))
        elif key == "METADATA":
            _skip_metadata(file)
        elif key == "LOOKUP_TABLE" and len(words) == 3:
            file.numbers(4 * file.whole(words[2]), "unsigned_char")
        elif centring is None or len(words) < 3:
            raise file.fail("CELL_DATA or POINT_DATA and arrays", repr(line[:60]))
        elif key == "FIELD":
            for name, values in _field(file, file.whole(words[2])).items():
                if len(values) == size:
                    result[centring, name] = known(values, values.shape[1])
        elif key in ("SCALARS", *map(str.upper, FIXED)):
            components = FIXED.get(key.lower()) or (file.whole(words[3]) if len(words) > 3 else 1)
            if key == "SCALARS":
                start = file.at
                if not file.line().upper().startswith("LOOKUP_TABLE"):
                    file.at = start
            values = file.numbers(size * components, words[2]).reshape(size, components)
            result[centring, _unquoted(words[1])] = known(values, components)
        else:
            raise file.fail("SCALARS, VECTORS or FIELD", repr(line[:60]))
    return result


def _field(file: LegacyFile, number: int) -> dict[str, np.ndarray]:
    """Arrays (tuple, component) of a FIELD, by name."""
    result = {}
    for _ in range(number):
        words = file.line().split()
        if words[:1] == ["METADATA"]:
            _skip_metadata(file)
            words = file.line().split()
        if len(words) != 4:
            raise file.fail("name, components, tuples and type of an array", repr(" ".join(words)[:60]))
        components, tuples = file.whole(words[1]), file.whole(words[2])
        result[_unquoted(words[0])] = file.numbers(components * tuples, words[3]).reshape(tuples, components)
    return result


def _unquoted(name: str) -> str:
    return re.sub(r"%([0-9A-Fa-f]{2})", lambda match: chr(int(match[1], 16)), name)


def _skip_metadata(file: LegacyFile) -> None:
    """Names of components and information keys, up to a blank line."""
    end = re.compile(rb"\n[ \t\r]*\n").search(file.data, file.at - 1)
    file.at = end.end() if end else len(file.data)
