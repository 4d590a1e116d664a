"""`raylift import-x2ct` on files of the form that X2CT-GAN's public code writes, with known weights."""

import json
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
import x2ct_reference as reference

from raylift.datasets.geometry import Grid, x2ct
from raylift.datasets.phantom.thorax import thorax
from raylift.datasets.projector import render_drrs
from raylift.models import weights
from raylift.models.systems.x2ct import X2CT_GAN
from raylift.models.x2ct_weights import convert, system_of
from raylift.models.zoo import parameters
from raylift.platform import cli
from raylift.serve.reconstructor import Reconstructor

PUBLISHED = ((6, 12, 24, 16, 6), 64, 32, 128, (16, 16, 32, 64, 128, 256), 4)
SMALL = ((2, 1, 3), 6, 4, 8, (3, 4, 5, 6), 2)


def checkpoint(folder, state, **changed):
    path = folder / "90_net_G.pth"
    state = OrderedDict((name, one.float() if one.is_floating_point() else one) for name, one in state.items())
    torch.save({"iters": 20610, "epoch": 90, "state_dict": state, "lr": 4e-5, **changed}, path)
    return path


@pytest.mark.parametrize(("views", "count"), [(2, 61_740_467), (1, 29_384_481)])
def test_the_published_generators_weights_are_those_of_the_published_system(views, count):
    with torch.device("meta"):
        state = reference.random_state(*PUBLISHED, views)
        converted = convert(state)
        system, size = system_of(converted)
        network = system.reconstruction_network(Grid(size), x2ct(Grid(size)))
    assert size == 128
    assert system == (X2CT_GAN.full if views == 2 else X2CT_GAN.single_view)
    assert {name: one.shape for name, one in converted.items()} == {
        name: one.shape for name, one in network.state_dict().items()
    }
    assert parameters(network) == count
    if views == 2:
        assert len(state) - len(converted) == 1047


@pytest.mark.parametrize("views", [1, 2])
def test_an_imported_model_predicts_what_the_reference_does_from_x2ct_gans_own_images(views, tmp_path, capsys):
    torch.manual_seed(views)
    state = reference.random_state(*SMALL, views)
    path = checkpoint(tmp_path, state)
    assert cli.main(["import-x2ct", str(path), str(tmp_path / "model")]) == 0
    assert "16^3" in capsys.readouterr().out
    description = weights.load(tmp_path / "model").description
    assert description.normalization == "maximum"
    grid = Grid(16, 20.0)
    assert description.grid == grid
    assert description.geometry.attenuation == "plastimatch"
    assert json.loads((tmp_path / "model" / "model.json").read_text())["model"]["provenance"]["epoch"] == 90
    assert "data of 90_net_G.pth" in (tmp_path / "model" / "README.md").read_text()

    images = render_drrs(thorax(5, grid)[0], grid, x2ct(grid))[:views]
    reconstructor = Reconstructor.load(str(tmp_path / "model"))
    given = reconstructor.prepare(dict(zip(reconstructor.views, images, strict=True)))
    (result,) = reconstructor.reconstruct([given])
    # X2CT-GAN's own: divided by the maximum as uint8, the lateral with columns from front to back.
    theirs = np.stack([(image / image.max() * 255).astype(np.uint8) / 255 for image in images])
    if views == 2:
        theirs[1] = theirs[1][:, ::-1]
    function = reference.biplanar if views == 2 else reference.single
    expected = function(state, torch.from_numpy(theirs)[None])[0, 0].clip(0, 1) * 2500 - 1024
    assert expected.std() > 10
    assert np.abs(result.hu - expected.numpy()).max() < 2


def test_a_file_that_would_run_code_is_refused(tmp_path, capsys):
    class Runs:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    path = tmp_path / "netG.pth"
    torch.save({"iters": 1, "epoch": 1, "state_dict": {"encoder_layer.1.weight": Runs()}, "lr": 0.1}, path)
    assert cli.main(["import-x2ct", str(path), str(tmp_path / "model")]) == 2
    assert "nothing else is unpickled" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "model").exists()


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {}, "has no state_dict"),
        (lambda state: {"conv.weight": torch.ones(1)}, "lacks the decoder"),
        (lambda state: {**state, "encoder_layer.9.x": torch.ones(1)}, "'encoder_layer.9.x' is no weight"),
        (lambda state: {**state, "decoder_layer.0.bias": torch.tensor([float("nan")])}, "not finite"),
        (lambda state: {**state, "decoder_layer.0.bias": torch.ones(2)}, "size mismatch"),
        (lambda state: {**state, "decoder_layer.0.bias": 3}, "is no tensor"),
        (lambda state: without(state, "decoder_layer.0.bias"), "Missing key"),
        (lambda state: without(state, "encoder_layer.1.weight"), "lacks weights"),
    ],
)
def test_what_is_not_the_generators_checkpoint_is_refused_by_name(change, message, tmp_path, capsys):
    state = reference.random_state(*SMALL, 1)
    path = tmp_path / "netG.pth"
    torch.save({"iters": 1, "epoch": 1, "state_dict": change(state), "lr": 0.1}, path)
    assert cli.main(["import-x2ct", str(path), str(tmp_path / "model")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(path) in error
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", pickle.dumps([1, 2]), None])
def test_another_file_or_none_is_refused(content, tmp_path, capsys):
    path = tmp_path / "netG.pth"
    if content is not None:
        path.write_bytes(content)
    assert cli.main(["import-x2ct", str(path), str(tmp_path / "model")]) == 2
    assert str(path) in capsys.readouterr().err
