"""What every 3D picture shares: rendering without a screen, true proportions, one camera, one set of colours.

PyVista draws the box, matplotlib everything written on it. The projection is parallel and along a fixed direction, so
that the plane of the picture is known beforehand: the box fills the frame, lengths can be compared between pictures,
and labels are placed in metres instead of pixels.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from itertools import product
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, UInt8

from latentphys.grid import Geometry, Grid
from latentphys.views import quantities

if TYPE_CHECKING:
    import pyvista
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

SPEED_COLORS = "viridis"
"""Magnitudes: perceptually uniform, readable in grey and by the colour-blind."""
ERROR_COLORS = "magma_r"
"""Errors: perceptually uniform, palest where there is none."""
SOLID_COLOR = "#b8b8b8"
DPI = 200

_WINDOWS = ("vtkEGLRenderWindow", "vtkOSOpenGLRenderWindow", "vtkXOpenGLRenderWindow")
_PROBE = """
import sys
from vtkmodules import vtkRenderingOpenGL2
window = getattr(vtkRenderingOpenGL2, sys.argv[1])()
window.SetOffScreenRendering(1)
window.SetSize(8, 8)
window.Render()
sys.exit(0 if window.SupportsOpenGL() else 1)
"""
_TOWARDS_CAMERA = np.array([0.62, -1.0, 0.6]) / np.linalg.norm([0.62, -1.0, 0.6])
_RIGHT = np.array([1.0, 0.62, 0.0]) / np.linalg.norm([1.0, 0.62, 0.0])
_UP = np.cross(_TOWARDS_CAMERA, _RIGHT)
_PREFIXES = ((1.0, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n"))


def _renders(window: str) -> bool:
    # In a process of its own: where a library is missing VTK does not raise, it ends the process.
    run = subprocess.run([sys.executable, "-c", _PROBE, window], capture_output=True, timeout=120)
    return run.returncode == 0


@cache
def start() -> ModuleType:
    """Make PyVista ready to render without a screen and return it.

    Takes the first that works of EGL, OSMesa and, where ``DISPLAY`` is set, X; or the one that
    ``VTK_DEFAULT_OPENGL_WINDOW`` names.

    Raises:
        RuntimeError: none works on this machine.
    """
    chosen = os.environ.get("VTK_DEFAULT_OPENGL_WINDOW")
    windows = (chosen,) if chosen else _WINDOWS if os.environ.get("DISPLAY") else _WINDOWS[:2]
    working = next((window for window in windows if _renders(window)), None)
    if working is None:
        raise RuntimeError(
            f"Expected a working OpenGL library for rendering, got none (tried {', '.join(windows)}); "
            "install one, on Debian or Ubuntu: apt-get install libegl1 libgl1-mesa-dri"
        )
    os.environ["VTK_DEFAULT_OPENGL_WINDOW"] = working

    import pyvista

    return pyvista


def readable(largest: float, unit: str) -> tuple[float, str]:
    """A scale and its unit in which numbers up to ``largest`` are easy to read: (0.001, "mm/s") for 0.02 m/s."""
    scale, prefix = next(((scale, prefix) for scale, prefix in _PREFIXES if largest >= scale), _PREFIXES[-1])
    return scale, prefix + unit


def project(points: Float[np.ndarray, "*n 3"]) -> Float[np.ndarray, "*n 2"]:
    """Points of the box [m] in the plane of the picture [m], to the right and up."""
    return np.stack([points @ _RIGHT, points @ _UP], axis=-1)


def frame(grid: Grid) -> tuple[Float[np.ndarray, " 2"], Float[np.ndarray, " 2"]]:
    """The low and high corner of the picture of a box in its plane [m]; the box fits exactly."""
    seen = project(np.array(list(product(*zip((0.0, 0.0, 0.0), grid.lengths, strict=True)))))
    margin = 0.006 * np.ptp(seen, axis=0).max()
    return seen.min(axis=0) - margin, seen.max(axis=0) + margin


def _named(values: np.ndarray) -> np.ndarray:
    """Scalars as VTK wants them, x fastest: (n,) or (n, 3)."""
    return values.ravel(order="F") if values.ndim == 3 else values.reshape(3, -1, order="F").T


def image_data(
    grid: Grid, cells: dict[str, np.ndarray] | None = None, corners: dict[str, np.ndarray] | None = None
) -> pyvista.ImageData:
    """The box with its true spacing [m], the low corner at the origin.

    Args:
        grid: the box.
        cells: name → values in cells, ``(nx, ny, nz)`` or ``(3, nx, ny, nz)``.
        corners: name → values at the corners of cells, ``(nx + 1, …)`` or ``(3, nx + 1, …)``.
    """
    import pyvista

    x, y, z = (n + 1 for n in grid.shape)
    image = pyvista.ImageData(dimensions=(x, y, z), spacing=grid.spacing)
    for name, values in (cells or {}).items():
        image.cell_data[name] = _named(values)
    for name, values in (corners or {}).items():
        image.point_data[name] = _named(values)
    return image


def plotter(grid: Grid, pixels: int = 1000) -> pyvista.Plotter:
    """An empty picture of the box, ``pixels`` along its longer side, the edges drawn, the camera in place."""
    pyvista = start()
    low, high = frame(grid)
    width, height = high - low
    scale = pixels / max(width, height)
    size = [max(64, round(float(width) * scale)), max(64, round(float(height) * scale))]
    plot = pyvista.Plotter(off_screen=True, window_size=size, theme=pyvista.plotting.themes.DocumentTheme())
    plot.enable_anti_aliasing("msaa", multi_samples=4)
    plot.add_mesh(pyvista.Box(_bounds(grid)).extract_all_edges(), color="#404040", line_width=2)
    centre = _RIGHT * (low + high)[0] / 2 + _UP * (low + high)[1] / 2
    camera = plot.camera
    camera.focal_point, camera.up = centre, _UP
    camera.position = centre + 10 * np.linalg.norm(grid.lengths) * _TOWARDS_CAMERA
    camera.parallel_projection, camera.parallel_scale = True, float(height) / 2
    return plot


def _bounds(grid: Grid) -> tuple[float, ...]:
    return tuple(bound for length in grid.lengths for bound in (0.0, length))


def add_solid(plot: pyvista.Plotter, geometry: Geometry, opacity: float = 1.0) -> None:
    """Draw the solids as a smooth grey surface, closed on the sides of the box."""
    if geometry.is_empty:
        return
    image = image_data(geometry.grid, corners={"solid": quantities.corner_solid(geometry)})
    surface = image.clip_scalar(scalars="solid", value=0.5, invert=False).extract_surface(algorithm="dataset_surface")
    plot.add_mesh(
        surface, color=SOLID_COLOR, opacity=opacity, smooth_shading=True, split_sharp_edges=True, ambient=0.15
    )


def snapshot(plot: pyvista.Plotter) -> UInt8[np.ndarray, "height width 3"]:
    """Render a picture and close its plotter."""
    image = np.asarray(plot.screenshot(return_img=True))
    plot.close()
    return image


def show(axes: Axes, image: UInt8[np.ndarray, "height width 3"], grid: Grid) -> AxesImage:
    """Put a rendered picture into matplotlib axes and label the edges of its box."""
    low, high = frame(grid)
    shown = axes.imshow(image, extent=(low[0], high[0], low[1], high[1]), interpolation="antialiased")
    axes.set_axis_off()
    lx, ly, lz = grid.lengths
    scale, unit = readable(max(grid.lengths), "m")
    for name, first, last, align, outward in (
        ("x", (0.0, 0.0, 0.0), (lx, 0.0, 0.0), "right", (-3, -7)),
        ("y", (lx, 0.0, 0.0), (lx, ly, 0.0), "left", (4, -6)),
        ("z", (0.0, 0.0, 0.0), (0.0, 0.0, lz), "right", (-4, 0)),
    ):
        a, b = project(np.array(first)), project(np.array(last))
        length = np.subtract(last, first).max()
        for text, place in (("0", 0.04), (f"{name} [{unit}]", 0.5), (f"{length / scale:.3g}", 0.96)):
            at = a + place * (b - a)
            axes.annotate(text, at, outward, textcoords="offset points", ha=align, va="center", annotation_clip=False)
    return shown


def color_bar(
    figure: Figure,
    axes: Any,
    colors: str,
    limits: tuple[float, float],
    quantity: str,
    unit: str,
    largest: float | None = None,
    **place: Any,
) -> Colorbar:
    """A colour bar with its quantity and unit, pointed where numbers beyond its limits take the last colour.

    Bars that are compared share a unit, the one in which ``largest`` is easy to read; by default the high limit.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    scale, unit = readable(limits[1] if largest is None else largest, unit)
    mappable = ScalarMappable(Normalize(limits[0] / scale, limits[1] / scale), colors)
    return figure.colorbar(mappable, ax=axes, label=f"{quantity} [{unit}]", extend="max", **place)
