"""The rules by which records go by the socket or by REST: one owner at a time."""

import math
import random

import pytest

from agent.net.choice import FAILED_DIALS, WITHOUT_WELCOME, Rules


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
