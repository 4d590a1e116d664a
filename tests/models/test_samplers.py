"""Noise schedules, prediction types and samplers, on Gaussian data, whose optimal prediction is known."""

import itertools
import math

import pytest
import torch

from raylift.datasets.errors import ConfigError
from raylift.models.diffusion.diffusion_network import SamplingConfig
from raylift.models.diffusion.noise_schedule import NoiseScheduler, NoiseSchedulerConfig
from raylift.models.diffusion.samplers import SAMPLERS, Noise, initial_data, timestep_schedule

MEAN, STD = -0.6, 0.3
"""Mean and standard deviation of the data: most of a CT is air."""
LIKE = torch.zeros(1, 1, 24, 24, 24)


def gaussian_x0(alphas_cumprod):
    """The posterior mean of x_0 given x_t, exact for data of N(MEAN, STD)."""

    def estimate(noisy, time):
        signal = math.sqrt(alphas_cumprod[time])
        gain = signal * STD**2 / (alphas_cumprod[time] * STD**2 + 1 - alphas_cumprod[time])
        return MEAN + gain * (noisy - signal * MEAN)

    return estimate


def sampled(name, schedule, steps, seed=0):
    alphas_cumprod = NoiseSchedulerConfig(schedule).alphas_cumprod()
    noise = Noise(seed, LIKE)
    predict_x0 = gaussian_x0(alphas_cumprod)
    start = initial_data(predict_x0, noise(), alphas_cumprod)
    return (
        SAMPLERS[name](predict_x0, start, timestep_schedule(alphas_cumprod, steps), noise),
        start,
        alphas_cumprod,
    )


def flown(start, alphas_cumprod):
    """The end of the probability flow from the initial noise: for Gaussians the map is linear."""
    last = alphas_cumprod[-1]
    return MEAN + STD * (start - math.sqrt(last) * MEAN) / math.sqrt(last * STD**2 + 1 - last)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_reaches_the_distribution_of_the_data(name, schedule):
    made, *_ = sampled(name, schedule, 250)
    assert float(made.mean()) == pytest.approx(MEAN, abs=0.005)
    assert float(made.std()) == pytest.approx(STD, rel=0.04)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_with_few_steps_the_second_order_has_less_error_and_converges_faster(schedule):
    errors = {}
    for name in ("ddim", "dpm_solver"):
        for steps in (8, 16, 32):
            made, start, alphas_cumprod = sampled(name, schedule, steps)
            errors[name, steps] = float((made - flown(start, alphas_cumprod)).square().mean().sqrt()) / STD
        # Doubling the steps halves DDIM's error.
        assert errors[name, 8] > errors[name, 16] > errors[name, 32]
    for steps in (8, 16, 32):
        assert errors["dpm_solver", steps] < errors["ddim", steps] / 2
    assert errors["ddim", 8] / errors["ddim", 32] == pytest.approx(4, rel=0.2)
    assert errors["dpm_solver", 8] / errors["dpm_solver", 32] > 6


def test_the_linear_schedule_is_the_published_one_and_the_cosine_one_ends_in_noise():
    linear, cosine = NoiseSchedulerConfig().alphas_cumprod(), NoiseSchedulerConfig("cosine").alphas_cumprod()
    assert linear[0] == pytest.approx(1 - 1e-6, abs=1e-12)
    assert linear[-1] == pytest.approx(math.exp(-1000 * (1e-6 + 1e-2) / 2), rel=0.02)
    assert linear[-1] / linear[-2] == pytest.approx(1 - 1e-2)
    assert cosine[499] == pytest.approx(math.cos((0.5 + 0.008) / 1.008 * math.pi / 2) ** 2, rel=1e-3)
    assert 0 < cosine[-1] < 1e-8
    for alphas_cumprod in (linear, cosine):
        assert all(one > other for one, other in itertools.pairwise(alphas_cumprod))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_the_target_of_each_prediction_type_determines_x0(prediction, schedule):
    # With 1 - abar_t in place of its square root the error would be of the order of the noise.
    scheduler = NoiseScheduler(NoiseSchedulerConfig(schedule, prediction_type=prediction))
    generator = torch.Generator().manual_seed(0)
    data, noise = (torch.randn(4, 1, 4, 4, 4, generator=generator) for _ in range(2))
    timesteps = torch.tensor([0, 250, 500, 900])
    noisy = scheduler.add_noise(data, noise, timesteps)
    back = scheduler.predict_x0(scheduler.target(data, noise, timesteps), noisy, timesteps)
    torch.testing.assert_close(back, data, atol=1e-4, rtol=1e-4)
    assert float((noisy - data)[0].abs().max()) < 0.1
    assert torch.corrcoef(torch.stack([noisy[3].flatten(), noise[3].flatten()]))[0, 1] > 0.9


def test_sampling_starts_with_the_signal_that_the_schedule_leaves():
    for schedule, share in (("linear", 0.081), ("cosine", 0.0)):
        alphas_cumprod = NoiseSchedulerConfig(schedule).alphas_cumprod()
        noise = Noise(0, LIKE)()
        start = initial_data(gaussian_x0(alphas_cumprod), noise, alphas_cumprod)
        assert float((start - noise).mean()) == pytest.approx(share * MEAN, abs=1e-3)


def test_a_preconditioned_output_of_zero_is_no_worse_than_gray_at_the_last_timestep():
    preconditioned, plain = (NoiseScheduler(NoiseSchedulerConfig(preconditioning=flag)) for flag in (True, False))
    generator = torch.Generator().manual_seed(0)
    data, noise = (torch.randn(4, 1, 4, 4, 4, generator=generator) for _ in range(2))
    timesteps = torch.tensor([0, 250, 500, 999])
    noisy = plain.add_noise(data, noise, timesteps)
    # The output that gives epsilon is v.
    v = NoiseScheduler(NoiseSchedulerConfig(prediction_type="v_prediction")).target(data, noise, timesteps)
    torch.testing.assert_close(preconditioned.precondition(v, noisy, timesteps), noise, atol=1e-5, rtol=1e-5)
    zero = torch.zeros_like(data)
    assert torch.equal(plain.precondition(v, noisy, timesteps), v)

    def error_of_x0(scheduler):
        epsilon = scheduler.precondition(zero, noisy, timesteps)
        return float((scheduler.predict_x0(epsilon, noisy, timesteps) - data)[-1].square().mean().sqrt())

    assert error_of_x0(preconditioned) < 1.2
    assert error_of_x0(plain) > 10


def test_timesteps_are_uniformly_distributed():
    torch.manual_seed(0)
    scheduler = NoiseScheduler(NoiseSchedulerConfig(num_train_timesteps=4))
    counts = torch.bincount(scheduler.sample_timesteps(torch.empty(4000, 1, 1, 1, 1)), minlength=4)
    assert counts.min() > 900


@pytest.mark.parametrize("count", [1, 2, 5, 16, 64, 1000, 5000])
def test_the_timestep_schedule_goes_from_noise_to_the_data(count):
    alphas_cumprod = NoiseSchedulerConfig().alphas_cumprod()
    steps = timestep_schedule(alphas_cumprod, count)
    assert len(steps) == min(count, 1000)
    assert steps[0][0] == 999
    assert steps[-1][2] == 1
    assert count == 1 or steps[-1][0] == 0
    assert all(before[2] == after[1] == alphas_cumprod[after[0]] for before, after in itertools.pairwise(steps))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_timesteps_are_uniformly_spaced_in_log_signal_to_noise_ratio(schedule):
    alphas_cumprod = NoiseSchedulerConfig(schedule).alphas_cumprod()

    def strides(timesteps):
        ratios = [math.log(alphas_cumprod[t] / (1 - alphas_cumprod[t])) for t in timesteps]
        # The timesteps of a cosine schedule are too coarse at its noisy end.
        return [after - before for before, after in itertools.pairwise(ratios)][3:]

    chosen = strides([t for t, *_ in timestep_schedule(alphas_cumprod, 9)])
    assert max(chosen) < 1.2 * min(chosen)
    equal_times = strides([999 - 125 * k for k in range(8)] + [0])
    assert max(equal_times) > 5 * min(equal_times)


def test_noise_is_a_function_of_the_seed_and_equal_for_every_item():
    one, four = Noise(3, torch.empty(1, 2, 5, 5, 5)), Noise(3, torch.empty(4, 2, 5, 5, 5))
    first, second = one(), one()
    assert not torch.equal(first, second)
    for wanted in (first, second):
        made = four()
        assert made.shape == (4, 2, 5, 5, 5)
        assert all(torch.equal(item, wanted[0]) for item in made)
    assert not torch.equal(Noise(4, torch.empty(1, 2, 5, 5, 5))(), first)


def test_of_the_three_samplers_only_ddpm_adds_noise_at_each_step():
    for name in SAMPLERS:
        alphas_cumprod = NoiseSchedulerConfig().alphas_cumprod()
        # The same initial noise, other noise after it.
        made = [
            SAMPLERS[name](
                gaussian_x0(alphas_cumprod),
                torch.ones_like(LIKE),
                timestep_schedule(alphas_cumprod, 8),
                Noise(seed, LIKE),
            )
            for seed in (1, 2)
        ]
        assert torch.equal(*made) == (name != "ddpm")


@pytest.mark.parametrize(
    "settings", [{"num_train_timesteps": 0}, {"beta_start": 0.0}, {"beta_start": 0.5}, {"beta_end": 1.0}]
)
def test_an_invalid_schedule_is_refused(settings):
    with pytest.raises(ConfigError, match="beta_start <= beta_end < 1"):
        NoiseSchedulerConfig(**settings)


@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
def test_preconditioning_leaves_other_prediction_types_as_they_are(prediction):
    scheduler = NoiseScheduler(NoiseSchedulerConfig(prediction_type=prediction, preconditioning=True))
    assert torch.equal(scheduler.precondition(LIKE, torch.ones_like(LIKE), torch.tensor([999])), LIKE)


def test_no_steps_are_refused():
    with pytest.raises(ConfigError, match="0 sampling steps: use 1 or more"):
        SamplingConfig(steps=0)
