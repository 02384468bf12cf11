"""JSON Schema and AsyncAPI 3 of the contract, made from its structs, and its tables in Markdown."""

import ast
import inspect
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

from protocol import failures, fields, jobspec, messages, records, rest, worker
from protocol.jobspec import JobSpec
from protocol.lifecycle import IGNORED, TRANSITIONS, WANTS, JobState, Trigger, Want
from protocol.messages import CONNECT_PATH, SUBPROTOCOL_JSON, SUBPROTOCOL_MSGPACK
from protocol.version import PROTOCOL_VERSION

JSON_SCHEMA = "https://json-schema.org/draft/2020-12/schema"
SCHEMA_FILE, ASYNCAPI_FILE = "schema.json", "asyncapi.json"
_AGENT = messages.AgentMessage.__args__
_HUB = messages.HubMessage.__args__
_RECORDS = records.AnyRecord.__args__
_FRAMES = tuple(dict.fromkeys((*_AGENT, *_HUB)))
_BODIES = (rest.SubmitJob, rest.Control, rest.Branch, rest.Execute)


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of every frame, record, REST body and of the job spec, under `$defs`."""
    definitions = _definitions("#/$defs/{name}")
    definitions["AgentMessage"] = _one_of(_AGENT, "#/$defs/", "What an agent may send.")
    definitions["HubMessage"] = _one_of(_HUB, "#/$defs/", "What a backend may send.")
    definitions["AnyRecord"] = _one_of(_RECORDS, "#/$defs/", "What a DATA frame may carry.")
    return {
        "$schema": JSON_SCHEMA,
        "$id": f"https://finetunelab.ai/schema/agent/v{PROTOCOL_VERSION}.json",
        "title": "FineTune Lab agent protocol",
        "description": (
            "Frames and records are arrays with an integer tag first. Fields are appended with defaults: a reader "
            "takes longer arrays than it knows, and passes over a tag that it does not know."
        ),
        "$defs": dict(sorted(definitions.items())),
    }


def async_api() -> dict[str, Any]:
    """Return the AsyncAPI 3.0 document of the socket."""
    prefix = "#/components/schemas/"
    channel = {"$ref": "#/channels/connect"}
    encodings = {SUBPROTOCOL_MSGPACK: "application/msgpack", SUBPROTOCOL_JSON: "application/json"}
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "FineTune Lab agent protocol",
            "version": f"{PROTOCOL_VERSION}.0.0",
            "description": (
                "An agent dials this channel and keeps it. Control is wanted state with versions, data are numbered "
                "records with acks; what is not acknowledged is sent again after a reconnect."
            ),
            "license": {"name": "MIT"},
        },
        "defaultContentType": "application/msgpack",
        "servers": {
            "backend": {
                "host": "app.finetunelab.ai",
                "protocol": "wss",
                "security": [{"$ref": "#/components/securitySchemes/apiKey"}],
            }
        },
        "channels": {
            "connect": {
                "address": CONNECT_PATH,
                "title": "The agent's socket",
                "servers": [{"$ref": "#/servers/backend"}],
                "messages": {
                    kind.__name__: {"$ref": f"#/components/messages/{kind.__name__}"} for kind in _FRAMES
                },
                "bindings": {
                    "ws": {
                        "method": "GET",
                        "headers": {
                            "type": "object",
                            "required": ["Authorization", rest.HEADER_AGENT, "Sec-WebSocket-Protocol"],
                            "properties": {
                                "Authorization": {"type": "string", "pattern": "^Bearer .+$"},
                                rest.HEADER_AGENT: {
                                    "type": "string",
                                    "pattern": "^agent_[A-Za-z0-9_-]{4,64}$",
                                },
                                "Sec-WebSocket-Protocol": {
                                    "type": "string",
                                    "enum": list(encodings),
                                    "description": "; ".join(
                                        f"{name}: {kind}" for name, kind in encodings.items()
                                    ),
                                },
                            },
                        },
                        "bindingVersion": "0.1.0",
                    }
                },
            }
        },
        "operations": {
            "agentSends": {
                "action": "send",
                "channel": channel,
                "summary": "What the agent sends.",
                "messages": [{"$ref": f"#/channels/connect/messages/{kind.__name__}"} for kind in _AGENT],
            },
            "agentReceives": {
                "action": "receive",
                "channel": channel,
                "summary": "What the backend sends.",
                "messages": [{"$ref": f"#/channels/connect/messages/{kind.__name__}"} for kind in _HUB],
            },
        },
        "components": {
            "securitySchemes": {
                "apiKey": {"type": "http", "scheme": "bearer", "description": "A key with scope `training`."}
            },
            "messages": {
                kind.__name__: {
                    "name": kind.__name__,
                    "summary": _sentence(kind),
                    "payload": {"$ref": f"{prefix}{kind.__name__}"},
                }
                for kind in _FRAMES
            },
            "schemas": {
                **_draft_07(dict(sorted(_definitions(prefix + "{name}").items()))),
                "AnyRecord": _one_of(_RECORDS, prefix, "What a DATA frame may carry."),
            },
        },
    }


def _definitions(template: str) -> dict[str, Any]:
    kinds = (*_FRAMES, *_RECORDS, JobSpec, *_BODIES)
    _, definitions = msgspec.json.schema_components(kinds, ref_template=template)
    for module in (fields, messages, records, jobspec, failures, worker, rest):
        for name, sentences in _sentences(module).items():
            kind = getattr(module, name)
            if name in definitions and issubclass(kind, msgspec.Struct):
                _name_fields(definitions[name], kind, sentences)
    data = definitions["Data"]["prefixItems"][3]
    # msgspec knows a Raw as anything; what stands there is a record.
    data["items"] = {"$ref": template.format(name="AnyRecord")}
    return dict(definitions)


def _name_fields(definition: dict[str, Any], kind: type[msgspec.Struct], sentences: dict[str, str]) -> None:
    """Add what msgspec leaves out: the names of an array's places, and the sentence under a field."""
    if "prefixItems" in definition:
        places = definition["prefixItems"]
        if len(places) > len(kind.__struct_fields__):
            places[0]["title"] = "tag"
            places = places[1:]
        fields = dict(zip(kind.__struct_fields__, places, strict=True))
        for name, place in fields.items():
            place["title"] = name
    else:
        fields = definition["properties"]
    for name, sentence in sentences.items():
        fields[name]["description"] = sentence


def _sentences(module: ModuleType) -> dict[str, dict[str, str]]:
    """Return for each class of a module the sentences under its fields."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ClassDef):
            fields = found[node.name] = {}
            for field, after in pairwise(node.body):
                if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
                    assert isinstance(field.target, ast.Name) and isinstance(after.value, ast.Constant)
                    fields[field.target.id] = str(after.value.value)
    return found


def _draft_07(schema: Any) -> Any:
    """Return the schema as AsyncAPI reads it: places of an array under `items`."""
    if isinstance(schema, list):
        return [_draft_07(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {("items" if name == "prefixItems" else name): _draft_07(part) for name, part in schema.items()}


def _one_of(kinds: tuple[type, ...], prefix: str, what: str) -> dict[str, Any]:
    return {"description": what, "oneOf": [{"$ref": f"{prefix}{kind.__name__}"} for kind in kinds]}


def _sentence(kind: type) -> str:
    return (kind.__doc__ or "").split(". ")[0].split("\n")[0]


def text(document: dict[str, Any]) -> str:
    """Return a document as it stands in its file."""
    return json.dumps(document, indent=2, ensure_ascii=True) + "\n"


def write(folder: Path) -> list[Path]:
    """Write both documents into ``folder``; return their paths."""
    written = []
    for name, document in ((SCHEMA_FILE, json_schema()), (ASYNCAPI_FILE, async_api())):
        path = folder / name
        path.write_text(text(document), encoding="utf-8")
        written.append(path)
    return written


def states_table() -> str:
    """Return the table of states: what moves a job, and what is late news."""
    rows = []
    for state in JobState:
        moves = [
            f"{trigger} -> {TRANSITIONS[state, trigger]}"
            for trigger in Trigger
            if (state, trigger) in TRANSITIONS
        ]
        late = [str(trigger) for trigger in Trigger if (state, trigger) in IGNORED]
        rows.append((str(state), ", ".join(moves) or "-", ", ".join(late) or "-"))
    return _markdown(("state", "moves", "late news, ignored"), rows)


def wants_table() -> str:
    """Return the table of wants: the trigger that each state answers with; - is to wait."""
    rows = [(str(state), *(str(WANTS[state, want] or "-") for want in Want)) for state in JobState]
    return _markdown(("state", *(f"want {want}" for want in Want)), rows)


def _markdown(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
