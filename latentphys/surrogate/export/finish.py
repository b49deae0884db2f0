"""What a decode lacks when it leaves its graph: constraints to the last bit, in FP64."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from latentphys import exact
from latentphys.autoencoders import FamilyScale
from latentphys.autoencoders.heads import Heads
from latentphys.autoencoders.helmholtz import FluxHead
from latentphys.autoencoders.scalar_heads import ConservedHead
from latentphys.grid import Geometry


@torch.no_grad()
def finish(
    decoded: Float[Tensor, "b f nx ny nz"],
    geometry: Geometry,
    scale: FamilyScale,
    totals: Mapping[str, Tensor] | None = None,
) -> Float[Tensor, "b f nx ny nz"]:
    """Packed FP64 fields that obey their constraints, from what `Decode` says of them.

    Solenoidal fluxes get a net of 0.0 in every cell (`exact.conserve`), other fluxes what their heads keep of them,
    conserved scalars their totals. Fields of other constraints have left the graph as they are.

    Args:
        totals: name → what a conserved scalar amounts to in each sample [unit·m³]. Default: what the decode says.

    Raises:
        ValueError: fields that are not finite.
    """
    heads, fields = Heads(), []
    for name, x in scale.split(decoded).items():
        field = scale[name]
        head = heads.head(field.spec)
        if field.spec.constraint == "solenoidal":
            x = exact.conserve(flux=x, geometry=geometry)
        elif isinstance(head, FluxHead):
            x = head.admit(x.double(), geometry)
        elif isinstance(head, ConservedHead):
            total = None if totals is None else totals.get(name)
            x = head.exact(field.normalise(x, geometry.grid), geometry, field, total)
        fields.append(x)
    return fields[0] if len(fields) == 1 else torch.cat(fields, dim=1)
