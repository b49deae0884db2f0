"""Latents are bounded, and the noise on them is the share of each channel that it is said to be, whatever its size."""

import math

import pytest
import torch
from torch import Tensor

from latentphys.autoencoders.bottleneck import SATURATION, Bottleneck

SIZES = torch.tensor([0.01, 1.0, 4.0]).reshape(1, 3, 1, 1, 1)


def latents(batch: int = 4) -> Tensor:
    """Channels of different sizes."""
    return SIZES * torch.randn(batch, 3, 12, 10, 9)


def test_latents_are_bounded_and_small_ones_left_as_they_are() -> None:
    bottleneck, z = Bottleneck(), torch.tensor([1e-3, 10.0, -1e4]).reshape(1, 3, 1, 1, 1)
    expected = torch.tensor([1e-3, 10 / 2**0.25, -10.0]).reshape(1, 3, 1, 1, 1)
    torch.testing.assert_close(bottleneck(z), expected, rtol=1e-6, atol=0.0)
    assert Bottleneck(bound=2.0)(z).abs().max() == 2.0 and bottleneck.bound == SATURATION
    assert torch.equal(Bottleneck(bound=math.inf)(z), z)
    assert bottleneck.admit(z).flatten().tolist() == pytest.approx([1e-3, 10.0, -10.0])
    assert bottleneck(1e5 * z).isfinite().all()


def test_latents_are_fp32_under_autocast() -> None:
    """16 bits tell 20 from 19.9 by a single step; saturated in them, large latents become one."""
    z = torch.linspace(40, 80, 6).reshape(1, 6, 1, 1, 1).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        latent = Bottleneck()(z)
        noisy, deviation = Bottleneck(noise=0.1).disturb(latent)
    assert {latent.dtype, noisy.dtype} == {torch.float32} and deviation is not None and deviation.dtype == torch.float32
    assert torch.equal(latent, Bottleneck()(z.float())) and len(latent.unique()) == 6


@pytest.mark.parametrize("factor", [1e-4, 1.0, 10.0])
def test_noise_is_a_share_of_every_channel_however_large_it_is(factor: float) -> None:
    bottleneck, z = Bottleneck(noise=0.02), factor * latents()
    noisy, deviation = bottleneck.disturb(z)
    assert deviation is not None and deviation.shape == (3, 1, 1, 1)
    size = z.square().mean((0, 2, 3, 4)).sqrt()
    torch.testing.assert_close(deviation.flatten(), 0.02 * size)
    torch.testing.assert_close(
        (noisy - z).square().mean((0, 2, 3, 4)).sqrt() / size, torch.full((3,), 0.02), rtol=0.05, atol=0
    )
    unit = (noisy - z) / deviation
    assert unit.mean().abs() < 0.05 and unit.flatten(2).transpose(0, 1).flatten(1).corrcoef().triu(1).abs().max() < 0.05


def test_the_encoder_gains_nothing_by_larger_latents() -> None:
    """Of what the decoder sees in units of the channel, no gradient points along the latent's size."""
    z = latents().double().requires_grad_()
    noisy, _ = Bottleneck(noise=0.5).disturb(z)
    target, size = torch.randn_like(z), z.detach().square().mean((0, 2, 3, 4), keepdim=True).sqrt()
    loss = (noisy / noisy.square().mean((0, 2, 3, 4), keepdim=True).sqrt() - target).square().mean()
    (gradient,) = torch.autograd.grad(loss, z)
    along = (gradient * z).sum((0, 2, 3, 4)).detach().abs()
    across = ((gradient * size).square().sum((0, 2, 3, 4)) * z.detach()[:, 0].numel()).sqrt()
    assert (across > 0).all() and (along < 1e-10 * across).all()


def test_a_dead_channel_has_a_finite_gradient() -> None:
    z = torch.zeros(2, 3, 4, 4, 4, requires_grad=True)
    noisy, deviation = Bottleneck(noise=0.1).disturb(z)
    noisy.square().sum().backward()
    assert deviation is not None and bool((deviation == 0).all()) and torch.equal(noisy, z)
    assert z.grad is not None and bool((z.grad == 0).all())


@pytest.mark.parametrize("learned", [False, True])
def test_noise_acts_in_training_only_and_is_told_of_always(learned: bool) -> None:
    bottleneck, z = Bottleneck(3, noise=0.1, learned=learned), latents(1)
    noisy, deviation = bottleneck.disturb(z)
    assert not torch.equal(noisy, z) and not torch.equal(noisy, bottleneck.disturb(z)[0])
    bottleneck.eval()
    before = torch.get_rng_state()
    still, told = bottleneck.disturb(z)
    assert torch.equal(still, z) and torch.equal(torch.get_rng_state(), before)
    assert deviation is not None and told is not None and torch.equal(told, deviation)
    untouched, none = Bottleneck().disturb(z)
    assert untouched is z and none is None and torch.equal(torch.get_rng_state(), before)


def test_learned_noise_starts_where_it_is_told_to_and_has_a_gradient_per_channel() -> None:
    bottleneck = Bottleneck(3, noise=0.3, learned=True)
    noisy, deviation = bottleneck.disturb(latents())
    assert deviation is not None and bottleneck.log_deviation is not None
    torch.testing.assert_close(deviation.flatten(), torch.full((3,), 0.3))
    noisy.square().mean().backward()
    assert bottleneck.log_deviation.grad is not None and bool((bottleneck.log_deviation.grad != 0).all())
    assert not list(Bottleneck(3, noise=0.3).parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bound": 0.0}, "a positive bound of the latents, got 0.0; math.inf is none"),
        ({"bound": math.nan}, "a positive bound of the latents, got nan"),
        ({"noise": -0.1}, "finite latent noise ≥ 0, got -0.1"),
        ({"noise": math.inf}, "finite latent noise ≥ 0, got inf"),
        ({"noise": 0.1, "learned": True}, "number of channels and a positive noise .* channels = None and noise = 0.1"),
        ({"channels": 3, "learned": True}, "a positive noise to start from .* channels = 3 and noise = 0.0"),
    ],
)
def test_bottlenecks_that_cannot_be_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Bottleneck(**options)  # type: ignore[arg-type]


def test_latents_of_other_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="latents of 4 channels, got 3"):
        Bottleneck(4)(latents())
