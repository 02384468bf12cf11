"""What a trainer died of, and advice in the job's own figures."""

import json
from typing import Any

import pytest

from agent.core.explain import GB, MB, UNKNOWN_NEED, Seen, enriched, is_final, no_room, room_needed, verdict
from agent.core.job import Job
from agent.core.xid import CONSEQUENCES, XIDS, explain
from protocol.failures import ADVICE, Evidence, FailureReason, failure
from protocol.worker import Estimate

R = FailureReason
CONFIG: dict[str, Any] = {
    "model": {"name": "m"},
    "training": {
        "method": "sft",
        "use_lora": True,
        "batch_size": 4,
        "max_length": 4096,
        "learning_rate": 2e-4,
        "dataloader_num_workers": 3,
    },
}


def job(**fields: Any) -> Job:
    return Job(job_id="j", config=json.dumps(CONFIG), attempt=2, step=57, saved_step=40, **fields)


def found(signal: int | None = None, forced: bool = False, **seen: Any) -> tuple[FailureReason, str]:
    return verdict(job(), "It ended.", signal, forced, Seen(**seen))


def test_an_end_is_called_by_what_was_seen() -> None:
    assert found() == (R.LOST, "It ended.")
    assert found(11) == (R.SIGNAL, "It ended.")
    assert found(9, True) == (R.LOST, "It ended."), "the agent's own signal explains nothing"
    assert found(9)[0] is R.SIGNAL
    assert found(11, oom_killed=True)[0] is R.SIGNAL, "the kernel ends for lack of memory by SIGKILL alone"
    reason, sentence = found(9, oom_killed=True, trainer=3 * GB, host_free=GB // 10, host_total=8 * GB)
    assert reason is R.HOST_MEMORY and "held 3.0 GB" in sentence and "0.1 of 8.0 GB" in sentence
    reason, sentence = found(None, xids=[31, 79])
    assert reason is R.DRIVER and sentence.startswith("The driver reported XID 79") and "bus" in sentence
    assert found(9, xids=[45])[0] is R.SIGNAL, "that follows every end"
    assert found(9, True, stalled="It stood still.", xids=[79]) == (R.STALLED, "It stood still.")


def test_a_card_that_needs_hands_is_not_tried_again() -> None:
    assert is_final(R.DRIVER, Seen(xids=[13, 79]))
    assert not is_final(R.DRIVER, Seen(xids=[13]))
    assert not is_final(R.LOST, Seen(xids=[79]))


def test_every_xid_has_a_meaning_and_advice() -> None:
    for number, known in XIDS.items():
        assert known.meaning[0].islower() and known.advice.endswith(".") and explain(number) is known
    assert {13, 31, 43, 45, 48, 62, 63, 64, 74, 79, 94, 95, 119} <= XIDS.keys()
    assert XIDS.keys() > CONSEQUENCES
    assert "not in this agent's list" in explain(9999).meaning and not explain(9999).passing


def test_a_failure_says_what_was_seen_and_keeps_what_the_trainer_said() -> None:
    told = failure(R.DATA, "Row 57.", Evidence(traceback="T", step=3, host_memory_gb=1.5))
    seen = Seen(log_tail=["last"], host_free=2 * GB, trainer=GB, device_free=5 * GB, traceback="x")
    evidence = enriched(job(exits=["a"]), told, seen).evidence
    assert evidence is not None
    assert (evidence.traceback, evidence.step, evidence.host_memory_gb) == ("T", 3, 1.5)
    assert (evidence.log_tail, evidence.host_free_gb, evidence.device_free_gb) == (["last"], 2, 5)
    assert evidence.exits == ["a"]
    bare = enriched(job(), failure(R.STALLED, "x"), seen).evidence
    assert bare is not None and (bare.traceback, bare.step, bare.host_memory_gb) == ("x", 57, 1)


def test_a_driver_error_is_told_with_its_number_and_its_own_advice() -> None:
    made = enriched(job(), failure(R.INTERNAL, "Something."), Seen(xids=[79]))
    assert made.reason is R.DRIVER and "XID 79" in made.sentence and made.advice == explain(79).advice
    assert made.evidence is not None and made.evidence.xid == 79
    assert enriched(job(), failure(R.DATA, "Row 57."), Seen(xids=[79])).reason is R.DATA


def test_advice_of_the_trainers_own_is_kept() -> None:
    told = failure(R.DEVICE_MEMORY, "x", advice="Take 3 rows.")
    assert enriched(job(), told, Seen()).advice == "Take 3 rows."
    assert enriched(job(), failure(R.SPEC, "x"), Seen()).advice == ADVICE[R.SPEC]


def test_device_memory_advice_has_the_figures_of_this_job() -> None:
    estimate = Estimate(
        device="0",
        host_gb=1,
        disk_gb=1,
        free_host_gb=9,
        free_disk_gb=9,
        parts={"activations": 8.0, "weights": 16.0},
    )
    advice = enriched(job(estimate=estimate), failure(R.DEVICE_MEMORY, "x"), Seen()).advice
    assert "training.max_length is 4096: 2048 needs about 4.0 GB less" in advice
    assert "training.batch_size is 4: 1 needs about 6.0 GB less" in advice
    assert "nf4) need about 11.2 GB less" in advice and "gradient_checkpointing is off" in advice
    without = enriched(job(), failure(R.DEVICE_MEMORY, "x"), Seen()).advice
    assert "2048 needs less" in without and "GB" not in without, "no figure is made up"
    said = Estimate(device="0", host_gb=1, disk_gb=1, free_host_gb=9, free_disk_gb=9, advice=["A.", "B."])
    assert enriched(job(estimate=said), failure(R.DEVICE_MEMORY, "x"), Seen()).advice == "A. B."


def test_host_memory_advice_has_figures_too() -> None:
    advice = enriched(
        job(train_rows=900), failure(R.HOST_MEMORY, "x"), Seen(trainer=3 * GB, host_free=GB)
    ).advice
    assert "held 3.0 GB, and 1.0 GB were free" in advice
    assert "dataloader_num_workers is 3" in advice and "900 rows" in advice


def test_a_job_on_the_cpu_saves_the_machines_memory_as_it_would_a_devices() -> None:
    said = Estimate(
        device="cpu", host_gb=1, disk_gb=1, free_host_gb=9, free_disk_gb=9, advice=["A saves 2 GB."]
    )
    told = failure(R.HOST_MEMORY, "x")
    assert "A saves 2 GB." in enriched(job(estimate=said, device="cpu"), told, Seen()).advice
    assert "A saves 2 GB." not in enriched(job(estimate=said, device="0"), told, Seen()).advice


def test_a_loss_that_is_no_number_names_rate_norm_and_rows() -> None:
    told = failure(R.NON_FINITE_LOSS, "x", Evidence(step=9, rows=[3, 8]))
    advice = enriched(job(values={"learning_rate": 1e-3, "grad_norm": 55.5}), told, Seen()).advice
    assert "0.001 at step 9: try 0.0005" in advice and "55.5" in advice and "rows 3, 8" in advice


def test_a_job_whose_config_cannot_be_read_any_more_still_gets_its_reason() -> None:
    old = Job(job_id="j", config='{"model": 3}')
    assert enriched(old, failure(R.DEVICE_MEMORY, "x"), Seen()).advice == ADVICE[R.DEVICE_MEMORY]


@pytest.mark.parametrize(
    ("need", "free", "fields", "room"),
    [
        (300 * MB, 100 * MB, {}, 300 * MB),
        (100 * MB, 300 * MB, {}, 100 * MB),
        (100 * MB, 300 * MB, {"full_step": 40}, 400 * MB),
        (300 * MB, 100 * MB, {"full_step": 40}, 300 * MB),
        (0, 0, {"saved_bytes": 7 * MB}, 7 * MB),
        (0, 0, {}, UNKNOWN_NEED),
    ],
)
def test_how_much_disk_is_waited_for(need: int, free: int, fields: dict[str, int], room: int) -> None:
    assert room_needed(job(**fields), need, free) == room


def test_who_waits_for_a_disk_says_how_much_and_where() -> None:
    said = no_room(300 * MB, 100 * MB, "/c")
    assert "100 MB are free under /c and 300 MB are needed" in said and "resume it" in said
