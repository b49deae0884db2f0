"""Sparse mixtures of experts: routers, experts, dispatch, balance and telemetry."""

from latentphys.routers.auxiliary import AuxiliaryLosses
from latentphys.routers.balance import BiasBalance, counts_over_ranks
from latentphys.routers.dense import DenseRouter
from latentphys.routers.dispatch import dispatch
from latentphys.routers.experts import Experts, FeedForward
from latentphys.routers.lazy import LazyExperts, load_lazily
from latentphys.routers.moe import MoEFeedForward
from latentphys.routers.nested import Nested
from latentphys.routers.random import RandomRouter
from latentphys.routers.routing import Layout, Router, Routing
from latentphys.routers.telemetry import expert_counts
from latentphys.routers.top1 import SemanticTop1
from latentphys.routers.topk import TopK
from latentphys.routers.tree import TreeRouter

__all__ = [
    "AuxiliaryLosses",
    "BiasBalance",
    "DenseRouter",
    "Experts",
    "FeedForward",
    "Layout",
    "LazyExperts",
    "MoEFeedForward",
    "Nested",
    "RandomRouter",
    "Router",
    "Routing",
    "SemanticTop1",
    "TopK",
    "TreeRouter",
    "counts_over_ranks",
    "dispatch",
    "expert_counts",
    "load_lazily",
]
