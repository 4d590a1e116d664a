"""The page in a browser without WebGL, where the volume is shown as slices."""

import io
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from page_visit import Visit
from PIL import Image
from playwright.sync_api import BrowserContext, expect


@pytest.fixture
def visit(browser: BrowserContext, url: str) -> Iterator[Visit]:
    visit = Visit(browser, url)
    yield visit
    visit.check()


@pytest.fixture
def files(request: pytest.FixtureRequest, radiographs: dict[str, bytes], tmp_path: Path) -> dict[str, Path]:
    """Real radiographs if available, otherwise synthetic ones."""
    try:
        folder: Path = request.getfixturevalue("real_data")
        return {view: folder / "xray" / f"cc0_normal_{view}.jpg" for view in radiographs}
    except pytest.skip.Exception:
        paths = {view: tmp_path / f"{view}.png" for view in radiographs}
        for view, path in paths.items():
            path.write_bytes(radiographs[view])
        return paths


def test_a_reconstruction_gives_slices_reprojections_and_a_file(
    visit: Visit, files: dict[str, Path], tmp_path: Path
) -> None:
    for view, file in files.items():
        visit.at(f"{view}-file").locator("input[type=file]").set_input_files(file)
        expect(visit.at(f"{view}-preview").locator("img")).to_be_visible()
    expect(visit.at("results")).to_be_hidden()
    visit.reconstruct()
    expect(
        visit.page.get_by_text(
            "The interactive viewer, which needs WebGL 2, is not available, so the volume is shown as slices."
        )
    ).to_be_visible()
    expect(visit.page.locator("raylift-viewer canvas")).to_be_hidden()
    assert not any(request.endswith("niivue.umd.js") for request in visit.requests)

    for plane in ("axial", "coronal", "sagittal"):
        middle = visit.image(f"{plane}-slice")
        assert middle.shape == (448, 448)
        assert middle.std() > 5
        slider = visit.at(f"{plane}-slider").locator("input[type=number]")
        other = visit.changed(f"{plane}-slice", lambda slider=slider: (slider.fill("9"), slider.press("Enter")))
        assert np.abs(other - middle).mean() > 1
    narrow = visit.changed("axial-slice", lambda: visit.choose("window", "soft tissue"))
    assert ((narrow == 0) | (narrow == 255)).mean() > 0.3

    for view in files:
        radiograph, preview = visit.image(f"{view}-comparison .radiograph"), visit.image(f"{view}-preview")
        np.testing.assert_array_equal(radiograph[:150], preview[:150])
        assert visit.image(f"{view}-comparison .reprojection").std() > 5

    for button, suffix in (("", ".nii.gz"), ("-nrrd", ".nrrd"), ("-dicom", ".zip"), ("-png", ".png")):
        with visit.page.expect_download() as download:
            visit.at(f"download{button}").click()
        assert download.value.suggested_filename == f"reconstruction{suffix}"
        download.value.save_as(tmp_path / f"reconstruction{suffix}")
    zipfile.ZipFile(tmp_path / "reconstruction.zip").extractall(tmp_path / "series")
    series = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path / "series"))
    image, *others = (sitk.ReadImage(str(tmp_path / f"reconstruction{suffix}")) for suffix in (".nii.gz", ".nrrd"))
    for one in (image, *others, sitk.ReadImage(series)):
        assert (one.GetSize(), one.GetSpacing()) == ((32, 32, 32), (10.0, 10.0, 10.0))
        np.testing.assert_allclose(one.GetDirection(), np.eye(3).ravel())
        np.testing.assert_array_equal(sitk.GetArrayFromImage(one), sitk.GetArrayFromImage(image))
    with Image.open(tmp_path / "reconstruction.png") as sheet:
        assert sheet.size == (3 * 448, 3 * 448)

    visit.page.screenshot(path=tmp_path / "page.png", full_page=True)


def test_inversion_and_flip_change_the_preview(visit: Visit, files: dict[str, Path]) -> None:
    for view, file in files.items():
        visit.at(f"{view}-file").locator("input[type=file]").set_input_files(file)
        expect(visit.at(f"{view}-preview").locator("img")).to_be_visible()
        plain = visit.image(f"{view}-preview")
        flipped = visit.changed(f"{view}-preview", visit.at(f"{view}-flip").locator("input").check)
        # Letters are at half height; resizing is symmetric to a fraction of a pixel; a thorax is almost symmetric.
        off = np.abs(flipped - plain[:, ::-1])[:150].mean()
        assert off < 2
        assert np.abs(flipped - plain)[:150].mean() > 1 + 1.5 * off
        visit.changed(f"{view}-preview", visit.at(f"{view}-flip").locator("input").uncheck)
        inverted = visit.changed(f"{view}-preview", lambda view=view: visit.choose(f"{view}-invert", "yes"))
        inside = slice(150, 200), slice(180, 268)
        assert np.corrcoef(inverted[inside].ravel(), plain[inside].ravel())[0, 1] < -0.9


def test_a_lateral_that_clearly_faces_right_is_flipped_and_the_user_can_undo_it(
    visit: Visit, files: dict[str, Path], tmp_path: Path
) -> None:
    chosen, control = visit.at("lateral-file").locator("input[type=file]"), visit.at("lateral-flip")
    chosen.set_input_files(files["lateral"])
    expect(visit.at("lateral-preview").locator("img")).to_be_visible()
    expect(control).to_contain_text("The patient must face the left edge. Detected: patient faces left.")
    expect(control.locator("input")).not_to_be_checked()
    plain = visit.image("lateral-preview")
    visit.at("lateral-file").get_by_label("Clear").click()
    expect(visit.at("lateral-preview")).to_be_hidden()
    Image.open(files["lateral"]).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "flipped.png")
    chosen.set_input_files(tmp_path / "flipped.png")
    expect(control).to_contain_text("Detected: patient faces right; the image was flipped.")
    expect(control.locator("input")).to_be_checked()
    expect(visit.at("lateral-preview").locator("img")).to_be_visible()
    assert np.abs(visit.image("lateral-preview") - plain)[:150].mean() < 2
    undone = visit.changed("lateral-preview", control.locator("input").uncheck)
    assert np.abs(undone - plain)[:150].mean() > 4


def test_exchanged_radiographs_have_a_light_and_a_sentence_before_and_with_the_result(
    visit: Visit, files: dict[str, Path]
) -> None:
    other = {"frontal": "lateral", "lateral": "frontal"}
    for view, file in files.items():
        chosen = visit.at(f"{view}-file").locator("input[type=file]")
        chosen.set_input_files(file)
        expect(visit.at(f"{view}-checks").locator(".light.ok")).to_have_text(
            "OK no warning of the checks of the input."
        )
        visit.at(f"{view}-file").get_by_label("Clear").click()
        expect(visit.at(f"{view}-checks")).to_be_hidden()
        chosen.set_input_files(files[other[view]])
        sentence = f"This looks like a {other[view]} chest radiograph: the two may be exchanged. (exchanged -"
        expect(visit.at(f"{view}-checks").locator(".light.stop")).to_contain_text(f"Stop {sentence}")
    visit.reconstruct()
    expect(visit.at("checks").locator(".light")).to_have_count(2)
    expect(visit.at("checks")).to_contain_text("Stop lateral: This looks like a frontal chest radiograph")


@pytest.mark.parametrize("order", [["frontal", "lateral"], ["lateral", "frontal"]])
def test_both_files_of_one_drop_become_their_views_and_can_be_exchanged(
    visit: Visit, files: dict[str, Path], order: list[str]
) -> None:
    visit.at("both-files").locator("input[type=file]").set_input_files([files[view] for view in order])
    for view, file in files.items():
        expect(visit.at(f"{view}-file")).to_contain_text(file.stem)
        expect(visit.at(f"{view}-checks").locator(".light.ok")).to_be_visible()
    expect(visit.at("both-files")).not_to_contain_text(files["frontal"].stem)
    visit.reconstruct()
    visit.at("exchange").click()
    expect(visit.at("results")).to_be_hidden()
    expect(visit.at("frontal-file")).to_contain_text(files["lateral"].stem)
    expect(visit.at("frontal-checks").locator(".light.stop")).to_contain_text("the two may be exchanged")


def test_the_example_needs_no_file_and_has_the_same_controls(visit: Visit) -> None:
    visit.at("example").click()
    expect(visit.at("lateral-preview").locator("img")).to_be_visible()
    visit.reconstruct()
    assert "32³ voxels of 10 mm" in (visit.at("facts").text_content() or "")
    visit.changed("frontal-preview", visit.at("frontal-flip").locator("input").check)
    expect(visit.at("results")).to_be_hidden()


def test_a_result_and_its_inputs_survive_a_reload_and_are_hidden_while_an_input_differs(
    visit: Visit, files: dict[str, Path]
) -> None:
    for view, file in files.items():
        visit.at(f"{view}-file").locator("input[type=file]").set_input_files(file)
        expect(visit.at(f"{view}-preview").locator("img")).to_be_visible()
    # Not the detected orientation: a reload must not detect it again.
    visit.changed("lateral-preview", visit.at("lateral-flip").locator("input").check)
    visit.reconstruct()
    before = {name: visit.image(name) for name in ("axial-slice", "lateral-preview", "lateral-comparison .radiograph")}
    facts = visit.at("facts").text_content()
    visit.page.wait_for_url(re.compile(r"\?volume=[0-9a-f]{64}$"))

    visit.page.reload()
    expect(visit.at("results")).to_be_visible()
    expect(visit.at("facts")).to_have_text(facts or "")
    expect(visit.at("lateral-flip").locator("input")).to_be_checked()
    for name, pixels in before.items():
        expect(visit.img(name)).to_be_visible()
        np.testing.assert_array_equal(visit.image(name), pixels)
    for view, file in files.items():
        expect(visit.at(f"{view}-file")).to_contain_text(file.stem)

    visit.at("lateral-flip").locator("input").uncheck()
    expect(visit.at("results")).to_be_hidden()
    visit.at("lateral-flip").locator("input").check()
    expect(visit.at("results")).to_be_visible()

    link = visit.at("permalink").locator("a").get_attribute("href")
    assert visit.page.url.endswith(link or "-")


def test_the_link_of_an_expired_result_has_a_message(browser: BrowserContext, url: str) -> None:
    visit = Visit(browser, url, f"?volume={'0' * 64}")
    expect(visit.page.get_by_test_id("toast-body")).to_contain_text("The result of this link has expired")
    expect(visit.at("results")).to_be_hidden()
    visit.check()


def test_a_radiograph_and_its_reprojection_are_swiped_overlaid_and_subtracted(visit: Visit, tmp_path: Path) -> None:
    visit.at("example").click()
    expect(visit.at("lateral-preview").locator("img")).to_be_visible()
    visit.reconstruct()
    expect(visit.at("frontal-comparison .reprojection")).to_be_visible()
    radiograph, reprojection = (visit.image(f"frontal-comparison .{one}") for one in ("radiograph", "reprojection"))
    shown = visit.at("frontal-comparison .pair")

    def pixels() -> np.ndarray:
        """The pair as the browser shows it, in the size of its images."""
        with Image.open(io.BytesIO(shown.screenshot())) as image:
            return np.asarray(image.convert("L").resize((448, 448)), np.int32)[20:-20, 20:-20]

    expected = {
        "swipe": np.where(np.arange(448) < 112, radiograph, reprojection),
        "overlay": 0.75 * radiograph + 0.25 * reprojection,
        "difference": np.abs(radiograph - reprojection),
    }
    for mode, image in expected.items():
        visit.choose("comparisons", mode)
        slider = visit.at("frontal-comparison input[type=range]")
        if mode == "difference":
            expect(slider).to_be_hidden()
        else:
            slider.fill("25")
        assert np.abs(pixels() - image[20:-20, 20:-20]).mean() < 3, mode


def test_a_file_that_is_not_an_image_is_refused_with_a_sentence_and_not_used(visit: Visit, tmp_path: Path) -> None:
    visit.at("example").click()
    expect(visit.at("frontal-preview").locator("img")).to_be_visible()
    (tmp_path / "letter.pdf").write_bytes(b"%PDF-1.7")
    visit.at("frontal-file").get_by_label("Clear").click()
    expect(visit.at("frontal-preview")).to_be_hidden()
    visit.at("frontal-file").locator("input[type=file]").set_input_files(tmp_path / "letter.pdf")
    expect(visit.at("frontal-problem")).to_contain_text("Frontal: not an image raylift reads")
    visit.at("reconstruct").click()
    expect(visit.page.get_by_test_id("toast-body")).to_contain_text("Frontal: not an image raylift reads")
    expect(visit.at("reconstruct")).to_have_text("Reconstruct")
    expect(visit.at("results")).to_be_hidden()


def test_reconstruct_without_radiographs_reports_the_missing_file(visit: Visit) -> None:
    visit.at("reconstruct").click()
    expect(visit.page.get_by_text("The frontal radiograph is missing: choose a file.")).to_be_visible()


def test_the_standard_deviation_over_samples_is_shown_as_a_map_with_color_bar_and_file(
    browser: BrowserContext, diffusion_url: str, tmp_path: Path
) -> None:
    visit = Visit(browser, diffusion_url)
    visit.at("example").click()
    expect(visit.at("lateral-preview").locator("img")).to_be_visible()
    expect(visit.at("samples").locator("input[type=number]")).to_have_value("4")
    visit.reconstruct()
    assert "Mean of 4 samples, seeds 0 to 3." in (visit.at("facts").text_content() or "")
    expect(visit.at("std")).to_be_hidden()
    visit.becomes("axial-slice", gray=True)

    visit.choose("slice-content", "std")
    expect(visit.at("explanation")).to_contain_text("not an error bar on the anatomy")
    bar = visit.at("colorbar").locator("[role=img]")
    expect(bar).to_be_visible()
    top = int(re.search(r"bright, (\d+) HU", bar.get_attribute("aria-label") or "").group(1))
    for plane in ("axial", "coronal", "sagittal"):
        expect(visit.at(f"{plane}-slice").locator("img")).to_be_visible()
        visit.becomes(f"{plane}-slice", gray=False)
    visit.page.screenshot(path=tmp_path / "std.png", full_page=True)

    volumes = {}
    for button, name in (("download", "reconstruction.nii.gz"), ("download-std", "reconstruction-std.nii.gz")):
        with visit.page.expect_download() as download:
            visit.at(button).click()
        assert download.value.suggested_filename == name
        download.value.save_as(tmp_path / name)
        volumes[name] = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / name)))
    deviation = volumes["reconstruction-std.nii.gz"]
    assert deviation.shape == volumes["reconstruction.nii.gz"].shape
    assert deviation.min() >= 0
    assert top - 40 < np.quantile(deviation, 0.995) <= top

    visit.page.set_viewport_size({"width": 390, "height": 844})
    assert visit.page.evaluate("document.documentElement.scrollWidth") == 390
    visit.page.screenshot(path=tmp_path / "std-phone.png", full_page=True)
    visit.page.set_viewport_size({"width": 1280, "height": 900})

    # A single sample has no standard deviation, and that of the previous volume is hidden.
    number = visit.at("samples").locator("input[type=number]")
    number.fill("1")
    number.press("Enter")
    expect(visit.at("results")).to_be_hidden()
    visit.reconstruct()
    expect(visit.at("slice-content")).to_be_hidden()
    expect(visit.at("std")).to_be_hidden()
    expect(visit.at("download-std")).to_be_hidden()
    for plane in ("axial", "coronal", "sagittal"):
        visit.becomes(f"{plane}-slice", gray=True)
    assert visit.problems == []


def test_the_page_of_a_deterministic_model_has_no_sampling_controls(visit: Visit) -> None:
    for name in ("samples", "slice-content", "colorbar"):
        expect(visit.at(name)).to_have_count(0)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_on_a_phone_nothing_exceeds_the_screen_width(browser: BrowserContext, url: str, theme: str) -> None:
    visit = Visit(browser, url, f"?__theme={theme}")
    visit.page.set_viewport_size({"width": 390, "height": 844})
    visit.at("example").click()
    expect(visit.at("lateral-preview").locator("img")).to_be_visible()
    visit.reconstruct()
    assert visit.page.evaluate("document.documentElement.scrollWidth") == 390
    right = "element => element.getBoundingClientRect().right"
    assert visit.at("viewer").evaluate("element => element.getBoundingClientRect().top + scrollY") <= 2000
    edge = visit.at("viewer").evaluate(right)
    assert all(link.evaluate(right) <= edge for link in visit.at("formats").locator("a").all())
    assert "not for diagnosis" in (visit.at("notice").text_content() or "")
