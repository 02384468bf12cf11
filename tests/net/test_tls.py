"""The backend's certificate, against a real TLS server: what does not verify is given no key, and the owner is told."""

import re
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
import trustme
from websockets.asyncio.server import ServerConnection, serve
from websockets.http11 import Request, Response
from websockets.typing import Subprotocol

import agent.net.websocket
from agent.net.client import RestClient, Unreached
from agent.net.retry import TLS_RETRY, backoff
from agent.net.websocket import Link
from protocol.messages import CONNECT_PATH, SUBPROTOCOLS
from tests.net.backend import DEADLINE, KEY, Backend, Records, is_connected, running
from tests.support.programs import Agent

pytestmark = pytest.mark.anyio

HOST = "127.0.0.2"
"""This machine, but not one of the names whose requests are kept from all that the environment says."""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def trusted(authority: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner trusts it, as one who has a company's authority does."""
    authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))


def shows(certificate: trustme.LeafCert, context: ssl.SSLContext | None = None) -> ssl.SSLContext:
    """Have a server show a certificate from now on."""
    context = context or ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    return context


@asynccontextmanager
async def serving(backend: Backend, context: ssl.SSLContext, host: str = HOST) -> AsyncIterator[None]:
    """Serve ``backend`` over TLS, and an empty object on every other path."""

    def answer(socket: ServerConnection, request: Request) -> Response | None:
        backend.requests.append(request)
        return None if request.path == CONNECT_PATH else socket.respond(200, "{}")

    offered = [Subprotocol(name) for name in SUBPROTOCOLS]
    async with serve(
        backend.converse, host, 0, ssl=context, process_request=answer, subprotocols=offered
    ) as server:
        backend.port = server.sockets[0].getsockname()[1]
        yield


def link_to(backend: Backend) -> Link:
    """Return a link whose states are kept."""
    states: list[tuple[str, str]] = []

    def note(state: str, detail: str) -> None:
        states.append((state, detail))
        backend.changed.set()

    link = Link(
        Records(),
        backend_url=f"https://{HOST}:{backend.port}",
        key=lambda: KEY,
        agent_id="agent_0123456789abcdef",
        heartbeat=15.0,
        on_state=note,
        user_agent="test/1",
    )
    link.states = states  # type: ignore[attr-defined]
    return link


def last_words(link: Link) -> str:
    states: list[tuple[str, str]] = link.states  # type: ignore[attr-defined]
    return " ".join(states[-1]) if states else ""


async def ask(backend: Backend, host: str = HOST) -> dict[str, object]:
    rest = RestClient(f"https://{host}:{backend.port}", key=lambda: KEY, agent_id="a", user_agent="test/1")
    try:
        return await rest.get("/any")
    finally:
        await rest.close()


async def refuses(backend: Backend, why: str) -> None:
    """See that neither the socket nor a request gets as far as to name the key, and that both say why."""
    link = link_to(backend)
    async with running(link):
        await backend.until(lambda: "dialling again" in last_words(link))
        assert last_words(link).startswith("connecting ") and why in last_words(link)
        assert link.dial_due - time.monotonic() > TLS_RETRY - 60
    with pytest.raises(Unreached, match=why):
        await ask(backend)
    assert not backend.requests and not backend.hellos


async def test_a_certificate_of_an_unknown_authority_is_given_no_key(authority: trustme.CA) -> None:
    backend = Backend()
    async with serving(backend, shows(authority.issue_cert(HOST))):
        await refuses(backend, "certificate verify failed")


@pytest.mark.usefixtures("trusted")
async def test_a_certificate_of_another_host_is_given_no_key(authority: trustme.CA) -> None:
    backend = Backend()
    async with serving(backend, shows(authority.issue_cert("127.0.0.3", "elsewhere.example"))):
        await refuses(backend, f"certificate is not valid for '{HOST}'")


@pytest.mark.usefixtures("trusted")
async def test_a_certificate_that_has_expired_is_given_no_key(authority: trustme.CA) -> None:
    backend = Backend()
    yesterday = datetime.now(UTC) - timedelta(days=1)
    async with serving(backend, shows(authority.issue_cert(HOST, not_after=yesterday))):
        await refuses(backend, "certificate has expired")


@pytest.mark.usefixtures("trusted")
async def test_a_certificate_of_an_authority_that_the_owner_trusts_will_do(authority: trustme.CA) -> None:
    backend = Backend()
    async with serving(backend, shows(authority.issue_cert(HOST))):
        link = link_to(backend)
        async with running(link):
            await backend.until(lambda: is_connected(link))
        assert link.url.startswith("wss://")
        assert await ask(backend) == {"http_status": 200}
    assert [request.headers["Authorization"] for request in backend.requests] == [f"Bearer {KEY}"] * 2


@pytest.mark.usefixtures("trusted")
async def test_a_backend_on_this_machine_is_judged_by_the_same_authorities(authority: trustme.CA) -> None:
    backend, here = Backend(), "127.0.0.1"
    async with serving(backend, shows(authority.issue_cert(here)), here):
        assert await ask(backend, here) == {"http_status": 200}


@pytest.mark.usefixtures("trusted")
async def test_once_the_certificate_is_renewed_the_agent_is_back_by_itself(
    authority: trustme.CA, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent.net.websocket, "TLS_RETRY", 0.05)
    monkeypatch.setattr(agent.net.websocket, "backoff", lambda: backoff(0.05, 0.2))
    backend = Backend()
    yesterday = datetime.now(UTC) - timedelta(days=1)
    context = shows(authority.issue_cert(HOST, not_after=yesterday))
    async with serving(backend, context):
        link = link_to(backend)
        async with running(link):
            await backend.until(lambda: "has expired" in last_words(link))
            assert not backend.requests
            shows(authority.issue_cert(HOST), context)
            await backend.until(lambda: is_connected(link))


async def test_the_owner_is_told_and_the_agent_stays_until_the_authority_is_trusted(
    authority: trustme.CA, tmp_path: Path
) -> None:
    backend, home = Backend(), tmp_path / "agent"
    authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
    async with serving(backend, shows(authority.issue_cert(HOST))):
        url = f"https://{HOST}:{backend.port}"
        program = Agent(home, url, NO_PROXY="*").start()
        try:
            said = f"the certificate of wss://{HOST}:{backend.port}{CONNECT_PATH} does not verify"
            await wait_for(lambda: said in program.output)
            await wait_for(lambda: re.search(r"dialling again in 3\d\d\.", program.output) is not None)
            assert not backend.requests
        finally:
            code = await anyio.to_thread.run_sync(program.stop)
        assert code == 0, program.output
        program = Agent(home, url, NO_PROXY="*", SSL_CERT_FILE=str(tmp_path / "authority.pem")).start()
        try:
            await backend.until(lambda: bool(backend.hellos))
        finally:
            code = await anyio.to_thread.run_sync(program.stop)
        assert code == 0, program.output


async def wait_for(reached: Callable[[], bool]) -> None:
    with anyio.fail_after(4 * DEADLINE):
        while not reached():  # noqa: ASYNC110  a file is looked at
            await anyio.sleep(0.05)
