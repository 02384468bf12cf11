"""A trainer that does nothing but report: points of 20 figures, as fast as they can be said.

A job by the name of "slow" makes fifty a second; one by the name of "waits" makes the first, and the rest after
three seconds. One by the name of "talks" makes a single point and answers live parameters until it is told to go.

`tests.bench.points` is a trainer module (see `agent.runtime.boot`), and as a program the agent that starts it.
"""

import os
import sys
import time

from agent.trainer.line import EventQueue, Line, OrderQueue
from protocol.worker import (
    Cancel,
    Finished,
    Left,
    Metrics,
    ParametersSet,
    Pause,
    Ready,
    SetParameters,
    Start,
    Trained,
    Warm,
)

FIGURES = 20


def main(orders: OrderQueue, events: EventQueue) -> int:
    """Say as many points as the job has steps, and finish."""
    line = Line(orders, events, parent_pid=os.getppid())
    line.say(Warm(os.getpid(), 0.0))
    start = line.wait_order()
    while start is not None and not isinstance(start, Start):
        start = line.wait_order()
    if start is None:
        return 0
    line.begin(start.attempt, start.first_event, start.workspace.checkpoints)
    steps = start.spec.training.max_steps or 1
    line.say(
        Ready(
            total_steps=steps,
            total_epochs=1.0,
            start_step=0,
            train_rows=1,
            eval_rows=0,
            device="cpu",
            trainable_parameters=0,
            all_parameters=0,
            batch_size=1,
            gradient_accumulation_steps=1,
        )
    )
    name = start.spec.name
    names = ["train_loss", *(f"figure_{number}" for number in range(1, FIGURES))]
    for step in range(1, steps + 1):
        values = dict.fromkeys(names, 1.0 / step)
        line.say(Metrics(step, step / steps, time.time(), values))
        if name == "slow":
            time.sleep(0.02)
        if name == "waits" and step == 1:
            time.sleep(3.0)  # the hub has the first now, and can be taken away
        if name == "talks" and not _talk(line, step):
            return 0
    line.say(Trained(steps, "steps"))
    line.say(
        Finished(
            model_path="", merged_path="", weights_hash="", step=steps, values={"final_loss": 1.0 / steps}
        )
    )
    line.flush(60.0)
    line.close()
    return 0


def _talk(line: Line, step: int) -> bool:
    """Answer live parameters; False once the agent wants this process gone."""
    while True:
        match line.wait_order():
            case SetParameters(parameters):
                line.say(ParametersSet(step, parameters))
            case None | Cancel() | Pause():
                line.say(Left("cancelled", step))
                line.close()
                return False
            case _:
                pass


if __name__ == "__main__":
    import anyio

    from agent.app import run_agent
    from agent.cli_start import log_to
    from agent.config import load_for_program

    settings = load_for_program()
    sys.exit(anyio.run(lambda: run_agent(settings, module="tests.bench.points", redactor=log_to(settings))))
