"""Which trainer is paused when the machine's memory runs out."""

from agent.core.hostmemory import MARGIN, WINDOW, HostMemory

GB = 1 << 30
RESERVE = 2 * GB


def seen(*looks: tuple[float, float, dict[str, float]]) -> HostMemory:
    """What (time, GB free, GB that each trainer holds) make of it."""
    memory = HostMemory(RESERVE)
    for now, free, held in looks:
        memory.note(now, int(free * GB), 32 * GB, {job: int(size * GB) for job, size in held.items()})
    return memory


def test_a_trainer_that_grows_into_the_reserve_is_paused() -> None:
    found = seen((0, 9, {"a": 4, "b": 10}), (10, 1.5, {"a": 11, "b": 10})).shortage()
    assert found is not None and found.job_id == "a"
    assert "1.50 of 32.0 GB are free" in found.why and "holds 11.00 GB" in found.why
    assert "+7.00 GB in 10 s" in found.why and "2048" in found.why
    # It must be able to begin again, and then some.
    assert found.room == RESERVE + int(5.5 * GB) + MARGIN


def test_with_enough_left_nobody_is_paused() -> None:
    assert seen((0, 9, {"a": 4}), (10, 2.1, {"a": 11})).shortage() is None
    assert seen((0, 9, {}), (10, 0.1, {})).shortage() is None
    off = HostMemory(0)
    off.note(0, 0, GB, {"a": GB})
    assert off.shortage() is None


def test_a_trainer_that_does_not_grow_is_left_alone_until_the_kernel_would_end_it() -> None:
    steady = {"a": 4.0, "b": 10.0}
    assert seen((0, 9, steady), (10, 1.5, steady)).shortage() is None
    found = seen((0, 9, steady), (10, 0.9, steady)).shortage()
    assert found is not None and found.job_id == "b", "the largest gives back the most"


def test_growth_is_of_the_last_moments_alone() -> None:
    memory = seen((0, 9, {"a": 1}), (WINDOW + 1, 1.5, {"a": 9}), (2 * WINDOW + 2, 1.5, {"a": 9}))
    assert memory.shortage() is None
    assert memory.held("a") == 9 * GB and memory.held("z") is None


def test_a_trainer_that_was_not_there_before_grows_from_what_it_began_with() -> None:
    assert seen((0, 9, {}), (5, 1.5, {"a": 9})).shortage() is None
    assert seen((0, 9, {}), (5, 3, {"a": 8}), (6, 1.5, {"a": 9})).shortage() is not None
