"""Heads of fields in cells: what solids hold, totals exact in every bit, values above zero for anything said."""

import math
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import box, random_geometry
from torch import Tensor
from torch.autograd import gradcheck

from latentphys.autoencoders.head import Head
from latentphys.autoencoders.normaliser import FieldScale
from latentphys.autoencoders.scalar_heads import SOFTNESS, ConservedHead, PlainHead, PositiveHead
from latentphys.fields import Constraint, FieldSpec
from latentphys.grid import Geometry, Grid

BATCH = 3
SIZES = (1e-6, 1e-3, 1.0, 1e3, 1e6)
PLACES = ("channel", "pores", "pores of each")


def place(name: str, shape: tuple[int, int, int] = (5, 4, 7)) -> Geometry:
    if name == "channel":
        return Geometry(box("channel", shape))
    return random_geometry(box("mixed", shape), *([BATCH] if name == "pores of each" else []))


def scale_of(
    grid: Grid, size: float = 0.7, mean: float = 0.4, kind: Literal["scalar", "vector"] = "scalar"
) -> FieldScale:
    """A mean profile along the walled axis."""
    constraint: Constraint = "none"
    profile = torch.linspace(-mean, mean, grid.shape[2]).double().expand(1 if kind == "scalar" else 3, 1, 1, -1)
    return FieldScale(grid, profile + mean, size, FieldSpec("q", kind, "K", constraint))


def raw_for(grid: Grid, channels: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(BATCH, channels, *grid.shape, dtype=dtype)


def fluid(where: Geometry, x: Tensor) -> Tensor:
    return where.fluid.unsqueeze(-4).expand_as(x)


def sums(x: Tensor) -> list[float]:
    """Each sample's exact sum, rounded once."""
    return [math.fsum(sample.flatten().tolist()) for sample in x]


def sums_in_many_orders(x: Tensor) -> list[list[float]]:
    flat = x.flatten(1)
    shuffled = flat[:, torch.randperm(flat.shape[1])]
    ascending = flat.sort(1).values
    each = [x.sum((1, 2, 3, 4)), x.sum(-1).sum(-1).sum(-1).sum(-1)]
    each += [order.cumsum(1)[:, -1] for order in (flat, flat.flip(1), shuffled, ascending, ascending.flip(1))]
    return [order.tolist() for order in each]


@pytest.mark.parametrize("kind", ["scalar", "vector"])
@pytest.mark.parametrize("name", PLACES)
def test_a_plain_field_is_what_the_network_says_and_zero_in_solids(
    name: str, kind: Literal["scalar", "vector"]
) -> None:
    where = place(name)
    scale = scale_of(where.grid, kind=kind)
    head = PlainHead(scale.num_components)
    x = head.exact(raw := raw_for(where.grid, head.num_channels), where, scale)
    inside = fluid(where, x)
    torch.testing.assert_close(scale.normalise(x, where.grid)[inside], raw.double()[inside], rtol=0, atol=1e-14)
    assert (x[~inside] == 0.0).all()
    assert x.dtype == torch.float64 and head(raw, where, scale).dtype == torch.float32
    torch.testing.assert_close(head(raw, where, scale).double(), x, rtol=0, atol=1e-6)


@given(
    name=st.sampled_from(PLACES),
    shape=st.tuples(*3 * [st.integers(2, 6)]),
    size=st.sampled_from(SIZES),
    scale=st.sampled_from([1e-9, 0.7, 1e7]),
    total=st.none() | st.floats(-1e9, 1e9),
    seed=st.integers(0, 10**6),
)
def test_a_total_is_exact_in_every_order(
    name: str, shape: tuple[int, int, int], size: float, scale: float, total: float | None, seed: int
) -> None:
    torch.manual_seed(seed)
    where = place(name, shape)
    volume = where.grid.cell_volume
    wanted = None if total is None else total * torch.tensor([1.0, -0.3, 0.0]).double()
    raw, of_field = size * raw_for(where.grid), scale_of(where.grid, scale)
    x = ConservedHead().exact(raw, where, of_field, wanted)
    assert x.dtype == torch.float64 and (x[~fluid(where, x)] == 0.0).all()
    assert all(order == sums(x) for order in sums_in_many_orders(x))
    own = PlainHead().exact(raw, where, of_field)
    for sample, got in enumerate(sums(x)):
        asked = sums(own)[sample] if wanted is None else float(wanted[sample]) / volume
        load = where.grid.num_cells * (0.8 + 8 * scale) + float(own[sample].abs().sum()) + 2 * abs(asked)
        assert abs(got - asked) <= 2.0**-50 * load
    again = ConservedHead().exact(raw, where, of_field, torch.tensor(sums(x), dtype=torch.float64) * volume)
    assert sums(again) == sums(x)


@pytest.mark.parametrize("name", PLACES)
def test_one_total_is_one_sum_in_every_snapshot(name: str) -> None:
    """The multiple nearest to total / volume of the quantum that grid and scale set; here by rational numbers."""
    where = place(name)
    scale = scale_of(where.grid)
    total = torch.tensor([0.1, -12.3456789, 7e-5], dtype=torch.float64)
    quantum = Fraction(2) ** (math.floor(math.log2(where.grid.num_cells * (0.8 + 8 * 0.7))) + 1 - 50)
    whole = [round(Fraction(t / where.grid.cell_volume) / quantum) for t in total.tolist()]
    for size in (1e-3, 1.0, 3.0):
        x = ConservedHead().exact(size * raw_for(where.grid), where, scale, total)
        assert sums(x) == [float(n * quantum) for n in whole]
        units = x / float(quantum)
        assert torch.equal(units, units.round())


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("given_total", [True, False])
def test_a_total_shifts_all_fluid_cells_alike(name: str, given_total: bool) -> None:
    where = place(name)
    scale, raw = scale_of(where.grid), raw_for(where.grid)
    total = torch.tensor([40.0, -3.0, 0.0]).double() if given_total else None
    x, own = ConservedHead().exact(raw, where, scale, total), PlainHead().exact(raw, where, scale)
    inside = fluid(where, x)
    cells = inside.sum((1, 2, 3, 4))
    missing = torch.zeros(BATCH).double() if total is None else total / where.grid.cell_volume - own.sum((1, 2, 3, 4))
    expected = own + inside * (missing / cells)[:, None, None, None, None]
    torch.testing.assert_close(x, expected, rtol=0, atol=4e-12)
    single = ConservedHead()(raw, where, scale, total)
    assert single.dtype == torch.float32 and (single[~inside] == 0.0).all()
    torch.testing.assert_close(single.double(), x, rtol=1e-6, atol=1e-6)
    if total is None:
        assert torch.equal(single, PlainHead()(raw, where, scale))


@pytest.mark.parametrize("name", PLACES)
def test_the_gradient_of_a_given_total_has_no_mean(name: str) -> None:
    """dc/d(raw) is the size times the removal of the mean over the fluid, or the size alone without a total."""
    where = place(name)
    scale, weights = scale_of(where.grid), raw_for(where.grid)
    raw = raw_for(where.grid).requires_grad_()
    inside = fluid(where, raw)
    weights = torch.where(inside, weights, 5.0)
    mean = (weights * inside).sum((1, 2, 3, 4), keepdim=True) / inside.sum((1, 2, 3, 4), keepdim=True)
    for head, total, expected in (
        (ConservedHead(), torch.ones(BATCH), (weights - mean) * inside),
        (ConservedHead(), None, weights * inside),
    ):
        (gradient,) = torch.autograd.grad((head(raw, where, scale, total) * weights).sum(), raw)
        torch.testing.assert_close(gradient, 0.7 * expected, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad((PlainHead()(raw, where, scale) * weights).sum(), raw)
    torch.testing.assert_close(gradient, 0.7 * weights * inside)


def test_totals_that_are_none_are_refused(unchecked: None) -> None:
    where = place("channel")
    scale, raw = scale_of(where.grid), raw_for(where.grid)
    for decode in (ConservedHead(), ConservedHead().exact):
        for total in (torch.tensor(1.0), torch.ones(2), torch.tensor([1.0, math.nan, 1.0])):
            with pytest.raises(
                ValueError, match=r"a finite total for each of 3 samples, got .*; pass a tensor of shap"
            ):
                decode(raw, where, scale, total)


def test_channels_that_are_not_finite_have_no_exact_total() -> None:
    where = place("channel")
    raw = raw_for(where.grid)
    raw[1, 0, 0, 0, :2] = torch.tensor([math.nan, math.inf])
    with pytest.raises(ValueError, match=r"finite channels, got 2 NaN or infinite values among 420"):
        ConservedHead().exact(raw, where, scale_of(where.grid))


def line(values: Tensor, size: float = 1.0, mean: float = 0.0) -> tuple[Tensor, Geometry, FieldScale]:
    """Numbers as the channels of a row of cells."""
    grid = Grid((len(values), 2, 2), (1.0, 1.0, 1.0))
    spec = FieldSpec("q", "scalar", "K", "positive")
    raw = values[:, None, None].expand(-1, 2, 2)[None, None]
    return raw, Geometry(grid), FieldScale(grid, torch.full((1, 1, 1, 1), mean, dtype=torch.float64), size, spec)


@given(
    raw=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=2, max_size=8),
    size=st.sampled_from([1e-12, 1e-6, 1.0, 1e6]),
    mean=st.sampled_from([0.0, 1e-3, 2.0, 1e3]),
)
def test_any_number_becomes_a_positive_one(raw: list[float], size: float, mean: float) -> None:
    head, arguments = PositiveHead(), line(torch.tensor(raw), size, mean * size)
    for x in (head(*arguments), head.exact(*arguments)):
        assert bool(torch.isfinite(x).all()) and bool((x > 0).all())


def test_far_below_zero_in_fp32_nothing_cancels() -> None:
    values = torch.tensor([-1e30, -1e12, -1e6, -3e5, -1e3, -10.0, -1.0, -1e-3, -0.0, 0.0, 1e-30, 1e-3, 1.0, 1e6, 1e30])
    expected = []
    with localcontext() as context:
        context.prec = 80
        for y in (Decimal(max(v, -1e6)) for v in values.tolist()):
            expected.append(float((y + (y * y + Decimal(SOFTNESS) ** 2).sqrt()) / 2))
    head, arguments = PositiveHead(), line(values)
    wanted = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(head.exact(*arguments)[0, 0, :, 0, 0], wanted, rtol=1e-14, atol=0)
    torch.testing.assert_close(head(*arguments)[0, 0, :, 0, 0].double(), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [1e-6, 3.0, 1e6])
def test_well_above_zero_values_are_what_the_network_says(size: float) -> None:
    """Up to ε²/4y, and monotone: nothing that was larger becomes smaller."""
    values = torch.linspace(-5, 5, 201).double()
    raw, where, scale = line(values, size, 2 * size)
    x = PositiveHead().exact(raw, where, scale)[0, 0, :, 0, 0] / size
    y = values + 2
    large = y > 0.5
    beyond = (x - y)[large] / (SOFTNESS**2 / (4 * y[large]))
    assert bool(((beyond > 0.999) & (beyond < 1.001)).all())
    assert bool((x.diff() > 0).all())


def test_a_positive_field_learns_from_anything_moderately_said() -> None:
    """Its slope is ½ at zero, falls to (ε/2y)² below and is finite at any number."""
    values = torch.tensor([-1e30, -1e3, -100.0, -1.0, 0.0, 1e-3, 1.0, 1e30]).requires_grad_()
    PositiveHead()(*line(values)).sum().backward()
    assert values.grad is not None
    slope = values.grad / 4  # each number stands in four cells
    assert slope[0] == 0
    torch.testing.assert_close(slope[1:4], (SOFTNESS / 2 / values[1:4].detach()).square(), rtol=1e-3, atol=0)
    torch.testing.assert_close(slope[4:], torch.tensor([0.5, 0.54975, 1.0, 1.0]), rtol=1e-4, atol=0)


def test_derivatives_of_a_positive_field() -> None:
    raw, where, scale = line(torch.linspace(-0.1, 0.1, 10).double(), 0.7, 0.02)
    assert gradcheck(lambda x: PositiveHead().field(x, where, scale), raw.clone().requires_grad_(), eps=1e-7)


def test_a_positive_field_goes_on_through_solids() -> None:
    where = place("pores")
    raw, scale = raw_for(where.grid), scale_of(where.grid)
    x = PositiveHead().exact(raw, where, scale)
    assert torch.equal(x, PositiveHead().exact(raw, Geometry(where.grid), scale)) and bool((x > 0).all())


@pytest.mark.parametrize("head", [PlainHead(), ConservedHead(), PositiveHead()], ids=lambda head: type(head).__name__)
def test_autocast_changes_no_bit(head: Head) -> None:
    where = place("pores")
    raw, scale = raw_for(where.grid).bfloat16(), scale_of(where.grid)
    plain = head(raw, where, scale)
    assert plain.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(raw, where, scale), plain)


@pytest.mark.parametrize("head", [PlainHead(), ConservedHead(), PositiveHead()], ids=lambda head: type(head).__name__)
def test_a_box_that_the_scale_does_not_know_is_refused(head: Head) -> None:
    for decode in (head, head.exact):
        with pytest.raises(ValueError, match="the boundaries this model knows"):
            decode(raw_for(box("closed")), Geometry(box("closed")), scale_of(box("channel")))
