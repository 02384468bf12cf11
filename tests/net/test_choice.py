"""The rules by which records go by the socket or by REST: one owner at a time."""

import math
import random

import pytest

from agent.errors import KeyRefused, NotOurBackend
from agent.net.choice import FAILED_DIALS, REFUSALS, REFUSED_FOR, WITHOUT_WELCOME, Polls, Rules
from agent.net.client import Said, Unclear


def test_rest_has_its_turn_after_so_many_dials_or_so_long() -> None:
    rules = Rules("auto", 100.0)
    assert rules.rest_from() == 100.0 + WITHOUT_WELCOME
    for _ in range(FAILED_DIALS - 1):
        rules.ended(101.0)
    assert rules.rest_from() == 100.0 + WITHOUT_WELCOME
    rules.ended(102.0)
    assert rules.rest_from() == -math.inf


def test_the_socket_keeps_its_turn_from_hello_to_the_sessions_end() -> None:
    rules = Rules("auto", 0.0)
    rules.hello()
    assert rules.rest_from() is None
    rules.welcomed()
    assert rules.rest_from() is None
    rules.ended(50.0)
    # A short break is the redial's own; the count begins anew.
    assert rules.rest_from() == 50.0 + WITHOUT_WELCOME
    for _ in range(FAILED_DIALS):
        assert rules.rest_from() is not None
        rules.ended(51.0)
    assert rules.rest_from() == -math.inf


def test_an_upgrade_that_nothing_follows_counts_as_a_failed_dial() -> None:
    rules = Rules("auto", 0.0)
    for _ in range(FAILED_DIALS):
        rules.hello()
        rules.ended(20.0)
    assert rules.rest_from() == -math.inf


def test_a_backend_without_a_socket_is_polled_at_once_until_it_has_one() -> None:
    rules = Rules("auto", 0.0)
    rules.absent()
    assert rules.rest_from() == -math.inf
    rules.hello()
    assert rules.rest_from() is None
    rules.welcomed()
    rules.ended(700.0)
    assert rules.rest_from() == 700.0 + WITHOUT_WELCOME


@pytest.mark.parametrize(("setting", "expected"), [("websocket", None), ("poll", -math.inf)])
def test_the_owner_decides_for_always(setting: str, expected: float | None) -> None:
    rules = Rules(setting, 0.0)
    assert rules.rest_from() == expected
    for _ in range(5):
        rules.ended(1.0)
    rules.absent()
    assert rules.rest_from() == expected


def test_whatever_happens_there_is_one_owner_and_rest_is_never_shut_out_for_good() -> None:
    for seed in range(300):
        chance = random.Random(seed)
        rules, now = Rules("auto", 0.0), 0.0
        for _ in range(60):
            now += chance.expovariate(0.2)
            what = chance.choice(["hello", "welcomed", "ended", "absent"])
            if what == "welcomed" and rules.socket != "opening":
                continue
            if what == "absent" and rules.socket in ("opening", "open"):
                continue
            rules.ended(now) if what == "ended" else getattr(rules, what)()
            assert (rules.rest_from() is None) == (rules.socket in ("opening", "open")), (seed, rules)
        if rules.socket in ("opening", "open"):
            rules.ended(now)
        due = rules.rest_from()
        assert due is not None and due <= now + WITHOUT_WELCOME, (seed, rules)


def said(status: int, error: str) -> Said:
    return Said(status, error, {"error": error})


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (401, "Invalid API key"),
        (401, "Invalid API key format"),
        (401, "Missing authorization header"),
        (403, "API key does not have 'training' scope. Key scopes: testing"),
    ],
)
def test_a_refusal_of_the_key_itself_ends_it_at_once(status: int, error: str) -> None:
    polls = Polls("https://backend.example")
    polls.answered()
    with pytest.raises(KeyRefused, match="API_KEY"):
        polls.failed(said(status, error), 1.0, no_socket=True)


@pytest.mark.parametrize(
    ("before", "status", "error"),
    [
        ("", 401, "Database error"),
        ("poll", 401, "Authentication failed"),
        ("poll", 403, "Forbidden"),
        ("socket", 403, "Forbidden"),
    ],
)
def test_a_refusal_that_may_pass_must_last(before: str, status: int, error: str) -> None:
    polls, refusal = Polls("https://backend.example"), said(status, error)
    polls.known = before == "socket"
    if before == "poll":
        polls.answered()
    for _ in range(3):
        # Many at once, or few over a long time, are a bad hour.
        for _ in range(10):
            polls.failed(refusal, 100.0, no_socket=True)
        polls.failed(Unclear("HTTP 500"), 200.0, no_socket=True)
        for number in range(REFUSALS - 1):
            polls.failed(refusal, 300.0 + number * REFUSED_FOR, no_socket=True)
        polls.answered()
    for number in range(REFUSALS - 1):
        polls.failed(refusal, float(number), no_socket=True)
    with pytest.raises(KeyRefused, match=error):
        polls.failed(refusal, REFUSED_FOR, no_socket=True)


def test_what_was_polled_before_is_a_backend_whatever_answers_for_it() -> None:
    polls = Polls("https://backend.example")
    polls.failed(said(404, "Not Found"), 0.0, no_socket=False)
    with pytest.raises(NotOurBackend, match="BACKEND_URL"):
        polls.failed(said(404, "Not Found"), 0.0, no_socket=True)
    polls.answered()
    polls.failed(said(404, "Not Found"), 0.0, no_socket=True)
