import subprocess
import sys

import pytest
import ray

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


def test_workers_find_their_own_cluster_beside_another(ray_cluster, neighbor):
    """Ray detects a stopped trial through this query and frees its resources."""
    actor = ClusterState.remote()
    assert "ClusterState" in ray.get(actor.actors.remote(), timeout=60)
    ray.kill(actor)
