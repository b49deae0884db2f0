"""Latents that conserve mass: three of their channels are the flux on the latent grid, from the encoder to the end of a
rollout.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from einops import reduce
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import box, points, random_flux, random_geometry, velocity_scale
from small import train
from torch import Tensor

from latentphys import operators
from latentphys.autoencoders import (
    Bottleneck,
    ConservativeAutoencoder,
    FamilyScale,
    FieldScale,
    LatentKL,
    fit_linear_code,
)
from latentphys.autoencoders.coarse import coarse_flux, coarse_geometry, restrict_velocity, with_coarse
from latentphys.data import Store, Windows, open_store
from latentphys.families import OpenChannel, Porous, simulate
from latentphys.fields import VELOCITY, FieldSpec
from latentphys.grid import Geometry, Grid
from latentphys.projection import project
from latentphys.rollout import LatentStepper, rollout, rollout_store
from latentphys.training import encode_store, load_autoencoder, load_dynamics
from latentphys.training.tasks import DynamicsTask
from latentphys.transformer.conditioning import store_parameters
from latentphys.validators import validate

SHAPE = (8, 12, 8)
CHANNEL, PORES = box("channel", SHAPE), box("periodic", SHAPE)
MAGNETIC = FieldSpec("magnetic", "flux", "Wb", "solenoidal")
PRESSURE = FieldSpec("pressure", "scalar", "Pa")
FACTOR = 4


def channel_profile() -> Tensor:
    profile = torch.zeros(3, 1, 1, SHAPE[2], dtype=torch.float64)
    profile[0] = torch.linspace(1, 9, SHAPE[2])
    return profile


SCALES = {
    "channel": FamilyScale(FieldScale(CHANNEL, channel_profile(), 0.7)),
    "porous": FamilyScale(FieldScale(PORES, torch.tensor([0.3, -0.2, 0.1]).double().reshape(3, 1, 1, 1), 2.5)),
    # the velocity is neither the first field nor the only solenoidal one
    "mixed": FamilyScale(
        FieldScale(PORES, torch.full((1, 1, 1, 1), 4.0).double(), 2.0, PRESSURE),
        FieldScale(PORES, torch.zeros(3, 1, 1, 1).double(), 0.5, MAGNETIC),
        FieldScale(PORES, torch.zeros(3, 1, 1, 1).double(), 1.5),
    ),
}


@lru_cache
def geometry(family: str) -> Geometry:
    torch.manual_seed(3)
    return random_geometry(PORES, fraction=0.3) if family == "porous" else Geometry(SCALES[family].grid)


def small(seed: int = 0, channels: int = 7) -> ConservativeAutoencoder:
    """Patches of 4³, all weights random, those that start at zero too."""
    model = ConservativeAutoencoder(SCALES, channels, [8, 16], [1, 1])
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def fields(family: str, batch: int = 2) -> Tensor:
    """Packed random fields, the fluxes solenoidal, the velocity with the mean of the family."""
    where, scale = geometry(family), SCALES[family]
    parts = {}
    for name, field in scale.fields.items():
        if field.spec.kind == "flux":
            u = random_flux(where.grid, batch) + field.profile
            parts[name] = project(u, where, 1e-14)
        else:
            parts[name] = torch.randn(batch, *where.grid.shape, dtype=torch.float64)
    return scale.pack(parts)


def velocity(packed: Tensor, family: str) -> Tensor:
    return SCALES[family].split(packed)["velocity"]


def summed(flux: Tensor) -> Tensor:
    """The flux through the low faces of the latent grid: the sum of the 4 × 4 fine ones in each."""
    parts = []
    for axis in range(3):
        low = flux[:, axis].index_select(axis - 3, torch.arange(0, flux.shape[axis - 3], FACTOR))
        i, j, k = (1 if a == axis else FACTOR for a in range(3))
        parts.append(reduce(low, "b (x i) (y j) (z k) -> b x y z", "sum", i=i, j=j, k=k))
    return torch.stack(parts, dim=1)


def largest(x: Tensor) -> float:
    return float(x.detach().abs().amax())


def off(x: Tensor, expected: Tensor) -> float:
    return float(((x - expected).norm() / expected.norm()).detach())


# the model


@pytest.mark.parametrize("family", SCALES)
@settings(max_examples=5)
@given(seed=st.integers(0, 2**32), weights=st.integers(0, 2**32), size=st.sampled_from([1e-6, 1.0, 1e6]))
def test_any_latent_decodes_to_a_net_of_zero(family: str, seed: int, weights: int, size: float) -> None:
    where, model = geometry(family), small(weights)
    z = size * torch.randn(2, 7, 2, 3, 2, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        single, exactly = (model.decode(z, where, family, exact=exact) for exact in (False, True))
    assert single.dtype == torch.float32 and exactly.dtype == torch.float64
    for name, spec in SCALES[family].specs.items():
        if spec.kind == "flux":
            flux, near = (SCALES[family].split(x)[name] for x in (exactly, single))
            assert (operators.div(flux, where.grid) == 0.0).all()
            assert (flux[(~where.open_faces).expand_as(flux)] == 0.0).all()
            assert largest(flux) > 0 and off(near, flux) < 1e-2
            assert largest(operators.div(near, where.grid)) < 1e-2 * largest(near)


@pytest.mark.parametrize("family", SCALES)
def test_the_first_channels_are_the_flux_through_the_faces_of_the_latent_grid(family: str) -> None:
    """As velocities in units of the fluctuations, the mean flow included; nothing comes from within solids."""
    where, model, packed = geometry(family), small(), fields(family)
    scale = SCALES[family]["velocity"]
    latent = model.encode(packed, where, family)
    assert latent.shape == (2, 7, 2, 3, 2) and latent.dtype == torch.float32
    areas = FACTOR**2 * torch.tensor(where.grid.face_areas, dtype=torch.float64).reshape(3, 1, 1, 1)
    expected = summed(velocity(packed, family)) / (areas * scale.size)
    torch.testing.assert_close(latent[:, :3].double(), expected, rtol=1e-5, atol=1e-5)
    own = restrict_velocity(velocity(packed, family), scale, where, FACTOR)
    assert torch.equal(latent[:, :3], own.float())
    spoilt = packed.clone()
    velocity(spoilt, family)[(~where.open_faces).expand_as(own.new_empty(2, 3, *SHAPE))] = 1e3
    assert torch.equal(model.encode(spoilt, where, family)[:, :3], latent[:, :3])


@pytest.mark.parametrize("family", ["channel", "mixed"])
@pytest.mark.parametrize("exact", [True, False])
def test_what_is_decoded_has_the_coarse_flux_of_what_was_encoded(family: str, exact: bool) -> None:
    """Whatever the network says of the rest."""
    where, packed = geometry(family), fields(family)
    coarse, decoded = summed(velocity(packed, family)), []
    for seed in (0, 1):
        model = small(seed)
        latent = model.encode(packed, where, family)
        decoded.append(velocity(model.decode(latent, where, family, exact=exact), family).double())
        assert off(summed(decoded[-1]), coarse) < 1e-5
    assert off(decoded[1], decoded[0]) > 0.05


def test_round_grains_it_has_that_coarse_flux_to_a_few_percent() -> None:
    """Porosity 0.73. The network's own flux, which is another altogether, passes through the same pores."""
    grid = box("periodic", (16, 16, 16), (1.0, 1.0, 1.0))
    solid = torch.zeros(grid.shape, dtype=torch.bool)
    for centre in (16 * torch.rand(12, 3, generator=torch.Generator().manual_seed(0))).tolist():
        apart = [(x - c).abs() for x, c in zip(points(grid, (0.5, 0.5, 0.5)), centre, strict=True)]
        x, y, z = (torch.minimum(d, 16 - d) ** 2 for d in apart)
        solid |= x + y + z < 9
    where, patches = Geometry(grid, solid), torch.randn(2, 3, 4, 4, 4, dtype=torch.float64)
    flow = project(patches.repeat_interleave(4, -3).repeat_interleave(4, -2).repeat_interleave(4, -1), where, 1e-14)
    model = ConservativeAutoencoder({"f": velocity_scale(grid)}, 7, [8, 16], [1, 1])
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape)
    with torch.no_grad():
        decoded = model.decode(model.encode(flow, where, "f"), where, "f", exact=True)
    assert off(summed(decoded), summed(flow)) < 0.05 < 0.5 < off(decoded, flow)


@pytest.mark.parametrize("family", SCALES)
def test_the_flux_of_a_latent_balances_to_the_bit(family: str) -> None:
    """Of any latent; that of an encoded one is the coarse flux, through-flow and all."""
    where, model, packed = geometry(family), small(), fields(family)
    grid = coarse_geometry(where, FACTOR).grid
    encoded = model.encode(packed, where, family)
    for latent in (encoded, torch.randn_like(encoded)):
        flux = model.latent_fields(latent, where, family)["velocity"]
        assert flux.dtype == torch.float64 and flux.shape == (2, 3, *grid.shape) and largest(flux) > 0
        assert (operators.div(flux, grid) == 0.0).all()
    flux, fine = model.latent_fields(encoded, where, family)["velocity"], velocity(packed, family)
    torch.testing.assert_close(flux, summed(fine), rtol=0, atol=1e-5 * largest(flux))
    for axis in range(3):
        through, fine_through = (x[:, axis].movedim(axis - 3, 1)[:, 0].sum((-2, -1)) for x in (flux, fine))
        torch.testing.assert_close(through, fine_through, rtol=1e-5, atol=1e-5 * largest(fine))
    assert set(model.latent_fields(encoded, where, family)) == set(model.latent_specs) == {"velocity"}


@pytest.mark.parametrize("family", SCALES)
def test_latents_of_flows_are_admissible_and_others_become_so(family: str) -> None:
    where, model = geometry(family), small()
    encoded = model.encode(fields(family), where, family)
    torch.testing.assert_close(model.admit(encoded, where, family), encoded, rtol=0, atol=1e-5 * largest(encoded))
    other = 5 * torch.randn_like(encoded)
    admitted, bound = model.admit(other, where, family), model.bottleneck.bound
    assert torch.equal(admitted[:, 3:], other[:, 3:].clamp(-bound, bound)) and off(admitted[:, :3], other[:, :3]) > 0.1
    torch.testing.assert_close(model.admit(admitted, where, family), admitted, rtol=0, atol=1e-5 * largest(admitted))
    scale, grid = SCALES[family]["velocity"], coarse_geometry(where, FACTOR).grid
    net = operators.div(coarse_flux(admitted[:, :3].double(), scale, where, FACTOR), grid)
    assert largest(net) < 1e-5 * largest(operators.div(coarse_flux(other[:, :3].double(), scale, where, FACTOR), grid))
    # only the solenoidal part of the first channels counts when they are decoded
    a, b = (model.latent_fields(z, where, family)["velocity"] for z in (other, admitted))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * largest(a))


def test_the_decoder_sees_no_mean_flow_and_the_learnt_channels_carry_no_coarse_flux() -> None:
    for family in ("channel", "porous"):
        where, model = geometry(family), small()
        profile = where.mask(SCALES[family]["velocity"].profile.expand(1, 3, *SHAPE))
        of_mean = model.decoder_input(model.encode(profile, where, family), where, family)
        assert largest(of_mean[:, :3]) < 1e-5
        one, two = (model.decoder_input(model.encode(x, where, family), where, family) for x in fields(family)[:, None])
        encoded = [model.encode(x, where, family) for x in fields(family)[:, None]]
        assert one.shape == encoded[0].shape and largest(one - two) > 0.1
    where, model = geometry("mixed"), small()
    packed = fields("mixed")
    parts = {
        name: model.learnt_inputs(packed, where, "mixed")[f"{name}_flux_solenoidal"]
        for name in ("velocity", "magnetic")
    }
    flux = operators.flux_of(parts["velocity"], PORES)
    assert largest(summed(flux)) < 1e-5 * largest(flux)
    magnetic = SCALES["mixed"].split(packed)["magnetic"]
    torch.testing.assert_close(parts["magnetic"], SCALES["mixed"]["magnetic"].normalise(magnetic, PORES))
    coarsely = with_coarse(torch.zeros_like(magnetic), summed(velocity(packed, "mixed")), where, FACTOR)
    detail = velocity(packed, "mixed") - coarsely
    torch.testing.assert_close(flux * SCALES["mixed"]["velocity"].size, detail, rtol=0, atol=1e-5 * largest(detail))


def test_the_linear_code_brings_back_what_lives_on_the_latent_grid() -> None:
    """A flow that its coarse flux says in full needs no learnt channel."""
    where, model = geometry("channel"), ConservativeAutoencoder({"channel": SCALES["channel"]}, 4, [8, 16], [1, 1])
    profile, latent = SCALES["channel"]["velocity"].profile, coarse_geometry(geometry("channel"), FACTOR)
    coarse = project(random_flux(latent.grid, 6) * 8, latent, 1e-14)
    flows = with_coarse(torch.zeros(6, 3, *SHAPE, dtype=torch.float64), coarse, where, FACTOR, 1e-14) + profile
    flows = flows + 0.01 * project(random_flux(CHANNEL, 6), where, 1e-14)
    fit_linear_code(model, {"channel": [(where, flow.float()) for flow in flows]})
    decoded = model(flows, where, "channel").fields.double()
    assert off(decoded - profile, flows - profile) < 0.1 < off(flows, profile.expand_as(flows))


@pytest.mark.parametrize("family", ["channel", "porous"])
def test_gradients_reach_every_latent_channel(family: str) -> None:
    where, model = geometry(family), small()
    z = torch.randn(1, 7, 2, 3, 2, requires_grad=True)
    model.decode(z, where, family).square().sum().backward()
    assert z.grad is not None and bool(torch.isfinite(z.grad).all())
    assert bool((z.grad.abs().amax((0, 2, 3, 4)) > 0).all())
    again = z.detach().clone().requires_grad_()
    model.admit(again, where, family)[:, :3].square().sum().backward()
    assert again.grad is not None and largest(again.grad[:, :3]) > 0 == largest(again.grad[:, 3:])


@pytest.mark.parametrize("learned", [False, True])
def test_noise_in_training_leaves_the_coarse_flux_alone(learned: bool) -> None:
    """It is a share of the RMS of what is learnt; the mean flow would make it large."""
    bottleneck = Bottleneck(4, noise=0.5, learned=learned)
    model = ConservativeAutoencoder(SCALES, 7, [8, 16], [1, 1], bottleneck=bottleneck).train()
    where, packed = geometry("channel"), fields("channel")
    for parameter in model.parameters():
        if parameter is not bottleneck.log_deviation:
            parameter.data = 0.3 * torch.randn(parameter.shape)
    first, second = (model(packed, where, "channel") for _ in range(2))
    assert off(first.fields, second.fields) > 1e-3 and first.noise is not None and len(first.noise) == 4
    for made in (first, second):
        assert off(summed(made.fields.double()), summed(packed)) < 1e-4
    z, variance = first.latent[:, 3:], first.noise.square()
    expected = 0.5 * (z.square() + variance - 1 - variance.log()).mean()
    torch.testing.assert_close(LatentKL()(first), expected)


def test_what_has_no_conservative_latents_is_refused() -> None:
    compressible = FieldSpec("velocity", "flux", "kg/s", "none")
    scales = {
        "waves": FamilyScale(FieldScale(PORES, torch.zeros(1, 1, 1, 1), 1.0, PRESSURE)),
        "gas": FamilyScale(FieldScale(PORES, torch.zeros(3, 1, 1, 1), 1.0, compressible)),
    }
    for family, got in (("waves", r"\['pressure'\]"), ("gas", "FieldSpec.*constraint='none'")):
        message = f"solenoidal velocity in family '{family}' for conservative latents, got {got}.*latent=free"
        with pytest.raises(ValueError, match=message):
            ConservativeAutoencoder({**SCALES, family: scales[family]}, 7, [8, 16], [1, 1])
        with pytest.raises(ValueError, match=message):
            small().check(family, PORES, scales[family].specs)
    small().check("new", PORES, {"velocity": VELOCITY})
    with pytest.raises(ValueError, match="compression that is a power of two for conservative latents, got 6"):
        ConservativeAutoencoder(SCALES, 7, [8, 16], [1, 1], stem=3)
    with pytest.raises(ValueError, match="latent_channels from 4 to 192, .* got 3"):
        ConservativeAutoencoder({"channel": SCALES["channel"]}, 3, [8, 16], [1, 1])
    with pytest.raises(ValueError, match="at least 2 latent cells along each axis of more than one cell"):
        grid = Grid((8, 8, 4), PORES.spacing)
        model = ConservativeAutoencoder(
            {"f": FamilyScale(FieldScale(grid, torch.zeros(3, 1, 1, 1), 1.0))}, 7, [8, 16], [1, 1]
        )
        model.encode(random_flux(grid, 1), Geometry(grid), "f")


# the whole road

STEPS = 3


@dataclass(frozen=True)
class Made:
    """What one training of each model made."""

    fields: dict[str, Path]
    latents: dict[str, Path]
    autoencoder: Path
    dynamics: Path

    def stepper(self, family: str, trajectory: int) -> LatentStepper:
        dynamics, autoencoder = load_dynamics(self.dynamics)
        return LatentStepper(autoencoder, dynamics, open_store(self.fields[family]).geometry(trajectory), family)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Two steps of each kind of training, the dynamics over two steps of each window."""
    folder = tmp_path_factory.mktemp("conservative")
    families = {"open_channel": OpenChannel(spin_up=0.01), "porous": Porous(spin_up=0.01)}
    paths = {name: folder / f"{name}.zarr" for name in families}
    latents = {name: folder / f"{name}.latent.zarr" for name in families}
    for name, family in families.items():
        simulate(family, paths[name], shape=(8, 8, 8), num_trajectories=3, num_frames=5)
    short = ("trainer.num_steps=2", "trainer.test_every=2", "trainer.warmup=1")
    options = ("autoencoder/latent=conservative", *short)
    autoencoder = train("autoencoder", list(paths.values()), folder / "autoencoder", *options)
    model = load_autoencoder(autoencoder)
    assert isinstance(model, ConservativeAutoencoder)
    for name, path in latents.items():
        encode_store(model, open_store(paths[name]), path, checkpoint=str(autoencoder))
    unrolled = ("dynamics_training.unroll=2", *short)
    dynamics = train("dynamics", list(latents.values()), folder / "dynamics", *unrolled)
    return Made(paths, latents, autoencoder, dynamics)


@pytest.mark.parametrize("family", ["open_channel", "porous"])
def test_latent_stores_hold_a_flux_that_balances(made: Made, family: str) -> None:
    latents, source = open_store(made.latents[family]), open_store(made.fields[family])
    assert set(latents.specs) == {"latent", "velocity"} and latents.specs["velocity"] == VELOCITY
    assert latents.array("latent").dtype == "float32" and latents.array("velocity").dtype == "float64"
    assert latents.array("velocity").shape == (3, 5, 3, 2, 2, 2)
    report = validate(latents)
    net = report["net_flux_max"]
    assert net.value == 0.0 == net.threshold and net.verdict == "pass" and report["finite"].value == 0.0
    flux = source.read("velocity", 1, slice(None))
    torch.testing.assert_close(
        latents.read("velocity", 1, slice(None)), summed(flux), rtol=0, atol=1e-5 * largest(summed(flux))
    )


@pytest.mark.parametrize("family", ["open_channel", "porous"])
def test_rollouts_stay_admissible(made: Made, family: str, tmp_path: Path) -> None:
    stepper, store = made.stepper(family, 1), open_store(made.fields[family])
    model, given_ = stepper.autoencoder, store.read("velocity", 1, slice(0, 1))[None]
    scale = model.scale(family)["velocity"]
    latents = [f.latent for f in rollout(stepper, given_, lambda n: [store_parameters(store, 1, n)], STEPS)]
    assert len(latents) == STEPS + 1 and largest(latents[-1] - latents[0]) > 1e-3
    for latent in latents:
        channels = coarse_flux(latent[:, :3], scale, stepper.geometry, FACTOR).double()
        exactly = model.latent_fields(latent, stepper.geometry, family)["velocity"]
        torch.testing.assert_close(channels, exactly, rtol=0, atol=1e-5 * largest(exactly))
        stepped = stepper.decode(latent)
        assert (operators.div(stepped, stepper.geometry.grid) == 0.0).all()
        if stepper.geometry.is_empty:
            assert off(summed(stepped), exactly) < 1e-5
    dynamics = stepper.dynamics
    path = rollout_store(model, dynamics, store, tmp_path / "out", num_steps=STEPS, trajectories=[0, 1])
    report = validate(open_store(path))
    assert report["net_flux_max"].value == 0.0 == report["solid_flux_max"].value
    assert torch.equal(open_store(path).read("velocity", 1, STEPS), stepper.decode(latents[-1])[0])


@pytest.mark.parametrize("family", ["open_channel", "porous"])
def test_training_unrolls_what_a_rollout_does(made: Made, family: str) -> None:
    """Every step of the loss is admissible: it is the error of the latents that a rollout makes."""
    stepper, store = made.stepper(family, 1), open_store(made.latents[family])
    source: Store = open_store(made.fields[family])
    windows = Windows([store], "latent", 3, trajectories=[[1]])
    task = DynamicsTask(stepper.dynamics, stepper.autoencoder, windows, windows, [source], {}, {}, unroll=2).eval()
    batch = windows.sample(0, 1, seed=0)
    start, latent, errors = int(batch.starts), batch.values[:, :1], []
    for n in (1, 2):
        now, then = (store_parameters(source, 1, start + n + m) for m in (-1, 0))
        latent = stepper.step(latent, [now], [then]).latent[:, None]
        errors.append(((latent[:, 0] - batch.values[:, n]) / stepper.dynamics.increment_std).square().mean())
    with torch.no_grad():
        loss = task(batch).loss
    torch.testing.assert_close(loss, torch.stack(errors).mean(), rtol=1e-5, atol=0)
