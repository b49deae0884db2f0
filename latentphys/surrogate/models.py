"""Trained models as what a surrogate steps with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from latentphys.autoencoders import Autoencoder
from latentphys.grid import Geometry
from latentphys.rollout import LatentStepper
from latentphys.surrogate.contract import Contract, Quantity
from latentphys.surrogate.protocol import Factory
from latentphys.transformer.dynamics import Dynamics


class Models:
    """A dynamics model and its autoencoder, for flows of any of their families.

    Args:
        dynamics, autoencoder: in evaluation mode, both on one device, on which every step is worked out.
        digest: SHA-256 of the weights; see `checkpoint_digest`. Default: worked out from the weights in memory.

    Raises:
        ValueError: a dynamics model of more than one input frame.
    """

    def __init__(self, dynamics: Dynamics, autoencoder: Autoencoder, digest: str | None = None) -> None:
        if dynamics.num_frames != 1:
            raise ValueError(f"Expected a dynamics model of one input frame, got one of {dynamics.num_frames}.")
        self.dynamics, self.autoencoder, self._digest = dynamics, autoencoder, digest

    @classmethod
    def load(
        cls, path: str | Path, device: torch.device | str = "cpu", max_resident_experts: int | None = None
    ) -> Models:
        """From a dynamics checkpoint or the run directory that holds it.

        Args:
            device: where to compute. Default: the CPU.
            max_resident_experts: see `latentphys.training.load_dynamics`. Default: all experts are loaded.

        Raises:
            ValueError: no such checkpoint, or one of another kind or schema.
        """
        from latentphys.training.models import load_dynamics

        dynamics, autoencoder = load_dynamics(path, max_resident_experts)
        return cls(dynamics.to(device), autoencoder.to(device), checkpoint_digest(path))

    @property
    def intervals(self) -> Mapping[str, float]:
        """Family → Δt [s]."""
        return dict(self.dynamics.intervals)

    @property
    def digest(self) -> str:
        """SHA-256 of the weights."""
        if self._digest is None:
            whole = hashlib.sha256()
            for model in (self.dynamics, self.autoencoder):
                for name, tensor in sorted(model.state_dict().items()):
                    whole.update(
                        name.encode()
                        + tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                    )
            self._digest = whole.hexdigest()
        return self._digest

    def contract(self, family: str) -> Contract:
        """What a solver has to know of a family; units of parameters are not in checkpoints.

        Raises:
            ValueError: a family that the models do not know.
        """
        scale, interval = self.autoencoder.scale(family), self.dynamics.interval(family)
        lengths = [field.profile.shape[1:] for field in scale.fields.values()]
        x, y, z = (any(shape[axis] > 1 for shape in lengths) or scale.grid.shape[axis] == 1 for axis in range(3))
        return Contract(
            family,
            scale.grid,
            tuple(scale.specs.values()),
            interval,
            tuple(Quantity(**asdict(parameter)) for parameter in self.dynamics.conditioning.parameters),
            self.autoencoder.compression,
            (x, y, z),
        )

    def stepper(self, geometry: Geometry, family: str) -> LatentStepper:
        """See `LatentStepper`."""
        return LatentStepper(self.autoencoder, self.dynamics, geometry, family)


def open_factory(path: str | Path, device: torch.device | str, max_resident_experts: int | None) -> Factory:
    """What steps: an artefact where the folder is one, else the models of a checkpoint or run; see `Models.load`.

    Raises:
        ValueError: neither there, or a limit of experts for an artefact.
    """
    if not (Path(path) / "artefact.json").is_file():
        return Models.load(path, device, max_resident_experts)
    if max_resident_experts is not None:
        raise ValueError(f"Expected max_resident_experts with a checkpoint only, got the artefact {path}.")
    from latentphys.surrogate.export import open_artefact

    return open_artefact(Path(path), device)


def checkpoint_digest(path: str | Path) -> str:
    """SHA-256 that tells the weights of a dynamics checkpoint, and of the autoencoder in it, from any others.

    It is that of what checkpoint.json lists: the SHA-256 of every file of weights, by name.

    Args:
        path: as `latentphys.training.open_checkpoint` takes it.
    """
    from latentphys.training import manifest, open_checkpoint

    files = manifest.read(open_checkpoint(path, "dynamics").path)["files"]
    weights = {n: f["sha256"] for n, f in files.items() if n.endswith(".safetensors") and "optimizer" not in n}
    return hashlib.sha256("\n".join(f"{weights[n]}  {n}" for n in sorted(weights)).encode()).hexdigest()
