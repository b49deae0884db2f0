"""XML files of VTK: image data (.vti), numbers as text, base64 or raw, compressed or not, and collections (.pvd)."""

from __future__ import annotations

import base64
import lzma
import math
import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from latentphys.data.importing.vtkimage import RESAMPLE, Arrays, Centring, Image, Values, checked_image, shape

HEAD = 2**12
WORDS = {"UInt32": "u4", "UInt64": "u8"}
TYPES = WORDS | {"Int8": "i1", "UInt8": "u1", "Int16": "i2", "UInt16": "u2", "Int32": "i4", "Int64": "i8"}
TYPES |= {"Float32": "f4", "Float64": "f8"}
ORDERS = {"LittleEndian": "<", "BigEndian": ">"}
MOST_SQUEEZED = 10000
"""How many times smaller than its numbers a compressed file may be."""
_TYPE = re.compile(rb"<VTKFile\b[^>]*?\btype\s*=\s*[\"'](\w+)[\"']")
_RAW = re.compile(rb"\bencoding\s*=\s*[\"']raw[\"']")


def _lz4(block: bytes, size: int) -> bytes:
    """LZ4, which only VTK itself brings; it says nothing where a block is damaged, and gives less than `size`."""
    try:
        from vtkmodules.util.numpy_support import vtk_to_numpy
        from vtkmodules.vtkCommonCore import vtkObject
        from vtkmodules.vtkIOCore import vtkLZ4DataCompressor
    except ImportError as error:
        raise ValueError("Expected VTK for files packed with LZ4, got none; install latentphys[viz].") from error
    shown = vtkObject.GetGlobalWarningDisplay()
    vtkObject.GlobalWarningDisplayOff()
    try:
        unpacked = vtkLZ4DataCompressor().Uncompress(block, len(block), size)
    finally:
        vtkObject.SetGlobalWarningDisplay(shown)
    return vtk_to_numpy(unpacked).tobytes() if unpacked is not None else b""


def _whole(decoder: Any, block: bytes, size: int) -> bytes:
    """At most `size` bytes and one; nothing where the block lacks its end, and with it its checksum."""
    unpacked: bytes = decoder.decompress(block, size + 1)
    return unpacked if decoder.eof else b""


COMPRESSORS: dict[str, Callable[[bytes, int], bytes]] = {
    "vtkZLibDataCompressor": lambda block, size: _whole(zlib.decompressobj(), block, size),
    "vtkLZ4DataCompressor": _lz4,
    "vtkLZMADataCompressor": lambda block, size: _whole(lzma.LZMADecompressor(), block, size),
}


def kind(path: Path) -> str | None:
    """The type that an XML file of VTK declares, such as ImageData; None for all other files."""
    with path.open("rb") as stream:
        match = _TYPE.search(stream.read(HEAD))
    return match[1].decode() if match else None


@dataclass(frozen=True)
class XmlFile:
    """The tree of a file, the bytes after ``<AppendedData …>_``, and whether they are raw, not base64."""

    root: ElementTree.Element
    appended: bytes
    is_raw: bool

    def numbers(self, element: ElementTree.Element, shape: tuple[int, int]) -> np.ndarray:
        """Numbers of a DataArray, (tuple, component).

        Raises:
            ValueError: another number of them, or bytes that are not what the file says.
        """
        size = math.prod(shape)
        if element.get("type") not in TYPES:
            raise ValueError(f"numbers of the type {element.get('type')!r}")
        if element.get("format") == "ascii":
            words = (element.text or "").split()
            if len(words) != size:
                raise ValueError(f"{len(words)} of {size} numbers")
            return np.fromiter(map(float, words), np.float64, size).reshape(shape)
        order = ORDERS[self.root.get("byte_order") or "LittleEndian"]
        dtype = np.dtype(order + TYPES[element.get("type", "")])
        word = np.dtype(order + WORDS[self.root.get("header_type") or "UInt32"])
        return np.frombuffer(self._unpacked(element, size * dtype.itemsize, word), dtype).reshape(shape)

    def _unpacked(self, element: ElementTree.Element, size: int, word: np.dtype) -> bytes:
        """The `size` bytes of an array. Words in front say how many there are, or how they were compressed:
        the number of blocks, bytes in each and in the last one, and what each is packed in."""
        stored = self._stored(element)
        compressor = self.root.get("compressor")
        if not compressor:
            length, at = int(np.frombuffer(stored, word, 1)[0]), word.itemsize
            if length != size or len(stored) < at + size:
                raise ValueError(f"{min(length, len(stored) - at)} of {size} bytes")
            return stored[at : at + size]
        number, block, last = map(int, np.frombuffer(stored, word, 3))
        if number == 0 or (number - 1) * block + (last or block) != size:
            raise ValueError(f"{number} blocks of {block} bytes for {size}")
        packed = np.frombuffer(stored, word, number, 3 * word.itemsize)
        parts, at = [], (3 + number) * word.itemsize
        for i, length in enumerate(map(int, packed)):
            wanted = last or block if i == number - 1 else block
            parts.append(COMPRESSORS[compressor](stored[at : at + length], wanted))
            if len(parts[-1]) != wanted:
                raise ValueError(f"{len(parts[-1])} of {wanted} bytes in block {i}")
            at += length
        return b"".join(parts)

    def _stored(self, element: ElementTree.Element) -> bytes:
        """An array as it was before it became text."""
        if element.get("format") == "appended":
            offsets = {e: int(e.get("offset", "")) for e in self.root.iter() if e.get("format") == "appended"}
            start = offsets[element]
            if start < 0:
                raise ValueError(f"the offset {start}")
            end = min((offset for offset in offsets.values() if offset > start), default=len(self.appended))
            code = self.appended[start:end]
            if self.is_raw:
                return code
        elif element.get("format") == "binary":
            code = (element.text or "").encode()
        else:
            raise ValueError(f"the format {element.get('format')!r}")
        # the words in front are encoded by themselves, with padding; some writers encode all in one
        parts = re.findall(rb"[^=]+=*|=+", b"".join(code.split()))
        return b"".join(base64.b64decode(part, validate=True) for part in parts)


def open_xml(path: Path) -> XmlFile:
    """Parse a file.

    Raises:
        ValueError: no XML, or no VTKFile in it.
    """
    tree, found, rest = path.read_bytes().partition(b"<AppendedData")
    tag, _, body = rest.partition(b"_")
    appended, closed, _ = body.rpartition(b"</AppendedData")
    if found and not closed:
        raise ValueError("the beginning of its appended data")
    if b"<!ENTITY" in tree or b"<!DOCTYPE" in tree:
        raise ValueError(f"Expected plain XML in {path}, got a document type definition; write it again.")
    root = ElementTree.fromstring(tree + b"</VTKFile>" if found else tree)
    known: dict[str, Iterable[str]] = {"byte_order": ORDERS, "header_type": WORDS, "compressor": COMPRESSORS}
    for key, names in known.items():
        if root.get(key) not in (None, "", *names):
            raise ValueError(f"Expected {key} {' | '.join(names)} in {path}, got {root.get(key)!r}; write it again.")
    return XmlFile(root, appended, bool(_RAW.search(tag)))


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
        raise ValueError("no ImageData")
    pieces = image.findall("Piece")
    extent = _numbers(image, "WholeExtent", "")
    if len(pieces) != 1 or _numbers(pieces[0], "Extent", "") != extent or len(extent) != 6:
        raise ValueError(f"Expected one piece with all of the data in {path}, got {len(pieces)}; save it as one.")
    points = [int(high - low) + 1 for low, high in zip(extent[::2], extent[1::2], strict=True)]
    spacing = _numbers(image, "Spacing", "1 1 1")
    origin = [o + low * h for o, low, h in zip(_numbers(image, "Origin", "0 0 0"), extent[::2], spacing, strict=True)]
    time = image.find("FieldData/DataArray[@Name='TimeValue']")
    return checked_image(
        path,
        points,
        origin,
        spacing,
        None if time is None else float(file.numbers(time, (1, 1))[0, 0]),
        path.stat().st_size * (MOST_SQUEEZED if file.root.get("compressor") else 8),
        # the tree is read again when its arrays are wanted: a series of files is opened in one go
        lambda: _arrays(open_xml(path), points),
        _numbers(image, "Direction", "1 0 0 0 1 0 0 0 1"),
    )


def _arrays(file: XmlFile, points: list[int]) -> Arrays:
    groups: tuple[tuple[Centring, str], ...] = (("points", "PointData"), ("cells", "CellData"))
    result: dict[tuple[Centring, str], Values] = {}
    for centring, group in groups:
        for element in file.root.iterfind(f"ImageData/Piece/{group}/DataArray"):
            components = int(element.get("NumberOfComponents", "1"))
            read = partial(file.numbers, element, (math.prod(shape(points, centring)), components))
            result[centring, element.get("Name") or f"{group}_{len(result)}"] = Values(components, read)
    return result


def _numbers(element: ElementTree.Element, key: str, default: str) -> list[float]:
    return [float(word) for word in element.get(key, default).split()]


def collection(path: Path) -> list[tuple[float, Path]]:
    """Times t [s] and files of a .pvd collection, in order of time.

    Raises:
        ValueError: entries without time or file, or with several parts of one time.
    """
    entries = []
    for element in open_xml(path).root.iterfind("Collection/DataSet"):
        time, file = float(element.get("timestep", "nan")), path.parent / element.get("file", "")
        if not np.isfinite(time) or not file.is_file():
            raise ValueError(
                f"Expected entries with a timestep and a file that exists in {path}, got {element.attrib}."
            )
        entries.append((time, file))
    if not entries or len(dict(entries)) < len(entries):
        raise ValueError(
            f"Expected one file for each time in {path}, got {len(entries)} entries; merge the parts first."
        )
    return sorted(entries)
