"""TRL's trainer on the tiny model, as its documentation shows it: nothing of ours."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from datasets import Dataset
from peft import LoraConfig
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback, set_seed
from transformers.distributed import DistributedConfig
from trl import SFTConfig, SFTTrainer

STEPS, PAUSE = 10, 4


class Notes(TrainerCallback):  # type: ignore[misc]
    """Keeps the losses, and does what a test wants done at a step."""

    def __init__(self, at: int = 0, act: Callable[[Any], None] = lambda control: None) -> None:
        self.at, self.act = at, act
        self.losses: dict[int, float] = {}
        self.batches: list[int] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses[state.global_step] = float(logs["loss"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self.batches.append(state.train_batch_size)
        if state.global_step == self.at:
            self.act(control)
        return control


def pause(control: Any) -> None:
    control.should_save = control.should_training_stop = True


@dataclass
class Ended:
    """What is left of a run."""

    trainer: Any
    losses: dict[int, float]
    weights: str
    folder: Path
    dtypes: set[torch.dtype] = field(default_factory=set)


def rows(count: int = 48, seed: int = 0, longest: int = 24) -> Dataset:
    """Return token ids of uneven length."""
    rng = random.Random(seed)
    return Dataset.from_list(
        [{"input_ids": [rng.randrange(5, 260) for _ in range(rng.randint(6, longest))]} for _ in range(count)]
    )


def pairs(count: int = 48) -> Dataset:
    """Return preference pairs of uneven length."""
    rng = random.Random(4)

    def said(most: int) -> str:
        return " ".join(
            rng.choice(("red", "green", "cat", "sun", "runs")) for _ in range(rng.randint(2, most))
        )

    return Dataset.from_list(
        [{"prompt": said(5), "chosen": said(7), "rejected": said(7)} for _ in range(count)]
    )


def weights_of(model: Any) -> str:
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(model.named_parameters()):
        if tensor.requires_grad:
            digest.update(name.encode())
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            digest.update(whole.detach().float().numpy().tobytes())
    return digest.hexdigest()


class Stock:
    """Runs TRL's trainer as its documentation shows it."""

    def __init__(self, folder: Path, model: Path, tokenizer: Any) -> None:
        self.folder, self.model, self.tokenizer = folder, model, tokenizer

    def trainer(
        self,
        name: str,
        *callbacks: TrainerCallback,
        lora: bool = True,
        bits: BitsAndBytesConfig | None = None,
        data: Dataset | None = None,
        kind: type[Any] = SFTTrainer,
        config: type[Any] = SFTConfig,
        eval_data: Dataset | None = None,
        streaming: bool = False,
        distributed: DistributedConfig | None = None,
        **changes: Any,
    ) -> Any:
        set_seed(1)
        data = data if data is not None else rows()
        if streaming:
            data = data.to_iterable_dataset(num_shards=4).shuffle(seed=3, buffer_size=16)
        model = AutoModelForCausalLM.from_pretrained(
            self.model,
            dtype=torch.float32,
            **({"quantization_config": bits} if bits else {}),
            **({"distributed_config": distributed} if distributed else {}),
        )
        arguments = {
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "max_length": 32,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "bf16": False,
            "activation_checkpointing": False,
            "dataloader_pin_memory": False,
            **changes,
        }
        return kind(
            model=model,
            args=config(output_dir=str(self.folder / name), **arguments),
            train_dataset=data,
            eval_dataset=eval_data,
            processing_class=self.tokenizer,
            peft_config=LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
            if lora
            else None,
            callbacks=list(callbacks),
        )

    def run(
        self,
        name: str,
        *callbacks: TrainerCallback,
        resume: bool | str | None = None,
        pause_at: int = 0,
        **changes: Any,
    ) -> Ended:
        notes = Notes(pause_at, pause)
        trainer = self.trainer(name, notes, *callbacks, **changes)
        trainer.train(resume_from_checkpoint=resume)
        kinds = {p.dtype for p in trainer.model.parameters() if p.requires_grad}
        return Ended(trainer, notes.losses, weights_of(trainer.model), self.folder / name, kinds)

    def paused_and_resumed(self, name: str, **changes: Any) -> tuple[Ended, Ended, Ended]:
        """Return an untouched run, one that was paused, and its resume."""
        whole = self.run(f"{name}-whole", **changes)
        first = self.run(name, pause_at=PAUSE, **changes)
        return whole, first, self.run(name, resume=True, **changes)


def resumed_elsewhere(stock: Stock, name: str) -> tuple[dict[int, float], str]:
    """Resume a paused job in a fresh interpreter, and return the losses and the weights it came to."""
    program = (
        "import json, sys; from pathlib import Path; from transformers import AutoTokenizer\n"
        "from tests.trainer.stock import Stock\n"
        "folder, model, name = sys.argv[1:]\n"
        "ended = Stock(Path(folder), Path(model), AutoTokenizer.from_pretrained(model)).run(name, resume=True)\n"
        "Path(folder, 'ended.json').write_text(json.dumps([list(ended.losses.items()), ended.weights]))\n"
    )
    command = [sys.executable, "-c", program, str(stock.folder), str(stock.model), name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    losses, weights = json.loads((stock.folder / "ended.json").read_text())
    return dict(map(tuple, losses)), weights


def forked(body: Callable[[], Any]) -> int:
    """Run ``body`` in a forked process; return its exit status, as a negative number if a signal ended it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)  # the parent's pool of threads is not there in a forked process
            body()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def in_ranks(folder: Path, body: Callable[[], Any]) -> list[Any]:
    """Run ``body`` in two forked processes that form a gloo group, and return what each returned."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                signal.alarm(120)  # a group that has lost a rank waits for it
                torch.set_num_threads(1)  # the parent's pool of threads is not there in a forked process
                os.environ.update(
                    OMP_NUM_THREADS="1",
                    RANK=str(rank),
                    LOCAL_RANK=str(rank),
                    WORLD_SIZE="2",
                    LOCAL_WORLD_SIZE="2",
                    MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=str(port),
                )
                (folder / f"rank-{rank}.json").write_text(json.dumps(body()))
                code = 0
            except BaseException:  # noqa: BLE001  told by the parent, whose stack this is a copy of
                (folder / f"rank-{rank}.txt").write_text(traceback.format_exc())
            finally:
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    told = "".join(path.read_text() for path in folder.glob("rank-*.txt"))
    assert codes == [0, 0], told
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]
