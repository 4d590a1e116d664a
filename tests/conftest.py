import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from playwright.sync_api import BrowserContext, sync_playwright
from s3_server import S3Server

pytest_plugins = ["training_fixtures"]

REPOSITORY = Path(__file__).resolve().parent.parent
REQUIRE_ALL = os.environ.get("RAYLIFT_REQUIRE_ALL") == "1"
ABSENT_ANYWHERE = ("no real data", "no GPU")
"""How a reason to skip begins that holds even where nothing else may be missing (RAYLIFT_REQUIRE_ALL=1)."""
BUCKET = "raylift-tests"
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

hypothesis.settings.register_profile("raylift", deadline=None, database=None)
hypothesis.settings.load_profile("raylift")


def pytest_configure() -> None:
    for folder in ("datasets", "models", "platform", "tune_spaces", "serve"):
        stray = REPOSITORY / folder / "__init__.py"
        if stray.exists():
            pytest.exit(
                f"{stray} must not exist: as a package of its own {folder}/ would shadow the module of that name "
                "and numpy, torch or Ray would stall or break: remove it",
                returncode=pytest.ExitCode.USAGE_ERROR,
            )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    """Where everything is required, a test that skips because something is missing fails."""
    report = yield
    if REQUIRE_ALL and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not reason.removeprefix("Skipped: ").startswith(ABSENT_ANYWHERE):
            report.outcome, report.longrepr = "failed", f"RAYLIFT_REQUIRE_ALL=1, but: {reason}"
    return report


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    """Tests share two cores, and results do not depend on how many there are."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real CT scans and radiographs, which are never in the repository."""
    folder = Path(os.environ.get("RAYLIFT_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "MANIFEST.csv").exists():
        pytest.skip(f"no real data in {folder}: set RAYLIFT_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def plastimatch() -> str:
    """The command of an independent projector."""
    command = shutil.which("plastimatch", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if command is None:
        pytest.skip("no plastimatch: pip install -e .[dev]")
    return command


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server with one bucket; the environment names it to every client of the session."""
    with S3Server(tmp_path_factory.mktemp("s3")) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        server.make_bucket(BUCKET)
        yield server


@pytest.fixture(scope="session")
def s3_bucket_url(s3_server: S3Server) -> str:
    """An empty bucket on a real S3 server."""
    return f"s3://{BUCKET}"


def chromium(profile: Path, *flags: str) -> Iterator[BrowserContext]:
    """Chromium with an empty profile."""
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("no Chromium: apt install chromium")
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            profile,
            executable_path=executable,
            args=[*CHROMIUM_FLAGS, *flags],
            viewport={"width": 1280, "height": 900},
            accept_downloads=True,
        )
        yield context
        context.close()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[BrowserContext]:
    """Chromium without WebGL."""
    yield from chromium(tmp_path / "profile", "--disable-gpu", "--disable-3d-apis")


@pytest.fixture(scope="module")
def webgl_browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrowserContext]:
    """Chromium with WebGL 2 in software, for the tests of a module without another browser."""
    flags = "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"
    yield from chromium(tmp_path_factory.mktemp("profile"), *flags)
