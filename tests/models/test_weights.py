"""Models on disk: saving and loading, and the refusal of altered or foreign files."""

import json
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from raylift.datasets import hashed_json
from raylift.datasets.geometry import Grid, chest
from raylift.datasets.intensity import Window
from raylift.models import weights
from raylift.models.baselines import FittedBaselines
from raylift.models.parts.lifting import LiftingConfig
from raylift.models.systems.duolift import DUOLIFT_GAN
from raylift.models.systems.psr import PSR
from raylift.models.systems.unrolled import UNROLLED
from raylift.models.systems.x2ct import X2CT_GAN
from raylift.models.training_data import TrainingData
from raylift.models.weights import Description, WeightsError
from raylift.platform.presets import PRESETS

GRID = Grid(32, 10.0)


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    system = PRESETS["x2ct-gan-tiny"].system
    network = system.reconstruction_network(GRID, chest(GRID))
    description = Description(system, GRID, chest(GRID), Window(), provenance={"step": 3})
    sha256 = weights.save(tmp_path / "model", network.state_dict(), description)
    return tmp_path / "model", network.eval(), description, sha256


def test_a_loaded_model_equals_the_saved_one(saved):
    folder, network, description, sha256 = saved
    model = weights.load(folder)
    views = torch.rand(1, 2, 32, 32)
    torch.testing.assert_close(model.network(views), network(views), atol=1e-4, rtol=0)
    states = model.network.state_dict(), network.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert (model.description, model.sha256) == (description, sha256)
    assert not any(parameter.requires_grad for parameter in model.network.parameters())


def test_the_weights_of_a_loaded_model_are_aligned_whatever_the_file(saved):
    # The last digits of a convolution depend on the alignment, and a copy in another process is aligned.
    loaded = weights.load(saved[0]).network.state_dict()
    assert {tensor.data_ptr() % 64 for tensor in loaded.values()} == {0}


def test_a_model_may_name_the_weights_of_a_neighboring_folder(saved):
    folder, network, *_ = saved
    alike = folder.parent / "alike"
    alike.mkdir()
    head = hashed_json.decode((folder / "model.json").read_bytes(), "model.json")

    def name(other: Any) -> None:
        (alike / "model.json").write_bytes(hashed_json.encode({**head, "weights_of": other}))

    name("model")
    views = torch.rand(1, 2, 32, 32)
    torch.testing.assert_close(weights.load(alike).network(views), network(views), atol=1e-4, rtol=0)
    for other in ("../model", "..", ".", "/model", "a/b", "model\n", 5, True, None, ["model"]):
        name(other)
        with pytest.raises(weights.WeightsError, match="it must be a folder next to it"):
            weights.load(alike)
    name("absent")
    with pytest.raises(
        weights.WeightsError, match=r"absent has no model\.safetensors, whose weights .*/alike has: copy both"
    ):
        weights.load(alike)
    name("model")
    (folder / "model.safetensors").write_bytes(b"altered")
    with pytest.raises(weights.WeightsError, match=r"model/model\.safetensors has SHA-256 .*: the file was altered"):
        weights.load(alike)


def test_a_checkpoint_folder_is_a_model_too(saved):
    folder, *_ = saved
    assert weights.load(folder.rename(folder.parent / "checkpoint").parent / "checkpoint").sha256
    (folder.parent / "step").mkdir()
    (folder.parent / "checkpoint").rename(folder.parent / "step/model")
    assert weights.load(folder.parent / "step").sha256 == saved[3]


def test_one_altered_byte_is_detected(saved):
    path = saved[0] / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="the file was altered or cut"):
        weights.load(saved[0])


@pytest.fixture
def with_training_data(saved):
    """The same model with its training data, and these."""
    folder, network, description, _ = saved
    torch.manual_seed(1)
    data = TrainingData(
        frozenset({"ab" * 32, "01" * 32}), FittedBaselines(torch.rand(1, 1, 32, 32, 32), 0.5, -0.1, 7), 2
    )
    weights.save(folder, network.state_dict(), description, training_data=data)
    return folder, data


def test_the_training_data_of_a_model_are_those_that_were_saved(with_training_data):
    folder, data = with_training_data
    loaded = weights.load(folder).training_data
    assert (loaded.scans, loaded.unlisted) == (data.scans, 2)
    assert (loaded.baselines.scale, loaded.baselines.offset, loaded.baselines.volumes) == (0.5, -0.1, 7)
    # Half a HU of the window's 2500.
    torch.testing.assert_close(loaded.baselines.mean, data.baselines.mean, atol=0.51 / 2500, rtol=0)
    (folder / "training_data.npz").unlink()
    with pytest.raises(WeightsError, match=r"has no training_data\.npz"):
        weights.load(folder)


def test_altered_or_foreign_training_data_are_refused(with_training_data):
    folder, _ = with_training_data
    path = folder / "training_data.npz"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(WeightsError, match="the file was altered or cut"):
        weights.load(folder)
    mean_hu = np.zeros((32, 32, 32), np.int16)
    good = {"scans": np.zeros((1, 32), np.uint8), "unlisted": np.array([0]), "mean_hu": mean_hu, "fit": np.zeros(3)}
    others = [
        {**good, "mean_hu": mean_hu[1:]},
        {**good, "fit": np.zeros(2)},
        {**good, "scans": np.zeros((1, 31), np.uint8)},
        {**good, "scans": np.array([{}], object)},
        {"scans": good["scans"]},
        {**good, "unlisted": np.array([])},
    ]
    text = json.loads((folder / "model.json").read_text())
    for arrays in (good, *others):
        np.savez_compressed(path, **arrays)
        text["training_data_sha256"] = weights.file_sha256(path)
        (folder / "model.json").write_bytes(hashed_json.encode(text))
        if arrays is good:
            assert weights.load(folder).training_data.scans == {"00" * 32}
            continue
        with pytest.raises(WeightsError, match=r"training_data.npz does not fit model.json"):
            weights.load(folder)


def test_a_pickle_in_place_of_the_weights_is_never_opened(saved, tmp_path):
    flag = tmp_path / "opened"

    class Trap:
        def __reduce__(self):
            return (open, (str(flag), "w"))

    (saved[0] / "model.safetensors").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(WeightsError):
        weights.load(saved[0])
    # Nor with a matching digest.
    text = json.loads((saved[0] / "model.json").read_text())
    text["sha256"] = weights.file_sha256(saved[0] / "model.safetensors")
    (saved[0] / "model.json").write_bytes(hashed_json.encode(text))
    with pytest.raises(WeightsError, match=r"does not fit|cannot"):
        weights.load(saved[0])
    assert not flag.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.pop("sha256"), "sha256"),
        (lambda text: text.update(version=2), "this raylift reads"),
        (lambda text: text["model"].update(surprise=1), "surprise"),
        (
            lambda text: text["model"]["system"]["fusion"].update(kind="max"),
            "expected one of average, sum, concatenate, attention, alignment, not 'max'",
        ),
        (lambda text: text["model"]["grid"].update(size=64), "does not fit"),
    ],
)
def test_a_wrong_description_is_refused_with_the_reason(saved, change, message):
    path = saved[0] / "model.json"
    text = json.loads(path.read_text())
    change(text)
    path.write_bytes(hashed_json.encode(text))
    with pytest.raises(WeightsError, match=message):
        weights.load(saved[0])


def test_a_folder_that_is_no_model_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(WeightsError, match="Give a checkpoint or an exported folder"):
        weights.load(tmp_path)


@pytest.mark.parametrize(
    "system",
    [PSR.tiny, DUOLIFT_GAN.tiny, replace(X2CT_GAN.tiny, lifting=LiftingConfig(along="rays")), UNROLLED.tiny],
    ids=["batch norm", "nested", "along rays", "channels-last"],
)
def test_every_network_is_loaded_completely_from_meta_tensors(tmp_path, system):
    torch.manual_seed(0)
    network = system.reconstruction_network(GRID, chest(GRID))
    views = torch.rand(1, len(system.views), 32, 32)
    network(views)
    weights.save(tmp_path / "model", network.state_dict(), Description(system, GRID, chest(GRID), Window()))
    again = weights.load(tmp_path / "model").network
    torch.testing.assert_close(again(views), network.eval()(views), atol=1e-5, rtol=0)


def test_a_system_with_channels_last_weights_has_them_when_it_is_loaded_and_saves_them_again(tmp_path):
    torch.manual_seed(0)
    description = Description(UNROLLED.tiny, GRID, chest(GRID), Window())
    network = UNROLLED.tiny.reconstruction_network(GRID, chest(GRID))
    sha256 = weights.save(tmp_path / "model", network.state_dict(), description)
    loaded = weights.load(tmp_path / "model").network
    kernels = [parameter for parameter in loaded.parameters() if parameter.dim() == 5 and parameter.shape[2] == 3]
    assert kernels
    assert all(kernel.is_contiguous(memory_format=torch.channels_last_3d) for kernel in kernels)
    assert not all(kernel.is_contiguous() for kernel in kernels)
    assert weights.save(tmp_path / "again", loaded.state_dict(), description) == sha256


def test_weights_in_half_precision_are_half_as_large_and_load_in_fp32(saved):
    folder, network, description, _ = saved
    sha256 = weights.save(folder.parent / "half", network.state_dict(), description, torch.float16)
    sizes = [(place / "model.safetensors").stat().st_size for place in (folder, folder.parent / "half")]
    assert sizes[1] < 0.6 * sizes[0]
    model = weights.load(folder.parent / "half")
    assert model.sha256 == sha256
    for name, value in model.network.state_dict().items():
        assert torch.equal(value, network.state_dict()[name].half().float())
