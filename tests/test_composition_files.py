"""Weights of any three safetensors files: closed forms, FP64, memory, and writes that fail."""

import json
import os
import re
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from composed import write_files
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from latentphys.composition import coordinate, files, merge_files
from latentphys.composition.files import num_numbers
from latentphys.composition.weights import pieces


def relatives(anchor: Mapping[str, Tensor], size: float = 0.1) -> tuple[dict[str, Tensor], ...]:
    """An anchor and two endpoints near it; what is not of floating point stays."""

    def near(tensor: Tensor) -> Tensor:
        moves = tensor.is_floating_point() or tensor.is_complex()
        return tensor + size * torch.randn_like(tensor) if moves else tensor.clone()

    return dict(anchor), *({name: near(tensor) for name, tensor in anchor.items()} for _ in range(2))


def many() -> dict[str, Tensor]:
    """Tensors of every kind, some larger than a piece: rows of any length, and a single row."""
    return {
        "matrix": torch.randn(300, 400),
        "experts": torch.randn(3, 280, 300),
        "row": torch.randn(1, 1, 200_000),
        "column": torch.randn(200_000, 1),
        "wide": torch.randn(3, 70_000),
        "gain": torch.randn(5),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        "double": torch.randn(3, 5, dtype=torch.float64),
        "half": torch.randn(5, 7).bfloat16(),
        "modes": torch.randn(6, dtype=torch.complex64),
        "count": torch.tensor([3, 4]),
        "mask": torch.tensor([True, False, True]),
    }


def residual_form(anchor: Tensor, low: Tensor, high: Tensor, alpha: float) -> Tensor:
    """θ₀ + Δ₊ + α Δ₋ as it is written."""
    wide = torch.promote_types(anchor.dtype, torch.float64)
    a, b, c = (tensor.to(wide) for tensor in (anchor, low, high))
    return a + ((c + b) / 2 - a) + alpha * (c - b) / 2


@pytest.mark.parametrize("alpha", [0.0, 0.37, -1.8])
def test_every_tensor_is_the_anchor_plus_half_the_sum_plus_alpha_times_half_the_difference(
    tmp_path: Path, alpha: float
) -> None:
    three = relatives(many())
    merge_files(*write_files(tmp_path, *three), tmp_path / "out", alpha)
    merged = load_file(tmp_path / "out")
    assert set(merged) == set(three[0])
    for name, (anchor, low, high) in {name: [one[name] for one in three] for name in merged}.items():
        assert (merged[name].dtype, merged[name].shape) == (anchor.dtype, anchor.shape)
        if name in ("count", "mask"):
            assert torch.equal(merged[name], anchor)
        else:
            expected = residual_form(anchor, low, high, alpha)
            error = (merged[name].to(expected.dtype) - expected).abs()
            # half a unit in the last place of the anchor's type: rounded once, from FP64
            rounding = 0.5 * torch.finfo(anchor.dtype).eps * expected.abs() + 1e-15
            assert (error <= rounding).all(), name


@pytest.mark.parametrize(("alpha", "endpoint"), [(-1.0, 1), (1.0, 2)])
def test_the_endpoints_come_back_to_the_last_bit_however_their_weights_differ(
    tmp_path: Path, alpha: float, endpoint: int
) -> None:
    three = relatives(many())
    three[1]["gain"], three[2]["gain"] = (
        torch.tensor([1e-30, 1.0, -3e4, 0.1, 1e-9]),
        torch.tensor([1e8, 1e-12, 1, 3, 7]),
    )
    merge_files(*write_files(tmp_path, *three), tmp_path / "out", alpha)
    merged = load_file(tmp_path / "out")
    assert not [name for name in merged if not torch.equal(merged[name], three[endpoint][name])]


def test_where_the_endpoints_are_equal_no_alpha_changes_a_bit(tmp_path: Path) -> None:
    three = relatives(many())
    three[2]["matrix"] = three[1]["matrix"].clone()
    merge_files(*write_files(tmp_path, *three), tmp_path / "out", 0.123)
    assert torch.equal(load_file(tmp_path / "out")["matrix"], three[1]["matrix"])


def test_weights_that_are_linear_in_a_parameter_are_found_at_every_value_of_it(tmp_path: Path) -> None:
    """dx/dt = (A + ν B) x: trained at two ν, the composite is the operator at any other one."""
    a, b = torch.randn(2, 40, 40, dtype=torch.float64)
    at = {nu: {"operator": a + nu * b} for nu in (0.1, 0.25, 0.4, 0.7)}
    paths = write_files(tmp_path, at[0.25], at[0.1], at[0.4])
    for nu in (0.25, 0.7):
        merge_files(*paths, tmp_path / "out", coordinate(nu, 0.1, 0.4))
        assert torch.allclose(load_file(tmp_path / "out")["operator"], at[nu]["operator"], rtol=0, atol=1e-14)


@pytest.mark.parametrize("fixed", [None, {"bn.running_var"}])
def test_what_is_fixed_is_copied_and_not_worked_out(tmp_path: Path, fixed: set[str] | None) -> None:
    """Between two infinities lies no number."""
    variance = torch.tensor([1.0, float("inf"), -float("inf"), -0.0])
    three = [{"w": torch.randn(4, 4) + d, "bn.running_var": variance} for d in (0, 1, 2)]
    merge_files(*write_files(tmp_path, *three), tmp_path / "out", 0.3, fixed=fixed)
    copied = load_file(tmp_path / "out")["bn.running_var"]
    assert torch.equal(copied.view(torch.int32), variance.view(torch.int32))


def test_the_sum_is_taken_in_fp64(tmp_path: Path) -> None:
    """In FP32 the same expression is off by a unit in the last place of most of these weights."""
    three = relatives({"w": torch.randn(200, 200)}, size=1e-3)
    merge_files(*write_files(tmp_path, *three), tmp_path / "out", 0.3)
    merged = load_file(tmp_path / "out")["w"]
    anchor, low, high = (one["w"] for one in three)
    single = anchor + ((high + low) / 2 - anchor) + 0.3 * (high - low) / 2
    exact = residual_form(anchor, low, high, 0.3)
    assert (merged.double() - exact).abs().max() <= (single.double() - exact).abs().max() / 1.5
    assert (single != merged).float().mean() > 0.1
    assert torch.equal(merged, exact.float())


def test_endpoints_in_other_types_make_the_anchors_type(tmp_path: Path) -> None:
    anchor, low, high = relatives({"w": torch.randn(8, 8).bfloat16()})
    low, high = {"w": low["w"].float()}, {"w": high["w"].double() + 1e-3}
    merge_files(*write_files(tmp_path, anchor, low, high), tmp_path / "out", 0.5)
    expected = (0.25 * low["w"].double() + 0.75 * high["w"]).bfloat16()
    assert torch.equal(load_file(tmp_path / "out")["w"], expected)


def test_the_relation_of_the_three_is_measured(tmp_path: Path) -> None:
    anchor, plus, minus = torch.randn(3, 50, 60, dtype=torch.float64)
    three = [{"w": anchor, "n": torch.arange(7)}] + [
        {"w": anchor + 0.1 * plus + sign * 0.2 * minus, "n": torch.arange(7)} for sign in (-1, 1)
    ]
    relation = merge_files(*write_files(tmp_path, *three), tmp_path / "out", 0.0)
    assert (relation.num_moved, relation.num_fixed) == (3000, 7)
    assert relation.plus == pytest.approx(float((0.1 * plus).norm() / anchor.norm()), rel=1e-12)
    assert relation.minus == pytest.approx(float((0.2 * minus).norm() / anchor.norm()), rel=1e-12)
    ways = [(one["w"] - anchor).flatten() for one in three[1:]]
    assert relation.residuals == pytest.approx(float(torch.cosine_similarity(ways[0], ways[1], dim=0)), rel=1e-9)
    for cosine, one in zip((relation.cosine_low, relation.cosine_high), three[1:], strict=True):
        rows = [(w - w.mean()).flatten() for w in (anchor, one["w"])]
        assert cosine == pytest.approx(float(torch.cosine_similarity(rows[0], rows[1], dim=0)), rel=1e-9)


def test_the_header_is_what_other_readers_expect(tmp_path: Path) -> None:
    paths = write_files(tmp_path, *relatives(many()))
    done: list[int] = []
    merge_files(*paths, tmp_path / "out", 0.5, metadata={"alpha": "½"}, progress=done.append)
    assert sum(done) == num_numbers(paths[0])
    with safe_open(tmp_path / "out", "pt") as file:
        assert file.metadata() == {"alpha": "½"}
    data = (tmp_path / "out").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    assert size % 8 == 0
    for name, about in header.items():
        if name != "__metadata__":  # aligned, as memory maps want it
            start, end = about["data_offsets"]
            itemsize = many()[name].element_size()
            assert start % itemsize == 0 and end - start == itemsize * many()[name].numel()


@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (7,), (100,), (3, 5), (4, 1, 30), (1, 1, 90), (2, 3, 2, 11)])
def test_pieces_go_through_a_tensor_once_in_order_and_are_small(shape: tuple[int, ...]) -> None:
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape)
    parts = [tensor[index].reshape(-1) for index in pieces(shape, 10)]
    assert torch.equal(torch.cat(parts), tensor.reshape(-1))
    assert max(part.numel() for part in parts) <= 10


def resident() -> int:
    """Memory of this process that no file stands behind [bytes]."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
def test_a_merge_needs_far_less_memory_than_one_tensor(tmp_path: Path) -> None:
    """One tensor of 32 MB in each file: all three, or two of them in FP64, would take 100 MB or more."""
    merge_files(*write_files(tmp_path, *relatives({"w": torch.randn(4, 4)})), tmp_path / "warm", 0.5)
    anchor = torch.randn(1, 2000, 4000)
    size, paths = anchor.nbytes, write_files(tmp_path, {"w": anchor}, {"w": anchor * 1.1}, {"w": anchor * 0.9})
    del anchor
    peak, before, is_over = 0, resident(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not is_over.is_set():
            peak = max(peak, resident())
            time.sleep(5e-4)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        merge_files(*paths, tmp_path / "out", 0.5)
    finally:
        is_over.set()
        thread.join()
    assert 0 < peak - before < size / 2


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, out = write_files(tmp_path, *relatives(many())), tmp_path / "out"
    out.write_bytes(b"before")
    there, calls, real = sorted(tmp_path.iterdir()), [], files.at

    def fails(*arguments: object) -> Tensor:
        calls.append(1)
        if len(calls) > 5:
            raise OSError("No space left on device")
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(files, "at", fails)
    with pytest.raises(OSError, match="No space left"):
        merge_files(*paths, out, 0.5)
    assert sorted(tmp_path.iterdir()) == there and out.read_bytes() == b"before"
    assert os.path.getsize(out) == 6
