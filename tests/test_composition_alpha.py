"""Every way to an α finds the right one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composed import Three
from small import Road

from latentphys.composition import (
    Choice,
    CompositeModel,
    Fit,
    Prefix,
    calibrate,
    coordinate,
    from_metadata,
    score,
    search,
)
from latentphys.composition.sources import open_relatives
from latentphys.rollout import Frame, LatentStepper


@pytest.fixture(scope="module")
def model(three: Three) -> CompositeModel:
    return CompositeModel(*three)


def test_alpha_of_a_parameter_is_linear_in_it_or_in_its_logarithm(three: Three) -> None:
    assert [coordinate(x, 1.0, 5.0) for x in (1.0, 3.0, 5.0, 9.0)] == [-1.0, 0.0, 1.0, 3.0]
    assert coordinate(1e-3, 1e-4, 1e-2, "log") == pytest.approx(0.0, abs=1e-12)
    assert coordinate(1e-1, 1e-4, 1e-2, "log") == pytest.approx(2.0, rel=1e-12)
    assert coordinate(2.0, 5.0, 1.0) == 0.5  # the low endpoint may have the larger value
    sources = open_relatives(*three)
    assert from_metadata(sources, "viscosity", 0.04).alpha == pytest.approx(1.0)
    assert from_metadata(sources, "viscosity", 0.02, "log").alpha == pytest.approx(0.0, abs=1e-12)
    chosen = from_metadata(sources, "viscosity", 0.02, "linear", 0.0, 0.08)
    assert (chosen.alpha, chosen.about["low_at"]) == (-0.5, 0.0)
    for match, arguments in (
        ("Expected a map of linear | log, got 'cubic'", (1.0, 0.0, 2.0, "cubic")),
        ("a finite value of the parameter, got inf", (float("inf"), 0.0, 2.0)),
        ("a positive value of the parameter for its logarithm, got 0; use --map linear", (1.0, 0.0, 2.0, "log")),
        ("endpoints at two values of the parameter, got 2 for both", (1.0, 2.0, 2.0)),
    ):
        with pytest.raises(ValueError, match=match):
            coordinate(*arguments)


def test_endpoints_that_do_not_say_where_they_were_trained(three: Three) -> None:
    sources = open_relatives(*three)

    def refused(match: str, low: dict[str, Any] | None, map: str = "linear") -> None:
        extra = {k: v for k, v in sources[1].extra.items() if k != "regimes"} | (
            {} if low is None else {"regimes": low}
        )
        with pytest.raises(ValueError, match=match):
            from_metadata([sources[0], replace(sources[1], extra=extra), sources[2]], "viscosity", 0.02, map)

    at = {"mean": 0.01, "geometric_mean": None}
    refused("viscosity of the training data in .*low, got a checkpoint that does not say .*; pass --low-at", None)
    refused(r"got only \['porosity'\]; pass --low-at", {"porous": {"porosity": at}})
    refused(
        r"one for each of \['a', 'b'\]; pass --low-at",
        {"a": {"viscosity": at}, "b": {"viscosity": {**at, "mean": 1.0}}},
    )
    refused("values that have no logarithm; pass --low-at", {"porous": {"viscosity": at}}, "log")
    refused("one that is not finite; pass --low-at", {"porous": {"viscosity": {**at, "mean": float("nan")}}})


def test_far_extrapolation_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="alpha = 2.5 is far beyond the endpoints"):
        assert Choice(2.5, "given").range == "extrapolation, 2.5 × as far as the endpoints"
    assert Choice(-1.0, "given").range == "interpolation"
    with pytest.raises(ValueError, match="Expected a finite alpha, got nan. Give a number"):
        Choice(float("nan"), "given")


def rolled(model: CompositeModel, prefix: Prefix, alpha: float) -> Prefix:
    """The same flows as θ(α) would have them."""
    model.set(alpha)
    batches = []
    for stepper, latents, parameters in prefix.batches:
        frames = [latents[:, :1]]
        for n in range(1, latents.shape[1]):
            frames.append(stepper.step(frames[-1], parameters[n - 1], parameters[n]).latent[:, None])
        batches.append((stepper, torch.cat(frames, 1), parameters))
    return Prefix(batches, prefix.about)


def test_a_prefix_is_the_first_frames_of_a_store_as_the_model_sees_them(road: Road, model: CompositeModel) -> None:
    store = road.store("porous")
    prefix = Prefix.read(model, store, [2, 0], frames=3)
    (stepper, latents, parameters), scale = prefix.batches[0], model.autoencoder.scale("porous")
    for n, i in enumerate((2, 0)):
        packed = scale.pack({"velocity": store.read("velocity", i, 1)})[None]
        expected = model.autoencoder.encode(packed, store.geometry(i), "porous")[0]
        assert torch.allclose(latents[n, 1], expected, atol=1e-5)
        assert parameters[1][n]["viscosity"] == store.parameters["viscosity"][i]
    model.set(0.7)
    errors, frame = [], latents[:, :1]
    for n in (1, 2):
        frame = stepper.step(frame, parameters[n - 1], parameters[n]).latent[:, None]
        errors.append(((frame[:, 0] - latents[:, n]) / model.dynamics.increment_std).square().mean())
    assert score(model, prefix, 0.7) == pytest.approx(float(torch.stack(errors).mean()), rel=1e-5)
    for match, trajectories, frames in (
        (r"trajectories from 0 to 3 of .*porous.zarr, got \[4\]", [4], 4),
        ("Expected 2 to 6 frames, 1 snapshots of .* apart, got 7", [0], 7),
        ("Expected 2 to 6 frames, 1 snapshots of .* apart, got 1", [0], 1),
    ):
        with pytest.raises(ValueError, match=match):
            Prefix.read(model, store, trajectories, frames)


@pytest.mark.parametrize(("alpha", "tolerance"), [(0.437, 0.01), (-1.31, 1e-3)])
def test_a_prefix_finds_the_alpha_that_made_it(
    road: Road, model: CompositeModel, alpha: float, tolerance: float
) -> None:
    prefix = rolled(model, Prefix.read(model, road.store("porous"), [0, 1]), alpha)
    found = search(model, prefix, [-2, -1, 0, 1, 2], tolerance)
    assert abs(found.alpha - alpha) < tolerance
    assert found.how == "prefix" and found.about["score"] == min(p["score"] for p in found.about["curve"])
    assert score(model, prefix, alpha) < 1e-9 < found.about["curve"][0]["score"]


def test_searches_that_say_nothing_are_refused_or_warned_of(
    road: Road, model: CompositeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = rolled(model, Prefix.read(model, road.store("porous"), [0], frames=2), 1.9)
    with pytest.warns(UserWarning, match="alpha = 0.5, the best of the bank, lies at its end"):
        assert search(model, prefix, [-0.5, 0.0, 0.5]).alpha <= 0.5
    for bank, tolerance in (([0.5], 0.1), ([0.5, 0.5], 0.1), ([0, float("nan")], 0.1), ([0, 1], 0.0)):
        with pytest.raises(ValueError, match="Expected a bank of two or more finite alphas and a tolerance above 0"):
            search(model, prefix, bank, tolerance)
    with pytest.raises(ValueError, match="scores that depend on alpha on .*porous.zarr, got the same one everywhere"):
        monkeypatch.setattr("latentphys.composition.prefix.score", lambda *_: 1.0)
        search(model, prefix)
    with pytest.raises(ValueError, match="got none that is finite; give more frames"):
        monkeypatch.setattr("latentphys.composition.prefix.score", lambda *_: float("inf"))
        search(model, prefix)


def test_rollouts_that_blow_up_count_as_infinitely_bad(
    road: Road, model: CompositeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = Prefix.read(model, road.store("porous"), [0], frames=2)
    (stepper, latents, parameters), about = prefix.batches[0], prefix.about
    assert score(model, Prefix([(stepper, latents * float("nan"), parameters)], about), 0.0) == float("inf")
    prefix, steps, step = Prefix.read(model, road.store("porous"), [0], frames=5), [], LatentStepper.step

    def blows_up(*arguments: Any) -> Frame:
        steps.append(1)
        return step(*arguments)._replace(latent=arguments[1][:, -1] * float("inf"))

    monkeypatch.setattr(LatentStepper, "step", blows_up)
    assert score(model, prefix, 0.0) == float("inf") and len(steps) == 1  # what comes later cannot make it finite


@pytest.mark.parametrize("map", ["linear", "log"])
def test_a_scale_fits_a_known_map(road: Road, model: CompositeModel, monkeypatch: pytest.MonkeyPatch, map: str) -> None:
    """Flows made by θ(a + b x) give a and b back, and say how well a line fits."""
    store, read = road.store("porous"), Prefix.read
    viscosity = store.parameters["viscosity"]
    line = {"linear": (-2.0, 100.0), "log": (5.0, 1.2)}[map]

    def truth(value: float) -> float:
        return line[0] + line[1] * (value if map == "linear" else np.log(value))

    def made(model: CompositeModel, store: Any, some: Any, frames: int) -> Prefix:
        return rolled(model, read(model, store, some, 2), truth(viscosity[some[0]]))

    monkeypatch.setattr(Prefix, "read", made)
    fit = calibrate(model, [store], "viscosity", map, bank=[-2, -1, 0, 1, 2], tolerance=1e-3)
    assert fit.a == pytest.approx(line[0], abs=0.05) and fit.b == pytest.approx(line[1], rel=0.02)
    assert fit.r == pytest.approx(1.0, abs=1e-4)
    assert [p["trajectories"] for p in fit.points] == [[i] for i in np.argsort(viscosity)]
    choice = fit.choice(0.02)
    assert choice.how == "scale" and choice.alpha == pytest.approx(truth(0.02), abs=0.02)
    with pytest.raises(ValueError, match="one number for each trajectory, .*'viscosity'.*, got 'force'. Name one"):
        calibrate(model, [store], "force")
    with pytest.raises(ValueError, match="at two or more values of 'viscosity', got 1; add stores"):
        calibrate(model, [store], "viscosity", trajectories=[1], bank=[-2, 0, 2])
    with pytest.raises(ValueError, match=r"trajectories from 0 to 3 of .*, got \[9\]"):
        calibrate(model, [store], "viscosity", trajectories=[9])
    other = road.store("porous")
    other.attributes["parameter_units"] = {**other.attributes["parameter_units"], "viscosity": "cm²/s"}
    with pytest.raises(ValueError, match="one unit of 'viscosity' in all stores, got .*cm²/s.*Convert them to one"):
        calibrate(model, [store, other], "viscosity")


def test_least_squares() -> None:
    points = [{"value": x, "alpha": y} for x, y in ((1.0, 0.0), (2.0, 2.0), (3.0, 1.0))]
    fit = Fit.of("p", "linear", points)
    assert fit.a == pytest.approx(0.0, abs=1e-12) and fit.b == pytest.approx(0.5) and fit.r == pytest.approx(0.5)
    assert Fit.of("p", "linear", [{**point, "alpha": 1.0} for point in points]).r is None


def test_a_fitted_scale_is_drawn(tmp_path: Path) -> None:
    points = [{"value": v, "alpha": a} for v, a in ((0.01, -1.1), (0.02, 0.1), (0.05, 0.9))]
    Fit.of("viscosity", "log", points).choice(0.03).draw(tmp_path / "fit.png")
    assert (tmp_path / "fit.png").read_bytes().startswith(b"\x89PNG")
    Choice(0.0, "given").draw(tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
