"""Several models in one service: each has a page and an API of its own, and the pages link to each other."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from page_visit import Visit
from playwright.sync_api import BrowserContext, expect

from raylift.datasets.errors import ConfigError
from raylift.platform.model_store import FRONTAL_MODEL, sha256_of
from raylift.serve.client import Client
from raylift.serve.settings import ServeSettings


def test_each_model_has_a_page_and_an_api_and_the_pages_link_to_each_other(
    browser: BrowserContext,
    two_models_url: str,
    model_folder: Path,
    radiographs: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    visit = Visit(browser, two_models_url)
    expect(visit.at("models").locator("b")).to_have_text(f"{model_folder.name} (x2ct-gan)")
    expect(visit.at("models").locator("a")).to_have_text(FRONTAL_MODEL)
    visit.page.screenshot(path=tmp_path / "first.png")
    visit.at("example").click()
    for view in ("frontal", "lateral"):
        expect(visit.at(f"{view}-preview").locator("img")).to_be_visible()
    visit.reconstruct()
    visit.check()
    visit.at("models").locator("a").click()
    expect(visit.at("models").locator("b")).to_have_text(FRONTAL_MODEL)
    assert visit.page.url == f"{two_models_url}/2/"
    expect(visit.at("frontal-file")).to_be_visible()
    expect(visit.at("lateral-file")).to_have_count(0)
    expect(visit.at("about")).to_contain_text(sha256_of(FRONTAL_MODEL)[:16])
    visit.at("example").click()
    expect(visit.at("frontal-preview").locator("img")).to_be_visible()
    visit.reconstruct()
    visit.page.screenshot(path=tmp_path / "second.png", full_page=True)
    visit.check()
    visit.at("models").locator("a").click()
    expect(visit.at("models").locator("b")).to_have_text(f"{model_folder.name} (x2ct-gan)")
    assert visit.page.url == f"{two_models_url}/"
    for path, views in (("", 2), ("/2", 1)):
        assert httpx.get(f"{two_models_url}{path}/readyz", trust_env=False).status_code == 200
        model = httpx.get(f"{two_models_url}{path}/v1/model", trust_env=False).json()
        assert len(model["views"]) == views
        models = httpx.get(f"{two_models_url}{path}/v1/models", trust_env=False).json()["models"]
        assert [(one["name"], one["path"]) for one in models] == [(model_folder.name, ""), (FRONTAL_MODEL, "/2")]
        assert models[bool(path)] == model
    frontal = {"frontal": radiographs["frontal"]}
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for path, files, default in (("", radiographs, model_folder.name), ("/2", frontal, FRONTAL_MODEL)):
        with Client(f"{two_models_url}{path}") as client:
            assert client.reconstruct(**files).parameters["model"] == default
            result = client.reconstruct(**frontal, model=FRONTAL_MODEL)
            assert (result.sha256, result.hu.shape) == (sha256_of(FRONTAL_MODEL), (64, 64, 64))
            result = client.reconstruct(**radiographs, model=model_folder.name)
            assert (result.sha256, result.hu.shape) == (sha256_of(model_folder), (32, 32, 32))


def test_several_models_are_not_served_below_a_path() -> None:
    with pytest.raises(ConfigError, match="--also and --root-path"):
        ServeSettings(also=("other",), root_path="/ct")
