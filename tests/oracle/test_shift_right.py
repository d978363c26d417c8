"""`shift_right` against the decoder inputs of transformers' families."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tunesmith.tasks._translators import shift_right
from tunesmith.testing import FAMILIES, tiny_model

LABELS = torch.tensor([
    [5, 9, 8, 7, 3],
    [6, 3, -100, -100, -100],
    [4, 4, 4, 3, -100],
    [3, -100, -100, -100, -100],
])  # fmt: skip
"""Targets of unequal length with an end token, padded with -100."""


@pytest.mark.parametrize("family", ("t5", "bart", "marian", "mbart", "plbart"))
def test_decoders_read_what_transformers_gives_them(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, family, FAMILIES.get(family, FAMILIES["bart"]))
    model: Any = tiny_model(family, "AutoModelForSeq2SeqLM")
    given = LABELS.clone()
    ours = shift_right(model.config, given)
    assert torch.equal(given, LABELS), "labels stay as they are"
    assert torch.equal(ours, model.prepare_decoder_input_ids_from_labels(LABELS.clone()))


@pytest.mark.parametrize("family", ("t5", "bart", "marian", "mbart", "plbart"))
def test_one_row_alone_is_shifted_alike(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, family, FAMILIES.get(family, FAMILIES["bart"]))
    config = tiny_model(family, "AutoModelForSeq2SeqLM").config
    assert torch.equal(torch.cat([shift_right(config, row[None]) for row in LABELS]), shift_right(config, LABELS))
