from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from adapting import trainable
from pydantic import ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from tunesmith import registry
from tunesmith.errors import CheckpointError, RecipeError
from tunesmith.models.anatomy import anatomy
from tunesmith.techniques.prompt import LEARNING_RATE, Prompt
from tunesmith.testing import CLASSIFYING, tiny_model, tiny_tokenizer

CLASSIFIER, TOKEN_CLASSIFIER = "AutoModelForSequenceClassification", "AutoModelForTokenClassification"
TOKENIZER = tiny_tokenizer()
CLS = TOKENIZER.cls_token_id
TOKENS = torch.tensor([[CLS, 9, 7, 11, 3], [CLS, 8, 13, 4, 3]])
DECODERS = ("gpt2", "llama", "qwen2", "mistral", "gemma", "phi", "phi3")
ENCODER_DECODERS = ("t5", "bart")
N = 4


def prompted(family: str, kind: str = CLASSIFIER, **config: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return an adapted model and its base."""
    base, model = (tiny_model(family, kind, **config) for _ in range(2))
    torch.manual_seed(0)
    Prompt(num_virtual_tokens=N).apply(model, anatomy(model), TOKENIZER)
    return model, base


def vectors(model: Any) -> Tensor:
    found: Tensor = model.get_input_embeddings().prompt.weight
    return found


def test_the_registry_knows_it_by_its_file() -> None:
    assert registry.get("technique", "prompt") is Prompt


@pytest.mark.parametrize("family", CLASSIFYING)
def test_n_vectors_and_the_head_learn(family: str) -> None:
    model, base = prompted(family)
    found = anatomy(base)
    (prompt,) = trainable(model) - found.always_trainable
    assert trainable(model) == {prompt} | found.always_trainable
    width = base.get_input_embeddings().weight.shape[1]
    assert model.get_parameter(prompt).shape == (N, width) and width == (16 if family in ("albert", "electra") else 32)
    assert set(dict(model.named_parameters())) - set(dict(base.named_parameters())) == {prompt}


@pytest.mark.parametrize("family", CLASSIFYING)
def test_they_start_as_tokens_of_the_vocabulary(family: str) -> None:
    model, base = prompted(family)
    with torch.no_grad():
        known = base.get_input_embeddings()(torch.arange(len(TOKENIZER)))
    assert (vectors(model)[:, None] == known).all(-1).any(-1).all()


def test_a_text_is_repeated_or_cut() -> None:
    model = tiny_model("bert", CLASSIFIER)
    words = TOKENIZER("great or bad", add_special_tokens=False)["input_ids"]
    assert len(words) == 3
    Prompt(num_virtual_tokens=5, init_text="great or bad").apply(model, anatomy(model), TOKENIZER)
    expected = model.get_input_embeddings().weight[[*words, *words[:2]]]
    assert torch.equal(vectors(model), expected)
    model = tiny_model("bert", CLASSIFIER)
    Prompt(num_virtual_tokens=2, init_text="great or bad").apply(model, anatomy(model), TOKENIZER)
    assert torch.equal(vectors(model), expected[:2])


def test_what_a_model_multiplies_after_looking_it_up_stays_multiplied() -> None:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 64, "scale_embedding": True}
    more = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    config = transformers.MarianConfig(**sizes, **more, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config).eval()
    entered: list[Tensor] = []
    model.model.encoder.layers[0].register_forward_pre_hook(lambda _, args: entered.append(args[0].detach()))
    positions = model.model.encoder.embed_positions(torch.Size([2, 2 + 5]))
    asked = {"input_ids": TOKENS, "decoder_input_ids": torch.tensor([[0], [0]])}
    model(**asked)
    (word,) = TOKENIZER("great", add_special_tokens=False)["input_ids"]
    technique = Prompt(num_virtual_tokens=2, init_text="great")
    parts = anatomy(model)
    technique.apply(model, parts, TOKENIZER)
    expected = model.get_input_embeddings().weight[word] * 4
    assert torch.equal(vectors(model), torch.stack([expected, expected]))
    model(**asked)
    torch.testing.assert_close(entered[1][:, 2:] - positions[2:], entered[0] - positions[:5], atol=1e-6, rtol=0)
    assert technique.adapter_config(model, parts)["peft_type"] == "TUNESMITH_PROMPT", "PEFT does not multiply"


def body_of(model: Any) -> Any:
    return getattr(model, model.base_model_prefix)


@torch.no_grad()
def test_an_encoder_is_given_first_token_vectors_text() -> None:
    """The output is the base's for x_1 p x_1 ... x_T, without the outputs of p and of the second x_1."""
    model, base = prompted("bert", TOKEN_CLASSIFIER, num_labels=3)
    embedded = base.get_input_embeddings()(TOKENS)
    between = vectors(model).expand(2, -1, -1)
    states = base.bert(inputs_embeds=torch.cat([embedded[:, :1], between, embedded], 1)).last_hidden_state
    expected = base.classifier(torch.cat([states[:, :1], states[:, N + 2 :]], 1))
    out = model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS), output_hidden_states=True)
    torch.testing.assert_close(out.logits, expected)
    assert out.logits.shape == (2, 5, 3), "one for each token of the text"


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_decoder_is_given_vectors_text(family: str) -> None:
    model, base = prompted(family, TOKEN_CLASSIFIER, num_labels=3)
    embedded = base.get_input_embeddings()(TOKENS)
    states = body_of(base)(inputs_embeds=torch.cat([vectors(model).expand(2, -1, -1), embedded], 1)).last_hidden_state
    found = model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits
    head = base.classifier if family == "gpt2" else base.score
    torch.testing.assert_close(found, head(states[:, N:]))
    assert found.shape == (2, 5, 3)


@torch.no_grad()
@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_an_encoder_decoder_reads_them_in_the_encoder_and_answers_for_the_text(family: str) -> None:
    model, base = prompted(family, "AutoModelForSeq2SeqLM")
    asked = {"decoder_input_ids": torch.tensor([[0, 7, 9], [0, 4, 6]])}
    embedded = torch.cat([vectors(model).expand(2, -1, -1), base.get_input_embeddings()(TOKENS)], 1)
    mask = torch.ones(2, N + 5, dtype=torch.long)
    expected = base(inputs_embeds=embedded, attention_mask=mask, **asked).logits
    found = model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS), **asked).logits
    torch.testing.assert_close(found, expected)
    assert found.shape == (2, 3, 64)


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "modernbert", "electra", "albert", "deberta-v2"])
def test_one_output_for_each_token_of_a_text(family: str) -> None:
    model, base = prompted(family, TOKEN_CLASSIFIER, num_labels=3)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    found, plain = (one(input_ids=TOKENS, attention_mask=mask).logits for one in (model, base))
    assert found.shape == plain.shape == (2, 5, 3)
    assert (found[mask.bool()] - plain[mask.bool()]).abs().max() > 1e-4, "the vectors are seen by attention"
    hidden = model(input_ids=TOKENS, attention_mask=mask, output_hidden_states=True).hidden_states
    assert hidden is None or {states.shape[1] for states in hidden} <= {5, 5 + N + 1}


@torch.no_grad()
def test_the_pooler_reads_the_real_first_token() -> None:
    """The state of the first token differs from the base's only through attention."""
    model, base = prompted("bert")
    entered: dict[str, Tensor] = {}
    for name, one in (("ours", model), ("base", base)):
        one.bert.encoder.layer[0].register_forward_pre_hook(lambda _, args, name=name: entered.update({name: args[0]}))
        one.bert.pooler.register_forward_pre_hook(
            lambda _, args, name=name: entered.update({f"{name} pooled": args[0]})
        )
    model(input_ids=TOKENS), base(input_ids=TOKENS)
    assert torch.equal(entered["ours"][:, 0], entered["base"][:, 0]), "[CLS] at position 0"
    assert entered["ours"].shape == (2, 5 + N + 1, 32)
    assert not torch.allclose(entered["ours pooled"][:, 0], entered["base pooled"][:, 0], atol=1e-3)
    for layer in (*model.bert.encoder.layer, *base.bert.encoder.layer):  # values of zero: attention brings nothing
        layer.attention.self.value.weight.zero_()
        layer.attention.self.value.bias.zero_()
    model(input_ids=TOKENS), base(input_ids=TOKENS)
    torch.testing.assert_close(entered["ours pooled"][:, 0], entered["base pooled"][:, 0])


@torch.no_grad()
@pytest.mark.parametrize("family", CLASSIFYING)
def test_padding_on_the_right_changes_nothing(family: str) -> None:
    model, _ = prompted(family, num_labels=3)
    short, long = [CLS, 9, 7, 3], [CLS, 8, 13, 4, 11, 6, 3]
    alone = model(input_ids=torch.tensor([short]), attention_mask=torch.ones(1, 4, dtype=torch.long)).logits[0]
    ids = torch.tensor([short + [0] * 3, long])
    together = model(input_ids=ids, attention_mask=(ids != 0).long()).logits[0]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_token_types_and_positional_words_are_understood() -> None:
    model, _ = prompted("bert")
    types = torch.tensor([[0, 0, 1, 1, 1]] * 2)
    mask = torch.ones_like(TOKENS)
    by_name = model.bert(input_ids=TOKENS, attention_mask=mask, token_type_ids=types)[0]
    assert torch.equal(model.bert(TOKENS, mask, types)[0], by_name)
    assert torch.equal(model.bert(TOKENS, mask, types, return_dict=False)[0], by_name)
    assert not torch.equal(model.bert(TOKENS, mask)[0], by_name)
    embedded = model.get_input_embeddings()(TOKENS)
    assert torch.equal(model.bert(inputs_embeds=embedded, attention_mask=mask, token_type_ids=types)[0], by_name)


def test_gradients_reach_the_vectors_and_stop_there() -> None:
    model, _ = prompted("gpt2")
    model(input_ids=TOKENS).logits.sum().backward()
    grad = vectors(model).grad
    assert grad is not None and bool((grad.abs().sum(1) > 0).all())
    assert model.get_input_embeddings().weight.grad is None


def test_it_takes_positions_from_the_text() -> None:
    assert Prompt(num_virtual_tokens=7).virtual_tokens == 8, "with the repeated first token"


@pytest.mark.parametrize(("family", "more"), [("bert", 1), ("gpt2", 0), ("t5", 0)])
def test_what_is_saved_is_what_was_learned(family: str, more: int) -> None:
    """Any number of vectors is loaded; an encoder's first row is its first token."""
    model, base = prompted(family)
    with torch.no_grad():
        vectors(model).normal_()
    technique = Prompt(num_virtual_tokens=N)
    tensors = technique.adapter_tensors(model)
    assert tensors["prompt_embeddings"].shape == (N + more, 32)
    other = Prompt(num_virtual_tokens=2)
    other.apply(base, anatomy(base), TOKENIZER)
    other.load_adapter(base, tensors)
    assert torch.equal(base(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)
    assert vectors(base).requires_grad
    config = technique.adapter_config(model, anatomy(tiny_model(family, CLASSIFIER)))
    assert config["num_virtual_tokens"] == N + more and config["token_dim"] == 32
    assert config["peft_type"] == ("TUNESMITH_PROMPT" if family == "t5" else "PROMPT_TUNING")


def test_an_adapter_that_does_not_fit_is_refused() -> None:
    model, _ = prompted("bert")
    technique = Prompt(num_virtual_tokens=N)
    tensors = technique.adapter_tensors(model)
    with pytest.raises(CheckpointError, match="16.*32"):
        technique.load_adapter(model, tensors | {"prompt_embeddings": torch.zeros(5, 16)})
    without_head = {"prompt_embeddings": tensors["prompt_embeddings"]}
    with pytest.raises(CheckpointError, match="2 of 3 "):
        technique.load_adapter(model, without_head)
    with pytest.raises(CheckpointError, match="prompt_embeddings"):
        technique.load_adapter(model, {name: value for name, value in tensors.items() if name != "prompt_embeddings"})


def test_it_cannot_be_merged_and_says_why() -> None:
    with pytest.raises(RecipeError, match=Prompt.cannot_merge):
        Prompt().merge(prompted("bert")[0])


def test_a_text_that_leaves_no_token_is_refused() -> None:
    model = tiny_model("bert", CLASSIFIER)
    with pytest.raises(RecipeError) as caught:
        Prompt(init_text=" ").apply(model, anatomy(model), TOKENIZER)
    assert caught.value.where == "technique.init_text"


def test_an_encoder_whose_texts_begin_with_no_token_of_its_own_is_refused() -> None:
    model, plain = tiny_model("bert", CLASSIFIER), tiny_tokenizer()
    plain.cls_token = None
    with pytest.raises(RecipeError, match="technique=prefix"):
        Prompt().apply(model, anatomy(model), plain)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"init_text": ""}, "at least 1 character"),
        ({"num_virtual_tokens": 0}, "greater than or equal to 1"),
        ({"tokens": 3}, "Extra inputs"),
    ],
)
def test_what_is_no_setting_is_refused(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Prompt(**keys)


def test_the_rate_is_the_same_for_every_width() -> None:
    rates = {Prompt().learning_rate(anatomy(tiny_model("bert", CLASSIFIER, hidden_size=width))) for width in (32, 64)}
    assert rates == {LEARNING_RATE}
