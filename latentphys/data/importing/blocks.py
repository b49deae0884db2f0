"""Sources from arrays in HDF5 files: what the axes of each array mean, and which files belong together.

Every layout of gridded data says the same things in another order. Here an array is a name and a string of axes,

    b trajectory    t time    x y z space    c components of a vector (c d of a tensor)

such as ``btxyc``. What an array lacks does not vary: without b it is the same in all trajectories, without t in all
frames, without z along z; an axis of length 1 counts as lacking.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from latentphys.data.importing.h5 import Array, H5File
from latentphys.data.importing.source import Source
from latentphys.fields import FieldSpec
from latentphys.grid import Grid

MOST_OPEN_FILES = 8


@dataclass(frozen=True)
class Piece:
    """Components of a field: those of one array, or one of them.

    Args:
        array: its name in the file.
        axes: what its axes mean, in order.
        channel: index along the component axes; empty for all components along c.
    """

    array: str
    axes: str
    channel: tuple[int, ...] = ()


@dataclass(frozen=True)
class Part:
    """Trajectories of one file that have a grid and times in common.

    Args:
        path: the file.
        indices: where they are along b.
        grid, times, specs: as in a source.
        pieces: what each field consists of, in order; a vector with fewer than three components has zeros after them.
        parameters: numbers (trajectory,), (trajectory, k) or (trajectory, time, k).
        solid: where the solid is above one half, or None.
    """

    path: Path
    indices: Sequence[int]
    grid: Grid
    times: np.ndarray
    specs: Mapping[str, FieldSpec]
    pieces: Mapping[str, tuple[Piece, ...]]
    parameters: Mapping[str, np.ndarray] = field(default_factory=dict)
    solid: Piece | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """What trajectories must have in common to be in one store."""
        shapes = tuple(sorted((name, values.shape[1:]) for name, values in self.parameters.items()))
        return self.grid, self.times.tobytes(), tuple(self.specs.items()), shapes, self.solid is None


class OpenFiles:
    """The files read last, open, and what was read last of an array with several fields in it."""

    def __init__(self) -> None:
        self._files: OrderedDict[Path, tuple[H5File, dict[str, Array]]] = OrderedDict()
        self._last: tuple[Any, np.ndarray] = (None, np.zeros(0))

    def array(self, path: Path, name: str) -> Array:
        if path not in self._files:
            while len(self._files) >= MOST_OPEN_FILES:
                self._files.popitem(last=False)
            self._files[path] = (H5File(path), {})
        self._files.move_to_end(path)
        file, arrays = self._files[path]
        if name not in arrays:
            arrays[name] = file.array(name)
        return arrays[name]

    def snapshot(self, path: Path, piece: Piece, trajectory: int, frame: int, grid: Grid) -> np.ndarray:
        """Components of one snapshot (component, nx, ny, nz), in the type they have in the file.

        Raises:
            ValueError: data that cannot be read or are not finite, with file, array, trajectory and frame.
        """
        array = self.array(path, piece.array)
        assert array.shape is not None
        place, sizes = {"b": trajectory, "t": frame}, dict(zip(piece.axes, array.shape, strict=True))
        index = tuple(slice(None) if axis not in place else 0 if n == 1 else place[axis] for axis, n in sizes.items())
        key = (path, piece.array, trajectory, frame)
        if self._last[0] != key:
            values = array.read(index)
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                raise ValueError(
                    f"Expected finite numbers, got NaN or infinity in {array.where}, trajectory {trajectory}, "
                    f"frame {frame}."
                )
            self._last = (key, values)
        values = self._last[1]
        axes = [axis for axis in piece.axes if axis not in place]
        values = values.transpose([axes.index(axis) for axis in "cdxyz" if axis in axes])
        if "c" not in axes:
            values = values[None]
        elif piece.channel:
            values = values[piece.channel][None]
        return np.broadcast_to(
            values.reshape(len(values), *(sizes.get(axis, 1) for axis in "xyz")), (len(values), *grid.shape)
        )


def check_axes(file: H5File, piece: Piece, sizes: Mapping[str, int], may_be_one: str = "btxyz") -> None:
    """Check an array against what its axes must measure.

    Args:
        file: where it is.
        piece: the array and its axes.
        sizes: length of each axis by its letter; letters that are not there may measure anything.
        may_be_one: axes along which an array that does not vary may have length 1.

    Raises:
        ValueError: another number of axes, or other lengths.
    """
    array = file.array(piece.array)
    assert array.shape is not None
    fits = len(array.shape) == len(piece.axes) and all(
        n == sizes.get(axis, n) or (n == 1 and axis in may_be_one)
        for axis, n in zip(piece.axes, array.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(f"{axis} = {sizes.get(axis, 'any')}" for axis in piece.axes)
        raise ValueError(f"Expected {array.where} with axes ({wanted}), got shape {array.shape}.")


def gather(
    format: str,
    family: str,
    parts: Sequence[Part],
    parameter_units: Mapping[str, str] | None = None,
    about: Mapping[str, Any] | None = None,
) -> list[Source]:
    """One source for all parts that have grid, times, fields and names of parameters in common.

    Args:
        format: name of the layout.
        family: the kind of flow.
        parts: trajectories by file, in the order in which the store shall hold them.
        parameter_units: name → unit of a parameter.
        about: what was taken for granted, for the provenance.
    """
    groups: dict[Any, list[Part]] = {}
    for part in parts:
        groups.setdefault(part.key, []).append(part)
    return [_source(format, family, group, parameter_units or {}, about or {}) for group in groups.values()]


def _source(
    format: str, family: str, parts: Sequence[Part], units: Mapping[str, str], about: Mapping[str, Any]
) -> Source:
    first, files = parts[0], OpenFiles()
    places = [(part, index) for part in parts for index in part.indices]

    def read(name: str, trajectory: int, frame: int) -> np.ndarray:
        part, index = places[trajectory]
        pieces = [files.snapshot(part.path, piece, index, frame, first.grid) for piece in part.pieces[name]]
        shape = first.specs[name].shape(first.grid)
        if len(shape) == 3:
            return pieces[0][0]
        values = np.zeros(shape, dtype=np.result_type(*pieces))
        np.concatenate(pieces, out=values[: sum(len(piece) for piece in pieces)])
        return values

    solid = None
    if first.solid is not None:
        solid = np.stack(
            [files.snapshot(p.path, p.solid, index, 0, first.grid)[0] > 0.5 for p, index in places if p.solid]
        )
    return Source(
        format=format,
        paths=list(dict.fromkeys(part.path for part in parts)),
        family=family,
        grid=first.grid,
        times=first.times,
        num_trajectories=len(places),
        specs=first.specs,
        read=read,
        parameters={name: np.concatenate([part.parameters[name] for part in parts]) for name in first.parameters},
        parameter_units={name: unit for name, unit in units.items() if name in first.parameters},
        solid=solid,
        about={**about, "trajectories": [[str(part.path), len(part.indices)] for part in parts]},
    )
