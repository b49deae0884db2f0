"""A loss on how energy is spread over scales."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from latentphys.autoencoders.losses import FieldsLoss, present
from latentphys.autoencoders.normaliser import FieldScale
from latentphys.grid import Geometry, Grid


class SpectrumLoss(FieldsLoss):
    """Error of the energy per band of wave numbers, mean over bands of |ln E/E_target| [nats].

    Energies are those of a field's fluctuations about its mean profile, over those of the family, sums over components,
    with closed faces and solids at zero. A periodic axis has Fourier modes; along any other the field goes on mirrored
    and has cosine modes. Phases do not count: on its own this loss reconstructs nothing.

    The bands split the wave numbers from the lowest of the box to the Nyquist wave number of its coarsest axis into
    parts equally wide in log k; what lies beyond is in the last, and the mean (k = 0) in none. A band without modes,
    in a box of few cells, does not count.

    Args:
        weights: of the bands, from large to small scales. Default: three bands alike.
        floor: energy, in units of the family's, that is added to both: less is not asked for. Good values: 1e-8…1e-4.

    Raises:
        ValueError: weights that are no finite numbers ≥ 0 or all of them 0, or a floor that is not positive.
    """

    def __init__(self, weights: Sequence[float] = (1.0, 1.0, 1.0), floor: float = 1e-6) -> None:
        super().__init__()
        if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
            raise ValueError(f"Expected finite weights ≥ 0 of the bands, one of them positive, got {list(weights)}.")
        if not 0 < floor < math.inf:
            raise ValueError(f"Expected a positive floor of the energies, got {floor}.")
        self.weights, self.floor = tuple(map(float, weights)), floor

    def of_field(
        self, prediction: Tensor, target: Tensor, geometry: Geometry, field: FieldScale
    ) -> Float[Tensor, " b"] | None:
        grid = geometry.grid
        bands, num_modes = _bands(grid, len(self.weights))
        weights = [weight if n else 0.0 for weight, n in zip(self.weights, num_modes, strict=True)]
        where, band = present(geometry, field.spec, prediction.device), torch.from_numpy(bands).to(prediction.device)
        logs = []
        for x in (prediction, target):
            energy = _energy(torch.where(where, field.normalise(x, grid), 0.0), grid)
            per_band = [torch.where(band == i, energy, 0.0).sum((-3, -2, -1)) for i in range(len(weights))]
            logs.append((torch.stack(per_band) + self.floor).log())
        errors = (logs[0] - logs[1]).abs()
        total = sum(weights) or 1.0
        return torch.stack([weight / total * error for weight, error in zip(weights, errors, strict=True)]).sum(0)


def _energy(x: Float[Tensor, "b c nx ny nz"], grid: Grid) -> Float[Tensor, "b mx my half"]:
    """Mean square of a field per mode, summed over components; modes of both signs along z are one."""
    for dim, is_periodic in zip((-3, -2, -1), grid.periodic, strict=True):
        if not is_periodic:
            x = torch.cat([x, x.flip(dim)], dim)
    modes = torch.view_as_real(torch.fft.rfftn(x, dim=(-3, -2, -1), norm="forward"))
    energy = modes.square().sum((1, -1))
    # All but the first, and the Nyquist mode of an even number of cells, stand for two.
    return energy + torch.nn.functional.pad(energy[..., 1 : (x.shape[-1] + 1) // 2], (1, 1 - x.shape[-1] % 2))


@lru_cache(maxsize=16)
def _bands(grid: Grid, num_bands: int) -> tuple[np.ndarray, tuple[int, ...]]:
    """The band of each mode of `_energy`, −1 for k = 0, and the number of modes in each band."""
    cells = [n if periodic else 2 * n for n, periodic in zip(grid.shape, grid.periodic, strict=True)]
    transforms = (np.fft.fftfreq, np.fft.fftfreq, np.fft.rfftfreq)
    along = [transform(n, h) for transform, n, h in zip(transforms, cells, grid.spacing, strict=True)]
    k = np.sqrt(sum(np.square(f) for f in np.meshgrid(*along, indexing="ij")))
    lowest = k[k > 0].min(initial=math.inf)
    nyquist = min((0.5 / h for h, n in zip(grid.spacing, grid.shape, strict=True) if n > 1), default=0.0)
    width = math.log(nyquist / lowest) if nyquist > lowest * (1 + 1e-9) else math.inf
    ratio = np.log(np.maximum(k, lowest) / lowest) / width if np.isfinite(lowest) else np.zeros_like(k)
    bands = np.where(k > 0, np.clip(num_bands * ratio + 1e-9, 0, num_bands - 1).astype(int), -1).astype(np.int16)
    return bands, tuple(int((bands == i).sum()) for i in range(num_bands))
