"""Every shape of a row, what TRL is given for it, and what is said of a row that is not whole."""

from typing import Any

import pytest

from agent.trainer.formats import SHAPES, BadRow, canonical, detect, wrong_columns
from protocol.jobspec import DataFormat

M, S, A, P, T = (
    DataFormat.MESSAGES,
    DataFormat.SHAREGPT,
    DataFormat.ALPACA,
    DataFormat.PROMPT_COMPLETION,
    DataFormat.TEXT,
)
USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"messages": []}, M),
        ({"conversations": [], "id": 1}, S),
        ({"instruction": "i", "response": "r"}, A),
        ({"instruction": "i", "input": "", "output": "o", "text": "all of it"}, A),
        ({"prompt": "p", "response": "r", "reward": 1.0}, P),
        ({"prompt": "p", "prompt_id": 3, "messages": [USER, ASSISTANT]}, M),
        ({"text": None}, T),
        ({"messages": None, "text": "filled"}, T),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, None),
        ({"question": "q"}, None),
        ({}, None),
    ],
)
def test_a_row_is_told_by_its_filled_columns(row: dict[str, Any], form: DataFormat | None) -> None:
    assert detect(row) is form


@pytest.mark.parametrize(
    ("form", "row", "expected"),
    [
        (T, {"text": "a", "id": 1}, {"text": "a"}),
        (M, {"messages": [USER, ASSISTANT], "id": 1}, {"messages": [USER, ASSISTANT]}),
        (M, {"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'},
         {"messages": [USER, ASSISTANT]}),
        (M, {"messages": [{**USER, "weight": 1, "name": None}, ASSISTANT]}, {"messages": [USER, ASSISTANT]}),
        (M, {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ASSISTANT]},
         {"messages": [USER, ASSISTANT]}),
        (M, {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}], "tools": [{"n": 1}]},
         {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}], "tools": '[{"n": 1}]'}),
        (S, {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
         {"messages": [{"role": "system", "content": "s"}, USER, ASSISTANT]}),
        (S, {"conversations": [{"from": "system", "value": "s"}, {"from": "user", "value": "q"},
                               {"from": "assistant", "value": "a"}]},
         {"messages": [{"role": "system", "content": "s"}, USER, ASSISTANT]}),
        (A, {"instruction": "q", "input": None, "output": "a"}, {"messages": [USER, ASSISTANT]}),
        (A, {"instruction": "i", "input": "x", "response": "a", "system": "s"},
         {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "i\n\nx"}, ASSISTANT]}),
        (P, {"prompt": "q", "completion": "a"}, {"prompt": [USER], "completion": [ASSISTANT]}),
        (P, {"prompt": "q", "response": "a", "reward": 2}, {"prompt": [USER], "completion": [ASSISTANT]}),
        (P, {"prompt": [USER], "completion": [ASSISTANT]}, {"prompt": [USER], "completion": [ASSISTANT]}),
    ],
)  # fmt: skip
def test_with_a_chat_template_rows_become_conversations(
    form: DataFormat, row: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert canonical(row, form, chat=True) == expected


def test_without_a_chat_template_prompt_and_completion_stay_text() -> None:
    assert canonical({"prompt": "q", "response": "a"}, P, chat=False) == {"prompt": "q", "completion": "a"}
    with pytest.raises(BadRow, match=r"lists of turns, and the tokenizer has no chat template"):
        canonical({"prompt": [USER], "completion": [ASSISTANT]}, P, chat=False)


def test_without_a_chat_template_alpaca_has_its_usual_layout() -> None:
    plain = canonical({"instruction": "Add.", "input": "1 2", "output": "3"}, A, chat=False)
    assert plain == {
        "prompt": (
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
        ),
        "completion": "3",
    }
    assert "### Input" not in canonical({"instruction": "Go.", "output": "x"}, A, chat=False)["prompt"]


@pytest.mark.parametrize(
    ("form", "row", "sentence"),
    [
        (T, {"text": None}, "text is null. Fill it in or remove the row."),
        (T, {"text": 3}, "text is a number where text is needed."),
        (M, {"messages": None}, "messages is null."),
        (M, {"messages": []}, "messages is an empty list."),
        (M, {"messages": "hello"}, "messages is of type str where a list of turns is needed."),
        (M, {"messages": ["hello", ASSISTANT]}, "messages[0] is of type str where a turn"),
        (M, {"messages": [USER]}, "the conversation has no assistant turn"),
        (M, {"messages": [USER, {"role": "assistant", "content": " "}]}, "every assistant turn is empty"),
        (M, {"messages": [USER, {"role": "assistant", "content": None}]}, "messages[1].content is null."),
        (M, {"messages": [USER, {"role": "bot", "content": "a"}]}, "messages[1].role is 'bot'. Known are assistant"),
        (M, {"messages": [{"speaker": "x"}]}, 'messages[0] needs "role" and "content"'),
        (M, {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, ASSISTANT]},
         "messages[0].content[0] is 'image'; only parts of type text"),
        (M, {"messages": [USER, ASSISTANT], "tools": "{"}, "tools is not valid JSON"),
        (M, {"messages": [USER, ASSISTANT], "tools": {"a": 1}}, "tools must be a list"),
        (S, {"conversations": [{"from": "alien", "value": "a"}]}, "conversations[0].from is 'alien'. Known are human"),
        (S, {"conversations": [{"from": "human", "value": None}]}, "conversations[0].value is null."),
        (A, {"instruction": None, "output": "o"}, "instruction is null."),
        (A, {"instruction": "i", "output": None}, "output is null."),
        (A, {"instruction": "i", "output": ""}, "output is empty"),
        (A, {"instruction": "i", "input": 3, "output": "o"}, "input is a number"),
        (P, {"prompt": None, "completion": "c"}, "prompt is null."),
        (P, {"prompt": "p", "response": None}, "response is null."),
        (P, {"prompt": "p", "completion": ["c"]}, "completion[0] is of type str"),
        (P, {"prompt": [USER], "completion": [USER]}, "completion has no assistant turn"),
    ],
)  # fmt: skip
def test_a_row_that_is_not_whole_is_refused_in_a_sentence(
    form: DataFormat, row: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(BadRow) as caught:
        canonical(row, form, chat=True)
    assert sentence in str(caught.value)


def test_wrong_columns_are_listed_with_the_accepted_shapes() -> None:
    assert wrong_columns({"question": "q", "answer": "a"}) == (
        f"no shape fits the columns: answer, question. Accepted are {SHAPES}."
    )
    assert wrong_columns({"a": 1}, A) == (
        "the format is alpaca, which needs 'instruction' and 'output' or 'response', but the columns are: a."
    )
    assert "preference pairs" in wrong_columns({"prompt": "p", "chosen": "c", "rejected": "r"})
