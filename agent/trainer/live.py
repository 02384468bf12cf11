"""Parameters that change while a job trains."""

from typing import Any

import msgspec
from torch.optim.lr_scheduler import LambdaLR

from protocol.worker import Parameters, ParametersSet


def set_parameters(trainer: Any) -> None:
    """Put the ordered parameters in force from the next step on, and say which were refused."""
    inbox, progress = trainer.job.inbox, trainer.job.progress
    orders, inbox.parameters = inbox.parameters, []
    for wanted in orders:
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
        progress.parameters = msgspec.structs.replace(progress.parameters, **taken)
        inbox.line.say(ParametersSet(trainer.state.global_step + 1, Parameters(**taken), " ".join(refused)))


def _set(trainer: Any, name: str, value: Any) -> str:
    """Put one parameter in force; return a sentence if that cannot be done."""
    schedule = trainer.job.schedule
    now = {
        "batch_size": trainer.args.per_device_train_batch_size,
        "gradient_accumulation_steps": trainer.args.gradient_accumulation_steps,
    }
    if name in now:
        if now[name] == value:
            return ""
        return (
            f"{name} stays {now[name]}: the place in the data is counted in batches of that size. "
            "Submit a new job to train with another."
        )
    if not value > 0:
        return f"{name} must be greater than 0, not {value}."
    if name == "learning_rate":
        return _set_learning_rate(trainer, value)
    if name == "early_stopping_patience":
        schedule.patience = value
    elif name == "eval_steps" and schedule.eval_strategy != "steps":
        return f"eval_steps has no effect: the job's eval_strategy is {schedule.eval_strategy}, not steps."
    else:
        setattr(schedule, name, value)
    return ""


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
