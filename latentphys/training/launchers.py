"""Where the runs of a sweep take place: one after another on this machine, or in a cluster's queue through submitit.

What runs is the program's own command, one process or launcher per run: a run that fails or is killed ends nothing but
itself.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentphys.training.control import PREEMPTED
from latentphys.training.sweep import DONE, Job

Report = Callable[[Job, str, Path], None]
"""Told of a run, its state, and the file in which it says more."""
_POLL = 0.5
_ENDS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


def run_locally(
    jobs: Sequence[Job],
    accelerate: str | Path | None = None,
    report: Report = lambda job, state, log: None,
) -> dict[str, str]:
    """Train one run after another on this machine; what each says goes to ``OUT/logs``.

    SIGTERM, SIGUSR1, SIGHUP and Ctrl-C reach the run in progress as SIGUSR1: it saves a checkpoint, and the sweep ends.

    Args:
        accelerate: a launch file for several processes per run, such as ``configs/accelerate/one_node.yaml``. Default:
            a single process.
        report: told of each run as it starts ("running") and ends.

    Returns:
        Name of the run → its state; "new" where the sweep was ended before it.
    """
    states = {job.run.name: job.state() for job in jobs}
    with _stopping() as stop:
        for job in jobs:
            if states[job.run.name] != DONE and not stop.asked:
                report(job, "running", job.log)
                states[job.run.name] = _train(job, accelerate, stop)
            if states[job.run.name] != "new":
                report(job, states[job.run.name], job.log)
    return states


@dataclass
class _Stop:
    """Whether the sweep was asked to end, and the run that has to know of it."""

    asked: bool = False
    process: int | None = None

    def __call__(self, *_: Any) -> None:
        self.asked = True
        if self.process is not None:
            _signal_tree(self.process)


def _signal_tree(process: int) -> None:
    """SIGUSR1 to a process and all below it: launchers start their workers in sessions, so in groups, of their own."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        top = psutil.Process(process)
        for one in (top, *top.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                one.send_signal(signal.SIGUSR1)


@contextmanager
def _stopping() -> Iterator[_Stop]:
    stop = _Stop()
    before = {number: signal.signal(number, stop) for number in _ENDS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _train(job: Job, accelerate: str | Path | None, stop: _Stop) -> str:
    """Train one run in a session of its own, which Ctrl-C does not reach; returns the state it ended in."""
    launcher = [] if accelerate is None else ["-m", "accelerate.commands.launch", "--config_file", str(accelerate)]
    before = job.status()
    command = [sys.executable, *launcher, "-m", "latentphys", *job.arguments]
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        # Launchers die of SIGUSR1. Ignored here it is ignored in them, and a run sets a handler of its own.
        ignoring = ["/bin/sh", "-c", "trap '' USR1; exec \"$@\"", "sh", *command]
        process = subprocess.Popen(ignoring, stdout=log, stderr=log, start_new_session=True)
    stop.process = process.pid
    while True:
        try:
            status = process.wait(_POLL)
            break
        except subprocess.TimeoutExpired:
            if stop.asked:  # again: a run that was still starting ignored the first
                stop()
    stop.process = None
    return _end(job, before, status)


def _end(job: Job, before: Mapping[str, Any], status: int = 0) -> str:
    """The state of a run whose process is over: done or preempted where it said so since it started, else failed."""
    now = job.status()
    state = now.get("state")
    said = now != before and (state == "preempted" or (state == DONE and status == 0))
    return str(state) if said else "failed"


def submit(
    jobs: Sequence[Job],
    settings: Mapping[str, Any],
    report: Report = lambda job, state, log: None,
) -> dict[str, str]:
    """Hand every run that is not done to a cluster's queue through submitit, and wait for them.

    Tasks of a job are the ranks of one run: ``tasks_per_node=8 gpus_per_node=8`` trains on eight GPUs. A job that is
    preempted or runs into its time limit saves a checkpoint and is queued again. What a job says is in
    ``OUT/.submitit``, where submitit also keeps the job itself, as a pickle that only its own processes read.

    Args:
        settings: ``cluster`` (slurm | local; default: slurm where there is one) and parameters of submitit's
            AutoExecutor, such as ``timeout_min``, ``nodes``, ``slurm_partition``. ``local`` starts all at once.
        report: told of each run as it is queued and as it ends.

    Returns:
        Name of the run → its state.

    Raises:
        ValueError: submitit is missing, or refuses the settings.
    """
    folder = jobs[0].run.parent / ".submitit"
    executor = _executor(folder, settings)
    states = {job.run.name: job.state() for job in jobs}
    for job in jobs:
        report(job, DONE if states[job.run.name] == DONE else "queued", folder)
    left = [job for job in jobs if states[job.run.name] != DONE]
    if not left:
        return states
    before = {job: job.status() for job in left}
    waiting = dict(zip(left, executor.map_array(_Rank(), [job.arguments for job in left]), strict=True))
    while waiting:
        time.sleep(_POLL)
        for job in [job for job, queued in waiting.items() if queued.done()]:
            queued = waiting.pop(job)
            states[job.run.name] = _end(job, before[job])
            report(job, states[job.run.name], queued.paths.stderr)
    return states


class _Rank:
    """One rank of a run inside a job: joins the others and trains."""

    def __call__(self, arguments: list[str]) -> None:
        from submitit import JobEnvironment
        from submitit.helpers import TorchDistributedEnvironment

        from latentphys.cli import main

        if JobEnvironment().num_tasks > 1:
            TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        requeue = signal.getsignal(signal.SIGUSR1)
        try:
            status = main(arguments)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        if status == PREEMPTED:
            signal.signal(signal.SIGUSR1, requeue)
            signal.raise_signal(signal.SIGUSR1)  # submitit queues the job again
        if status:
            raise RuntimeError(f"latentphys {' '.join(arguments)} ended with exit status {status}; see above.")

    def checkpoint(self, arguments: list[str]) -> Any:
        """What is queued again: the same, which goes on from the run's newest checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, arguments)


def _executor(folder: Path, settings: Mapping[str, Any]) -> Any:
    try:
        from submitit import AutoExecutor
    except ImportError:
        raise ValueError(
            "Expected the package submitit for --launcher submitit, got none; pip install 'latentphys[sweeps]'."
        ) from None
    parameters = {"name": "latentphys", **settings}
    try:
        executor = AutoExecutor(folder=folder / "%j", cluster=parameters.pop("cluster", None))
        executor.update_parameters(**parameters)
    except (AssertionError, NameError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"Expected settings that submitit takes: {' '.join(str(error).split())}") from None
    return executor
