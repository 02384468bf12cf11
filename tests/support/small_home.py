"""An agent whose AGENT_HOME lies on a small disk that fills up; run in a mount namespace of its own.

Prints one JSON line: what became of its jobs, and with which code the agent left.
"""

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from tests.support.programs import Agent, Hub, fake_config, wait_until


def main(folder: Path) -> None:
    home = folder / "home"
    home.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(home)], check=True)
    places = {
        name: str(folder / name.lower())
        for name in ("MODELS_DIR", "CHECKPOINTS_DIR", "LOGS_DIR", "DATASETS_DIR")
    }
    hub = Hub(folder / "hub").start()
    agent = Agent(home, hub.url, **places, LOG_LEVEL="INFO").start()
    total = 400
    try:
        job = hub.submit(fake_config("step=0.01", steps=total))
        other = hub.submit(fake_config("step=0.01", steps=total))
        hub.wait_step(job, 10)
        with (home / "ballast").open("wb", buffering=0) as ballast, suppress(OSError):
            while True:
                ballast.write(b"\0" * 4096)
        wait_until(lambda: "AGENT_HOME is full" in hub.status(job)["detail"], "the pause", within=60)
        hub.control(other, "cancel")
        cancelled = hub.wait_state(other, "cancelled")["state"]
        (home / "ballast").unlink()
        hub.wait_state(job, "completed")
        steps = [point["step"] for point in hub.metrics(job)]
        output = agent.output
        left = agent.stop()
    finally:
        for part in (agent, hub):
            if part.process is not None and part.process.poll() is None:
                part.stop()
    said = {"cancelled": cancelled, "steps": steps, "total": total, "left with": left}
    print(json.dumps({**said, "disk": "the disk has room again" in output}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
