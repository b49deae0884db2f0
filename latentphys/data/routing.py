"""The routing that a rollout store holds: which expert took each latent cell in the step that made a frame."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from latentphys.data.store import Store
from latentphys.grid import Grid

NO_STEP = -1
"""What stands for an expert in frame 0, which no step made."""


def has_routing(store: Store) -> bool:
    """Whether the model that made a store left its routing there."""
    return "routing" in store.attributes["snapshots"]


def recorded_experts(store: Store) -> tuple[int, ...] | None:
    """Number of experts of each layer as the model had them; None where the store does not say."""
    found = store.attributes.get("rollout", {}).get("num_experts")
    return None if found is None else tuple(int(number) for number in found)


def num_experts(store: Store) -> tuple[int, ...]:
    """Number of experts of each layer; where the store does not say, the largest id of all layers + 1.

    Raises:
        ValueError: as in `read_routing`.
    """
    recorded = recorded_experts(store)
    if recorded is not None:
        return recorded
    highest = max(int(read_routing(store, trajectory).max()) for trajectory in range(len(store)))
    return (highest + 1,) * int(store.array("routing").shape[2])


def read_routing(store: Store, trajectory: int) -> Int[np.ndarray, "time layer px py pz"]:
    """The first choice of each latent cell; -1 in frame 0.

    Raises:
        ValueError: no such array, one of another shape or type, a shard that is missing or damaged, or a later frame
            with ids that are no expert's.
    """
    array, counts = store.array("routing"), (store.num_trajectories, store.num_times)
    if array.ndim != 6 or array.shape[:2] != counts or 0 in array.shape or array.dtype.kind != "i":
        raise ValueError(
            f"Expected routing in {store.path} as whole numbers of shape (*{counts}, layer, px, py, pz), got "
            f"{array.dtype} of shape {array.shape}; make the rollout again."
        )
    routing = store.read("routing", trajectory, slice(None)).numpy()
    limits = recorded_experts(store) or (np.iinfo(routing.dtype).max,) * routing.shape[1]
    if len(limits) != routing.shape[1]:
        raise ValueError(
            f"Expected routing of {len(limits)} layers in {store.path}, as many as it names numbers of experts, got "
            f"{routing.shape[1]}; make the rollout again."
        )
    wrong = (routing < 0) | (routing >= np.array(limits).reshape(-1, 1, 1, 1))
    if wrong[1:].any():
        frame, layer, *_ = (int(axis[0]) for axis in np.nonzero(wrong[1:]))
        raise ValueError(
            f"Expected experts 0 to {limits[layer] - 1} in layer {layer} of {store.path}, got "
            f"{int(routing[1:][wrong[1:]][0])} in trajectory {trajectory}, frame {frame + 1}; make the rollout again."
        )
    return routing


def upsample(routing: Int[np.ndarray, "px py pz"], grid: Grid) -> Int[np.ndarray, "nx ny nz"]:
    """The expert of the latent cell in which each cell's centre lies."""
    places = [(2 * np.arange(n) + 1) * p // (2 * n) for n, p in zip(grid.shape, routing.shape, strict=True)]
    return routing[np.ix_(*places)]


def cell_data(routing: Sequence[np.ndarray] | np.ndarray, grid: Grid) -> dict[str, np.ndarray]:
    """Each layer's experts in the cells of a box, by the name that volumes carry them under: ``expert_layer0``, …

    Args:
        routing: the layers of one frame, (layer, px, py, pz).
        grid: the box.
    """
    return {f"expert_layer{layer}": upsample(ids, grid) for layer, ids in enumerate(routing)}
