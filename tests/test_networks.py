"""Encoder and decoder: patches, padding, conditions, and what the networks may and may not depend on."""

import math
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import BOUNDARIES, OPEN
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from latentphys.autoencoders.decoder import Decoder
from latentphys.autoencoders.encoder import Encoder
from latentphys.autoencoders.layers import (
    CONDITION_WIDTH,
    Basis,
    ChannelNorm,
    Down,
    Level,
    Patches,
    ResidualBlock,
    Up,
    depth_to_space,
    geometry_features,
    pad_by_boundary,
    space_to_depth,
)
from latentphys.autoencoders.place import Place, describe, num_conditions
from latentphys.flops import count_flops
from latentphys.grid import Geometry, Grid

FIELDS = {"velocity": 3, "heat": 1, "salt": 1}
SIDES = BOUNDARIES | OPEN


def new_networks(basis: Basis = "patch") -> tuple[Encoder, Decoder]:
    """As they start, for patches of 4³ cells."""
    encoder = Encoder(FIELDS, 5, [8, 16], [1, 1], 2, basis, num_conditions(3))
    decoder = Decoder({**FIELDS, "velocity": 6}, 5, [8, 16], [1, 1], 2, basis, num_conditions(3))
    return encoder, decoder


def randomise(*networks: nn.Module) -> None:
    with torch.no_grad():
        for parameter in (p for network in networks for p in network.parameters()):
            parameter.copy_(torch.randn_like(parameter) / max(1, parameter[0].numel()) ** 0.5)


def new_place(sides: str = "channel", shape: tuple[int, int, int] = (8, 12, 8), solid: float = 0.2) -> Place:
    geometry = Geometry(Grid(shape, (0.1, 0.2, 0.1), SIDES[sides]), torch.rand(2, *shape) < solid)
    return describe(geometry, [True, True, False], 4)


def new_fields(place: Place, *names: str) -> dict[str, Tensor]:
    return {name: torch.randn(2, FIELDS[name], *place.features.shape[-3:]) for name in names}


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
@pytest.mark.parametrize("basis", ["patch", "haar"])
def test_patches_are_an_isometry(factor: int, basis: Basis) -> None:
    patches, n = Patches(factor, basis), factor**3
    blocks = torch.eye(n, dtype=torch.float64).reshape(n, 1, factor, factor, factor)
    matrix = patches.split(blocks).flatten(1)
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-14)
    x = torch.randn(2, 3, 2 * factor, factor, 3 * factor, dtype=torch.float64)
    parts = patches.split(x)
    assert parts.shape == (2, 3 * n, 2, 1, 3)
    torch.testing.assert_close(patches.join(parts), x, rtol=0, atol=1e-14)
    # a patch is made of its own block alone, and of each channel alike
    torch.testing.assert_close(patches.split(x[..., :factor]), parts[..., :1], rtol=0, atol=0)
    assert bool((patches.split(x * torch.tensor([1.0, 0, 0]).reshape(3, 1, 1, 1)) != 0).sum(1).eq(n).all())


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_haar_coefficients_go_from_coarse_to_fine(factor: int) -> None:
    """Blocks in which 2³ cells are equal have the coefficients of the coarser block, and no further ones."""
    constant = Patches(factor, "haar").split(torch.full((1, 1, factor, factor, factor), 3.0))
    expected = torch.zeros(factor**3)
    expected[0] = 3.0 * factor**1.5
    torch.testing.assert_close(constant.flatten(), expected)
    coarse = torch.randn(1, 2, factor // 2, factor // 2, factor // 2)
    found = Patches(factor, "haar").split(F.interpolate(coarse, scale_factor=2.0))
    few = coarse.numel()
    torch.testing.assert_close(found[:, :few], 8**0.5 * Patches(factor // 2, "haar").split(coarse))
    assert not bool(found[:, few:].any())


@pytest.mark.parametrize(
    ("factor", "basis", "message"),
    [
        (3, "haar", "Expected a stem of a power of two for the Haar basis, got 3"),
        (0, "haar", "Expected a stem of a power of two for the Haar basis, got 0"),
        (0, "patch", "Expected a stem of at least 1, got 0"),
        (2, "fourier", "Expected a basis of patch | haar, got 'fourier'"),
    ],
)
def test_patches_that_are_none(factor: int, basis: Any, message: str, unchecked: None) -> None:
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        Patches(factor, basis)


@pytest.mark.parametrize("sides", list(SIDES))
def test_ghost_cells_of_every_side(sides: str) -> None:
    """Edges and corners too: along each axis a ghost cell is that far in, or the one beside it, or zero."""
    x = torch.randn(2, 3, 3, 4, 2)
    weight: Tensor = torch.ones(1, 1, 1, 1, 1)
    picks = []
    for axis, ((low, high), n) in enumerate(zip(SIDES[sides], x.shape[2:], strict=True)):
        ends = {"periodic": (n - 1, 0), "no_slip": None, "inflow": None}
        first, last = (ends.get(side, (0, n - 1)) for side in (low, high))
        picks.append(torch.tensor([first[0] if first else 0, *range(n), last[1] if last else 0]))
        along = torch.tensor([float(first is not None), *[1.0] * n, float(last is not None)])
        weight = weight * along.reshape([-1 if a == axis + 2 else 1 for a in range(5)])
    i, j, k = picks
    expected = x[:, :, i[:, None, None], j[None, :, None], k[None, None, :]] * weight
    assert torch.equal(pad_by_boundary(x, SIDES[sides]), expected)


def test_channel_norm_knows_one_cell_only() -> None:
    norm = ChannelNorm(6)
    nn.init.normal_(norm.gain)
    x = torch.randn(2, 6, 3, 2, 2)
    y = norm(x)
    expected = x / (x.square().mean(1, keepdim=True) + norm.eps).sqrt() * norm.gain.reshape(1, 6, 1, 1, 1)
    torch.testing.assert_close(y, expected)
    other = x.clone()
    other[1, :, 2, 0, 1] = torch.randn(6)
    assert (norm(other) != y).any(1).nonzero().tolist() == [[1, 2, 0, 1]]


def test_channel_norm_sums_in_fp32_in_any_precision() -> None:
    """In half precision squares of 300 would overflow; in FP64 nothing is lost."""
    norm = ChannelNorm(4)
    large = norm(torch.full((1, 4, 1, 1, 1), 300.0, dtype=torch.float16))
    assert large.dtype == torch.float16 and torch.equal(large, torch.ones_like(large))
    x = torch.randn(1, 4, 2, 2, 2, dtype=torch.float64)
    assert norm.double()(x).dtype == torch.float64
    torch.testing.assert_close(norm(x).square().mean(1), 1 - 1e-4 / (x.square().mean(1) + 1e-4), rtol=1e-12, atol=0)
    zeros = torch.zeros(1, 4, 1, 1, 1, dtype=torch.float64, requires_grad=True)
    norm(zeros).sum().backward()
    assert zeros.grad is not None and bool(torch.isfinite(zeros.grad).all())


def test_blocks_are_the_identity_at_the_start() -> None:
    place, condition = new_place(), torch.randn(1, CONDITION_WIDTH)
    x = torch.randn(2, 8, 4, 6, 4)
    assert torch.equal(Level(8, 2, 2)(x, place.features, condition, place.boundaries), x)


def test_the_condition_modulates_channels_only_when_it_has_learnt_to() -> None:
    block, conditions = ResidualBlock(8), torch.randn(2, 1, CONDITION_WIDTH)
    nn.init.normal_(block.conv2.weight)
    x, sides = torch.randn(2, 8, 3, 3, 3), SIDES["channel"]
    one, other = (block(x, condition, sides) for condition in conditions)
    assert torch.equal(one, other) and not torch.equal(one, x)
    randomise(block.film)
    one, other = (block(x, condition, sides) for condition in conditions)
    assert not torch.allclose(one, other, atol=1e-2)
    # one condition for each sample
    both = block(x, conditions[:, 0], sides)
    torch.testing.assert_close(both, torch.stack([one[0], other[1]]))
    # by hand
    scale, shift = block.film(conditions[0])[0].reshape(2, 8, 1, 1, 1)
    inner = block.norm2(block.conv1(F.silu(block.norm1(x)), sides)) * (1 + scale) + shift
    torch.testing.assert_close(one, x + block.conv2(F.silu(inner), sides))


def test_geometry_modulates_each_cell() -> None:
    """A solid voxel more changes the cell of the level that it lies in, and no other."""
    level, place = Level(8, 0, 2), new_place()
    randomise(level)
    x, condition = torch.randn(2, 8, 4, 6, 4), torch.randn(1, CONDITION_WIDTH)
    features = place.features.clone()
    features[1, 0, 5, 2, 7] -= 1
    before, after = (level(x, f, condition, place.boundaries) for f in (place.features, features))
    assert (before != after).any(1).nonzero().tolist() == [[1, 2, 1, 3]]
    scale, shift = level.geometry(space_to_depth(features, 2)).chunk(2, dim=1)
    torch.testing.assert_close(after, x + scale * x + shift)


@pytest.mark.parametrize(("fine", "coarse"), [(3, 6), (1, 8)])
def test_sampling_starts_from_averages_and_copies(fine: int, coarse: int) -> None:
    down, up, group = Down(fine, coarse), Up(coarse, fine), 8 * fine // coarse
    for conv in (down.conv, up.conv):
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    x = torch.randn(2, fine, 4, 2, 6)
    rows = space_to_depth(x, 2)
    averages = torch.stack([rows[:, group * i : group * (i + 1)].mean(1) for i in range(coarse)], dim=1)
    torch.testing.assert_close(down(x), averages)
    copies = up(averages)
    torch.testing.assert_close(copies, depth_to_space(averages[:, [i // group for i in range(8 * fine)]], 2))
    torch.testing.assert_close(down(copies), averages)


@pytest.mark.parametrize("layer", [lambda: Down(8, 24), lambda: Up(24, 8), lambda: Down(2, 32)])
def test_widths_that_do_not_divide(layer: Any) -> None:
    with pytest.raises(ValueError, match="Expected widths of which 8 · finer is a multiple of the coarser, got"):
        layer()


@pytest.mark.parametrize("basis", ["patch", "haar"])
def test_the_linear_path_is_all_there_is_at_the_start(basis: Basis) -> None:
    encoder, decoder = new_networks(basis)
    place = new_place()
    fields = new_fields(place, "velocity", "heat")
    z = encoder(fields, place)
    torch.testing.assert_close(
        z, sum(encoder.linear[n](space_to_depth(u, 4), place.boundaries) for n, u in fields.items())
    )
    decoded = decoder(z, place, ["salt", "velocity"])
    assert {name: x.shape for name, x in decoded.items()} == {"salt": (2, 1, 8, 12, 8), "velocity": (2, 6, 8, 12, 8)}
    for name, x in decoded.items():
        torch.testing.assert_close(x, depth_to_space(decoder.linear[name](z, place.boundaries), 4))


@pytest.mark.parametrize("basis", ["patch", "haar"])
def test_rolled_by_patches_all_is_rolled(basis: Basis) -> None:
    """Along periodic axes; along the axis between walls it is not."""
    encoder, decoder = new_networks(basis)
    randomise(encoder, decoder)
    place = new_place()
    fields = new_fields(place, "velocity", "salt")

    def both(shift: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        cells = [4 * s for s in shift]
        there = place._replace(features=place.features.roll(cells, (2, 3, 4)))
        z = encoder({name: u.roll(cells, (2, 3, 4)) for name, u in fields.items()}, there)
        decoded = decoder(z, there, ["velocity"])["velocity"]
        return z.roll([-s for s in shift], (2, 3, 4)), decoded.roll([-s for s in cells], (2, 3, 4))

    for expected, found in zip(both((0, 0, 0)), both((1, 2, 0)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(both((0, 0, 1))[0], both((0, 0, 0))[0], atol=1e-2)


def test_absent_fields_leave_no_trace() -> None:
    encoder, decoder = new_networks()
    randomise(encoder, decoder)
    place = new_place()
    fields = new_fields(place, "velocity", "heat")
    z = encoder(fields, place)
    decoded = decoder(z, place, ["heat"])["heat"]
    randomise(encoder.stems["salt"], encoder.linear["salt"], decoder.heads["salt"], decoder.linear["velocity"])
    for training in (True, False):
        encoder.train(training)
        decoder.train(training)
        torch.testing.assert_close(encoder(fields, place), z, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(decoder(z, place, ["heat"])["heat"], decoded, rtol=1e-4, atol=1e-4)
    # nor does the order; of a field of zeros the networks know through the condition alone
    torch.testing.assert_close(encoder(dict(reversed(fields.items())), place), z, rtol=1e-4, atol=1e-4)
    with_zeros = {**fields, "salt": torch.zeros(2, 1, 8, 12, 8)}
    torch.testing.assert_close(encoder(with_zeros, place), z, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(encoder({"heat": fields["heat"]}, place), z, atol=1e-2)


@pytest.mark.parametrize("there", [["velocity"], ["salt", "heat"]])
def test_every_parameter_has_a_gradient_in_training(there: list[str]) -> None:
    encoder, decoder = new_networks()
    randomise(encoder, decoder)
    place = new_place()
    z = encoder(new_fields(place, *there), place)
    sum(x.square().mean() for x in decoder(z, place, there).values()).backward()
    for network, parts in ((encoder, ("stems", "linear")), (decoder, ("heads", "linear"))):
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            part, _, rest = name.partition(".")
            assert bool(parameter.grad.any()) == (part not in parts or rest.partition(".")[0] in there), name


@pytest.mark.parametrize("names", [[], ["velocity", "density"]])
def test_fields_that_the_networks_do_not_know(names: list[str]) -> None:
    encoder, decoder = new_networks()
    place = new_place()
    message = r"Expected at least one field of \['velocity', 'heat', 'salt'\] and no other, got \["
    with pytest.raises(ValueError, match=message):
        encoder({name: torch.zeros(2, 3, 8, 12, 8) for name in names}, place)
    with pytest.raises(ValueError, match=message):
        decoder(torch.zeros(2, 5, 2, 3, 2), place, names)


@pytest.mark.parametrize("bf16", [False, True])
def test_recomputed_gradients_are_the_same(bf16: bool) -> None:
    encoder, decoder = new_networks()
    randomise(encoder, decoder)
    both = nn.ModuleList([encoder, decoder])
    place = new_place()
    fields = new_fields(place, "velocity")
    grads = []
    for on in (False, True):
        for level in (*encoder.levels, *decoder.levels):
            level.recompute = on
        both.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = decoder(encoder(fields, place), place, ["velocity"])["velocity"].float().square().mean()
        loss.backward()
        grads.append({name: p.grad.clone() for name, p in both.named_parameters() if p.grad is not None})
    assert len(grads[0]) == len(list(both.parameters()))
    assert all(torch.equal(grad, grads[1][name]) for name, grad in grads[0].items())


def test_under_autocast_the_numbers_are_near() -> None:
    encoder, decoder = new_networks("haar")
    randomise(encoder, decoder)
    place = new_place()
    fields = new_fields(place, "velocity", "salt")
    z = encoder(fields, place)
    decoded = decoder(z, place, ["velocity"])["velocity"]
    with torch.autocast("cpu", torch.bfloat16):
        found = encoder(fields, place), decoder(z, place, ["velocity"])["velocity"]
    for x, expected in zip(found, (z, decoded), strict=True):
        assert 0 < float((x.float() - expected).norm()) < 0.05 * float(expected.norm())


def test_every_size_runs_without_memory_of_its_own() -> None:
    """Base size at 128³; the FLOPs of its products are those by hand."""
    sizes = (32, [64, 128, 256], [2, 3, 4], 2)
    with FakeTensorMode():
        encoder = Encoder({"velocity": 3}, *sizes, "haar", num_conditions(1))
        decoder = Decoder({"velocity": 3}, *sizes, "haar", num_conditions(1))
        condition = torch.zeros(1, num_conditions(1))
        place = Place(torch.zeros(1, 2, 128, 128, 128), condition, SIDES["channel"])
        u = torch.zeros(1, 3, 128, 128, 128)
        z = encoder({"velocity": u}, place)
        decoded = decoder(z, place, ["velocity"])["velocity"]
        assert z.shape == (1, 32, 16, 16, 16) and decoded.shape == u.shape
        flops = count_flops(lambda: decoder(z, place, ["velocity"]), {decoder: "decoder"})["decoder"]
        small = sum(p.numel() for name, p in decoder.named_parameters() if "film" in name or "embed" in name)
    cells = 16**3
    blocks = 2 * 27 * (4 * 256**2 * cells + 3 * 128**2 * 8 * cells + 2 * 64**2 * 64 * cells)
    ups = 8 * 128 * 256 * cells + 8 * 64 * 128 * 8 * cells
    ends = 27 * 64 * 24 * 64 * cells + 32 * 256 * cells + 27 * 32 * 3 * 512 * cells
    geometry = sum(2 * f**3 * 2 * w * (128 // f) ** 3 for f, w in ((2, 64), (4, 128), (8, 256)))
    assert flops == pytest.approx(2 * (blocks + ups + ends + geometry), rel=2e-6)
    assert 2 * small < 2e-6 * flops


def test_on_the_meta_device_too() -> None:
    with torch.device("meta"):
        encoder = Encoder({"velocity": 3}, 32, [64, 128, 256], [2, 3, 4], 2, "patch", num_conditions(1))
    assert all(p.is_meta for p in encoder.parameters()) and not list(encoder.buffers())


def test_what_the_networks_are_told_of_a_channel() -> None:
    grid = Grid((24, 1, 16), (0.4, 7.0, 0.1), SIDES["channel"])
    place = describe(Geometry(grid), [False, True], 4)
    none = [1.0, 0, 0, 0, 0]
    sides = [none] * 4 + [[0, 1.0, 0, 0, 0], [0, 0, 1.0, 0, 0]]
    expected = [math.log(4), 0.0, 0.0, math.log2(16 / 32), *(x for side in sides for x in side), 0.0, 1.0]
    torch.testing.assert_close(place.condition, torch.tensor([expected]))
    assert place.condition.shape == (1, num_conditions(2)) and place.boundaries == grid.boundaries
    assert place.features.shape == (1, 2, 24, 4, 16)
    assert torch.equal(place.features[:, :, :, 3:], geometry_features(Geometry(grid)))


@pytest.mark.parametrize("sides", list(SIDES))
def test_every_kind_of_side_has_its_own_number(sides: str) -> None:
    condition = describe(Geometry(Grid((4, 4, 4), (1.0, 1.0, 1.0), SIDES[sides])), [True], 2).condition[0]
    names = ["periodic", "no_slip", "free_slip", "inflow", "outflow"]
    for (axis, end), one_hot in zip(product(range(3), range(2)), condition[4:34].reshape(6, 5), strict=True):
        assert one_hot.tolist() == [float(SIDES[sides][axis][end] == name) for name in names]


def test_a_place_does_not_depend_on_the_unit_of_length() -> None:
    solid = torch.rand(2, 8, 6, 4) < 0.3
    metres, millimetres = (
        describe(Geometry(Grid((8, 6, 4), (0.1 * s, 0.2 * s, 0.3 * s), SIDES["mixed"]), solid), [True], 2)
        for s in (1.0, 1e3)
    )
    torch.testing.assert_close(metres.condition, millimetres.condition)
    torch.testing.assert_close(metres.features, millimetres.features)
    assert metres.features.shape[0] == 2
    moved = metres.to(torch.float64)
    assert moved.features.dtype == moved.condition.dtype == torch.float64 and moved.boundaries == metres.boundaries
