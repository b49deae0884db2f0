"""What can leave as fixed graphs, and what has to stay in Python."""

from __future__ import annotations

from latentphys.autoencoders import Autoencoder
from latentphys.autoencoders.conservative import ConservativeAutoencoder
from latentphys.autoencoders.helmholtz import RieszHead
from latentphys.grid import Geometry
from latentphys.routers.lazy import LazyExperts
from latentphys.transformer.dynamics import Dynamics


def check_exportable(dynamics: Dynamics, autoencoder: Autoencoder, geometry: Geometry, family: str) -> None:
    """Refuse what no artefact can hold.

    Raises:
        ValueError: what it is, and what to do instead.
    """
    if dynamics.num_frames != 1:
        raise ValueError(
            f"Expected a dynamics model of one input frame to export, got one of {dynamics.num_frames}; train with "
            "dynamics.num_frames=1."
        )
    if isinstance(autoencoder, ConservativeAutoencoder):
        raise ValueError(
            "Expected free latents to export, got conservative ones, which every step projects with a solver; train "
            "with autoencoder/latent=free, or use the checkpoint in Python."
        )
    constraints = {spec.constraint for spec in autoencoder.scale(family).specs.values()}
    if "solenoidal" in constraints and isinstance(autoencoder.heads.solenoidal, RieszHead):
        raise ValueError(
            "Expected a head without Fourier transforms to export, got RieszHead; train with "
            "autoencoder/head=projection, or use the checkpoint in Python."
        )
    if geometry.batch_shape:
        raise ValueError(
            f"Expected the geometry of one flow to export, got a batch of {geometry.batch_shape}; choose one sample."
        )
    if geometry.inflow:
        raise ValueError(
            f"Expected a geometry without a prescribed inflow to export, got one through {sorted(geometry.inflow)}; "
            "use the checkpoint in Python."
        )
    if any(isinstance(module, LazyExperts) for module in dynamics.modules()):
        raise ValueError(
            "Expected all experts in memory to export, got experts in their file; load the checkpoint without "
            "max_resident_experts."
        )
