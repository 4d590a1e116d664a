"""`raylift runs` lists runs and searches with their state, owner, best metric, size and the next command."""

import time
import uuid

import pytest

from raylift.datasets import hashed_json
from raylift.datasets.archive.store import Folder
from raylift.datasets.geometry import Grid, chest
from raylift.datasets.intensity import Window
from raylift.datasets.serialization import to_plain
from raylift.models.weights import Description
from raylift.platform import cli
from raylift.platform.training import runs
from raylift.platform.training.checkpoint import Checkpoints, Tensors, TrainingState
from raylift.platform.tuning import search
from raylift.platform.tuning.search import Search, Space
from raylift.platform.tuning.trials import TABLE_FILE, Trial


class OverviewSuite:
    @pytest.fixture
    def url(self):
        raise NotImplementedError

    def checkpoint(self, url, run, step, metrics):
        state = TrainingState(step, 4 * step, metrics)
        description = Description(run.system, Grid(32, 10.0), chest(Grid(32, 10.0)), Window())
        Checkpoints(url).save(state, Tensors({"generator": {}}, {}), description)

    def hold(self, url, age_s):
        owner = {"host": "node-7", "pid": 4242, "started": 0.0}
        Folder(url).write(".lease-000001.json", hashed_json.encode({"process": owner, "time": time.time() - age_s}))

    def test_each_run_and_search_is_listed_with_its_state_and_the_next_command(self, url, tiny, capsys):
        for name in ("damaged", "finished", "lost", "running", "stopped"):
            runs.create(tiny, f"{url}/{name}")
        self.checkpoint(f"{url}/finished", tiny, 4, {"val_psnr_db": 21.25})
        self.checkpoint(f"{url}/finished", tiny, 8, {"val_psnr_db": 20.0})
        self.checkpoint(f"{url}/stopped", tiny, 3, {})
        self.hold(f"{url}/lost", 100)
        self.hold(f"{url}/running", 5)
        Folder(f"{url}/damaged").write("run.json", b"{}")
        for name in ("search-ended", "search-stopped"):
            search.create(Search(tiny, Space({"optimizer.lr": {"choice": [1e-4]}})), f"{url}/{name}")
        model = f"{url}/search-ended/trials/abc/checkpoints/step-00000008"
        table = [Trial("abc", {"optimizer.lr": 1e-4}, 22.5, 8, model)]
        Folder(f"{url}/search-ended").write(TABLE_FILE, hashed_json.encode({"trials": to_plain(table)}))
        Folder(f"{url}/no-run").write("notes.txt", b"mine")
        size = Folder(f"{url}/stopped").size()
        assert size > len(Folder(f"{url}/stopped").read("run.json"))

        assert cli.main(["runs", url]) == 0
        lines = capsys.readouterr().out.splitlines()
        archive = tiny.data.archive
        expected = [
            ("damaged  damaged: ", ""),
            ("finished  finished  8 of 8 steps  21.25 dB at step 4", f"evaluate {url}/finished --archive {archive}"),
            ("lost  lost: process 4242 on node-7, whose last heartbeat is 10", f"train --resume {url}/lost"),
            ("running  running: process 4242 on node-7, whose last heartbeat is ", ""),
            ("search-ended  finished  1 trials  22.50 dB of trial abc", f"evaluate {model} --archive"),
            ("search-stopped  stopped  0 of 8 trials begun", f"tune --resume {url}/search-stopped"),
            (f"stopped  stopped  3 of 8 steps  {size / 2**20:.1f} MiB", f"train --resume {url}/stopped"),
        ]
        for start, command in expected:
            assert lines.pop(0).startswith(f"{url}/{start}")
            if command:
                assert lines.pop(0).startswith(f"  raylift {command}")
        assert lines == []

        assert cli.main(["runs", f"{url}/finished"]) == 0
        assert len(capsys.readouterr().out.splitlines()) == 2
        assert cli.main(["runs", f"{url}/no-run"]) == 2
        assert "has no run and no search" in capsys.readouterr().err


class TestFolder(OverviewSuite):
    @pytest.fixture
    def url(self, tmp_path):
        return str(tmp_path)


class TestBucket(OverviewSuite):
    @pytest.fixture
    def url(self, s3_bucket_url):
        return f"{s3_bucket_url}/{uuid.uuid4().hex}"
