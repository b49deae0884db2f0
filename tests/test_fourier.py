"""The Fourier mixer against its formula in complex numbers, and what it keeps and breaks."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from latentphys.routers import Nested, SemanticTop1
from latentphys.routers.routing import RouterFactory
from latentphys.transformer import LatentTransformer
from latentphys.transformer.block import TransformerBlock
from latentphys.transformer.fourier import FourierMixer

Shape = tuple[int, int, int]
SHAPES: list[Shape] = [(4, 3, 2), (3, 5, 7), (6, 4, 1), (1, 4, 6), (5, 1, 1), (1, 1, 4), (1, 1, 1), (2, 2, 3)]


def random_mixer(dim: int = 8, num_blocks: int = 2, sparsity: float = 0.0) -> FourierMixer:
    """A mixer in FP64 whose biases are random as well."""
    mixer = FourierMixer(dim, num_blocks, sparsity).double()
    for bias in (mixer.b1, mixer.b2):
        torch.nn.init.normal_(bias, std=0.3)
    return mixer


def fields(shape: Shape, dim: int = 8, batch: int = 2) -> Tensor:
    return torch.randn(batch, shape[0] * shape[1] * shape[2], dim, dtype=torch.float64)


def by_formula(mixer: FourierMixer, x: Tensor, shape: Shape) -> Tensor:
    """Mode by mode with dense complex matrices, and the sum of the inverse transform written out along each axis."""
    w1, w2 = (torch.stack([torch.block_diag(*part) for part in w.detach()]) for w in (mixer.w1, mixer.w2))
    b1, b2 = (torch.complex(*b.detach().flatten(1)) for b in (mixer.b1, mixer.b2))
    w1, w2 = torch.complex(*w1), torch.complex(*w2)
    cells = x.reshape(len(x), *shape, -1)
    modes = torch.fft.fftn(cells, dim=(1, 2, 3), norm="ortho")
    half = shape[2] // 2 + 1
    hidden = modes[:, :, :, :half] @ w1 + b1
    out = torch.complex(hidden.real.clamp(min=0), hidden.imag.clamp(min=0)) @ w2 + b2

    def shrink(a: Tensor) -> Tensor:
        return a.sign() * (a.abs() - mixer.sparsity).clamp(min=0)

    out = torch.complex(shrink(out.real), shrink(out.imag))
    out = torch.fft.ifftn(out, dim=(1, 2), norm="ortho")
    # real part of the half of the modes along z, those that have a conjugate counted twice
    k, z = torch.arange(half, dtype=torch.float64), torch.arange(shape[2], dtype=torch.float64)
    wave = torch.exp(2j * torch.pi * z[:, None] * k / shape[2]) / shape[2] ** 0.5
    alone = (k == 0) | (2 * k == shape[2])
    back = torch.einsum("bxykd,zk->bxyzd", out, wave * torch.where(alone, 1.0, 2.0)).real
    return x + back.reshape(x.shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.2])
def test_it_is_its_formula(shape: Shape, sparsity: float) -> None:
    mixer, x = random_mixer(sparsity=sparsity), fields(shape)
    found = mixer(x, shape)
    assert found.shape == x.shape and (found - x).std() > 0.05
    torch.testing.assert_close(found, by_formula(mixer, x, shape), rtol=0, atol=1e-12)


@given(
    shape=st.tuples(*(st.integers(1, 5) for _ in range(3))),
    num_blocks=st.sampled_from([1, 2, 3, 6]),
    batch=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_any_shape_and_any_blocks(shape: Shape, num_blocks: int, batch: int, seed: int) -> None:
    torch.manual_seed(seed)
    mixer, x = random_mixer(6, num_blocks, 0.05), fields(shape, 6, batch)
    torch.testing.assert_close(mixer(x, shape), by_formula(mixer, x, shape), rtol=0, atol=1e-12)


def linear_mixer(factor: complex) -> FourierMixer:
    """relu(a) − relu(−a) = a: channel 0 is multiplied by a complex number in every mode, and channel 1 left alone."""
    mixer = FourierMixer(2, num_blocks=1).double()
    with torch.no_grad():
        mixer.w1.zero_()[0, 0, 0] = torch.tensor([1.0, -1.0])
        for part, number in enumerate((factor.real, factor.imag)):
            mixer.w2[part, 0] = torch.tensor([[number, 0.0], [-number, 0.0]], dtype=torch.float64)
    return mixer


@pytest.mark.parametrize("shape", SHAPES)
def test_without_its_relu_it_multiplies_modes(shape: Shape) -> None:
    x, other = fields(shape, 2), fields(shape, 2)
    y = linear_mixer(0.7)(x, shape)
    torch.testing.assert_close(y, x * torch.tensor([1.7, 1.0], dtype=torch.float64), rtol=0, atol=1e-13)
    mixer = linear_mixer(0.3 - 0.8j)
    y = mixer(x, shape)
    torch.testing.assert_close(mixer(2 * x - 3 * other, shape), 2 * y - 3 * mixer(other, shape), rtol=0, atol=1e-12)
    for axis in (1, 2, 3):
        rolled = x.unflatten(1, shape).roll(1, axis).flatten(1, 3)
        expected = y.unflatten(1, shape).roll(1, axis).flatten(1, 3)
        torch.testing.assert_close(mixer(rolled, shape), expected, rtol=0, atol=1e-12)


def test_a_quarter_turn_of_the_phase_keeps_the_energy_of_a_wave() -> None:
    """Parseval: multiplied by −i a cosine is a sine of the same energy, in a transform that keeps energies."""
    shape = (4, 3, 8)
    z = torch.arange(8, dtype=torch.float64) * (2 * torch.pi / 8)
    wave = torch.stack([z.cos(), 0 * z], dim=-1).expand(1, 4, 3, 8, 2).flatten(1, 3)
    y = linear_mixer(-1j)(wave, shape) - wave
    torch.testing.assert_close(y.unflatten(1, shape)[0, 2, 1, :, 0], z.sin(), rtol=0, atol=1e-13)
    torch.testing.assert_close(y.square().sum(), wave.square().sum())


def test_phases_show_where_the_origin_is() -> None:
    """The limit that the docstring states, of size: not rounding."""
    shape = (4, 3, 4)
    mixer, x = random_mixer(), fields(shape)
    y = mixer(x, shape) - x
    for axis in (1, 2, 3):
        rolled = x.unflatten(1, shape).roll(1, axis).flatten(1, 3)
        expected = y.unflatten(1, shape).roll(1, axis).flatten(1, 3)
        assert (mixer(rolled, shape) - rolled - expected).std() > 0.1 * y.std()
    # x and y are alike, z is not
    swapped = x.unflatten(1, (4, 3, 4)).transpose(1, 2).flatten(1, 3)
    expected = y.unflatten(1, (4, 3, 4)).transpose(1, 2).flatten(1, 3)
    torch.testing.assert_close(mixer(swapped, (3, 4, 4)) - swapped, expected, rtol=0, atol=1e-12)
    turned = x.unflatten(1, (4, 3, 4)).transpose(1, 3).flatten(1, 3)
    expected = y.unflatten(1, (4, 3, 4)).transpose(1, 3).flatten(1, 3)
    assert (mixer(turned, (4, 3, 4)) - turned - expected).std() > 0.1 * y.std()


def test_a_thin_axis_is_the_same_in_2d_whichever_it_is_but_z() -> None:
    mixer, x = random_mixer(), fields((4, 1, 6))
    torch.testing.assert_close(mixer(x, (4, 1, 6)), mixer(x, (1, 4, 6)), rtol=0, atol=1e-13)


def test_every_cell_reaches_every_cell_and_no_other_sample() -> None:
    shape = (3, 4, 5)
    mixer, x = random_mixer(), fields(shape)
    changed = x.clone()
    changed[0, 17] += 1.0
    difference = (mixer(changed, shape) - mixer(x, shape)).abs()
    assert difference[0].amax(-1).min() > 1e-4 and not difference[1].any()
    torch.testing.assert_close(mixer(x[1:], shape), mixer(x, shape)[1:], rtol=0, atol=1e-13)


@pytest.mark.parametrize("blocks", [1, 4])
def test_blocks_do_not_mix(blocks: int) -> None:
    shape = (2, 3, 4)
    mixer, x = random_mixer(8, blocks), fields(shape)
    changed = x.clone()
    changed[..., 0] += torch.randn(24, dtype=torch.float64)
    moved = (mixer(changed, shape) - mixer(x, shape)).abs().amax((0, 1)) > 1e-9
    assert moved.tolist() == [channel < 8 // blocks for channel in range(8)]


@pytest.mark.parametrize("shape", [(2, 3, 2), (3, 1, 3)])
def test_gradients_are_those_of_finite_differences(shape: Shape) -> None:
    mixer, x = random_mixer(2, 1, 0.05), fields(shape, 2, 1).requires_grad_()

    def f(x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
        return torch.func.functional_call(mixer, {"w1": w1, "w2": w2, "b1": b1, "b2": b2}, (x, shape))

    assert torch.autograd.gradcheck(f, (x, mixer.w1, mixer.w2, mixer.b1, mixer.b2))


def test_every_parameter_learns_from_the_start() -> None:
    """Along z three cells or more: on fewer the imaginary part of a constant over all modes is no real field."""
    mixer = FourierMixer(8, 2)
    mixer(fields((4, 3, 5)).float(), (4, 3, 5)).square().sum().backward()
    for parameter in mixer.parameters():
        assert parameter.grad is not None
        assert (parameter.grad.flatten(1).abs().amax(1) > 1e-2).all()  # real and imaginary parts
        assert parameter.grad.isfinite().all()


def test_a_large_threshold_leaves_the_tokens_alone() -> None:
    x = fields((4, 3, 2))
    assert torch.equal(random_mixer(sparsity=1e3)(x, (4, 3, 2)), x)


def test_white_noise_has_modes_of_unit_size() -> None:
    """So that a threshold means the same for boxes of any size: as many modes fall below it."""
    shares = []
    for shape in ((12, 16, 20), (24, 24, 24)):
        mixer = linear_mixer(1.0)
        mixer.sparsity = 0.5
        x = fields(shape, 2, 1)
        kept = torch.fft.rfftn((mixer(x, shape) - x)[..., 0].unflatten(1, shape), dim=(1, 2, 3))
        shares.append(float((kept.real.abs() > 1e-9).double().mean()))
    # parts have variance 1/2: P(|N(0, 1/2)| > 1/2) = erfc(1/2)
    assert shares == pytest.approx([0.4795, 0.4795], abs=0.03)


def test_it_runs_in_fp32_under_autocast_and_in_16_bit_models() -> None:
    shape = (4, 3, 2)
    mixer, x = random_mixer().float(), fields(shape).float()
    expected = mixer(x, shape)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mixer(x, shape), expected)
        half = mixer(x.bfloat16(), shape)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), mixer(x.bfloat16().float(), shape), rtol=1e-2, atol=1e-2)
    rounded = mixer.bfloat16()(x.bfloat16(), shape)
    torch.testing.assert_close(rounded.float(), expected, rtol=5e-2, atol=5e-2)


TOP1 = partial(SemanticTop1, num_experts=4)


def build(router: RouterFactory = TOP1, depth: int = 2) -> LatentTransformer:
    model = LatentTransformer(2, 2, 3, 1, 32, depth, num_heads=4, hidden=16, router=router, mixer="fourier")
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def inputs(shape: Shape = (4, 3, 2), batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch, 2, 2, *shape), torch.randn(batch, 3), torch.randn(batch, 1, *shape)


def test_a_block_mixes_by_either_and_nothing_else() -> None:
    block = TransformerBlock(32, 16, 4, 16, SemanticTop1(32, 4), mixer="fourier")
    assert block.attention is None and block.fourier is not None and block.fourier.num_blocks == 4
    assert TransformerBlock(32, 16, 4, 16, SemanticTop1(32, 4)).fourier is None
    with pytest.raises(ValueError, match=r"Expected a mixer of attention \| fourier, got 'conv'"):
        TransformerBlock(32, 16, 4, 16, SemanticTop1(32, 4), mixer="conv")


def test_cells_of_a_fourier_transformer_see_each_other_through_the_mixer_alone() -> None:
    model, (latents, condition, geometry) = build(), inputs()
    changed = latents.clone()
    changed[0, :, :, 0, 0, 0] += 1.0
    base, other = (model(x, condition, geometry, (True, True, True)).increment for x in (latents, changed))
    moved = (other - base).abs().amax(1)
    assert moved[0, 3, 2, 1] > 1e-5 and not moved[1].any()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".fourier." in name:
                parameter.zero_()
    base, other = (model(x, condition, geometry, (True, True, True)).increment for x in (latents, changed))
    moved = (other - base).abs().amax(1)[0]
    assert moved[0, 0, 0] > 1e-5 and int((moved > 1e-6).sum()) == 1


def test_every_parameter_of_a_fourier_transformer_learns() -> None:
    model = build()
    model(*inputs(batch=4), periodic=(True, True, False)).increment.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if "fourier" in name:
            assert parameter.grad.norm() > 1e-4, name


@pytest.mark.parametrize(
    ("shape", "router"),
    [((4, 3, 5), TOP1), ((3, 5, 1), partial(Nested, num_experts=6, num_groups=3))],
)
def test_its_export_is_the_model(shape: Shape, router: RouterFactory) -> None:
    class Increment(torch.nn.Module):
        def __init__(self, model: LatentTransformer) -> None:
            super().__init__()
            self.model = model

        def forward(self, latents: Tensor, condition: Tensor, geometry: Tensor) -> Tensor:
            return self.model(latents, condition, geometry, (True, True, False)).increment

    module = Increment(build(router, depth=1)).eval()
    program = torch.export.export(module, inputs(shape)).module()
    other = inputs(shape)
    torch.testing.assert_close(program(*other), module(*other), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("unchecked")
def test_refuses_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="Expected a width that 3 blocks divide, got dim = 8"):
        FourierMixer(8, 3)
    with pytest.raises(ValueError, match="Expected a width that 0 blocks divide, got dim = 8"):
        FourierMixer(8, 0)
    for sparsity in (-0.1, float("nan")):
        with pytest.raises(ValueError, match=f"Expected a sparsity ≥ 0, got {sparsity}"):
            FourierMixer(8, 2, sparsity)
    mixer = FourierMixer(8, 2)
    for x in (torch.zeros(1, 23, 8), torch.zeros(1, 24, 6)):
        with pytest.raises(
            ValueError, match=r"Expected tokens of shape \(b, 24, 8\) for \(4, 3, 2\) cells, got \(1, 2"
        ):
            mixer(x, (4, 3, 2))
