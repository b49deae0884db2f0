"""Experiment trackers, through `accelerate`: what a run logs goes to TensorBoard, Weights & Biases, MLflow or Trackio.

``log.jsonl`` stays the record of a run; a tracker is a view of it. A run that resumes goes on in the same place.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentphys.training.provenance import flat

if TYPE_CHECKING:
    from accelerate import Accelerator

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
"""Their names, which are those of the packages as well."""
FOLDER = "trackers"
PROJECT = "latentphys"
_NO_FIGURES = ("step", "seconds")


def check(names: Sequence[str]) -> list[str]:
    """The trackers that a run asks for, before anything is trained; accelerate leaves missing ones out without a word.

    Raises:
        ValueError: an unknown name, one twice, or a package that is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"Expected trackers out of {' | '.join(TRACKERS)}, got {name!r}.")
        if list(names).count(name) > 1:
            raise ValueError(f"Expected each tracker once, got {name!r} {list(names).count(name)} times.")
        if find_spec(name) is None:
            raise ValueError(f"Expected the package {name} for the tracker {name!r}, got none; pip install {name}.")
    return list(names)


def start(
    accelerator: Accelerator, names: Sequence[str], run: Path, first: int, config: Mapping[str, Any] | None = None
) -> None:
    """Open the trackers that the accelerator was made for, ``Accelerator(log_with=check(names), project_dir=run)``.

    Args:
        names: as given to `check`.
        run: the run directory; trackers that write to files do so below ``RUN/trackers``.
        first: the step that the run goes on from; what TensorBoard holds beyond it no longer counts. Weights & Biases
            and Trackio go on with the run of the same name; MLflow gets another run of that name.
        config: the composed configuration, recorded where the run is new.
    """
    if not names:
        return
    name, where = run.resolve().name, run.resolve()
    identity = hashlib.sha256(str(where).encode()).hexdigest()[:16]
    folder = where / FOLDER
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
    accelerator.project_configuration.logging_dir = str(folder)
    options = {
        "tensorboard": {"purge_step": first + 1} if first else {},
        "wandb": {"name": name, "id": identity, "dir": str(folder), "resume": "allow"},
        "mlflow": {"run_name": name, "logging_dir": str(folder), "tags": {"run": str(where), "first_step": str(first)}},
        "trackio": {"name": f"{name}-{identity}", "resume": "allow"},
    }
    settings = None if first or config is None else {k: _plain(v) for k, v in flat(config).items()}
    accelerator.init_trackers(PROJECT, config=settings, init_kwargs={n: options[n] for n in names})


def flatten(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a log line by name; the step itself is none of them.

    What each layer's router says, a list under ``routing``, becomes ``routing/layer0/entropy`` and so on: of ``load``
    the largest and smallest, of ``dead`` how many. Numbers that are not finite are left out: a tracker cannot draw
    them, and ``log.jsonl`` has them.
    """
    figures: dict[str, float] = {}
    for name, value in line.items():
        if name == "routing":
            for layer in value:
                figures |= _layer(layer, f"routing/layer{layer['layer']}/")
        elif name not in _NO_FIGURES and _is_number(value):
            figures[name] = float(value)
    return {name: value for name, value in figures.items() if math.isfinite(value)}


def _layer(layer: Mapping[str, Any], prefix: str) -> dict[str, float]:
    figures: dict[str, float] = {}
    for name, value in layer.items():
        if name == "layer":
            continue
        if name == "load":
            figures |= {f"{prefix}load_max": float(max(value)), f"{prefix}load_min": float(min(value))}
        elif isinstance(value, Sequence) and not isinstance(value, str):
            if name == "dead":
                figures[prefix + name] = float(len(value))
        elif _is_number(value):
            figures[prefix + name] = float(value)
    return figures


def show(accelerator: Accelerator, path: Path, step: int, name: str = "sample") -> None:
    """Show a PNG in every tracker that takes images."""
    takers = [tracker for tracker in accelerator.trackers if hasattr(tracker, "log_images")]
    if not takers:
        return
    import numpy as np
    from matplotlib.image import imread

    image = np.round(255 * imread(path)[..., :3]).astype(np.uint8)
    for tracker in takers:
        options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({name: image[None]}, step=step, **options)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _plain(value: Any) -> bool | float | int | str:
    """A value that every tracker takes as a setting."""
    return value if isinstance(value, (bool, float, int, str)) else str(value)
