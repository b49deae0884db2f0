"""Closed forms of what telemetry says."""

import math

import numpy as np
import pytest
import torch

from latentphys.routers import RandomRouter, telemetry


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
    assert telemetry.margins(scores).tolist() == pytest.approx([0.5, 0.1])
    assert telemetry.top1_margin(torch.zeros(0, 3)) == 0.0
    with pytest.raises(ValueError, match="Expected scores of at least 2 experts for a margin, got 1"):
        telemetry.top1_margin(torch.ones(3, 1))


def test_samples_are_counted_apart() -> None:
    ids = torch.randint(0, 5, (3 * 40, 2))
    counts = telemetry.sample_counts(ids, 3, 5)
    assert counts.tolist() == [telemetry.expert_counts(ids[40 * b : 40 * (b + 1)], 5).tolist() for b in range(3)]
    with pytest.raises(ValueError, match="Expected 120 tokens to fill whole samples, got num_samples = 7"):
        telemetry.sample_counts(ids, 7, 5)
    with pytest.raises(ValueError, match="got num_samples = 0"):
        telemetry.sample_counts(ids, 0, 5)


def test_dead_ages_count_the_steps_since_the_last_token() -> None:
    ages = torch.zeros(3, dtype=torch.long)
    for counts, expected in [([4, 0, 1], [0, 1, 0]), ([5, 0, 0], [0, 2, 1]), ([0, 1, 0], [1, 0, 2])]:
        ages = telemetry.dead_ages(ages, torch.tensor(counts))
        assert ages.tolist() == expected


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


def moments(*families: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums, squares and number of the samples of each family."""
    counts = [torch.tensor(family) for family in families]
    joint, squares = (torch.stack([(c**power).sum(0) for c in counts]) for power in (1, 2))
    return joint, squares, torch.tensor([len(c) for c in counts])


def test_the_bias_of_independent_tokens_is_that_of_miller_and_madow() -> None:
    """(occupied cells − families − experts + 1) / (2 N ln 2); an expert that nobody asks for changes nothing."""
    expected = (3 * 3 - 3 - 3 + 1) / (2 * 600 * math.log(2))
    assert telemetry.mutual_information_bias(
        *moments([[60, 0, 30, 10]], [[120, 0, 60, 20]], [[180, 0, 90, 30]])
    ) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("tokens", [1, 64])
def test_tokens_that_go_together_count_once(tokens: int) -> None:
    """Whole samples at one expert: the bias of one token per sample, with n − 1 in place of n as scatter has it."""
    a = [[tokens, 0]] * 6 + [[0, tokens]] * 2
    b = [[tokens, 0]] * 3 + [[0, tokens]] * 5
    over_all = sum((6 * 2 + 3 * 5) / 64 / 7 / 4 / share for share in (9 / 16, 7 / 16))
    expected = (1 / 7 - over_all) / (2 * math.log(2))
    assert telemetry.mutual_information_bias(*moments(a, b)) == pytest.approx(expected, rel=1e-12)


def test_the_correction_takes_the_bias_off_and_stops_at_zero() -> None:
    counts = moments([[30, 10], [20, 20], [25, 15]], [[10, 30], [12, 28], [15, 25]])
    plain, bias = telemetry.mutual_information(counts[0]), telemetry.mutual_information_bias(*counts)
    found = telemetry.corrected_mutual_information(*counts)
    assert 0 < bias < plain.bits
    assert found.bits == found.normalised == pytest.approx(plain.bits - bias, abs=1e-12)
    same = [[30, 10], [10, 30]]
    assert telemetry.corrected_mutual_information(*moments(same, same)).bits == 0.0


def test_sure_knowledge_needs_no_correction() -> None:
    counts = moments([[30, 0, 10]] * 4, [[0, 40, 0]] * 4)
    assert telemetry.corrected_mutual_information(*counts).bits == pytest.approx(1.0)
    joint = torch.tensor([[8, 0], [0, 8], [0, 0]])
    found = telemetry.corrected_mutual_information(joint, joint.square(), torch.tensor([1, 1, 0]))
    assert (found.bits, found.normalised) == (1.0, 1.0)
    nothing = torch.zeros(2, 3)
    assert telemetry.corrected_mutual_information(nothing, nothing, torch.zeros(2)).bits == 0.0


def test_the_correction_takes_off_the_bias_of_tokens_that_resemble_each_other() -> None:
    """Samples of two families whose loads scatter much more than independent tokens would; I is known in the limit."""
    generator = np.random.default_rng(0)
    alphas = ([2.0, 1.0, 1.0, 0.5], [1.0, 2.0, 1.0, 0.5])
    shares = torch.tensor(alphas) / 4.5
    exact = telemetry.mutual_information(shares).bits
    plain, corrected = [], []
    for _ in range(300):
        families = [[generator.multinomial(64, p).tolist() for p in generator.dirichlet(a, 40)] for a in alphas]
        counts = moments(*families)
        plain.append(telemetry.mutual_information(counts[0]).bits)
        corrected.append(plain[-1] - telemetry.mutual_information_bias(*counts))
    error = np.std(corrected) / math.sqrt(300)
    assert abs(np.mean(corrected) - exact) < 3 * error
    assert np.mean(plain) - exact > 5 * error


def test_random_routing_knows_nothing_of_the_family() -> None:
    """Two families whose tokens lie far apart; 32 samples of 16 tokens at 8 experts."""
    plain, corrected = [], []
    for seed in range(40):
        router = RandomRouter(16, 8, seed=seed)
        tokens = [torch.randn(16 * 16, 16) + offset for offset in (0.0, 2.0)]
        families = [telemetry.sample_counts(router(t).ids, 16, 8).tolist() for t in tokens]
        counts = moments(*families)
        plain.append(telemetry.mutual_information(counts[0]).bits)
        corrected.append(plain[-1] - telemetry.mutual_information_bias(*counts))
    error = np.std(corrected) / math.sqrt(len(corrected))
    assert abs(np.mean(corrected)) < 3 * error
    assert np.mean(plain) > 10 * error


def test_churn_is_the_share_of_cells_that_change_hands() -> None:
    stripes = (torch.arange(8) // 2 % 2)[:, None, None].expand(8, 3, 2)
    still, moving = stripes.expand(5, 8, 3, 2), torch.stack([stripes.roll(t, 0) for t in range(5)])
    found = telemetry.churn(torch.stack([still, moving], 1))
    assert found.dtype == torch.float64
    assert found.tolist() == [[0.0, 0.5]] * 4
    assert telemetry.churn(moving[::2, None].to(torch.int16).numpy()).tolist() == [[1.0]] * 2
    assert telemetry.churn(still[:1, None]).shape == (0, 1)


def test_churn_of_routing_drawn_anew() -> None:
    p = torch.tensor([0.5, 0.3, 0.2])
    drawn = torch.multinomial(p, 3 * 32**3, replacement=True).reshape(3, 1, 32, 32, 32)
    assert telemetry.churn(drawn).tolist() == [[pytest.approx(1 - float(p.square().sum()), abs=0.01)]] * 2


def test_churn_wants_one_routed_trajectory() -> None:
    with pytest.raises(ValueError, match=r"Expected routing of shape \(time, layer, px, py, pz\), got \(1, 2, 1"):
        telemetry.churn(torch.zeros(1, 2, 1, 2, 2, 2, dtype=torch.long))
    routing = torch.zeros(2, 1, 2, 2, 2, dtype=torch.int16)
    routing[0] = -1
    with pytest.raises(ValueError, match="got −1; leave out the frame that a rollout started from"):
        telemetry.churn(routing)


def test_routing_map_puts_tokens_where_their_cells_are() -> None:
    ids = [torch.arange(2 * 24).reshape(48, 1) + layer for layer in range(3)]
    found = telemetry.routing_map(ids, (2, 3, 4))
    assert found.shape == (2, 3, 2, 3, 4) and found.dtype == torch.int16
    assert found[1, 2, 1, 0, 3] == 24 + 12 + 3 + 2
    with pytest.raises(ValueError, match=r"Expected a multiple of 24 tokens for latents of \(2, 3, 4\), got 47"):
        telemetry.routing_map([layer[:47] for layer in ids], (2, 3, 4))
    with pytest.raises(ValueError, match="at least one layer"):
        telemetry.routing_map([], (2, 3, 4))
