"""Loading, and the sentence for each way it can fail."""

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from agent.trainer.errors import TrainerError
from agent.trainer.model import choose_precision, load_base, load_model, load_tokenizer
from protocol.failures import FailureReason
from protocol.jobspec import LoraSpec, Method, ModelSpec, Quantization, TokenizerSpec, TrainingSpec
from tests.trainer.conftest import Jobs, build_model, build_tokenizer


def load(start: Any) -> Any:
    notes: list[str] = []
    precision = choose_precision(start.spec, start.limits, lambda level, text: notes.append(text))
    tokenizer = load_tokenizer(start.spec, start.workspace, start.limits)
    return load_model(start.spec, start.workspace, start.limits, precision, tokenizer)


def refusal(act: Callable[[], Any]) -> tuple[FailureReason, str]:
    with pytest.raises(TrainerError) as caught:
        act()
    return caught.value.reason, caught.value.sentence


def test_a_model_folder_that_is_not_there(jobs: Jobs) -> None:
    reason, sentence = refusal(lambda: load(jobs.start(base="/nowhere/model")))
    assert reason is FailureReason.MODEL
    assert sentence.startswith("There is no model folder /nowhere/model.")


def test_the_hub_is_refused_where_the_owner_forbids_it(jobs: Jobs) -> None:
    reason, sentence = refusal(lambda: load(jobs.start(base="someone/model")))
    assert reason is FailureReason.PERMISSION
    assert "someone/model would come from the Hugging Face Hub" in sentence


def test_pickled_weights_are_not_opened(jobs: Jobs, tmp_path: Path, tiny_tokenizer: Any) -> None:
    folder = build_model(tmp_path / "pickled", len(tiny_tokenizer))
    tiny_tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    reason, sentence = refusal(lambda: load(jobs.start(base=folder)))
    assert reason is FailureReason.MODEL
    assert "pickled (pytorch_model.bin)" in sentence


def test_torn_weights_are_said_to_be(jobs: Jobs, tmp_path: Path, tiny_tokenizer: Any) -> None:
    folder = build_model(tmp_path / "torn", len(tiny_tokenizer))
    tiny_tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"\x01\x02")
    reason, sentence = refusal(lambda: load(jobs.start(base=folder)))
    assert reason is FailureReason.MODEL
    assert sentence.startswith(f"The model in {folder} cannot be loaded")


def test_a_folder_without_a_tokenizer(jobs: Jobs, tmp_path: Path) -> None:
    reason, sentence = refusal(lambda: load(jobs.start(base=build_model(tmp_path / "bare", 300))))
    assert reason is FailureReason.MODEL
    assert "tokenizer" in sentence
    assert "\n" not in sentence


def test_remote_code_needs_the_owner(jobs: Jobs) -> None:
    model = ModelSpec(name="tiny", trust_remote_code=True)
    reason, sentence = refusal(lambda: load(jobs.start(model=model)))
    assert reason is FailureReason.PERMISSION
    assert "trust_remote_code" in sentence


def treacherous_tokenizer(folder: Path, marker: Path) -> Path:
    """Save a tokenizer whose code, once imported, leaves a file."""
    build_tokenizer().save_pretrained(folder)
    (folder / "evil.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n"
        f"open({str(marker)!r}, 'w').close()\n"
        "class EvilTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    config = folder / "tokenizer_config.json"
    changed = json.loads(config.read_text()) | {
        "tokenizer_class": "EvilTokenizer",
        "auto_map": {"AutoTokenizer": [None, "evil.EvilTokenizer"]},
    }
    config.write_text(json.dumps(changed))
    return folder


@pytest.mark.parametrize(
    ("asked", "allowed", "runs"),
    [(True, False, False), (False, True, False), (False, False, False), (True, True, True)],
)
def test_leave_for_a_models_code_is_none_for_another_tokenizers(
    asked: bool, allowed: bool, runs: bool, jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])
    marker = tmp_path / "ran"
    start = jobs.start(
        model=ModelSpec(name="tiny", trust_remote_code=True),
        tokenizer=TokenizerSpec(name="evil", trust_remote_code=asked),
        remote_code=True,
        tokenizer_code=allowed,
    )
    workspace = msgspec.structs.replace(
        start.workspace, tokenizer=str(treacherous_tokenizer(tmp_path / f"evil-{runs}", marker))
    )

    def load() -> Any:
        return load_tokenizer(start.spec, workspace, start.limits)

    if runs:
        load()
    elif asked:
        reason, sentence = refusal(load)
        assert reason is FailureReason.PERMISSION
        assert "not allowed that for this tokenizer" in sentence
    else:
        with contextlib.suppress(TrainerError):  # whether its plain files do is the library's to say
            load()
    assert marker.exists() is runs


def test_what_comes_from_the_hub_is_kept_where_the_libraries_keep_it(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def fetch(*_: Any, **arguments: Any) -> None:
        asked.append(arguments)
        raise OSError("no network in a test")

    monkeypatch.setattr("agent.trainer.model.AutoTokenizer.from_pretrained", fetch)
    monkeypatch.setattr("agent.trainer.model.AutoModelForCausalLM.from_pretrained", fetch)
    start = jobs.start(base="someone/model")
    limits = msgspec.structs.replace(start.limits, hub=True)
    refusal(lambda: load_tokenizer(start.spec, start.workspace, limits))
    refusal(lambda: load_base(start.spec, start.workspace, limits, torch.float32))
    assert len(asked) == 2
    assert not any("cache_dir" in arguments for arguments in asked)


def test_a_tokenizer_larger_than_the_model(jobs: Jobs, tmp_path: Path, tiny_tokenizer: Any) -> None:
    folder = build_model(tmp_path / "small", 300)
    tiny_tokenizer.save_pretrained(folder)
    reason, sentence = refusal(lambda: load(jobs.start(base=folder)))
    assert reason is FailureReason.MODEL
    assert f"has {len(tiny_tokenizer)} tokens" in sentence
    assert "has embeddings for 300" in sentence


def test_a_tokenizer_that_cannot_stop(jobs: Jobs, tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    folder = build_model(tmp_path / "endless", len(tokenizer))
    tokenizer.save_pretrained(folder)
    reason, sentence = refusal(lambda: load(jobs.start(base=folder)))
    assert reason is FailureReason.MODEL
    assert "end-of-sequence" in sentence


def test_modules_that_the_model_lacks_are_named_with_those_it_has(jobs: Jobs) -> None:
    reason, sentence = refusal(lambda: load(jobs.start(lora=LoraSpec(target_modules=["q_proj", "query"]))))
    assert reason is FailureReason.SPEC
    assert "no module named query" in sentence
    assert "q_proj" in sentence


def test_quantised_weights_need_an_adapter(jobs: Jobs) -> None:
    reason, sentence = refusal(lambda: load(jobs.start(quantization=Quantization(bits=4))))
    assert reason is FailureReason.SPEC
    assert "Add a lora section" in sentence


def test_an_adapter_is_as_the_job_says(jobs: Jobs) -> None:
    lora = LoraSpec(r=4, alpha=8, dropout=0.1, target_modules=["q_proj"], use_rslora=True, use_dora=True)
    adapter = load(jobs.start(lora=lora)).adapter
    assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout) == (4, 8, 0.1)
    assert (adapter.target_modules, adapter.use_rslora, adapter.use_dora) == ({"q_proj"}, True, True)


def test_the_tokenizer_obeys_the_job(jobs: Jobs) -> None:
    spec = TokenizerSpec(padding_side="left", chat_template="{{ messages[0]['content'] }}")
    start = jobs.start(tokenizer=spec)
    tokenizer = load_tokenizer(start.spec, start.workspace, start.limits)
    assert tokenizer.padding_side == "left"
    assert tokenizer.chat_template == spec.chat_template


F32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a device does")
@pytest.mark.parametrize(
    ("dtype", "training", "mixed", "weights", "bf16", "noted"),
    [
        ("auto", {}, True, F32, False, False),
        ("auto", {"bf16": True}, True, F32, True, False),
        ("bfloat16", {}, True, BF16, False, False),
        ("bfloat16", {}, False, F32, False, True),
        ("auto", {"bf16": True}, False, F32, False, True),
        ("auto", {"fp16": True}, True, F32, False, True),
        ("float16", {}, True, F32, False, True),
    ],
)
def test_precision_without_a_device(
    dtype: Any, training: Any, mixed: bool, weights: Any, bf16: bool, noted: bool, jobs: Jobs
) -> None:
    start = jobs.start(model=ModelSpec(name="tiny", dtype=dtype), mixed_precision=mixed)
    spec = type(start.spec)(job_id="x", model=start.spec.model, training=TrainingSpec(**training))
    notes: list[str] = []
    precision = choose_precision(spec, start.limits, lambda level, text: notes.append(text))
    assert (precision.weights, precision.bf16, precision.fp16) == (weights, bf16, False)
    assert bool(notes) is noted


def test_an_adapter_cannot_be_laid_over_the_head(jobs: Jobs) -> None:
    reason, sentence = refusal(lambda: load(jobs.start(lora=LoraSpec(target_modules=["q_proj", "lm_head"]))))
    assert reason is FailureReason.SPEC
    assert "lora.target_modules: lm_head cannot have an adapter" in sentence


def test_preference_training_in_full_has_a_reference_beside_it(jobs: Jobs) -> None:
    full = load(jobs.start(method=Method.DPO))
    assert full.reference is not full.model
    assert "held beside the one that is trained" in full.facts["reference"]
    assert load(jobs.start(method=Method.DPO, lora=LoraSpec(r=4))).reference is None
    assert load(jobs.start()).reference is None


def test_dora_reads_8_bit_weights_in_every_pass(jobs: Jobs) -> None:
    """Its norm is that of the weight at first, so the untrained model is the one without it."""
    wanted = {"quantization": Quantization(bits=8), "eval_fraction": 0.25, "training": {"max_steps": 2}}
    plain = jobs.run("plain", lora=LoraSpec(r=4), **wanted)
    dora = jobs.run("dora", lora=LoraSpec(r=4, use_dora=True), **wanted)
    assert dora.points[0]["eval_loss"] == pytest.approx(plain.points[0]["eval_loss"], abs=2e-2)
    assert dora.points[2]["grad_norm"] > 0
