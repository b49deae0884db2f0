"""Files as other projects publish them, written by hand to their layouts and small."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

h5py = pytest.importorskip("h5py")

LENGTHS = (1.0, 2.0, 0.5)


def written(path: Path) -> Any:
    """A new file, open for writing; one of that name that somebody still has open stays as it is, without a name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    return h5py.File(path, "w")


def points(number: int, length: float = 1.0) -> np.ndarray:
    """Centres of cells."""
    return (np.arange(number) + 0.5) * (length / number)


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    """Normal random numbers in single precision."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def well(
    path: Path,
    shape: Sequence[int] = (6, 4, 5),
    count: int = 2,
    times: Any = (0.0, 0.5, 1.0),
    kinds: Sequence[Any] = ("periodic", "WALL", "Open"),
    fields: Mapping[str, np.ndarray] | None = None,
    lengths: Sequence[float] = LENGTHS,
    seed: int = 0,
) -> Path:
    """A file of The Well: a velocity, a pressure, fields that do not vary everywhere, a tensor and scalars.

    `kinds`: a bc_type for both ends of an axis, a pair for each of them, or None for an axis without a mask.
    """
    axes, d = "xyz"[: len(shape)], len(shape)
    times = np.asarray(times, dtype=np.float32)
    num_frames = times.shape[-1]
    stress = numbers(count, num_frames, *shape, d, d, seed=seed + 3)
    given = {
        "velocity": numbers(count, num_frames, *shape, d, seed=seed + 1),
        "pressure": numbers(count, num_frames, *shape, seed=seed + 2),
        "stress": stress + np.swapaxes(stress, -1, -2),
        **(fields or {}),
    }
    with written(path) as file:
        file.attrs.update({"dataset_name": "stirred tank", "grid_type": "cartesian"})
        file.attrs.update({"n_spatial_dims": d, "n_trajectories": count, "viscosity": 0.25})
        file.attrs["simulation_parameters"] = ["viscosity"]
        dimensions = file.create_group("dimensions")
        dimensions.attrs["spatial_dims"] = list(axes)
        _varying(dimensions.create_dataset("time", data=times), sample=times.ndim == 2)
        for axis, n, length in zip(axes, shape, lengths, strict=False):
            _varying(dimensions.create_dataset(axis, data=points(n, length).astype(np.float32)), time=False)
        boundaries = file.create_group("boundary_conditions")
        for axis, n, kind in zip(axes, shape, kinds, strict=False):
            sides = kind if isinstance(kind, tuple) else (kind, kind)
            for place, one in enumerate(dict.fromkeys(sides)):
                if one is None:
                    continue
                group = boundaries.create_group(f"{axis}_{one}_{place}")
                group.attrs.update({"associated_dims": [axis], "bc_type": one})
                group.attrs.update({"sample_varying": False, "time_varying": False})
                group.attrs["associated_fields"] = []
                mask = np.zeros(n, dtype=bool)
                mask[[0, -1]] = [one == side for side in sides]
                group.create_dataset("mask", data=mask)
        scalars = file.create_group("scalars")
        scalars.attrs["field_names"] = ["viscosity", "stirring", "heating"]
        _varying(scalars.create_dataset("viscosity", data=np.float32(0.25)), time=False)
        _varying(scalars.create_dataset("stirring", data=np.arange(count, dtype=np.float32)), sample=True, time=False)
        _varying(scalars.create_dataset("heating", data=np.arange(num_frames, dtype=np.float32)), time=True)
        groups = [file.create_group(f"t{order}_fields") for order in range(3)]
        groups[0].attrs["field_names"] = ["pressure", "lid", "profile"]
        groups[1].attrs["field_names"] = ["velocity"]
        groups[2].attrs["field_names"] = ["stress"]
        all_axes = [True] * d
        for name, group in (("pressure", groups[0]), ("velocity", groups[1]), ("stress", groups[2])):
            _varying(group.create_dataset(name, data=given[name]), sample=True, time=True, dims=all_axes)
        groups[2]["stress"].attrs.update({"symmetric": True, "antisymmetric": False})
        # one that varies along the last axis only, which leaves the others out, and one that keeps them at length 1
        last = [False] * (d - 1) + [True]
        _varying(groups[0].create_dataset("lid", data=numbers(shape[-1], seed=9)), dims=last, time=False)
        profile = numbers(count, num_frames, shape[0], *(1,) * (d - 1), seed=10)
        _varying(
            groups[0].create_dataset("profile", data=profile), sample=True, time=True, dims=[True] + [False] * (d - 1)
        )
    return path


def _varying(dataset: Any, sample: bool = False, time: bool | None = None, dims: Sequence[bool] | None = None) -> None:
    dataset.attrs["sample_varying"] = sample
    if time is not None:
        dataset.attrs["time_varying"] = time
    if dims is not None:
        dataset.attrs["dim_varying"] = np.array(dims, dtype=bool)


def pdebench_flow(path: Path, shape: Sequence[int] = (6, 4), count: int = 2, num_frames: int = 3) -> Path:
    """Compressible flow: one array per component, and one time more than frames."""
    with written(path) as file:
        file.attrs.update({"eta": 0.01, "zeta": 0.01, "M": 0.1})
        for i, name in enumerate(["density", "pressure", "Vx", "Vy", "Vz"][: 2 + len(shape)]):
            file[name] = numbers(count, num_frames, *shape, seed=i)
        for axis, n in zip("xyz", shape, strict=False):
            file[f"{axis}-coordinate"] = points(n).astype(np.float32)
        file["t-coordinate"] = np.linspace(0, 1, num_frames + 1, dtype=np.float32)
    return path


def pdebench_scalar(path: Path, n: int = 8, count: int = 2, num_frames: int = 3) -> Path:
    """A scalar equation in 1D."""
    with written(path) as file:
        file["tensor"] = numbers(count, num_frames, n)
        file["x-coordinate"], file["t-coordinate"] = points(n), np.linspace(0, 1, num_frames + 1)
    return path


def pdebench_darcy(path: Path, n: int = 6, count: int = 3) -> Path:
    """Steady flow through a permeability."""
    with written(path) as file:
        file.attrs["beta"] = 1.0
        file["tensor"], file["nu"] = numbers(count, 1, n, n), numbers(count, n, n, seed=1)
        file["x-coordinate"] = file["y-coordinate"] = points(n)
    return path


def pdebench_groups(path: Path, shape: Sequence[int] = (6, 4), count: int = 3, channels: int = 1) -> Path:
    """A group per trajectory with its own grid, times and configuration."""
    with written(path) as file:
        for i in range(count):
            group = file.create_group(f"{i:04d}")
            group["data"] = numbers(3, *shape, channels, seed=i)
            for axis, n in zip("xy", shape, strict=False):
                group[f"grid/{axis}"] = points(n, 5.0) - 2.5
            group["grid/t"] = np.linspace(0, 1, 3)
            sim = {"seed": i, "gravity": 1.0, "dam_radius": 0.3 + 0.1 * i, "xdim": shape[0]}
            group.attrs["config"] = yaml.safe_dump({"name": "2d_rdb", "sim": sim})
    return path


def pdebench_incompressible(path: Path, shape: Sequence[int] = (6, 4), count: int = 2, num_frames: int = 3) -> Path:
    """Incompressible flow with the force that drives it and particles that show it."""
    with written(path) as file:
        file["velocity"] = numbers(count, num_frames, *shape, 2)
        file["particles"] = numbers(count, num_frames, *shape, 1, seed=1)
        file["force"] = numbers(count, *shape, 2, seed=2)
        file["t"] = np.tile(np.linspace(0, 1, num_frames), (count, 1))
    return path


def dpot(path: Path, shape: Sequence[int] = (6, 4, 3, 2), seed: int = 0) -> Path:
    """One array, (x y t c) or with samples before."""
    with written(path) as file:
        file["data"] = numbers(*shape, seed=seed)
    return path
