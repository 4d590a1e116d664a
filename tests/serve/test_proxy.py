"""The service below a path, behind nginx."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urljoin

import httpx
import pytest
from playwright.sync_api import BrowserContext, expect

ROOT = "/apps/ct"
# The API and the page without Ray: no request of this test reaches the model.
APPLICATION = """
import sys
import uvicorn
from raylift.platform import model_store
from raylift.serve import ingress
from raylift.serve.gate import Gate
from raylift.serve.served_model import ServedModel
from raylift.serve.settings import ServeSettings

model = model_store.load(sys.argv[1])
settings = ServeSettings(root_path=sys.argv[2], allowed_hosts=("ct.example.org",))
app = ingress.build("model", Gate(), settings, ServedModel(model.description, model.sha256), None)
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[3]), log_level="warning")
"""
NGINX = """
pid {folder}/pid;
error_log {folder}/error.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    proxy_set_header Host $http_host;
    proxy_http_version 1.1;
    proxy_buffering off;
    server {{ listen 127.0.0.1:{passing}; location {root}/ {{ proxy_pass http://127.0.0.1:{port}; }} }}
    server {{ listen 127.0.0.1:{stripping}; location {root}/ {{ proxy_pass http://127.0.0.1:{port}/; }} }}
}}
"""


@pytest.fixture(scope="module")
def proxies(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """URLs of a proxy that passes the path on and of one that strips it."""
    nginx = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/bin")
    if nginx is None:
        pytest.skip("no nginx: apt install nginx-light")
    folder = tmp_path_factory.mktemp("nginx")
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    port, passing, stripping = (probe.getsockname()[1] for probe in probes)
    for probe in probes:
        probe.close()
    text = NGINX.format(folder=folder, root=ROOT, port=port, passing=passing, stripping=stripping)
    (folder / "nginx.conf").write_text(text)
    commands = [
        [sys.executable, "-c", APPLICATION, str(model_folder), ROOT, str(port)],
        [nginx, "-c", str(folder / "nginx.conf"), "-g", "daemon off;"],
    ]
    processes = [subprocess.Popen(command) for command in commands]
    urls = [f"http://127.0.0.1:{one}{ROOT}" for one in (passing, stripping)]
    until = time.monotonic() + 240
    try:
        while not all(responds(url) for url in urls):
            assert all(process.poll() is None for process in processes)
            assert time.monotonic() < until
            time.sleep(0.2)
        yield urls
    finally:
        for process in processes:
            process.terminate()
            process.wait(20)


def responds(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def test_the_api_is_served_below_the_path_by_proxies_that_pass_and_strip_it(proxies: list[str]) -> None:
    for url in proxies:
        with httpx.Client(base_url=url, trust_env=False) as http:
            assert http.get("/v1/model").json()["views"] == ["frontal", "lateral"]
            assert f"{url}/v1/reconstructions" in http.get("/docs").text
            refused = http.get("/v1/reconstructions")
            assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
            assert http.post("/v1/reconstructions", files={"frontal": b"x"}).status_code == 422
            assert http.get("/nothing").status_code == 404
            assert http.get("/v1/model", headers={"host": "ct.example.org"}).status_code == 200
            assert http.get("/v1/model", headers={"host": "evil.example"}).status_code == 421


def test_the_page_works_below_the_path_behind_both_proxies(proxies: list[str], browser: BrowserContext) -> None:
    for url in proxies:
        page = browser.new_page()
        problems: list[str] = []
        page.on("pageerror", lambda error, problems=problems: problems.append(str(error)))
        page.on("response", lambda one, problems=problems: one.status >= 400 and problems.append(one.url))
        page.on("request", lambda one, url=url, problems=problems: is_below(one.url, url) or problems.append(one.url))
        page.goto(f"{url}/")
        page.wait_for_function("Boolean(customElements.get('raylift-viewer'))", timeout=30_000)
        page.locator("#example").click(timeout=30_000)
        for view in ("frontal", "lateral"):
            expect(page.locator(f"#{view}-preview img")).to_be_visible(timeout=30_000)
        with page.expect_navigation():
            page.locator("#about a").evaluate("link => window.location = link.href")
        assert "raylift API" in page.content()
        # Gradio's page links its manifest, which is for installed pages, at the root of the host.
        assert set(problems) <= {urljoin(url, "/manifest.json")}
        page.close()


def is_below(requested: str, url: str) -> bool:
    return requested.startswith((f"{url}/", "data:", "blob:"))
