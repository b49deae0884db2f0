"""Orders as pure functions of a seed: shuffles, and stores that take turns as often as their weights say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

MOST_TURNS = 10_000


class Turns:
    """Which store is whose turn, at any step.

    Weights become whole numbers of turns in a round, which come about evenly: the j-th turn of a store with c turns of
    N is at (j + u) N/c, with u from 0 to 1 at random, and the turns are taken in the order of these times. After every
    round each store has had its share exactly, and at no time is it more than a few turns ahead or behind.

    Args:
        weights: how often each store comes, relative to one another; 0 for never. Weights that are no ratios of whole
            numbers with a sum of at most 10,000 are rounded to such, and to at least one turn.

    Attributes:
        counts: turns of each store in a round.

    Raises:
        ValueError: weights that are negative, not finite, no numbers, or all 0.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        numbers = [w for w in weights if isinstance(w, int | float) and not isinstance(w, bool)]
        if len(numbers) < len(weights) or any(not (math.isfinite(w) and w >= 0) for w in numbers):
            raise ValueError(f"Expected weights that are finite numbers ≥ 0, got {list(weights)}.")
        if not any(numbers):
            raise ValueError(f"Expected at least one weight above 0, got {list(weights)}.")
        self.counts = _whole_numbers(np.array(numbers, dtype=np.float64))

    def at(self, step: int, seed: int) -> tuple[int, int]:
        """The store of a step, and how many turns it has had before."""
        round_, turn = divmod(step, sum(self.counts))
        order, before = _round(self.counts, seed, round_)
        store = int(order[turn])
        return store, round_ * self.counts[store] + int(before[turn])


def _whole_numbers(weights: np.ndarray) -> tuple[int, ...]:
    """The smallest whole numbers in the ratio of the weights, or near it where their sum would be too large."""
    share = weights / weights.max()
    share = share / share.sum()
    for total in range(1, MOST_TURNS + 1):
        counts = np.rint(total * share)
        if np.abs(total * share - counts).max() <= 1e-9 * total and ((counts > 0) == (weights > 0)).all():
            return tuple(int(count) for count in counts)
    return tuple(int(count) for count in np.where(weights > 0, np.maximum(np.rint(MOST_TURNS * share), 1), 0))


@lru_cache(maxsize=64)
def _round(counts: tuple[int, ...], seed: int, round_: int) -> tuple[np.ndarray, np.ndarray]:
    """The stores of a round in their order, and how many turns each of them has had in it before."""
    turns = np.concatenate([np.arange(count) for count in counts])
    stores = np.repeat(np.arange(len(counts)), counts)
    times = (turns + np.random.default_rng((seed, 0, round_)).random(len(turns))) / np.repeat(counts, counts)
    order = np.argsort(times, kind="stable")
    return stores[order], turns[order]


@lru_cache(maxsize=64)
def permutation(n: int, *seed: int) -> np.ndarray:
    """A shuffled range(n), int64; a function of its arguments only."""
    order = np.random.default_rng(seed).permutation(n)
    order.setflags(write=False)
    return order
