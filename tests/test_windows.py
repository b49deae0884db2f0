"""Windows are a pure function of seed and step, balanced over stores and divided over ranks."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentphys.data import Store, Windows, create_store, open_store, split
from latentphys.data.order import Turns
from latentphys.fields import FieldSpec
from latentphys.grid import Grid

FIELD = FieldSpec("p", "scalar", "Pa")
FLUX = FieldSpec("u", "flux", "m3/s")
VALUE = {"p": 10_000, "u": 20_000, "c": 30_000}


def numbered(path: Path, shape: tuple[int, int, int], num_trajectories: int, num_times: int) -> Store:
    """A store in which every value is 100 · trajectory + time."""
    with create_store(
        path,
        grid=Grid(shape, (1.0, 1.0, 1.0)),
        specs={"p": FIELD},
        family=path.name,
        num_trajectories=num_trajectories,
        times=range(num_times),
    ) as out:
        for i in range(num_trajectories):
            frames = 100.0 * i + torch.arange(num_times, dtype=torch.float64)
            out.write("p", i, slice(None), frames.reshape(-1, 1, 1, 1).expand(-1, *shape))
    return open_store(path)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[Store]:
    folder = tmp_path_factory.mktemp("stores")
    sizes = {"a": ((2, 3, 2), 3, 9), "b": ((4, 2, 2), 2, 6), "c": ((2, 2, 2), 5, 7)}
    return [numbered(folder / name, *size) for name, size in sizes.items()]


@pytest.mark.parametrize("cache", [False, True])
def test_a_window_holds_the_snapshots_it_names(stores: list[Store], cache: bool) -> None:
    windows = Windows(stores, "p", length=3, stride=2, trajectories=[[0, 2], [1], range(5)], cache=cache)
    assert [windows.num_windows(i) for i in range(3)] == [2 * 5, 2, 5 * 3] and len(windows) == 27
    for step in range(12):
        batch = windows.sample(step, batch=2, seed=0)
        assert batch.values.dtype == torch.float32
        assert batch.values.shape == (2, 3, *stores[batch.store].grid.shape)
        expected = 100 * batch.trajectories[:, None] + batch.starts[:, None] + torch.tensor([0, 2, 4])
        assert torch.equal(batch.values, expected[:, :, None, None, None].expand(batch.values.shape).float())


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> list[Store]:
    """Two stores with other fields each, in which every value tells field, component, trajectory and time apart."""
    folder, stores = tmp_path_factory.mktemp("mixed"), []
    families = {"a": (FIELD, FLUX, FieldSpec("c", "scalar", "K")), "b": (FieldSpec("c", "scalar", "K"),)}
    for name, specs in families.items():
        with create_store(
            folder / name,
            grid=Grid((2, 4, 3), (1.0, 1.0, 1.0)),
            specs={spec.name: spec for spec in specs},
            family=name,
            num_trajectories=2,
            times=range(5),
        ) as out:
            for spec in specs:
                for i in range(2):
                    frames = 100.0 * i + torch.arange(5, dtype=torch.float64).reshape(-1, 1, 1, 1)
                    values = frames + VALUE[spec.name] + torch.zeros(5, 2, 4, 3, dtype=torch.float64)
                    if spec.kind == "flux":
                        values = torch.stack([values + 1000 * axis for axis in range(3)], dim=1)
                    out.write(spec.name, i, slice(None), values)
        stores.append(open_store(folder / name))
    return stores


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("names", [["p", "u", "c"], ["c", "u"], ["u"], ["c"]])
def test_packed_fields_are_one_after_another_in_the_order_asked_for(
    mixed: list[Store], names: list[str], cache: bool
) -> None:
    """A scalar has one component, alone too."""
    windows = Windows(mixed, {"a": names, "b": ["c"]}, length=2, stride=2, cache=cache)
    components = {"p": [10_000], "u": [20_000, 21_000, 22_000], "c": [30_000]}
    seen = set()
    for step in range(6):
        batch = windows.sample(step, batch=2, seed=0)
        expected = torch.tensor([x for name in (names if batch.store == 0 else ["c"]) for x in components[name]])
        assert batch.values.dtype == torch.float32 and batch.values.shape == (2, 2, len(expected), 2, 4, 3)
        frames = 100 * batch.trajectories[:, None] + batch.starts[:, None] + torch.tensor([0, 2])
        values = (frames[:, :, None] + expected)[..., None, None, None]
        assert torch.equal(batch.values, values.expand(batch.values.shape).float())
        seen.add(batch.store)
        one = windows.read(batch.store, int(batch.trajectories[0]), int(batch.starts[0]))
        assert torch.equal(one, batch.values[0])
    assert seen == {0, 1}


def test_packed_fields_that_are_not_there_are_refused(mixed: list[Store]) -> None:
    with pytest.raises(ValueError, match=r"a field 'p' in .*b, got \['c'\]"):
        Windows(mixed, {"a": ["p"], "b": ["p"]}, 2)


def drawn(windows: Windows, step: int, batch: int = 4, seed: int = 5) -> tuple[int, list[int], list[int]]:
    got = windows.sample(step, batch, seed)
    return got.store, got.trajectories.tolist(), got.starts.tolist()


def test_a_step_is_the_same_after_resuming_anywhere(stores: list[Store]) -> None:
    steps = [drawn(Windows(stores, "p", 2), step) for step in range(12)]
    resumed = Windows([open_store(s.path) for s in stores], "p", 2)
    assert [drawn(resumed, step) for step in range(11, -1, -1)] == steps[::-1]
    assert steps != [drawn(resumed, step, seed=6) for step in range(12)]


def test_ranks_share_the_batch_of_one(stores: list[Store]) -> None:
    windows = Windows(stores, "p", 2)
    for step in range(6):
        whole = windows.sample(step, 4, seed=1)
        halves = [windows.sample(step, 4, seed=1, rank=rank, world=2) for rank in range(2)]
        assert {half.store for half in halves} == {whole.store}
        assert torch.equal(torch.cat([half.values for half in halves]), whole.values)
        assert torch.equal(torch.cat([half.starts for half in halves]), whole.starts)


def test_stores_take_turns_in_a_changing_order(stores: list[Store]) -> None:
    windows = Windows(stores, "p", 2, cache=True)
    order = [drawn(windows, step)[0] for step in range(18)]
    rounds = [tuple(order[i : i + 3]) for i in range(0, 18, 3)]
    assert all(sorted(r) == [0, 1, 2] for r in rounds) and len(set(rounds)) > 1


WEIGHTS = [
    {"a": 3, "b": 2},
    {"a": 0.25, "c": 0.5},
    {"b": 0},
    {"a": 30, "b": 20, "c": 13},
    {"a": 1 / 3, "b": 2 / 3},
]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_stores_come_as_often_as_their_weights_say(stores: list[Store], weights: dict[str, float]) -> None:
    """Exactly after every round, within two turns at any time, and in an order that changes from round to round."""
    windows = Windows(stores, "p", 2, cache=True, weights=weights)
    share = np.array([weights.get(store.family, 1.0) for store in stores])
    share = share / share.sum()
    length = next(n for n in range(1, 100) if np.allclose(n * share, np.rint(n * share)))
    order = np.array([drawn(windows, step)[0] for step in range(6 * length)])
    counts = (order[:, None] == np.arange(3)).cumsum(0)
    assert np.array_equal(counts[length - 1 :: length], np.rint(np.outer(np.arange(1, 7), length * share)))
    assert np.abs(counts - np.outer(np.arange(1, len(order) + 1), share)).max() < 2
    rounds = {tuple(order[i : i + length]) for i in range(0, len(order), length)}
    assert len(rounds) > 1


def test_weights_leave_epochs_resumption_and_ranks_alone(stores: list[Store]) -> None:
    windows = Windows(stores, "p", 2, weights={"a": 3, "b": 0.5})
    steps = [drawn(windows, step) for step in range(72)]
    again = Windows([open_store(s.path) for s in stores], "p", 2, weights={"b": 0.5, "a": 3})
    assert [drawn(again, step) for step in (71, 3, 40)] == [steps[71], steps[3], steps[40]]
    seen = Counter(
        (i, s) for store, trajectories, starts in steps for i, s in zip(trajectories, starts, strict=True) if store == 0
    )
    assert [step[0] for step in steps].count(0) == 48 and set(seen.values()) == {
        8
    }  # 24 windows, 6 batches of 4: 8 epochs
    for step in range(6):
        halves = [windows.sample(step, 4, seed=5, rank=rank, world=2) for rank in range(2)]
        assert {half.store for half in halves} == {steps[step][0]}
        assert torch.cat([half.starts for half in halves]).tolist() == steps[step][2]


def test_equal_weights_are_the_default(stores: list[Store]) -> None:
    plain, weighted = Windows(stores, "p", 2), Windows(stores, "p", 2, weights={"a": 7, "b": 7.0, "c": 7})
    assert [drawn(plain, step) for step in range(12)] == [drawn(weighted, step) for step in range(12)]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"d": 1}, r"weights of the families \['a', 'b', 'c'\], got one of 'd'"),
        ({"a": -1}, r"finite numbers ≥ 0, got \[-1, 1.0, 1.0\]"),
        ({"a": float("nan")}, "finite numbers ≥ 0"),
        ({"a": float("inf")}, "finite numbers ≥ 0"),
        ({"a": "2"}, "finite numbers ≥ 0"),
        ({"a": True}, "finite numbers ≥ 0"),
        ({"a": 0, "b": 0, "c": 0.0}, "at least one weight above 0"),
        (3, r"weights by family, such as \{a: 2\}, got 3"),
        ([1, 2, 3], "weights by family"),
    ],
)
def test_weights_that_make_no_sense_are_refused(
    stores: list[Store], weights: Any, message: str, unchecked: None
) -> None:
    with pytest.raises(ValueError, match=message):
        Windows(stores, "p", 2, weights=weights)


@pytest.mark.parametrize("weights", [[np.pi, 1.0], [1e-9, 1.0, 0.5], [12345, 678, 91011], [1e300, 1e300, 0]])
def test_any_weights_become_turns(weights: list[float]) -> None:
    """Ratios of large numbers to one turn in a round of 10,000, and nobody with a weight is left out."""
    counts, share = np.array(Turns(weights).counts), np.array(weights) / max(weights)
    np.testing.assert_allclose(counts / counts.sum(), share / share.sum(), atol=2e-4)
    assert ((counts > 0) == (share > 0)).all()


def test_a_store_that_is_never_drawn_may_be_small(stores: list[Store]) -> None:
    windows = Windows(stores, "p", 2, weights={"b": 0})
    windows.check_batch(24)
    assert {drawn(windows, step, batch=24)[0] for step in range(9)} == {0, 2}
    with pytest.raises(ValueError, match="batch of at most 10"):
        Windows(stores, "p", 2).check_batch(24)


def test_an_epoch_has_every_window_once_and_the_next_another_order(stores: list[Store]) -> None:
    windows = Windows(stores[:1], "p", 2)
    epochs = []
    for epoch in range(2):
        batches = [drawn(windows, 6 * epoch + i) for i in range(6)]
        epochs.append([pair for _, i, s in batches for pair in zip(i, s, strict=True)])
    assert all(Counter(e) == Counter((i, s) for i in range(3) for s in range(8)) for e in epochs)
    assert epochs[0] != epochs[1]


def test_misuse_is_refused(stores: list[Store]) -> None:
    with pytest.raises(ValueError, match="at least one store"):
        Windows([], "p", 2)
    with pytest.raises(ValueError, match="length ≥ 1 and stride ≥ 1, got 2 and 0"):
        Windows(stores, "p", 2, stride=0)
    with pytest.raises(ValueError, match=r"a field 'u' in .*got \['p'\]"):
        Windows(stores, "u", 2)
    with pytest.raises(ValueError, match="at least 7 snapshots for windows of 4 with stride 2, got 6"):
        Windows(stores, "p", 4, stride=2)
    with pytest.raises(ValueError, match="trajectories for 3 stores, got 1"):
        Windows(stores, "p", 2, trajectories=[[0]])
    for wrong in ([3], [], [0, 0]):
        with pytest.raises(ValueError, match="different trajectories from 0 to 2"):
            Windows(stores, "p", 2, trajectories=[wrong, [0], [0]])
    windows = Windows(stores[1:2], "p", 2)
    with pytest.raises(ValueError, match="batch of at most 10, .*choose a smaller batch"):
        windows.sample(0, 11, seed=0)
    with pytest.raises(ValueError, match="batch that is a multiple of world"):
        windows.sample(0, 5, seed=0, rank=0, world=2)
    with pytest.raises(ValueError, match="rank < world"):
        windows.sample(0, 4, seed=0, rank=2, world=2)


@pytest.mark.parametrize(("n", "held_out", "number"), [(10, 0.2, 2), (10, 3, 3), (4, 0.01, 1), (2, 1, 1)])
def test_split_holds_out_the_last(n: int, held_out: float, number: int) -> None:
    train, test = split(n, held_out)
    assert train + test == list(range(n)) and len(test) == number


@pytest.mark.parametrize(("n", "held_out"), [(1, 0.5), (3, 3), (3, 0), (3, -1), (3, 1.0), (3, 0.9)])
def test_split_needs_something_on_both_sides(n: int, held_out: float) -> None:
    with pytest.raises(ValueError, match="Expected held_out to be a share between 0 and 1 or a number from 1 to"):
        split(n, held_out)
