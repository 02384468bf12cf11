"""What is switched on for bit-equal runs; each in a process of its own, as it cannot be switched back."""

import subprocess
import sys

import pytest

PROGRAM = """
import os
import torch
from agent.trainer import determinism
from protocol.jobspec import JobSpec, ModelSpec, TrainingSpec

spec = JobSpec(job_id="j", model=ModelSpec(name="m"), training=TrainingSpec(deterministic={wanted}))
print(determinism.apply(spec))
print(torch.cuda.is_initialized(), os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
print(torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic)
print(torch.backends.cuda.mem_efficient_sdp_enabled(), torch.backends.cuda.cudnn_sdp_enabled())
"""


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (False, ["{}", "False None", "False False", "True True"]),
        (True, ["{'deterministic': 'yes, as any CPU'}", "False :4096:8", "True True", "True False"]),
    ],
)
def test_ordered_kernels_are_chosen_before_cuda_starts(wanted: bool, expected: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(wanted=wanted)],
        capture_output=True,
        text=True,
        check=True,
        env={"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ":".join(filter(None, sys.path))},
    )
    assert done.stdout.splitlines() == expected
