"""What each head promises: its constraint for any channels, every flux of its class, and how fast it learns one."""

import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import abc_flux, box, random_flux, random_geometry, two_pi_box
from torch import Tensor
from torch.autograd import gradcheck

from latentphys import operators
from latentphys.autoencoders.head import Head
from latentphys.autoencoders.heads import Heads
from latentphys.autoencoders.helmholtz import (
    FluxHead,
    GeneralHead,
    IrrotationalHead,
    PotentialHead,
    ProjectionHead,
    RieszHead,
    SolenoidalHead,
)
from latentphys.autoencoders.normaliser import FieldScale
from latentphys.autoencoders.scalar_heads import ConservedHead, PlainHead, PositiveHead
from latentphys.configuration import compose
from latentphys.fields import CONSTRAINTS, FieldSpec
from latentphys.grid import Geometry, Grid
from latentphys.hodge import edge_laplacian_power, energy_product, vector_potential
from latentphys.inflow import through_sides
from latentphys.projection import project
from latentphys.training.models import build, check_classes

SOLENOIDAL: dict[str, type[SolenoidalHead]] = {
    "projection": ProjectionHead,
    "riesz": RieszHead,
    "potential": PotentialHead,
}
HEADS: dict[str, type[FluxHead]] = {**SOLENOIDAL, "irrotational": IrrotationalHead, "general": GeneralHead}
FOLDER = Path(__file__).parent.parent / "configs" / "autoencoder" / "head"


def inflow_profile(grid: Grid) -> Tensor:
    return torch.linspace(0.5, 2.0, grid.shape[1] * grid.shape[2]).double().reshape(grid.shape[1:])


def pores(name: str, shape: tuple[int, int, int]) -> Geometry:
    return random_geometry(box(name, shape), fraction=0.3)


def with_inflow(shape: tuple[int, int, int], solid: bool) -> Geometry:
    grid = box("duct", shape)
    voxels = pores("duct", shape).solid if solid else None
    return Geometry(grid, voxels, {"x-": inflow_profile(grid)})


PLACES: dict[str, Callable[[tuple[int, int, int]], Geometry]] = {
    "channel": lambda shape: Geometry(box("channel", shape)),
    "closed": lambda shape: Geometry(box("closed", shape)),
    "periodic": lambda shape: Geometry(box("periodic", shape)),
    "porous": lambda shape: pores("periodic", shape),
    "walled pores": lambda shape: pores("mixed", shape),
    "duct": lambda shape: Geometry(box("duct", shape)),
    "bend": lambda shape: Geometry(box("bend", shape)),
    "through": lambda shape: Geometry(box("through", shape)),
    "porous bend": lambda shape: pores("bend", shape),
    "inflow": lambda shape: with_inflow(shape, solid=False),
    "porous inflow": lambda shape: with_inflow(shape, solid=True),
}
OPEN = ("duct", "bend", "through", "porous bend", "inflow", "porous inflow")
INFLOW = ("inflow", "porous inflow")
EVERYWHERE = [(head, place) for head in HEADS for place in PLACES]
SUITED = [
    (head, place)
    for head, place in EVERYWHERE
    if not (head == "riesz" and place in OPEN) and not (head == "irrotational" and place in INFLOW)
]


@lru_cache
def geometry(place: str, shape: tuple[int, int, int] = (5, 4, 7)) -> Geometry:
    torch.manual_seed(3)
    return PLACES[place](shape)


def scale_of(grid: Grid, mean: float = 1.0) -> FieldScale:
    """A mean flow along every axis that lets one pass."""
    u = mean * torch.tensor([0.3, -0.2, 0.1]).double() * torch.tensor(grid.through)
    return FieldScale(grid, operators.flux_of(u.reshape(3, 1, 1, 1), grid), 0.7)


def raw_for(head: Head, grid: Grid, *batch: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*batch, head.num_channels, *grid.shape, dtype=dtype)


def norm(flux: Tensor) -> Tensor:
    return flux.double().square().sum((-4, -3, -2, -1)).sqrt()


def net(flux: Tensor, where: Geometry) -> Tensor:
    return operators.div(flux.double(), where.grid).square().sum((-3, -2, -1)).sqrt()


def closed(flux: Tensor, where: Geometry) -> Tensor:
    return flux[(~where.open_faces).expand_as(flux)]


@pytest.mark.parametrize(("name", "place"), [(h, p) for h, p in SUITED if h in SOLENOIDAL])
def test_any_channels_become_a_flux_that_balances_exactly(name: str, place: str) -> None:
    where, head = geometry(place), SOLENOIDAL[name]()
    size = torch.tensor([1e-6, 1.0, 1e6]).reshape(3, 1, 1, 1, 1)
    flux = head.exact(size * raw_for(head, where.grid, 3, dtype=torch.float32), where, scale_of(where.grid))
    assert flux.dtype == torch.float64 and flux.abs().max() > 0
    assert (operators.div(flux, where.grid) == 0.0).all()
    assert (closed(flux, where) == 0.0).all()


@pytest.mark.parametrize(("name", "place"), [(h, p) for h, p in SUITED if h in SOLENOIDAL])
def test_in_fp32_it_balances_to_rounding_in_boxes_and_to_the_tolerance_round_voxels(name: str, place: str) -> None:
    tol = 1e-3
    where, head = geometry(place), SOLENOIDAL[name](tol)
    scale = scale_of(where.grid)
    raw = raw_for(head, where.grid, 2, dtype=torch.float32)
    flux, exact = head(raw, where, scale), head.exact(raw, where, scale)
    before = GeneralHead().admit(head.flux(raw, where, scale), where)
    # An inflow is taken off and put back; a potential that drives it through the box has as many roundings as cells.
    rounding = torch.finfo(torch.float32).eps * (4 * max(where.grid.shape) if where.inflow else 8)
    left = 0.0 if where.is_empty else 1.01 * tol
    assert flux.dtype == torch.float32
    assert (closed(flux, where) == 0.0).all()
    assert (net(flux, where) <= left * net(before, where) + rounding * norm(before)).all()
    assert (norm(flux - exact) <= (4 * left + rounding) * norm(before)).all()


def test_a_looser_tolerance_stops_earlier() -> None:
    where, scale = geometry("porous"), scale_of(geometry("porous").grid)
    raw = raw_for(ProjectionHead(), where.grid, 1, dtype=torch.float32)
    before = net(GeneralHead()(raw, where, scale), where)
    for tol in (1e-1, 1e-2, 1e-3):
        assert 0.1 * tol < float(net(ProjectionHead(tol)(raw, where, scale), where) / before) < 1.01 * tol


@pytest.mark.parametrize("place", INFLOW)
@pytest.mark.parametrize("name", ["projection", "potential", "general"])
def test_a_prescribed_inflow_is_kept(name: str, place: str) -> None:
    where, head = geometry(place), HEADS[name]()
    raw = raw_for(head, where.grid, 2, dtype=torch.float32)
    area = where.grid.face_areas[0]
    wanted = (inflow_profile(where.grid) * area * where.fluid[0]).expand(2, -1, -1)
    assert bool((wanted > 0).any())
    for flux, rtol in (
        (head(raw, where, scale_of(where.grid)), 1e-6),
        (head.exact(raw, where, scale_of(where.grid)), 1e-12),
    ):
        torch.testing.assert_close(through_sides(flux, where)["x-"].double(), wanted, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("place", [p for h, p in SUITED if h == "irrotational"])
@pytest.mark.parametrize("tol", [1e-1, 1e-6])
def test_the_irrotational_part_is_orthogonal_to_every_solenoidal_flux(place: str, tol: float) -> None:
    """Also where the projection stops early: what it has removed is a gradient all the same.

    What that makes of an open high side, which no array stores, then closes its cells' balance to the tolerance only.
    """
    where, head = geometry(place), IrrotationalHead(tol)
    grid, scale = where.grid, scale_of(where.grid)
    raw = raw_for(head, grid, 2, dtype=torch.float32)
    solenoidal = project(random_flux(grid, 2), where)
    early = tol if place == "porous bend" else 0.0
    for flux, eps in ((head(raw, where, scale), 1e-6 + early), (head.exact(raw, where, scale), 1e-12)):
        size = (
            energy_product(flux.double(), flux.double(), where) * energy_product(solenoidal, solenoidal, where)
        ).sqrt()
        assert (size > 0).all()
        assert (energy_product(flux.double(), solenoidal, where).abs() <= eps * size).all()
        assert (closed(flux, where) == 0.0).all()
    whole = where.mask(scale.denormalise(raw.double(), grid))
    torch.testing.assert_close(head.exact(raw, where, scale), whole - project(whole, where), rtol=0, atol=1e-10)


def edges_amid_free_faces(where: Geometry) -> Tensor:
    """Low edges inside the box all of whose four faces are free."""
    free, grid = where.free_faces, where.grid
    edges = torch.ones_like(free)
    for axis in range(3):
        for normal, along in (((axis + 1) % 3, (axis + 2) % 3), ((axis + 2) % 3, (axis + 1) % 3)):
            face = free[normal]
            edges[axis] &= face & face.roll(1, along)
            if not grid.periodic[along]:
                edges[axis].select(along, 0).fill_(False)
    return edges


@pytest.mark.parametrize("place", [p for h, p in SUITED if h == "irrotational"])
def test_the_irrotational_part_has_no_vorticity(place: str) -> None:
    where, head = geometry(place), IrrotationalHead(0.1)
    edges, scale = edges_amid_free_faces(where), scale_of(where.grid)
    raw = raw_for(head, where.grid, 1)
    vorticity = operators.vorticity(head.exact(raw, where, scale)[0], where.grid)
    before = operators.vorticity(where.mask(scale.denormalise(raw, where.grid))[0], where.grid)
    assert int(edges.sum()) > 10
    assert vorticity[edges].abs().max() < 1e-12 * before[edges].abs().max()


def test_a_gradient_has_no_say_over_an_inflow() -> None:
    where = geometry("inflow")
    with pytest.raises(ValueError, match=r"without a prescribed inflow for an irrotational flux, got one .* \['x-'\]"):
        IrrotationalHead()(raw_for(IrrotationalHead(), where.grid, 1), where, scale_of(where.grid))


@pytest.mark.parametrize("place", PLACES)
def test_a_general_head_changes_nothing_on_the_free_faces(place: str) -> None:
    where, head, scale = geometry(place), GeneralHead(), scale_of(geometry(place).grid)
    raw = raw_for(head, where.grid, 2)
    flux, meant = head.exact(raw, where, scale), scale.denormalise(raw, where.grid)
    free = where.free_faces.expand_as(flux)
    assert torch.equal(flux[free], meant[free])
    assert (closed(flux, where) == 0.0).all()
    assert operators.div(flux, where.grid).abs().max() > 0.1


@pytest.mark.parametrize("place", [p for p in PLACES if p not in INFLOW])
def test_the_parts_of_a_general_head_add_up_and_are_of_their_kinds(place: str) -> None:
    where, head, scale = geometry(place), GeneralHead(), scale_of(geometry(place).grid)
    raw = raw_for(head, where.grid, 1)
    parts, flux = head.parts(raw, where, scale), head.exact(raw, where, scale)
    torch.testing.assert_close(parts.curl + parts.harmonic + parts.gradient, flux, rtol=0, atol=1e-13)
    solenoidal = ProjectionHead().exact(raw, where, scale)
    torch.testing.assert_close(parts.curl + parts.harmonic, solenoidal, rtol=0, atol=1e-10)
    torch.testing.assert_close(parts.gradient, IrrotationalHead().exact(raw, where, scale), rtol=0, atol=1e-10)
    size = float(energy_product(flux, flux, where))
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert abs(float(energy_product(parts[one], parts[other], where))) < 1e-11 * size
    assert all(part.dtype == torch.float64 for part in parts)


def test_the_parts_ask_for_a_geometry_without_inflow() -> None:
    where = geometry("inflow")
    with pytest.raises(ValueError, match="without a prescribed inflow, got one; subtract inflow.inflow_flux"):
        GeneralHead().parts(raw_for(GeneralHead(), where.grid, 1), where, scale_of(where.grid))


@pytest.mark.parametrize("place", OPEN)
def test_the_isometric_curl_asks_for_a_box_without_open_sides(place: str) -> None:
    where, head = geometry(place), RieszHead()
    for decode in (head, head.exact):
        with pytest.raises(ValueError, match="a box of walls and periodic axes, .*; use a projection instead"):
            decode(raw_for(head, where.grid, 1), where, scale_of(where.grid))


@pytest.mark.parametrize(("name", "place"), SUITED)
def test_gradients_reach_the_channels(name: str, place: str) -> None:
    where, head = geometry(place), HEADS[name]()
    raw = raw_for(head, where.grid, 2, dtype=torch.float32).requires_grad_()
    flux = head(raw, where, scale_of(where.grid))
    (flux * torch.randn_like(flux)).sum().backward()
    assert raw.grad is not None and bool(torch.isfinite(raw.grad).all())
    means = 3 * [True] if name not in ("riesz", "potential") else 3 * [True] + list(where.grid.through)
    assert (raw.grad.abs().amax((0, 2, 3, 4)) > 0).tolist() == means


@pytest.mark.parametrize(
    ("name", "place"), [(h, p) for h, p in SUITED if p in ("channel", "porous", "porous bend", "porous inflow")]
)
def test_derivatives(name: str, place: str) -> None:
    where, head = geometry(place, (3, 2, 3)), HEADS[name]()
    scale = scale_of(where.grid)
    raw = raw_for(head, where.grid, 1).requires_grad_()
    assert gradcheck(lambda x: head.admit(head.flux(x, where, scale), where, 1e-13), (raw,), fast_mode=True)


@pytest.mark.parametrize("name", HEADS)
def test_autocast_changes_no_bit(name: str) -> None:
    where, head = geometry("channel"), HEADS[name]()
    raw = raw_for(head, where.grid, 1, dtype=torch.bfloat16)
    plain = head(raw, where, scale_of(where.grid))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(raw, where, scale_of(where.grid)), plain)


def rank(columns: Tensor) -> int:
    """Of what fluxes, one of a row, span; no singular value may lie between large and small."""
    values = torch.linalg.svdvals(columns.flatten(1))
    large = values > 1e-6 * values[0]
    assert not bool(((values > 1e-11 * values[0]) & large.logical_not()).any())
    return int(large.sum())


@pytest.mark.parametrize(
    ("name", "place"), [(h, p) for h, p in SUITED if h != "potential" or p not in ("duct", "bend", "through")]
)
def test_every_flux_of_its_class_can_be_said(name: str, place: str) -> None:
    where, head = geometry(place, (3, 4, 3)), HEADS[name]()
    grid, scale = where.grid, scale_of(where.grid)

    def span(count: int, decode: Callable[[Tensor], Tensor]) -> int:
        unit = torch.eye(count * grid.num_cells, dtype=torch.float64).reshape(-1, count, *grid.shape)
        return rank(decode(unit) - decode(torch.zeros_like(unit[:1])))

    said = span(head.num_channels, lambda raw: head.admit(head.flux(raw, where, scale), where, 1e-13))
    free, solenoidal = int(where.free_faces.sum()), span(3, lambda flux: project(flux, where, 1e-13))
    assert 0 < solenoidal < free
    assert said == {"none": free, "solenoidal": solenoidal, "irrotational": free - solenoidal}[head.constraint]


def test_a_potential_lets_out_what_passes_the_face_before() -> None:
    """All that it cannot say in an empty box: there it continues unchanged beyond an open high side."""
    where, head = geometry("duct"), PotentialHead()
    flux = head.exact(raw_for(head, where.grid, 2), where, scale_of(where.grid))
    torch.testing.assert_close(through_sides(flux, where)["x+"], flux[:, 0, -1], rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("name", "place"), [(h, p) for h, p in SUITED if p not in INFLOW and not (h == "potential" and p in OPEN)]
)
def test_the_channels_of_a_given_flux(name: str, place: str) -> None:
    where, head = geometry(place), HEADS[name]()
    grid, scale = where.grid, scale_of(where.grid)
    target = head.admit(random_flux(grid, 2), where, 1e-13)
    raw = scale.normalise(target, grid)
    if name in ("riesz", "potential"):
        edges, uniform = vector_potential(target - scale.profile, Geometry(grid))  # the solids are fluid at rest
        potential = edges / grid.per_face(grid.spacing, edges) / scale.size
        along = potential / min(grid.lengths) if name == "potential" else edge_laplacian_power(potential, grid, 0.5)
        mean = operators.velocity(uniform[..., None, None, None].expand_as(target), grid) / scale.size
        raw = torch.cat([along, mean], dim=1)
    for flux in (head.flux(raw, where, scale), head.exact(raw, where, scale)):
        assert (norm(flux - target) < 1e-11 * norm(target)).all()


@pytest.mark.parametrize("place", ["channel", "periodic", "closed", "porous", "walled pores"])
@pytest.mark.parametrize("name", ["projection", "riesz"])
def test_one_step_of_steepest_descent_finds_any_solenoidal_target(name: str, place: str) -> None:
    """H Hᵀ is the projection itself: the well-conditioned heads keep the sizes of all modes, round voxels too."""
    where, head = geometry(place), SOLENOIDAL[name]()
    scale = scale_of(where.grid)
    target = project(random_flux(where.grid, 1), where)
    raw = torch.zeros(1, head.num_channels, *where.grid.shape, dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        flux = head.admit(head.flux(raw, where, scale), where, 1e-13)
        error = operators.velocity(flux - target, where.grid) / scale.size
        (step,) = torch.autograd.grad(0.5 * error.square().sum(), raw)
        raw = (raw - step).detach().requires_grad_()
    assert norm(flux - target) < 1e-10 * norm(target)


def steps_to_learn(head: SolenoidalHead, n: int) -> int:
    """Steps of gradient descent, as long as the head lets them be, until 90 % of a large vortex are there."""
    where, target = Geometry(two_pi_box((n, n, n))), abc_flux(two_pi_box((n, n, n)))[None]
    scale = scale_of(where.grid, mean=0.0)

    def gradient(raw: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        raw = raw.detach().requires_grad_()
        error = head.admit(head.flux(raw, where, scale), where) - target
        loss = 0.5 * (operators.velocity(error, where.grid) / scale.size).square().sum()
        return loss.detach(), torch.autograd.grad(loss, raw)[0]

    vector = raw_for(head, where.grid, 1)
    for _ in range(30):  # the largest curvature, by the power method
        vector = gradient(vector / vector.norm(), torch.zeros_like(target))[1]
    raw, step = torch.zeros_like(vector), 1 / float(vector.norm())
    first, descent = gradient(raw, target)
    loss, steps = first, 0
    while loss > 0.01 * first:
        raw, steps = raw - step * descent, steps + 1
        loss, descent = gradient(raw, target)
    return steps


def test_only_the_plain_curl_learns_more_slowly_on_finer_grids() -> None:
    """Its curvature spreads from the box's wavenumber squared to the cell's, 4 times as far on half the cell size."""
    coarse, fine = ({name: steps_to_learn(head(), n) for name, head in SOLENOIDAL.items()} for n in (8, 16))
    for name in ("projection", "riesz"):
        assert coarse[name] == fine[name] == 1
    assert coarse["potential"] > 10
    assert 3 < fine["potential"] / coarse["potential"] < 5


@pytest.mark.parametrize(("name", "place"), [(h, p) for h, p in SUITED if h in SOLENOIDAL and p in ("channel", "duct")])
def test_a_uniform_flow_passes_the_head_untouched(name: str, place: str) -> None:
    """The harmonic part: a net flow through the box, which no potential of the box carries."""
    where, head = geometry(place), SOLENOIDAL[name]()
    grid, scale = where.grid, scale_of(where.grid)
    along = torch.tensor([2.0, -1.0, 3.0]) * torch.tensor(grid.through)
    velocity = along.reshape(3, 1, 1, 1).expand(3, *grid.shape).double()
    target = operators.flux_of(velocity, grid)
    raw = scale.normalise(target, grid)
    if name != "projection":
        everywhere = torch.tensor([2.0, -1.0, 3.0]).reshape(3, 1, 1, 1).expand_as(velocity) / scale.size
        raw = torch.cat([torch.zeros_like(raw), everywhere])
        target = target + scale.profile
    for flux in (head(raw[None], where, scale), head.exact(raw[None], where, scale)):
        torch.testing.assert_close(flux[0].double(), target, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("place", PLACES)
def test_projecting_cannot_raise_the_error_of_a_solenoidal_target(place: str) -> None:
    where, head = geometry(place), ProjectionHead(1e-6)
    scale = scale_of(where.grid)
    for seed in range(2):
        torch.manual_seed(seed)
        target = head.exact(raw_for(head, where.grid, 1), where, scale)
        raw = scale.normalise(target, where.grid) + raw_for(head, where.grid, 1)
        before, after = GeneralHead().exact(raw, where, scale) - target, head(raw, where, scale).double() - target
        assert float(energy_product(after, after, where)) < float(energy_product(before, before, where))


def test_a_box_that_the_scale_does_not_know_is_refused() -> None:
    for head in (each() for each in HEADS.values()):
        with pytest.raises(ValueError, match="the boundaries this model knows"):
            head(raw_for(head, box("closed"), 1), geometry("closed"), scale_of(box("channel")))


@pytest.mark.parametrize("tol", [0.0, 1.0])
def test_a_tolerance_that_is_none_is_refused(tol: float) -> None:
    with pytest.raises(ValueError, match="tolerance between 0 and 1"):
        ProjectionHead(tol)


def test_an_irrotational_field_is_a_flux() -> None:
    with pytest.raises(ValueError, match="kind 'flux' for the irrotational field 'u', got 'vector'"):
        FieldSpec("u", "vector", "m/s", "irrotational")


FIELDS: dict[tuple[str, str], type[Head]] = {
    ("flux", "solenoidal"): ProjectionHead,
    ("flux", "irrotational"): IrrotationalHead,
    ("flux", "none"): GeneralHead,
    ("scalar", "conserved"): ConservedHead,
    ("scalar", "positive"): PositiveHead,
    ("scalar", "none"): PlainHead,
    ("vector", "none"): PlainHead,
}
REFUSED = [
    (kind, constraint)
    for kind in ("flux", "scalar", "vector")
    for constraint in CONSTRAINTS
    if (kind, constraint) not in FIELDS and (kind == "flux" or constraint not in ("solenoidal", "irrotational"))
]


def field(kind: str, constraint: str) -> FieldSpec:
    return FieldSpec("q", kind, "m3/s" if kind == "flux" else "K", constraint)  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "constraint"), FIELDS)
def test_a_field_gets_the_head_of_its_constraint(kind: str, constraint: str) -> None:
    head = Heads().head(field(kind, constraint))
    assert type(head) is FIELDS[kind, constraint]
    assert head.constraint == constraint
    assert head.num_channels == (1 if kind == "scalar" else 3)


@pytest.mark.parametrize("name", SOLENOIDAL)
def test_solenoidal_fluxes_get_the_head_chosen_for_them(name: str) -> None:
    chosen = SOLENOIDAL[name](3e-3)
    heads = Heads(chosen)
    assert heads.head(field("flux", "solenoidal")) is chosen
    assert chosen.num_channels == (3 if name == "projection" else 6)
    irrotational = heads.head(field("flux", "irrotational"))
    assert isinstance(irrotational, IrrotationalHead) and irrotational.tol == 3e-3


@pytest.mark.parametrize(("kind", "constraint"), REFUSED)
def test_constraints_that_no_head_keeps_are_refused(kind: str, constraint: str) -> None:
    with pytest.raises(ValueError, match=f"Expected the constraint .*none of the {kind} 'q', got '{constraint}'"):
        Heads().head(field(kind, constraint))


def test_a_head_of_other_fluxes_is_no_head_of_solenoidal_ones(unchecked: None) -> None:
    with pytest.raises(ValueError, match="head of solenoidal fluxes, got GeneralHead; choose autoencoder/head from"):
        Heads(GeneralHead())  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "constraint"), FIELDS)
@settings(max_examples=12)
@given(
    place=st.sampled_from([p for p in PLACES if p not in INFLOW]),
    shape=st.tuples(*3 * [st.integers(2, 5)]),
    size=st.sampled_from([1e-6, 1e-2, 1.0, 1e3, 1e6]),
    seed=st.integers(0, 10**6),
)
def test_whatever_the_network_says_the_field_is_admissible(
    kind: str, constraint: str, place: str, shape: tuple[int, int, int], size: float, seed: int
) -> None:
    torch.manual_seed(seed)
    where, spec = PLACES[place](shape), field(kind, constraint)
    grid, head = where.grid, Heads().head(spec)
    profile = torch.randn(1 if kind == "scalar" else 3, 1, 1, 1).double()
    if kind == "flux":
        profile = operators.flux_of(profile * torch.tensor(grid.through).reshape(3, 1, 1, 1), grid)
    scale = FieldScale(grid, profile, 0.7, spec)
    raw = (size * raw_for(head, grid, 2, dtype=torch.float32)).requires_grad_()
    x, single = head.exact(raw, where, scale), head(raw, where, scale)
    assert x.dtype == torch.float64 and single.dtype == torch.float32
    assert single.requires_grad and not x.requires_grad
    x, single = x.detach(), single.detach()
    assert x.shape == single.shape == (2, len(profile), *shape)
    largest = float(scale.denormalise(raw.detach(), grid).abs().max())
    near = 0.05 if isinstance(head, FluxHead) and not where.is_empty and constraint != "none" else 1e-5
    torch.testing.assert_close(single.double(), x, rtol=0, atol=near * largest)
    for values in (x, single):
        assert bool(torch.isfinite(values).all())
        if kind == "flux":
            assert (closed(values, where) == 0.0).all()
        elif constraint == "positive":
            assert (values > 0).all()
        else:
            assert (values[(~where.fluid).expand_as(values)] == 0.0).all()
    if constraint == "solenoidal":
        assert (operators.div(x, grid) == 0.0).all()
    elif constraint == "conserved":
        assert [math.fsum(c.flatten().tolist()) for c in x] == x.flatten(1).flip(1).cumsum(1)[:, -1].tolist()
    elif constraint == "irrotational":
        balanced = project(random_flux(grid, 2), where)
        bound = energy_product(x, x, where).sqrt() * energy_product(balanced, balanced, where).sqrt()
        assert (energy_product(x, balanced, where).abs() <= 1e-11 * bound + 1e-13 * largest).all()


@pytest.mark.parametrize("model", ["tiny", "base"])
def test_every_solenoidal_head_has_a_configuration(model: str) -> None:
    """Of any size of model, and of such classes as a checkpoint may name."""
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(SOLENOIDAL)
    for name, head in SOLENOIDAL.items():
        config = compose("train", ["stores=[a]", "run=a", f"autoencoder={model}", f"autoencoder/head={name}"])
        heads = build(config["autoencoder"]["heads"])
        check_classes(config["autoencoder"]["heads"], FOLDER)
        assert type(heads) is Heads and type(heads.solenoidal) is head and heads.solenoidal.tol == 1e-2


def test_the_tolerance_is_a_setting() -> None:
    overrides = ["stores=[a]", "run=a", "autoencoder/head=riesz", "autoencoder.heads.solenoidal.tol=1e-3"]
    heads = build(compose("train", overrides)["autoencoder"]["heads"])
    assert type(heads.solenoidal) is RieszHead and heads.solenoidal.tol == heads.irrotational.tol == 1e-3


@pytest.mark.parametrize("place", ["periodic", "channel", "closed", "porous"])
@pytest.mark.parametrize("head", [ProjectionHead(1e-8), RieszHead(1e-8), PotentialHead(1e-8)], ids=["P", "R", "A"])
def test_a_head_says_which_channels_make_a_flux(head: SolenoidalHead, place: str) -> None:
    """Round voxels it is the flux to the tolerance; nothing is left to learn but these channels."""
    where = geometry(place)
    scale = scale_of(where.grid)
    flux = project(random_flux(where.grid, 2), where)
    channels = head.channels_of(flux, where, scale)
    assert channels.shape == (2, head.num_channels, *where.grid.shape)
    torch.testing.assert_close(head.exact(channels, where, scale), flux, rtol=0, atol=1e-8 * float(flux.abs().max()))
