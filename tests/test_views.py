"""Pictures: what they show is where and what the numbers are, at one scale, and nothing is blank."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageSequence

from latentphys import operators
from latentphys.data import Store, create_store, open_store
from latentphys.fields import VELOCITY, FieldSpec, State
from latentphys.grid import Boundaries, Geometry, Grid
from latentphys.views import flow, movie, quantities, render, routing, scene, slices
from latentphys.views.render import _replacing, _truth

CHANNEL: Boundaries = (("periodic", "periodic"), ("periodic", "periodic"), ("no_slip", "free_slip"))
EXPERTS = (0, 2, 3)


def vortices(n: int = 16, amplitude: float = 1.0, time: float = 0.0) -> State:
    """Taylor–Green vortices (sin x cos y, −cos x sin y, 0) in a box of 2π."""
    grid = Grid((n, n, n), (2 * math.pi / n,) * 3)
    faces = torch.arange(n, dtype=torch.float64) * grid.spacing[0]
    centres = faces + 0.5 * grid.spacing[0]
    u = torch.zeros(3, n, n, n, dtype=torch.float64)
    u[0] = amplitude * (torch.sin(faces)[:, None] * torch.cos(centres))[..., None]
    u[1] = -amplitude * (torch.cos(centres)[:, None] * torch.sin(faces))[..., None]
    return State({"velocity": operators.flux_of(u, grid)}, Geometry(grid), time)


def grains(n: int = 16, time: float = 0.0, error: float = 0.0) -> State:
    """A flow along x past a ball in the middle of a box of 1 mm; masked, which is enough for a picture."""
    grid = Grid((n, n, n), (1e-3 / n,) * 3)
    place = (np.indices(grid.shape) + 0.5) / n - 0.5
    geometry = Geometry(grid, torch.from_numpy((place**2).sum(0) < 0.3**2))
    u = torch.zeros(3, *grid.shape, dtype=torch.float64)
    u[0] = (geometry.wall_distance / geometry.wall_distance.max()) * (1 + time) * 1e-3
    u[1] = error * 1e-3
    return State({"velocity": geometry.mask(operators.flux_of(u, grid))}, geometry, time)


def experts(p: int = 4) -> np.ndarray:
    """Three of four experts, the last one only in the corner that is cut away."""
    ids = np.where(np.indices((p, p, p)).sum(0) % 2 == 0, EXPERTS[0], EXPERTS[1]).astype(np.int16)
    ids[-1, 0, -1] = EXPERTS[2]
    return ids


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pictures, which are quicker to write."""
    monkeypatch.setattr(scene, "DPI", 60)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two trajectories past a ball, and a rollout from time 1 of the second with routing in two layers."""
    folder = tmp_path_factory.mktemp("stores")
    times = [0.1 * t for t in range(6)]
    first = grains()
    solid = torch.stack([first.geometry.fluid.logical_not()] * 2)
    shared: dict[str, Any] = {"grid": first.grid, "specs": {"velocity": VELOCITY}, "family": "porous"}
    shared |= {"num_trajectories": 2, "times": times, "solid": solid}
    with create_store(folder / "true.zarr", **shared) as writer:
        for trajectory in range(2):
            for t, time in enumerate(times):
                writer.write("velocity", trajectory, t, grains(time=time).velocity * (1 + trajectory))
    start = {"reference": "true.zarr", "trajectories": [1], "start": 1, "stride": 2, "checkpoint": ""}
    extras = {"routing": ((1, 3, 2, 4, 4, 4), "int16", ("trajectory", "time", "layer", "px", "py", "pz"))}
    path, attributes = folder / "rollout.zarr", {"rollout": start}
    shared |= {"num_trajectories": 1, "times": [0.1, 0.3, 0.5], "solid": solid[:1]}
    with create_store(path, attributes=attributes, extras=extras, **shared) as writer:
        for t, time in enumerate((0.1, 0.3, 0.5)):
            writer.write("velocity", 0, t, 2 * grains(time=time, error=0.1 * t).velocity)
            writer.write("routing", 0, t, np.full((2, 4, 4, 4), -1) if t == 0 else np.stack([experts(), experts() * 0]))
    return folder / "true.zarr", path


def numbers(axes: Axes) -> np.ma.MaskedArray:
    """What the picture in some axes was made from."""
    return np.ma.asarray(axes.images[0].get_array())


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(float)


def test_corner_values_keep_linear_fields_and_vanish_on_no_slip_walls() -> None:
    grid = Grid((4, 5, 6), (0.1, 0.2, 0.3), CHANNEL)
    height = np.broadcast_to((np.arange(6) + 0.5) * 0.3, grid.shape)
    found = quantities.corners(height, grid)
    assert found.shape == (5, 6, 7)
    np.testing.assert_allclose(found[..., 1:-1], np.broadcast_to(np.arange(1, 6) * 0.3, (5, 6, 5)))
    np.testing.assert_allclose(quantities.corners(np.ones(grid.shape), grid, wall="flip")[..., 0], 0)
    np.testing.assert_allclose(quantities.corners(np.ones(grid.shape), grid, wall="flip")[..., 1:], 1)


def test_q_criterion_converges_to_the_vortices_with_second_order() -> None:
    errors = []
    for n in (16, 32):
        x = (np.arange(n) + 0.5) * 2 * math.pi / n
        exact = np.outer(np.sin(x) ** 2, np.sin(x) ** 2) - np.outer(np.cos(x) ** 2, np.cos(x) ** 2)
        errors.append(np.abs(quantities.q_criterion(vortices(n)) - exact[..., None]).max())
    assert 1.8 < math.log2(errors[0] / errors[1]) < 2.2


def test_image_data_has_true_places_and_order() -> None:
    grid = Grid((4, 5, 6), (0.1, 0.2, 0.3))
    centres = (np.indices(grid.shape) + 0.5) * np.array(grid.spacing).reshape(3, 1, 1, 1)
    image = scene.image_data(grid, cells={"x": centres[0], "place": centres}, corners={"one": np.ones((5, 6, 7))})
    np.testing.assert_allclose(image.cell_centers().points, image.cell_data["place"])
    np.testing.assert_allclose(image.cell_centers().points[:, 0], image.cell_data["x"])


def test_labels_and_pixels_agree_on_where_a_point_is() -> None:
    grid = Grid((4, 4, 4), (1.0, 0.5, 0.25))
    point = np.array([3.0, 0.5, 1.0])
    plot = scene.plotter(grid)
    plot.add_mesh(scene.start().Sphere(radius=0.1, center=point), color="red", lighting=False)
    image = scene.snapshot(plot).astype(float)
    rows, columns = np.nonzero((image[..., 0] > 200) & (image[..., 1] < 50))
    low, high = scene.frame(grid)
    across, up = (scene.project(point) - low) / (high - low)
    assert columns.mean() / image.shape[1] == pytest.approx(across, abs=0.01)
    assert 1 - rows.mean() / image.shape[0] == pytest.approx(up, abs=0.01)


def test_readable_units() -> None:
    assert scene.readable(3.0, "m") == (1.0, "m")
    assert scene.readable(0.02, "m/s") == (1e-3, "mm/s")
    assert scene.readable(0.0, "m") == (1e-9, "nm")


def test_without_a_library_there_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    scene.start.cache_clear()
    monkeypatch.setenv("VTK_DEFAULT_OPENGL_WINDOW", "vtkNoSuchRenderWindow")
    with pytest.raises(RuntimeError, match="vtkNoSuchRenderWindow.*apt-get install libegl1 libgl1-mesa-dri"):
        scene.start()
    scene.start.cache_clear()


@pytest.mark.parametrize("draw", [flow.volume, flow.isosurface, flow.streamlines])
def test_the_flow_is_drawn_in_its_colours(draw: Callable[[State], Any], tmp_path: Path) -> None:
    draw(vortices()).savefig(tmp_path / "flow.png", dpi=80)
    image = pixels(tmp_path / "flow.png")[:, :380]
    assert (np.ptp(image, axis=-1) > 30).mean() > 0.02


def test_a_fluid_at_rest_and_a_solid_plane_can_be_drawn() -> None:
    solid = torch.zeros(8, 8, 8, dtype=torch.bool)
    solid[:, 4] = True
    state = State({"velocity": torch.zeros(3, 8, 8, 8)}, Geometry(Grid((8, 8, 8), (1.0, 1.0, 1.0)), solid))
    for figure in (flow.streamlines(state), flow.isosurface(state), slices.slices([state])):
        assert numbers(figure.axes[0]).size


def test_solids_are_grey_in_volumes_and_slices() -> None:
    state = grains()
    image = scene.snapshot(flow.draw_volume(state, flow.Scale(1e9, 1e8), 300)).astype(int)
    middle = image[image.shape[0] // 2, image.shape[1] // 2]
    assert np.ptp(middle) < 20 and middle.max() < 245
    axes = slices.slices([state]).axes[0]
    np.testing.assert_array_equal(numbers(axes).mask.T, ~state.geometry.fluid.numpy()[:, 8])
    assert axes.images[0].get_cmap().get_bad()[:3] == pytest.approx((0.72,) * 3, abs=0.01)


def test_truth_and_rollout_share_one_scale() -> None:
    truth, rollout = [grains(time=0.1), grains(time=0.2)], [grains(time=0.1), grains(time=5.0)]
    panels = slices.slices(truth, rollout, vrmse=[0.1, 0.2]).axes[:6]
    scales = {axes.images[0].get_clim() for i, axes in enumerate(panels) if i % 3 < 2}
    errors = {axes.images[0].get_clim() for i, axes in enumerate(panels) if i % 3 == 2}
    assert len(scales) == len(errors) == 1
    assert scales.pop()[1] > 4e-3, "the faster rollout must not saturate"
    assert numbers(panels[2]).max() == 0
    assert panels[5].get_title() == "VRMSE 0.2"


def test_slices_refuse_what_cannot_be_compared() -> None:
    state = grains()
    with pytest.raises(ValueError, match="Expected at least one state"):
        slices.slices([])
    with pytest.raises(ValueError, match="as many rollout states as true states, 1, got 2"):
        slices.slices([state], [state, state])
    with pytest.raises(ValueError, match="on one grid"):
        slices.slices([state], [grains(8)])
    with pytest.raises(ValueError, match="Expected axis 0, 1 or 2, got 3"):
        slices.plane(state, axis=3)
    with pytest.raises(ValueError, match="pick a sample first"):
        quantities.speed(State({"velocity": state.velocity[None]}, state.geometry))


def test_blocks_are_the_experts_of_their_places() -> None:
    grid = Grid((8, 8, 8), (1.0, 0.5, 0.25))
    ids = np.arange(64).reshape(4, 4, 4)
    surface = routing.blocks(ids, grid)
    kept = set(range(64)) - set(ids[2:, :2, 2:].ravel())
    assert set(surface.cell_data["expert"]) == kept
    at = surface.cell_centers().points[surface.cell_data["expert"] == ids[3, 2, 1]].mean(axis=0)
    np.testing.assert_allclose(at, [7.0, 2.5, 0.75], rtol=1e-5)


def test_routing_map_shows_exactly_the_experts_present() -> None:
    figure = routing.routing_map(experts(), grains(), num_experts=4)
    bars: list[Any] = list(figure.axes[3].patches)
    assert [bar.get_height() > 0 for bar in bars] == [expert in EXPERTS for expert in range(4)]
    assert sum(bar.get_height() for bar in bars) == pytest.approx(100)
    colors = routing.expert_colors(4)
    for bar, color in zip(bars, colors, strict=True):
        assert bar.get_facecolor()[:3] == pytest.approx(tuple(color))
    image = numbers(figure.axes[1]).astype(float) / 255
    hues = image / np.maximum(image.max(axis=-1, keepdims=True), 1e-9)
    for expert in range(4):
        near = np.abs(hues - colors[expert] / colors[expert].max()).max(axis=-1) < 0.04
        assert (near.mean() > 0.01) == (expert in EXPERTS[:2]), f"expert {expert}"


def test_expert_colors_differ() -> None:
    assert len({tuple(color) for color in routing.expert_colors(24).round(3)}) == 24


def test_routing_refuses_what_it_cannot_draw(unchecked: None) -> None:
    state = grains()
    for ids, message in (
        (experts().astype(float), "Expected routing as whole numbers"),
        (experts()[None], "pick a layer"),
        (np.zeros((17, 4, 4), int), "Expected at most .16, 16, 16. patches"),
        (experts() * 0 - 1, "no routing made this frame"),
    ):
        with pytest.raises(ValueError, match=message):
            routing.routing_map(ids, state)
    with pytest.raises(ValueError, match="Expected experts below 3, got expert 3"):
        routing.routing_map(experts(), state, num_experts=3)


def test_exported_experts_lie_over_the_cells_they_made(tmp_path: Path) -> None:
    state = grains()
    routing.export_vti(tmp_path / "state.vti", state, experts()[None])
    image = scene.start().read(tmp_path / "state.vti")
    assert image.spacing == pytest.approx(state.grid.spacing)
    found = image.cell_data["expert_layer0"].reshape(state.grid.shape, order="F")
    np.testing.assert_array_equal(found, np.kron(experts(), np.ones((4, 4, 4))))
    np.testing.assert_allclose(image.cell_data["speed"], quantities.speed(state).ravel(order="F"))


def plane_flow(thin: int) -> tuple[State, np.ndarray]:
    """A vortex in a box one cell thick, 8 × 4 cells, and two layers of experts in 4 × 2 patches."""
    shape, patches = [8, 4], [4, 2]
    shape.insert(thin, 1)
    patches.insert(thin, 1)
    grid = Grid((shape[0], shape[1], shape[2]), (1.0, 1.0, 1.0))
    potential = torch.zeros(3, *grid.shape, dtype=torch.float64)
    potential[thin] = torch.rand(grid.shape)
    ids = np.arange(8, dtype=np.int16).reshape(patches)
    state = State({"velocity": operators.curl(potential, grid)}, Geometry(grid), 0.5)
    return state, np.stack([ids, 7 - ids])


@pytest.mark.parametrize("thin", [0, 1, 2])
def test_planes_are_drawn_as_planes_with_every_patch_in_its_place(thin: int) -> None:
    state, ids = plane_flow(thin)
    figure = routing.routing_map(ids[0], state, num_experts=9)
    speed, patches, _, load = figure.axes[:4]
    first, second = (axis for axis in range(3) if axis != thin)
    np.testing.assert_array_equal(numbers(patches).T, ids[0].take(0, thin))
    np.testing.assert_allclose(numbers(speed).T, quantities.speed(state).take(0, thin))
    for axes in (speed, patches):
        assert axes.images[0].get_extent() == pytest.approx([0, 8, 0, 4])
        assert axes.get_xlabel() == f"{'xyz'[first]} [m]"
        assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "4", "8"]
    assert speed.get_ylabel() == f"{'xyz'[second]} [m]"
    shown = patches.images[0].to_rgba(numbers(patches))[..., :3]
    np.testing.assert_allclose(shown, routing.expert_colors(9)[numbers(patches)])
    edges = [np.asarray(line.get_xydata())[0] for line in patches.lines]
    assert [x for x, _ in edges[:3]] == [2, 4, 6] and edges[3][1] == 2 and len(edges) == 4
    heights = [patch.get_height() for patch in load.patches if isinstance(patch, Rectangle)]
    assert heights == pytest.approx([12.5] * 8 + [0.0])


@pytest.mark.parametrize("thin", [0, 1, 2])
def test_exported_planes_have_all_layers(thin: int, tmp_path: Path) -> None:
    state, ids = plane_flow(thin)
    routing.export_vti(tmp_path / "state.vti", state, ids)
    image = scene.start().read(tmp_path / "state.vti")
    repeats = [1 if axis == thin else 2 for axis in range(3)]
    for layer in range(2):
        found = image.cell_data[f"expert_layer{layer}"].reshape(state.grid.shape, order="F")
        np.testing.assert_array_equal(found, np.kron(ids[layer], np.ones(repeats)))


@pytest.fixture
def save_plane(tmp_path: Path) -> Callable[..., Store]:
    """A rollout of one step of a plane with two layers of eight experts, and what else its attributes say."""

    def write(**said: Any) -> Store:
        state, ids = plane_flow(2)
        path = tmp_path / "rollout.zarr"
        dimensions = ("trajectory", "time", "layer", "px", "py", "pz")
        with create_store(
            path,
            grid=state.grid,
            specs={"velocity": VELOCITY},
            family="plane",
            num_trajectories=1,
            times=[0.0, 0.5],
            attributes={"rollout": {"checkpoint": "model", **said}},
            extras={"routing": ((1, 2, *ids.shape), "int16", dimensions)},
        ) as out:
            out.write("velocity", 0, slice(None), torch.stack([state.velocity] * 2))
            out.write("routing", 0, slice(None), np.stack([np.full_like(ids, -1), ids]))
        return open_store(path)

    return write


def test_render_a_rollout_of_a_plane(save_plane: Callable[..., Store], tmp_path: Path) -> None:
    pictures = render(save_plane(), tmp_path / "out")
    assert [p.path.name for p in pictures] == ["plane_rollout_velocity_slices.png", "plane_rollout_routing.png"]
    assert "the expert of layer 1" in pictures[1].caption and "cut away" not in pictures[1].caption
    assert all(pixels(p.path).std() > 5 for p in pictures)
    image = scene.start().read(tmp_path / "out" / "plane_rollout.vti")
    found = image.cell_data["expert_layer1"].reshape((8, 4, 1), order="F")
    np.testing.assert_array_equal(found, np.kron(plane_flow(2)[1][1], np.ones((2, 2, 1))))
    assert {"velocity", "expert_layer0"} <= set(image.cell_data.keys())


@pytest.mark.parametrize(("said", "number"), [({"num_experts": [8, 12]}, 12), ({}, 8)])
def test_the_bars_are_of_all_experts_of_the_layer(
    save_plane: Callable[..., Store],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    said: dict[str, list[int]],
    number: int,
) -> None:
    """As many as the store says its model has; of a store that does not say, up to the largest id."""
    drawn = []

    def watch(ids: np.ndarray, state: State, num_experts: int) -> Figure:
        drawn.append(num_experts)
        return routing.routing_map(ids, state, num_experts)

    monkeypatch.setattr(sys.modules["latentphys.views.render"], "routing_map", watch)
    render(save_plane(**said), tmp_path / "out")
    assert drawn == [number]


def test_damaged_routing_is_not_passed_over(save_plane: Callable[..., Store], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected experts 0 to 5 in layer 0 of .*, got 6 in trajectory 0, frame 1"):
        render(save_plane(num_experts=[6, 8]), tmp_path / "out")


def test_render_a_rollout_beside_its_reference(stores: tuple[Path, Path], tmp_path: Path) -> None:
    true, rollout = (open_store(path) for path in stores)
    pictures = render(rollout, tmp_path, reference=true, layer=0)
    names = ["slices", "routing", "volume", "streamlines", "isosurface"]
    assert [p.path.name for p in pictures] == [f"porous_rollout_{n}.png" for n in names] + ["porous_rollout_movie.gif"]
    for picture in pictures:
        assert pixels(picture.path).std() > 5, picture.path.name
        assert picture.title.startswith("porous: ") and picture.caption.endswith((".", ".mp4."))
    assert len(ImageSequence.all_frames(Image.open(pictures[-1].path))) == 3
    others = {path.name for path in tmp_path.iterdir()} - {picture.path.name for picture in pictures}
    assert others == {"porous_rollout.vti", "porous_rollout_movie.mp4"}


def test_the_truth_beside_a_rollout_is_of_the_same_times(stores: tuple[Path, Path]) -> None:
    true, rollout = (open_store(path) for path in stores)
    found = _truth(rollout, true, 0, [0, 1, 2])
    assert found is not None
    assert [state.time for state in found] == pytest.approx([rollout[0, t].time for t in range(3)])
    assert torch.equal(found[0].velocity, true[1, 1].velocity)


def test_render_data(stores: tuple[Path, Path], tmp_path: Path) -> None:
    pictures = render(open_store(stores[0]), tmp_path / "new", trajectory=-1, movie=False)
    assert [picture.path.name for picture in pictures][:1] == ["porous_slices.png"]
    assert len(pictures) == 4 and all(pixels(picture.path).std() > 5 for picture in pictures)


def test_render_refuses_what_it_cannot_draw(stores: tuple[Path, Path], tmp_path: Path) -> None:
    true, rollout = (open_store(path) for path in stores)
    with pytest.raises(ValueError, match="Expected a trajectory from 0 to 1, got 2"):
        render(true, tmp_path, trajectory=2)
    with pytest.raises(ValueError, match="Expected a layer from 0 to 1, got 2"):
        render(rollout, tmp_path, layer=2)
    with pytest.raises(ValueError, match="Expected a rollout to compare with a reference"):
        render(true, tmp_path, reference=true)
    grid = Grid((4, 4, 4), (1.0, 1.0, 1.0))
    shared: dict[str, Any] = {"grid": grid, "family": "porous", "num_trajectories": 1, "times": [0.0]}
    for spec, channels in ((FieldSpec("latent", "vector", "1"), 5), (VELOCITY, None)):
        with create_store(tmp_path / spec.name, specs={spec.name: spec}, channels=channels, **shared) as writer:
            writer.write(spec.name, 0, 0, torch.zeros(channels or 3, 4, 4, 4))
    with pytest.raises(ValueError, match="Expected a reference on the grid of the rollout"):
        render(rollout, tmp_path, reference=open_store(tmp_path / "velocity"))
    with pytest.raises(ValueError, match="Expected a store of fields, got latents"):
        render(open_store(tmp_path / "latent"), tmp_path)
    assert not list(tmp_path.glob("*.png"))


def test_a_failed_picture_leaves_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "a.png"
    target.write_text("old")
    with pytest.raises(OSError, match="disk"), _replacing(target) as partial:
        partial.write_text("half")
        raise OSError("disk full")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"] and target.read_text() == "old"


def test_movies_need_as_many_true_states() -> None:
    with pytest.raises(ValueError, match="at least one, got none"):
        movie.frames([])
    with pytest.raises(ValueError, match="got 1 and 2"):
        movie.frames([grains()], [grains(), grains()])
