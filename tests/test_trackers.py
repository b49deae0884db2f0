"""Trackers show what the log says, each step once however often a run resumes; what cannot work is refused first."""

import importlib.machinery
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import LoggerType
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from latentphys.training import trackers

LINE = {
    "step": 30,
    "loss": 0.5,
    "porous/latent_mse": 0.25,
    "test/porous/latent_mse": float("nan"),
    "event": "expert 3 is dead",
    "seconds": 12.5,
    "routing": [
        {
            "layer": 0,
            "load": [0.1, 0.7, 0.2],
            "entropy": 1.1,
            "dead": [],
            "dead_age": [],
            "margin": 0.3,
            "purity": None,
        },
        {"layer": 1, "load": [1.0, 0.0, 0.0], "entropy": 0, "dead": [1, 2], "dead_age": [7, 9], "margin": 1},
    ],
}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_trackers_are_checked_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    assert trackers.check(["tensorboard"]) == ["tensorboard"]
    assert trackers.check([]) == []
    with pytest.raises(ValueError, match=r"trackers out of tensorboard \| wandb \| mlflow \| trackio, got 'comet_ml'"):
        trackers.check(["tensorboard", "comet_ml"])
    with pytest.raises(ValueError, match="each tracker once, got 'tensorboard' 2 times"):
        trackers.check(["tensorboard", "tensorboard"])
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="the package wandb for the tracker 'wandb', got none; pip install wandb"):
        trackers.check(["wandb"])


def test_a_log_line_becomes_numbers_by_name() -> None:
    assert trackers.flatten(LINE) == {
        "loss": 0.5,
        "porous/latent_mse": 0.25,
        "routing/layer0/load_max": 0.7,
        "routing/layer0/load_min": 0.1,
        "routing/layer0/entropy": 1.1,
        "routing/layer0/dead": 0.0,
        "routing/layer0/margin": 0.3,
        "routing/layer1/load_max": 1.0,
        "routing/layer1/load_min": 0.0,
        "routing/layer1/entropy": 0.0,
        "routing/layer1/dead": 2.0,
        "routing/layer1/margin": 1.0,
    }
    assert all(type(value) is float for value in trackers.flatten(LINE).values())
    assert trackers.flatten({"step": 3, "done": True, "loss": float("inf")}) == {}


def told(run: Path) -> EventAccumulator:
    events = EventAccumulator(str(run / "trackers" / "latentphys"), size_guidance={"images": 0})
    events.Reload()
    return events


def start(run: Path, first: int, **config: Any) -> Accelerator:
    accelerator = Accelerator(cpu=True, log_with=["tensorboard"], project_dir=str(run))
    trackers.start(accelerator, ["tensorboard"], run, first, config or None)
    return accelerator


def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    """Killed at step 5 with its last checkpoint at step 3: steps 4 and 5 are those of the second start."""
    for first, steps, value in ((0, range(1, 6), 1.0), (3, range(4, 8), 2.0)):
        accelerator = start(tmp_path, first, trainer={"seed": 0, "tags": ["a", None]})
        for step in steps:
            accelerator.log(trackers.flatten({"step": step, "loss": value}), step=step)
        AcceleratorState._reset_state(reset_partial_state=True)
    points = told(tmp_path).Scalars("loss")
    assert [(point.step, point.value) for point in points] == [(n, 1.0 if n < 4 else 2.0) for n in range(1, 8)]
    hyper = list((tmp_path / "trackers").rglob("hparams.yml"))
    assert len(hyper) == 1 and "trainer.seed: 0" in hyper[0].read_text()


def test_pictures_are_shown_as_they_are(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "picture.png")
    accelerator = start(tmp_path, 0)
    trackers.show(accelerator, tmp_path / "picture.png", 40)
    accelerator.end_training()
    (image,) = told(tmp_path).Images("sample")
    (file := tmp_path / "read.png").write_bytes(image.encoded_image_string)
    assert image.step == 40
    assert np.array_equal(np.asarray(Image.open(file)), picture)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, dict[str, Any]], None]:
    def install(name: str, members: dict[str, Any]) -> None:
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)

    return install


def test_wandb_goes_on_with_the_same_run(
    tmp_path: Path, stand_in: Callable[[str, dict[str, Any]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the package only the calls are real here: accelerate makes them with what `start` says."""
    inits: list[dict[str, Any]] = []
    logged: list[tuple[dict[str, float], int | None]] = []

    class Run:
        config = type("Config", (), {"update": lambda self, values, **_: None})()

        def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
            logged.append((values, step))

        def finish(self) -> None: ...

    def init(**settings: Any) -> Run:
        inits.append(settings)
        return Run()

    stand_in("wandb", {"init": init, "config": Run.config, "Image": lambda image: image})
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.WANDB])
    for first in (0, 3):
        assert trackers.check(["wandb"]) == ["wandb"]
        accelerator = Accelerator(cpu=True, log_with=["wandb"], project_dir=str(tmp_path / "run"))
        trackers.start(accelerator, ["wandb"], tmp_path / "run", first, {"a": 1})
        accelerator.log(trackers.flatten({"step": first + 1, "loss": 1.0}), step=first + 1)
        AcceleratorState._reset_state(reset_partial_state=True)
    assert inits[0] == inits[1]
    assert (inits[0]["project"], inits[0]["name"], inits[0]["resume"]) == ("latentphys", "run", "allow")
    assert inits[0]["dir"] == str(tmp_path / "run" / "trackers")
    assert logged == [({"loss": 1.0}, 1), ({"loss": 1.0}, 4)]
    accelerator = Accelerator(cpu=True, log_with=["wandb"], project_dir=str(tmp_path / "other"))
    trackers.start(accelerator, ["wandb"], tmp_path / "other" / "run", 0)
    assert inits[2]["name"] == "run" and inits[2]["id"] != inits[0]["id"]


def test_every_tracker_is_told_which_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[dict[str, dict[str, Any]], dict[str, Any] | None]] = []

    def init(accelerator: Accelerator, project: str, config: Any, init_kwargs: Any) -> None:
        told.append((init_kwargs, config))

    monkeypatch.setattr(Accelerator, "init_trackers", init)
    accelerator = Accelerator(cpu=True)
    for folder, first in (("a", 0), ("a", 3), ("b", 0)):
        trackers.start(accelerator, ["mlflow", "trackio"], tmp_path / folder / "run", first, {"seed": 1})
    assert [config for _, config in told] == [{"seed": 1}, None, {"seed": 1}]
    names = [settings["trackio"]["name"] for settings, _ in told]
    assert names[0] == names[1] != names[2]
    assert all(settings["trackio"]["resume"] == "allow" for settings, _ in told)
    assert [(settings["mlflow"]["run_name"], settings["mlflow"]["tags"]) for settings, _ in told] == [
        ("run", {"run": str(tmp_path / folder / "run"), "first_step": first})
        for folder, first in (("a", "0"), ("a", "3"), ("b", "0"))
    ]


def test_without_trackers_nothing_is_made(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, project_dir=str(tmp_path))
    trackers.start(accelerator, [], tmp_path, 0, json.loads('{"a": 1}'))
    trackers.show(accelerator, tmp_path / "nothing.png", 1)
    assert not list(tmp_path.iterdir())
