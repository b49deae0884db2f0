"""What a surrogate agrees on with a solver: what it says, and one clear line for everything that does not agree."""

import json
from dataclasses import replace

import pytest
import torch
from small import SHAPE, Road

from latentphys.fields import FieldSpec, State
from latentphys.grid import PERIODIC, Geometry, Grid
from latentphys.surrogate import Contract, Models, Quantity, Surrogate


@pytest.fixture(scope="module")
def contract(road: Road) -> Contract:
    return Models.load(road.dynamics).contract("open_channel")


def test_it_says_what_a_solver_has_to_know(road: Road, contract: Contract) -> None:
    store = road.store("open_channel")
    assert (contract.family, contract.grid, contract.interval) == ("open_channel", store.grid, store.times[1])
    assert contract.fields == tuple(store.specs.values()) and contract.layout == store.attributes["layout"]
    assert contract.fixed == (False, False, True) and contract.compression == 4
    assert [(q.name, q.size, q.unit) for q in contract.parameters] == [
        ("force", 3, None),
        ("porosity", 1, None),
        ("viscosity", 1, None),
    ]
    text = str(contract)
    for line in (
        "family      open_channel",
        "Δt          0.012 s",
        "cells       16 (any) × 16 (any) × 16, multiples of 4",
        "spacing     0.19635 × 0.0981748 × 0.0625 m",
        "y+ periodic, z- no_slip, z+ free_slip",
        "field       'velocity', a flux in m3/s, constraint solenoidal",
        "viscosity [unit not recorded], constant, in training about 0.0",
    ):
        assert line in text
    assert Surrogate.load(road.dynamics).contract("open_channel") == contract


def test_the_flows_that_it_is_for_agree(road: Road, contract: Contract) -> None:
    for time in (0, 3):
        contract.check(road.store("open_channel")[3, time])
    state = road.store("open_channel")[3, 0]
    contract.check(replace(state, fields={"velocity": state.velocity[None]}))
    longer = Geometry(replace(state.grid, shape=(32, 8, 16)))
    contract.check(State({"velocity": torch.zeros(3, 32, 8, 16)}, longer, 0.0, {}, "open_channel"))
    contract.check(contract)


def test_a_dictionary_keeps_everything(contract: Contract) -> None:
    units = replace(
        contract,
        parameters=tuple(replace(q, unit="m2/s", required=True) for q in contract.parameters),
        fixed=(True,) * 3,
    )
    for one in (contract, units):
        assert Contract.from_dict(json.loads(json.dumps(one.to_dict()))) == one
    assert units != contract and "(required)" in str(units) and "viscosity [m2/s]" in str(units)
    data = contract.to_dict()
    for wrong in ({k: v for k, v in data.items() if k != "interval"}, {**data, "colour": "red"}):
        with pytest.raises(ValueError, match="Expected the entries of a contract, got"):
            Contract.from_dict(wrong)


def test_every_mismatch_of_a_state_has_a_line(road: Road, contract: Contract) -> None:
    grid = Grid((18, 16, 8), (0.19635, 0.2, 0.0625), PERIODIC)
    velocity = torch.zeros(2, 2, 3, *grid.shape)
    state = State({"velocity": velocity}, Geometry(grid), 0.0, {"viscocity": 1.0}, "pipe")
    required = replace(contract, parameters=tuple(replace(q, required=q.name == "force") for q in contract.parameters))
    lines = required.mismatches(state)
    assert lines == [
        "Expected family 'open_channel', got 'pipe'.",
        "Expected the boundary 'no_slip' on z-, got 'periodic'.",
        "Expected the boundary 'free_slip' on z+, got 'periodic'.",
        "Expected a spacing of 0.0981748 m along y, got 0.2 m.",
        "Expected a multiple of 4 cells along x, got 18.",
        "Expected 16 cells along z, got 8.",
        "Expected velocity of shape (3, 18, 16, 8), or a batch of it, got (2, 2, 3, 18, 16, 8).",
        "Expected the parameter 'force', got none.",
        "Expected parameters among ['force', 'porosity', 'viscosity'], got 'viscocity'.",
    ]
    with pytest.raises(ValueError, match="(?s)family 'open_channel', got 'pipe'.*'viscocity'"):
        required.check(state)
    other = State({"p": torch.zeros(SHAPE)}, road.store("open_channel").geometry(0), 0.0, {}, "open_channel")
    assert contract.mismatches(other) == [
        "Expected the field 'velocity', a flux in m3/s, constraint solenoidal, got only ['p']."
    ]


def test_every_mismatch_of_a_contract_has_a_line(contract: Contract) -> None:
    ours = replace(
        contract,
        fields=(*contract.fields, FieldSpec("p", "scalar", "Pa")),
        parameters=(
            Quantity("viscosity", 1, False, True, [0.0], [1.0], "m2/s"),
            Quantity("force", 3, True, False, [0.0] * 3, [1.0] * 3),
            Quantity("porosity", 1, False, False, [0.0], [1.0], "1", required=True),
        ),
    )
    theirs = replace(
        ours,
        interval=0.01,
        layout="cell_spectral",
        fields=(FieldSpec("velocity", "vector", "m/s"),),
        parameters=(
            Quantity("viscosity", 1, False, True, [0.0], [1.0], "Pa s"),
            Quantity("force", 1, True, False, [0.0], [1.0], "N"),
        ),
    )
    assert ours.mismatches(theirs) == [
        "Expected fluxes in the layout 'face_flux', got 'cell_spectral'.",
        "Expected an interval of 0.012 s, got 0.01 s.",
        "Expected the field 'velocity', a flux in m3/s, constraint solenoidal, got 'velocity', a vector in m/s, "
        "constraint none.",
        "Expected the field 'p', a scalar in Pa, constraint none, got only ['velocity'].",
        "Expected the parameter 'viscosity' in m2/s, got it in Pa s.",
        "Expected the parameter 'force' of size 3, got size 1.",
        "Expected the parameter 'porosity', got none.",
    ]
    dx, dy, dz = (h * (1 + 1e-5) for h in ours.grid.spacing)
    near = replace(ours, interval=ours.interval * (1 + 1e-9), grid=replace(ours.grid, spacing=(dx, dy, dz)))
    assert ours.mismatches(near) == []
