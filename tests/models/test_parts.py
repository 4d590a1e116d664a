"""Parts of compositions: fast implementations equal the plain ones, and every option is what it is named after."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import FRONTAL, LATERAL, Grid, View, chest, parallel, x2ct
from raylift.models.parts.attention import positional_encoding, transformer_block
from raylift.models.parts.blocks import DepthTapConvolution
from raylift.models.parts.discriminators import DiscriminatorConfig
from raylift.models.parts.encoders import EncoderConfig
from raylift.models.parts.fusion import FusionConfig
from raylift.models.parts.heads import Head, Rendering
from raylift.models.parts.lifting import AttentionLift, LiftingConfig, RayLift, RepeatConvLift
from raylift.models.parts.rays import Rays, along_volume_axes, repeat_along_axis

GRID = Grid(16, 20.0)
OBLIQUE = View("oblique", azimuth_deg=35.0, elevation_deg=8.0)


def rays(view=FRONTAL, follow_geometry=False, grid=GRID, geometry=chest):
    return Rays(grid, replace(geometry(grid), views=(view,)), view, follow_geometry)


@pytest.mark.parametrize("view", [FRONTAL, LATERAL], ids=lambda view: view.name)
@pytest.mark.parametrize("size", [2, 3, 8])
def test_lifting_by_planes_equals_a_3d_convolution_of_repeated_features(view, size):
    torch.manual_seed(size)
    lift = RepeatConvLift(6, 5).double()
    along = rays(view)
    features = torch.randn(2, 6, size, size, dtype=torch.float64, requires_grad=True)
    fast = lift(features, along)
    repeated = repeat_along_axis(lift.in_proj(features), along.axis)
    plain = torch.relu(F.instance_norm(F.conv3d(repeated, lift.conv.weight, lift.conv.bias, padding=1)))
    torch.testing.assert_close(fast, plain, atol=1e-10, rtol=1e-10)
    weights = torch.randn_like(fast)
    gradients = [torch.autograd.grad((out * weights).sum(), [features, lift.conv.weight]) for out in (fast, plain)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize(("channels", "kernel"), [(1, 7), (2, 7), (3, 3), (1, 1)])
def test_convolving_by_depth_taps_equals_one_3d_convolution(channels, kernel):
    torch.manual_seed(0)
    taps = DepthTapConvolution(4, channels, kernel).double()
    features = torch.randn(2, 4, 9, 10, 11, dtype=torch.float64, requires_grad=True)
    fast, plain = taps(features), F.conv3d(features, taps.weight, taps.bias, padding=kernel // 2)
    torch.testing.assert_close(fast, plain, atol=1e-10, rtol=1e-10)
    gradients = [torch.autograd.grad(out.square().sum(), [features, taps.weight]) for out in (fast, plain)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-8, rtol=1e-8)


def test_a_head_ends_with_the_activation_of_its_name():
    features = torch.randn(1, 3, 4, 4, 4)
    made = {name: Head(3, name, kernel=1) for name in ("relu", "leaky_relu", "linear")}
    for head in made.values():
        head.load_state_dict(made["linear"].state_dict())
    plain = made["linear"](features)
    assert torch.equal(made["relu"](features), plain.clamp_min(0))
    assert torch.equal(made["leaky_relu"](features), torch.where(plain < 0, 0.01 * plain, plain))


def test_rendering_averages_each_size_with_the_upsampled_coarser_one():
    rendering = Rendering([1, 1, 1], "linear")
    renders = [torch.full((1, 1, size, size, size), value) for size, value in ((2, 8.0), (4, 4.0), (8, 2.0))]
    final, nearest, coarsest = rendering.combine(renders, auxiliaries=True)
    # ((8 / 2 + 4) / 2 + 2) / 2, and the coarser ones with weights normalized to one.
    torch.testing.assert_close(final, torch.full((1, 1, 8, 8, 8), 3.0))
    torch.testing.assert_close(nearest, torch.full((1, 1, 8, 8, 8), 4.0 / 0.75))
    torch.testing.assert_close(coarsest, torch.full((1, 1, 8, 8, 8), 8.0))
    assert len(rendering.combine(renders, auxiliaries=False)) == 1


def test_a_pixel_is_lifted_to_its_row_and_column_at_every_depth():
    # The ray of a single bright pixel of a frontal view: row = D, column = W, all of H.
    image = torch.zeros(1, 1, 8, 8)
    image[0, 0, 2, 5] = 1.0
    assert rays(FRONTAL).backproject(image).nonzero()[:, 2:].tolist() == [[2, depth, 5] for depth in range(8)]
    assert rays(LATERAL).backproject(image).nonzero()[:, 2:].tolist() == [[2, 5, depth] for depth in range(8)]


@pytest.mark.parametrize("view", [FRONTAL, LATERAL], ids=lambda view: view.name)
def test_rays_of_a_parallel_geometry_are_parallel_to_the_axes(view):
    image, maps = torch.rand(2, 3, 16, 16), torch.rand(2, 16, 16, 16)
    straight, true = rays(view), rays(view, follow_geometry=True, geometry=parallel)
    torch.testing.assert_close(true.backproject(image), straight.backproject(image), atol=1e-5, rtol=0)
    # Rays run from back to front and from the patient's left: against the order of the axes.
    sign = torch.tensor(1.0) if torch.allclose(true.depth(16, image), straight.depth(16, image), atol=1e-5) else -1.0
    torch.testing.assert_close(true.depth(16, image), sign * straight.depth(16, image), atol=1e-5, rtol=0)
    stood = straight.depths_to_volume(maps if sign == 1 else maps.flip(1))
    torch.testing.assert_close(true.depths_to_volume(maps), stood, atol=1e-4, rtol=0)


@pytest.mark.parametrize("azimuth", [0, 90, 180, 270, -90])
def test_images_whose_columns_run_against_the_volumes_axis_are_flipped(azimuth):
    images, ray = torch.rand(2, 2, 16, 16), rays(View("around", azimuth_deg=azimuth))
    along = along_volume_axes(images, [rays(FRONTAL), ray])
    assert ray.is_flipped == (azimuth in (180, 270, -90))
    torch.testing.assert_close(along[:, 0], images[:, 0])
    # A parallel beam follows the geometry, which flips by itself.
    true = rays(ray.view, follow_geometry=True, geometry=parallel)
    torch.testing.assert_close(true.backproject(images[:, 1:]), ray.backproject(along[:, 1:]), atol=1e-5, rtol=0)
    assert along_volume_axes(images, [rays(FRONTAL), true]) is images


def test_an_image_upside_down_is_not_lifted_along_an_axis():
    with pytest.raises(ConfigError, match="neither frontal nor lateral"):
        rays(View("upside", roll_deg=180.0))


def test_rays_of_a_cone_diverge_towards_the_detector():
    # A pixel off the center: its voxels are closer to the axis the closer they are to the source.
    image = torch.zeros(1, 1, 16, 16)
    image[0, 0, 7:9, 12] = 1.0
    volume = rays(FRONTAL, follow_geometry=True, geometry=x2ct).backproject(image)[0, 0, 7]
    depth = rays(FRONTAL, follow_geometry=True, geometry=x2ct).depth(16, image)[0, 0, 7, :, 0]
    columns = torch.arange(16.0)
    place = (volume * columns).sum(1) / volume.sum(1).clamp_min(1e-6)
    order = depth.argsort()
    met = volume.sum(1)[order] > 0.5
    towards_detector = place[order][met]
    assert len(towards_detector) > 8
    assert towards_detector[-1] - towards_detector[0] > 1
    assert (towards_detector.diff() > -0.2).all()


def test_an_oblique_view_needs_rays_that_follow_the_geometry():
    with pytest.raises(ConfigError, match=r"view 'oblique' .*use system\.lifting\.along rays"):
        rays(OBLIQUE)
    rays(OBLIQUE, follow_geometry=True)


@pytest.mark.parametrize("view", [FRONTAL, LATERAL, OBLIQUE], ids=lambda view: view.name)
def test_features_lifted_along_rays_differ_between_depths(view):
    torch.manual_seed(0)
    lifted = RayLift(2, 3)(torch.rand(1, 2, 16, 16), rays(view, follow_geometry=True))
    assert lifted.shape == (1, 3, 16, 16, 16)
    along = lifted.mean(dim=(0, 1, 2))
    assert along.std(dim=0).mean() > 1e-3


@pytest.mark.parametrize("kind", ["repeat_conv", "repeat", "duo", "attention"])
@pytest.mark.parametrize("along", ["axes", "rays"])
def test_every_lifting_gives_a_volume_for_every_size_and_the_radiograph_reaches_each(kind, along):
    torch.manual_seed(0)
    config = LiftingConfig(kind, along, coarsest="features", heads=1)
    features = (3, 4, 5)
    widths = config.widths(features, (9, 6, 4, 2))
    assert widths == ((5, 4, 3) if kind == "repeat" else (6, 4, 2))
    lifting = config.build(features, widths, 16, use_checkpoint=False)
    radiograph = torch.rand(2, 1, 16, 16, requires_grad=True)
    pyramid = [
        F.avg_pool2d(radiograph, 2**k).repeat(1, c, 1, 1) * torch.arange(1.0, c + 1).view(-1, 1, 1)
        for k, c in enumerate(features)
    ]
    volumes = lifting(radiograph, pyramid, rays(follow_geometry=along == "rays"))
    assert [tuple(volume.shape) for volume in volumes] == [
        (2, width, size, size, size) for width, size in zip(widths, (4, 8, 16), strict=True)
    ]
    for volume in volumes:
        (gradient,) = torch.autograd.grad(volume.square().sum() + volume.pow(3).sum(), radiograph, retain_graph=True)
        assert gradient.abs().sum() > 0


def test_lifting_by_channels_needs_one_feature_map():
    with pytest.raises(ConfigError, match="use the hourglass or unet encoder"):
        LiftingConfig("channels").widths((64, 128), (8, 4))


def test_the_transformer_relates_far_corners_of_an_image():
    # Far corners of the image depend on each other only through attention.
    torch.manual_seed(0)
    tokens = torch.rand(1, 16, 8)
    block = transformer_block(8, 2)
    changed = tokens.clone()
    changed[0, 15, 0] += 1.0
    assert not torch.allclose(block(tokens)[0, 0], block(changed)[0, 0], atol=1e-5)


def test_the_published_transformer_has_64_tokens_at_128_before_the_last_stage():
    met = []
    with torch.device("meta"):
        encoder = EncoderConfig("transformer").build(use_checkpoint=False)
        for block in encoder.transformer:
            block.register_forward_pre_hook(lambda _, given: met.append(tuple(given[0].shape)))
        features = encoder(torch.empty(1, 1, 128, 128))
    assert met == [(1, 64, 512)] * 6
    assert tuple(features[-2].shape) == (1, 512, 8, 8)


def test_volumes_up_to_16_a_side_have_attention_and_larger_ones_do_not():
    features = (1, 2, 3, 4)
    lifting = LiftingConfig("attention", coarsest="features", heads=1).build(features, (4, 3, 2, 1), 64, False)
    attending = [isinstance(lift, AttentionLift) for lift in (lifting.coarsest, *lifting.finer)]
    # 8, 16, 32 and 64 per side.
    assert attending == [True, True, False, False]


def test_a_voxel_attends_to_pixels_outside_its_receptive_field():
    torch.manual_seed(0)

    class Nothing(torch.nn.Module):
        def forward(self, features, rays):
            return torch.ones(1, 4, 8, 8, 8)

    lift = AttentionLift(Nothing(), 3, 4, heads=2)
    image = torch.rand(1, 3, 8, 8)
    changed = image.clone()
    changed[..., 0, 0] += 1.0
    moved = (lift(changed, rays()) - lift(image, rays())).abs()
    assert moved[..., 7, 7, 7].max() > 1e-4


def test_lifting_along_rays_has_no_fully_connected_layer():
    for along, count in (("axes", 1), ("rays", 0)):
        lifting = LiftingConfig(along=along).build((3, 4, 5), (5, 4, 3), 16, use_checkpoint=False)
        assert sum(isinstance(module, torch.nn.Linear) for module in lifting.modules()) == count


def test_positional_encodings_are_distinct():
    for axes in (2, 3):
        places = positional_encoding(4, axes, 14, like=torch.zeros(1))
        assert places.shape == (4**axes, 14)
        assert len(torch.unique(places.round(decimals=4), dim=0)) == 4**axes


@pytest.mark.parametrize("kind", ["dense", "transformer", "hourglass", "identity"])
def test_the_features_of_an_encoder_have_its_declared_channels_at_halved_sizes(kind):
    config = EncoderConfig(
        kind,
        init_features=8,
        growth_rate=4,
        bottleneck_channels=8,
        block_config=(1, 1, 1),
        transformer_blocks=1,
        heads=1,
    )
    features = config.build(use_checkpoint=False)(torch.rand(2, 1, 32, 32))
    assert tuple(f.shape[1] for f in features) == config.channels()
    assert [f.shape[-1] for f in features] == [32 >> k for k in range(len(features))]


def test_average_sum_and_concatenation_are_what_they_are_named_after():
    views = [torch.full((1, 3, 2, 2, 2), value) for value in (1.0, 3.0)]
    fused = {kind: FusionConfig(kind).build(3, 2)(views) for kind in ("average", "sum", "concatenate")}
    assert torch.equal(fused["average"], torch.full((1, 3, 2, 2, 2), 2.0))
    assert torch.equal(fused["sum"], torch.full((1, 3, 2, 2, 2), 4.0))
    assert torch.equal(fused["concatenate"], torch.cat(views, dim=1))
    projected = FusionConfig("concatenate").build(3, 2, keep_width=True)
    assert projected(views).shape == (1, 3, 2, 2, 2)
    assert projected.out_proj.weight.shape == (3, 6, 1, 1, 1)


@pytest.mark.parametrize("kind", ["average", "sum", "concatenate", "attention", "alignment"])
@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("below", [0, 2])
def test_every_fusion_takes_one_view_and_more_with_and_without_a_coarser_volume(kind, views, below):
    fusion = FusionConfig(kind).build(3, views, below)
    came = torch.rand(2, below, 4, 4, 4) if below else None
    fused = fusion([torch.rand(2, 3, 4, 4, 4) for _ in range(views)], came)
    assert fused.shape == (2, fusion.out_channels, 4, 4, 4)


@pytest.mark.parametrize("kind", ["average", "sum", "attention"])
def test_fusions_that_take_any_number_of_views_do_so_with_the_same_weights_in_any_order(kind):
    torch.manual_seed(0)
    fusion = FusionConfig(kind).build(3, 2)
    FusionConfig(kind).build(3, 5).load_state_dict(fusion.state_dict())
    views = [torch.rand(1, 3, 4, 4, 4) for _ in range(3)]
    torch.testing.assert_close(fusion(views), fusion(views[::-1]))


def test_alignment_weights_views_voxel_by_voxel_and_masks_their_weighted_sum():
    torch.manual_seed(0)
    fusion = FusionConfig("alignment").build(3, 2, 2)
    views, below = [torch.rand(1, 3, 4, 4, 4) for _ in range(2)], torch.rand(1, 2, 4, 4, 4)
    coarse, fine, both = fusion(views, below).chunk(3, dim=1)
    torch.testing.assert_close(both, views[0] + views[1])
    low, high = torch.minimum(*views), torch.maximum(*views)
    assert ((coarse >= low - 1e-6) & (coarse <= high + 1e-6)).all()
    mask = fine / coarse
    assert ((mask > 0) & (mask < 1)).all()
    torch.testing.assert_close(mask, mask[:, :1].expand_as(mask))
    # One weight for each voxel, the same for all channels.
    weight = (coarse - views[1]) / (views[0] - views[1])
    torch.testing.assert_close(weight, weight[:, :1].expand_as(weight), atol=1e-3, rtol=0)


def test_attention_weights_views_voxel_by_voxel_with_a_sum_of_one():
    torch.manual_seed(0)
    views = [torch.rand(1, 3, 4, 4, 4) for _ in range(3)]
    fused = FusionConfig("attention").build(3, 3)(views)
    low, high = torch.stack(views).amin(dim=0), torch.stack(views).amax(dim=0)
    assert ((fused >= low - 1e-6) & (fused <= high + 1e-6)).all()
    torch.testing.assert_close(FusionConfig("attention").build(3, 3)([views[0]] * 3), views[0])


@pytest.mark.parametrize(
    ("kind", "views", "count"),
    [
        ("patch", (FRONTAL, LATERAL), 11_055_169),
        ("patch", (FRONTAL,), 11_051_073),
        ("coordinate", (FRONTAL, LATERAL), 11_067_457),
    ],
)
def test_published_discriminators_have_the_published_number_of_parameters(kind, views, count):
    with torch.device("meta"):
        built = DiscriminatorConfig(kind).build([rays(view) for view in views])
    assert sum(p.numel() for p in built.parameters()) == count


def test_the_published_discriminator_scores_19_patches_a_side_at_128():
    grid = Grid(128)
    with torch.device("meta"):
        discriminator = DiscriminatorConfig().build([rays(view, grid=grid) for view in (FRONTAL, LATERAL)])
        scores = discriminator(torch.empty(1, 1, 128, 128, 128), torch.empty(1, 2, 128, 128))
    assert scores.shape == (1, 1, 19, 19, 19)


@pytest.mark.parametrize("kind", ["patch", "coordinate", "lifted", "cnn"])
@pytest.mark.parametrize("conditional", [True, False])
def test_every_discriminator_depends_on_the_volume_and_when_conditional_on_the_radiographs(kind, conditional):
    torch.manual_seed(0)
    config = DiscriminatorConfig(kind, (4, 4, 4), conditional, condition_channels=2)
    discriminator = config.build([rays(FRONTAL), rays(OBLIQUE, follow_geometry=True)])
    volume, views = torch.rand(2, 1, 16, 16, 16), torch.rand(2, 2, 16, 16)
    scores = discriminator(volume, views)
    assert scores.shape == ((2, 1) if kind == "cnn" else (2, 1, 7, 7, 7))
    assert not torch.allclose(scores, discriminator(volume.flip(2), views))
    assert torch.allclose(scores, discriminator(volume, views.flip(2))) != conditional


def test_a_coordinate_discriminator_depends_on_the_position_of_a_patch_and_a_patch_one_does_not():
    torch.manual_seed(0)
    volume, views = torch.full((1, 1, 16, 16, 16), 0.5), torch.zeros(1, 1, 16, 16)
    for kind, depends in (("patch", False), ("coordinate", True)):
        discriminator = DiscriminatorConfig(kind, (4, 4), conditional=False).build([])
        discriminator.layers = discriminator.layers[:1]
        inside = discriminator(volume, views)[..., 2:-2, 2:-2, 2:-2]
        assert (inside.std(dim=(2, 3, 4)) > 1e-4).all() == depends
