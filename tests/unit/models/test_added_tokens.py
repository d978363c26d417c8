"""Added tokens have separate rows: only these are trained, and a merge gives a plain model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

from tunesmith.errors import RecipeError
from tunesmith.models import added_tokens
from tunesmith.models.anatomy import anatomy
from tunesmith.testing import tiny_model, tiny_tokenizer

CAUSAL, SEQ2SEQ, MASKED = "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM"
MODELS = (
    ("llama", CAUSAL, True), ("llama", CAUSAL, False), ("gpt2", CAUSAL, True), ("gemma", CAUSAL, True),
    ("phi", CAUSAL, False), ("t5", SEQ2SEQ, True), ("bart", SEQ2SEQ, True), ("bert", MASKED, True),
    ("distilbert", "AutoModelForSequenceClassification", None),
)  # fmt: skip
TOKENS = ("greatly", "<mark>")


def _model(family: str, kind: str, tied: bool | None, seed: int = 0) -> Any:
    given = {} if tied is None else {"tie_word_embeddings": tied}
    return tiny_model(family, kind, seed=seed, **given)


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits
    return found


@pytest.fixture(params=("beyond", "within"))
def added(request: pytest.FixtureRequest) -> range:
    """Ids beyond the embedding, and ids inside it (an embedding padded to a round size)."""
    return range(64, 66) if request.param == "beyond" else range(60, 62)


@pytest.mark.parametrize(("family", "kind", "tied"), MODELS)
def test_old_tokens_answer_as_before_and_folding_changes_nothing(
    family: str, kind: str, tied: bool | None, added: range
) -> None:
    plain, model = _model(family, kind, tied), _model(family, kind, tied)
    added_tokens.extend(model, added)
    old = torch.arange(3, 60)[None]
    before, after = _logits(plain, old), _logits(model, old)
    if before.shape[-1] >= 64:
        assert torch.allclose(after[..., : added.start], before[..., : added.start], atol=1e-6)
        assert after.shape[-1] == max(64, added.stop) and torch.isfinite(after).all()
    rows = [p for name, p in model.named_parameters() if name in anatomy(model).added]
    assert len(rows) == (2 if tied is False else 1)
    table = plain.get_input_embeddings().weight
    assert torch.allclose(rows[0], table[: added.start].mean(0).repeat(2, 1), atol=1e-6)
    with torch.no_grad():
        for number, row in enumerate(rows):
            row.add_(torch.randn(row.shape, generator=torch.Generator().manual_seed(number)))
    asked = torch.tensor([[5, added.start, 7, added.start + 1, 9, added.start]])
    expected = _logits(model, asked)
    folded = copy.deepcopy(model)
    added_tokens.fold(folded)
    assert torch.allclose(_logits(folded, asked), expected, atol=1e-5)
    assert {type(module) for module in folded.modules()} == {type(module) for module in plain.modules()}
    assert {name for name, _ in folded.named_parameters()} == {name for name, _ in plain.named_parameters()}
    assert folded.config.vocab_size == folded.get_input_embeddings().num_embeddings == max(64, added.stop)
    if tied:
        assert folded.get_output_embeddings().weight is folded.get_input_embeddings().weight


@pytest.mark.parametrize(("family", "kind", "tied"), MODELS)
def test_transformers_loads_what_was_folded(family: str, kind: str, tied: bool | None, tmp_path: Any) -> None:
    model = _model(family, kind, tied)
    added_tokens.extend(model, range(64, 67))
    asked = torch.tensor([[5, 64, 7, 66, 9, 65]])
    expected = _logits(model, asked)
    added_tokens.fold(model)
    model.save_pretrained(tmp_path)
    assert torch.allclose(_logits(getattr(transformers, kind).from_pretrained(tmp_path), asked), expected, atol=1e-5)


def test_only_the_rows_learn_where_the_table_is_frozen() -> None:
    model = _model("llama", CAUSAL, True)
    added_tokens.extend(model, range(64, 66))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in anatomy(model).always_trainable)
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learns == {"model.embed_tokens.added"}
    model(input_ids=torch.tensor([[5, 64, 7]])).logits.log_softmax(-1)[0, :, 65].sum().backward()
    grad = model.model.embed_tokens.added.grad
    assert grad[0].abs().sum() > 0 and grad[1].abs().sum() > 0, "one is read and both are written"


def test_a_scaled_embedding_scales_new_rows_too() -> None:
    config = transformers.CONFIG_MAPPING["gemma3_text"](
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=64, pad_token_id=0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    added_tokens.extend(model, range(64, 65))
    expected = _logits(model, torch.tensor([[5, 64, 7]]))
    added_tokens.fold(model)
    assert torch.allclose(_logits(model, torch.tensor([[5, 64, 7]])), expected, atol=1e-5)
    assert model.get_input_embeddings().embed_scale == 32**0.5


def test_the_tokenizer_reads_each_as_one() -> None:
    tokenizer = tiny_tokenizer()
    size = len(tokenizer)
    added_tokens.add(tokenizer, TOKENS)
    assert added_tokens.ids(tokenizer, TOKENS) == range(size, size + 2)
    assert tokenizer.tokenize("it was greatly <mark> good") == ["it", "was", "greatly", "<mark>", "[UNK]"]
    assert added_tokens.ids(tokenizer, ()) == added_tokens.ids(tokenizer, ("no", "such")) == range(0)
    assert added_tokens.ids(tokenizer, TOKENS[::-1]) == range(0), "in their order"


@pytest.mark.parametrize(
    ("tokens", "said"),
    (
        (["great"], "'great'"),
        (["new", "great"], "'great'"),
        (["new", "new"], "'new'"),
        ([" new"], "' new'"),
        ([""], "''"),
    ),
)
def test_what_cannot_be_added_is_refused(tokens: list[str], said: str) -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(RecipeError, match=f"task.add_tokens: ({said})"):
        added_tokens.add(tokenizer, tokens)
    assert len(tokenizer) == len(tiny_tokenizer())


def test_a_tokenizer_that_is_already_too_large_is_refused() -> None:
    with pytest.raises(RecipeError, match="tokenizer .*70 tokens.*embedding .*64"):
        added_tokens.extend(_model("llama", CAUSAL, True), range(70, 71))


def test_two_vocabularies_are_refused() -> None:
    model = tiny_model("bart", SEQ2SEQ)
    model.model.decoder.embed_tokens.weight = torch.nn.Parameter(model.model.decoder.embed_tokens.weight.clone())
    with pytest.raises(RecipeError, match="task.add_tokens: "):
        added_tokens.extend(model, range(64, 65))
