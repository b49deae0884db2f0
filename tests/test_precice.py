"""A surrogate in a preCICE coupling, against a stand-in that refuses every call out of order."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from precice_fake import Setup, module
from small import Road

from latentphys.fields import State
from latentphys.grid import Geometry, Grid
from latentphys.surrogate import Models, Surrogate, stack
from latentphys.surrogate.precice import Interface, face_centres, participate

DT = 0.012


@pytest.fixture(scope="module")
def models(road: Road) -> Models:
    return Models.load(road.dynamics)


@pytest.fixture(scope="module")
def start(road: Road) -> State:
    return road.store("open_channel")[3, 0]


def couple(
    monkeypatch: pytest.MonkeyPatch, setup: Setup, surrogate: Surrogate, start: State, **options: Any
) -> tuple[list[State], Any]:
    """The states after every window, and the participant that preCICE saw."""
    monkeypatch.setitem(sys.modules, "precice", module(setup))
    names = {"participant": "Surrogate", "config": "precice-config.xml", "mesh": "Faces", "write": "Flux", **options}
    states = list(participate(surrogate, start, Interface(**names)))
    return states, setup.made[-1]


def flux_of(state: State) -> np.ndarray:
    values: np.ndarray = state.velocity[state.geometry.open_faces].numpy()
    return values


def test_face_centres() -> None:
    """Closed faces are no vertices; where the open ones are, in the order of the flux."""
    solid = torch.zeros(2, 2, 2, dtype=torch.bool)
    solid[0, 0, 0] = True
    walls = Grid((2, 2, 2), (1.0, 2.0, 4.0), (("periodic",) * 2, ("no_slip",) * 2, ("periodic",) * 2))
    faces = Geometry(walls, solid).open_faces
    centres = face_centres(faces, walls.spacing)
    assert centres.shape == (int(faces.sum()), 3)
    assert centres[0].tolist() == [0.0, 1.0, 6.0]  # normal to x, of cell (0, 0, 1)
    y = centres[int(faces[0].sum()) :][: int(faces[1].sum())]
    assert set(y[:, 1]) == {2.0} and set(y[:, 0]) == {0.5, 1.5} and set(y[:, 2]) == {2.0, 6.0}


def test_a_partner_that_listens_leaves_every_bit(monkeypatch: pytest.MonkeyPatch, models: Models, start: State) -> None:
    """Written only, or given back what was written: the coupling is the surrogate alone, its steps the windows."""
    alone = Surrogate(models)
    state, expected = alone.init(start), []
    for _ in range(3):
        state = alone.step(state)
        expected.append(state)
    first = alone.init(start)
    for setup, options in (
        (Setup(DT, 3), {}),
        (Setup(DT, 3, initial=flux_of(first)), {"read": "Echo"}),
    ):
        states, seen = couple(monkeypatch, setup, Surrogate(models), start, **options)
        assert (seen.name, seen.config, seen.phase) == ("Surrogate", "precice-config.xml", "finalized")
        assert [s.time for s in states] == pytest.approx([DT, 2 * DT, 3 * DT])
        assert all(torch.equal(a.velocity, b.velocity) for a, b in zip(states, expected, strict=True))


def test_what_the_partner_says_is_what_is_stepped(
    monkeypatch: pytest.MonkeyPatch, models: Models, start: State
) -> None:
    """At the beginning of a step by default, at its end for boundary values; fluxes, or velocities."""
    alone = Surrogate(models)
    first = alone.init(start)
    areas = start.grid.per_face(start.grid.face_areas, start.velocity).expand_as(start.velocity)
    for read_at, quantity, factors in (("begin", "flux", (1.0, 0.5)), ("end", "velocity", (1.0, 1.0))):
        setup = Setup(DT, 2, lambda end, written: 0.5 * written, initial=flux_of(first))
        if quantity == "velocity":
            setup.initial = flux_of(first) / areas[start.geometry.open_faces].numpy()
        states, seen = couple(
            monkeypatch, setup, Surrogate(models), start, read="Theirs", read_at=read_at, quantity=quantity
        )
        state = alone.init(start)
        for n, factor in enumerate(factors):
            state = alone.step(state.with_fields(velocity=factor * (first if n == 0 else state).velocity))
            if read_at == "begin":
                assert torch.equal(states[n].velocity, state.velocity)
        assert [call for call in seen.calls if call[0] == "read"][0][1] == (0.0 if read_at == "begin" else DT)
        if quantity == "velocity":
            rounded = alone.init(start).velocity / areas * areas
            assert torch.equal(states[0].velocity, alone.step(rounded))


def test_windows_of_several_intervals_are_taken_in_steps(
    monkeypatch: pytest.MonkeyPatch, models: Models, start: State
) -> None:
    states, seen = couple(monkeypatch, Setup(3 * DT, 2), Surrogate(models), start)
    alone = Surrogate(models)
    assert [size for what, size in seen.calls if what == "advance"] == pytest.approx([DT] * 6)
    assert [s.time for s in states] == pytest.approx([3 * DT, 6 * DT])
    assert torch.equal(states[1].velocity, alone.step(alone.init(start), num_steps=6).velocity)


@pytest.mark.parametrize("window", [0.5 * DT, 2.5 * DT])
def test_windows_that_do_not_fit_need_a_fallback(
    monkeypatch: pytest.MonkeyPatch, models: Models, start: State, window: float
) -> None:
    message = f"whole intervals of 0.012 s, got {window:g} s left of one; change time-window-size"
    setup = Setup(window, 2)
    with pytest.raises(ValueError, match=message):
        couple(monkeypatch, setup, Surrogate(models), start)
    assert setup.made[-1].phase == "finalized"
    hybrid = Surrogate(models, fallback=lambda state, duration: state)
    states, seen = couple(monkeypatch, Setup(window, 2), hybrid, start)
    assert states[-1].time == pytest.approx(2 * window) and hybrid.num_fallbacks == 2
    assert [entry.duration for entry in hybrid.log] == pytest.approx([0.5 * DT] * 2)


@pytest.mark.parametrize("intervals", [1, 2])
def test_implicit_windows_are_repeated_from_their_beginning(
    monkeypatch: pytest.MonkeyPatch, models: Models, start: State, intervals: int
) -> None:
    """Every iteration starts from the same bits: three of them end where one does, and four calls see three windows."""
    alone = Surrogate(models)
    expected = alone.step(alone.init(start), num_steps=2 * intervals)
    states, seen = couple(monkeypatch, Setup(intervals * DT, 2, iterations=3), Surrogate(models), start)
    assert len(states) == 2 and len([c for c in seen.calls if c[0] == "advance"]) == 2 * 3 * intervals
    assert torch.equal(states[-1].velocity, expected.velocity) and states[-1].time == pytest.approx(2 * intervals * DT)


def test_an_implicit_coupling_finds_its_fixed_point(
    monkeypatch: pytest.MonkeyPatch, models: Models, start: State
) -> None:
    """The partner answers with a mixture of the first flow and what it is given, which pulls the two together."""
    alone = Surrogate(models)
    first = flux_of(alone.init(start))
    partner = lambda end, written: first + 0.05 * (written - first)  # noqa: E731
    setup = Setup(DT, 1, partner, initial=first, iterations=None)
    (state,), seen = couple(monkeypatch, setup, Surrogate(models), start, read="Theirs", read_at="end")
    count = len([call for call in seen.calls if call[0] == "advance"])
    assert 3 <= count <= 10
    theirs = alone.init(start).velocity.clone()
    theirs[start.geometry.open_faces] = torch.from_numpy(partner(DT, flux_of(state)))
    again = alone.step(theirs)
    torch.testing.assert_close(again, state.velocity, rtol=0.0, atol=1e-4 * float(state.velocity.abs().max()))


def test_initial_data_is_given_and_asked_for(monkeypatch: pytest.MonkeyPatch, models: Models, start: State) -> None:
    setup = Setup(DT, 1, needs_initial=True)
    couple(monkeypatch, setup, Surrogate(models), start)
    with pytest.raises(ValueError, match=r"the partner's first 'Theirs', got zeros only; exchange initial data"):
        couple(monkeypatch, Setup(DT, 1), Surrogate(models), start, read="Theirs")
    assert setup.made[-1].phase == "finalized"


def test_one_side_alone(monkeypatch: pytest.MonkeyPatch, models: Models, start: State) -> None:
    states, seen = couple(monkeypatch, Setup(DT, 1), Surrogate(models), start, side="y-")
    open_faces = start.geometry.open_faces[1, :, 0]
    assert len(seen.positions) == int(open_faces.sum()) and set(seen.positions[:, 1]) == {0.0}
    faces = Interface("S", "c", "m", write="w", side="y-").faces(start.geometry)
    assert torch.equal(faces[1, :, 0], open_faces) and int(faces.sum()) == int(open_faces.sum())
    channel = Grid((4, 4, 4), (1.0, 1.0, 1.0), (("periodic",) * 2, ("periodic",) * 2, ("no_slip",) * 2))
    with pytest.raises(ValueError, match="open faces to couple at z-, got a wall"):
        Interface("S", "c", "m", write="w", side="z-").faces(Geometry(channel))


@pytest.mark.usefixtures("unchecked")
def test_the_file_of_an_interface(tmp_path: Path) -> None:
    file = tmp_path / "surrogate.json"
    file.write_text(json.dumps({"participant": "S", "config": "p.xml", "mesh": "m", "read": "a", "side": "x-"}))
    assert Interface.load(file) == Interface("S", str(tmp_path / "p.xml"), "m", read="a", side="x-")
    for text, message in (
        ('{"config": "p.xml"}', "Expected participant, config, mesh, read and write in .*surrogate.json, got"),
        ('{"participant": "S", "config": "p.xml", "mesh": "m", "reads": "a"}', "unexpected keyword argument 'reads'"),
        ('{"participant": "S", "config": "p.xml", "mesh": "m"}', "data to read or to write, got neither"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            Interface.load(file)
    with pytest.raises(ValueError, match=r"the file of an interface, got .*none.json: no such file"):
        Interface.load(tmp_path / "none.json")
    for name, value, message in (
        ("quantity", "mass", r"quantity of flux \| velocity, got 'mass'"),
        ("side", "x+", r"side of None \| x- \| y- \| z-, got 'x\+'"),
        ("read_at", "middle", r"read_at of begin \| end, got 'middle'"),
    ):
        with pytest.raises(ValueError, match=message):
            Interface("S", "c", "m", write="w", **{name: value})  # type: ignore[arg-type]


def test_meshes_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch, models: Models, start: State) -> None:
    for setup, message in (
        (Setup(DT, 1, mesh_dimensions=2), "the mesh 'Faces' in 3 dimensions, got 2"),
        (Setup(DT, 1, data_dimensions=3), "scalar data 'Flux' on 'Faces', got 3 dimensions"),
    ):
        with pytest.raises(ValueError, match=message):
            couple(monkeypatch, setup, Surrogate(models), start)


def test_a_coupling_is_of_one_flow_on_the_cpu(monkeypatch: pytest.MonkeyPatch, models: Models, start: State) -> None:
    with pytest.raises(ValueError, match=r"Expected a single flow, got a velocity of shape \(2, 3, 16, 16, 16\)"):
        couple(monkeypatch, Setup(DT, 1), Surrogate(models), stack([start, start]))
    moved: list[Any] = []
    to = State.to

    def noted(self: State, device: Any) -> State:
        moved.append(device)
        return to(self, device)

    monkeypatch.setattr(State, "to", noted)
    couple(monkeypatch, Setup(DT, 1), Surrogate(models), start)
    assert moved == ["cpu"]


def test_without_precice_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, models: Models, start: State) -> None:
    monkeypatch.setitem(sys.modules, "precice", None)
    with pytest.raises(ImportError, match="Expected preCICE 3 and its Python bindings, got none; install the library"):
        next(participate(Surrogate(models), start, Interface("S", "c", "m", write="w")))
