"""The shapes of a row: which one it has, whether it is whole, and what TRL is given for it."""

import json
from collections.abc import Mapping
from typing import Any

from protocol.jobspec import DataFormat

Columns = tuple[tuple[str, ...], ...]

REQUIRED: dict[DataFormat, Columns] = {
    DataFormat.MESSAGES: (("messages",),),
    DataFormat.SHAREGPT: (("conversations",),),
    DataFormat.ALPACA: (("instruction",), ("output", "response")),
    DataFormat.PROMPT_COMPLETION: (("prompt",), ("completion", "response")),
    DataFormat.TEXT: (("text",),),
}
"""What a row of each shape must hold, in the order in which shapes are tried; of a group one name is enough."""

USED: dict[DataFormat, frozenset[str]] = {
    DataFormat.MESSAGES: frozenset({"messages", "tools"}),
    DataFormat.SHAREGPT: frozenset({"conversations", "system", "tools"}),
    DataFormat.ALPACA: frozenset({"instruction", "input", "output", "response", "system"}),
    DataFormat.PROMPT_COMPLETION: frozenset({"prompt", "completion", "response", "tools"}),
    DataFormat.TEXT: frozenset({"text"}),
}
"""Columns that are read; others are left out."""

SHAPES = (
    '{"messages": [{"role", "content"}, ...]}, {"conversations": [{"from", "value"}, ...]}, '
    '{"instruction", "input"?, "output"}, {"prompt", "completion"} or {"text"}'
)
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
_ALPACA_PLAIN = "Write a response that appropriately completes the request."


class BadRow(Exception):
    """A row that cannot be trained on; the text says why and what to do, without the row's number."""


def detect(row: Mapping[str, Any]) -> DataFormat | None:
    """Return the shape of ``row``; one whose columns hold something goes before one whose are null."""
    for form, groups in REQUIRED.items():
        if all(any(row.get(name) is not None for name in group) for group in groups):
            return form
    return next((form for form in REQUIRED if has_columns(row, form)), None)


def has_columns(row: Mapping[str, Any], form: DataFormat) -> bool:
    """Tell whether ``row`` has every column of ``form``, null or not."""
    return all(any(name in row for name in group) for group in REQUIRED[form])


def wrong_columns(row: Mapping[str, Any], form: DataFormat | None = None) -> str:
    """Return the sentence for a row whose columns fit no shape, or not the one that was asked for."""
    found = ", ".join(sorted(map(str, row))) or "none"
    if form is not None:
        needed = " and ".join(" or ".join(map(repr, group)) for group in REQUIRED[form])
        return f"the format is {form}, which needs {needed}, but the columns are: {found}."
    if {"prompt", "chosen", "rejected"} <= row.keys() or {"chosen", "rejected"} <= row.keys():
        return f"these are preference pairs (columns {found}), which supervised fine-tuning cannot use."
    return f"no shape fits the columns: {found}. Accepted are {SHAPES}."


def canonical(row: Mapping[str, Any], form: DataFormat, chat: bool) -> dict[str, Any]:
    """Return ``row`` as TRL takes it; ``chat`` says whether the tokenizer has a chat template.

    The result holds "messages", or "prompt" and "completion", or "text"; "tools", where there are
    any, is JSON. Raises BadRow.
    """
    match form:
        case DataFormat.TEXT:
            return {"text": _string(row.get("text"), "text")}
        case DataFormat.MESSAGES:
            messages = _turns(row.get("messages"), "messages")
            return _conversation(messages, row.get("tools"))
        case DataFormat.SHAREGPT:
            messages = _turns(row.get("conversations"), "conversations")
            if row.get("system"):
                messages.insert(0, {"role": "system", "content": _string(row["system"], "system")})
            return _conversation(messages, row.get("tools"))
        case DataFormat.ALPACA:
            return _alpaca(row, chat)
        case DataFormat.PROMPT_COMPLETION:
            return _prompt_completion(row, chat)
    raise ValueError(f"{form} names no shape")  # AUTO is resolved before a row comes here


def _string(value: Any, field: str) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        raise BadRow(f"{field} is null. Fill it in or remove the row.")
    raise BadRow(f"{field} is {_kind(value)} where text is needed. Correct or remove the row.")


def _filled(value: Any, field: str) -> str:
    text = _string(value, field)
    if not text.strip():
        raise BadRow(f"{field} is empty, so there is nothing to learn. Fill it in or remove the row.")
    return text


def _kind(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), f"of type {type(value).__name__}")


def _either(row: Mapping[str, Any], *names: str) -> tuple[Any, str]:
    """Return the first of the columns that holds something, and its name."""
    present = [name for name in names if name in row]
    name = next((name for name in present if row[name] is not None), present[0] if present else names[0])
    return row.get(name), name


def _alpaca(row: Mapping[str, Any], chat: bool) -> dict[str, Any]:
    instruction = _filled(row.get("instruction"), "instruction")
    extra = _string(row.get("input") or "", "input")
    system = _string(row.get("system") or "", "system")
    answer = _filled(*_either(row, "output", "response"))
    if chat:
        messages = [{"role": "system", "content": system}] if system else []
        question = f"{instruction}\n\n{extra}" if extra.strip() else instruction
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return {"messages": messages}
    paired = ", paired with an input that provides further context" if extra.strip() else ""
    opening = system or f"Below is an instruction that describes a task{paired}. {_ALPACA_PLAIN}"
    context = f"### Input:\n{extra}\n\n" if extra.strip() else ""
    return {
        "prompt": f"{opening}\n\n### Instruction:\n{instruction}\n\n{context}### Response:\n",
        "completion": answer,
    }


def _prompt_completion(row: Mapping[str, Any], chat: bool) -> dict[str, Any]:
    prompt, answer = _parsed(row.get("prompt")), _either(row, "completion", "response")
    completion, field = _parsed(answer[0]), answer[1]
    if isinstance(prompt, list) or isinstance(completion, list):
        if not chat:
            raise BadRow(
                "prompt and completion are lists of turns, and the tokenizer has no chat template. "
                "Set tokenizer.chat_template, or give them as text."
            )
        turns = _turns(prompt, "prompt") if isinstance(prompt, list) else _turn("user", prompt, "prompt")
        answers = (
            _turns(completion, field)
            if isinstance(completion, list)
            else _turn("assistant", completion, field)
        )
        if not any(turn["role"] == "assistant" for turn in answers):
            raise BadRow(f"{field} has no assistant turn, so there is nothing to learn. Correct the row.")
        return _with_tools({"prompt": turns, "completion": answers}, row.get("tools"))
    if chat:
        pair = {
            "prompt": _turn("user", prompt, "prompt"),
            "completion": _turn("assistant", completion, field),
        }
        return _with_tools(pair, row.get("tools"))
    return {"prompt": _string(prompt, "prompt"), "completion": _filled(completion, field)}


def _turn(role: str, value: Any, field: str) -> list[dict[str, Any]]:
    return [
        {"role": role, "content": _filled(value, field) if role == "assistant" else _string(value, field)}
    ]


def _parsed(value: Any) -> Any:
    """Return a list of turns that a cell of CSV or Parquet holds as JSON; anything else as it is."""
    if isinstance(value, str) and value.startswith("[{"):
        try:
            parsed = json.loads(value)
        except json.JSONDecodeError:
            return value
        return parsed if isinstance(parsed, list) else value
    return value


def _conversation(messages: list[dict[str, Any]], tools: Any) -> dict[str, Any]:
    answers = [turn for turn in messages if turn["role"] == "assistant"]
    if not answers:
        raise BadRow(
            "the conversation has no assistant turn, so there is nothing to learn. Add one or remove the row."
        )
    if not any(turn["content"].strip() or len(turn) > 2 for turn in answers):
        raise BadRow(
            "every assistant turn is empty, so there is nothing to learn. Fill one in or remove the row."
        )
    return _with_tools({"messages": messages}, tools)


def _with_tools(row: dict[str, Any], tools: Any) -> dict[str, Any]:
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


def _turns(value: Any, field: str) -> list[dict[str, Any]]:
    """Return the turns of a conversation as {"role", "content", ...}, whichever way they are spelt."""
    value = _parsed(value)
    if value is None:
        raise BadRow(f"{field} is null. Fill it in or remove the row.")
    if not isinstance(value, list):
        raise BadRow(f"{field} is {_kind(value)} where a list of turns is needed. Correct or remove the row.")
    if not value:
        raise BadRow(f"{field} is an empty list. Add turns or remove the row.")
    return [_one_turn(turn, f"{field}[{index}]") for index, turn in enumerate(value)]


def _one_turn(turn: Any, field: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise BadRow(f"{field} is {_kind(turn)} where a turn with a role and a content is needed.")
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
        return _string(content, field)
    texts = []
    for index, part in enumerate(content):
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and part.get("type", "text") == "text":
            texts.append(_string(part.get("text"), f"{field}[{index}].text"))
        else:
            kind = part.get("type") if isinstance(part, dict) else _kind(part)
            raise BadRow(f"{field}[{index}] is {kind!r}; only parts of type text can be trained on here.")
    return "".join(texts)
