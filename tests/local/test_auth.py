"""Who may call: token, Host and Origin."""

import stat
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from agent.local.auth import local_token
from tests.local.desk import Api, api, job

PAGE = "https://page.example"


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with api(tmp_path_factory.mktemp("home"), job("run")) as one:
        yield one


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with api(tmp_path_factory.mktemp("open"), job("run"), LOCAL_API_OPEN="true") as one:
        yield one


def test_the_token_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    token = local_token(tmp_path)
    path = tmp_path / "local_token"
    assert len(token) >= 43 and path.read_text().strip() == token
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    assert local_token(tmp_path) == token
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text("")
    assert local_token(tmp_path) not in ("", token), "an empty file is a crash's, and no token"


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer wrong", "Basic dXNlcg==", "Bearer \u00ff"])
def test_everything_but_health_needs_the_token(door: Api, header: str) -> None:
    headers = {"Authorization": header.encode("latin-1")} if header else {}
    for path in ("/api/training/jobs", "/metrics", "/api/training/agent", "/api/training/nothing"):
        answer = door.stranger.get(path, headers=headers)
        assert answer.status_code == 401
        assert "AGENT_HOME/local_token" in answer.json()["error"]
    assert door.stranger.get("/health", headers=headers).status_code == 200
    assert door.stranger.post("/health", headers=headers).status_code == 401


def test_the_open_setting_lifts_the_token(opened: Api) -> None:
    assert opened.stranger.get("/api/training/jobs").status_code == 200
    assert opened.stranger.post("/api/training/pause/run").status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "[::1"])
def test_a_foreign_host_header_is_refused(opened: Api, host: str) -> None:
    answer = opened.stranger.get("/health", headers={"Host": host})
    assert answer.status_code in (400, 403), "a name that was bound to this machine to get at it"


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1", "[::1]:8000", "192.168.1.4:8000"])
def test_this_machines_own_names_are_taken(opened: Api, host: str) -> None:
    assert opened.stranger.get("/health", headers={"Host": host}).status_code == 200


def test_who_has_the_token_may_use_any_name(door: Api) -> None:
    assert door.client.get("/api/training/jobs", headers={"Host": "agent:8000"}).status_code == 200


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "https://page.example.evil", "http://page.example"]
)
def test_pages_of_other_origins_may_not_call(opened: Api, origin: str) -> None:
    for call in (
        opened.stranger.get("/health", headers={"Origin": origin}),
        opened.stranger.post("/api/training/cancel/run", headers={"Origin": origin}),
        opened.client.get("/api/training/jobs", headers={"Origin": origin}),
        _preflight(opened, origin, "GET", "/health"),
    ):
        assert call.status_code == 403
        assert "access-control-allow-origin" not in call.headers


def test_the_backends_page_may_read_what_it_calls(door: Api, opened: Api) -> None:
    for path in ("/health", "/api/training/checkpoints/run"):
        answer = opened.stranger.get(path, headers={"Origin": PAGE})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == PAGE
    refused = door.stranger.get("/api/training/checkpoints/run", headers={"Origin": PAGE})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == PAGE, "so that the page can read why"


def test_the_backends_page_may_do_no_more(opened: Api) -> None:
    for method, path in [
        ("GET", "/api/training/jobs"),
        ("GET", "/metrics"),
        ("POST", "/api/training/cancel/run"),
    ]:
        assert opened.stranger.request(method, path, headers={"Origin": PAGE}).status_code == 403
        assert _preflight(opened, PAGE, method, path).status_code == 403
    started = opened.stranger.post("/api/training/run/force-start", headers={"Origin": PAGE})
    assert started.status_code == 200, "its recovery card calls this from the browser"


def test_a_preflight_of_the_backends_page(door: Api) -> None:
    answer = _preflight(door, PAGE, "GET", "/health", {"Access-Control-Request-Private-Network": "true"})
    assert answer.status_code == 204
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert answer.headers["access-control-allow-private-network"] == "true"
    assert "Authorization" in answer.headers["access-control-allow-headers"]


def _preflight(
    door: Api, origin: str, method: str, path: str, more: dict[str, str] | None = None
) -> httpx.Response:
    headers = {"Origin": origin, "Access-Control-Request-Method": method, **(more or {})}
    return door.stranger.options(path, headers=headers)
