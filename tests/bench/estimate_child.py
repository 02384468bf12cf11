"""`python -m tests.bench.estimate_child check|run`: a fresh process that estimates a job, or trains it.

Reads the job from standard input, prints one JSON object. Memory is counted in bytes.
"""

import json
import os
import sys
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


def main(what: str) -> None:
    # As the trainer's entry does, before its imports.
    from agent.trainer.entry import QUIET

    for name, value in {**QUIET, "HF_HUB_OFFLINE": "1"}.items():
        os.environ.setdefault(name, value)
    import datasets
    import msgspec
    import torch

    from agent.trainer import check, meter, run
    from protocol.worker import Check, Estimated, Start

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
        assert run.train(msgspec.convert(given, Start), line) == 0
        told["host"] = meter.most_resident()
        if torch.cuda.is_available():
            told["device"] = torch.cuda.max_memory_reserved()
        early = [msgspec.to_builtins(event.estimate) for event in line.events if isinstance(event, Estimated)]
        told["early"] = early[0] if early else None
    print(json.dumps(told), file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
