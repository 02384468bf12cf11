"""What the installed stack does with its checkpoints, as `test_facts` has it for the rest: facts 3, 6, 7 and 8."""

import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback
from transformers.trainer_jit_checkpoint import CheckpointManager
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTTrainer

from tests.trainer.stock import PAUSE, Stock, forked, rows, weights_of

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture
def stock(tmp_path: Path, tiny_model: Path, tiny_tokenizer: Any) -> Stock:
    return Stock(tmp_path, tiny_model, tiny_tokenizer)


# 3. A pause can lose its own checkpoint


def test_fact_3_saving_the_best_forgets_the_save_of_a_pause(stock: Stock) -> None:
    best = {
        "eval_data": rows(8, 5),
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "best",
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "learning_rate": 0.0,  # the first evaluation stays the best one
    }
    paused = stock.run("job", pause_at=PAUSE, **best)
    assert paused.trainer.state.global_step == PAUSE
    assert not (paused.folder / f"checkpoint-{PAUSE}").exists()


def test_fact_3_a_limit_of_one_deletes_the_checkpoint_of_a_pause(stock: Stock) -> None:
    limited = {
        "eval_data": rows(8, 5),
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 1,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "learning_rate": 0.0,
        "load_best_model_at_end": True,
    }
    paused = stock.run("job", pause_at=PAUSE, **limited)
    assert paused.trainer.state.global_step == PAUSE
    assert [path.name for path in paused.folder.glob("checkpoint-*")] == ["checkpoint-2"]


# 6. A save that was not finished is chosen, and breaks the resume


class KilledInSave(SFTTrainer):  # type: ignore[misc]
    """Is killed in the middle of the second save."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.state.global_step > 3:
            os.kill(os.getpid(), signal.SIGKILL)
        super()._save_optimizer_and_scheduler(output_dir)


class FullInSave(SFTTrainer):  # type: ignore[misc]
    """Gets no further than the first bytes of a file in the second save: the kernel refuses the rest."""

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step > 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))
        super()._save_checkpoint(*args, **kwargs)


@pytest.mark.parametrize(
    ("kind", "code", "refusal"),
    [(KilledInSave, -signal.SIGKILL, "trainer_state"), (FullInSave, 1, "Can't find a valid checkpoint")],
    ids=["killed", "disk full"],
)
def test_fact_6_a_torn_checkpoint_is_chosen_although_a_good_one_lies_beside_it(
    stock: Stock, kind: type[SFTTrainer], code: int, refusal: str
) -> None:
    saves = {"save_strategy": "steps", "save_steps": 3}
    assert forked(lambda: stock.run("job", kind=kind, **saves)) == code
    folder = stock.folder / "job"
    assert (folder / "checkpoint-3" / "trainer_state.json").exists()
    chosen = get_last_checkpoint(str(folder))
    assert chosen is not None and Path(chosen).name == "checkpoint-6"
    with pytest.raises((FileNotFoundError, ValueError), match=refusal):
        stock.run("job", resume=True, **saves)


# 7. Damage and other inputs go on without a word


@pytest.fixture
def paused(stock: Stock) -> Path:
    return stock.run("job", pause_at=PAUSE, lora=False).folder / f"checkpoint-{PAUSE}"


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[-100] ^= 0x40  # in the tensors: the header stands in front
    file.write_bytes(raw)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a flipped byte in the weights": lambda folder: flip(folder / "model.safetensors"),
    "no optimizer": lambda folder: (folder / "optimizer.pt").unlink(),
    "no scheduler": lambda folder: (folder / "scheduler.pt").unlink(),
    "no random state": lambda folder: (folder / "rng_state.pth").unlink(),
}


def test_fact_7_damaged_checkpoints_are_gone_on_from(stock: Stock, paused: Path) -> None:
    for what, damage in DAMAGES.items():
        copy = stock.folder / "copy" / paused.name
        shutil.copytree(paused, copy)
        damage(copy)
        again = stock.run("again", resume=str(copy), lora=False, max_steps=PAUSE + 1)
        assert list(again.losses) == [PAUSE + 1], what
        shutil.rmtree(copy.parent)


def test_fact_7_other_inputs_are_gone_on_with(stock: Stock, paused: Path) -> None:
    for changes in ({"data": rows(48, seed=9)}, {"data": rows(12)}, {"seed": 7}, {"learning_rate": 1e-4}):
        again = stock.run("again", resume=str(paused), lora=False, max_steps=PAUSE + 1, **changes)
        assert list(again.losses) == [PAUSE + 1], changes
    # The last one: not even heeded, since the scheduler's state holds the rate that it was made with.
    assert set(again.trainer.lr_scheduler.base_lrs) == {1e-2}


# 8. The checkpoint on SIGTERM is not exact


class Terminated(TrainerCallback):  # type: ignore[misc]
    """Has a SIGTERM arrive whose waiting time is over in the middle of a step."""

    trainer: Any = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == PAUSE:
            for callback in self.trainer.callback_handler.callbacks:
                if (manager := getattr(callback, "jit_manager", None)) is not None:
                    manager.is_checkpoint_requested = True


def test_fact_8_the_checkpoint_on_sigterm_waits_and_is_not_exact_with_dropout(stock: Stock) -> None:
    assert CheckpointManager(None).kill_wait == 3
    whole = stock.run("whole")
    before = signal.getsignal(signal.SIGTERM)
    terminated = Terminated()
    try:
        trainer = stock.trainer("job", enable_jit_checkpoint=True)
        terminated.trainer = trainer
        # In front of the stack's own callback, which looks at the flag in the same event.
        trainer.callback_handler.callbacks.insert(0, terminated)
        trainer.train()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [path.name for path in (stock.folder / "job").glob("checkpoint-*")] == [f"checkpoint-{PAUSE}"]
    # In memory the step after it was made all the same.
    assert trainer.state.global_step == PAUSE + 1
    assert weights_of(trainer.model) == stock.run("next", pause_at=PAUSE + 1).weights
    again = stock.run("job", resume=True)
    assert min(again.losses) == PAUSE + 1
    assert again.losses[PAUSE + 1] != whole.losses[PAUSE + 1]
    assert again.weights != whole.weights


def test_fact_8_nobody_reads_the_mark_of_an_unfinished_checkpoint(stock: Stock, paused: Path) -> None:
    (paused / "checkpoint-is-incomplete.txt").write_text("Checkpoint started at step 4 and in progress...")
    assert get_last_checkpoint(str(paused.parent)) == str(paused)
