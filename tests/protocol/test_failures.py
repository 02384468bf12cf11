"""The closed list of failures."""

import msgspec

from protocol.failures import ADVICE, Evidence, Failure, FailureReason, failure


def test_every_reason_has_advice_that_is_a_sentence() -> None:
    assert set(ADVICE) == set(FailureReason)
    for advice in ADVICE.values():
        assert advice[0].isupper()
        assert advice.endswith(".")


def test_a_failure_carries_the_advice_of_its_reason() -> None:
    made = failure(FailureReason.DATA, "Row 57 has no text.", Evidence(rows=[57]))
    assert made.advice == ADVICE[FailureReason.DATA]
    body = msgspec.json.encode(made)
    assert b"traceback" not in body, "what is empty does not travel"
    assert msgspec.json.decode(body, type=Failure) == made


def test_the_words_are_those_a_backend_relies_on() -> None:
    # Only ever added to: a word that is taken away here breaks a page somewhere.
    assert {str(reason) for reason in FailureReason} >= {
        "device_memory", "host_memory", "disk_full", "non_finite_loss", "data", "model", "template", "spec",
        "permission", "checkpoint", "driver", "signal", "lost", "stalled", "internal",
    }  # fmt: skip


def test_advice_with_figures_of_the_job_goes_before_the_general_one() -> None:
    assert failure(FailureReason.DATA, "Row 57.", advice="Mend 3 rows.").advice == "Mend 3 rows."
