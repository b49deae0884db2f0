"""The linear code that training starts from, fitted to some snapshots.

The encoder's linear path says the principal components of each patch; the decoder's is the least-squares estimate of a
patch from the latents of that patch and of its 26 neighbours, which know the flow across the patch's rim: where flows
are smooth, a third to a half of the error of the patches alone is gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from latentphys.autoencoders.layers import LinearPath, extrude, pad_by_boundary, space_to_depth
from latentphys.grid import Boundaries, Geometry

if TYPE_CHECKING:
    from latentphys.autoencoders.autoencoder import Autoencoder

Snapshots = Mapping[str, Iterable[tuple[Geometry, Float[Tensor, "c nx ny nz"]]]]
"""Family → some training snapshots, packed, each with the box it lives in; gone through more than once."""

RIDGE = 1e-4
"""Of the least squares, as a share of the mean square of a latent number."""


@torch.no_grad()
def fit_linear_code(model: Autoencoder, snapshots: Snapshots) -> None:
    """Set the linear paths of a model, each family with the same weight. Free latents get unit variance.

    Args:
        model: whose networks say nothing beside their linear paths yet.
        snapshots: family → snapshots to fit the code to; memory holds one at a time.

    Raises:
        ValueError: fields that are not finite.
    """
    _fit_encoder(model, snapshots)
    model.encoder.deep = False
    try:
        _fit_decoder(model, snapshots)
    finally:
        model.encoder.deep = True


def _fit_encoder(model: Autoencoder, snapshots: Snapshots) -> None:
    patch, layers = model.compression, model.encoder.linear
    sizes = [_path(layers, name).in_channels for name in model.specs]
    total = torch.zeros(sum(sizes), sum(sizes), dtype=torch.float64)
    for family, some in snapshots.items():
        moment, number = torch.zeros_like(total), 0
        for geometry, packed in some:
            if not bool(torch.isfinite(packed).all()):
                raise ValueError(f"Expected finite fields of family {family!r}, got NaN or infinite values.")
            fields = model.learnt_inputs(packed[None].double(), geometry, family)
            patches = {name: space_to_depth(u, patch)[0].flatten(1) for name, u in fields.items()}
            columns = next(iter(patches.values())).shape[1]
            absent = {name: total.new_zeros(size, columns) for name, size in zip(model.specs, sizes, strict=True)}
            rows = torch.cat([patches.get(name, absent[name]) for name in model.specs])
            moment.addmm_(rows, rows.mT)
            number += columns
        total += moment / number / len(snapshots)
    variances, components = _principal(total, model.latent_channels - model.num_coarse)
    parts = (components / variances.clamp(min=1e-12).sqrt()).split(sizes)
    for name, part in zip(model.specs, parts, strict=True):
        taps = torch.zeros(*part.mT.shape, 3, 3, 3)
        taps[..., 1, 1, 1] = part.mT
        _path(layers, name).set_map(taps)


def _fit_decoder(model: Autoencoder, snapshots: Snapshots) -> None:
    patch, layers = model.compression, model.decoder.linear
    known = 27 * model.latent_channels
    normal = {name: torch.zeros(known, known, dtype=torch.float64) for name in layers}
    cross = {name: torch.zeros(known, _path(layers, name).out_channels, dtype=torch.float64) for name in layers}
    for family, some in snapshots.items():
        gram, by_field = torch.zeros(known, known, dtype=torch.float64), dict[str, Tensor]()
        number = 0
        for geometry, packed in some:
            x, grid = packed[None], geometry.grid
            z = model.decoder_input(model.encode(x, geometry, family), geometry, family).double()
            near = _neighbours(z, grid.boundaries)[0].flatten(1)
            gram += near @ near.mT
            number += near.shape[1]
            for name, channels in model.channels_of(x.double(), geometry, family).items():
                patches = space_to_depth(extrude(channels, patch), patch)[0].flatten(1)
                by_field[name] = by_field.get(name, 0.0) + near @ patches.mT
        for name, products in by_field.items():
            normal[name] += gram / number
            cross[name] += products / number
    for name, matrix in normal.items():
        matrix.diagonal().add_(RIDGE * matrix.diagonal().mean().clamp(min=1e-12))
        solution = torch.linalg.solve(matrix, cross[name])
        _path(layers, name).set_map(solution.mT.unflatten(1, (27, -1)).mT.unflatten(2, (3, 3, 3)))


def _path(layers: nn.ModuleDict, name: str) -> LinearPath:
    path = layers[name]
    assert isinstance(path, LinearPath)
    return path


def _neighbours(z: Float[Tensor, "b l x y z"], boundaries: Boundaries) -> Float[Tensor, "b m x y z"]:
    """What a 3³ convolution sees of latents: those of the 27 cells, one cell after another."""
    padded, (nx, ny, nz) = pad_by_boundary(z, boundaries), z.shape[-3:]
    parts = [padded[..., i : i + nx, j : j + ny, k : k + nz] for i, j, k in product(range(3), repeat=3)]
    return torch.cat(parts, dim=1)


def _principal(moment: Float[Tensor, "n n"], number: int) -> tuple[Float[Tensor, " k"], Float[Tensor, "n k"]]:
    """The largest eigenvalues of a symmetric matrix and their eigenvectors."""
    from scipy.sparse.linalg import eigsh

    if len(moment) <= 2048 or number >= len(moment):
        values, vectors = torch.linalg.eigh(moment)
        return values.flip(-1)[:number], vectors.flip(-1)[:, :number]
    found, columns = eigsh(moment.numpy(), number, v0=np.ones(len(moment)))
    return torch.from_numpy(found[::-1].copy()), torch.from_numpy(columns[:, ::-1].copy())
