from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from bench.floor import K, M, Model, N, Row, product_rate
from tunesmith.models.anatomy import anatomy
from tunesmith.techniques.freeze import Freeze
from tunesmith.techniques.full import Full
from tunesmith.techniques.lora import Lora

SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
CLASSIFIED = [Row(read=5, written=0, losses=1)]


def _bert(technique: Any) -> Model:
    """A block has query, key, value, output of 64 each, 128 up, 128 down; then a pooler of 64, a classifier of 16."""
    config = transformers.BertConfig(vocab_size=20, max_position_embeddings=16, **SIZES)
    model = transformers.BertForSequenceClassification(config)
    found = anatomy(model)
    technique.apply(model, found, None)
    return Model(model, found, 0)


ATTENTION = 2 * 8 * (5 * 5 + 1 * 5)
"""Two products of width 8 for each pair of tokens; in the last block only [CLS] is a query."""


def test_of_full_fine_tuning_every_map_is_passed_thrice() -> None:
    first, last, head = 512 * 5, 128 * 5 + 384 * 1, 64 + 16  # the last block: keys and values everywhere, else [CLS]
    assert _bert(Full()).multiply_adds(CLASSIFIED, epochs=2) == 2 * 3 * (first + last + head + ATTENTION)


def test_of_lora_nothing_is_passed_back_below_the_lowest_block() -> None:
    first = 192 * 5 + 2 * 320 * 5  # no trainable parameter before the first query, key and value
    last, head = 2 * (128 * 5 + 384), 2 * 64 + 3 * 16
    a, b = 16, 16  # rank 2, on query and value
    first_lora = 2 * 5 * (2 * a + 3 * b)
    last_lora = (1 + 5) * (3 * a + 3 * b)
    expected = 2 * (first + last + head + first_lora + last_lora + 3 * ATTENTION)
    assert _bert(Lora(r=2)).multiply_adds(CLASSIFIED, epochs=2) == expected


def test_of_a_head_alone_the_frozen_part_is_passed_once() -> None:
    body, head = 512 * 5 + 128 * 5 + 384 + 64 + ATTENTION, 2 * 16
    for epochs in (1, 10):
        assert _bert(Freeze(head_only=True)).multiply_adds(CLASSIFIED, epochs) == body + epochs * head


def test_of_the_last_block_alone_what_is_below_is_passed_once() -> None:
    below = 512 * 5 + 2 * 8 * 25
    last = 2 * (128 * 5 + 64) + 3 * 320 + 3 * 2 * 8 * 5  # query, key and value need no gradient of their input
    head = 3 * (64 + 16)
    assert _bert(Freeze(last_n_blocks=1)).multiply_adds(CLASSIFIED, epochs=4) == below + 4 * (last + head)


def test_of_a_decoder_the_vocabulary_counts_where_a_loss_is() -> None:
    config = transformers.LlamaConfig(vocab_size=50, num_key_value_heads=1, **SIZES)
    model = transformers.LlamaForCausalLM(config)
    found = anatomy(model)
    Full().apply(model, found, None)
    first = (2 * 64 + 2 * 32 + 3 * 128) * 6
    last = 2 * 32 * 6 + (2 * 64 + 3 * 128) * 2
    pairs = 6 * 7 // 2 + (5 + 6)  # each token sees itself and those before; the last two carry loss
    expected = 3 * (first + last + 50 * 8 * 2 + 2 * 8 * pairs)
    assert Model(model, found, 0).multiply_adds([Row(read=6, written=0, losses=2)], epochs=1) == expected


def test_of_two_stacks_the_decoder_reads_keys_and_values_of_the_source() -> None:
    config = transformers.MarianConfig(
        vocab_size=50,
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        pad_token_id=0,
        max_position_embeddings=16,
    )
    model = transformers.MarianMTModel(config)
    found = anatomy(model)
    Full().apply(model, found, None)
    encoder, own, across = 512 * 4, 256 * 3, 128 * 3 + 128 * 4
    decoder = own + across + 256 * 3 + 50 * 8 * 3
    pairs = 4 * 4 + 3 * 4 // 2 + 3 * 4
    expected = 3 * (encoder + decoder + 2 * 8 * pairs)
    assert Model(model, found, 0).multiply_adds([Row(read=4, written=3, losses=3)], epochs=1) == expected


def test_the_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.floor.SECONDS", 0.0)
    rate = product_rate(torch.device("cpu"), torch.float32)
    assert 1e8 < rate < 1e15 and (M, K, N) == (2048, 768, 3072)
