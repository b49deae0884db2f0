"""The alarm of a surrogate: what it measures, in closed form; when it rings and when it is quiet; what happens then."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small import Road

from latentphys import operators
from latentphys.data import Store
from latentphys.fields import State
from latentphys.grid import PERIODIC, Grid
from latentphys.surrogate import Alarm, AlarmError, AlarmWarning, Models, Reading, Surrogate
from latentphys.surrogate.measures import energy, latent_moments, roughness

FAMILY = "open_channel"


@pytest.fixture(scope="module")
def models(road: Road) -> Models:
    return Models.load(road.dynamics)


@pytest.fixture(scope="module")
def alarm(road: Road, models: Models) -> Alarm:
    """Calibrated with all flows but the last."""
    return Alarm.fit(models, road.store(FAMILY), [0, 1, 2])


def held_out(road: Road, time: int = 0) -> State:
    return road.store(FAMILY)[3, time]


# what is measured


@pytest.mark.parametrize("mode", [(0, 0, 0), (1, 0, 0), (2, 1, 3), (4, 4, 4)])
def test_roughness_of_a_wave_is_the_weight_of_its_wave_number(mode: tuple[int, int, int]) -> None:
    grid = Grid((8, 8, 8), (0.1, 0.2, 0.3))
    x, y, z = torch.meshgrid(*(torch.arange(8).double() / 8 for _ in range(3)), indexing="ij")
    wave = torch.cos(2 * math.pi * (mode[0] * x + mode[1] * y + mode[2] * z) + 0.3)
    expected = sum(math.sin(math.pi * m / 8) ** 4 for m in mode) / 3
    assert float(roughness(wave.expand(1, 3, -1, -1, -1), grid)) == pytest.approx(expected, abs=1e-14)
    assert float(energy(wave.expand(1, 3, -1, -1, -1))) == pytest.approx(1.5 * float(wave.square().mean()))


def test_roughness_leaves_out_walls_thin_axes_and_rest() -> None:
    walls = Grid((4, 8, 1), (1.0, 1.0, 1.0), (PERIODIC[0], ("no_slip", "no_slip"), PERIODIC[2]))
    ramp = torch.arange(8).double()[None, None, None, :, None].expand(1, 1, 4, 8, 1)
    assert float(roughness(ramp, walls)) == 0.0  # a jump from one wall to the other is none
    assert float(roughness(ramp, Grid((4, 8, 1), (1.0, 1.0, 1.0)))) > 0.01
    assert float(roughness(torch.zeros_like(ramp), walls)) == 0.0
    noise = torch.randn(1, 3, 24, 24, 24, dtype=torch.float64)
    assert float(roughness(noise, Grid((24, 24, 24), (1.0, 1.0, 1.0)))) == pytest.approx(3 / 8, rel=0.05)


def test_latent_moments_are_means_and_logarithmic_spreads() -> None:
    latents = torch.stack([torch.full((2, 2, 2), 5.0), torch.tensor([1.0, 3.0]).repeat(4).reshape(2, 2, 2)])[None]
    means, spreads = latent_moments(latents)[0].split(2)
    assert means.tolist() == [5.0, 2.0] and spreads.exp().tolist() == pytest.approx([1e-6, 1.0])


# when it rings


def test_it_is_quiet_on_held_out_flows(
    road: Road, models: Models, alarm: Alarm, recwarn: pytest.WarningsRecorder
) -> None:
    surrogate = Surrogate(models, alarm=alarm, on_alarm="raise")
    for time in range(road.store(FAMILY).num_times):
        surrogate.init(held_out(road, time))
        assert surrogate.reading is not None and not surrogate.reading.is_ringing
        assert set(surrogate.reading.values) == {"energy", "energy_change", "spectrum", "latent", "parameters"}
    state = surrogate.step(surrogate.init(held_out(road)), num_steps=2)
    assert surrogate.reading is not None
    assert "quiet at t = 0.024 s" in str(surrogate.reading) and surrogate.log == ()
    assert surrogate.reading.values["energy"][0] == pytest.approx(
        float(operators.kinetic_energy(state.velocity, state.grid)), rel=1e-12
    )


def spoilt(state: State, how: str) -> State:
    u = state.velocity
    if how == "viscosity":
        return replace(state, parameters={**state.parameters, "viscosity": 10 * state.parameters["viscosity"]})
    noise = 0.3 * u.std() * torch.randn_like(u)
    return state.with_fields(velocity={"scaled": 3 * u, "slowed": u / 3, "noise": u + noise, "mirrored": -u}[how])


@pytest.mark.parametrize(
    ("how", "rings"),
    [
        ("scaled", {"energy", "latent"}),
        ("slowed", {"energy", "latent"}),
        ("noise", {"spectrum"}),
        ("mirrored", {"latent"}),
        ("viscosity", {"parameters"}),
    ],
)
def test_it_rings_on_flows_of_another_kind(road: Road, models: Models, alarm: Alarm, how: str, rings: set[str]) -> None:
    state = spoilt(held_out(road), how)
    surrogate = Surrogate(models, alarm=alarm)
    with pytest.warns(AlarmWarning, match="flow 0 at t = 0 s: "):
        surrogate.init(state)
    reading = surrogate.reading
    assert reading is not None and rings <= set(reading.rings[0])
    (entry,) = surrogate.log
    assert entry.quantities == reading.rings[0] and not entry.is_fallback and entry.duration == 0.0
    strict = Surrogate(models, alarm=alarm, on_alarm="raise")
    with pytest.raises(AlarmError, match=f"{min(rings)} .* beyond "):
        strict.init(state)


def test_it_rings_in_the_step_that_goes_wrong(road: Road, models: Models, alarm: Alarm) -> None:
    """The kinetic energy may not change by more than a factor of 1 + 1e-6: no step keeps to that."""
    strict = replace(alarm, limits={**alarm.limits, "energy_change": (0.0, 1e-6)})
    surrogate = Surrogate(models, alarm=strict, on_alarm="raise")
    state = surrogate.init(held_out(road))
    before = state.velocity.clone()
    with pytest.raises(AlarmError, match=r"energy_change .* beyond 0 … 1e-06"):
        surrogate.step(state, num_steps=2)
    assert torch.equal(surrogate.restore(surrogate.snapshot()).velocity, before) and surrogate.log == ()
    warner = Surrogate(models, alarm=strict)
    state = warner.init(held_out(road))
    with pytest.warns(AlarmWarning):
        state = warner.step(state, num_steps=2)
    assert [entry.time for entry in warner.log] == pytest.approx([0.0, 0.012])
    assert {entry.quantities for entry in warner.log} == {("energy_change",)}
    assert warner.log[0].duration == pytest.approx(0.012)
    quiet = Surrogate(models)
    assert torch.equal(state.velocity, quiet.step(quiet.init(held_out(road)), num_steps=2).velocity)


def at_rest(state: State) -> State:
    return state.with_fields(velocity=torch.zeros_like(state.velocity))


def test_a_flow_that_leaves_rest_rings(road: Road, models: Models) -> None:
    """From outside it has not changed; an interval later its energy is infinitely more."""
    surrogate = Surrogate(models, alarm=Alarm(FAMILY, {"energy_change": (0.0, 1e9)}), on_alarm="raise")
    state = surrogate.init(at_rest(held_out(road)))
    assert surrogate.reading is not None and surrogate.reading.values["energy_change"] == (0.0,)
    state = surrogate.init(state.with_fields(velocity=0 * state.velocity))
    with pytest.raises(AlarmError, match="energy_change inf"):
        surrogate.step(at_rest(state))


def test_numbers_that_are_none_ring() -> None:
    assert Reading(0.0, {"energy": (math.nan, 1.0)}, {"energy": (-math.inf, math.inf)}).rings == (("energy",), ())


def test_flows_at_rest_set_no_limit_on_changes(road: Road, models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first snapshot at rest has no ratio of energies; where no flow has one there is nothing to calibrate with."""
    store, read = road.store(FAMILY), Store.read
    with monkeypatch.context() as patch:
        patch.setattr(Store, "read", lambda self, name, i, n: (n > 0) * read(self, name, i, n))
        fitted = Alarm.fit(models, store, [0, 1, 2])
    assert 0 < fitted.limits["energy_change"][1] < math.inf and fitted.limits["energy"][0] == 0.0
    monkeypatch.setattr(store, "num_times", 1)
    with pytest.raises(ValueError, match=r"with two snapshots in motion one interval apart, got none in \[0, 1, 2\]"):
        Alarm.fit(models, store, [0, 1, 2])


def test_without_a_calibration_it_finds_gross_errors_only(road: Road, models: Models) -> None:
    default = Alarm.default(models, FAMILY, held_out(road).geometry)
    assert set(default.limits) == {"energy", "latent", "parameters"} and default.source == "the model's own scales"
    surrogate = Surrogate(models, alarm=default, on_alarm="raise")
    assert not surrogate.step(surrogate.init(held_out(road)), num_steps=2).velocity.isnan().any()
    for how, match in (("scaled", "latent"), ("viscosity", "")):
        if match:
            with pytest.raises(AlarmError, match=match):
                surrogate.init(spoilt(held_out(road), how))
        else:
            surrogate.init(spoilt(held_out(road), how))
    typical = math.sqrt(math.prod(default.limits["energy"]))
    assert typical == pytest.approx(
        float(operators.kinetic_energy(held_out(road).velocity, held_out(road).grid)), rel=0.1
    )


# what happens then


def test_the_fallback_repeats_the_interval(road: Road, models: Models, alarm: Alarm) -> None:
    calls: list[State] = []

    def solver(state: State, duration: float) -> State:
        calls.append(state)
        assert duration == pytest.approx(0.012)
        return state.with_fields(velocity=(0.99 * state.velocity).float())

    never = replace(alarm, limits={"energy_change": (0.0, 0.0)})
    surrogate = Surrogate(models, alarm=never, fallback=solver)
    start = surrogate.init(held_out(road))
    token = surrogate.snapshot()
    force = torch.as_tensor(start.parameters["force"])
    state = surrogate.step(start, num_steps=3, parameters=lambda t: {**start.parameters, "force": force * (1 + t)})
    assert [call.time for call in calls] == pytest.approx([0.0, 0.012, 0.024])
    assert torch.equal(calls[0].velocity, start.velocity)
    torch.testing.assert_close(calls[2].parameters["force"], force * 1.024)
    torch.testing.assert_close(
        state.velocity, 0.99**3 * start.velocity, rtol=0.0, atol=1e-6 * float(start.velocity.max())
    )
    assert state.velocity.dtype == torch.float64 and not operators.div(state.velocity, state.grid).any()
    assert surrogate.num_fallbacks == 3 and {e.quantities for e in surrogate.log} == {("energy_change",)}
    assert surrogate.restore(token).time == 0.0 and surrogate.num_fallbacks == 0
    calls[0].velocity.zero_()  # the solver's copy is its own
    assert float(surrogate.restore(token).velocity.abs().max()) > 0


def test_what_the_fallback_returns_is_read_anew(road: Road, models: Models, alarm: Alarm) -> None:
    """The same fields an interval later, now with a viscosity far from training's."""
    never = replace(alarm, limits={"energy_change": (0.0, 0.0), "parameters": alarm.limits["parameters"]})
    surrogate = Surrogate(models, alarm=never, fallback=lambda state, duration: state)
    start = surrogate.init(held_out(road))
    high = {**start.parameters, "viscosity": 10 * start.parameters["viscosity"]}
    state = surrogate.step(start, parameters=lambda t: start.parameters if t == 0.0 else high)
    assert surrogate.num_fallbacks == 1 and torch.equal(state.velocity, start.velocity)
    assert surrogate.reading is not None and surrogate.reading.time == state.time == pytest.approx(0.012)
    assert surrogate.reading.rings == (("parameters",),)


def test_where_all_is_quiet_the_fallback_is_not_called(road: Road, models: Models, alarm: Alarm) -> None:
    def solver(state: State, duration: float) -> State:
        raise AssertionError

    plain, surrogate = Surrogate(models), Surrogate(models, alarm=alarm, fallback=solver)
    got = surrogate.step(surrogate.init(held_out(road)), num_steps=3)
    assert torch.equal(got.velocity, plain.step(plain.init(held_out(road)), num_steps=3).velocity)
    assert surrogate.num_fallbacks == 0


def test_a_flow_that_rings_from_the_start_is_the_solvers_until_it_is_quiet(
    road: Road, models: Models, alarm: Alarm
) -> None:
    surrogate = Surrogate(models, alarm=alarm, fallback=lambda s, t: s.with_fields(velocity=s.velocity / 1.75))
    state = surrogate.init(spoilt(held_out(road), "scaled"))
    state = surrogate.step(state, num_steps=2)
    assert surrogate.num_fallbacks >= 1 and all(entry.is_fallback for entry in surrogate.log)
    assert "energy" in surrogate.log[0].quantities


def test_restoring_repeats_readings_and_rings(road: Road, models: Models, alarm: Alarm) -> None:
    """The change of the energy looks back an interval: over a snapshot as well."""
    surrogate = Surrogate(models, alarm=alarm, on_alarm="raise")
    state = surrogate.step(surrogate.init(held_out(road)))
    token, reading = surrogate.snapshot(), surrogate.reading
    first = surrogate.step(state, num_steps=2)
    expected = surrogate.reading
    surrogate.init(held_out(road, 3))
    state = surrogate.restore(token)
    assert surrogate.reading == reading and surrogate.reading != expected
    again = surrogate.step(surrogate.step(state))
    assert surrogate.reading is not None and expected is not None
    assert surrogate.reading.values == expected.values and torch.equal(again.velocity, first.velocity)


# files


def test_a_file_keeps_every_bit(road: Road, models: Models, alarm: Alarm, tmp_path: Path) -> None:
    alarm.save(tmp_path / "alarm.json")
    assert Alarm.load(tmp_path / "alarm.json") == alarm and [f.name for f in tmp_path.iterdir()] == ["alarm.json"]
    surrogate = Surrogate.load(road.dynamics, alarm=tmp_path / "alarm.json")
    assert surrogate.alarm == alarm and alarm.digest == surrogate.factory.digest
    assert alarm.source == f"{FAMILY}.zarr: 3 trajectories, quantile 1, margin 2"
    simple = Alarm(FAMILY, {"energy": (0.0, 1.0)})
    simple.save(tmp_path / "simple.json")
    assert Alarm.load(tmp_path / "simple.json") == simple
    data = json.loads((tmp_path / "alarm.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps({**data, "schema": "latentphys.alarm/0"}))
    for name in ("other.json", "none.json"):
        with pytest.raises(ValueError, match=r"Expected an alarm of schema latentphys.alarm/1 in .*, got none"):
            Alarm.load(tmp_path / name)


@pytest.mark.usefixtures("unchecked")
def test_limits_and_models_that_do_not_fit_are_refused(road: Road, models: Models, alarm: Alarm) -> None:
    for limits, message in (
        ({"speed": (0.0, 1.0)}, r"limits of some of energy \| .*, got \['speed'\]"),
        ({}, "got none"),
        ({"energy": (2.0, 1.0)}, "limits of energy with lowest ≤ highest, got 2.0 and 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            Alarm(FAMILY, limits)
    with pytest.raises(
        ValueError, match=r"for the model with the SHA-256 \w{12}…, got one for abc…; calibrate one with"
    ):
        Surrogate(models, alarm=replace(alarm, digest="abc"))
    with pytest.raises(ValueError, match=r"on_alarm of warn \| raise, got 'ignore'"):
        Surrogate(models, on_alarm="ignore")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a flow of the alarm's family 'open_channel', got 'porous'"):
        Surrogate(models, alarm=alarm).init(road.store("porous")[0, 0])
    store = road.store(FAMILY)
    for arguments, message in (
        ({"quantile": 0.0}, r"a quantile in \(0, 1\] and a margin ≥ 1, got 0.0 and 2.0"),
        ({"margin": 0.5}, "got 1.0 and 0.5"),
        ({"trajectories": [4]}, r"trajectories from 0 to 3 of .*, got \[4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            Alarm.fit(models, store, **arguments)


def test_margin_and_quantile_widen_the_limits(road: Road, models: Models, alarm: Alarm) -> None:
    tight = Alarm.fit(models, road.store(FAMILY), [0, 1, 2], margin=1.0)
    for name in ("energy", "spectrum"):
        assert alarm.limits[name][1] == pytest.approx(2 * tight.limits[name][1])
    assert alarm.limits["latent"][1] == pytest.approx(4 * tight.limits["latent"][1])
    assert alarm.limits["energy"][0] == pytest.approx(tight.limits["energy"][0] / 2)
    energies = [
        float(operators.kinetic_energy(road.store(FAMILY)[i, t].velocity.double(), road.store(FAMILY).grid))
        for i in (0, 1, 2)
        for t in range(road.store(FAMILY).num_times)
    ]
    assert tight.limits["energy"][0] <= min(energies) and max(energies) <= tight.limits["energy"][1]
    half = Alarm.fit(models, road.store(FAMILY), [0, 1, 2], quantile=0.5, margin=1.0)
    assert tight.limits["energy"][0] < half.limits["energy"][0] < half.limits["energy"][1] < tight.limits["energy"][1]


def test_the_digest_tells_models_apart(models: Models) -> None:
    a, b = (Models(models.dynamics, models.autoencoder) for _ in range(2))
    assert a.digest == b.digest and len(a.digest) == 64
    weight = next(models.dynamics.parameters()).data
    kept = weight.clone()
    weight.view(-1)[0] += 1.0
    assert Models(models.dynamics, models.autoencoder).digest != a.digest
    weight.copy_(kept)
