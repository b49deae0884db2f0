"""Classical ways to compress a velocity, at the size of an autoencoder's latent.

    Spectral   the longest waves: what a grid coarsened alike along each axis could hold, with the best interpolation
    Pod        proper orthogonal modes of whole training snapshots (method of snapshots, Sirovich 1987)
    PatchPca   principal components of patches: the best linear code of single patches
    Wavelet    the largest wavelet coefficients, wherever they are
    Zfp        the general compressor for floating-point arrays (Lindstrom 2014), at a fixed rate

All take fluctuations in units of their size, at 0 on closed faces: arrays (3, nx, ny, nz). Numbers are stored in FP32,
so that ``num_numbers`` numbers are 32 bits each. Whatever decodes knows the box, its solids, the family's mean and size
and, of `Pod` and `PatchPca`, the basis without paying for them; that is generous to `Pod`, whose basis is as large as
its training snapshots.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np
import pywt
import scipy.fft
import zfpy
from einops import rearrange
from jaxtyping import Float

from latentphys.grid import Grid

BITS = 32
"""Of a stored number."""
RANK_TOLERANCE = 1e-12
"""Share of the largest variance of snapshots below which a mode is rounding."""
FACES, WAVES = "faces", "waves"


class Code(NamedTuple):
    """A compressed snapshot: what is stored, and its size in numbers of 32 bits."""

    stored: Any
    num_numbers: float


class Compressor(ABC):
    """Turns a snapshot into a `Code` and back.

    Args:
        num_numbers: numbers of 32 bits that a snapshot may take, ≥ 1.

    Attributes:
        num_parameters: numbers that whatever decodes must have once, not counted per snapshot.

    Raises:
        ValueError: no numbers at all.
    """

    num_parameters = 0

    def __init__(self, num_numbers: int) -> None:
        if num_numbers < 1:
            raise ValueError(f"Expected at least 1 number per snapshot, got {num_numbers}; compress less.")
        self.num_numbers = num_numbers

    @abstractmethod
    def encode(self, u: Float[np.ndarray, "3 nx ny nz"]) -> Code:
        """The code of a snapshot."""

    @abstractmethod
    def decode(self, code: Code) -> Float[np.ndarray, "3 nx ny nz"]:
        """What is left of a snapshot, in FP64."""


class Spectral(Compressor):
    """Keeps the modes with the longest waves, counted in cells, of all three components together.

    Each component is expanded in real waves that meet its boundary conditions, an orthonormal basis: sines and cosines
    along periodic axes; between walls sines or cosines with a node at no-slip walls (tangential components) or at
    every wall (normal ones), and a crest at free-slip walls.

    Args:
        grid: the box.
        bits: of each mode; see `rounded`. Default 32.

    Raises:
        ValueError: a box with open sides.
    """

    def __init__(self, grid: Grid, num_numbers: int, bits: int = BITS) -> None:
        super().__init__(num_numbers)
        self.bits = bits
        if any(sum(grid.open_sides, ())):
            raise ValueError(f"Expected a box of walls and periodic sides, got {grid.boundaries}.")
        self.shape = (3, *grid.shape)
        self.bases = [[_basis(grid, component, axis) for axis in range(3)] for component in range(3)]
        squares = np.zeros(self.shape)
        for component in range(3):
            for axis in range(3):
                k = _wavenumbers(self.bases[component][axis], grid.shape[axis])
                squares[component] += np.square(k).reshape([-1 if a == axis else 1 for a in range(3)])
        self.kept = np.argsort(squares, axis=None, kind="stable")[: num_numbers * BITS // bits]

    def encode(self, u: np.ndarray) -> Code:
        modes = rounded(self._transform(u, inverse=False).ravel()[self.kept], self.bits)
        return Code(modes, modes.size * self.bits / BITS)

    def decode(self, code: Code) -> np.ndarray:
        modes = np.zeros(self.shape)
        modes.ravel()[self.kept] = code.stored
        return self._transform(modes, inverse=True)

    def _transform(self, x: np.ndarray, inverse: bool) -> np.ndarray:
        result = np.array(x, dtype=np.float64)
        for component in range(3):
            for axis in range(3):
                along = result[component].swapaxes(axis, -1)
                along[...] = _waves(along, self.bases[component][axis], inverse)
        return result


def _basis(grid: Grid, component: int, axis: int) -> str:
    """The waves of one component along one axis: `WAVES`, `FACES`, or the type of scipy's transform."""
    if grid.periodic[axis]:
        return WAVES
    if component == axis:
        return FACES
    return {
        ("no_slip", "no_slip"): "dst2",
        ("no_slip", "free_slip"): "dst4",
        ("free_slip", "no_slip"): "dct4",
        ("free_slip", "free_slip"): "dct2",
    }[grid.boundaries[axis]]


def _wavenumbers(basis: str, n: int) -> np.ndarray:
    """k of each mode [rad per cell]; infinity where there is none."""
    m = np.arange(n)
    if basis == WAVES:
        return 2 * math.pi / n * np.minimum(m, n - m)
    if basis == FACES:
        return np.where(m == 0, np.inf, math.pi / n * m)
    return math.pi / n * (m + {"dst2": 1.0, "dct2": 0.0}.get(basis, 0.5))


def _waves(x: np.ndarray, basis: str, inverse: bool) -> np.ndarray:
    """An orthonormal transform along the last axis."""
    if basis == WAVES:
        # sines and cosines as their sums: Hartley's transform, which is its own inverse
        spectrum = scipy.fft.fft(x, norm="ortho")
        return spectrum.real - spectrum.imag
    if basis == FACES:
        inner = scipy.fft.dst(x[..., 1:], type=1, norm="ortho")
        return np.concatenate([np.zeros_like(x[..., :1]), inner], axis=-1)
    kind, number = basis[:3], int(basis[3])
    return getattr(scipy.fft, f"i{kind}" if inverse else kind)(x, type=number, norm="ortho")


class Pod(Compressor):
    """Modes of whole snapshots, about the mean of those that it is fitted to.

    Args:
        snapshots: of training. More modes than these span do not exist, so that the code may be smaller than allowed.
    """

    def __init__(self, snapshots: Float[np.ndarray, "n 3 nx ny nz"], num_numbers: int) -> None:
        super().__init__(num_numbers)
        self.shape = snapshots.shape[1:]
        self.mean = snapshots.mean(0, dtype=np.float64).ravel()
        rows = snapshots.reshape(len(snapshots), -1) - self.mean
        variances, vectors = np.linalg.eigh(rows @ rows.T)
        largest = np.argsort(variances)[::-1][:num_numbers]
        largest = largest[variances[largest] > RANK_TOLERANCE * max(variances.max(), 0.0)]
        self.modes = (vectors[:, largest] / np.sqrt(variances[largest])).T @ rows
        self.num_parameters = self.modes.size + self.mean.size

    def encode(self, u: np.ndarray) -> Code:
        amplitudes = (self.modes @ (u.ravel() - self.mean)).astype(np.float32)
        return Code(amplitudes, amplitudes.size)

    def decode(self, code: Code) -> np.ndarray:
        return (code.stored.astype(np.float64) @ self.modes + self.mean).reshape(self.shape)


class PatchPca(Compressor):
    """Principal components of patches, as many of each patch as the latent has channels.

    Args:
        snapshots: of training.
        num_channels: components per patch, ≤ 3 · patch³.
        patch: cells of a patch along each axis.

    Raises:
        ValueError: a patch that does not divide the box, or more components than a patch has numbers.
    """

    def __init__(self, snapshots: Float[np.ndarray, "n 3 nx ny nz"], num_channels: int, patch: int) -> None:
        self.patch, self.shape = patch, snapshots.shape[1:]
        if any(n % patch for n in self.shape[1:]) or num_channels > 3 * patch**3:
            raise ValueError(
                f"Expected patches that divide a box of {self.shape[1:]} cells and at most 3 · patch³ components, got "
                f"{patch} cells and {num_channels} components."
            )
        super().__init__(num_channels * math.prod(n // patch for n in self.shape[1:]))
        covariance, total, count = np.zeros((3 * patch**3,) * 2), np.zeros(3 * patch**3), 0
        for snapshot in snapshots:
            rows = self._patches(snapshot.astype(np.float64))
            covariance, total, count = covariance + rows.T @ rows, total + rows.sum(0), count + len(rows)
        self.mean = total / count
        self.components = np.linalg.eigh(covariance / count - np.outer(self.mean, self.mean))[1][:, ::-1][
            :, :num_channels
        ]
        self.num_parameters = self.components.size + self.mean.size

    def _patches(self, u: np.ndarray) -> np.ndarray:
        i = self.patch
        return rearrange(u, "c (x i) (y j) (z k) -> (x y z) (c i j k)", i=i, j=i, k=i)

    def encode(self, u: np.ndarray) -> Code:
        latent = ((self._patches(u) - self.mean) @ self.components).astype(np.float32)
        return Code(latent, latent.size)

    def decode(self, code: Code) -> np.ndarray:
        rows = code.stored.astype(np.float64) @ self.components.T + self.mean
        i, (x, y, z) = self.patch, (n // self.patch for n in self.shape[1:])
        return rearrange(rows, "(x y z) (c i j k) -> c (x i) (y j) (z k)", x=x, y=y, z=z, c=3, i=i, j=i, k=i)


class Wavelet(Compressor):
    """Keeps the largest coefficients of a wavelet transform of each component, down to 4 cells per axis.

    A kept coefficient costs its bits and its share of the log₂ C(n, k) bits that say which k of n were kept, what an
    ideal coder of positions would need. Boxes are taken as periodic between walls too.

    Args:
        wavelet: of PyWavelets. Default: the best of eight for channels and porous media.
        bits: of each coefficient; see `rounded`. Default 32.
    """

    def __init__(self, num_numbers: int, wavelet: str = "bior6.8", bits: int = BITS) -> None:
        super().__init__(num_numbers)
        self.wavelet, self.bits = wavelet, bits

    def encode(self, u: np.ndarray) -> Code:
        levels = max(1, int(math.log2(min(u.shape[1:]) / 4)))
        with warnings.catch_warnings():
            # that filters reach round the whole box is meant
            warnings.filterwarnings("ignore", message="Level value", category=UserWarning)
            coefficients = pywt.wavedecn(u, self.wavelet, "periodization", levels, axes=(1, 2, 3))
        array, places = pywt.coeffs_to_array(coefficients, axes=(1, 2, 3))
        k = largest_count(array.size, self.num_numbers, self.bits)
        kept = np.argpartition(np.abs(array), array.size - k, axis=None)[array.size - k :]
        stored = kept, rounded(array.ravel()[kept], self.bits), array.shape, places, u.shape
        return Code(stored, (self.bits * k + position_bits(array.size, k)) / BITS)

    def decode(self, code: Code) -> np.ndarray:
        kept, values, shape, places, original = code.stored
        array = np.zeros(shape)
        array.ravel()[kept] = values
        coefficients = pywt.array_to_coeffs(array, places, output_format="wavedecn")
        u = pywt.waverecn(coefficients, self.wavelet, "periodization", axes=(1, 2, 3))
        return u[tuple(slice(n) for n in original)]


def position_bits(n: int, k: int) -> float:
    """log₂ C(n, k): the bits that say which k of n things are meant."""
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)


def rounded(values: np.ndarray, bits: int) -> np.ndarray:
    """FP32 for 32 bits; for fewer, whole multiples of a step, the largest value the largest multiple they can count."""
    if bits == BITS:
        return values.astype(np.float32)
    step = max(float(np.abs(values).max(initial=0.0)), np.finfo(np.float32).tiny) / (2 ** (bits - 1) - 1)
    return np.rint(values / step) * step


def largest_count(n: int, num_numbers: int, bits: int = BITS) -> int:
    """The most of n coefficients whose values of some bits and positions fit into some numbers of 32 bits."""
    low, high = 0, min(n, num_numbers * BITS // bits)
    if bits * high + position_bits(n, high) <= BITS * num_numbers:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        fits = bits * middle + position_bits(n, middle) <= BITS * num_numbers
        low, high = (middle, high) if fits else (low, middle)
    return low


class Zfp(Compressor):
    """ZFP at the fixed rate that comes nearest to the budget from below.

    Its lowest rate is 9 bits for a block of 4³ values; a smaller budget gets that, and its code says so by its size.
    """

    HEADER_BITS = 256
    BLOCK, LEAST = 64, 9

    def encode(self, u: np.ndarray) -> Code:
        values = np.ascontiguousarray(u.reshape(-1, *u.shape[2:]), dtype=np.float32)
        num_blocks = math.prod(-(-n // 4) for n in values.shape)
        bits = max(self.LEAST, int((BITS * self.num_numbers - self.HEADER_BITS) // num_blocks))
        stored = zfpy.compress_numpy(values, rate=bits / self.BLOCK)
        return Code((stored, u.shape), 8 * len(stored) / BITS)

    def decode(self, code: Code) -> np.ndarray:
        stored, shape = code.stored
        return zfpy.decompress_numpy(stored).reshape(shape).astype(np.float64)
