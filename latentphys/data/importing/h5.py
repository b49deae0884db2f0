"""HDF5 files of others: opened for reading only, nothing followed out of them, one line for whatever is wrong.

A file may be cut off, half-written, or made to harm. So every link is looked at before it is followed, every array is
checked before its first number is read (numbers and nothing else, all of it in this file, as much of it as its shape
says), and what the HDF5 library says of a broken file becomes one ValueError with the file's name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

SIGNATURE = b"\x89HDF\r\n\x1a\n"
MOST_SMALL_NUMBERS = 2**24
"""Coordinates, times and the like are read whole; no more than this many at once."""
MOST_ATTRIBUTE_BYTES = 2**22
MOST_SOFT_LINKS = 16
SPLITS = ("train", "valid", "val", "test")


def h5py() -> Any:
    """The HDF5 library, loaded when the first file is."""
    try:
        import h5py
    except ImportError as error:
        raise ValueError("Expected h5py for HDF5 files, got none; install latentphys[formats].") from error
    return h5py


def is_hdf5(path: Path) -> bool:
    """Whether a file has HDF5's signature, at its start or behind a user block of 512, 1024, 2048, … bytes.

    Raises:
        ValueError: a file that cannot be read.
    """
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            size, place = path.stat().st_size, 0
            while place < size:
                file.seek(place)
                if file.read(len(SIGNATURE)) == SIGNATURE:
                    return True
                place = 2 * place or 512
    except OSError as error:
        raise ValueError(f"Expected a file that can be read, got {path}: {error.strerror}.") from error
    return False


def hdf5_files(path: Path) -> list[Path]:
    """The HDF5 files at a path: itself, or those in the folder and in its folders, two levels down.

    Training files come before validation and test files, and numbers in names count as numbers.
    """
    if not path.is_dir():
        return [path] if is_hdf5(path) else []
    try:
        found = [p for pattern in ("*", "*/*", "*/*/*") for p in path.glob(pattern)]
        found = [p for p in found if not _is_hidden(p.relative_to(path)) and is_hdf5(p)]
    except OSError as error:
        raise ValueError(f"Expected a folder that can be read, got {path}: {error.strerror}.") from error
    return sorted(found, key=lambda p: _order(p.relative_to(path)))


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _order(path: Path) -> tuple[Any, ...]:
    split = next((SPLITS.index(part) for part in path.parts if part in SPLITS), -1)
    return split, [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in _parts(str(path))]


def _parts(text: str) -> list[str]:
    return re.findall(r"\d+|\D+", text)


class Array:
    """A numerical array of a file, read in parts.

    Attributes:
        shape, dtype: what it holds.
        where: the file and the array, for messages.
    """

    def __init__(self, dataset: Any, path: Path, name: str) -> None:
        self._dataset, self.where = dataset, f"array {name!r} of {path}"
        with broken(self.where):
            self.shape: tuple[int, ...] | None = dataset.shape
            virtual, external = dataset.is_virtual, dataset.external
            dtype = np.dtype(dataset.dtype)
        if self.shape is None or not math.prod(self.shape):
            raise ValueError(f"Expected numbers in {self.where}, got an empty one of shape {self.shape}.")
        if dtype.kind not in "fiub" or dtype.hasobject:
            raise ValueError(f"Expected real numbers in {self.where}, got values of type {dtype}.")
        if virtual or external:
            raise ValueError(f"Expected all numbers of {self.where} in that file, got an array kept in other files.")
        self.dtype = dtype
        self._check_complete(path)

    def _check_complete(self, path: Path) -> None:
        """Parts that were never written would read as fill values, and shapes without data cost memory."""
        assert self.shape is not None
        with broken(self.where):
            chunks, identifier = self._dataset.chunks, self._dataset.id
            stored = identifier.get_storage_size()
            written = identifier.get_num_chunks() if chunks else 0
        wanted = math.prod(self.shape) * self.dtype.itemsize
        if chunks:
            parts = math.prod(-(-n // c) for n, c in zip(self.shape, chunks, strict=True))
            complete, got = written == parts, f"{written} of {parts} chunks"
        else:
            complete, got = stored >= wanted, f"{stored} of {wanted} bytes"
        if not complete or stored > path.stat().st_size:
            raise ValueError(f"Expected {self.where} to be complete, got {got} of shape {self.shape}; make it again.")

    def read(self, index: tuple[int | slice, ...] = ()) -> np.ndarray:
        """Some of its numbers."""
        with broken(self.where):
            return np.asarray(self._dataset[index])


class H5File:
    """An HDF5 file open for reading."""

    def __init__(self, path: Path) -> None:
        self.path = path
        library = h5py()
        with broken(str(path), remedy="copy or download it again"):
            self._file = library.File(path, "r", locking="best-effort")

    def attributes(self, name: str = "/") -> dict[str, Any]:
        """Attributes of a group or array, texts as `str`, in arrays as lists.

        Raises:
            ValueError: nothing of that name, or attributes that cannot be read.
        """
        found, result = self._get(name), {}
        with broken(f"attributes of {name!r} in {self.path}"):
            for key in found.attrs:
                identifier = found.attrs.get_id(key)
                if math.prod(identifier.shape) * identifier.dtype.itemsize > MOST_ATTRIBUTE_BYTES:
                    raise OSError(f"{key!r} has the shape {identifier.shape}")
                result[str(key)] = _plain(found.attrs[key])
        return result

    def names(self, name: str = "/") -> list[str]:
        """Names of what a group holds, sorted; [] for an array.

        Raises:
            ValueError: nothing of that name.
        """
        found = self._get(name)
        with broken(f"group {name!r} of {self.path}"):
            return sorted(found) if isinstance(found, h5py().Group) else []

    def has(self, name: str) -> bool:
        """Whether there is a group or array of that name."""
        return self._find(name) is not None

    def is_array(self, name: str) -> bool:
        return isinstance(self._find(name), h5py().Dataset)

    def array(self, name: str) -> Array:
        """An array that is safe to read.

        Raises:
            ValueError: no array of that name, one that does not hold numbers, is incomplete or kept in other files.
        """
        found = self._get(name)
        if not isinstance(found, h5py().Dataset):
            raise ValueError(f"Expected an array {name!r} in {self.path}, got a group.")
        return Array(found, self.path, name)

    def numbers(self, name: str) -> np.ndarray:
        """All of a small array, such as coordinates, in FP64.

        Raises:
            ValueError: as `array`, and for more numbers than coordinates can be, or ones that are not finite.
        """
        array = self.array(name)
        assert array.shape is not None
        if math.prod(array.shape) > MOST_SMALL_NUMBERS:
            raise ValueError(
                f"Expected at most {MOST_SMALL_NUMBERS} numbers in {array.where}, got shape {array.shape}."
            )
        values = array.read().astype(np.float64)
        if not np.isfinite(values).all():
            raise ValueError(f"Expected finite numbers in {array.where}, got NaN or infinity.")
        return values

    def arrays(self) -> Iterator[tuple[str, tuple[int, ...] | None]]:
        """Name and shape of every array, for messages; links are not followed."""
        found: list[tuple[str, tuple[int, ...] | None]] = []

        def visit(name: str, item: Any) -> None:
            if isinstance(item, h5py().Dataset):
                found.append((name, item.shape))

        with broken(str(self.path)):
            self._file.visititems(visit)
        yield from found

    def _get(self, name: str) -> Any:
        found = self._find(name)
        if found is None:
            raise ValueError(
                f"Expected {name!r} in {self.path}, got none; the file is incomplete or of another layout."
            )
        return found

    def _find(self, name: str) -> Any:
        """A group or array; None where there is none."""
        with broken(f"{name!r} in {self.path}"):
            return self._follow(name, 0)

    def _follow(self, name: str, followed: int) -> Any:
        """The same link by link, none of them out of the file."""
        links, here = h5py().h5l, self._file["/"]
        for part in PurePosixPath(name).parts:
            if part in ("/", "."):
                continue
            key = part.encode()
            if not isinstance(here, h5py().Group) or not here.id.links.exists(key):
                return None
            kind = here.id.links.get_info(key).type
            if kind == links.TYPE_HARD:
                here = here[part]
            elif kind != links.TYPE_SOFT:
                raise OSError("a link to another file, which is not followed")
            elif followed >= MOST_SOFT_LINKS:
                raise OSError("too many links")
            else:
                target = here.id.links.get_val(key).decode()
                here = self._follow(str(PurePosixPath(here.name) / target), followed + 1)
        return here


@contextmanager
def broken(where: str, remedy: str = "the file is damaged or incomplete") -> Iterator[None]:
    """What HDF5 says of a file that it cannot read, as one ValueError."""
    try:
        yield
    except (OSError, RuntimeError, LookupError, TypeError, ValueError, AttributeError, MemoryError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"Expected readable HDF5 data, got {where}: {reason[:200]}; {remedy}.") from error


def _plain(value: Any) -> Any:
    """An attribute as Python numbers, texts and lists."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, np.ndarray):
        return _plain(value.item()) if value.ndim == 0 else [_plain(item) for item in value.tolist()]
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | bool | int | float) else repr(value)


def texts(value: Any) -> list[str]:
    """An attribute that lists names; a single text is a list of one."""
    return [value] if isinstance(value, str) else [str(item) for item in value or []]
