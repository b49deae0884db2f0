"""What a run logs of its experts: closed forms by hand, the same on two processes, and nothing that training feels."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from small import Road, train

from latentphys.routers import DenseRouter, Layout, Nested, Routing, telemetry
from latentphys.training.routing_log import RoutingLog, Usage

PROGRAM = """
import json
import os
import sys

import torch
import torch.distributed as dist

from latentphys.routers import Routing
from latentphys.training.routing_log import RoutingLog, Usage

rank, folder = int(os.environ["RANK"]), sys.argv[1]
dist.init_process_group("gloo")
log, calls, all_gather = RoutingLog(2), [], dist.all_gather
dist.all_gather = lambda *given: (calls.append(1), all_gather(*given))
lines = []
for name, family in [("0", 0), ("1", 1), ("log", 0), ("2", 0), ("log", 0)]:
    if name == "log":
        lines.append(log.lines())
        continue
    ids, scores = torch.load(f"{folder}/{name}.pt", weights_only=True)
    half = slice(rank * 6, rank * 6 + 6)
    routing = Routing(ids[half], torch.ones(6, 1), scores[half])
    log.add(Usage.of([[routing]], 2, family))
with open(f"{folder}/{rank}.json", "w") as file:
    json.dump([lines, len(calls)], file)
dist.destroy_process_group()
"""


def routing(ids: list[int], num_experts: int = 4, best: float = 0.7) -> Routing:
    """Every token sure of its expert: best score ``best``, the others alike."""
    chosen = torch.tensor(ids)[:, None]
    scores = torch.full((len(ids), num_experts), (1 - best) / (num_experts - 1)).scatter(1, chosen, best)
    return Routing(chosen, torch.ones(len(ids), 1), scores)


def usage(routings: list[list[Routing]], num_samples: int, family: int = 0) -> Usage:
    found = Usage.of(routings, num_samples, family)
    assert found is not None
    return found


def log(run: Path) -> list[dict[str, Any]]:
    """The training lines of a run."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors")


def test_a_line_by_hand() -> None:
    """Two families, two layers, two steps unrolled, samples of four tokens."""
    found = RoutingLog(2)
    even, unsure, sure = routing([0, 1, 2, 3] * 2), routing([3] * 8, best=0.4), routing([3] * 8)
    found.add(usage([[even, unsure], [even, sure]], 2, family=0))
    found.add(usage([[routing([0, 0, 1, 1])] * 2], 1, family=1))
    # Both samples of family 0 put 2 tokens at each expert, so that they have no scatter.
    joint, squares = torch.tensor([[4] * 4, [2, 2, 0, 0]]), torch.tensor([[8] * 4, [4, 4, 0, 0]])
    information = telemetry.corrected_mutual_information(joint, squares, torch.tensor([2, 1]))
    first, second = found.lines()
    assert first == {
        "layer": 0,
        "load": [round(6 / 20, 6), round(6 / 20, 6), round(4 / 20, 6), round(4 / 20, 6)],
        "entropy": round(-(0.6 * math.log2(0.3) + 0.4 * math.log2(0.2)), 6),
        "entropy_share": round(-(0.6 * math.log2(0.3) + 0.4 * math.log2(0.2)) / 2, 6),
        "dead": [],
        "dead_age": [],
        "margin": pytest.approx(0.6),
        "mutual_information": pytest.approx(information.bits, abs=1e-6),
        "purity": round((4 + 4 + 4 + 4) / 20, 6),
    }
    assert (second["layer"], second["load"], second["dead"]) == (1, [0.1, 0.1, 0.0, 0.8], [2])
    # Two samples of family 0 have a margin of 0.4 − 0.2, then 0.7 − 0.1; one of family 1 has 0.6.
    assert second["margin"] == pytest.approx((2 * (0.2 + 0.6) / 2 + 0.6) / 3, abs=1e-6)
    assert second["mutual_information"] > 0.4 and second["purity"] == 1.0


def test_every_choice_of_a_token_is_load() -> None:
    ids = torch.tensor([[0, 1], [0, 2]])
    found = RoutingLog(1)
    found.add(usage([[Routing(ids, torch.ones(2, 2), torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.1, 0.3]]))]], 1))
    (line,) = found.lines()
    assert line["load"] == [0.5, 0.25, 0.25]
    assert line["margin"] == pytest.approx(0.25, abs=1e-6)


def test_one_family_says_nothing_of_families() -> None:
    found = RoutingLog(3)
    for _ in range(2):
        found.add(usage([[routing([0, 1])]], 1, family=2))
    (line,) = found.lines()
    assert line["mutual_information"] is None and line["purity"] is None


def test_lines_cover_the_steps_since_the_last_one_and_ages_go_on() -> None:
    found = RoutingLog(1)
    assert found.lines() == []
    steps = [[0, 1], [0, 0], [0, 0], [0, 2], [0, 0], [0, 0]]
    lines = []
    for n, ids in enumerate(steps):
        found.add(usage([[routing(ids)]], 1))
        if n % 2:
            lines += found.lines()
            assert found.lines() == []
    assert [line["load"] for line in lines] == [[0.75, 0.25, 0, 0], [0.75, 0, 0.25, 0], [1, 0, 0, 0]]
    assert [line["dead"] for line in lines] == [[2, 3], [1, 3], [1, 2, 3]]
    assert [line["dead_age"] for line in lines] == [[2, 2], [3, 4], [5, 2, 6]]


def test_samples_that_act_as_one_are_no_proof() -> None:
    """Whole samples at one expert, three of each family: as tokens they would tell the families apart."""
    found = RoutingLog(2)
    found.add(usage([[routing([0] * 100 + [1] * 50)]], 3, family=0))
    found.add(usage([[routing([0] * 50 + [1] * 100)]], 3, family=1))
    (line,) = found.lines()
    assert telemetry.mutual_information(torch.tensor([[100, 50], [50, 100]])).bits > 0.08
    assert line["mutual_information"] == 0.0


def test_routing_in_levels_is_judged_where_tokens_arrive() -> None:
    layout = Layout(3, (2, 2, 2))
    said = Nested(8, 6, 3, top_groups=2, top_k=1)(torch.randn(24, 8), layout)
    found = RoutingLog(1)
    found.add(usage([[said]], 3))
    (line,) = found.lines()
    assert said.levels
    assert line["load"] == pytest.approx((telemetry.expert_counts(said.ids, 6) / 48).tolist(), abs=1e-6)
    assert line["margin"] == pytest.approx(telemetry.top1_margin(said.scores), abs=1e-6)


def test_one_expert_has_nothing_to_tell() -> None:
    assert Usage.of([[DenseRouter(8)(torch.randn(4, 8))]], 1, 0) is None


def test_counting_never_waits_for_the_device() -> None:
    """Numbers of a meta tensor do not exist: asking for one, as a wait for a GPU does, would raise."""
    scores = torch.rand(8, 4, requires_grad=True)
    said = Routing(torch.zeros(8, 1, dtype=torch.long, device="meta"), torch.ones(8, 1), scores.to("meta"))
    found = RoutingLog(2)
    for family in (0, 1):
        seen = usage([[said, said]] * 2, 2, family)
        assert not seen.margin_L.requires_grad
        found.add(seen)
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        found.lines()


def test_two_processes_log_what_one_does(tmp_path: Path) -> None:
    """Expert 1 takes its last token on the second process, expert 2 on the first; one collective per line."""
    torch.manual_seed(1)
    batches = []
    for n, ids in enumerate(([0, 3, 0, 2, 0, 2, 0, 1, 1, 3, 0, 0], [3, 3, 2] * 2 + [3, 3, 3] * 2, [3] * 12)):
        batches.append((torch.tensor(ids)[:, None], torch.rand(12, 5).softmax(-1)))
        torch.save(batches[-1], tmp_path / f"{n}.pt")
    run_ranks(PROGRAM, tmp_path, tmp_path)
    whole, lines = RoutingLog(2), list[list[dict[str, Any]]]()
    for (chosen, scores), family in zip(batches, (0, 1, 0), strict=True):
        whole.add(usage([[Routing(chosen, torch.ones(12, 1), scores)]], 4, family))
        if len(lines) or family:
            lines.append(whole.lines())
    assert [lines, 2] == json.loads((tmp_path / "0.json").read_text()) == json.loads((tmp_path / "1.json").read_text())
    assert lines[0][0]["dead"] == [4] and lines[0][0]["mutual_information"] is not None
    assert lines[1][0]["dead"] == [0, 1, 2, 4] and lines[1][0]["dead_age"] == [2, 2, 1, 3]


def test_training_writes_a_line_per_layer(road: Road) -> None:
    lines = log(road.dynamics)
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        assert [entry["layer"] for entry in line["routing"]] == [0, 1]
        for entry in line["routing"]:
            assert sum(entry["load"]) == pytest.approx(1.0, abs=1e-5)
            assert 0 <= entry["entropy_share"] <= 1 and 0 < entry["margin"] < 1
            # Every two steps visit both families once.
            assert 0 <= entry["mutual_information"] <= 1 and 0.5 <= entry["purity"] <= 1
    assert not any("routing" in line for line in log(road.autoencoder))


def test_random_routing_knows_less_than_routing_by_content(road: Road, tmp_path: Path) -> None:
    settings, lines = ["trainer.num_steps=12", "trainer.log_every=12"], dict[str, list[dict[str, Any]]]()
    for router, num_experts in (("random", 4), ("top1", 4), ("dense", 1)):
        train(
            "dynamics",
            road.inputs("dynamics"),
            tmp_path / router,
            *settings,
            f"router={router}",
            f"router.num_experts={num_experts}",
        )
        (line,) = log(tmp_path / router)
        lines[router] = line.get("routing", [])
    assert lines["dense"] == []
    for entry in lines["random"]:
        assert entry["mutual_information"] < 0.005 and 0.5 <= entry["purity"] < 0.56
        assert entry["entropy_share"] > 0.99 and entry["margin"] == 1.0
    for entry in lines["top1"]:
        assert entry["mutual_information"] > 0.04 and entry["purity"] > 0.6


def test_held_out_data_leave_no_trace_in_the_lines(road: Road, tmp_path: Path) -> None:
    """Nor does asking for lines more often change the weights."""
    lasts = {}
    for name, test_every, log_every in (("tests", 1, 3), ("quiet", 6, 3), ("lines", 6, 1)):
        settings = [f"trainer.test_every={test_every}", f"trainer.log_every={log_every}"]
        lasts[name] = weights(train("dynamics", road.inputs("dynamics"), tmp_path / name, *settings))
    tested, quiet = ([line["routing"] for line in log(tmp_path / name)] for name in ("tests", "quiet"))
    assert tested == quiet
    for name in ("tests", "lines"):
        assert all(torch.equal(tensor, lasts["quiet"][key]) for key, tensor in lasts[name].items())
