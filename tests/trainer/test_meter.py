"""Memory is counted to the byte."""

import torch

from agent.trainer import meter

CPU = torch.device("cpu")
MB = 1 << 20


def test_the_peak_and_what_stays_are_told_apart() -> None:
    kept = []
    with meter.measured(CPU) as found:
        kept.append(torch.empty(3 * MB, dtype=torch.uint8))
        found.mark("first")
        passing = torch.empty(5 * MB, dtype=torch.uint8)
        del passing
        found.mark("second")
        kept.append(torch.empty(1 * MB, dtype=torch.uint8))
    assert found.live("first") == 3 * MB and found.live() == 4 * MB
    assert found.peak() == 8 * MB
    assert found.peak(upto="first") == 3 * MB
    assert found.peak(since="second") == 4 * MB
    assert found.peak(upto="no such mark") == 8 * MB


def test_what_is_resident_follows_what_is_held() -> None:
    before = meter.resident()
    meter.forget_most()
    held = torch.ones(64 * MB, dtype=torch.uint8)
    assert meter.most_resident() - before > 60 * MB
    assert meter.resident() - before > 60 * MB
    del held
    assert meter.resident() - before < 20 * MB


def test_the_free_memory_is_some_and_less_than_all() -> None:
    assert 0 < meter.free_host() < meter.total_host()
