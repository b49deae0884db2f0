"""Encode and decode in tiles against the whole box at once: how far apart, what is conserved, time and memory.

    python benchmarks/bench_tiles.py --sizes 64 128
    python benchmarks/bench_tiles.py --sizes 256 --tile 64 --json tiles.jsonl

An autoencoder with random weights everywhere in a channel: periodic axes, along which halos wrap, and walls. Per size a
line: the largest difference of latents and of FP32 decodes over their RMS, the largest |net flux| of a cell and
|flux| through a closed face of the exact FP64 decode in tiles [m³/s], and time and memory of the networks alone, with
tiles and without.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from bench_core import closed_flux, random_autoencoder
from machine import Results, parser, peak_memory, timed

from latentphys import operators
from latentphys.autoencoders.autoencoder import field_type
from latentphys.autoencoders.place import describe
from latentphys.autoencoders.tiles import decode_in_tiles, encode_in_tiles
from latentphys.families import OpenChannel
from latentphys.fields import VELOCITY
from latentphys.grid import Geometry


@torch.no_grad()
def measure(size: int, preset: str, tile: int, device: str) -> dict[str, Any]:
    geometry = Geometry(OpenChannel().grid((size,) * 3))
    model, name = random_autoencoder(geometry.grid, device, preset), field_type(VELOCITY)
    flux = geometry.mask(torch.randn(1, 3, *geometry.grid.shape)).to(device)
    place, fields = describe(geometry, [True], model.compression).to(device), {name: flux}
    latent, encode_s = timed(partial(model.encoder, fields, place), device, 0)
    in_tiles, encode_tiles_s = timed(partial(encode_in_tiles, model.encoder, fields, place, tile), device, 0)
    whole, decode_s = timed(partial(model.decoder, latent, place, [name]), device, 0)
    tiles, decode_tiles_s = timed(partial(decode_in_tiles, model.decoder, latent, place, [name], tile), device, 0)
    figures: dict[str, Any] = {
        "latent_difference": float((in_tiles - latent).abs().amax() / latent.square().mean().sqrt()),
        "decode_difference": float((tiles[name] - whole[name]).abs().amax() / whole[name].square().mean().sqrt()),
    }
    del whole, tiles, in_tiles
    model.tile = tile
    exact = model.decode(latent, geometry, "any", exact=True)
    figures |= {
        "net_flux_max": float(operators.div(exact, geometry.grid).abs().amax()),
        "closed_flux_max": closed_flux(exact, geometry),
    }
    del exact
    return figures | {
        "encode_s": encode_s,
        "encode_tiles_s": encode_tiles_s,
        "decode_s": decode_s,
        "decode_tiles_s": decode_tiles_s,
        "decode_mib": peak_memory(partial(model.decoder, latent, place, [name]), device),
        "decode_tiles_mib": peak_memory(partial(decode_in_tiles, model.decoder, latent, place, [name], tile), device),
    }


def main() -> None:
    arguments = parser(str(__doc__).partition("\n")[0])
    arguments.add_argument("--sizes", type=int, nargs="+", default=[64], help="cells per axis (default %(default)s)")
    arguments.add_argument("--preset", default="tiny", help="autoencoder=… (default %(default)s)")
    arguments.add_argument("--tile", type=int, default=16, help="cells per axis of a tile (default %(default)s)")
    options = arguments.parse_args()
    results = Results("tiles", options)
    for size in options.sizes:
        settings = {"cells": size, "model": options.preset, "tile": options.tile}
        results.add(f"{options.preset}_{size}", measure(size, options.preset, options.tile, options.device), settings)


if __name__ == "__main__":
    main()
