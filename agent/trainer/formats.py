"""The shapes of a row: which one it has, whether it is whole, and what TRL is given for it."""

from collections.abc import Mapping
from typing import Any

from agent.trainer.pairs import preference_pair
from agent.trainer.turns import BadRow, as_text, as_turns, filled_text, one_turn, parsed_turns, with_tools
from protocol.jobspec import DataFormat

Columns = tuple[tuple[str, ...], ...]

REQUIRED: dict[DataFormat, Columns] = {
    DataFormat.MESSAGES: (("messages",),),
    DataFormat.SHAREGPT: (("conversations",),),
    DataFormat.ALPACA: (("instruction",), ("output", "response")),
    DataFormat.PROMPT_COMPLETION: (("prompt",), ("completion", "response")),
    DataFormat.TEXT: (("text",),),
    DataFormat.PREFERENCE: (("chosen",), ("rejected",)),
}
"""What a row of each shape must hold, in the order in which shapes are tried; of a group one name is enough."""

USED: dict[DataFormat, frozenset[str]] = {
    DataFormat.MESSAGES: frozenset({"messages", "tools"}),
    DataFormat.SHAREGPT: frozenset({"conversations", "system", "tools"}),
    DataFormat.ALPACA: frozenset({"instruction", "input", "output", "response", "system"}),
    DataFormat.PROMPT_COMPLETION: frozenset({"prompt", "completion", "response", "tools"}),
    DataFormat.TEXT: frozenset({"text"}),
    DataFormat.PREFERENCE: frozenset({"prompt", "question", "system", "chosen", "rejected", "tools"}),
}
"""Columns that are read; others are left out."""

SHAPES = (
    '{"messages": [{"role", "content"}, ...]}, {"conversations": [{"from", "value"}, ...]}, '
    '{"instruction", "input"?, "output"}, {"prompt", "completion"} or {"text"}'
)
PAIRS = '{"prompt", "chosen", "rejected"} or {"chosen", "rejected"} with the prompt at the head of both'
_ALPACA_PLAIN = "Write a response that appropriately completes the request."


def detect(row: Mapping[str, Any], pairs: bool = False) -> DataFormat | None:
    """Return the shape of ``row``; one whose columns hold something goes before one whose are null.

    ``pairs`` says that preference pairs are wanted, and nothing else; without it they are never taken.
    """
    forms = [form for form in REQUIRED if (form is DataFormat.PREFERENCE) == pairs]
    for form in forms:
        if all(any(row.get(name) is not None for name in group) for group in REQUIRED[form]):
            return form
    return next((form for form in forms if has_columns(row, form)), None)


def has_columns(row: Mapping[str, Any], form: DataFormat) -> bool:
    """Tell whether ``row`` has every column of ``form``, null or not."""
    return all(any(name in row for name in group) for group in REQUIRED[form])


def wrong_columns(row: Mapping[str, Any], form: DataFormat | None = None, pairs: bool = False) -> str:
    """Return the sentence for a row whose columns fit no shape, or not the one that was asked for."""
    found = ", ".join(sorted(map(str, row))) or "none"
    if pairs:
        return (
            f"the method dpo needs preference pairs, {PAIRS}, but the columns are: {found}. "
            "Give such data, or set the method to sft."
        )
    if form is not None:
        needed = " and ".join(" or ".join(map(repr, group)) for group in REQUIRED[form])
        return f"the format is {form}, which needs {needed}, but the columns are: {found}."
    if has_columns(row, DataFormat.PREFERENCE):
        return (
            f"these are preference pairs (columns {found}), which supervised fine-tuning cannot use. "
            "Set the method to dpo, or give other data."
        )
    return f"no shape fits the columns: {found}. Accepted are {SHAPES}."


def canonical(row: Mapping[str, Any], form: DataFormat, chat: bool) -> dict[str, Any]:
    """Return ``row`` as TRL takes it; ``chat`` says whether the tokenizer has a chat template.

    The result holds "messages", or "prompt" and "completion", or "prompt", "chosen" and "rejected", or
    "text"; "tools", where there are any, is JSON. Raises BadRow.
    """
    match form:
        case DataFormat.TEXT:
            return {"text": as_text(row.get("text"), "text")}
        case DataFormat.MESSAGES:
            messages = as_turns(row.get("messages"), "messages")
            return _conversation(messages, row.get("tools"))
        case DataFormat.SHAREGPT:
            messages = as_turns(row.get("conversations"), "conversations")
            if row.get("system"):
                messages.insert(0, {"role": "system", "content": as_text(row["system"], "system")})
            return _conversation(messages, row.get("tools"))
        case DataFormat.ALPACA:
            return _alpaca(row, chat)
        case DataFormat.PROMPT_COMPLETION:
            return _prompt_completion(row, chat)
        case DataFormat.PREFERENCE:
            return preference_pair(row, chat)
    raise ValueError(f"{form} names no shape")  # AUTO is resolved before a row comes here


def _either(row: Mapping[str, Any], *names: str) -> tuple[Any, str]:
    """Return the first of the columns that holds something, and its name."""
    present = [name for name in names if name in row]
    name = next((name for name in present if row[name] is not None), present[0] if present else names[0])
    return row.get(name), name


def _alpaca(row: Mapping[str, Any], chat: bool) -> dict[str, Any]:
    instruction = filled_text(row.get("instruction"), "instruction")
    extra = as_text(row.get("input") or "", "input")
    system = as_text(row.get("system") or "", "system")
    answer = filled_text(*_either(row, "output", "response"))
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
    prompt, answer = parsed_turns(row.get("prompt")), _either(row, "completion", "response")
    completion, field = parsed_turns(answer[0]), answer[1]
    if isinstance(prompt, list) or isinstance(completion, list):
        if not chat:
            raise BadRow(
                "prompt and completion are lists of turns, and the tokenizer has no chat template. "
                "Set tokenizer.chat_template, or give them as text."
            )
        turns = as_turns(prompt, "prompt") if isinstance(prompt, list) else one_turn("user", prompt, "prompt")
        answers = (
            as_turns(completion, field)
            if isinstance(completion, list)
            else one_turn("assistant", completion, field)
        )
        if not any(turn["role"] == "assistant" for turn in answers):
            raise BadRow(f"{field} has no assistant turn, so there is nothing to learn. Correct the row.")
        return with_tools({"prompt": turns, "completion": answers}, row.get("tools"))
    if chat:
        pair = {
            "prompt": one_turn("user", prompt, "prompt"),
            "completion": one_turn("assistant", completion, field),
        }
        return with_tools(pair, row.get("tools"))
    return {"prompt": as_text(prompt, "prompt"), "completion": filled_text(completion, field)}


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
    return with_tools({"messages": messages}, tools)
