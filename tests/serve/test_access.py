"""Hosts, origins, credentials, routes and events of requests, and headers of responses."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import bcrypt
import httpx
import psutil
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from raylift.datasets.errors import ConfigError
from raylift.serve.api import access, credentials
from raylift.serve.api.access import SECURITY_HEADERS, AccessControl
from raylift.serve.api.request_limits import KnownRoutes
from raylift.serve.page.upload_guard import KnownEvents
from raylift.serve.settings import ServeSettings

TOKEN = "0123456789abcdef" * 2


def secret(path: Path, *lines: str) -> Path:
    path.touch(0o600)
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def required(tmp_path_factory: pytest.TempPathFactory) -> credentials.Credentials | None:
    folder = tmp_path_factory.mktemp("credentials")
    hashed = bcrypt.hashpw(b"a password", bcrypt.gensalt(4)).decode()
    # htpasswd writes the letter y.
    users = secret(folder / "users", "# users", f"ada:{hashed.replace('$2b$', '$2y$')}")
    return credentials.read(users, secret(folder / "tokens", TOKEN))


def client(hosts: tuple[str, ...] = (), required: credentials.Credentials | None = None) -> TestClient:
    """An application of three routes behind the middleware, with the hosts of the default address."""
    app = FastAPI()
    for path in ("/healthz", "/readyz", "/v1/model"):
        app.api_route(path, methods=["GET", "HEAD"])(lambda: {"done": True})
    app.post("/v1/reconstructions")(lambda: {"done": True})
    app.add_middleware(KnownRoutes)
    settings = ServeSettings(allowed_hosts=hosts)
    app.add_middleware(AccessControl, hosts=settings.hosts, proxied_hosts=hosts, credentials=required)
    return TestClient(app, base_url="http://127.0.0.1:8000")


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("127.0.0.1:8000", None, 200),
        ("localhost:9000", None, 200),
        ("[::1]:8000", "http://[::1]:8000", 200),
        ("ct.example.org", "https://ct.example.org", 200),
        ("CT.example.org", "https://ct.example.ORG", 200),
        ("127.0.0.1:8000", "https://ct.example.org", 200),
        ("127.0.0.1:8000", "http://127.0.0.1:8000", 200),
        ("127.0.0.1:8000", "http://127.0.0.1:3000", 403),
        ("127.0.0.1:8000", "http://localhost:8000", 403),
        ("127.0.0.1:8000", "https://evil.example", 403),
        ("127.0.0.1:8000", "https://ct.example.org.evil.example", 403),
        ("127.0.0.1:8000", "null", 403),
        ("evil.example", None, 421),
        ("ct.example.org.evil.example:80", None, 421),
        ("", None, 421),
    ],
)
def test_only_the_services_hosts_and_origins_are_served(host: str, origin: str | None, status: int) -> None:
    headers = {"host": host} | ({"origin": origin} if origin else {})
    api = client(("ct.example.org",))
    for response in (api.get("/v1/model", headers=headers), api.post("/v1/reconstructions", headers=headers)):
        assert response.status_code == status
        assert not [name for name in response.headers if name.startswith("access-control-")]
        assert SECURITY_HEADERS.items() <= {name: response.headers[name] for name in SECURITY_HEADERS}.items()


def test_preflights_permit_no_other_origin() -> None:
    headers = {"access-control-request-method": "POST", "origin": "https://evil.example"}
    assert client().options("/v1/reconstructions", headers=headers).status_code == 403
    same = client().options("/v1/reconstructions", headers=headers | {"origin": "http://127.0.0.1:8000"})
    assert (same.status_code, same.headers["allow"]) == (405, "POST")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"authorization": f"Bearer {TOKEN}"}, 200),
        ({"authorization": f"bearer {TOKEN}"}, 200),
        ({"authorization": f"Bearer {TOKEN[:-1]}0"}, 401),
        ({"authorization": TOKEN}, 401),
        ({"authorization": "Basic not base64"}, 401),
        ({"authorization": "Basic /w=="}, 401),
        ({"authorization": b"Basic \xff"}, 401),
        ({"authorization": "Digest a"}, 401),
    ],
)
def test_credentials_are_required_except_for_probes(
    headers: dict[str, str], status: int, required: credentials.Credentials
) -> None:
    api = client(required=required)
    response = api.get("/v1/model", headers=headers)
    assert response.status_code == status
    if status == 401:
        assert response.headers["www-authenticate"].startswith("Basic realm=")
        assert response.json()["title"] == "Unauthorized"
    assert api.get("/healthz").status_code == api.get("/readyz", headers={"host": "10.0.0.7:8000"}).status_code == 200


@pytest.mark.parametrize(
    ("user", "status"),
    [(("ada", "a password"), 200), (("ada", "another"), 401), (("eve", "a password"), 401), (("ada", "x" * 100), 401)],
)
def test_users_authenticate_with_their_password(
    user: tuple[str, str], status: int, required: credentials.Credentials
) -> None:
    api = client(required=required)
    assert [api.get("/v1/model", auth=user).status_code for _ in range(2)] == [status, status]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["ada:secret"], "line 1 is not a user and a hash of bcrypt: use htpasswd -B"),
        (["ada:$apr1$abc$abc"], "line 1 is not a user and a hash of bcrypt"),
        ([], "has no line"),
    ],
)
def test_a_file_of_users_without_hashes_is_refused(lines: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        credentials.read(secret(tmp_path / "users", *lines), None)


def test_a_short_token_is_refused(tmp_path: Path) -> None:
    path = secret(tmp_path / "tokens", TOKEN, "short")
    with pytest.raises(ConfigError, match="line 2 has under 32 characters: use openssl rand -hex 32"):
        credentials.read(None, path)
    assert credentials.read(None, None) is None


@pytest.mark.parametrize(
    ("mode", "is_refused"),
    [(0o600, False), (0o400, False), (0o640, False), (0o440, False), (0o660, True), (0o604, True), (0o602, True)],
)
def test_a_file_that_all_users_can_read_or_its_group_write_is_refused(
    mode: int, is_refused: bool, tmp_path: Path
) -> None:
    path = secret(tmp_path / "tokens", TOKEN)
    path.chmod(mode)
    expected = pytest.raises(ConfigError, match=r"run chmod 600 .*, or 640 for its group")
    with expected if is_refused else nullcontext():
        assert credentials.read(None, path) is not None


def test_an_unknown_user_takes_as_long_as_a_known_one(tmp_path: Path) -> None:
    hashed = bcrypt.hashpw(b"a password", bcrypt.gensalt(8)).decode()
    required = credentials.read(secret(tmp_path / "users", f"ada:{hashed}"), None)
    assert required is not None

    def seconds(user: str) -> float:
        header = "Basic " + base64.b64encode(f"{user}:wrong".encode()).decode()
        begun = time.process_time()
        assert not required.accept_password(header)
        return time.process_time() - begun

    known, unknown = (min(seconds(user) for _ in range(5)) for user in ("ada", "eve"))
    assert 0.5 < unknown / known < 2
    password = "Basic " + base64.b64encode(b"eve:a password").decode()
    assert not required.accept_password(password)


def test_passwords_in_verification_are_bounded_and_others_pass_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "MAX_VERIFICATIONS", 4)
    hashed = bcrypt.hashpw(b"a password", bcrypt.gensalt(11)).decode()
    slow = credentials.read(secret(tmp_path / "users", f"ada:{hashed}"), secret(tmp_path / "tokens", TOKEN))
    app = client(required=slow).app

    async def run() -> tuple[list[int], list[int]]:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as http:
            assert (await http.get("/v1/model", auth=("ada", "a password"))).status_code == 200
            wrong = [asyncio.create_task(http.get("/v1/model", auth=("ada", f"wrong {k}"))) for k in range(10)]
            await asyncio.sleep(0)
            known = await http.get("/v1/model", auth=("ada", "a password"))
            token = await http.get("/v1/model", headers={"authorization": f"Bearer {TOKEN}"})
            assert not all(one.done() for one in wrong)
            return [(await one).status_code for one in wrong], [known.status_code, token.status_code]

    wrong, right = asyncio.run(run())
    assert sorted(wrong) == [401] * 4 + [503] * 6
    assert right == [200, 200]


def test_another_address_than_this_machine_requires_credentials(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::", "192.168.1.7", "ct.example.org"):
        with pytest.raises(ConfigError, match=f"--host {host} is open to other machines: pass --auth-file"):
            ServeSettings(host=host)
        assert ServeSettings(host=host, token_file=tmp_path / "tokens").host == host
    for host in ("127.0.0.1", "127.0.0.2", "::1", "localhost"):
        assert ServeSettings(host=host).host == host


def test_an_address_of_ipv6_has_brackets_in_urls_and_hosts(tmp_path: Path) -> None:
    assert ServeSettings(host="::1").url == "http://[::1]:8000"
    opened = ServeSettings(host="2001:db8::7", token_file=tmp_path / "tokens")
    assert (opened.url, opened.reachable_host) == ("http://[2001:db8::7]:8000", "2001:db8::7")
    assert "[2001:db8::7]" in opened.hosts
    assert not [host for host in opened.hosts if ":" in host and not host.startswith("[")]
    assert ServeSettings(host="::", token_file=tmp_path / "tokens").reachable_host == "::1"


def test_an_open_service_is_served_by_the_addresses_of_its_machine(tmp_path: Path) -> None:
    opened = ServeSettings(host="0.0.0.0", token_file=tmp_path / "tokens").hosts
    addresses = {entry.address for entries in psutil.net_if_addrs().values() for entry in entries}
    assert {address for address in addresses if re.fullmatch(r"[\d.]+", address)} <= opened
    assert "127.0.0.1" in opened


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"allowed_hosts": ("ct.example.org:8443",)}, "ct.example.org:8443: give a name or an address without scheme"),
        ({"allowed_hosts": ("https://ct.example.org",)}, "without scheme, port and path"),
        ({"decoding_timeout_s": 0.0}, "of 0 refuse every request"),
        ({"body_timeout_s": 0.0}, "of 0 refuse every request"),
        ({"root_path": "/ct/"}, "--root-path /ct/ is not a path such as /ct"),
    ],
)
def test_settings_that_would_refuse_every_request_are_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServeSettings(**settings)
    assert ServeSettings(allowed_hosts=("[::1]", "10.0.0.7"), root_path="/user/ada@example.org/proxy/8000")


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", "/v1/reconstructions", 405, "POST"),
        ("DELETE", "/v1/model", 405, "GET, HEAD"),
        ("POST", "/healthz", 405, "GET, HEAD"),
        ("PUT", "/", 405, "GET, HEAD"),
        ("GET", "/gradio_api/queue/join", 405, "POST"),
        ("GET", "/v1/none", 404, None),
        ("GET", "/v1/model/", 404, None),
    ],
)
def test_other_methods_get_405_with_the_allowed_ones_and_other_paths_404(
    method: str, path: str, status: int, allow: str | None
) -> None:
    response = client().request(method, path, headers={"x-request-id": "one-of-the-client"})
    assert (response.status_code, response.headers.get("allow")) == (status, allow)
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["request_id"] == "one-of-the-client"
    assert client().get("/nothing", headers={"x-request-id": "<script>"}).json()["request_id"] != "<script>"


@pytest.mark.parametrize(
    ("event", "status"),
    [
        ({"data": [], "fn_index": 0, "session_hash": "a"}, 200),
        ({"data": [], "fn_index": 7, "session_hash": "a"}, 422),
        ({"data": [], "fn_index": True, "session_hash": "a"}, 422),
        ({"data": [], "fn_index": 10**30, "session_hash": "a"}, 422),
        ({"data": [], "fn_index": 0, "session_hash": None}, 422),
        ({"data": [], "session_hash": "a"}, 422),
        ([], 422),
        ("[" * 20_000, 422),
        ("{", 422),
        (json.dumps({"data": ["x" * 70_000], "fn_index": 0, "session_hash": "a"}), 413),
    ],
)
def test_events_of_no_function_of_the_page_are_refused(event: Any, status: int) -> None:
    app = FastAPI()

    @app.post("/gradio_api/queue/join")
    async def join(body: dict[str, Any]) -> list[str]:
        return sorted(body)

    app.add_middleware(KnownEvents, functions={0})
    content = event if isinstance(event, str) else json.dumps(event)
    response = TestClient(app).post(
        "/gradio_api/queue/join", content=content, headers={"content-type": "application/json"}
    )
    assert response.status_code == status
    if status == 200:
        assert response.json() == ["data", "fn_index", "session_hash"]
