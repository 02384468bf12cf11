"""What a lack of memory is told by, and what a step that is made again needs: without a run."""

from pathlib import Path

import torch

from agent.trainer import healing
from tests.trainer.test_healing import CPU, CUDA


def test_only_a_lack_of_memory_is_one() -> None:
    for error in (torch.OutOfMemoryError(CUDA), MemoryError(), RuntimeError(CPU), OSError(12, "no memory")):
        assert healing.is_out_of_memory(error)
    for error in (
        RuntimeError("CUDA error: an illegal memory access"),
        ValueError("out of memory"),
        OSError(28, ""),
    ):
        assert not healing.is_out_of_memory(error)


def test_each_step_may_ask_for_one_fresh_process(tmp_path: Path) -> None:
    assert healing.Asked(tmp_path).for_fresh_process(3)
    assert not healing.Asked(tmp_path).for_fresh_process(3)
    assert healing.Asked(tmp_path).for_fresh_process(4)


def test_a_scaled_step_whose_clipping_was_given_up_is_made_again() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer, scaler = torch.optim.SGD([weight], lr=1.0), torch.amp.GradScaler("cpu", init_scale=1024.0)

    def backward() -> None:
        optimizer.zero_grad()
        scaler.scale(weight.sum()).backward()
        scaler.unscale_(optimizer)

    backward()  # memory ended in the clipping that follows
    healing.forget_unscaled(scaler)
    backward()
    scaler.step(optimizer)
    scaler.update()
    assert weight.tolist() == [0.0, 0.0]
    assert scaler.get_scale() == 1024.0
    healing.forget_unscaled(None)
