"""Safetensors files that do not compose are refused, and only these."""

from pathlib import Path

import pytest
import torch
from composed import write_files
from torch import Tensor

from latentphys.composition import merge_files


def test_refusals(tmp_path: Path) -> None:
    w, big, out = torch.randn(8, 8), torch.randn(60, 60), tmp_path / "out"

    def refused(match: str, three: list[dict[str, Tensor]], alpha: float = 0.5, **options: object) -> None:
        before = sorted(tmp_path.iterdir())
        paths = write_files(tmp_path, *three)
        with pytest.raises(ValueError, match=match):
            merge_files(*paths, out, alpha, **options)  # type: ignore[arg-type]
        assert set(tmp_path.iterdir()) - set(before) <= set(paths)

    near = [{"w": w}, {"w": w + 0.1}, {"w": w - 0.1}]
    refused("Expected a finite alpha, got nan. Give a number", near, float("nan"))
    refused("got 'v' in .*low.* and not in .*anchor", [near[0], {"w": w, "v": w.clone()}, near[2]])
    refused("got 'w' in .*anchor.* and not in .*high", [near[0], near[1], {"x": w}])
    refused(
        r"'w' of shape \(8, 8\), as in .*anchor.*, got \(4, 16\) in .*low.*; both endpoints",
        [near[0], {"w": w.reshape(4, 16)}, near[2]],
    )
    refused("'w' of type F32, as in .*, got C64 in .*high.*; both endpoints", [near[0], near[1], {"w": w + 0j}])
    refused(
        "'n' of type I64, as in .*, got F32 in .*low",
        [{"n": torch.arange(3)}, {"n": torch.arange(3.0)}, {"n": torch.arange(3)}],
    )
    refused("finite weights, got others in 'w' of .*high.* Use an earlier checkpoint", [near[0], near[1], {"w": w / 0}])
    refused("finite weights, got others in 'w' of .*anchor", [{"w": w * float("nan")}, near[1], near[2]])
    refused("two endpoints that differ, got the same weights in .*low.* and .*high", [near[0], near[1], near[1]])
    refused(
        "Expected 'n' equal in .*anchor.* and .*high.*: buffers and scales do not compose",
        [{**near[0], "n": torch.tensor(1)}, {**near[1], "n": torch.tensor(1)}, {**near[2], "n": torch.tensor(2)}],
    )
    refused(
        "Expected 'router.w' equal in .*: the router moved; .*freeze_router=true",
        [{"w": w + d, "router.w": w + d} for d in (0, 1, 2)],
        fixed={"router.w"},
    )
    refused("Expected 'bn.running_var' equal", [{"w": w + d, "bn.running_var": w[0] + d} for d in (0, 1, 2)])
    refused(
        r"high.* to be fine-tuned from .*anchor.*, got weights whose cosine .* is -?0\.0\d\d, below 0.25",
        [{"w": big}, {"w": big + 0.1 * torch.randn_like(big)}, {"w": torch.randn_like(big)}],
    )
    refused(
        "within the range of torch.float16, got others in 'w' at alpha = 9",
        [
            {"w": torch.tensor([1.0, 1.0]).half()},
            {"w": torch.tensor([1.0, 0.0]).half()},
            {"w": torch.tensor([1.0, 3e4]).half()},
        ],
        9.0,
    )
    paths = write_files(tmp_path, *near)
    paths[1].write_bytes(paths[1].read_bytes()[:-4])
    with pytest.raises(ValueError, match="Expected a readable safetensors file, got .*low.* Copy it again"):
        merge_files(*paths, out, 0.5)
    with pytest.raises(ValueError, match="Expected a readable safetensors file, got .*none"):
        merge_files(tmp_path / "none", paths[1], paths[2], out, 0.5)


def test_no_relatives_are_refused_without_need(tmp_path: Path) -> None:
    """Few weights, an anchor of zeros, gains and biases, endpoints far along, one that stayed: all compose."""
    w = torch.randn(60, 60)
    for three in (
        [{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 1.0])}, {"w": torch.tensor([-1.0, 0.0])}],
        [{"w": torch.zeros(60, 60)}, {"w": w}, {"w": -w}],
        [{"w": torch.ones(60, 60)}, {"w": 1 + w}, {"w": 1 - w}],
        [{"b": torch.randn(5000)}, {"b": torch.randn(5000)}, {"b": torch.randn(5000)}],
        [{"w": w}, {"w": w + torch.randn_like(w)}, {"w": w + 2 * torch.randn_like(w)}],
        [{"w": w}, {"w": w}, {"w": 1.5 * w}],
    ):
        merge_files(*write_files(tmp_path, *three), tmp_path / "out", 0.5)
