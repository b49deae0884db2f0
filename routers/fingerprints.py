"""Routing fingerprints: how a trajectory loads the experts, and whether that tells which family it is of.

Shape suffixes: n trajectories, f = layers · experts shares, R families.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from latentphys.routers.telemetry import expert_counts, routing_series

Labels = Sequence[str] | Sequence[int] | np.ndarray | Tensor
"""One family per trajectory, by name or number."""


def fingerprint(routing: Tensor | np.ndarray, num_experts: int) -> Tensor:
    """Share of the tokens that each expert of each layer took over one trajectory.

    Args:
        routing: expert of each latent cell at each step, ``(time, layer, px, py, pz)``, as rollouts store it.
        num_experts: experts E per layer.

    Returns:
        ``(layer·E,)`` FP64, layer after layer; the shares of each layer sum to 1.

    Raises:
        ValueError: another number of axes, nothing routed, or experts outside 0…E−1.

    Reference: MoE-POT, arXiv 2510.25803.
    """
    series = routing_series(routing)
    if not series.numel():
        raise ValueError(f"Expected at least one step, layer and latent cell, got {tuple(series.shape)}.")
    if int(series.max()) >= num_experts:
        raise ValueError(
            f"Expected experts 0…{num_experts - 1}, got {int(series.max())}; set num_experts to that of the model."
        )
    layers = series.movedim(1, 0).flatten(1)
    counts = torch.stack([expert_counts(ids[:, None], num_experts) for ids in layers])
    return (counts.double() / layers.shape[1]).flatten()


@dataclass(frozen=True)
class CrossValidation:
    """How well families are told from fingerprints that the classifier was not fitted to.

    Args:
        accuracy: share of trajectories whose family was found with that trajectory left out. Its standard error is at
            least √(a (1 − a) / n): ten trajectories all found are still compatible with a true 0.75.
        chance: share of the largest family, which is what always naming it reaches.
        num_samples: trajectories n.
    """

    accuracy: float
    chance: float
    num_samples: int


class FingerprintClassifier:
    """Nearest centroid in Hellinger distance: the family whose mean fingerprint is nearest.

        d²(x, y) = ½ Σ (√x − √y)²,    family = argmin_r d²(x, m_r) − σ² / n_r

    with m_r the mean of √x over the n_r fingerprints of family r, and σ² the pooled variance. Roots of shares have the
    same counting noise whatever the share, so that rare experts count as they should. The mean of few fingerprints
    lies d² = σ²/n_r off the true one; taking that off keeps small families from losing, and leave-one-out from falling
    below chance where there is nothing to tell. There is nothing to tune, so that few trajectories suffice.
    """

    def fit(self, fingerprints_nf: Tensor, labels: Labels) -> FingerprintClassifier:
        """Learn the families.

        Args:
            fingerprints_nf: of known trajectories, ``(n, f)``.
            labels: their families.

        Raises:
            ValueError: shares that are none, not one label per fingerprint, or no family with two fingerprints, whose
                spread would say what is near.
        """
        roots_nf = _roots(fingerprints_nf)
        names, member_n = _families(labels, len(roots_nf))
        self._names = names
        centroids, squares, sizes = [], [], []
        for family in range(len(names)):
            own_nf = roots_nf[member_n == family]
            centroids.append(own_nf.mean(0))
            squares.append((own_nf - own_nf.mean(0)).square().sum())
            sizes.append(len(own_nf))
        self._centroids_Rf, self._sizes_R = torch.stack(centroids), torch.tensor(sizes, dtype=torch.float64)
        free_R, squares_R = self._sizes_R - 1, torch.stack(squares)
        if free_R.sum() < 1:
            raise ValueError("Expected at least one family with 2 fingerprints or more, got one of each; add more.")
        self._variance = squares_R.sum() / free_R.sum()
        self._variances_R = torch.where(free_R > 0, squares_R / free_R.clamp(min=1), self._variance)
        return self

    def predict(self, fingerprints_nf: Tensor) -> list[str] | list[int]:
        """The nearest family of each fingerprint; the first in order of their labels where two are equally near."""
        squares_nR = self._squares(fingerprints_nf) - self._variance / self._sizes_R
        return [self._names[i] for i in squares_nR.argmin(1).tolist()]

    def novelty(self, fingerprints_nf: Tensor) -> Tensor:
        """Distance from the families in units of their spread, of the family for which it is smallest, ``(n,)`` FP64.

            min_r d(x, m_r) / (σ_r √(1 + 1/n_r))

        A new trajectory of a known family has a mean square of 1 or less, and one of an unseen family is far above. σ_r
        is measured with n_r − 1 degrees of freedom, so that members of a family of two or three reach 4 and more by
        chance: take what held-out trajectories of known families reach as threshold. A family with one fingerprint
        takes the pooled spread. Where a family has no spread at all the distance is 0 or infinite.
        """
        squares_nR = self._squares(fingerprints_nf)
        scaled_nR = squares_nR / (self._variances_R * (1 + 1 / self._sizes_R))
        return torch.where(squares_nR > 0, scaled_nR, 0.0).min(1).values.sqrt()

    @staticmethod
    def cross_validated_accuracy(fingerprints_nf: Tensor, labels: Labels) -> CrossValidation:
        """Leave one trajectory out, fit to the others, and name its family; all n times. No random numbers.

        Raises:
            ValueError: what `fit` refuses, fewer than two families, or a family with one fingerprint only, which would
                be unknown when that is left out.
        """
        names, member_n = _families(labels, len(fingerprints_nf))
        sizes_R = torch.bincount(member_n)
        if len(sizes_R) < 2 or int(sizes_R.min()) < 2:
            raise ValueError(
                "Expected at least 2 families with at least 2 fingerprints each, "
                f"got {dict(zip(names, sizes_R.tolist(), strict=True))}."
            )
        hits, all_n = 0, torch.arange(len(member_n))
        for i in range(len(member_n)):
            rest = all_n != i
            fitted = FingerprintClassifier().fit(fingerprints_nf[rest], member_n[rest])
            hits += fitted.predict(fingerprints_nf[i : i + 1]) == [int(member_n[i])]
        n = len(member_n)
        return CrossValidation(accuracy=hits / n, chance=int(sizes_R.max()) / n, num_samples=n)

    def _squares(self, fingerprints_nf: Tensor) -> Tensor:
        """Squared distance from every centroid, ``(n, R)``."""
        if not hasattr(self, "_names"):
            raise ValueError("Expected a fitted classifier, got one that has seen nothing; call fit first.")
        roots_nf = _roots(fingerprints_nf)
        if roots_nf.shape[1] != self._centroids_Rf.shape[1]:
            raise ValueError(
                f"Expected fingerprints of {self._centroids_Rf.shape[1]} shares, got {roots_nf.shape[1]}; "
                "compare trajectories of one model."
            )
        return (roots_nf[:, None] - self._centroids_Rf).square().sum(-1)


def _roots(fingerprints_nf: Tensor) -> Tensor:
    """√(x/2), between which the plain distance is the Hellinger distance."""
    if fingerprints_nf.ndim != 2 or not len(fingerprints_nf):
        raise ValueError(f"Expected fingerprints of shape (n ≥ 1, f), got {tuple(fingerprints_nf.shape)}.")
    shares_nf = fingerprints_nf.double()
    if not bool(((shares_nf >= 0) & (shares_nf <= 1)).all()):
        raise ValueError("Expected shares of tokens between 0 and 1, got others; see `fingerprint`.")
    return (shares_nf / 2).sqrt()


def _families(labels: Labels, n: int) -> tuple[list, Tensor]:
    """The families in order, and which one each label is."""
    names, member_n = np.unique(np.asarray(labels), return_inverse=True)
    if member_n.shape != (n,):
        raise ValueError(f"Expected one label for each of {n} fingerprints, got {member_n.shape}.")
    return names.tolist(), torch.from_numpy(member_n)
