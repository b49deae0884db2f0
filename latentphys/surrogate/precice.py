"""A surrogate as a participant of a preCICE coupling (preCICE 3, with its Python bindings `pyprecice`).

    interface = Interface.load("surrogate.json")
    for state in participate(surrogate, store[0, 0], interface):
        print(state.time)                                     # after every time window

Vertices are the centres of open faces, where the flux lives; a solver with the same mesh gives and takes every bit of
it. In each step the participant takes what its partner says of these faces, steps, and writes its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from latentphys.fields import State
from latentphys.grid import SIDES, Geometry
from latentphys.surrogate.stepper import ParametersAt, Surrogate


@dataclass(frozen=True)
class Interface:
    """What a participant has to know besides preCICE's own configuration.

    Args:
        participant: its name in that configuration.
        config: the path of that configuration.
        mesh: the name of its mesh, of three dimensions.
        read, write: names of the scalar data to take and to give; None for none.
        quantity: what these are: the ``flux`` through a face [m³/s], or its normal ``velocity`` [m/s], for mappings
            between meshes that interpolate.
        side: the low side of the box that is coupled, ``x-``, ``y-`` or ``z-``. Default: every face in the box.
        read_at: the time of what is read: the ``begin`` of a step, of flows that the surrogate takes over, or its
            ``end``, of boundary values.

    Raises:
        ValueError: neither read nor write, or an option of another name.
    """

    participant: str
    config: str
    mesh: str
    read: str | None = None
    write: str | None = None
    quantity: Literal["flux", "velocity"] = "flux"
    side: Literal["x-", "y-", "z-"] | None = None
    read_at: Literal["begin", "end"] = "begin"

    def __post_init__(self) -> None:
        if self.read is None and self.write is None:
            raise ValueError("Expected the name of data to read or to write, got neither.")
        for name, value, known in (
            ("quantity", self.quantity, ("flux", "velocity")),
            ("side", self.side, (None, *SIDES[::2])),
            ("read_at", self.read_at, ("begin", "end")),
        ):
            if value not in known:
                raise ValueError(f"Expected {name} of {' | '.join(map(str, known))}, got {value!r}.")

    @classmethod
    def load(cls, path: str | Path) -> Interface:
        """From a JSON file with these names; a relative `config` starts at the file's folder.

        Raises:
            ValueError: no such file, or names that are missing or unknown.
        """
        from latentphys.training.manifest import read_json

        file = Path(path)
        if not file.is_file():
            raise ValueError(f"Expected the file of an interface, got {path}: no such file.")
        data = read_json(file)
        try:
            return cls(**{**data, "config": str(file.parent / data["config"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"Expected participant, config, mesh, read and write in {path}, got {error}.") from None

    def faces(self, geometry: Geometry) -> Bool[Tensor, "3 nx ny nz"]:
        """The faces that are vertices: the open ones of the box, or of one of its sides."""
        faces = geometry.open_faces
        if self.side is not None:
            axis, chosen = SIDES.index(self.side) // 2, torch.zeros_like(faces)
            chosen[axis].select(axis, 0).copy_(faces[axis].select(axis, 0))
            faces = chosen
        if not bool(faces.any()):
            raise ValueError(f"Expected open faces to couple at {self.side or 'the box'}, got a wall.")
        return faces


def face_centres(faces: Bool[Tensor, "3 nx ny nz"], spacing: tuple[float, float, float]) -> np.ndarray:
    """Where the centres of low faces are, the corner of the box at 0 [m]: shape (n, 3), in the order of the flux."""
    index = faces.nonzero()
    offset = 0.5 * (1 - torch.eye(3, dtype=torch.float64))
    centres: np.ndarray = ((index[:, 1:] + offset[index[:, 0]]) * torch.tensor(spacing, dtype=torch.float64)).numpy()
    return centres


def participate(
    surrogate: Surrogate, start: State, interface: Interface, parameters: ParametersAt | None = None
) -> Iterator[State]:
    """Take part in a coupling until it ends; yields the state after every time window.

    A window longer than Δt is taken in several steps, with an exchange after each. Windows that are iterated (implicit
    coupling) begin from a snapshot.

    Args:
        surrogate: with a fallback where windows are no whole number of Δt.
        start: the first state, of a single flow with a velocity.
        interface: names and places of what is exchanged.
        parameters: see `Surrogate.step`.

    Raises:
        ImportError: no preCICE.
        ValueError: a batch of flows, a mesh or data of other dimensions, a window that is no multiple of Δt, or no data
            to start from.
    """
    try:
        import precice  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise ImportError(
            "Expected preCICE 3 and its Python bindings, got none; install the library, then `pip install pyprecice`."
        ) from error
    if start.velocity.ndim != 4:
        raise ValueError(f"Expected a single flow, got a velocity of shape {tuple(start.velocity.shape)}.")
    state = surrogate.init(start.to("cpu"))
    exchange = _Exchange(precice.Participant(interface.participant, interface.config, 0, 1), interface, state)
    participant = exchange.participant
    try:
        if participant.requires_initial_data():
            exchange.write(state)
        participant.initialize()
        token, is_first = surrogate.snapshot(), True
        while participant.is_coupling_ongoing():
            if participant.requires_writing_checkpoint():
                token = surrogate.snapshot()
            duration = _duration(surrogate, participant.get_max_time_step_size())
            given = exchange.read(state, duration, is_first)
            state, is_first = surrogate.step(given, duration=duration, parameters=parameters), False
            exchange.write(state)
            participant.advance(duration)
            if participant.requires_reading_checkpoint():
                state = surrogate.restore(token)
            elif participant.is_time_window_complete():
                yield state
    finally:
        participant.finalize()


def _duration(surrogate: Surrogate, longest: float) -> float:
    """How long a step is: Δt, or all that is left of the time window where that is no more or the fallback's.

    Raises:
        ValueError: see `participate`.
    """
    window = surrogate.negotiate(longest)
    if window.remainder and surrogate.fallback is None:
        raise ValueError(
            f"Expected a time window of whole intervals of {window.interval:g} s, got {longest:g} s left of one; "
            "change time-window-size in preCICE's configuration, or give the surrogate a fallback, for the rest."
        )
    return window.interval if window.num_steps > 1 or (window.num_steps and window.remainder) else longest


class _Exchange:
    """Reads and writes the flux of some faces."""

    def __init__(self, participant: Any, interface: Interface, state: State) -> None:
        self.participant, self.interface = participant, interface
        self._faces = interface.faces(state.geometry)
        mesh, grid = interface.mesh, state.grid
        if (got := participant.get_mesh_dimensions(mesh)) != 3:
            raise ValueError(f"Expected the mesh {mesh!r} in 3 dimensions, got {got}.")
        for name in filter(None, (interface.read, interface.write)):
            if (got := participant.get_data_dimensions(mesh, name)) != 1:
                raise ValueError(f"Expected scalar data {name!r} on {mesh!r}, got {got} dimensions.")
        areas = grid.per_face(grid.face_areas, state.velocity).expand(3, *grid.shape)[self._faces].numpy()
        self._scale = areas if interface.quantity == "velocity" else np.ones_like(areas)
        self._ids = participant.set_mesh_vertices(mesh, face_centres(self._faces, grid.spacing))

    def read(self, state: State, duration: float, is_first: bool) -> State:
        """The state with the partner's flux on the coupled faces."""
        name = self.interface.read
        if name is None:
            return state
        when = duration if self.interface.read_at == "end" else 0.0
        values = self.participant.read_data(self.interface.mesh, name, self._ids, when)
        if is_first and not values.any() and bool(state.velocity[self._faces].any()):
            raise ValueError(
                f'Expected the partner\'s first {name!r}, got zeros only; exchange initial data (initialize="yes").'
            )
        flux = state.velocity.clone()
        flux[self._faces] = torch.from_numpy(np.asarray(values, dtype=np.float64) * self._scale)
        return state.with_fields(velocity=flux)

    def write(self, state: State) -> None:
        """Give the flux of the coupled faces to the partner."""
        name = self.interface.write
        if name is not None:
            values = state.velocity[self._faces].numpy() / self._scale
            self.participant.write_data(self.interface.mesh, name, self._ids, values)
