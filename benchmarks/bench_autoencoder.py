"""What autoencoders reconstruct of flows never seen, beside classical compression to the same size.

    python benchmarks/bench_autoencoder.py --work runs/bench_autoencoder --json autoencoder.jsonl
    python benchmarks/bench_autoencoder.py --size large --device cuda --bf16 --work runs/large --json large.jsonl

Both main families are simulated and one model is trained on both, as `latentphys train autoencoder` does; the last
trajectories are held out. What is already in ``--work`` is not simulated or trained again.

    helmholtz                   the default: orthogonal projection after the decoder
    conservative                the same with conservative latents
    riesz, potential            other solenoidal heads (--models)
    unconstrained               the same network, steps and seed without any constraint; closed faces at zero
    unconstrained_projected     the same weights with `exact.conserve` after the fact
    spectral, pod, pca,         `compressors`, fitted per family, with as many numbers of 32 bits per snapshot as the
    wavelet, zfp                latent has; …_projected: with `exact.conserve` afterwards
    …_8bit                      latents, modes and coefficients rounded to 8 bits, and zfp, which stores what it
                                keeps in as few bits as it can, in a quarter of the room

One line per family and model: errors as `reconstructions.Errors` defines them, of the FP64 decode; numbers stored per
snapshot, and the compression of the 3 numbers per cell; shortest times to encode and decode one snapshot, for models
also in FP32, the decode of training; the most memory that both took. `mse_unit` is what is published as mean square
error of fields of unit variance: 2.48e-6 (open channel) and 1.76e-6 (porous), at 48 times fewer numbers and 128³ cells.

`cost` lines: time and memory of one sample at growing sizes, beside what `latentphys info` predicts: activations,
gradients and temporary memory of a step with one sample. 128³ cells need --memory.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from compressors import BITS, Compressor, PatchPca, Pod, Spectral, Wavelet, Zfp
from flows import simulate
from machine import Results, parser, peak_memory, timed
from reconstructions import Errors, Scale
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from latentphys import exact
from latentphys.autoencoders import Autoencoder
from latentphys.configuration import compose
from latentphys.data import Store, split
from latentphys.demo import FAMILIES, HELD_OUT
from latentphys.demo import SIZES as DEMO
from latentphys.fields import VELOCITY
from latentphys.grid import Geometry, Grid
from latentphys.info_experiment import describe_experiment
from latentphys.training import load_autoencoder, train_autoencoder
from latentphys.training.models import build, unit_scale

MODELS = {
    "helmholtz": [],
    "conservative": ["autoencoder/latent=conservative"],
    "riesz": ["autoencoder/head=riesz"],
    "potential": ["autoencoder/head=potential"],
    "unconstrained": ["autoencoder.heads.solenoidal._target_=unconstrained.UnconstrainedHead"],
}
PUBLISHED = {"open_channel": 2.48e-6, "porous": 1.76e-6}
COLUMNS = {
    "vrmse": "VRMSE",
    "mse_unit": "MSE",
    "spectrum_low": "low",
    "spectrum_mid": "mid",
    "spectrum_high": "high",
    "net_flux_relative": "net flux",
    "solid_flux_max": "solid [m³/s]",
    "wall_slip": "wall slip",
    "numbers_stored": "numbers",
    "compression": "compression",
    "encode_ms": "encode [ms]",
    "decode_ms": "decode [ms]",
    "peak_mib": "peak [MiB]",
    "parameters": "parameters",
}


@dataclass(frozen=True)
class Size:
    """How much of everything.

    Args:
        simulate: family → what follows ``latentphys simulate``.
        autoencoder: what follows ``latentphys train autoencoder``.
        steps: of training.
        frames: snapshots measured of each held-out trajectory.
        fitted: training snapshots that `Pod` and `PatchPca` may see, as memory allows.
        costs: (preset, cells per axis) whose cost is measured.
    """

    simulate: dict[str, list[str]]
    autoencoder: list[str]
    steps: int
    frames: int
    fitted: int
    costs: tuple[tuple[str, int], ...]


SIZES = {
    "tiny": Size(DEMO["tiny"].simulate, ["trainer.batch_size=2"], 4, 1, 64, (("tiny", 16),)),
    "small": Size(DEMO["demo"].simulate, [], 400, 6, 512, (("tiny", 64), ("base", 64))),
    "large": Size(
        {family: ["size=base", "trajectories=24", "frames=24"] for family in FAMILIES},
        ["autoencoder=base", "trainer.test_every=1000", "trainer.checkpoint_every=1000"],
        20_000,
        6,
        256,
        (("tiny", 64), ("base", 64)),
    ),
}
FINER = 4
"""How many numbers of 8 bits take the room of one of 32."""
MEMORY_COSTS = (("tiny", 128), ("base", 128))


class Method(Protocol):
    """Something that compresses fluxes [m³/s] and gives them back in FP64, on the CPU."""

    parameters: int

    def encode(self, flux: Tensor, geometry: Geometry) -> Any: ...

    def decode(self, code: Any, geometry: Geometry) -> Tensor: ...

    def numbers(self, code: Any) -> float:
        """Numbers of 32 bits in a code."""
        ...


class Learned:
    """A trained autoencoder."""

    def __init__(self, model: Autoencoder, family: str, device: str) -> None:
        self.model, self.family, self.device = model.to(device), family, device
        self.parameters = sum(p.numel() for p in model.parameters())

    @torch.no_grad()
    def encode(self, flux: Tensor, geometry: Geometry) -> Tensor:
        return self.model.encode(flux[None].to(self.device), geometry, self.family)

    @torch.no_grad()
    def decode(self, code: Tensor, geometry: Geometry, exact: bool = True) -> Tensor:
        return self.model.decode(code, geometry, self.family, exact=exact)[0].cpu()

    def numbers(self, code: Tensor) -> float:
        return code.numel()


class Rounded:
    """A trained autoencoder whose latents are stored as whole numbers of 8 bits, in units of a step per snapshot."""

    LEVELS = 127

    def __init__(self, learned: Learned) -> None:
        self.learned, self.parameters = learned, learned.parameters

    def encode(self, flux: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
        latent = self.learned.encode(flux, geometry)
        step = latent.abs().amax() / self.LEVELS
        return (latent / step).round().to(torch.int8), step

    def decode(self, code: tuple[Tensor, Tensor], geometry: Geometry) -> Tensor:
        units, step = code
        return self.learned.decode(units * step, geometry)

    def numbers(self, code: tuple[Tensor, Tensor]) -> float:
        return code[0].numel() / FINER + 1


class Classical:
    """A compressor of fluctuations; what it makes of closed faces is masked."""

    def __init__(self, compressor: Compressor, scale: Scale) -> None:
        self.compressor, self.scale, self.parameters = compressor, scale, compressor.num_parameters

    def encode(self, flux: Tensor, geometry: Geometry) -> Any:
        return self.compressor.encode(fluctuations(flux, geometry, self.scale))

    def decode(self, code: Any, geometry: Geometry) -> Tensor:
        u = torch.from_numpy(np.ascontiguousarray(self.compressor.decode(code)))
        return geometry.mask(self.scale.denormalise(u, geometry.grid))

    def numbers(self, code: Any) -> float:
        return code.num_numbers


class Projected:
    """Another method with exact conservation after the fact."""

    def __init__(self, method: Method) -> None:
        self.method, self.parameters = method, method.parameters
        self.encode, self.numbers = method.encode, method.numbers

    def decode(self, code: Any, geometry: Geometry) -> Tensor:
        return exact.conserve(flux=self.method.decode(code, geometry), geometry=geometry)


def fluctuations(flux: Tensor, geometry: Geometry, scale: Scale) -> np.ndarray:
    """What compressors see of a flux: velocities in units of the family's scale, 0 on closed faces."""
    return geometry.mask(scale.normalise(flux.double(), geometry.grid)).numpy()


def snapshots(store: Store, trajectories: list[int], most: int) -> Iterator[tuple[Tensor, Geometry]]:
    """Fluxes of some trajectories in FP64, as many of each, evenly spaced and the last among them."""
    per_trajectory = min(store.num_times, max(1, most // len(trajectories)))
    times = np.linspace(store.num_times - 1, 0, per_trajectory).round().astype(int)[::-1]
    for i in trajectories:
        geometry = store.geometry(i)
        for time in times.tolist():
            yield store.read("velocity", i, time).double(), geometry


def methods(
    models: dict[str, Autoencoder], store: Store, scale: Scale, size: Size, device: str
) -> Iterator[tuple[str, Method]]:
    """Every method of one family, one after another: bases of whole snapshots are large."""
    for name, model in models.items():
        learned = Learned(model, store.family, device)
        yield name, learned
        if name == "unconstrained":
            yield "unconstrained_projected", Projected(learned)
        else:
            yield f"{name}_8bit", Rounded(learned)
    model = next(iter(models.values()))
    patch, channels = model.compression, model.latent_channels
    numbers = channels * math.prod(n // patch for n in store.grid.shape)
    train = split(len(store), HELD_OUT)[0]

    def fitted() -> np.ndarray:
        rows = snapshots(store, train, size.fitted)
        return np.stack([fluctuations(flux, geometry, scale).astype(np.float32) for flux, geometry in rows])

    for name, make in (
        ("spectral", lambda: Spectral(store.grid, numbers)),
        ("pod", lambda: Pod(fitted(), numbers)),
        ("pca", lambda: PatchPca(fitted(), channels, patch)),
        ("wavelet", lambda: Wavelet(numbers)),
        ("zfp", lambda: Zfp(numbers)),
        ("spectral_8bit", lambda: Spectral(store.grid, numbers // FINER, BITS // FINER)),
        ("wavelet_8bit", lambda: Wavelet(numbers // FINER, bits=BITS // FINER)),
        ("zfp_8bit", lambda: Zfp(numbers // FINER)),
    ):
        classical = Classical(make(), scale)
        yield name, classical
        yield f"{name}_projected", Projected(classical)


def measure(method: Method, store: Store, scale: Scale, size: Size, device: str) -> dict[str, float]:
    """All figures of one method on the held-out trajectories of one family."""
    errors, stored = Errors(scale), 0.0
    test = split(len(store), HELD_OUT)[1]
    held_out = list(snapshots(store, test, size.frames * len(test)))
    for flux, geometry in held_out:
        code = method.encode(flux, geometry)
        errors.update(method.decode(code, geometry), flux, geometry)
        stored += method.numbers(code) / len(held_out)
    flux, geometry = held_out[0]
    code, encode_s = timed(lambda: method.encode(flux, geometry), device)
    figures = errors.figures() | {
        "numbers_stored": stored,
        "compression": flux.numel() / stored,
        "encode_ms": 1e3 * encode_s,
        "decode_ms": 1e3 * timed(lambda: method.decode(code, geometry), device)[1],
        "peak_mib": peak_memory(lambda: method.decode(method.encode(flux, geometry), geometry), device),
        "parameters": method.parameters,
    }
    if isinstance(method, Learned):
        figures["decode_fp32_ms"] = 1e3 * timed(lambda: method.decode(code, geometry, exact=False), device)[1]
    return figures


def cost(preset: str, cells: int, device: str) -> dict[str, Any]:
    """Time and memory of one sample, forward alone and with the backward pass, of random weights in an empty box."""
    grid = Grid((cells,) * 3, (1 / cells,) * 3)
    config = compose("train", [f"autoencoder={preset}", "stores=[]", "run=unused"])
    model: Autoencoder = build(config["autoencoder"], scales={"box": unit_scale(grid, {"velocity": VELOCITY})})
    model.to(device)
    flux, geometry = torch.randn(1, 3, *grid.shape).to(device), Geometry(grid)

    @torch.no_grad()
    def forward() -> None:
        model.eval()(flux, geometry, "box")

    def backward() -> None:
        model.zero_grad(set_to_none=True)
        model.train()(flux, geometry, "box").fields.square().mean().backward()

    needs = describe_experiment(
        "autoencoder", [f"autoencoder={preset}", f"shape={[cells] * 3}", "trainer.batch_size=1"]
    )
    memory = needs["memory of a process at its fullest"]
    predicted = sum(memory[name] for name in ("activations", "gradients", "temporary"))
    figures = {"forward_mib": peak_memory(forward, device), "forward_s": timed(forward, device, 1)[1]}
    measured = peak_memory(backward, device)
    model.zero_grad(set_to_none=True)
    return figures | {
        "backward_mib": measured,
        "predicted_mib": predicted / 2**20,
        "measured_over_predicted": measured * 2**20 / predicted,
        "backward_s": timed(backward, device, 1)[1],
    }


def prepare(options: argparse.Namespace, size: Size, work: Path) -> tuple[dict[str, Store], dict[str, Autoencoder]]:
    """Simulate and train what is not there yet."""
    stores = simulate(work, {family: size.simulate[family] for family in options.families}, options.device)
    models = {}
    paths = ",".join(str(store.path) for store in stores.values())
    for name in options.models:
        run = work / f"{name}-{size.steps}-{'-'.join(stores)}{'-bf16' * options.bf16}"
        overrides = [*MODELS[name], f"stores=[{paths}]", f"run={run}", f"held_out={HELD_OUT}"]
        overrides += [f"trainer.num_steps={size.steps}", f"trainer.mixed_precision={'bf16' if options.bf16 else 'no'}"]
        train_autoencoder(compose("train", ["trainer=autoencoder", *size.autoencoder, *overrides]))
        models[name] = load_autoencoder(run)
    return stores, models


def table(family: str, rows: dict[str, dict[str, float]]) -> Table:
    """All figures of one family, for people."""
    result = Table(*["", *map(escape, COLUMNS.values())], title=family)
    result.caption = escape("low, mid, high: spectrum error [decades]")
    for name, figures in rows.items():
        result.add_row(name, *(f"{figures[key]:.4g}" if key in figures else "" for key in COLUMNS))
    return result


def run(options: argparse.Namespace) -> None:
    if options.device == "cpu":  # before anything asks what there is
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    size = SIZES[options.size]
    if options.steps is not None:
        size = replace(size, steps=options.steps)
    results = Results("autoencoder", options)
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        tables = reconstruct(options, size, work, results)
    for preset, cells in size.costs + (MEMORY_COSTS if options.memory else ()):
        results.add(f"cost_{preset}_{cells}", cost(preset, cells, options.device), {"model": preset, "cells": cells})
    if not results.json_only:
        for one in tables:
            Console(width=200).print(one)


def reconstruct(options: argparse.Namespace, size: Size, work: Path, results: Results) -> list[Table]:
    """One result per family and method, and one table per family."""
    with redirect_stdout(sys.stderr):
        stores, models = prepare(options, size, work)
    about = {"size": options.size, "steps": size.steps, "precision": "bf16" if options.bf16 else "fp32"}
    tables = []
    for family, store in stores.items():
        scale, rows = next(iter(models.values())).scales[family], {}
        published = {"published_mse": PUBLISHED[family]} if options.size == "large" else {}
        for name, method in methods(models, store, scale, size, options.device):
            rows[name] = measure(method, store, scale, size, options.device)
            settings = {"family": family, "model": name, "cells": list(store.grid.shape), **about, **published}
            results.add(f"{family}_{name}", rows[name], settings)
        tables.append(table(family, rows))
    return tables


def main() -> None:
    options = parser(str(__doc__).partition("\n")[0])
    options.add_argument("--size", choices=SIZES, default="small", help="(default %(default)s)")
    options.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    options.add_argument("--models", nargs="+", choices=MODELS, default=["helmholtz", "conservative", "unconstrained"])
    options.add_argument("--steps", type=int, help="of training (default: the size's)")
    options.add_argument("--bf16", action="store_true", help="train under bfloat16 autocast")
    options.add_argument("--memory", action="store_true", help="cost lines at 128³ cells too")
    options.add_argument("--work", type=Path, metavar="DIR", help="data and runs (default: temporary)")
    run(options.parse_args())


if __name__ == "__main__":
    main()
