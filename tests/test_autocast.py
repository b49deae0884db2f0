"""Under bfloat16 autocast: what decides, what normalises and what conserves runs in FP32, and the rest in 16 bits."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from reference import velocity_scale
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from latentphys import operators
from latentphys.autoencoders import Autoencoder
from latentphys.grid import Geometry, Grid
from latentphys.routers import DenseRouter, Nested, RandomRouter, Router, SemanticTop1, TreeRouter
from latentphys.routers.topk import TopK
from latentphys.training.recompute import set_recompute
from latentphys.transformer.model import LatentTransformer

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.bmm.default, aten.addmm.default, aten.convolution.default}
WITH_STATISTICS = {aten.native_layer_norm.default, aten.native_group_norm.default}
RMS = aten.rsqrt.default

ROUTERS: dict[str, tuple[Callable[[int], Router], str]] = {
    "top1": (partial(SemanticTop1, num_experts=4, semantic_dim=8), "block"),
    "topk": (partial(TopK, num_experts=4, top_k=2, per="sample"), "block"),
    "nested": (partial(Nested, num_experts=8, num_groups=4), "block"),
    "random": (partial(RandomRouter, num_experts=4), "block"),
    "dense": (DenseRouter, "block"),
    "tree": (partial(TreeRouter, num_experts=4), "function"),
}


class Watch(TorchDispatchMode):
    """The dtypes of products, of the statistics of norms, and of all that is made while `inside` holds.

    Args:
        reciprocal_roots: operations that are statistics as well.
    """

    def __init__(self, *reciprocal_roots: Any) -> None:
        super().__init__()
        self.reciprocal_roots = reciprocal_roots
        self.products: set[torch.dtype] = set()
        self.statistics: list[torch.dtype] = []
        self.inside, self.made_inside = False, list[torch.dtype]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [tensor.dtype for tensor in tree_leaves(out) if isinstance(tensor, Tensor)]
        if func in PRODUCTS:
            self.products.update(made)
        if func in WITH_STATISTICS:
            self.statistics += made[1:]
        elif func in self.reciprocal_roots:
            self.statistics += made
        if self.inside:
            self.made_inside += [dtype for dtype in made if dtype.is_floating_point]
        return out

    def watch_inside(self, module: nn.Module) -> None:
        module.register_forward_pre_hook(lambda *_: setattr(self, "inside", True))
        module.register_forward_hook(lambda *_: setattr(self, "inside", False))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("mixer", ["attention", "fourier"])
@pytest.mark.parametrize("router", ROUTERS)
def test_routers_and_norms_of_the_transformer_are_in_fp32(router: str, mixer: str, recompute: bool) -> None:
    factory, routing = ROUTERS[router]
    model = LatentTransformer(3, 2, 2, 1, 16, 2, 2, 16, factory, routing=routing, mixer=mixer)
    for parameter in model.parameters():
        if not parameter.detach().any():
            nn.init.normal_(parameter, std=0.2)
    set_recompute(model, recompute)
    inputs = [torch.randn(2, 2, 3, 2, 2, 2), torch.randn(2, 2), torch.randn(2, 1, 2, 2, 2)]
    with Watch(RMS) as watch:
        for module in model.routers():
            watch.watch_inside(module)
        with torch.autocast("cpu", torch.bfloat16):
            prediction = model(*inputs, (True, True, True))
        prediction.increment.square().mean().backward()
    assert set(watch.made_inside) == {torch.float32}
    num_norms = 2 * 2 + 1 + (2 * 2 if mixer == "attention" else 0)
    assert len(watch.statistics) >= num_norms and set(watch.statistics) == {torch.float32}
    assert torch.bfloat16 in watch.products
    assert prediction.increment.dtype == torch.float32
    for found in prediction.routings:
        values = (found.scores, found.weights, found.log_z)
        assert {value.dtype for value in values if value is not None} == {torch.float32}


@pytest.mark.parametrize("recompute", [False, True])
def test_norms_and_head_of_the_autoencoder_are_in_fp32(recompute: bool) -> None:
    grid = Grid((16, 16, 16), (0.1, 0.1, 0.1), (("periodic", "periodic"),) * 2 + (("no_slip", "no_slip"),))
    scale = velocity_scale(grid, torch.zeros(3, 1, 1, 16, dtype=torch.float64))
    model = Autoencoder({"flow": scale}, 8, [16, 32], [1, 1])
    for parameter in model.parameters():
        if not parameter.detach().any():
            nn.init.normal_(parameter, std=0.05)
    set_recompute(model, recompute)
    with Watch(RMS) as watch:
        watch.watch_inside(model.heads.solenoidal)
        with torch.autocast("cpu", torch.bfloat16):
            flux = model(torch.randn(2, 3, 16, 16, 16), Geometry(grid), "flow").fields
        flux.square().mean().backward()
    assert watch.made_inside and not {torch.bfloat16, torch.float16} & set(watch.made_inside)
    assert len(watch.statistics) >= 2 * (2 + 2 + 1) and set(watch.statistics) == {torch.float32}
    assert torch.bfloat16 in watch.products
    assert flux.dtype == torch.float32
    # What 16 bits would leave over is a hundredth of the flux, and not a millionth.
    assert operators.div(flux.detach(), grid).abs().max() < 1e-5 * flux.detach().abs().max()
