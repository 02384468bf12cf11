"""The same numbers from the same inputs, bit for bit, where a job asks for it."""

import os

import torch

from protocol.jobspec import JobSpec

WORKSPACE = ":4096:8"
"""Buffers of cuBLAS that make its reductions keep one order (docs.nvidia.com/cuda/cublas, reproducibility)."""


def apply(spec: JobSpec) -> dict[str, str]:
    """Make the kernels deterministic if the job asks for it, and return what to say of it.

    Must come before the first use of CUDA: cuBLAS reads its workspace setting once. A CPU computes like that anyway.
    """
    if not spec.training.deterministic:
        return {}
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = WORKSPACE
    torch.use_deterministic_algorithms(True)
    # Filling fresh memory finds reads of it, which nothing here does, and costs a pass over every tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    # Of the attention kernels the others keep one order now (the memory-efficient one no longer splits its keys).
    torch.backends.cuda.enable_cudnn_sdp(False)
    return {"deterministic": "yes: ordered kernels only" if torch.cuda.is_available() else "yes, as any CPU"}
