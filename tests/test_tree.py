"""Whole functions go down a tree of nearest centroids: cheap, piecewise constant, placed once, and kept."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small import NUM_TRAJECTORIES, Road, train
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from latentphys.data import Windows, open_store
from latentphys.routers import TreeRouter
from latentphys.training import load_dynamics, open_checkpoint
from latentphys.training.guards import Guard
from latentphys.training.tasks import DynamicsTask
from latentphys.transformer import LatentTransformer
from latentphys.transformer.conditioning import Conditioning, latent_geometry, store_parameters
from latentphys.transformer.dynamics import Dynamics

TREE = ["router=tree", "dynamics.routing=function"]
SIZES = [(2, 8), (3, 9), (4, 16), (2, 2), (5, 5)]


def random_tree(branching: int, num_experts: int, dim: int = 6) -> TreeRouter:
    """A tree of random centroids, mean and spread."""
    tree = TreeRouter(dim, num_experts, branching)
    tree.centroids_NCD.normal_()
    tree.mean_D.normal_()
    tree.std_D.uniform_(0.5, 2.0)
    return tree


def fitted(rows: Tensor, num_experts: int, branching: int = 2) -> TreeRouter:
    tree = TreeRouter(rows.shape[1], num_experts, branching)
    tree.fit(rows)
    return tree


def leaves(tree: TreeRouter, rows: Tensor) -> Tensor:
    return tree(rows).ids[:, 0]


def descend(tree: TreeRouter, row: Tensor) -> tuple[int, float]:
    """Leaf of one row, worked out one centroid at a time, and how far it could be moved without reaching another."""
    x = (row.double() - tree.mean_D.double()) / tree.std_D.double()
    node, room = 0, np.inf
    for _ in range(tree.depth):
        centroids = tree.centroids_NCD[node].double()
        distances = [float(torch.dist(x, centroid)) for centroid in centroids]
        best = int(np.argmin(distances))
        for other in range(tree.branching):
            if other != best:
                apart = float(torch.dist(centroids[other], centroids[best]))
                room = min(room, (distances[other] ** 2 - distances[best] ** 2) / (2 * apart))
        node = node * tree.branching + 1 + best
    return node - len(tree.centroids_NCD), room


@pytest.mark.parametrize(("branching", "num_experts"), SIZES)
def test_each_row_takes_the_nearest_centroid_at_every_node(branching: int, num_experts: int) -> None:
    tree, rows = random_tree(branching, num_experts), torch.randn(300, 6)
    expected = torch.tensor([descend(tree, row)[0] for row in rows])
    assert torch.equal(leaves(tree, rows), expected) and len(expected.unique()) > 1
    assert torch.equal(leaves(tree, rows.double()), expected)
    routing = tree(rows)
    assert torch.equal(routing.weights, torch.ones(300, 1)) and routing.log_z is None and routing.levels == ()
    assert torch.equal(routing.scores, torch.eye(num_experts)[expected])
    assert tree(rows[:0]).ids.shape == (0, 1)


@pytest.mark.parametrize(("branching", "num_experts"), SIZES)
def test_the_choice_is_constant_up_to_the_bisectors(branching: int, num_experts: int) -> None:
    """A row that moves by less than its distance to the nearest bisector on its way stays; somewhere beyond it does
    not. Both in units of the spread of the features."""
    tree, rows = random_tree(branching, num_experts), torch.randn(100, 6, dtype=torch.float64)
    steps = torch.nn.functional.normalize(torch.randn(100, 6, dtype=torch.float64), dim=-1)
    room = torch.tensor([descend(tree, row)[1] for row in rows], dtype=torch.float64)
    before, inside = leaves(tree, rows), rows + 0.999 * room[:, None] * steps * tree.std_D
    assert torch.equal(leaves(tree, inside), before)
    assert (leaves(tree, rows + 100 * steps * tree.std_D) != before).any()
    assert not tree(rows.requires_grad_()).weights.requires_grad


class Counted(TorchDispatchMode):
    """Numbers that each operation put out, and every operation's name."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            name = func.overloadpacket.__name__
            self.numbers[name] = self.numbers.get(name, 0) + out.numel()
        return out


@pytest.mark.parametrize(("branching", "num_experts", "distances"), [(2, 8, 6), (3, 9, 6), (2, 1024, 20), (4, 4, 4)])
def test_routing_costs_branching_times_depth_distances(branching: int, num_experts: int, distances: int) -> None:
    tree, rows = random_tree(branching, num_experts), torch.randn(50, 6)
    assert tree.num_comparisons == distances
    with Counted() as counted:
        tree(rows)
    assert counted.numbers["sum"] == 50 * distances
    assert counted.numbers["index"] == 50 * distances * 6  # centroids that were looked at
    assert counted.numbers["sub"] == 50 * distances * 6 + 50 * 6 + 50  # the differences, the mean, the leaf's number
    assert "_local_scalar_dense" not in counted.numbers  # nothing waits for the device


@pytest.mark.parametrize("dim", [3, 24])
def test_well_separated_clusters_get_a_leaf_each(dim: int) -> None:
    """Corners of a box with sides of their own, of unequal size; features of unequal units."""
    centres = torch.cartesian_prod(*3 * [torch.tensor([-1.0, 1.0])]) * torch.tensor([9.0, 6.0, 4.0])
    sizes = torch.tensor([5, 60, 9, 30, 11, 7, 40, 20])
    cluster = torch.repeat_interleave(torch.arange(8), sizes)[torch.randperm(182)]
    rows = centres[cluster] @ torch.linalg.qr(torch.randn(dim, 3)).Q.mT + 0.1 * torch.randn(182, dim)
    units = 10.0 ** torch.linspace(-6, 6, dim)
    rows = 1e3 * units + rows * units
    found = leaves(fitted(rows, 8), rows)
    assert len({(int(c), int(e)) for c, e in zip(cluster, found, strict=True)}) == len(found.unique()) == 8


def test_units_and_offsets_of_features_change_nothing() -> None:
    rows = torch.randn(200, 5)
    other = 1e3 + rows * 10.0 ** torch.arange(-2, 3)
    assert torch.equal(leaves(fitted(other, 8), other), leaves(fitted(rows, 8), rows))


def test_the_same_rows_give_the_same_tree_in_any_order() -> None:
    rows = torch.randn(150, 4)
    tree = fitted(rows, 8)
    again, shuffled = fitted(rows, 8), fitted(rows[torch.randperm(150)], 8)
    for name, value in tree.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
        torch.testing.assert_close(shuffled.state_dict()[name], value, rtol=0, atol=1e-5)
    assert torch.equal(leaves(shuffled, rows), leaves(tree, rows))


@pytest.mark.parametrize("number", [8, 11, 64])
@pytest.mark.parametrize("stretch", [1, 4])
def test_no_leaf_is_empty_where_there_are_rows_enough(number: int, stretch: int) -> None:
    """As many different rows as leaves, or few more, some repeated, and with outliers that k-means would isolate."""
    for seed in range(20):
        torch.manual_seed(seed)
        rows = (stretch * torch.randn(number, 3)).sinh()
        rows = torch.cat([rows, rows[:3].repeat(20, 1)])
        assert len(leaves(fitted(rows, 8), rows).unique()) == 8


def test_rows_that_coincide_share_a_leaf_and_leave_others_empty() -> None:
    one = torch.randn(1, 4)
    assert leaves(fitted(one.expand(30, 4), 8), one.expand(30, 4)).unique().tolist() == [0]
    assert leaves(fitted(one, 9, 3), one).tolist() == [0]
    three = torch.randn(3, 4)
    for branching, num_experts in ((2, 8), (4, 16), (3, 27)):
        tree = fitted(three.repeat(10, 1), num_experts, branching)
        assert len(leaves(tree, three).unique()) == 3
        assert torch.isfinite(tree.centroids_NCD).all()
        assert int(leaves(tree, 100 * torch.randn(500, 4)).max()) < num_experts


def test_features_that_do_not_vary_take_no_part() -> None:
    """A constant in FP32 has a spread of rounding; in units of that it would be a feature like any other."""
    rows = torch.randn(100, 2)
    constant = 1e4 * (1 + 1e-7 * torch.randn(100, 1)), torch.zeros(100, 1), torch.full((100, 1), 3e-30)
    more = torch.cat([rows, *constant], dim=1)
    assert torch.equal(leaves(fitted(more, 8), more), leaves(fitted(rows, 8), rows))
    assert torch.isfinite(fitted(more, 8).std_D).all()


def test_the_tree_is_in_the_checkpoint() -> None:
    rows = torch.randn(60, 5)
    tree, other = fitted(rows, 8), TreeRouter(5, 8)
    assert not other.fitted and tree.fitted
    other.load_state_dict(tree.state_dict())
    assert other.fitted and torch.equal(leaves(other, rows), leaves(tree, rows))
    assert set(tree.state_dict()) == {"bias_E", "mean_D", "std_D", "centroids_NCD", "fitted"}
    assert not list(tree.parameters())


def test_centroids_stay_fp32_in_a_16_bit_model() -> None:
    rows = torch.randn(400, 5)
    tree = fitted(rows, 16)
    before = leaves(tree, rows)
    model = torch.nn.Sequential(tree).bfloat16()
    assert {b.dtype for b in model.buffers() if b.is_floating_point()} == {torch.float32}
    assert torch.equal(leaves(tree, rows), before)


def test_before_it_is_fitted_every_row_goes_to_the_first_leaf() -> None:
    assert leaves(TreeRouter(5, 8), torch.randn(20, 5)).tolist() == 20 * [0]
    one = fitted(torch.randn(20, 5), 1)
    assert (one.depth, one.num_comparisons) == (0, 0) and leaves(one, torch.randn(7, 5)).tolist() == 7 * [0]


def test_the_bias_moves_nobody() -> None:
    rows = torch.randn(100, 5)
    tree = fitted(rows, 4)
    before = leaves(tree, rows)
    tree.bias_E[1] = 1e6
    assert torch.equal(leaves(tree, rows), before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: TreeRouter(5, 6),
            "a power of branching = 2 experts, the leaves of .* tree, got 6; use 4 or 8",
        ),
        (lambda: TreeRouter(5, 8, 3), "a power of branching = 3 experts.*got 8; use 3 or 9"),
        (lambda: TreeRouter(5, 4, 1), "Expected branching ≥ 2, got 1"),
        (lambda: TreeRouter(5, 0), "at least 1 expert, got num_experts = 0"),
        (lambda: fitted(torch.zeros(0, 5), 4), r"rows of shape \(R, 5\) with R ≥ 1, got \(0, 5\)"),
        (lambda: TreeRouter(5, 4).fit(torch.zeros(9, 4)), r"rows of shape \(R, 5\) with R ≥ 1, got \(9, 4\)"),
        (lambda: TreeRouter(5, 4).fit(torch.zeros(5)), r"rows of shape \(R, 5\) with R ≥ 1, got \(5,\)"),
    ],
)
def test_refuses_what_no_tree_can_be(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_rows_that_are_not_finite_are_refused_and_leave_the_tree_as_it_was(value: float) -> None:
    rows = torch.randn(30, 5)
    tree = fitted(rows, 4)
    before = {name: tensor.clone() for name, tensor in tree.state_dict().items()}
    rows[17, 3] = value
    with pytest.raises(ValueError, match=f"finite rows to fit a tree to, got {value} as feature 3 of row 17"):
        tree.fit(rows)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tree.state_dict().items())


def test_blocks_have_nothing_to_fit_a_tree_to(road: Road, tmp_path: Path) -> None:
    sizes = {"dim": 16, "depth": 1, "num_heads": 2, "hidden": 8, "router": partial(TreeRouter, num_experts=2)}
    with pytest.raises(ValueError, match="routing = function for a TreeRouter, .* got 'block'"):
        LatentTransformer(2, 1, 3, 1, **sizes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="routing = function for a TreeRouter"):
        train("dynamics", road.inputs("dynamics"), tmp_path / "run", "router=tree", "dynamics.routing=block")


# In training


@pytest.fixture(scope="module")
def run(road: Road, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dynamics model whose functions are routed by a tree."""
    return train("dynamics", road.inputs("dynamics"), tmp_path_factory.mktemp("tree") / "run", *TREE).parent


def tree_of(run: Path) -> TreeRouter:
    router = load_dynamics(run)[0].transformer.router
    assert isinstance(router, TreeRouter)
    return router


def test_two_families_go_to_different_leaves(road: Road, run: Path) -> None:
    """Trajectories that training never saw, through the model itself; and the load balance left the tree alone."""
    dynamics, autoencoder = load_dynamics(run)
    assert [type(router) for router in dynamics.transformer.routers()] == [TreeRouter]
    chosen: dict[str, set[int]] = {}
    for family, path in road.latents.items():
        source, latents, i = road.store(family), open_store(path), NUM_TRAJECTORIES - 1
        values = latents.read("latent", i, slice(0, 5))[:, None]
        condition = torch.stack(
            [
                dynamics.conditioning.vector(
                    store_parameters(source, i, t), store_parameters(source, i, t + 1), dynamics.interval(family)
                )
                for t in range(5)
            ]
        )
        geometry = latent_geometry(source.geometry(i), autoencoder.compression).expand(5, -1, -1, -1, -1)
        (routing,) = dynamics(values, condition, geometry, source.grid.periodic).routings
        per_sample = routing.ids.reshape(5, -1)
        assert (per_sample == per_sample[:, :1]).all()
        chosen[family] = set(routing.ids.flatten().tolist())
    assert chosen["open_channel"].isdisjoint(chosen["porous"])
    assert not tree_of(run).bias_E.any() and tree_of(run).fitted


def test_it_is_fitted_to_what_the_model_sees_of_training_windows(
    road: Road, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row of the fit reaches the router again in training without noise, and none of held-out trajectories is
    among them."""
    fit_rows: list[Tensor] = []
    seen_train: list[Tensor] = []
    seen_test: list[Tensor] = []
    fit, route, forward = TreeRouter.fit, TreeRouter.route, DynamicsTask.forward
    training: list[bool] = []

    def spy_forward(self: DynamicsTask, batch: Any) -> Any:
        training[:] = [self.training]
        return forward(self, batch)

    def spy_fit(self: TreeRouter, rows: Tensor) -> None:
        fit_rows.append(rows)
        fit(self, rows)

    def spy_route(self: TreeRouter, rows: Tensor, layout: Any) -> Any:
        (seen_train if training[0] else seen_test).append(rows)
        return route(self, rows, layout)

    monkeypatch.setattr(DynamicsTask, "forward", spy_forward)
    monkeypatch.setattr(TreeRouter, "fit", spy_fit)
    monkeypatch.setattr(TreeRouter, "route", spy_route)
    settings = [
        "trainer.num_steps=8",
        "trainer.batch_size=7",
        "dynamics_training.input_noise=0",
        "dynamics.num_frames=2",
    ]
    train("dynamics", road.inputs("dynamics"), tmp_path / "run", *TREE, *settings)
    (rows,) = fit_rows

    def nearest(a: Tensor, b: Tensor) -> Tensor:
        return torch.cdist(a.double(), b.double(), compute_mode="donot_use_mm_for_euclid_dist").min(1).values

    assert len(rows.unique(dim=0)) == 2 * (NUM_TRAJECTORIES - 1) * 4
    assert nearest(torch.cat(seen_train), rows).max() < 1e-5
    assert nearest(torch.cat(seen_test), rows).min() > 1e-3


def tree_tensors(run: Path) -> dict[str, Tensor]:
    tensors = load_file(open_checkpoint(run).path / "model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if name.startswith("transformer.router.")}


def test_an_interrupted_run_resumes_to_the_same_bits(
    road: Road, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where fitting anew would give another tree."""
    stopped = tmp_path / "run"
    with monkeypatch.context() as patched:

        def verdict(guard: Guard, step: int, *_: Any) -> None:
            if step == 2:
                raise KeyboardInterrupt

        patched.setattr(Guard, "verdict", verdict)
        with pytest.raises(KeyboardInterrupt):
            train("dynamics", road.inputs("dynamics"), stopped, *TREE)
    assert open_checkpoint(stopped).step == 2
    with monkeypatch.context() as patched:
        fit = TreeRouter.fit
        patched.setattr(TreeRouter, "fit", lambda self, rows: fit(self, rows + torch.randn_like(rows)))
        train("dynamics", road.inputs("dynamics"), stopped, *TREE)
    assert open_checkpoint(stopped).step == open_checkpoint(run).step == 6
    whole, resumed = (load_file(open_checkpoint(r).path / "model.safetensors") for r in (run, stopped))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert len(tree_tensors(run)) == 5 and tree_tensors(run)["transformer.router.centroids_NCD"].any()


def test_a_tree_that_is_fitted_already_is_kept(road: Road, run: Path, tmp_path: Path) -> None:
    """A model that is trained on goes on with its tree, whatever it is trained on."""
    dynamics, autoencoder = load_dynamics(run)
    kept = tree_of(run).state_dict()
    windows = Windows([open_store(road.latents["porous"])], "latent", 2)
    DynamicsTask(dynamics, autoencoder, windows, windows, [road.store("porous")], {}, {})
    router = dynamics.transformer.router
    assert router is not None
    assert all(torch.equal(kept[name], tensor) for name, tensor in router.state_dict().items())


def test_features_are_those_of_scaled_latents() -> None:
    model = LatentTransformer(2, 2, 3, 1, 16, 1, 2, 8, partial(TreeRouter, num_experts=2), routing="function")
    dynamics = Dynamics(model, Conditioning([]), {}, 2)
    dynamics.latent_mean += 3.0
    dynamics.latent_std *= 2.0
    latents, condition, geometry = torch.randn(4, 2, 2, 4, 3, 2), torch.randn(4, 3), torch.randn(4, 1, 4, 3, 2)
    features = dynamics.function_features(latents, condition, geometry)
    last = (latents[:, -1].flatten(2) - 3) / 2
    expected = [last.mean(-1), last.std(-1, correction=0), geometry.flatten(2).mean(-1), condition]
    torch.testing.assert_close(features, torch.cat(expected, -1))
