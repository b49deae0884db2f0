"""Every YAML composes, every class it names can be built, and options that do not exist are refused in one sentence."""

from pathlib import Path

import pytest
from reference import velocity_scale
from small import Road, train

from latentphys.autoencoders import Autoencoder, WeightedSum
from latentphys.configuration import compose
from latentphys.families import Family
from latentphys.grid import Grid
from latentphys.routers import Router
from latentphys.sphere import Sphere
from latentphys.training import Trainer, load_dynamics
from latentphys.training.models import build
from latentphys.transformer import LatentTransformer

FOLDER = Path(__file__).parent.parent / "configs"
TRAIN = ["stores=[a.zarr]", "run=run"]


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (FOLDER / group).glob("*.yaml"))


def test_every_group_is_covered() -> None:
    groups = {path.name for path in FOLDER.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert groups == {
        *("accelerate", "autoencoder", "data", "dynamics", "experiment", "family", "router", "size", "trainer")
    }
    assert choices("data") == ["default"]


@pytest.mark.parametrize("family", choices("family"))
@pytest.mark.parametrize("size", choices("size"))
def test_families_and_sizes(family: str, size: str) -> None:
    config = compose("simulate", [f"family={family}", f"size={size}"])
    built = build(config["family"])
    assert isinstance(built, Family) and built.name == family
    shape, domain = tuple(config["grid"]["shape"]), built.grid(config["grid"]["shape"])
    assert domain.shape == ((shape[0], 2 * shape[0]) if isinstance(domain, Sphere) else shape)


@pytest.mark.parametrize("name", choices("autoencoder"))
def test_autoencoders(name: str) -> None:
    config = compose("train", [*TRAIN, f"autoencoder={name}"])
    scale = velocity_scale(Grid((16, 16, 16), (1, 1, 1)))
    assert isinstance(build(config["loss"]), WeightedSum)
    model = build(config["autoencoder"], scales={"porous": scale})
    assert isinstance(model, Autoencoder)
    assert 8 <= 3 * model.compression**3 / model.latent_channels <= 200


@pytest.mark.parametrize("router", choices("router"))
@pytest.mark.parametrize("name", choices("dynamics"))
def test_dynamics_with_every_router(name: str, router: str) -> None:
    config = compose("train", [*TRAIN, f"dynamics={name}", f"router={router}"])
    arguments = {"latent_channels": 16, "condition_channels": 3, "geometry_channels": 16}
    if name == "tiny":
        assert isinstance(build(config["dynamics"], **arguments), LatentTransformer)
    # the larger ones differ in numbers only, and fill the memory
    built = build(config["router"], dim=config["dynamics"]["dim"])
    assert isinstance(built, Router) and built.num_experts == config["router"]["num_experts"]
    assert config["dynamics"]["router"] == config["router"]


@pytest.mark.parametrize("name", choices("trainer"))
def test_trainers(name: str) -> None:
    trainer = build(compose("train", [*TRAIN, f"trainer={name}"])["trainer"])
    assert isinstance(trainer, Trainer)
    assert all(isinstance(x, float) for x in (trainer.learning_rate, trainer.weight_decay, trainer.clip))
    assert trainer.mixed_precision is None


@pytest.mark.parametrize("kind", ["road", "flat_road"])
@pytest.mark.parametrize("name", choices("experiment"))
def test_experiments_train(request: pytest.FixtureRequest, tmp_path: Path, name: str, kind: str) -> None:
    """All from one trainer, on latents of boxes of three dimensions and of two."""
    road: Road = request.getfixturevalue(kind)
    settings = [f"experiment={name}", "trainer.num_steps=2", "dynamics_training.unroll=2"]
    if name == "ccm":  # what goes on from an anchor
        settings.append(f"finetune.checkpoint={road.dynamics}")
    dynamics, _ = load_dynamics(train("dynamics", road.inputs("dynamics"), tmp_path / "run", *settings))
    routers = {
        "ccm": ("SemanticTop1", 4),
        "dense": ("DenseRouter", 1),
        "mono": ("TreeRouter", 4),
        "moe_pot": ("TopK", 16),
        "nestor": ("Nested", 36),
        "random": ("RandomRouter", 4),
        "shodh_moe": ("SemanticTop1", 4),
    }
    router = dynamics.transformer.routers()[0]
    assert (type(router).__name__, router.num_experts) == routers[name]
    assert bool(router.bias_E.any()) == (name in ("shodh_moe", "ccm"))


def test_endpoints_are_fine_tuned_in_a_way_that_keeps_them_composable() -> None:
    config = compose("train", [*TRAIN, "trainer=dynamics", "experiment=ccm"])
    trainer, finetune = config["trainer"], config["finetune"]
    assert (trainer["weight_decay"], trainer["schedule"], trainer["warmup"]) == (0.0, "constant", 0)
    assert (finetune["adapt"], finetune["freeze_router"]) == ("full", True)
    assert config["dynamics_training"]["balance_rate"] == 0.0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["foo=1"], "options that train.yaml knows: Could not override 'foo'"),
        (["trainer.steps=1"], "options that train.yaml knows: Could not override 'trainer.steps'"),
        (["router=best"], "Could not find 'router/best' Available options in 'router': dense .*top1"),
        (["run"], "Error parsing override 'run'"),
        (["trainer.num_steps=many"], "Expected a whole number for 'trainer.num_steps', got 'many'"),
        (["trainer.num_steps=1e3"], "Expected a whole number for 'trainer.num_steps', got 1000.0"),
        (["trainer.learning_rate=high"], "Expected a number for 'trainer.learning_rate', got 'high'"),
        (["held_out=null"], "Expected a number for 'held_out', got None"),
        (["resume=perhaps"], "Expected true or false for 'resume', got 'perhaps'"),
        (
            ["autoencoder.widths=64"],
            r"Expected a list for 'autoencoder.widths', got 64; write autoencoder.widths=\[…\]",
        ),
        (["autoencoder.widths=[a]"], "Expected a whole number for 'autoencoder.widths', got 'a'"),
        (["dynamics_training=5"], "Expected options for 'dynamics_training', got 5; write dynamics_training.stride=…"),
    ],
)
def test_options_that_do_not_exist_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        compose("train", [*TRAIN, *overrides])
    assert "\n" not in str(caught.value)


def test_values_that_only_the_user_knows_are_asked_for() -> None:
    with pytest.raises(ValueError, match="a value for 'run', got none; add run=… to the command"):
        compose("train", TRAIN[:1])
    with pytest.raises(ValueError, match="a value for 'stores', got none; add stores=… to the command"):
        compose("train", TRAIN[1:])


def test_numbers_may_be_whole_and_choices_of_a_group_may_change_types() -> None:
    config = compose(
        "train", [*TRAIN, "trainer.learning_rate=1", "held_out=3", "experiment=dense", "autoencoder.heads=null"]
    )
    assert (config["trainer"]["learning_rate"], config["held_out"]) == (1, 3)
    assert config["router"]["num_experts"] == 1
    assert compose("simulate", ["compile=true", "out=x.zarr"])["compile"] is True
