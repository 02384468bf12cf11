import base64
import json
import random
import re
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.runtime.redact import MARK, Redactor

SECRET = 'p/s "w\u00f6rd"+\n%7:tail'
"""One that every encoding changes."""


def in_base64(shift: int) -> str:
    return base64.b64encode(b"x" * shift + SECRET.encode() + b"after").decode()


@pytest.mark.parametrize(
    "form",
    [
        SECRET,
        quote(SECRET, safe=""),
        re.sub("%..", lambda found: found[0].lower(), quote(SECRET, safe="")),
        quote(SECRET),
        quote_plus(SECRET),
        json.dumps(SECRET)[1:-1],
        json.dumps(SECRET, ensure_ascii=False)[1:-1],
        json.dumps(SECRET)[1:-1].replace("/", "\\/"),
        repr(SECRET)[1:-1],
        SECRET.encode().hex(),
        SECRET.encode().hex().upper(),
    ],
)
def test_a_known_secret_is_found_in_each_encoding(form: str) -> None:
    text = Redactor([SECRET]).redact(f"before {form} after")
    assert "tail" not in text
    assert text.startswith(f"before {MARK}")
    assert text.endswith(" after")


@pytest.mark.parametrize("shift", range(3))
@pytest.mark.parametrize("secret", ["s3cr3t", "s3cr3t7", "s3cr3t78", "\u00fb\u00ff\u00fe\u00ff-secret"])
def test_base64_is_found_wherever_the_secret_stands_in_it(secret: str, shift: int) -> None:
    text = b"-" * shift + secret.encode() + b" and more"
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        whole = encode(text).decode()
        redacted = Redactor([secret]).redact(f"Authorization: Basic {whole}")
        assert MARK in redacted
        # Only characters that depend on the neighbours may stay: at most two bits' worth at either end.
        assert (
            len(redacted.replace(MARK, ""))
            <= len(f"Authorization: Basic {whole}") - len(secret.encode()) * 8 // 6 + 1
        )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("key wak_Abc-12345_x, used", f"key {MARK}, used"),
        ("token=hf_AbCdEfGhIjKlMnOpQrStUvWxYz01234567", f"token={MARK}"),
        ("Authorization: Bearer abc.def-ghi=", f"Authorization: Bearer {MARK}"),
        ("authorization: bearer abcdef123", f"authorization: bearer {MARK}"),
        ("proxy http://me:pa55word@10.0.0.1:3128/", f"proxy http://{MARK}@10.0.0.1:3128/"),
        ("hf_hub_download and wak_ and Bearer of news", "hf_hub_download and wak_ and Bearer of news"),
        ("https://huggingface.co:443/a@b", "https://huggingface.co:443/a@b"),
    ],
)
def test_what_looks_like_a_token_is_replaced(text: str, expected: str) -> None:
    assert Redactor().redact(text) == expected


def test_a_short_secret_is_left_alone() -> None:
    assert Redactor(["a", "", "12345"]).redact("a 12345 banana") == "a 12345 banana"


def test_each_long_line_of_a_secret_counts_by_itself() -> None:
    key = "-----BEGIN KEY-----\nMIIEvQIBADANBgkqhkiG9w0BAQ\nshort\n-----END KEY-----"
    assert Redactor([key]).redact("log: MIIEvQIBADANBgkqhkiG9w0BAQ\nshort") == f"log: {MARK}\nshort"


def test_the_longer_of_two_secrets_goes_first() -> None:
    assert Redactor(["secret", "secret-of-two"]).redact("secret-of-two") == MARK


def test_a_secret_can_be_added_later() -> None:
    redactor = Redactor(["first-one"])
    assert redactor.redact("first-one second-one") == f"{MARK} second-one"
    redactor.add("second-one")
    assert redactor.redact("first-one second-one") == f"{MARK} {MARK}"
    assert "first" not in repr(redactor)


def test_values_are_redacted_to_any_depth_and_keep_their_shape() -> None:
    value = {"a": ["x s3cr3t!", 7, None, ("s3cr3t!", 1.5)], "s3cr3t!": {"b": True}}
    expected = {"a": [f"x {MARK}", 7, None, (MARK, 1.5)], MARK: {"b": True}}
    assert Redactor(["s3cr3t!"]).redact_value(value) == expected


TEXTS = [
    "nothing here\n" * 40,
    "x" * 900 + "s3cr3t-value" + "y" * 900,
    "s3cr3t-value" * 30,
    "Bearer " + "a" * 2000 + " end",
    "see wak_" + "Z" * 700 + "!, and http://user:" + "p" * 200 + "@host/" + "q" * 600,
    "a://b:c@d " * 100 + "ends with wak_123456",
    "hf_" + "a" * 15 + " xhf_" + "a" * 30 + " hf_" + "a" * 30,
]


@given(st.sampled_from(TEXTS), st.integers(0, 1 << 30), st.sampled_from([1, 7, 100, 1000]))
@settings(max_examples=120, deadline=None, derandomize=True, database=None)
def test_pieces_give_the_same_as_the_whole(text: str, seed: int, size: int) -> None:
    redactor = Redactor(["s3cr3t-value", "s3cr3t-value-and-more"])
    cuts = random.Random(seed)
    stream = redactor.stream()
    out = ""
    at = 0
    while at < len(text):
        step = cuts.randint(0, size)
        out += stream.feed(text[at : at + step])
        at += step
    assert out + stream.flush() == redactor.redact(text)


def test_what_follows_a_known_secret_stays() -> None:
    secret = "".join(random.Random(1).choices("abcdefgh", k=300))
    stream = Redactor([secret]).stream()
    assert stream.feed(secret.encode().hex()) + stream.feed("and on") + stream.flush() == f"{MARK}and on"


def test_a_stream_gives_out_what_is_settled() -> None:
    stream = Redactor(["s3cr3t-value"]).stream()
    assert len(stream.feed("word " * 1000)) > 4500
    endless = Redactor().stream()
    fed = [endless.feed("wak_" + "a" * 5000)] + [endless.feed("a" * 5000) for _ in range(100)]
    # A token without an end is marked once and held nowhere.
    assert "".join(fed) == MARK
    assert endless.feed(" done") + endless.flush() == " done"
