"""What the next step depends on, out of a trainer and back into one."""

import shutil
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers

from agent.trainer import contents
from agent.trainer.errors import TrainerError
from agent.trainer.snapshot import Content
from tests.trainer.test_tensorfile import same as equal

OPTIMIZERS = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-2),
    "adamw_fused": lambda ps: torch.optim.AdamW(ps, lr=1e-2, fused=True),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9),
    "adafactor": lambda ps: transformers.Adafactor(ps, lr=1e-2, relative_step=False),
    "adamw_8bit": lambda ps: bitsandbytes.optim.AdamW8bit(ps, lr=1e-2, min_8bit_size=64),
    "lion_8bit": lambda ps: bitsandbytes.optim.Lion8bit(ps, lr=1e-2, min_8bit_size=64),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_exactly(name: str, tmp_path: Path) -> None:
    def make() -> tuple[list[torch.nn.Parameter], Any, Any]:
        torch.manual_seed(1)
        ps = [torch.nn.Parameter(torch.randn(64, 64)), torch.nn.Parameter(torch.randn(64).bfloat16())]
        optimizer = OPTIMIZERS[name](ps)
        return ps, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def step(ps: list[torch.nn.Parameter], optimizer: Any, scheduler: Any) -> None:
        for number, p in enumerate(ps):
            p.grad = torch.sin(p.detach().float() + number).to(p.dtype)
        optimizer.step()
        scheduler.step()

    one, other = make(), make()
    step(*one)
    step(*one)
    for here, there_ in zip(other[0], one[0], strict=True):
        here.data.copy_(there_.data)
    content = Content()
    contents.add(content, contents.OPTIMIZER, one[1].state_dict())
    contents.add(content, contents.SCHEDULE, one[2].state_dict())
    content.write(tmp_path)
    contents.put_optimizer(other[1], contents.take(tmp_path, contents.OPTIMIZER))
    other[2].load_state_dict(contents.take(tmp_path, contents.SCHEDULE))
    # What was put back is training's own: the files may go.
    shutil.rmtree(tmp_path / "training")
    for _ in range(3):
        step(*one)
        step(*other)
    assert equal(other[1].state_dict(), one[1].state_dict())
    assert equal(other[2].state_dict(), one[2].state_dict())
    assert all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True))


def test_random_numbers_go_on(tmp_path: Path) -> None:
    import random

    import numpy as np

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    content = Content()
    contents.add(content, contents.RANDOM, contents.random_states())
    drawn = draw()
    content.write(tmp_path)
    draw()
    contents.put_random_states(contents.take(tmp_path, contents.RANDOM))
    assert draw() == drawn


def test_weights_of_another_model_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    found = contents.weights(model)
    del found["model"]["model.norm.weight"]
    Content(found).write(tmp_path)
    with pytest.raises(TrainerError, match=r"model\.norm\.weight does not match"):
        contents.put_weights(model, tmp_path)


@pytest.mark.parametrize("compress", [False, True])
def test_weights_that_are_tied_are_kept_once_and_put_back(
    compress: bool, tiny_model: Path, tmp_path: Path
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    Content(contents.weights(model)).write(tmp_path, compress=compress)
    wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    contents.put_weights(model, tmp_path)
    assert equal(dict(model.state_dict()), wanted)
    assert "lm_head.weight" not in contents.weights(model)["model"]
