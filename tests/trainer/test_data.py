"""From a file to what TRL trains on: whole data sets, and the sentences for those that are not whole."""

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.trainer import tables
from agent.trainer.data import Prepared, prepare
from agent.trainer.errors import TrainerError
from protocol.failures import FailureReason
from protocol.jobspec import DataFormat, DataSpec, JobSpec, Method, ModelSpec, TokenizerSpec, TrainingSpec
from protocol.worker import Limits, Workspace
from tests.trainer.conftest import (
    CHAT_TEMPLATE,
    PLAIN_TEMPLATE,
    build_tokenizer,
    chat_rows,
    pair_rows,
    text_rows,
)

Jsonl = Callable[..., Path]


class Desk:
    """Prepares data sets with one tokenizer, and keeps the notes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.notes: list[tuple[str, str]] = []

    def prepare(
        self,
        path: Path | str,
        *,
        template: str | None = CHAT_TEMPLATE,
        training: TrainingSpec = TrainingSpec(),  # noqa: B008 - frozen
        own_template: str | None = None,
        eval_data: str = "",
        method: Method = Method.SFT,
        **changes: Any,
    ) -> Prepared:
        spec = JobSpec(
            job_id="job",
            method=method,
            model=ModelSpec(name="tiny"),
            tokenizer=TokenizerSpec(chat_template=own_template),
            data=DataSpec(path=str(path), **changes),
            training=training,
        )
        workspace = Workspace(
            checkpoints=str(self.folder / "checkpoints"),
            output=str(self.folder / "output"),
            cache=str(self.folder / "cache"),
            model="tiny",
            data=str(path),
            eval_data=eval_data,
        )
        return prepare(
            spec,
            workspace,
            build_tokenizer(template),
            Limits(hub=False),
            lambda level, text: self.notes.append((level, text)),
        )

    def refusal(self, path: Path | str, **changes: Any) -> TrainerError:
        with pytest.raises(TrainerError) as caught:
            self.prepare(path, **changes)
        return caught.value


def contents(rows: Any) -> list[dict[str, Any]]:
    """Return the rows without their numbers."""
    return [{name: value for name, value in row.items() if name != "row"} for row in rows]


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_rows_come_in_order_with_the_facts(desk: Desk, jsonl: Jsonl) -> None:
    rows = chat_rows(12)
    prepared = desk.prepare(jsonl(rows))
    assert contents(prepared.train) == rows
    assert prepared.train["row"][:] == list(range(1, 13)), "by which the user knows them"
    assert prepared.eval is None
    assert prepared.format is DataFormat.MESSAGES
    assert prepared.assistant_only
    assert prepared.facts == {
        "data_format": "messages",
        "loss_on": "the assistant's turns",
        "chat_template": "the tokenizer's own",
        "train_rows": "12",
        "eval_rows": "0",
        "data_fingerprint": prepared.fingerprint,
    }
    assert desk.notes == []


def test_row_57_with_null_text_is_named(desk: Desk, jsonl: Jsonl) -> None:
    rows: list[dict[str, Any]] = text_rows(80)
    rows[56] = {"text": None}
    path = jsonl(rows)
    error = desk.refusal(path)
    assert str(error) == f"{path}, row 57: text is null. Fill it in or remove the row."
    assert error.reason is FailureReason.DATA
    assert error.rows == [57]
    assert error.failure().advice == "Mend the data set where the message says, then retry the job."


def test_all_bad_rows_are_listed(desk: Desk, jsonl: Jsonl) -> None:
    rows: list[dict[str, Any]] = text_rows(80)
    for index in (9, 19, 29):
        rows[index] = {"text": None}
    error = desk.refusal(jsonl(rows))
    assert "row 10: text is null. Fill it in or remove the row. (3 rows are bad: 10, 20, 30.)" in str(error)
    assert error.rows == [10, 20, 30]
    error = desk.refusal(jsonl([{"text": None}] * 80))
    assert "(at least 32 rows are bad: 1, 2, 3, 4, 5, 6, 7, 8 and on.)" in str(error)


def test_row_33_without_an_assistant_turn_is_named(desk: Desk, jsonl: Jsonl) -> None:
    rows = chat_rows(40)
    rows[32] = {"messages": rows[32]["messages"][:1]}
    assert "row 33: the conversation has no assistant turn" in str(desk.refusal(jsonl(rows)))


def test_wrong_columns_are_named_with_what_is_accepted(desk: Desk, jsonl: Jsonl) -> None:
    sentence = str(desk.refusal(jsonl([{"question": "q", "answer": "a"}] * 3)))
    assert "row 1: no shape fits the columns: answer, question." in sentence
    assert '"instruction", "input"?, "output"' in sentence


def test_an_empty_data_set_is_refused(desk: Desk, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("")
    assert f"{path}: the file is empty." in str(desk.refusal(path))
    for content in ("\n\n", "[]", '{"data": []}'):
        path.write_text(content)
        assert str(desk.refusal(path)) == f"{path}: the data set is empty: it has no rows."


def test_a_missing_data_set_is_refused(desk: Desk, tmp_path: Path) -> None:
    assert "there is no such file or folder" in str(desk.refusal(tmp_path / "none.jsonl"))
    assert "The job names no data set" in str(desk.refusal(""))


def test_a_row_of_another_format_is_named(desk: Desk, jsonl: Jsonl) -> None:
    sentence = str(desk.refusal(jsonl([*text_rows(4), *chat_rows(2)])))
    assert "row 5: it is messages (columns: messages), but row 1 is text." in sentence
    assert "(2 rows are bad: 5, 6.)" in sentence


def test_a_named_format_is_held_to(desk: Desk, jsonl: Jsonl) -> None:
    rows = [{"text": "a", "prompt": "p", "completion": "c"}] * 4
    assert desk.prepare(jsonl(rows)).format is DataFormat.PROMPT_COMPLETION
    assert desk.prepare(jsonl(rows), format=DataFormat.TEXT).train.column_names == ["text", "row"]
    sentence = str(desk.refusal(jsonl(rows), format=DataFormat.ALPACA))
    assert "row 1: the format is alpaca, which needs 'instruction'" in sentence


def test_a_row_that_is_no_object_and_one_that_is_no_text(desk: Desk, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n["text"]\n')
    assert "row 2: it is not an object with columns" in str(desk.refusal(path))
    path.write_text('{"text": "a"}\n{"text": "b \\ud800"}\n')
    assert "row 2: its text is not valid UTF-8" in str(desk.refusal(path))


def test_dropped_columns_and_empty_rows_are_told(desk: Desk, jsonl: Jsonl) -> None:
    rows = [{"text": "a", "id": 1}, {"text": " ", "source": "x"}, {"text": "b"}]
    prepared = desk.prepare(jsonl(rows))
    assert prepared.train.to_list() == [{"text": "a", "row": 1}, {"text": "b", "row": 3}]
    (info, columns), (warning, empty) = desk.notes
    assert (info, warning) == ("info", "warning")
    assert columns.endswith("that text data has no use for are left out: id, source.")
    assert "1 rows of" in empty
    assert "(rows 2)" in empty


def test_conversations_without_a_template_say_what_to_do(desk: Desk, jsonl: Jsonl) -> None:
    error = desk.refusal(jsonl(chat_rows(3)), template=None)
    assert error.reason is FailureReason.TEMPLATE
    assert "the tokenizer has no chat template. Set tokenizer.chat_template" in str(error)
    prepared = desk.prepare(jsonl(chat_rows(3)), template=None, own_template=PLAIN_TEMPLATE)
    assert prepared.facts["chat_template"] == "the job's"
    assert prepared.facts["loss_on"] == "every token"


def test_the_row_that_the_template_refuses_is_named(desk: Desk, jsonl: Jsonl) -> None:
    strict = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + CHAT_TEMPLATE
    )
    rows = chat_rows(20)
    rows[13] = {"messages": [{"role": "system", "content": "s"}, *rows[13]["messages"]]}
    sentence = str(desk.refusal(jsonl(rows), template=strict))
    assert (
        "row 14: the chat template cannot render this conversation (roles system, user, assistant)"
        in sentence
    )


def test_tool_calls_survive_without_null_keys(desk: Desk, jsonl: Jsonl) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"city": "Oslo"}}}
    rows = chat_rows(3)
    rows[1]["messages"][1] = {"role": "assistant", "content": None, "tool_calls": [call]}
    rows[2]["tools"] = [{"type": "function", "function": {"name": "f"}}]
    prepared = desk.prepare(jsonl(rows))
    assert prepared.train[0] == {**rows[0], "tools": None, "row": 1}
    assert prepared.train[1]["messages"][1] == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert json.loads(prepared.train[2]["tools"]) == rows[2]["tools"]


def test_held_out_rows_are_disjoint_and_follow_the_seed(desk: Desk, jsonl: Jsonl) -> None:
    rows = [{"text": f"row {index}"} for index in range(40)]
    path = jsonl(rows)

    def split(seed: int) -> tuple[list[str], list[str]]:
        prepared = desk.prepare(path, eval_fraction=0.2, training=TrainingSpec(seed=seed))
        assert prepared.eval is not None
        return prepared.train["text"][:], prepared.eval["text"][:]

    train, held_out = split(1)
    assert (len(train), len(held_out)) == (32, 8)
    assert sorted(train + held_out) == sorted(row["text"] for row in rows)
    assert split(1) == (train, held_out)
    assert split(2) != (train, held_out)


def test_each_side_of_a_split_has_a_row(desk: Desk, jsonl: Jsonl) -> None:
    prepared = desk.prepare(jsonl(text_rows(3)), eval_fraction=0.01)
    assert prepared.eval is not None
    assert len(prepared.eval) == 1
    sentence = str(desk.refusal(jsonl(text_rows(1)), eval_fraction=0.5))
    assert "it has 1 rows; with eval_fraction 0.5 held out none is left to train on." in sentence


def test_the_first_rows_are_taken(desk: Desk, jsonl: Jsonl) -> None:
    rows = text_rows(20)
    assert contents(desk.prepare(jsonl(rows), max_samples=5).train) == rows[:5]


def test_evaluation_data_of_its_own(desk: Desk, jsonl: Jsonl) -> None:
    train, other = jsonl(chat_rows(8)), jsonl(chat_rows(4, seed=9), "eval.jsonl")
    prepared = desk.prepare(train, eval_data=str(other), eval_fraction=0.5)
    assert prepared.eval is not None
    assert (len(prepared.train), len(prepared.eval)) == (8, 4)
    assert "no share of the training rows is held out" in desk.notes[0][1]
    assert "given both to train and to evaluate on" in str(desk.refusal(train, eval_data=str(train)))
    text = jsonl(text_rows(3), "text.jsonl")
    assert "the evaluation rows are text, but the training rows are messages" in str(
        desk.refusal(train, eval_data=str(text))
    )


def test_other_rows_or_another_template_have_another_fingerprint(desk: Desk, jsonl: Jsonl) -> None:
    rows = chat_rows(6)
    first = desk.prepare(jsonl(rows)).fingerprint
    extra = [{**row, "id": index} for index, row in enumerate(rows)]
    assert desk.prepare(jsonl(extra)).fingerprint == first, "a dropped column is no other data"
    assert len(first) == 32
    changed = msgspec.json.decode(msgspec.json.encode(rows))
    changed[5]["messages"][1]["content"] += "."
    others = {
        desk.prepare(jsonl(changed)).fingerprint,
        desk.prepare(jsonl(rows[::-1])).fingerprint,
        desk.prepare(jsonl(rows[:5])).fingerprint,
        desk.prepare(jsonl(rows), own_template=CHAT_TEMPLATE + " ").fingerprint,
    }
    assert len(others | {first}) == 5


def test_rows_that_will_be_cut_are_counted(desk: Desk, jsonl: Jsonl) -> None:
    rows = [{"text": "cat"}] * 8 + [{"text": "red green blue " * 60}] * 2
    desk.prepare(jsonl(rows), training=TrainingSpec(max_length=32))
    assert desk.notes == [
        (
            "warning",
            "2 of 10 rows are longer than max_length=32 tokens and are cut there. "
            "Raise max_length, or turn packing on, which cuts nothing off.",
        )
    ]
    desk.notes.clear()
    desk.prepare(jsonl(rows), training=TrainingSpec(max_length=32, packing=True))
    assert desk.notes == []


def test_the_tables_of_an_earlier_attempt_are_not_trusted(desk: Desk, jsonl: Jsonl, tmp_path: Path) -> None:
    path = jsonl(text_rows(4))
    desk.prepare(path)
    (tables,) = (tmp_path / "cache").iterdir()
    tokenised = tables / "train" / "cache-1.arrow"
    tokenised.write_bytes(b"torn")
    assert len(desk.prepare(path).train) == 4
    assert not tokenised.exists()


def test_a_full_disk_is_said_to_be_one(desk: Desk, jsonl: Jsonl, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tables.ArrowWriter, "write", full)
    error = desk.refusal(jsonl(text_rows(2)))
    assert error.reason is FailureReason.DISK_FULL
    assert "No space is left on the disk of" in str(error)


def test_preference_pairs_come_with_their_facts(desk: Desk, jsonl: Jsonl) -> None:
    rows: list[dict[str, Any]] = pair_rows(12)
    prepared = desk.prepare(jsonl(rows), method=Method.DPO)
    assert prepared.format is DataFormat.PREFERENCE
    assert prepared.train[0] == {
        "prompt": [{"role": "user", "content": rows[0]["prompt"]}],
        "chosen": [{"role": "assistant", "content": rows[0]["chosen"]}],
        "rejected": [{"role": "assistant", "content": rows[0]["rejected"]}],
        "row": 1,
    }
    assert (prepared.rows, prepared.chat, prepared.assistant_only) == (12, True, False)
    assert prepared.facts["loss_on"] == "the chosen and the rejected answer"
    plain = desk.prepare(jsonl(rows), method=Method.DPO, template=None)
    assert contents(plain.train) == rows
    assert not plain.chat


def test_pairs_with_tools_keep_them(desk: Desk, jsonl: Jsonl) -> None:
    rows: list[dict[str, Any]] = pair_rows(3)
    rows[1]["tools"] = [{"type": "function", "function": {"name": "f"}}]
    prepared = desk.prepare(jsonl(rows), method=Method.DPO)
    assert json.loads(prepared.train[1]["tools"]) == rows[1]["tools"]
    assert prepared.train[1]["rejected"] == [{"role": "assistant", "content": rows[1]["rejected"]}]


def test_a_bad_pair_is_named(desk: Desk, jsonl: Jsonl) -> None:
    rows: list[dict[str, Any]] = pair_rows(20)
    rows[6]["rejected"] = rows[6]["chosen"]
    error = desk.refusal(jsonl(rows), method=Method.DPO)
    assert error.rows == [7]
    assert "row 7: chosen and rejected are the same" in str(error)
    strict = (
        "{% if messages[-1].content == 'no' %}{{ raise_exception('no such answer') }}{% endif %}"
        + CHAT_TEMPLATE
    )
    rows = [{"prompt": "q", "chosen": "yes", "rejected": "no"}]
    assert "row 1: the chat template cannot render" in str(
        desk.refusal(jsonl(rows), method=Method.DPO, template=strict)
    )


def test_pairs_that_become_text_do_not_mix_with_those_that_become_turns(desk: Desk, jsonl: Jsonl) -> None:
    rows = [pair_rows(1)[0], {"chosen": "The sky is blue", "rejected": "The sky is black"}]
    sentence = str(desk.refusal(jsonl(rows), method=Method.DPO))
    assert (
        "row 2: it becomes prompt (text) and chosen (text) and rejected (text), but the rows before"
        in sentence
    )


def test_method_and_format_are_held_together(desk: Desk, jsonl: Jsonl) -> None:
    path = jsonl(pair_rows(3))
    error = desk.refusal(path, method=Method.DPO, format=DataFormat.ALPACA)
    assert error.reason is FailureReason.SPEC
    assert "the method dpo trains on preference pairs, not on alpaca" in str(error)
    error = desk.refusal(path, format=DataFormat.PREFERENCE)
    assert "preference pairs are for the method dpo, and the method is sft" in str(error)


def test_pairs_that_will_be_cut_are_counted_by_their_longer_side(desk: Desk, jsonl: Jsonl) -> None:
    rows = [{"prompt": "q", "chosen": "yes", "rejected": "red green blue " * 60}, *pair_rows(3)]
    desk.prepare(jsonl(rows), method=Method.DPO, training=TrainingSpec(max_length=64))
    ((_, told),) = desk.notes
    assert told == "1 of 4 rows are longer than max_length=64 tokens and are cut there. Raise max_length."
