"""Chat templates: whether there is one, whether it can mark the assistant's turns, what the loss covers."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from trl.chat_template_utils import (
    get_training_chat_template,
    has_generation_markers,
    is_chat_template_stop_token_trained,
)

from agent.trainer.errors import TrainerError
from protocol.failures import FailureReason

RENDER_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)
"""What a template raises on a conversation it was not written for."""
_PROBE = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]


@dataclass(frozen=True)
class Coverage:
    """Which tokens the loss is taken on."""

    assistant_only: bool
    loss_on: str
    """In words, for the user."""
    template: str
    """The template that training renders with; empty where none is used."""
    warning: str = ""


def template_of(tokenizer: Any) -> str:
    """Return the tokenizer's chat template; empty if it has none."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return template or ""


def set_template(tokenizer: Any, template: str | None) -> str:
    """Give ``tokenizer`` the job's template, if it names one; return where the template is from."""
    if template is None:
        return "the tokenizer's own" if template_of(tokenizer) else "none"
    tokenizer.chat_template = template
    try:
        tokenizer.apply_chat_template(_PROBE, tokenize=False)
    except RENDER_ERRORS as exc:
        raise TrainerError(
            FailureReason.TEMPLATE,
            f"tokenizer.chat_template cannot render a plain question and answer: {exc}. Correct the template.",
        ) from exc
    return "the job's"


def require_template(tokenizer: Any, source: str, form: str) -> None:
    """Raise if conversations are to be rendered and there is nothing to render them with."""
    if not template_of(tokenizer):
        raise TrainerError(
            FailureReason.TEMPLATE,
            f"{source} holds conversations ({form}), and the tokenizer has no chat template. Set "
            "tokenizer.chat_template, use an instruct model's tokenizer, or give the data as prompt and completion.",
        )


def require_end(tokenizer: Any) -> None:
    """Raise if plain text is to be ended by a token that the tokenizer does not have."""
    if tokenizer.eos_token is None:
        raise TrainerError(
            FailureReason.MODEL,
            "The tokenizer has no end-of-sequence token, so the model would never learn to stop. "
            "Use a tokenizer that names one (eos_token).",
        )


def conversations_of(row: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    """Return the conversations of a canonical row: two for a preference pair, none for plain text."""
    if "messages" in row:
        return [list(row["messages"])]
    if isinstance(row.get("prompt"), list):
        return [[*row["prompt"], *row[name]] for name in ("completion", "chosen", "rejected") if name in row]
    return []


def turns_of(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return the (first) conversation of a canonical row; None if it is plain text."""
    return next(iter(conversations_of(row)), None)


def render_failure(tokenizer: Any, row: Mapping[str, Any]) -> str:
    """Return why the template cannot render ``row``; empty if it can."""
    for turns in conversations_of(row):
        try:
            tokenizer.apply_chat_template(turns, tools=tools_of(row), tokenize=False)
        except RENDER_ERRORS as exc:
            roles = ", ".join(turn["role"] for turn in turns[:6]) + (", ..." if len(turns) > 6 else "")
            return (
                f"the chat template cannot render this conversation (roles {roles}): {exc}. "
                "Change the row, or give another tokenizer.chat_template."
            )
    return ""


def tools_of(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return a row's tools as templates take them."""
    tools = row.get("tools")
    return json.loads(tools) if isinstance(tools, str) else tools


def coverage(tokenizer: Any, wanted: bool | None, rows: Sequence[Mapping[str, Any]]) -> Coverage:
    """Say what the loss covers for data of which ``rows`` are a few; ``wanted`` is the job's assistant_only_loss."""
    first = rows[0]
    template = template_of(tokenizer) if turns_of(first) is not None else ""
    if "chosen" in first:
        return Coverage(False, "the chosen and the rejected answer", template)
    if "prompt" in first:
        # TRL leaves the prompt out of the loss of such rows by itself.
        return Coverage(False, "the completion", template)
    if "text" in first:
        if wanted:
            raise TrainerError(
                FailureReason.TEMPLATE,
                "assistant_only_loss is true, but the data is plain text, which has no turns. "
                "Turn it off, or give conversations.",
            )
        return Coverage(False, "every token", "")
    if wanted is False:
        return Coverage(False, "every token", template)
    patched, why = _marking_template(tokenizer)
    why = why or _mask_fault(tokenizer, patched, rows)
    if not why:
        warning = ""
        if not is_chat_template_stop_token_trained(tokenizer, chat_template=patched):
            warning = (
                "The chat template leaves the token that ends an assistant turn out of the loss; "
                "the model may not learn to stop."
            )
        return Coverage(True, "the assistant's turns", patched or template, warning)
    if wanted:
        raise TrainerError(
            FailureReason.TEMPLATE,
            f"assistant_only_loss is true, but the assistant's turns cannot be marked: {why}. Put "
            "{% generation %} and {% endgeneration %} round them in tokenizer.chat_template, or turn it off.",
        )
    return Coverage(
        False, "every token", template, f"The loss covers every token, not the answers alone: {why}."
    )


def _marking_template(tokenizer: Any) -> tuple[str | None, str]:
    """Return (template to use in place of the tokenizer's own or None, why turns cannot be marked)."""
    if has_generation_markers(template_of(tokenizer)):
        return None, ""
    try:
        return get_training_chat_template(tokenizer), ""
    except RENDER_ERRORS:
        return None, "the chat template has no {% generation %} marks, and TRL knows no marked form of it"


def _mask_fault(tokenizer: Any, template: str | None, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return what is wrong with the assistant mask of ``rows``; empty if it marks some tokens and not all."""
    for row in rows:
        try:
            encoded = tokenizer.apply_chat_template(
                turns_of(row),
                tools=tools_of(row),
                chat_template=template,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
        except RENDER_ERRORS as exc:
            return f"marking the turns failed ({exc})"
        mask = encoded["assistant_masks"]
        if 1 not in mask:
            return "the template's {% generation %} marks select no token"
        if 0 not in mask:
            return "the template's {% generation %} marks select every token"
    return ""


def count_tokens(tokenizer: Any, row: Mapping[str, Any], cover: Coverage) -> int:
    """Return how many tokens ``row`` has; of a preference pair its longer side."""
    conversations = conversations_of(row)
    if conversations:
        return max(
            len(
                tokenizer.apply_chat_template(
                    turns,
                    tools=tools_of(row),
                    chat_template=cover.template,
                    tokenize=True,
                    return_dict=True,
                )["input_ids"]
            )
            for turns in conversations
        )
    texts = (
        [row["text"]]
        if "text" in row
        else [row["prompt"] + row[name] for name in ("completion", "chosen", "rejected") if name in row]
    )
    # TRL ends plain text with the end-of-sequence token.
    return max(len(tokenizer(text)["input_ids"]) for text in texts) + 1
