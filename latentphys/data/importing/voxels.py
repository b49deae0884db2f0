"""Voxel images of porous samples: TIFF stacks, folders of slices, .npy and raw arrays; one value is pore space.

Arrays here are (nx, ny, nz). The pages of a TIFF stack, and the slices of a folder, are z; rows are y and columns x.
Arrays of .npy and raw files are taken to be (x, y, z) in C order; `axes` says otherwise, such as ``z y x`` for raw
images whose x is fastest. What value is pore space is never guessed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latentphys.data.importing.boxes import box, field_name
from latentphys.data.importing.damaged import readable
from latentphys.data.importing.numbered import series_name, visible_files
from latentphys.data.importing.source import ImportOptions, Source
from latentphys.fields import FieldSpec
from latentphys.grid import Boundary, Geometry
from latentphys.topology import harmonic_dimension, regions

TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
NPY_MAGIC = b"\x93NUMPY"
MOST_VALUES = 16
"""An image with more values than this is not segmented."""
MOST_SQUEEZED = 10000
"""How many times smaller than its numbers a compressed file may be."""
PERIODIC: tuple[Boundary, Boundary] = ("periodic", "periodic")


def recognises(path: Path) -> bool:
    """Whether this is a TIFF file, a folder of nothing but TIFF files, or a .npy array of three axes.

    Raw files look like anything: name the format for them.
    """
    if path.is_dir():
        files = visible_files(path)
        return bool(files) and all(_is_tiff(file) for file in files)
    if _is_tiff(path):
        return True
    try:
        return _begins(path, (NPY_MAGIC,)) and len(_npy_header(path)[0]) == 3
    except ValueError:
        return False


def sources(path: Path, options: ImportOptions) -> list[Source]:
    """An image as one snapshot of a scalar field ``pore``, 1 in pores and 0 in solid, with its solid voxels.

    Args:
        path: a file, or a folder of slices.
        options: `pore`; `shape` and `dtype` for raw files; `axes`; `lengths` (else the longest edge is 1 m);
            `boundaries` (else periodic), which decide what counts as connected.

    Raises:
        ValueError: as `read_voxels`.
    """
    solid = read_voxels(path, pore=options.pore, shape=options.shape, dtype=options.dtype, axes=options.axes)
    grid = box(solid.shape, None, [PERIODIC] * 3, options, str(path))
    geometry = Geometry(grid, torch.from_numpy(solid))
    values = np.where(solid, 0.0, 1.0)
    return [
        Source(
            format="voxels",
            paths=[path],
            family=options.family or field_name(series_name(path) or "voxels"),
            grid=grid,
            times=np.array([0.0]),
            num_trajectories=1,
            specs={"pore": FieldSpec("pore", "scalar", "1")},
            read=lambda name, trajectory, frame: values,
            solid=solid[None],
            about={
                "pore_value": options.pore,
                "porosity": float(values.mean()),
                "pore_spaces": int(regions(geometry).max()) + 1,
                "independent_net_flows": int(harmonic_dimension(geometry)),
                "lengths": "given" if options.lengths is not None else "the longest edge is taken to be 1 m",
                "boundaries": "given" if options.boundaries is not None else "taken to be periodic",
            },
        )
    ]


def read_voxels(
    path: str | Path,
    *,
    pore: float | None,
    shape: Sequence[int] | None = None,
    dtype: str | None = None,
    axes: str | None = None,
) -> np.ndarray:
    """The solid of an image, True where there is no pore space, bool (nx, ny, nz).

    Args:
        path: a TIFF stack, a folder of TIFF slices, a .npy file or a raw file.
        pore: the value of pore space; everything else is solid.
        shape, dtype: of a raw file, such as (400, 400, 400) and ``uint8``, in C order.
        axes: what the axes of a .npy or raw file mean. Default ``x y z``.

    Raises:
        ValueError: a file that is damaged or of another size than said, an image in colour, with NaN or with slices of
            several sizes, no value for the pores, an image without pores, without solid, or with pores through which
            nothing can flow from one side to the opposite one.
    """
    path = Path(path)
    with readable(path, "an image"):
        image = _image(path, shape, dtype, axes)
    if min(image.shape) < 2:
        raise ValueError(f"Expected at least two voxels along each axis of {path}, got {image.shape} (x, y, z).")
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        raise ValueError(f"Expected finite values in {path}, got NaN or infinity; segment the image first.")
    counts = _shares(image)
    listed = ", ".join(f"{value:g} ({share:.1%})" for value, share in counts.items())
    if len(counts) > MOST_VALUES:
        raise ValueError(f"Expected a segmented image in {path}, got {len(counts)} values; set a threshold first.")
    if pore is None:
        raise ValueError(f"Expected the value of pore space in {path}, which holds {listed}; pass it (pore).")
    if pore not in counts:
        raise ValueError(f"Expected pores in {path}, got none of value {pore:g}; it holds {listed}.")
    if len(counts) == 1:
        raise ValueError(f"Expected pores and solid in {path}, got value {pore:g} only: an empty box needs no image.")
    solid = image != pore
    if not _is_connected(~solid):
        raise ValueError(
            f"Expected pores that lead from one side of {path} to the opposite one, got none of value {pore:g} along "
            f"any axis: nothing can flow; it holds {listed}."
        )
    return np.ascontiguousarray(solid)


def _shares(image: np.ndarray) -> dict[float, float]:
    """The values of an image and the share of voxels that have each."""
    if image.dtype.itemsize == 1 and image.dtype.kind in "bu":
        # counting slice by slice is several times faster than sorting, and takes no memory
        all_counts = sum(np.bincount(part.ravel().view(np.uint8), minlength=256) for part in image)
        values = np.flatnonzero(all_counts)
        counts = np.asarray(all_counts)[values]
    else:
        values, counts = np.unique(image, return_counts=True)
    return {float(v): float(n) / image.size for v, n in zip(values, counts, strict=True)}


def _is_connected(pores: np.ndarray) -> bool:
    """Whether a path of pores that share faces joins two opposite sides."""
    from scipy.ndimage import label

    labels = label(pores)[0]
    for axis in range(3):
        low, high = (set(np.unique(labels.take(end, axis))) - {0} for end in (0, -1))
        if low & high:
            return True
    return False


def _image(path: Path, shape: Sequence[int] | None, dtype: str | None, axes: str | None) -> np.ndarray:
    """The values of an image, (nx, ny, nz)."""
    if not path.exists():
        raise ValueError(f"Expected an image at {path}, got nothing there.")
    if path.is_dir():
        return _slices(visible_files(path), path)
    if _is_tiff(path):
        return _stack(path).transpose(2, 1, 0)
    order = (axes or "x y z").replace(",", " ").split()
    if sorted(order) != ["x", "y", "z"]:
        raise ValueError(f"Expected the axes x, y and z of {path} in some order, got {axes!r}.")
    image = _npy(path) if _begins(path, (NPY_MAGIC,)) else _raw(path, shape, dtype)
    return image.transpose([order.index(axis) for axis in "xyz"])


def _slices(files: Sequence[Path], path: Path) -> np.ndarray:
    """A folder of slices, one z each."""
    if not files or not all(_is_tiff(file) for file in files):
        other = next((file.name for file in files if not _is_tiff(file)), "nothing")
        raise ValueError(f"Expected a folder of TIFF slices at {path}, got {other}.")
    first = _stack(files[0])
    size = first.shape[1:]
    result = np.empty((len(files), *size), first.dtype)
    for i, file in enumerate(files):
        one = _stack(file)
        if one.shape != (1, *size) or one.dtype != first.dtype:
            raise ValueError(
                f"Expected slices of {size[1]}×{size[0]} pixels of {first.dtype} in {path}, got {one.shape[0]} of "
                f"{one.shape[2]}×{one.shape[1]} of {one.dtype} in {file.name}."
            )
        result[i] = one[0]
    return result.transpose(2, 1, 0)


def _stack(path: Path) -> np.ndarray:
    """The pages of a TIFF file, (page, row, column)."""
    library = _tifffile()
    with _logged("tifffile") as errors, library.TiffFile(path) as file:
        pages = list(file.pages)
        if errors:
            raise ValueError(errors[0])
        if not pages:
            raise ValueError(f"Expected an image in {path}, got none.")
        first = pages[0]
        for page in pages:
            if page.ndim != 2 or page.samplesperpixel != 1:
                raise ValueError(
                    f"Expected grey slices in {path}, got pages of shape {page.shape} with {page.samplesperpixel} "
                    "samples a pixel; save one channel without colour."
                )
            if page.shape != first.shape or page.dtype != first.dtype:
                raise ValueError(f"Expected slices of one size in {path}, got {first.shape} and {page.shape}.")
        if first.dtype is None or first.dtype.kind not in "fiub":
            raise ValueError(f"Expected numbers in {path}, got values of type {first.dtype}.")
        rows, columns = first.shape
        size, there = rows * columns * len(pages) * first.dtype.itemsize, path.stat().st_size
        if size > MOST_SQUEEZED * there or (first.compression == 1 and size > 8 * there):
            raise ValueError(f"Expected {len(pages)} slices of {first.shape} in {path}, got a file too small for them.")
        result = np.empty((len(pages), rows, columns), first.dtype)
        for i, page in enumerate(pages):
            try:
                result[i] = page.asarray()
            except ValueError as error:
                if "imagecodecs" not in str(error):
                    raise
                raise ValueError(
                    f"Expected an uncompressed image in {path}, or one in zlib, got another compression; save it "
                    "so, or install imagecodecs."
                ) from error
    return result


class _Errors(logging.Handler):
    """Keeps what is logged as an error."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def _logged(name: str) -> Iterator[list[str]]:
    """What a library logs as errors: tifffile goes on with fewer pages where the list of pages is damaged."""
    logger, handler = logging.getLogger(name), _Errors()
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield handler.messages
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def _tifffile() -> Any:
    try:
        import tifffile
    except ImportError as error:
        raise ValueError("Expected tifffile for TIFF images, got none; install latentphys[formats].") from error
    return tifffile


def _npy_header(path: Path) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, Fortran order and type of a .npy file."""
    readers: dict[tuple[int, int], Callable[[Any], tuple[tuple[int, ...], bool, np.dtype[Any]]]] = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    with readable(path, "an image"), path.open("rb") as stream:
        version = np.lib.format.read_magic(stream)
        if version not in readers:
            raise ValueError(f"version {version} of the format")
        shape, is_fortran, dtype = readers[version](stream)
        size = math.prod(shape) * dtype.itemsize
        if dtype.hasobject or dtype.kind not in "fiub":
            raise ValueError(f"values of type {dtype}, numbers wanted")
        if size != path.stat().st_size - stream.tell():
            raise ValueError(f"{path.stat().st_size - stream.tell()} bytes for shape {shape} of {dtype}")
    return shape, is_fortran, dtype


def _npy(path: Path) -> np.ndarray:
    shape, _, _ = _npy_header(path)
    if len(shape) != 3:
        raise ValueError(f"Expected an array of three axes in {path}, got shape {shape}.")
    return np.load(path, allow_pickle=False)


def _raw(path: Path, shape: Sequence[int] | None, dtype: str | None) -> np.ndarray:
    size = path.stat().st_size
    if shape is None or dtype is None:
        raise ValueError(
            f"Expected a TIFF or .npy image, or the shape and dtype of a raw one, for {path} of {size} bytes."
        )
    try:
        kind = np.dtype(dtype)
    except TypeError as error:
        raise ValueError(f"Expected a dtype such as uint8 for {path}, got {dtype!r}.") from error
    if len(shape) != 3 or min(shape) < 1 or kind.kind not in "fiub":
        raise ValueError(f"Expected a shape of three axes and a dtype of numbers for {path}, got {shape} of {dtype!r}.")
    if math.prod(shape) * kind.itemsize != size:
        raise ValueError(
            f"Expected {math.prod(shape) * kind.itemsize} bytes, shape {tuple(shape)} of {kind}, in {path}, got {size}."
        )
    return np.fromfile(path, kind).reshape(tuple(shape))


def _begins(path: Path, magic: Sequence[bytes]) -> bool:
    try:
        with path.open("rb") as stream:
            return stream.read(max(map(len, magic))) in magic
    except OSError:
        return False


def _is_tiff(path: Path) -> bool:
    return _begins(path, TIFF_MAGIC)
