"""The folder of a training run, and the one owner of what is in it.

config.json        the whole configuration
environment.json   machine, packages and command, of every start
provenance.json    revision of the code, data and changed settings, of every start
log.jsonl          losses, figures of held-out data, events
status.json        running, or how it ended
skipped.jsonl      batches that did not reach the weights
step-000123        checkpoints: the newest ones, and the best
last.json, best.json   name two of them
corrupt-…          checkpoints that were found damaged; nothing reads them
.lock              held while a process trains here
"""

from __future__ import annotations

import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from latentphys.data import Store
from latentphys.data.lock import FileLock
from latentphys.training import checkpoint, manifest
from latentphys.training.checkpoint import BEST, LAST, Checkpoint
from latentphys.training.durable import present, remove, restore, write_json
from latentphys.training.provenance import HARMLESS, data_hash, differences, environment, now, provenance, store_hash
from latentphys.training.run_log import RunLog

LOCK = ".lock"
STATES = ("running", "done", "preempted", "interrupted", "stopped", "failed")
_OTHER_RUN = "choose another run=…, or resume=false to start over"


class RunDirectory:
    """One run's folder. Every process of the run has one; only the main process writes.

    Args:
        path: made where there is none.
        main: whether this is the main process.

    Attributes:
        log: figures and events go here; see `RunLog`.
        keep: newest checkpoints to keep beside the best.
    """

    def __init__(self, path: Path, main: bool) -> None:
        self.path, self.main, self.keep = path, main, 2
        self.log = RunLog(path / "log.jsonl" if main else None)
        self._lock: FileLock | None = None

    def __enter__(self) -> RunDirectory:
        self.acquire()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def acquire(self) -> None:
        """Keep every other run out, until `close` or the end of this process, however it ends.

        Raises:
            ValueError: a run that is alive.
        """
        for attempt in range(3 if self.main else 0):
            try:
                self._lock = FileLock(self.path / LOCK)
                return
            except ValueError as error:
                if isinstance(error.__cause__, OSError):
                    warnings.warn(
                        f"Expected a file system with locks at {self.path}, got: {error.__cause__}; nothing keeps a "
                        "second run out of this folder.",
                        stacklevel=2,
                    )
                    return
                # `is_held` may have tried the lock in this very moment
                if attempt == 2:
                    raise
                time.sleep(0.05)

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def begin(self, about: Mapping[str, Any], stores: Sequence[Store], resume: bool = True, keep: int = 2) -> None:
        """Compare a start with the one before, on every process, and record it.

        Args:
            about: the whole configuration; under the kind of the model, such as ``dynamics``, stands what its weights
                depend on.
            stores: the data.
            resume: False removes what an earlier run left, checkpoints, best and log.
            keep: newest checkpoints to keep beside the best, ≥ 1.

        Raises:
            ValueError: checkpoints of another model or of other data, before anything is written.
        """
        if keep < 1:
            raise ValueError(f"Expected keep ≥ 1 checkpoints, got {keep}.")
        self.keep = keep
        changed = self._changes(about, stores) if resume and checkpoint.steps(self.path) else {}
        if not self.main:
            return
        loud = {name: pair for name, pair in changed.items() if name not in HARMLESS}
        if loud:
            warnings.warn(f"{self.path} goes on with other settings: {_listed(loud)}.", stacklevel=2)
        if not resume:
            self._clear()
        self.path.mkdir(parents=True, exist_ok=True)
        for folder in checkpoint.steps(self.path):
            restore(folder)
        for pattern in (".step-*.partial", ".step-*.gone"):
            for leftover in self.path.glob(pattern):
                shutil.rmtree(leftover, ignore_errors=True)
        write_json(self.path / "config.json", about)
        self._record("environment.json", environment(), resume)
        told = {name: list(pair) for name, pair in changed.items()}
        self._record("provenance.json", {**provenance(stores), "changed": told}, resume)

    def _changes(self, about: Mapping[str, Any], stores: Sequence[Store]) -> dict[str, tuple[Any, Any]]:
        """Settings that differ from those of the run's checkpoints; refused where these do not fit any more."""
        starts = _starts(self.path / "provenance.json")
        data = data_hash(stores)
        if starts and starts[-1]["data"] != data:
            known = {store["sha256"] for store in starts[-1]["stores"]}
            new = [str(store.path) for store in stores if store_hash(store) not in known] or ["fewer stores"]
            raise ValueError(
                f"Expected the data that {self.path} was trained on, {starts[-1]['data'][:12]}, got {data[:12]} with "
                f"{', '.join(new)}; {_OTHER_RUN}."
            )
        try:
            before = manifest.read_json(self.path / "config.json")
        except ValueError as error:
            warnings.warn(f"{error} Nothing can be compared with the earlier settings.", stacklevel=3)
            return {}
        changed = differences(before, about)
        kinds = {_kind(folder) for folder in checkpoint.steps(self.path)}
        fixed = kinds | ({"fields"} if "autoencoder" in kinds else set())
        unfit = {name: pair for name, pair in changed.items() if name.split(".")[0] in fixed and "(none)" not in pair}
        if unfit:
            raise ValueError(
                f"Expected the model of the checkpoints in {self.path}, got another: {_listed(unfit)}; {_OTHER_RUN}."
            )
        return changed

    def _record(self, name: str, start: Mapping[str, Any], resume: bool) -> None:
        before = _starts(self.path / name) if resume else []
        write_json(self.path / name, {"starts": [*before, start]})

    def _clear(self) -> None:
        for name in (LAST, BEST, "log.jsonl", "status.json", "skipped.jsonl"):
            (self.path / name).unlink(missing_ok=True)
        for folder in (*self.path.glob("step-*"), *self.path.glob("corrupt-*"), *self.path.glob(".step-*")):
            shutil.rmtree(folder)

    def newest(self, kind: str) -> Checkpoint | None:
        """The checkpoint to go on from: that of last.json or the newest other one that is whole; None where none is.

        On the main process damaged ones that are newer are put aside with a warning, and the log goes back to the
        checkpoint's step. The others should ask after that.

        Raises:
            ValueError: checkpoints of which none is whole, which stay as they are; or one of another kind.
        """
        found = checkpoint.open_checkpoint(self.path, kind) if checkpoint.has_checkpoints(self.path) else None
        if self.main:
            self.log.rewind(found.step if found else 0)
        if self.main and found:
            for folder in checkpoint.steps(self.path):
                if checkpoint.step_of(folder) > found.step and not _is_whole(folder):
                    self._put_aside(folder)
            write_json(self.path / LAST, {"checkpoint": found.path.name})
        return found

    def path_of(self, step: int) -> Path:
        """The checkpoint folder of a step."""
        return self.path / f"step-{step:06d}"

    def save(self, step: int, write: Callable[[Path], None], is_best: bool = False) -> None:
        """Write a checkpoint and remove those that are not needed any more.

        Of a sharded model every process has to call this; of any other, the main one alone may.

        Args:
            step: number of steps that were taken.
            write: writes the checkpoint folder; see `checkpoint.save`.
            is_best: whether it is the best so far, and to be kept as such.

        Raises:
            OSError: a full disk, or a checkpoint that was not written. Those before stay.
        """
        path = self.path_of(step)
        write(path)
        if not self.main:
            return
        if not manifest.is_complete(path):
            raise OSError(f"Expected a whole checkpoint in {path}, got none; those before are kept.")
        checkpoint.write_json(self.path / LAST, {"checkpoint": path.name})
        if is_best:
            checkpoint.write_json(self.path / BEST, {"checkpoint": path.name})
        self._rotate(path)

    def _rotate(self, newest: Path) -> None:
        """Remove all but the newest whole checkpoints up to this one, and the best."""
        try:
            best = manifest.read_json(self.path / BEST).get("checkpoint")
        except ValueError:
            best = None
        folders = checkpoint.steps(self.path)
        later = folders[: folders.index(newest)]
        kept = 0
        for folder in folders:
            if folder not in later and kept < self.keep:
                if manifest.is_complete(folder):
                    kept += 1
                else:
                    self._put_aside(folder)
            elif folder.name != best:
                remove(folder)

    def _put_aside(self, folder: Path) -> None:
        """Keep a damaged checkpoint as evidence, under a name that nothing reads."""
        aside, n = folder.with_name(f"corrupt-{folder.name}"), 2
        while aside.exists():
            aside, n = folder.with_name(f"corrupt-{folder.name}-{n}"), n + 1
        try:
            checkpoint.verify(folder)
            reason = "it is incomplete"
        except ValueError as error:
            reason = str(error)
        os.replace(present(folder), aside)
        warnings.warn(f"Damaged: {folder}, kept as {aside.name}. {reason}", stacklevel=3)

    def check_space(self, num_bytes: int) -> None:
        """Refuse to start where the disk would fill.

        Args:
            num_bytes: size of one checkpoint.

        Raises:
            ValueError: no room for the newest checkpoints, the best, and one that is being written.
        """
        own = sum(file.stat().st_size for folder in checkpoint.steps(self.path) for file in present(folder).rglob("*"))
        needed, free = (self.keep + 2) * num_bytes, shutil.disk_usage(self.path).free
        if free + own < needed:
            raise ValueError(
                f"Expected {needed} bytes for {self.keep + 2} checkpoints in {self.path}, got {free} free beside {own} "
                "in old ones; make room, choose another run=…, or lower trainer.keep."
            )

    def status(self, state: str, **details: Any) -> None:
        """Say how the run is: one of `STATES`, and further details such as ``step`` and ``message``."""
        assert state in STATES, state
        if self.main:
            write_json(self.path / "status.json", {"state": state, "time": now(), **details})

    def dump_batch(self, **facts: Any) -> None:
        """Record a batch that did not reach the weights; it is on the disk when this returns."""
        if self.main:
            with (self.path / "skipped.jsonl").open("a") as file:
                file.write(json.dumps(facts) + "\n")
                file.flush()
                os.fsync(file.fileno())


def is_held(run: Path) -> bool | None:
    """Whether a live process trains in a run directory; None where nobody can tell. It writes nothing."""
    import fcntl

    try:
        handle = os.open(run / LOCK, os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(handle)
    return False


def _is_whole(folder: Path) -> bool:
    try:
        checkpoint.verify(folder)
    except ValueError:
        return False
    return True


def _kind(folder: Path) -> Any:
    """The kind of a checkpoint, whole or not."""
    try:
        return manifest.read(present(folder)).get("kind")
    except ValueError:
        return None


def _starts(file: Path) -> list[dict[str, Any]]:
    """What was recorded of earlier starts; none where that cannot be read."""
    try:
        return list(manifest.read_json(file)["starts"])
    except (ValueError, KeyError, TypeError):
        return []


def _listed(changed: Mapping[str, tuple[Any, Any]]) -> str:
    return "; ".join(f"{name}: expected {before}, got {after}" for name, (before, after) in sorted(changed.items()))
