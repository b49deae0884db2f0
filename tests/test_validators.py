"""The validators against fields whose net flux, error and spectrum are known in closed form."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import zarr
from torch import Tensor

from latentphys import exact, operators
from latentphys.data import Store, create_store, open_store
from latentphys.fields import VELOCITY, Domain, FieldSpec, State
from latentphys.grid import Geometry, Grid
from latentphys.sphere import Sphere
from latentphys.validators import Check, energy_spectra, exit_status, validate, vrmse, vrmse_well
from latentphys.validators.conservation import closed_flux, net_flux
from latentphys.validators.statistics import spectrum_errors

CHANNEL = Grid((8, 6, 4), (0.5, 0.25, 0.2), (("periodic",) * 2, ("periodic",) * 2, ("no_slip", "free_slip")))
BOX = Grid((8, 8, 8), (0.125, 0.125, 0.125))
SOLID = torch.zeros(8, 8, 8, dtype=torch.bool)
SOLID[2:5, 3:6, 1:4] = True
POROUS = Geometry(BOX, SOLID)


def solenoidal(grid: Grid, *batch: int) -> Tensor:
    """A flux of integers, so that every net flux is 0.0 without rounding."""
    return operators.curl(torch.randint(-99, 100, (*batch, 3, *grid.shape)).double(), grid)


def save(
    path: Path,
    flux: Tensor,
    grid: Grid,
    *,
    solid: Tensor | None = None,
    exact: bool = True,
    dtype: str = "float64",
    rollout: dict[str, object] | None = None,
) -> Store:
    """A store of fluxes (trajectory, time, 3, x, y, z)."""
    num_trajectories, num_times = flux.shape[:2]
    with create_store(
        path,
        grid=grid,
        specs={"velocity": VELOCITY},
        family="channel" if solid is None else "porous",
        num_trajectories=num_trajectories,
        times=[0.5 + 0.25 * t for t in range(num_times)],
        solid=None if solid is None else solid.expand(num_trajectories, *grid.shape),
        dtype=dtype,
        provenance={"exact": exact},
        attributes={} if rollout is None else {"rollout": rollout},
    ) as writer:
        for trajectory in range(num_trajectories):
            writer.write("velocity", trajectory, slice(None), flux[trajectory])
    return open_store(path)


def poison(store: Store, value: float) -> Store:
    """The same store with one value of trajectory 1, frame 2 replaced, as an import might bring it."""
    array = zarr.open_group(str(store.path), mode="r+")["velocity"]
    assert isinstance(array, zarr.Array)
    array[1, 2, 0, 3, 3, 3] = value
    return open_store(store.path)


# Checks


def test_a_nan_fails_every_kind_of_check() -> None:
    about = {"family": "channel", "unit": "1", "operator": "none", "dtype": "float64"}
    assert Check.at_most("a", math.nan, 1.0, **about).verdict == "fail"
    assert Check.below("a", math.nan, 1.0, **about).verdict == "fail"
    assert Check.below("a", 0.0, math.nan, **about).verdict == "fail"
    assert Check.info("a", math.nan, **about).verdict == "fail"


def test_a_threshold_is_reached_by_at_most_and_not_by_below() -> None:
    about = {"family": "channel", "unit": "1", "operator": "none", "dtype": "float64"}
    equal, less = Check.at_most("a", 1.0, 1.0, **about), Check.below("a", 1.0, 1.0, **about)
    assert (equal.verdict, less.verdict) == ("pass", "fail")
    assert exit_status([equal, Check.info("a", 9.0, **about)]) == 0
    assert exit_status([equal, less]) == 1


# Conservation


def test_a_box_with_an_outflow_says_what_its_balance_means(tmp_path: Path) -> None:
    grid = Grid((8, 6, 4), (0.5, 0.25, 0.2), (("inflow", "outflow"), ("no_slip",) * 2, ("periodic",) * 2))
    flux = exact.conserve(flux=torch.randn(1, 2, 3, *grid.shape, dtype=torch.float64), geometry=Geometry(grid))
    check = validate(save(tmp_path / "a.zarr", flux, grid))["net_flux_max"]
    assert check.verdict == "pass" and check.value == 0.0
    assert "before an open high side the outflow is what closes it" in check.operator
    flux[0, 1, 1, 3, 2, 1] += 1e-6
    check = validate(save(tmp_path / "b.zarr", flux, grid))["net_flux_max"]
    assert check.verdict == "fail" and check.value == pytest.approx(1e-6)


@pytest.mark.parametrize("grid", [CHANNEL, BOX], ids=["channel", "box"])
@pytest.mark.parametrize("step", [2.0**-30, -3.0])
def test_one_perturbed_face_gives_a_net_flux_of_exactly_that_size(grid: Grid, step: float, tmp_path: Path) -> None:
    flux = solenoidal(grid, 2, 3)
    assert validate(save(tmp_path / "a.zarr", flux, grid))["net_flux_max"].value == 0.0
    flux[1, 2, 0, 4, 2, 1] += step
    check = validate(save(tmp_path / "b.zarr", flux, grid))["net_flux_max"]
    assert (check.value, check.threshold, check.verdict) == (abs(step), 0.0, "fail")
    assert "trajectory 1, frame 2" in check.detail and "(3, 2, 1)" in check.detail


def test_a_store_that_claims_no_exactness_is_allowed_the_rounding_of_its_type(tmp_path: Path) -> None:
    flux = solenoidal(BOX, 1, 2) / 3
    largest = float(flux.float().abs().max())
    stored = save(tmp_path / "a.zarr", flux, BOX, exact=True, dtype="float32")
    check = validate(stored)["net_flux_max"]
    assert check.threshold == pytest.approx(1e-5 * largest, rel=1e-6)
    assert 0 < check.value < 1e-6 * largest and check.verdict == "pass" and check.dtype == "float32"
    flux[0, 1, 1, 2, 2, 2] += 2e-5 * largest
    assert validate(save(tmp_path / "b.zarr", flux, BOX, dtype="float32"))["net_flux_max"].verdict == "fail"


def test_a_leak_through_a_solid_face_is_found_with_its_size(tmp_path: Path) -> None:
    flux = POROUS.mask(solenoidal(BOX, 1, 2))
    assert validate(save(tmp_path / "a.zarr", flux, BOX, solid=SOLID))["solid_flux_max"].verdict == "pass"
    flux[0, 1, 0, 2, 4, 2] = 2.0**-40
    check = validate(save(tmp_path / "b.zarr", flux, BOX, solid=SOLID))["solid_flux_max"]
    assert (check.value, check.verdict) == (2.0**-40, "fail")
    assert "(0, 2, 4, 2) of trajectory 0, frame 1" in check.detail


def test_a_leak_through_the_wall_of_a_channel_counts_as_closed_flux_and_as_net_flux() -> None:
    flux = solenoidal(CHANNEL)
    assert float(closed_flux(flux, Geometry(CHANNEL)).max()) == 0.0
    flux[2, 1, 1, 0] = 0.5
    assert float(closed_flux(flux, Geometry(CHANNEL)).max()) == 0.5
    assert float(net_flux(flux, Geometry(CHANNEL)).max()) == 0.5


def test_drift_is_the_change_of_the_mean_over_the_rms_velocity(tmp_path: Path) -> None:
    mean = torch.tensor([3.0, 3.0, 4.0, 3.5])
    flux = torch.zeros(1, 4, 3, *BOX.shape, dtype=torch.float64)
    flux[0, :, 0] = mean[:, None, None, None]
    assert validate(save(tmp_path / "a.zarr", flux, BOX))["mean_flow_drift"].value == pytest.approx(1 / 4)


# Errors


@pytest.mark.parametrize("geometry", [Geometry(CHANNEL), Geometry(BOX), POROUS], ids=["channel", "box", "porous"])
def test_a_perfect_prediction_scores_0_and_the_reference_mean_1(geometry: Geometry) -> None:
    grid = geometry.grid
    reference = geometry.mask(torch.randn(2, 3, *grid.shape, dtype=torch.float64))
    dims = (-3, -2) if grid is CHANNEL else (-3, -2, -1)
    open_faces = geometry.open_faces.double()
    mean = reference.sum(dims, keepdim=True) / open_faces.sum(dims, keepdim=True).clamp(min=1.0)
    prediction = geometry.mask(mean.expand_as(reference))
    assert vrmse(reference, reference, geometry).tolist() == [0.0, 0.0]
    assert vrmse(prediction, reference, geometry).tolist() == pytest.approx([1.0, 1.0])


def test_a_wrong_profile_counts_in_full() -> None:
    geometry, areas = Geometry(CHANNEL), torch.tensor(CHANNEL.face_areas).double()[:, None, None, None]
    fluctuation = torch.randn(3, *CHANNEL.shape, dtype=torch.float64)
    fluctuation[2, :, :, 0] = 0.0
    fluctuation -= fluctuation.mean((1, 2), keepdim=True)
    profile = torch.tensor([1.0, 5.0, 8.0, 9.0], dtype=torch.float64).expand(3, *CHANNEL.shape).clone()
    profile[1:] = 0.0
    offset = torch.zeros_like(profile)
    offset[0] = 0.25
    u, v = (profile + offset + fluctuation) * areas, (profile + fluctuation) * areas
    expected = math.sqrt(CHANNEL.num_cells * 0.25**2 / float(fluctuation.square().sum()))
    assert float(vrmse(u, v, geometry)) == pytest.approx(expected)
    # The profile itself is no part of what a prediction is measured against: a steeper one changes nothing.
    steeper = (3 * profile) * areas
    assert float(vrmse(u + steeper, v + steeper, geometry)) == pytest.approx(expected)
    assert float(vrmse_well(profile * areas, v, geometry)) < 0.9 < float(vrmse(profile * areas, v, geometry))


def test_values_behind_closed_faces_do_not_count() -> None:
    reference = POROUS.mask(torch.randn(3, *BOX.shape, dtype=torch.float64))
    prediction = torch.where(POROUS.open_faces, reference, 1e9)
    assert float(vrmse(prediction, reference, POROUS)) == 0.0


def test_vrmse_of_a_flow_at_rest() -> None:
    still, geometry = torch.zeros(3, *BOX.shape, dtype=torch.float64), Geometry(BOX)
    assert float(vrmse(still, still, geometry)) == 0.0
    assert float(vrmse(still + 1, still, geometry)) == math.inf


def test_vrmse_well_is_the_mean_over_components_of_scaled_errors() -> None:
    n, geometry = 8, Geometry(BOX)
    wave = torch.sin(2 * math.pi * torch.arange(n, dtype=torch.float64) / n)
    flux = torch.zeros(3, n, n, n, dtype=torch.float64)
    flux[0], flux[1], flux[2] = wave[None, :, None], wave[None, None, :], wave[:, None, None]
    prediction = flux.clone()
    prediction[0], prediction[1] = 0.0, 0.5 * flux[1]
    assert float(vrmse_well(prediction, flux, geometry)) == pytest.approx((1.0 + 0.5 + 0.0) / 3)


def test_vrmse_refuses_other_shapes(unchecked: None) -> None:
    with pytest.raises(ValueError, match="Expected a prediction of the reference's shape"):
        vrmse(torch.zeros(1, 3, *BOX.shape), torch.zeros(3, *BOX.shape), Geometry(BOX))


# Rollouts


def rotating(num_times: int, angle: float) -> Tensor:
    """Two shear waves in quadrature whose phase turns by ``angle`` per frame; persistence errs by 2 sin(angle t/2)."""
    n = BOX.shape[0]
    y = 2 * math.pi * torch.arange(n, dtype=torch.float64) / n
    flux = torch.zeros(1, num_times, 3, *BOX.shape, dtype=torch.float64)
    for t in range(num_times):
        flux[0, t, 0] = torch.sin(y - angle * t)[None, :, None]
    return flux


def rollout_of(start: int, stride: int, trajectories: list[int]) -> dict[str, object]:
    return {
        "reference": "r.zarr",
        "trajectories": trajectories,
        "start": start,
        "stride": stride,
        "checkpoint": "runs/d",
    }


def test_persistence_in_closed_form_and_a_model_that_beats_it(tmp_path: Path) -> None:
    angle = 0.4
    reference = save(tmp_path / "r.zarr", rotating(4, angle), BOX, exact=False)
    lagging = save(tmp_path / "m.zarr", rotating(4, 0.75 * angle), BOX, exact=False)
    found = validate(lagging, reference)
    error = lambda phase: [2 * math.sin(phase * t / 2) for t in range(4)]  # noqa: E731
    held, model = error(angle), error(0.25 * angle)
    assert found["vrmse_persistence_1_step"].value == pytest.approx(held[1])
    assert found["vrmse_persistence_rollout"].value == pytest.approx(sum(held[1:]) / 3)
    assert found["vrmse_1_step"].value == pytest.approx(model[1])
    assert found["vrmse_rollout"].value == pytest.approx(sum(model[1:]) / 3)
    assert found["vrmse_1_step"].threshold == found["vrmse_persistence_1_step"].value
    assert exit_status(found.checks) == 0
    curves = {curve.label: curve.y for curve in found.series[0].curves}
    assert curves["model"] == pytest.approx(model) and curves["persistence"] == pytest.approx(held)
    assert found.series[0].x == (0.0, 0.25, 0.5, 0.75)


def test_a_model_that_holds_frame_0_does_not_beat_persistence(tmp_path: Path) -> None:
    flux = rotating(3, 0.4)
    reference = save(tmp_path / "r.zarr", flux, BOX, exact=False)
    held = save(tmp_path / "m.zarr", flux[:, :1].expand_as(flux), BOX, exact=False)
    found = validate(held, reference)
    assert [check.name for check in found.checks if check.verdict == "fail"] == ["vrmse_1_step", "vrmse_rollout"]


def test_frames_meet_the_reference_at_the_rollouts_start_and_stride(tmp_path: Path) -> None:
    truth = solenoidal(CHANNEL, 3, 7)
    reference = save(tmp_path / "r.zarr", truth, CHANNEL)
    perfect = save(tmp_path / "m.zarr", truth[[2, 0]][:, 1::2], CHANNEL, rollout=rollout_of(1, 2, [2, 0]))
    found = validate(perfect, reference)
    assert found["vrmse_rollout"].value == found["spectrum_error_low"].value == 0.0
    assert found["kinetic_energy_ratio"].value == 1.0
    assert found.subject == "m.zarr: rollout of runs/d from r.zarr"
    shifted = save(tmp_path / "s.zarr", truth[[2, 0]][:, 1::2], CHANNEL, rollout=rollout_of(0, 2, [2, 0]))
    assert validate(shifted, reference)["vrmse_1_step"].value > 0.5


def test_the_autoencoders_floor_is_its_error_on_the_reference(tmp_path: Path) -> None:
    truth = solenoidal(CHANNEL, 2, 3)
    truth -= truth.mean((-3, -2), keepdim=True)
    reference = save(tmp_path / "r.zarr", truth, CHANNEL, exact=False)
    seen: list[tuple[int, int]] = []

    def damp(state: State) -> Tensor:
        return 0.75 * state.velocity

    found = validate(reference, reference, damp, progress=lambda done, total: seen.append((done, total)))
    assert found["vrmse_autoencoder_floor"].value == pytest.approx(0.25)
    assert found["vrmse_rollout"].value == 0.0
    alone = validate(reference, reconstruct=damp)
    assert alone["vrmse_autoencoder_floor"].value == pytest.approx(0.25)
    assert [curve.label for curve in alone.series[0].curves] == ["autoencoder floor"]
    assert seen == [(i, 6) for i in range(1, 7)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_fails_everything_judged(value: float, tmp_path: Path) -> None:
    flux = solenoidal(BOX, 2, 4)
    reference = save(tmp_path / "r.zarr", flux, BOX)
    found = validate(poison(save(tmp_path / "m.zarr", flux, BOX), value), reference)
    assert found.checks[0].name == "finite" and found.checks[0].value == 1.0
    assert "trajectory 1, frame 2" in found.checks[0].detail
    assert {check.name: check.verdict for check in found.checks} == dict.fromkeys(
        ["finite", "net_flux_max", "solid_flux_max", "vrmse_1_step", "vrmse_rollout"], "fail"
    )


def test_ground_truth_alone_is_checked_for_conservation_and_finiteness(tmp_path: Path) -> None:
    flux = POROUS.mask(solenoidal(BOX, 2, 2))
    found = validate(save(tmp_path / "porous.zarr", flux, BOX, solid=SOLID, exact=False))
    names = ["finite", "net_flux_max", "solid_flux_max", "mean_flow_drift", "kinetic_energy"]
    assert [check.name for check in found.checks] == names
    energy = float(operators.kinetic_energy(flux, BOX).mean())
    assert found["kinetic_energy"].value == pytest.approx(energy)
    with pytest.raises(KeyError, match="Expected one of finite"):
        found["vrmse_rollout"]


def reference_cases(tmp_path: Path) -> dict[str, Callable[[], object]]:
    flux = solenoidal(BOX, 1, 3)
    store = save(tmp_path / "m.zarr", flux, BOX)
    finer = Grid(BOX.shape, (0.25, 0.125, 0.125))
    return {
        "Expected a reference on the store's grid": lambda: validate(store, save(tmp_path / "g.zarr", flux, finer)),
        "Expected a reference up to frame 2, got 2": lambda: validate(
            store, save(tmp_path / "t.zarr", flux[:, :2], BOX)
        ),
        "Expected a reference trajectory for each of 2": lambda: validate(
            save(tmp_path / "n.zarr", flux.expand(2, 3, 3, *BOX.shape), BOX), store
        ),
        "Expected a rollout of at least one step": lambda: validate(save(tmp_path / "o.zarr", flux[:, :1], BOX), store),
        "Expected the solid voxels of the reference in trajectory 0": lambda: validate(
            store, save(tmp_path / "s.zarr", POROUS.mask(flux), BOX, solid=SOLID)
        ),
    }


def test_references_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    for message, call in reference_cases(tmp_path).items():
        with pytest.raises(ValueError, match=message):
            call()


def saved(path: Path, specs: list[FieldSpec], frames: dict[str, list[Tensor]], domain: Domain = BOX) -> Store:
    """A store of one trajectory with these frames, which claims exact fluxes."""
    times = [0.1 * t for t in range(len(next(iter(frames.values()))))]
    with create_store(
        path,
        grid=domain,
        specs={spec.name: spec for spec in specs},
        family="box",
        num_trajectories=1,
        times=times,
        provenance={"exact": True},
    ) as writer:
        for name, snapshots in frames.items():
            writer.write(name, 0, slice(None), torch.stack(snapshots))
    return open_store(path)


def test_a_store_without_a_velocity_flux_is_no_rollout(tmp_path: Path) -> None:
    store = saved(
        tmp_path / "t.zarr", [FieldSpec("temperature", "scalar", "K")], {"temperature": [torch.zeros(8, 8, 8)]}
    )
    with pytest.raises(ValueError, match="Expected a solenoidal flux field 'velocity', got temperature"):
        validate(store, reconstruct=lambda state: state.velocity)
    assert exit_status(validate(store).checks) == 0


def test_every_solenoidal_flux_is_judged(tmp_path: Path) -> None:
    magnetic = FieldSpec("magnetic", "flux", "Wb", "solenoidal")
    velocity, field = solenoidal(BOX), solenoidal(BOX)
    spoilt = field.clone()
    spoilt[0, 3, 3, 3] += 0.25
    for name, flux, net in (("good", field, 0.0), ("spoilt", spoilt, 0.25)):
        store = saved(tmp_path / name, [VELOCITY, magnetic], {"velocity": [velocity], "magnetic": [flux]})
        found = validate(store)
        assert found["magnetic_net_flux_max"].value == net and found["magnetic_net_flux_max"].unit == "Wb"
        assert found["net_flux_max"].value == 0.0 and exit_status(found.checks) == (net > 0)


def test_a_flux_that_need_not_be_solenoidal_is_held_to_closed_faces_only(tmp_path: Path) -> None:
    flux = torch.randn(3, *CHANNEL.shape, dtype=torch.float64)
    spec = FieldSpec("velocity", "flux", "m3/s")
    leaking = validate(saved(tmp_path / "leaking", [spec], {"velocity": [flux]}, CHANNEL))
    assert leaking["solid_flux_max"].value == float(flux[2, :, :, 0].abs().max())
    tight = validate(saved(tmp_path / "tight", [spec], {"velocity": [Geometry(CHANNEL).mask(flux)]}, CHANNEL))
    assert exit_status(tight.checks) == 0 and not any("net_flux" in check.name for check in tight.checks)


def test_conserved_totals_and_positive_values(tmp_path: Path) -> None:
    """A bump that moves keeps its total; one that grows by a hundredth drifts by a hundredth of its size."""
    bump = torch.zeros(8, 8, 8, dtype=torch.float64)
    bump[2, 3, 4] = 4.0
    spec = FieldSpec("dye", "scalar", "kg", "conserved")
    kept = validate(saved(tmp_path / "kept", [spec], {"dye": [bump, bump.roll(3, 0), bump.roll(2, 1)]}))
    assert kept["dye_total_drift"].value == 0.0 and kept["dye_total_drift"].verdict == "pass"
    grown = validate(saved(tmp_path / "grown", [spec], {"dye": [bump, bump, 1.01 * bump]}))["dye_total_drift"]
    mean = 4.0 / 512
    assert grown.value == pytest.approx(0.01 * mean / (2 * mean * (1 - 1 / 512))) and grown.verdict == "fail"
    positive = FieldSpec("dye", "scalar", "kg", "positive")
    below = validate(saved(tmp_path / "below", [positive], {"dye": [bump, bump - 1e-9]}))["dye_below_zero"]
    assert below.value == 1e-9 and below.verdict == "fail"
    assert validate(saved(tmp_path / "above", [positive], {"dye": [bump]}))["dye_below_zero"].verdict == "pass"


def test_totals_on_a_sphere_weigh_by_area(tmp_path: Path) -> None:
    """cos²θ has the mean 1/3 over the sphere, far from the mean of its samples."""
    sphere = Sphere(8, 16)
    height = (sphere.colatitudes.cos() ** 2)[:, None].expand(8, 16)
    spec = FieldSpec("height", "scalar", "m", "conserved")
    even = torch.full_like(height, 1 / 3)
    found = validate(saved(tmp_path / "s.zarr", [spec], {"height": [height, even]}, sphere))
    assert found["height_total_drift"].value < 1e-14
    assert found["height_rms"].value == pytest.approx((math.sqrt(1 / 5) + 1 / 3) / 2)


# Spectra


@pytest.mark.parametrize("geometry", [Geometry(CHANNEL), Geometry(BOX), POROUS], ids=["channel", "box", "porous"])
@pytest.mark.parametrize("odd", [False, True])
def test_every_spectrum_sums_to_the_kinetic_energy(geometry: Geometry, odd: bool) -> None:
    if odd:
        grid = geometry.grid
        geometry = Geometry(Grid((7, 9, 5), grid.spacing, grid.boundaries))
    flux = geometry.mask(torch.randn(3, *geometry.grid.shape, dtype=torch.float64))
    energy = float(operators.kinetic_energy(flux, geometry.grid))
    spectra = energy_spectra(flux, geometry)
    assert [s.direction for s in spectra] == (["shell"] if all(geometry.grid.periodic) else ["x", "y"])
    for spectrum in spectra:
        assert float(spectrum.energy.sum()) == pytest.approx(energy)


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_a_single_fourier_mode_sits_in_its_shell(m: int) -> None:
    y = 2 * math.pi * torch.arange(8, dtype=torch.float64) / 8
    flux = torch.zeros(3, *BOX.shape, dtype=torch.float64)
    flux[0] = torch.cos(m * y)[None, :, None]
    (spectrum,) = energy_spectra(flux, Geometry(BOX))
    assert int(spectrum.energy.argmax()) == m
    assert float(spectrum.energy[m] / spectrum.energy.sum()) == pytest.approx(1.0)
    assert spectrum.wavenumbers[m - 1] == pytest.approx(2 * math.pi * m / 1.0)
    flat = Grid(BOX.shape, BOX.spacing, (("periodic",) * 2, ("periodic",) * 2, ("no_slip", "no_slip")))
    along_x, along_y = energy_spectra(flux, Geometry(flat))
    assert int(along_x.energy.argmax()) == 0 and int(along_y.energy.argmax()) == m
    assert float(along_y.energy[m] / along_y.energy.sum()) == pytest.approx(1.0)


def test_shells_of_a_long_box_hold_the_modes_of_its_short_side() -> None:
    grid = Grid((16, 8, 8), (0.125, 0.125, 0.125))
    flux = torch.zeros(3, *grid.shape, dtype=torch.float64)
    flux[0] = torch.cos(2 * math.pi * 3 * torch.arange(8, dtype=torch.float64) / 8)[None, None, :]
    (spectrum,) = energy_spectra(flux, Geometry(grid))
    assert spectrum.spacing == pytest.approx(2 * math.pi) and int(spectrum.energy.argmax()) == 3
    assert spectrum.resolved == 4 and bool(
        (energy_spectra(torch.randn(3, *grid.shape), Geometry(grid))[0].energy > 0).all()
    )


def test_a_box_too_flat_to_resolve_a_shell_has_no_spectrum_to_show(tmp_path: Path) -> None:
    grid = Grid((8, 8, 4), (1.0, 1.0, 0.25))
    flux = solenoidal(grid, 1, 2)
    (spectrum,) = energy_spectra(flux[0, 0], Geometry(grid))
    assert spectrum.resolved == 0
    store = save(tmp_path / "a.zarr", flux, grid)
    found = validate(store, store)
    assert [series.name for series in found.series] == ["vrmse", "kinetic_energy"]
    assert not any(check.name.startswith("spectrum") for check in found.checks)


def test_the_spectral_error_is_the_decades_by_which_a_band_is_off() -> None:
    reference = energy_spectra(torch.randn(3, *BOX.shape, dtype=torch.float64), Geometry(BOX))
    damped = tuple(
        type(s)(
            s.direction, s.spacing, s.resolved, torch.where(torch.arange(len(s.energy)) >= 3, s.energy / 100, s.energy)
        )
        for s in reference
    )
    assert spectrum_errors(reference, reference) == {"low": 0.0, "mid": 0.0, "high": 0.0}
    errors = spectrum_errors(damped, reference)
    # Of the shells 1 to 4, the third 1 … 1.6 of log k holds 1, the next 2, the last 3 and 4.
    assert errors == pytest.approx({"low": 0.0, "mid": 0.0, "high": 2.0}, abs=1e-12)


def test_a_rollout_with_half_the_amplitude_has_a_quarter_of_the_energy(tmp_path: Path) -> None:
    flux = solenoidal(CHANNEL, 2, 3)
    reference = save(tmp_path / "r.zarr", flux, CHANNEL)
    found = validate(save(tmp_path / "m.zarr", 0.5 * flux, CHANNEL), reference)
    assert found["kinetic_energy_ratio"].value == pytest.approx(0.25)
    for band in ("low", "high"):
        assert found[f"spectrum_error_{band}"].value == pytest.approx(2 * math.log10(2))
