"""Encoding streams, and comes out the same to the last bit whoever does it and however often it is interrupted."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from encoding import BATCH, NUM_TIMES, NUM_TRAJECTORIES, SHARD, SHARD_BYTES, Case, make_autoencoder, make_store
from ranks import run_ranks
from reference import box
from store_files import content
from torch import Tensor

from latentphys import workers
from latentphys.autoencoders import Autoencoder
from latentphys.cli import main
from latentphys.data import Part, Store, open_store, plan
from latentphys.training import encode_jobs, encode_ranks, encode_store, load_autoencoder

HAS_FORK = "fork" in multiprocessing.get_all_start_methods()


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "SHARD_BYTES", SHARD_BYTES)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(plan, "SHARD_BYTES", SHARD_BYTES)
        return Case(tmp_path_factory.mktemp("encode"))


def test_latents_are_those_of_each_snapshot_and_say_where_they_come_from(case: Case) -> None:
    latents, model = open_store(case.whole), load_autoencoder(case.checkpoint)
    assert latents.array("latent").shards == (1, SHARD, 8, 4, 4, 4)
    for i in range(NUM_TRAJECTORIES):
        states = [case.store[i, t] for t in range(NUM_TIMES)]
        packed = [torch.cat([s.velocity, s.fields["temperature"][None]])[None] for s in states]
        with torch.no_grad():
            expected = torch.cat([model.encode(x, case.store.geometry(i), "random") for x in packed])
        torch.testing.assert_close(latents.read("latent", i, slice(None)), expected, rtol=1e-5, atol=1e-5)
    about = latents.attributes
    assert about["source"] == str(case.store.path.resolve()) and about["checkpoint"] == str(case.checkpoint.resolve())
    assert (about["kind"], about["layout"], about["channels"]) == ("latent", "latent", 8)
    assert about["provenance"] | {"batch_size": BATCH, "threads": 1, "device": "cpu"} == about["provenance"]


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Trajectory, first and last + 1 snapshot of every batch that is encoded in this process."""
    encode, seen = encode_jobs.encode_frames, []

    def encode_frames(model: Autoencoder, store: Store, i: int, frames: slice, *rest: Any) -> dict[str, Tensor]:
        seen.append((i, frames.start, frames.stop))
        return encode(model, store, i, frames, *rest)

    monkeypatch.setattr(encode_jobs, "encode_frames", encode_frames)
    return seen


def test_batches_begin_with_shards(case: Case, tmp_path: Path, batches: list[tuple[int, int, int]]) -> None:
    """They are the same for all trajectories, and for a run that goes on: bits that depend on them cannot differ."""
    case.check(case.encode(tmp_path / "a.zarr"))
    once = [(0, 3), (3, 4), (4, 7), (7, 8), (8, 11)]
    assert batches == [(i, *frames) for i in range(NUM_TRAJECTORIES) for frames in once]


def test_threads_are_those_asked_for_and_come_back(case: Case, tmp_path: Path, monkeypatch: Any) -> None:
    """Whatever torch was set to before: bits depend on it."""
    encode, seen = encode_jobs.encode_frames, set()

    def encode_frames(*arguments: Any) -> dict[str, Tensor]:
        seen.add(torch.get_num_threads())
        return encode(*arguments)

    monkeypatch.setattr(encode_jobs, "encode_frames", encode_frames)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        case.check(case.encode(tmp_path / "a.zarr"))
        assert seen == {1} and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("n", "size"), [(16, 512), (64, 8), (128, 1), (256, 1)])
def test_the_default_batch_is_bounded_in_cells(n: int, size: int) -> None:
    assert encode_jobs.default_batch_size(box("periodic", (n, n, n))) == size


def encode_as_rank(command: list[str], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    sys.exit(main(command))


@pytest.mark.skipif(not HAS_FORK, reason="no fork on this system")
def test_two_ranks_write_what_one_process_writes(case: Case, tmp_path: Path, capfd: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    out, fork = tmp_path / "a.zarr", multiprocessing.get_context("fork")
    commands = [(case.command(out), {**meeting, "RANK": str(rank)}) for rank in range(2)]
    ranks = [fork.Process(target=encode_as_rank, args=arguments) for arguments in commands]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=60)
        rank.kill()
    said = capfd.readouterr()
    assert [rank.exitcode for rank in ranks] == [0, 0], said.err
    assert said.out == f"{out}\n" and "encode random, 2 of 3 trajectories" in said.err
    case.check(out)


def encode_and_die(case: Case, out: Path, snapshots: int) -> None:
    """In a process of its own: ends by ``kill -9`` once so many snapshots are done."""
    count = 0

    def progress(num_snapshots: int) -> None:
        nonlocal count
        count += num_snapshots
        if count >= snapshots:
            os.kill(os.getpid(), signal.SIGKILL)

    case.encode(out, progress=progress)


@pytest.mark.skipif(not HAS_FORK, reason="no fork on this system")
@pytest.mark.parametrize(("snapshots", "kept"), [(4, 0), (7, 4), (11, 11), (19, 15), (33, 33)])
def test_work_goes_on_after_kill_9(
    case: Case, tmp_path: Path, snapshots: int, kept: int, batches: list[tuple[int, int, int]]
) -> None:
    """Killed before a shard is on record, after one, and at the very end; whole shards are never encoded again."""
    out = tmp_path / "a.zarr"
    process = multiprocessing.get_context("fork").Process(target=encode_and_die, args=(case, out, snapshots))
    process.start()
    process.join(timeout=60)
    assert process.exitcode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".a.zarr.partial"]
    done: list[int] = []
    case.check(case.encode(out, progress=done.append))
    assert sum(done) == NUM_TRAJECTORIES * NUM_TIMES
    assert sum(stop - start for _, start, stop in batches) == NUM_TRAJECTORIES * NUM_TIMES - kept


@pytest.mark.parametrize(
    "start",
    [
        pytest.param("fork", marks=pytest.mark.skipif(not HAS_FORK, reason="no fork on this system")),
        pytest.param("spawn", marks=pytest.mark.slow),
    ],
)
def test_two_processes_go_on_with_what_one_left(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str
) -> None:
    """A trajectory that is done, one that is begun and one that is not, to the bits of a single process.

    Forked processes are there sooner; those that users get are spawned.
    """
    interrupt(case, out := tmp_path / "a.zarr", snapshots=16)
    context = multiprocessing.get_context(start)
    monkeypatch.setattr(workers.multiprocessing, "get_context", lambda _: context)
    done: list[int] = []
    case.check(case.encode(out, workers=2, progress=done.append))
    assert sum(done) == NUM_TRAJECTORIES * NUM_TIMES and {11, 4, 0} <= set(done)


def interrupt(case: Case, out: Path, snapshots: int, **changes: Any) -> None:
    """Encode so many snapshots and stop."""
    count = 0

    def progress(num_snapshots: int) -> None:
        nonlocal count
        count += num_snapshots
        if count >= snapshots:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        case.encode(out, progress=progress, **changes)


def test_what_was_begun_with_other_settings_is_refused(case: Case, tmp_path: Path) -> None:
    out, partial = tmp_path / "a.zarr", tmp_path / ".a.zarr.partial"
    interrupt(case, out, snapshots=14)
    before = content(partial / "store")
    said = f"the description that {partial} was begun with, got another .*{{}}.*; delete that folder to begin anew"
    with pytest.raises(ValueError, match=said.format("checkpoint, provenance weights")):
        case.encode(out, checkpoint=str(case.other))
    with pytest.raises(ValueError, match=said.format(r"provenance batch_size .provenance batch_size: 3 there, 2 here")):
        case.encode(out, batch_size=2)
    with pytest.raises(ValueError, match=said.format("provenance threads")):
        case.encode(out, threads=2)
    assert content(partial / "store") == before
    case.check(case.encode(out))


def test_other_weights_or_fields_under_the_same_paths_are_refused(case: Case, tmp_path: Path) -> None:
    out, moved = tmp_path / "a.zarr", tmp_path / "autoencoder"
    moved.symlink_to(case.checkpoint)
    interrupt(case, out, snapshots=14)
    attributes = case.store.attributes["checksums"]
    changed = open_store(case.store.path)
    changed.attributes["checksums"] = {**attributes, "velocity": attributes["velocity"][::-1]}
    with pytest.raises(ValueError, match=r"begun with, got another provenance fields"):
        encode_store(load_autoencoder(moved), changed, out, checkpoint=str(moved), batch_size=BATCH)


@pytest.mark.parametrize(("snapshots", "resume"), [(3, True), (14, False)])
def test_nothing_is_left_where_there_is_nothing_to_go_on_from(
    case: Case, tmp_path: Path, snapshots: int, resume: bool
) -> None:
    interrupt(case, tmp_path / "a.zarr", snapshots, resume=resume)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_has_status_130_and_the_same_command_goes_on(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, put = tmp_path / "a.zarr", Part.checkpoint

    def checkpoint_and_be_interrupted(part: Part, trajectory: int) -> int:
        put(part, trajectory)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError

    with monkeypatch.context() as patched:
        patched.setattr(Part, "checkpoint", checkpoint_and_be_interrupted)
        assert main(case.command(out)) == 130
    assert "latentphys encode: interrupted; the same command goes on\n" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [".a.zarr.partial"]
    assert main(case.command(out)) == 0
    assert capsys.readouterr().out == f"{out}\n"
    case.check(out)
    assert main(case.command(out)) == 2
    assert main(case.command(out, "--overwrite")) == 0
    case.check(out)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size ≥ 1 and threads ≥ 1, got 0 and 1"),
        ({"threads": 0}, "batch_size ≥ 1 and threads ≥ 1, got 3 and 0"),
        ({"workers": 0}, "at least one worker, .*, got 0"),
        ({"workers": 2, "together": True}, "one worker in each process of a launch, got workers=2; start more ranks"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    case: Case, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"Expected {message}"):
        case.encode(tmp_path / "a.zarr", **settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers=0"], "argument --workers: Expected a number ≥ 1, got '0'"),
        (["--threads=two"], "argument --threads: Expected a number ≥ 1, got 'two'"),
        (["--device=gpu"], "argument --device: invalid choice: 'gpu'"),
        (["--workers=2", "--dask=tcp://host:8786"], "--dask: not allowed with argument --workers"),
    ],
)
def test_options_that_cannot_be_are_refused(
    case: Case, tmp_path: Path, options: Sequence[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(case.command(tmp_path / "a.zarr", *options))
    assert message in capsys.readouterr().err


def test_no_gpu_is_said_to_be_none(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(case.command(tmp_path / "a.zarr", "--device=cuda")) == 2
    assert "Expected a GPU that torch can use for --device cuda, got none; use --device cpu." in capsys.readouterr().err


@pytest.mark.parametrize(("index", "device"), [(0, "cuda:0"), (5, "cuda:1")])
def test_workers_share_gpus_in_turn(monkeypatch: pytest.MonkeyPatch, index: int, device: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert encode_jobs.nth_device("cuda", index) == torch.device(device)
    assert encode_jobs.nth_device("cpu", index) == torch.device("cpu")


def test_memory_holds_a_batch_and_not_a_trajectory(case: Case, tmp_path: Path) -> None:
    num_bytes, times = 4 * 16**3 * 8, 40
    store = make_store(tmp_path / "long.zarr", num_trajectories=1, num_times=times)
    model = load_autoencoder(case.checkpoint)
    tracemalloc.start()
    try:
        encode_store(model, store, tmp_path / "latent.zarr", checkpoint=str(case.checkpoint), batch_size=2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 2 * num_bytes < peak < times / 4 * num_bytes


MEMORY = """
import re, sys
from pathlib import Path
from latentphys.data import open_store, plan
from latentphys.training import encode_store, load_autoencoder
plan.SHARD_BYTES = 2**18
checkpoint, path, out = sys.argv[1:]
seen = []
def look(num_snapshots):
    seen.append(int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]))
encode_store(load_autoencoder(checkpoint), open_store(path), out, checkpoint=checkpoint, batch_size=2, progress=look)
print(max(seen[3:]) - seen[3])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no /proc on this system")
def test_memory_does_not_grow_with_the_store(tmp_path: Path) -> None:
    """Kilobytes that a process takes beyond those after three of twelve batches of 17 MB; pages of files are free."""
    store = make_store(tmp_path / "a.zarr", num_trajectories=1, num_times=24, n=64)
    path = make_autoencoder(tmp_path / "autoencoder", store)
    command = [sys.executable, "-c", MEMORY, *map(str, (path, store.path, tmp_path / "out.zarr"))]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(said) < 30_000, said


def test_ranks_learn_that_the_first_could_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_ranks.dist, "broadcast_object_list", lambda *_, **__: None)
    with pytest.raises(ValueError, match="Expected rank 0 to begin the store, got an error there; see what it says"):
        encode_ranks._follow(lambda *_: None, None)


RANKS = """
import sys
from latentphys.data import plan
from latentphys.cli import main
plan.SHARD_BYTES = int(sys.argv[1])
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_a_lost_rank_ends_the_others_and_leaves_what_is_done(case: Case, tmp_path: Path) -> None:
    program, out = tmp_path / "program", tmp_path / "a.zarr"
    program.mkdir()
    dying = RANKS.replace("sys.exit", DYING)
    with pytest.raises(AssertionError, match="Expected every process to do its share, got one that is lost"):
        run_ranks(dying, program, str(SHARD_BYTES), *case.command(out))
    assert (tmp_path / ".a.zarr.partial").is_dir() and not out.exists()
    assert run_ranks(RANKS, program, str(SHARD_BYTES), *case.command(out)) == [f"{out}\n", ""]
    case.check(out)


DYING = """
import os, signal
from latentphys.data import Part
put = Part.checkpoint
def checkpoint(part, trajectory):
    put(part, trajectory)
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
Part.checkpoint = checkpoint
sys.exit"""
