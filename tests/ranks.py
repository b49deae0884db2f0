"""Programs that run as two gloo ranks on this machine; none of them outlives its test."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path


def run_ranks(program: str, folder: Path, *arguments: str | Path, timeout: float = 120) -> list[str]:
    """What each rank of a program prints; all have to end well.

    Args:
        program: Python that joins with ``dist.init_process_group("gloo")``. Its rank is ``RANK`` in the environment.
        folder: where the program goes, for tracebacks.
        arguments: its ``sys.argv[1:]``.
    """
    script = folder / "ranks_program.py"
    script.write_text(program)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **meeting, "RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=timeout) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], [errors for _, errors in said]
    return [output for output, _ in said]
