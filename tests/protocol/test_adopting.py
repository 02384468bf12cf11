"""The page for adopters: its examples are the golden bytes, its figures the code's, its steps all clauses."""

import itertools
import random
import re
from collections import Counter
from pathlib import Path

import msgspec
import pytest

import protocol
from agent.config import Settings
from agent.net.retry import backoff
from protocol.messages import Welcome
from tests.contract.clauses import clauses
from tests.protocol.golden import FOLDER

TEXT = (Path(protocol.__file__).parent / "adopting.md").read_text(encoding="utf-8")
BY_HAND = re.findall(r"<!-- by hand: (\S+) -->\n((?:\|.*\n)+)", TEXT)


@pytest.mark.parametrize(("name", "rows"), BY_HAND, ids=[name for name, _ in BY_HAND])
def test_a_message_decoded_by_hand_is_the_golden_one(name: str, rows: str) -> None:
    told = "".join(re.findall(r"^\| `([0-9a-f ]+)` \|", rows, re.MULTILINE))
    assert bytes.fromhex(told) == (FOLDER / f"{name}.msgpack").read_bytes()
    # A record's golden JSON is a whole DATA frame.
    assert name.startswith("record.") or f"`{(FOLDER / f'{name}.json').read_text()}`" in TEXT


def test_three_messages_are_decoded_by_hand() -> None:
    assert len(BY_HAND) == 3


def test_the_steps_cover_every_clause_once() -> None:
    found: Counter[int] = Counter()
    for cell in re.findall(r"^\| \d\. .*\| ([^|]+) \|$", TEXT, re.MULTILINE):
        for first, last in re.findall(r"C(\d+)(?:-C(\d+))?", cell):
            found.update(range(int(first), int(last or first) + 1))
    assert found == Counter(clauses().keys())


def test_the_figures_of_the_code_are_the_codes() -> None:
    limits = Welcome("s", [])
    defaults = {field.name: field.default for field in msgspec.structs.fields(Settings)}
    assert f"/ {defaults['gpu_monitoring_interval_seconds']:g} s figures of the machine" in TEXT
    assert f"{limits.window_records:,} records or {limits.window_bytes // 2**20} MiB" in TEXT
    assert f"silent for {limits.heartbeat_s:g} s" in TEXT
    assert f"{1_000_000 // 5 + 100_000 + 20_000:,}/s" in TEXT
    assert f"{round(1_000_000 / 60 + 120_000 + 900_000 / limits.heartbeat_s):,}/s" in TEXT


def test_the_storm_is_that_of_the_waits() -> None:
    random.seed(1)
    agents, away = 4000, 300.0
    dials: Counter[int] = Counter()
    returns = []
    for _ in range(agents):
        for at in itertools.accumulate(backoff()):
            dials[int(at)] += 1
            if at >= away:
                returns.append(at)
                break
    returns.sort()
    assert dials[0] / agents == pytest.approx(1.2, abs=0.1)
    assert max(count for second, count in dials.items() if second) / agents == pytest.approx(0.49, abs=0.05)
    assert max(Counter(map(int, returns)).values()) / agents == pytest.approx(0.035, abs=0.01)
    assert returns[int(0.95 * agents)] - away == pytest.approx(47, abs=4)
