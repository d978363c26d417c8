"""What is faster is the same: 50 losses in fp32 without dropout, with the blocks of the model and with ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tunesmith import prepare, run
from tunesmith.talk import Talk
from tunesmith.techniques.lora import LoraLinear
from tunesmith.testing import MADE_UP, tiny_model, tiny_tokenizer

TRIALS: list[tuple[str, str, Any]] = [
    ("bert", "text-classification", "full"),
    ("bert", "text-classification", {"name": "lora", "target_modules": "all-linear"}),
    ("distilbert", "token-classification", "lora"),
    ("roberta", "text-classification", {"name": "prefix", "num_virtual_tokens": 4}),
    ("llama", "text-classification", "lora"),
    ("llama", "token-classification", "full"),
    ("gpt2", "text-classification", "lora"),
]


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
    tiny_model(family, "AutoModel", **without).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    rows = "".join(json.dumps(MADE_UP[task](number)) + "\n" for number in range(64))
    (tmp_path / "train.jsonl").write_text(rows)
    recipe = {
        "task": task,
        "model": str(tmp_path / "base"),
        "technique": technique,
        "data": {"train": str(tmp_path / "train.jsonl"), "validation": None},
        "train": {"max_steps": 50, "batch_size": 8, "precision": "fp32", "device": "cpu", "learning_rate": 3e-3},
    }

    def losses(name: str) -> list[float]:
        run.train(recipe, output=str(tmp_path / name), talk=Talk(level=-1))
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return [line["loss"] for line in lines if "grad_norm" in line]

    ours = losses("ours")
    monkeypatch.setattr(prepare, "use_padding_free_blocks", lambda *_: False)
    monkeypatch.setattr(prepare, "use_chunked_loss", lambda *_: False)
    monkeypatch.setattr(LoraLinear, "part", lambda *_: None)
    assert len(ours) == 50 and ours == pytest.approx(losses("plain"), abs=1e-5)
