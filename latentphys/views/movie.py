"""Moving pictures: the speed as a volume over time, truth beside rollout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from latentphys.fields import State
from latentphys.views import flow, scene

Frame = UInt8[np.ndarray, "height width 3"]

_PIXELS = 430
_DPI = 150


def frames(truth: Sequence[State], rollout: Sequence[State] | None = None) -> Iterator[Frame]:
    """Volume renderings of the speed |u| [m/s], one frame per state, truth on the left and rollout on the right.

    All frames share one colour scale and one size, whose sides are even as video formats want them.

    Args:
        truth: the states, in order.
        rollout: states at the same times. Default: the truth alone.

    Raises:
        ValueError: no state, or another number of states in the rollout.
    """
    if not truth or (rollout is not None and len(rollout) != len(truth)):
        got = f"{len(truth)} and {len(rollout)}" if rollout is not None else "none"
        raise ValueError(f"Expected as many states of the rollout as true ones, at least one, got {got}.")
    return _frames({"truth": truth, "rollout": rollout} if rollout is not None else {"": truth})


def _frames(columns: dict[str, Sequence[State]]) -> Iterator[Frame]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    first = next(iter(columns.values()))
    grid = first[0].grid
    scale = flow.scale(*(states[i] for states in columns.values() for i in {0, len(states) - 1}))
    low, high = scene.frame(grid)
    size = (3.4 * len(columns) + 0.9, 2.75 * float((high - low)[1] / (high - low)[0]) + 0.95)
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(columns), squeeze=False)[0]
    shown: list[Any] = []
    for time in range(len(first)):
        now = [states[time] for states in columns.values()]
        pictures = [scene.snapshot(flow.draw_volume(state, scale, _PIXELS)) for state in now]
        if not shown:
            shown = [scene.show(axes, picture, grid) for axes, picture in zip(panels, pictures, strict=True)]
            for axes, name in zip(panels, columns, strict=True):
                axes.set_title(name)
            scene.color_bar(figure, panels, scene.SPEED_COLORS, scale.volume, flow.SPEED, "m/s", shrink=0.8, pad=0.02)
            clock = figure.suptitle("")
        for artist, picture in zip(shown, pictures, strict=True):
            artist.set_data(picture)
        clock.set_text(f"t = {now[0].time:.4g} s")
        canvas.draw()
        picture = np.asarray(canvas.buffer_rgba())[..., :3]
        yield picture[: picture.shape[0] // 2 * 2, : picture.shape[1] // 2 * 2].copy()


def can_write_mp4() -> bool:
    """Whether imageio-ffmpeg is installed, which brings its own encoder."""
    return find_spec("imageio_ffmpeg") is not None


def write_mp4(path: str | Path, pictures: Sequence[Frame], fps: int = 8) -> None:
    """Write frames as H.264 in the pixel format every browser plays."""
    import imageio.v3 as iio

    iio.imwrite(path, list(pictures), plugin="FFMPEG", fps=fps, codec="libx264", quality=8, macro_block_size=2)


def write_gif(path: str | Path, pictures: Sequence[Frame], fps: int = 8) -> None:
    """Write frames as a GIF that loops, at two thirds of their size and with one palette, for a web page."""
    from PIL import Image

    height, width, _ = pictures[0].shape
    small = [Image.fromarray(picture).resize((2 * width // 3, 2 * height // 3)) for picture in pictures]
    # Rounds of k-means keep the ends of the colour bar, which cover few pixels, from being averaged away.
    palette = small[-1].quantize(256, kmeans=3)
    indexed = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in small]
    indexed[0].save(path, save_all=True, append_images=indexed[1:], duration=1000 // fps, loop=0, optimize=True)
