"""The page for adopters: its examples are the golden bytes, its figures the code's, its steps all clauses."""

import itertools
import json
import os
import random
import re
import shutil
import subprocess
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

import protocol
from agent.config import Settings
from agent.hub.greeting import ROLLED_BACK
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
    readme = (Path(protocol.__file__).parent / "README.md").read_text(encoding="utf-8")
    assert all(f"away for {ROLLED_BACK:g} s" in text for text in (TEXT, readme))
    defaults = {field.name: field.default for field in msgspec.structs.fields(Settings)}
    assert f"/ {defaults['gpu_monitoring_interval_seconds']:g} s figures of the machine" in TEXT
    assert f"{limits.window_records:,} records or {limits.window_bytes // 2**10} KiB" in TEXT
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


def programs_of_postgres() -> Path | None:
    """Return the folder of `initdb` and `pg_ctl`, which Debian keeps off the path."""
    found = shutil.which("pg_ctl")
    folders = [Path(found).parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return next((folder for folder in folders if (folder / "initdb").exists()), None)


@pytest.fixture
def sql() -> Iterator[Callable[[str], str]]:
    """Run statements on a PostgreSQL of its own."""
    programs = programs_of_postgres()
    if programs is None or shutil.which("psql") is None:
        pytest.skip("there is no PostgreSQL here")
    # It runs under no root.
    user = "postgres" if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if user is not None:
            shutil.chown(folder, user)
        options = {"user": user, "cwd": name, "check": True, "stdout": subprocess.DEVNULL}
        data = folder / "data"
        subprocess.run([programs / "initdb", "-N", "-A", "trust", "-U", "postgres", "-D", data], **options)
        listen = f"-k {folder} -c listen_addresses='' -F"
        pg_ctl = [programs / "pg_ctl", "-w", "-D", data]
        subprocess.run([*pg_ctl, "-o", listen, "-l", folder / "log", "start"], **options)

        def run(text: str) -> str:
            psql = ["psql", "-h", name, "-U", "postgres", "-q", "-At", "-v", "ON_ERROR_STOP=1", "-f", "-"]
            done = subprocess.run(psql, input=text, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            return done.stdout.strip()

        try:
            yield run
        finally:
            subprocess.run([*pg_ctl, "-m", "immediate", "stop"], **options)


def filled(statement: str, values: dict[str, str]) -> str:
    """Put values in for `$name`, a psql's own way being another."""
    return re.sub(r"\$(\w+)", lambda found: values[found[1]], statement)


def test_the_tables_and_statements_hold_in_postgresql(sql: Callable[[str], str]) -> None:
    tables, hello, change, data = re.findall(r"```sql\n(.*?)```", TEXT, re.DOTALL)
    sql(tables)
    sql("CREATE TABLE points_all PARTITION OF points DEFAULT")
    who = {
        "user": f"'{uuid.UUID(int=1)}'",
        "agent": "'agent_0001'",
        "install": "'i'",
        "node": "'n'",
        "machine": "'{}'",
    }
    first = "INSERT INTO agents (user_id, agent_id, install_id, boot, attempt, machine, last_seen)"
    sql(filled(first + " VALUES ($user, $agent, $install, 1, 5, $machine, now())", who))
    for boot, attempt, taken in ((1, 6, "1"), (1, 6, ""), (1, 4, ""), (2, 1, "1"), (1, 9, "")):
        assert sql(filled(hello, {**who, "boot": str(boot), "attempt": str(attempt)})) == taken
    [away] = re.findall(r"`(\(\(boot, attempt\) < .*?)`", TEXT)
    patient = hello.replace("(boot, attempt) < ($boot, $attempt)", away)
    sql("UPDATE agents SET node = NULL")
    assert sql(filled(patient, {**who, "boot": "1", "attempt": "1"})) == ""
    sql("UPDATE agents SET last_seen = now() - interval '121 s'")
    assert sql(filled(patient, {**who, "boot": "1", "attempt": "1"})) == "1"
    job = "INSERT INTO jobs (id, user_id, config, dataset_path, token_hash, state, caused_by, detail, version, observed)"
    sql(filled(job + " VALUES ('job', $user, '{}', '', '', 'running', '', '', 3, 7)", who))
    assert [sql(filled(change, {"1": "'job'", "want": "'pause'"})) for _ in range(2)] == ["8", "9"]
    points = [
        {
            "attempt": attempt,
            "step": step,
            "epoch": 0.5,
            "schema_id": 7,
            "time": 1.5,
            "vals": [loss, None],
            "trend": "",
        }
        for attempt, step, loss in ((1, 1, 2.5), (1, 2, "NaN"), (2, 2, 1.5))
    ]
    record = {
        "1": "1",
        "2": "'job'",
        "3": "1::smallint",
        "4": str(2**63 - 25),
        "5": f"'{json.dumps(points)}'",
    }
    [made] = re.findall(r"`(INSERT INTO streams .*?)`", TEXT)
    for _ in range(2):
        sql(filled(made, record))
    assert sql(filled(data, {**record, "hi": "3"})) == "0"
    assert sql(filled(data, {**record, "hi": "6"})) == "3"
    [curve] = re.findall(r"`(SELECT DISTINCT ON .*?)`", TEXT, re.DOTALL)
    shown = {"curve": filled(curve, record | {"1": record["2"]})}
    rows = sql(filled("SELECT step, attempt, vals FROM ($curve) AS curve", shown))
    assert rows.splitlines() == ["1|1|{2.5,NULL}", "2|2|{1.5,NULL}"]
