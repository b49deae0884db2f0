"""Composition of weights in safetensors files, a piece of a tensor at a time; nothing here knows what they belong to.

With Δ₊ = ½ (θ_high + θ_low) − θ₀ and Δ₋ = ½ (θ_high − θ_low) the composite is

    θ(α) = θ₀ + Δ₊ + α Δ₋ = θ_low + ½ (1 + α) (θ_high − θ_low)

In its values the anchor θ₀ cancels. It says of which architecture and type the weights are, and that the endpoints are
its relatives.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentphys.composition.relatives import Relation, Tally
from latentphys.composition.weights import MOVED, Weights, check_same_specs, item_size, pieces
from latentphys.training.durable import partial_of, sync

STATISTICS = ("running_mean", "running_var")
"""How the names of what normalisation layers measure end: variances that were extrapolated could be negative."""

Progress = Callable[[int], None]


def at(low: Tensor, high: Tensor, alpha: float) -> Tensor:
    """θ(α) of two endpoints in FP64; where they are equal, and at α = ±1, it is an endpoint's value to the last bit."""
    wide = torch.promote_types(low.dtype, torch.float64)
    return torch.lerp(low.to(wide), high.to(wide), (1 + alpha) / 2)


def merge_files(
    anchor: str | Path,
    low: str | Path,
    high: str | Path,
    out: str | Path,
    alpha: float,
    *,
    fixed: Collection[str] | None = None,
    metadata: Mapping[str, str] | None = None,
    progress: Progress = lambda done: None,
) -> Relation:
    """Write θ(α) of three safetensors files as another one, worked out in FP64, in the types of the anchor.

    The files are read piece by piece, twice: `weights.PIECE` numbers of each in FP64 are all that is in memory.

    Args:
        alpha: −1 for the low endpoint, 0 for the mean of both, +1 for the high one.
        fixed: names of tensors that have to be equal in all three. Default: those that end as `STATISTICS`. All that
            are not of floating point have to be so as well.
        metadata: what to write into the header of the file.
        progress: called with the numbers done since the last call; `num_numbers` in all.

    Returns:
        how the three are related.

    Raises:
        ValueError: files that cannot be read, tensors of other names or shapes, weights that are no relatives or not
            finite, an α that is not finite, or one that leaves the range of the anchor's type.
    """
    if not math.isfinite(alpha):
        raise ValueError(f"Expected a finite alpha, got {alpha}. Give a number, such as 0.5.")
    with ExitStack() as stack:
        three = [Weights(path, stack) for path in (anchor, low, high)]
        if fixed is None:
            fixed = {name for name in three[0].specs if name.endswith(STATISTICS)}
        relation = relate(three, fixed, progress)
        _write(three, Path(out), alpha, fixed, metadata or {}, progress)
    return relation


def relate(three: Sequence[Weights], fixed: Collection[str], progress: Progress = lambda done: None) -> Relation:
    """How two endpoints are related to an anchor and to each other, from one pass over the files; see `merge_files`."""
    anchor = three[0]
    for other in three[1:]:
        check_same_specs(anchor, other)
    tally = Tally([weights.path for weights in three])
    for name, (dtype, shape) in anchor.specs.items():
        is_fixed = name in fixed or dtype not in MOVED
        for index in pieces(shape):
            piece = [weights.read(name, index) for weights in three]
            if is_fixed:
                tally.add_fixed(name, piece)
            else:
                tally.add(name, piece, is_matrix=len(shape) > 1)
            progress(piece[0].numel())
        tally.end()
    return tally.relation()


def num_numbers(path: str | Path) -> int:
    """What `merge_files` goes through: the numbers of a file, twice."""
    with ExitStack() as stack:
        return 2 * sum(math.prod(shape) for _, shape in Weights(path, stack).specs.values())


def _write(
    three: Sequence[Weights],
    out: Path,
    alpha: float,
    fixed: Collection[str],
    metadata: Mapping[str, str],
    progress: Progress,
) -> None:
    """Header first, as the format asks for it, and then one tensor after another."""
    anchor, low, high = three
    order = sorted(anchor.specs, key=lambda name: (-item_size(anchor, name), name))  # wide types first are aligned
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        dtype, shape = anchor.specs[name]
        start, end = end, end + math.prod(shape) * item_size(anchor, name)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = partial_of(out)
    try:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                dtype, shape = anchor.specs[name]
                for index in pieces(shape):
                    piece = anchor.read(name, index)
                    if dtype in MOVED and name not in fixed:
                        piece = _merged(name, low.read(name, index), high.read(name, index), alpha, MOVED[dtype])
                    file.write(piece.contiguous().reshape(-1).view(torch.uint8).numpy().data)
                    progress(piece.numel())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    sync(out.parent)


def _merged(name: str, low: Tensor, high: Tensor, alpha: float, dtype: torch.dtype) -> Tensor:
    merged = at(low, high, alpha).to(dtype)
    if not bool(torch.isfinite(merged).all()):
        raise ValueError(
            f"Expected weights within the range of {dtype}, got others in {name!r} at alpha = {alpha:g}; choose an "
            "alpha nearer to the endpoints, −1…1."
        )
    return merged
