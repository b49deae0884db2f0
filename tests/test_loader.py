"""Batches read ahead, in a thread or in spawned workers, are those that training would have read itself."""

import threading

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from latentphys.data import Batch, Batches, Store, Windows, create_store, open_store
from latentphys.data.batches import ahead
from latentphys.fields import VELOCITY
from latentphys.grid import Grid

NUM_STEPS = 7


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[Store]:
    folder, rng = tmp_path_factory.mktemp("loader"), np.random.default_rng(0)
    for name, dtype in (("a", "float32"), ("b", "float64")):
        with create_store(
            folder / name,
            grid=Grid((4, 3, 2), (1.0, 1.0, 1.0)),
            specs={"velocity": VELOCITY},
            family=name,
            num_trajectories=3,
            times=range(5),
            dtype=dtype,
        ) as out:
            for i in range(3):
                out.write("velocity", i, slice(None), rng.standard_normal((5, 3, 4, 3, 2)).astype(dtype))
    return [open_store(folder / name) for name in "ab"]


def assert_same(got: list[Batch], expected: list[Batch]) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert one.store == other.store and one.values.dtype == torch.float32
        for name in ("values", "trajectories", "starts"):
            assert torch.equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("cache", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_spawned_workers_read_the_same_batches(stores: list[Store], cache: bool) -> None:
    windows = Windows(stores, "velocity", 2, cache=cache, weights={"a": 2})
    batches = Batches(windows, 4, seed=3)
    loader = DataLoader(
        batches, batch_size=None, sampler=range(2, NUM_STEPS), num_workers=2, multiprocessing_context="spawn"
    )
    assert_same(list(loader), [windows.sample(step, 4, seed=3) for step in range(2, NUM_STEPS)])


def test_windows_are_the_stored_numbers_in_fp32(stores: list[Store]) -> None:
    windows = Windows(stores, "velocity", 3, stride=2)
    for step in range(4):
        batch = windows.sample(step, 3, seed=0)
        for i, start, values in zip(batch.trajectories.tolist(), batch.starts.tolist(), batch.values, strict=True):
            stored = stores[batch.store].array("velocity")[i, start : start + 5 : 2]
            assert np.array_equal(values.numpy(), np.asarray(stored).astype(np.float32))


def test_what_is_read_ahead_comes_in_order_and_one_step_early() -> None:
    begun: list[int] = []
    second = threading.Event()

    def work(step: int) -> int:
        begun.append(step)
        if step == 3:
            second.set()
        return step**2

    results = ahead(work, range(2, 6))
    assert begun == []
    assert next(results) == 4
    assert second.wait(10) and begun == [2, 3]
    assert list(results) == [9, 16, 25] and begun == [2, 3, 4, 5]
    assert list(ahead(work, range(0))) == []


def test_an_error_comes_with_its_own_step() -> None:
    results = ahead(lambda step: 1 // (2 - step), range(4))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_a_batch_that_is_too_large_is_refused_at_once(stores: list[Store]) -> None:
    with pytest.raises(ValueError, match="batch of at most 12, the windows of"):
        Batches(Windows(stores, "velocity", 2), 13, seed=0)


def test_reading_ahead_takes_no_threads_from_the_work() -> None:
    """A second team of OpenMP threads on the same cores would slow every operation of the first."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert list(ahead(lambda step: torch.get_num_threads(), range(3))) == [1, 1, 1]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
