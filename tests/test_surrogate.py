"""A surrogate in a solver's loop: the same bits as a rollout, snapshots, changed states, exact mass, clear refusals."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import SHAPE, Road, train
from torch import Tensor

from latentphys import exact, operators
from latentphys.data import open_store
from latentphys.families import NavierStokes
from latentphys.fields import State
from latentphys.grid import PERIODIC, Boundaries, Geometry, Grid
from latentphys.rollout import rollout_store
from latentphys.surrogate import Surrogate
from latentphys.training import load_dynamics
from latentphys.transformer.conditioning import store_parameters

FAMILIES = ("open_channel", "porous")
WALLS: Boundaries = (PERIODIC[0], PERIODIC[1], ("no_slip", "no_slip"))


@pytest.fixture(scope="module")
def surrogate(road: Road) -> Surrogate:
    return Surrogate.load(road.dynamics)


def first(road: Road, family: str = "porous", trajectory: int = 3) -> State:
    return road.store(family)[trajectory, 0]


def is_conservative(flux: Tensor, geometry: Geometry) -> bool:
    closed = flux[~geometry.open_faces]
    return bool((operators.div(flux, geometry.grid) == 0.0).all() and (closed == 0.0).all())


@pytest.mark.parametrize("family", FAMILIES)
def test_it_says_what_a_rollout_says(road: Road, surrogate: Surrogate, tmp_path: Path, family: str) -> None:
    dynamics, autoencoder = load_dynamics(road.dynamics)
    reference = road.store(family)
    store = open_store(rollout_store(autoencoder, dynamics, reference, tmp_path / "out", num_steps=4, trajectories=[3]))
    dt = surrogate.families[family]

    def parameters(time: float) -> Mapping[str, Any]:
        return store_parameters(reference, 3, round(time / dt))

    state = surrogate.init(first(road, family))
    assert torch.equal(state.velocity, store.read("velocity", 0, 0)) and state.time == 0.0
    for t in range(1, 5):
        state = surrogate.step(state, parameters=parameters)
        assert torch.equal(state.velocity, store.read("velocity", 0, t))
        assert state.time == pytest.approx(store.times[t])
        assert is_conservative(state.velocity, state.geometry)
        assert np.array_equal(np.asarray(state.parameters["force"]), reference.parameters["force"][3, t])


@pytest.mark.parametrize("family", FAMILIES)
def test_eight_steps_are_eight_times_one(road: Road, surrogate: Surrogate, family: str) -> None:
    state = surrogate.init(first(road, family))
    token = surrogate.snapshot()
    at_once = surrogate.step(state, num_steps=8)
    state = surrogate.restore(token)
    for _ in range(8):
        state = surrogate.step(state)
    assert torch.equal(state.velocity, at_once.velocity)
    assert state.time == pytest.approx(at_once.time) == pytest.approx(8 * surrogate.families[family])


def test_restoring_repeats_the_same_bits(road: Road, surrogate: Surrogate) -> None:
    state = surrogate.step(surrogate.init(first(road)))
    before, token = state.velocity.clone(), surrogate.snapshot()
    ahead = surrogate.step(state, num_steps=3)
    ahead.velocity.zero_()  # what a solver does to its copies is no concern of the snapshot
    state.velocity.zero_()
    again = surrogate.restore(token)
    assert torch.equal(again.velocity, before) and again.time == state.time
    again.velocity.zero_()
    repeated = surrogate.step(surrogate.restore(token), num_steps=3)
    state = surrogate.step(surrogate.step(surrogate.restore(token)), num_steps=2)
    assert torch.equal(state.velocity, repeated.velocity) and state.velocity.abs().max() > 0
    surrogate.init(first(road, "open_channel"))
    assert surrogate.restore(token).family == "porous"


def test_arrays_go_in_and_arrays_come_out(road: Road, surrogate: Surrogate) -> None:
    start = first(road)
    expected = surrogate.step(surrogate.init(start), num_steps=2).velocity
    given = surrogate.init(start.velocity.numpy(), start.geometry, "porous", start.parameters).velocity.numpy()
    flux = surrogate.step(given, num_steps=2)
    assert isinstance(flux, np.ndarray) and flux.dtype == np.float64
    np.testing.assert_array_equal(flux, expected.numpy())
    tensor = surrogate.step(torch.from_numpy(flux))
    assert isinstance(tensor, Tensor)
    assert isinstance(surrogate.step(tensor.numpy().astype(np.float32)), np.ndarray)
    reversed_axes = tensor.numpy()[:, ::-1].copy()[:, ::-1]
    assert isinstance(surrogate.step(reversed_axes), np.ndarray)


class Foreign:
    """An array of another library: all that is known of it is DLPack."""

    def __init__(self, values: Tensor) -> None:
        self._values = values

    def __dlpack__(self, **options: Any) -> Any:
        return self._values.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._values.__dlpack_device__()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_arrays_of_other_libraries_go_in_through_dlpack(road: Road, surrogate: Surrogate, dtype: torch.dtype) -> None:
    start = first(road)
    flux = start.velocity.to(dtype)
    expected = surrogate.step(surrogate.init(replace(start, fields={"velocity": flux})).velocity.to(dtype))
    state = surrogate.init(Foreign(flux), start.geometry, "porous", start.parameters)
    given = state.velocity.to(dtype)
    kept = given.clone()
    got = surrogate.step(Foreign(given))
    assert isinstance(got, Tensor) and hasattr(got, "__dlpack__") and got.dtype == torch.float64
    assert torch.equal(got, expected)
    got.zero_()
    assert torch.equal(given, kept)


def test_a_duration_is_a_whole_number_of_intervals(road: Road, surrogate: Surrogate) -> None:
    state, dt = surrogate.init(first(road)), surrogate.families["porous"]
    token = surrogate.snapshot()
    for duration, num_steps, remainder in (
        (3 * dt, 3, 0.0),
        (3 * dt * (1 + 1e-9), 3, 0.0),
        (3 * dt * (1 - 1e-9), 3, 0.0),
        (3.5 * dt, 3, 0.5 * dt),
        (0.25 * dt, 0, 0.25 * dt),
        (1e-7 * dt, 0, 1e-7 * dt),
    ):
        window = surrogate.negotiate(duration)
        assert (window.num_steps, window.interval) == (num_steps, dt)
        assert window.remainder == pytest.approx(remainder, rel=1e-9) and (remainder or window.remainder == 0.0)
    expected = surrogate.step(state, num_steps=3)
    got = surrogate.step(surrogate.restore(token), duration=3 * dt)
    assert torch.equal(got.velocity, expected.velocity) and got.time == expected.time
    for duration, message in (
        (2.5 * dt, "whole intervals of 0.02 s, got 0.05 s; the nearest: 0.04 s or 0.06 s. Or give a fallback"),
        (0.5 * dt, "got 0.01 s; the nearest: 0.02 s"),
        (1e-7 * dt, "got 2e-09 s; the nearest: 0.02 s"),
        (0.0, "Expected a duration > 0 s, got 0.0"),
        (torch.nan, "Expected a duration > 0 s, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            surrogate.step(got, duration=duration)
    with pytest.raises(ValueError, match="Expected num_steps or a duration, got both: 2 and 0.04 s"):
        surrogate.step(got, num_steps=2, duration=0.04)
    with pytest.raises(ValueError, match="Expected init before"):
        Surrogate(surrogate.factory).negotiate(dt)


def test_what_is_left_of_a_duration_is_for_the_fallback(road: Road, surrogate: Surrogate) -> None:
    calls: list[tuple[float, float]] = []

    def solver(state: State, duration: float) -> State:
        calls.append((state.time, duration))
        return state.with_fields(velocity=0.5 * state.velocity.float() + 1e-4)

    hybrid = Surrogate(surrogate.factory, fallback=solver)
    start = first(road)
    dt = hybrid.families["porous"]
    expected = hybrid.step(hybrid.init(start), num_steps=2)
    state = hybrid.step(hybrid.init(start), duration=2.25 * dt)
    assert len(calls) == 1 and calls[0] == pytest.approx((2 * dt, 0.25 * dt))
    assert state.time == pytest.approx(2.25 * dt) and hybrid.num_fallbacks == 1
    raw = 0.5 * expected.velocity.float() + 1e-4
    assert torch.equal(state.velocity, exact.conserve(flux=raw.double(), geometry=state.geometry))
    assert is_conservative(state.velocity, state.geometry)
    fresh = surrogate.init(state)
    assert torch.equal(hybrid.step(state).velocity, surrogate.step(fresh).velocity)  # it goes on from what came back
    hybrid.step(hybrid.init(start), duration=0.5 * dt)
    assert len(calls) == 2 and hybrid.log[0].quantities == () and hybrid.log[0].is_fallback
    for wrong, message in (
        (lambda s, t: s.velocity, "Expected a State from the fallback, got Tensor"),
        (lambda s, t: s.with_fields(velocity=s.velocity * torch.nan), "Expected a finite velocity"),
    ):
        broken = Surrogate(surrogate.factory, fallback=wrong)
        with pytest.raises(ValueError, match=message):
            broken.step(broken.init(start), duration=0.5 * dt)


def test_the_rest_of_a_duration_begins_with_the_parameters_of_then(road: Road, surrogate: Surrogate) -> None:
    """Also where no interval comes before it, or less than a millionth of one is left."""
    seen: list[State] = []

    def solver(state: State, duration: float) -> State:
        seen.append(state)
        return state

    hybrid = Surrogate(surrogate.factory, fallback=solver)
    dt, start = hybrid.families["porous"], first(road)
    force = torch.as_tensor(start.parameters["force"])

    def parameters(time: float) -> Mapping[str, Any]:
        return {**start.parameters, "force": force * (2 + time / dt)}

    for n, duration in enumerate((2.25 * dt, 0.5 * dt, 1e-7 * dt)):
        state = hybrid.step(hybrid.init(start), duration=duration, parameters=parameters)
        assert len(seen) == n + 1 and hybrid.num_fallbacks == 1
        begin = 2.0 if n == 0 else 0.0
        torch.testing.assert_close(seen[n].parameters["force"], force * (2 + begin))
        torch.testing.assert_close(state.parameters["force"], force * (2 + duration / dt))


def test_a_fallback_that_forgets_the_solids_does_not_empty_them(road: Road, surrogate: Surrogate) -> None:
    start = first(road)
    hybrid = Surrogate(
        surrogate.factory,
        fallback=lambda s, t: replace(s, fields={"velocity": s.velocity + 1e-4}, place=Geometry(s.grid)),
    )
    state = hybrid.step(hybrid.init(start), duration=0.5 * hybrid.families["porous"])
    closed = ~start.geometry.open_faces
    assert bool(closed.any()) and not state.velocity[closed].any()
    assert is_conservative(state.velocity, start.geometry)


def test_fields_that_the_model_does_not_advance_are_not_returned(road: Road, surrogate: Surrogate) -> None:
    start = first(road)
    rich = start.with_fields(temperature=torch.ones(SHAPE))
    expected = surrogate.step(surrogate.init(start))
    state = surrogate.init(rich)
    assert set(state.fields) == {"velocity"}
    state = surrogate.step(state.with_fields(temperature=torch.ones(SHAPE)))
    assert set(state.fields) == {"velocity"} and torch.equal(state.velocity, expected.velocity)


def test_experts_may_stay_in_their_file(road: Road, surrogate: Surrogate) -> None:
    start = first(road)
    expected = surrogate.step(surrogate.init(start)).velocity
    lazy = Surrogate.load(road.dynamics, "cpu", max_resident_experts=1)
    got = lazy.step(lazy.init(start)).velocity
    torch.testing.assert_close(got, expected, rtol=0.0, atol=1e-5 * float(expected.abs().max()))
    assert lazy.factory.digest == surrogate.factory.digest


def test_an_artefact_is_opened_as_one(
    road: Road, surrogate: Surrogate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from latentphys.surrogate import export

    monkeypatch.setattr(export, "open_artefact", lambda path, device: (path, device, surrogate.factory)[2])
    (tmp_path / "artefact.json").write_text("{}")
    assert Surrogate.load(tmp_path).factory is surrogate.factory
    with pytest.raises(ValueError, match="Expected max_resident_experts with a checkpoint only, got the artefact"):
        Surrogate.load(tmp_path, max_resident_experts=1)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("kind", ["state", "tensor", "array"])
def test_a_changed_state_is_encoded_anew(road: Road, surrogate: Surrogate, kind: str, in_place: bool) -> None:
    start = first(road)
    state = surrogate.step(surrogate.init(start))
    token = surrogate.snapshot()
    changed = 0.5 * state.velocity
    kept = surrogate.step(state).velocity
    fresh = surrogate.init(State({"velocity": changed}, state.geometry, state.time, state.parameters, "porous"))
    expected = surrogate.step(fresh).velocity
    state = surrogate.restore(token)
    given: Any = {"state": state, "tensor": state.velocity, "array": state.velocity.numpy()}[kind]
    if in_place:
        state.velocity.mul_(0.5)
    else:
        given = {"state": state.with_fields(velocity=changed), "tensor": changed, "array": changed.numpy()}[kind]
    got = surrogate.step(given)
    flux = got.velocity if isinstance(got, State) else torch.as_tensor(got)
    assert torch.equal(flux, expected) and not torch.equal(flux, kept)


def test_parameters_are_asked_for_at_both_ends_of_every_step(road: Road, surrogate: Surrogate) -> None:
    state, dt, asked = surrogate.init(first(road)), surrogate.families["porous"], []
    token, constant = surrogate.snapshot(), dict(state.parameters)

    def parameters(time: float) -> Mapping[str, Any]:
        asked.append(time / dt)
        return {**constant, "force": constant["force"] * (1 + time)}

    varying = surrogate.step(state, num_steps=2, parameters=parameters)
    np.testing.assert_allclose(asked, [0, 1, 1, 2])
    torch.testing.assert_close(varying.parameters["force"], constant["force"] * (1 + 2 * dt))
    steady = surrogate.step(surrogate.restore(token), num_steps=2)
    assert not torch.equal(steady.velocity, varying.velocity)
    other = surrogate.step(replace(surrogate.restore(token), parameters={**constant, "viscosity": 1.0}), num_steps=2)
    assert not torch.equal(steady.velocity, other.velocity)


@pytest.mark.parametrize("family", FAMILIES)
def test_mass_is_exact_in_turns_with_a_solver(road: Road, surrogate: Surrogate, family: str) -> None:
    """Solver, surrogate, solver, …: what the surrogate returns balances bit for bit, whatever the solver hands it."""
    start = first(road, family)
    force = torch.as_tensor(start.parameters["force"])
    solver = NavierStokes(start.geometry, start.parameters["viscosity"], lambda t: force)
    state, dt = surrogate.init(start), surrogate.families[family] / 8
    for _ in range(2):
        fields = solver.working({"velocity": state.velocity[None]})
        advanced = solver.advance(fields, state.time, dt)["velocity"][0]
        assert not is_conservative(advanced.double(), state.geometry)
        state = surrogate.step(state.with_fields(time=state.time + dt, velocity=advanced))
        assert state.velocity.dtype == torch.float64
        assert is_conservative(state.velocity, state.geometry)
    assert state.time == pytest.approx(2 * (surrogate.families[family] + dt))


def test_calls_out_of_order_are_refused(road: Road, surrogate: Surrogate) -> None:
    state, surrogate = first(road), Surrogate(surrogate.factory)
    for call in (lambda: surrogate.step(state), surrogate.snapshot, lambda: surrogate.step(state.velocity)):
        with pytest.raises(ValueError, match="Expected init before this call, got a surrogate without a state"):
            call()
    with pytest.raises(ValueError, match="a geometry and a family beside a bare flux"):
        surrogate.init(state.velocity)
    with pytest.raises(ValueError, match="Expected a State, or a flux as a NumPy array, .* got list"):
        surrogate.init([1.0])
    with pytest.raises(ValueError, match=r"a state of a family among \['open_channel', 'porous'\], got one without"):
        surrogate.init(replace(state, family=None))
    with pytest.raises(ValueError, match=r"a family of \['open_channel', 'porous'\], got 'pipe'"):
        surrogate.init(replace(state, family="pipe"))
    surrogate.init(state)
    with pytest.raises(ValueError, match="num_steps ≥ 1, got 0"):
        surrogate.step(state, num_steps=0)
    with pytest.raises(ValueError, match="Expected a State, or a flux as a NumPy array, .* got list"):
        surrogate.step([1.0])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_flux_that_is_not_finite_is_refused_and_forgotten(road: Road, surrogate: Surrogate, value: float) -> None:
    start = first(road)
    state = surrogate.init(start)
    expected = surrogate.step(state).velocity
    state = surrogate.init(start)
    broken = state.velocity.clone()
    broken[0, 1, 2, 3] = value
    for given in (broken, broken.numpy(), state.with_fields(velocity=broken)):
        with pytest.raises(ValueError, match="a finite velocity, got NaN or infinite values; step back to a snapshot"):
            surrogate.step(given)
    with pytest.raises(ValueError, match="a finite velocity"):
        surrogate.init(state.with_fields(velocity=broken))
    assert torch.equal(surrogate.step(state).velocity, expected)


def test_another_box_is_refused(road: Road, surrogate: Surrogate) -> None:
    state = surrogate.init(first(road))
    with pytest.raises(ValueError, match="the geometry given to init, got another one; call init again"):
        surrogate.step(first(road, trajectory=2))
    with pytest.raises(ValueError, match="the family given to init, 'porous', got 'open_channel'"):
        surrogate.step(replace(state, family="open_channel"))
    same = Geometry(state.grid, ~state.geometry.fluid)
    surrogate.step(replace(state, place=same))
    spacing = state.grid.spacing
    for grid, message in (
        (Grid(SHAPE, spacing, WALLS), "the boundaries this model knows"),
        (Grid(SHAPE, (spacing[0] * 2, *spacing[1:])), "the spacing this model knows"),
        (Grid((18, 16, 16), spacing), "divisible by the compression of 4"),
    ):
        with pytest.raises(ValueError, match=message):
            surrogate.init(torch.zeros(3, *grid.shape).double(), Geometry(grid), "porous")
    with pytest.raises(ValueError, match=r"one velocity of shape \(3, 16, 16, 16\), got \(1, 3, 16, 16, 16\)"):
        surrogate.step(state.velocity[None])


def test_parameters_that_the_model_does_not_know_are_refused(road: Road, surrogate: Surrogate) -> None:
    state = first(road)
    message = r"parameters among \['force', 'porosity', 'viscosity'\], got 'viscocity'"
    with pytest.raises(ValueError, match=message):
        surrogate.init(replace(state, parameters={"viscocity": 0.01}))
    surrogate.init(state)
    with pytest.raises(ValueError, match=message):
        surrogate.step(state.velocity, parameters=lambda t: {"viscocity": 0.01})


def test_models_that_do_not_step_from_one_state_are_refused(road: Road, tmp_path: Path) -> None:
    run = train("dynamics", road.inputs("dynamics"), tmp_path / "run", "dynamics.num_frames=2", "trainer.num_steps=1")
    with pytest.raises(ValueError, match="a dynamics model of one input frame, got one of 2"):
        Surrogate.load(run)
    with pytest.raises(ValueError, match="kind 'dynamics', got one of kind 'autoencoder'"):
        Surrogate.load(road.autoencoder)
