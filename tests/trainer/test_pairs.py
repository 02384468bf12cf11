"""Preference pairs in every spelling, and the sentences for those that are none."""

from typing import Any

import pytest

from agent.trainer.formats import canonical, detect, wrong_columns
from agent.trainer.turns import BadRow
from protocol.jobspec import DataFormat

P = DataFormat.PREFERENCE
Q, SYSTEM = {"role": "user", "content": "q"}, {"role": "system", "content": "s"}
GOOD, BAD = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}
TURNS = {"prompt": [Q], "chosen": [GOOD], "rejected": [BAD]}
HELPFUL = {
    "chosen": "\n\nHuman: q\n\nAssistant: good",
    "rejected": "\n\nHuman: q\n\nAssistant: bad",
}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "q", "chosen": "good", "rejected": "bad", "score": 3}, TURNS),
        ({"question": "q", "system": "s", "chosen": "good", "rejected": "bad"}, {**TURNS, "prompt": [SYSTEM, Q]}),
        ({"prompt": [Q], "chosen": [GOOD], "rejected": [BAD]}, TURNS),
        ({"prompt": [Q], "chosen": GOOD, "rejected": BAD}, TURNS),
        ({"chosen": [Q, GOOD], "rejected": [Q, BAD]}, TURNS),
        # As in ultrafeedback: the prompt beside the conversations says the same once more.
        ({"prompt": "q", "chosen": [Q, GOOD], "rejected": [Q, BAD]}, TURNS),
        ({"prompt": [SYSTEM], "chosen": [Q, GOOD], "rejected": [Q, BAD]}, {**TURNS, "prompt": [SYSTEM, Q]}),
        ({"chosen": [Q, GOOD, Q, GOOD], "rejected": [Q, GOOD, Q, BAD]}, {**TURNS, "prompt": [Q, GOOD, Q]}),
        (HELPFUL, TURNS),
        ({"prompt": "q", "chosen": '[{"role": "assistant", "content": "good"}]', "rejected": "bad"}, TURNS),
        ({"chosen": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "good"}], "rejected": [Q, BAD]}, TURNS),
        ({**TURNS, "tools": [{"name": "f"}]}, {**TURNS, "tools": '[{"name": "f"}]'}),
    ],
)  # fmt: skip
def test_with_a_chat_template_every_spelling_becomes_turns(
    row: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert detect(row, pairs=True) is P
    assert canonical(row, P, chat=True) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "q ", "chosen": "good", "rejected": "bad"}, ("q ", "good", "bad")),
        ({"prompt": "q", "system": "s", "chosen": "good", "rejected": "bad"}, ("s\n\nq", "good", "bad")),
        (HELPFUL, ("\n\nHuman: q\n\nAssistant:", " good", " bad")),
        ({"chosen": "The sky is blue", "rejected": "The sky is black"}, ("The sky is", " blue", " black")),
    ],
)  # fmt: skip
def test_without_a_chat_template_pairs_stay_text(row: dict[str, Any], expected: tuple[str, str, str]) -> None:
    pair = canonical(row, P, chat=False)
    assert (pair["prompt"], pair["chosen"], pair["rejected"]) == expected


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
        ({"prompt": "q", "chosen": " ", "rejected": "a"}, "chosen is empty"),
        ({"prompt": "q", "chosen": "a", "rejected": None}, "rejected is null"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "prompt is empty, so there is nothing to answer"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "prompt is a number"),
        ({"chosen": "a", "rejected": "b"}, "there is no prompt, and chosen and rejected do not begin alike"),
        ({"chosen": [Q, GOOD], "rejected": [{**Q, "content": "r"}, BAD]}, "there is no prompt"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "there is no prompt"),
        ({"chosen": [Q, GOOD], "rejected": [Q, GOOD]}, "chosen and rejected are the same"),
        ({"chosen": [Q, GOOD, Q], "rejected": [Q, GOOD, SYSTEM]}, "the prompt ends with an assistant turn"),
        ({"chosen": [Q], "rejected": [Q, BAD]}, "chosen says nothing beyond the prompt"),
        ({"prompt": [Q, GOOD], "chosen": [GOOD], "rejected": [BAD]}, "the prompt ends with an assistant turn"),
        ({"prompt": [Q], "chosen": [GOOD, Q], "rejected": [BAD]}, "chosen begins or ends with a user turn"),
        ({"prompt": [Q], "chosen": [GOOD], "rejected": [Q, BAD]}, "rejected begins or ends with a user turn"),
        ({"prompt": [Q], "chosen": [{**GOOD, "content": ""}], "rejected": [BAD]}, "chosen is empty"),
        ({"prompt": [Q], "chosen": [], "rejected": [BAD]}, "chosen is an empty list"),
        ({"prompt": [Q], "chosen": [{"role": "bot", "content": "a"}], "rejected": [BAD]}, "chosen[0].role is 'bot'"),
    ],
)  # fmt: skip
def test_a_pair_that_is_not_whole_is_refused_in_a_sentence(row: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadRow) as caught:
        canonical(row, P, chat=True)
    assert sentence in str(caught.value)


def test_pairs_of_turns_need_a_chat_template() -> None:
    with pytest.raises(BadRow, match="the tokenizer has no chat template"):
        canonical(TURNS, P, chat=False)


def test_pairs_are_taken_where_they_are_wanted_and_nowhere_else() -> None:
    row = {"prompt": "q", "chosen": "good", "rejected": "bad", "messages": [Q, GOOD]}
    assert detect(row, pairs=True) is P
    assert detect(row) is DataFormat.MESSAGES
    assert detect({"text": "a"}, pairs=True) is None
    assert "the method dpo needs preference pairs" in wrong_columns({"text": "a"}, pairs=True)
    assert "Set the method to dpo" in wrong_columns({"chosen": "a", "rejected": "b"})
