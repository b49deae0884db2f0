"""What an artefact holds as graphs: the library's numbers for every router, mixer and kind of field; and refusals."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from latentphys import exact, operators
from latentphys.autoencoders import Autoencoder, FamilyScale, FieldScale
from latentphys.autoencoders.conservative import ConservativeAutoencoder
from latentphys.autoencoders.heads import Heads
from latentphys.autoencoders.helmholtz import PotentialHead, RieszHead
from latentphys.fields import VELOCITY, FieldSpec, State
from latentphys.grid import Boundaries, Geometry, Grid
from latentphys.rollout import LatentStepper
from latentphys.routers import DenseRouter, Nested, RandomRouter, SemanticTop1, TopK, TreeRouter
from latentphys.surrogate.contract import Quantity
from latentphys.surrogate.export import export, open_artefact, torchscript, writing
from latentphys.surrogate.export.finish import finish
from latentphys.surrogate.export.functions import NAMES, Scaling, functions
from latentphys.surrogate.export.vectors import flat
from latentphys.surrogate.models import Models
from latentphys.transformer.conditioning import Conditioning, Parameter
from latentphys.transformer.dynamics import Dynamics
from latentphys.transformer.model import LatentTransformer

CHANNEL: Boundaries = (("periodic", "periodic"), ("periodic", "periodic"), ("no_slip", "free_slip"))
GRID = Grid((8, 8, 12), (0.1, 0.2, 0.05), CHANNEL)
CONDITIONING = Conditioning(
    [
        Parameter("density", 1, False, True, [0.3], [0.5]),
        Parameter("force", 3, True, False, [0.1, 0.0, -0.2], [1.0, 2.0, 0.5]),
        Parameter("viscosity", 1, False, True, [-4.0], [1.5]),
    ]
)
NOW = {"force": [0.2, -1.0, 0.3], "viscosity": 0.01}
THEN = {"force": [0.4, -1.5, 0.2], "viscosity": 0.01}
SPECS = (
    VELOCITY,
    FieldSpec("magnetic", "flux", "Wb", "irrotational"),
    FieldSpec("momentum", "flux", "kg/s", "none"),
    FieldSpec("dye", "scalar", "kg/m3", "conserved"),
    FieldSpec("heat", "scalar", "K", "positive"),
    FieldSpec("pressure", "scalar", "Pa"),
)


def box(solids: bool) -> Geometry:
    solid = torch.zeros(GRID.shape, dtype=torch.bool)
    solid[2:4, 3:6, 2:7] = solids
    return Geometry(GRID, solid if solids else None)


def family(*specs: FieldSpec) -> FamilyScale:
    fields = []
    for n, spec in enumerate(specs):
        profile = torch.linspace(0.1, 0.5 + n, 12, dtype=torch.float64).expand(
            1 if spec.kind == "scalar" else 3, 1, 1, 12
        )
        fields.append(FieldScale(GRID, profile * (0.01 if spec.kind == "flux" else 1.0), 0.7, spec))
    return FamilyScale(*fields)


def stirred(model: nn.Module) -> nn.Module:
    """Weights that hide nothing behind a zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def models(
    specs: tuple[FieldSpec, ...] = (VELOCITY,),
    kind: type[Autoencoder] = Autoencoder,
    heads: Heads | None = None,
    frames: int = 1,
    **transformer: Any,
) -> Models:
    autoencoder = kind({"flow": family(*specs)}, 6, [8, 16], [1, 1], heads=heads)
    settings = {"router": partial(SemanticTop1, num_experts=4, semantic_dim=8), **transformer}
    network = LatentTransformer(6, frames, CONDITIONING.num_channels, 16, 32, 2, 2, 16, **settings)
    dynamics = Dynamics(network, CONDITIONING, {"flow": 0.02}, 6)
    return Models(stirred(dynamics), stirred(autoencoder))  # type: ignore[arg-type]


def packed(scale: FamilyScale, geometry: Geometry, batch: int = 1) -> Tensor:
    x = scale.denormalise(torch.randn(batch, scale.num_components, *GRID.shape, dtype=torch.float64), GRID)
    return torch.where(geometry.fluid, x, 0.0)


def numbers(parameters: dict[str, Any], names: tuple[str, ...] = ("force", "viscosity")) -> Tensor:
    return torch.cat([torch.tensor(parameters[n], dtype=torch.float64).reshape(-1) for n in names])[None]


def exported(module: nn.Module, *inputs: Tensor) -> nn.Module:
    return torch.export.export(module, inputs, strict=False).module()


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().amax() / want.abs().amax())


ROUTERS: dict[str, dict[str, Any]] = {
    "top1 per block": {"router": partial(SemanticTop1, num_experts=4, semantic_dim=8, per=(1, 2, 1))},
    "topk per sample": {"router": partial(TopK, num_experts=8, top_k=3, per="sample")},
    "nested": {"router": partial(Nested, num_experts=6, num_groups=3)},
    "dense": {"router": DenseRouter},
    "random": {"router": partial(RandomRouter, num_experts=4)},
    "tree": {"router": partial(TreeRouter, num_experts=4), "routing": "function"},
    "fourier": {"mixer": "fourier"},
}


EVERY = [(name, False) for name in ROUTERS] + [(name, True) for name in ("nested", "fourier")]
SLOW = [(name, True) for name in ROUTERS if (name, True) not in EVERY]


@pytest.mark.parametrize(
    ("name", "exporting"), [*EVERY, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_a_step_is_the_models_for_every_router(name: str, exporting: bool) -> None:
    made, geometry = models(**ROUTERS[name]), box(solids=True)
    for router in made.dynamics.transformer.routers():
        if isinstance(router, TreeRouter):
            router.fit(torch.randn(64, router.dim))
    stepper = LatentStepper(made.autoencoder, made.dynamics, geometry, "flow")
    latent, other = torch.randn(2, 1, 6, 2, 2, 3)
    step = functions(made.dynamics, made.autoencoder, geometry, "flow", ["force", "viscosity"])["step"]
    graph = exported(step, latent, numbers(NOW), numbers(THEN)) if exporting else step
    expected = stepper.step(other[:, None], [NOW], [THEN]).latent
    assert relative(graph(other, numbers(NOW), numbers(THEN)), expected) < 1e-6
    assert relative(expected, stepper.step(other[:, None], [NOW], [NOW]).latent) > 1e-5  # `then` counts
    assert relative(expected, other) > 1e-2
    beyond = graph(30 * other, numbers(NOW), numbers(THEN))
    assert float(beyond.abs().amax()) == made.autoencoder.bottleneck.bound


@pytest.mark.parametrize("solids", [pytest.param(False, marks=pytest.mark.slow), True])
def test_encode_decode_and_finish_are_the_models_for_every_kind_of_field(solids: bool) -> None:
    made, geometry = models(SPECS), box(solids)
    scale = made.autoencoder.scale("flow")
    stepper = LatentStepper(made.autoencoder, made.dynamics, geometry, "flow")
    modules = functions(made.dynamics, made.autoencoder, geometry, "flow", [])
    x, y = packed(scale, geometry), packed(scale, geometry)
    encode, decode = exported(modules["encode"], x), exported(modules["decode"], torch.zeros(1, 6, 2, 2, 3))
    z = stepper.encode(y)
    assert relative(encode(y), z) < 1e-6
    totals = stepper.totals(y)
    assert set(totals) == {"dye"}
    inside = y[:, scale.channels["dye"]].sum((1, 2, 3, 4)) * GRID.cell_volume
    torch.testing.assert_close(totals["dye"], inside, rtol=1e-12, atol=0.0)
    got, want = finish(decode(z), geometry, scale, totals), stepper.decode(z, totals)
    for name, where in scale.channels.items():
        assert relative(got[:, where], want[:, where]) < 1e-6, name
    assert float(operators.div(got[:, :3], GRID).abs().amax()) == 0.0
    dye = got[:, scale.channels["dye"]]
    assert float(dye.sum()) == float(want[:, scale.channels["dye"]].sum())
    assert float(got[:, scale.channels["heat"]].amin()) > 0
    assert not decode(z)[:, scale.channels["dye"]][:, 0, ~geometry.fluid].any()
    free = finish(decode(z), geometry, scale)[:, scale.channels["dye"]]
    assert float(free.sum()) != float(dye.sum())


def flow(scale: FamilyScale, geometry: Geometry) -> State:
    return State(scale.unpack(packed(scale, geometry)[0]), geometry, 0.0, NOW, "flow")


def test_test_vectors_keep_the_totals_of_their_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the finish is compared with is the model's own decode, and not what a decode alone amounts to."""
    made, geometry = models((VELOCITY, FieldSpec("dye", "scalar", "kg/m3", "conserved"))), box(solids=True)
    scale = made.autoencoder.scale("flow")
    state = flow(scale, geometry)
    path = export(made, [state], tmp_path / "out", to="torchscript")
    artefact = open_artefact(path)
    vectors = artefact.arrays
    (held,), (said,), (free,) = (
        scale.totals(x, geometry)["dye"]
        for x in (vectors["test.fields"], vectors["test.finished"], finish(vectors["test.decoded"], geometry, scale))
    )
    assert float(said) == pytest.approx(float(held), rel=1e-12) and float(free) != pytest.approx(float(held), rel=1e-3)
    stepper = artefact.stepper(geometry, "flow")
    got = stepper.decode(stepper.encode(vectors["test.fields"]), stepper.totals(vectors["test.fields"]))
    for where in scale.channels.values():
        assert relative(got[:, where], vectors["test.finished"][:, where]) < 1e-5
    monkeypatch.setattr(writing, "finish", lambda *arguments: 1.01 * finish(*arguments))
    with pytest.raises(ValueError, match="Expected a finished decode within 0.001 of the model's, got .* cannot be"):
        export(made, [state], tmp_path / "other", to="torchscript")


def test_states_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    made, geometry = models(), box(solids=True)
    state = flow(made.autoencoder.scale("flow"), geometry)
    for states, then, message in (
        ([], None, "Expected at least one state to export with, got none"),
        ([state, replace(state, family="pipe")], None, "one family and parameters, 'flow' and .* got 'pipe'"),
        ([state, replace(state, parameters={})], None, r"and \['force', 'viscosity'\], got 'flow' and \[\]"),
        ([state, replace(state, place=box(solids=False))], None, "Expected states in one geometry, got several"),
        ([state, state], [NOW], "Expected parameters Δt later of each of 2 states, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            export(made, states, tmp_path / "out", to="torchscript", then=then)
    assert not list(tmp_path.iterdir())


def test_a_potential_head_leaves_as_its_curl() -> None:
    made, geometry = models(heads=Heads(PotentialHead())), box(solids=True)
    decode = functions(made.dynamics, made.autoencoder, geometry, "flow", [])["decode"]
    z = torch.randn(1, 6, 2, 2, 3)
    flux = exported(decode, torch.zeros_like(z))(z)
    want = made.autoencoder.decode(z, geometry, "flow", exact=True)
    assert relative(exact.conserve(flux=flux, geometry=geometry), want) < 1e-6


def test_scaling_is_that_of_the_conditioning() -> None:
    for names in (("force", "viscosity"), ("viscosity", "density", "force"), ()):
        begin, end = ({n: {**p, "density": 1.2}[n] for n in names} for p in (NOW, THEN))
        now, then = (numbers(p, names) if names else torch.zeros(1, 0, dtype=torch.float64) for p in (begin, end))
        got = Scaling(CONDITIONING, names, 0.02)(now, then)
        torch.testing.assert_close(got[0], CONDITIONING.vector(begin, end, 0.02), rtol=1e-6, atol=0.0)


def test_parameters_become_numbers_in_physical_units() -> None:
    quantities = [Quantity(**vars(p)) for p in CONDITIONING.parameters]
    got = flat(NOW, quantities)
    torch.testing.assert_close(got, torch.tensor([torch.e**0.3, 0.2, -1.0, 0.3, 0.01], dtype=torch.float64))
    with pytest.raises(ValueError, match="Expected parameters among .* got 'gravity'"):
        flat({"gravity": 9.81}, quantities)
    with pytest.raises(ValueError, match="Expected parameter 'force' of size 3, got 2 numbers"):
        flat({"force": [1.0, 2.0]}, quantities)
    assert flat({}, []).shape == (0,)


def test_a_trace_of_a_fourier_mixer_is_the_model(tmp_path: Path) -> None:
    made, geometry = models(mixer="fourier"), box(solids=False)
    step = functions(made.dynamics, made.autoencoder, geometry, "flow", ["force", "viscosity"])["step"]
    latent, other = torch.randn(2, 1, 6, 2, 2, 3)
    inputs = (numbers(NOW), numbers(THEN))
    torchscript.write({"step": step}, {"step": (latent, *inputs)}, tmp_path, lambda text: None)
    trace = torchscript.load(tmp_path, ("step",), torch.device("cpu"))["step"]
    assert relative(trace(other, *inputs), step(other, *inputs)) < 1e-6


def test_the_models_stay_as_they_were() -> None:
    made, geometry = models(), box(solids=False)
    made.autoencoder.tile = 8
    functions(made.dynamics, made.autoencoder, geometry, "flow", [])
    assert {block.feed_forward.dispatch for block in made.dynamics.transformer.blocks} == {"auto"}  # type: ignore[union-attr]
    assert made.autoencoder.tile == 8 and all(p.requires_grad for p in made.dynamics.parameters())


def refused(change: Callable[[], tuple[Models, Geometry]]) -> dict[str, nn.Module]:
    made, geometry = change()
    return functions(made.dynamics, made.autoencoder, geometry, "flow", [])


def test_refuses_what_no_graph_can_hold() -> None:
    geometry = box(solids=False)
    two = models()
    two.dynamics.transformer.num_frames = 2
    with pytest.raises(ValueError, match="Expected a dynamics model of one input frame to export, got one of 2; train"):
        refused(lambda: (two, geometry))
    with pytest.raises(ValueError, match="Expected free latents to export, got conservative ones, .*latent=free"):
        refused(lambda: (models(kind=ConservativeAutoencoder), geometry))
    with pytest.raises(ValueError, match="Expected a head without Fourier transforms to export, got RieszHead; train"):
        refused(lambda: (models(heads=Heads(RieszHead())), geometry))
    with pytest.raises(ValueError, match=r"Expected the geometry of one flow to export, got a batch of \(2,\)"):
        refused(lambda: (models(), Geometry.stack([box(True), box(True)])))
    entrance = Grid(GRID.shape, GRID.spacing, (("inflow", "outflow"), *CHANNEL[1:]))
    with pytest.raises(ValueError, match=r"Expected a geometry without a prescribed inflow .* through \['x-'\]"):
        refused(lambda: (models(), Geometry(entrance, None, {"x-": 1.0})))
    with pytest.raises(ValueError, match="Expected the boundaries this model knows"):
        refused(lambda: (models(), Geometry(replace(GRID, boundaries=entrance.boundaries))))
    assert set(refused(lambda: (models(), geometry))) == set(NAMES)


def test_the_exporters_load_where_they_are_used() -> None:
    statement = "import sys, latentphys.surrogate.export\nprint(*sys.modules)"
    loaded = set(
        subprocess.run([sys.executable, "-c", statement], capture_output=True, text=True, check=True).stdout.split()
    )
    assert "latentphys.surrogate.export.onnx" in loaded
    assert loaded.isdisjoint({"onnx", "onnxscript", "onnxruntime", "torch._inductor.compile_fx"})
