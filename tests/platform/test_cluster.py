import inspect
import os
import socket
import subprocess
import sys
from contextlib import ExitStack, suppress

import pytest
import ray

from raylift.platform import cluster

NEIGHBOR = "import ray; ray.init('local', num_cpus=1, include_dashboard=False); print('up', flush=True); input()"


@pytest.fixture
def neighbor():
    """Another Ray cluster on the same machine."""
    process = subprocess.Popen([sys.executable, "-c", NEIGHBOR], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline().strip() == b"up"
        yield
    finally:
        process.communicate(b"\n", timeout=60)


@ray.remote(num_cpus=0)
class ClusterState:
    def actors(self) -> list[str]:
        from ray.util.state import list_actors

        return [actor.class_name for actor in list_actors(filters=[("state", "=", "ALIVE")])]


def test_workers_find_their_own_cluster_next_to_another(ray_cluster, neighbor):
    """Ray detects a stopped trial through this query and frees its resources."""
    actor = ClusterState.remote()
    assert "ClusterState" in ray.get(actor.actors.remote(), timeout=60)
    ray.kill(actor)


def test_ray_listens_outside_the_range_of_the_ports_of_clients(ray_cluster):
    first, last = map(int, cluster.CLIENT_PORTS.read_text().split())
    port = int(ray.get_runtime_context().gcs_address.rpartition(":")[2])
    assert cluster.FIRST_PORT <= port < 65_536
    assert not first <= port <= last


def test_a_port_is_neither_of_clients_nor_in_use(tmp_path, monkeypatch):
    (tmp_path / "ports").write_text("20002\t65533\n")
    monkeypatch.setattr(cluster, "CLIENT_PORTS", tmp_path / "ports")
    taken = []
    with ExitStack() as sockets:
        with suppress(cluster.RayStartError):
            while True:
                taken.append(cluster.free_port())
                sockets.enter_context(socket.create_server(("", taken[-1])))
        with pytest.raises(cluster.RayStartError, match="between 20002 and 65533, the ports of clients, is in use"):
            cluster.free_port()
    assert 0 < len(taken) == len(set(taken))
    assert set(taken) <= {20_000, 20_001, 65_534, 65_535}
    for missing, content in ((False, "1024\t65535\n"), (True, "")):
        (tmp_path / "ports").write_text(content)
        monkeypatch.setattr(cluster, "CLIENT_PORTS", tmp_path / ("none" if missing else "ports"))
        socket.create_server(("", cluster.free_port())).close()


@pytest.mark.parametrize("failures", [1, 2, 0])
def test_ray_is_started_again_once_if_it_does_not_start_in_time(failures, monkeypatch, capsys):
    message = "The current node timed out during startup. This could happen because"
    assert message.split(".")[0] in inspect.getsource(ray._private.node)
    outcomes = [RuntimeError(message)] * failures + [None if failures else RuntimeError("another error")]
    addresses = []

    def start(*_, runtime_env, **__):
        addresses.append(runtime_env["env_vars"]["RAY_ADDRESS"])
        if error := outcomes.pop(0):
            raise error

    monkeypatch.setattr(ray, "init", start)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if failures == 1:
        cluster.connect()
    else:
        with pytest.raises(RuntimeError, match="within 30 s, 2 times: this machine" if failures else "another error"):
            cluster.connect()
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["raylift: Ray did not start within 30 s, retrying (2 of 2)"] * bool(failures)
    assert len(set(addresses)) == len(addresses) == (2 if failures else 1)


@pytest.fixture
def long_temporary_folder(tmp_path):
    folder = tmp_path / "a-folder-of-a-job-scheduler" / ("x" * 60)
    folder.mkdir(parents=True)
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY")} | {"TMPDIR": str(folder)}


def test_a_run_trains_where_the_temporary_folder_is_too_long_for_rays_sockets(
    long_temporary_folder, archive32, tmp_path
):
    words = ["train", "x2ct-gan-tiny", "--data.archive", str(archive32), "--output", str(tmp_path / "run")]
    words += ["--train.steps", "1", "--train.validate-every", "1", "--cluster.workers", "1"]
    trained = subprocess.run(
        [sys.executable, "-m", "raylift", *words], env=long_temporary_folder, capture_output=True, text=True
    )
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert (tmp_path / "run/checkpoints/step-00000001/checkpoint.json").is_file()


def test_without_a_short_folder_nothing_is_written_and_the_remedy_is_named(long_temporary_folder, archive32, tmp_path):
    (tmp_path / "file").touch()
    code = "import sys; from pathlib import Path; from raylift.platform import cli, cluster; "
    code += f"cluster.SHORT_ROOT = Path({str(tmp_path / 'file')!r}); sys.exit(cli.main(sys.argv[1:]))"
    for words in (["train", "x2ct-gan-tiny"], ["tune", "x2ct_gan", "--preset", "x2ct-gan-tiny"]):
        arguments = [*words, "--data.archive", str(archive32), "--output", str(tmp_path / "run")]
        refused = subprocess.run(
            [sys.executable, "-c", code, *arguments], env=long_temporary_folder, capture_output=True, text=True
        )
        assert refused.returncode == 2, refused.stderr
        assert "set RAY_TMPDIR to a folder whose path has at most 39 bytes" in refused.stderr
        assert refused.stderr.count("\n") == 1
        assert not (tmp_path / "run").exists()
