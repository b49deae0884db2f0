"""Every picture of one trajectory of a store, as files with titles and captions."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from latentphys.data import Store
from latentphys.data.routing import has_routing, num_experts, read_routing
from latentphys.fields import FieldSpec, State
from latentphys.sphere import Sphere
from latentphys.views import flow, slices
from latentphys.views.cuts import cuts
from latentphys.views.movie import can_write_mp4, frames, write_gif, write_mp4
from latentphys.views.routing import export_vti, routing_map

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PLANE = "the plane of cells through the middle of the box"
_STEPS = (1, 4, 8, 16)
_MOST_FRAMES = 32


@dataclass(frozen=True)
class Picture:
    """A picture on disk, PNG or GIF, which web pages can show.

    Args:
        path: its file.
        title: what it shows, in a few words.
        caption: what stands for what, and when.
    """

    path: Path
    title: str
    caption: str


@dataclass(frozen=True)
class _Frames(Sequence[State]):
    """Some snapshots of one trajectory, read when they are asked for: a movie does not fit in memory."""

    store: Store
    trajectory: int
    times: Sequence[int]

    def __len__(self) -> int:
        return len(self.times)

    def __getitem__(self, index: Any) -> Any:
        return self.store[self.trajectory, self.times[index]]


def render(
    store: Store,
    out_dir: str | os.PathLike[str],
    reference: Store | None = None,
    trajectory: int = 0,
    layer: int = -1,
    movie: bool = True,
) -> list[Picture]:
    """Draw one trajectory: volume, surfaces, stream lines around solids, slices, routing and a movie.

    Of fields other than a velocity flux in three dimensions there are slices, or maps of a sphere, and the routing of
    rollouts. Besides the pictures of a flow or of routing it writes the last state as VTK image data (.vti), with the
    experts of all layers, and the movie as MP4 too where imageio-ffmpeg is installed. File names begin with the family;
    files of the same name are replaced.

    Args:
        store: a store of fields or a rollout.
        out_dir: where the files go; made if need be.
        reference: the store that the rollout started from; adds truth and error.
        trajectory: which trajectory; negative counts from the end.
        layer: whose routing to draw, of the layers with experts; negative counts from the end.
        movie: whether to make the movie.

    Returns:
        The pictures, in the order in which they are best read.

    Raises:
        ValueError: latents, a trajectory or layer that is not there, or a reference that is not the rollout's.
        RuntimeError: no OpenGL library to render with.
    """
    trajectory = _index(trajectory, len(store), "trajectory")
    is_rollout = _check(store, reference)
    routing = _last_routing(store, trajectory) if is_rollout else None
    if routing is not None:
        layer = _index(layer, len(routing), "layer")
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    stem = f"{store.family}_rollout" if is_rollout else store.family
    what = "rollout" if is_rollout else "data"

    times = _slice_times(store.num_times, is_rollout)
    shown = _Frames(store, trajectory, times)
    last = store[trajectory, -1]
    now = f"Family {store.family}, {what}, trajectory {trajectory}, t = {last.time:.3g} s."
    pictures = []

    def save(kind: str, title: str, caption: str, figure: Figure) -> None:
        path = out / f"{stem}_{kind}.png"
        with _replacing(path) as partial:
            figure.savefig(partial, bbox_inches="tight", pad_inches=0.05)
        pictures.append(Picture(path, f"{store.family}: {title}", caption))

    def save_routing(layers: np.ndarray, cut: str) -> None:
        caption = (
            f"Left: speed |u|. Right: the expert of layer {layer} that took each latent patch in the step before{cut}. "
            f"Bars: share of the patches; dashed: equal shares. {now}"
        )
        save("routing", "routing of the experts", caption, routing_map(layers[layer], last, num_experts(store)[layer]))

    velocity = store.specs.get("velocity")
    is_solenoidal = velocity is not None and (velocity.kind, velocity.constraint) == ("flux", "solenoidal")
    has_flow = is_solenoidal and min(store.domain.shape) > 1
    for spec in store.specs.values():
        if not (has_flow and spec is velocity):
            everywhere = "the whole sphere, an equal-area map" if isinstance(store.domain, Sphere) else _PLANE
            caption = f"{_said(spec)} on {everywhere}, at one scale for all times."
            save(f"{spec.name}_slices", f"{spec.name.replace('_', ' ')} over time", caption, cuts(shown, spec))
    if not has_flow:
        if routing is not None:
            save_routing(routing, "")
            with _replacing(out / f"{stem}.vti") as partial:
                export_vti(partial, last, routing)
        return pictures

    true = _truth(store, reference, trajectory, times)
    cut = f"The speed |u| on {_PLANE}, at one scale for all times."
    if true is not None:
        compared = f"{cut} From left to right: truth, rollout, and the magnitude of the difference of their velocities."
        save("slices", "truth, rollout and error", compared, slices.slices(true, shown))
    else:
        save("slices", f"{what} over time", cut, slices.slices(shown))
    if routing is not None:
        save_routing(routing, ", the eighth nearest to the eye cut away")
    save("volume", "speed", f"The speed |u|, transparent below its median, solids grey. {now}", flow.volume(last))
    if last.geometry.is_empty:
        surfaces = "Vortices: a surface of the Q-criterion that encloses 7 % of the box, coloured by the speed |u|."
    else:
        surfaces = "Surfaces at 35 % and 65 % of the highest speed |u|, solids grey."
        save(
            "streamlines",
            "stream lines",
            f"Stream lines coloured by the speed |u|, solids grey. {now}",
            flow.streamlines(last),
        )
    save("isosurface", "surfaces", f"{surfaces} {now}", flow.isosurface(last))
    with _replacing(out / f"{stem}.vti") as partial:
        export_vti(partial, last, routing)
    if movie:
        pictures.append(_movie(store, reference, trajectory, out / f"{stem}_movie.gif"))
    return pictures


def _movie(store: Store, reference: Store | None, trajectory: int, path: Path) -> Picture:
    """Write the movie as GIF, and as MP4 beside it where that is possible."""
    times = range(0, store.num_times, -(-store.num_times // _MOST_FRAMES))
    shown, true = _Frames(store, trajectory, times), _truth(store, reference, trajectory, times)
    pictures = list(frames(shown) if true is None else frames(true, shown))
    with _replacing(path) as partial:
        write_gif(partial, pictures)
    caption = "The speed |u| over time, transparent below its median" + (
        "." if true is None else ": truth and rollout."
    )
    if can_write_mp4():
        mp4 = path.with_suffix(".mp4")
        with _replacing(mp4) as partial:
            write_mp4(partial, pictures)
        caption += f" In full size: {mp4.name}."
    return Picture(path, f"{store.family}: movie", caption)


def _check(store: Store, reference: Store | None) -> bool:
    """Whether the store is a rollout; refuses what cannot be drawn."""
    kind = store.attributes["kind"]
    if kind == "latent":
        raise ValueError(
            f"Expected a store of fields, got latents in {store.path}; decode them with `latentphys rollout`."
        )
    if reference is not None and kind != "rollout":
        raise ValueError(f"Expected a rollout to compare with a reference, got a store of {kind} in {store.path}.")
    if reference is not None and reference.domain != store.domain:
        raise ValueError(f"Expected a reference on the grid of the rollout, {store.domain}, got {reference.domain}.")
    return kind == "rollout"


def _said(spec: FieldSpec) -> str:
    name = spec.name.replace("_", " ")
    return f"The {name}" if spec.kind == "scalar" else f"The magnitude of the {name}"


def _index(value: int, size: int, what: str) -> int:
    if not -size <= value < size:
        raise ValueError(f"Expected a {what} from 0 to {size - 1}, got {value}.")
    return value % size


def _slice_times(num_times: int, is_rollout: bool) -> list[int]:
    """Four times at most: after growing numbers of steps for a rollout, evenly spaced for data."""
    if is_rollout and num_times > 1:
        return [step for step in _STEPS if step < num_times]
    return sorted({round(t) for t in np.linspace(0, num_times - 1, 4)})


def _truth(store: Store, reference: Store | None, trajectory: int, times: Sequence[int]) -> _Frames | None:
    """The snapshots of the reference at the times of the rollout's."""
    if reference is None:
        return None
    start = store.attributes["rollout"]
    source = start["trajectories"][trajectory]
    return _Frames(reference, source, [start["start"] + start["stride"] * time for time in times])


def _last_routing(store: Store, trajectory: int) -> Int[np.ndarray, "layer px py pz"] | None:
    """The routing of the last step; None where the model has none."""
    if not has_routing(store) or store.num_times < 2:
        return None
    return read_routing(store, trajectory)[-1]


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes ``path`` when all went well: nobody sees half a picture."""
    partial = path.with_name(f".{path.stem}.partial-{os.getpid()}{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
