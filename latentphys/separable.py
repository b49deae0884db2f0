"""Functions of the Laplacian of an empty box, applied in its eigenbasis: Fourier modes along periodic axes, sines and
cosines along the others. A periodic axis of one cell has no modes but the constant, and is left alone.

The discrete second difference along one axis has the eigenvalues −4 sin²(θ_k / 2). Its eigenvectors depend on where the
values sit (in the middle of cells, or on their corners) and on what the ends do:

    cells    closed, closed   cos(θ (i + ½)),  θ = πk/n            no difference across the end (Neumann, DCT-II)
             open, open       sin(θ (i + ½)),  θ = π(k + 1)/n      zero on the end, half a cell away (Dirichlet, DST-II)
             mixed            sin or cos,      θ = π(k + ½)/n
    corners  closed, closed   sin(θ i),        θ = πk/n, k ≥ 1     zero at both ends (Dirichlet, DST-I)

Reference: Strang, SIAM Rev. 41 (1999).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from latentphys.grid import End, Ends, Grid


class Separable:
    """A function f(−Δ) of the seven-point Laplacian of a box without solids.

    Args:
        grid: the box.
        ends: per axis what the low and the high end do: ``periodic | closed | open``.
        weights: per axis the factor of its second difference. With 1/h² the Laplacian is ∇²; with face area / cell size
            it is the net flux of a gradient.
        function: f of −Δ's eigenvalues [the unit of the weights]; it is not asked for at eigenvalue 0, where the result
            has no part.
        corners: the axes along which values sit on the corners of cells. Such an axis must not be open.
        dtype, device: of what it is applied to.
    """

    @torch.inference_mode(False)  # instances are kept, and must serve training too
    def __init__(
        self,
        grid: Grid,
        ends: Ends,
        weights: tuple[float, float, float],
        function: Callable[[Tensor], Tensor],
        *,
        corners: tuple[bool, bool, bool] = (False, False, False),
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        eigenvalues = torch.zeros(1, 1, 1, dtype=torch.float64)
        self.fourier = [axis - 3 for axis, pair in enumerate(ends) if pair[0] == "periodic" and grid.shape[axis] > 1]
        self.sizes = [grid.shape[dim] for dim in self.fourier]
        self.bases: list[tuple[int, Tensor]] = []
        for axis, (n, pair, weight) in enumerate(zip(grid.shape, ends, weights, strict=True)):
            if pair[0] == "periodic":
                theta = 2 * math.pi * torch.arange(n, dtype=torch.float64) / n
                if axis - 3 in self.fourier[-1:]:
                    theta = theta[: n // 2 + 1]
            else:
                theta, basis = _modes(n, pair, corners[axis])
                self.bases.append((axis - 3, basis.to(device, dtype)))
            along = [-1 if a == axis else 1 for a in range(3)]
            eigenvalues = eigenvalues + weight * (4 * torch.sin(theta / 2) ** 2).reshape(along)
        zero = eigenvalues == 0
        symbol = torch.where(zero, 0.0, function(torch.where(zero, 1.0, eigenvalues)))
        self.symbol = symbol.to(device, dtype)

    def __call__(
        self, x: Float[Tensor, "*batch nx ny nz"], symbol: Tensor | None = None
    ) -> Float[Tensor, "*batch nx ny nz"]:
        """f(−Δ) x, to rounding, in the dtype of x under autocast too; self-adjoint.

        Args:
            symbol: multiplies the modes instead of f of their eigenvalues; of the shape of `self.symbol` behind batch
                axes. For a function that changes from call to call, of the eigenvalues that f(λ) = λ has kept.
        """
        with torch.autocast(x.device.type, enabled=False):
            return self._apply(x, self.symbol if symbol is None else symbol)

    def _apply(self, x: Tensor, symbol: Tensor) -> Tensor:
        for dim, basis in self.bases:
            x = _along(x, dim, basis)
        if self.fourier:
            x = torch.fft.irfftn(torch.fft.rfftn(x, dim=self.fourier) * symbol, s=self.sizes, dim=self.fourier)
        else:
            x = x * symbol
        for dim, basis in self.bases:
            x = _along(x, dim, basis.T)
        return x


def _along(x: Tensor, dim: int, matrix: Tensor) -> Tensor:
    return x @ matrix if dim == -1 else (x.transpose(dim, -1) @ matrix).transpose(dim, -1)


def _modes(n: int, ends: tuple[End, End], corners: bool) -> tuple[Tensor, Tensor]:
    """Angles θ_k and orthonormal modes (n values, n modes) of an axis that ends."""
    i, k = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    low, high = (end == "open" for end in ends)
    if corners:
        if low or high:
            raise ValueError(f"Expected closed ends of an axis with values on corners, got {ends}.")
        theta = math.pi * k / n
        modes = torch.sin(theta * i)  # the mode of k = 0 is nothing, as is the value on the wall
    else:
        theta = math.pi * (k + 0.5 * low + 0.5 * high) / n
        modes = torch.sin(theta * (i + 0.5)) if low else torch.cos(theta * (i + 0.5))
    return theta, modes / modes.norm(dim=0).clamp(min=0.5)


@lru_cache(maxsize=64)
def box_poisson(grid: Grid, ends: Ends, dtype: torch.dtype, device: torch.device) -> Separable:
    """Direct solver of D C G φ = r in the empty box: φ [m²/s] from the net flux r [m³/s].

    φ is zero beyond open ends; where there are none it has zero mean, and so must r.
    """
    return Separable(grid, ends, grid.conductances, lambda eigenvalues: -1 / eigenvalues, dtype=dtype, device=device)
