"""Arrays and batches across the border between a solver and a surrogate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentphys import exact, operators
from latentphys.autoencoders import FamilyScale
from latentphys.fields import State
from latentphys.grid import Geometry
from latentphys.rollout import Parameters


def tensor(array: Any) -> Tensor:
    """An array of a solver in FP64: a NumPy array, a torch tensor, or anything with ``__dlpack__``.

    Raises:
        ValueError: anything else.
    """
    if isinstance(array, np.ndarray):
        return torch.from_numpy(np.array(array, dtype=np.float64))
    if isinstance(array, Tensor):
        return array.detach().double()
    if hasattr(array, "__dlpack__"):
        return torch.from_dlpack(array).double()
    raise ValueError(
        "Expected a State, or a flux as a NumPy array, a torch tensor or an array with __dlpack__, got "
        f"{type(array).__name__}."
    )


def like(flux: Tensor, given: Any) -> Tensor | np.ndarray:
    """A flux as what was given: an array for a NumPy array; else a tensor, on the device of what was given."""
    if isinstance(given, np.ndarray):
        return flux.cpu().numpy()
    return flux.to(given.device if isinstance(given, Tensor) else torch.from_dlpack(given).device)


def as_state(state: Any, geometry: Geometry | None, family: str | None, parameters: Parameters, time: float) -> State:
    """A state, a sequence of states as a batch, or a bare flux with what a state would say beside it.

    Raises:
        ValueError: none of these, or a bare flux without a geometry or family.
    """
    if isinstance(state, State):
        return state
    if isinstance(state, Sequence) and all(isinstance(one, State) for one in state):
        return stack(state)
    flux = tensor(state)
    if geometry is None or family is None:
        raise ValueError("Expected a geometry and a family beside a bare flux, got none; or pass a State.")
    return State({"velocity": flux}, geometry, time, parameters, family)


def stack(states: Sequence[State]) -> State:
    """Several flows of one family, grid and time as one batch: fields (b, …), parameters (b, …).

    Flows in one geometry keep it; those with solids of their own get `Geometry.stack`.

    Raises:
        ValueError: no states, or states with other fields, parameters, families, grids or times.
    """
    if not states:
        raise ValueError("Expected at least one state, got none.")
    first = states[0]
    for state in states:
        for name, ours, theirs in (
            ("family", first.family, state.family),
            ("time", first.time, state.time),
            ("fields", sorted(first.fields), sorted(state.fields)),
            ("parameters", sorted(first.parameters), sorted(state.parameters)),
        ):
            if ours != theirs:
                raise ValueError(f"Expected states of one batch with the same {name}, got {ours!r} and {theirs!r}.")
    shared = all(same_geometry(state.geometry, first.geometry) for state in states)
    geometry = first.geometry if shared else Geometry.stack([state.geometry for state in states])
    return State(
        {name: torch.stack([state.fields[name] for state in states]) for name in first.fields},
        geometry,
        first.time,
        {name: torch.stack([_number(state.parameters[name]) for state in states]) for name in first.parameters},
        first.family,
    )


def member(state: State, index: int, sizes: Mapping[str, int]) -> State:
    """One flow of a batch, with fields of its own.

    Args:
        sizes: name → how many numbers a parameter is, which tells those of each flow from one for all.
    """
    num_flows = len(next(iter(state.fields.values())))
    return replace(
        state,
        fields={name: values[index].clone() for name, values in state.fields.items()},
        place=state.geometry[index],
        parameters=per_flow(state.parameters, num_flows, sizes)[index],
    )


def per_flow(parameters: Parameters, num_flows: int, sizes: Mapping[str, int]) -> list[dict[str, Any]]:
    """The parameters of each flow: values (b, …) are one for each, others are everybody's."""
    flows: list[dict[str, Any]] = [{} for _ in range(num_flows)]
    for name, value in parameters.items():
        shape = tuple(np.shape(value))
        is_one = int(np.prod(shape)) == sizes.get(name, 1) and len(shape) < 2
        own = not is_one and shape[:1] == (num_flows,)
        for n, flow in enumerate(flows):
            flow[name] = value[n] if own else value
    return flows


def conserved(state: State, scale: FamilyScale) -> State:
    """The same state with every solenoidal flux in FP64 and exactly conservative; one that is stays as it is."""
    fields, geometry = {name: values.double() for name, values in state.fields.items()}, state.geometry
    for name, spec in scale.specs.items():
        if spec.constraint == "solenoidal":
            flux = fields[name]
            leaks = operators.div(flux, geometry.grid).any() or (flux != geometry.mask(flux)).any()
            fields[name] = exact.conserve(flux=flux, geometry=geometry) if bool(leaks) else flux
    return replace(state, fields=fields)


def same_geometry(a: Geometry, b: Geometry) -> bool:
    """Whether two boxes are one, solids and inflows included."""
    if a is b:
        return True
    inflow = set(a.inflow) == set(b.inflow) and all(
        torch.equal(_number(a.inflow[side]), _number(b.inflow[side])) for side in a.inflow
    )
    return a.grid == b.grid and inflow and torch.equal(a.fluid.cpu(), b.fluid.cpu())


def _number(value: Any) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64, device="cpu")
