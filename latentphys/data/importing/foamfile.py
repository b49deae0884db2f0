"""The files of OpenFOAM: a header, then entries or one long list, as text or with binary lists in it.

    FoamFile { format binary; class surfaceScalarField; arch "LSB;label=32;scalar=64"; … }
    dimensions [0 3 -1 0 0 0 0];    internalField nonuniform List<scalar> 760(…);    boundaryField { inlet { … } … }

Entries become dictionaries whose values are lists of words; a list of numbers among them is an array.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

COMPONENTS = {"scalar": 1, "vector": 3, "sphericalTensor": 1, "symmTensor": 6, "tensor": 9}
MOST_NESTED = 32

_BLANK = re.compile(rb"(?:\s+|//[^\n]*|/\*.*?\*/)*", re.DOTALL)
_WORD = re.compile(rb'"[^"]*"|[{}()\[\];]|[^\s{}()\[\];"]+')
_ROW_END = re.compile(rb"\)\s*\)")


@dataclass
class FoamFile:
    """One file, read as far as its header.

    Attributes:
        path: where it is.
        header: the entries of ``FoamFile { … }``.
    """

    path: Path
    data: bytes
    at: int
    header: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """Its class, such as ``volVectorField``."""
        return " ".join(self.header.get("class", ["unknown"]))

    def _fail(self, expected: str, got: str) -> ValueError:
        return ValueError(f"Expected {expected} in {self.path}, got {got}; the file is damaged or of another format.")

    def _blank(self) -> None:
        match = _BLANK.match(self.data, self.at)
        assert match is not None
        self.at = match.end()

    def word(self) -> str:
        """The next word or bracket; empty at the end."""
        self._blank()
        match = _WORD.match(self.data, self.at)
        if match is None:
            if self.at < len(self.data):
                raise self._fail("words", "a quotation that does not end")
            return ""
        self.at = match.end()
        return match.group().decode("utf-8", "replace").strip('"')

    def peek(self) -> str:
        at = self.at
        word = self.word()
        self.at = at
        return word

    def count(self) -> int:
        """The number in front of a list."""
        word = self.word()
        if not word.isdecimal() or len(word) > 12:
            raise self._fail("the length of a list", repr(word[:40]) if word else "its end")
        return int(word)

    def entries(self, end: str = "", depth: int = 0) -> dict[str, Any]:
        """``key words;`` and ``key { … }`` up to a bracket, or to the end of the file."""
        if depth > MOST_NESTED:
            raise self._fail(f"at most {MOST_NESTED} levels of entries", "more")
        result: dict[str, Any] = {}
        while (key := self.word()) != end:
            if key == "":
                raise self._fail(f"{end!r} at the end of the entries", "the end of the file")
            if key.startswith("#"):
                self.at = (self.data.find(b"\n", self.at) + 1) or len(self.data)
            elif key in "{}()[]":
                raise self._fail("a name", repr(key))
            elif key != ";":
                result[key] = self._value(depth)
        return result

    def _value(self, depth: int) -> Any:
        if self.peek() == "{":
            self.word()
            return self.entries("}", depth + 1)
        words: list[Any] = []
        while (word := self.word()) != ";":
            if word in ("", "}"):
                raise self._fail("';' after an entry", repr(word) if word else "the end of the file")
            words.append(word)
            if word == "nonuniform":
                words.append(self._typed_list())
        return words

    def _typed_list(self) -> np.ndarray:
        match = re.fullmatch(r"List<(\w+)>", self.peek())
        if match is None:  # an empty list has no type
            return self.numbers(1)
        self.word()
        if match[1] not in COMPONENTS:
            raise self._fail(f"a list of {' | '.join(COMPONENTS)}", match[0])
        return self.numbers(COMPONENTS[match[1]])

    def numbers(self, components: int, whole: bool = False) -> np.ndarray:
        """A list ``N(…)``, ``N{same for all}`` or binary, of shape (N,) or (N, components); FP64 or int64."""
        length = self.count()
        shape = (length,) if components == 1 else (length, components)
        dtype = np.dtype(np.int64 if whole else np.float64)
        if length == 0:
            if self.peek() == "(":
                self.word()
                self._close()
            return np.empty(shape, dtype)
        bracket = self.word()
        if bracket == "{":
            end = self.data.find(b"}", self.at)
            values = self._parsed(self.data[self.at : max(end, self.at)], components, dtype)
            self.at = end + 1
            return np.broadcast_to(values[0] if components == 1 else values, shape)
        if bracket != "(":
            raise self._fail("'(' before a list", repr(bracket) if bracket else "the end of the file")
        if self.header.get("format") == ["binary"]:
            return self._binary(length * components, whole).astype(dtype).reshape(shape)
        return self._parsed(self._text(rows=components > 1), length * components, dtype).reshape(shape)

    def _close(self) -> None:
        if (word := self.word()) != ")":
            raise self._fail("')' after a list", repr(word[:40]) if word else "the end of the file")

    def _text(self, rows: bool) -> bytes:
        """The text up to the bracket that closes a list."""
        match = _ROW_END.search(self.data, self.at) if rows else None
        end = (match.end() - 1 if match else -1) if rows else self.data.find(b")", self.at)
        if end < 0:
            raise self._fail("')' after a list", "the end of the file")
        text = self.data[self.at : end]
        self.at = end + 1
        return text

    def _parsed(self, text: bytes, size: int, dtype: np.dtype[Any]) -> np.ndarray:
        words = text.translate(bytes.maketrans(b"()", b"  ")).split()
        if len(words) != size:
            raise self._fail(f"a list of {size} numbers", str(len(words)))
        try:
            values = np.array(words).astype(dtype)
        except ValueError as error:
            raise self._fail("numbers", str(error)) from error
        return self._finite(values)

    def _binary(self, size: int, whole: bool) -> np.ndarray:
        arch = " ".join(self.header.get("arch", ["LSB;label=32;scalar=64"]))
        bits = re.search(r"label=(32|64)" if whole else r"scalar=(32|64)", arch)
        if bits is None:
            raise self._fail("the sizes of numbers in the header's arch", repr(arch))
        order = ">" if arch.startswith("MSB") else "<"
        dtype = np.dtype(f"{order}{'i' if whole else 'f'}{int(bits[1]) // 8}")
        end = self.at + size * dtype.itemsize
        if end > len(self.data):
            raise self._fail(f"a list of {size} numbers", f"{(len(self.data) - self.at) // dtype.itemsize}")
        values = np.frombuffer(self.data, dtype, size, self.at)
        self.at = end
        self._close()
        return self._finite(values)

    def _finite(self, values: np.ndarray) -> np.ndarray:
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise ValueError(f"Expected finite numbers in {self.path}, got NaN or infinity; the run has diverged.")
        return values

    def faces(self) -> np.ndarray:
        """Corners of the faces of a mesh of boxes, int64 (face, 4)."""
        if self.kind == "faceCompactList":
            starts, corners = self.numbers(1, whole=True), self.numbers(1, whole=True)
            is_rectangle = starts.size > 1 and bool((starts == 4 * np.arange(starts.size)).all())
            if not is_rectangle or corners.size != starts[-1]:
                raise self._not_boxes()
            return corners.reshape(-1, 4)
        length = self.count()
        if self.word() != "(":
            raise self._fail("'(' before the faces", "something else")
        words = self._text(rows=True)
        sizes = re.findall(rb"([0-9]+)\s*\(", words)
        if set(sizes) - {b"4"}:
            raise self._not_boxes()
        return self._parsed(words, 5 * length, np.dtype(np.int64)).reshape(-1, 5)[:, 1:]

    def _not_boxes(self) -> ValueError:
        return ValueError(
            f"Expected faces with four corners in {self.path}, got others; sample the case on a uniform box mesh "
            "(blockMesh and mapFields)."
        )


def open_foam(path: Path) -> FoamFile:
    """Read a file, compressed or not, and its header.

    Raises:
        ValueError: a file that cannot be read, or without a header.
    """
    try:
        data = path.read_bytes()
        if data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"Expected an OpenFOAM file at {path}, got: {error}.") from error
    file = FoamFile(path, data, 0, {})
    if file.word() != "FoamFile" or file.word() != "{":
        raise ValueError(f"Expected an OpenFOAM file with a header at {path}, got something else.")
    file.header = file.entries("}")
    return file


def unit_of(dimensions: list[str], path: Path) -> str:
    """The SI unit of ``[kg m s K mol A cd]`` exponents, such as ``m2/s2`` or ``kg/(m s2)``.

    Raises:
        ValueError: dimensions that are not numbers, in the file at `path`.
    """
    symbols = ("kg", "m", "s", "K", "mol", "A", "cd")
    try:
        powers = dict(zip(symbols, (float(w) for w in dimensions if w not in "[]"), strict=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"Expected numbers as dimensions in {path}, got {str(dimensions)[:60]}.") from error

    def product(sign: int) -> list[str]:
        terms = [(symbol, sign * power) for symbol, power in powers.items() if sign * power > 0]
        return [symbol if power == 1 else f"{symbol}{power:g}" for symbol, power in terms]

    above, below = " ".join(product(1)) or "1", product(-1)
    return above + (f"/({' '.join(below)})" if len(below) > 1 else f"/{below[0]}" if below else "")
