"""Fast paths give equal results: 50 losses in fp32 without dropout, with the model's blocks and with ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerating import accelerated

import tunesmith
from tunesmith.console import Console
from tunesmith.kernels import layout
from tunesmith.kernels.ops import attention, elementwise
from tunesmith.techniques.lora import LoraLinear
from tunesmith.testing import sample_row, tiny_model, tiny_tokenizer

TRIALS: list[tuple[str, str, Any]] = [
    ("bert", "text-classification", "full"),
    ("bert", "text-classification", {"name": "lora", "target_modules": "all-linear"}),
    ("distilbert", "token-classification", "lora"),
    ("roberta", "text-classification", {"name": "prefix", "num_virtual_tokens": 4}),
    ("llama", "text-classification", "lora"),
    ("llama", "token-classification", "full"),
    ("gpt2", "text-classification", "lora"),
    ("phi3", "text-generation", "lora"),
    ("marian", "translation", "full"),
    ("bart", "translation", {"name": "lora", "target_modules": "all-linear"}),
]
BASES = {"translation": "AutoModelForSeq2SeqLM", "text-generation": "AutoModelForCausalLM"}


def _losses(recipe: dict[str, Any], output: Path) -> list[float]:
    tunesmith.train(recipe, output=str(output), console=Console(level=-1))
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "grad_norm" in line]


@pytest.mark.parametrize(("family", "task", "technique"), TRIALS)
def test_first_fifty_losses(
    family: str, task: str, technique: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = {
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    }
    without |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "seq_classif_dropout": 0.0}
    tiny_model(family, BASES.get(task, "AutoModel"), **without).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    rows = "".join(json.dumps(sample_row(task, number)) + "\n" for number in range(64))
    (tmp_path / "train.jsonl").write_text(rows)
    recipe: dict[str, Any] = {
        "task": task,
        "model": str(tmp_path / "base"),
        "technique": technique,
        "data": {"train": str(tmp_path / "train.jsonl"), "validation": None},
        "train": {"max_steps": 50, "batch_size": 8, "precision": "fp32", "device": "cpu", "learning_rate": 3e-3},
    }

    ours = _losses(recipe, tmp_path / "ours")
    recipe["train"]["fast_path"] = "off"
    monkeypatch.setattr(LoraLinear, "part", lambda *_: None)
    assert len(ours) == 50 and ours == pytest.approx(_losses(recipe, tmp_path / "plain"), abs=1e-5)


@pytest.mark.parametrize(
    ("family", "dropout", "dtype", "taken"),
    [
        ("llama", "attention_dropout", torch.bfloat16, False),
        ("llama", None, torch.bfloat16, True),
        ("llama", None, None, False),
        ("bert", "attention_probs_dropout_prob", torch.bfloat16, False),
        ("bert", None, torch.float16, True),
        ("gpt2", "attn_pdrop", torch.bfloat16, False),
    ],
)
def test_on_a_gpu_only_half_precision_without_dropout_in_attention(
    family: str, dropout: str | None, dtype: torch.dtype | None, taken: bool
) -> None:
    dropouts = {dropout: 0.1} if dropout else {}
    model = tiny_model(family, "AutoModelForSequenceClassification", num_labels=2, **dropouts)
    path = accelerated(model, dtype, device="cuda")
    assert path.unpadded is taken and path.statuses["cuda_graphs"].on is not taken


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo looks at it
def test_the_way_of_a_gpu_played_here_gives_the_same_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    tiny_model("llama", "AutoModelForCausalLM", **sizes).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    rows = "".join(json.dumps(sample_row("text-classification", number)) + "\n" for number in range(32))
    (tmp_path / "train.jsonl").write_text(rows)
    recipe = {
        "task": "text-classification",
        "model": str(tmp_path / "base"),
        "technique": {"name": "lora", "target_modules": "all-linear"},
        "data": {"train": str(tmp_path / "train.jsonl"), "validation": None},
        "train": {"max_steps": 8, "batch_size": 8, "precision": "bf16", "device": "cpu", "learning_rate": 3e-3},
    }

    ours, called = _losses(recipe, tmp_path / "cpu"), set()

    def varlen(q: Any, k: Any, v: Any, ends: Any, *_: Any, scale: float, window_size: tuple[int, int]) -> Any:
        called.add(window_size)
        parts = [
            F.scaled_dot_product_attention(*(x[a:b].transpose(0, 1) for x in (q, k, v)), is_causal=True, scale=scale)
            for a, b in zip(ends.tolist()[:-1], ends.tolist()[1:], strict=True)
        ]
        return torch.cat([part.transpose(0, 1) for part in parts])

    torch.compiler.reset()
    monkeypatch.setattr(attention, "VARLEN_ATTN", varlen)
    monkeypatch.setattr(layout, "VARLEN_DEVICES", ("cpu",))
    monkeypatch.setattr(elementwise, "COMPILED_DEVICES", ("cpu",))
    monkeypatch.setattr(elementwise, "COMPILE_BACKEND", "aot_eager")
    monkeypatch.setattr(elementwise, "_has_compiler", lambda: True)
    assert _losses(recipe, tmp_path / "gpu") == pytest.approx(ours, abs=0.02)
    assert called == {(-1, 0)}
