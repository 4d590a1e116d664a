"""Configuration: presets survive YAML, overrides are checked, what cannot work is refused before anything starts."""

import pytest

from raylift.datasets.errors import ConfigError
from raylift.datasets.plain import to_plain
from raylift.models.zoo import SYSTEMS
from raylift.platform.config import OptimiserConfig, TrainConfig, dotted, from_yaml, overridden
from raylift.platform.presets.catalogue import PRESETS
from raylift.platform.tune import spaces_folder


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_yaml_and_keeps_its_digest(name):
    run = PRESETS[name]()
    again = from_yaml(run.to_yaml(), name)
    assert again == run
    assert again.sha256() == run.sha256()


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_says_what_it_is(name):
    assert PRESETS[name].__doc__.splitlines()[0].endswith(".")


def test_the_published_preset_has_the_published_settings():
    run = PRESETS["x2ct-gan"]()
    assert (run.optimiser.rate, run.optimiser.beta_1, run.optimiser.beta_2) == (2e-4, 0.5, 0.99)
    assert (run.system.loss.adversarial, run.system.loss.voxel, run.system.loss.projection) == (0.1, 10.0, 10.0)
    assert (run.data.size, run.train.batch, run.data.window.width_hu) == (128, 4, 2500)
    # 100 epochs of 916 volumes in batches of 4.
    assert run.train.steps == 100 * 229


def test_an_override_changes_its_key_and_nothing_else():
    run = PRESETS["x2ct-gan-tiny"]()
    changed = overridden(run, {"system.loss.voxel": 3.0, "system.fusion.kind": "sum"})
    assert (changed.system.loss.voxel, changed.system.fusion.kind) == (3.0, "sum")
    assert overridden(changed, {"system.loss.voxel": run.system.loss.voxel, "system.fusion.kind": "average"}) == run
    assert changed.sha256() != run.sha256()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("system.loss.voxl", 1.0, "did you mean system.loss.voxel"),
        ("nonsense", 1.0, "'nonsense' is not a setting"),
        ("system.loss.voxel.deeper", 1.0, "is not a setting"),
        ("system.fusion.kind", "max", "max not in literal"),
        ("train.batch", 3, "cannot be shared by 2 workers"),
        ("train.steps", "many", "expected int|invalid value"),
        ("engine.zero_stage", 4, "4 not in literal"),
    ],
)
def test_a_wrong_override_is_refused_with_what_is_wrong(key, value, message):
    with pytest.raises(ConfigError, match=message):
        overridden(PRESETS["x2ct-gan-tiny"](), {key: value})


def test_an_unknown_key_in_yaml_is_refused_by_its_path():
    with pytest.raises(ConfigError, match=r"batchsize.*mine\.yaml\.train"):
        from_yaml("train: {batchsize: 4}", "mine.yaml")


def test_yaml_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="is not YAML"):
        from_yaml("a: [", "mine.yaml")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("psr", {"optimiser.weight_decay": 1e-4, "system.loss.voxel": 1.0, "system.views": ["frontal"]}),
        (
            "cvaa-gan",
            {"optimiser.rate": 2e-4, "train.batch": 4, "train.steps": 200 * 53, "data.window.high_hu": 4096.0},
        ),
        (
            "x-recon",
            {
                "optimiser.rate": 5e-5,
                "train.batch": 1,
                "data.size": 224,
                "system.loss.adversarial": 1.0,
                "system.loss.voxel": 10.0,
                "system.loss.cone_projection": 0.1,
                "system.encoder.layers": [4, 8, 16, 8, 4],
            },
        ),
    ],
)
def test_other_published_presets_have_their_published_settings(name, settings):
    tree = dotted(to_plain(PRESETS[name]()))
    assert {key: list(tree[key]) if isinstance(tree[key], tuple) else tree[key] for key in settings} == settings


@pytest.mark.parametrize("name", [name for name in SYSTEMS if not name.endswith("x2ct-cnn")])
def test_every_system_has_a_published_preset_a_slim_one_and_a_space(name):
    assert PRESETS[name]().system.name == PRESETS[f"{name}-slim"]().system.name == name
    space = name.replace("duolift-cnn", "duolift-gan").replace("-", "_")
    assert (spaces_folder() / f"{space}.yaml").is_file()


def test_the_rate_is_constant_then_falls_to_zero_and_never_below():
    optimiser = OptimiserConfig(rate=1.0, constant_share=0.5)
    rates = [optimiser.rate_at(step, 10) for step in range(12)]
    assert rates[:5] == [1.0] * 5
    assert rates[5:10] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert rates[10:] == [0.0, 0.0]


def test_the_rate_depends_on_the_step_alone_so_a_resume_cannot_change_it():
    optimiser = OptimiserConfig()
    assert optimiser.rate_at(75, 100) == pytest.approx(1e-4)


@pytest.mark.parametrize("name", ["steps", "batch", "log_every", "validate_every", "keep_checkpoints"])
def test_a_zero_where_one_is_the_least_is_refused(name):
    with pytest.raises(ConfigError, match=f"train.{name} is 0"):
        TrainConfig(**{name: 0})
