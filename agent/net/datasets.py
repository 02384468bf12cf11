"""Where a data set is that stays at the platform: a file of the owner's, or a URL that may be fetched from."""

import hashlib
import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import anyio
import anyio.to_thread
import msgspec
from loguru import logger

from agent.config import Settings
from agent.net.download import DownloadFailed
from agent.net.retry import LOOPBACK, backoff, can_retry, system_trust
from protocol.codec import UNREADABLE

if TYPE_CHECKING:
    import httpx

READ_WITHIN = 30.0
TRIES = 5
MB = 1_000_000
PUBLIC = re.compile(r"/api/training/public/[^/]+/dataset$")
"""The platform's route that names the place of a data set in place of giving it."""
_STORED = re.compile(r"[^/]+/private/[^/]+\.jsonl(\.gz)?$")


async def find_dataset(given: str, job_id: str, settings: Settings, user_agent: str) -> str | None:
    """Return the file for what a job calls its data set, or None where it is an ordinary path or name.

    First what DATASET_MAP says, then a URL, then a file in DATASETS_DIR with the name that the data set has in
    the platform's store. Raises DownloadFailed.
    """
    for pair in settings.dataset_map:
        name, _, file = pair.partition("=")
        if name.strip() == given:
            path = settings.datasets_dir / file.strip()
            if not await anyio.Path(path).exists():
                raise DownloadFailed(
                    f"DATASET_MAP gives {path} for the data set {given}, and there is no such file."
                )
            return str(path)
    if given.startswith(("http://", "https://")):
        return str(await _fetched(given, job_id, settings, user_agent))
    if not _STORED.match(given):
        return None
    if await anyio.Path(settings.datasets_dir / given).exists():
        return None
    name = PurePosixPath(given).name
    for candidate in (name, name.removesuffix(".gz")):
        if await anyio.Path(settings.datasets_dir / candidate).is_file():
            return str(settings.datasets_dir / candidate)
    raise DownloadFailed(
        f"The platform keeps the data set {given} in its own store and gives agents no way to fetch it. Download it "
        f"there and put it into {settings.datasets_dir} as {name}, or name your file in DATASET_MAP."
    )


def kept_name(job_id: str) -> str:
    """Return the name under which the fetched rows of a job are kept: a signed URL serves only once."""
    return hashlib.sha256(job_id.encode()).hexdigest()[:32] + ".rows"


def allowed(url: str, settings: Settings) -> None:
    """Raise DownloadFailed unless the owner or the backend named the host of ``url``."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    backend = urlsplit(settings.backend_url).hostname
    if not host or parts.username is not None or host not in {backend, *settings.dataset_hosts}:
        raise DownloadFailed(
            f"The data set is at {host or 'no host'}, and data sets are fetched from the backend's own host alone. "
            "Add the host to DATASET_HOSTS if you trust it, or put the file into DATASETS_DIR and name it there."
        )
    _encrypted(url, settings)


def _encrypted(url: str, settings: Settings) -> None:
    parts = urlsplit(url)
    if parts.scheme != "https" and parts.hostname not in LOOPBACK and not settings.allow_plain_http:
        raise DownloadFailed(
            f"The data set at {parts.hostname} would come unencrypted; its address must be https://."
        )


async def _fetched(url: str, job_id: str, settings: Settings, user_agent: str) -> Path:
    allowed(url, settings)
    folder = settings.datasets_dir / ".fetched"
    target = folder / kept_name(job_id)
    if await anyio.Path(target).exists():
        return target
    import httpx

    part = target.with_suffix(".part")
    try:
        await anyio.Path(folder).mkdir(parents=True, exist_ok=True, mode=0o700)
        async with httpx.AsyncClient(
            headers={"User-Agent": user_agent, "Accept-Encoding": "identity"},
            timeout=READ_WITHIN,
            verify=system_trust(),
            follow_redirects=False,
            trust_env=urlsplit(url).hostname not in LOOPBACK,
        ) as client:
            if PUBLIC.search(urlsplit(url).path):
                url = await _place(client, url, settings)
            await _tried(client, url, part, settings.dataset_max_mb * MB)
        await anyio.Path(part).replace(target)
    except OSError as error:
        raise DownloadFailed(
            f"The data set of job {job_id} cannot be kept in {folder}: {error.strerror or error}. Free some space or "
            "mend the folder's rights, then retry the job."
        ) from None
    return target


async def _place(client: "httpx.AsyncClient", url: str, settings: Settings) -> str:
    """Return the address that the platform signs for a public configuration's data set."""
    import httpx

    try:
        answer = await client.get(url)
        answer.raise_for_status()
        found = msgspec.json.decode(answer.content).get("download_url")
    except (httpx.HTTPError, *UNREADABLE, AttributeError) as error:
        raise DownloadFailed(f"{_bare(url)} does not say where the data set is: {_said(error)}.") from None
    if not isinstance(found, str):
        raise DownloadFailed(f"{_bare(url)} names no place to fetch the data set from.")
    _encrypted(found, settings)
    return found


async def _tried(client: "httpx.AsyncClient", url: str, part: Path, most: int) -> None:
    import httpx

    waits = backoff(cap=15.0)
    for left in range(TRIES, 0, -1):
        try:
            await _one(client, url, part, most)
            return
        except httpx.HTTPError as error:
            if left == 1 or not can_retry(error):
                raise DownloadFailed(
                    f"The data set could not be fetched from {_bare(url)}: {_said(error)}. A signed address may have "
                    "expired: submit the job again."
                ) from None
            logger.info("the transfer of a data set broke off ({}); trying again", _said(error))
            await anyio.sleep(next(waits))


async def _one(client: "httpx.AsyncClient", url: str, part: Path, most: int) -> None:
    have = 0
    async with client.stream("GET", url) as answer, await anyio.open_file(part, "wb") as file:
        answer.raise_for_status()
        async for block in answer.aiter_bytes():
            have += len(block)
            if have > most:
                raise DownloadFailed(
                    f"{_bare(url)} sends more than {most // MB} MB; raise DATASET_MAX_MB if the data set is so large."
                )
            await file.write(block)


def _bare(url: str) -> str:
    """Return an address as it may be shown: what follows the ? of a signed one is a key."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}{parts.path}"


def _said(error: Exception) -> str:
    import httpx

    if isinstance(error, httpx.HTTPStatusError):
        return f"HTTP {error.response.status_code}"
    return str(error) or type(error).__name__
