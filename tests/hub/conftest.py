"""One hub for all tests of a file that do not kill it."""

from collections.abc import Iterator

import httpx
import pytest

from tests.hub.support import HubProcess


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubProcess]:
    with HubProcess(tmp_path_factory.mktemp("hub"), "--no-page") as process:
        yield process


@pytest.fixture
def client(hub: HubProcess) -> Iterator[httpx.Client]:
    with hub.client() as client:
        yield client
