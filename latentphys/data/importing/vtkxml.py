"""XML files of VTK: image data (.vti), numbers as text, base64 or raw, compressed or not, and collections (.pvd)."""

from __future__ import annotations

import base64
import binascii
import lzma
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from latentphys.data.importing.vtkimage import RESAMPLE, Arrays, Centring, Image, Values, checked_image

HEAD = 2**12
TYPES = {
    f"{kind}{bits}": f"{code}{bits // 8}" for kind, code in (("Int", "i"), ("UInt", "u")) for bits in (8, 16, 32, 64)
}
TYPES |= {"Float32": "f4", "Float64": "f8"}
MOST_SQUEEZED = 10000
"""How many times smaller than its numbers a compressed file may be."""


def _lz4(block: bytes, size: int) -> bytes:
    """LZ4, which only VTK itself brings; it says nothing where a block is damaged, and gives less than `size`."""
    try:
        from vtkmodules.util.numpy_support import vtk_to_numpy
        from vtkmodules.vtkCommonCore import vtkObject
        from vtkmodules.vtkIOCore import vtkLZ4DataCompressor
    except ImportError as error:
        raise ValueError("LZ4, for which latentphys[viz] is needed") from error
    shown = vtkObject.GetGlobalWarningDisplay()
    vtkObject.GlobalWarningDisplayOff()
    try:
        unpacked = vtkLZ4DataCompressor().Uncompress(block, len(block), size)
    finally:
        vtkObject.SetGlobalWarningDisplay(shown)
    return vtk_to_numpy(unpacked).tobytes() if unpacked is not None else b""


COMPRESSORS: dict[str, Callable[[bytes, int], bytes]] = {
    "vtkZLibDataCompressor": lambda block, size: zlib.decompressobj().decompress(block, size + 1),
    "vtkLZ4DataCompressor": _lz4,
    "vtkLZMADataCompressor": lambda block, size: lzma.LZMADecompressor().decompress(block, size + 1),
}
_TYPE = re.compile(rb"<VTKFile\b[^>]*?\btype\s*=\s*[\"'](\w+)[\"']")


def kind(path: Path) -> str | None:
    """The type that an XML file of VTK declares, such as ImageData; None for all other files."""
    with path.open("rb") as stream:
        match = _TYPE.search(stream.read(HEAD))
    return match[1].decode() if match else None


@dataclass(frozen=True)
class XmlFile:
    """The tree of a file, and the bytes after ``<AppendedData …>_``."""

    path: Path
    root: ElementTree.Element
    appended: bytes
    is_raw: bool

    @property
    def order(self) -> str:
        return ">" if self.root.get("byte_order") == "BigEndian" else "<"

    def fail(self, expected: str, got: str) -> ValueError:
        return ValueError(f"Expected {expected} in {self.path}, got {got}; the file is cut off or damaged.")

    def numbers(self, element: ElementTree.Element, size: int) -> np.ndarray:
        """`size` numbers of a DataArray.

        Raises:
            ValueError: another number of them, or bytes that are not what the file says.
        """
        name = element.get("Name", "?")
        if element.get("type") not in TYPES:
            raise self.fail(f"numbers in array {name!r}", f"type {element.get('type')!r}")
        dtype = np.dtype(self.order + TYPES[element.get("type", "")])
        if element.get("format") == "ascii":
            words = (element.text or "").split()
            if len(words) != size:
                raise self.fail(f"{size} numbers in array {name!r}", str(len(words)))
            try:
                return np.array(words).astype(np.float64)
            except ValueError as error:
                raise self.fail(f"numbers in array {name!r}", str(error)) from error
        try:
            data = self._bytes(element, size * dtype.itemsize)
        except (zlib.error, lzma.LZMAError, binascii.Error, ValueError, EOFError) as error:
            raise self.fail(f"{size} numbers in array {name!r}", str(error)) from error
        if len(data) != size * dtype.itemsize:
            raise self.fail(f"{size} numbers in array {name!r}", f"{len(data) // dtype.itemsize}")
        return np.frombuffer(data, dtype)

    def _bytes(self, element: ElementTree.Element, size: int) -> bytes:
        word = np.dtype(self.order + TYPES[self.root.get("header_type", "UInt32")])
        take = self._source(element)
        compressor = self.root.get("compressor")
        if not compressor:
            (length,) = np.frombuffer(take(word.itemsize), word)
            if length != size:
                raise ValueError(f"{length} bytes")
            return take(size, at=word.itemsize, joined=True)
        number, block, last = (int(n) for n in np.frombuffer(take(3 * word.itemsize), word))
        if number == 0 or number > size or block > max(size, 2**31) or (number - 1) * block + (last or block) != size:
            raise ValueError(f"{number} blocks of {block} bytes")
        head = (3 + number) * word.itemsize
        sizes = [int(n) for n in np.frombuffer(take(head), word)[3:]]
        packed = take(sum(sizes), at=head)
        parts, start = [], 0
        for i, length in enumerate(sizes):
            want = last or block if i == number - 1 else block
            parts.append(COMPRESSORS[compressor](packed[start : start + length], want))
            if len(parts[-1]) != want:
                raise ValueError(f"{len(parts[-1])} bytes in block {i}")
            start += length
        return b"".join(parts)

    def _source(self, element: ElementTree.Element) -> Callable[..., bytes]:
        """take(length, at=0): bytes of an array as they were before they became text."""
        if element.get("format") == "appended":
            text, is_raw = self.appended, self.is_raw
            offset = element.get("offset", "")
            if not offset.isdecimal() or int(offset) > len(text):
                raise ValueError(f"offset {offset!r}")
            start = int(offset)
        else:
            text, is_raw, start = "".join((element.text or "").split()).encode(), False, 0

        def take(length: int, at: int = 0, joined: bool = False) -> bytes:
            if is_raw:
                data = text[start + at : start + at + length]
            else:
                # a head is encoded by itself, with padding; some writers encode it in one with the numbers
                skipped = 4 * (-(-at // 3))
                inside = 0
                if joined and at % 3 and text[start + skipped - 1 : start + skipped] != b"=":
                    skipped, inside = 4 * (at // 3), at % 3
                code = text[start + skipped : start + skipped + 4 * (-(-(length + inside) // 3))]
                data = base64.b64decode(code, validate=True)[inside : inside + length]
            if len(data) != length:
                raise ValueError(f"{len(data)} of {length} bytes")
            return data

        return take


def open_xml(path: Path) -> XmlFile:
    """Parse a file.

    Raises:
        ValueError: no XML, or no VTKFile in it.
    """
    data = path.read_bytes()
    start = data.find(b"<AppendedData")
    appended, is_raw = b"", False
    if start >= 0:
        first, close = data.find(b"_", start), data.find(b">", start)
        end = data.rfind(b"</AppendedData")
        if first < 0 or close < 0 or end < first:
            raise ValueError(f"Expected appended data in {path}, got its beginning only; the file is cut off.")
        is_raw = b'"raw"' in data[start:close] or b"'raw'" in data[start:close]
        appended = data[first + 1 : end] if is_raw else data[first + 1 : end].strip()
        data = data[:start] + b"</VTKFile>"
    if b"<!ENTITY" in data or b"<!DOCTYPE" in data:
        raise ValueError(f"Expected plain XML in {path}, got a document type definition; write it again.")
    try:
        root = ElementTree.fromstring(data)
    except ElementTree.ParseError as error:
        raise ValueError(f"Expected XML in {path}, got: {error}; the file is cut off or damaged.") from error
    if root.tag != "VTKFile":
        raise ValueError(f"Expected a VTKFile in {path}, got {root.tag!r}.")
    compressor = root.get("compressor")
    if compressor and compressor not in COMPRESSORS:
        raise ValueError(f"Expected {' | '.join(COMPRESSORS)} in {path}, got {compressor}; save it with zlib.")
    if root.get("header_type", "UInt32") not in ("UInt32", "UInt64"):
        raise ValueError(f"Expected a header_type UInt32 or UInt64 in {path}, got {root.get('header_type')}.")
    return XmlFile(path, root, appended, is_raw)


def read(path: Path) -> Image:
    """The box of a .vti file; its arrays when they are asked for.

    Raises:
        ValueError: another kind of data, several pieces, or a file that is damaged.
    """
    if (found := kind(path)) != "ImageData":
        raise ValueError(f"Expected image data in {path}, got {found}; {RESAMPLE}.")
    file = open_xml(path)
    image = file.root.find("ImageData")
    if image is None:
        raise file.fail("ImageData", "none")
    pieces = image.findall("Piece")
    extent = _numbers(file, image, "WholeExtent", "")
    if len(pieces) != 1 or _numbers(file, pieces[0], "Extent", "") != extent or len(extent) != 6:
        raise ValueError(f"Expected one piece with all of the data in {path}, got {len(pieces)}; save it as one.")
    points = [int(high - low) + 1 for low, high in zip(extent[::2], extent[1::2], strict=True)]
    spacing = _numbers(file, image, "Spacing", "1 1 1")
    origin = _numbers(file, image, "Origin", "0 0 0")
    if len(origin) == len(spacing) == 3:
        origin = [o + low * h for o, low, h in zip(origin, extent[::2], spacing, strict=True)]
    time = None
    for element in image.iterfind("FieldData/DataArray"):
        if element.get("Name") == "TimeValue":
            time = float(file.numbers(element, 1)[0])
    most = path.stat().st_size * (MOST_SQUEEZED if file.root.get("compressor") else 8)
    direction = _numbers(file, image, "Direction", "1 0 0 0 1 0 0 0 1")
    # the tree is read again when its arrays are wanted: a series of files is opened in one go
    return checked_image(path, points, origin, spacing, time, most, lambda: _arrays(path, points), direction)


def _arrays(path: Path, points: list[int]) -> Arrays:
    file = open_xml(path)
    result: dict[tuple[Centring, str], Values] = {}
    groups: tuple[tuple[Centring, str, int], ...] = (
        ("points", "PointData", int(np.prod(points))),
        ("cells", "CellData", int(np.prod([max(n - 1, 1) for n in points]))),
    )
    for centring, group, size in groups:
        for element in file.root.iterfind(f"ImageData/Piece/{group}/DataArray"):
            components = element.get("NumberOfComponents", "1")
            if not components.isdecimal() or not 1 <= int(components) <= 1000:
                raise file.fail("a number of components", repr(components))
            name = element.get("Name") or f"{group}_{len(result)}"
            result[centring, name] = Values(int(components), _reader(file, element, size, int(components)))
    return result


def _reader(file: XmlFile, element: ElementTree.Element, size: int, components: int) -> Callable[[], np.ndarray]:
    return lambda: file.numbers(element, size * components).reshape(size, components)


def _numbers(file: XmlFile, element: ElementTree.Element, key: str, default: str) -> list[float]:
    try:
        return [float(word) for word in element.get(key, default).split()]
    except ValueError as error:
        raise file.fail(f"numbers in {key}", repr(element.get(key))) from error


def collection(path: Path) -> list[tuple[float, Path]]:
    """Times t [s] and files of a .pvd collection, in order of time.

    Raises:
        ValueError: entries without time or file, or with several parts of one time.
    """
    file = open_xml(path)
    entries = []
    for element in file.root.iterfind("Collection/DataSet"):
        try:
            time, name = float(element.get("timestep", "nan")), element.get("file", "")
        except ValueError:
            time, name = float("nan"), ""
        if not np.isfinite(time) or not (path.parent / name).is_file():
            raise ValueError(
                f"Expected entries with a timestep and a file that exists in {path}, got {element.attrib}."
            )
        entries.append((time, path.parent / name))
    entries.sort(key=lambda entry: entry[0])
    if not entries or len({time for time, _ in entries}) < len(entries):
        raise ValueError(
            f"Expected one file for each time in {path}, got {len(entries)} entries; merge the parts first."
        )
    return entries
