"""Secrets out of what is stored, logged or sent: the known ones in every usual encoding, others by their look."""

import base64
import json
import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote, quote_plus

MARK = "[redacted]"
MIN_LENGTH = 6
"""Shorter secrets are left alone: as pieces of ordinary words they would make the text unreadable."""
LONG_LINE = 16
"""A line of a secret of several lines (a private key) counts by itself from this length on."""

_TOKEN = r"[A-Za-z0-9._~+/=-]"  # noqa: S105 - a pattern, no token
# Longer than what any of these patterns needs to be recognised, not than what it can cover.
_PATTERN_HEAD = 400
_PATTERNS = (
    rf"(?P<bearer>\b[Bb]earer[ \t:]{{1,8}}){_TOKEN}{{{MIN_LENGTH},}}",
    r"wak_[A-Za-z0-9_-]{6,}",
    r"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{16,}",
    # User and password in an address, as proxies have it.
    r"(?<=://)[^\s/:@]{1,64}:[^\s/@]{1,256}(?=@)",
)


class Redactor:
    """Replaces secrets by `MARK`."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._forms: set[str] = set()
        self.add(*secrets)

    def __repr__(self) -> str:
        return f"<Redactor of {len(self._forms)} forms>"

    def add(self, *secrets: str) -> None:
        """Know more secrets from now on, such as the token of a job that has just arrived."""
        for secret in secrets:
            for part in {secret, secret.strip(), *(ln for ln in secret.splitlines() if len(ln) >= LONG_LINE)}:
                if len(part) >= MIN_LENGTH:
                    self._forms |= _forms(part)
        # Longest first, since the first alternative that fits is taken.
        literals = [re.escape(form) for form in sorted(self._forms, key=len, reverse=True)]
        known = "|".join(literals) or "(?!)"
        self._regex = re.compile("|".join((f"(?P<known>{known})", *_PATTERNS)))
        self.reach = max([_PATTERN_HEAD, *map(len, self._forms)])
        """How many characters are enough to decide whether a secret begins at the first of them."""

    def redact(self, text: str) -> str:
        """Return ``text`` without secrets."""
        return self._regex.sub(_mark, text)

    def redact_value(self, value: Any) -> Any:
        """Return ``value`` with every text in it redacted, in dicts (keys too), lists and tuples of any depth."""
        match value:
            case str():
                return self.redact(value)
            case dict():
                return {self.redact_value(key): self.redact_value(item) for key, item in value.items()}
            case list():
                return [self.redact_value(item) for item in value]
            case tuple():
                return tuple(self.redact_value(item) for item in value)
            case _:
                return value

    def stream(self) -> "Stream":
        """Return a redactor for one text that comes in pieces."""
        return Stream(self)


class Stream:
    """Redacts one text that comes in pieces, also where a secret lies across their borders."""

    def __init__(self, redactor: Redactor) -> None:
        self._redactor = redactor
        self._before = ""
        self._held = ""
        self._inside = False

    def feed(self, text: str) -> str:
        """Take a piece; return what is now certain to hold no secret. The end is held back."""
        return self._advance(text, keep=self._redactor.reach - 1)

    def flush(self) -> str:
        """Return what was held back: the text has ended."""
        return self._advance("", keep=0)

    def _advance(self, text: str, keep: int) -> str:
        if self._inside:
            # The last piece ended within a token of unknown length, already marked.
            text = re.sub(rf"\A(?:{_TOKEN}|_)+", "", text)
            if not text and keep:
                return ""
            self._inside = False
        text = self._before + self._held + text
        start = done = len(self._before)
        end = max(start, len(text) - keep)
        pieces: list[str] = []
        for match in self._redactor._regex.finditer(text, start):
            if match.start() >= end:
                break
            pieces += text[done : match.start()], _mark(match)
            done = match.end()
            end = max(end, done)
            self._inside = match["known"] is None and done == len(text)
        pieces.append(text[done:end])
        self._held = text[end:]
        # Patterns look back at what stands before a token.
        self._before = text[max(0, end - 8) : end]
        return "".join(pieces)


def _mark(match: re.Match[str]) -> str:
    return (match["bearer"] or "") + MARK


def _forms(secret: str) -> set[str]:
    """Return the secret as it may stand in a text: plain, in an address, in JSON, as hex, as base64."""
    raw = secret.encode()
    quoted = {quote(secret, safe=""), quote(secret), quote_plus(secret)}
    lower = {re.sub("%[0-9A-F]{2}", lambda found: found[0].lower(), form) for form in quoted}
    escaped = {json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1], repr(secret)[1:-1]}
    slashed = {form.replace("/", "\\/") for form in escaped}
    return {secret, raw.hex(), raw.hex().upper()} | quoted | lower | escaped | slashed | _base64_forms(raw)


def _base64_forms(raw: bytes) -> set[str]:
    """Return what base64 makes of ``raw`` wherever it stands in a longer text: three shifts, two alphabets.

    The characters that depend on the neighbours are left out.
    """
    forms: set[str] = set()
    for shift in range(3):
        padded = bytes(shift) + raw
        whole = slice((shift * 8 + 5) // 6, len(padded) * 8 // 6)
        forms.add(base64.b64encode(padded).decode()[whole])
        forms.add(base64.urlsafe_b64encode(padded).decode()[whole])
    return forms
