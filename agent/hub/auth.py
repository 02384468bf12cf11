"""API keys: hashed with scrypt where they lie, known by a keyed hash while the hub runs."""

import base64
import hashlib
import hmac
import re
import secrets
import string
import time

import anyio
import anyio.to_thread
from starlette.datastructures import Headers

from agent.hub.errors import Refusal
from agent.hub.store import Db, Store

_ALPHABET = string.ascii_letters + string.digits
_SHAPE = re.compile(r"^wak_[A-Za-z0-9]{32}$")
_REFUSED_KEPT = 1024


def new_key() -> str:
    return "wak_" + "".join(secrets.choice(_ALPHABET) for _ in range(32))


def _scrypt(key: str, salt: bytes) -> bytes:
    return hashlib.scrypt(key.encode(), salt=salt, n=2**14, r=8, p=1, dklen=32)


class Keys:
    """Who may use the hub."""

    def __init__(self, store: Store, given: str | None) -> None:
        self._store = store
        self._secret = secrets.token_bytes(32)
        self._good: set[bytes] = set()
        self._bad: dict[bytes, None] = {}
        self._one = anyio.Lock()
        if given:
            self._good.add(self._mark(given))

    def _mark(self, key: str) -> bytes:
        return hmac.digest(self._secret, key.encode("utf-8", "surrogatepass"), "sha256")

    async def first(self) -> str | None:
        """Make and store a key if there is none; it can be shown this once only."""
        key = new_key()
        salt = secrets.token_bytes(16)
        text = f"{base64.b64encode(salt).decode()}${base64.b64encode(_scrypt(key, salt)).decode()}"

        def add(db: Db) -> bool:
            if db.execute("SELECT count(*) FROM keys").fetchone()[0]:
                return False
            db.execute(
                "INSERT INTO keys (hash, prefix, created_at) VALUES (?,?,?)", (text, key[:8], time.time())
            )
            return True

        if not await self._store.write(add):
            return None
        self._good.add(self._mark(key))
        return key

    async def known(self, key: str) -> bool:
        """Tell whether ``key`` opens this hub."""
        mark = self._mark(key)
        if mark in self._good:
            return True
        if mark in self._bad or not _SHAPE.match(key):
            return False
        # One at a time: scrypt takes 16 MiB and 50 ms, and a stranger can ask for it.
        async with self._one:
            if mark in self._good or mark in self._bad:
                return mark in self._good
            stored = await self._store.read(
                lambda db: [row[0] for row in db.execute("SELECT hash FROM keys")]
            )
            if await anyio.to_thread.run_sync(_matches, key, stored):
                self._good.add(mark)
                return True
            self._bad[mark] = None
            if len(self._bad) > _REFUSED_KEPT:
                self._bad.pop(next(iter(self._bad)))
            return False

    async def require(self, headers: Headers) -> None:
        """Raise Refusal 401 unless the request carries a good key."""
        key = presented(headers)
        if key is None:
            raise Refusal(401, "Missing authorization header")
        if not await self.known(key):
            raise Refusal(401, "Invalid API key")


def _matches(key: str, stored: list[str]) -> bool:
    for text in stored:
        salt, _, digest = text.partition("$")
        if hmac.compare_digest(_scrypt(key, base64.b64decode(salt)), base64.b64decode(digest)):
            return True
    return False


def presented(headers: Headers) -> str | None:
    """Return the key of a request, from where the platform looks for it."""
    key = headers.get("x-api-key") or headers.get("x-workspace-api-key")
    return key or bearer(headers)


def bearer(headers: Headers) -> str | None:
    """Return the token behind `Bearer`."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None
