"""What of the environment a trainer may see: a list of names, and nothing that is not on it.

The agent cuts its own down by the same list, since a spawned child is born with it.
"""

import ctypes
import sys
from collections.abc import Iterable, Mapping, MutableMapping, Sequence

KEPT: dict[str, str] = {
    "PATH": "the compilers that triton and torch.compile start are found by it",
    "HOME": "caches of libraries lie under it",
    "USER": "names torch's cache folder",
    "LOGNAME": "the same, where USER is not set",
    "LANG": "decides how file names are decoded",
    "LANGUAGE": "the same",
    "TZ": "times in the log",
    "TMPDIR": "where the disk has room; a job's own goes before it",
    "LD_LIBRARY_PATH": "the driver's and CUDA's libraries",
    "LD_PRELOAD": "a memory allocator that the owner chose",
    "CC": "the compiler of triton",
    "CXX": "the compiler of torch.compile",
    "VIRTUAL_ENV": "where packages are",
    "PYTHONPATH": "where packages are",
    "PYTHONHASHSEED": "an owner who fixed it wants it in the trainer too",
    "XDG_CACHE_HOME": "caches of libraries",
    "HF_HOME": "the cache of models and data sets",
    "HF_HUB_CACHE": "the same, of the Hub alone",
    "HF_DATASETS_CACHE": "the same, of data sets alone",
    "HF_HUB_OFFLINE": "no network wanted",
    "HF_DATASETS_OFFLINE": "no network wanted",
    "TRANSFORMERS_OFFLINE": "no network wanted",
    "HF_ENDPOINT": "a mirror of the Hub",
    "HF_HUB_DOWNLOAD_TIMEOUT": "a slow line",
    "HF_HUB_DISABLE_XET": "a proxy that does not let it through",
    "SSL_CERT_FILE": "a company's certificate authority",
    "SSL_CERT_DIR": "the same",
    "REQUESTS_CA_BUNDLE": "the same",
    "CURL_CA_BUNDLE": "the same",
    "HTTP_PROXY": "the way out to the Hub",
    "HTTPS_PROXY": "the same",
    "ALL_PROXY": "the same",
    "NO_PROXY": "the same",
    "http_proxy": "the same",
    "https_proxy": "the same",
    "all_proxy": "the same",
    "no_proxy": "the same",
    "OMP_NUM_THREADS": "how many cores the owner gives",
    "MKL_NUM_THREADS": "the same",
    "OPENBLAS_NUM_THREADS": "the same",
    "NUMEXPR_NUM_THREADS": "the same",
    "TOKENIZERS_PARALLELISM": "the same",
    "COVERAGE_PROCESS_START": "counts the trainer's lines in a test run",
    "COVERAGE_FILE": "the same",
}
"""Every name that may stay, and what would go wrong without it."""

KEPT_PREFIXES: dict[str, str] = {
    "LC_": "decides how text is decoded",
    "CUDA_": "the toolkit and its devices",
    "NVIDIA_": "what the container runtime gives",
    "NCCL_": "how GPUs talk to each other",
    "PYTORCH_": "the memory allocator's settings",
    "TORCH_": "torch's caches and logs",
    "TORCHINDUCTOR_": "torch.compile's cache",
    "TRITON_": "triton's cache",
    "KMP_": "Intel's threads",
    "GOMP_": "GNU's threads",
    "BNB_": "which CUDA version bitsandbytes loads",
    "BITSANDBYTES_": "the same",
}
"""Families of names. None of them may name a secret: such are passed one by one, if the owner lists them."""

SECRET_WORDS = ("TOKEN", "SECRET", "PASSWORD", "PASSWD", "API_KEY", "CREDENTIAL", "PRIVATE")
"""A name of a family that holds one of these is not kept."""

PR_SET_DUMPABLE = 4


def may_stay(name: str) -> bool:
    """Return whether a name is on the list."""
    if name in KEPT:
        return True
    return name.startswith(tuple(KEPT_PREFIXES)) and not any(word in name.upper() for word in SECRET_WORDS)


def child_env(
    parent: Mapping[str, str], *, devices: str, workspace: str, passed: Sequence[str], threads: int | None
) -> dict[str, str]:
    """Build a trainer's whole environment.

    ``devices`` is CUDA_VISIBLE_DEVICES (empty: none), ``workspace`` the folder for temporary files,
    ``passed`` the names that the owner lets through (HF_TOKEN), ``threads`` the cores to use, None = as
    the owner's environment says.
    """
    env = {name: value for name, value in parent.items() if may_stay(name)}
    env |= {name: parent[name] for name in passed if name in parent}
    env["CUDA_VISIBLE_DEVICES"] = devices
    # NVML, and so the agent, counts by bus; CUDA's own order would make "0" another device.
    env["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    env["TMPDIR"] = workspace
    env["PYTHONUNBUFFERED"] = "1"
    if threads is not None:
        env["OMP_NUM_THREADS"] = str(threads)
    return env


def cut_own_environment(environ: MutableMapping[str, str], keep: Iterable[str] = ()) -> None:
    """Take every name out of ``environ`` that is not on the list nor in ``keep``.

    Called once the settings are read. What is needed later (HF_TOKEN, to be passed on) is read before.
    """
    kept = set(keep)
    for name in [name for name in environ if name not in kept and not may_stay(name)]:
        del environ[name]


def make_undumpable() -> None:
    """Close this process's memory and /proc entry to others of the same user. Linux only; else nothing.

    A child is dumpable again after its exec. Root is not kept out by this.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, "the process could not be made undumpable")
