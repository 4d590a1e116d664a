"""Checkpoints are published atomically, on a folder and on a real object store."""

import json

import pytest
import torch

from raylift.datasets.archive.store import Folder, join
from raylift.datasets.geometry import Grid, chest
from raylift.datasets.intensity import Window
from raylift.models.weights import Description
from raylift.platform.presets import PRESETS
from raylift.platform.training.checkpoint import (
    INDEX_FILE,
    CheckpointError,
    Checkpoints,
    Tensors,
    TrainingState,
    load_adam,
    load_network,
    load_state,
    local_copy,
)

GRID = Grid(32, 10.0)


class CheckpointSuite:
    """Tests for every storage of a run."""

    @pytest.fixture
    def url(self, tmp_path):
        raise NotImplementedError

    def save(self, url, step, psnr=20.0, metric="val_psnr_db"):
        torch.manual_seed(step)
        system = PRESETS["x2ct-gan-tiny"].system
        networks = {
            name: dict(net.state_dict()) for name, net in system.objective(Grid(32), chest(Grid(32))).networks().items()
        }
        adam = {name: {"a/exp_avg": torch.rand(3), "step": torch.tensor(float(step))} for name in networks}
        state = TrainingState(
            step,
            4 * step,
            {} if psnr is None else {metric: psnr},
            [{"step": 1.0, "generator/loss": 2.0}],
            {"k": 1},
            "abc",
        )
        where = Checkpoints(url).save(state, Tensors(networks, adam), Description(system, GRID, chest(GRID), Window()))
        return where, state, networks, adam

    def test_a_saved_checkpoint_is_loaded_unchanged(self, url):
        where, state, networks, adam = self.save(url, 7)
        with local_copy(where) as local:
            assert load_state(local) == state
            for index, name in enumerate(networks):
                back = load_network(local, name, first=index == 0)
                assert back.keys() == networks[name].keys()
                assert all(torch.equal(back[key], networks[name][key]) for key in back)
                assert torch.equal(load_adam(local, name)["a/exp_avg"], adam[name]["a/exp_avg"])

    def test_a_checkpoint_has_the_files_of_its_networks_and_state_and_no_other(self, url):
        where, _, networks, _ = self.save(url, 7)
        _, *later = networks
        folders = {"model", "networks", "adam"}
        assert set(Folder(where).names()) == {*folders, "state.json", INDEX_FILE}
        assert set(Folder(where).read_hashed(INDEX_FILE)["sha256"]) == {
            "state.json",
            *(f"model/{name}" for name in ("model.safetensors", "model.json")),
            *(f"networks/{name}.safetensors" for name in later),
            *(f"adam/{name}.safetensors" for name in networks),
        }

    def test_the_newest_and_the_best_are_found(self, url):
        for step, psnr in ((10, 20.0), (20, 23.0), (30, 21.0)):
            self.save(url, step, psnr)
        checkpoints = Checkpoints(url)
        assert checkpoints.newest() == (join(checkpoints.url, "step-00000030"), [])
        assert checkpoints.best("val_psnr_db")[0].endswith("step-00000020")

    def test_pruning_keeps_the_newest_and_the_best(self, url):
        for step, psnr in ((10, 25.0), (20, 20.0), (30, 21.0), (40, 22.0)):
            self.save(url, step, psnr)
        Checkpoints(url).prune(2)
        assert [summary["step"] for _, summary in Checkpoints(url).published()] == [10, 30, 40]
        assert Folder(join(url, "checkpoints")).names() == [f"step-{step:08d}" for step in (10, 30, 40)]

    def test_pruning_keeps_the_best_among_checkpoints_without_a_validation(self, url):
        for step, psnr in ((10, 25.0), (20, 20.0), (30, None), (40, None)):
            self.save(url, step, psnr, "val_reprojection_psnr_db")
        Checkpoints(url).prune(1)
        assert [summary["step"] for _, summary in Checkpoints(url).published()] == [10, 40]

    def test_pruning_keeps_the_newest_checkpoint_before_a_divergence(self, url):
        for step, psnr in ((10, 25.0), (20, 20.0), (30, 21.0), (40, 22.0)):
            self.save(url, step, psnr)
        checkpoints = Checkpoints(url)
        # The loss of step 30 is of the weights in checkpoint 30.
        assert checkpoints.newest_before(30) == join(checkpoints.url, "step-00000020")
        assert checkpoints.newest_before(10) is None
        checkpoints.prune(1, diverged_at=30)
        assert [summary["step"] for _, summary in checkpoints.published()] == [10, 20, 40]

    def test_a_checkpoint_that_was_not_published_is_none(self, url):
        self.save(url, 10)
        self.save(url, 20)
        # What a run leaves that is interrupted just before it publishes.
        Folder(url).remove("checkpoints/step-00000020/checkpoint.json")
        assert Checkpoints(url).newest()[0].endswith("step-00000010")
        with (
            pytest.raises(CheckpointError, match="is not a published checkpoint"),
            local_copy(join(url, "checkpoints/step-00000020")),
        ):
            pass

    @pytest.mark.parametrize("damage", ["alter", "cut", "remove"])
    @pytest.mark.parametrize("file", ["model/model.safetensors", "adam/discriminator.safetensors", "state.json"])
    def test_a_damaged_file_is_named_and_the_checkpoint_before_is_taken(self, url, file, damage):
        self.save(url, 10)
        self.save(url, 20)
        folder, name = Folder(url), f"checkpoints/step-00000020/{file}"
        content = bytearray(folder.read(name))
        content[len(content) // 2] ^= 1
        if damage == "remove":
            folder.remove(name)
        else:
            folder.write(name, bytes(content[: len(content) // 2] if damage == "cut" else content))
        newest, passed_over = Checkpoints(url).newest()
        assert newest.endswith("step-00000010")
        assert file in passed_over[0]

    def test_the_newest_state_is_read_without_weights_and_moments(self, url, capsys):
        self.save(url, 10)
        _, state, *_ = self.save(url, 20)
        for name in ("model/model.safetensors", "adam/discriminator.safetensors"):
            Folder(url).remove(f"checkpoints/step-00000020/{name}")
        assert Checkpoints(url).newest_state() == state
        assert capsys.readouterr().out == ""

    def test_a_damaged_state_is_named_and_the_state_before_is_read(self, url, capsys):
        _, state, *_ = self.save(url, 10)
        self.save(url, 20)
        Folder(url).write("checkpoints/step-00000020/state.json", b"{}")
        assert Checkpoints(url).newest_state() == state
        (line,) = capsys.readouterr().out.splitlines()
        assert "step-00000020/state.json has SHA-256" in line
        assert line.endswith(f": {Checkpoints(url).url}/step-00000010 is used instead")
        Folder(url).remove("checkpoints/step-00000010/state.json")
        assert Checkpoints(url).newest_state() is None
        assert capsys.readouterr().out.count("no checkpoint is used instead\n") == 2

    def test_the_same_step_can_be_written_again(self, url):
        self.save(url, 10)
        where, *_ = self.save(url, 10)
        with local_copy(where) as local:
            assert load_state(local).step == 10


class TestCheckpointsInAFolder(CheckpointSuite):
    @pytest.fixture
    def url(self, tmp_path):
        return str(tmp_path / "run")

    def test_the_list_of_digests_names_every_other_file(self, url, tmp_path):
        where, *_ = self.save(url, 1)
        listed = json.loads(Folder(where).read("checkpoint.json"))["sha256"].keys()
        there = {p.relative_to(where).as_posix() for p in (tmp_path / "run").rglob("*") if p.is_file()}
        assert there - {"checkpoint.json"} == set(listed)


class TestCheckpointsInABucket(CheckpointSuite):
    @pytest.fixture
    def url(self, s3_bucket_url, request):
        return join(s3_bucket_url, "checkpoints", str(abs(hash(request.node.nodeid))))
