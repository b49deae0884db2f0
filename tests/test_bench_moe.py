"""The benchmark of the sparse layer runs, and prints JSON alone."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
REQUIRED = {
    "top1_e16_forward_over_dense",
    "top1_e16_forward_backward_over_dense",
    "all_experts_over_top1_e16",
    "top1_e64_over_e16",
}


def bench(*options: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "bench_moe.py"), "--quick", "--threads", "1", *options]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def test_quick_run_prints_json_alone_and_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    options = ("--experts", "1", "16", "64", "--top-k", "1", "2", "--plot", "time.svg")
    machine, *lines = [json.loads(line) for line in bench("--json", *options, cwd=tmp_path).stdout.splitlines()]
    assert machine["threads"] == 1
    assert len({line["name"] for line in lines}) == len(lines)
    assert {line["name"] for line in lines} >= REQUIRED | {
        f"{kind}_e{e}_{way}_over_dense"
        for kind in ("top1", "loop_top1", "block_top1")
        for e in (1, 16, 64)
        for way in ("forward", "forward_backward")
    }
    assert all(math.isfinite(line["value"]) for line in lines)
    timed = [line for line in lines if "contestant" in line]
    assert all(line["ms"] > 0 and line["dense_ms"] > 0 and line["lowest"] <= line["highest"] for line in timed)
    loads = {line["contestant"]: line["largest_share"] for line in timed if line["experts"] == 16}
    assert loads["skewed_top1"] == pytest.approx(0.5, abs=0.02)
    assert loads["top1"] < 0.3
    for name in ("top1_e64_over_e16", "all_experts_over_top1_e16"):
        (line,) = (line for line in lines if line["name"] == name)
        assert line["value"] == pytest.approx(line["ms"] / line["top1_e16_ms"])  # exact, for there is one round
    assert (tmp_path / "time.svg").read_text().count("top-1") >= 2


def test_results_are_appended_to_a_file(tmp_path: Path) -> None:
    options = ("--experts", "16", "--top-k", "1", "--parts", "layer", "--json", "moe.jsonl")
    (tmp_path / "moe.jsonl").write_text('{"name": "there before"}\n')
    printed = bench(*options, cwd=tmp_path).stdout
    names = [json.loads(line)["name"] for line in (tmp_path / "moe.jsonl").read_text().splitlines()]
    assert names[0] == "there before" and names.count("top1_e16_forward_over_dense") == 1
    assert "top1_e16_forward_over_dense" in printed
