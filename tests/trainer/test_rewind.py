"""A loss that is no number, or a spike: back to before it, without its rows."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaModel

from agent.trainer.errors import TrainerError
from agent.trainer.rewind import Skip, Skips
from protocol.failures import FailureReason
from protocol.worker import Finished, Left, Note, Saved
from tests.trainer.conftest import Jobs, chat_rows, write_jsonl

BAD_ROW = 17
BAD_LINE = BAD_ROW + 1
"""Of the file: the number by which the user knows the row."""
POISON = "zebra"
"""A word that no other row has; the hook multiplies the last hidden states of a batch that holds it."""


@pytest.fixture
def poisoned(tmp_path: Path) -> Path:
    rows = chat_rows(48)
    rows[BAD_ROW]["messages"][1]["content"] = POISON * 3
    return write_jsonl(tmp_path / "poisoned.jsonl", rows)


@pytest.fixture
def poison(tiny_tokenizer: Any, request: pytest.FixtureRequest) -> Iterator[None]:
    factor = request.param
    mark = tiny_tokenizer(POISON * 3)["input_ids"][0:2]

    def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if isinstance(module, LlamaModel) and module.training:
            ids = kwargs["input_ids"]
            hit = ((ids[:, :-1] == mark[0]) & (ids[:, 1:] == mark[1])).any()
            if bool(hit):
                output.last_hidden_state = output.last_hidden_state * factor

    handle = torch.nn.modules.module.register_module_forward_hook(hook, with_kwargs=True)
    yield
    handle.remove()


@pytest.fixture
def fed(tiny_tokenizer: Any) -> Iterator[list[str]]:
    """The text of each batch that was trained on, padding and all."""
    texts: list[str] = []

    def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if isinstance(module, LlamaModel) and module.training:
            texts.append("".join(tiny_tokenizer.batch_decode(kwargs["input_ids"])))

    handle = torch.nn.modules.module.register_module_forward_hook(hook, with_kwargs=True)
    yield texts
    handle.remove()


def lines_in(text: str, rows: list[dict[str, Any]], tokenizer: Any) -> list[int]:
    """Return the numbers of those rows that stand in a batch, whole."""
    said = [tokenizer.apply_chat_template(row["messages"], tokenize=False).rstrip() for row in rows]
    return [number for number, one in enumerate(said, 1) if one in text]


REWIND = {"on_bad_loss": "rewind", "save_steps": 2, "max_steps": 16}


@pytest.mark.parametrize("poison", [float("nan")], indirect=True)
def test_a_step_without_a_number_is_left_out_with_its_rows(jobs: Jobs, poisoned: Path, poison: None) -> None:
    first = jobs.run("job", training=REWIND, rows=poisoned)
    assert isinstance(first.last, Left)
    assert first.last.why == "fresh_process"
    bad = first.last.step + 1
    (note,) = [note.text for note in first.of(Note) if "optimizer step" in note.text]
    assert f"At optimizer step {bad} the loss is not a finite number" in note
    (skip,) = Skips(jobs.checkpoints()).entries
    assert BAD_LINE in skip.rows
    assert len(skip.rows) == 4
    assert all(saved.step < bad for saved in first.of(Saved))

    second = jobs.run("job", attempt=2, training=REWIND, rows=poisoned)
    while isinstance(second.last, Left):  # the second epoch comes by the row again
        second = jobs.run("job", attempt=3, training=REWIND, rows=poisoned)
    assert isinstance(second.last, Finished)
    assert second.last.step == 16
    finite = [values["train_loss"] for values in second.points.values() if "train_loss" in values]
    assert all(torch.isfinite(torch.tensor(finite)))


@pytest.mark.parametrize("poison", [float("nan")], indirect=True)
def test_without_leave_to_rewind_it_ends_with_the_rows_that_fed_it(
    jobs: Jobs, poisoned: Path, poison: None
) -> None:
    with pytest.raises(TrainerError) as caught:
        jobs.run("job", training={"max_steps": 16, "logging_steps": 5}, rows=poisoned)
    assert caught.value.reason is FailureReason.NON_FINITE_LOSS
    assert BAD_LINE in caught.value.rows
    # The very step, though points are five apart.
    assert caught.value.step is not None
    assert f"At optimizer step {caught.value.step} the loss" in caught.value.sentence


@pytest.mark.parametrize("poison", [float("nan")], indirect=True)
def test_the_rows_of_a_stream_are_named_too(jobs: Jobs, poisoned: Path, poison: None) -> None:
    with pytest.raises(TrainerError) as caught:
        jobs.run("job", training={"max_steps": 16}, rows=poisoned, streaming=True)
    assert BAD_LINE in caught.value.rows


PACKED = {"packing": True, "batch_size": 1, "max_length": 128, "max_steps": 16}


@pytest.mark.parametrize("poison", [float("nan")], indirect=True)
@pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])
def test_of_packed_sequences_the_rows_in_them_are_named(
    jobs: Jobs, poisoned: Path, poison: None, streaming: bool, fed: list[str], tiny_tokenizer: Any
) -> None:
    rows = [json.loads(line) for line in poisoned.read_text().splitlines()]
    with pytest.raises(TrainerError) as caught:
        jobs.run("job", training=PACKED, rows=poisoned, streaming=streaming)
    (text,) = [text for text in fed if POISON * 3 in text][:1]
    assert BAD_LINE in caught.value.rows
    assert sorted(caught.value.rows) == lines_in(text, rows, tiny_tokenizer)
    assert 2 < len(caught.value.rows) < 20
    assert f"a packed sequence of the {len(caught.value.rows)} rows" in caught.value.sentence


@pytest.mark.parametrize("poison", [float("nan")], indirect=True)
@pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])
def test_a_packed_sequence_is_left_out_with_all_its_rows(
    jobs: Jobs, poisoned: Path, poison: None, streaming: bool, fed: list[str], tiny_tokenizer: Any
) -> None:
    rows = [json.loads(line) for line in poisoned.read_text().splitlines()]
    training = {**REWIND, **PACKED, "max_steps": 6}
    first = jobs.run("job", training=training, rows=poisoned, streaming=streaming)
    assert isinstance(first.last, Left)
    (note,) = [note.text for note in first.of(Note) if "optimizer step" in note.text]
    (skip,) = Skips(jobs.checkpoints()).entries
    assert sorted(skip.rows) == lines_in(fed[-1], rows, tiny_tokenizer)
    assert skip.end - skip.first == 1
    assert f"leaves this sequence of {len(skip.rows)} rows out" in note
    fed.clear()
    last = jobs.run("job", attempt=2, training=training, rows=poisoned, streaming=streaming).last
    assert isinstance(last, Finished | Left)
    before = fed if isinstance(last, Finished) else fed[:-1]
    assert before
    assert not any(POISON * 3 in text for text in before)


@pytest.mark.parametrize("poison", [40.0], indirect=True)
def test_a_spike_is_left_out_too(jobs: Jobs, tmp_path: Path, poison: None) -> None:
    rows = chat_rows(120)
    rows[BAD_ROW]["messages"][1]["content"] = POISON * 3
    data = write_jsonl(tmp_path / "spike.jsonl", rows)
    training = {**REWIND, "spike_factor": 1.3, "max_steps": 30, "learning_rate": 1e-4}
    first = jobs.run("job", training=training, rows=data)
    assert isinstance(first.last, Left), "the row came too early to be told from the usual"
    assert first.last.why == "fresh_process"
    (note,) = [note.text for note in first.of(Note) if "times its mean" in note.text]
    assert "1.3 times" in note
    assert BAD_LINE in Skips(jobs.checkpoints()).entries[0].rows


@pytest.mark.parametrize("poison", [float("nan")], indirect=True)
def test_it_goes_back_so_many_times_and_no_more(jobs: Jobs, poison: None, tmp_path: Path) -> None:
    rows = chat_rows(48)
    for row in rows:
        row["messages"][1]["content"] = POISON * 3
    data = write_jsonl(tmp_path / "all.jsonl", rows)
    training = {**REWIND, "max_rewinds": 2}
    for attempt in (1, 2):
        assert isinstance(jobs.run("job", attempt=attempt, training=training, rows=data).last, Left)
    with pytest.raises(TrainerError) as caught:
        jobs.run("job", attempt=3, training=training, rows=data)
    assert "gone back 2 times" in caught.value.sentence


def test_what_is_left_out_is_remembered(tmp_path: Path) -> None:
    Skips(tmp_path).add(Skip(step=3, epoch=1, first=8, end=12, why="loss", rows=[4]))
    skips = Skips(tmp_path)
    assert skips.places(1) == {8, 9, 10, 11}
    assert skips.places(0) == frozenset()
