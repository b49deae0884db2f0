"""Reading random snapshots against a memory map, HDF5 and the_well; statistics of a store larger than memory.

    python benchmarks/bench_data.py --json data.jsonl
    python benchmarks/bench_data.py --sizes 64 128 256 --folder /scratch

Per size and type of number one line `read`: mean time of a random snapshot from a store, from a NumPy memory map of the
same numbers and from contiguous HDF5 kept open, with the page cache warm and (`_cold`) emptied of the file before each
snapshot; the same converted to FP32; the same store compressed by LZ4, and read through Zarr. `windows`: random pairs
of snapshots as training reads them, against `the_well` on a file of the same numbers in its own layout, where it is
installed. `statistics`: of a store several times as large as the memory that the process may allocate. `training`: how
long a step of a tiny dynamics model on cached latents waits for its batch.

Ratios are of times taken in turns in one run; of each snapshot the shortest of some rounds counts.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from machine import Results, parser, timed
from zarr.codecs import BloscCodec

from latentphys import exact
from latentphys.configuration import compose
from latentphys.data import Batches, Store, Windows, create_store, open_store
from latentphys.data.shards import SnapshotReader
from latentphys.fields import VELOCITY, FieldSpec
from latentphys.grid import Geometry, Grid
from latentphys.training.models import build

DTYPES = ("float32", "float64")
MOST_BYTES = 300 * 2**20
"""Of the numbers of one store that is read from, so that the page cache holds all its copies."""

MEASURE = """
import json, re, resource, sys, threading, time
from pathlib import Path
import dask.array, dask.multiprocessing, dask.threaded
from latentphys.data import compute_statistics, open_store

def status(name):
    return int(re.search(name + r":\\s*(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) / 1024

store, cap, workers = open_store(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
before = status("RssAnon")
resource.setrlimit(resource.RLIMIT_DATA, (int(status("VmData") + cap) * 2**20, resource.RLIM_INFINITY))
peak, seconds, done = 0.0, [], threading.Event()

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, status("RssAnon") - before)

for _ in range(2):
    start = time.perf_counter()
    compute_statistics(store, num_workers=workers)
    seconds.append(time.perf_counter() - start)
threading.Thread(target=watch, daemon=True).start()
compute_statistics(store, num_workers=workers)
done.set()
print(json.dumps({"seconds": min(seconds), "peak_mib": peak}))
"""


def turbulence(size: int, number: int) -> np.ndarray:
    """Exactly solenoidal fluxes with a −5/3 spectrum, shifted copies of two, FP64 ``(number, 3, size, size, size)``."""
    geometry = Geometry(Grid((size,) * 3, (1 / size,) * 3))
    k = torch.fft.fftfreq(size, 1 / size, dtype=torch.float64)
    squares = k[:, None, None] ** 2 + k[:, None] ** 2 + torch.fft.rfftfreq(size, 1 / size, dtype=torch.float64) ** 2
    squares[0, 0, 0] = math.inf
    fields = []
    for seed in range(2):
        white = torch.randn(3, size, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        flux = torch.fft.irfftn(torch.fft.rfftn(white, dim=(1, 2, 3)) * squares ** (-11 / 12), dim=(1, 2, 3))
        fields.append(exact.conserve(flux=flux / flux.std() / size**2, geometry=geometry).numpy())
    return np.stack([np.roll(fields[i % 2], i, axis=1 + i % 3) for i in range(number)])


def write_store(path: Path, values: np.ndarray, num_trajectories: int = 1, spec: FieldSpec = VELOCITY) -> Store:
    """A store that holds the same snapshots in each of its trajectories."""
    latent = spec.kind == "vector"
    with create_store(
        path,
        grid=Grid(values.shape[2:], (1 / values.shape[2],) * 3),
        specs={spec.name: spec},
        family="turbulence",
        num_trajectories=num_trajectories,
        times=range(len(values)),
        dtype=str(values.dtype),
        channels=values.shape[1] if latent else None,
    ) as out:
        for trajectory in range(num_trajectories):
            out.write(spec.name, trajectory, slice(None), values)
    return open_store(path)


def in_turns(readers: Mapping[str, Callable[[int], Any]], number: int, rounds: int) -> dict[str, float]:
    """Mean time of each reader over all snapshots, each in the best of some rounds in random order [s]."""
    best, random = {name: np.full(number, math.inf) for name in readers}, np.random.default_rng(0)
    for _ in range(rounds + 1):
        for index in random.permutation(number).tolist():
            # in another order each time: who comes after a large allocation finds pages that are there already
            for name in random.permutation(list(readers)).tolist():
                read = readers[name]
                start = time.perf_counter()
                read(index)
                best[name][index] = min(best[name][index], time.perf_counter() - start)
    return {name: float(times.mean()) for name, times in best.items()}


def cold(files: list[Path], opened: Callable[[], Callable[[int], Any]], number: int) -> float:
    """Mean time to read a snapshot with the files out of the page cache, opening not counted [s]."""
    total, order = 0.0, np.random.default_rng(0).permutation(number)[:8].tolist()
    for index in order:
        gc.collect()  # pages that are mapped stay
        for file in files:
            handle = os.open(file, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)
        read = opened()
        start = time.perf_counter()
        read(index)
        total += time.perf_counter() - start
    return total / len(order)


def files_in(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()]


def read_case(values: np.ndarray, folder: Path, rounds: int) -> dict[str, Any]:
    """Random single snapshots."""
    import h5py

    number, shape, raw = len(values), values.shape[1:], folder / "raw"
    store = write_store(folder / "a.zarr", values)
    values.tofile(raw)
    with h5py.File(folder / "a.h5", "w") as file:
        file["velocity"] = values
    snapshot = (1, 1, *shape)
    shards = store.array("velocity").shards
    assert shards is not None
    lz4 = zarr.create_array(
        folder / "lz4.zarr",
        shape=(1, *values.shape),
        dtype=values.dtype,
        chunks=snapshot,
        shards=shards,
        compressors=BloscCodec(cname="lz4", shuffle="shuffle"),
    )
    for start in range(0, number, shards[1]):
        lz4[0, start : start + shards[1]] = values[start : start + shards[1]]
    memory = np.memmap(raw, values.dtype, "r", shape=values.shape)
    compressed, hdf5 = SnapshotReader(lz4), h5py.File(folder / "a.h5", "r")["velocity"]
    groups: list[dict[str, Callable[[int], Any]]] = [
        {"memmap": lambda i: np.array(memory[i]), "store": lambda i: store.read("velocity", 0, i)},
        {
            "memmap_to_fp32": lambda i: memory[i].astype(np.float32),
            "store_to_fp32": lambda i: store.read("velocity", 0, i, torch.from_numpy(np.empty(shape, np.float32))),
        },
        {
            "hdf5": lambda i: hdf5[i],
            "lz4": lambda i: compressed.read(0, i),
            "zarr": lambda i: store.array("velocity")[0, i],
        },
    ]
    seconds: dict[str, float] = {}
    for readers in groups:  # apart: who reads the numbers that somebody else has just read finds them in the cache
        seconds |= in_turns(readers, number, rounds)
    del memory, compressed, hdf5, groups, readers
    store._readers.clear()

    def open_memmap() -> Callable[[int], Any]:
        mapped = np.memmap(raw, values.dtype, "r", shape=values.shape)
        return lambda i: np.array(mapped[i])

    def open_reader() -> Callable[[int], Any]:
        return partial(SnapshotReader(store.array("velocity")).read, 0)

    cold_memmap, cold_store = cold([raw], open_memmap, number), cold(files_in(store.path), open_reader, number)
    size = values[0].nbytes
    return {
        "snapshot_mb": size / 1e6,
        "loader_over_memmap": seconds["memmap"] / seconds["store"],
        "loader_over_memmap_to_fp32": seconds["memmap_to_fp32"] / seconds["store_to_fp32"],
        "loader_over_memmap_cold": cold_memmap / cold_store,
        "loader_over_hdf5": seconds["hdf5"] / seconds["store"],
        "lz4_over_memmap": seconds["memmap"] / seconds["lz4"],
        "lz4_size": sum(file.stat().st_size for file in files_in(folder / "lz4.zarr")) / values.nbytes,
        "store_gb_per_s": size / seconds["store"] / 1e9,
        **{f"{name}_ms": 1e3 * value for name, value in seconds.items()},
        "memmap_cold_ms": 1e3 * cold_memmap,
        "store_cold_ms": 1e3 * cold_store,
    }


def windows_case(values: np.ndarray, folder: Path, rounds: int) -> dict[str, Any]:
    """Random pairs of FP32 snapshots, the samples of both readers."""
    windows = Windows([open_store(folder / "a.zarr")], "velocity", 2)
    readers: dict[str, Callable[[int], Any]] = {"windows": lambda i: windows.read(0, 0, i)}
    if importlib.util.find_spec("the_well") is not None:
        from the_well.data import WellDataset  # type: ignore[import-not-found]

        write_well(folder / "well", values)
        lean = {"return_grid": False, "boundary_return_type": None}
        for name, options in (("well", {}), ("well_lean", lean)):
            data = WellDataset(path=str(folder / "well"), well_split_name="train", use_normalization=False, **options)
            expected = windows.read(0, 0, 1)[0].movedim(0, -1)
            assert torch.equal(data[1]["input_fields"][0], expected)
            readers[name] = data.__getitem__
    else:
        print("the_well is not installed: not compared", file=sys.stderr)
    seconds = in_turns(readers, len(values) - 1, rounds)
    ratios = {f"loader_over_{name}": seconds[name] / seconds["windows"] for name in readers if name != "windows"}
    return {"window_mb": 2 * values[0].nbytes / 1e6, **ratios, **{f"{k}_ms": 1e3 * v for k, v in seconds.items()}}


def write_well(folder: Path, values: np.ndarray) -> None:
    """The same numbers as a data set of The Well: one file, one trajectory, components last."""
    import h5py

    (folder / "data" / "train").mkdir(parents=True)
    size, number, still = values.shape[-1], len(values), {"sample_varying": False, "time_varying": False}
    with h5py.File(folder / "data" / "train" / "a.hdf5", "w") as file:
        file.attrs.update(
            dataset_name="turbulence",
            grid_type="cartesian",
            n_spatial_dims=3,
            n_trajectories=1,
            simulation_parameters=[],
        )
        axes = file.create_group("dimensions")
        axes.attrs["spatial_dims"] = ["x", "y", "z"]
        axes["time"] = np.arange(number, dtype=np.float32)
        for name in "xyz":
            axes[name] = np.arange(size, dtype=np.float32) / size
        for name in ("time", *"xyz"):
            axes[name].attrs.update(still)
        conditions = file.create_group("boundary_conditions")
        for name in "xyz":
            group = conditions.create_group(name)
            group.attrs.update(still, bc_type="PERIODIC", associated_dims=[name], associated_fields=[])
            group["mask"] = np.isin(np.arange(size), (0, size - 1))
        file.create_group("scalars").attrs["field_names"] = []
        for order in range(3):
            group = file.create_group(f"t{order}_fields")
            group.attrs["field_names"] = ["velocity"] if order == 1 else []
        field = file["t1_fields"].create_dataset("velocity", data=np.moveaxis(values, 1, -1)[None])
        field.attrs.update(dim_varying=[True] * 3, sample_varying=True, time_varying=True)


def statistics_case(folder: Path, size: int, mebibytes: int, cap: int, workers: int) -> dict[str, Any]:
    """Throughput and memory, in a process that may allocate no more than a fraction of the store."""
    import json

    values = turbulence(size, 16)
    store = write_store(folder / "large.zarr", values, max(1, round(mebibytes * 2**20 / values.nbytes)))
    total = values.nbytes * len(store)
    command = [sys.executable, "-c", MEASURE, str(store.path), str(cap), str(workers)]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"Expected statistics within {cap} MiB, got {process.stderr.strip().splitlines()[-1:]}.")
    got = json.loads(process.stdout)
    shutil.rmtree(store.path)
    return {
        "store_mib": total / 2**20,
        "allocation_limit_mib": cap,
        "store_over_limit": total / 2**20 / cap,
        "peak_mib": got["peak_mib"],
        "workers": workers,
        "gb_per_s": total / got["seconds"] / 1e9,
    }


def training_case(folder: Path, rounds: int) -> dict[str, Any]:
    """A batch of two cached windows of latents, 16 channels on 16³, against a step of the tiny dynamics model on it."""
    latents = np.random.default_rng(0).standard_normal((32, 16, 16, 16, 16)).astype(np.float32)
    store = write_store(folder / "latent.zarr", latents, 2, FieldSpec("latent", "vector", "1"))
    batches = Batches(Windows([store], "latent", 2, cache=True), 2, seed=0)
    config = compose("train", ["trainer=dynamics", "stores=[x]", "run=x"])
    torch.manual_seed(0)
    model = build(config["dynamics"], latent_channels=16, condition_channels=3, geometry_channels=16)
    condition, geometry = torch.zeros(2, 3), torch.zeros(2, 16, 16, 16, 16)

    def step() -> None:
        batch = batches[0]
        model(batch.values[:, :1], condition, geometry, (True, True, True)).increment.square().mean().backward()
        model.zero_grad()

    steps = iter(range(1_000_000))
    sample_s = timed(lambda: batches[next(steps)], "cpu", 20 * rounds)[1]
    step_s = timed(step, "cpu", repeats=1)[1]
    return {"batch_ms": 1e3 * sample_s, "step_ms": 1e3 * step_s, "wait_share": sample_s / step_s}


def run(arguments: argparse.Namespace) -> None:
    results = Results("data", arguments)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        for size in arguments.sizes:
            for dtype in DTYPES:
                number = max(8, min(96, MOST_BYTES // (3 * size**3 * np.dtype(dtype).itemsize)))
                values, place = turbulence(size, number).astype(dtype), folder / f"{size}-{dtype}"
                place.mkdir()
                results.add(f"read {size} {dtype}", read_case(values, place, arguments.repeats))
                if dtype == "float32":
                    results.add(f"windows {size} {dtype}", windows_case(values, place, arguments.repeats))
                shutil.rmtree(place)
        for workers in (1, arguments.threads):
            figures = statistics_case(folder, 64, arguments.store_mib, arguments.limit_mib, workers)
            results.add(f"statistics {workers}", figures)
        results.add("training", training_case(folder, arguments.repeats))


def main() -> None:
    options = parser(str(__doc__).partition("\n")[0])
    options.add_argument("--sizes", type=int, nargs="+", default=[64, 128], help="cells per axis (default 64 128)")
    options.add_argument("--folder", type=Path, help="where files of about 2 GB go for a while (default: temporary)")
    options.add_argument("--store-mib", type=int, default=1024, help="size of the store to measure (default 1024)")
    options.add_argument("--limit-mib", type=int, default=192, help="what measuring it may allocate (default 192)")
    options.add_argument("--repeats", type=int, default=8, help="rounds, of which the shortest counts (default 8)")
    run(options.parse_args())


if __name__ == "__main__":
    main()
