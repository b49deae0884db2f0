"""Any latent of any weights decodes to a solenoidal flux; the code starts from principal components."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import box, random_flux, random_geometry, two_pi_box
from torch import Tensor

from latentphys import operators
from latentphys.autoencoders import (
    Autoencoder,
    FamilyScale,
    PotentialHead,
    ProjectionHead,
    RieszHead,
    VelocityLoss,
    VorticityLoss,
    WeightedSum,
)
from latentphys.autoencoders.layers import space_to_depth
from latentphys.grid import Geometry, Grid

HEADS = {"projection": ProjectionHead, "riesz": RieszHead, "potential": PotentialHead}
SHAPE = (8, 12, 4)
CHANNEL = box("channel", SHAPE)
POROUS = box("periodic", SHAPE)


def channel_scale() -> FamilyScale:
    profile = torch.zeros(3, 1, 1, SHAPE[2], dtype=torch.float64)
    profile[0] = torch.linspace(1, 9, SHAPE[2])
    return FamilyScale(CHANNEL, profile, 0.7)


SCALES = {
    "channel": channel_scale(),
    "porous": FamilyScale(POROUS, torch.tensor([0.3, -0.2, 0.1]).double().reshape(3, 1, 1, 1), 2.5),
}


@lru_cache
def geometry(family: str) -> Geometry:
    torch.manual_seed(3)
    return Geometry(CHANNEL) if family == "channel" else random_geometry(POROUS, fraction=0.3)


def small(
    head: str = "projection", latent_noise: float = 0.0, weights: int | None = 0, tol: float = 1e-6
) -> Autoencoder:
    """An autoencoder of 4³ patches, with all its weights random, those that start at zero too."""
    model = Autoencoder(SCALES, 6, [8, 16], [1, 1], head=HEADS[head](tol), latent_noise=latent_noise)
    if weights is not None:
        generator = torch.Generator().manual_seed(weights)
        for parameter in model.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def latents(batch: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(batch, 6, 2, 3, 1, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", SCALES)
@given(seed=st.integers(0, 2**32), weights=st.integers(0, 2**32), size=st.sampled_from([1e-6, 1.0, 1e6]))
def test_any_latent_of_any_weights_decodes_to_a_solenoidal_flux(
    head: str, family: str, seed: int, weights: int, size: float
) -> None:
    where, model = geometry(family), small(head, weights=weights)
    z = size * latents(2, seed)
    with torch.no_grad():
        approximate, exactly = (model.decode(z, where, family, exact=exact) for exact in (False, True))
    assert exactly.dtype == torch.float64 and approximate.dtype == torch.float32
    assert (operators.div(exactly, where.grid) == 0.0).all()
    assert (exactly[(~where.open_faces).expand_as(exactly)] == 0.0).all()
    assert exactly.abs().max() > 0
    assert (approximate[(~where.open_faces).expand_as(approximate)] == 0.0).all()
    scale = approximate.square().sum((-4, -3, -2, -1)).sqrt()
    net = operators.div(approximate.double(), where.grid).square().sum((-3, -2, -1)).sqrt()
    assert (net <= 3e-5 * scale).all()
    assert ((exactly - approximate).square().sum((-4, -3, -2, -1)).sqrt() <= 1e-4 * scale).all()


@pytest.mark.parametrize("head", HEADS)
def test_bfloat16_training_stays_solenoidal(head: str) -> None:
    model = small(head)
    for family in SCALES:
        with torch.autocast("cpu", torch.bfloat16):
            flux = model.decode(latents(1), geometry(family), family)
        net = operators.div(flux.detach().double(), geometry(family).grid)
        assert flux.dtype == torch.float32
        assert net.norm() < 1e-4 * flux.norm()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", SCALES)
def test_gradients_reach_every_parameter_through_the_projection(head: str, family: str) -> None:
    model = Autoencoder(SCALES, 6, [8, 16], [1, 1], head=HEADS[head](1e-3))
    where = geometry(family)
    target = random_flux(where.grid, 2, dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for _ in range(3):  # a layer that starts at zero hides what lies before it until it has moved, one layer a step
        optimizer.zero_grad()
        VelocityLoss()(model(target, where, family), target, where, SCALES[family]).backward()
        optimizer.step()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0}
    assert not without
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_patches_are_reconstructed_up_to_the_variance_that_the_code_leaves_out() -> None:
    model = small(weights=None)
    flux = {f: random_flux(s.grid, 5).cumsum(-1) * torch.rand(3, 1, 1, 1).double() for f, s in SCALES.items()}
    model.fit_patches({family: (SCALES[family].grid, x) for family, x in flux.items()})
    rows = []
    for family, x in flux.items():
        u = SCALES[family].normalise(x, SCALES[family].grid)
        blocks = u.numpy().reshape(5, 3, 2, 4, 3, 4, 1, 4).transpose(0, 2, 4, 6, 1, 3, 5, 7)
        rows.append(blocks.reshape(-1, 3 * 64))
    moment = sum(r.T @ r / len(r) for r in rows) / 2
    left_out = np.sort(np.linalg.eigvalsh(moment))[:-6].sum()
    error = 0.0
    for family, x in flux.items():
        patches = space_to_depth(SCALES[family].normalise(x, SCALES[family].grid).float(), 4)
        code = model.encoder.linear(patches)
        error += (model.decoder.linear(code) - patches).square().sum(1).mean().item() / 2
    assert error == pytest.approx(left_out, rel=1e-4)
    codes = torch.cat([torch.from_numpy(r).float() @ model.encoder.linear.weight[:, :, 0, 0, 0].T for r in rows])
    torch.testing.assert_close(codes.square().mean(0), torch.ones(6), rtol=1e-3, atol=0.0)
    with pytest.raises(ValueError, match="finite fluxes of family 'channel', got NaN"):
        model.fit_patches({"channel": (CHANNEL, random_flux(CHANNEL, 2) * torch.nan)})


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("family", "shift"), [("channel", (4, 8, 0)), ("porous", (4, 4, 0))])
def test_rolling_by_whole_patches_rolls_latent_and_flux(head: str, family: str, shift: tuple[int, int, int]) -> None:
    model, where, axes = small(head), geometry(family), (-3, -2, -1)
    rolled = Geometry(where.grid, None if where.solid is None else where.solid.roll(shift, axes))
    flux = random_flux(where.grid, 1)
    with torch.no_grad():
        z, z_rolled = model.encode(flux, where, family), model.encode(flux.roll(shift, axes), rolled, family)
        torch.testing.assert_close(z_rolled, z.roll([s // 4 for s in shift], axes), rtol=1e-4, atol=1e-4)
        out, out_rolled = (model.decode(x, g, family) for x, g in ((z, where), (z_rolled, rolled)))
    torch.testing.assert_close(out_rolled, out.roll(shift, axes), rtol=1e-3, atol=1e-3 * float(out.abs().max()))
    assert not torch.allclose(out_rolled, out, rtol=1e-2, atol=1e-2 * float(out.abs().max()))


@pytest.mark.parametrize("family", SCALES)
def test_normalising_and_back_is_the_identity(family: str) -> None:
    scale, flux = SCALES[family], random_flux(SCALES[family].grid, 2)
    torch.testing.assert_close(scale.denormalise(scale.normalise(flux, scale.grid), scale.grid), flux)
    copy = FamilyScale.from_dict(scale.to_dict())
    assert torch.equal(copy.normalise(flux, scale.grid), scale.normalise(flux, scale.grid))
    divergence = operators.div(flux - scale.profile, scale.grid)
    u = scale.normalise(flux, scale.grid)
    torch.testing.assert_close(operators.div(operators.flux_of(u, scale.grid), scale.grid) * scale.velocity, divergence)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (box("periodic", SHAPE), "the boundaries this model knows"),
        (
            box("channel", SHAPE, (0.7, 1.3, 0.5)),
            r"the spacing this model knows, \(0.7, 1.3, 0.4\) m, got \(0.7, 1.3, 0.5\)",
        ),
        (box("channel", (8, 12, 8)), r"the grid of this model's mean profile, \(8, 12, 4\), got \(8, 12, 8\)"),
    ],
)
def test_another_box_than_that_of_the_training_is_refused(grid: Grid, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small().encode(random_flux(grid, 1), Geometry(grid), "channel")


def test_a_larger_box_of_the_same_cells_is_taken() -> None:
    grid = box("channel", (16, 4, 4))
    flux = random_flux(grid, 1)
    assert small().encode(flux, Geometry(grid), "channel").shape == (1, 6, 4, 1, 1)


def test_what_does_not_fit_is_refused(unchecked: None) -> None:
    odd = box("channel", (6, 12, 4))
    with pytest.raises(
        ValueError, match=r"divisible by the compression of 4 per axis, got \(6, 12, 4\); choose multiples of 4"
    ):
        small().encode(random_flux(odd, 1), Geometry(odd), "channel")
    for wrong in (torch.zeros(1, 5, 2, 3, 1), torch.zeros(1, 6, 2, 3, 2)):
        with pytest.raises(ValueError, match=r"latents of shape \(b, 6, 2, 3, 1\), got \(1, "):
            small().decode(wrong, geometry("channel"), "channel")
    with pytest.raises(ValueError, match=r"a family of \['channel', 'porous'\], got 'pipe'"):
        small().decode(latents(1), geometry("channel"), "pipe")
    with pytest.raises(ValueError, match="positive velocity scale .* got 0.0; is the flow at rest"):
        FamilyScale(CHANNEL, torch.zeros(3, 1, 1, 1), 0.0)


@pytest.mark.parametrize(
    ("channels", "widths", "blocks", "options", "message"),
    [
        (6, [8], [1, 1], {}, "as many widths as num_blocks"),
        (6, [], [], {}, "as many widths as num_blocks"),
        (6, [8, 12], [1, 1], {}, "widths that are multiples of 8"),
        (193, [8, 16], [1, 1], {}, "latent_channels from 1 to 192, the numbers in a patch of 4³ cells, got 193"),
        (0, [8, 16], [1, 1], {}, "latent_channels from 1"),
        (6, [8, 16], [1, 1], {"stem": 0}, "stem ≥ 1"),
        (6, [8, 16], [1, 1], {"latent_noise": -0.1}, "latent_noise ≥ 0"),
    ],
)
def test_sizes_that_no_autoencoder_has_are_refused(
    channels: int, widths: Sequence[int], blocks: Sequence[int], options: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Autoencoder(SCALES, channels, widths, blocks, **options)  # type: ignore[arg-type]


def test_latent_noise_acts_in_training_only() -> None:
    model, where, flux = small(latent_noise=0.1), geometry("channel"), random_flux(CHANNEL, 1)
    with torch.no_grad():
        assert not torch.equal(model(flux, where, "channel"), model(flux, where, "channel"))
        assert torch.equal(model.encode(flux, where, "channel"), model.encode(flux, where, "channel"))
        model.eval()
        plain = model.decode(model.encode(flux, where, "channel"), where, "channel")
        assert torch.equal(model(flux, where, "channel"), plain)


def test_velocity_loss_is_one_for_the_mean_of_the_family() -> None:
    grid, scale = CHANNEL, SCALES["channel"]
    where = Geometry(grid)
    flux = scale.denormalise(where.mask(random_flux(grid, 3)), grid)
    fluctuation = (scale.normalise(flux, grid) * scale.velocity)[where.open_faces.expand_as(flux)]
    fitted = FamilyScale(grid, scale.profile, float(fluctuation.square().mean().sqrt()))
    mean = scale.profile.expand_as(flux)
    assert VelocityLoss()(flux, flux, where, fitted) == 0.0
    one = [VelocityLoss()(m[None], f[None], where, fitted).square().item() for m, f in zip(mean, flux, strict=True)]
    assert np.mean(one) == pytest.approx(1.0)


@pytest.mark.parametrize("loss", [VelocityLoss(), VorticityLoss()])
def test_losses_have_a_gradient_at_zero_error(loss: VelocityLoss | VorticityLoss) -> None:
    flux = random_flux(CHANNEL, 2).requires_grad_()
    loss(flux, flux.detach(), Geometry(CHANNEL), SCALES["channel"]).backward()
    assert flux.grad is not None and bool((flux.grad == 0.0).all())


def test_velocity_loss_counts_open_faces_only() -> None:
    where, scale = geometry("porous"), SCALES["porous"]
    target = torch.zeros(1, 3, *SHAPE).double()
    off = where.mask(operators.flux_of(torch.full_like(target, 0.5), where.grid))
    assert VelocityLoss()(off, target, where, scale).item() == pytest.approx(0.5 / scale.velocity)


@pytest.mark.parametrize("k", [1, 2])
def test_vorticity_loss_of_one_mode_is_its_wavenumber(k: int) -> None:
    """u = a sin(k y) e_x has vorticity of RMS a k/√2, with k̃ = 2 sin(k h/2)/h on the grid, in one of 3 components."""
    grid = two_pi_box((4, 8, 4))
    y, h, a = (torch.arange(8) + 0.5) * grid.spacing[1], min(grid.spacing), 0.8
    u = torch.zeros(1, 3, *grid.shape).double()
    u[:, 0] = a * (k * y.double()).sin()[:, None]
    flux, scale = operators.flux_of(u, grid), FamilyScale(grid, torch.zeros(3, 1, 1, 1), 2.0)
    wavenumber = 2 * np.sin(k * h / 2) / h
    expected = a * wavenumber * h / 2.0 / np.sqrt(6)
    where = Geometry(grid)
    assert VorticityLoss()(flux, torch.zeros_like(flux), where, scale).item() == pytest.approx(expected)
    assert VelocityLoss()(flux, 0 * flux, where, scale).item() * wavenumber * h == pytest.approx(expected)


def test_weighted_sum_adds_and_names_its_parts() -> None:
    where, scale = geometry("channel"), SCALES["channel"]
    a, b = random_flux(CHANNEL, 2), random_flux(CHANNEL, 2)
    both = WeightedSum({"u": VelocityLoss(), "w": VorticityLoss()}, {"u": 2.0, "w": 0.5})
    total, parts = both(a, b, where, scale)
    assert total == 2 * VelocityLoss()(a, b, where, scale) + 0.5 * VorticityLoss()(a, b, where, scale)
    assert set(parts) == {"u", "w"}
    with pytest.raises(ValueError, match=r"a weight for each loss \['u'\], got weights for \['v'\]"):
        WeightedSum({"u": VelocityLoss()}, {"v": 1.0})
