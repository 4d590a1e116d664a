import io
from collections.abc import Callable
from urllib.parse import urljoin, urlsplit

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import BrowserContext, Locator, Page, expect

# The default of five seconds is too short on a loaded machine.
expect.set_options(timeout=30_000)


class Visit:
    """A page that records its requests and errors."""

    def __init__(self, browser: BrowserContext, url: str, query: str = "") -> None:
        self.page: Page = browser.new_page()
        self.page.set_default_timeout(20_000)
        self.requests: list[str] = []
        self.problems: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        # A navigation aborts the streams of the page that is left.
        self.page.on("pageerror", lambda error: "AbortError" in str(error) or self.problems.append(str(error)))
        self.page.on("response", lambda response: response.status >= 400 and self.problems.append(response.url))
        self.page.on(
            "console",
            lambda message: (
                message.type == "error" and "AbortError" not in message.text and self.problems.append(message.text)
            ),
        )
        self.url = url
        self.page.goto(url + "/" + query)
        expect(self.page.locator("#reconstruct")).to_be_visible()

    def check(self) -> None:
        """Fail if the page had an error or a request for another host."""
        local = ("data", "blob")
        external = {one for one in self.requests if urlsplit(one).scheme not in local and not one.startswith(self.url)}
        assert external == set(), "the page loads from another host"
        assert self.problems == [], self.problems

    def at(self, name: str) -> Locator:
        return self.page.locator(f"#{name}")

    def img(self, name: str) -> Locator:
        """The image of an element, or the image with a class inside an element: `ID .CLASS`."""
        return self.at(name).locator("img") if " " not in name else self.at(name)

    def colors(self, name: str) -> np.ndarray:
        """Pixels of an image as RGB."""
        self.img(name).scroll_into_view_if_needed()
        source = self.img(name).get_attribute("src")
        return np.asarray(
            Image.open(io.BytesIO(self.page.request.get(urljoin(self.page.url, source)).body())).convert("RGB"),
            dtype=np.int32,
        )

    def image(self, name: str) -> np.ndarray:
        """Pixels of an image as gray values."""
        return np.asarray(Image.fromarray(self.colors(name).astype(np.uint8)).convert("L"), dtype=np.int32)

    def becomes(self, name: str, *, gray: bool) -> None:
        """Wait until an image is gray or colored: each slice is updated by its own event, in any order."""
        for _ in range(300):
            distance = np.ptp(self.colors(name), axis=2).max()
            if distance == 0 if gray else distance > 50:
                return
            self.page.wait_for_timeout(100)
        pytest.fail(f"{name} is not {'gray' if gray else 'colored'} after 30 s: channels differ by up to {distance}")

    def changed(self, name: str, act: Callable[[], object]) -> np.ndarray:
        """Run an action and return the pixels of an image after it changed."""
        before = self.at(name).locator("img").get_attribute("src") or ""
        act()
        expect(self.at(name).locator("img")).not_to_have_attribute("src", before)
        return self.image(name)

    def choose(self, name: str, value: str) -> None:
        self.at(name).locator(f"input[value='{value}']").check()

    def reconstruct(self) -> None:
        self.at("reconstruct").click()
        expect(self.at("sagittal-slice").locator("img")).to_be_visible()
        expect(self.at("reconstruct")).to_have_text("Reconstruct")
