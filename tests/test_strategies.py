"""However a model is spread over processes, it becomes the one that a single process trains on the whole batch."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from ranks import latentphys, run_forked
from safetensors.torch import load_file
from small import Road, arguments, train

from latentphys.training import open_checkpoint

QUIET = {
    "autoencoder": ["autoencoder.bottleneck.noise=0"],
    "dynamics": ["dynamics_training.input_noise=0", "dynamics_training.unroll=2"],
}
"""Noise is drawn by each process, so there is none here."""
SETTINGS = ["trainer.batch_size=4", "trainer.num_steps=4", "trainer.checkpoint_every=4", "trainer.ema=0.9"]
SPREAD = {
    "ddp": [],
    "ddp-passes": ["trainer.accumulate=2"],
    "fsdp": ["trainer.strategy=fsdp", "trainer.recompute=true"],
    "fsdp-passes": ["trainer.strategy=fsdp", "trainer.accumulate=2"],
}
EXPERTS = {
    "experts": ["trainer.strategy=fsdp", "trainer.expert_parallel=2"],
    "experts-passes": ["trainer.strategy=fsdp", "trainer.expert_parallel=2", "trainer.accumulate=2"],
}


def work(lines: list[list[str]]) -> int:
    """One run after the other, in processes that stay the same."""
    from accelerate import Accelerator, PartialState

    Accelerator.end_training = lambda self: None
    statuses = [latentphys(["train", *line]) for line in lines]
    assert PartialState().num_processes == 2
    PartialState().destroy_process_group()
    return max(statuses)


def cases() -> list[tuple[str, str]]:
    return [(kind, name) for kind in QUIET for name in (SPREAD if kind == "autoencoder" else {**SPREAD, **EXPERTS})]


@pytest.fixture(scope="module")
def spread(road: Road, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of every case on two processes, which are started once; the case is the folder's name."""
    folder = tmp_path_factory.mktemp("spread")
    lines = [
        arguments(
            kind,
            road.inputs(kind),
            folder / f"{kind}-{name}",
            *QUIET[kind],
            *SETTINGS,
            *{**SPREAD, **EXPERTS}[name],
        )
        for kind, name in cases()
    ]
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("CUDA_VISIBLE_DEVICES", "")
        run_forked(work, folder, lines, world=2, timeout=280)
    return folder


@pytest.fixture(scope="module")
def alone(road: Road, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    for kind in QUIET:
        train(kind, road.inputs(kind), folder / kind, *QUIET[kind], *SETTINGS)
    return folder


def read(run: Path, file: str) -> dict[str, torch.Tensor]:
    return load_file(open_checkpoint(run).path / f"{file}.safetensors")


@pytest.mark.parametrize(("kind", "name"), cases())
def test_two_processes_train_what_one_does(spread: Path, alone: Path, kind: str, name: str) -> None:
    """Adam divides rounding by itself where a gradient is zero: moments are compared, and weights as a vector."""
    two, one = spread / f"{kind}-{name}", alone / kind
    for file, bound in (("model", 2e-5), ("ema", 2e-5), ("optimizer", 1e-7)):
        found, expected = read(two, file), read(one, file)
        assert set(found) == set(expected)
        for key, value in expected.items():
            assert found[key].shape == value.shape and found[key].dtype == value.dtype
        a, b = (torch.cat([tensors[k].flatten().double() for k in sorted(tensors)]) for tensors in (found, expected))
        assert (a - b).norm() < bound * b.norm(), file
    ours, theirs = (open_checkpoint(run).state["guard"]["losses"] for run in (two, one))
    assert set(ours) == set(theirs) and all(ours[family] == pytest.approx(theirs[family], rel=1e-5) for family in ours)
    lines = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (two, one)]
    for found, expected in zip(*lines, strict=True):
        for key in {key for key in expected if key == "loss" or key.endswith(("vrmse", "latent_mse"))}:
            assert found[key] == pytest.approx(expected[key], rel=1e-5), key


def test_a_run_with_experts_on_two_processes_goes_on_on_one(spread: Path, road: Road, tmp_path: Path) -> None:
    """A checkpoint knows nothing of the processes that wrote it."""
    run = Path(shutil.copytree(spread / "dynamics-experts", tmp_path / "run"))
    last = train("dynamics", road.inputs("dynamics"), run, *QUIET["dynamics"], *SETTINGS, "trainer.num_steps=6")
    assert last.name == "step-000006"


def test_spreading_what_cannot_be_spread_is_refused(road: Road, tmp_path: Path) -> None:
    stores = road.inputs("dynamics")
    with pytest.raises(ValueError, match="Expected strategy = fsdp for expert_parallel = 2, got 'ddp'"):
        train("dynamics", stores, tmp_path / "run", "trainer.expert_parallel=2")
    with pytest.raises(ValueError, match="Expected a process group, got none; start with torchrun"):
        train("dynamics", stores, tmp_path / "run", "trainer.strategy=fsdp")
    with pytest.raises(ValueError, match="multiple of the 1 processes times 4 passes each, got 2"):
        train("dynamics", stores, tmp_path / "run", "trainer.accumulate=4")
