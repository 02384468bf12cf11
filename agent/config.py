"""Settings: read once, frozen, documented under each field. The only file that reads the environment.

Where a value comes from, strongest first: the command line, the real environment, the `.env`
file, the default. An empty value counts as not set. Loading makes no folders and opens nothing
but the `.env` file and API_KEY_FILE.
"""

import ast
import difflib
import inspect
import os
import stat
import sys
import textwrap
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from agent.errors import BadSetting
from agent.setting_values import HOSTED, Secret, allowed, check_url, is_loopback, parse, secret

__all__ = ["NAMES", "Secret", "Settings", "load", "load_for_program"]

Steps = Annotated[int, Meta(ge=1, le=1_000_000)]
Seconds = Annotated[float, Meta(ge=0.1, le=86_400)]
Device = Annotated[str, Meta(pattern=r"^([0-9]{1,3}|(GPU|MIG)-[A-Za-z0-9/-]{1,80}|cpu)$")]
VariableName = Annotated[str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}$")]


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything an operator can set. Made by `load`; a setting's name is its field's in capitals."""

    backend_url: str = HOSTED
    """Address of the backend to dial; `none` runs the agent without one."""
    api_key: Secret | None = None
    """The agent's key (wak_...), from the backend. Stays in the agent's process; never given to a job."""
    api_key_file: Path | None = None
    """A file that holds the key, in place of API_KEY (a container's secret, a 0600 file)."""
    backend_transport: Literal["auto", "websocket", "poll"] = "auto"
    """How the backend is reached: `auto` dials the WebSocket, and polls by REST where there is none to be had."""
    poll_interval_seconds: Annotated[float, Meta(ge=1, le=60)] = 10.0
    """Seconds between polls where there is no WebSocket; the backend may ask for more."""
    agent_id: Annotated[str, Meta(pattern=r"^agent_[A-Za-z0-9_-]{4,64}$")] | None = None
    """Name of this agent at the backend; made once and kept in AGENT_HOME unless given."""
    agent_home: Path
    """The agent's own state: journal, key to the local API, log. One agent at a time holds it."""
    host: str = "127.0.0.1"
    """Address that the local API listens on; beyond loopback every call needs the token."""
    port: Annotated[int, Meta(ge=0, le=65_535)] = 8000
    """Port of the local API; 0 takes a free one."""
    local_api: bool = True
    """Whether the local API (health check, command line, Prometheus) is there at all."""
    local_api_open: bool = False
    """Lift the local API's token; only where HOST is loopback."""
    models_dir: Path
    """Local base models lie here, and final models are written to MODELS_DIR/{job_id}/."""
    datasets_dir: Path
    """Local data sets lie here; a job can read no file outside it."""
    dataset_map: tuple[str, ...] = ()
    """Files for data sets that stay at the platform, as `ITS_PATH=FILE` with commas between."""
    dataset_hosts: tuple[str, ...] = ()
    """Hosts, besides the backend's, that a job's data set may be fetched from when its path is a URL."""
    dataset_max_mb: Annotated[int, Meta(ge=1, le=10_000_000)] = 10_000
    """The largest data set that is fetched."""
    checkpoints_dir: Path
    """Checkpoints, in CHECKPOINTS_DIR/{job_id}/."""
    logs_dir: Path
    """Logs of jobs, LOGS_DIR/{job_id}.log."""
    gpu_memory_fraction: Annotated[float, Meta(gt=0, le=1)] = 1.0
    """Share of a GPU's memory that a job may take; the job cannot raise it."""
    enable_mixed_precision: bool = True
    """Whether jobs may compute in bfloat16 or float16; `false` makes every job compute in float32."""
    max_concurrent_jobs: Annotated[int, Meta(ge=1, le=16)] = 1
    """How many jobs may run at once, a device each; the rest wait in order."""
    checkpoint_interval_steps: Steps = 500
    """Optimizer steps between checkpoints, for a job that names none (`save_steps`)."""
    metrics_report_interval_steps: Steps = 10
    """Optimizer steps between points of the curve, for a job that names none (`logging_steps`)."""
    gpu_monitoring_interval_seconds: Seconds = 5.0
    """Seconds between figures of GPU, CPU, memory, disk and network."""
    heartbeat_interval_seconds: Seconds = 15.0
    """Seconds between heartbeats; the link counts as dead after 2.5 of them without a byte."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """How much the agent says on its standard error and in AGENT_HOME/agent.log."""
    log_json: bool = False
    """Write the agent's log file as one JSON object a line."""
    allow_plain_http: bool = False
    """Allow http:// and ws:// to a backend that is not this machine; the key then travels in the clear."""
    warm_trainer: bool = False
    """Keep a trainer with its imports done, so that a job starts at once (about 500 MB of memory)."""
    allow_remote_code: tuple[str, ...] = ()
    """Models whose own Python code may run here (`trust_remote_code`), by name; all others are refused."""
    allow_hub: bool = True
    """Whether models and data sets may be fetched from the Hugging Face Hub."""
    pass_to_trainer: tuple[VariableName, ...] = ()
    """Environment variables that trainers may see, such as HF_TOKEN; they see no others of yours."""
    share_logs: bool = True
    """Whether the log lines of jobs are sent to the backend."""
    share_hostname: bool = True
    """Whether this machine's name is sent to the backend."""
    stop_grace_seconds: Annotated[float, Meta(ge=1, le=86_400)] = 120.0
    """How long a stopping agent waits for trainers to save before it kills them."""
    outbox_max_mb: Annotated[int, Meta(ge=1, le=1_000_000)] = 512
    """Disk for records that the backend has not yet acknowledged; past it points are merged by tens of seconds, and log lines stay here."""
    trainer_threads: Annotated[int, Meta(ge=0, le=1024)] = 0
    """CPU threads of a trainer; 0 takes OMP_NUM_THREADS, else all cores but one where a job trains on the CPU."""
    devices: tuple[Device, ...] = ()
    """GPUs that jobs may use, by number or UUID, such as `0,1`; `cpu` for none; empty for all."""
    host_memory_reserve_mb: Annotated[int, Meta(ge=0, le=1_000_000)] = 512
    """Memory of the machine that stays free: with less left, the job that fills it is paused; 0 for no such watch."""
    stall_factor: Annotated[float, Meta(ge=0, le=100_000)] = 20.0
    """A trainer that makes no step in so many times the usual while is ended and started again; 0 for never."""
    stall_min_seconds: Annotated[float, Meta(ge=1, le=86_400)] = 300.0
    """The least while that counts as standing still, however quick the steps are."""
    verify_resume: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    """After a resume, replay the last so many steps before it in a process beside, and say whether they are equal."""
    background_saves: bool = True
    """Periodic checkpoints are copied to memory and written while training goes on, where memory suffices."""
    compress_checkpoints: bool = False
    """Checkpoints are compressed without loss: 15 to 30 % smaller, slower to write, and of no use to other programs."""
    bad_key_sleep: Annotated[float, Meta(ge=0, le=86_400)] = 0.0
    """Seconds to wait before leaving when the backend refuses the key, so that restarts do not hammer it."""
    trainer_environment: dict[str, Secret] = {}
    """The values of PASS_TO_TRAINER. Not a setting of its own."""


NOT_SET_BY_NAME = frozenset({"trainer_environment"})
FOLDERS = {
    "models_dir": "models",
    "datasets_dir": "datasets",
    "checkpoints_dir": "checkpoints",
    "logs_dir": "logs",
}
"""Folders that lie under AGENT_HOME unless they are given."""
NAMES = tuple(name.upper() for name in Settings.__struct_fields__ if name not in NOT_SET_BY_NAME)
_HINTS: dict[str, Any] = Settings.__annotations__


def ignore(_: str) -> None:
    """Take a warning and do nothing with it."""


def load(
    environ: Mapping[str, str],
    dotenv: Path | None = None,
    overrides: Mapping[str, str] | None = None,
    warn: Callable[[str], None] = ignore,
) -> Settings:
    """Return the settings; raises BadSetting with name, value and what is allowed.

    ``overrides`` (names in capitals) come from the command line. ``warn`` takes the sentences on
    names in the environment that look like slips: others' names live there too.
    """
    from_file = _read_dotenv(dotenv) if dotenv is not None else {}
    sources = [
        (dict(overrides or {}), "command line"),
        (dict(environ), "environment"),
        (from_file, str(dotenv)),
    ]
    found: dict[str, tuple[str, int]] = {}
    for rank, (values, _) in enumerate(sources):
        for name in NAMES:
            if values.get(name, "").strip() and name not in found:
                found[name] = (values[name].strip(), rank)
    parsed: dict[str, Any] = {}
    for name, (text, rank) in found.items():
        parsed[name.lower()] = parse(name, text, _HINTS[name.lower()], sources[rank][1])

    passed = parsed.get("pass_to_trainer", ())
    _check_dotenv_names(from_file, passed, dotenv, warn)
    _warn_of_slips(environ, warn)
    _one_key(found, parsed, warn)
    home = parsed.setdefault("agent_home", _data_folder(environ))
    for field, folder in FOLDERS.items():
        parsed.setdefault(field, home / folder)
    merged = {**from_file, **environ}
    parsed["trainer_environment"] = {
        name: Secret(merged[name]) for name in passed if merged.get(name, "") != ""
    }
    settings = Settings(**parsed)
    _check_mixes(settings)
    return settings


def load_for_program(
    env_file: Path | None = None,
    overrides: Mapping[str, str] | None = None,
    warn: Callable[[str], None] = ignore,
) -> Settings:
    """Return the settings of this process: `load` with the real environment and the first `.env` there is."""
    environ = dict(os.environ)
    return load(environ, env_file or find_dotenv(environ, overrides or {}, Path.cwd()), overrides, warn)


def environment() -> dict[str, str]:
    """Return a copy of this process's environment, for the command line to build a child's from."""
    return dict(os.environ)


def cut_own(cut: Callable[[MutableMapping[str, str]], None]) -> dict[str, str]:
    """Cut this process's own environment down with ``cut``, and return a copy of what is left."""
    cut(os.environ)
    return dict(os.environ)


def find_dotenv(environ: Mapping[str, str], overrides: Mapping[str, str], folder: Path) -> Path | None:
    """Return AGENT_HOME/.env, else ``folder``/.env, else None."""
    given = overrides.get("AGENT_HOME") or environ.get("AGENT_HOME", "").strip()
    home = Path(given).expanduser() if given else _data_folder(environ)
    return next((path for path in (home / ".env", folder / ".env") if path.is_file()), None)


def dialable(settings: Settings) -> None:
    """Raise BadSetting unless there is a key for the backend, or no backend is wanted."""
    if settings.backend_url and settings.api_key is None:
        raise BadSetting(
            "API_KEY",
            f"is not set. Make a key with scope `training` at {settings.backend_url} and give it here or in "
            "API_KEY_FILE, or set BACKEND_URL=none to run without a backend.",
        )


def documented() -> dict[str, tuple[str, str, str]]:
    """Return for each setting: its default, what is allowed, and its sentence."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(Settings))).body[0]
    assert isinstance(tree, ast.ClassDef)
    sentences: dict[str, str] = {}
    for field, after in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
            assert isinstance(field.target, ast.Name) and isinstance(after.value, ast.Constant)
            sentences[field.target.id.upper()] = str(after.value.value)
    defaults = dict(zip(Settings.__struct_fields__[::-1], Settings.__struct_defaults__[::-1], strict=False))
    return {
        name: (
            _default_text(name.lower(), defaults),
            allowed(name.lower(), _HINTS[name.lower()]),
            sentences[name],
        )
        for name in NAMES
    }


def settings_table() -> str:
    """Return the table of the README."""
    rows = [
        f"| `{name}` | {f'`{default}`' if default else ''} | {allowed} | {sentence} |"
        for name, (default, allowed, sentence) in documented().items()
    ]
    return "\n".join(["| name | default | allowed | what it does |", "|---|---|---|---|", *rows]) + "\n"


def example() -> str:
    """Return the text of `.env.example`."""
    head = (
        "# Settings of the training agent. Copy to .env beside it or in AGENT_HOME and uncomment what you need.\n"
        "# The real environment goes before this file; an empty value counts as not set.\n"
    )
    parts = [
        f"\n# {sentence}\n# Allowed: {allowed}.\n# {name}={default}\n"
        for name, (default, allowed, sentence) in documented().items()
    ]
    return head + "".join(parts)


def _default_text(field: str, defaults: Mapping[str, Any]) -> str:
    if field == "agent_home":
        return "~/.local/share/finetunelab-agent"
    if field in FOLDERS:
        return f"AGENT_HOME/{FOLDERS[field]}"
    value = defaults[field]
    if value is None or value == ():
        return ""
    return (
        str(value).lower()
        if isinstance(value, bool)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def _read_dotenv(path: Path) -> dict[str, str]:
    # Start-up cost: most agents in containers have no such file.
    import dotenv as dotenv_files

    try:
        # No interpolation: a key may hold a dollar sign.
        with path.open(encoding="utf-8") as stream:
            found = dotenv_files.dotenv_values(stream=stream, interpolate=False)
    except (OSError, UnicodeDecodeError) as error:
        raise BadSetting("--env-file", f"cannot read {path}: {error}") from error
    return {name: value or "" for name, value in found.items()}


def _check_dotenv_names(
    values: Mapping[str, str], passed: tuple[str, ...], path: Path | None, warn: Callable[[str], None]
) -> None:
    for name in values:
        if name in NAMES or name in passed:
            continue
        near = _near(name)
        if near is not None:
            raise BadSetting(name, f"is no setting of the agent; did you mean {near}?", str(path))
        # A `.env` may serve several programs, so a name that is nothing like ours is not an error.
        warn(f"{name} in {path} is no setting of the agent; trainers see it only if PASS_TO_TRAINER names it")


def _warn_of_slips(environ: Mapping[str, str], warn: Callable[[str], None]) -> None:
    for name in environ:
        near = _near(name) if name not in NAMES and len(name) > 4 else None
        if near is not None and near not in environ:
            warn(f"{name} in the environment is no setting of the agent; did you mean {near}?")


def _near(name: str) -> str | None:
    return next(iter(difflib.get_close_matches(name.upper(), NAMES, n=1, cutoff=0.85)), None)


def _one_key(
    found: Mapping[str, tuple[str, int]], parsed: dict[str, Any], warn: Callable[[str], None]
) -> None:
    """Settle API_KEY against API_KEY_FILE: the stronger source wins, and the same source cannot give both."""
    if "API_KEY_FILE" not in found:
        return
    if "API_KEY" in found:
        key_rank, file_rank = found["API_KEY"][1], found["API_KEY_FILE"][1]
        if key_rank == file_rank:
            raise BadSetting("API_KEY", "is given twice: as API_KEY and as API_KEY_FILE; keep one of them")
        if key_rank < file_rank:
            return
    path: Path = parsed["api_key_file"]
    try:
        mode = path.stat().st_mode
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BadSetting("API_KEY_FILE", f"cannot read {path}: {error}") from error
    if not text:
        raise BadSetting("API_KEY_FILE", f"{path} is empty")
    if os.name == "posix" and stat.S_IMODE(mode) & 0o077:
        warn(f"{path} holds the API key and others on this machine can read it; `chmod 600` it")
    parsed["api_key"] = secret("API_KEY_FILE", text, str(path))


def _check_mixes(settings: Settings) -> None:
    if settings.backend_url:
        check_url(settings.backend_url, settings.allow_plain_http)
    if settings.local_api_open and not is_loopback(settings.host):
        raise BadSetting(
            "LOCAL_API_OPEN",
            f"true is refused while HOST is {settings.host}: anybody on the network could steer the agent. "
            "Set HOST=127.0.0.1 or leave the token on",
        )
    ours = {"API_KEY", "API_KEY_FILE"} & set(settings.pass_to_trainer)
    if ours:
        raise BadSetting("PASS_TO_TRAINER", f"{min(ours)} is the agent's own and is never given to a trainer")


def _data_folder(environ: Mapping[str, str]) -> Path:
    """Return the default AGENT_HOME: a folder of this user's data."""
    try:
        home = Path(environ["HOME"]) if environ.get("HOME") else Path.home()
    except RuntimeError as error:
        raise BadSetting(
            "AGENT_HOME", "this user has no home folder; say where the agent keeps its state"
        ) from error
    if sys.platform == "darwin":
        base = home / "Library" / "Application Support"
    elif sys.platform == "win32":
        base = Path(environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    else:
        base = Path(environ.get("XDG_DATA_HOME") or home / ".local" / "share")
    return base / "finetunelab-agent"
