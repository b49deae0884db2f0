"""What the experts do: load, dead experts, and how much an expert tells about the family of a flow.

Shape suffixes: T tokens, k experts per token, E experts, R families. Pure functions of ids and counts; entropies and
mutual information in bits, computed in FP64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def expert_counts(ids_Tk: Tensor, num_experts: int) -> Tensor:
    """Tokens that each expert took, ``(E,)`` int64. Deterministic, and without waiting for a GPU."""
    all_E = torch.arange(num_experts, device=ids_Tk.device)
    return (ids_Tk.reshape(-1, 1) == all_E).sum(0)


def joint_counts(ids_Tk: Tensor, families_T: Tensor, num_experts: int, num_families: int) -> Tensor:
    """Tokens of each family that each expert took, ``(R, E)`` int64.

    Args:
        ids_Tk: experts of each token, 0…E−1.
        families_T: family of each token, 0…R−1.

    Raises:
        ValueError: not one family per token.
    """
    if families_T.shape != ids_Tk.shape[:1]:
        raise ValueError(
            f"Expected one family for each of {ids_Tk.shape[0]} tokens, got {tuple(families_T.shape)}; "
            "repeat each sample's family over its tokens."
        )
    return torch.stack([expert_counts(ids_Tk[families_T == family], num_experts) for family in range(num_families)])


def load(counts_E: Tensor) -> Tensor:
    """Share of the tokens that each expert took, ``(E,)`` FP64; zero everywhere without any tokens."""
    counts_E = counts_E.double()
    return counts_E / counts_E.sum().clamp(min=1.0)


def entropy(counts: Tensor) -> float:
    """Entropy −Σ p log₂ p of the shares that counts of any shape make [bit]; log₂ E for an even load of E experts."""
    p = load(counts.flatten())
    return float(-torch.xlogy(p, p).sum() / math.log(2.0)) + 0.0


def dead_experts(counts_E: Tensor) -> list[int]:
    """The experts that took no token at all."""
    return torch.nonzero(counts_E == 0).flatten().tolist()


def top1_margin(scores_TE: Tensor) -> float:
    """Mean distance of the best score from the second best, 0…1: how sure the router is. 0 without any tokens.

    Raises:
        ValueError: fewer than two experts.
    """
    if scores_TE.shape[-1] < 2:
        raise ValueError(f"Expected scores of at least 2 experts for a margin, got {scores_TE.shape[-1]}.")
    best_T2 = scores_TE.double().topk(2, dim=-1).values
    return float((best_T2[:, 0] - best_T2[:, 1]).sum() / max(len(best_T2), 1))


@dataclass(frozen=True)
class MutualInformation:
    """How much the expert of a token tells about its family.

    Args:
        bits: I(family; expert) [bit].
        normalised: I / H(family), 0 (independent) … 1 (the expert gives the family away); 0 with one family only.
    """

    bits: float
    normalised: float


def mutual_information(joint_RE: Tensor) -> MutualInformation:
    """I(family; expert) = H(family) + H(expert) − H(family, expert), of the counts that `joint_counts` makes.

    It is an estimate from counts: biased up by about (R−1)(E−1)/(2 N ln 2) bits for N tokens.
    """
    family = entropy(joint_RE.sum(1))
    bits = max(0.0, family + entropy(joint_RE.sum(0)) - entropy(joint_RE))
    return MutualInformation(bits=bits, normalised=min(1.0, bits / family) if family > 0 else 0.0)


def domain_purity(joint_RE: Tensor) -> float:
    """Share of the tokens that belong to the majority family of their expert, 1/R … 1; 0 without any tokens."""
    joint_RE = joint_RE.double()
    return float(joint_RE.max(0).values.sum() / joint_RE.sum().clamp(min=1.0))


def routing_map(ids: Sequence[Tensor], latent_shape: tuple[int, int, int]) -> Tensor:
    """Which expert took each latent cell: each token's first choice, laid out in space.

    Args:
        ids: per layer the experts of all tokens, ``(T, k)``, as in ``[r.ids for r in prediction.routings]``; T is the
            number of samples times the number of latent cells.
        latent_shape: latent cells per axis (px, py, pz).

    Returns:
        ``(sample, layer, px, py, pz)`` int16.

    Raises:
        ValueError: no layer, or a number of tokens that does not fill whole samples.
    """
    if not ids:
        raise ValueError("Expected the ids of at least one layer, got none.")
    first_LT = torch.stack([ids_Tk[:, 0] for ids_Tk in ids])
    if first_LT.shape[1] % math.prod(latent_shape):
        raise ValueError(
            f"Expected a multiple of {math.prod(latent_shape)} tokens for latents of {latent_shape}, "
            f"got {first_LT.shape[1]}."
        )
    return first_LT.to(torch.int16).unflatten(1, (-1, *latent_shape)).movedim(1, 0)
