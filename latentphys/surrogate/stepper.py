"""A trained model as a time stepper that a solver can call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentphys.autoencoders import Autoencoder
from latentphys.fields import State
from latentphys.grid import Geometry
from latentphys.rollout import LatentStepper
from latentphys.transformer.dynamics import Dynamics

ParametersAt = Callable[[float], Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What `Surrogate.snapshot` remembers; hand it to `Surrogate.restore`."""

    state: State
    latents: Tensor
    totals: Mapping[str, Tensor]
    stepper: LatentStepper


class Surrogate:
    """Steps one flow with a trained model. Mass is conserved exactly by every state that it returns.

    Fluxes go in and out as the volume flux through each cell's low faces [m³/s], FP64 out, and so do further fields of
    the family; conserved scalars keep their total. A solver may change the state between calls, in place too: a state
    whose fields are not those returned last is encoded anew.

        s = Surrogate.load("runs/demo/dynamics")
        state = s.init(store[0, 0])
        state = s.step(state, num_steps=8)
        token = s.snapshot(); …; state = s.restore(token)

    Args:
        dynamics, autoencoder: the models, in evaluation mode.
    """

    def __init__(self, dynamics: Dynamics, autoencoder: Autoencoder) -> None:
        if dynamics.num_frames != 1:
            raise ValueError(f"Expected a dynamics model of one input frame, got one of {dynamics.num_frames}.")
        self.dynamics, self.autoencoder = dynamics, autoencoder
        self._current: Snapshot | None = None

    @classmethod
    def load(cls, path: str | Path) -> Surrogate:
        """From a dynamics checkpoint or the run directory that holds it.

        Raises:
            ValueError: no such checkpoint, or one of another kind or schema.
        """
        from latentphys.training.models import load_dynamics

        return cls(*load_dynamics(path))

    @property
    def families(self) -> dict[str, float]:
        """The families that the model knows, and the Δt [s] of its steps for each."""
        return dict(self.dynamics.intervals)

    def init(
        self,
        state: State | Tensor | np.ndarray,
        geometry: Geometry | None = None,
        family: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        time: float = 0.0,
    ) -> State:
        """Set geometry, family and first state.

        Args:
            state: a `State` that says all the rest itself, such as ``store[0, 0]``, or a flux (3, nx, ny, nz) [m³/s].
            geometry, family, parameters, time: with a bare flux, what a `State` would say.

        Returns:
            The state that the model sees: the given one through the autoencoder.

        Raises:
            ValueError: a grid, family, parameter or flux that the model cannot take.
        """
        if not isinstance(state, State):
            if geometry is None or family is None:
                raise ValueError("Expected a geometry and a family beside a bare flux, got none; or pass a State.")
            state = State({"velocity": _tensor(state)}, geometry, time, parameters or {}, family)
        if state.family is None:
            raise ValueError(f"Expected a state of a family among {sorted(self.families)}, got one without a family.")
        stepper = LatentStepper(self.autoencoder, self.dynamics, state.geometry, state.family)
        packed = _checked(state, stepper)
        self.dynamics.conditioning.vector(state.parameters, state.parameters, stepper.interval)  # refused here or never
        return self._remember(state, stepper.encode(packed), stepper.totals(packed), stepper)

    def step(
        self, state: State | Tensor | np.ndarray, num_steps: int = 1, parameters: ParametersAt | None = None
    ) -> Any:
        """Advance by ``num_steps`` intervals of the family's Δt.

        Args:
            state: the state returned last, or one that a solver has changed; a bare flux (3, nx, ny, nz), NumPy or
                torch, stands for the last state with that velocity.
            parameters: time → the parameters then, where they change in time. Default: those of the state, constant.

        Returns:
            What was given: a `State`, or a flux as a tensor or an array.

        Raises:
            ValueError: a call before `init`, another geometry or family than set there, or a flux that is not finite.
        """
        current = self._require()
        if num_steps < 1:
            raise ValueError(f"Expected num_steps ≥ 1, got {num_steps}.")
        stepper, latents, totals = current.stepper, current.latents, current.totals
        if not isinstance(state, State) and "velocity" not in stepper.scale.fields:
            raise ValueError(
                f"Expected a State with the fields {list(stepper.scale.fields)} of family {stepper.family!r}, got a "
                "bare flux."
            )
        given = state if isinstance(state, State) else current.state.with_fields(velocity=_tensor(state))
        if given.geometry is not stepper.geometry and not _same_geometry(given.geometry, stepper.geometry):
            raise ValueError("Expected the geometry given to init, got another one; call init again to change it.")
        if given.family != stepper.family:
            raise ValueError(f"Expected the family given to init, {stepper.family!r}, got {given.family!r}.")
        if any(
            name not in given.fields or not torch.equal(given.fields[name], current.state.fields[name])
            for name in stepper.scale.fields
        ):
            packed = _checked(given, stepper)
            latents, totals = stepper.encode(packed), stepper.totals(packed)
        time = given.time
        for n in range(num_steps):
            now, then = (
                given.parameters if parameters is None else parameters(time + (n + m) * stepper.interval)
                for m in (0, 1)
            )
            latents = stepper.step(latents[:, None], [now], [then]).latent
        end = time + num_steps * stepper.interval
        if parameters is not None:
            given = replace(given, parameters=parameters(end))
        result = self._remember(replace(given, time=end), latents, totals, stepper)
        if isinstance(state, State):
            return result
        return result.velocity.numpy() if isinstance(state, np.ndarray) else result.velocity

    def snapshot(self) -> Snapshot:
        """A token of the present state; steps after `restore` repeat bit for bit."""
        current = self._require()
        return Snapshot(current.state, current.latents.clone(), current.totals, current.stepper)

    def restore(self, token: Snapshot) -> State:
        """Go back to a snapshot and return its state."""
        self._current = token
        return _copied(token.state)

    def _require(self) -> Snapshot:
        if self._current is None:
            raise ValueError("Expected init before this call, got a surrogate without a state.")
        return self._current

    def _remember(self, state: State, latents: Tensor, totals: Mapping[str, Tensor], stepper: LatentStepper) -> State:
        state = state.with_fields(state.time, **stepper.scale.unpack(stepper.decode(latents, totals)[0]))
        self._current = Snapshot(state, latents, totals, stepper)
        return _copied(state)


def _copied(state: State) -> State:
    """The same state with fields of its own, so that a solver that works in place leaves ours as it was."""
    return state.with_fields(state.time, **{name: values.clone() for name, values in state.fields.items()})


def _tensor(flux: Tensor | np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(flux, dtype=np.float64)) if isinstance(flux, np.ndarray) else flux.double()


def _checked(state: State, stepper: LatentStepper) -> Tensor:
    """The packed fields of a state as a batch of one, in FP64."""
    for name, spec in stepper.scale.specs.items():
        values, expected = state.fields.get(name), spec.shape(state.grid)
        if values is None:
            raise ValueError(f"Expected the fields {list(stepper.scale.fields)}, got {sorted(state.fields)}.")
        if tuple(values.shape) != expected:
            raise ValueError(f"Expected one {name} of shape {expected}, got {tuple(values.shape)}.")
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"Expected a finite {name}, got NaN or infinite values; step back to a snapshot.")
    return stepper.scale.pack({name: state.fields[name].double() for name in stepper.scale.fields})[None]


def _same_geometry(a: Geometry, b: Geometry) -> bool:
    return a.grid == b.grid and bool(torch.equal(a.fluid, b.fluid))
