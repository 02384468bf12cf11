"""A job whose checkpoints lie on a small disk that fills up; run in a mount namespace of its own.

Prints one JSON line: how the job failed, the checkpoints that are left, and how it ended once there was room.
"""

import json
import subprocess
import sys
from pathlib import Path

from tests.support.programs import together, wait_until
from tests.trainer.conftest import build_model, build_tokenizer, chat_rows, write_jsonl


def main(folder: Path) -> None:
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], check=True)
    tokenizer = build_tokenizer()
    build_model(folder / "agent" / "models" / "tiny", len(tokenizer))
    tokenizer.save_pretrained(str(folder / "agent" / "models" / "tiny"))
    write_jsonl(folder / "agent" / "datasets" / "chat.jsonl", chat_rows(32))
    config = {
        "model": {"name": "tiny"},
        "training": {
            "max_steps": 40,
            "batch_size": 2,
            "max_length": 64,
            "learning_rate": 1e-3,
            "save_steps": 4,
            "save_total_limit": 100,
        },
    }
    with together(folder, fake=False, CHECKPOINTS_DIR=str(disk)) as (hub, _):
        ballast = disk / "ballast"
        ballast.write_bytes(b"\0" * (21 << 20))
        job = hub.submit(config, "chat.jsonl")
        failed = hub.wait_state(job, "failed", "paused")
        good = sorted(path.name for path in (disk / job).glob("step-*"))
        ballast.unlink()
        hub.control(job, "retry" if failed["state"] == "failed" else "resume")
        wait_until(lambda: hub.status(job)["state"] == "completed", "the job's end")
        failure = failed["failure"] or {"reason": failed["by"]}
        print(
            json.dumps(
                {
                    "reason": failure["reason"],
                    "error": failed["error"] or failed["detail"],
                    "good": good,
                    "resumed": hub.status(job)["state"],
                }
            )
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
