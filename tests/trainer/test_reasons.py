"""What the errors of libraries and of the system are told as."""

import errno
import os
import signal
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, Dataset

from agent.trainer.reasons import explain


def raised(action: Any) -> BaseException:
    """Return what an action of a real library raises."""
    with pytest.raises(BaseException) as found:
        action()
    return found.value


def after(first: BaseException, then: BaseException, *, cause: bool) -> BaseException:
    """Return an error that came up while another was dealt with."""
    try:
        try:
            raise first
        except BaseException as one:
            if cause:
                raise then from one
            raise then  # noqa: B904  (as libraries do)
    except BaseException as found:  # noqa: BLE001  (any: it is returned)
        return found


class Rows(Dataset[int]):
    """Rows whose reader is killed."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return index


def test_a_reader_of_rows_that_was_killed() -> None:
    reason, sentence, advice = explain(raised(lambda: list(DataLoader(Rows(), num_workers=1))))
    assert reason == "host_memory" and "was killed" in sentence and "dataloader_num_workers" in advice


def test_a_damaged_file_of_weights(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    reason, sentence, advice = explain(raised(lambda: safe_open(str(file), "pt").__enter__()))
    assert reason == "model" and "damaged" in sentence and "Git LFS" in advice


def test_a_tokenizer_of_another_version(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text('{"version": "1.0", "model": {"type": "FromTheFuture"}}')
    reason, sentence, _ = explain(raised(lambda: Tokenizer.from_file(str(file))))
    assert reason == "model" and "tokenizer" in sentence


def test_weights_of_another_shape() -> None:
    one, other = torch.nn.Linear(2, 2), torch.nn.Linear(3, 3)
    assert explain(raised(lambda: one.load_state_dict(other.state_dict())))[0] == "model"


def test_more_memory_than_any_machine_has() -> None:
    reason, sentence, _ = explain(raised(lambda: torch.empty(1 << 60, dtype=torch.uint8)))
    assert reason == "host_memory" and "machine's memory" in sentence
    assert explain(raised(lambda: bytearray(1 << 62)))[0] == "host_memory"


def test_a_template_that_cannot_be_read_or_asks_for_what_is_not_there() -> None:
    assert explain(raised(lambda: jinja2.Template("{% if %}")))[0] == "template"
    strict = jinja2.Template("{{ a.b.c }}", undefined=jinja2.StrictUndefined)
    assert explain(raised(strict.render))[0] == "template"


@pytest.mark.parametrize(
    ("number", "reason", "words"),
    [
        (errno.ENOSPC, "disk_full", "The disk is full (/data/x)"),
        (errno.EDQUOT, "disk_full", "The disk is full (/data/x)"),
        (errno.ENOMEM, "host_memory", "machine's memory"),
        (errno.EACCES, "permission", "/data/x/y cannot be used: this user may not"),
        (errno.EROFS, "permission", "read-only"),
        (errno.ENOENT, "permission", "not any more"),
        (errno.ESTALE, "permission", "network disk"),
        (errno.EIO, "permission", "answers with errors"),
        (errno.EPIPE, "internal", "BrokenPipeError"),
    ],
)
def test_what_the_system_refuses(number: int, reason: str, words: str) -> None:
    told = explain(OSError(number, os.strerror(number), "/data/x/y"))
    assert told[0] == reason and words in told[1]


def test_a_folder_that_is_read_only_or_gone(tmp_path: Path) -> None:
    assert "not there" in explain(raised((tmp_path / "gone" / "file").read_bytes))[1]
    not_a_folder = tmp_path / "file"
    not_a_folder.write_text("x")
    assert "no folder" in explain(raised((not_a_folder / "below").read_bytes))[1]


class AcceleratorError(RuntimeError):
    """As torch names its own."""


class GatedRepoError(OSError):
    """As the Hub's library names its own."""


@pytest.mark.parametrize(
    ("error", "reason", "words"),
    [
        (RuntimeError("CUDA error: out of memory"), "device_memory", "did not suffice"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `x`"), "device_memory", "suffice"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"), "device_memory", "memory is full"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), "driver", "EXECUTION_FAILED"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), "driver", "EXECUTION_FAILED"),
        (AcceleratorError("CUDA error: device-side assert triggered"), "model", "vocabulary"),
        (AcceleratorError("CUDA error: uncorrectable ECC error encountered"), "driver", "hardware"),
        (AcceleratorError("CUDA error: unspecified launch failure"), "driver", "unspecified launch failure"),
        (AcceleratorError("what it never said before"), "driver", "what it never said before"),
        (RuntimeError("CUDA error: no kernel image is available for execution"), "driver", "not built for"),
        (RuntimeError("Found no NVIDIA driver on your system."), "driver", "missing or older"),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that"),
            "host_memory",
            "/dev/shm has",
        ),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), "signal", "reads rows ended"),
        (
            ImportError("Using `bitsandbytes` 4-bit quantization requires bitsandbytes: `pip install -U`"),
            "model",
            "not installed",
        ),
        (
            RuntimeError("Attempted to load libbitsandbytes_cuda124.so: not found"),
            "driver",
            "no CUDA library",
        ),
        (GatedRepoError("403 Client Error. Access to model x is restricted"), "model", "consent"),
        (OSError("You are trying to access a gated repo.\nMake sure"), "model", "consent"),
        (OSError("401 Client Error: Unauthorized for url"), "permission", "token"),
        (OSError("403 Client Error: Forbidden"), "permission", "lets this account not"),
        (OSError("429 Client Error: Too Many Requests"), "data", "too many"),
        (
            OSError("We couldn't connect to 'https://huggingface.co' to load the files"),
            "model",
            "not be reached",
        ),
        (OSError("x/y is not a local folder and is not a valid model identifier"), "model", "nothing under"),
        (ModuleNotFoundError("No module named 'einops'"), "model", "einops"),
        (ImportError("You need to have `torchao>=0.4.0` in order to use it."), "model", "torchao"),
        (ValueError("Please install grokadamw with `pip install grokadamw`"), "model", "grokadamw"),
        (RuntimeError("No space left on device (os error 28)"), "disk_full", "full"),
    ],
)
def test_what_libraries_say(error: Exception, reason: str, words: str) -> None:
    told = explain(error)
    assert told[0] == reason, told
    assert words in told[1]
    assert "\n" not in told[1] and told[1].endswith((".", "`")), told[1]


def test_the_cause_is_told_and_what_was_only_being_dealt_with_is_not() -> None:
    gated = GatedRepoError("403 Client Error. Access to model x is restricted")
    assert explain(after(gated, ValueError("no config"), cause=True))[0] == "model"
    missing = FileNotFoundError(errno.ENOENT, "no", "/a")
    assert explain(after(missing, ValueError("a defect"), cause=False))[0] == "internal"
    full = OSError(errno.ENOSPC, "no", "/a/b")
    assert explain(after(full, RuntimeError("cannot write"), cause=False))[0] == "disk_full"
    reason, sentence, _ = explain(ValueError())
    assert reason == "internal" and "ValueError: no further words. The job's log" in sentence
