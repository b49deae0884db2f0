"""Which expert took which part of the box, beside the flow that it saw."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from latentphys.data.routing import cell_data
from latentphys.fields import State
from latentphys.grid import Grid
from latentphys.views import flow, quantities, scene, slices

if TYPE_CHECKING:
    import pyvista
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito (2008), told apart with any colour vision, and grey in place of black.
_HUES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#777777")
_GAP = 0.16


def expert_colors(num_experts: int) -> Float[np.ndarray, "expert 3"]:
    """A colour (0…1) per expert: eight hues, then the same darker, then lighter, then from the start again."""
    from matplotlib.colors import to_rgb

    hues = np.array([to_rgb(hue) for hue in _HUES])
    tones = np.concatenate([hues, 0.55 * hues, 0.5 + 0.5 * hues])
    return tones[np.arange(num_experts) % len(tones)]


def load(routing: Int[np.ndarray, "px py pz"], num_experts: int) -> Float[np.ndarray, " expert"]:
    """Share of the patches that each expert took, 0…1."""
    return np.bincount(routing.ravel(), minlength=num_experts) / routing.size


def blocks(routing: Int[np.ndarray, "px py pz"], grid: Grid) -> pyvista.PolyData:
    """The patches as separate blocks, the eighth of the box nearest to the eye cut away; cell data ``expert``."""
    pyvista = scene.start()
    shape = routing.shape
    size = [length / n for length, n in zip(grid.lengths, shape, strict=True)]
    image = pyvista.ImageData(dimensions=[n + 1 for n in shape], spacing=size)
    x, y, z = np.indices(shape)
    cut = (2 * x >= shape[0]) & (2 * y < shape[1]) & (2 * z >= shape[2])
    image.cell_data["expert"] = routing.ravel(order="F")
    image.cell_data["cut"] = cut.ravel(order="F").astype(np.uint8)
    kept = image.threshold(0.5, scalars="cut", invert=True)
    return kept.shrink(1 - _GAP).extract_surface(algorithm="dataset_surface")


def routing_map(
    routing: Int[Tensor, "px py pz"] | Int[np.ndarray, "px py pz"], state: State, num_experts: int | None = None
) -> Figure:
    """The flow beside the latent patches that make it, coloured by expert, with the load of each expert.

    A box one cell thick is drawn as the plane that it is, any other in perspective with an eighth cut away.

    Args:
        routing: which expert took each patch of one layer, from 0. Patch (i, j, k) is the same share of the box as its
            place among the patches.
        state: the decoded state of the same step.
        num_experts: number of experts of the layer. Default: up to the largest in ``routing``.

    Raises:
        ValueError: routing that is not one whole number ≥ 0 per patch, more patches than cells, or an expert beyond
            ``num_experts``.
    """
    ids = _checked(routing, state.grid)
    count = int(ids.max()) + 1 if num_experts is None else num_experts
    if ids.max() >= count:
        raise ValueError(f"Expected experts below {count}, got expert {int(ids.max())}.")
    colors = expert_colors(count)
    thin = [axis for axis, n in enumerate(state.grid.shape) if n == 1]
    return _plane_map(ids, state, colors, thin[-1]) if thin else _box_map(ids, state, colors)


def _box_map(ids: Int[np.ndarray, "px py pz"], state: State, colors: Float[np.ndarray, "expert 3"]) -> Figure:
    from matplotlib.figure import Figure

    low, high = scene.frame(state.grid)
    width = 3.9
    height = width * float((high - low)[1] / (high - low)[0])
    figure = Figure(figsize=(2 * width + 0.6, height + 1.35), dpi=scene.DPI, layout="compressed")
    panels = figure.subplots(2, 2, height_ratios=[height, 0.75])

    scale = flow.scale(state)
    scene.show(panels[0, 0], scene.snapshot(flow.draw_volume(state, scale)), state.grid)
    panels[1, 0].set_axis_off()
    place = {"cax": panels[1, 0].inset_axes((0.1, 0.6, 0.8, 0.17)), "orientation": "horizontal"}
    scene.color_bar(figure, None, scene.SPEED_COLORS, scale.volume, flow.SPEED, "m/s", **place)

    plot = scene.plotter(state.grid)
    surface = blocks(ids, state.grid)
    surface.cell_data["color"] = (255 * colors[surface.cell_data["expert"]]).round().astype(np.uint8)
    plot.add_mesh(surface, scalars="color", rgb=True, ambient=0.7, diffuse=0.35)
    scene.show(panels[0, 1], scene.snapshot(plot), state.grid)
    _draw_load(panels[1, 1], load(ids, len(colors)), colors)
    return figure


def _plane_map(
    ids: Int[np.ndarray, "px py pz"], state: State, colors: Float[np.ndarray, "expert 3"], normal: int
) -> Figure:
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    grid, patches = state.grid, ids.take(0, normal)
    across, up = (length for axis, length in enumerate(grid.lengths) if axis != normal)
    aspect = min(2.5, max(0.25, up / across))
    proportions: Literal["equal", "auto"] = "equal" if aspect == up / across else "auto"
    figure = Figure(figsize=(7.6, 3.1 * aspect + 1.6), dpi=scene.DPI, layout="compressed")
    panels = figure.subplots(2, 2, height_ratios=[3.1 * aspect, 0.75])

    speed = slices.plane(state, normal).speed
    limits = quantities.color_limits([speed.compressed()])
    slices.draw(panels[0, 0], speed, grid, normal, scene.SPEED_COLORS, limits, proportions)
    panels[1, 0].set_axis_off()
    place = {"cax": panels[1, 0].inset_axes((0.1, 0.6, 0.8, 0.17)), "orientation": "horizontal"}
    scene.color_bar(figure, None, scene.SPEED_COLORS, limits, flow.SPEED, "m/s", **place)

    axes = panels[0, 1]
    image = slices.draw(axes, patches, grid, normal, scene.SPEED_COLORS, (-0.5, len(colors) - 0.5), proportions)
    image.set_cmap(ListedColormap(colors))
    _, right, _, top = image.get_extent()
    for panel in panels[0]:
        panel.tick_params(labelbottom=True)
        panel.set_xlabel(f"{'yxx'[normal]} [{scene.readable(max(grid.lengths), 'm')[1]}]")
    for draw, number, length in ((axes.axvline, patches.shape[0], right), (axes.axhline, patches.shape[1], top)):
        for place_of_edge in np.arange(1, number) * length / number:
            draw(place_of_edge, color="white", linewidth=0.6)
    _draw_load(panels[1, 1], load(ids, len(colors)), colors)
    return figure


def _draw_load(axes: Axes, shares: Float[np.ndarray, " expert"], colors: Float[np.ndarray, "expert 3"]) -> None:
    experts = np.arange(len(shares))
    axes.bar(experts, 100 * shares, color=colors, width=0.85)
    axes.axhline(100 / len(shares), color="#404040", linewidth=0.8, linestyle="--")
    axes.set_xticks(experts[:: -(-len(experts) // 12)])
    axes.set_xlabel("expert")
    axes.set_ylabel("load [%]")
    axes.spines[["top", "right"]].set_visible(False)


def export_vti(path: str | Path, state: State, routing: Int[np.ndarray, "layer px py pz"] | None = None) -> None:
    """Write a state as VTK image data (.vti) for ParaView and others, in cells, with its true spacing.

    Cell data: ``velocity`` [m/s], ``speed`` [m/s], ``solid`` (0 or 1), and ``expert_layer0``, … the expert that took
    the patch in which the cell lies.

    Raises:
        ValueError: routing as in `routing_map`.
    """
    u = quantities.velocity(state)
    cells = {
        "velocity": u,
        "speed": np.linalg.norm(u, axis=0),
        "solid": quantities.solid(state.geometry).astype(np.uint8),
    }
    if routing is not None:
        cells |= cell_data([_checked(ids, state.grid) for ids in routing], state.grid)
    scene.image_data(state.grid, cells).save(path)


def _checked(routing: Tensor | np.ndarray, grid: Grid) -> Int[np.ndarray, "px py pz"]:
    ids = np.asarray(routing)
    if ids.ndim != 3 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"Expected routing as whole numbers (px, py, pz), got {ids.dtype} of shape {ids.shape}; pick a layer."
        )
    if any(p > n for p, n in zip(ids.shape, grid.shape, strict=True)):
        raise ValueError(f"Expected at most {grid.shape} patches, one per cell, got {ids.shape}.")
    if ids.min() < 0:
        raise ValueError(
            "Expected an expert ≥ 0 for every patch, got -1: no routing made this frame; pick a later one."
        )
    return ids
