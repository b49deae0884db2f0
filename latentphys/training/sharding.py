"""Training one model on many processes that each hold a part of it: FSDP2, and experts spread over ranks.

    mesh "all"              every rank: blocks and everything else, one shard per rank (FSDP2)
    mesh "copies" × "ep"    experts: slice e of the experts stands on the ranks of column e, which share it (FSDP2)

Every rank trains on samples of its own. Gradients are *sums* over the ranks: divide the loss by their number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm, parametrize

from latentphys.routers import Experts
from latentphys.transformer.block import TransformerBlock


def shard(model: nn.Module, expert_parallel: int = 1, mixed_precision: bool = False) -> None:
    """Spread a model over all processes, in place.

    Call it on every rank, with the same weights everywhere, before the optimiser is made. The model goes on to be
    called as a whole, on every rank as often as on the others. The gradients are then the sum over all ranks of the
    gradients of their losses: with the mean loss of a rank's samples divided by the number of ranks, and as many
    samples on each, they are those of one process on all samples.

    Args:
        model: on the device to train on.
        expert_parallel: ranks P that the experts are spread over, neighbours in rank. The experts then stand on as many
            groups of ranks as go into the world, and are sharded over these. Default 1: every rank runs all experts.
        mixed_precision: gather the experts in bfloat16 and sum their gradients in FP32, for training under bfloat16
            autocast. Weights stay FP32 where they are kept, and so does all that is not an expert where it is gathered:
            routers, norms, embeddings and head compute in FP32, and autocast casts the rest.

    Raises:
        ValueError: no process group, a number P that does not divide the ranks or the experts, or widths that the ranks
            that share a slice do not divide.
    """
    if not dist.is_initialized():
        raise ValueError("Expected a process group, got none; start with torchrun or `accelerate launch`.")
    world = dist.get_world_size()
    if expert_parallel < 1 or world % expert_parallel:
        raise ValueError(f"Expected expert_parallel to divide the {world} ranks, got {expert_parallel}.")
    layers = [module for module in model.modules() if isinstance(module, Experts)]
    copies = world // expert_parallel
    for layer in layers:
        _check(layer, expert_parallel, copies)
    device = next(model.parameters()).device.type
    everyone = init_device_mesh(device, (world,), mesh_dim_names=("all",))
    grid = init_device_mesh(device, (copies, expert_parallel), mesh_dim_names=("copies", "ep"))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if mixed_precision else MixedPrecisionPolicy()
    for layer in layers:
        if expert_parallel > 1:
            _spread(layer, grid["ep"])
        fully_shard(layer, mesh=grid["copies"], shard_placement_fn=lambda w: _placement(w, copies), mp_policy=policy)
        for method in ("each", "one"):
            register_fsdp_forward_method(layer, method)
    for block in [module for module in model.modules() if isinstance(module, TransformerBlock)]:
        fully_shard(block, mesh=everyone)
    fully_shard(model, mesh=everyone)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # An average over the ranks of a mesh would be one over different samples for experts and for the rest.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _check(layer: Experts, expert_parallel: int, copies: int) -> None:
    if layer.num_experts % expert_parallel:
        raise ValueError(
            f"Expected expert_parallel to divide the {layer.num_experts} experts, got {expert_parallel}; "
            "choose a divisor, or another number of experts."
        )
    if expert_parallel > 1 and parametrize.is_parametrized(layer):
        raise ValueError(
            "Expected plain experts to spread over ranks, got some with low-rank updates or new experts beside them; "
            "set expert_parallel = 1."
        )
    if expert_parallel > 1 and (layer.dim % copies or layer.hidden % copies):
        raise ValueError(
            f"Expected widths that the {copies} ranks which share an expert divide, got dim = {layer.dim} and "
            f"hidden = {layer.hidden}; raise expert_parallel, or choose multiples of {copies}."
        )


def _spread(layer: Experts, mesh: DeviceMesh) -> None:
    """Keep one slice of the stacked experts on each rank of a mesh."""
    for name, weight in list(layer.named_parameters(recurse=False)):
        # No source rank: every rank has all weights and cuts its own slice.
        local = distribute_tensor(weight.detach(), mesh, [Shard(0)], src_data_rank=None)
        layer.register_parameter(name, nn.Parameter(local, requires_grad=weight.requires_grad))
    layer.group = mesh.get_group()


def _placement(weight: nn.Parameter, ranks: int) -> Shard:
    """Along a width, for the experts may be fewer than the ranks, where it divides; else FSDP2's own choice."""
    return Shard(1 if weight.shape[1] % ranks == 0 else 0)


def by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """The parameters of each mesh. No operation takes lists of more than one: make them groups of the optimiser."""
    groups: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
    return list(groups.values())


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients of a sharded model down to a largest norm, of all parameters on all ranks together.

    `torch.nn.utils.clip_grad_norm_` refuses parameters of several meshes, and a norm per mesh is rounded otherwise on
    every rank.

    Returns:
        the norm before, the same on every rank.

    Raises:
        ValueError: parameters that are not sharded: each rank would count them.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    # Every number stands on one rank alone, so that the squares of the ranks add up.
    local = get_total_norm([_local(parameter.grad) for parameter in parameters])
    total = local.double().square()
    dist.all_reduce(total)
    total = total.sqrt().to(local.dtype)
    for group in by_mesh(parameters):
        clip_grads_with_norm_(group, max_norm, total)
    return total


def gather(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole of each tensor, in main memory on rank 0; empty on every other rank. Call it on every rank."""
    result = {}
    for name, tensor in tensors.items():
        whole = _whole(tensor.detach())
        if dist.get_rank() == 0:
            result[name] = whole.cpu()
    return result


def scatter_like(whole: Tensor, pattern: Tensor) -> Tensor:
    """This rank's part of a tensor that every rank has, where the pattern has parts and the same shape."""
    if not isinstance(pattern, DTensor) or pattern.shape != whole.shape:
        return whole
    return distribute_tensor(whole.to(pattern.device), pattern.device_mesh, pattern.placements, src_data_rank=None)


def _local(tensor: Tensor | None) -> Tensor:
    if not isinstance(tensor, DTensor):
        raise ValueError(
            "Expected parameters of a sharded model, got some of which every rank has the whole; "
            "use torch.nn.utils.clip_grad_norm_."
        )
    return tensor.to_local()


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
