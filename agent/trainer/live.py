"""Parameters that change while a job trains."""

from typing import Any

import msgspec
from torch.optim.lr_scheduler import LambdaLR

from agent.trainer.progress import Progress
from protocol.jobspec import not_within
from protocol.worker import Note, Parameters, ParametersSet

BATCH = frozenset(("batch_size", "gradient_accumulation_steps", "step_rows"))
"""What belongs together."""
Applied = list[tuple[int, Parameters]]
"""Parameters, and the step from which on they were in force."""


def to_come(
    wanted: Parameters, applied: Applied, progress: Progress, saved_step: int | None
) -> tuple[Parameters, Applied]:
    """Return what is to be put in force at once, and what at later steps because an earlier attempt did.

    What the checkpoint of ``saved_step`` holds is in force already; None: there is no checkpoint.
    """
    # What was set at the very next step may be in the checkpoint or not: setting it again changes nothing.
    later = [(step, given) for step, given in applied if saved_step is None or step > saved_step]
    known = msgspec.structs.asdict(progress.parameters)
    for _, given in later:
        known |= {name: value for name, value in msgspec.structs.asdict(given).items() if value is not None}
    news = {
        name: value
        for name, value in msgspec.structs.asdict(wanted).items()
        if value is not None and value != known[name]
    }
    # An old wish must not come after a new one.
    over = set(news) | (set(BATCH) if not BATCH.isdisjoint(news) else set())
    later = [(step, msgspec.structs.replace(given, **dict.fromkeys(over))) for step, given in later]
    return Parameters(**news), [entry for entry in later if entry[1] != Parameters()]


def set_parameters(trainer: Any) -> None:
    """Put the ordered parameters in force from the next step on, and say which were refused."""
    job, next_step = trainer.job, trainer.state.global_step + 1
    inbox, progress = job.inbox, job.progress
    if not inbox.parameters and not job.replay:  # the usual case at every step
        return
    orders, inbox.parameters = inbox.parameters, []
    due = 0
    while due < len(job.replay) and job.replay[due][0] <= next_step:
        due += 1
    again, job.replay = [given for _, given in job.replay[:due]], job.replay[due:]
    for at, wanted in enumerate([*again, *orders]):
        taken: dict[str, Any] = {}
        refused: list[str] = []
        for name, value in msgspec.structs.asdict(wanted).items():
            if value is None:
                continue
            why = _set(trainer, name, value)
            if why:
                refused.append(why)
            else:
                taken[name] = value
        _set_batch(trainer, taken)
        progress.parameters = msgspec.structs.replace(progress.parameters, **taken)
        inbox.line.say(ParametersSet(next_step, Parameters(**taken), " ".join(refused), at < len(again)))


def _set(trainer: Any, name: str, value: Any) -> str:
    """Put one parameter in force; return a sentence if that cannot be done."""
    schedule = trainer.job.schedule
    if name == "step_rows":  # what a step was cut into is found out here, and named by nobody
        return ""
    if must := not_within(name, value):
        return f"{name} must be {must}, not {value}."
    if name in BATCH:
        return ""
    if name == "learning_rate":
        return _set_learning_rate(trainer, value)
    if name == "early_stopping_patience":
        schedule.patience = value
    elif name == "eval_steps" and schedule.eval_strategy != "steps":
        return f"eval_steps has no effect: the job's eval_strategy is {schedule.eval_strategy}, not steps."
    else:
        setattr(schedule, name, value)
    return ""


def _set_batch(trainer: Any, taken: dict[str, Any]) -> None:
    """Change how many rows are taken at once; the number of optimizer steps stays."""
    place = trainer.job.progress.place
    if "step_rows" in taken:  # a healed step's: its cut changed, and nothing else
        place.micro, place.step_rows = taken.get("batch_size", place.micro), taken["step_rows"]
        return
    micro = taken.get("batch_size", place.micro)
    accumulation = taken.get("gradient_accumulation_steps", place.accumulation)
    if (micro, micro * accumulation) != (place.micro, place.step_rows) and (
        micro != place.micro or accumulation != place.accumulation
    ):
        before = place.step_rows
        place.micro, place.step_rows = micro, micro * accumulation
        if place.step_rows != before:
            trainer.job.inbox.line.say(
                Note(
                    "info",
                    f"An optimizer step now takes {place.step_rows} rows in place of {before}; the run keeps its "
                    f"{trainer.state.max_steps} steps, so it sees more or less of the data than was planned.",
                )
            )


def _set_learning_rate(trainer: Any, value: float) -> str:
    """Make ``value`` the peak of the schedule, which keeps its shape."""
    scheduler = trainer.lr_scheduler
    if not isinstance(scheduler, LambdaLR):
        return f"learning_rate cannot be changed under the {trainer.args.lr_scheduler_type} schedule."
    rates = [value * shape(scheduler.last_epoch) for shape in scheduler.lr_lambdas]
    scheduler.base_lrs = [value for _ in rates]
    scheduler._last_lr = rates
    for group, rate in zip(trainer.optimizer.param_groups, rates, strict=True):
        group["initial_lr"], group["lr"] = value, rate
    return ""
