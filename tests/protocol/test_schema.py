"""The documents for backends in other languages: current, valid, and true of what is really sent."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest

from protocol import messages, records, rest, schema
from protocol.codec import Codec, encode_record
from protocol.jobspec import JobSpec, ModelSpec
from protocol.lifecycle import JobState, Want
from protocol.messages import (
    SUBPROTOCOL_JSON,
    SUBPROTOCOLS,
    Ack,
    Data,
    Hello,
    Machine,
    StreamAck,
    StreamHead,
    Welcome,
)
from protocol.records import JobStatus, Point

FOLDER = Path(schema.__file__).parent
DOCUMENT = schema.json_schema()
ASYNC = schema.async_api()
MACHINE = Machine("h", "linux", "os", "3.11", "1", "cpu", 2, 1.0, 2.0, 1.0, [], ["sft"])
HELLO = Hello("agent_0123456789abcdef", "i", 1, 1, 7, MACHINE, [StreamHead(1, 7, "", 0, 1, 0)])


@pytest.mark.parametrize(("name", "document"), [("schema.json", DOCUMENT), ("asyncapi.json", ASYNC)])
def test_the_files_are_current(name: str, document: dict[str, Any]) -> None:
    assert (FOLDER / name).read_text() == schema.text(document), "run training-agent schema --write protocol"


def test_the_schema_is_a_schema_and_names_everything() -> None:
    jsonschema.Draft202012Validator.check_schema(DOCUMENT)
    for union in (messages.AgentMessage, messages.HubMessage, records.AnyRecord):
        for kind in union.__args__:
            assert DOCUMENT["$defs"][kind.__name__]["prefixItems"][0] == {
                "enum": [kind.__struct_config__.tag],
                "title": "tag",
            }
    assert {"JobSpec", "SubmitJob", "Control", "Execute", "Failure"} <= set(DOCUMENT["$defs"])


def test_every_place_of_an_array_has_its_name() -> None:
    for name, definition in DOCUMENT["$defs"].items():
        for place in definition.get("prefixItems", []):
            assert place["title"], name
    places = DOCUMENT["$defs"]["Hello"]["prefixItems"]
    assert [place["title"] for place in places[1:]] == list(Hello.__struct_fields__)
    assert places[3]["description"].startswith("Counts starts of the agent")


def validator(name: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": DOCUMENT["$defs"]})


@pytest.mark.parametrize(
    ("name", "frame"),
    [
        ("AgentMessage", HELLO),
        ("HubMessage", Welcome("s", [StreamAck(1, 4)])),
        ("HubMessage", Ack([StreamAck(1, 4)])),
        (
            "AgentMessage",
            Data(
                1,
                1,
                [
                    msgspec.Raw(encode_record(JobStatus(1.0, 1, "running"))),
                    msgspec.Raw(encode_record(Point(1.0, 1, 3, 0.1, 1, [2.5, float("nan"), None]))),
                ],
            ),
        ),
    ],
)
def test_what_a_json_session_sends_is_what_the_schema_says(name: str, frame: Any) -> None:
    sent = json.loads(Codec(SUBPROTOCOL_JSON).encode(frame))
    validator(name).validate(sent)
    validator(name).validate([*sent, "a field of a newer version"])
    with pytest.raises(jsonschema.ValidationError):
        validator(name).validate([*sent[:1], {"wrong": 1}, *sent[2:]])


def test_a_job_and_the_rest_bodies_are_what_the_schema_says() -> None:
    spec = JobSpec(job_id="j", model=ModelSpec(name="m"))
    validator("JobSpec").validate(msgspec.to_builtins(spec))
    with pytest.raises(jsonschema.ValidationError):
        validator("JobSpec").validate({**msgspec.to_builtins(spec), "unknown": 1})
    validator("SubmitJob").validate(msgspec.to_builtins(rest.SubmitJob(config={"model": {}})))


def test_the_asyncapi_document_holds_together() -> None:
    assert ASYNC["asyncapi"] == "3.0.0" and set(ASYNC["info"]) >= {"title", "version"}
    for reference in references(ASYNC):
        found: Any = ASYNC
        for part in reference.removeprefix("#/").split("/"):
            found = found[part]
        assert isinstance(found, dict), reference
    channel = ASYNC["channels"]["connect"]
    assert channel["address"] == messages.CONNECT_PATH
    headers = channel["bindings"]["ws"]["headers"]["properties"]
    assert headers["Sec-WebSocket-Protocol"]["enum"] == list(SUBPROTOCOLS)
    sent = {part["$ref"].rsplit("/", 1)[1] for part in ASYNC["operations"]["agentSends"]["messages"]}
    assert sent == {kind.__name__ for kind in messages.AgentMessage.__args__}
    jsonschema.Draft7Validator.check_schema({"definitions": ASYNC["components"]["schemas"]})
    hello = {"$ref": "#/components/schemas/Hello", "components": ASYNC["components"]}
    jsonschema.Draft7Validator(hello).validate(json.loads(Codec(SUBPROTOCOL_JSON).encode(HELLO)))


def references(tree: Any) -> list[str]:
    if isinstance(tree, list):
        return [found for part in tree for found in references(part)]
    if isinstance(tree, dict):
        own = [tree["$ref"]] if isinstance(tree.get("$ref"), str) else []
        return own + [found for part in tree.values() for found in references(part)]
    return []


def test_the_tables_have_a_row_for_each() -> None:
    states = schema.states_table().splitlines()
    assert len(states) == 2 + len(JobState)
    assert "| pausing | cancel -> cancelling, released -> paused," in schema.states_table()
    wants = schema.wants_table().splitlines()
    assert wants[0] == "| state | want run | want pause | want stop | want cancel |"
    assert len(wants) == 2 + len(JobState) and len(Want) == wants[0].count("want")
    assert "| paused | resume | - | resume | cancel |" in wants
