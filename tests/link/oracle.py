"""Whether the hub's copy is what was said: of the trainer's own record, of the job's log, and record by record."""

import hashlib
import sqlite3
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from agent.runtime.logs import read_lines
from protocol.codec import decode_record
from protocol.lifecycle import TRANSITIONS
from protocol.records import CommandDone, JobStatus
from tests.link.stand import Stand

ONWARD = {(before.value, after.value) for (before, _), after in TRANSITIONS.items()}
_PAGE = 10_000


@dataclass
class Tally:
    """What was counted so far, and every sentence about what is wrong."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def curve_hash(points: list[tuple[int, int, list[tuple[str, float]]]]) -> str:
    """Return one hash of (step, attempt, values by name) of a whole curve."""
    return hashlib.blake2b(repr(points).encode(), digest_size=16).hexdigest()


def said_curve(stand: Stand, job: str) -> list[tuple[int, int, list[tuple[str, float]]]]:
    """Return the trainer's own record: of each step, what its newest attempt said."""
    newest: dict[int, tuple[int, list[tuple[str, float]]]] = {}
    for said in stand.said(job):
        if said.step:
            newest[said.step] = (said.attempt, sorted(said.values.items()))
    return [(step, *newest[step]) for step in sorted(newest)]


def hub_curve(stand: Stand, job: str) -> list[tuple[int, int, list[tuple[str, float]]]]:
    """Return the curve that the hub shows, of the fields that the fake trainer gives."""
    names = ("grad_norm", "learning_rate", "train_loss", "train_perplexity")
    return [
        (point["step"], point["attempt"], [(name, point[name]) for name in names])
        for point in stand.hub.metrics(job)
    ]


def hub_log(stand: Stand, job: str) -> list[str]:
    lines: list[str] = []
    while True:
        page = stand.hub.get(f"/api/training/local/{job}/logs?limit={_PAGE}&offset={len(lines)}")
        lines += page["logs"]
        if len(page["logs"]) < _PAGE:
            return lines


def log_file(stand: Stand, job: str) -> list[str]:
    return read_lines(stand.logs / f"{job}.log", 0, 10**9)[0]


def check_curve(stand: Stand, job: str, tally: Tally) -> None:
    """Every step once, of the newest attempt, with what was said of it; and no other."""
    said, have = said_curve(stand, job), hub_curve(stand, job)
    tally.counts["points"] += len(said)
    if curve_hash(said) == curve_hash(have):
        return
    steps, there = {point[0] for point in said}, Counter(point[0] for point in have)
    tally.counts["points missing"] += len(steps - set(there))
    other = [pair for pair in zip(said, have, strict=False) if pair[0] != pair[1]][:1]
    tally.wrong.append(
        f"{job}: the hub's curve is not the trainer's; missing {sorted(steps - set(there))[:5]}, "
        f"more than said {sorted(set(there) - steps)[:5]}, first difference {other}"
    )


def check_points(stand: Stand, job: str, tally: Tally) -> None:
    """No point is there that nobody said. Whether one was stored twice is asked record by record."""
    said = {(point.step, point.attempt) for point in stand.said(job) if point.step}
    db = sqlite3.connect(f"file:{_database(stand.hub.data)}?mode=ro", uri=True)
    rows = db.execute(
        "SELECT step, attempt FROM points WHERE job=(SELECT seq FROM jobs WHERE id=?)", (job,)
    ).fetchall()
    db.close()
    invented = [row for row in rows if row not in said]
    if invented:
        tally.wrong.append(f"{job}: never said {invented[:5]}")


def check_log(stand: Stand, job: str, tally: Tally) -> None:
    """Every line of the log file once, in order."""
    lines, have = log_file(stand, job), hub_log(stand, job)
    tally.counts["lines"] += len(lines)
    if lines != have:
        at = next(
            (number for number, (one, other) in enumerate(zip(lines, have, strict=False)) if one != other),
            min(len(lines), len(have)),
        )
        tally.wrong.append(
            f"{job}: its log has {len(lines)} lines and the hub {len(have)}; they differ from line {at}: "
            f"{lines[at : at + 2]} and {have[at : at + 2]}"
        )


def check_states(stand: Stand, tally: Tally, ended: dict[str, str], retries: dict[str, int]) -> None:
    """States follow each other as the table allows, the last is right, a command is answered and done once."""
    db = sqlite3.connect(f"file:{_database(stand.hub.data)}?mode=ro", uri=True)
    rows = db.execute(
        "SELECT scope, body FROM link_took WHERE lane=0 AND body IS NOT NULL ORDER BY n"
    ).fetchall()
    commands = db.execute("SELECT id, status FROM commands").fetchall()
    db.close()
    states: dict[str, list[str]] = {}
    answers: dict[str, list[str]] = {}
    for scope, body in rows:
        match decode_record(body):
            case JobStatus(state=state):
                states.setdefault(scope, []).append(state)
            case CommandDone(command_id=command_id, status=status):
                answers.setdefault(command_id, []).append(status)
            case _:
                pass
    for job, want in ended.items():
        path = states.get(job, [])
        tally.counts["states"] += len(path)
        bad = [pair for pair in pairwise(path) if pair[0] != pair[1] and pair not in ONWARD]
        if bad:
            tally.wrong.append(f"{job}: states in an order that is not legal: {bad[:3]} in {path[-20:]}")
        if path[-1:] != [want]:
            tally.wrong.append(f"{job}: its last state is {path[-1:]}, not {want}")
        again = sum(pair == ("failed", "queued") for pair in pairwise(path))
        if again != retries.get(job, 0):
            tally.wrong.append(f"{job}: begun again {again} times for {retries.get(job, 0)} commands")
    tally.counts["commands"] = len(commands)
    tally.counts["answered again"] = sum(map(len, answers.values())) - len(answers)
    for command_id, status in commands:
        # One that came a second time is answered a second time, by what was noted at the first.
        if status != "done" or set(answers.get(command_id, [])) != {"done"}:
            tally.wrong.append(f"{command_id}: {status!r}, answered {answers.get(command_id)}")


def check_records(stand: Stand, tally: Tally) -> None:
    """Record by record: what the agent's journal was given, and what the hub stored. The agent is stopped."""
    db = sqlite3.connect(stand.agent.home / "journal.sqlite")
    said: dict[Any, list[bytes]] = {}
    for epoch, scope, lane, body in db.execute(
        "SELECT epoch, scope, lane, digest FROM link_said ORDER BY epoch, scope, lane, seq"
    ):
        said.setdefault((epoch, scope, lane), []).append(body)
    kept = {
        (epoch, scope, lane): last - acked
        for epoch, scope, lane, last, acked in db.execute(
            "SELECT epoch, scope, lane, last, acked FROM streams"
        )
    }
    db.close()
    db = sqlite3.connect(f"file:{_database(stand.hub.data)}?mode=ro", uri=True)
    took: dict[Any, list[bytes | None]] = {}
    for epoch, scope, lane, body, buried in db.execute(
        "SELECT epoch, scope, lane, digest, buried FROM link_took ORDER BY n"
    ):
        took.setdefault((epoch, scope, lane), []).extend([None] * buried if buried else [body])
    db.close()
    counts: Counter[str] = Counter(records=sum(map(len, said.values())))
    for stream, have in took.items():
        there = said.get(stream, [])
        counts["buried"] += have.count(None)
        if len(have) <= len(there) and all(
            one in (None, other) for one, other in zip(have, there, strict=False)
        ):
            continue
        much: Counter[bytes | None] = Counter(have)
        were: Counter[bytes | None] = Counter(there)
        more = sum((much - were).values())
        counts["doubled"] += more
        if not more:
            counts["out of order"] += 1
        tally.wrong.append(f"stream {stream}: {len(have)} records for {len(there)} said, {more} too many")
    for stream, there in said.items():
        missing = len(there) - len(took.get(stream, []))
        still = kept.get(stream, 0)
        if missing > still:
            counts["lost"] += missing - still
            tally.wrong.append(f"stream {stream}: {missing - still} of {len(there)} records are nowhere")
        # What was stored and whose acknowledgement has not come counts with neither.
        counts["still to be sent"] += max(0, missing)
    for name in ("records", "lost", "doubled", "out of order", "buried", "still to be sent"):
        tally.counts[name] = counts[name]


def _database(data: Path) -> Path:
    return data / "hub.sqlite3"
