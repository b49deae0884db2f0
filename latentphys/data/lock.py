"""Locks on files, which the operating system opens when the process that holds them ends, however it ends."""

from __future__ import annotations

import os
import socket
import weakref
from pathlib import Path


class FileLock:
    """A lock, held from here until `close`.

    Args:
        path: the file; made where there is none.
        shared: several may hold it, but nobody else alone. Default: one alone.

    Raises:
        ValueError: somebody else holds it, or a file system without locks.
    """

    def __init__(self, path: Path, shared: bool = False) -> None:
        import fcntl

        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._close = weakref.finalize(self, _release, handle, os.getpid())
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            is_ours = os.fstat(handle).st_ino == path.stat().st_ino
        except (BlockingIOError, FileNotFoundError):
            is_ours = False
        except OSError as error:
            self.close()
            raise ValueError(f"Expected a file system with locks at {path}, got: {error}; use resume=False.") from error
        if not is_ours:
            holder = os.pread(handle, 200, 0).decode(errors="replace") or "unknown"
            self.close()
            where = f"Expected nobody else to write to {path.parent}"
            raise ValueError(f"{where}, got a live process ({holder}); wait for it or stop it.")
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()} on {socket.gethostname()}".encode(), 0)

    def close(self) -> None:
        self._close()


def _release(handle: int, owner: int) -> None:
    import fcntl

    # what a fork inherited is the lock of its parent
    if os.getpid() == owner:
        fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)
