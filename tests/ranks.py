"""Functions and programs in processes of their own, alone or as gloo ranks on this machine; none outlives its test.

They are forked from a server that has imported what they need, which takes longer than most of them run.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerProcess
from pathlib import Path

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(
    [
        "accelerate",
        "accelerate.data_loader",
        "hydra",
        "latentphys.cli",
        "latentphys.data",
        "latentphys.training",
        "latentphys.training.runs",
        "safetensors.torch",
        "torch._dynamo",
        "torch.distributed.fsdp",
        "torch.distributed.tensor",
    ]
)
"""Makes processes as ``spawn`` does, but soon."""


@contextmanager
def started(
    work: Callable[..., int | None], folder: Path, *arguments: object, world: int = 1, name: str = "said"
) -> Iterator[list[ForkServerProcess]]:
    """Processes that call a function; those that still run at the end of the block are killed.

    Args:
        work: a function of a module that returns an exit status, or None if all is well.
        folder: where ``{name}{rank}.out`` and ``.err`` go, what each rank prints.
        arguments: its arguments.
        world: the number of processes. If there are several, they are the ranks of a group, as a launcher says it.
        name: of the files.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = dict(os.environ)
    if world > 1:
        environment |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = []
    for rank in range(world):
        named = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}
        given = (work, arguments, environment | named, str(folder / f"{name}{rank}"))
        processes.append(FORK.Process(target=_work, args=given))
    try:
        for process in processes:
            process.start()
        yield processes
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()


def wait(processes: list[ForkServerProcess], timeout: float = 120) -> list[int | None]:
    """The exit status of each process, in the order of ranks; None where the time is up."""
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    return [process.exitcode for process in processes]


def run_forked(
    work: Callable[..., int | None], folder: Path, *arguments: object, world: int, timeout: float = 120
) -> None:
    """Call a function in several processes, which all have to end well; see `started`."""
    with started(work, folder, *arguments, world=world) as processes:
        statuses = wait(processes, timeout)
    assert statuses == [0] * world, [(folder / f"said{rank}.err").read_text()[-3000:] for rank in range(world)]


def run_ranks(program: str, folder: Path, *arguments: str | Path, timeout: float = 120) -> list[str]:
    """What each of two ranks of a program prints; both have to end well.

    Args:
        program: Python that joins with ``dist.init_process_group("gloo")``. Its rank is ``RANK`` in the environment.
        folder: where the program goes, for tracebacks, and what it prints.
        arguments: its ``sys.argv[1:]``.
    """
    script = folder / "ranks_program.py"
    script.write_text(program)
    run_forked(_script, folder, str(script), [str(argument) for argument in arguments], world=2, timeout=timeout)
    return [(folder / f"said{rank}.out").read_text() for rank in range(2)]


def latentphys(line: list[str]) -> int:
    """The program with these arguments, in this process."""
    from latentphys.cli import main

    return main(line)


def _script(path: str, arguments: list[str]) -> None:
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(
    work: Callable[..., int | None], arguments: tuple[object, ...], environment: dict[str, str], output: str
) -> None:
    gc.freeze()  # what the server has imported is no garbage
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.clear()
    os.environ.update(environment)
    for number, ending in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{ending}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.exit(work(*arguments))
