"""Keeps an eye on memory, disks and the driver, so that a trainer's end can be explained by what was seen."""

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import anyio
import anyio.to_thread
import msgspec

from agent.config import Settings
from agent.core.explain import GB, Seen
from agent.core.hostmemory import HostMemory, Shortage
from agent.desk import JobDesk
from agent.runtime import devices, hostmem
from agent.runtime.ending import log_tail
from agent.runtime.redact import Redactor
from protocol.lifecycle import JobState

MOMENTS = 30.0
"""Seconds before an end within which what was seen may have been its cause."""
CLOSER = 4
"""Times the reserve: with less memory left than this, the trainers' own memory is looked at every time."""
SELDOM = 5
CROWDED = 0.9
"""Share of what a job may take that should be free; a desktop's own screens need the rest."""


class Witness:
    """What was seen of the machine in the last moments."""

    def __init__(
        self,
        desk: JobDesk,
        settings: Settings,
        redactor: Redactor,
        *,
        memory: Callable[[], hostmem.Memory] = hostmem.memory,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._desk = desk
        self._redactor = redactor
        self._share_logs = settings.share_logs
        self._logs = settings.logs_dir
        self._disks = (settings.checkpoints_dir, settings.models_dir)
        self._data = settings.datasets_dir
        self._reserve = settings.host_memory_reserve_mb << 20
        self._fraction = settings.gpu_memory_fraction
        self._memory = memory
        self._clock = clock
        self._host = HostMemory(self._reserve)
        self._looks = 0
        self._oom: deque[tuple[float, int]] = deque()
        self._faults: deque[tuple[float, devices.GpuFault]] = deque(maxlen=256)
        self.newest = hostmem.Memory(0, 0)
        self.gpus: dict[str, int] = {}
        """Index of each GPU by number and UUID."""

    async def look(self) -> Shortage | None:
        """Look at the machine; return which trainer is to be paused for its memory, if any."""
        working = {
            job_id: identity
            for job_id, identity in self._desk.supervisor.alive().items()
            if self._desk.jobs[job_id].state in (JobState.PREPARING, JobState.RUNNING)
        }
        now, before = self._clock(), self.newest
        self._looks += 1
        close = before.available < CLOSER * self._reserve or self._looks % SELDOM == 1

        def read() -> tuple[hostmem.Memory, dict[str, int], int, list[devices.GpuFault]]:
            held = {job_id: hostmem.held_by(identity) for job_id, identity in working.items() if close}
            return self._memory(), held, hostmem.oom_kills(), devices.faults()

        self.newest, held, kills, faults = await anyio.to_thread.run_sync(read)
        self._oom.append((now, kills))
        while now - self._oom[0][0] > MOMENTS:
            self._oom.popleft()
        self._faults.extend((now, fault) for fault in faults)
        if not close:
            return None
        self._host.note(now, self.newest.available, self.newest.total, held)
        return self._host.shortage()

    async def seen(self, job_id: str) -> Seen:
        """Return what was seen of the machine in the last moments, for a job whose trainer has failed or ended."""
        await self.look()
        device = self._desk.jobs[job_id].device if job_id in self._desk.jobs else "cpu"
        index = self.gpus.get(device)
        now = self._clock()
        tail = await anyio.to_thread.run_sync(log_tail, self._logs / f"{job_id}.log")
        return Seen(
            log_tail=[self._redactor.redact(line) for line in tail] if self._share_logs else [],
            host_free=self.newest.available,
            host_total=self.newest.total,
            trainer=self._host.held(job_id),
            device_free=devices.free_memory(index) if index is not None else None,
            oom_killed=self._oom[-1][1] > self._oom[0][1],
            xids=[
                fault.xid
                for when, fault in self._faults
                # Of a slice of a card (MIG) the index is not known: any card's error may be its own.
                if device != "cpu" and now - when <= MOMENTS and index in (None, fault.index)
            ],
            disk_free=await anyio.to_thread.run_sync(self.disk_free),
        )

    def crowded(self, device: str) -> str:
        """Return a sentence where others hold so much of a device that a job cannot have its share; "" elsewhere."""
        index = self.gpus.get(device)
        if index is None:
            return ""
        free, total = devices.free_memory(index), devices.total_memory(index)
        if free is None or total is None or free >= CROWDED * self._fraction * total:
            return ""
        return (
            f"Other programs hold {(total - free) / GB:.1f} of the {total / GB:.1f} GB of GPU {index}: the job may take "
            f"{self._fraction * total / GB:.1f} GB (GPU_MEMORY_FRACTION {self._fraction:g}), and {free / GB:.1f} GB are "
            "free. It starts, and may run out of the device's memory."
        )

    def disk_free(self) -> int:
        """Return the free bytes where checkpoints and models are written: of two disks, the fuller one's."""
        return devices.free_disk(self._disks)

    def data_free(self) -> int:
        """Return the free bytes where data sets are fetched to."""
        return devices.free_disk((self._data,))

    @property
    def where(self) -> str:
        """Name the folders whose disk is meant."""
        names: list[Path] = list(dict.fromkeys(self._disks))
        return " and ".join(str(name) for name in names[:2])

    def know(self, inventory: devices.Inventory) -> None:
        """Take over how the machine's GPUs are called."""
        for gpu in inventory.gpus:
            self.gpus |= {str(gpu.index): gpu.index, gpu.uuid: gpu.index}


def with_stack(seen: Seen, sentence: str, stack: list[str]) -> Seen:
    """Return what was seen of a trainer that the agent ended because it stood still."""
    return msgspec.structs.replace(seen, stalled=sentence, traceback="\n".join(stack))
