"""The launch configurations load in accelerate's own parser, and two ranks are two processes."""

import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

FOLDER = Path(__file__).parent.parent / "configs" / "accelerate"
PROCESSES = {"cpu": 1, "cpu_2proc": 2, "one_gpu": 1, "one_node": 8, "multi_node": 32}
PROGRAM = """
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

accelerator = Accelerator(cpu=True)
total = accelerator.reduce(torch.tensor([1.0 + accelerator.process_index]))
Path(sys.argv[1], f"rank{accelerator.process_index}").write_text(f"{total.item():g} of {accelerator.num_processes}")
accelerator.end_training()
"""


def test_every_configuration_is_covered() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(PROCESSES)


@pytest.mark.parametrize("name", PROCESSES)
def test_configuration_loads(name: str) -> None:
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert config.num_processes == PROCESSES[name]
    assert config.mixed_precision == ("no" if name.startswith("cpu") else "bf16")


def test_two_ranks_on_the_cpu_are_two(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FOLDER / "cpu_2proc.yaml")]
    process = subprocess.run([*launch, str(script), str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    assert {path.name: path.read_text() for path in tmp_path.glob("rank*")} == {"rank0": "3 of 2", "rank1": "3 of 2"}
