"""One run at a time owns its folder, goes on only with the model and the data it had, and never loses its last
checkpoint."""

import json
import os
import select
import shutil
import signal
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import zarr
from small import spoil
from torch import nn

from latentphys.data import Store, open_store
from latentphys.families import MHD, simulate
from latentphys.training import checkpoint, open_checkpoint, provenance
from latentphys.training.run_directory import RunDirectory, is_held
from latentphys.training.run_log import RunLog, read_log

CONFIG: dict[str, Any] = {
    "autoencoder": {"widths": [8, 16], "head": {"tol": 0.01}},
    "dynamics": {"dim": 32},
    "trainer": {"num_steps": 6, "learning_rate": 1e-3, "keep": 2},
    "run": "runs/a",
    "resume": True,
    "weights": None,
}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("stores")
    for seed in range(2):
        path = folder / f"{seed}.zarr"
        simulate(MHD(spin_up=0.01), path, shape=(16, 16, 1), num_trajectories=1, num_frames=2, seed=seed)
    return [folder / "0.zarr", folder / "1.zarr"]


def opened(paths: Sequence[Path]) -> list[Store]:
    return [open_store(path) for path in paths]


def writer(step: int, kind: str = "autoencoder") -> Callable[[Path], None]:
    model = nn.Linear(3, 2)
    nn.init.constant_(model.bias, step)
    return lambda path: checkpoint.save(path, kind=kind, model=model, config={}, extra={}, step=step)


def begun(path: Path, about: Any = CONFIG, paths: Sequence[Path] = (), **more: Any) -> RunDirectory:
    directory = RunDirectory(path, True)
    directory.begin(about, opened(paths), **more)
    return directory


def changed(**settings: Any) -> dict[str, Any]:
    """The configuration with some dotted settings, ``__`` for a dot."""
    config = json.loads(json.dumps(CONFIG))
    for name, value in settings.items():
        *groups, last = name.split("__")
        place = config
        for group in groups:
            place = place[group]
        place[last] = value
    return config


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir() if "step-" in path.name)


def quietly() -> Any:
    caught = warnings.catch_warnings()
    caught.__enter__()
    warnings.simplefilter("error")
    return caught


def test_two_processes_cannot_own_one_run(tmp_path: Path) -> None:
    """A lock that a process took opens when it is killed."""
    run = tmp_path / "run"
    listen, ready = os.pipe()
    child = os.fork()
    if child == 0:
        owner = RunDirectory(run, True)
        owner.acquire()
        os.write(ready, b"!")
        signal.pause()
    try:
        assert select.select([listen], [], [], 30)[0]
        assert is_held(run) is True
        with pytest.raises(ValueError, match=rf"nobody else to write to .*run, got a live process \({child} on"):
            RunDirectory(run, True).acquire()
        with RunDirectory(run, False):  # other processes of the run that owns it
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert is_held(run) is False
    with RunDirectory(run, True):
        assert is_held(run) is True
        with pytest.raises(ValueError, match=f"{os.getpid()} on"):
            RunDirectory(run, True).acquire()
    assert is_held(run) is False and is_held(tmp_path / "none") is False
    assert not (tmp_path / "none").exists()


def test_a_look_at_the_lock_keeps_no_run_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from latentphys.training import run_directory

    tried = []
    original = run_directory.FileLock

    def busy(path: Path) -> Any:
        tried.append(path)
        if len(tried) < 3:
            raise ValueError("Expected nobody else")
        return original(path)

    monkeypatch.setattr(run_directory, "FileLock", busy)
    with RunDirectory(tmp_path, True):
        assert len(tried) == 3 and is_held(tmp_path)

    def no_locks(path: Path) -> Any:
        raise ValueError("Expected a file system with locks") from OSError(95, "not supported")

    monkeypatch.setattr(run_directory, "FileLock", no_locks)
    with pytest.warns(UserWarning, match=r"with locks at .*not supported; nothing keeps a second run out"):
        RunDirectory(tmp_path, True).acquire()


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run", False)
    directory.begin(CONFIG, [])
    directory.status("running", step=0)
    directory.log.write(step=1, loss=1.0)
    directory.dump_batch(step=1)
    assert directory.newest("autoencoder") is None
    assert not (tmp_path / "run").exists()


def test_a_start_records_what_it_is_and_keeps_those_before(tmp_path: Path, stores: list[Path]) -> None:
    run = tmp_path / "run"
    begun(run, paths=stores).save(2, writer(2))
    with pytest.warns(UserWarning, match=r"run goes on with other settings: weights: expected None, got \[1, 2\]\.$"):
        begun(run, changed(weights=[1, 2], trainer__num_steps=9), stores)
    assert json.loads((run / "config.json").read_text()) == changed(weights=[1, 2], trainer__num_steps=9)
    places = json.loads((run / "environment.json").read_text())["starts"]
    origins = json.loads((run / "provenance.json").read_text())["starts"]
    assert len(places) == len(origins) == 2
    assert places[0]["packages"]["torch"] == torch.__version__ and places[0]["processes"] == 1
    assert {"host", "system", "cpu", "gpus", "precision", "command", "python", "time"} <= set(places[0])
    assert origins[0]["changed"] == {}
    assert origins[1]["changed"] == {"weights": [None, [1, 2]], "trainer.num_steps": [6, 9]}
    assert [store["path"] for store in origins[0]["stores"]] == [str(path.resolve()) for path in stores]
    assert len(origins[0]["data"]) == 64 and origins[0]["data"] == origins[1]["data"]
    assert origins[0]["git"] is None or len(origins[0]["git"]) == 40


def test_a_revision_is_that_of_this_package_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package installed inside somebody's repository is no part of it."""
    import subprocess

    package = tmp_path / "site" / "latentphys"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "theirs").touch()
    for command in (["init", "-q"], ["add", "theirs"], ["commit", "-qm", "theirs"]):
        subprocess.run([*git, *command], check=True, timeout=30)
    monkeypatch.setattr(provenance.latentphys, "__file__", str(package / "__init__.py"))
    assert (provenance.provenance([])["git"], provenance.provenance([])["dirty"]) == (None, None)
    subprocess.run([*git, "add", "site"], check=True, timeout=30)
    subprocess.run([*git, "commit", "-qm", "ours"], check=True, timeout=30)
    revision = subprocess.run([*git, "rev-parse", "HEAD"], check=True, timeout=30, capture_output=True, text=True)
    assert (provenance.provenance([])["git"], provenance.provenance([])["dirty"]) == (revision.stdout.strip(), False)
    (package / "__init__.py").write_text("a = 1\n")
    assert provenance.provenance([])["dirty"] is True


def test_another_model_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    run = tmp_path / "run"
    begun(run).save(2, writer(2))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for settings in ({"autoencoder__widths": [8, 24]}, {"autoencoder__head": {"tol": 0.02}, "trainer__seed": 3}):
        for main in (True, False):
            with pytest.raises(
                ValueError,
                match=r"Expected the model of the checkpoints in .*, got another: "
                r"autoencoder\.(widths: expected \[8, 16\], got \[8, 24\]|head\.tol: expected 0\.01, got 0\.02); "
                r"choose another run=…, or resume=false",
            ):
                RunDirectory(run, main).begin(changed(**settings), [])
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.warns(UserWarning, match=r"dynamics.dim: expected 32, got 64"):
        begun(run, changed(dynamics__dim=64))  # no part of an autoencoder
    with pytest.warns(UserWarning, match=r"autoencoder.head.solver: expected \(none\), got cg; dynamics.dim"):
        begun(run, changed(autoencoder__head={"tol": 0.01, "solver": "cg"}))  # the weights decide whether they fit
    begun(run, changed(autoencoder__widths=[8, 24]), resume=False)
    assert names(run) == []


def test_what_cannot_matter_changes_without_a_word(tmp_path: Path) -> None:
    run = tmp_path / "run"
    begun(run).save(2, writer(2))
    caught = quietly()
    begun(run, changed(trainer__num_steps=60, trainer__keep=5, trainer__log_every=1, run="else", resume=False, cache=1))
    caught.__exit__(None, None, None)
    with pytest.warns(UserWarning, match=r"trainer.learning_rate: expected 0.001, got 0.002"):
        begun(run, changed(trainer__learning_rate=2e-3))
    with pytest.warns(UserWarning, match="weights: expected None, got 1"):
        begun(run, changed(weights=1, trainer__learning_rate=2e-3))
    with pytest.warns(UserWarning, match="weights: expected 1, got True"):
        begun(run, changed(weights=True, trainer__learning_rate=2e-3))


def test_a_run_without_checkpoints_may_become_any_other(tmp_path: Path, stores: list[Path]) -> None:
    run = tmp_path / "run"
    begun(run, paths=stores[:1])
    caught = quietly()
    begun(run, changed(autoencoder__widths=[1]), stores)
    caught.__exit__(None, None, None)


def test_damaged_records_are_told_and_stop_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    begun(run).save(2, writer(2))
    (run / "config.json").write_text("{")
    (run / "provenance.json").write_text("[")
    with pytest.warns(UserWarning, match=r"without a readable config.json. Nothing can be compared"):
        begun(run, changed(autoencoder__widths=[1]))
    assert len(json.loads((run / "provenance.json").read_text())["starts"]) == 1


def test_other_data_are_refused_and_moved_data_are_not(tmp_path: Path, stores: list[Path]) -> None:
    run = tmp_path / "run"
    begun(run, paths=stores).save(2, writer(2))
    moved = [Path(shutil.copytree(path, tmp_path / f"moved-{path.name}")) for path in stores]
    caught = quietly()
    begun(run, paths=moved[::-1])
    caught.__exit__(None, None, None)
    group = zarr.open_group(str(moved[1]), mode="r+")
    sums = dict(group.attrs["checksums"])  # type: ignore[arg-type]
    name = next(iter(open_store(moved[1]).specs))
    group.attrs["checksums"] = {**sums, name: ["00000000"]}
    recorded = (run / "provenance.json").read_bytes()
    for paths, which in ((moved, r"moved-1\.zarr"), (moved[:1], "fewer stores"), ([], "fewer stores")):
        with pytest.raises(
            ValueError, match=rf"Expected the data that .*run was trained on, .*{which}; choose another"
        ):
            begun(run, paths=paths)
    assert (run / "provenance.json").read_bytes() == recorded
    begun(run, paths=moved, resume=False)
    assert provenance.data_hash(opened(moved)) != provenance.data_hash(opened(stores))
    assert provenance.data_hash(opened(stores)) == provenance.data_hash(opened(stores[::-1]))
    assert provenance.store_hash(open_store(stores[0])) != provenance.store_hash(open_store(stores[1]))


def test_starting_over_removes_what_was_there_and_no_more(tmp_path: Path) -> None:
    run = tmp_path / "run"
    directory = begun(run)
    for step in (2, 4):
        directory.save(step, writer(step), is_best=step == 2)
    directory.log.write(step=2, loss=1.0)
    directory.status("failed", step=4)
    directory.dump_batch(step=3)
    (run / "corrupt-step-000001").mkdir()
    (run / "notes.txt").write_text("mine")
    begun(run, resume=False)
    assert sorted(path.name for path in run.iterdir()) == [
        *("config.json", "environment.json", "notes.txt", "provenance.json"),
    ]
    assert len(json.loads((run / "provenance.json").read_text())["starts"]) == 1
    assert directory.newest("autoencoder") is None
    with pytest.raises(ValueError, match="Expected keep ≥ 1 checkpoints, got 0"):
        begun(run, keep=0)


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    run = tmp_path / "run"
    directory = begun(run, keep=2)
    kept = {1: [1], 2: [1, 2], 3: [2, 3], 4: [2, 3, 4], 5: [2, 4, 5], 6: [5, 6], 7: [6, 7], 8: [6, 7, 8]}
    for step, expected in kept.items():
        directory.save(step, writer(step), is_best=step in (2, 6))
        assert names(run) == [f"step-{n:06d}" for n in expected]
        assert open_checkpoint(run).step == step
    assert open_checkpoint(run / "best").step == 6
    directory = begun(run, keep=1)
    directory.save(1_000_000, writer(1_000_000))
    directory.save(1_000_001, writer(1_000_001))
    assert names(run) == ["step-000006", "step-1000001"] and directory.path_of(7) == run / "step-000007"


def test_checkpoints_of_a_future_that_was_given_up_go(tmp_path: Path) -> None:
    """After going back from step 8 to 4 the newest is the one saved last, and it is what a fall-back would find."""
    run = tmp_path / "run"
    directory = begun(run, keep=2)
    for step in (4, 6, 8):
        directory.save(step, writer(step), is_best=step == 8)
    directory.save(5, writer(5))
    assert names(run) == ["step-000005", "step-000008"]  # the best stays, as it is
    directory.save(7, writer(7), is_best=True)
    assert names(run) == ["step-000005", "step-000007"]


def test_a_damaged_checkpoint_does_not_push_out_a_good_one(tmp_path: Path) -> None:
    run = tmp_path / "run"
    directory = begun(run, keep=2)
    for step in (2, 4):
        directory.save(step, writer(step))
    (run / "step-000004" / "model.safetensors").write_bytes(b"cut")
    with pytest.warns(UserWarning, match=r"step-000004, kept as corrupt-step-000004. Expected \d+ bytes in .*, got 3"):
        directory.save(6, writer(6))
    assert names(run) == ["corrupt-step-000004", "step-000002", "step-000006"]

    def forgetful(path: Path) -> None:
        path.mkdir()

    with pytest.raises(OSError, match="Expected a whole checkpoint in .*step-000008, got none; those before are kept"):
        directory.save(8, forgetful)
    assert open_checkpoint(run).step == 6 and len(names(run)) == 4


@pytest.mark.filterwarnings("ignore:Damaged")
def test_damaged_checkpoints_are_put_aside_and_the_run_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    directory = begun(run, keep=3)
    for step in (2, 4, 6):
        directory.save(step, writer(step))
        directory.log.write(step=step, loss=1.0)
    spoil(run / "step-000006")
    (run / "step-000004" / "checkpoint.json").unlink()
    with pytest.warns(UserWarning) as caught:
        found = RunDirectory(run, True).newest("autoencoder")
    assert found is not None and found.step == 2
    told = " ".join(str(warning.message) for warning in caught)
    for text in ("step-000002 is used instead", "kept as corrupt-step-000006. Expected SHA-256", "corrupt-step-000004"):
        assert text in told
    assert names(run) == ["corrupt-step-000004", "corrupt-step-000006", "step-000002"]
    assert [line["step"] for line in read_log(run / "log.jsonl")] == [2]
    silent = quietly()
    assert open_checkpoint(run).step == 2
    directory.save(6, writer(6))
    silent.__exit__(None, None, None)
    spoil(run / "step-000006")
    with pytest.warns(UserWarning, match="kept as corrupt-step-000006-2"):
        RunDirectory(run, True).newest("autoencoder")
    spoil(run / "step-000002")
    before = names(run)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"Expected SHA-256 .*step-000002"):
            RunDirectory(run, True).newest("autoencoder")
    assert names(run) == before


def test_a_reader_changes_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    directory = begun(run)
    for step in (2, 4):
        directory.save(step, writer(step))
    spoil(run / "step-000004")
    with pytest.warns(UserWarning, match="step-000002 is used instead"):
        found = RunDirectory(run, False).newest("autoencoder")
    assert found is not None and found.step == 2 and names(run) == ["step-000002", "step-000004"]
    with pytest.raises(ValueError, match="a checkpoint of kind 'dynamics', got one of kind 'autoencoder'"):
        (run / "last.json").write_text('{"checkpoint": "step-000002"}')
        RunDirectory(run, True).newest("dynamics")
    assert names(run) == ["step-000002", "step-000004"]


def test_a_start_clears_what_a_kill_left(tmp_path: Path) -> None:
    run = tmp_path / "run"
    directory = begun(run)
    for step in (2, 4):
        directory.save(step, writer(step))
    os.replace(run / "step-000004", run / ".step-000004.old")
    shutil.copytree(run / "step-000002", run / ".step-000002.old")
    for leftover in (".step-000004.partial", ".step-000001.gone"):
        (run / leftover).mkdir()
        (run / leftover / "model.safetensors").write_bytes(b"half")
    assert open_checkpoint(run).step == 4
    found = begun(run).newest("autoencoder")
    assert found is not None and found.step == 4
    assert names(run) == ["step-000002", "step-000004"]


def test_a_disk_that_would_fill_is_met_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    directory = begun(run, keep=3)
    directory.save(1, writer(1))
    own = sum(file.stat().st_size for file in (run / "step-000001").rglob("*"))
    usage = shutil._ntuple_diskusage(10**9, 0, 5 * 1000 - own)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    directory.check_space(1000)
    with pytest.raises(
        ValueError, match=rf"Expected 5005 bytes for 5 checkpoints in .*, got {5000 - own} free beside {own}"
    ):
        directory.check_space(1001)


def test_a_log_goes_back_and_keeps_events(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = RunLog(path)
    for step in range(1, 7):
        log.write(step=step, loss=float(step))
    log.write(step=5, event="skipped step 5")
    lines = read_log(path)
    with path.open("a") as file:
        file.write('{"step": 2, "loss"')
    assert read_log(path) == lines
    again = RunLog(path)
    again.rewind(3)
    assert [(line["step"], line.get("event")) for line in read_log(path)] == [
        *((1, None), (2, None), (3, None)),
        (5, "skipped step 5"),
    ]
    again.write(step=4, loss=0.5)
    again.write(step=5, event="skipped step 5")
    again.write(step=5, event="another")
    lines = read_log(path)
    assert [line.get("event", line.get("loss")) for line in lines] == [1, 2, 3, "skipped step 5", 0.5, "another"]
    assert lines[-1]["seconds"] >= lines[3]["seconds"]
    from_there = RunLog(path)
    from_there.rewind(5)
    from_there.write(step=5, event="another")
    assert read_log(path) == lines
    RunLog(path).rewind(0)
    assert len(read_log(path)) == 2
    path.write_text('[1]\n{"loss": 3}\n{"step": "a"}\n\0\n{"step": 1}\n')
    assert read_log(path) == [{"step": 1}]
    RunLog(None).write(step=1)
    RunLog(tmp_path / "none").rewind(3)
    assert not (tmp_path / "none").exists()


def test_seconds_add_up_over_starts(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "seconds": 1000.0}\n{"step": 2, "seconds": 2000.0}\n')
    log = RunLog(path)
    log.rewind(1)
    log.write(step=2)
    assert 1000 <= read_log(path)[-1]["seconds"] < 1100


def test_status_and_skipped_batches(tmp_path: Path) -> None:
    directory = begun(tmp_path / "run")
    directory.status("running", step=3)
    directory.status("failed", step=4, message="no")
    said = json.loads((directory.path / "status.json").read_text())
    assert said == {"state": "failed", "step": 4, "message": "no", "time": said["time"]}
    directory.dump_batch(step=3, reason="nan", trajectories=[1])
    directory.dump_batch(step=4, reason="inf", trajectories=[2])
    lines = [json.loads(line) for line in (directory.path / "skipped.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 4] and lines[0]["trajectories"] == [1]
