"""A sweep is Hydra's product of settings; its runs are the program's own, and what happens to one is nobody else's."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace
from typing import Any

import pytest
from small import MODEL, TRAINER, Road, configuration

from latentphys import cli_training
from latentphys.cli import main
from latentphys.configuration import compose
from latentphys.training import launchers, results
from latentphys.training.launchers import run_locally, submit
from latentphys.training.sweep import Job, expand

REPOSITORY = Path(__file__).parent.parent
STAND_IN = """
import json, os, signal, subprocess, sys, time
from pathlib import Path

settings = dict(text.split("=", 1) for text in sys.argv[3:])
run = Path(settings["run"].strip("'"))
def say(state):
    run.mkdir(parents=True, exist_ok=True)
    (run / "status.json").write_text(json.dumps({"state": state, "time": time.time()}))
    with (run / "starts").open("a") as file: file.write("x")
print("trains", settings["router"])
match settings["router"]:
    case "top1": say("done")
    case "topk": sys.exit("latentphys train: Expected more, got less.")
    case "nested": say("running"); os.kill(os.getpid(), signal.SIGKILL)
    case "dense": say("done"); sys.exit(1)
    case "tree":
        def save(*_): say("preempted"); sys.exit(75)
        signal.signal(signal.SIGUSR1, save)
        say("running")
        time.sleep(30)
    case "launcher":
        argv = [sys.executable, "-m", "latentphys", *sys.argv[1:3], "router=tree", f"run={run}"]
        sys.exit(subprocess.call(argv, start_new_session=True) and 1)
    case "starting":
        os.kill(os.getpid(), signal.SIGUSR1)
        say("done" if os.getsid(0) == os.getpid() else "failed")
"""
"""Takes the place of the program: it ends as the router says."""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    package = tmp_path / "latentphys"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(STAND_IN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def jobs(out: Path, *overrides: str) -> list[Job]:
    return expand("dynamics", ["stores=[a.zarr]", f"out='{out}'", *overrides])


def test_every_combination_is_a_run_that_its_settings_name(tmp_path: Path) -> None:
    found = jobs(tmp_path, "router=top1,topk", "trainer.seed=range(0,2)", "trainer.num_steps=5")
    assert [job.run for job in found] == [
        tmp_path / f"router={router},trainer.seed={seed}" for router in ("top1", "topk") for seed in (0, 1)
    ]
    assert found[2].overrides == ("stores=[a.zarr]", "trainer.num_steps=5", "router=topk", "trainer.seed=0")
    for text, names in (
        ("trainer.learning_rate=choice(1e-3,3e-3)", ["trainer.learning_rate=0.001", "trainer.learning_rate=0.003"]),
        ("stores=[a.zarr],[b/c.zarr]", ["stores=[a.zarr]", "stores=[b.c.zarr]"]),
        ("autoencoder/head=projection,riesz", ["autoencoder.head=projection", "autoencoder.head=riesz"]),
    ):
        assert [job.run.name for job in expand("dynamics", ["stores=[a.zarr]", f"out='{tmp_path}'", text])] == names


@pytest.mark.parametrize("folder", ["plain", "it's, a=b [x]"])
def test_runs_compose_as_training_does(tmp_path: Path, folder: str) -> None:
    out = str(tmp_path / folder).replace("'", "\\'")
    job = expand("dynamics", ["stores=[a.zarr]", f"out='{out}'", "router=top1,topk", "trainer.num_steps=7"])[1]
    direct = compose("train", ["trainer=dynamics", "stores=[a.zarr]", "run=x", "router=topk", "trainer.num_steps=7"])
    assert job.config() == {**direct, "run": str(tmp_path / folder / "router=topk")}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["out=o"], "at least one setting with several values, .*got none; for a single run use `latentphys train`"),
        (["trainer.seed=0,1"], "the sweep's folder once, got 0; add out=DIR"),
        (["out=o,p", "trainer.seed=0,1"], "the sweep's folder once, got 0"),
        (["out=o", "trainer.seed=0,1", "run=x"], "no run=… in a sweep, got run=x; its runs lie below out=DIR"),
        (["out=o", "trainer.seed=0,1", "resume=false"], "no resume=… in a sweep"),
        (["out=o", "trainer.seed=0,one"], "a whole number for 'trainer.seed', got 'one'"),
        (["out=o", "router=top1,top2"], "options that train.yaml knows: .*top2"),
        (["out=o", "trainer.seed=1,1"], "runs with names of their own, got trainer.seed=1 twice"),
        (["out=o", "trainer.learning_rate=interval(0,1)"], "one by one or range.*, got trainer.learning_rate=interval"),
        (["out=o", "trainer.seed=(0,1"], "overrides such as trainer.seed=0,1,2: "),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        expand("dynamics", ["stores=[a.zarr]", *overrides])
    assert not list(tmp_path.iterdir())


def test_a_run_that_was_begun_with_other_settings_is_refused(tmp_path: Path) -> None:
    first = jobs(tmp_path, "router=top1,topk", "trainer.num_steps=5")
    first[1].run.mkdir()
    file = first[1].run / "config.json"
    file.write_text(json.dumps(first[1].config()))
    jobs(tmp_path, "router=top1,topk", "trainer.num_steps=5", "trainer.log_every=3")
    for setting in ("trainer.num_steps=6", "dynamics.depth=5"):
        name = setting.partition("=")[0]
        with pytest.raises(
            ValueError, match=f"that .*router=topk was begun with, got {name} = .*choose another out=DIR"
        ):
            jobs(tmp_path, "router=top1,topk", "trainer.num_steps=5", setting)
    before = first[1].config()
    del before["regime"]  # a setting that came later, which is off unless it is asked for
    file.write_text(json.dumps(before))
    jobs(tmp_path, "router=top1,topk", "trainer.num_steps=5")
    with pytest.raises(ValueError, match="regime.viscosity = .* where it has '\\(none\\)'"):
        jobs(tmp_path, "router=top1,topk", "trainer.num_steps=5", "regime={viscosity: [0, 1]}")
    file.write_text("{")
    with pytest.raises(ValueError, match="Expected a readable .*config.json, got a damaged one"):
        jobs(tmp_path, "router=top1,topk", "trainer.num_steps=5")


def test_runs_that_fail_or_are_killed_leave_the_others_alone(stand_in: Path) -> None:
    out = stand_in / "out"
    some = jobs(out, "router=topk,nested,dense,top1")
    told: list[tuple[str, str]] = []
    states = run_locally(some, report=lambda job, state, log: told.append((job.run.name, state)))
    assert states == {
        "router=topk": "failed",
        "router=nested": "failed",
        "router=dense": "failed",
        "router=top1": "done",
    }
    assert told[-2:] == [("router=top1", "running"), ("router=top1", "done")]
    assert (out / "logs" / "router=topk.log").read_text().endswith("Expected more, got less.\n")
    run_locally(some)
    assert (out / "logs" / "router=topk.log").read_text().count("Expected more, got less.") == 2
    assert [(job.run / "starts").read_text() for job in some if (job.run / "starts").is_file()] == ["xx", "x", "x"]


def test_an_old_word_of_a_run_is_not_taken_for_its_end(stand_in: Path) -> None:
    some = jobs(stand_in / "out", "router=topk,top1")
    some[0].run.mkdir(parents=True)
    (some[0].run / "status.json").write_text('{"state": "preempted", "time": 0}')
    assert run_locally(some) == {"router=topk": "failed", "router=top1": "done"}
    (some[0].run / "status.json").write_text("{")
    assert some[0].state() == "new"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_lets_the_run_save_and_ends_the_sweep(stand_in: Path, number: signal.Signals) -> None:
    some = [Job("dynamics", stand_in / "out" / name, (f"router={name}",)) for name in ("tree", "top1")]

    def interrupt() -> None:
        limit = time.monotonic() + 60
        while some[0].state() != "running" and time.monotonic() < limit:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    thread = threading.Thread(target=interrupt)
    thread.start()
    states = run_locally(some)
    thread.join(60)
    assert states == {"tree": "preempted", "top1": "new"}
    assert not some[1].run.exists()
    assert signal.getsignal(number) == before


def test_a_signal_before_a_run_can_save_is_no_harm_and_is_said_again(stand_in: Path) -> None:
    some = [Job("dynamics", stand_in / "out" / name, (f"router={name}",)) for name in ("starting", "launcher", "top1")]

    def interrupt(job: Job, state: str, log: Path) -> None:
        if (job.run.name, state) == ("launcher", "running"):
            os.kill(os.getpid(), signal.SIGTERM)

    assert run_locally(some, report=interrupt) == {"starting": "done", "launcher": "preempted", "top1": "new"}


def test_the_exit_status_says_how_a_sweep_ended(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def swept(*overrides: str) -> int:
        return main(["sweep", "dynamics", "stores=[a.zarr]", f"out={stand_in / 'out'}", *overrides])

    assert swept("router=top1", "trainer.seed=0,1") == 0
    assert swept("router=topk,top1") == 1
    monkeypatch.setattr(cli_training, "_report", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert swept("router=tree", "trainer.seed=2,3") == 75


def test_only_what_is_not_done_is_queued_and_what_it_said_since_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = jobs(tmp_path, "router=top1,topk,dense")
    for job, state in zip(some, ("done", "preempted", "preempted"), strict=True):
        job.run.mkdir()
        (job.run / "status.json").write_text(json.dumps({"state": state, "time": 0}))
    queued: list[list[str]] = []

    class Queue:
        def map_array(self, rank: Any, arguments: list[list[str]]) -> list[Any]:
            queued.extend(arguments)
            (some[2].run / "status.json").write_text('{"state": "done", "time": 1}')
            return [SimpleNamespace(done=lambda: True, paths=SimpleNamespace(stderr=tmp_path)) for _ in arguments]

    monkeypatch.setattr(launchers, "_executor", lambda *_: Queue())
    assert submit(some, {}) == {"router=top1": "done", "router=topk": "failed", "router=dense": "done"}
    assert queued == [some[1].arguments, some[2].arguments]


@pytest.mark.parametrize(("status", "is_requeued"), [(0, False), (1, False), (75, True)])
def test_a_rank_is_queued_again_where_it_was_preempted(
    monkeypatch: pytest.MonkeyPatch, status: int, is_requeued: bool
) -> None:
    """Training takes the signal's handler for itself; submitit's is there again when it is needed."""
    asked: list[int] = []

    def train(arguments: list[str]) -> int:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        return status

    monkeypatch.setattr("submitit.JobEnvironment", lambda: SimpleNamespace(num_tasks=1))
    monkeypatch.setattr("latentphys.cli.main", train)
    before = signal.signal(signal.SIGUSR1, lambda number, frame: asked.append(number))
    try:
        with pytest.raises(RuntimeError, match=f"status {status}; see") if status else nullcontext():
            launchers._Rank()(["train"])
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert bool(asked) == is_requeued


def test_submitit_and_its_settings_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = jobs(tmp_path, "router=top1,topk")
    for settings, message in (
        ({"cluster": "nowhere"}, "settings that submitit takes: .*nowhere"),
        ({"cluster": "local", "nodes": "two"}, "settings that submitit takes: .*nodes"),
        ({"cluster": "local", "slurm_pigeons": 2}, "settings that submitit takes: .*pigeons"),
    ):
        with pytest.raises(ValueError, match=message):
            submit(some, settings)
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ValueError, match=r"the package submitit .*pip install 'latentphys\[sweeps\]'"):
        submit(some, {})


def rows(*figures: float | None) -> list[dict[str, Any]]:
    return [
        {"run": f"r{n}", "state": "done", "step": 9, "router": "ab"[n // 2], "trainer.seed": n % 2, "test/a/x": figure}
        for n, figure in enumerate(figures)
    ]


def test_runs_that_differ_in_the_seed_become_mean_and_spread() -> None:
    summary = results.over_seeds(rows(1.0, 4.0, 2.0, 2.5))
    assert [row["test/a/x"] for row in summary] == [mean([1.0, 4.0]), mean([2.0, 2.5])]
    assert [row["test/a/x ±"] for row in summary] == [stdev([1.0, 4.0]), stdev([2.0, 2.5])]
    assert [row["trainer.seed"] for row in summary] == ["0, 1", "0, 1"]
    assert summary[0]["run"] == "2 runs such as r0"
    best = results.over_seeds([{**row, "best": n} for n, row in enumerate(rows(1.0, 4.0, 2.0, 2.5))])
    assert [row["best"] for row in best] == [0.5, 2.5]
    unknown = results.ordered(rows(float("nan"), 4.0, float("inf"), 2.5), "test/a/x")
    assert [row["run"] for row in unknown[:2]] == ["r3", "r1"]
    ranked = results.ordered(summary, "test/a/x")
    assert [row["router"] for row in ranked] == ["b", "a"]
    text = results.as_csv(ranked).splitlines()
    assert text[0] == "run,state,step,router,trainer.seed,test/a/x,test/a/x ±"
    assert text[1].startswith('2 runs such as r2,done,9,b,"0, 1",2.25,0.35355')
    assert json.loads(results.as_json(ranked)) == ranked


@pytest.mark.parametrize("state", ["failed", "running", "preempted"])
def test_what_is_not_done_takes_no_part_in_means(state: str) -> None:
    four = rows(1.0, 4.0, 2.0, None)
    four[1]["state"] = state
    summary = results.over_seeds(four)
    assert [(row["test/a/x"], row["test/a/x ±"]) for row in summary] == [(1.0, None), (4.0, None), (2.0, None)]
    assert [row["state"] for row in summary] == ["done", state, "done"]
    different = [{**row, "trainer.seed": 0, "depth": n} for n, row in enumerate(four)]
    assert results.over_seeds(different) == different
    assert [row["run"] for row in results.ordered(four, "test/a/x")] == ["r0", "r2", "r1", "r3"]
    with pytest.raises(ValueError, match="a column to sort by out of run, state, .*, got 'loss'"):
        results.ordered(four, "loss")
    assert json.loads(results.as_json([{"run": "r", "best": float("inf")}])) == [{"run": "r", "best": None}]


def test_the_printed_table_has_a_figure_and_its_spread_together(capsys: pytest.CaptureFixture[str]) -> None:
    results.show(results.over_seeds(rows(1.0, 4.0, 2.0, 2.5)))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and "±" not in lines[0]
    assert lines[1].split()[-3:] == ["2.5", "±", "2.1"]


def test_runs_are_found_below_folders(road: Road, tmp_path: Path) -> None:
    found = results.find_runs([road.autoencoder.parent, road.dynamics])
    assert found == sorted([road.autoencoder, road.dynamics])
    with pytest.raises(ValueError, match="a run directory or a folder of them, got .*, without any run"):
        results.find_runs([tmp_path])


def command(road: Road, out: Path, *rest: str) -> list[str]:
    latents = f"stores=[{road.latents['open_channel']}]"
    start = [sys.executable, "-m", "latentphys", "sweep", "dynamics", latents, f"out='{out}'"]
    return [*start, *MODEL["dynamics"], *(text for text in TRAINER if "num_steps" not in text), *rest]


@pytest.mark.slow
def test_a_sweep_trains_and_goes_on(road: Road, tmp_path: Path) -> None:
    """Real runs: the second is the weights that training alone gives, the third fails, and a second sweep skips."""
    settings = ["trainer.num_steps=2", "router=top1", "dynamics.depth=2,3,0"]
    ended = subprocess.run(command(road, tmp_path / "s", *settings), capture_output=True, text=True, timeout=200)
    assert ended.returncode == 1, ended.stderr
    assert "failed    dynamics.depth=0" in ended.stderr and "Expected depth ≥ 1, got 0" in ended.stderr
    assert [line.split()[:2] for line in ended.stdout.splitlines()[1:]] == [
        ["dynamics.depth=2", "done"],
        ["dynamics.depth=3", "done"],
    ]
    config = configuration(
        "dynamics", [road.latents["open_channel"]], tmp_path / "alone", *settings[:2], "dynamics.depth=3"
    )
    from latentphys.training import open_checkpoint, train_dynamics

    alone = train_dynamics(config) / "model.safetensors"
    swept = open_checkpoint(tmp_path / "s" / "dynamics.depth=3").path / "model.safetensors"
    assert swept.read_bytes() == alone.read_bytes()
    again = subprocess.run(
        command(road, tmp_path / "s", settings[0], settings[1], "dynamics.depth=2,3"),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert again.returncode == 0 and "running" not in again.stderr


@pytest.mark.slow
def test_ranks_of_a_submitted_run_train_together(road: Road, tmp_path: Path) -> None:
    """Through submitit's own queue of this machine: two ranks, and the weights that one process gives, but rounding."""
    import torch
    from safetensors.torch import load_file

    from latentphys.training import open_checkpoint

    # The noise of an input is drawn by each rank for itself.
    settings = ["trainer.num_steps=2", "router=top1", "trainer.seed=0,1", "dynamics_training.input_noise=0"]
    ended = subprocess.run(
        [*command(road, tmp_path / "s", *settings), "--launcher", "submitit", "--submitit"]
        + ["cluster=local", "tasks_per_node=2", "timeout_min=5"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "MASTER_ADDR": "127.0.0.1"},
    )
    assert ended.returncode == 0, ended.stderr
    (one := tmp_path / "one").mkdir()
    alone = subprocess.run(command(road, one, *settings), capture_output=True, text=True, timeout=300)
    assert alone.returncode == 0, alone.stderr
    for seed in (0, 1):
        pair = [
            load_file(open_checkpoint(f / f"trainer.seed={seed}").path / "model.safetensors")
            for f in (tmp_path / "s", one)
        ]
        assert max(float((pair[0][name] - pair[1][name]).abs().max()) for name in pair[0]) < 1e-4
        assert all(torch.isfinite(tensor).all() for tensor in pair[0].values())


@pytest.mark.slow
def test_a_sweep_of_two_processes_per_run_is_saved_by_a_signal(road: Road, tmp_path: Path) -> None:
    """Launchers start their workers in sessions of their own; the signal reaches them all the same."""
    launch = ["--accelerate", str(REPOSITORY / "configs" / "accelerate" / "cpu_2proc.yaml")]
    settings = ["trainer.num_steps=100000", "router=top1", "trainer.seed=0,1"]
    sweep = subprocess.Popen([*command(road, tmp_path / "s", *settings), *launch], stderr=subprocess.PIPE, text=True)
    log = tmp_path / "s" / "trainer.seed=0" / "log.jsonl"
    try:
        limit = time.monotonic() + 120
        while not (log.is_file() and log.read_text().count("\n") > 2) and time.monotonic() < limit:
            time.sleep(0.2)
        sweep.send_signal(signal.SIGTERM)
        _, said = sweep.communicate(timeout=120)
    finally:
        sweep.kill()
    assert sweep.returncode == 75, said
    assert json.loads((log.parent / "status.json").read_text())["state"] == "preempted"
    assert not (tmp_path / "s" / "trainer.seed=1").exists()
