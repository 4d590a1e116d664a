"""The page has no violation of axe-core's rules, in either theme, before and after a reconstruction."""

from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from page_visit import Visit
from playwright.sync_api import BrowserContext, expect


def violations(visit: Visit) -> list[str]:
    # Elements that fade in have less contrast until they are opaque.
    visit.page.wait_for_timeout(1000)
    found = Axe().run(visit.page).response
    assert len(found["passes"]) > 20
    return [
        f"{rule['id']}: {node['target']} {node['html'][:200]}" for rule in found["violations"] for node in rule["nodes"]
    ]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_page_has_no_violation(webgl_browser: BrowserContext, url: str, theme: str, tmp_path: Path) -> None:
    visit = Visit(webgl_browser, url, f"?__theme={theme}")
    assert violations(visit) == []

    (tmp_path / "letter.pdf").write_bytes(b"%PDF-1.7")
    visit.at("frontal-file").locator("input[type=file]").set_input_files(tmp_path / "letter.pdf")
    expect(visit.at("frontal-problem")).to_be_visible()
    assert violations(visit) == []

    visit.at("frontal-file").get_by_label("Clear").click()
    visit.at("example").click()
    expect(visit.at("lateral-preview").locator("img")).to_be_visible()
    visit.at("reconstruct").click()
    expect(visit.page.locator("raylift-viewer[data-state=ready]")).to_be_visible()
    assert violations(visit) == []
    visit.choose("comparisons", "swipe")
    assert violations(visit) == []
    visit.page.close()


def test_an_image_without_a_text_is_a_violation(webgl_browser: BrowserContext, url: str) -> None:
    visit = Visit(webgl_browser, url)
    visit.page.evaluate("document.body.append(Object.assign(new Image(), {src: '/favicon.ico'}))")
    assert any(violation.startswith("image-alt") for violation in violations(visit))
    visit.page.close()
