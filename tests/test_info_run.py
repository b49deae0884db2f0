"""What is said of a run is what its log, its checkpoints and its lock say."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from latentphys import info_run
from latentphys.info import describe
from latentphys.training import checkpoint
from latentphys.training.run_directory import RunDirectory


def new_run(path: Path, best: float = 0.25, **trainer: Any) -> RunDirectory:
    directory = RunDirectory(path, True)
    directory.acquire()
    directory.begin({"trainer": {"num_steps": 40, "seed": 0, **trainer}, "run": str(path), "stores": ["a.zarr"]}, [])
    directory.status("running", step=0)
    log = directory.log
    log.write(step=10, loss=2.0, lr=0.1, samples_per_s=3.0, tokens_per_s=9.0, **{"porous/vrmse": 1.5})
    log.write(step=10, **{"test/porous/vrmse": 0.25, "test/channel/vrmse": 0.5})
    log.write(step=11, event="skipped step 11: the loss of porous is nan")
    log.write(
        step=20, loss=1.0, lr=0.1, samples_per_s=4.0, mfu=0.5, **{"channel/vrmse": 0.75, "porous/vrmse": math.nan}
    )
    log.write(step=20, **{"test/porous/vrmse": 0.125, "test/channel/vrmse": 1.0})
    directory.dump_batch(step=11)
    for step in (10, 20):

        def write(path: Path, step: int = step) -> None:
            state = {"best": best}
            checkpoint.save(path, kind="dynamics", model=nn.Linear(1, 1), config={}, extra={}, step=step, state=state)

        directory.save(step, write, is_best=step == 10)
    return directory


def test_a_run_is_described_by_its_files(tmp_path: Path) -> None:
    directory = new_run(tmp_path / "run")
    about = info_run.describe(tmp_path / "run")
    assert about["state"] == "running" and about["kind"] == "dynamics" and about["progress"] == "20 of 40 steps"
    assert about["losses"] == {
        "loss": {"first": 2.0, "last": 1.0},
        "porous/vrmse": {"first": 1.5, "last": None},
        "channel/vrmse": {"first": 0.75, "last": 0.75},
    }
    assert about["held-out data"]["test/porous/vrmse"] == {"first": 0.25, "last": 0.125}
    assert about["newest checkpoint"] == {
        "name": "step-000020",
        "test/porous/vrmse": 0.125,
        "test/channel/vrmse": 1.0,
    }
    assert about["best checkpoint"]["name"] == "step-000010" and about["best checkpoint"]["test/channel/vrmse"] == 0.5
    assert about["throughput"] == {"samples_per_s": 4.0, "mfu": 0.5}
    assert about["skipped steps"] == 1 and about["last events"] == "step 11: skipped step 11: the loss of porous is nan"
    assert about["processes"] == 1 and about["precision"] == "no" and about["elapsed [s]"] >= 0
    assert len(about["data"]["SHA-256"]) == 64 and "revision" in about["code"]
    json.dumps(about, allow_nan=False)
    directory.close()


def test_a_run_that_says_it_is_running_and_is_not_was_killed(tmp_path: Path) -> None:
    directory = new_run(tmp_path / "run")
    assert info_run.state(tmp_path / "run") == "running"
    directory.close()
    assert info_run.state(tmp_path / "run") == "killed"
    for state in ("done", "failed", "preempted"):
        directory.status(state, step=20, message=f"as {state}")
        assert info_run.state(tmp_path / "run") == state
        assert info_run.describe(tmp_path / "run")["message"] == f"as {state}"
    (tmp_path / "run" / "status.json").unlink()
    assert info_run.state(tmp_path / "run") == "unknown"


def test_a_run_without_a_checkpoint_is_described_too(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path, True)
    directory.begin({"trainer": {"num_steps": 4}}, [])
    directory.log.write(step=1, loss=1.0)
    about = describe(tmp_path)
    assert (about["progress"], about["newest checkpoint"]) == ("1 of 4 steps", "none yet")
    assert about["held-out data"] == "none yet" and "throughput" not in about and about["skipped steps"] == 0


def test_a_table_has_the_settings_that_differ(tmp_path: Path) -> None:
    new_run(tmp_path / "a", best=0.25, seed=1).close()
    new_run(tmp_path / "b", best=math.inf, seed=2, clip=0.5).close()
    (tmp_path / "b" / "log.jsonl").write_text('{"step": 7, "loss": 1.0}\n')
    first, second = info_run.table([tmp_path / "a", str(tmp_path / "b")])
    assert first == {
        "run": str(tmp_path / "a"),
        "state": "killed",
        "step": 20,
        "trainer.seed": 1,
        "trainer.clip": None,
        "best": 0.25,
        "test/porous/vrmse": 0.125,
        "test/channel/vrmse": 1.0,
    }
    assert second == {
        **first,
        "run": str(tmp_path / "b"),
        "step": 7,
        "trainer.seed": 2,
        "trainer.clip": 0.5,
        "best": None,
        "test/porous/vrmse": None,
        "test/channel/vrmse": None,
    }
    assert list(first) == list(second)
    with pytest.raises(ValueError, match="Expected a run directory, got .*, without config.json and log.jsonl"):
        info_run.table([tmp_path])
