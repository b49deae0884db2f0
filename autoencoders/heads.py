"""Which head a field gets: the one whose fields obey its constraint."""

from __future__ import annotations

from torch import nn

from latentphys.autoencoders.head import Head
from latentphys.autoencoders.helmholtz import GeneralHead, IrrotationalHead, ProjectionHead, SolenoidalHead
from latentphys.autoencoders.scalar_heads import ConservedHead, PlainHead, PositiveHead
from latentphys.fields import Constraint, FieldSpec, Kind


class Heads(nn.Module):
    """The heads of a model, one for each kind of field and constraint.

    Args:
        solenoidal: the head of solenoidal fluxes, in which there is a choice. Its tolerance is that of irrotational
            fluxes too. Default: `ProjectionHead`.

    Raises:
        ValueError: a head whose fluxes are not solenoidal.
    """

    def __init__(self, solenoidal: SolenoidalHead | None = None) -> None:
        super().__init__()
        solenoidal = solenoidal or ProjectionHead()
        if not isinstance(solenoidal, SolenoidalHead):
            raise ValueError(
                f"Expected a head of solenoidal fluxes, got {type(solenoidal).__name__}; choose autoencoder/head from "
                "projection | riesz | potential. Fields of other constraints have their heads already."
            )
        self.solenoidal = solenoidal
        self.irrotational, self.general = IrrotationalHead(solenoidal.tol), GeneralHead()
        self.conserved, self.positive = ConservedHead(), PositiveHead()
        self.scalar, self.vector = PlainHead(1), PlainHead(3)

    def head(self, spec: FieldSpec) -> Head:
        """The head of a field.

        Raises:
            ValueError: a constraint that no head of its kind of field can keep.
        """
        heads: dict[Kind, dict[Constraint, Head]] = {
            "flux": {"solenoidal": self.solenoidal, "irrotational": self.irrotational, "none": self.general},
            "scalar": {"conserved": self.conserved, "positive": self.positive, "none": self.scalar},
            "vector": {"none": self.vector},
        }
        suited = heads[spec.kind]
        if spec.constraint not in suited:
            raise ValueError(
                f"Expected the constraint {' | '.join(suited)} of the {spec.kind} {spec.name!r}, got "
                f"{spec.constraint!r}, which no head keeps; store the field with the constraint none."
            )
        return suited[spec.constraint]
