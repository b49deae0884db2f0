"""The examples run as they are, on a small model made here."""

import runpy
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from latentphys.configuration import compose
from latentphys.data import open_store
from latentphys.families import Porous, simulate
from latentphys.training import encode_store, load_autoencoder, train_autoencoder, train_dynamics

FOLDER = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def porous(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A store of small porous flows and a dynamics model that has seen them twice."""
    folder = tmp_path_factory.mktemp("porous")
    store = simulate(Porous(spin_up=0.01), folder / "porous.zarr", shape=(8, 8, 8), num_trajectories=2, num_frames=6)
    common = ["held_out=1", "trainer.num_steps=2", "trainer.batch_size=2", "trainer.warmup=1"]
    sizes = ["autoencoder.widths=[8,16]", "autoencoder.latent_channels=4"]
    train_autoencoder(
        compose("train", ["trainer=autoencoder", f"stores=[{store}]", f"run={folder / 'ae'}", *common, *sizes])
    )
    latents = encode_store(
        load_autoencoder(folder / "ae"), open_store(store), folder / "latent.zarr", checkpoint=str(folder / "ae")
    )
    sizes = ["dynamics.dim=24", "dynamics.depth=1", "dynamics.num_heads=2", "dynamics.hidden=16"]
    run = ["trainer=dynamics", f"stores=[{latents}]", f"run={folder / 'dynamics'}"]
    train_dynamics(compose("train", [*run, *common, *sizes]))
    return {"store": str(store), "dynamics": str(folder / "dynamics")}


@pytest.fixture
def surrogate_in_solver(porous: dict[str, str], capsys: pytest.CaptureFixture[str]) -> Callable[..., list[list[str]]]:
    """The example's lines, split into columns: t, who, seconds, largest net flux, energy, VRMSE."""
    main: Callable[[Sequence[str]], int] = runpy.run_path(str(FOLDER / "surrogate_in_solver.py"))["main"]

    def run(*options: str) -> list[list[str]]:
        assert main([porous["dynamics"], porous["store"], *options]) == 0
        return [line.split() for line in capsys.readouterr().out.splitlines()[1:-1]]

    return run


def test_the_surrogate_takes_turns_with_the_solver(surrogate_in_solver: Callable[..., list[list[str]]]) -> None:
    lines = surrogate_in_solver("--intervals", "4", "--band", "1e9")
    assert [line[1] for line in lines] == ["solver", "surrogate", "surrogate", "solver"]
    assert [float(line[0]) for line in lines] == [0.02, 0.04, 0.06, 0.08]
    assert {line[3] for line in lines} == {"0.0"}
    assert all(float(line[4]) > 0 for line in lines)
    assert lines[0][5] == "0.000" and float(lines[1][5]) > 0 and float(lines[3][5]) > 0


def test_the_solver_repeats_what_leaves_the_band(surrogate_in_solver: Callable[..., list[list[str]]]) -> None:
    """Where the energy may not change at all the surrogate never gets its way: the loop is the solver alone."""
    lines = surrogate_in_solver("--intervals", "3", "--band", "1")
    assert [line[1] for line in lines] == ["solver", "fallback", "fallback"]
    assert {line[3] for line in lines} == {"0.0"} and {line[5] for line in lines} == {"0.000"}


@pytest.mark.parametrize("intervals", ["0", "6"])
def test_intervals_beyond_the_record_are_refused(
    intervals: str, surrogate_in_solver: Callable[..., list[list[str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        surrogate_in_solver("--intervals", intervals)
    assert error.value.code == 2
    assert f"Expected 1 to 5 intervals (the store's force ends there), got {intervals}." in capsys.readouterr().err
