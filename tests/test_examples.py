"""The examples run as they are, on a small model."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from small import Road

FOLDER = Path(__file__).parent.parent / "examples"

Lines = list[list[str]]


@pytest.fixture
def surrogate_in_solver(road: Road, capsys: pytest.CaptureFixture[str], unchecked: None) -> Callable[..., Lines]:
    """The example's lines, split into columns: t, who, seconds, largest net flux, energy, VRMSE."""
    main: Callable[[Sequence[str]], int] = runpy.run_path(str(FOLDER / "surrogate_in_solver.py"))["main"]

    def run(family: str, *options: str) -> Lines:
        assert main([str(road.dynamics), str(road.fields[family]), *options]) == 0
        return [line.split() for line in capsys.readouterr().out.splitlines()[1:-1]]

    return run


@pytest.mark.parametrize(("family", "interval"), [("open_channel", 0.012), ("porous", 0.02)])
def test_the_surrogate_takes_turns_with_the_solver(
    family: str, interval: float, surrogate_in_solver: Callable[..., Lines]
) -> None:
    lines = surrogate_in_solver(family, "--intervals", "4", "--band", "1e9")
    assert [line[1] for line in lines] == ["solver", "surrogate", "surrogate", "solver"]
    assert [float(line[0]) for line in lines] == pytest.approx([interval * n for n in (1, 2, 3, 4)])
    assert {line[3] for line in lines} == {"0.0"}
    assert all(float(line[4]) > 0 for line in lines)
    assert lines[0][5] == "0.000" and float(lines[1][5]) > 0 and float(lines[3][5]) > 0


def test_the_solver_repeats_what_leaves_the_band(surrogate_in_solver: Callable[..., Lines]) -> None:
    """Where the energy may not change at all the surrogate never gets its way: the loop is the solver alone."""
    lines = surrogate_in_solver("porous", "--intervals", "3", "--band", "1")
    assert [line[1] for line in lines] == ["solver", "fallback", "fallback"]
    assert {line[3] for line in lines} == {"0.0"} and {line[5] for line in lines} == {"0.000"}


def test_error_and_cost_are_drawn(surrogate_in_solver: Callable[..., Lines], tmp_path: Path) -> None:
    lines = surrogate_in_solver("porous", "--intervals", "2", "--turns", "0", "--plot", str(tmp_path / "hybrid.png"))
    assert [line[1] for line in lines] == ["solver", "solver"] and {line[5] for line in lines} == {"0.000"}
    assert (tmp_path / "hybrid.png").stat().st_size > 10_000


@pytest.mark.parametrize("intervals", ["0", "6"])
def test_intervals_beyond_the_record_are_refused(
    intervals: str, surrogate_in_solver: Callable[..., Lines], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        surrogate_in_solver("porous", "--intervals", intervals)
    assert error.value.code == 2
    assert f"Expected 1 to 5 intervals (the store's force ends there), got {intervals}." in capsys.readouterr().err
