"""The user's own model and data set, in the place of the demo's."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from agent.errors import BadJob


def bring_model(name: str, folder: Path) -> dict[str, Any]:
    """Return what changes for a model of the user's: a folder is brought under ``folder``, a Hub name stays."""
    source = Path(name).expanduser()
    if not source.exists():
        if "/" not in name.strip("/") or name.startswith((".", "/", "~")):
            raise BadJob(f"{name} is no folder here and no name on the Hugging Face Hub (owner/name)")
        return {"model": name, "parameters": None}
    if not (source / "config.json").is_file():
        raise BadJob(f"{source} is no model folder: it holds no config.json")
    target = folder / source.resolve().name
    for path in sorted(source.rglob("*")):
        if path.is_file():
            _bring(path.resolve(), target / path.relative_to(source))
    return {"model": str(target), "parameters": None}


def bring_data(name: str, folder: Path) -> dict[str, Any]:
    """Return what changes for a data set of the user's. The last row of a JSONL file is kept back as the sample."""
    source = Path(name).expanduser()
    if not source.exists():
        if "/" not in name.strip("/") or name.startswith((".", "/", "~")):
            raise BadJob(f"{name} is no file here and no name on the Hugging Face Hub (owner/name)")
        return {"data": name, "rows": None, "prompt": "", "answer": ""}
    target = folder / f"own-{source.name}"
    folder.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
        return {"data": str(target), "rows": None, "prompt": "", "answer": ""}
    if source.suffix != ".jsonl":
        shutil.copyfile(source, target)
        return {"data": str(target), "rows": None, "prompt": "", "answer": ""}
    try:
        rows = [line for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise BadJob(f"{source} is not UTF-8 text: {error}") from error
    prompt, answer = _sample(rows[-1]) if len(rows) > 1 else ("", "")
    kept = rows[:-1] if prompt else rows
    target.write_text("".join(row + "\n" for row in kept), encoding="utf-8")
    return {"data": str(target), "rows": len(kept), "prompt": prompt, "answer": answer}


def _sample(line: str) -> tuple[str, str]:
    """Return prompt and answer of a row, or empty ones where it has another shape."""
    try:
        row = json.loads(line)
    except ValueError:
        return "", ""
    if not isinstance(row, dict):
        return "", ""
    turns = row.get("messages")
    if isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns):
        said = {str(turn.get("role")): str(turn.get("content") or "") for turn in reversed(turns)}
        return said.get("user", "")[:4096], said.get("assistant", "")[:4096]
    for asked, answered in (("prompt", "completion"), ("instruction", "output")):
        if isinstance(row.get(asked), str) and isinstance(row.get(answered), str):
            return row[asked][:4096], row[answered][:4096]
    return "", ""


def _bring(source: Path, target: Path) -> None:
    """Link a file, or copy it where a link cannot be had."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
