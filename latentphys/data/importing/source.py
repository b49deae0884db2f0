"""What an importer finds in somebody else's files, before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from latentphys.fields import FieldSpec
from latentphys.grid import Boundaries, Geometry, Grid


@dataclass(frozen=True)
class ImportOptions:
    """What a user says of files that do not say it themselves; None where the files are to be believed.

    Args:
        family: name of the kind of flow in the store.
        lengths: edge lengths of the box [m].
        boundaries: (low, high) pair of each axis.
        axes: what the axes of an array mean, in order, such as ``t x y z c`` (b trajectory, t time, x y z space, c
            component), for files that leave it open.
        shape, dtype: of raw binary files, C order.
        pore: the value that means pore space in voxel images; everything else is solid.
        dataset: the array to read from a file that holds several, where only one is wanted.
        time_step: time between frames [s], for files without times.
        units: name → unit of a field, for files without units.
        fields: name of each component of an array whose components have none, in order; a name that is given twice or
            three times makes a vector, as in ``velocity velocity pressure``.
    """

    family: str | None = None
    lengths: Sequence[float] | None = None
    boundaries: Boundaries | None = None
    axes: str | None = None
    shape: Sequence[int] | None = None
    dtype: str | None = None
    pore: float | None = None
    dataset: str | None = None
    time_step: float | None = None
    units: Mapping[str, str] = field(default_factory=dict)
    fields: Sequence[str] | None = None


@dataclass(frozen=True)
class Source:
    """Trajectories on one grid with one set of times, described and ready to be read snapshot by snapshot.

    Args:
        format: the layout they were found in, such as ``well``.
        paths: the files.
        family: the kind of flow.
        grid: the box; an axis that the data do not have is periodic and one cell thick.
        times: t [s], strictly increasing.
        num_trajectories: how many.
        specs: the fields by name; velocities in cells are vectors [m/s].
        read: (name, trajectory, frame) → one snapshot of the shape ``specs[name].shape(grid)``.
        parameters, parameter_units: physical parameters as `create_store` takes them.
        solid: voxels (trajectory, nx, ny, nz), or None.
        layout: ``cell_centred`` (vectors at cell centres), or ``face_flux`` where the files hold fluxes themselves.
        about: what the files said and which conventions were taken, for the store's provenance; JSON-ready.
    """

    format: str
    paths: Sequence[Path]
    family: str
    grid: Grid
    times: np.ndarray
    num_trajectories: int
    specs: Mapping[str, FieldSpec]
    read: Callable[[str, int, int], np.ndarray]
    parameters: Mapping[str, np.ndarray] = field(default_factory=dict)
    parameter_units: Mapping[str, str] = field(default_factory=dict)
    solid: np.ndarray | None = None
    layout: str = "cell_centred"
    about: Mapping[str, Any] = field(default_factory=dict)

    def snapshot(self, name: str, trajectory: int, frame: int) -> np.ndarray:
        """What `read` reads, checked.

        Raises:
            ValueError: numbers that are not finite, with field, trajectory and frame.
        """
        values = np.asarray(self.read(name, trajectory, frame))
        if not np.isfinite(values).all():
            files = ", ".join(map(str, self.paths[:2])) + " …" * (len(self.paths) > 2)
            raise ValueError(
                f"Expected finite numbers in {files}, got NaN or infinity in {name!r}, trajectory {trajectory}, frame "
                f"{frame}."
            )
        return values

    def geometry(self, trajectory: int) -> Geometry:
        """The box of one trajectory and its solids."""
        return Geometry(self.grid, None if self.solid is None else torch.from_numpy(np.array(self.solid[trajectory])))


@runtime_checkable
class Reader(Protocol):
    """A module that reads one format."""

    def recognises(self, path: Path) -> bool:
        """Whether this is a file or folder of the format, by content and never by the ending of its name."""

    def sources(self, path: Path, options: ImportOptions) -> list[Source]:
        """What is there, one source for each grid and set of times; nothing large is read yet.

        Raises:
            ValueError: a file that is corrupt, truncated or of another shape than it says, in one line with its name.
        """
