"""Low-rank adaptation: a small trained update beside weights that stay as they are.

Shape suffixes: E experts, K inputs, M outputs, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from latentphys.routers import Experts, FeedForward
from latentphys.transformer.attention import SelfAttention
from latentphys.transformer.fourier import FourierMixer


class LowRank(nn.Module):
    """A parametrisation W + (α/r) A B, for each matrix of a stack of them.

    The factor on the side of the inputs is random, the other is zero: the weight is W at the start, bit for bit.

    Args:
        weight: of `nn.Linear`, ``(…, M, K)``, or of what multiplies rows from the right, ``(…, K, M)``.
        rank: r, ≥ 1 and below K and M.
        alpha: α.
        inputs_first: whether K stands before M.

    Raises:
        ValueError: a rank that is no saving.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float, inputs_first: bool) -> None:
        super().__init__()
        rows, columns = weight.shape[-2:]
        if not 1 <= rank < min(rows, columns):
            raise ValueError(
                f"Expected a rank from 1 to {min(rows, columns) - 1} for weights of {rows} × {columns}, got {rank}."
            )
        self.scale = alpha / rank
        self.a = nn.Parameter(weight.new_zeros(*weight.shape[:-1], rank))
        self.b = nn.Parameter(weight.new_zeros(*weight.shape[:-2], rank, columns))
        num_inputs = rows if inputs_first else columns
        nn.init.normal_(self.a if inputs_first else self.b, std=num_inputs**-0.5)

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            return weight + self.scale * (self.a @ self.b)


def add(model: nn.Module, rank: int, alpha: float | None = None) -> None:
    """Give every weight of attention, Fourier mixing and feed-forwards a low-rank update, in place.

    Stacked experts get one pair of factors each. Only the factors train; everything else gets ``requires_grad`` False.

        W + (α/r) B A

    Args:
        rank: r, ≥ 1 and below every width. Good values: 4…16.
        alpha: α, so that another rank needs no other learning rate. Default: the rank.

    Raises:
        ValueError: a rank that is no saving, or a model without such weights.

    Reference: Hu et al. 2021, arXiv 2106.09685.
    """
    targets = list(_targets(model))
    if not targets:
        raise ValueError("Expected a model with attention, mixers or experts, got one without.")
    model.requires_grad_(False)
    for module, name, inputs_first in targets:
        weight = getattr(module, name)
        update = LowRank(weight, rank, rank if alpha is None else alpha, inputs_first)
        parametrize.register_parametrization(module, name, update)


def _targets(model: nn.Module) -> Iterator[tuple[nn.Module, str, bool]]:
    """Each weight: its module, its name there, and whether it multiplies rows from the right."""
    for module in model.modules():
        if isinstance(module, Experts):
            yield from ((module, name, True) for name in ("w_in_EDG", "w_out_EFD"))
        elif isinstance(module, FourierMixer):
            yield from ((module, name, True) for name in ("w1", "w2"))
        elif isinstance(module, SelfAttention):
            yield from ((linear, "weight", False) for linear in (module.to_qkv, module.to_out))
        elif isinstance(module, FeedForward):
            yield from ((linear, "weight", False) for linear in (module.w_in, module.w_out))


def merge(model: nn.Module) -> None:
    """Make every parametrised weight a plain one of the same bits, in place; all of them train again."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                weight = getattr(module, name).detach().clone()
                parametrize.remove_parametrizations(module, name, leave_parametrized=False)
                setattr(module, name, nn.Parameter(weight))
    model.requires_grad_(True)
