"""The embedded model and corpus of the demo: built on the spot, nothing downloaded.

The corpus is the text of CPython's own reference (`pydoc_data.topics`), cut into passages that
never overlap, so a held-out passage has been seen by nobody. The model is a small Llama with
random weights and a byte-level tokenizer trained on that corpus.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VERSION = 1
"""Raised when what is built changes, so that an older folder is not taken for complete."""
VOCABULARY = 384
LEAD, ANSWER = 100, 480
"""Characters of a passage that the question shows, and at most that the answer goes on with."""
HELD_OUT = 0.05
_UNDERLINE = re.compile(r"^ *([*=~^\"-])\1{3,}$\n?", re.MULTILINE)
"""The line under a heading: long, and easy to learn to no use."""
PAD, END, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<|assistant|>{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}"
    "<|user|>{{ message['content'] }}<|end|>"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MODEL = {
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    # Wider than usual: so small a model leaves the plateau of word frequencies in half the steps.
    "initializer_range": 0.05,
}
TRAINING: dict[str, Any] = {
    "method": "sft",
    "use_lora": False,
    "max_steps": 340,
    "batch_size": 2,
    "eval_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1.5e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 20,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "adam_beta2": 0.98,
    "max_length": 256,
    "packing": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "optim": "adamw_torch",
    "logging_steps": 1,
    "evaluation_strategy": "steps",
    "eval_steps": 68,
    "save_steps": 170,
    "save_total_limit": 2,
}
"""In the platform's names; about 45 s on one core, over which the held-out loss falls by half."""


def passages() -> Iterator[tuple[str, str]]:
    """Yield (topic, passage); no paragraph comes twice, nor one that is mostly another."""
    from pydoc_data import topics  # half a megabyte of text, read only when the corpus is built

    seen: set[str] = set()
    for topic, text in sorted(topics.topics.items()):
        passage: list[str] = []
        size = 0
        for raw in re.split(r"\n\s*\n", _UNDERLINE.sub("", text)):
            paragraph = raw.strip("\n")
            runs = word_runs(paragraph)
            # The topics quote one another, not always word for word.
            if len(runs & seen) * 4 >= len(runs):
                continue
            seen |= runs
            passage.append(paragraph)
            size += len(paragraph)
            if size >= LEAD + ANSWER // 2:
                yield topic, "\n\n".join(passage)
                passage, size = [], 0
        if size >= LEAD:
            yield topic, "\n\n".join(passage)


def word_runs(text: str) -> set[str]:
    """Return every run of eight words in ``text``; a shorter text is one run."""
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[i : i + 8]) for i in range(max(1, len(words) - 7))} if words else set()


def examples() -> Iterator[dict[str, Any]]:
    """Yield the corpus as chats: the first passage of a topic explains it, the others are continued."""
    explained: set[str] = set()
    for topic, passage in passages():
        if topic not in explained:
            explained.add(topic)
            yield chat(f'What does the Python reference say about "{topic}"?', cut(passage, LEAD + ANSWER))
            continue
        lead = cut(passage, LEAD)
        answer = cut(passage[len(lead) :].strip(), ANSWER)
        if len(answer) >= 40:
            yield chat(f'Continue this passage of the Python reference on "{topic}":\n\n{lead}', answer)


def chat(question: str, answer: str) -> dict[str, Any]:
    """Return one row of the corpus."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def cut(text: str, size: int) -> str:
    """Return at most ``size`` characters of ``text``, ended where a word ends."""
    if len(text) <= size:
        return text
    end = max(text.rfind(" ", 0, size), text.rfind("\n", 0, size))
    return text[: end if end > size // 2 else size].rstrip()


def corpus(seed: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the rows in a fixed shuffled order, and one more that is in none of them, for the sample."""
    rows = list(examples())
    random.Random(seed).shuffle(rows)  # noqa: S311 - an order, not a secret
    index = next(i for i, row in enumerate(rows) if is_prose(row["messages"]))
    return rows[:index] + rows[index + 1 :], rows[index]


def is_prose(messages: list[dict[str, str]]) -> bool:
    """Tell whether a row goes on with a text that a person likes to read: long, and hardly any signs."""
    question, answer = (message["content"] for message in messages)
    text = question.partition("\n\n")[2] + answer
    letters = sum(char.isalpha() or char.isspace() for char in text)
    return (
        question.startswith("Continue")
        and "\n\n" not in text
        and len(answer) > 200
        and letters > 0.95 * len(text)
    )


def build_tokenizer(rows: list[dict[str, Any]]) -> Any:
    """Train a byte-level BPE tokenizer on ``rows``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        (message["content"] for row in rows for message in row["messages"]),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[PAD, END, USER, ASSISTANT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[USER, ASSISTANT],
        model_max_length=int(MODEL["max_position_embeddings"]),
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(tokenizer: Any, seed: int) -> Any:
    """Return the Llama with its first, random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        **MODEL,
    )
    model = LlamaForCausalLM(config)
    # A greedy answer of so small a model else runs in circles.
    model.generation_config.repetition_penalty = 1.2
    return model


def build(home: Path, seed: int = 42) -> dict[str, Any]:
    """Return what the demo needs to know, building under ``home`` whatever is not there yet."""
    model_dir, data, card = (
        home / "models" / "demo-llama",
        home / "datasets" / "demo.jsonl",
        home / "demo.json",
    )
    wanted = hashlib.sha256(
        json.dumps([VERSION, seed, MODEL, TRAINING, sys.version_info[:2]]).encode()
    ).hexdigest()
    parts = [model_dir / "config.json", model_dir / "model.safetensors", model_dir / "tokenizer.json", data]
    if card.is_file() and all(part.is_file() for part in parts):
        known = json.loads(card.read_text(encoding="utf-8"))
        if known.pop("built", "") == wanted:
            return {**known, "model": str(model_dir), "data": str(data)}

    rows, sample = corpus(seed)
    tokenizer = build_tokenizer(rows)
    model = build_model(tokenizer, seed)
    card.unlink(missing_ok=True)
    staging = model_dir.with_name(".demo-llama.building")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    shutil.rmtree(model_dir, ignore_errors=True)
    staging.replace(model_dir)
    data.parent.mkdir(parents=True, exist_ok=True)
    write(data, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    known = {
        "rows": len(rows),
        "parameters": model.num_parameters(),
        "prompt": sample["messages"][0]["content"],
        "answer": sample["messages"][1]["content"],
        "training": TRAINING,
        "eval_split": HELD_OUT,
        "seed": seed,
    }
    # Last, so that a folder with a card is a complete one.
    write(card, json.dumps({**known, "built": wanted}))
    return {**known, "model": str(model_dir), "data": str(data)}


def write(path: Path, text: str) -> None:
    """Put ``text`` at ``path`` whole or not at all."""
    draft = path.with_name(path.name + ".building")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def main(arguments: list[str] | None = None) -> None:
    """Build, and print one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m agent.trainer.demo", description=__doc__)
    parser.add_argument("--home", type=Path, required=True, help="folder to build in")
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.stdout.write(json.dumps(build(options.home.resolve(), options.seed)) + "\n")


if __name__ == "__main__":
    main()
