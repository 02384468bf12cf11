import ctypes
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import msgspec
import psutil
import pynvml
import pytest

from agent.runtime import devices
from agent.runtime.devices import GIB, GpuFault, Sampler, faults, free_memory, gpu_pids, inventory
from protocol.messages import Gpu


def xid_event(card: int, number: int) -> Any:
    """An event as the library hands it out: its own struct, with the card's handle in it."""
    event = pynvml.c_nvmlEventData_t()
    event.device = ctypes.cast(100 + card, pynvml.c_nvmlDevice_t)
    event.eventType = pynvml.nvmlEventTypeXidCriticalError
    event.eventData = number
    return event


class Driver(ModuleType):
    """The NVML library on a machine with two cards; the second knows no fan, power or graphics."""

    NVMLError = pynvml.NVMLError
    NVMLError_LibraryNotFound = pynvml.NVMLError_LibraryNotFound
    NVMLError_DriverNotLoaded = pynvml.NVMLError_DriverNotLoaded
    nvmlEventTypeXidCriticalError = 8  # noqa: N815 - their name

    def __init__(self, refuse: int | None = None) -> None:
        super().__init__("pynvml")
        self.lost: list[int] = []
        self.watched: list[int] = []
        self.events: list[Any] = []
        memory = SimpleNamespace(total=24 * GIB, used=6 * GIB, free=18 * GIB)
        self.answers: dict[str, Callable[..., Any]] = {
            "Init": lambda: refuse is None or self.fail(refuse),
            "DeviceGetCount": lambda: 2,
            "DeviceGetHandleByIndex": lambda index: 100 + index,
            "DeviceGetIndex": lambda handle: ctypes.cast(handle, ctypes.c_void_p).value - 100,  # type: ignore[operator]
            "DeviceGetName": lambda handle: f"Card {handle}",
            "DeviceGetUUID": lambda handle: f"GPU-{handle}",
            "SystemGetDriverVersion": lambda: "580.1",
            "SystemGetCudaDriverVersion": lambda: 12040,
            "DeviceGetCudaComputeCapability": lambda handle: (9, 0),
            "DeviceGetMemoryInfo": lambda handle: memory,
            "DeviceGetUtilizationRates": lambda handle: SimpleNamespace(gpu=97, memory=40),
            "DeviceGetTemperature": lambda handle, sensor: 61,
            "DeviceGetPowerUsage": lambda handle: 250_500 if handle == 100 else self.fail(),
            "DeviceGetFanSpeed": lambda handle: 0 if handle == 100 else self.fail(),
            "DeviceGetComputeRunningProcesses": lambda handle: [SimpleNamespace(pid=handle)],
            "DeviceGetGraphicsRunningProcesses": lambda handle: (
                [SimpleNamespace(pid=7)] if handle == 100 else self.fail()
            ),
            "EventSetCreate": lambda: self.events,
            "DeviceRegisterEvents": lambda handle, kinds, events: self.watched.append(handle),
            "EventSetWait": lambda events, wait: (
                events.pop(0) if events else self.fail(pynvml.NVML_ERROR_TIMEOUT)
            ),
        }

    def fail(self, code: int = pynvml.NVML_ERROR_NOT_SUPPORTED) -> Any:
        raise pynvml.NVMLError(code)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("nvml"):
            raise AttributeError(name)

        def call(*args: Any) -> Any:
            if args and args[0] in self.lost:
                self.fail(pynvml.NVML_ERROR_GPU_IS_LOST)
            return self.answers[name.removeprefix("nvml")](*args)

        return call


@pytest.fixture(autouse=True)
def fresh_nvml() -> Iterator[None]:
    devices._start.cache_clear()
    yield
    devices._start.cache_clear()


def use(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> Driver:
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    return driver


def test_the_machine_is_described_in_what_can_be_sent(tmp_path: Path) -> None:
    found = inventory([tmp_path / "not" / "yet" / "there"])
    assert found.cpu
    assert found.hostname
    assert found.platform in ("linux", "darwin", "windows")
    assert found.cpu_cores >= 1
    assert found.ram_gb == pytest.approx(psutil.virtual_memory().total / GIB, abs=0.01)
    assert 0 < found.disk_free_gb <= found.disk_total_gb
    assert int(found.network["up"]) >= 1
    assert msgspec.json.decode(msgspec.json.encode(found), type=type(found)) == found


def test_cards_are_described(monkeypatch: pytest.MonkeyPatch) -> None:
    use(Driver(), monkeypatch)
    assert inventory([]).gpus == [
        Gpu(0, "Card 100", 24.0, "GPU-100", "580.1", "12.4", "9.0"),
        Gpu(1, "Card 101", 24.0, "GPU-101", "580.1", "12.4", "9.0"),
    ]


def test_a_figure_that_a_card_does_not_know_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    driver = use(Driver(), monkeypatch)
    sampler = Sampler([tmp_path])
    values = {name: value for name, value in sampler.sample().items() if name.startswith("gpu")}
    common = {"utilization_percent": 97, "memory_used_gb": 6, "memory_total_gb": 24, "temperature_c": 61}
    assert values == (
        {f"gpu0_{name}": value for name, value in common.items()}
        | {f"gpu1_{name}": value for name, value in common.items()}
        | {"gpu0_power_w": 250.5, "gpu0_fan_percent": 0}
    )
    driver.lost.append(100)
    assert {name[:4] for name in sampler.sample() if name.startswith("gpu")} == {"gpu1"}


def test_who_holds_a_gpu_and_how_much_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = use(Driver(), monkeypatch)
    assert gpu_pids() == {7, 100, 101}
    assert free_memory(1) == 18 * GIB
    assert free_memory(2) is None
    driver.lost.append(101)
    assert gpu_pids() == {7, 100}
    assert free_memory(1) is None


def test_errors_of_the_driver_are_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = use(Driver(), monkeypatch)
    assert faults() == []
    assert driver.watched == [100, 101]
    driver.events += [xid_event(1, 79), xid_event(0, 48)]
    assert faults() == [GpuFault(1, 79), GpuFault(0, 48)]
    assert faults() == []


@pytest.mark.parametrize(
    ("refusal", "problem"),
    [
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, ""),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, ""),
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "restart of the machine"),
    ],
)
def test_no_driver_is_no_gpu_and_a_broken_one_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, refusal: int, problem: str
) -> None:
    use(Driver(refuse=refusal), monkeypatch)
    found = inventory([tmp_path])
    assert found.gpus == []
    assert problem in found.gpu_problem
    assert bool(problem) == bool(found.gpu_problem)
    assert gpu_pids() == set()
    assert free_memory(0) is None
    sampler = Sampler([tmp_path])
    assert faults() == []
    assert not any(name.startswith("gpu") for name in sampler.sample())


def test_a_driver_that_never_answers_is_told_and_hangs_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(devices, "NVML_WITHIN", 0.1)
    driver, never = use(Driver(), monkeypatch), threading.Event()
    monkeypatch.setattr(driver, "nvmlInit", never.wait, raising=False)
    try:
        found = inventory([tmp_path])
        assert found.gpus == []
        assert found.gpu_problem.startswith(
            "The NVIDIA driver has not answered for 0.1 s. Jobs run without a GPU"
        )
        assert gpu_pids() is None
        assert free_memory(0) is None
    finally:
        never.set()


def test_a_driver_that_stops_answering_holds_nobody_for_long(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(devices, "ANSWER_WITHIN", 0.2)
    driver, answering, asked = use(Driver(), monkeypatch), threading.Event(), []
    sampler = Sampler([tmp_path])
    assert free_memory(0) == 18 * GIB

    def hang(handle: int) -> Any:
        asked.append(handle)
        answering.wait()
        return SimpleNamespace(total=24 * GIB, used=6 * GIB, free=18 * GIB)

    driver.answers["DeviceGetMemoryInfo"] = hang
    try:
        # Once it has hung it is not asked again before it has answered.
        assert [free_memory(0), free_memory(1)] == [None, None]
        assert not any(name.startswith("gpu") for name in sampler.sample())
        assert gpu_pids() is None
        assert asked == [100]
    finally:
        answering.set()
    deadline = time.monotonic() + 20
    while free_memory(1) != 18 * GIB:
        assert time.monotonic() < deadline


@pytest.mark.parametrize("call", ["DeviceGetName", "EventSetCreate"])
def test_an_error_that_nobody_foresaw_is_told_as_what_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: str
) -> None:
    driver = use(Driver(), monkeypatch)
    driver.answers[call] = lambda *args: b"\xff".decode()
    began = time.monotonic()
    found = inventory([tmp_path])
    # Nobody waits for a driver that will not be opened.
    assert time.monotonic() - began < devices.NVML_WITHIN / 2
    assert found.gpus == []
    assert "could not be looked at: UnicodeDecodeError: " in found.gpu_problem
    assert gpu_pids() == set()
    assert faults() == []
    assert not any(name.startswith("gpu") for name in Sampler([tmp_path]).sample())


def test_threads_that_come_first_together_open_one_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    use(Driver(), monkeypatch)
    before, interval = set(threading.enumerate()), sys.getswitchinterval()
    together = threading.Barrier(8)

    def come() -> None:
        together.wait()
        gpu_pids()

    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=come) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert len([one for one in set(threading.enumerate()) - before if one.name == "nvml"]) == 1


HUNG = """
import sys, time, threading
from types import ModuleType
from pathlib import Path
import anyio, anyio.to_thread
from agent.runtime import devices

driver = ModuleType("pynvml")
driver.nvmlInit = lambda: threading.Event().wait() if sys.argv[1] == "opening" else None
driver.nvmlDeviceGetCount = lambda: 1
driver.nvmlEventTypeXidCriticalError = 8
class Error(Exception): ...
driver.NVMLError = driver.NVMLError_LibraryNotFound = driver.NVMLError_DriverNotLoaded = Error
def fail(*args):
    raise Error()
driver.__getattr__ = lambda name: (lambda index: index) if name == "nvmlDeviceGetHandleByIndex" else fail
sys.modules["pynvml"] = driver

async def main():
    with anyio.move_on_after(1):
        await anyio.to_thread.run_sync(devices.free_memory, 0, abandon_on_cancel=True)

devices.NVML_WITHIN, devices.ANSWER_WITHIN = 2, 2
if sys.argv[1] == "asking":
    devices.faults()
    driver.nvmlDeviceGetMemoryInfo = lambda handle: threading.Event().wait()
anyio.run(main)
print("left")
"""


@pytest.mark.parametrize("when", ["opening", "asking"])
def test_a_driver_that_hangs_does_not_keep_the_process_from_its_end(when: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HUNG, when], capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stdout == "left\n", done.stderr


def test_the_machines_figures_are_sane(tmp_path: Path) -> None:
    now = iter([100.0, 101.0, 101.0])
    sampler = Sampler([tmp_path], clock=lambda: next(now))
    values = sampler.sample()
    names = {"cpu_percent", "memory_used_gb", "memory_percent", "disk_free_gb", "disk_used_percent"}
    assert names <= values.keys()
    for name in names:
        assert 0 <= values[name] <= (100 if name.endswith("percent") else 1e6)
    # No time has gone by: a rate would be a division by zero.
    assert "network_sent_mb_s" not in sampler.sample()


def test_network_rates_are_since_the_sample_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def traffic(sent: int, received: int) -> dict[str, Any]:
        own = SimpleNamespace(bytes_sent=sent * 7, bytes_recv=received * 7)
        return {"lo": own, "eth0": SimpleNamespace(bytes_sent=sent, bytes_recv=received)}

    counters = iter([traffic(0, 0), traffic(4_000_000, 1_000_000), traffic(0, 0)])
    monkeypatch.setattr(psutil, "net_io_counters", lambda pernic: next(counters))
    now = iter([100.0, 102.0, 104.0])
    sampler = Sampler([tmp_path], clock=lambda: next(now))
    values = sampler.sample()
    assert (values["network_sent_mb_s"], values["network_received_mb_s"]) == (2.0, 0.5)
    assert "network_sent_mb_s" not in sampler.sample()


def test_the_disk_with_the_least_room_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sizes = {"wide": (1000 * GIB, 500 * GIB), "tight": (100 * GIB, 10 * GIB)}
    for name in sizes:
        (tmp_path / name).mkdir()
    monkeypatch.setattr(
        psutil,
        "disk_usage",
        lambda path: SimpleNamespace(total=sizes[Path(path).name][0], free=sizes[Path(path).name][1]),
    )
    values = Sampler([tmp_path / "wide", tmp_path / "tight" / "new"]).sample()
    assert (values["disk_free_gb"], values["disk_used_percent"]) == (10, 90)


@pytest.mark.parametrize(("plugged", "on_battery"), [(True, 0.0), (False, 1.0), (None, None)])
def test_the_power_source_is_told_where_there_is_a_battery(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, plugged: bool | None, on_battery: float | None
) -> None:
    battery = SimpleNamespace(percent=55, power_plugged=plugged)
    monkeypatch.setattr(psutil, "sensors_battery", lambda: battery, raising=False)
    values = Sampler([tmp_path]).sample()
    assert values["battery_percent"] == 55
    assert values.get("on_battery") == on_battery


def test_importing_the_module_loads_no_library() -> None:
    code = "import sys, agent.runtime.devices; print({'psutil', 'pynvml', 'torch'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
