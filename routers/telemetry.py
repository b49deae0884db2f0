"""What the experts do: load, dead experts, and how much an expert tells about the family of a flow.

Shape suffixes: T tokens, k experts per token, B samples, E experts, R families. Pure functions of ids and counts;
entropies and mutual information in bits, computed in FP64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def expert_counts(ids_Tk: Tensor, num_experts: int) -> Tensor:
    """Tokens that each expert took, ``(E,)`` int64. Deterministic, and without waiting for a GPU."""
    all_E = torch.arange(num_experts, device=ids_Tk.device)
    return (ids_Tk.reshape(-1, 1) == all_E).sum(0)


def sample_counts(ids_Tk: Tensor, num_samples: int, num_experts: int) -> Tensor:
    """Tokens of each sample that each expert took, ``(B, E)`` int64, as cheap as `expert_counts`.

    Args:
        ids_Tk: experts of the tokens, sample after sample, all samples of one size.

    Raises:
        ValueError: tokens that do not fill whole samples.
    """
    if num_samples < 1 or len(ids_Tk) % num_samples:
        raise ValueError(f"Expected {len(ids_Tk)} tokens to fill whole samples, got num_samples = {num_samples}.")
    all_E = torch.arange(num_experts, device=ids_Tk.device)
    return (ids_Tk.reshape(num_samples, -1, 1) == all_E).sum(1)


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


def dead_ages(ages_E: Tensor, counts_E: Tensor) -> Tensor:
    """Steps since each expert last took a token, ``(E,)``: 0 for those that did in this step, else one more."""
    return torch.where(counts_E > 0, 0, ages_E + 1)


def margins(scores_TE: Tensor) -> Tensor:
    """Distance of each token's best score from its second best, ``(T,)`` FP64, 0…1: how sure the router is.

    Raises:
        ValueError: fewer than two experts.
    """
    if scores_TE.shape[-1] < 2:
        raise ValueError(f"Expected scores of at least 2 experts for a margin, got {scores_TE.shape[-1]}.")
    best_T2 = scores_TE.detach().topk(2, dim=-1).values.double()
    return best_T2[:, 0] - best_T2[:, 1]


def top1_margin(scores_TE: Tensor) -> float:
    """Mean of the `margins`; 0 without any tokens."""
    return float(margins(scores_TE).sum() / max(len(scores_TE), 1))


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

    It is an estimate from counts: biased up by about (R−1)(E−1)/(2 N ln 2) bits for N independent tokens, and by more
    where the tokens of a sample resemble each other; see `corrected_mutual_information`.
    """
    return _mutual_information(joint_RE, 0.0)


def mutual_information_bias(joint_RE: Tensor, squares_RE: Tensor, samples_R: Tensor) -> float:
    """What the mutual information of counts is too large by [bit], to first order in one over the samples.

        bias = ½ Σ_r P_r Σ_e v_re / p_re − ½ Σ_e (Σ_r P_r² v_re) / p_e     [nat]

    with P_r the share of family r, p_re and p_e the loads within it and over all, and v_re the variance of p_re, taken
    from how much the loads of single samples scatter. For independent tokens and experts that know nothing this is the
    correction of Miller and Madow; it grows where the tokens of a sample resemble each other, up to that of one token
    per sample. Samples are taken as independent: where they are windows of few trajectories some of the bias stays.

    Args:
        joint_RE: tokens of each family that each expert took.
        squares_RE: the same of the squares of what each expert took in each sample.
        samples_R: samples of each family, of one size within a family. A family with one sample only counts as
            independent tokens.

    Reference: Miller 1955 (see Paninski, Neural Computation 15, 2003, eq. 4); variance of clustered samples as in Rao &
    Scott, J. Am. Stat. Assoc. 76, 1981.
    """
    seen_R = samples_R > 0
    joint_RE, squares_RE = joint_RE[seen_R].double(), squares_RE[seen_R].double()
    samples_R1, tokens_R1 = samples_R[seen_R].double()[:, None], joint_RE.sum(1, keepdim=True).clamp(min=1.0)
    p_RE, P_R1 = joint_RE / tokens_R1, tokens_R1 / tokens_R1.sum().clamp(min=1.0)
    scatter_RE = (squares_RE - joint_RE.square() / samples_R1) * samples_R1 / (samples_R1 - 1).clamp(min=1.0)
    v_RE = torch.where(samples_R1 > 1, scatter_RE / tokens_R1.square(), p_RE * (1 - p_RE) / tokens_R1)
    within = (P_R1 * v_RE)[p_RE > 0] / p_RE[p_RE > 0]
    p_E = (P_R1 * p_RE).sum(0)
    over_all = (P_R1.square() * v_RE).sum(0)[p_E > 0] / p_E[p_E > 0]
    return float(within.sum() - over_all.sum()) / (2 * math.log(2.0))


def corrected_mutual_information(joint_RE: Tensor, squares_RE: Tensor, samples_R: Tensor) -> MutualInformation:
    """Mutual information less its bias; about 0 for routing that knows nothing of the family.

    What falls below 0 is called 0, so that the mean of many such estimates stays a little above it.

    Args:
        joint_RE, squares_RE, samples_R: see `mutual_information_bias`.
    """
    return _mutual_information(joint_RE, mutual_information_bias(joint_RE, squares_RE, samples_R))


def _mutual_information(joint_RE: Tensor, bias: float) -> MutualInformation:
    family = entropy(joint_RE.sum(1))
    bits = max(0.0, family + entropy(joint_RE.sum(0)) - entropy(joint_RE) - bias)
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


def routing_series(routing: Tensor | np.ndarray) -> Tensor:
    """Routing maps of one trajectory as int64, ``(time, layer, px, py, pz)``.

    Raises:
        ValueError: another number of axes, or cells that nothing was decided for (−1).
    """
    if routing.ndim != 5:
        raise ValueError(
            f"Expected routing of shape (time, layer, px, py, pz), got {tuple(routing.shape)}; pass one trajectory."
        )
    series = torch.as_tensor(routing).long()
    if series.numel() and int(series.min()) < 0:
        raise ValueError("Expected an expert for every cell, got −1; leave out the frame that a rollout started from.")
    return series


def churn(routing: Tensor | np.ndarray) -> Tensor:
    """Share of the latent cells whose expert is another one than a step before, 0…1.

    0 where routing stands still; 1 − Σ p² where it is drawn anew at every step with the shares p of the experts, and
    even experts then give 1 − 1/E. It grows with the time between steps.

    Args:
        routing: expert of each latent cell at each step, ``(time, layer, px, py, pz)``, as rollouts store it.

    Returns:
        ``(time−1, layer)`` FP64; no rows for a single step.

    Raises:
        ValueError: another number of axes, or cells without an expert.
    """
    series = routing_series(routing)
    return (series[1:] != series[:-1]).double().flatten(2).mean(2)
