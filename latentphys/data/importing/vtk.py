"""VTK image data: legacy .vtk, .vti and VTKHDF files, one by one, in numbered series or as .pvd collections.

VTK counts x fastest; here arrays are (nx, ny, nz). Values in cells are preferred. Where a file has values at points
only, each point counts as the centre of a cell, so that a box of n points is n spacings long. Arrays of three
components are vectors, those called velocity, vel or u the velocity [m/s]; of one component, scalars; all others are
left out. Zeros and ones called ``solid`` are the solid voxels. Boundaries and units are not in these files: the user
says them, or the box is periodic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from einops import rearrange

from latentphys.data.importing import vtkhdf, vtklegacy, vtkxml
from latentphys.data.importing.boxes import box, field_name, frames, spec
from latentphys.data.importing.damaged import readable
from latentphys.data.importing.numbered import series_name, visible_files
from latentphys.data.importing.source import ImportOptions, Source
from latentphys.data.importing.vtkimage import RESAMPLE, Arrays, Centring, Image
from latentphys.fields import FieldSpec
from latentphys.grid import Boundary

KIND = "VTK image data"
VELOCITIES = ("velocity", "vel", "u")
PERIODIC: tuple[Boundary, Boundary] = ("periodic", "periodic")
ALIKE = 1e-6
"""How far, in spacings, the boxes of a series may differ."""


def recognises(path: Path) -> bool:
    """Whether this is a VTK file of any kind, or a folder with some; what is no image data is refused later."""
    if path.is_dir():
        return any(_kind(file) for file in visible_files(path))
    return _kind(path) is not None


def _kind(path: Path) -> str | None:
    try:
        with path.open("rb") as stream:
            head = stream.read(len(vtklegacy.MAGIC))
        if head == vtklegacy.MAGIC:
            return "legacy"
        return vtkxml.kind(path) or ("vtkhdf" if vtkhdf.recognises(path) else None)
    except OSError:
        return None


def sources(path: Path, options: ImportOptions) -> list[Source]:
    """A file, a numbered series in a folder or a collection, as one trajectory.

    Args:
        path: the file or folder.
        options: `lengths`, `boundaries`, `units`, `family`; `time_step` [s] of series without times; `dataset` takes
            one array only.

    Raises:
        ValueError: other data than images, images that differ within a series, times that are missing, or files that
            are damaged.
    """
    images, left_out = _images(path, options)
    first = images[0]
    for image in images[1:]:
        _check_alike(first, image)
    reader = _Reader(images)
    arrays = reader.arrays(0)
    centring: Centring = "cells" if any(where == "cells" for where, _ in arrays) else "points"
    specs, raw, solid_name = _specs(arrays, centring, options, path)
    about = {
        "centring": centring,
        "names": {new: old for new, old in raw.items() if new != old},
        "left_out": sorted({name for _, name in arrays} - {*raw.values(), solid_name}),
        "files_left_out": [file.name for file in left_out],
        "origin": list(first.origin),
        "boundaries": "given" if options.boundaries is not None else "taken to be periodic",
    }
    if centring == "points":
        about["points"] = "values at points are taken for values in cells around them"
    grid = box(first.shape(centring), first.spacing, [PERIODIC] * 3, options, str(path))
    solid = None
    if solid_name is not None:
        voxels = reader.array(0, centring, solid_name)[0]
        if not np.isin(voxels, (0, 1)).all():
            raise ValueError(f"Expected zeros and ones in 'solid' of {first.path}, got other values; rename the array.")
        solid = voxels.astype(bool)[None] if voxels.any() else None

    def read(name: str, trajectory: int, frame: int) -> np.ndarray:
        values = reader.array(frame, centring, raw[name])
        return values[0] if specs[name].kind == "scalar" else values

    return [
        Source(
            format="vtk",
            paths=list(dict.fromkeys(image.path for image in images)),
            family=options.family or field_name(series_name(path) or "vtk"),
            grid=grid,
            times=_image_times(images, options, path),
            num_trajectories=1,
            specs=specs,
            read=read,
            solid=solid,
            about=about,
        )
    ]


def _images(path: Path, options: ImportOptions) -> tuple[list[Image], list[Path]]:
    """The images of a path in order, and the files of its folder that are none."""
    if not path.is_dir():
        return _read(path), []
    files = {file: _kind(file) for file in visible_files(path)}
    found = [file for file, kind in files.items() if kind]
    collections = [file for file in found if files[file] == "Collection"]
    if len(collections) == 1:
        images = _read(collections[0])
        used = {image.path for image in images} | set(collections)
        return images, [file for file in files if file not in used]
    if not found:
        raise ValueError(f"Expected VTK files in {path}, got none.")
    names = sorted({series_name(file) for file in found})
    if len(names) > 1 or collections:
        raise ValueError(f"Expected the files of one series in {path}, got {names[:8]}; import them one by one.")
    return [image for file in found for image in _read(file)], [file for file in files if not files[file]]


def _read(path: Path) -> list[Image]:
    if not path.exists():
        raise ValueError(f"Expected a file or folder at {path}, got nothing there.")
    kind = _kind(path)
    with readable(path, KIND):
        if kind == "legacy":
            return [vtklegacy.read(path)]
        if kind == "vtkhdf":
            return vtkhdf.read(path)
        if kind == "Collection":
            return [replace(image, time=t) for t, file in vtkxml.collection(path) for image in _read(file)]
        if kind is not None:
            return [vtkxml.read(path)]
    raise ValueError(f"Expected VTK image data (legacy, .vti or VTKHDF) in {path}, got something else; {RESAMPLE}.")


def _check_alike(first: Image, image: Image) -> None:
    offset = max(
        max(abs(a - b) / abs(h or 1.0), abs(h - g) / abs(h or 1.0) * n)
        for a, b, h, g, n in zip(first.origin, image.origin, first.spacing, image.spacing, first.points, strict=True)
    )
    if image.points != first.points or offset > ALIKE * max(first.points):
        raise ValueError(
            f"Expected one box for all times, {first.points} points from {first.origin} with spacing {first.spacing} "
            f"as in {first.path.name}, got {image.points} from {image.origin} with {image.spacing} in {image.path}."
        )


def _specs(
    arrays: Arrays, centring: Centring, options: ImportOptions, path: Path
) -> tuple[dict[str, FieldSpec], dict[str, str], str | None]:
    """The fields, their names in the file, and the name of the solid."""
    usable = {name: values for (where, name), values in arrays.items() if where == centring}
    usable = {n: v for n, v in usable.items() if v.components in (1, 3) and not n.startswith("vtk")}
    if options.dataset is not None:
        if options.dataset not in usable:
            raise ValueError(f"Expected one of the arrays {sorted(usable)} of {path}, got {options.dataset!r}.")
        usable = {name: values for name, values in usable.items() if name in (options.dataset, "solid")}
    solid = "solid" if "solid" in usable and usable["solid"].components == 1 else None
    specs: dict[str, FieldSpec] = {}
    raw: dict[str, str] = {}
    for name, values in usable.items():
        if name == solid:
            continue
        is_vector = values.components == 3
        found = spec("velocity" if is_vector and name.lower() in VELOCITIES else name, is_vector, options)
        unit = options.units.get(name) or (None if found.name in options.units else values.unit)
        found = replace(found, unit=unit or found.unit)
        if found.name in specs:
            raise ValueError(f"Expected arrays of different names in {path}, got {name!r} and {raw[found.name]!r}.")
        specs[found.name], raw[found.name] = found, name
    if not specs:
        got = sorted(name for _, name in arrays)
        raise ValueError(f"Expected arrays of one or three components at points or in cells of {path}, got {got}.")
    return specs, raw, solid


def _image_times(images: Sequence[Image], options: ImportOptions, path: Path) -> np.ndarray:
    """Times t [s]: those of the files, or a `time_step` apart."""
    named = [image.time for image in images if image.time is not None]
    if options.time_step is not None and len(named) < len(images):
        return frames(options.time_step * np.arange(len(images)), str(path))
    if len(images) == 1:
        return np.array(named or [0.0])
    if len(named) < len(images):
        raise ValueError(
            f"Expected the times of {len(images)} files in {path}, got {len(named)} TimeValues; pass the time step [s]."
        )
    return frames(np.array(named), str(path))


class _Reader:
    """Reads arrays of a series; keeps the file read last, since its fields are asked for one after another."""

    def __init__(self, images: Sequence[Image]) -> None:
        self._images = images
        self._last: tuple[int, Arrays] = (-1, {})

    def arrays(self, frame: int) -> Arrays:
        """The arrays of one frame."""
        if self._last[0] != frame:
            with readable(self._images[frame].path, KIND):
                self._last = (frame, self._images[frame].arrays())
        return self._last[1]

    def array(self, frame: int, centring: Centring, name: str) -> np.ndarray:
        """One array of one frame, (component, nx, ny, nz)."""
        image = self._images[frame]
        found = self.arrays(frame).get((centring, name))
        if found is None:
            raise ValueError(f"Expected the array {name!r} in {centring} of {image.path}, got none.")
        with readable(image.path, f"{KIND} with {name!r}"):
            values = found.read()
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise ValueError(f"Expected finite numbers in {name!r} of {image.path}, got NaN or infinity.")
        nx, ny, nz = image.shape(centring)
        return np.ascontiguousarray(rearrange(values, "(z y x) c -> c x y z", z=nz, y=ny, x=nx))
