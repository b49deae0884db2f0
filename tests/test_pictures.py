"""Pictures show what the model makes of held-out flows, and leave the training as if they had never been drawn."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small import Road, configuration

from latentphys.data import open_store
from latentphys.training import Trainer, pictures, train_autoencoder, train_dynamics
from latentphys.training.tasks import AutoencoderTask, DynamicsTask, Task
from latentphys.validators.pointwise import vrmse
from latentphys.views import quantities

Build = Callable[..., Any]
KINDS = ("autoencoder", "dynamics")


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Build:
    """The task that a training run is about to train."""

    def build(road: Road, kind: str, *overrides: str) -> Any:
        built: list[Task] = []

        def fit(trainer: Trainer, task: Task, *_: Any, **__: Any) -> Path:
            built.append(task)
            return tmp_path

        monkeypatch.setattr(Trainer, "fit", fit)
        train = train_autoencoder if kind == "autoencoder" else train_dynamics
        train(configuration(kind, road.inputs(kind), tmp_path / "run", *overrides))
        return built[0]

    return build


@pytest.mark.parametrize("kind", KINDS)
def test_one_picture_per_step_and_the_same_for_the_same_weights(
    road: Road, task: Build, tmp_path: Path, kind: str
) -> None:
    model = task(road, kind)
    path = pictures.sample_picture(model, tmp_path / "p", 20)
    assert path == tmp_path / "p" / "step-000020.png"
    assert [p.name for p in path.parent.iterdir()] == ["step-000020.png"]
    with Image.open(path) as image:
        assert min(image.size) > 800
        first = np.asarray(image)
    with Image.open(pictures.sample_picture(model, tmp_path / "q", 20)) as image:
        assert np.array_equal(first, np.asarray(image))


@pytest.mark.parametrize("kind", KINDS)
def test_training_does_not_notice(road: Road, task: Build, tmp_path: Path, kind: str) -> None:
    model = task(road, kind)
    model.train()
    frozen = next(module for module in model.modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv3d))
    frozen.eval()
    modes = [module.training for module in model.modules()]
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    pictures.sample_picture(model, tmp_path, 1)
    assert torch.equal(torch.randn(4), expected)
    assert [module.training for module in model.modules()] == modes
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks
    assert all(parameter.grad is None for parameter in model.parameters())
    batch = model.train_windows.sample(0, 2, 0)
    torch.manual_seed(5)
    after = model(batch).loss
    torch.manual_seed(5)
    assert torch.equal(after, model(batch).loss) and after.requires_grad


def test_a_failing_model_is_left_as_it_was(road: Road, task: Build, tmp_path: Path) -> None:
    model = task(road, "autoencoder")
    model.train()
    model.autoencoder.decoder.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        pictures.sample_picture(model, tmp_path / "p", 1)
    assert all(module.training for module in model.modules())
    assert not model.autoencoder._forward_hooks and not (tmp_path / "p").exists()


def test_a_reconstruction_is_that_of_held_out_flows_without_noise(road: Road, task: Build) -> None:
    model: AutoencoderTask = task(road, "autoencoder", "autoencoder.bottleneck.noise=0.9")
    samples = [pictures._sample(model, number) for number in range(2)]
    assert {sample.label.partition(",")[0] for sample in samples} == {"open channel", "porous"}
    for sample in samples:
        family = sample.label.partition(",")[0].replace(" ", "_")
        assert "trajectory 3" in sample.label and sample.persistence is None
        store = road.store(family)
        frame = int(np.argmin(abs(store.times - sample.truth.time)))
        flux = store.read("velocity", 3, slice(frame, frame + 1)).float()
        assert torch.equal(sample.truth.velocity.float(), flux[0])
        with torch.no_grad():
            model.eval()
            expected = model.autoencoder(flux, store.geometry(3), family).fields
        torch.testing.assert_close(sample.prediction.velocity.float(), expected[0])


def test_an_untrained_dynamics_model_shows_persistence(road: Road, task: Build) -> None:
    """Its prediction is the decode of the latent before; persistence is that flow itself, and the truth the next."""
    model: DynamicsTask = task(road, "dynamics")
    for number in range(2):
        sample = pictures._sample(model, number)
        assert sample.persistence is not None
        family = sample.label.partition(",")[0].replace(" ", "_")
        store, latents = road.store(family), open_store(road.latents[family])
        frame = int(np.argmin(abs(store.times - sample.truth.time)))
        assert sample.persistence.time == store.times[frame - 1]
        assert torch.equal(sample.persistence.velocity, store[3, frame - 1].velocity)
        latent = latents.read("latent", 3, slice(frame - 1, frame))
        with torch.no_grad():
            expected = model._autoencoder[0].decode(latent, store.geometry(3), family)
        torch.testing.assert_close(sample.prediction.velocity.float(), expected[0])


@pytest.mark.parametrize("kind", KINDS)
def test_panels_share_scales_and_grey_is_solid(road: Road, task: Build, kind: str) -> None:
    model = task(road, kind)
    samples = [pictures._sample(model, number) for number in range(2)]
    figure = pictures._draw(samples, "title")
    for row, sample in zip(figure.subfigs, samples, strict=True):
        panels = [axes for axes in row.axes if axes.images]
        limits = [axes.images[0].get_clim() for axes in panels]
        assert len(panels) == (3 if kind == "autoencoder" else 4)
        assert limits[0] == limits[1] and len(set(limits[2:])) == 1
        solid = quantities.solid(sample.truth.geometry).take(sample.truth.grid.shape[1] // 2, 1).T == 1
        for axes in panels:
            drawn: Any = np.ma.asarray(axes.images[0].get_array())
            assert np.array_equal(np.ma.getmaskarray(drawn), solid)
        error = vrmse(sample.prediction.velocity.double(), sample.truth.velocity.double(), sample.truth.geometry)
        assert panels[2].get_title() == f"error, VRMSE {float(error):#.3g}"
        labels = [axes.get_xlabel() or axes.get_ylabel() for axes in row.axes if not axes.images]
        assert [label.partition(" [")[0] for label in labels] == ["speed |u|", "|u − u_truth|"]
        assert all(label.endswith("m/s]") for label in labels)
    assert any("porous" in sample.label for sample in samples) and figure.get_suptitle() == "title"


@pytest.mark.parametrize("kind", KINDS)
def test_flat_boxes_are_seen_along_their_thin_axis(flat_road: Road, task: Build, tmp_path: Path, kind: str) -> None:
    model = task(flat_road, kind)
    samples = {s.label.partition(",")[0]: s for s in (pictures._sample(model, number) for number in range(2))}
    assert {name: pictures._normal(sample) for name, sample in samples.items()} == {"mhd": 2, "convection": 1}
    figure = pictures._draw(list(samples.values()), "")
    image: Any = figure.subfigs[0].axes[0].images[0].get_array()
    assert image.shape == (16, 16)
    assert pictures.sample_picture(model, tmp_path, 3).is_file()


def test_pictures_that_cannot_be_drawn_are_refused(
    road: Road, task: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = task(road, "autoencoder")
    path = pictures.sample_picture(model, tmp_path / "p", 1, write=False)
    assert path == tmp_path / "p" / "step-000001.png" and not path.parent.exists()
    monkeypatch.setattr(pictures, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"the package matplotlib for pictures, got none; pip install 'latentphys\[viz"
    ):
        pictures.sample_picture(model, tmp_path / "p", 1)
    monkeypatch.undo()

    class Other(Task):
        test_windows = model.test_windows
        train_windows = model.train_windows

    Other.__abstractmethods__ = frozenset()
    with pytest.raises(ValueError, match="an autoencoder or a dynamics model to draw, got a Other"):
        pictures.sample_picture(Other(), tmp_path / "p", 1)  # type: ignore[abstract]
