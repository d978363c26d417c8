"""Added tokens under every technique and in every decoder: the contract holds as it does without them."""

from __future__ import annotations

from typing import Any

import pytest

from tunesmith import registry
from tunesmith.testing import check

TASK = {"name": "text-generation", "add_tokens": ["it was", "was the film"], "general": "none"}
DECODERS = ("gpt2", "llama", "qwen2", "mistral", "gemma", "phi", "phi3")
CASES = [(technique, "llama") for technique in registry.names("technique") if technique != "bitfit"]
CASES += [("lora", family) for family in DECODERS if family != "llama"] + [("bitfit", "gpt2")]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's
@pytest.mark.parametrize(("technique", "family"), CASES)
def test_contract_with_added_tokens(technique: str, family: str) -> None:
    keys: dict[str, Any] = {"last_n_blocks": 1} if technique == "freeze" else {}
    check({"name": technique, **keys}, TASK, family)
