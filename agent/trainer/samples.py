"""What the model answers before and after training, and how likely it finds a given answer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from agent.trainer.randomness import unmoved
from protocol.jobspec import SampleSpec

NEW_TOKENS = 64


@dataclass(frozen=True)
class Answer:
    """The model's own greedy answer, and the mean log-likelihood per token of the one given (None without one)."""

    text: str
    log_likelihood: float | None


class _Listen(StoppingCriteria):  # type: ignore[misc]
    """Looks at the orders after every token."""

    def __init__(self, listen: Callable[[], None]) -> None:
        self._listen = listen

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self._listen()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@torch.no_grad()  # type: ignore[untyped-decorator]
def answer(
    model: Any, tokenizer: Any, sample: SampleSpec, *, chat: bool, room: int, listen: Callable[[], None]
) -> Answer:
    """Answer a prompt greedily and weigh the given answer. Leaves random states and the model's mode alone.

    ``listen`` is called after each token and may raise to leave.
    """
    training = model.training
    prompt = _prompt_ids(tokenizer, sample.prompt, chat)
    model.eval()
    try:
        with unmoved():
            return Answer(
                _generate(model, tokenizer, prompt[-room:], listen),
                _log_likelihood(model, tokenizer, prompt, sample.answer, room) if sample.answer else None,
            )
    finally:
        model.train(training)


def _prompt_ids(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    if chat:
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(tokenizer(prompt)["input_ids"])


def _generate(model: Any, tokenizer: Any, prompt: list[int], listen: Callable[[], None]) -> str:
    ids = torch.tensor([prompt], device=model.device)
    generated = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        stopping_criteria=StoppingCriteriaList([_Listen(listen)]),
    )
    return str(tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True))


def _log_likelihood(model: Any, tokenizer: Any, prompt: list[int], answer: str, room: int) -> float:
    wanted = list(tokenizer(answer, add_special_tokens=False)["input_ids"])[: room - 1]
    before = prompt[-(room - len(wanted)) :]
    ids = torch.tensor([before + wanted], device=model.device)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    # The logits at a position are of the token after it.
    scores = torch.log_softmax(logits[0, len(before) - 1 : -1].float(), dim=-1)
    chosen = scores.gather(1, ids[0, len(before) :, None])
    return float(chosen.mean().item())
