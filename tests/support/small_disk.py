"""A job whose checkpoints lie on a small disk that fills up; run in a mount namespace of its own.

Prints one JSON line: for what the job paused, the checkpoints that are left, and how it ended once there was room.
"""

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from tests.support.programs import together, wait_until
from tests.trainer.conftest import build_model, build_tokenizer, chat_rows, write_jsonl


def main(folder: Path) -> None:
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(disk)], check=True)
    tokenizer = build_tokenizer()
    build_model(folder / "agent" / "models" / "tiny", len(tokenizer))
    tokenizer.save_pretrained(str(folder / "agent" / "models" / "tiny"))
    write_jsonl(folder / "agent" / "datasets" / "chat.jsonl", chat_rows(32))
    config = {
        "model": {"name": "tiny"},
        "training": {
            "max_steps": 150,
            "batch_size": 2,
            "max_length": 64,
            "learning_rate": 1e-3,
            "save_steps": 4,
            "save_total_limit": 3,
        },
    }
    with together(folder, fake=False, CHECKPOINTS_DIR=str(disk)) as (hub, _):
        ballast = disk / "ballast"
        job = hub.submit(config, "chat.jsonl")
        hub.wait_step(job, 12)
        with ballast.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(b"\0" * (1 << 18))
        paused = hub.wait_state(job, "paused")
        good = sorted(path.name for path in (disk / job).glob("step-*"))
        ballast.unlink()
        # Nobody resumes it: the agent sees that there is room again.
        wait_until(lambda: hub.status(job)["state"] == "completed", "the job's end")
        ended = hub.status(job)
        print(
            json.dumps(
                {
                    "by": paused["by"],
                    "detail": paused["detail"],
                    "notes": paused["notes"],
                    "good": good,
                    "attempt": ended["attempt"],
                    "step": ended["current_step"],
                }
            )
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
