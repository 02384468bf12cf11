"""The contract in words says what the code does."""

import inspect
import re
from pathlib import Path

import pytest

import agent
import protocol
from agent.net.retry import GROWTH, backoff
from protocol import schema
from protocol.fields import MAX_FRAME
from protocol.messages import (
    CONNECT_PATH,
    SUBPROTOCOLS,
    AgentMessage,
    Close,
    CommandKind,
    HubMessage,
    Offer,
    StreamHead,
)
from protocol.records import AnyRecord
from protocol.rest import DATASET, HEADER_AGENT, HEADER_RANGE, HEADER_STREAM
from protocol.session import SILENCE, WELCOME_WITHIN
from tests.protocol import refusals

PATH = Path(protocol.__file__).parent / "README.md"
AGENT = Path(agent.__file__).parent
TEXT = PATH.read_text(encoding="utf-8")
TABLES = {
    "states": schema.states_table,
    "wants": schema.wants_table,
    **refusals.TABLES,
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_the_one_that_the_code_prints(name: str) -> None:
    said = TABLES[name]()
    assert refusals.between(name, TEXT).strip() == said.strip(), f"put this between the markers:\n\n{said}"


def test_every_close_code_has_a_row() -> None:
    assert set(Close) <= set(refusals.WHEN)


def test_what_the_user_reads_at_a_refusal_is_what_the_code_says() -> None:
    code = " ".join(
        re.sub(r'"\s*f?"', "", path.read_text(encoding="utf-8")) for path in AGENT.rglob("*.py")
    ).replace('\\"', '"')
    rows = TEXT.partition("### Refusals without a code")[2].partition("\n## ")[0]
    quoted = [cell for cell in re.findall(r"`([^`|]+)`", rows) if " " in cell]
    assert len(quoted) == 5
    for sentence in quoted:
        pattern = r"[^\n]{0,80}?".join(map(re.escape, re.split(r"\{\w+\}", sentence)))
        assert re.search(pattern, code), sentence


def test_the_waits_between_dials_are_those_of_the_code() -> None:
    first, cap = (inspect.signature(backoff).parameters[name].default for name in ("first", "cap"))
    assert f"a window that grows from {first:g} s by {GROWTH:g} to {cap:g} s" in TEXT


def rows_of(heading: str) -> dict[str, list[str]]:
    """The rows of the table whose second column is called ``heading``, by that column."""
    lines = TEXT.splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith(f"| tag | {heading} |"))
    rows: dict[str, list[str]] = {}
    for line in lines[begin + 2 :]:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows[cells[1]] = cells
    return rows


def fields_in(cell: str) -> list[str]:
    """The names of fields, without what is in brackets."""
    return [name.strip() for name in re.sub(r"[\[(].*?[\])]+", "", cell).split(",")]


def test_every_frame_is_there_with_its_tag_and_fields() -> None:
    rows = rows_of("frame")
    kinds = {*AgentMessage.__args__, *HubMessage.__args__}
    assert len(rows) == len(kinds)
    for kind in kinds:
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.__name__).upper()
        cells = rows[name]
        assert int(cells[0]) == kind.__struct_config__.tag
        by_agent, by_hub = kind in AgentMessage.__args__, kind in HubMessage.__args__
        assert cells[2] == ("either" if by_agent and by_hub else "agent" if by_agent else "backend")
        assert fields_in(cells[3]) == list(kind.__struct_fields__), name
    assert ", ".join(Offer.__struct_fields__) in rows["DESIRED"][3]
    assert ", ".join(StreamHead.__struct_fields__) in rows["HELLO"][3]


def test_every_record_is_there_with_its_tag_and_fields() -> None:
    rows = rows_of("record")
    assert set(rows) == {kind.__name__ for kind in AnyRecord.__args__}
    for kind in AnyRecord.__args__:
        cells = rows[kind.__name__]
        tag = kind.__struct_config__.tag
        assert (int(cells[0]), int(cells[2])) == (tag, 0 if tag < 16 else 1 if tag < 24 else 2)
        assert fields_in(cells[3]) == list(kind.__struct_fields__), kind.__name__


def test_the_figures_are_those_of_the_code() -> None:
    for said in (
        CONNECT_PATH,
        *SUBPROTOCOLS,
        HEADER_AGENT,
        HEADER_STREAM,
        HEADER_RANGE,
        DATASET.format(job_id="{id}"),
        f"{MAX_FRAME:,} bytes",
        f"{SILENCE:g} intervals",
        f"WELCOME within {WELCOME_WITHIN:g} s",
        *(f"`{kind}`" for kind in CommandKind),
    ):
        assert said in TEXT, said


def test_what_the_scenarios_ask_of_whoever_runs_them_is_said() -> None:
    folder = Path(__file__).parents[1] / "contract"
    code = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    names = set(re.findall(r'environ(?:\.get\(|\[)"(AGENT_TEST_\w+)"', code))
    assert len(names) == 3
    for page in (TEXT, PATH.with_name("adopting.md").read_text(encoding="utf-8")):
        assert all(f"{name}=" in page for name in names)
