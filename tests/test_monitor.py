"""What a run says of itself: rates that are right, figures that are means, trackers and pictures that repeat them."""

import json
import math
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from safetensors.torch import load_file
from small import Road, configuration, train

from latentphys.data import open_store
from latentphys.training import hardware, open_checkpoint
from latentphys.training.estimate import Settings, estimate, sample_cost
from latentphys.training.meter import Meter
from latentphys.training.models import build
from latentphys.training.planned import plan
from latentphys.training.tasks import Task
from latentphys.views import scene

KINDS = ("autoencoder", "dynamics")


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pictures, which are quicker to write."""
    monkeypatch.setattr(scene, "DPI", 60)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_means_are_of_the_steps_that_had_a_figure() -> None:
    meter = Meter()
    for loss, more in ((1.0, {"a": 4.0}), (2.0, {"b": 8.0}), (6.0, {"a": 5.0})):
        meter.add({name: torch.tensor(value) for name, value in {"loss": loss, **more}.items()})
    assert meter.means() == {"loss": 3.0, "a": 4.5, "b": 8.0}
    assert meter.means() == {}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_logs_rates_and_shows_everything_to_trackers(road: Road, tmp_path: Path, kind: str) -> None:
    """Rates against the log's own clock; every scalar and the pictures are in TensorBoard's files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    settings = ["trainer.num_steps=8", "trainer.batch_size=2", "trainer.log_every=4", "trainer.test_every=8"]
    seen = ["trainer.trackers=[tensorboard]", "trainer.pictures_every=4", "trainer.peak_flops=1e12"]
    train(kind, road.inputs(kind), run, *settings, *seen, "trainer.checkpoint_every=8")
    told = [line for line in lines(run) if "samples_per_s" in line]
    assert [line["step"] for line in told] == [4, 8]
    config = configuration(kind, road.inputs(kind), run)
    each = [sample_cost(config, open_store(path)) for path in road.inputs(kind)]
    # Both families come twice in four steps.
    tokens, flops = (mean(values) for values in zip(*each, strict=True))
    for line in told:
        assert line["tokens_per_s"] == pytest.approx(tokens * line["samples_per_s"])
        assert line["mfu"] == pytest.approx(flops * line["samples_per_s"] / 1e12)
        assert 0 <= line["data_wait"] < 1
    assert 4 * 2 / told[0]["samples_per_s"] <= told[0]["seconds"]
    events = EventAccumulator(str(next((run / "trackers").rglob("events*")).parent))
    events.Reload()
    shown = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    for line in lines(run):
        for name, value in line.items():
            if isinstance(value, float) and name != "seconds":
                assert shown[name][line["step"]] == pytest.approx(value, rel=1e-6), name
    assert sorted(path.name for path in (run / "pictures").iterdir()) == ["step-000004.png", "step-000008.png"]
    assert [event.step for event in events.Images("sample")] == [4, 8]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_seen_changes_nothing(road: Road, tmp_path: Path, kind: str) -> None:
    """Tests, pictures, log lines and checkpoints leave every bit of the weights as it would be without them."""
    seldom = [f"trainer.{name}_every=6" for name in ("log", "test", "checkpoint")]
    often = [f"trainer.{name}=1" for name in ("log_every", "test_every", "checkpoint_every")]
    for name, settings in (("seldom", seldom), ("often", often)):
        train(kind, road.inputs(kind), tmp_path / name, *settings, f"trainer.pictures_every={3 * (name == 'often')}")

    for file in ("model", "optimizer"):
        a, b = (load_file(open_checkpoint(tmp_path / n).path / f"{file}.safetensors") for n in ("seldom", "often"))
        assert set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)


def test_losses_of_families_count_as_they_are_told(road: Road, tmp_path: Path) -> None:
    """A weight scales the gradient of its own family's steps alone, and no figure."""
    settings = ["trainer.num_steps=2", "trainer.log_every=1", "trainer.clip=1e9", "dynamics_training.input_noise=0"]
    runs = {}
    for name, weights in (("plain", "null"), ("weighted", "{porous: 3}")):
        train("dynamics", road.inputs("dynamics"), tmp_path / name, *settings, f"loss_weights={weights}")
        runs[name] = next(line for line in lines(tmp_path / name) if "porous/latent_mse" in line and "loss" in line)
    factor = 3 if runs["plain"]["step"] == 1 else None
    assert factor, "the first step of this seed is one of the porous medium"
    assert runs["weighted"]["loss"] == pytest.approx(3 * runs["plain"]["loss"])
    assert runs["weighted"]["gradient_norm"] == pytest.approx(3 * runs["plain"]["gradient_norm"], rel=1e-5)
    assert runs["weighted"]["porous/latent_mse"] == runs["plain"]["porous/latent_mse"]
    for weights in ("{channel: 2}", "{porous: 0}", "{porous: -1}"):
        with pytest.raises(ValueError, match="Expected positive loss weights of open_channel, porous, got "):
            train("dynamics", road.inputs("dynamics"), tmp_path / "refused", f"loss_weights={weights}")


def test_passes_of_a_step_are_the_step(road: Road, tmp_path: Path) -> None:
    """Accumulated gradients are those of the whole batch, to rounding; so are figures and the use of experts."""
    settings = ["trainer.batch_size=4", "trainer.num_steps=1", "trainer.log_every=1", "dynamics_training.input_noise=0"]
    for name, passes in (("one", 1), ("four", 4)):
        train("dynamics", road.inputs("dynamics"), tmp_path / name, *settings, f"trainer.accumulate={passes}")
    one, four = lines(tmp_path / "one")[0], lines(tmp_path / "four")[0]
    assert set(one) == set(four)
    assert math.isclose(one["gradient_norm"], four["gradient_norm"], rel_tol=1e-5)
    assert one["routing"][0]["load"] == four["routing"][0]["load"]
    assert math.isclose(one["loss"], four["loss"], rel_tol=1e-6)


def test_a_run_that_does_not_fit_is_refused(road: Road, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As before every run on a GPU; the same model on a larger one is taken."""
    stores = [open_store(path) for path in road.inputs("dynamics")]
    config = configuration("dynamics", road.inputs("dynamics"), tmp_path / "run", "trainer.batch_size=4")
    trainer, task = build(config["trainer"]), MagicMock(Task, stores=lambda: stores)
    needed = estimate(lambda: plan(config, stores[0]), Settings.of(config["trainer"])).memory().total
    monkeypatch.setattr(hardware, "available_memory", lambda: needed - 1)
    with pytest.raises(
        ValueError, match=r"Expected at most .* for each process, got a need of .*trainer\.accumulate=4"
    ):
        trainer.check_memory(task, config, 1, False)
    monkeypatch.setattr(hardware, "available_memory", lambda: needed)
    trainer.check_memory(task, config, 1, False)
