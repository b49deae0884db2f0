"""A run that was stopped anywhere and resumed has the bits of one that was not, on one process and on two."""

import json
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
from ranks import latentphys, started, wait
from small import Road, arguments, assert_bit_equal, train

from latentphys.training import checkpoint, open_checkpoint
from latentphys.training.guards import Guard

KINDS = ("autoencoder", "dynamics")


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("moment", ["during step 2", "during the save of step 4", "before the save of step 4 is named"])
def test_an_interrupted_run_resumes_to_the_same_bits(
    road: Road, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, moment: str
) -> None:
    """The uninterrupted run is the one of `road`; the log comes out the same too."""
    run = tmp_path / "run"

    def stops(original: Callable[..., object], when: Callable[..., bool]) -> Callable[..., object]:
        def stopping(*given: object, **named: object) -> object:
            if when(*given):
                raise KeyboardInterrupt
            return original(*given, **named)

        return stopping

    with monkeypatch.context() as patched:
        if moment == "during step 2":
            patched.setattr(Guard, "verdict", stops(Guard.verdict, lambda _, step, *__: step == 2))
        elif moment == "during the save of step 4":
            patched.setattr(
                checkpoint, "save_file", stops(checkpoint.save_file, lambda _, path: "step-000004" in str(path))
            )
        else:
            write = stops(checkpoint.write_json, lambda path, data: data == {"checkpoint": "step-000004"})
            patched.setattr(checkpoint, "write_json", write)
        with pytest.raises(KeyboardInterrupt):
            train(kind, road.inputs(kind), run)
    # Step 3 was tested, and the best so far.
    assert open_checkpoint(run).step == (2 if moment == "during step 2" else 3)
    train(kind, road.inputs(kind), run)
    whole = road.autoencoder.parent / kind
    assert_bit_equal(run, whole)
    assert steps(run) == steps(whole) == [2, 3, 4, 6, 6]
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in whole.iterdir())


@pytest.mark.parametrize(("kind", "processes"), [("autoencoder", 1), ("dynamics", 2)])
def test_a_killed_run_resumes_to_the_same_bits(road: Road, tmp_path: Path, kind: str, processes: int) -> None:
    """SIGKILL once a checkpoint is there, wherever the run then is; `benchmarks/fault_resume.py` kills at any time."""
    settings = ["trainer.num_steps=30", "trainer.checkpoint_every=1", "trainer.ema=0.9", "trainer.batch_size=4"]
    run, whole = tmp_path / "run", tmp_path / "whole"

    def start(path: Path) -> AbstractContextManager[list[ForkServerProcess]]:
        line = ["train", *arguments(kind, road.inputs(kind), path, *settings, "trainer.accumulate=2")]
        return started(latentphys, tmp_path, line, world=processes, name=path.name)

    with start(whole) as uninterrupted:
        with start(run) as killed:
            deadline = time.monotonic() + 120
            while not (run / "last.json").is_file():
                assert None in wait(killed, 0.01) and time.monotonic() < deadline
            for process in killed:
                process.kill()
            assert wait(killed) == [-signal.SIGKILL] * processes
        assert 1 <= open_checkpoint(run).step < 30
        with (run / "log.jsonl").open("a") as log:
            log.write('{"step": 2')
        with start(run) as again:
            assert wait(uninterrupted) == wait(again) == [0] * processes
    assert json.loads((run / "environment.json").read_text())["starts"][-1]["processes"] == processes
    assert_bit_equal(run, whole)
    assert steps(run) == steps(whole)


def test_a_finished_run_stays_as_it_is(road: Road, tmp_path: Path) -> None:
    run = Path(shutil.copytree(road.dynamics, tmp_path / "run"))
    for num_steps in (6, 4):
        assert train("dynamics", road.inputs("dynamics"), run, f"trainer.num_steps={num_steps}") == run / "step-000006"
        assert_bit_equal(run, road.dynamics)


def test_starting_over_forgets_the_run_before(road: Road, tmp_path: Path) -> None:
    run = Path(shutil.copytree(road.dynamics, tmp_path / "run"))
    last = train("dynamics", road.inputs("dynamics"), run, "resume=false", "trainer.num_steps=3")
    assert last == open_checkpoint(run).path == run / "step-000003"
    assert sorted(path.name for path in run.glob("step-*")) == ["step-000002", "step-000003"]
    assert steps(run) == [2, 3, 3]
