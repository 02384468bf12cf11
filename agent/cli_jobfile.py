"""A job's file, as users export it from the platform: YAML or JSON, raw or normalised. Prints nothing."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import msgspec

from agent.errors import BadJob

MAX_SIZE = 4 * 1024 * 1024


class JobFile(msgspec.Struct, frozen=True, kw_only=True):
    """What a file says of a job. ``job_id`` is empty unless the file names one."""

    config: dict[str, Any]
    dataset_path: str = ""
    name: str = ""
    job_id: str = ""


def read(path: Path) -> JobFile:
    """Return the job in ``path``: a TrainingConfig, or an object that holds one under `config`."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadJob(f"cannot read {path}: {error}") from error
    if len(text) > MAX_SIZE:
        raise BadJob(f"{path} is larger than {MAX_SIZE} bytes, which no job is")
    tree = _yaml(path, text) if path.suffix.lower() in (".yaml", ".yml") else _json(path, text)
    if not isinstance(tree, dict):
        raise BadJob(f"{path}: expected an object with `model` and `training`, found {type(tree).__name__}")
    config = next((tree[key] for key in ("config", "config_json") if isinstance(tree.get(key), dict)), None)
    if config is None:
        return JobFile(config=tree, dataset_path=str(tree.get("dataset_path") or ""))
    # Of a row of the platform, `id` is the configuration's, not a job's.
    return JobFile(
        config=config,
        dataset_path=str(tree.get("dataset_path") or config.get("dataset_path") or ""),
        name=str(tree.get("name") or ""),
        job_id=str(tree.get("job_id") or ""),
    )


def stable_id(path: Path, job: JobFile, data: str) -> str:
    """Return an id that the same file with the same content gives again, so that it resumes."""
    content = json.dumps(
        [str(path.resolve()), job.config, job.dataset_path, data], sort_keys=True, default=str
    )
    stem = re.sub(r"[^A-Za-z0-9]+", "-", path.stem).strip("-").lower()[:40] or "job"
    return f"{stem}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def _json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise BadJob(f"{path} is not JSON: {error}") from error
    except RecursionError:
        raise BadJob(f"{path} is nested too deeply") from None


def _yaml(path: Path, text: str) -> Any:
    # Needed for YAML jobs alone, and slow to import.
    import yaml

    try:
        return yaml.load(text, Loader=_loader())  # noqa: S506 - a SafeLoader, made below
    except yaml.YAMLError as error:
        raise BadJob(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise BadJob(f"{path} is nested too deeply") from None


def _loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads 2e-4 as a number and `no` as a word, as users mean them; YAML 1.1 has it the other way."""

        yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own attribute, replaced
            first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
    )
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
        list("-+.0123456789"),
    )
    return Loader
