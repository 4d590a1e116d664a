"""Configuration: presets survive YAML, overrides are checked, and invalid settings are refused before a start."""

from dataclasses import fields, replace

import pytest
import torch

from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import Grid, chest
from raylift.datasets.intensity import Window
from raylift.datasets.serialization import to_plain
from raylift.models.system_entry import Training
from raylift.models.zoo import SYSTEMS, parameters
from raylift.platform.config import OptimizerConfig, TrainConfig, flatten, from_yaml, override
from raylift.platform.presets import PRESETS, run_of
from raylift.platform.training.memory import estimate
from raylift.platform.tuning.search import load_space


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_yaml_and_keeps_its_digest(name):
    run = PRESETS[name]
    again = from_yaml(run.to_yaml(), name)
    assert again == run
    assert again.sha256() == run.sha256()


def test_the_published_preset_has_the_published_settings():
    run = PRESETS["x2ct-gan"]
    assert (run.optimizer.lr, run.optimizer.betas) == (2e-4, (0.5, 0.99))
    loss = run.system.loss
    assert (loss.adversarial_weight, loss.mse_weight, loss.projection_weight) == (0.1, 10.0, 10.0)
    assert (run.data.size, run.train.batch_size, run.data.window.width_hu) == (128, 4, 2500)
    # 100 epochs of 916 volumes in batches of 4.
    assert run.train.steps == 100 * 229
    # Its radiographs are divided by their maximum; the other presets' have their percentiles.
    assert {name for name, run in PRESETS.items() if run.data.normalization == "maximum"} == {
        "x2ct-gan",
        "x2ct-gan-single",
        "x2ct-cnn",
    }


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("x2ct-gan-tiny", {"data.match_histograms": True}, "matches radiographs normalized by percentiles"),
        ("cyclegan-b-tiny", {}, "compares radiographs with DRRs normalized by percentiles"),
    ],
)
def test_radiographs_divided_by_their_maximum_are_refused_where_percentiles_are_needed(name, changed, message):
    with pytest.raises(ConfigError, match=f"{message}: set data.normalization to percentiles"):
        override(PRESETS[name], {"data.normalization": "maximum", **changed})


def test_an_override_changes_its_key_and_nothing_else():
    run = PRESETS["x2ct-gan-tiny"]
    changed = override(run, {"system.loss.mse_weight": 3.0, "system.fusion.kind": "sum"})
    assert (changed.system.loss.mse_weight, changed.system.fusion.kind) == (3.0, "sum")
    back = {"system.loss.mse_weight": run.system.loss.mse_weight, "system.fusion.kind": "average"}
    assert override(changed, back) == run
    assert changed.sha256() != run.sha256()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("system.loss.mse_weigth", 1.0, "did you mean system.loss.mse_weight"),
        ("nonsense", 1.0, "'nonsense' is not a setting"),
        ("system.loss.mse_weight.deeper", 1.0, "is not a setting"),
        ("system.fusion.kind", "max", "expected one of average, sum, concatenate, attention, alignment, not 'max'"),
        ("train.batch_size", 3, "cannot be shared by 2 workers"),
        ("train.steps", "many", "expected int|invalid value"),
        ("engine.zero_stage", 4, "expected one of 0, 1, 2, 3, not 4"),
    ],
)
def test_a_wrong_override_is_refused_with_what_is_wrong(key, value, message):
    with pytest.raises(ConfigError, match=message):
        override(PRESETS["x2ct-gan-tiny"], {key: value})


def test_an_unknown_key_in_yaml_is_refused_by_its_path():
    with pytest.raises(ConfigError, match=r"batchsize.*mine\.yaml\.train"):
        from_yaml("train: {batchsize: 4}", "mine.yaml")


def test_text_that_is_not_yaml_is_refused():
    with pytest.raises(ConfigError, match="is not YAML"):
        from_yaml("a: [", "mine.yaml")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        (
            "psr",
            {
                "optimizer.weight_decay": 1e-4,
                "system.views": ["frontal"],
                "system.loss.mse_weight": 1.0,
                "system.loss.projection_weight": 0.0,
                "system.loss.adversarial_weight": 0.0,
            },
        ),
        (
            "cvaa-gan",
            {"optimizer.lr": 2e-4, "train.batch_size": 4, "train.steps": 200 * 53}
            | {"data.window.low_hu": -1000.0, "data.window.high_hu": 4096.0},
        ),
        (
            "x-recon",
            {
                "optimizer.lr": 5e-5,
                "train.batch_size": 1,
                "data.size": 224,
                "system.loss.adversarial_weight": 1.0,
                "system.loss.mse_weight": 10.0,
                "system.loss.cone_projection_weight": 0.1,
                "system.loss.projection_weight": 0.0,
                "system.loss.cone_jitter_deg": 10.0,
                "system.loss.cone_jitter_voxels": 8.0,
                "system.encoder.block_config": [4, 8, 16, 8, 4],
            },
        ),
        (
            "x2ct-cnn",
            {
                "system.loss.adversarial_weight": 0.0,
                "system.loss.mse_weight": 10.0,
                "system.loss.projection_weight": 10.0,
            },
        ),
        (
            "3dcnn",
            {
                "system.loss.adversarial_weight": 0.0,
                "system.loss.mse_weight": 10.0,
                "system.loss.projection_weight": 10.0,
            },
        ),
        (
            "duolift-gan",
            {"system.loss.mse_weight": 10.0, "system.loss.lung_weight": 10.0, "system.decoder.kind": "unet++"},
        ),
        (
            "diffux2ct",
            {
                "optimizer.lr": 2e-4,
                "system.scheduler.num_train_timesteps": 1000,
                "system.scheduler.beta_start": 1e-6,
                "system.scheduler.beta_end": 1e-2,
                "system.scheduler.prediction_type": "epsilon",
                "system.loss.projection_weight": 1.0,
                "system.ema_decay": 0.999,
                "system.sampling.steps": 16,
            },
        ),
        (
            "latent-diffusion",
            {"system.scheduler.beta_schedule": "cosine", "system.scheduler.prediction_type": "sample"},
        ),
        ("refiner", {"system.sampling.steps": 1, "system.scheduler.prediction_type": "sample"}),
        (
            "u-x2ctgan",
            {
                "optimizer.lr": 1e-4,
                # Of the L2 penalty of 1e-4.
                "optimizer.weight_decay": 2e-4,
                "optimizer.decay_start": 1.0,
                "system.encoder.growth_rate": 16,
                "system.encoder.block_config": [4] * 5,
                "system.loss.reprojection_weight": 1.0,
                "system.loss.total_variation_weight": 0.1,
                "system.loss.adversarial_weight": 1.0,
                "train.batch_size": 16,
                "train.steps": 50 * (3388 // 16 + 1),
            },
        ),
        *(
            (
                name,
                {
                    "optimizer.lr": 1e-5,
                    "engine.gradient_clipping": 1.0,
                    "data.size": 64,
                    "system.loss.cycle_weight": 15.0,
                    "system.loss.smoothing": 0.1,
                    "system.loss.discriminators_every": 2,
                    "system.phantoms": 16,
                    "system.views": views,
                    "train.batch_size": 16,
                    "train.steps": epochs * (2873 // 16 + 1),
                },
            )
            for name, views, epochs in (
                ("cyclegan-b", ["frontal", "lateral"], 40),
                ("cyclegan-f", ["frontal"], 50),
            )
        ),
        (
            "cgan-128",
            {
                "optimizer.lr": 1e-4,
                "train.batch_size": 4,
                "system.loss.balanced": False,
                # Of both views' mean.
                "system.loss.reprojection_weight": 2.0,
                "system.loss.adversarial_weight": 1.0,
                "system.encoder.init_features": 64,
            },
        ),
    ],
)
def test_other_published_presets_have_their_published_settings(name, settings):
    tree = flatten(to_plain(PRESETS[name]))
    assert {key: list(tree[key]) if isinstance(tree[key], tuple) else tree[key] for key in settings} == settings


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_has_a_published_preset_a_slim_one_and_a_space(name):
    assert PRESETS[name].system.name == PRESETS[f"{name}-slim"].system.name == name
    assert load_space(name).preset == f"{name}-slim"


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_slim_preset_has_the_same_parts_with_fewer_parameters(name):
    published, small = PRESETS[name].system, PRESETS[f"{name}-slim"].system
    # Another end and no checkpointing for small networks; a base of its own; what an estimate of noise takes too long.
    others = ("decoder.output", "checkpointing", "base.", *(["scheduler."] if name == "diffux2ct" else []))
    chosen, kept = (
        {
            key: value
            for key, value in flatten(to_plain(system)).items()
            if (isinstance(value, str | bool) or key.startswith("loss.")) and not key.startswith(others)
        }
        for system in (published, small)
    )
    assert kept == chosen


@pytest.mark.parametrize("name", [name for name in PRESETS if name.endswith("-slim")])
def test_a_slim_preset_has_some_two_million_parameters_at_most(name):
    run = PRESETS[name]
    assert run.data.size == 64
    with torch.device("meta"):
        count = parameters(run.system.reconstruction_network(Grid(64), chest(Grid(64))))
    assert count < 2_200_000


def test_a_preset_has_every_setting_of_the_training_in_its_systems_file():
    window = Window(-900.0, 900.0)
    training = Training(64, window, "maximum", 7, 6, 3, 1e-3, (0.1, 0.2), 0.3, 0.4, 0.5, "bf16", "CPU", 5, 2, 1)
    assert all(getattr(training, field.name) != field.default for field in fields(Training))
    run = run_of(SYSTEMS["psr"].tiny, training)
    optimizer, engine, train = run.optimizer, run.engine, run.train
    assert (run.data.size, run.data.window, run.data.normalization) == (64, window, "maximum")
    assert run.system == SYSTEMS["psr"].tiny
    assert (optimizer.lr, optimizer.betas) == (1e-3, (0.1, 0.2))
    assert (optimizer.decay_start, optimizer.weight_decay) == (0.3, 0.4)
    assert (engine.gradient_accumulation_steps, engine.gradient_clipping, engine.precision) == (3, 0.5, "bf16")
    assert (train.steps, train.batch_size, train.validate_every, train.log_every, train.validation_samples) == (
        7,
        6,
        5,
        2,
        1,
    )
    assert run.cluster.gpus_per_worker == 0
    assert run_of(SYSTEMS["psr"].tiny, replace(training, device="GPU")).cluster.gpus_per_worker == 1


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_settings_of_a_system_bear_its_name(name):
    entry = SYSTEMS[name]
    assert {system.name for system, _ in entry.variants().values()} == {name}
    assert len({type(system) for system, _ in entry.variants().values()}) == 1


@pytest.mark.parametrize("name", ["mine", "cgan-128"])
def test_settings_under_the_name_of_no_system_or_of_another_family_are_refused(name):
    with pytest.raises(ConfigError, match=f"system.name is '{name}': with these settings it must be one of psr, 3dcnn"):
        replace(PRESETS["x2ct-gan-tiny"], system=replace(SYSTEMS["x2ct-gan"].tiny, name=name))


def test_the_learning_rate_is_constant_then_falls_to_zero_and_never_below():
    optimizer = OptimizerConfig(lr=1.0, decay_start=0.5)
    rates = [optimizer.lr_at(step, 10) for step in range(12)]
    assert rates[:5] == [1.0] * 5
    assert rates[5:10] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert rates[10:] == [0.0, 0.0]


def test_the_learning_rate_depends_on_the_step_alone_so_a_resume_cannot_change_it():
    optimizer = OptimizerConfig()
    assert optimizer.lr_at(75, 100) == pytest.approx(1e-4)


@pytest.mark.parametrize("name", ["steps", "batch_size", "log_every", "validate_every", "keep_checkpoints"])
def test_a_zero_where_one_is_the_least_is_refused(name):
    with pytest.raises(ConfigError, match=f"^{name} is 0: give 1 or more"):
        TrainConfig(**{name: 0})


@pytest.mark.parametrize("name", ["x2ct-gan-tiny", "latent-diffusion-tiny", "cyclegan-b-slim"])
def test_every_number_of_zero_or_below_gives_a_network_or_an_error_message(name):
    run = PRESETS[name]
    refused = 0
    for key, value in flatten(to_plain(run)).items():
        if isinstance(value, bool | str):
            continue
        wrong = [[], [0] * len(value)] if isinstance(value, list | tuple) else [0, -1]
        for number in wrong:
            try:
                estimate(override(run, {key: number}))
            except ConfigError:
                refused += 1
    assert refused > 30
