"""A data set comes by ranges, verified, whatever happens on the way."""

import hashlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import agent.net.download
from agent.net.download import DownloadFailed, fetch_dataset
from agent.net.retry import backoff
from tests.support.network import BadNetwork

pytestmark = pytest.mark.anyio
DATA = random.Random(5).randbytes(3_000_000)
SHA = hashlib.sha256(DATA).hexdigest()
TOKEN = "job-token"
Answer = Callable[[Request], Awaitable[Response]]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent.net.download, "backoff", lambda cap: backoff(0.01, 0.05))


class Platform:
    """Serves DATA as the contract says; ``odd`` may answer a request otherwise."""

    def __init__(self, odd: Answer | None = None) -> None:
        self.odd = odd
        self.ranges: list[str] = []
        self.headers: list[Any] = []
        self.port = 0

    async def dataset(self, request: Request) -> Response:
        assert request.path_params["job_id"] in ("job-1", "job-2")
        asked = request.headers.get("Range", "")
        self.ranges.append(asked)
        self.headers.append(request.headers)
        if self.odd is not None:
            return await self.odd(request)
        return ranged(request)


def ranged(request: Request, data: bytes = DATA) -> Response:
    """Return what the contract says."""
    asked = request.headers.get("Range", "")
    if not asked:
        return Response(data)
    first = int(asked.removeprefix("bytes=").removesuffix("-"))
    headers = {"Content-Range": f"bytes {first}-{len(data) - 1}/{len(data)}"}
    return Response(data[first:], 206, headers)


@asynccontextmanager
async def serving(odd: Answer | None = None) -> AsyncIterator[Platform]:
    platform = Platform(odd)
    app = Starlette(routes=[Route("/api/training/local/{job_id}/dataset", platform.dataset)])
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="off"))
    sockets = [server.config.bind_socket()]
    platform.port = sockets[0].getsockname()[1]
    async with anyio.create_task_group() as group:
        group.start_soon(server.serve, sockets)
        try:
            yield platform
        finally:
            server.should_exit = server.force_exit = True
    sockets[0].close()


async def fetch(port: int, folder: Path, **more: Any) -> Path:
    options: dict[str, Any] = {
        "sha256": SHA,
        "size": len(DATA),
        "folder": folder,
        "user_agent": "test/1",
    } | more
    with anyio.fail_after(30):
        return await fetch_dataset(
            f"http://127.0.0.1:{port}/",
            options.pop("job_id", "job-1"),
            options.pop("token", TOKEN),
            **options,
        )


async def test_it_arrives_and_is_fetched_once(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    async with serving() as platform:
        path = await fetch(platform.port, folder)
        assert path.read_bytes() == DATA
        assert path.parent == folder
        assert await fetch(platform.port, folder) == path
        assert await fetch(platform.port, folder, job_id="job-2") == path, (
            "another job of the same rows has them"
        )
    assert platform.ranges == [""]
    assert platform.headers[0]["Authorization"] == f"Bearer {TOKEN}"
    assert platform.headers[0]["User-Agent"] == "test/1"
    assert platform.headers[0]["Accept-Encoding"] == "identity"
    assert [one.name for one in folder.iterdir()] == [f"{SHA}.data"], "no part is left"


async def test_two_jobs_of_the_same_rows_do_not_disturb_each_other(tmp_path: Path) -> None:
    paths: list[Path] = []

    async def one(job_id: str) -> None:
        paths.append(await fetch(net.port, tmp_path, job_id=job_id))

    async with serving() as platform, BadNetwork("127.0.0.1", platform.port) as net:
        net.throttle(20_000_000)
        async with anyio.create_task_group() as group:
            group.start_soon(one, "job-1")
            group.start_soon(one, "job-2")
    assert [path.read_bytes() for path in paths] == [DATA, DATA]


async def test_a_broken_transfer_goes_on_where_it_stopped(tmp_path: Path) -> None:
    async with serving() as platform, BadNetwork("127.0.0.1", platform.port) as net:
        net.throttle(3_000_000)
        async with anyio.create_task_group() as group:

            async def cut() -> None:
                for _ in range(3):
                    await anyio.sleep(0.3)
                    net.cut()
                net.heal()

            group.start_soon(cut)
            path = await fetch(net.port, tmp_path)
    assert path.read_bytes() == DATA
    starts = [int(asked.removeprefix("bytes=").removesuffix("-")) for asked in platform.ranges[1:]]
    assert len(starts) >= 2
    assert starts == sorted(starts)
    assert starts[-1] > 0


async def test_what_an_earlier_agent_left_is_used(tmp_path: Path) -> None:
    (tmp_path / f"{SHA}.job-1.part").write_bytes(DATA[:1_000_000])
    async with serving() as platform:
        assert (await fetch(platform.port, tmp_path)).read_bytes() == DATA
    assert platform.ranges == ["bytes=1000000-"]


async def test_a_whole_part_needs_no_request(tmp_path: Path) -> None:
    (tmp_path / f"{SHA}.job-1.part").write_bytes(DATA)
    async with serving() as platform:
        assert (await fetch(platform.port, tmp_path)).read_bytes() == DATA
    assert platform.ranges == []


async def test_a_part_that_is_too_long_is_begun_again(tmp_path: Path) -> None:
    (tmp_path / f"{SHA}.job-1.part").write_bytes(DATA + b"more")
    async with serving() as platform:
        assert (await fetch(platform.port, tmp_path)).read_bytes() == DATA
    assert platform.ranges == [""]


async def test_a_server_without_ranges_sends_all_again(tmp_path: Path) -> None:
    async def whole(_: Request) -> Response:
        return Response(DATA)

    (tmp_path / f"{SHA}.job-1.part").write_bytes(b"x" * 2_000_000)
    async with serving(whole) as platform:
        assert (await fetch(platform.port, tmp_path)).read_bytes() == DATA


async def test_a_transfer_that_always_ends_early_but_moves_on_is_not_given_up(tmp_path: Path) -> None:
    async def short(request: Request) -> Response:
        answer = ranged(request)
        return Response(bytes(answer.body)[:150_000], answer.status_code)

    async with serving(short) as platform:
        assert (await fetch(platform.port, tmp_path)).read_bytes() == DATA
    assert len(platform.ranges) == 20


async def test_a_transfer_that_brings_nothing_is_given_up(tmp_path: Path) -> None:
    async def nothing(_: Request) -> Response:
        return Response(b"")

    async with serving(nothing) as platform:
        with pytest.raises(DownloadFailed, match=r"could not be fetched from .*: 0 of 3000000 bytes arrived"):
            await fetch(platform.port, tmp_path)
    assert len(platform.ranges) == 8


async def test_a_busy_server_is_asked_again(tmp_path: Path) -> None:
    async def busy(request: Request) -> Response:
        return Response(status_code=503) if len(platform.ranges) < 4 else ranged(request)

    async with serving(busy) as platform:
        assert (await fetch(platform.port, tmp_path)).read_bytes() == DATA


@pytest.mark.parametrize("status", [401, 403, 404, 410, 302])
async def test_a_refusal_is_said_once(tmp_path: Path, status: int) -> None:
    async def refused(_: Request) -> Response:
        return Response(status_code=status, headers={"Location": "https://elsewhere.example"})

    async with serving(refused) as platform:
        with pytest.raises(DownloadFailed) as failed:
            await fetch(platform.port, tmp_path)
    assert str(failed.value).startswith(
        "The data set of job job-1 could not be fetched from http://127.0.0.1:"
    )
    assert str(failed.value).endswith(f": HTTP {status}.")
    assert TOKEN not in str(failed.value)
    assert len(platform.ranges) == 1


async def test_other_bytes_than_announced_are_refused_and_not_kept(tmp_path: Path) -> None:
    async with serving() as platform:
        with pytest.raises(
            DownloadFailed, match=rf"arrived with sha256 {SHA[:12]}\.\.\., the backend announced 00000"
        ):
            await fetch(platform.port, tmp_path, sha256="0" * 64)
    assert not (tmp_path / ("0" * 64 + ".job-1.part")).exists()
    assert not (tmp_path / ("0" * 64 + ".data")).exists()


async def test_more_bytes_than_announced_are_not_taken(tmp_path: Path) -> None:
    async with serving() as platform:
        with pytest.raises(DownloadFailed, match="sends more than the 1000 bytes it announced"):
            await fetch(platform.port, tmp_path, size=1000)
    assert (tmp_path / f"{SHA}.job-1.part").stat().st_size <= 1000


async def test_an_empty_data_set_is_fetched(tmp_path: Path) -> None:
    async def empty(request: Request) -> Response:
        return Response(b"")

    async with serving(empty) as platform:
        path = await fetch(platform.port, tmp_path, size=0, sha256=hashlib.sha256(b"").hexdigest())
    assert path.read_bytes() == b""


async def test_a_folder_that_cannot_be_written_is_said_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    async with serving() as platform:
        with pytest.raises(
            DownloadFailed, match=r"cannot be kept in .*file/cache: Not a directory\. Free some space"
        ):
            await fetch(platform.port, tmp_path / "file" / "cache")


async def test_a_cancelled_transfer_leaves_what_came(tmp_path: Path) -> None:
    async with serving() as platform, BadNetwork("127.0.0.1", platform.port) as net:
        net.throttle(1_000_000)
        with anyio.move_on_after(0.8):
            await fetch(net.port, tmp_path)
        had = (tmp_path / f"{SHA}.job-1.part").stat().st_size
        assert 0 < had < len(DATA)
        net.heal()
        assert (await fetch(net.port, tmp_path)).read_bytes() == DATA
    assert platform.ranges[-1] == f"bytes={had}-"


async def test_without_a_token_what_is_here_will_do(tmp_path: Path) -> None:
    async with serving() as platform:
        with pytest.raises(DownloadFailed, match="no token to fetch it with any more; retry the job"):
            await fetch(platform.port, tmp_path, token="")
        assert not platform.ranges
        there = await fetch(platform.port, tmp_path)
        assert await fetch(platform.port, tmp_path, token="") == there
