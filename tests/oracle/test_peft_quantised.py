"""`bits` against PEFT over a base that transformers has quantized with bitsandbytes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from tunesmith.models import load, sources
from tunesmith.techniques.lora import Lora
from tunesmith.testing import tiny_model, tiny_tokenizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # warnings of third parties at import
    peft = pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT's
    pytest.mark.filterwarnings("ignore:Some matrices hidden dimension:UserWarning"),  # bitsandbytes'
]

CLASSIFIER, CAUSAL = "AutoModelForSequenceClassification", "AutoModelForCausalLM"
MODELS = (("bert", CLASSIFIER), ("llama", CLASSIFIER), ("llama", CAUSAL), ("distilbert", CLASSIFIER))
WIDE: dict[str, dict[str, int]] = {
    "bert": {"hidden_size": 64, "intermediate_size": 128},
    "llama": {"hidden_size": 64, "intermediate_size": 128},
    "distilbert": {"hidden_size": 64, "hidden_dim": 128},
}
"""Multiples of 64: for other widths the CPU kernel of bitsandbytes 0.50 uses wrong scales; ours passes flat rows."""

TOKENS = torch.tensor([[5, 9, 7, 11, 2], [6, 8, 3, 4, 2]])


def _answers(model: nn.Module) -> Tensor:
    """Return logits in training mode (without dropout), where bitsandbytes also multiplies with decoded weights."""
    return model.train()(input_ids=TOKENS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize(("family", "kind"), MODELS)
def test_peft_and_bitsandbytes_give_the_same_logits_and_gradients(
    family: str, kind: str, bits: int, tmp_path: Path
) -> None:
    tiny_model(family, kind, **WIDE[family]).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    source, technique = sources.resolve(str(tmp_path / "base")), Lora(bits=bits, target_modules="all-linear", r=4)
    model, anatomy = load.load_model(source, model_class=kind, config={}, seed=0)
    before = _answers(model).detach()
    technique.apply(model, anatomy, None)
    assert (_answers(model) - before).norm() > 1e-3 * before.norm()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    config = technique.adapter_config(model, anatomy) | {"base_model_name_or_path": ""}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    save_file(technique.adapter_tensors(model), tmp_path / "adapter" / "adapter_model.safetensors")
    kept = transformers.BitsAndBytesConfig(**technique.quantization(anatomy))
    base: Any = getattr(transformers, kind).from_pretrained(tmp_path / "base", quantization_config=kept)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    ours, reference = _answers(model), _answers(theirs)
    torch.testing.assert_close(ours, reference, atol=1e-4, rtol=1e-4)
    gradients = []
    for one, logits in ((model, ours), (theirs, reference)):
        logits.log_softmax(-1)[..., 0].sum().backward()
        gradients.append([p.grad for name, p in one.named_parameters() if "lora_A" in name])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for mine, judge in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, judge, atol=1e-4, rtol=1e-3)
