"""Uploaded data sets: files under the data folder, named by their id and by nothing a user sent."""

import hashlib
import os
import re
import shutil
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

import anyio.to_thread
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import Response

from agent.hub.errors import Refusal
from agent.hub.hub import Hub
from agent.hub.store import Db
from agent.hub.web import Json

MOST_BYTES = 16 * 1024**3
KEEP_FREE = 256 * 1024**2
"""Bytes of the disk that an upload leaves to the hub's own database."""


def file_of(data_dir: Path, dataset_id: str) -> Path:
    """Return where an uploaded data set lies."""
    if not re.fullmatch(r"[0-9a-f]{32}", dataset_id):
        raise ValueError(f"{dataset_id!r} is not the id of a data set")
    return data_dir / "datasets" / dataset_id


def plain_name(name: str) -> str:
    """Return the last part of a file's name in harmless characters."""
    last = name.replace("\\", "/").rsplit("/", 1)[-1]
    return re.sub(r"[^A-Za-z0-9._-]+", "_", last).lstrip(".")[:128] or "dataset.jsonl"


async def _bounded(request: Request) -> AsyncGenerator[bytes, None]:
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > MOST_BYTES:
            raise Refusal(413, f"The data set is larger than {MOST_BYTES} bytes.")
        yield part


async def upload(request: Request, hub: Hub) -> Response:
    """`POST /api/training/dataset`: a multipart form with `file`, or the bytes themselves."""
    await hub.keys.require(request.headers)
    dataset_id = uuid.uuid4().hex
    target = file_of(hub.data_dir, dataset_id)
    await anyio.Path(target.parent).mkdir(parents=True, exist_ok=True)
    said = request.headers.get("content-length", "")
    free = shutil.disk_usage(target.parent).free - KEEP_FREE
    if said.isdigit() and int(said) > min(MOST_BYTES, free):
        raise Refusal(
            413, f"The data set has {said} bytes; this hub takes {max(0, min(MOST_BYTES, free))} now."
        )
    part = target.with_suffix(".part")
    try:
        if request.headers.get("content-type", "").startswith("multipart/form-data"):
            name, sha256, size = await _from_form(request, part)
        else:
            name = request.query_params.get("name") or request.headers.get("x-filename") or "dataset.jsonl"
            sha256, size = await _take(_bounded(request), part)
        if size == 0:
            raise Refusal(400, "The data set is empty.")
        await anyio.to_thread.run_sync(os.replace, part, target)
    finally:
        await anyio.Path(part).unlink(missing_ok=True)
    name = plain_name(name)
    storage_path = f"hub/{dataset_id}/{name}"

    def add(db: Db) -> None:
        db.execute(
            "INSERT INTO datasets (id, storage_path, name, sha256, size, created_at) VALUES (?,?,?,?,?,?)",
            (dataset_id, storage_path, name, sha256, size, time.time()),
        )

    await hub.store.write(add)
    return Json(
        {
            "success": True,
            "dataset_id": dataset_id,
            "storage_path": storage_path,
            "name": name,
            "sha256": sha256,
            "size": size,
        },
        201,
    )


async def _take(parts: AsyncIterator[bytes], path: Path) -> tuple[str, int]:
    """Write what comes to ``path``, durably; return its sha256 and size."""
    digest = hashlib.sha256()
    size = 0
    async with await anyio.open_file(path, "wb") as file:
        async for part in parts:
            digest.update(part)
            size += len(part)
            await file.write(part)
        await file.flush()
        await anyio.to_thread.run_sync(os.fsync, file.wrapped.fileno())
    return digest.hexdigest(), size


async def _from_form(request: Request, path: Path) -> tuple[str, str, int]:
    parser = MultiPartParser(request.headers, _bounded(request), max_files=1, max_fields=32)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise Refusal(400, f"The form cannot be read: {error.message}") from None
    try:
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise Refusal(400, 'The form has no file: send it in a field named "file".')
        sha256, size = await _take(_chunks(file), path)
        return file.filename or "dataset.jsonl", sha256, size
    finally:
        await form.close()


async def _chunks(file: UploadFile) -> AsyncIterator[bytes]:
    while chunk := await file.read(1 << 20):
        yield chunk
