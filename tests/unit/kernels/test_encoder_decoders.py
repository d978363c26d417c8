"""Encoder-decoders give equal outputs and gradients with and without padding."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import transformers
from accelerating import accelerated, unpadded
from adapting import TECHNIQUES, adapt
from torch import Tensor

from tunesmith import registry
from tunesmith.kernels import block_pattern
from tunesmith.kernels import unpadded as unpadded_module
from tunesmith.kernels.fast_path import fast_path
from tunesmith.kernels.fused_blocks import PostNorm, PreNorm
from tunesmith.models.anatomy import anatomy
from tunesmith.testing import tiny_model, tiny_tokenizer

LENGTHS = (([12, 3, 7, 7, 1], [2, 9, 7, 1, 5]), ([5, 5, 5], [5, 5, 5]), ([9], [4]), ([1, 2, 3, 40], [3, 8, 8, 8]))
"""Lengths of sources and of targets."""
SIZES = {
    "vocab_size": 64,
    "d_model": 32,
    **{
        f"{side}_{what}": n
        for side in ("encoder", "decoder")
        for what, n in {"layers": 2, "attention_heads": 4}.items()
    },
    **{"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "init_std": 0.2, "pad_token_id": 0, "eos_token_id": 3},
    **{"max_position_embeddings": 64, "decoder_start_token_id": 0, "forced_bos_token_id": None},
}
OF_T5 = {"num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 64, "dropout_rate": 0.0}
OF_T5 |= {"relative_attention_num_buckets": 12, "relative_attention_max_distance": 20}
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}


def _model(family: str, **more: Any) -> Any:
    settings = NO_DROPOUT | {"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}
    settings = (OF_T5 if family.endswith("t5") else settings) | more
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **(SIZES | settings))
    model = transformers.AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager")
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.2)
    return model


def _batch(read: list[int], written: list[int]) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(len(read))
    masks = [(torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long() for lengths in (read, written)]
    ids = [torch.randint(4, 64, mask.shape, generator=drawn) * mask for mask in masks]
    names = ("input_ids", "decoder_input_ids"), ("attention_mask", "decoder_attention_mask")
    return dict(zip(names[0], ids, strict=True)) | dict(zip(names[1], masks, strict=True))


def _answers_and_gradients(model: Any, lengths: tuple[list[int], list[int]]) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    batch = _batch(*lengths)
    logits = model(**batch).logits * batch["decoder_attention_mask"][:, :, None]
    logits.square().sum().backward()
    return logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _fused(model: Any) -> bool:
    return accelerated(model).statuses["fused_blocks"].blocks == anatomy(model).blocks


def _same(model: Any, padded: list[tuple[Tensor, Tensor]]) -> None:
    for lengths, (answers, gradients) in zip(LENGTHS, padded, strict=True):
        ours = _answers_and_gradients(model, lengths)
        torch.testing.assert_close(ours[0], answers, atol=2e-5, rtol=2e-5)
        assert torch.dist(ours[1], gradients) < 1e-5 * gradients.norm()


def test_no_dropout_may_be_written_as_a_whole_number() -> None:
    none = dict.fromkeys(("dropout", "activation_dropout", "attention_dropout"), 0)
    assert _fused(tiny_model("marian", "AutoModelForSeq2SeqLM", **none))


CASES = [*itertools.product(("marian", "bart", "mbart", "m2m_100"), TECHNIQUES)]
CASES += itertools.product(("t5", "mt5"), [name for name in TECHNIQUES if name not in ("bitfit", "prefix")])
"""T5 has no biases, and its distances include virtual tokens: with a prefix it keeps its padding."""


@pytest.mark.parametrize(("family", "technique"), CASES)
def test_answers_and_gradients_are_those_of_the_padded_model(family: str, technique: str) -> None:
    model = _model(family)
    adapt(model, technique)
    padded = [_answers_and_gradients(model, lengths) for lengths in LENGTHS]
    path = unpadded(model)
    _same(model, padded)
    path.undo()
    assert _fused(model)
    _same(model, padded)


def test_a_prefix_of_t5_keeps_its_padding() -> None:
    model = _model("t5")
    adapt(model, "prefix")
    padded = [_answers_and_gradients(model, lengths) for lengths in LENGTHS]
    assert not accelerated(model).statuses["unpadded"].on
    _same(model, padded)


def test_blocks_of_both_stacks_see_valid_tokens_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = _model("marian"), list[tuple[int, int]]()
    assert _fused(model)
    attended = block_pattern.AttentionPart.__call__

    def watched(self: Any, asked: Tensor, x: Tensor, *args: Any) -> Tensor:
        seen.append((len(asked), len(x)))
        return attended(self, asked, x, *args)

    monkeypatch.setattr(block_pattern.AttentionPart, "__call__", watched)
    with torch.no_grad():
        model(**_batch([30, 1, 2], [4, 24, 20]))
    assert seen == [(64, 64)] * 2 + [(64, 64), (64, 64)] * 2, "33 tokens and 48, rounded up to 64 each"
    seen.clear()
    with torch.no_grad():
        model(**_batch([30, 1, 1], [4, 24, 20]))
    assert seen == [(32, 32)] * 2 + [(64, 64), (64, 32)] * 2


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_classifier_on_both_answers_as_before(family: str) -> None:
    model: Any = tiny_model(family, "AutoModelForSequenceClassification", num_labels=3)
    batch = {name: value for name, value in _batch([12, 3, 7], [1, 1, 1]).items() if "decoder" not in name}
    batch["input_ids"][torch.arange(3), torch.tensor([11, 2, 6])] = 3
    expected = model(**batch).logits
    assert _fused(model)
    torch.testing.assert_close(model(**batch).logits, expected, atol=2e-5, rtol=2e-5)


def test_norms_before_and_after_are_told_by_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: dict[str, set[type]] = {}
    for family in ("bart", "mbart"):
        model, ways = _model(family), list[Any]()
        for kind in (PostNorm, PreNorm):
            monkeypatch.setattr(kind, "__init__", _noted(kind.__init__, ways))
        assert _fused(model)
        monkeypatch.undo()
        model(**_batch([3, 2], [1, 2]))
        kinds[family] = {type(way) for way in ways[-4:]}
    assert kinds == {"bart": {PostNorm}, "mbart": {PreNorm}}


def _noted(init: Any, ways: list[Any]) -> Any:
    def noted(self: Any, *args: Any, **kwargs: Any) -> None:
        ways.append(self)
        init(self, *args, **kwargs)

    return noted


@pytest.mark.parametrize(
    ("family", "where"),
    [*itertools.product(("marian", "mbart"), NO_DROPOUT), ("t5", "dropout_rate"), ("mt5", "dropout_rate")],
)
def test_dropout_falls_where_the_model_has_it(family: str, where: str) -> None:
    """Mean and standard deviation of the outputs over draws equal those of the padded model."""
    model, found = _model(family, **{where: 0.3}), []
    batch = {name: one.repeat(800, 1) for name, one in _batch([5, 3], [2, 4]).items()}
    model.train()
    for taken in (False, True):
        if taken:
            assert _fused(model)
        torch.manual_seed(0)
        with torch.no_grad():
            drawn = model(**batch).logits[batch["decoder_attention_mask"] == 1].view(800, 6, -1)[:, :, 1:]
        assert not torch.equal(drawn[0], drawn[1])
        found.append((drawn.mean(0), drawn.std(0)))
    (mean, spread), (ours, our_spread) = found
    assert ((ours - mean).abs() < 5 * spread * (2 / 800) ** 0.5).all()
    assert ((our_spread / spread - 1).abs() < 0.25).all()


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("family", ["marian", "t5"])
def test_what_is_computed_again_in_the_backward_pass_is_the_same(family: str, fast: bool) -> None:
    model, found = _model(family, **{"dropout_rate" if family == "t5" else "attention_dropout": 0.2}), []
    assert _fused(model) if fast else unpadded(model)
    model.train()
    for checkpointing in (False, True):
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        torch.manual_seed(0)
        found.append(_answers_and_gradients(model, LENGTHS[0]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-5)


def test_long_texts_go_to_the_fused_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model("bart")
    padded = [_answers_and_gradients(model, lengths) for lengths in LENGTHS]
    monkeypatch.setattr(unpadded_module, "MAX_EXPLICIT_LENGTH", 0)
    unpadded(model)
    _same(model, padded)


@pytest.mark.parametrize("family", ["marian", "t5"])
def test_it_writes_as_it_did(family: str) -> None:
    model = _model(family).eval()
    batch = {name: value for name, value in _batch([7, 3], [1, 1]).items() if "decoder" not in name}
    how = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    expected = model.generate(**batch, **how)
    assert _fused(model)
    with fast_path(model).with_padding(model):
        assert torch.equal(model.generate(**batch, **how), expected)


def test_dropout_that_the_formula_has_no_place_for_keeps_a_block_its_own_way() -> None:
    model = _model("marian")
    model.get_submodule(anatomy(model).blocks[-1]).more = torch.nn.Dropout(0.1)
    assert not _fused(model)
    model = _model("marian")
    model.get_submodule(anatomy(model).blocks[-1]).more_dropout = 0.1
    assert not _fused(model)


def test_hooks_keep_a_block_its_own_way_where_it_would_not_call_them() -> None:
    for kind, taken in (("pfeiffer", False), ("parallel", True), ("houlsby", True)):
        model: Any = tiny_model("bert", "AutoModelForSequenceClassification", num_labels=3)
        technique: Any = registry.get("technique", "adapter")
        technique(kind=kind).apply(model, anatomy(model), tiny_tokenizer())
        assert _fused(model) == taken, kind
    model = tiny_model("bert", "AutoModelForSequenceClassification", num_labels=3)
    model.bert.encoder.layer[0].attention.register_forward_hook(lambda *_: None)
    assert not _fused(model)
