"""`ray job submit` from a checkout that no worker has installed, to a cluster with token authentication."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import psutil
import pytest
import yaml
from s3_server import free_ports

REPOSITORY = Path(__file__).resolve().parents[2]
UPLOAD_LIMIT = 512 * 2**20
RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture
def checkout(tmp_path):
    """The files that git tracks, with a version that differs from the installed one."""
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        check=True,
    ).stdout
    folder = tmp_path / "checkout"
    for name in filter(None, files.decode().split("\0")):
        source, target = REPOSITORY / name, folder / name
        if source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target, follow_symlinks=False)
    version = folder / "raylift/__init__.py"
    version.write_text(version.read_text().replace('__version__ = "', '__version__ = "99.'))
    return folder


@pytest.fixture
def head(tmp_path):
    """A Ray head with a token; its dashboard's address and the environment of a client."""
    home = tmp_path / "home"
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(home), "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
    # The nodes of a cluster have the environment with Ray first; here the tests' own may not be activated.
    environment["PATH"] = os.pathsep.join([str(Path(RAY).parent), environment.get("PATH", os.defpath)])
    subprocess.run([RAY, "get-auth-token", "--generate"], env=environment, check=True, capture_output=True)
    (home / ".ray/auth_token").chmod(0o600)
    gcs, dashboard, agent, client = free_ports(4)
    # Sockets below the folder must stay under 108 characters.
    temporary = Path("/dev/shm" if Path("/dev/shm").is_dir() else tmp_path) / f"raylift-{os.getpid()}"
    command = [RAY, "start", "--head", "--block", "--num-cpus=2", f"--port={gcs}", f"--dashboard-port={dashboard}"]
    command += [
        f"--dashboard-agent-listen-port={agent}",
        f"--ray-client-server-port={client}",
        f"--temp-dir={temporary}",
    ]
    command += ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-host=127.0.0.1"]
    log = (tmp_path / "head.log").open("wb")
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        wait_until_up(address, (home / ".ray/auth_token").read_text(), process, tmp_path / "head.log")
        yield address, environment
    finally:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for member in family:
            if member.is_running():
                member.kill()
        process.wait()
        log.close()
        shutil.rmtree(temporary, ignore_errors=True)


def wait_until_up(address: str, token: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            with urlopen(Request(f"{address}/api/version", headers={"Authorization": f"Bearer {token}"}), timeout=5):
                return
        except URLError:
            time.sleep(0.5)
    raise AssertionError(f"Ray did not come up: {log.read_text()}")


def test_a_job_trains_from_an_uploaded_checkout_with_a_token_and_not_without(head, checkout, archive32, tmp_path):
    address, environment = head
    with pytest.raises(HTTPError, match="401"):
        urlopen(f"{address}/api/version", timeout=10)
    run = tmp_path / "run"
    words = ["train", "x2ct-gan-tiny", "--data.archive", str(archive32), "--output", str(run)]
    words += ["--train.steps", "4", "--train.validate-every", "2", "--cluster.workers", "2"]
    command = [
        RAY,
        "job",
        "submit",
        "--address",
        address,
        "--working-dir",
        ".",
        "--",
        "python",
        "-m",
        "raylift",
        *words,
    ]
    job = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=400)
    assert job.returncode == 0, job.stdout + job.stderr
    assert "best checkpoint" in job.stdout
    # Rank 0 wrote this: the code it ran is the uploaded one.
    description = json.loads((run / "checkpoints/step-00000004/model/model.json").read_text())
    assert description["model"]["provenance"]["versions"]["raylift"].startswith("99.")


def test_what_a_job_uploads_from_a_checkout_in_use_is_far_below_rays_limit(tmp_path):
    from ray._private.runtime_env.packaging import create_package

    package = tmp_path / "package.zip"
    create_package(str(REPOSITORY), package, include_gitignore=True)
    with zipfile.ZipFile(package) as opened:
        names = opened.namelist()
    assert "platform/training/loop.py" in names
    assert "tune_spaces/x2ct_gan.yaml" in names
    assert not [name for name in names if name.startswith((".git/", ".venv/", ".cache/", "tests/", "docs/"))]
    assert package.stat().st_size < UPLOAD_LIMIT / 100


def test_the_cluster_file_is_what_ray_up_accepts():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((REPOSITORY / "ray_cluster.yaml").read_text())
    prepared = prepare_config(config)
    validate_config(prepared)
    nodes = prepared["available_node_types"]
    assert nodes[prepared["head_node_type"]]["resources"]["CPU"] == 0
    assert all("IamInstanceProfile" in node["node_config"] for node in nodes.values())
    assert any(path.endswith("auth_token") for path in prepared["file_mounts"])


def test_nodes_of_the_cluster_file_install_every_dependency():
    dependencies = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[\[<>=]", dependency)[0] for dependency in dependencies}
    commands = yaml.safe_load((REPOSITORY / "ray_cluster.yaml").read_text())["setup_commands"]
    (install,) = [command for command in commands if "pip install" in command]
    assert names <= set(re.findall(r"[\w-]+", install))


def test_the_cluster_file_with_a_mistake_is_refused_by_the_same_checker():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((REPOSITORY / "ray_cluster.yaml").read_text())
    config["head_node_type"] = "none"
    with pytest.raises(Exception, match=r"head_node_type|none"):
        validate_config(prepare_config(config))
