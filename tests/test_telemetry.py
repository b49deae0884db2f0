"""Closed forms of what telemetry says."""

import math

import pytest
import torch

from latentphys.routers import telemetry


def test_counts_and_shares() -> None:
    ids = torch.tensor([[0], [2], [2], [2]])
    counts = telemetry.expert_counts(ids, 4)
    assert counts.tolist() == [1, 0, 3, 0]
    assert telemetry.load(counts).tolist() == [0.25, 0.0, 0.75, 0.0]
    assert telemetry.dead_experts(counts) == [1, 3]
    assert telemetry.load(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]


def test_every_choice_of_a_token_counts() -> None:
    assert telemetry.expert_counts(torch.tensor([[0, 1], [1, 2]]), 3).tolist() == [1, 2, 1]


@pytest.mark.parametrize(("counts", "bits"), [([5, 5, 5, 5], 2.0), ([7, 0, 0], 0.0), ([0, 0], 0.0), ([1, 1, 2], 1.5)])
def test_entropy(counts: list[int], bits: float) -> None:
    assert telemetry.entropy(torch.tensor(counts)) == pytest.approx(bits, abs=1e-12)


def test_margin() -> None:
    scores = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.5, 0.4]])
    assert telemetry.top1_margin(scores) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="Expected scores of at least 2 experts for a margin, got 1"):
        telemetry.top1_margin(torch.ones(3, 1))


def test_joint_counts_separate_the_families() -> None:
    joint = telemetry.joint_counts(torch.tensor([[0], [1], [1], [2]]), torch.tensor([0, 0, 1, 1]), 3, 2)
    assert joint.tolist() == [[1, 1, 0], [0, 1, 1]]
    with pytest.raises(ValueError, match="Expected one family for each of 4 tokens"):
        telemetry.joint_counts(torch.zeros(4, 1, dtype=torch.long), torch.zeros(2), 3, 2)


@pytest.mark.parametrize(
    ("joint", "bits", "normalised", "purity"),
    [
        ([[50, 0], [0, 50]], 1.0, 1.0, 1.0),
        ([[25, 25, 0, 0], [0, 0, 10, 40]], 1.0, 1.0, 1.0),
        ([[30, 10], [30, 10]], 0.0, 0.0, 0.5),
        ([[30, 10], [15, 5]], 0.0, 0.0, 2 / 3),
        ([[8, 0], [0, 0]], 0.0, 0.0, 1.0),
        ([[10, 0, 0, 0], [0, 10, 0, 0], [0, 0, 10, 0], [0, 0, 0, 10]], 2.0, 1.0, 1.0),
    ],
)
def test_mutual_information_and_purity(joint: list[list[int]], bits: float, normalised: float, purity: float) -> None:
    counts = torch.tensor(joint)
    found = telemetry.mutual_information(counts)
    assert found.bits == pytest.approx(bits, abs=1e-12)
    assert found.normalised == pytest.approx(normalised, abs=1e-12)
    assert telemetry.domain_purity(counts) == pytest.approx(purity)


def test_mutual_information_of_a_noisy_split() -> None:
    """A binary symmetric channel with error rate e carries 1 − H₂(e) bits."""
    e = 0.1
    expected = 1 + e * math.log2(e) + (1 - e) * math.log2(1 - e)
    assert telemetry.mutual_information(torch.tensor([[90, 10], [10, 90]])).bits == pytest.approx(expected, abs=1e-12)


def test_routing_map_puts_tokens_where_their_cells_are() -> None:
    ids = [torch.arange(2 * 24).reshape(48, 1) + layer for layer in range(3)]
    found = telemetry.routing_map(ids, (2, 3, 4))
    assert found.shape == (2, 3, 2, 3, 4) and found.dtype == torch.int16
    assert found[1, 2, 1, 0, 3] == 24 + 12 + 3 + 2
    with pytest.raises(ValueError, match=r"Expected a multiple of 24 tokens for latents of \(2, 3, 4\), got 47"):
        telemetry.routing_map([layer[:47] for layer in ids], (2, 3, 4))
    with pytest.raises(ValueError, match="at least one layer"):
        telemetry.routing_map([], (2, 3, 4))
