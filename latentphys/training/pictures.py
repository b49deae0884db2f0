"""Pictures of held-out samples while a model trains: what it makes of one flow of each family, beside the truth.

A picture changes nothing of the training: the model's modes and the random numbers are as they were before.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from latentphys.autoencoders import Autoencoder
from latentphys.data import Batch
from latentphys.fields import State
from latentphys.training.tasks import AutoencoderTask, DynamicsTask, Task
from latentphys.validators.pointwise import vrmse
from latentphys.views import quantities, scene, slices

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

SAMPLE_SEED = 1
"""Draws the samples: the same ones at every step of every run on the same data."""
_PANEL = 2.3
"""Width of a panel [inch]."""
_BARS = 1.5
"""Height of a row's titles and colour bars [inch]."""


@dataclass(frozen=True)
class Sample:
    """One flow of a family and what the model made of it; fluxes [m³/s] on one geometry.

    Args:
        truth: the flow as simulated.
        prediction: the model's.
        persistence: the flow one Δt before the truth, for a model that predicts; None for one that reconstructs.
        label: which flow.
    """

    truth: State
    prediction: State
    persistence: State | None
    label: str


def check() -> None:
    """Refuse a training run with pictures where nothing could draw them.

    Raises:
        ValueError: no matplotlib.
    """
    if find_spec("matplotlib") is None:
        raise ValueError("Expected the package matplotlib for pictures, got none; pip install 'latentphys[viz]'.")


def sample_picture(task: Task, folder: str | Path, step: int, write: bool = True) -> Path:
    """Draw ``step-000123.png``: for each family the same held-out flow, on the plane through the middle of the box.

    An autoencoder: truth, reconstruction and error. A dynamics model: the truth after one Δt, the prediction, its
    error, and that of persistence, which predicts that nothing changes. Solids are grey; truth and prediction share a
    colour scale, and so do the errors. The model works in FP32.

    Args:
        folder: made where there is none.
        write: False computes and draws nothing: of a model that is sharded over processes every one has to call this.

    Raises:
        ValueError: no matplotlib, or a task that is neither.
    """
    check()
    path = Path(folder) / f"step-{step:06d}.png"
    samples = [_sample(task, number) for number in range(len(task.stores()))]
    if not write:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial-{os.getpid()}.png")
    try:
        _draw(samples, f"{task.kind}, step {step}").savefig(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _sample(task: Task, number: int) -> Sample:
    """The sample of one store, and the model's answer."""
    batch = task.test_windows.sample(number, 1, SAMPLE_SEED)
    store = task.stores()[batch.store]
    trajectory, start = int(batch.trajectories), int(batch.starts)
    if isinstance(task, AutoencoderTask):
        state = store[trajectory, start]
        packed = _answer(task, task.autoencoder, batch).fields
        label = f"{_said(store.family)}, trajectory {trajectory}, t = {state.time:.3g} s"
        return Sample(state, _with(state, packed, task.autoencoder), None, label)
    if not isinstance(task, DynamicsTask):
        raise ValueError(f"Expected an autoencoder or a dynamics model to draw, got a {type(task).__name__}.")
    source = task.sources[batch.store]
    now = start + (task.dynamics.num_frames - 1) * task.test_windows.stride
    before, after = source[trajectory, now], source[trajectory, now + task.test_windows.stride]
    latent = _answer(task, task.dynamics, batch).latent
    autoencoder = task.autoencoder
    device = next(autoencoder.parameters()).device
    with torch.no_grad():
        packed = autoencoder.decode(latent.float().to(device), after.geometry, source.family)
    interval = after.time - before.time
    label = f"{_said(store.family)}, trajectory {trajectory}, t = {after.time:.3g} s, one step of Δt = {interval:.3g} s"
    return Sample(after, _with(after, packed, autoencoder), before, label)


def _answer(task: Task, model: nn.Module, batch: Batch) -> Any:
    """What a model of a task first returns when the task is given a batch to test."""
    answers: list[Any] = []
    handle = model.register_forward_hook(lambda module, given, answer: answers.append(answer))
    try:
        with _undisturbed(task), torch.no_grad():
            task(batch.to(next(model.parameters()).device))
    finally:
        handle.remove()
    return answers[0]


@contextmanager
def _undisturbed(task: Task) -> Iterator[None]:
    """Evaluation mode, and afterwards the modes and random numbers of before."""
    modes = [(module, module.training) for module in task.modules()]
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            task.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training


def _with(state: State, packed: Tensor, autoencoder: Autoencoder) -> State:
    assert state.family is not None
    fields = autoencoder.scale(state.family).unpack(packed[0].double().cpu())
    return State(fields, state.place, state.time)


def _said(family: str) -> str:
    return family.replace("_", " ")


def _draw(samples: list[Sample], title: str) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = 3 if samples[0].persistence is None else 4
    heights = [_PANEL * _aspect(sample)[0] + _BARS for sample in samples]
    size = (columns * _PANEL + 0.9, sum(heights) + 0.35)
    figure = Figure(figsize=size, dpi=scene.DPI, layout=ConstrainedLayoutEngine(h_pad=0.06, w_pad=0.05))
    figure.suptitle(title, fontsize=11)
    rows = figure.subfigures(len(samples), 1, height_ratios=heights, squeeze=False)[:, 0]
    for row, sample in zip(rows, samples, strict=True):
        _row(figure, row, sample, columns)
    return figure


def _normal(sample: Sample) -> int:
    """The axis normal to the plane: y, or the one that is one cell thick."""
    thin = [axis for axis, n in enumerate(sample.truth.grid.shape) if n == 1]
    return thin[-1] if thin else 1


def _aspect(sample: Sample) -> tuple[float, bool]:
    """Height over width of the panels, and whether these are the true proportions."""
    width, height = (length for axis, length in enumerate(sample.truth.grid.lengths) if axis != _normal(sample))
    aspect = min(2.5, max(0.25, height / width))
    return aspect, aspect == height / width


def _row(root: Figure, figure: SubFigure, sample: Sample, columns: int) -> None:
    normal, grid = _normal(sample), sample.truth.grid
    proportions: Literal["equal", "auto"] = "equal" if _aspect(sample)[1] else "auto"
    truth, prediction = slices.plane(sample.truth, normal), slices.plane(sample.prediction, normal)
    others = [sample.prediction, *([] if sample.persistence is None else [sample.persistence])]
    errors = [slices.plane(other, normal).error(truth) for other in others]
    shares = [
        float(vrmse(other.velocity.double().cpu(), sample.truth.velocity.double().cpu(), sample.truth.geometry))
        for other in others
    ]
    speeds = quantities.color_limits([truth.speed.compressed(), prediction.speed.compressed()])
    wrong = quantities.color_limits([error.compressed() for error in errors])
    axes = figure.subplots(1, columns, squeeze=False, sharex=True, sharey=True)[0]
    told = "reconstruction" if sample.persistence is None else "prediction"
    named = ["error"] if sample.persistence is None else ["error", "error of persistence"]
    panels = [
        (truth.speed, scene.SPEED_COLORS, speeds, "truth"),
        (prediction.speed, scene.SPEED_COLORS, speeds, told),
        *(
            (error, scene.ERROR_COLORS, wrong, f"{name}, VRMSE {share:#.3g}")
            for error, name, share in zip(errors, named, shares, strict=True)
        ),
    ]
    for panel, (values, colors, limits, name) in zip(axes, panels, strict=True):
        slices.draw(panel, values, grid, normal, colors, limits, proportions)
        panel.set_title(name, fontsize=9)
        panel.tick_params(labelsize=8)
        panel.xaxis.label.set_size(9)
        panel.yaxis.label.set_size(9)
    figure.suptitle(sample.label, x=0.01, ha="left", fontsize=9, fontweight="bold")
    bar: dict[str, Any] = {"location": "bottom", "aspect": 34, "pad": 0.03, "shrink": 0.9, "largest": speeds[1]}
    scene.color_bar(root, axes[:2], scene.SPEED_COLORS, speeds, "speed |u|", "m/s", **bar)
    bar["aspect"] = 34 if columns == 4 else 17
    scene.color_bar(root, axes[2:], scene.ERROR_COLORS, wrong, "|u − u_truth|", "m/s", **bar)
