"""The platform's TrainingConfig becomes a job, or is refused with the path as the user wrote it."""

import copy
from collections.abc import Mapping
from typing import Any

import pytest

from protocol.jobspec import BadSpec, BranchSpec, DataFormat, DpoSpec, JobSpec, LoraSpec, Method, Quantization
from protocol.trainingconfig import job_spec

QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]


def template(
    method: str, model: str, epochs: int, lr: float, micro: int, accumulation: int, **more: Any
) -> dict[str, Any]:
    """A template of the platform, with what all of them have in common."""
    training = {
        "method": method,
        "num_epochs": epochs,
        "learning_rate": lr,
        "batch_size": micro,
        "eval_batch_size": 4,
        "gradient_accumulation_steps": accumulation,
        "warmup_steps": 100,
        "warmup_ratio": 0.03,
        "lr_scheduler_type": "cosine",
        "use_lora": True,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.1,
        "lora_config": {
            "r": 16,
            "lora_alpha": 32,
            "lora_dropout": 0.1,
            "target_modules": QKVO,
            "bias": "none",
            "task_type": "CAUSAL_LM",
            "modules_to_save": [],
        },
        "quantization": {
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_use_double_quant": True,
        },
        "bf16": True,
        "fp16": False,
        "weight_decay": 0.01,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "dataloader_num_workers": 4,
        "dataloader_prefetch_factor": 2,
        "dataloader_pin_memory": True,
        "pretokenize": True,
        "use_streaming": False,
        "evaluation_strategy": "steps",
        "save_strategy": "steps",
        "save_total_limit": 3,
        **more.pop("training", {}),
    }
    name = {"name": model, "trust_remote_code": True}
    return {
        "model": {**name, "torch_dtype": "bfloat16", "device_map": "auto"},
        "tokenizer": name,
        "training": training,
        "data": {"strategy": "standard", "generation_type": "real", **more.pop("data")},
        "provider": {"type": "local", "base_url": "http://localhost"},
        "tools": [],
        "evaluation": {"metrics": ["loss"], "eval_steps": 500},
        "tensorboard": {"enabled": True, "log_dir": "./runs"},
        "seed": 42,
        **more,
    }


TEMPLATES = {
    "sft_standard": template(
        "sft",
        "meta-llama/Llama-3.2-1B-Instruct",
        3,
        2e-4,
        4,
        8,
        training={
            "max_length": 2048,
            "optim": "paged_adamw_8bit",
            "logging_steps": 10,
            "eval_steps": 500,
            "save_steps": 500,
            "packing": True,
            "group_by_length": True,
            "max_grad_norm": 1.0,
        },
        data={"train_split": 0.95, "dataset_format": "sft"},
        predictions={"enabled": True, "sample_count": 5, "sample_frequency": "eval"},
    ),
    "cpt_standard": template(
        "cpt",
        "meta-llama/Llama-3.2-1B",
        1,
        2e-5,
        4,
        8,
        training={"max_length": 4096, "optim": "paged_adamw_8bit", "packing": True, "save_steps": 500},
        data={"dataset_format": "raw_text"},
    ),
    "dpo_standard": template(
        "dpo",
        "meta-llama/Llama-2-7b-hf",
        3,
        1e-6,
        2,
        16,
        training={"max_length": 512, "beta": 0.1, "max_prompt_length": 512, "optim": "paged_adamw_32bit"},
        data={"train_split": 0.8, "dataset_format": "dpo"},
    ),
    "rlhf_standard": template(
        "rlhf",
        "meta-llama/Llama-2-7b-hf",
        3,
        1e-5,
        4,
        4,
        training={
            "ppo_epochs": 4,
            "clip_range": 0.2,
            "clip_range_value": 0.2,
            "vf_coef": 0.1,
            "entropy_coef": 0.01,
        },
        data={"train_split": 0.9, "dataset_format": "rlhf"},
    ),
    "orpo_standard": template(
        "orpo",
        "meta-llama/Llama-2-7b-hf",
        3,
        8e-6,
        4,
        4,
        training={"max_length": 1024, "beta": 0.1, "evaluation_strategy": "no"},
        data={"dataset_format": "dpo"},
    ),
}

NORMALISED = {
    "model": {"name": "Qwen/Qwen2.5-3B"},
    "tokenizer": {"name": "Qwen/Qwen2.5-3B"},
    "training": {
        "method": "sft",
        "num_epochs": 3,
        "batch_size": 4,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 100,
        "save_steps": 500,
        "save_total_limit": 3,
        "evaluation_strategy": "steps",
        "eval_steps": 500,
        "packing": False,
        "max_length": 512,
        "gradient_checkpointing": True,
        "dataloader_num_workers": 4,
        "dataloader_prefetch_factor": 2,
        "quantization": {"load_in_4bit": True},
    },
    "lora": {
        "r": 16,
        "alpha": 32,
        "dropout": 0.05,
        "target_modules": None,
        "bias": "none",
        "task_type": "CAUSAL_LM",
    },
    "data": {"strategy": "standard"},
    "dataset_path": "train.jsonl",
    "output_dir": "/workspace/fine_tuned_model",
}


def made(config: Mapping[str, Any], **more: Any) -> JobSpec:
    before = copy.deepcopy(config)
    job = job_spec("job-1", config, **more)
    assert config == before, "the config belongs to the caller"
    return job


def with_training(**training: Any) -> dict[str, Any]:
    return {"model": {"name": "m"}, "training": training}


def test_the_sft_template() -> None:
    job = made(TEMPLATES["sft_standard"])
    assert (job.method, job.model.name, job.model.dtype) == (
        Method.SFT,
        "meta-llama/Llama-3.2-1B-Instruct",
        "bfloat16",
    )
    assert job.model.quantization == Quantization(bits=4, double_quant=True)
    assert job.lora == LoraSpec(r=16, alpha=32, dropout=0.1, target_modules=QKVO)
    training = job.training
    assert (
        training.epochs,
        training.learning_rate,
        training.batch_size,
        training.gradient_accumulation_steps,
    ) == (
        3,
        2e-4,
        4,
        8,
    )
    assert (training.max_length, training.optim, training.packing, training.group_by_length) == (
        2048,
        "paged_adamw_8bit",
        True,
        True,
    )
    assert (training.logging_steps, training.eval_steps, training.save_steps) == (10, 500, 500)
    assert (training.eval_strategy, training.seed, training.bf16) == ("steps", 42, True)
    assert (job.data.eval_fraction, job.data.format) == (0.05, DataFormat.AUTO)
    assert (training.warmup_ratio, training.warmup_steps) == (0.03, None), (
        "both are in the template; the ratio scales"
    )


def test_the_cpt_template() -> None:
    job = made(TEMPLATES["cpt_standard"], dataset_path="books.txt", name="Books")
    assert (job.method, job.data.format, job.data.path, job.name) == (
        Method.CPT,
        DataFormat.TEXT,
        "books.txt",
        "Books",
    )
    assert job.data.eval_fraction == 0


@pytest.mark.parametrize("name", ["rlhf_standard", "orpo_standard"])
def test_a_template_of_a_method_that_cannot_run_is_refused_for_that(name: str) -> None:
    with pytest.raises(BadSpec) as refused:
        made(TEMPLATES[name])
    method = name.partition("_")[0]
    assert (
        str(refused.value)
        == f'training.method: "{method}" cannot be run by this agent yet; it can run: sft, cpt, dpo.'
    )


def test_the_dpo_template_of_the_platform() -> None:
    job = made(TEMPLATES["dpo_standard"])
    assert (job.method, job.data.format, job.dpo) == (Method.DPO, DataFormat.PREFERENCE, DpoSpec(beta=0.1))
    assert made(with_training(method="sft", beta=0.5, loss_type="nll")).dpo == DpoSpec()
    assert made(with_training(method="dpo", loss_type="ipo")).dpo == DpoSpec(loss_type="ipo")
    assert made(with_training(method="dpo", beta=1, loss_type=["hinge"])).dpo.loss_type == "hinge"


def test_rows_are_streamed_where_the_last_step_is_named() -> None:
    assert made(with_training(use_streaming=True, max_steps=5)).data.streaming
    assert not made(with_training(use_streaming=True)).data.streaming
    assert not made(with_training(max_steps=5)).data.streaming


def test_what_a_run_needs_to_survive_is_taken_over() -> None:
    training = made(
        with_training(
            metric_for_best_model="eval_rewards/accuracies",
            load_best_model_at_end=True,
            deterministic=True,
            on_bad_loss="rewind",
            spike_factor=4,
            max_rewinds=2,
        )
    ).training
    assert (training.metric_for_best, training.load_best_at_end) == ("eval_rewards_accuracy", True)
    assert (training.deterministic, training.on_bad_loss) == (True, "rewind")
    assert (training.spike_factor, training.max_rewinds) == (4, 2)
    assert made(with_training(metric_for_best_model="loss")).training.metric_for_best == "eval_loss"


def test_a_job_that_begins_with_another_ones_checkpoint() -> None:
    job = made({"model": {"name": "m"}, "branch": {"job_id": "run-1", "checkpoint": "step-20"}})
    assert job.branch == BranchSpec(job_id="run-1", checkpoint="step-20")


@pytest.mark.parametrize("name", ["rlhf_standard", "orpo_standard"])
def test_apart_from_its_method_every_template_is_understood(name: str) -> None:
    config = copy.deepcopy(TEMPLATES[name])
    config["training"]["method"] = "sft"
    made(config)


def test_a_normalised_config() -> None:
    job = made(NORMALISED)
    assert job.lora == LoraSpec(r=16, alpha=32, dropout=0.05, target_modules="all-linear")
    assert job.data.path == "train.jsonl"
    assert job.training.warmup_steps == 100
    assert job.model.quantization == Quantization(bits=4)


def test_where_the_spellings_of_lora_disagree_the_one_that_users_edit_wins() -> None:
    nested = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": QKVO}
    lora = made(
        with_training(use_lora=True, lora_r=32, lora_alpha=64, lora_dropout=0.0, lora_config=nested)
    ).lora
    assert lora == LoraSpec(r=32, alpha=64, dropout=0.0, target_modules=QKVO)
    # Normalised: `lora` at the top gives only what nothing else does.
    both = with_training(lora_config={"r": 8}) | {"lora": {"r": 4, "alpha": 7}}
    assert made(both).lora == LoraSpec(r=8, alpha=7)


def test_without_lora_the_model_is_tuned_in_full() -> None:
    assert made(with_training()).lora is None
    assert made(with_training(use_lora=False, lora_r=16) | {"lora": {"r": 4}}).lora is None
    assert made(with_training(use_lora=True)).lora == LoraSpec()
    assert made(with_training(use_lora=True, lora_config={"target_modules": []})).lora == LoraSpec()


def test_nothing_and_zero_mean_what_they_mean_on_the_page() -> None:
    job = made(
        {
            "model": {"name": "m"},
            "data": {"max_samples": 0, "train_split": 1},
            "training": {
                "warmup_ratio": 0,
                "warmup_steps": 0,
                "weight_decay": 0,
                "max_grad_norm": 0,
                "dataloader_num_workers": 0,
                "dataloader_prefetch_factor": 2,
                "learning_rate": None,
                "eval_batch_size": None,
                "max_steps": None,
                "quantization": {"load_in_4bit": False, "load_in_8bit": False},
            },
            "tokenizer": None,
        }
    )
    assert (job.data.max_samples, job.data.eval_fraction) == (None, 0.0)
    assert (job.training.warmup_steps, job.training.warmup_ratio) == (0, None)
    assert (job.training.weight_decay, job.training.max_grad_norm) == (0, 0)
    assert job.training.dataloader_prefetch_factor is None, "it must be absent without workers"
    assert job.training.learning_rate == 2e-4
    assert job.model.quantization is None


def test_both_flags_of_quantisation_mean_four_bits() -> None:
    flags = {"load_in_4bit": True, "load_in_8bit": True}
    assert made(with_training(use_lora=True, quantization=flags)).model.quantization == Quantization(bits=4)
    eight = {"load_in_8bit": True}
    assert made(with_training(use_lora=True) | {"quantization": eight}).model.quantization == Quantization(
        bits=8
    )


def test_a_held_out_share_has_three_spellings() -> None:
    def share(config: dict[str, Any]) -> float:
        return made({"model": {"name": "m"}, **config}).data.eval_fraction

    assert share({"data": {"train_split": 0.8}}) == 0.2
    assert share({"eval_split": 0.1}) == 0.1
    assert share({"eval_split": 0.1, "data": {"eval_split": 0.3, "train_split": 0.9}}) == 0.3
    assert share({}) == 0.0


def test_the_jobs_own_data_set_goes_before_the_configs() -> None:
    config = {"model": {"name": "m"}, "dataset_path": "a", "data": {"path": "b"}}
    assert made(config).data.path == "b"
    assert made(config, dataset_path="c").data.path == "c"


def test_a_name_may_stand_in_many_places() -> None:
    config = with_training(job_name="third") | {"job_name": "second"}
    assert made(config).name == "second"
    assert made(config, name="first").name == "first"
    assert made(with_training(job_name="third")).name == "third"


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"model": {}}, "model.name: give the name of a model or the folder it lies in."),
        ({"model": "m"}, "model: expected an object, found str."),
        ({"modle": {}}, 'modle: no such setting. Did you mean "model"?'),
        (with_training(lerning_rate=1), 'training.lerning_rate: no such setting. Did you mean "learning_rate"?'),
        (with_training(zzz=1), "training.zzz: no such setting."),
        (with_training(lora_config={"rank": 1}), "training.lora_config.rank: no such setting."),
        (with_training(quantization={"bits": 4}), "training.quantization.bits: no such setting."),
        ({"model": {"name": "m", "nme": 1}}, 'model.nme: no such setting. Did you mean "name"?'),
        ({"model": {"name": "m"}, "data": {"pth": 1}}, 'data.pth: no such setting. Did you mean "path"?'),
        ({"model": {"name": "m"}, "tokenizer": {"size": 1}}, "tokenizer.size: no such setting."),
        ({"model": {"name": "m"}, "lora": {"q": 1}}, "lora.q: no such setting."),
        ({"model": {"name": "m"}, "output": {"merge": 1}}, "output: Object contains unknown field `merge`."),
        (with_training(method="grpo"), 'training.method: unknown method "grpo"; this agent can run: sft, cpt, dpo.'),
        (with_training(batch_size=0), "training.batch_size: Expected `int` >= 1."),
        (with_training(batch_size="4"), "training.batch_size: Expected `int`, got `str`."),
        (with_training(num_epochs=0), "training.num_epochs: Expected `float` > 0.0."),
        (with_training(num_train_epochs=-1), "training.num_train_epochs: Expected `float` > 0.0."),
        (with_training(learning_rate=0), "training.learning_rate: Expected `float` > 0.0."),
        (with_training(learning_rate=float("nan")), "training.learning_rate: Expected `float` > 0.0."),
        (with_training(lr_scheduler_type="steep"), "training.lr_scheduler_type: Invalid enum value 'steep'."),
        (with_training(evaluation_strategy="daily"), "training.evaluation_strategy: Invalid enum value 'daily'."),
        (with_training(seed=-1), "training.seed: Expected `int` >= 0."),
        ({"model": {"name": "m"}, "seed": -1}, "seed: Expected `int` >= 0."),
        (with_training(use_lora="yes"), "training.use_lora: expected true or false."),
        (with_training(use_lora=True, lora_r=0), "training.lora_r: Expected `int` >= 1."),
        (with_training(lora_config={"lora_alpha": -1}), "training.lora_config.lora_alpha: Expected `float` > 0.0."),
        ({"model": {"name": "m"}, "lora": {"dropout": 1}}, "lora.dropout: Expected `float` < 1.0."),
        (
            with_training(lora_config={"r": 4, "task_type": "SEQ_CLS"}),
            'training.lora_config.task_type: "SEQ_CLS" cannot be trained here; only CAUSAL_LM can.',
        ),
        (
            with_training(quantization={"load_in_4bit": True}),
            "training.quantization: a quantised model cannot be fine-tuned in full; set training.use_lora to true, or "
            "both load_in flags to false.",
        ),
        (
            with_training(use_lora=True, quantization={"load_in_4bit": True, "bnb_4bit_quant_type": "int4"}),
            "training.quantization.bnb_4bit_quant_type: Invalid enum value 'int4'.",
        ),
        ({"model": {"name": "m", "torch_dtype": "int8"}}, "model.torch_dtype: Invalid enum value 'int8'."),
        ({"model": {"name": "m"}, "data": {"train_split": 0}}, "data.train_split: expected a number above 0 and at most 1."),
        ({"model": {"name": "m"}, "data": {"train_split": "x"}}, "data.train_split: expected a number above 0 and at most 1."),
        ({"model": {"name": "m"}, "data": {"eval_split": 1}}, "data.eval_split: Expected `float` < 1.0."),
        ({"model": {"name": "m"}, "eval_split": -0.1}, "eval_split: Expected `float` >= 0.0."),
        ({"model": {"name": "m"}, "data": {"max_samples": -5}}, "data.max_samples: Expected `int` >= 1."),
        (
            {"model": {"name": "m"}, "data": {"dataset_format": "xml"}},
            'data.dataset_format: unknown format "xml"; known are: alpaca, auto, chatml, dpo, jsonl, messages, openorca, '
            "preference, prompt_completion, raw_text, rlhf, sft, sharegpt, text, unnatural.",
        ),
        ({"model": {"name": "m"}, "branch": "run-1"}, "branch: expected an object, found str."),
        ({"model": {"name": "m"}, "branch": {"checkpoint": "best"}}, "branch: Object missing required field `job_id`."),
        (with_training(method="dpo", beta=0), "training.beta: Expected `float` > 0.0."),
        (with_training(method="dpo", loss_type="nca"), "training.loss_type: Invalid enum value 'nca'."),
        ({"model": {"name": "m"}, "samples": [{"answer": "a"}]}, "samples[0]: Object missing required field `prompt`."),
    ],
)  # fmt: skip
def test_a_refusal_names_the_path_as_it_was_written(config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadSpec) as refused:
        made(config)
    assert str(refused.value) == sentence


def test_an_id_that_is_no_name_of_a_folder_is_refused() -> None:
    with pytest.raises(BadSpec, match=r"^job_id: "):
        job_spec("../../etc", {"model": {"name": "m"}})


def test_something_else_than_an_object_is_refused() -> None:
    with pytest.raises(BadSpec, match=r"^config: expected an object, found list"):
        job_spec("j", [])  # type: ignore[arg-type]
