"""Pictures of flows and of the experts that predicted them, without a screen."""

from latentphys.views.render import Picture, render

__all__ = ["Picture", "render"]
