"""From the text of a setting to its value: what each kind takes, and how that is said."""

import hmac
import ipaddress
import math
import os
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin
from urllib.parse import urlsplit

import msgspec

from agent.errors import BadSetting

HOSTED = "https://app.finetunelab.ai"
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


class Secret:
    """A value that no text, log, encoder or pickle accepts; only ``reveal()`` gives it."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """Return the value. Never hand it to a trainer, a log or a message."""
        return self._value

    def __repr__(self) -> str:
        return "Secret(...)"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return repr(self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and hmac.compare_digest(self._value.encode(), other._value.encode())

    def __hash__(self) -> int:
        return hash(("Secret", self._value))

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret cannot be pickled")


def is_address(host: str) -> bool:
    """Tell whether ``host`` is an IP address and no name."""
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Tell whether ``host`` is a name or address of this machine itself."""
    if host.lower().rstrip(".") == "localhost":
        return True
    return is_address(host) and ipaddress.ip_address(host.strip("[]")).is_loopback


def bare(hint: Any) -> Any:
    """Return the type without its `| None`."""
    if get_origin(hint) in (Union, UnionType):
        return next(part for part in get_args(hint) if part is not type(None))
    return hint


def parse(name: str, text: str, hint: Any, source: str) -> Any:
    """Return the value that ``text`` means for a setting of type ``hint``; raises BadSetting."""
    field = name.lower()
    hint = bare(hint)
    if hint is Secret:
        return secret(name, text, source)
    if hint is Path:
        return Path(os.path.abspath(Path(text).expanduser()))  # noqa: PTH100 - resolves no links: a mount stays as given
    if field == "backend_url":
        return "" if text.lower() == "none" else text.rstrip("/")
    value: Any = text
    if hint is bool:
        value = {**dict.fromkeys(_TRUE, True), **dict.fromkeys(_FALSE, False)}.get(text.lower(), text)
    elif get_origin(hint) is tuple:
        value = [part.strip() for part in text.split(",") if part.strip()]
    elif field == "log_level":
        value = text.upper()
    try:
        result = msgspec.convert(value, hint, strict=hint is bool)
    except msgspec.ValidationError:
        result = None
    if result is None or (isinstance(result, float) and not math.isfinite(result)):
        raise BadSetting(name, f"{text!r} is not allowed; it takes {allowed(field, hint)}", source)
    return result


def secret(name: str, text: str, source: str) -> Secret:
    """Return a key; raises BadSetting, without the value, for what cannot stand in a header."""
    if not text.isascii() or not text.isprintable() or " " in text:
        raise BadSetting(
            name, "holds a space or a character that no key has (its value is not shown)", source
        )
    return Secret(text)


def allowed(field: str, hint: Any) -> str:
    """Say in words what a setting takes."""
    hint = bare(hint)
    if hint is Path:
        return "a path"
    if hint is Secret:
        return "a key"
    if field == "backend_url":
        return "an http(s) address, or `none`"
    if get_origin(hint) is Literal:
        return ", ".join(get_args(hint))
    kind = msgspec.inspect.type_info(hint)
    match kind:
        case msgspec.inspect.BoolType():
            return "true or false"
        case msgspec.inspect.IntType() | msgspec.inspect.FloatType():
            what = "a whole number" if isinstance(kind, msgspec.inspect.IntType) else "a number"
            low = f"above {kind.gt}" if kind.gt is not None else f"from {kind.ge}"
            return f"{what} {low} to {kind.le}"
        case msgspec.inspect.VarTupleType():
            return "names, with commas between"
        case msgspec.inspect.StrType() if field == "agent_id":
            return "`agent_` and 4 to 64 letters, digits, `_` or `-`"
        case msgspec.inspect.StrType():
            return "an address or a host name"
    raise AssertionError(f"no words for the type of {field}")


def check_url(url: str, allow_plain: bool) -> None:
    """Raise BadSetting unless ``url`` is a backend that a key may be sent to."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise BadSetting("BACKEND_URL", f"is no address: {error}") from error
    if parts.username is not None or parts.password is not None:
        # Not shown: what stands before the @ may be a password.
        raise BadSetting("BACKEND_URL", "holds a user name or password; the key goes in API_KEY")
    if parts.scheme not in ("http", "https") or not host:
        raise BadSetting("BACKEND_URL", f"{url!r} is not allowed; it takes an address such as {HOSTED}")
    if parts.query or parts.fragment:
        raise BadSetting("BACKEND_URL", f"{url!r} is not allowed; leave out what follows ? or #")
    if parts.scheme == "http" and not is_loopback(host) and not allow_plain:
        raise BadSetting(
            "BACKEND_URL",
            f"{url!r} would send the key over {host}'s network unencrypted; use https://, "
            "or set ALLOW_PLAIN_HTTP=true if that network is yours",
        )
