"""X2CT-GAN: counts of the published network, sizes, and that each part does what the composition says."""

from dataclasses import replace

import pytest
import torch

from raylift.datasets.errors import ConfigError
from raylift.datasets.stream import Batch
from raylift.models.discriminators import PatchDiscriminator, PatchDiscriminatorConfig
from raylift.models.encoders import DenseEncoderConfig
from raylift.models.objectives.adversarial import ReconstructionLoss
from raylift.models.objectives.turns import frozen
from raylift.models.systems.x2ct_gan import X2CTGAN
from raylift.models.zoo import parameters
from raylift.platform.presets import x2ct_gan_tiny

TINY = x2ct_gan_tiny().system


def batch(size=32, n=2, views=2):
    generator = torch.Generator().manual_seed(1)
    return Batch(
        torch.rand(n, 1, size, size, size, generator=generator),
        torch.rand(n, views, size, size, generator=generator),
        tuple(f"sample-{k}" for k in range(n)),
    )


@pytest.mark.parametrize(
    ("views", "count"), [(("frontal", "lateral"), 61_740_467), (("frontal",), 29_384_481)], ids=["biplanar", "single"]
)
def test_the_published_generator_has_the_published_number_of_parameters(views, count):
    with torch.device("meta"):
        assert parameters(X2CTGAN(views=views).reconstructor(128)) == count


@pytest.mark.parametrize(
    ("views", "count"), [(("frontal", "lateral"), 11_055_169), (("frontal",), 11_051_073)], ids=["biplanar", "single"]
)
def test_the_published_discriminator_has_the_published_number_of_parameters(views, count):
    with torch.device("meta"):
        assert parameters(PatchDiscriminator(PatchDiscriminatorConfig(), views)) == count


def test_the_published_discriminator_judges_19_patches_a_side_at_128():
    with torch.device("meta"):
        discriminator = PatchDiscriminator(PatchDiscriminatorConfig(), ("frontal", "lateral"))
        scores = discriminator(torch.empty(1, 1, 128, 128, 128), torch.empty(1, 2, 128, 128))
    assert scores.shape == (1, 1, 19, 19, 19)


@pytest.mark.parametrize("size", [64, 96, 128, 224])
def test_the_published_network_takes_other_sizes(size):
    with torch.device("meta"):
        assert X2CTGAN().reconstructor(size)(torch.empty(1, 2, size, size)).shape == (1, 1, size, size, size)


def test_a_size_that_cannot_be_halved_is_refused_with_the_sizes_that_can():
    with pytest.raises(ConfigError, match="multiple of 32 from 64 up"):
        X2CTGAN().reconstructor(48)


@pytest.mark.parametrize("fusion", ["average", "sum", "concatenate"])
def test_every_fusion_trains_every_parameter_that_can_matter(fusion):
    system = replace(TINY, fusion=fusion, dropout=0.0)
    network = system.reconstructor(32)
    data = batch()
    (network(data.views) - data.volume).square().mean().backward()
    without = {name for name, parameter in network.named_parameters() if parameter.grad is None}
    # The views' own last block and head, which only a lone view uses.
    unused = {
        name
        for name, _ in network.named_parameters()
        if name.startswith("branches") and ("head" in name or "decoder.4.blocks" in name)
    }
    assert without == unused


def test_the_unused_parameters_of_the_published_network_are_those_known():
    with torch.device("meta"):
        network = X2CTGAN().reconstructor(128)
    unused = [
        p.numel()
        for name, p in network.named_parameters()
        if name.startswith("branches") and ("head" in name or "decoder.5.blocks" in name)
    ]
    assert sum(unused) == 24_834


def test_each_view_reaches_the_volume():
    torch.manual_seed(0)
    network = TINY.reconstructor(32).eval()
    views = torch.rand(1, 2, 32, 32)
    for view in range(2):
        changed = views.clone()
        changed[:, view] = changed[:, view].flip(-1)
        assert not torch.allclose(network(views), network(changed), atol=1e-6)


def test_a_frontal_detail_lands_on_its_row_and_column_at_every_depth():
    # A lone bright pixel, lifted, must be where its ray is: row = D, column = W, all of H.
    from raylift.models.lifting import repeat_along_rays

    image = torch.zeros(1, 1, 8, 8)
    image[0, 0, 2, 5] = 1.0
    assert repeat_along_rays(image, "frontal").nonzero()[:, 2:].tolist() == [[2, depth, 5] for depth in range(8)]
    assert repeat_along_rays(image, "lateral").nonzero()[:, 2:].tolist() == [[2, 5, depth] for depth in range(8)]


def test_the_generators_turn_leaves_no_gradient_in_the_discriminator_and_the_other_way_round():
    objective = TINY.objective(32)
    generator, discriminator = objective.players.values()
    data = batch()
    with frozen([discriminator.network]):
        loss, _, carried = generator(data, {})
        loss.backward()
    assert all(parameter.grad is None for parameter in discriminator.network.parameters())
    assert all(parameter.requires_grad for parameter in discriminator.network.parameters())
    before = [None if p.grad is None else p.grad.clone() for p in generator.network.parameters()]
    with frozen([generator.network]):
        loss, _, _ = discriminator(data, carried)
        loss.backward()
    after = [p.grad for p in generator.network.parameters()]
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert any(parameter.grad.abs().sum() > 0 for parameter in discriminator.network.parameters())


def test_without_an_adversarial_weight_there_is_no_discriminator():
    system = replace(TINY, loss=ReconstructionLoss(adversarial=0.0))
    assert list(system.objective(32).players) == ["generator"]


def test_the_generators_loss_is_the_weighted_sum_of_its_terms():
    objective = TINY.objective(32)
    torch.manual_seed(0)
    loss, logs, _ = objective.players["generator"](batch(), {})
    expected = 0.1 * logs["adversarial"] + 10 * logs["voxel_mse"] + 10 * logs["projection_l1"]
    assert torch.isclose(loss, expected)


def test_it_overfits_two_volumes_and_does_not_answer_with_their_mean():
    # 40 steps at 32^3: the loss falls to a tenth or less, and two inputs give two volumes.
    torch.manual_seed(0)
    system = replace(TINY, dropout=0.0, loss=ReconstructionLoss(adversarial=0.0))
    objective = system.objective(32)
    volume = torch.zeros(2, 1, 32, 32, 32)
    volume[0, :, 8:20, 6:18, 4:16] = 0.8
    volume[1, :, 14:28, 12:26, 14:28] = 0.8
    views = torch.stack([volume.mean(dim=3)[:, 0], volume.mean(dim=4)[:, 0]], dim=1)
    data = Batch(volume, views)
    optimiser = torch.optim.Adam(objective.reconstructor.parameters(), lr=2e-4, betas=(0.5, 0.99))
    losses = []
    for _ in range(40):
        optimiser.zero_grad()
        loss, _, _ = objective.players["generator"](data, {})
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 10
    made = objective.reconstructor(views).detach()
    between = (made[0] - made[1]).square().mean()
    assert between > 0.25 * (volume[0] - volume[1]).square().mean()


def test_a_wrong_number_of_decoder_widths_is_refused():
    with pytest.raises(ConfigError, match="4 decoder widths for 5 encoder stages: give 6"):
        X2CTGAN(decoder_channels=(8, 8, 8, 8), encoder=DenseEncoderConfig())
