"""Flows under way in a surrogate: their state, their latents, and what its alarm has seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from latentphys.fields import State
from latentphys.surrogate.alarm import Alarm
from latentphys.surrogate.contract import Contract
from latentphys.surrogate.exchange import per_flow, same_geometry, tensor
from latentphys.surrogate.protocol import Factory, Stepper
from latentphys.surrogate.reading import Intervention, Reading


@dataclass(frozen=True, eq=False)
class Flight:
    """What a surrogate knows of its flows; a token for `Surrogate.restore`.

    Args:
        state: what it returned last.
        latents: of the flows, (b, C, x, y, z).
        totals: of conserved scalars, by name.
        stepper, contract, alarm: as at `init`.
        reading: what the alarm measured last.
        log: what happened since `init`.
        is_decoded: whether `state` holds the fields of the latents.
    """

    state: State
    latents: Tensor
    totals: Mapping[str, Tensor]
    stepper: Stepper
    contract: Contract
    alarm: Alarm | None = None
    reading: Reading | None = None
    log: tuple[Intervention, ...] = ()
    is_decoded: bool = False

    @classmethod
    def begin(cls, factory: Factory, alarm: Alarm | None, state: State) -> Flight:
        """Flows at their first state; ValueError for a state that the model cannot take."""
        contract, stepper = factory.contract(str(state.family)), factory.stepper(state.geometry, str(state.family))
        flight = cls(state, torch.empty(0), {}, stepper, contract, alarm)
        packed = flight.packed(state)
        for parameters in flight.per_flow(state.parameters):
            stepper.check_parameters(parameters)
        latents, totals = stepper.encode(packed), stepper.totals(packed)
        return replace(flight, state=flight._own(state), latents=latents, totals=totals)._read(packed)

    @cached_property
    def batch(self) -> tuple[int, ...]:
        """(b,) for a batch, () for a single flow."""
        name, spec = next(iter(self.stepper.scale.specs.items()))
        lead = self.state.fields[name].ndim - len(spec.shape(self.state.domain)) if name in self.state.fields else 0
        return tuple(self.state.fields[name].shape[:1]) if lead > 0 else ()

    @property
    def num_flows(self) -> int:
        return self.batch[0] if self.batch else 1

    def copy(self) -> State:
        """The state with fields of its own, so that a solver that works in place leaves ours as it was."""
        return replace(self.state, fields={name: values.clone() for name, values in self.state.fields.items()})

    @property
    def home(self) -> torch.device:
        """Where the fields of the state are."""
        return next(iter(self.state.fields.values())).device

    def given(self, state: Any) -> State:
        """What a solver hands over, a state or a bare flux, as a state of the model's fields where ours are.

        Raises:
            ValueError: another geometry or family, or a bare flux that does not say all.
        """
        stepper = self.stepper
        if not isinstance(state, State):
            if "velocity" not in stepper.scale.fields:
                raise ValueError(
                    f"Expected a State with the fields {list(stepper.scale.fields)} of family {stepper.family!r}, got "
                    "a bare flux."
                )
            return self.state.with_fields(velocity=tensor(state).to(self.home))
        if not same_geometry(state.geometry, stepper.geometry):
            raise ValueError("Expected the geometry given to init, got another one; call init again to change it.")
        if state.family != stepper.family:
            raise ValueError(f"Expected the family given to init, {stepper.family!r}, got {state.family!r}.")
        fields = {name: values.to(self.home, torch.float64) for name, values in state.fields.items()}
        return replace(state, fields=fields)

    def unchanged(self, state: State) -> list[bool]:
        """For each flow whether a state has the fields that were returned last."""
        names = self.state.fields if set(self.state.fields) <= set(state.fields) else ()
        pairs = [(state.fields[name], self.state.fields[name]) for name in names]
        if not pairs or any(a.shape != b.shape for a, b in pairs):
            return [False] * self.num_flows
        flows = range(self.num_flows) if self.batch else [...]
        return [all(torch.equal(a[n], b[n]) for a, b in pairs) for n in flows]

    def moved_to(self, state: State, is_new: Sequence[bool] | None = None) -> Flight:
        """The flows of a state, some of them encoded and read anew.

        Args:
            is_new: which. Default: those that are not as they were returned last.
        """
        if is_new is None:
            is_new = [not same for same in self.unchanged(state)]
        if not any(is_new):
            return replace(self, state=replace(state, fields=self.state.fields))
        packed = self.packed(state)
        latents, totals = self.stepper.encode(packed), self.stepper.totals(packed)
        foreign = replace(self, state=self._own(state), latents=latents, totals=totals, is_decoded=True)._read(packed)
        return foreign if all(is_new) else foreign.mixed(is_new, self)

    def mixed(self, which: Sequence[bool], others: Flight) -> Flight:
        """The same with the latents, totals and readings of others for all but some flows."""
        rows = torch.tensor(which)
        latents = torch.where(rows.to(self.latents.device)[:, None, None, None, None], self.latents, others.latents)
        totals = {
            name: torch.where(rows.to(total.device), total, others.totals[name].to(total.device))
            for name, total in self.totals.items()
        }
        reading = self.reading
        if reading is not None and others.reading is not None:
            values = {
                name: tuple(
                    a if ours else b for ours, a, b in zip(which, own, others.reading.values[name], strict=True)
                )
                for name, own in reading.values.items()
            }
            reading = replace(reading, values=values)
        return replace(self, latents=latents, totals=totals, reading=reading)

    def advanced(self, now: Mapping[str, Any], then: Mapping[str, Any], end: float) -> Flight:
        """An interval later, in latent space."""
        frame = self.stepper.step(self.latents[:, None], self.per_flow(now), self.per_flow(then))
        return replace(
            self, state=replace(self.state, time=end, parameters=then), latents=frame.latent, is_decoded=False
        )

    def decoded(self, before: Reading | None = None) -> Flight:
        """The same with the fields of its latents, and, with a reading an interval earlier, the alarm's reading."""
        if self.is_decoded:
            return self
        packed = self.stepper.decode(self.latents, self.totals)
        fields = self.stepper.scale.unpack(packed if self.batch else packed[0])
        state = replace(self.state, fields={name: values.to(self.home) for name, values in fields.items()})
        flight = replace(self, state=state, is_decoded=True)
        return flight if before is None else flight._read(packed, before)

    def _own(self, state: State) -> State:
        """A state with the fields of the model, and no others."""
        return replace(state, fields={name: state.fields[name].double() for name in self.stepper.scale.fields})

    def _read(self, packed: Float[Tensor, "b f nx ny nz"], before: Reading | None = None) -> Flight:
        if self.alarm is None:
            return self
        parameters, time = self.per_flow(self.state.parameters), self.state.time
        reading = self.alarm.read(self.stepper, self.contract, packed, self.latents, parameters, time, before)
        return replace(self, reading=reading)

    def per_flow(self, parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The parameters of each flow."""
        if not self.batch:
            return [dict(parameters)]
        return per_flow(parameters, self.num_flows, {q.name: q.size for q in self.contract.parameters})

    def packed(self, state: State) -> Tensor:
        """The packed fields of flows, checked, in FP64 and with an axis for the batch."""
        for name, spec in self.stepper.scale.specs.items():
            values, expected = state.fields.get(name), (*self.batch, *spec.shape(state.grid))
            if values is None:
                raise ValueError(f"Expected the fields {list(self.stepper.scale.fields)}, got {sorted(state.fields)}.")
            if tuple(values.shape) != expected:
                some = "a batch of" if self.batch else "one"
                raise ValueError(f"Expected {some} {name} of shape {expected}, got {tuple(values.shape)}.")
            if not bool(torch.isfinite(values).all()):
                raise ValueError(f"Expected a finite {name}, got NaN or infinite values; step back to a snapshot.")
        packed = self.stepper.scale.pack({name: state.fields[name].double() for name in self.stepper.scale.fields})
        return packed if self.batch else packed[None]
