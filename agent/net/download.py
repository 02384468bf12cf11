"""Fetch a job's data set from the backend: by ranges, verified, and only once."""

import hashlib
import os
from pathlib import Path

import anyio
import anyio.to_thread
import httpx
from loguru import logger

from agent.net.retry import backoff, can_retry
from protocol.rest import DATASET

CHUNK = 1 << 20
READ_WITHIN = 30.0
TRIES = 8


class DownloadFailed(Exception):
    """The data set could not be had; the sentence is for the user."""


async def fetch_dataset(
    backend_url: str, job_id: str, token: str, *, sha256: str, size: int, folder: Path, user_agent: str
) -> Path:
    """Return the file with these bytes, from ``folder`` or from the backend.

    A broken transfer goes on where it stopped. Raises DownloadFailed.
    """
    target = folder / f"{sha256}.data"
    if target.exists() and target.stat().st_size == size:
        return target
    await anyio.to_thread.run_sync(lambda: folder.mkdir(parents=True, exist_ok=True, mode=0o700))
    part = folder / f"{sha256}.part"
    url = backend_url.rstrip("/") + DATASET.format(job_id=job_id)
    headers = {"Authorization": f"Bearer {token}", "User-Agent": user_agent}
    waits = backoff(cap=15.0)
    async with httpx.AsyncClient(headers=headers, timeout=READ_WITHIN, follow_redirects=False) as client:
        for attempt in range(1, TRIES + 1):
            try:
                await _fetch(client, url, part, size)
                break
            except httpx.HTTPError as error:
                if isinstance(error, httpx.HTTPStatusError):
                    said = f"HTTP {error.response.status_code}"
                else:
                    said = str(error) or type(error).__name__
                if attempt == TRIES or not can_retry(error):
                    raise DownloadFailed(f"The data set of job {job_id} could not be fetched from {url}: {said}.") from None
                logger.info("job {}: data set transfer broke off ({}); going on", job_id, said)
                await anyio.sleep(next(waits))
    found = await anyio.to_thread.run_sync(_sha256, part)
    if found != sha256:
        part.unlink()
        raise DownloadFailed(
            f"The data set of job {job_id} arrived with sha256 {found[:12]}..., the backend announced {sha256[:12]}...; "
            "upload it again."
        )
    part.replace(target)
    return target


async def _fetch(client: httpx.AsyncClient, url: str, part: Path, size: int) -> None:
    have = part.stat().st_size if part.exists() else 0
    if have > size:
        part.unlink()
        have = 0
    if have == size and size:
        return
    headers = {"Range": f"bytes={have}-"} if have else {}
    async with client.stream("GET", url, headers=headers) as answer:
        answer.raise_for_status()
        if answer.status_code != 206:
            have = 0
        with part.open("r+b" if have else "wb") as file:
            file.seek(have)
            async for block in answer.aiter_bytes(CHUNK):
                have += len(block)
                if have > size:
                    raise DownloadFailed(f"{url} sends more than the {size} bytes it announced.")
                await anyio.to_thread.run_sync(file.write, block)
            file.flush()
            await anyio.to_thread.run_sync(os.fsync, file.fileno())
    if have < size:
        raise httpx.ReadError(f"{have} of {size} bytes arrived")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
