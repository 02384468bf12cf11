"""What this machine has and how busy it is, without torch: NVML for GPUs, psutil for the rest.

Both libraries are imported at first use: the agent dials before it looks at the machine.
"""

import platform
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from protocol.messages import Gpu

GIB = 1 << 30
MEGABYTE = 1_000_000
NVML_WITHIN = 60.0
"""Seconds in which the driver must have opened all cards: a machine with eight may take a while."""
ANSWER_WITHIN = 5.0
"""Seconds in which an open driver must answer; one that does not is not asked again before it has."""


class Inventory(msgspec.Struct, frozen=True, kw_only=True):
    """What the machine has. Memory and disk in GiB."""

    hostname: str
    platform: str
    """linux, darwin or windows."""
    os: str
    python: str
    cpu: str
    cpu_cores: int
    ram_gb: float
    disk_total_gb: float
    """Of the disk under the given paths; of the one with the least room where they lie on several."""
    disk_free_gb: float
    gpus: list[Gpu]
    gpu_problem: str = ""
    """Why no GPU is seen although a driver is installed; a sentence for the owner."""
    network: dict[str, str] = {}
    """How many interfaces are up and down."""


class GpuFault(msgspec.Struct, frozen=True):
    """The driver reported a critical error (an XID) of a GPU."""

    index: int
    xid: int


def inventory(paths: Sequence[Path], within: float | None = None) -> Inventory:
    """Look at the machine once; ``paths`` are the folders that jobs write to.

    The driver is waited for `NVML_WITHIN`, or ``within`` these seconds; without it no GPU is seen.
    """
    import psutil

    nvml = _nvml(within)
    total, free = _fullest_disk(paths)
    links = [link.isup for link in psutil.net_if_stats().values()]
    return Inventory(
        hostname=socket.gethostname(),
        platform="windows" if sys.platform == "win32" else sys.platform,
        os=_os_name(),
        python=platform.python_version(),
        cpu=_cpu_name(),
        cpu_cores=psutil.cpu_count() or 1,
        ram_gb=round(psutil.virtual_memory().total / GIB, 2),
        disk_total_gb=round(total / GIB, 2),
        disk_free_gb=round(free / GIB, 2),
        gpus=nvml.gpus,
        gpu_problem=nvml.problem,
        network={"up": str(sum(links)), "down": str(len(links) - sum(links))},
    )


def driver_settled() -> bool:
    """Begin to open the driver; tell whether it is open, or will not be waited for any longer."""
    nvml = _started()
    return nvml.opened.is_set() or time.monotonic() >= nvml.due


def gpu_pids() -> set[int] | None:
    """Return who holds memory of any GPU, in a container maybe by the host's numbers; None: no answer."""
    nvml = _nvml()
    return nvml.pids() if nvml.opened.is_set() else None


def free_memory(index: int) -> int | None:
    """Return the free bytes of GPU ``index``; None where there is no such GPU or it does not tell."""
    return _nvml().read("nvmlDeviceGetMemoryInfo", index, part="free")


def total_memory(index: int) -> int | None:
    """Return the bytes of memory that GPU ``index`` has; None as with `free_memory`."""
    return _nvml().read("nvmlDeviceGetMemoryInfo", index, part="total")


def faults() -> list[GpuFault]:
    """Take the critical errors that the driver reported since the last call (Linux)."""
    return _nvml().faults()


class Sampler:
    """Figures of CPU, memory, disk, network, power and GPUs. Rates are since the sample before."""

    def __init__(self, paths: Sequence[Path], clock: Callable[[], float] = time.monotonic) -> None:
        import psutil

        self._paths = paths
        self._clock = clock
        self._psutil = psutil
        self._nvml = _nvml()
        # The first call only starts the measurement; its own answer means nothing.
        psutil.cpu_percent(interval=None)
        self._last = (clock(), *self._traffic())

    def sample(self) -> dict[str, float]:
        """Return the figures; what this machine or card does not tell is left out."""
        memory = self._psutil.virtual_memory()
        disk_total, disk_free = _fullest_disk(self._paths)
        values = {
            "cpu_percent": self._psutil.cpu_percent(interval=None),
            "memory_used_gb": (memory.total - memory.available) / GIB,
            "memory_percent": memory.percent,
            "disk_free_gb": disk_free / GIB,
            "disk_used_percent": 100 * (1 - disk_free / disk_total) if disk_total else 0.0,
        }
        values |= self._network_rates() | self._power() | self._gpus()
        return {name: round(value, 3) for name, value in values.items()}

    def _network_rates(self) -> dict[str, float]:
        now, sent, received = self._clock(), *self._traffic()
        then, sent_then, received_then = self._last
        self._last = (now, sent, received)
        # Counters start again at 0 when an interface is replaced.
        if now <= then or sent < sent_then or received < received_then:
            return {}
        return {
            "network_sent_mb_s": (sent - sent_then) / (now - then) / MEGABYTE,
            "network_received_mb_s": (received - received_then) / (now - then) / MEGABYTE,
        }

    def _traffic(self) -> tuple[int, int]:
        counters = self._psutil.net_io_counters(pernic=True)
        real = [count for name, count in counters.items() if not name.lower().startswith("lo")]
        return sum(count.bytes_sent for count in real), sum(count.bytes_recv for count in real)

    def _power(self) -> dict[str, float]:
        # psutil leaves the function out where the system has no such thing.
        battery = self._psutil.sensors_battery() if hasattr(self._psutil, "sensors_battery") else None
        if battery is None:
            return {}
        values = {"battery_percent": float(battery.percent)}
        if battery.power_plugged is not None:
            values["on_battery"] = float(not battery.power_plugged)
        return values

    def _gpus(self) -> dict[str, float]:
        nvml = self._nvml
        values: dict[str, float | None] = {}
        for index in range(nvml.count):
            name = f"gpu{index}_"
            milliwatts = nvml.read("nvmlDeviceGetPowerUsage", index)
            used = nvml.read("nvmlDeviceGetMemoryInfo", index, part="used")
            total = nvml.read("nvmlDeviceGetMemoryInfo", index, part="total")
            values[name + "utilization_percent"] = nvml.read(
                "nvmlDeviceGetUtilizationRates", index, part="gpu"
            )
            values[name + "memory_used_gb"] = None if used is None else used / GIB
            values[name + "memory_total_gb"] = None if total is None else total / GIB
            # 0: NVML_TEMPERATURE_GPU, the only sensor it knows.
            values[name + "temperature_c"] = nvml.read("nvmlDeviceGetTemperature", index, 0)
            values[name + "power_w"] = None if milliwatts is None else milliwatts / 1000
            values[name + "fan_percent"] = nvml.read("nvmlDeviceGetFanSpeed", index)
        return {name: float(value) for name, value in values.items() if value is not None}


class _Nvml:
    """NVML, or its absence (no GPU). A question that a card does not support is answered with None.

    A broken driver may hang in any call for ever. All of them are made on one thread that the process does not wait
    for at its end, as it would for a worker thread: the event loop, and whoever asks, wait for it only so long.
    """

    def __init__(self) -> None:
        self.count = 0
        self.opened = threading.Event()
        self.due = time.monotonic() + NVML_WITHIN
        """Until when it is waited for; one that opens later stays closed, since jobs have begun without it."""
        self._calls: queue.SimpleQueue[tuple[Future[Any], str, tuple[Any, ...]]] = queue.SimpleQueue()
        self._hanging: Future[Any] | None = None
        self._thread = threading.Thread(target=self._serve, name="nvml", daemon=True)
        self.problem = ""
        self.gpus: list[Gpu] = []
        self._handles: list[Any] = []
        self._events: Any = None

    def start(self) -> None:
        self._thread.start()

    def _serve(self) -> None:
        try:
            self._open()
        except Exception as exc:  # noqa: BLE001 - whatever it is, the owner is told, and nobody waits for the driver
            self.gpus, self._handles, self._events = [], [], None
            self.problem = (
                f"The GPUs of this machine could not be looked at: {type(exc).__name__}: {exc}. "
                "Jobs run without a GPU until that is solved and the agent is started again."
            )
        if time.monotonic() >= self.due:
            return
        self.opened.set()
        while True:
            answer, function, args = self._calls.get()
            try:
                answer.set_result(self._call(function, *args))
            except Exception as exc:  # noqa: BLE001 - it is the caller's, and is raised there
                answer.set_exception(exc)

    def _open(self) -> None:
        """Find the driver and its cards."""
        try:
            import pynvml
        except ImportError:
            return
        self._lib = pynvml
        try:
            pynvml.nvmlInit()
            self._handles = [
                pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())
            ]
        except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
            return
        except pynvml.NVMLError as exc:
            # Such as a library of another version than the loaded driver: after an update, until a restart.
            self.problem = (
                f"The NVIDIA driver answers: {exc}. Jobs run without a GPU until that is solved; "
                "after a driver update a restart of the machine does it."
            )
            return
        self.gpus = [self._describe(index) for index in range(len(self._handles))]
        self._watch()
        self.count = len(self._handles)

    def read(self, function: str, index: int, *args: Any, part: str = "") -> int | None:
        if index >= len(self._handles):
            return None
        value = self._ask(function, self._handles[index], *args)
        number: int | None = getattr(value, part) if part and value is not None else value
        return number

    def _describe(self, index: int) -> Gpu:
        handle = self._handles[index]
        cuda = self._ask("nvmlSystemGetCudaDriverVersion")
        capability = self._ask("nvmlDeviceGetCudaComputeCapability", handle)
        return Gpu(
            index=index,
            name=self._ask("nvmlDeviceGetName", handle) or "NVIDIA GPU",
            memory_total_gb=round((self.read("nvmlDeviceGetMemoryInfo", index, part="total") or 0) / GIB, 2),
            uuid=self._ask("nvmlDeviceGetUUID", handle) or "",
            driver=self._ask("nvmlSystemGetDriverVersion") or "",
            cuda=f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else "",
            compute_capability=f"{capability[0]}.{capability[1]}" if capability else "",
        )

    def pids(self) -> set[int] | None:
        kinds = ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses")
        try:
            return {
                process.pid
                for handle in self._handles
                for kind in kinds
                for process in self._demand(kind, handle) or ()
            }
        except TimeoutError:
            return None

    def faults(self) -> list[GpuFault]:
        found: list[GpuFault] = []
        while self._events is not None:
            # With no wait it raises a time-out, hence None, once there are no more.
            event = self._ask("nvmlEventSetWait", self._events, 0)
            if event is None:
                break
            index = self._ask("nvmlDeviceGetIndex", event.device)
            found.append(GpuFault(-1 if index is None else index, int(event.eventData)))
        return found

    def _watch(self) -> None:
        events = self._ask("nvmlEventSetCreate")
        if events is None:
            return
        for handle in self._handles:
            self._ask("nvmlDeviceRegisterEvents", handle, self._lib.nvmlEventTypeXidCriticalError, events)
        self._events = events

    def _ask(self, function: str, *args: Any) -> Any:
        """Return the answer; None where there is none, for whatever reason."""
        try:
            return self._demand(function, *args)
        except TimeoutError:
            return None

    def _demand(self, function: str, *args: Any) -> Any:
        """Return the answer; None where the card does not know it. Raises TimeoutError where the driver is silent."""
        if threading.current_thread() is self._thread:
            return self._call(function, *args)
        if self._hanging is not None and not self._hanging.done():
            raise TimeoutError
        answer: Future[Any] = Future()
        self._calls.put((answer, function, args))
        try:
            return answer.result(ANSWER_WITHIN)
        except TimeoutError:
            self._hanging = answer
            raise

    def _call(self, function: str, *args: Any) -> Any:
        # An old driver lacks functions, a card lacks sensors, a broken card answers nothing at all.
        try:
            return getattr(self._lib, function)(*args)
        except self._lib.NVMLError:
            return None


@cache
def _start() -> _Nvml:
    """Begin to open this process's NVML: it is initialised once per process."""
    nvml = _Nvml()
    nvml.start()
    return nvml


_starting = threading.Lock()


def _started() -> _Nvml:
    """Return what `_start` began; of threads that come first together only one begins it."""
    with _starting:
        return _start()


def _nvml(within: float | None = None) -> _Nvml:
    """Return this process's NVML once it is open; one without cards where that takes too long."""
    nvml = _started()
    left = max(0.0, nvml.due - time.monotonic())
    if nvml.opened.wait(left if within is None else min(left, within)):
        return nvml
    absent = _Nvml()
    absent.problem = (
        f"The NVIDIA driver has not answered for {NVML_WITHIN:g} s. Jobs run without a GPU until that is solved and "
        "the agent is started again; a restart of the machine often does it."
    )
    return absent


def free_disk(paths: Sequence[Path]) -> int:
    """Return the free bytes of the disk under ``paths`` that has the least room."""
    return _fullest_disk(paths)[1]


def _fullest_disk(paths: Sequence[Path]) -> tuple[int, int]:
    """Return total and free bytes of the disk under ``paths`` that has the least room."""
    import psutil

    disks = [psutil.disk_usage(str(_existing(path))) for path in paths or (Path.cwd(),)]
    fullest = min(disks, key=lambda disk: disk.free)
    return fullest.total, fullest.free


def _existing(path: Path) -> Path:
    return next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return f"{platform.system()} {platform.release()}"


def _cpu_name() -> str:
    if sys.platform != "linux":
        return platform.processor() or platform.machine()
    # platform.processor() would start a program here.
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
