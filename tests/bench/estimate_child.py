"""`python -m tests.bench.estimate_child check|run`: a fresh process that estimates a job, or trains it.

Reads the job from standard input, prints one JSON object. Memory is counted in bytes.
"""

import contextlib
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any


class Silent:
    """A line to nobody, which remembers what was said."""

    parent_gone = False

    def __init__(self) -> None:
        self.events: list[Any] = []

    def say(self, event: Any) -> None:
        self.events.append(event)

    def orders(self) -> list[Any]:
        return []

    def flush(self, timeout: float) -> bool:
        return True


class Folders:
    """The most bytes that lay in some folders at a time, as far as can be seen by looking again and again."""

    def __init__(self, *folders: str) -> None:
        self.most = 0
        self._folders = folders
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "Folders":
        self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._done.set()
        self._thread.join()
        self._add_up()

    def _look(self) -> None:
        while not self._done.wait(0.02):
            self._add_up()

    def _add_up(self) -> None:
        self.most = max(self.most, sum(map(_bytes_below, self._folders)))


def _bytes_below(folder: str) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # renamed while it is looked at
                total += (Path(place) / name).stat().st_size
    return total


def main(what: str) -> None:
    # As the trainer's entry does, before its imports.
    from agent.trainer.entry import QUIET

    for name, value in {**QUIET, "HF_HUB_OFFLINE": "1"}.items():
        os.environ.setdefault(name, value)
    import datasets
    import msgspec
    import torch

    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    from agent.trainer import check, meter, run

    del os.environ["TORCHDYNAMO_DISABLE"]
    from protocol.worker import Check, Estimated, Metrics, Start

    datasets.disable_progress_bars()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    given = json.load(sys.stdin)
    line, imported = Silent(), meter.most_resident()
    told: dict[str, Any] = {"imported": imported}
    if what == "check":
        assert check.check(msgspec.convert(given, Check), line) == 0
        told["estimate"] = msgspec.to_builtins(
            next(event.estimate for event in line.events if isinstance(event, Estimated))
        )
    else:
        start = msgspec.convert(given, Start)
        with Folders(start.workspace.checkpoints, start.workspace.output) as folders:
            assert run.train(start, line) == 0
        told["host"], told["disk"] = meter.most_resident(), folders.most
        if torch.cuda.is_available():
            told["device"] = torch.cuda.max_memory_reserved()
        early = [msgspec.to_builtins(event.estimate) for event in line.events if isinstance(event, Estimated)]
        told["early"] = early[0]
        ends = [
            event.time for event in line.events if isinstance(event, Metrics) and "train_loss" in event.values
        ]
        told["step_seconds"] = (ends[-1] - ends[0]) / (len(ends) - 1)
    print(json.dumps(told), file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
