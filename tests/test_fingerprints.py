"""Fingerprints are shares; families that differ are told apart, equal ones are not, and unseen ones stand out."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from latentphys.routers.fingerprints import FingerprintClassifier, fingerprint

LOADS = {"channel": [0.6, 0.2, 0.1, 0.1], "porous": [0.3, 0.4, 0.2, 0.1], "mhd": [0.2, 0.2, 0.5, 0.1]}
"""Mean loads of families."""


def trajectories(loads: list[float], n: int, seed: int, concentration: float = 80.0) -> Tensor:
    """Fingerprints of two layers, whose loads scatter around those of the family."""
    shares = np.random.default_rng(seed).dirichlet(concentration * np.array(loads), (n, 2))
    return torch.from_numpy(shares.reshape(n, -1))


def families(n: int, seed: int) -> tuple[Tensor, list[str]]:
    made = [trajectories(loads, n, seed + i) for i, loads in enumerate(LOADS.values())]
    return torch.cat(made), [name for name in LOADS for _ in range(n)]


def hellinger(x: Tensor, y: Tensor) -> float:
    return float(0.5 * (x.sqrt() - y.sqrt()).square().sum()) ** 0.5


def test_a_fingerprint_is_the_share_of_each_expert_in_each_layer() -> None:
    routing = torch.zeros(2, 2, 2, 2, 1, dtype=torch.int16)
    routing[0, 1, 0] = 2
    routing[1, 1] = 1
    found = fingerprint(routing, 3)
    assert found.dtype == torch.float64
    assert found.tolist() == [1.0, 0.0, 0.0, 0.25, 0.5, 0.25]
    assert torch.equal(fingerprint(routing.numpy(), 3), found)


def test_a_fingerprint_needs_a_routed_trajectory() -> None:
    routing = torch.randint(0, 4, (2, 1, 2, 2, 2))
    routing[1, 0, 0, 0, 0] = 3
    with pytest.raises(ValueError, match="Expected experts 0…2, got 3; set num_experts to that of the model"):
        fingerprint(routing, 3)
    with pytest.raises(ValueError, match="leave out the frame that a rollout started from"):
        fingerprint(routing - 4, 4)
    with pytest.raises(ValueError, match=r"Expected routing of shape \(time, layer, px, py, pz\), got \(1, 2, 2, 2\)"):
        fingerprint(routing[0], 4)
    with pytest.raises(ValueError, match="Expected at least one step, layer and latent cell"):
        fingerprint(routing[:0], 4)


def test_families_that_load_differently_are_told_apart() -> None:
    classifier = FingerprintClassifier().fit(*families(12, seed=0))
    held_out, names = families(30, seed=100)
    assert classifier.predict(held_out) == names
    by_number = FingerprintClassifier().fit(families(12, seed=0)[0], np.repeat([3, 1, 2], 12))
    assert by_number.predict(held_out) == np.repeat([3, 1, 2], 30).tolist()


def test_a_narrow_share_counts_in_its_own_scale() -> None:
    """An expert with 0 or 2 % of the tokens tells more than one with 50 ± 4 %, as in their counting noise."""
    known = torch.tensor([[0.5, 0.5, 0.0], [0.52, 0.48, 0.0], [0.5, 0.48, 0.02], [0.48, 0.5, 0.02]])
    classifier = FingerprintClassifier().fit(known, ["never", "never", "rarely", "rarely"])
    assert classifier.predict(torch.tensor([[0.46, 0.54, 0.0], [0.54, 0.44, 0.02]])) == ["never", "rarely"]


def test_cross_validation_finds_known_families_and_reports_chance() -> None:
    shares, names = families(6, seed=3)
    keep = [i for i in range(18) if i not in (0, 1)]
    found = FingerprintClassifier.cross_validated_accuracy(shares[keep], [names[i] for i in keep])
    assert found.accuracy == 1.0
    assert found.chance == 6 / 16 and found.num_samples == 16
    order = torch.randperm(16).tolist()
    mixed = FingerprintClassifier.cross_validated_accuracy(shares[keep][order], [names[keep[i]] for i in order])
    assert mixed == found


def test_a_left_out_fingerprint_is_not_known_to_the_fit() -> None:
    """The odd one out is nearest to its own family only as long as it is a third of it."""
    shares = torch.tensor([[0.9, 0.1], [0.88, 0.12], [0.5, 0.5], [0.2, 0.8], [0.22, 0.78], [0.21, 0.79]])
    names = ["a", "a", "a", "b", "b", "b"]
    assert FingerprintClassifier().fit(shares, names).predict(shares[2:3]) == ["a"]
    assert FingerprintClassifier.cross_validated_accuracy(shares, names).accuracy == 5 / 6


def test_shuffled_labels_are_found_at_chance() -> None:
    """Also with so few trajectories that a plain nearest centroid falls to 0.31, by the pull of what was left out."""
    accuracies = []
    for seed in range(150):
        shares = trajectories([1 / 16] * 16, 6, seed, concentration=400.0)
        accuracies.append(FingerprintClassifier.cross_validated_accuracy(shares, [0, 1] * 3).accuracy)
    assert abs(np.mean(accuracies) - 0.5) < 3 * np.std(accuracies) / math.sqrt(150)


def test_a_small_family_wins_as_often_as_a_large_one_where_they_are_equal() -> None:
    wins = 0
    for seed in range(100):
        shares = trajectories([0.4, 0.3, 0.2, 0.1], 33, seed)
        fitted = FingerprintClassifier().fit(shares[:13], ["large"] * 10 + ["small"] * 3)
        wins += sum(name == "small" for name in fitted.predict(shares[13:]))
    assert 0.42 < wins / 2000 < 0.58


def test_a_new_trajectory_of_a_known_family_is_one_spread_away() -> None:
    squares = []
    for seed in range(40):
        shares, names = families(20, 10 * seed)
        novelty = FingerprintClassifier().fit(shares, names).novelty(families(5, 1000 + 10 * seed)[0])
        assert novelty.dtype == torch.float64 and novelty.shape == (15,)
        squares.append(float(novelty.square().mean()))
    assert np.mean(squares) == pytest.approx(1.0, abs=0.1)


def test_an_unseen_family_is_far_from_all() -> None:
    classifier = FingerprintClassifier().fit(*families(8, seed=0))
    known, unseen = families(20, seed=50)[0], trajectories([0.1, 0.1, 0.1, 0.7], 20, seed=9)
    assert float(classifier.novelty(unseen).min()) > 1.5 * float(classifier.novelty(known).max())


def test_novelty_by_hand() -> None:
    """The nearest family in its own units is b, though a is the nearer one in plain distance."""
    a, b = torch.tensor([[0.3, 0.7], [0.32, 0.68]]).double(), torch.tensor([[0.5, 0.5], [0.9, 0.1]]).double()
    new = torch.tensor([[0.4, 0.6]]).double()
    classifier = FingerprintClassifier().fit(torch.cat([a, b]), ["a", "a", "b", "b"])

    def scaled(own: Tensor) -> float:
        centre = own.sqrt().mean(0).square()
        variance = sum(hellinger(x, centre) ** 2 for x in own)
        return hellinger(new[0], centre) / math.sqrt(1.5 * variance)

    assert scaled(b) < scaled(a)
    assert float(classifier.novelty(new)) == pytest.approx(scaled(b), rel=1e-12)
    assert classifier.predict(new) == ["a"]


def test_novelty_of_families_without_spread() -> None:
    a, b = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.0, 0.5, 0.5])
    still = FingerprintClassifier().fit(torch.stack([a, a, b, b]), [0, 0, 1, 1])
    assert still.novelty(torch.stack([a, (a + b) / 2])).tolist() == [0.0, math.inf]
    near = torch.tensor([0.4, 0.6, 0.0])
    single = FingerprintClassifier().fit(torch.stack([a, near, b]), ["a", "a", "b"])
    pooled = hellinger(a.double(), ((a.double().sqrt() + near.double().sqrt()) / 2).square()) * math.sqrt(2)
    new = torch.tensor([[0.0, 0.6, 0.4]])
    expected = hellinger(new[0].double(), b.double()) / (pooled * math.sqrt(2))
    assert float(single.novelty(new)) == pytest.approx(expected, rel=1e-6)


def test_the_names_of_the_experts_do_not_matter() -> None:
    shares, names = families(5, seed=7)
    new = families(5, seed=70)[0]
    order = torch.randperm(8)
    plain = FingerprintClassifier().fit(shares, names)
    renamed = FingerprintClassifier().fit(shares[:, order], names)
    assert renamed.predict(new[:, order]) == plain.predict(new)
    torch.testing.assert_close(renamed.novelty(new[:, order]), plain.novelty(new), rtol=1e-12, atol=0)


def test_what_no_classifier_can_learn_from_is_refused() -> None:
    shares, names = families(2, seed=0)
    fit = FingerprintClassifier().fit
    with pytest.raises(ValueError, match="Expected one label for each of 6 fingerprints"):
        fit(shares, names[:5])
    with pytest.raises(ValueError, match=r"Expected fingerprints of shape \(n ≥ 1, f\), got \(8,\)"):
        fit(shares[0], names[:1])
    for bad in (-0.1, 1.5, math.nan):
        broken = shares.clone()
        broken[0, 0] = bad
        with pytest.raises(ValueError, match="Expected shares of tokens between 0 and 1"):
            fit(broken, names)
    with pytest.raises(ValueError, match="Expected at least one family with 2 fingerprints or more"):
        fit(shares[::2], names[::2])
    with pytest.raises(ValueError, match="Expected a fitted classifier"):
        FingerprintClassifier().predict(shares)
    with pytest.raises(ValueError, match="Expected fingerprints of 8 shares, got 4"):
        fit(shares, names).predict(shares[:, :4])
    with pytest.raises(ValueError, match=r"at least 2 families .* got \{'channel': 2, 'mhd': 1, 'porous': 2\}"):
        FingerprintClassifier.cross_validated_accuracy(shares[:5], names[:5])
    with pytest.raises(ValueError, match="Expected at least 2 families"):
        FingerprintClassifier.cross_validated_accuracy(shares[:2], names[:2])
