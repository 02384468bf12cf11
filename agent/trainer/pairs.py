"""Preference pairs: a prompt, an answer that was chosen and one that was rejected, however a row spells them."""

import re
from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from agent.trainer.turns import BadRow, as_text, as_turns, filled_text, one_turn, parsed_turns, with_tools

Turns = list[dict[str, Any]]

_MARK = re.compile(r"(?:^\s*|\n\n)(Human|Assistant):")
"""Who speaks, in a transcript like Anthropic's hh-rlhf."""


def preference_pair(row: Mapping[str, Any], chat: bool) -> dict[str, Any]:
    """Return a row as "prompt", "chosen" and "rejected": three texts, or three lists of turns.

    Where no prompt is given, it is what both answers begin with. Raises BadRow.
    """
    chosen, rejected = _answer(row.get("chosen"), "chosen"), _answer(row.get("rejected"), "rejected")
    if chosen == rejected:
        raise BadRow(
            "chosen and rejected are the same, so there is nothing to prefer. Correct or remove the row."
        )
    field = "question" if row.get("prompt") is None and row.get("question") is not None else "prompt"
    prompt = parsed_turns(row.get(field))
    if prompt is None and chat and _is_transcript(chosen) and _is_transcript(rejected):
        chosen, rejected = _transcript(chosen), _transcript(rejected)
    system = as_text(row.get("system") or "", "system")
    texts = isinstance(chosen, str) and isinstance(rejected, str) and not isinstance(prompt, list)
    if texts and prompt is None:
        pair = _parted_texts(chosen, rejected)
    elif texts and not chat:
        asked = filled_text(prompt, field)
        pair = {
            "prompt": f"{system}\n\n{asked}" if system else asked,
            "chosen": chosen,
            "rejected": rejected,
        }
    elif not chat:
        raise BadRow(
            "prompt, chosen and rejected are lists of turns, and the tokenizer has no chat template. "
            "Set tokenizer.chat_template, or give them as text."
        )
    else:
        pair = _turn_pair(prompt, chosen, rejected, field)
        if system and pair["prompt"][0]["role"] != "system":
            pair["prompt"].insert(0, {"role": "system", "content": system})
    return with_tools(pair, row.get("tools"))


def _answer(value: Any, field: str) -> Any:
    """Return an answer as text or as turns."""
    value = parsed_turns(value)
    if isinstance(value, dict):
        value = [value]
    return as_turns(value, field) if isinstance(value, list) else filled_text(value, field)


def _parted_texts(chosen: str, rejected: str) -> dict[str, Any]:
    """Part two texts where they begin to differ: after the last sign that the assistant speaks, else at a space."""
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))
    shared = "".join(letter for letter, _ in alike)
    marks = [mark.end() for mark in _MARK.finditer(shared) if mark[1] == "Assistant"]
    spaces = [space.start() for space in re.finditer(r"\s", shared)]
    length = (marks or spaces or [0])[-1]
    if not shared[:length].strip():
        raise BadRow("there is no prompt, and chosen and rejected do not begin alike. Add a prompt.")
    return {
        "prompt": shared[:length],
        "chosen": filled_text(chosen[length:], "chosen, after what it shares with rejected,"),
        "rejected": filled_text(rejected[length:], "rejected, after what it shares with chosen,"),
    }


def _is_transcript(value: Any) -> bool:
    found = _MARK.match(value) if isinstance(value, str) else None
    return found is not None and found[1] == "Human"


def _transcript(text: str) -> Turns:
    """Return the turns of a transcript."""
    marks = list(_MARK.finditer(text))
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return [
        {
            "role": "user" if mark[1] == "Human" else "assistant",
            "content": text[mark.end() : end].strip(),
        }
        for mark, end in zip(marks, ends, strict=True)
    ]


def _turn_pair(prompt: Any, chosen: Any, rejected: Any, field: str) -> dict[str, Any]:
    """Return a pair of conversations, with the prompt that they share apart."""
    given: Turns = []
    if prompt is not None:
        given = as_turns(prompt, field) if isinstance(prompt, list) else one_turn("user", prompt, field)
    answers: list[Turns] = [
        value if isinstance(value, list) else one_turn("assistant", value, name)
        for name, value in (("chosen", chosen), ("rejected", rejected))
    ]
    if all(answer[0]["role"] != "assistant" for answer in answers):
        # Whole conversations; a prompt beside them mostly says the same once more.
        shared = 0
        while all(len(a) > shared for a in answers) and answers[0][shared] == answers[1][shared]:
            shared += 1
        head, answers = answers[0][:shared], [answer[shared:] for answer in answers]
        given = head if all(turn in head for turn in given) else given + head
    if not given:
        raise BadRow("there is no prompt, and chosen and rejected do not begin alike. Add a prompt.")
    if given[-1]["role"] == "assistant":
        raise BadRow(
            "the prompt ends with an assistant turn, so there is nothing to answer: chosen and rejected must part "
            "at the assistant's turn. Correct or remove the row."
        )
    if given[-1]["role"] in ("user", "system") and not given[-1]["content"].strip():
        raise BadRow(f"{field} is empty, so there is nothing to answer. Fill it in or remove the row.")
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        if not answer:
            raise BadRow(
                f"{name} says nothing beyond the prompt. Add the assistant's turn or remove the row."
            )
        wrong = next((turn["role"] for turn in (answer[0], answer[-1]) if turn["role"] != "assistant"), None)
        if wrong is not None:
            raise BadRow(
                f"{name} begins or ends with a {wrong} turn where the assistant's is needed. "
                "The order is prompt, then the assistant's answer. Correct or remove the row."
            )
        if not any(
            turn["content"].strip() or len(turn) > 2 for turn in answer if turn["role"] == "assistant"
        ):
            raise BadRow(f"{name} is empty, so there is nothing to learn. Fill it in or remove the row.")
    return {"prompt": given, "chosen": answers[0], "rejected": answers[1]}
