"""A run that was stopped anywhere and resumed has the weights of one that was not; so has one on two processes."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import Road, arguments, train

from latentphys.training import checkpoint, open_checkpoint
from latentphys.training.guards import Guard

KINDS = ("autoencoder", "dynamics")
LAUNCH = Path(__file__).parent.parent / "configs" / "accelerate" / "cpu_2proc.yaml"


def assert_bit_equal(run: Path, other: Path) -> None:
    a, b = open_checkpoint(run), open_checkpoint(other)
    assert a.step == b.step
    for name in ("model.safetensors", "optimizer.safetensors"):
        x, y = load_file(a.path / name), load_file(b.path / name)
        assert set(x) == set(y)
        assert not [key for key in x if not torch.equal(x[key], y[key])]


def weights(path: Path) -> torch.Tensor:
    return torch.cat([tensor.flatten().double() for _, tensor in sorted(load_file(path / "model.safetensors").items())])


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


def test_a_killed_run_resumes_to_the_same_bits(road: Road, tmp_path: Path) -> None:
    """SIGKILL as soon as a checkpoint is there, wherever the run then is; the last log line may be cut off."""
    settings = ["trainer.num_steps=30", "trainer.checkpoint_every=1"]
    program, processes = [sys.executable, "-m", "latentphys", "train"], {}
    for kind in KINDS:
        command = [*program, *arguments(kind, road.inputs(kind), tmp_path / kind, *settings)]
        processes[kind] = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while any(process.poll() is None for process in processes.values()) and time.monotonic() < deadline:
        for kind, process in processes.items():
            if (tmp_path / kind / "last.json").is_file():
                process.kill()
        time.sleep(0.01)
    for kind, process in processes.items():
        run, whole = tmp_path / kind, tmp_path / f"{kind}-whole"
        assert process.wait() == -9
        assert 1 <= open_checkpoint(run).step < 30
        with (run / "log.jsonl").open("a") as log:
            log.write('{"step": 2')
        train(kind, road.inputs(kind), run, *settings)
        train(kind, road.inputs(kind), whole, *settings[:1])
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
