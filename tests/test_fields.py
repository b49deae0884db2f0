"""Field specifications and the state that owns fields, geometry, time and parameters."""

import json
from typing import Any

import pytest
import torch
from reference import box, random_flux, random_geometry

from latentphys.fields import VELOCITY, Domain, FieldSpec, State, domain_from_dict
from latentphys.grid import Geometry
from latentphys.sphere import Sphere

GRID = box("channel")
SPHERE = Sphere(6, 12, radius=2.0, quadrature="equiangular")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("u", "tensor", "m/s"), r"Expected a field kind of flux \| scalar \| vector, got 'tensor'"),
        (("u", "flux", "m3/s", "free"), r"Expected a constraint of solenoidal \| .* \| none, got 'free'"),
        (("u", "vector", "m/s", "solenoidal"), "Expected kind 'flux' for the solenoidal field 'u', got 'vector'"),
    ],
)
def test_impossible_fields_are_refused(arguments: tuple[Any, ...], message: str, unchecked: None) -> None:
    with pytest.raises(ValueError, match=message):
        FieldSpec(*arguments)


def test_a_field_knows_its_shape_and_survives_a_dict() -> None:
    assert VELOCITY.shape(GRID) == (3, 5, 4, 7)
    assert FieldSpec("w", "vector", "1/s").shape(GRID) == (3, 5, 4, 7)
    assert FieldSpec("p", "scalar", "Pa").shape(GRID) == (5, 4, 7)
    assert FieldSpec.from_dict(VELOCITY.to_dict()) == VELOCITY


@pytest.mark.parametrize(
    ("value", "got"), [(torch.zeros(3, 5, 4, 6), r"\(3, 5, 4, 6\)"), ([0.0], "list"), (torch.zeros(7), r"\(7,\)")]
)
def test_a_field_off_the_grid_is_refused(value: Any, got: str, unchecked: None) -> None:
    with pytest.raises(ValueError, match=rf"Expected field 'velocity' on the grid \(5, 4, 7\), got {got}"):
        State({"velocity": value}, Geometry(GRID))


def test_a_state_without_velocity_says_what_it_has() -> None:
    state = State({"p": torch.zeros(5, 4, 7), "b": torch.zeros(3, 5, 4, 7)}, Geometry(GRID))
    with pytest.raises(ValueError, match=r"Expected a field 'velocity' in this state, got \['b', 'p'\]"):
        _ = state.velocity


def test_a_state_cannot_be_changed_from_outside() -> None:
    fields = {"velocity": random_flux(GRID)}
    state = State(fields, Geometry(GRID), parameters={"viscosity": 1.0})
    flux = fields.pop("velocity")
    assert state.velocity is flux and state.grid is GRID and state.domain is GRID
    with pytest.raises(TypeError):
        state.fields["velocity"] = flux  # type: ignore[index]
    with pytest.raises(TypeError):
        state.parameters["viscosity"] = 2.0  # type: ignore[index]
    with pytest.raises(AttributeError):
        state.time = 1.0  # type: ignore[misc]


def test_replacing_fields_keeps_everything_else() -> None:
    geometry = random_geometry(GRID)
    state = State(
        {"velocity": random_flux(GRID), "p": torch.zeros(5, 4, 7)}, geometry, 2.0, {"viscosity": 3.0}, "channel"
    )
    flux = random_flux(GRID)
    later = state.with_fields(time=2.5, velocity=flux)
    assert later.velocity is flux and later.fields["p"] is state.fields["p"]
    assert (later.time, later.family, later.geometry) == (2.5, "channel", geometry)
    assert dict(later.parameters) == {"viscosity": 3.0}
    assert state.with_fields(velocity=flux).time == 2.0 and state.velocity is not flux


def test_a_state_moves_with_its_fields_and_parameters() -> None:
    state = State({"velocity": random_flux(GRID)}, Geometry(GRID), 1.0, {"viscosity": torch.ones(1), "name": "x"})
    moved = state.to("meta")
    assert moved.velocity.device.type == "meta"
    assert moved.parameters["viscosity"].device.type == "meta" and moved.parameters["name"] == "x"
    assert state.velocity.device.type == "cpu"


def test_a_field_on_a_sphere_has_two_components_and_no_faces() -> None:
    assert FieldSpec("u", "vector", "m/s").shape(SPHERE) == (2, 6, 12)
    assert FieldSpec("h", "scalar", "m").shape(SPHERE) == (6, 12)
    with pytest.raises(ValueError, match=r"scalar or vector on a sphere, got the flux 'velocity'; use kind 'vector'"):
        VELOCITY.shape(SPHERE)


@pytest.mark.parametrize("domain", [GRID, SPHERE])
def test_a_domain_survives_a_dict(domain: Domain) -> None:
    assert domain_from_dict(json.loads(json.dumps(domain.to_dict()))) == domain


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "torus"}, r"domain of kind box \| sphere, got 'torus'"),
        ({"nlat": None}, "Expected nlat, nlon, radius and quadrature of a sphere, got .*None"),
        ({"nlat": 1}, "Expected nlat ≥ 2"),
        ({"quadrature": "healpix"}, "Expected a quadrature of"),
        ({"kind": "box"}, "Expected a grid with shape, spacing and boundaries"),
    ],
)
def test_an_impossible_domain_is_refused(change: dict[str, Any], message: str, unchecked: None) -> None:
    with pytest.raises(ValueError, match=message):
        domain_from_dict({**SPHERE.to_dict(), **change})


def test_a_state_on_a_sphere_has_no_box() -> None:
    state = State({"h": torch.zeros(6, 12), "velocity": torch.ones(2, 6, 12)}, SPHERE)
    assert state.domain == SPHERE and state.with_fields(h=torch.ones(6, 12)).place == SPHERE
    assert state.to("meta").velocity.device.type == "meta"
    for name in ("grid", "geometry"):
        with pytest.raises(ValueError, match="Expected a state in a box, got one on Sphere.*use `domain`"):
            getattr(state, name)
    with pytest.raises(ValueError, match=r"Expected field 'h' on the grid \(6, 12\), got \(12, 6\)"):
        State({"h": torch.zeros(12, 6)}, SPHERE)
