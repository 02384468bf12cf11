"""The demo: a hub, an agent that dials it and a real fine-tune, all on this machine. Prints nothing.

It imports neither torch nor the hub: each part is a process of its own, started by name and
ended, by its id, when the demo leaves.
"""

import contextlib
import json
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
import webbrowser
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import msgspec

from agent.cli_remote import Hub, Json
from agent.config import NAMES, environment
from agent.demo_data import bring_data, bring_model
from agent.errors import AgentError, Exit, JobFailed

AGENT_ENDS_WITHIN = 90.0
"""Seconds that a stopped agent may take to save."""
LOOK_EVERY = 0.5
ENDED = ("completed", "failed", "cancelled")
INTERRUPTED = 130
OWN_MODEL = {"use_lora": True, "learning_rate": 2e-4, "batch_size": 1, "eval_batch_size": 1, "max_steps": 60}
"""What differs from the embedded training for a model of the user's own."""


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """What the user asked of the demo."""

    home: Path
    model: str = ""
    data: str = ""
    port: int = 0
    stay: bool = True
    """Keep hub and page up until Ctrl-C."""
    browser: bool = False


class News(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Something the demo has to tell."""

    text: str = ""
    page: str = ""
    job: Json = {}
    """The job's status at the hub."""
    result: Json = {}


class _Listens(msgspec.Struct):
    """What the hub says once it is up."""

    url: str


Tell = Callable[[News], None]


def run(wish: Wish, tell: Tell) -> int:
    """Run the demo to its end; return the exit code. Ctrl-C ends it and everything it started."""
    with _as_interrupt(signal.SIGTERM), contextlib.ExitStack() as stack:
        try:
            return _run(wish, tell, stack)
        except KeyboardInterrupt:
            tell(News(text="Stopping; what was started is ended."))
            return INTERRUPTED


def _run(wish: Wish, tell: Tell, stack: contextlib.ExitStack) -> int:
    wish.home.mkdir(parents=True, exist_ok=True)
    tell(News(text=f"Everything is kept in {wish.home}."))
    built = _build(wish, tell)
    key = _key(wish.home / "api_key")
    hub = _start_hub(wish, key, stack)
    page = hub.url + "/" if _has_page() else ""
    tell(News(text=f"Hub and page: {page or hub.url}  (API key {key})", page=page))
    if page and wish.browser:
        webbrowser.open(page)
    for old in hub.jobs():
        if old["status"] not in ENDED:
            hub.act(str(old["id"]), "cancel", "", False)
            tell(News(text=f"Job {old['id']} of an earlier demo is cancelled."))
    agent = _start(
        wish.home / "agent.log", ["agent", "start"], _agent_settings(wish.home, hub.url, key), wish.home
    )
    stack.callback(_end, agent, AGENT_ENDS_WITHIN)
    job_id = f"demo-{time.strftime('%Y%m%d-%H%M%S')}"
    hub.submit(job_config(built), job_id=job_id, dataset_path=built["data"], name="Demo")
    tell(News(text=f"Job {job_id}: {built['rows'] or '?'} rows, {_size(built['parameters'])} parameters."))
    job = _follow(hub, job_id, agent, wish.home, tell)
    if job["status"] != "completed":
        raise JobFailed(
            f"{job.get('error') or 'The job is ' + job['status'] + '.'} See {wish.home / 'logs'}."
        )
    result = summary(job)
    tell(News(text=_told(result), result=result))
    if wish.stay:
        tell(News(text=f"The page stays up at {page or hub.url}; Ctrl-C ends it."))
        with contextlib.suppress(KeyboardInterrupt):
            agent.wait()
    return Exit.OK


def job_config(built: Mapping[str, Any]) -> Json:
    """Return the job in the platform's shape."""
    samples = [{"prompt": built["prompt"], "answer": built["answer"]}] if built["prompt"] else []
    return {
        "model": {"name": built["model"]},
        "training": dict(built["training"]),
        "data": {"eval_split": built["eval_split"]},
        "seed": built["seed"],
        "samples": samples,
    }


def summary(job: Mapping[str, Any]) -> Json:
    """Return what the demo shows at the end."""
    results = job.get("results") or {}
    sample: Json = next(iter(job.get("samples") or []), {})
    return {
        "job_id": job["job_id"],
        "steps": job.get("current_step"),
        "held_out_loss_before": results.get("initial_eval_loss"),
        "held_out_loss_after": results.get("final_eval_loss"),
        "log_likelihood_before": sample.get("log_likelihood_before"),
        "log_likelihood_after": sample.get("log_likelihood_after"),
        "prompt": sample.get("prompt"),
        "answer_before": sample.get("before"),
        "answer_after": sample.get("after"),
        "model_path": job.get("model_path"),
        "weights_hash": job.get("weights_hash"),
    }


def _told(result: Json) -> str:
    lines = ["", f"Done after {result['steps']} steps."]
    before, after = result["held_out_loss_before"], result["held_out_loss_after"]
    if before and after is not None:
        lines.append(
            f"Held-out loss       {before:.4f} -> {after:.4f}  ({100 * (before - after) / before:.0f} % lower)"
        )
    before, after = result["log_likelihood_before"], result["log_likelihood_after"]
    if before is not None and after is not None:
        lines.append(f"A held-out answer   log-likelihood {before:.2f} -> {after:.2f}")
    if result["prompt"]:
        lines += [f"Asked               {_short(result['prompt'])}"]
        lines += [f"  before training   {_short(result['answer_before'])}"]
        lines += [f"  after training    {_short(result['answer_after'])}"]
    return "\n".join([*lines, f"Model               {result['model_path']}"])


def _short(value: Any, size: int = 240) -> str:
    shown = " ".join(str(value or "").split())
    return shown if len(shown) <= size else shown[:size] + " ..."


def _size(parameters: Any) -> str:
    return f"{parameters / 1e6:.1f} million" if isinstance(parameters, int) else "an unknown number of"


def _build(wish: Wish, tell: Tell) -> Json:
    """Build model and corpus, and put the user's own in their place."""
    tell(News(text="Building a small model and its corpus ..."))
    command = [sys.executable, "-m", "agent.trainer.demo", "--home", str(wish.home)]
    with (wish.home / "build.log").open("wb") as log:
        ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, check=False, cwd=wish.home)
    if ended.returncode != 0:
        raise AgentError(f"The demo's model could not be built; {wish.home / 'build.log'} says why.")
    built: Json = json.loads(ended.stdout.splitlines()[-1])
    if wish.data:
        built |= bring_data(wish.data, wish.home / "datasets")
    if wish.model:
        built |= bring_model(wish.model, wish.home / "models")
        built["training"] = {**built["training"], **OWN_MODEL}
    return built


def _key(path: Path) -> str:
    """Return the key of this home's hub, made the first time."""
    with contextlib.suppress(FileNotFoundError):
        return path.read_text(encoding="ascii").strip()
    key = f"wak_{secrets.token_hex(16)}"
    path.touch(mode=0o600)
    path.write_text(key + "\n", encoding="ascii")
    return key


def _has_page() -> bool:
    from importlib.util import find_spec

    return find_spec("nicegui") is not None


def _start_hub(wish: Wish, key: str, stack: contextlib.ExitStack) -> Hub:
    command = [
        "agent.hub",
        "--host",
        "127.0.0.1",
        "--port",
        str(wish.port),
        "--data-dir",
        str(wish.home / "hub"),
    ]
    command += ["--json", "--api-key", key] + ([] if _has_page() else ["--no-page"])
    log = wish.home / "hub.log"
    child = _start(log, command, {}, wish.home, read=True)
    stack.callback(_end, child, 10.0)
    assert child.stdout is not None
    for line in child.stdout:
        with contextlib.suppress(msgspec.DecodeError):
            url = msgspec.json.decode(line, type=_Listens).url
            # What else it prints must not fill the pipe.
            threading.Thread(target=_drain, args=(child.stdout, log), daemon=True).start()
            hub = Hub(url, key)
            stack.callback(hub.close)
            return hub
    child.wait()
    raise AgentError(f"The hub did not start: {_last_line(log)}")


def _drain(pipe: IO[bytes], log: Path) -> None:
    with log.open("ab") as output:
        shutil.copyfileobj(pipe, output)


def _agent_settings(home: Path, url: str, key: str) -> dict[str, str]:
    return {
        "BACKEND_URL": url,
        "API_KEY": key,
        "AGENT_HOME": str(home / "agent"),
        "MODELS_DIR": str(home / "models"),
        "DATASETS_DIR": str(home / "datasets"),
        "CHECKPOINTS_DIR": str(home / "checkpoints"),
        "LOGS_DIR": str(home / "logs"),
        "PORT": "0",
    }


def _start(
    log: Path, words: list[str], settings: Mapping[str, str], folder: Path, *, read: bool = False
) -> "subprocess.Popen[bytes]":
    # The user's own settings are for the user's own agent, not for this one.
    environ = {name: value for name, value in environment().items() if name not in NAMES}
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if read else output,
            stderr=output,
            env={**environ, **settings},
            cwd=folder,
            # Ctrl-C is for the demo alone: an agent takes a second signal for "leave now".
            start_new_session=True,
        )


def _end(child: "subprocess.Popen[bytes]", within: float) -> None:
    if child.poll() is not None:
        return
    child.terminate()
    try:
        child.wait(within)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _follow(hub: Hub, job_id: str, agent: "subprocess.Popen[bytes]", home: Path, tell: Tell) -> Json:
    """Tell how the job goes on until it ends; return it as the hub shows it."""
    while True:
        job = hub.status(job_id)
        tell(News(job=job))
        if job["status"] in ENDED:
            return job
        if agent.poll() is not None:
            raise AgentError(f"The agent ended with {agent.returncode}: {_last_line(home / 'agent.log')}")
        time.sleep(LOOK_EVERY)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"{lines[-1]} ({log})" if lines else f"it said nothing in {log}"


@contextlib.contextmanager
def _as_interrupt(number: signal.Signals) -> Iterator[None]:
    """Treat a signal as Ctrl-C, so that what was started is ended."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(number, interrupt)
    try:
        yield
    finally:
        signal.signal(number, before)
