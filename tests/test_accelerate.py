"""Launch configurations load in accelerate's own parser, and Slurm's script goes on.

`test_faults` launches two ranks.
"""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

FOLDER = Path(__file__).parent.parent / "configs" / "accelerate"
PROCESSES = {"cpu": 1, "cpu_2proc": 2, "one_gpu": 1, "one_node": 8, "multi_node": 32}


def test_every_configuration_is_covered() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(PROCESSES)


@pytest.mark.parametrize("name", PROCESSES)
def test_configuration_loads(name: str) -> None:
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert config.num_processes == PROCESSES[name]
    assert config.mixed_precision == ("no" if name.startswith("cpu") else "bf16")


TRAIN = Path(__file__).parent.parent / "examples" / "slurm" / "train.sh"
SCONTROL = """#!/bin/sh
echo "scontrol $*" >> "$CALLS"
[ "$1" = show ] && printf 'node7\\nnode8\\nnode9\\n'
exit "${REQUEUE:-0}"
"""
SRUN = """#!/bin/bash
echo "srun ${@:1:2}" >> "$CALLS"
shift 2
for rank in 0 1 2; do SLURM_NODEID=$rank "$@" || code=$?; done
[ -n "${SAYS:-}" ] && printf '{\n "state": "%s",\n "time": "%s"\n}\n' "$SAYS" now > "$RUN/status.json"
exit "${code:-0}"
"""
ACCELERATE = """#!/bin/bash
kill -USR1 $$  # the launcher must not die of it
printf '%s|' "$OMP_NUM_THREADS" "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" "$@" >> "$CALLS"
echo >> "$CALLS"
exit "${ENDS:-0}"
"""
"""Programs that write down how they were called."""


@pytest.fixture
def slurm(tmp_path: Path) -> Callable[..., tuple[int, list[str]]]:
    """Runs the script among three nodes of eight GPUs; returns its exit status and the calls it made."""
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN), ("accelerate", ACCELERATE)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (run := tmp_path / "run").mkdir()
    calls = tmp_path / "calls"
    job = {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "node[7-9]", "SLURM_NNODES": "3", "SLURM_CPUS_PER_TASK": "96"}

    def train(*arguments: str, **settings: str) -> tuple[int, list[str]]:
        calls.write_text("")
        path = f"{tmp_path}:{os.environ['PATH']}"
        environment = {**os.environ, **job, "PATH": path, "CALLS": str(calls), "RUN": str(run), **settings}
        given = arguments or ("dynamics", "stores=[a b.zarr]", f"run={run}")
        ended = subprocess.run([str(TRAIN), *given], env=environment, capture_output=True, text=True, timeout=60)
        return ended.returncode, calls.read_text().splitlines()

    return train


def test_slurm_starts_one_launcher_per_node(slurm: Callable[..., tuple[int, list[str]]], tmp_path: Path) -> None:
    assert subprocess.run(["bash", "-n", str(TRAIN)], timeout=60).returncode == 0
    status, calls = slurm(SAYS="done")
    assert status == 0
    assert calls[:2] == ["scontrol show hostnames node[7-9]", "srun --kill-on-bad-exit=0 --wait=180"]
    assert len(calls) == 5
    parser = launch_command_parser()
    for rank, call in enumerate(calls[2:]):
        threads, patience, verb, *words = call.split("|")[:-1]
        assert (threads, patience, verb) == ("12", "110", "launch")
        given = parser.parse_args(words)
        assert (given.machine_rank, given.num_machines, given.num_processes) == (rank, 3, 24)
        assert (given.main_process_ip, given.main_process_port) == ("node7", 20041)
        assert (given.module, given.training_script) == (True, "latentphys")
        assert given.training_script_args == ["train", "dynamics", "stores=[a b.zarr]", f"run={tmp_path / 'run'}"]
        load_config_from_file(str(TRAIN.parent.parent.parent / given.config_file))


def test_slurm_leaves_time_to_save_and_keeps_what_was_said() -> None:
    """The signal goes to the training processes (no ``B:``); who waits for whom waits longer."""
    text = TRAIN.read_text()
    told = {line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")}
    assert {"signal=USR1@120", "requeue", "open-mode=append", "ntasks-per-node=1"} <= told
    assert "TIMEOUT=110\n" in text and "--wait=180 bash" in text


def test_slurm_queues_again_what_was_preempted_and_nothing_else(
    slurm: Callable[..., tuple[int, list[str]]], tmp_path: Path
) -> None:
    for settings, status, is_requeued in (
        ({"SAYS": "preempted", "ENDS": "1"}, 75, True),
        ({"SAYS": "failed", "ENDS": "1"}, 1, False),
        ({"SAYS": "running", "ENDS": "137"}, 137, False),  # killed
        ({"ENDS": "1"}, 1, False),
        ({"SAYS": "running"}, 1, False),  # ended as if all were well
        ({"SAYS": "done"}, 0, False),
    ):
        (tmp_path / "run" / "status.json").unlink(missing_ok=True)
        code, calls = slurm(**settings)
        assert (code, calls[-1] == "scontrol requeue 41") == (status, is_requeued)


def test_slurm_does_not_take_an_old_word_for_a_new_one(
    slurm: Callable[..., tuple[int, list[str]]], tmp_path: Path
) -> None:
    """A run that was preempted once and now fails before it says anything must not be queued for ever."""
    assert slurm(SAYS="preempted", ENDS="1")[0] == 75
    code, calls = slurm(ENDS="2")
    assert code == 2 and not any("requeue" in call for call in calls)
    assert slurm("dynamics", "stores=[a.zarr]") == (2, [])


def test_slurm_waits_for_the_step_when_it_is_told_to_end(
    slurm: Callable[..., tuple[int, list[str]]], tmp_path: Path
) -> None:
    srun = (tmp_path / "srun").read_text()
    (tmp_path / "srun").write_text(srun.replace("shift 2", "shift 2\nkill -TERM $PPID; kill -USR1 $PPID; sleep 0.5"))
    code, calls = slurm(SAYS="preempted", ENDS="1")
    assert (code, calls[-1]) == (75, "scontrol requeue 41")
