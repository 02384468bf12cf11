"""Fetch a job's data set from the backend: by ranges, verified, and only once."""

import errno
import hashlib
import os
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import urlsplit

import anyio
import anyio.to_thread
from loguru import logger

from agent.net.retry import LOOPBACK, backoff, can_retry, system_trust
from protocol.rest import DATASET

if TYPE_CHECKING:
    import httpx

# httpx is imported at the first transfer: it takes longer than the rest of the way to the first dial.

READ_WITHIN = 30.0
TRIES = 8
"""Transfers in a row that may break off without having brought a byte."""


class DownloadFailed(Exception):
    """The data set could not be had; the sentence is for the user."""

    disk_full = False


class _BrokeOff(Exception):
    """A transfer ended early."""


async def fetch_dataset(
    backend_url: str, job_id: str, token: str, *, sha256: str, size: int, folder: Path, user_agent: str
) -> Path:
    """Return the file with these bytes, from ``folder`` or, where there is a ``token``, from the backend.

    A broken transfer goes on where it stopped. Raises DownloadFailed.
    """
    target = folder / f"{sha256}.data"
    # Two jobs may want the same rows at the same time: each has its own part.
    part = folder / f"{sha256}.{job_id}.part"
    url = backend_url.rstrip("/") + DATASET.format(job_id=job_id)
    try:
        if await anyio.to_thread.run_sync(_there, target, size):
            return target
        if not token:
            raise DownloadFailed(
                f"The backend holds the data set of job {job_id}, and this machine has no token to fetch it with "
                "any more; retry the job at the backend, or submit it again."
            )
        await anyio.to_thread.run_sync(lambda: folder.mkdir(parents=True, exist_ok=True, mode=0o700))
        await _fetch_all(url, job_id, token, part, size, user_agent)
        found = await anyio.to_thread.run_sync(_sha256, part)
        if found != sha256:
            await anyio.to_thread.run_sync(part.unlink)
            raise DownloadFailed(
                f"The data set of job {job_id} arrived with sha256 {found[:12]}..., the backend announced "
                f"{sha256[:12]}...; upload it again."
            )
        await anyio.to_thread.run_sync(part.replace, target)
    except OSError as error:
        failed = DownloadFailed(
            f"The data set of job {job_id} ({size / 1e6:.0f} MB) cannot be kept in {folder}: "
            f"{error.strerror or error}. Free some space or mend the folder's rights, then retry the job."
        )
        failed.disk_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise failed from None
    return target


async def _fetch_all(url: str, job_id: str, token: str, part: Path, size: int, user_agent: str) -> None:
    import httpx

    headers = {
        "Authorization": f"Bearer {token}",
        "User-Agent": user_agent,
        # Ranges count the bytes of the file, not those of a compressed answer.
        "Accept-Encoding": "identity",
    }
    direct = urlsplit(url).hostname in LOOPBACK
    waits = backoff(cap=15.0)
    tries = 0
    async with httpx.AsyncClient(
        headers=headers,
        timeout=READ_WITHIN,
        verify=system_trust(),
        follow_redirects=False,
        trust_env=not direct,
    ) as client:
        while True:
            before = await anyio.to_thread.run_sync(_size, part)
            try:
                await _fetch(client, url, part, before, size)
                return
            except (httpx.HTTPError, _BrokeOff) as error:
                if isinstance(error, httpx.HTTPStatusError):
                    said = f"HTTP {error.response.status_code}"
                else:
                    said = str(error) or type(error).__name__
                tries = 1 if await anyio.to_thread.run_sync(_size, part) > before else tries + 1
                if tries >= TRIES or not (isinstance(error, _BrokeOff) or can_retry(error)):
                    raise DownloadFailed(
                        f"The data set of job {job_id} could not be fetched from {url}: {said}."
                    ) from None
                logger.info("job {}: data set transfer broke off ({}); going on", job_id, said)
                if tries == 1:
                    waits = backoff(cap=15.0)
                await anyio.sleep(next(waits))


async def _fetch(client: "httpx.AsyncClient", url: str, part: Path, have: int, size: int) -> None:
    """Fetch what ``part`` lacks of the file; what has come stays there when the transfer breaks off."""
    if have > size:
        have = 0
    if have == size and size:
        return
    headers = {"Range": f"bytes={have}-"} if have else {}
    async with client.stream("GET", url, headers=headers) as answer:
        answer.raise_for_status()
        if answer.status_code != HTTPStatus.PARTIAL_CONTENT:
            have = 0
        file = await anyio.to_thread.run_sync(_opened, part, have)
        with file:
            try:
                # As it comes: a block of a set size would be lost whole when the line breaks before it is full.
                async for block in answer.aiter_bytes():
                    have += len(block)
                    if have > size:
                        raise DownloadFailed(f"{url} sends more than the {size} bytes it announced.")
                    await anyio.to_thread.run_sync(file.write, block)
            finally:
                # A cancelled job goes on from here too, when it is retried.
                file.flush()
            await anyio.to_thread.run_sync(os.fsync, file.fileno())
    if have < size:
        raise _BrokeOff(f"{have} of {size} bytes arrived")


def _opened(part: Path, have: int) -> BinaryIO:
    file = part.open("r+b" if have else "wb")
    file.seek(have)
    file.truncate()
    return file


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _there(path: Path, size: int) -> bool:
    return path.exists() and path.stat().st_size == size


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
