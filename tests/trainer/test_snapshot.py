"""A copy in kept memory, and a thread that writes it."""

import threading
from pathlib import Path

import pytest
import torch

from agent.trainer import meter
from agent.trainer.checkpoint import FileRecord
from agent.trainer.snapshot import Content, HostBuffer, Writer, fits_host_memory
from agent.trainer.tensorfile import read


def content() -> Content:
    return Content(
        {
            "model": {"w": torch.randn(7, 5).t(), "b": torch.randn(3).bfloat16()},
            "training/optimizer": {"step": torch.tensor(4.0), "none": torch.empty(0)},
        },
        {"config.json": b"{}", "training/a.json": b"[1]"},
    )


def test_a_copy_stays_as_it_was_while_training_goes_on() -> None:
    live = content()
    before = {name: tensor.clone() for name, tensor in live.tensors["model"].items()}
    buffer = HostBuffer()
    held = buffer.hold(live)
    live.tensors["model"]["w"].add_(1)
    for name, tensor in before.items():
        assert torch.equal(held.tensors["model"][name], tensor)
        assert held.tensors["model"][name].dtype is tensor.dtype
    assert held.tensors["training/optimizer"]["step"].item() == 4.0
    assert held.files == live.files


def test_the_memory_is_kept_for_the_next_one() -> None:
    live, buffer = content(), HostBuffer()
    assert buffer.lacks(live) >= live.tensor_bytes > 0
    place = buffer.hold(live).tensors["model"]["w"].data_ptr()
    assert buffer.lacks(live) == 0
    assert buffer.hold(live).tensors["model"]["w"].data_ptr() == place
    live.tensors["model"]["more"] = torch.zeros(1000)
    assert buffer.lacks(live) > 4000
    assert torch.equal(buffer.hold(live).tensors["model"]["more"], torch.zeros(1000))


def test_memory_is_left_for_others() -> None:
    assert fits_host_memory(1)
    assert not fits_host_memory(meter.free_host() - 1)


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mb = 1 << 20
    (tmp_path / "memory.max").write_text(f"{1000 * mb}\n")
    (tmp_path / "memory.current").write_text(f"{300 * mb}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {100 * mb}\n")
    monkeypatch.setattr(meter, "_groups", lambda: iter([tmp_path]))
    assert (meter.free_host(), meter.total_host()) == (800 * mb, 1000 * mb)
    assert fits_host_memory(200 * mb)
    assert not fits_host_memory(300 * mb)


@pytest.mark.parametrize("compress", [False, True])
def test_every_file_is_written_where_it_belongs(compress: bool, tmp_path: Path) -> None:
    live = content()
    records = live.write(tmp_path, compress=compress)
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()} == set(
        records
    )
    for name, record in records.items():
        assert isinstance(record, FileRecord)
        assert (tmp_path / name).stat().st_size == record.size
    for stem, tensors in live.tensors.items():
        back = read(tmp_path, stem)
        assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    assert (tmp_path / "training" / "a.json").read_bytes() == b"[1]"


def test_an_error_of_the_thread_comes_out_where_training_looks() -> None:
    writer = Writer()

    def fail() -> None:
        raise OSError("disk")

    writer.start(fail)
    with pytest.raises(OSError, match="disk"):
        writer.wait()
    writer.wait()
    writer.check()
    writer.start(fail)
    with pytest.raises(OSError, match="disk"):
        writer.start(lambda: None)


def test_one_piece_of_work_at_a_time() -> None:
    writer, go, done = Writer(), threading.Event(), []

    def work() -> None:
        assert go.wait(60)
        done.append(1)

    writer.start(work)
    writer.check()
    assert writer.busy and not done
    threading.Timer(0.05, go.set).start()
    writer.start(lambda: done.append(2))
    writer.wait()
    assert done == [1, 2] and not writer.busy


def test_a_cancel_does_not_wait_for_the_rest() -> None:
    writer, looked = Writer(), threading.Event()

    def endless() -> None:
        while True:
            looked.set()
            writer.pulse()

    writer.start(endless)
    assert looked.wait(60)
    writer.close(within=0.01)
    assert not writer.busy
