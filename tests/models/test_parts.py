"""The fast forms of lifting and head are the plain ones, term by term."""

import pytest
import torch
from torch.nn import functional as F

from raylift.models.decoders import Head
from raylift.models.fusion import fusion
from raylift.models.lifting import RepeatLift, repeat_along_rays


@pytest.mark.parametrize("view", ["frontal", "lateral"])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_lifting_by_planes_equals_a_3d_convolution_of_repeated_features(view, size):
    torch.manual_seed(size)
    lift = RepeatLift(6, 5, view).double()
    features = torch.randn(2, 6, size, size, dtype=torch.float64, requires_grad=True)
    fast = lift(features)
    plain = torch.relu(F.instance_norm(lift.mix(repeat_along_rays(lift.narrow(features), view))))
    torch.testing.assert_close(fast, plain, atol=1e-10, rtol=1e-10)
    weights = torch.randn_like(fast)
    gradients = [torch.autograd.grad((out * weights).sum(), [features, lift.mix.weight]) for out in (fast, plain)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-8, rtol=1e-8)


def test_the_head_by_depth_taps_equals_one_7x7x7_convolution():
    torch.manual_seed(0)
    head = Head(4).double()
    features = torch.randn(2, 4, 9, 10, 11, dtype=torch.float64, requires_grad=True)
    fast, plain = head(features), torch.relu(head.convolve(features))
    torch.testing.assert_close(fast, plain, atol=1e-10, rtol=1e-10)
    gradients = [torch.autograd.grad(out.square().sum(), [features, head.convolve.weight]) for out in (fast, plain)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-8, rtol=1e-8)


def test_fusions_do_what_their_names_say():
    views = [torch.full((1, 3, 2, 2, 2), value) for value in (1.0, 3.0)]
    assert torch.equal(fusion("average", 3, 2)(views), torch.full((1, 3, 2, 2, 2), 2.0))
    assert torch.equal(fusion("sum", 3, 2)(views), torch.full((1, 3, 2, 2, 2), 4.0))
    mixing = fusion("concatenate", 3, 2)
    assert mixing(views).shape == (1, 3, 2, 2, 2)
    assert mixing.mix.weight.shape == (3, 6, 1, 1, 1)
