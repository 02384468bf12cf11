"""What the command line asks over HTTP: this machine's agent, or a backend. Prints nothing."""

import re
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import httpx

from agent.config import Settings
from agent.errors import AgentError, BadJob, Exit, KeyRefused, NotPossible, Unreachable
from agent.local import ADDRESS_FILE, TOKEN_FILE
from agent.setting_values import check_url, is_loopback
from protocol import rest

TIMEOUT = 30.0
Json = dict[str, Any]
_SAFE_ID = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$")


class Door(Protocol):
    """Where jobs can be seen and steered."""

    def health(self) -> Json: ...

    def jobs(self) -> list[Json]: ...

    def status(self, job_id: str) -> Json: ...

    def logs(self, job_id: str, limit: int, offset: int) -> Json: ...

    def act(self, job_id: str, action: str, checkpoint: str, accept_changes: bool) -> Json: ...

    def branch(self, job_id: str, body: Json) -> Json: ...

    def checkpoints(self, job_id: str) -> Json: ...

    def pin(self, job_id: str, checkpoint: str, pinned: bool) -> Json: ...

    def close(self) -> None: ...


class _Http:
    """One address with one key, and answers turned into errors of ours."""

    def __init__(self, url: str, key: str, absent: str) -> None:
        self._absent = absent
        self._client = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=TIMEOUT,
            # The system's authorities, as the agent has them, and not a list that httpx brings.
            verify=ssl.create_default_context(),
            # A proxy must not be asked for what is on this machine.
            trust_env=not is_loopback(urlsplit(url).hostname or ""),
        )

    def close(self) -> None:
        self._client.close()

    def ask(self, method: str, path: str, **more: Any) -> Json:
        try:
            answer = self._client.request(method, path, **more)
        except httpx.TransportError as error:
            raise Unreachable(f"{self._absent} ({error or type(error).__name__})") from error
        try:
            body = answer.json()
        except ValueError:
            body = None
        if answer.is_success and isinstance(body, dict):
            return body
        said = body if isinstance(body, dict) else {}
        sentence = str(said.get("error") or said.get("message") or said.get("detail") or "")
        where = f"{self._client.base_url.host} answered {answer.status_code}"
        raise _KINDS.get(answer.status_code, AgentError)(
            sentence or f"{where}, which is no answer of ours. Check the address."
        )


class _NoSuch(AgentError):
    """The other side knows no such job, and its sentence says so."""

    exit_code = Exit.UNKNOWN_JOB


_KINDS: dict[int, type[AgentError]] = {
    400: BadJob,
    401: KeyRefused,
    403: KeyRefused,
    404: _NoSuch,
    409: NotPossible,
    413: BadJob,
    422: BadJob,
}


class Local:
    """The agent of this AGENT_HOME, by its local API."""

    def __init__(self, settings: Settings) -> None:
        try:
            url = (settings.agent_home / ADDRESS_FILE).read_text(encoding="ascii").strip()
        except OSError:
            host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host  # noqa: S104 - compared
            url = f"http://[{host}]:{settings.port}" if ":" in host else f"http://{host}:{settings.port}"
        try:
            token = (settings.agent_home / TOKEN_FILE).read_text(encoding="ascii").strip()
        except OSError:
            token = ""
        self._http = _Http(
            url,
            token,
            f"No agent answers at {url}. Start one with `training-agent start`, or give --hub URL",
        )

    def close(self) -> None:
        self._http.close()

    def health(self) -> Json:
        return self._http.ask("GET", "/api/training/agent")

    def jobs(self) -> list[Json]:
        return list(self._http.ask("GET", "/api/training/jobs")["jobs"])

    def status(self, job_id: str) -> Json:
        return self._http.ask("GET", f"/api/training/status/{checked(job_id)}")

    def logs(self, job_id: str, limit: int, offset: int) -> Json:
        path = f"/api/training/logs/{checked(job_id)}"
        return self._http.ask("GET", path, params={"limit": limit, "offset": offset})

    def act(self, job_id: str, action: str, checkpoint: str, accept_changes: bool) -> Json:
        body = _wish(checkpoint, accept_changes)
        return self._http.ask("POST", f"/api/training/{action}/{checked(job_id)}", json=body)

    def branch(self, job_id: str, body: Json) -> Json:
        return self._http.ask("POST", f"/api/training/branch/{checked(job_id)}", json=body)

    def checkpoints(self, job_id: str) -> Json:
        return self._http.ask("GET", f"/api/training/checkpoints/{checked(job_id)}")

    def pin(self, job_id: str, checkpoint: str, pinned: bool) -> Json:
        body = {"checkpoint": checkpoint, "pinned": pinned}
        return self._http.ask("POST", f"/api/training/checkpoints/{checked(job_id)}", json=body)


class Hub:
    """A backend, by its REST routes and an API key."""

    def __init__(self, url: str, key: str, *, allow_plain_http: bool = False) -> None:
        check_url(url, allow_plain_http)
        self.url = url.rstrip("/")
        self._http = _Http(self.url, key, f"No backend answers at {self.url}")

    def close(self) -> None:
        self._http.close()

    def health(self) -> Json:
        return self._http.ask("GET", rest.AGENTS)

    def jobs(self) -> list[Json]:
        return list(self._http.ask("GET", rest.JOBS, params={"limit": 100})["jobs"])

    def status(self, job_id: str) -> Json:
        return self._http.ask("GET", rest.JOB.format(job_id=checked(job_id)) + "/status")

    def logs(self, job_id: str, limit: int, offset: int) -> Json:
        path = rest.JOB.format(job_id=checked(job_id)) + "/logs"
        return self._http.ask("GET", path, params={"limit": limit, "offset": offset})

    def act(self, job_id: str, action: str, checkpoint: str, accept_changes: bool) -> Json:
        body = {"action": action, **_wish(checkpoint, accept_changes)}
        return self._http.ask("POST", rest.JOB.format(job_id=checked(job_id)) + "/control", json=body)

    def branch(self, job_id: str, body: Json) -> Json:
        return self._http.ask("POST", rest.JOB.format(job_id=checked(job_id)) + "/branch", json=body)

    def checkpoints(self, job_id: str) -> Json:
        return self._http.ask("GET", rest.JOB.format(job_id=checked(job_id)) + "/checkpoints")

    def pin(self, job_id: str, checkpoint: str, pinned: bool) -> Json:
        raise NotPossible("Checkpoints lie on the agent's machine: pin them there, without --hub.")

    def submit(self, config: Mapping[str, Any], *, job_id: str, dataset_path: str, name: str) -> Json:
        """Hand in a job; the answer holds its ``job_id``."""
        body: Json = {"config": dict(config), "dataset_path": dataset_path, "status": "pending"}
        body |= {"job_id": job_id} if job_id else {}
        body |= {"name": name} if name else {}
        return self._http.ask("POST", rest.JOBS, json=body)

    def upload(self, path: Path) -> str:
        """Send a data set; return the path by which a job names it."""
        try:
            with path.open("rb") as stream:
                answer = self._http.ask(
                    "POST", rest.UPLOAD, files={"file": (path.name, stream)}, data={"name": path.stem}
                )
        except OSError as error:
            raise BadJob(f"cannot read {path}: {error.strerror or error}") from error
        return str(answer["storage_path"])


def _wish(checkpoint: str, accept_changes: bool) -> Json:
    wish: Json = {"checkpoint_path": checkpoint} if checkpoint else {}
    return wish | ({"accept_changes": True} if accept_changes else {})


def checked(job_id: str) -> str:
    """Return ``job_id`` if it can stand in an address."""
    if not _SAFE_ID.match(job_id):
        raise BadJob(f"{job_id!r} is no job id: letters, digits, `_`, `.` and `-`, at most 128.")
    return job_id
