"""What goes wrong on a cluster, made to go wrong: each has one clear message, and nothing that was saved is lost."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from ranks import latentphys, started, wait
from safetensors.torch import load_file
from small import Road, arguments, assert_bit_equal, spoil, train

from latentphys import info_run
from latentphys.cli import INTERRUPTED, main
from latentphys.data import Windows
from latentphys.training import open_checkpoint
from latentphys.training.control import PREEMPTED
from latentphys.training.ema import EMA
from latentphys.training.loop import Loop
from latentphys.training.tasks import DynamicsTask, Output

KINDS = ("autoencoder", "dynamics")
LAUNCH = Path(__file__).parent.parent / "configs" / "accelerate" / "cpu_2proc.yaml"


def status(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())


def events(run: Path) -> list[str]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line["event"] for line in lines if "event" in line]


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[Loop], object]) -> None:
    """Do something once, when a training step begins."""
    step = Loop._step

    def acting(self: Loop, n: int, *given: Any) -> None:
        if n == number:
            act(self)
        step(self, n, *given)

    monkeypatch.setattr(Loop, "_step", acting)


def test_windows_that_are_not_finite_are_skipped_counted_and_listed(
    road: Road, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of every epoch's fifteen windows have a NaN; the weights never see it."""
    stores, run = road.inputs("dynamics")[:1], tmp_path / "run"
    read = Windows.read

    def poisoned(self: Windows, store: int, trajectory: int, start: int, out: Any = None) -> torch.Tensor:
        window = read(self, store, trajectory, start, out)
        return window.fill_(math.nan) if trajectory == 0 and start in (1, 3) and len(self) == 15 else window

    monkeypatch.setattr(Windows, "read", poisoned)
    settings = ["trainer.batch_size=1", "trainer.num_steps=45", "trainer.spike=0", "trainer.log_every=15"]
    train("dynamics", stores, run, *settings)
    dumped = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
    assert sorted((*line["trajectories"], *line["starts"]) for line in dumped) == [(0, 1)] * 3 + [(0, 3)] * 3
    assert {line["store"] for line in dumped} == {str(stores[0])}
    assert [line for line in events(run) if line.startswith("skipped step")] == events(run) and len(events(run)) == 6
    assert "the loss of open_channel is nan (store 0, trajectories [0])" in events(run)[0]
    state, weights = open_checkpoint(run).state, load_file(open_checkpoint(run).path / "model.safetensors")
    assert state["guard"]["total"] == 6 and all(tensor.isfinite().all() for tensor in weights.values())
    with pytest.raises(FloatingPointError, match="at most 2 skipped steps among the last 100, .* is nan .*is intact"):
        train("dynamics", stores, tmp_path / "other", *settings, "trainer.max_skipped=2")
    assert status(tmp_path / "other")["state"] == "failed"


def test_a_leap_of_the_loss_is_skipped(road: Road, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Windows.read

    def leaping(self: Windows, store: int, trajectory: int, start: int, out: Any = None) -> torch.Tensor:
        window = read(self, store, trajectory, start, out)
        window[-1] *= 1e3 if (trajectory, start, len(self)) == (1, 2, 15) else 1.0
        return window

    updated: list[int] = []
    balanced: list[Output] = []
    update, after_step = EMA.update, DynamicsTask.after_step

    def updating(self: EMA, model: torch.nn.Module, step: int) -> None:
        updated.append(step)
        update(self, model, step)

    def balancing(self: DynamicsTask, output: Output) -> None:
        balanced.append(output)
        after_step(self, output)

    settings = ["trainer.batch_size=1", "trainer.num_steps=45", "trainer.log_every=15", "trainer.ema=0.9"]
    stores = road.inputs("dynamics")[:1]
    monkeypatch.setattr(Windows, "read", leaping)
    monkeypatch.setattr(EMA, "update", updating)
    monkeypatch.setattr(DynamicsTask, "after_step", balancing)
    run = tmp_path / "run"
    train("dynamics", stores, run, *settings)
    dumped = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
    # Once in every fifteen steps; the first time there is nothing yet to compare it with.
    assert [(line["trajectories"], line["starts"]) for line in dumped] == [([1], [2])] * 2
    assert all("leapt to" in line["reason"] for line in dumped)
    # Neither the average nor the routers' biases know of them.
    assert updated == sorted(set(range(45)) - {line["step"] for line in dumped}) and len(balanced) == 43


def test_a_store_that_vanishes_stops_the_run_with_all_it_learnt(
    road: Road, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["cache=false", "trainer.num_steps=8"]
    store, away = (Path(shutil.copytree(road.fields["porous"], tmp_path / "porous.zarr")), tmp_path / "away.zarr")
    whole = train("autoencoder", [store], tmp_path / "whole", *settings)
    run = tmp_path / "run"

    def vanish(loop: Loop) -> None:
        store.rename(away)
        for reader in (loop.task.stores()[0]._readers, loop.task.stores()[0]._handles):
            reader.clear()  # open files would outlive their names

    with monkeypatch.context() as patched:
        at_step(patched, 3, vanish)
        with pytest.raises(
            OSError,
            match=r"Expected the windows of step [45], got: .*Restore the store: the run is saved at step [45],",
        ):
            train("autoencoder", [store], run, *settings)
    assert status(run)["state"] == "failed" and open_checkpoint(run).step == status(run)["step"] in (4, 5)
    away.rename(store)
    assert train("autoencoder", [store], run, *settings).name == whole.name
    assert_bit_equal(run, tmp_path / "whole")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("number", "code", "state"),
    [
        (signal.SIGTERM, PREEMPTED, "preempted"),
        (signal.SIGUSR1, PREEMPTED, "preempted"),
        (signal.SIGINT, INTERRUPTED, "interrupted"),
    ],
)
def test_a_run_that_is_asked_to_stop_saves_itself_and_goes_on(
    road: Road,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    number: signal.Signals,
    code: int,
    state: str,
) -> None:
    """Between two checkpoints; in the program's own process, whose handlers come back."""
    run, settings, before = tmp_path / "run", ["trainer.checkpoint_every=6"], signal.getsignal(number)
    line = ["train", *arguments(kind, road.inputs(kind), run, *settings)]
    with monkeypatch.context() as patched:
        at_step(patched, 2, lambda _: os.kill(os.getpid(), number))
        assert main(line) == code
    assert signal.getsignal(number) is before
    assert status(run) | {"state": state, "step": 3} == status(run) and open_checkpoint(run).step == 3
    assert "the run is saved at step 3, and the same command goes on from there" in capsys.readouterr().err
    assert main(line) == 0
    assert status(run)["state"] == "done"
    assert_bit_equal(run, road.autoencoder.parent / kind)


@contextmanager
def two_processes(road: Road, run: Path) -> Iterator[subprocess.Popen[str]]:
    """A long run of two ranks under a launcher, once it has taken a step; nothing of it outlives the block."""
    settings = [f"trainer.{name}=5000" for name in ("num_steps", "test_every", "checkpoint_every")]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(LAUNCH), "-m", "latentphys"]
    line = [*launch, "train", *arguments("dynamics", road.inputs("dynamics"), run, *settings, "trainer.log_every=1")]
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    everybody = [psutil.Process(process.pid)]
    try:
        deadline = time.monotonic() + 120
        while not (run / "log.jsonl").is_file() or not (run / "log.jsonl").read_text():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        everybody += everybody[0].children(recursive=True)
        yield process
    finally:
        for one in everybody:
            with suppress(psutil.NoSuchProcess):
                one.kill()


def ranks(process: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """The ranks below a launcher."""
    found = {child.environ().get("RANK"): child for child in psutil.Process(process.pid).children(recursive=True)}
    return {int(rank): child for rank, child in found.items() if rank is not None}


def test_two_processes_stop_together_when_one_is_asked_to(road: Road, tmp_path: Path) -> None:
    """Under a launcher only one rank hears the signal; both save and stop, and the run directory says why."""
    run = tmp_path / "run"
    with two_processes(road, run) as process:
        ranks(process)[1].send_signal(signal.SIGUSR1)
        _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and "SIGUSR1: the run is saved at step" in errors
    assert json.loads((run / "environment.json").read_text())["starts"][-1]["processes"] == 2
    assert status(run)["state"] == "preempted"
    assert open_checkpoint(run).step == status(run)["step"] > 0


def test_a_rank_that_is_lost_ends_the_run_and_does_not_hang_it(road: Road, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with two_processes(road, run) as process:
        ranks(process)[1].kill()
        process.communicate(timeout=60)
    assert process.returncode != 0
    assert status(run)["state"] == "failed" or info_run.state(run) == "killed"
    assert not psutil.pid_exists(process.pid)


def test_a_corrupt_checkpoint_gives_way_to_the_one_before(road: Road, tmp_path: Path) -> None:
    run = Path(shutil.copytree(road.dynamics, tmp_path / "run"))
    spoil(run / "step-000006")
    with pytest.warns(UserWarning, match="step-000006"):
        train("dynamics", road.inputs("dynamics"), run)
    assert_bit_equal(run, road.dynamics)
    assert [path.name for path in run.glob("corrupt-*")] == ["corrupt-step-000006"]


def test_a_run_of_another_model_or_of_other_data_is_refused(road: Road, tmp_path: Path) -> None:
    run = Path(shutil.copytree(road.dynamics, tmp_path / "run"))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    stores = road.inputs("dynamics")
    with pytest.raises(ValueError, match=r"dynamics\.dim.*32.*48.*resume=false"):
        train("dynamics", stores, run, "trainer.num_steps=8", "dynamics.dim=48")
    with pytest.raises(ValueError, match="data"):
        train("dynamics", stores[:1], run, "trainer.num_steps=8")
    assert {path: path.read_bytes() for path in before} == before
    with pytest.warns(UserWarning, match=r"trainer\.learning_rate"):
        train("dynamics", stores, run, "trainer.num_steps=7", "trainer.learning_rate=1e-4")


def test_two_runs_in_one_directory_are_one_too_many(
    road: Road, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, refused = tmp_path / "run", []

    def second(_: Loop) -> None:
        line = ["train", *arguments("dynamics", road.inputs("dynamics"), run)]
        with started(latentphys, tmp_path, line) as processes:
            refused.extend(wait(processes))

    at_step(monkeypatch, 3, second)
    train("dynamics", road.inputs("dynamics"), run)
    assert refused == [2] and "Expected nobody else to write to" in (tmp_path / "said0.err").read_text()
    assert_bit_equal(run, road.dynamics)


def test_a_full_disk_keeps_the_checkpoint_before(road: Road, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from latentphys.training import checkpoint

    save_file = checkpoint.save_file

    def full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if "step-000004" in str(path) and path.name.startswith("optimizer"):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save_file", full)
        with pytest.raises(OSError, match="free"):
            train("dynamics", road.inputs("dynamics"), run)
    assert status(run)["state"] == "failed" and open_checkpoint(run).step == 3
    assert not list(run.glob(".*partial*"))
    train("dynamics", road.inputs("dynamics"), run)
    assert_bit_equal(run, road.dynamics)


def test_experts_that_no_token_comes_to_are_named(road: Road, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias that no score overcomes keeps three of four experts without tokens."""
    made = DynamicsTask.__init__

    def biased(self: DynamicsTask, *given: Any, **named: Any) -> None:
        made(self, *given, **named)
        for router in self.routers():
            router.bias_E.copy_(torch.tensor([1e3, 0.0, 0.0, 0.0]))

    monkeypatch.setattr(DynamicsTask, "__init__", biased)
    run = tmp_path / "run"
    train("dynamics", road.inputs("dynamics"), run, "dynamics_training.balance_rate=0", "trainer.dead_after=4")
    assert sorted(events(run)) == [
        f"expert {e} of layer {layer} has taken no token for 4 steps" for e in (1, 2, 3) for layer in (0, 1)
    ]


def test_training_stops_when_tests_no_longer_fall(road: Road, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = ["trainer.num_steps=40", "trainer.test_every=1", "trainer.patience=3", "trainer.learning_rate=1e-12"]
    settings += ["trainer.checkpoint_every=40"]
    last = train("dynamics", road.inputs("dynamics"), run, *settings)
    state = open_checkpoint(run)
    assert last == state.path and 4 <= state.step < 40
    assert "stopped early" in events(run)[-1] and status(run)["state"] == "done"
    best = json.loads((run / "best.json").read_text())["checkpoint"]
    assert open_checkpoint(run / "best").path.name == best
    assert state.step == open_checkpoint(run / "best").step + 3 and state.state["tests_without_best"] == 3
    assert train("dynamics", road.inputs("dynamics"), run, *settings).name == last.name
    with pytest.warns(UserWarning, match=r"trainer\.patience"):
        train("dynamics", road.inputs("dynamics"), run, *settings, "trainer.patience=5")
    assert open_checkpoint(run).step == state.step + 2 and open_checkpoint(run).state["best"] == state.state["best"]
