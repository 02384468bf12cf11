"""Which job runs next, and where."""

from collections.abc import Iterable, Mapping, Sequence

from agent.core.job import Job
from protocol.lifecycle import JobState


def queue(jobs: Iterable[Job]) -> list[Job]:
    """Return the jobs that wait for a device, first one first."""
    return sorted((job for job in jobs if job.state is JobState.QUEUED), key=lambda job: job.order)


def due(
    jobs: Iterable[Job], held: Mapping[str, str], devices: Sequence[str], at_once: int
) -> list[tuple[str, str]]:
    """Return (job id, device) for every job that can start now.

    ``held`` maps each job whose process may be alive to its device: a device is free when its
    process is gone, whatever the job's state says. Without a GPU, "cpu" takes ``at_once`` jobs.
    A job goes back to the device it had, if that is free.
    """
    room = at_once - len(held)
    free = [device for device in devices if device == "cpu" or device not in held.values()]
    starts: list[tuple[str, str]] = []
    for job in queue(jobs):
        if room <= 0 or not free:
            break
        if job.job_id in held:
            continue
        device = job.device if job.device in free else free[0]
        if device != "cpu":
            free.remove(device)
        starts.append((job.job_id, device))
        room -= 1
    return starts
