"""Direct preference optimisation over TRL's trainer, its loss without a wait for the device.

TRL waits a dozen times in each micro-batch to log measures that are not shown. The losses that a job can name
are computed here instead; a test holds them to TRL's own.
"""

from typing import Any

import torch
from peft import PeftModel
from torch.nn.functional import logsigmoid
from trl import DPOTrainer
from trl.trainer.utils import add_fused_lm_head

from agent.trainer.control import ControlledMixin
from agent.trainer.curve import Moment

SMOOTHING = 0.1
"""The share of pairs that the loss "robust" takes to be labelled the wrong way round; with none it is "sigmoid"."""
MEASURES = ("rewards_chosen", "rewards_rejected", "rewards_margin", "rewards_accuracy")
_NOT_THE_MODELS = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")


class ControlledDPOTrainer(ControlledMixin, DPOTrainer):  # type: ignore[misc]
    """Preference pairs; a batch holds the chosen sides in its first half and the rejected ones in its second."""

    loss_is_scaled_for_ga = True
    """`compute_loss` takes the mean over the pairs of the whole step, however it is cut into micro-batches."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Patched once more, over TRL's own patch: entropy and accuracy are not shown, so they are not computed.
        add_fused_lm_head(self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model)
        self._rewards = torch.zeros(len(MEASURES) + 1, dtype=torch.float32, device=self.args.device)
        """Sums since the last point, and of how many pairs."""
        self._rewards_of_step = torch.zeros_like(self._rewards)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> int:
        """Return the pairs of a step."""
        return sum(_pairs(batch) for batch in batch_samples)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return this micro-batch's share of the mean loss of the step's pairs."""
        losses, rewards, outputs = self._compare(model, inputs)
        pairs = losses.shape[0]
        loss = losses.sum() / (pairs if num_items_in_batch is None else num_items_in_batch)
        if self.aux_loss_enabled:
            share = 1.0 if num_items_in_batch is None else pairs / num_items_in_batch
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss * share
        if model.training:
            self._rewards_of_step += torch.cat([rewards, rewards.new_tensor([pairs])])
        return (loss, outputs) if return_outputs else loss

    def _compare(self, model: Any, inputs: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Return the loss of each pair, the sums of `MEASURES`, and what the model gave."""
        given = {name: value for name, value in inputs.items() if name not in _NOT_THE_MODELS}
        given["use_cache"] = False
        if self.aux_loss_enabled:
            given["output_router_logits"] = True
        mask = inputs["completion_mask"]
        labels = inputs["input_ids"].masked_fill(mask == 0, -100)
        outputs = model(**given, labels=labels, fused_lm_head=True)
        chosen, rejected = outputs.log_probs.sum(dim=1).chunk(2)
        reference = self._reference(given, labels)
        chosen, rejected = chosen - reference[0], rejected - reference[1]
        lengths = mask.sum(dim=1).clamp(min=1).chunk(2)
        losses = pair_losses(self.args.loss_type[0], self.beta, chosen, rejected, lengths)
        with torch.no_grad():
            won, lost = self.beta * chosen.detach().float(), self.beta * rejected.detach().float()
            sums = torch.stack([won.sum(), lost.sum(), (won - lost).sum(), (won > lost).sum().to(won.dtype)])
        return losses, sums, outputs

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _reference(self, given: dict[str, Any], labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the log-probabilities of both sides under the model as it was before training."""
        given = {name: value for name, value in given.items() if name != "output_router_logits"}
        if self.ref_model is not None:
            outputs = self.ref_model(**given, labels=labels, fused_lm_head=True)
        else:
            with self.model.disable_adapter():
                outputs = self.model(**given, labels=labels, fused_lm_head=True)
        chosen, rejected = outputs.log_probs.sum(dim=1).chunk(2)
        return chosen, rejected

    # For the mixin

    def _count(self, inputs: Any) -> None:
        super()._count(inputs)
        self._samples -= _pairs(inputs)  # counted as rows, but two of them are one

    def _weigh(self, model: Any, inputs: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        losses, sums, _ = self._compare(model, inputs)
        pairs = torch.tensor(losses.shape[0], device=losses.device)
        rewards = {f"eval_{name}": (total, pairs) for name, total in zip(MEASURES, sums, strict=True)}
        return {"eval_loss": (losses.sum(), pairs), **rewards}

    def _pass(self, model: Any, step: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self._rewards_of_step.zero_()  # of a pass that ran out of memory, and is made again
        made = super()._pass(model, step)
        self._rewards += self._rewards_of_step
        return made

    def _resume_counting(self) -> None:
        super()._resume_counting()
        if measures := self.job.progress.window_measures:
            self._rewards.copy_(torch.tensor(measures))

    def _store_counters(self) -> None:
        super()._store_counters()
        self.job.progress.window_measures = self._rewards.tolist()

    def _say_point(self, step: int, values: dict[str, float], at: Moment | None = None) -> None:
        # Of a loss that is no negative log-likelihood there is no perplexity.
        shown = {name: value for name, value in values.items() if "perplexity" not in name}
        super()._say_point(step, shown, at)

    def _row_lengths(self) -> list[int]:
        columns = self.train_dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
        return [
            len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in columns
        ]

    def _extra(self) -> dict[str, float]:
        *sums, pairs = self._rewards.tolist()
        self._rewards.zero_()
        return {name: total / pairs for name, total in zip(MEASURES, sums, strict=True)} if pairs else {}


def _pairs(inputs: Any) -> int:
    return int(inputs["input_ids"].shape[0]) // 2


def pair_losses(
    kind: str,
    beta: float,
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    lengths: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Return the loss of each pair from how much likelier its sides have become than they were to the reference.

    ``chosen`` and ``rejected`` are differences of log-probabilities, summed over the tokens of ``lengths``.
    """
    margin = beta * (chosen - rejected)
    match kind:
        case "sigmoid":
            return -logsigmoid(margin)
        case "hinge":
            return torch.relu(1 - margin)
        case "ipo":
            return (chosen / lengths[0] - rejected / lengths[1] - 1 / (2 * beta)) ** 2
        case "robust":
            clean, flipped = -logsigmoid(margin), -logsigmoid(-margin)
            return ((1 - SMOOTHING) * clean - SMOOTHING * flipped) / (1 - 2 * SMOOTHING)
        case "apo_zero":
            return 1 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)
        case "sppo_hard":
            return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2
    raise ValueError(f"{kind} names no loss")  # the job spec is a closed list
