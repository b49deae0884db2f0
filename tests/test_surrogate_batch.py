"""Several flows at once in a surrogate: each is what it is alone, but for the rounding of FP32 in another batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from small import SHAPE, Road

from latentphys import operators
from latentphys.fields import State
from latentphys.grid import Geometry, Grid
from latentphys.surrogate import Alarm, Surrogate, stack

TOLERANCE = 1e-5
"""Of the largest flux, for a few steps."""


@pytest.fixture(scope="module")
def surrogate(road: Road) -> Surrogate:
    return Surrogate.load(road.dynamics)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return float((a - b).abs().max()) <= TOLERANCE * float(b.abs().max())


@pytest.mark.parametrize("family", ["open_channel", "porous"])
def test_a_batch_is_its_flows_one_by_one(road: Road, surrogate: Surrogate, family: str) -> None:
    """In one empty box, and in boxes with solids and porosities of their own."""
    states = [road.store(family)[i, 0] for i in (0, 3)]
    batch = surrogate.init(states)
    first = batch.velocity
    batch = surrogate.step(batch, num_steps=2)
    assert batch.velocity.shape == (2, 3, *SHAPE) and batch.velocity.dtype == torch.float64
    assert batch.geometry.batch_shape == ((2,) if family == "porous" else ())
    assert not operators.div(batch.velocity, batch.grid).any()
    assert not batch.velocity[~batch.geometry.open_faces.expand_as(batch.velocity)].any()
    for n, state in enumerate(states):
        start = surrogate.init(state)
        assert close(first[n], start.velocity)
        assert close(batch.velocity[n], surrogate.step(start, num_steps=2).velocity)
    assert not close(batch.velocity[0], batch.velocity[1])


def test_restoring_a_batch_repeats_the_same_bits(road: Road, surrogate: Surrogate) -> None:
    state = surrogate.init([road.store("porous")[i, 0] for i in (1, 2)])
    token = surrogate.snapshot()
    ahead = surrogate.step(state, num_steps=2)
    ahead_again = surrogate.step(surrogate.restore(token), num_steps=2)
    assert torch.equal(ahead.velocity, ahead_again.velocity)
    state = surrogate.restore(token)
    state.velocity[1].mul_(0.5)
    changed = surrogate.step(state)
    plain = surrogate.step(surrogate.restore(token))
    assert close(changed.velocity[0], plain.velocity[0]) and not close(changed.velocity[1], plain.velocity[1])


def test_a_batch_of_fluxes_in_one_box(road: Road, surrogate: Surrogate) -> None:
    states = [road.store("open_channel")[i, 0] for i in (0, 1)]
    viscosity = [float(state.parameters["viscosity"]) for state in states]
    force = torch.stack([torch.as_tensor(state.parameters["force"]) for state in states])
    flux = np.stack([state.velocity.numpy() for state in states])
    start = surrogate.init(flux, states[0].geometry, "open_channel", {"viscosity": viscosity, "force": force})
    out = surrogate.step(start.velocity.numpy())
    assert isinstance(out, np.ndarray) and out.shape == flux.shape
    expected = surrogate.step(surrogate.init(stack(states)))
    assert close(torch.from_numpy(out), expected.velocity)
    with pytest.raises(ValueError, match=r"a batch of velocity of shape \(2, 3, 16, 16, 16\), got \(3, 16, 16, 16\)"):
        surrogate.step(out[0])


def test_parameters_are_each_flows_or_everybodys(road: Road, surrogate: Surrogate) -> None:
    """Also a force of three numbers for a batch of three, which is one for all."""
    one = road.store("porous")[0, 0]
    force, viscosity = torch.tensor([20.0, 0.0, -20.0]).double(), float(one.parameters["viscosity"])
    flux = one.velocity.expand(3, -1, -1, -1, -1)

    def stepped(force: torch.Tensor, viscosity: object) -> torch.Tensor:
        parameters = {"force": force, "viscosity": viscosity, "porosity": one.parameters["porosity"]}
        state = State({"velocity": flux}, one.geometry, 0.0, parameters, "porous")
        velocity: torch.Tensor = surrogate.step(surrogate.init(state)).velocity
        return velocity

    shared = stepped(force, viscosity)
    assert torch.equal(shared, stepped(force.expand(3, 3), torch.full((3,), viscosity, dtype=torch.float64)))
    forces = stepped(torch.stack([force, -force, force]), viscosity)
    assert close(forces[0], shared[0]) and close(forces[2], shared[2]) and not close(forces[1], shared[1])
    thicker = stepped(force, [viscosity, 3 * viscosity, viscosity])
    assert close(thicker[0], shared[0]) and close(thicker[2], shared[2]) and not close(thicker[1], shared[1])
    alone = surrogate.init(replace(one, parameters={**one.parameters, "force": force}))
    assert close(shared[0], surrogate.step(alone).velocity)


def test_only_flows_that_ring_are_repeated(road: Road, surrogate: Surrogate) -> None:
    """The middle one of three leaves the limit on its energy; the solver gets it alone, with its own parameters."""
    states = [road.store("porous")[i, 0] for i in (0, 1, 2)]
    states[1] = states[1].with_fields(velocity=30.0 * states[1].velocity)
    seen: list[State] = []

    def solver(state: State, duration: float) -> State:
        seen.append(state)
        return state.with_fields(velocity=state.velocity / 30)

    alarm = Alarm("porous", {"energy": (0.0, 10.0), "energy_change": (0.0, 5.0)})
    hybrid = Surrogate(surrogate.factory, alarm=alarm, fallback=solver)
    start = hybrid.init(states)
    token = hybrid.snapshot()
    batch = hybrid.step(start)
    assert [entry.flow for entry in hybrid.log] == [1] and hybrid.log[0].quantities == ("energy",)
    (given,) = seen
    assert given.velocity.shape == (3, *SHAPE) and torch.equal(given.velocity, start.velocity[1])
    assert torch.equal(given.geometry.fluid, states[1].geometry.fluid)
    assert torch.equal(torch.as_tensor(given.parameters["force"]), torch.as_tensor(states[1].parameters["force"]))
    torch.testing.assert_close(batch.velocity[1], given.velocity / 30)
    assert not operators.div(batch.velocity, batch.grid).any()
    plain = surrogate.step(surrogate.init(states))
    assert torch.equal(batch.velocity[0], plain.velocity[0]) and torch.equal(batch.velocity[2], plain.velocity[2])
    after = hybrid.step(batch)
    assert hybrid.num_fallbacks == 1  # the flow that was brought back is quiet, and steps from there
    one = surrogate.step(surrogate.init(replace(states[1], fields={"velocity": batch.velocity[1]}))).velocity
    assert close(after.velocity[1], one)
    again = hybrid.step(hybrid.step(hybrid.restore(token)))
    assert torch.equal(again.velocity, after.velocity) and hybrid.num_fallbacks == 1


def test_flows_that_do_not_go_together_are_refused(road: Road, surrogate: Surrogate) -> None:
    porous, channel = road.store("porous")[0, 0], road.store("open_channel")[0, 0]
    for states, message in (
        ([], "at least one state, got none"),
        ([porous, channel], "with the same family, got 'porous' and 'open_channel'"),
        ([porous, replace(porous, time=1.0)], "with the same time, got 0.0 and 1.0"),
        (
            [porous, replace(porous, parameters={})],
            r"with the same parameters, got \['force', 'porosity', 'viscosity'\]",
        ),
        ([porous, porous.with_fields(p=torch.ones(SHAPE))], r"with the same fields, got \['velocity'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            surrogate.init(states)
    longer = Geometry(Grid((32, 16, 16), porous.grid.spacing))
    other = State({"velocity": torch.zeros(3, 32, 16, 16)}, longer, 0.0, porous.parameters, "porous")
    with pytest.raises(ValueError, match="samples on one grid, got several"):
        surrogate.init([porous, other])
