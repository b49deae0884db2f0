"""Net flux, time, memory and growth of projection, Helmholtz head and exact conservation, at growing sizes.

    python benchmarks/bench_core.py --json core.jsonl
    python benchmarks/bench_core.py --sizes 32 64 128 256
    python benchmarks/bench_core.py --device cuda --sizes 64 128 256

For every box two lines. `field`: the largest |net flux| of a cell over the largest |flux| after the curl of a random
potential in FP32 and in FP64, after `project` and after `conserve` of a random flux; iterations, times and memory.
`decode`: an autoencoder of size `base` with random weights decodes a random FP32 latent; time of the decoder and of its
head, the share of the head, and net and solid flux of the exact decode [m³/s]. At the end, per box, how iterations and
time grow from the smallest size to the largest.

Only `conserve` and the exact decode are 0.0 bit for bit; the others are what rounding and tolerance leave.
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from typing import Any

import numpy as np
import torch
from counting import count_iterations
from machine import Results, parser, peak_memory, timed
from torch import Tensor

from latentphys import exact, operators, projection
from latentphys.autoencoders import Autoencoder
from latentphys.autoencoders.autoencoder import field_type
from latentphys.autoencoders.place import describe
from latentphys.configuration import compose
from latentphys.families import OpenChannel, Porous
from latentphys.families.media import sphere_pack
from latentphys.fields import VELOCITY
from latentphys.grid import Geometry, Grid
from latentphys.training.models import build, unit_scale

TRAINING_TOLERANCE = 1e-2
DECODED_SIZES = (64, 128)


def boxes(size: int, device: str) -> dict[str, Geometry]:
    """A periodic box, a channel, a duct with inflow and outflow, grains with a solid fraction of 0.2, 0.5 and 0.8."""
    periodic = Porous().grid((size,) * 3)
    duct = Grid((size,) * 3, (1 / size,) * 3, (("inflow", "outflow"), ("no_slip", "no_slip"), ("periodic", "periodic")))
    result = {
        "empty": Geometry(periodic),
        "channel": Geometry(OpenChannel().grid((size,) * 3)),
        "duct": Geometry(duct, inflow={"x-": 1.0}),
    }
    for fraction in (0.2, 0.5, 0.8):
        solid = sphere_pack(periodic, 1 - fraction, 0.2, np.random.default_rng(0), overlap=1.0)
        result[f"grains {fraction}"] = Geometry(periodic, torch.from_numpy(solid).to(device))
    return result


def net(flux: Tensor, geometry: Geometry) -> float:
    """Largest |net flux| of a cell over the largest |flux|, in FP64."""
    flux = flux.double()
    return float(operators.div(flux, geometry.grid).abs().amax() / flux.abs().amax())


def field(geometry: Geometry, device: str, repeats: int) -> dict[str, Any]:
    """What projection and conservation make of a random flux."""
    torch.manual_seed(0)
    random = torch.randn(3, *geometry.grid.shape, dtype=torch.float64).to(device)
    single = random.float()
    project = partial(projection.project, single, geometry)
    conserve = partial(exact.conserve_report, flux=random, geometry=geometry)
    # What a geometry works out about itself is worked out once, and counted apart.
    first_s = timed(conserve, device, repeats=0)[1]
    projected, project_s = timed(project, device, repeats)
    loose, loose_s = timed(partial(project, tol=TRAINING_TOLERANCE), device, repeats)
    report, conserve_s = timed(conserve, device, repeats)
    curled, curl_s = timed(partial(operators.curl, single, geometry.grid), device, repeats)
    iterations = {}
    for name, flux, tol in (("1e-2", single, 1e-2), ("1e-6", single, 1e-6), ("1e-8", random, 1e-8)):
        iterations[f"iterations_{name}"] = projection.decompose(flux, geometry, tol).num_iterations
    with count_iterations(exact) as counted:
        conserve()
    return {
        "net_curl_fp32": net(curled, geometry),
        "net_curl_fp64": net(operators.curl(random, geometry.grid), geometry),
        "net_project_fp32": net(projected, geometry),
        "net_project_fp32_tol1e-2": net(loose, geometry),
        "net_conserve": net(report.flux, geometry),
        "net_conserve_potential": net(exact.conserve(potential=random, geometry=geometry), geometry),
        "solid_flux": closed_flux(report.flux, geometry),
        "correction": report.correction,
        **iterations,
        "iterations_conserve": counted[0],
        "curl_fp32_ms": 1e3 * curl_s,
        "project_fp32_ms": 1e3 * project_s,
        "project_fp32_tol1e-2_ms": 1e3 * loose_s,
        "conserve_ms": 1e3 * conserve_s,
        "conserve_first_ms": 1e3 * first_s,
        "project_fp32_mib": peak_memory(project, device),
        "conserve_mib": peak_memory(conserve, device),
    }


def closed_flux(flux: Tensor, geometry: Geometry) -> float:
    """Largest |flux| through a closed face [m³/s]."""
    closed = flux[..., ~geometry.open_faces.to(flux.device)]
    return float(closed.abs().amax()) if closed.numel() else 0.0


def random_autoencoder(grid: Grid, device: str, preset: str = "base") -> Autoencoder:
    """An autoencoder of a configured size with random weights, the zeros it starts from included."""
    config = compose("train", ["trainer=autoencoder", f"autoencoder={preset}", "stores=[x]", "run=x"])
    scale = unit_scale(grid, {"velocity": VELOCITY})
    torch.manual_seed(0)
    model: Autoencoder = build(config["autoencoder"], scales={"any": scale})
    for weights in model.parameters():
        if not bool(weights.any()):
            torch.nn.init.normal_(weights, std=0.05)
    return model.to(device).eval()


@torch.no_grad()
def decode(geometry: Geometry, device: str, repeats: int) -> dict[str, Any]:
    """What a decode costs, and what it conserves."""
    model = random_autoencoder(geometry.grid, device)
    latent = torch.randn(1, model.latent_channels, *model.latent_shape(geometry.grid)).to(device)
    place, name = describe(geometry, [True], model.compression).to(device), field_type(VELOCITY)
    raw, decoder_s = timed(partial(model.decoder, latent, place, [name]), device, repeats)
    head, scale = model.heads.head(VELOCITY), model.scale("any")["velocity"]
    head_s = timed(partial(head, raw[name], geometry, scale), device, repeats)[1]
    exact_s = timed(partial(head.exact, raw[name], geometry, scale), device, repeats)[1]
    flux = model.decode(latent, geometry, "any", exact=True)
    return {
        "net_flux_max": float(operators.div(flux, geometry.grid).abs().amax()),
        "solid_flux_max": closed_flux(flux, geometry),
        "largest_flux": float(flux.abs().amax()),
        "decoder_ms": 1e3 * decoder_s,
        "head_ms": 1e3 * head_s,
        "exact_head_ms": 1e3 * exact_s,
        "head_share": head_s / (decoder_s + head_s),
        "exact_head_share": exact_s / (decoder_s + exact_s),
    }


def growth(first: dict[str, Any], last: dict[str, Any], cells: float) -> dict[str, Any]:
    """From the smallest size to the largest: ratios of iterations, and the power of the number of cells of times."""
    result = {}
    for name in first:
        if not first[name]:
            continue
        if name.startswith("iterations"):
            result[f"{name}_ratio"] = last[name] / first[name]
        elif name.endswith("_ms"):
            result[f"{name.removesuffix('_ms')}_power"] = math.log(last[name] / first[name]) / math.log(cells)
    return result


def run(arguments: argparse.Namespace) -> None:
    results = Results("core", arguments)
    device, repeats = arguments.device, arguments.repeats
    fields: dict[str, list[dict[str, Any]]] = {}
    for size in arguments.sizes:
        for name, geometry in boxes(size, device).items():
            if name not in (arguments.boxes or [name]):
                continue
            fields.setdefault(name, []).append(field(geometry, device, repeats))
            results.add(f"field {name} {size}", fields[name][-1])
            if size in arguments.decode:
                results.add(f"decode {name} {size}", decode(geometry, device, repeats))
    if len(arguments.sizes) > 1:
        cells = (arguments.sizes[-1] / arguments.sizes[0]) ** 3
        for name, figures in fields.items():
            results.add(
                f"growth {name} {arguments.sizes[0]} to {arguments.sizes[-1]}", growth(figures[0], figures[-1], cells)
            )


def main() -> None:
    options = parser(str(__doc__).partition("\n")[0])
    options.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 128], help="cells per axis, ascending")
    options.add_argument(
        "--decode", type=int, nargs="*", default=DECODED_SIZES, help="sizes of them to decode at (default 64 128)"
    )
    options.add_argument("--boxes", nargs="+", help="some of them, such as empty 'grains 0.5' (default all)")
    options.add_argument("--repeats", type=int, default=2, help="timed runs, of which the shortest counts")
    run(options.parse_args())


if __name__ == "__main__":
    main()
