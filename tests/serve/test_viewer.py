"""The interactive viewer in a browser with WebGL 2, and where it fails."""

import gzip
import hashlib
import io
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from fastapi import FastAPI
from fastapi.testclient import TestClient
from page_visit import Visit
from PIL import Image
from playwright.sync_api import BrowserContext, Locator, Route, expect

from raylift.serve.api.access import AccessControl
from raylift.serve.api.credentials import Credentials
from raylift.serve.api.request_limits import KnownRoutes
from raylift.serve.page import viewer

READING = re.compile(r"(-?\d+) HU(?:, standard deviation (\d+) HU)? at ([RL]) (\d+), ([AP]) (\d+), ([SI]) (\d+) mm")


class Viewed(Visit):
    """A page whose viewer shows the volume of the synthetic example."""

    def __init__(self, browser: BrowserContext, url: str, query: str = "") -> None:
        super().__init__(browser, url, query)
        self.at("example").click()
        expect(self.at("lateral-preview").locator("img")).to_be_visible()
        self.at("reconstruct").click()
        self.viewer = self.page.locator("raylift-viewer")
        self.canvas = self.viewer.locator("canvas")
        expect(self.viewer).to_have_attribute("data-state", "ready")
        expect(self.at("reconstruct")).to_have_text("Reconstruct")

    def control(self, name: str, value: str | None = None) -> Locator:
        return self.viewer.locator(f"[name={name}]" + (f"[value='{value}']" if value else ""))

    def text(self, name: str) -> str:
        return self.viewer.locator(f"output[name={name}]").text_content() or ""

    def reading(self, name: str) -> tuple[int, int | None, np.ndarray]:
        """HU and standard deviation that are shown, and their position in mm (LPS)."""
        match = READING.search(self.text(name))
        assert match, self.text(name)
        hu, std, *position = match.groups()
        signs = {"R": -1, "L": 1, "A": -1, "P": 1, "S": 1, "I": -1}
        mm = [signs[letter] * int(length) for letter, length in zip(position[::2], position[1::2], strict=True)]
        return int(hu), int(std) if std else None, np.array(mm)

    def pixels(self) -> np.ndarray:
        """The canvas as gray values."""
        return np.asarray(Image.open(io.BytesIO(self.canvas.screenshot())).convert("L"), dtype=np.int32)

    def volume(self, path: Path, button: str = "download") -> sitk.Image:
        """The file that the page offers."""
        with self.page.expect_download() as download:
            self.at(button).click()
        download.value.save_as(path)
        return sitk.ReadImage(str(path))

    def point(self, x: float, y: float) -> tuple[float, float]:
        """Fractions of the canvas as a point of the window."""
        self.canvas.scroll_into_view_if_needed()
        box = self.canvas.bounding_box()
        assert box is not None
        return box["x"] + x * box["width"], box["y"] + y * box["height"]

    def drag(self, start: tuple[float, float], across: tuple[float, float]) -> None:
        mouse = self.page.mouse
        mouse.move(*start)
        mouse.down()
        mouse.move(start[0] + across[0], start[1] + across[1], steps=4)
        mouse.up()


@pytest.fixture(scope="module")
def pages() -> list[Viewed]:
    """The page that tests share, if it is open."""
    return []


@pytest.fixture
def viewed(pages: list[Viewed], webgl_browser: BrowserContext, url: str) -> Iterator[Viewed]:
    """A page whose viewer has its initial state."""
    if not pages:
        pages.append(Viewed(webgl_browser, url))
    viewed = pages[0]
    viewed.control("reset").click()
    viewed.control("layout").select_option("multiplanar")
    viewed.control("drag", "crosshair").check()
    yield viewed
    viewed.check()


def values_within(image: sitk.Image, mm: np.ndarray, tolerance_mm: float = 1.0) -> set[int]:
    """Values of the voxels at a position that is given in whole mm."""
    size, found = image.GetSize(), set()
    for offset in itertools.product((-tolerance_mm, 0.0, tolerance_mm), repeat=3):
        index = image.TransformPhysicalPointToIndex((mm + offset).tolist())
        found.add(int(image[tuple(min(max(i, 0), n - 1) for i, n in zip(index, size, strict=True))]))
    return found


def test_slices_and_3d_are_shown_and_the_readings_are_the_values_of_the_file(viewed: Viewed, tmp_path: Path) -> None:
    expect(viewed.at("slices")).to_be_hidden()
    expect(viewed.viewer.locator(".unavailable")).to_be_hidden()
    image = viewed.volume(tmp_path / "reconstruction.nii.gz")
    hu = sitk.GetArrayFromImage(image)
    side = hu.shape[0]
    for axial, coronal, sagittal in ((16, 16, 16), (4, 20, 9), (31, 0, 30)):
        for plane, index in (("axial", axial), ("coronal", coronal), ("sagittal", sagittal)):
            viewed.control(plane).fill(str(index))
        shown, _, mm = viewed.reading("crosshair")
        voxel = sagittal, coronal, side - 1 - axial
        assert shown == hu[voxel[::-1]]
        np.testing.assert_allclose(mm, image.TransformIndexToPhysicalPoint(voxel), atol=0.51)

    for layout in ("multiplanar", "axial", "coronal", "sagittal", "render"):
        viewed.control("layout").select_option(layout)
        expect(viewed.viewer.locator(".scale-bar")).to_be_visible(visible=layout != "render")
        assert viewed.pixels().std() > 10, layout
        if layout == "render":
            continue
        for x, y in ((0.42, 0.2), (0.35, 0.4), (0.45, 0.3)):
            viewed.page.mouse.move(*viewed.point(x, y))
            shown, _, mm = viewed.reading("pointer")
            assert shown in values_within(image, mm)
    viewed.control("layout").select_option("axial")
    viewed.page.mouse.move(*viewed.point(0.4, 0.4))
    before = viewed.control("axial").input_value()
    viewed.page.mouse.wheel(0, 100)
    expect(viewed.control("axial")).not_to_have_value(before)


def test_presets_and_dragging_change_the_window(viewed: Viewed) -> None:
    viewed.control("layout").select_option("axial")
    wide = viewed.pixels()
    viewed.viewer.get_by_label("soft tissue").check()
    assert viewed.text("window") == "Window 400 / 40 HU"
    narrow = viewed.pixels()
    # The network is not trained: few of its values are within 400 HU.
    saturated = [((image < 5) | (image > 250)).mean() for image in (wide, narrow)]
    assert saturated[1] > saturated[0] + 0.1

    viewed.control("drag", "window").check()
    viewed.drag(viewed.point(0.5, 0.4), (20, 0))
    width, level = map(int, re.findall(r"-?\d+", viewed.text("window")))
    assert width > 400
    assert level == 40
    viewed.drag(viewed.point(0.5, 0.4), (0, 30))
    assert int(re.findall(r"-?\d+", viewed.text("window"))[1]) < level
    expect(viewed.viewer.locator("[name=preset]:checked")).to_have_count(0)
    viewed.control("reset").click()
    assert viewed.text("window") == "Window 2500 / 226 HU"
    expect(viewed.viewer.get_by_label("wide")).to_be_checked()


def test_a_distance_agrees_with_the_scale_bar_and_the_positions(viewed: Viewed) -> None:
    viewed.control("layout").select_option("coronal")
    viewed.control("drag", "distance").check()
    start, bar = viewed.point(0.4, 0.5), viewed.viewer.locator(".scale-bar").bounding_box()
    assert bar is not None
    viewed.page.mouse.move(*start)
    left = viewed.reading("pointer")[2]
    viewed.drag(start, (bar["width"], 0))
    right = viewed.reading("pointer")[2]
    assert np.abs(right - left - [100, 0, 0]).max() <= 2
    measured = re.fullmatch(r"Distance ([\d.]+) mm", viewed.text("distance"))
    assert measured
    assert float(measured[1]) == pytest.approx(100, abs=2)
    viewed.control("reset").click()
    assert viewed.text("distance") == ""


def test_the_keyboard_reaches_the_controls_and_moves_slices(viewed: Viewed) -> None:
    canvas = viewed.page.get_by_role("application", name="Reconstructed volume: axial, coronal and sagittal slices")
    viewed.control("full-screen").focus()
    viewed.page.keyboard.press("Tab")
    expect(canvas).to_be_focused()
    assert canvas.evaluate("canvas => getComputedStyle(canvas).outlineWidth") == "3px"
    before = viewed.reading("crosshair")[2]
    steps = {
        "ArrowUp": (0, 0, 10),
        "ArrowDown": (0, 0, -10),
        "ArrowLeft": (-10, 0, 0),
        "ArrowRight": (10, 0, 0),
        "PageUp": (0, -10, 0),
        "Shift+PageDown": (0, 50, 0),
    }
    for key, step in steps.items():
        viewed.page.keyboard.press(key)
        after = viewed.reading("crosshair")[2]
        np.testing.assert_array_equal(after - before, step)
        before = after
    viewed.control("axial").fill("1")
    canvas.focus()
    for _ in range(2):
        viewed.page.keyboard.press("ArrowUp")
    expect(viewed.control("axial")).to_have_value("0")
    for control in viewed.viewer.locator("input, select, button").all():
        assert control.evaluate("one => one.labels?.length || one.textContent"), "a control without a name"
    viewed.control("full-screen").click()
    viewed.page.wait_for_function("document.fullscreenElement?.localName === 'raylift-viewer'")
    viewed.control("full-screen").press("Enter")
    viewed.page.wait_for_function("document.fullscreenElement === null")


def test_on_a_phone_the_viewer_is_not_wider_than_the_screen(viewed: Viewed) -> None:
    viewed.page.set_viewport_size({"width": 390, "height": 844})
    try:
        assert viewed.page.evaluate("document.documentElement.scrollWidth") == 390
        box = viewed.canvas.bounding_box()
        assert box is not None
        assert 300 < box["width"] <= 390
        assert box["height"] <= 390
    finally:
        viewed.page.set_viewport_size({"width": 1280, "height": 900})


def reconstruct_flipped(viewed: Viewed) -> None:
    viewed.at("frontal-flip").locator("input").click()
    expect(viewed.at("results")).to_be_hidden()
    viewed.at("reconstruct").click()
    expect(viewed.at("reconstruct")).to_have_text("Reconstruct")


def only_volume_is(viewed: Viewed, image: sitk.Image, other: sitk.Image) -> None:
    """Fail unless the viewer has one volume, and its value is the file's where another file differs most."""
    expect(viewed.viewer).to_have_attribute("data-state", "ready")
    hu, different = sitk.GetArrayFromImage(image), sitk.GetArrayFromImage(other)
    z, y, x = np.unravel_index(np.abs(hu.astype(int) - different).argmax(), hu.shape)
    assert hu[z, y, x] != different[z, y, x]
    for plane, index in (("axial", hu.shape[0] - 1 - z), ("coronal", y), ("sagittal", x)):
        viewed.control(plane).fill(str(index))
    assert viewed.reading("crosshair")[:2] == (hu[z, y, x], None)
    assert viewed.viewer.evaluate("one => one.nv.volumes.length") == 1


def test_a_new_volume_replaces_the_former_one(viewed: Viewed, tmp_path: Path) -> None:
    former = viewed.volume(tmp_path / "former.nii.gz")
    before, requests = viewed.pixels(), len(viewed.requests)
    reconstruct_flipped(viewed)
    expect(viewed.viewer).to_have_attribute("data-state", "ready")
    assert len([one for one in viewed.requests[requests:] if one.endswith(".nii.gz")]) == 1
    assert np.abs(viewed.pixels() - before).mean() > 1
    only_volume_is(viewed, viewed.volume(tmp_path / "new.nii.gz"), former)


def test_a_volume_that_arrives_during_the_load_of_another_replaces_it(viewed: Viewed, tmp_path: Path) -> None:
    last = viewed.volume(tmp_path / "last.nii.gz")
    url = next(one for one in reversed(viewed.requests) if one.endswith(".nii.gz"))
    delayed: list[Route] = []

    def delay(route: Route) -> None:
        delayed.append(route)

    viewed.page.route("**/*.nii.gz", delay, times=1)
    with viewed.page.expect_request("**/*.nii.gz"):
        reconstruct_flipped(viewed)
    viewed.page.evaluate("url => rayliftShow({ url })", url)
    viewed.page.wait_for_timeout(1000)
    expect(viewed.viewer).to_have_attribute("data-state", "loading")
    assert viewed.text("crosshair") == ""
    (route,) = delayed
    assert route.request.url != url
    route.continue_()
    only_volume_is(viewed, last, viewed.volume(tmp_path / "delayed.nii.gz"))


def test_a_viewer_that_is_removed_while_it_opens_frees_its_context(viewed: Viewed) -> None:
    url = next(one for one in reversed(viewed.requests) if one.endswith(".nii.gz"))
    assert viewed.viewer.evaluate(
        """async (viewer, url) => {
            const copy = viewer.cloneNode(true);
            document.body.append(copy);
            rayliftShow({ url });
            while (!copy.niivue) await null;
            copy.remove();
            await copy.loading;
            rayliftShow({ url });
            return !copy.nv && copy.canvas.getContext("webgl2").isContextLost();
        }""",
        url,
    )
    expect(viewed.viewer).to_have_attribute("data-state", "ready")


def test_a_lost_context_of_the_graphics_processor_leaves_the_slices(viewed: Viewed) -> None:
    viewed.canvas.evaluate("canvas => canvas.getContext('webgl2').getExtension('WEBGL_lose_context').loseContext()")
    expect(viewed.at("axial-slice").locator("img")).to_be_visible()


@pytest.mark.parametrize("missing", ["**/niivue.umd.js", "**/*.nii.gz"])
def test_where_the_viewer_fails_the_slices_are_shown(webgl_browser: BrowserContext, url: str, missing: str) -> None:
    webgl_browser.route(missing, lambda route: route.abort())
    visit = Visit(webgl_browser, url)
    visit.at("example").click()
    expect(visit.at("lateral-preview").locator("img")).to_be_visible()
    visit.reconstruct()
    expect(visit.page.locator("raylift-viewer canvas")).to_be_hidden()
    webgl_browser.unroute(missing)


def test_the_standard_deviation_is_an_overlay_with_its_values(
    webgl_browser: BrowserContext, diffusion_url: str, tmp_path: Path
) -> None:
    viewed = Viewed(webgl_browser, diffusion_url)
    std = sitk.GetArrayFromImage(viewed.volume(tmp_path / "std.nii.gz", "download-std"))
    for plane, index in (("axial", 5), ("coronal", 20), ("sagittal", 11)):
        viewed.control(plane).fill(str(index))
    assert viewed.reading("crosshair")[1] == std[std.shape[0] - 1 - 5, 20, 11]

    def colors() -> int:
        image = Image.open(io.BytesIO(viewed.canvas.screenshot())).convert("RGB")
        return int((np.ptp(np.asarray(image, dtype=np.int32), axis=2) > 50).sum())

    viewed.control("layout").select_option("axial")
    gray = colors()
    viewed.viewer.get_by_label("Standard deviation").check()
    assert colors() > gray + 10_000
    number = viewed.at("samples").locator("input[type=number]")
    number.fill("1")
    number.press("Enter")
    expect(viewed.at("results")).to_be_hidden()
    viewed.at("reconstruct").click()
    expect(viewed.viewer).to_have_attribute("data-state", "ready")
    expect(viewed.viewer.get_by_label("Standard deviation")).to_be_hidden()
    assert viewed.reading("crosshair")[1] is None
    viewed.check()


def test_the_files_of_the_viewer_need_credentials_and_are_kept_by_the_browser() -> None:
    app = FastAPI()
    viewer.add_routes(app)
    app.add_middleware(KnownRoutes)
    token = "0123456789abcdef" * 2
    required = Credentials(tokens=frozenset([hashlib.sha256(token.encode()).digest()]))
    app.add_middleware(AccessControl, hosts={"127.0.0.1"}, proxied_hosts=(), credentials=required)
    http = TestClient(app, base_url="http://127.0.0.1:8000")
    folder = f"/viewer/{viewer.DIGEST}"
    assert http.get(f"{folder}/viewer.js").status_code == 401
    http.headers["authorization"] = f"Bearer {token}"
    for name, kind in (("viewer.js", "javascript"), ("niivue.umd.js", "javascript"), ("viewer.css", "css")):
        response = http.get(f"{folder}/{name}")
        assert response.status_code == 200
        assert kind in response.headers["content-type"]
        assert "immutable" in response.headers["cache-control"]
        assert response.content == gzip.decompress(viewer.FILES[name])
    for path in (f"{folder}/viewer.py", f"{folder}/..%2fviewer.py", "/viewer/0/viewer.js"):
        assert http.get(path).status_code == 404
    assert "https:" not in (viewer.FOLDER / "viewer.js").read_text()


def test_niivue_is_the_published_file_that_its_licenses_name() -> None:
    digest = hashlib.sha256(gzip.decompress(viewer.FILES["niivue.umd.js"])).hexdigest()
    assert digest in (viewer.FOLDER / "LICENSES.txt").read_text()
