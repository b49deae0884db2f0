"""Any latent of any weights decodes to a solenoidal flux; the code starts from principal components."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import box, random_flux, random_geometry, two_pi_box, velocity_scale
from torch import Tensor

from latentphys import operators
from latentphys.autoencoders import (
    Autoencoder,
    Bottleneck,
    FamilyScale,
    FieldLoss,
    FieldScale,
    Heads,
    PotentialHead,
    ProjectionHead,
    RieszHead,
    fit_linear_code,
)
from latentphys.autoencoders.layers import space_to_depth
from latentphys.grid import Geometry, Grid

HEADS = {"projection": ProjectionHead, "riesz": RieszHead, "potential": PotentialHead}
SHAPE = (8, 12, 4)
CHANNEL = box("channel", SHAPE)
TYPE = "velocity_flux_solenoidal"
POROUS = box("periodic", SHAPE)


def channel_scale() -> FamilyScale:
    profile = torch.zeros(3, 1, 1, SHAPE[2], dtype=torch.float64)
    profile[0] = torch.linspace(1, 9, SHAPE[2])
    return FamilyScale(FieldScale(CHANNEL, profile, 0.7))


SCALES = {
    "channel": channel_scale(),
    "porous": FamilyScale(FieldScale(POROUS, torch.tensor([0.3, -0.2, 0.1]).double().reshape(3, 1, 1, 1), 2.5)),
}


@lru_cache
def geometry(family: str) -> Geometry:
    torch.manual_seed(3)
    return Geometry(CHANNEL) if family == "channel" else random_geometry(POROUS, fraction=0.3)


def small(head: str = "projection", noise: float = 0.0, weights: int | None = 0, tol: float = 1e-6) -> Autoencoder:
    """An autoencoder of 4³ patches, with all its weights random, those that start at zero too."""
    model = Autoencoder(SCALES, 6, [8, 16], [1, 1], heads=Heads(HEADS[head](tol)), bottleneck=Bottleneck(noise=noise))
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
    model = Autoencoder(SCALES, 6, [8, 16], [1, 1], heads=Heads(HEADS[head](1e-3)))
    where = geometry(family)
    target = random_flux(where.grid, 2, dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for _ in range(5):  # a layer that starts at zero hides what lies before it until it has moved, one layer a step
        optimizer.zero_grad()
        FieldLoss()(model(target, where, family).fields, target, where, SCALES[family]).backward()
        optimizer.step()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0}
    assert not without
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_the_code_starts_from_principal_components_of_unit_variance() -> None:
    model = small(weights=None)
    flux = {f: random_flux(s.grid, 5).cumsum(-1) * torch.rand(3, 1, 1, 1).double() for f, s in SCALES.items()}
    fit_linear_code(model, {f: [(Geometry(SCALES[f].grid), one) for one in x] for f, x in flux.items()})
    moment, codes = 0.0, []
    for family, x in flux.items():
        where = Geometry(SCALES[family].grid)
        u = where.mask(SCALES[family].normalise(x, where.grid)).numpy()
        rows = u.reshape(5, 3, 2, 4, 3, 4, 1, 4).transpose(0, 2, 4, 6, 1, 3, 5, 7).reshape(-1, 3 * 64)
        moment = moment + rows.T @ rows / len(rows) / 2
        codes.append(model.encode(x, where, family).detach().double().movedim(1, -1).reshape(-1, 6).numpy())
    variances, vectors = np.linalg.eigh(moment)
    expected = variances[::-1][:6]
    found = model.encoder.linear[TYPE].get_parameter("weight")[..., 1, 1, 1].detach().double().numpy() / 27
    np.testing.assert_allclose((found @ moment @ found.T), np.eye(6), atol=1e-4)
    np.testing.assert_allclose((found @ vectors[:, ::-1][:, :6]) ** 2 * expected, np.eye(6), atol=1e-4)
    np.testing.assert_allclose(sum(c.T @ c / len(c) / 2 for c in codes), np.eye(6), atol=0.05)  # bounded, a little
    with pytest.raises(ValueError, match="finite fields of family 'channel', got NaN"):
        fit_linear_code(model, {"channel": [(Geometry(CHANNEL), random_flux(CHANNEL) * torch.nan)]})


@pytest.mark.parametrize("head", HEADS)
def test_neighbours_help_to_decode_a_smooth_flow(head: str) -> None:
    """A wave of two latent cells' length or more is beyond what its patches' components say alone, and not beyond what
    their neighbours add: the fitted decoder errs by less than half as much as the patches' principal components."""
    grid = two_pi_box((16, 16, 16))
    x = (torch.arange(16, dtype=torch.float64) + 0.5) * grid.spacing[0]
    flows = []
    for phase in torch.linspace(0, 6, 24, dtype=torch.float64):
        u = torch.zeros(3, 16, 16, 16, dtype=torch.float64)
        u[0] = torch.sin(2 * x + phase)[None, :, None] + torch.cos(x - 2 * phase)[None, None, :]
        u[1] = torch.sin(x + 3 * phase)[:, None, None] + torch.cos(2 * x + phase)[None, None, :]
        flows.append(operators.flux_of(u, grid))
    model = Autoencoder({"f": velocity_scale(grid)}, 6, [8, 16], [1, 1], heads=Heads(HEADS[head](1e-6)))
    fit_linear_code(model, {"f": [(Geometry(grid), flow) for flow in flows]})
    errors = []
    for path in (True, False):
        if not path:  # the components of the patch alone, as the best decoder of one patch has them
            patches = [space_to_depth(operators.velocity(f, grid)[None], 4)[0].flatten(1) for f in flows]
            rows = torch.cat(patches, dim=1)
            vectors = torch.linalg.eigh(rows @ rows.mT).eigenvectors[:, -6:]
            errors.append(float((rows - vectors @ (vectors.mT @ rows)).norm() / rows.norm()))
            continue
        stacked = torch.stack(flows)
        back = model(stacked, Geometry(grid), "f").fields.detach().double()
        errors.append(float((back - stacked).norm() / stacked.norm()))
    assert errors[0] < 0.5 * errors[1]


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
    divergence = operators.div(flux - scale["velocity"].profile, scale.grid)
    u = scale.normalise(flux, scale.grid)
    net = operators.div(operators.flux_of(u, scale.grid), scale.grid) * scale["velocity"].size
    torch.testing.assert_close(net, divergence)


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
    with pytest.raises(
        ValueError, match="fluctuations of 'velocity' of a positive size, got 0.0; is the field at rest"
    ):
        FieldScale(CHANNEL, torch.zeros(3, 1, 1, 1), 0.0)


@pytest.mark.parametrize(
    ("channels", "widths", "blocks", "options", "message"),
    [
        (6, [8], [1, 1], {}, "as many widths as num_blocks"),
        (6, [], [], {}, "as many widths as num_blocks"),
        (193, [8, 16], [1, 1], {}, "latent_channels from 1 to 192, the numbers in a patch of 4³ cells, got 193"),
        (0, [8, 16], [1, 1], {}, "latent_channels from 1"),
        (6, [8, 16], [1, 1], {"stem": 0}, "stem ≥ 1"),
        (6, [8, 72], [1, 1], {}, "8 · finer is a multiple of the coarser, got 8 and 72"),
        (6, [8, 16], [1, 1], {"stem": 3, "basis": "haar"}, "power of two for the Haar basis, got 3"),
    ],
)
def test_sizes_that_no_autoencoder_has_are_refused(
    channels: int, widths: Sequence[int], blocks: Sequence[int], options: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Autoencoder(SCALES, channels, widths, blocks, **options)  # type: ignore[arg-type]


def test_latent_noise_acts_in_training_only() -> None:
    model, where, flux = small(noise=0.1), geometry("channel"), random_flux(CHANNEL, 1)
    with torch.no_grad():
        first, second = (model(flux, where, "channel") for _ in range(2))
        assert torch.equal(first.latent, second.latent) and not torch.equal(first.fields, second.fields)
        assert torch.equal(first.latent, model.encode(flux, where, "channel"))
        model.eval()
        plain = model.decode(first.latent, where, "channel")
        assert torch.equal(model(flux, where, "channel").fields, plain)


def test_tiles_are_the_whole() -> None:
    """In evaluation only, and with the projection over the whole box: the net across tile borders is zero too."""
    grid = box("channel", (40, 8, 4))
    where, flux, model = Geometry(grid), random_flux(grid, 1), small().eval()
    latent = torch.randn(1, 6, *model.latent_shape(grid))
    runs = []
    for model.tile in (None, 2):
        with torch.no_grad():
            runs.append((model.encode(flux, where, "channel"), model.decode(latent, where, "channel", exact=True)))
    whole, parts = runs
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(one.abs().max()))
    assert not torch.equal(whole[0], parts[0])  # another order of sums: tiles were made
    assert (operators.div(parts[1], grid) == 0.0).all()
