"""The benchmarks of training run and print JSON alone; the one that kills runs sees every bit that differs."""

import importlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
FAMILY = """
import subprocess, sys, time
if "child" in sys.argv:
    time.sleep(60)
subprocess.Popen([sys.executable, __file__, "child"], start_new_session=True)
time.sleep(60)
"""


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module that kills runs and compares them."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("killed_runs")


def bench(program: str, *options: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / program), "--threads", "1", "--json", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=280, env=environment)


def lines(process: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    machine, *found = [json.loads(line) for line in process.stdout.splitlines()]
    assert machine["threads"] == 1 and all(line["machine"]["cpu"] for line in found)
    assert len({line["name"] for line in found}) == len(found)
    return {line["name"]: line for line in found}


def test_costs_of_training_are_printed_as_json_alone(tmp_path: Path) -> None:
    options = ["--size", "micro", "--rounds", "1", "--steps", "2", "--experts", "4", "--folder", str(tmp_path)]
    process = bench("bench_training.py", *options, "--parts", "overhead", "data", "rates", "experts", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    found = lines(process)
    assert set(found) == {
        *("trainer_overhead", "data_wait", "data_wait_uncached", "top1_e4_over_dense"),
        *(f"{name}_{kind}" for name in ("steps_per_s", "mfu_of_measured_gemm") for kind in ("dense", "top1")),
    }
    assert all(math.isfinite(line["value"]) and line["value"] > 0 for line in found.values())
    assert all(found[name]["value"] < 1 for name in found if name.startswith(("mfu", "data_wait")))
    ratio = found["trainer_overhead"]
    assert ratio["value"] == pytest.approx(ratio["ms"] / ratio["reference_ms"])
    rates = found["steps_per_s_top1"]
    assert rates["tokens_per_s"] == pytest.approx(4 * 4**3 * rates["value"])
    assert rates["flops_per_s"] == pytest.approx(rates["flops_per_step"] * rates["value"])
    assert not list(tmp_path.iterdir())


def make_run(folder: Path) -> Path:
    """What a training run leaves, as far as it is compared."""
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(2)}
    for step in ("step-000004", "step-000006"):
        (folder / step / "autoencoder").mkdir(parents=True)
        for file in ("model", "ema", "optimizer", "autoencoder/model"):
            save_file(tensors, folder / step / f"{file}.safetensors")
        (folder / step / "checkpoint.json").write_text(json.dumps({"step": 6, "state": {"best": 0.1}}))
    (folder / "last.json").write_text(json.dumps({"checkpoint": "step-000006"}))
    (folder / "best.json").write_text(json.dumps({"checkpoint": "step-000004"}))
    (folder / "status.json").write_text(json.dumps({"state": "done"}))
    log: list[dict[str, Any]] = [
        {"step": n, "loss": 1 / n, "seconds": 0.1 * n, "routing": [{"load": [0.5, 0.5], "dead_age": [n]}]}
        for n in (1, 2)
    ]
    log.append({"step": 2, "event": "skipped step 2: the loss leapt", "seconds": 0.3})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    return folder


def change_tensor(file: str, key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def act(run: Path) -> None:
        path = run / "step-000006" / file
        tensors = load_file(path)
        save_file({**tensors, key: change(tensors[key])}, path)

    return act


def replace_text(file: str, old: str, new: str) -> Callable[[Path], None]:
    def act(run: Path) -> None:
        text = (run / file).read_text()
        assert old in text
        (run / file).write_text(text.replace(old, new))

    return act


def last_bit(tensor: torch.Tensor) -> torch.Tensor:
    return torch.nextafter(tensor, torch.full_like(tensor, math.inf))


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        (change_tensor("model.safetensors", "a", last_bit), "model.safetensors: a"),
        (change_tensor("ema.safetensors", "b", last_bit), "ema.safetensors: b"),
        (change_tensor("optimizer.safetensors", "b", torch.neg), "optimizer.safetensors: b"),  # −0
        (change_tensor("optimizer.safetensors", "b", lambda t: t.int()), "optimizer.safetensors: b"),
        (change_tensor("autoencoder/model.safetensors", "a", last_bit), "autoencoder/model.safetensors: a"),
        (lambda run: (run / "step-000006" / "ema.safetensors").unlink(), "ema.safetensors is missing"),
        (replace_text("best.json", "000004", "000006"), "best.json"),
        (lambda run: (run / "best.json").unlink(), "best.json"),
        (lambda run: shutil.rmtree(run / "step-000006"), "last checkpoint ['step-000004', 'step-000006']"),
        (replace_text("step-000006/checkpoint.json", "0.1", "0.10000000000000002"), "checkpoint.json: state"),
        (replace_text("log.jsonl", '"loss": 0.5', '"loss": 0.5000000000000001'), "figures in the log"),
        (replace_text("log.jsonl", "skipped step 2", "skipped step 1"), "skipped steps in the log"),
    ],
)
def test_every_difference_is_seen(
    faults: ModuleType, tmp_path: Path, act: Callable[[Path], None], expected: str
) -> None:
    whole, run = make_run(tmp_path / "whole"), make_run(tmp_path / "run")
    replace_text("log.jsonl", '"seconds": 0.1', '"seconds": 7.0')(run)
    replace_text("log.jsonl", '"dead_age": [2]', '"dead_age": [1]')(run)
    assert faults.differences(run, whole) == []
    act(run)
    assert faults.differences(run, whole) == [expected]


def test_two_runs_without_an_average_are_not_taken_for_runs_with_one(faults: ModuleType, tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in ("whole", "run")]
    for run in runs:
        (run / "step-000006" / "ema.safetensors").unlink()
    assert faults.differences(*runs) == ["ema.safetensors is missing"]


def test_a_kill_reaches_children_in_sessions_of_their_own(faults: ModuleType, tmp_path: Path) -> None:
    script = tmp_path / "family.py"
    script.write_text(FAMILY)
    attempt = faults.Attempt([sys.executable, str(script)], tmp_path / "run", "cpu", 1)
    deadline = time.monotonic() + 30
    while len(list(faults.marked(attempt.mark))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert attempt.kill()
    assert not list(faults.marked(attempt.mark)) and attempt.process.returncode == -9


def test_a_run_that_is_done_cannot_be_killed(faults: ModuleType, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with faults.Attempt([sys.executable, "-c", "import time; time.sleep(60)"], run, "cpu", 1) as attempt:
        assert not attempt.kill()
    with faults.Attempt([sys.executable, "-c", "import time; time.sleep(60)"], run, "cpu", 1) as attempt:
        assert not attempt.wait(attempt.begin)
    assert attempt.process.returncode == -9
    attempt = faults.Attempt([sys.executable, "-c", ""], tmp_path / "other", "cpu", 1)
    assert attempt.wait(time.monotonic() + 30) and not attempt.kill()


def test_a_save_that_was_cut_off_is_recognised(faults: ModuleType, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert not faults.interrupted_save(run) and faults.steps_saved(run) == 6 and faults.steps_done(run) == 2
    for name in (".step-000008.partial", ".step-000006.old", ".step-000002.gone", "step-000008"):
        (run / name).mkdir()
        assert faults.interrupted_save(run), name
        (run / name).rmdir()
    assert not faults.interrupted_save(run)


@pytest.mark.slow
def test_killed_runs_come_out_to_the_same_bits(tmp_path: Path) -> None:
    options = ["--kills", "3", "--processes", "1", "--steps", "16", "--folder", str(tmp_path)]
    process = bench("fault_resume.py", *options, cwd=tmp_path)
    assert process.returncode == 0, process.stdout + process.stderr
    found = lines(process)
    assert found["kills"]["value"] == found["bit_identical"]["value"] == 3
    assert found["runs_bit_identical"]["value"] == found["runs_bit_identical"]["of"] >= 1
    assert found["corrupt_checkpoints"]["value"] == 0 and found["steps_lost_at_most"]["value"] <= 2
