"""What is counted on the meta device is what the loaded model has."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig

from agent.trainer import contents, sizes, tensorfile
from agent.trainer.model import choose_precision, load_model, load_tokenizer, old_name_allowed
from protocol.jobspec import JobSpec, LoraSpec, Method, ModelSpec, Quantization, TrainingSpec
from protocol.worker import Limits, Workspace
from tests.trainer.conftest import Jobs

FORMS = {
    "full": {},
    "full in bfloat16": {"dtype": "bfloat16"},
    "dpo, full": {"method": Method.DPO},
    "lora": {"lora": LoraSpec(r=4)},
    "lora on two": {"lora": LoraSpec(r=8, target_modules=["q_proj", "down_proj"])},
    "lora with a whole module": {
        "lora": LoraSpec(r=4, target_modules=["v_proj"], modules_to_save=["lm_head"])
    },
    "dora": {"lora": LoraSpec(r=4, use_dora=True)},
    "nf4": {"lora": LoraSpec(r=4), "quantization": Quantization(bits=4)},
    "nf4, double": {"lora": LoraSpec(r=4), "quantization": Quantization(bits=4, double_quant=True)},
    "int8": {"lora": LoraSpec(r=4), "quantization": Quantization(bits=8)},
    "int8, dora": {"lora": LoraSpec(r=4, use_dora=True), "quantization": Quantization(bits=8)},
}


@pytest.mark.parametrize("form", FORMS)
def test_the_plan_is_what_is_loaded(tiny_model: Path, tmp_path: Path, form: str) -> None:
    spec = _spec(**FORMS[form])
    limits = Limits(hub=False)
    space = Workspace(checkpoints="", output="", cache=str(tmp_path), model=str(tiny_model), data="")
    precision = choose_precision(spec, limits, lambda level, text: None)
    planned = sizes.planned(spec, precision, AutoConfig.from_pretrained(tiny_model))
    held = load_model(spec, space, limits, precision, load_tokenizer(spec, space, limits))
    model = held.model
    if held.adapter is not None:
        with old_name_allowed(), warnings.catch_warnings():
            # Said of tied embeddings whose module is saved whole.
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
            model = get_peft_model(model, held.adapter)
    if spec.model.quantization is not None:
        _as_trl_holds_it(model)
    real = sizes.loaded(spec, model)
    assert planned.trainable == real.trainable
    assert planned.trained == real.trained
    assert planned.weights == pytest.approx(real.weights, rel=0.01)
    assert planned.optimizer == real.optimizer
    assert planned.reference == pytest.approx(real.reference, rel=0.01)
    if spec.model.quantization is None:
        # Of packed weights the loaded model counts its own way.
        assert planned.parameters == real.parameters


def _as_trl_holds_it(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_magnitude_vector" not in name:
            parameter.data = parameter.data.to(torch.bfloat16)


@pytest.mark.parametrize("form", ["lora", "nf4", "int8, dora"])
def test_a_checkpoint_is_as_large_as_planned(jobs: Jobs, tiny_model: Path, form: str) -> None:
    jobs.run(**FORMS[form], training={"max_steps": 1})
    start = jobs.start(**FORMS[form], training={"max_steps": 1})
    precision = choose_precision(start.spec, start.limits, lambda level, text: None)
    planned = sizes.planned(start.spec, precision, AutoConfig.from_pretrained(tiny_model))
    folder = jobs.checkpoints() / "step-1"
    written = [tensorfile.read(folder, name) for name in (contents.ADAPTER, contents.OPTIMIZER)]
    size = sum(one.numel() * one.element_size() for group in written for one in group.values())
    assert planned.checkpoint == pytest.approx(size, rel=0.05)


def test_the_reference_is_counted_for_full_dpo_alone() -> None:
    assert _planned_reference(_spec(method=Method.DPO)) > 0
    assert _planned_reference(_spec(method=Method.DPO, lora=LoraSpec())) == 0
    assert _planned_reference(_spec()) == 0


def _planned_reference(spec: JobSpec) -> int:
    from transformers import LlamaConfig

    precision = choose_precision(spec, Limits(), lambda level, text: None)
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    return sizes.planned(spec, precision, config).reference


@pytest.mark.parametrize(
    ("name", "state", "on_host"),
    [
        ("adamw_torch", 8000, False),
        ("sgd", 0, False),
        ("adamw_8bit", 2031, False),
        ("paged_adamw_8bit", 2031, True),
        ("paged_adamw_32bit", 8000, True),
        ("lion_32bit", 4000, False),
        ("adagrad", 4000, False),
    ],
)
def test_what_an_optimizer_keeps(name: str, state: int, on_host: bool) -> None:
    assert sizes.optimizer_bytes(name, 4000, 1000) == (state, on_host)


def _spec(
    *,
    method: Method = Method.SFT,
    lora: LoraSpec | None = None,
    quantization: Quantization | None = None,
    dtype: Any = "auto",
) -> JobSpec:
    return JobSpec(
        job_id="job",
        method=method,
        model=ModelSpec(name="tiny", quantization=quantization, dtype=dtype),
        lora=lora,
        training=TrainingSpec(max_steps=1),
    )
