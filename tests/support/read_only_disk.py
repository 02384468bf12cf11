"""A job whose checkpoints lie on a disk that turns read-only; run in a mount namespace of its own.

Prints one JSON line: how the pause failed, the checkpoints that are left, where it goes on, and whether its end is
that of a run that was left alone.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from agent.trainer.errors import TrainerError
from protocol.worker import Metrics, Pause, Ready, Saved
from tests.trainer.conftest import Jobs, RecordingLine, build_model, build_tokenizer, chat_rows, write_jsonl

TRAINING = {"save_steps": 2}


def main(folder: Path) -> None:
    from agent.trainer import run

    tokenizer = build_tokenizer()
    model = build_model(folder / "tiny", len(tokenizer))
    tokenizer.save_pretrained(str(model))
    jobs = Jobs(folder, model, write_jsonl(folder / "chat.jsonl", chat_rows(48)))
    disk = jobs.checkpoints()
    disk.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(disk)], check=True)

    class Line(RecordingLine):
        def say(self, event: Any) -> None:
            super().say(event)
            if isinstance(event, Metrics) and event.step == 3:
                subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)

    untouched = jobs.run("untouched", training=TRAINING)
    line = Line({6: [Pause()]})
    start = jobs.start("job", training=TRAINING, background_saves=False)
    try:
        run.train(start, line, reports_beside=False)
        told = {}
    except TrainerError as error:
        told = {"reason": error.reason, "sentence": error.sentence, "advice": error.advice}
    left = sorted(path.name for path in disk.iterdir())
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    again = jobs.run("job", attempt=2, training=TRAINING)
    print(
        json.dumps(
            {
                **told,
                "saved": [event.step for event in line.of(Saved)],
                "left": left,
                "start_step": again.of(Ready)[0].start_step,
                "same": again.last.weights_hash == untouched.last.weights_hash,
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
