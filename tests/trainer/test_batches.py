"""Rows fetched by workers: the same steps as without them, also after a pause."""

from typing import Any

from protocol.jobspec import LoraSpec
from protocol.worker import Left, Pause
from tests.trainer.conftest import Jobs, curve


def test_rows_that_workers_fetch_make_the_same_run_also_after_a_pause(jobs: Jobs) -> None:
    training = {"max_steps": 7, "eval_strategy": "steps", "eval_steps": 5, "gradient_accumulation_steps": 2}
    wanted: dict[str, Any] = {"lora": LoraSpec(r=4, dropout=0.2), "eval_fraction": 0.2}
    fetched = {**training, "dataloader_num_workers": 2, "dataloader_prefetch_factor": 3}
    alone = jobs.run("alone", training=training, **wanted)
    # In the middle of an epoch, with batches fetched that are not trained on; and its second epoch follows.
    paused = jobs.run("paused", {3: [Pause()]}, training=fetched, **wanted)
    assert isinstance(paused.last, Left)
    assert (paused.last.why, paused.last.step) in {("paused", 3), ("paused", 4)}
    again = jobs.run("paused", attempt=2, training=fetched, **wanted)
    assert curve(paused, again) == curve(alone)
    assert again.last.weights_hash == alone.last.weights_hash
