"""One state in three dimensions: its speed as a volume, its vortices or fast paths as surfaces, its stream lines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from latentphys.fields import State
from latentphys.views import quantities, scene

if TYPE_CHECKING:
    import pyvista
    from matplotlib.figure import Figure

SPEED = "speed |u|"


@dataclass(frozen=True)
class Scale:
    """How speeds look, the same in every picture that is compared with another.

    Args:
        high: the speed of the last colour [m/s].
        clear: the speed up to which a volume is transparent [m/s].
    """

    high: float
    clear: float

    @property
    def surface(self) -> tuple[float, float]:
        """Colour limits on surfaces [m/s]: from rest."""
        return 0.0, self.high

    @property
    def volume(self) -> tuple[float, float]:
        """Colour limits in a volume [m/s]: all the colours for what can be seen."""
        return self.clear, self.high


def scale(*states: State) -> Scale:
    """The scale for some states: colours to the speed that one fluid cell in 500 exceeds, clear up to the median."""
    speeds = [quantities.in_fluid(quantities.speed(state), state.geometry) for state in states]
    high = quantities.color_limits(speeds)[1]
    return Scale(high, min(float(np.median(np.concatenate(speeds))), 0.9 * high))


def draw_volume(state: State, scale: Scale, pixels: int = 1000) -> pyvista.Plotter:
    """Volume rendering of the speed, with the solids in it."""
    plot = scene.plotter(state.grid, pixels)
    scene.add_solid(plot, state.geometry, opacity=0.3)
    speed = np.linalg.norm(quantities.corner_velocity(state), axis=0)
    plot.add_volume(
        scene.image_data(state.grid, corners={"speed": speed}),
        scalars="speed",
        opacity=255 * np.linspace(0, 1, 256) ** 1.5,
        opacity_unit_distance=0.12 * state.grid.shortest_side,
        shade=False,
        **_colors(scale.volume),
    )
    # Without jittering the steps along the rays show as rings.
    assert plot.mapper is not None
    plot.mapper.SetUseJittering(True)
    return plot


def volume(state: State) -> Figure:
    """Volume rendering of the speed |u| [m/s], with the solids as a grey surface."""
    speeds = scale(state)
    return _figure(draw_volume(state, speeds), state, speeds.volume)


def isosurface(state: State) -> Figure:
    """Surfaces coloured by the speed [m/s]: of the Q-criterion, or of the speed itself where there are solids.

    In the creeping flow between grains nothing rotates freely, so that Q marks no vortices there.
    """
    speeds = scale(state)
    corner_speed = np.linalg.norm(quantities.corner_velocity(state), axis=0)
    if state.geometry.is_empty:
        q = quantities.q_criterion(state)
        values, levels = quantities.corners(q, state.grid), {float(np.quantile(q, 0.93)): 1.0}
    else:
        values, levels = corner_speed, {0.35 * speeds.high: 0.3, 0.65 * speeds.high: 1.0}
    image = scene.image_data(state.grid, corners={"level": values, "speed": corner_speed})
    plot = scene.plotter(state.grid)
    scene.add_solid(plot, state.geometry, opacity=0.15)
    for level, opacity in levels.items():
        surface = image.contour([level], scalars="level")
        if surface.n_points:
            plot.add_mesh(
                surface, scalars="speed", opacity=opacity, smooth_shading=True, specular=0.2, **_colors(speeds.surface)
            )
    return _figure(plot, state, speeds.surface)


def streamlines(state: State, num_lines: int = 150) -> Figure:
    """Stream lines as tubes coloured by the speed |u| [m/s], denser where it is high, with the solids."""
    speeds = scale(state)
    grid = state.grid
    u = quantities.corner_velocity(state)
    image = scene.image_data(grid, corners={"velocity": u, "speed": np.linalg.norm(u, axis=0)})
    pyvista = scene.start()
    fluid = np.argwhere(state.geometry.fluid.cpu().numpy())
    # More lines where more flows; the smallest number lets a fluid at rest be drawn too.
    weight = quantities.in_fluid(quantities.speed(state), state.geometry) + np.finfo(np.float64).tiny
    count = min(num_lines, len(fluid))
    chosen = fluid[np.random.default_rng(0).choice(len(fluid), count, replace=False, p=weight / weight.sum())]
    seeds = pyvista.PolyData((chosen + 0.5) * np.array(grid.spacing))
    length = max(grid.lengths)
    lines = image.streamlines_from_source(
        seeds,
        vectors="velocity",
        integration_direction="both",
        max_length=length,
        initial_step_length=0.5,
        terminal_speed=1e-3 * speeds.high,
    )
    plot = scene.plotter(grid)
    scene.add_solid(plot, state.geometry, opacity=0.25)
    if lines.n_lines:
        tubes = lines.tube(radius=0.004 * length, n_sides=8)
        plot.add_mesh(tubes, scalars="speed", smooth_shading=True, **_colors(speeds.surface))
    return _figure(plot, state, speeds.surface)


def _colors(limits: tuple[float, float]) -> dict[str, Any]:
    return {"cmap": scene.SPEED_COLORS, "clim": limits, "show_scalar_bar": False}


def _figure(plot: pyvista.Plotter, state: State, limits: tuple[float, float]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 4.6), dpi=scene.DPI, layout="compressed")
    axes = figure.subplots()
    scene.show(axes, scene.snapshot(plot), state.grid)
    scene.color_bar(figure, axes, scene.SPEED_COLORS, limits, SPEED, "m/s", shrink=0.8, pad=0.02)
    return figure
