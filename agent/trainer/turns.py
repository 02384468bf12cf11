"""The text and the turns that a row holds, however they are spelt; and the error for those that cannot be used."""

import json
from typing import Any

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "ipython"})
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
TURN_EXTRAS = ("name", "tool_calls", "tool_call_id", "reasoning_content", "thinking")
"""Keys of a turn, beside role and content, that chat templates read."""


class BadRow(Exception):
    """A row that cannot be trained on; the text says why and what to do, without the row's number."""


def as_text(value: Any, field: str) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        raise BadRow(f"{field} is null. Fill it in or remove the row.")
    raise BadRow(f"{field} is {kind_of(value)} where text is needed. Correct or remove the row.")


def filled_text(value: Any, field: str) -> str:
    text = as_text(value, field)
    if not text.strip():
        raise BadRow(f"{field} is empty, so there is nothing to learn. Fill it in or remove the row.")
    return text


def kind_of(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), f"of type {type(value).__name__}")


def one_turn(role: str, value: Any, field: str) -> list[dict[str, Any]]:
    """Return a conversation of one turn; an assistant's must say something."""
    return [
        {"role": role, "content": filled_text(value, field) if role == "assistant" else as_text(value, field)}
    ]


def parsed_turns(value: Any) -> Any:
    """Return a list of turns that a cell of CSV or Parquet holds as JSON; anything else as it is."""
    if isinstance(value, str) and value.startswith("[{"):
        try:
            found = json.loads(value)
        except json.JSONDecodeError:
            return value
        return found if isinstance(found, list) else value
    return value


def with_tools(row: dict[str, Any], tools: Any) -> dict[str, Any]:
    """Return ``row`` with its tools, where there are any, as JSON."""
    if not tools:
        return row
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as exc:
            raise BadRow(f"tools is not valid JSON ({exc.msg} at column {exc.colno}).") from exc
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow("tools must be a list of JSON schemas.")
    # TRL reads a tools column of text as JSON; as a struct, every tool would gain the others' null keys.
    return {**row, "tools": json.dumps(tools)} if tools else row


def as_turns(value: Any, field: str) -> list[dict[str, Any]]:
    """Return the turns of a conversation as {"role", "content", ...}, whichever way they are spelt."""
    value = parsed_turns(value)
    if value is None:
        raise BadRow(f"{field} is null. Fill it in or remove the row.")
    if not isinstance(value, list):
        raise BadRow(
            f"{field} is {kind_of(value)} where a list of turns is needed. Correct or remove the row."
        )
    if not value:
        raise BadRow(f"{field} is an empty list. Add turns or remove the row.")
    return [_spelt_out(turn, f"{field}[{index}]") for index, turn in enumerate(value)]


def _spelt_out(turn: Any, field: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise BadRow(f"{field} is {kind_of(turn)} where a turn with a role and a content is needed.")
    if turn.get("from") is not None:
        role, content, label = SHAREGPT_ROLES.get(str(turn["from"]).lower()), turn.get("value"), "value"
        if role is None:
            known = ", ".join(SHAREGPT_ROLES)
            raise BadRow(f"{field}.from is {turn['from']!r}. Known are {known}.")
    elif "role" in turn:
        role, content, label = turn["role"], turn.get("content"), "content"
        if role not in ROLES:
            raise BadRow(f"{field}.role is {role!r}. Known are {', '.join(sorted(ROLES))}.")
    else:
        found = ", ".join(sorted(map(str, turn))) or "none"
        raise BadRow(f'{field} needs "role" and "content" (or "from" and "value"); its keys are: {found}.')
    # A null extra is one that Parquet filled in for a turn that has none.
    extras = {key: turn[key] for key in TURN_EXTRAS if turn.get(key) is not None}
    if content is None and extras.get("tool_calls"):
        content = ""
    return {"role": role, "content": _content(content, f"{field}.{label}"), **extras}


def _content(content: Any, field: str) -> str:
    """Return the text of a turn; a list of text parts becomes one text."""
    if not isinstance(content, list):
        return as_text(content, field)
    texts = []
    for index, part in enumerate(content):
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and part.get("type", "text") == "text":
            texts.append(as_text(part.get("text"), f"{field}[{index}].text"))
        else:
            found = part.get("type") if isinstance(part, dict) else kind_of(part)
            raise BadRow(f"{field}[{index}] is {found!r}; only parts of type text can be trained on here.")
    return "".join(texts)
