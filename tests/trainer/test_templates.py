"""Which tokens the loss covers, by what the chat template can do."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast
from trl import chat_template_utils

from agent.trainer import templates
from agent.trainer.errors import TrainerError
from protocol.failures import FailureReason
from tests.trainer.conftest import CHAT_TEMPLATE, PLAIN_TEMPLATE, build_tokenizer

ROWS = [
    {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]},
    {"messages": [{"role": "user", "content": "red"}, {"role": "assistant", "content": "green"}]},
]


def tokenizer(template: str | None) -> Any:
    return build_tokenizer(template)


def refusal(template: str | None, wanted: bool | None, rows: list[dict[str, Any]]) -> TrainerError:
    with pytest.raises(TrainerError) as caught:
        templates.coverage(tokenizer(template), wanted, rows)
    assert caught.value.reason is FailureReason.TEMPLATE
    return caught.value


@pytest.mark.parametrize("wanted", [None, True])
def test_a_template_with_marks_takes_the_loss_on_the_assistants_turns(wanted: bool | None) -> None:
    cover = templates.coverage(tokenizer(CHAT_TEMPLATE), wanted, ROWS)
    assert (cover.assistant_only, cover.loss_on, cover.warning) == (True, "the assistant's turns", "")
    assert cover.template == CHAT_TEMPLATE


def test_the_job_may_want_the_loss_on_every_token() -> None:
    cover = templates.coverage(tokenizer(CHAT_TEMPLATE), False, ROWS)
    assert (cover.assistant_only, cover.loss_on) == (False, "every token")


def test_a_template_without_marks_falls_back_and_says_so() -> None:
    cover = templates.coverage(tokenizer(PLAIN_TEMPLATE), None, ROWS)
    assert (cover.assistant_only, cover.loss_on) == (False, "every token")
    assert "The loss covers every token, not the answers alone: the chat template has no" in cover.warning


def test_marks_that_are_wanted_and_cannot_be_had_are_an_error() -> None:
    sentence = str(refusal(PLAIN_TEMPLATE, True, ROWS))
    assert sentence.startswith("assistant_only_loss is true, but the assistant's turns cannot be marked:")
    assert "{% generation %}" in sentence


def test_a_template_that_trl_has_a_marked_form_of_is_used() -> None:
    marked = tokenizer(chat_template_utils.qwen3_chat_template)
    cover = templates.coverage(marked, True, ROWS)
    assert cover.assistant_only
    assert "{% generation %}" in cover.template or "{%- generation %}" in cover.template
    assert marked.chat_template == chat_template_utils.qwen3_chat_template


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}{% endgeneration %}",
            "select no token",
        ),
        (
            "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}",
            "every token",
        ),
    ],
)
def test_marks_that_select_nothing_or_everything_are_not_believed(template: str, fault: str) -> None:
    assert fault in templates.coverage(tokenizer(template), None, ROWS).warning
    assert fault in str(refusal(template, True, ROWS))


def test_a_stop_token_outside_the_loss_is_told() -> None:
    outside = CHAT_TEMPLATE.replace("<|end|>{% endgeneration %}", "{% endgeneration %}<|end|>")
    cover = templates.coverage(tokenizer(outside), None, ROWS)
    assert cover.assistant_only
    assert "may not learn to stop" in cover.warning


def test_prompt_and_completion_need_no_marks() -> None:
    pair = [
        {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}
    ]
    cover = templates.coverage(tokenizer(PLAIN_TEMPLATE), True, pair)
    assert (cover.assistant_only, cover.loss_on) == (False, "the completion")


def test_plain_text_has_no_turns_to_choose() -> None:
    assert templates.coverage(tokenizer(None), None, [{"text": "a"}]).loss_on == "every token"
    assert "plain text, which has no turns" in str(refusal(None, True, [{"text": "a"}]))


def test_the_jobs_template_goes_before_the_tokenizers_own() -> None:
    plain = tokenizer(CHAT_TEMPLATE)
    assert templates.set_template(plain, None) == "the tokenizer's own"
    assert templates.set_template(plain, PLAIN_TEMPLATE) == "the job's"
    assert plain.chat_template == PLAIN_TEMPLATE
    assert templates.set_template(tokenizer(None), None) == "none"


@pytest.mark.parametrize(
    "broken", ["{% for m in messages %}", "{{ raise_exception('no') }}", "{{ messages.x.y }}"]
)
def test_a_template_that_cannot_render_is_refused(broken: str) -> None:
    with pytest.raises(
        TrainerError, match=r"tokenizer.chat_template cannot render a plain question"
    ) as caught:
        templates.set_template(tokenizer(None), broken)
    assert caught.value.reason is FailureReason.TEMPLATE


def test_conversations_need_a_template_and_plain_text_an_end() -> None:
    with pytest.raises(
        TrainerError, match=r"the tokenizer has no chat template\. Set tokenizer.chat_template"
    ):
        templates.require_template(tokenizer(None), "a.jsonl", "messages")
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer(None).backend_tokenizer)
    with pytest.raises(TrainerError, match="no end-of-sequence token"):
        templates.require_end(endless)


def test_the_row_that_a_template_refuses_is_told_why() -> None:
    strict = tokenizer(
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}x"
    )
    row = {"messages": [{"role": "system", "content": "s"}, *ROWS[0]["messages"]]}
    assert templates.render_failure(strict, ROWS[0]) == ""
    assert "(roles system, user, assistant): System role not supported" in templates.render_failure(
        strict, row
    )
