"""LoRA over a base in 4 or 8 bits: what is packed, what stays, how it is scored, shipped and merged."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

import tunesmith
from tunesmith.console import Console
from tunesmith.deploy import merge as merging
from tunesmith.kernels.ops.quantized import QuantizedLinear, QuantizedWeight
from tunesmith.models.anatomy import anatomy
from tunesmith.techniques.lora import Lora, LoraLinear
from tunesmith.testing import tiny_model, tiny_tokenizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # warnings of third parties at import
    pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT's
    pytest.mark.filterwarnings("ignore:Some matrices hidden dimension:UserWarning"),  # bitsandbytes'
]

CLASSIFIER = "AutoModelForSequenceClassification"
TOKENS = torch.tensor([[5, 9, 7, 11, 3], [6, 8, 13, 4, 3]])


def _applied(family: str, **keys: Any) -> tuple[Any, Any]:
    model = tiny_model(family, CLASSIFIER)
    map_ = anatomy(model)
    torch.manual_seed(0)
    Lora(**keys).apply(model, map_, None)
    return model, map_


def _answers(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=TOKENS).logits
    return found


@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("family", ("bert", "gpt2", "llama"))
def test_all_maps_of_the_blocks_are_packed_and_nothing_else(family: str, bits: int) -> None:
    model, map_ = _applied(family, bits=bits)
    packed = {
        path.removesuffix(".weight") for path, module in model.named_modules() if isinstance(module, QuantizedWeight)
    }
    assert packed == set(map_.targets("all-linear"))
    assert {path for path, m in model.named_modules() if isinstance(m, LoraLinear)} == set(
        map_.targets(["query", "value"])
    )
    plain: Any = tiny_model(family, CLASSIFIER)
    for path in packed:
        module, weight = model.get_submodule(path), plain.get_submodule(path).weight
        was = weight.t() if isinstance(plain.get_submodule(path), Conv1D) else weight
        assert 1e-4 < (module.weight.dequantized() - was).norm() / was.norm() < (0.12 if bits == 4 else 0.02)


@pytest.mark.parametrize("keys", ({"dora": True}, {"init": "pissa", "r": 4}, {"rslora": True}), ids=str)
@pytest.mark.parametrize("family", ("bert", "gpt2"))
def test_its_kin_start_as_the_packed_base(family: str, keys: dict[str, Any]) -> None:
    plain, _ = _applied(family, bits=8)
    model, _ = _applied(family, bits=8, **keys)
    torch.testing.assert_close(_answers(model), _answers(plain), atol=5e-2 if "dora" in keys else 1e-5, rtol=1e-2)


@pytest.mark.parametrize("family", ("bert", "gpt2", "llama"))
def test_merged_in_place_it_answers_as_it_did(family: str) -> None:
    model, _ = _applied(family, bits=4, target_modules="all-linear")
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoraLinear):
                module.lora_B.weight.normal_(std=0.1)
    before = _answers(model)
    Lora(bits=4).merge(model)
    torch.testing.assert_close(_answers(model), before, atol=1e-4, rtol=1e-4)
    assert not any(isinstance(module, QuantizedWeight | QuantizedLinear | LoraLinear) for module in model.modules())
    assert sum(isinstance(module, Conv1D) for module in model.modules()) == (12 if family == "gpt2" else 0)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model whose weights have rows of 64, which bitsandbytes decodes correctly."""
    folder = tmp_path_factory.mktemp("models") / "bert"
    tiny_model("bert", "AutoModelForMaskedLM", hidden_size=64, intermediate_size=128).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(bert: Path, reviews_csv: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("runs") / "bits"
    given = {
        "task": "text-classification",
        "model": str(bert),
        "data": {"train": str(reviews_csv), "validation": 0.2, "test": 0.2},
        "technique": {"name": "lora", "bits": 4},
        "train": {"max_steps": 8, "batch_size": 8, "device": "cpu", "learning_rate": 5e-3},
        "output": str(folder),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_HOME", str(folder.parent / "home"))
        return folder, tunesmith.train(given, console=Console(level=-1))


def test_what_is_scored_is_the_adapter_over_the_packed_base(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, result = trained
    assert tunesmith.evaluate(folder)["metrics"] == result["metrics"]["test"]
    assert any(isinstance(module, QuantizedWeight) for module in tunesmith.load(folder).model.modules())
    sizes = [p.numel() for p in tiny_model("bert", CLASSIFIER, hidden_size=64, intermediate_size=128).parameters()]
    assert result["total_parameters"] - result["trainable_parameters"] < sum(sizes) < result["total_parameters"]
    learned = json.loads((folder / "run.json").read_text())["learned"]
    assert not [name for name in learned if "codes" in name or "scales" in name]


def test_the_lines_of_the_card_load_it_over_the_same_bits(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = trained
    text = (folder / "README.md").read_text(encoding="utf-8")
    ours, plain = re.findall(r"^```python\n(.*?)^```$", text, re.S | re.M)
    assert "quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4'" in plain
    first: dict[str, Any] = {"print": lambda *_: None}
    second: dict[str, Any] = {}
    exec(ours, first)
    exec(plain, second)
    with torch.no_grad():
        theirs = second["model"].train()(input_ids=TOKENS).logits
    torch.testing.assert_close(theirs, _answers(first["model"].model), atol=1e-4, rtol=1e-4)


def test_a_merge_adds_to_the_stored_weights(trained: tuple[Path, dict[str, Any]], bert: Path) -> None:
    folder, _ = trained
    merging.merge_adapter(folder)
    merged, base = (load_file(path / "model.safetensors") for path in (folder / "model", bert))
    held = load_file(folder / "adapter" / "adapter_model.safetensors")
    name = "bert.encoder.layer.0.attention.self.query"
    A, B = (held[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
    torch.testing.assert_close(merged[f"{name}.weight"], base[f"{name}.weight"] + 2 * B @ A, atol=1e-6, rtol=1e-5)
    untouched = "bert.encoder.layer.0.intermediate.dense.weight"
    assert torch.equal(merged[untouched], base[untouched])
