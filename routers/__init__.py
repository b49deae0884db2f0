"""Sparse mixtures of experts: routers, experts, dispatch, balance and telemetry."""

from latentphys.routers.balance import BiasBalance, load_loss
from latentphys.routers.dense import DenseRouter
from latentphys.routers.dispatch import dispatch
from latentphys.routers.experts import Experts, FeedForward
from latentphys.routers.moe import MoEFeedForward
from latentphys.routers.random import RandomRouter
from latentphys.routers.routing import Layout, Router, Routing
from latentphys.routers.telemetry import expert_counts
from latentphys.routers.top1 import SemanticTop1

__all__ = [
    "BiasBalance",
    "DenseRouter",
    "Experts",
    "FeedForward",
    "Layout",
    "MoEFeedForward",
    "RandomRouter",
    "Router",
    "Routing",
    "SemanticTop1",
    "dispatch",
    "expert_counts",
    "load_loss",
]
