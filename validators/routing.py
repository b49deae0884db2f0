"""What the experts did in rollouts: who took how much of which family, how steadily, and what that tells of the family.

    I(family; expert) = H(family) + H(expert) − H(family, expert)     purity = Σ_expert max_family n(family, expert) / n

over the n tokens of a layer: the first choice of every latent cell in every step. Nothing is judged by these numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latentphys.data.routing import has_routing, num_experts, read_routing, recorded_experts
from latentphys.data.store import Store
from latentphys.routers import telemetry
from latentphys.routers.fingerprints import CrossValidation, FingerprintClassifier, fingerprint
from latentphys.validators.series import Curve, Series

ONE_EXPERT = "One expert: there was nothing to choose."
ONE_FAMILY = (
    "What experts tell of the family is not measured: that takes rollouts of at least two families by one model."
)
FEW_TRAJECTORIES = "Fingerprints are not classified: that takes at least two trajectories of each of two families."
NOT_RECORDED = (
    "A store does not say how many experts its model has: as many as the largest id seen are taken to be all."
)
SAME_NAME = (
    "Rollouts of this checkpoint with other layers or experts are another model's, and have a section of their own."
)


@dataclass(frozen=True)
class StoreRouting:
    """One rollout.

    Args:
        subject: its name.
        family: its family of flows.
        num_trajectories, num_steps, latent_cells: how much there is; the product is its tokens in each layer.
        times: lead time t of each step but the first [s].
        churn: share of the latent cells whose expert is another one than a step before, mean over trajectories, one
            row per layer and one number for each of ``times``.
    """

    subject: str
    family: str
    num_trajectories: int
    num_steps: int
    latent_cells: tuple[int, ...]
    times: tuple[float, ...]
    churn: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class FamilyLoad:
    """How one family loads the experts of one layer.

    Args:
        family: its name.
        load: share of the family's tokens that each expert took.
        entropy: of the load [bit], 0 … log₂ of the number of experts.
        dead: experts that took none of this family's tokens.
        churn: mean over steps and trajectories; None for a single step.
        own: share of the family's tokens in experts that took more of it than of any other; None for one family.
    """

    family: str
    load: tuple[float, ...]
    entropy: float
    dead: tuple[int, ...]
    churn: float | None
    own: float | None


@dataclass(frozen=True)
class LayerRouting:
    """The experts of one layer over all families.

    Args:
        name: ``layer 0`` and so on, or ``all blocks`` of a model with one router for all of them.
        num_experts: how many the model has there.
        families: the load of each family.
        dead: experts that took no token at all.
        information: I(family; expert) [bit]; None for one family.
        normalised: the same as a share of H(family), 0 … 1; None for one family.
        purity: share of the tokens that belong to the majority family of their expert; None for one family.
    """

    name: str
    num_experts: int
    families: tuple[FamilyLoad, ...]
    dead: tuple[int, ...]
    information: float | None
    normalised: float | None
    purity: float | None

    @property
    def even(self) -> float:
        """Entropy of an even load [bit]."""
        return math.log2(self.num_experts)


@dataclass(frozen=True)
class ModelRouting:
    """The routing of all given rollouts of one model.

    Args:
        model: its checkpoint.
        stores: the rollouts.
        layers: what each router did.
        family_entropy: H(family) of the tokens [bit]; None for one family.
        largest_family: share of the largest family, the purity of experts that tell nothing; None for one family.
        fingerprints: how often a trajectory's load of all experts gives its family away, each trajectory left out once.
        notes: what was not measured, and why.
    """

    model: str
    stores: tuple[StoreRouting, ...]
    layers: tuple[LayerRouting, ...]
    family_entropy: float | None
    largest_family: float | None
    fingerprints: CrossValidation | None
    notes: tuple[str, ...]

    @property
    def one_expert(self) -> bool:
        """Whether there was nothing to choose."""
        return all(layer.num_experts == 1 for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description."""
        return asdict(self)

    def series(self) -> list[Series]:
        """Churn along each rollout of at least two steps, a curve per layer."""
        return [
            Series(
                "churn",
                "Churn of the experts",
                store.times,
                "lead time t [s]",
                "share of the latent cells [1]",
                tuple(Curve(layer.name, row) for layer, row in zip(self.layers, store.churn, strict=True)),
                caption=f"Rollout {store.subject}: latent cells whose expert is another one than a step before; mean "
                "over trajectories.",
            )
            for store in self.stores
            if store.times
        ]


def measure_routing(stores: Sequence[Store]) -> list[ModelRouting]:
    """What routing did in rollouts, one entry per model; stores without routing are passed over.

    Args:
        stores: any stores. Rollouts of one checkpoint with the same layers and experts are one model's; a rollout that
            does not name its model stands alone.

    Raises:
        ValueError: routing that is missing, damaged, or of no expert, as `read_routing` says.
    """
    models: dict[tuple[Any, ...], list[Store]] = {}
    for store in stores:
        if has_routing(store) and store.num_times > 1:
            checkpoint, decided = _said(store, "checkpoint"), _said(store, "routing")
            depth = read_routing(store, 0).shape[1]
            name = checkpoint or f"the model of {store.path}, which the store does not name"
            models.setdefault((name, depth, decided, recorded_experts(store)), []).append(store)
    names = [name for name, *_ in models]
    return [_measure(name, group, names.count(name) > 1) for (name, *_), group in models.items()]


def _said(store: Store, name: str) -> str:
    return str(store.attributes.get("rollout", {}).get(name, ""))


def _measure(model: str, stores: Sequence[Store], same_name: bool) -> ModelRouting:
    experts = [max(numbers) for numbers in zip(*map(num_experts, stores), strict=True)]
    by_store = [[_trajectory(store, i, experts) for i in range(len(store))] for store in stores]
    by_family: dict[str, list[_Trajectory]] = {}
    for store, found in zip(stores, by_store, strict=True):
        by_family.setdefault(store.family, []).extend(found)
    name = "all blocks" if _said(stores[0], "routing") == "function" else "layer {}"
    layers = tuple(_layer(name.format(layer), layer, by_family) for layer in range(len(experts)))
    several, has_choice = len(by_family) > 1, max(experts) > 1
    repeated = all(len(found) > 1 for found in by_family.values())
    notes = {
        ONE_EXPERT: not has_choice,
        ONE_FAMILY: has_choice and not several,
        FEW_TRAJECTORIES: has_choice and several and not repeated,
        NOT_RECORDED: recorded_experts(stores[0]) is None,
        SAME_NAME: same_name,
    }
    tokens_R = torch.tensor([sum(int(t.counts_LE[0].sum()) for t in found) for found in by_family.values()])
    return ModelRouting(
        model,
        tuple(_describe(store, found) for store, found in zip(stores, by_store, strict=True)),
        layers,
        telemetry.entropy(tokens_R) if several else None,
        float(telemetry.load(tokens_R).max()) if several else None,
        _classify(by_family) if has_choice and several and repeated else None,
        tuple(text for text, applies in notes.items() if applies),
    )


class _Trajectory(NamedTuple):
    """Tokens of each expert layer by layer, churn (time, layer), and the shares of all experts of all layers."""

    counts_LE: list[Tensor]
    churn_TL: Tensor
    fingerprint_f: Tensor


def _trajectory(store: Store, index: int, experts: Sequence[int]) -> _Trajectory:
    routing = read_routing(store, index)[1:]
    layers = [routing[:, [layer]] for layer in range(len(experts))]
    pairs = list(zip(layers, experts, strict=True))
    return _Trajectory(
        [telemetry.expert_counts(torch.from_numpy(ids).reshape(-1, 1), number) for ids, number in pairs],
        telemetry.churn(routing),
        torch.cat([fingerprint(ids, number) for ids, number in pairs]),
    )


def _describe(store: Store, found: Sequence[_Trajectory]) -> StoreRouting:
    times = tuple(float(t - store.times[0]) for t in store.times[2:])
    cells = tuple(int(n) for n in store.array("routing").shape[3:])
    rows = torch.stack([trajectory.churn_TL for trajectory in found]).mean(0).T.tolist()
    return StoreRouting(
        store.path.name, store.family, len(store), store.num_times - 1, cells, times, tuple(map(tuple, rows))
    )


def _layer(name: str, layer: int, by_family: Mapping[str, Sequence[_Trajectory]]) -> LayerRouting:
    counts_RE = [sum(t.counts_LE[layer] for t in found) for found in by_family.values()]
    joint_RE = torch.stack([torch.as_tensor(counts_E) for counts_E in counts_RE])
    several, majority_E = len(joint_RE) > 1, joint_RE.argmax(0)
    families = []
    for number, (family, found) in enumerate(by_family.items()):
        load_E, churn = telemetry.load(joint_RE[number]), torch.cat([t.churn_TL[:, layer] for t in found])
        families.append(
            FamilyLoad(
                family,
                tuple(load_E.tolist()),
                telemetry.entropy(joint_RE[number]),
                tuple(telemetry.dead_experts(joint_RE[number])),
                float(churn.mean()) if len(churn) else None,
                float(load_E[majority_E == number].sum()) if several else None,
            )
        )
    told = telemetry.mutual_information(joint_RE)
    return LayerRouting(
        name,
        joint_RE.shape[1],
        tuple(families),
        tuple(telemetry.dead_experts(joint_RE.sum(0))),
        told.bits if several else None,
        told.normalised if several else None,
        telemetry.domain_purity(joint_RE) if several else None,
    )


def _classify(by_family: Mapping[str, Sequence[_Trajectory]]) -> CrossValidation:
    prints = [t.fingerprint_f for found in by_family.values() for t in found]
    labels = [family for family, found in by_family.items() for _ in found]
    return FingerprintClassifier.cross_validated_accuracy(torch.stack(prints), labels)
