"""Where a data set of the platform is looked for, and where it is not fetched from."""

import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import anyio
import pytest

from agent.config import Settings, load
from agent.net.datasets import find_dataset, kept_name
from agent.net.download import DownloadFailed

STORED = "0b1c/private/2d3e.jsonl.gz"
ROWS = gzip.compress(b'{"text": "one"}\n' * 50)


class _Files(BaseHTTPRequestHandler):
    asked: ClassVar[list[str]] = []
    port = 0

    def do_GET(self) -> None:  # the library's name
        self.asked.append(self.path)
        path = self.path.partition("?")[0]
        status, body = 200, ROWS
        if path.endswith("/public/p1/dataset"):
            body = f'{{"download_url": "http://127.0.0.1:{self.port}/signed?key=s3cret"}}'.encode()
        elif path == "/flaky" and self.asked.count(self.path) == 1:
            status, body = 503, b""
        elif path == "/big":
            body = bytes(1_000_001)
        elif path == "/gone":
            status, body = 403, b"expired"
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def files() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), _Files) as server:
        _Files.port = server.server_port
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def settings(folder: Path, **more: str) -> Settings:
    given = {"AGENT_HOME": str(folder), "API_KEY": "wak_1", "HOME": str(folder), **more}
    made = load(given)
    made.datasets_dir.mkdir(parents=True, exist_ok=True)
    return made


def found(given: str, made: Settings) -> str | None:
    return anyio.run(find_dataset, given, "job", made, "test")


def test_an_ordinary_path_or_name_is_left_to_the_usual_rules(tmp_path: Path) -> None:
    made = settings(tmp_path)
    assert found("chat.jsonl", made) is None and found("owner/name", made) is None
    whole = made.datasets_dir / STORED
    whole.parent.mkdir(parents=True)
    whole.write_bytes(ROWS)
    assert found(STORED, made) is None


def test_the_owners_files_stand_for_what_the_platform_stores(tmp_path: Path) -> None:
    made = settings(tmp_path, DATASET_MAP=f"{STORED}=mine/chat.jsonl, other/private/x.jsonl=/no/such")
    with pytest.raises(DownloadFailed, match=r"there is no such file"):
        found(STORED, made)
    mine = made.datasets_dir / "mine" / "chat.jsonl"
    mine.parent.mkdir()
    mine.write_text('{"text": "a"}\n')
    assert found(STORED, made) == str(mine)
    made = settings(tmp_path)
    with pytest.raises(
        DownloadFailed, match=r"put it into .* as 2d3e\.jsonl\.gz, or name your file in DATASET_MAP"
    ):
        found(STORED, made)
    (made.datasets_dir / "2d3e.jsonl").write_text("{}\n")
    assert found(STORED, made) == str(made.datasets_dir / "2d3e.jsonl")


def test_a_url_is_fetched_once_from_a_host_that_somebody_named(tmp_path: Path, files: str) -> None:
    made = settings(tmp_path, BACKEND_URL=files)
    path = found(f"{files}/flaky?key=1", made)
    assert path == str(made.datasets_dir / ".fetched" / kept_name("job"))
    assert Path(path).read_bytes() == ROWS and _Files.asked.count("/flaky?key=1") == 2
    # A signed address serves only for a while: a resumed job has its rows.
    assert found(f"{files}/flaky?key=2", made) == path and "/flaky?key=2" not in _Files.asked
    Path(path).unlink()
    assert found(f"{files}/api/training/public/p1/dataset", made) == path
    assert "/signed?key=s3cret" in _Files.asked


def test_other_hosts_plain_addresses_and_too_many_bytes_are_refused(tmp_path: Path, files: str) -> None:
    made = settings(tmp_path)
    for url, said in (
        (f"{files}/rows", "Add the host to DATASET_HOSTS"),
        ("https://u:p@app.finetunelab.ai/rows", "DATASET_HOSTS"),
        ("http://app.finetunelab.ai/rows", "must be https://"),
    ):
        with pytest.raises(DownloadFailed, match=said):
            found(url, made)
    made = settings(tmp_path, DATASET_HOSTS="127.0.0.1")
    with pytest.raises(DownloadFailed, match=r"HTTP 403.*may have expired") as refused:
        found(f"{files}/gone?key=s3cret", made)
    assert "s3cret" not in str(refused.value)
    small = settings(tmp_path, DATASET_HOSTS="127.0.0.1", DATASET_MAX_MB="1")
    with pytest.raises(DownloadFailed, match=r"more than 1 MB; raise DATASET_MAX_MB"):
        found(f"{files}/big", small)
    assert found(f"{files}/rows", small) is not None
