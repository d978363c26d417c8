"""What a third party needs to test its own task or technique: tiny random models, made-up rows, and the contract.

`check(technique, task, family)` holds a technique to all that its contract promises on one task and one family of
model; the matrix of what serves what is generated from it. Nothing here needs a network, a GPU or more than seconds.

    from tunesmith.testing import FAMILIES, check
    check({"name": "my-technique", "rank": 2}, "text-classification", "bert")
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tunesmith import recipe as recipes
from tunesmith.data.batches import Batch, Batches, Limits, collate
from tunesmith.data.encoded import Encoded, encode
from tunesmith.data.formats import Row
from tunesmith.deploy import artefact
from tunesmith.errors import RecipeError
from tunesmith.models import added_tokens
from tunesmith.models import load as models
from tunesmith.models.anatomy import LINEAR, Anatomy, anatomy
from tunesmith.recipe import Recipe
from tunesmith.tasks import Task
from tunesmith.techniques import Technique
from tunesmith.training import loop, optimizer
from tunesmith.training.machine import NEVER_CUT, Machine

__all__ = ["FAMILIES", "MADE_UP", "Case", "case", "check", "tiny_model", "tiny_tokenizer"]

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # at the usual 0.02 a random model answers nearly the same to everything
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SEQ2SEQ = {"eos_token_id": 3, "decoder_start_token_id": 0}
_BERT = {"intermediate_size": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_LLAMA = {"intermediate_size": 64, "num_key_value_heads": 2, "classifier_dropout": 0.0}
_DECODER = {
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "dropout": 0.0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "distilbert": {"hidden_dim": 64, "dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0},
    "modernbert": {"intermediate_size": 64, "cls_token_id": 1, "sep_token_id": 2, "initializer_cutoff_factor": 5.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "classifier_dropout": 0.0},
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "mistral": _LLAMA,
    "albert": _BERT | {"embedding_size": 16, "classifier_dropout_prob": 0.0},
    "electra": _BERT | {"embedding_size": 16},
    "deberta": _BERT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "pooler_dropout": 0.0},
    "deberta-v2": _BERT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "pooler_dropout": 0.0},
    "gemma": _LLAMA | {"head_dim": 8},
    "phi": _LLAMA | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0},
    "phi3": _LLAMA | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0},
    "t5": _SEQ2SEQ | {"d_kv": 8, "d_ff": 64, "dropout_rate": 0.0, "classifier_dropout": 0.0},
    "bart": _SEQ2SEQ | _DECODER,
    "marian": _SEQ2SEQ | _DECODER | {"forced_eos_token_id": 3},
}
"""Family (a config's `model_type`) -> what its tiny config says beside the sizes all share; no dropout."""

CLASSIFYING = tuple(family for family in FAMILIES if family != "marian")
"""The families of which transformers has a model that classifies texts."""

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_WORDS = "the film plot was and very acting story it this . ! a not so".split()
_ENDING = "##ly"
_GOOD, _BAD = "great lovely warm fine superb".split(), "bad dull poor cold awful".split()


def _review(number: int) -> dict[str, object]:
    word = (_BAD, _GOOD)[number % 2][number // 2 % 5]
    filler = " ".join(_WORDS[(number + k) % len(_WORDS)] for k in range(number % 7))
    return {"text": f"the film was {word} {filler}".strip(), "label": ("negative", "positive")[number % 2]}


def _document(number: int) -> dict[str, object]:
    reviews = [str(_review(number + k)["text"]) for k in range(2 + number % 4)]
    return {"text": " . ".join([*reviews, f"very {(_BAD, _GOOD)[number % 2][number % 5]}ly"])}


def _tagged(number: int) -> dict[str, object]:
    """A sentence in which one word of blame or two of praise stand among others."""
    kind, words = ("BLAME", "PRAISE")[number % 2], (_BAD, _GOOD)[number % 2]
    before = [_WORDS[(number + k) % len(_WORDS)] for k in range(number % 4)]
    marked = [words[(number // 2 + k) % len(words)] for k in range(1 + number % 2)]
    after = _WORDS[: number % 7]
    tags = [f"{'BI'[k]}-{kind}" for k in range(len(marked))]
    return {"tokens": [*before, *marked, *after], "label": ["O"] * len(before) + tags + ["O"] * len(after)}


def _asked(number: int) -> dict[str, object]:
    """What was good or bad, as a conversation of one or two turns whose answers repeat a word of the question."""
    words = (_BAD, _GOOD)[number % 2]
    turns = [
        (f"was the {_WORDS[1 + k]} {words[(number + k) % 5]}", f"it was {words[(number + k) % 5]}") for k in range(2)
    ]
    messages = [
        {"role": role, "content": text}
        for turn in turns[: 1 + number % 3 // 2]
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    return {"messages": messages}


def _pair(number: int) -> dict[str, object]:
    """A review, and the same words from behind, each as the one next to it in the vocabulary."""
    words = str(_review(number)["text"]).split()
    known = [*_WORDS, *_GOOD, *_BAD]
    return {"source": " ".join(words), "target": " ".join(known[known.index(word) - 1] for word in reversed(words))}


MADE_UP = {
    "fill-mask": _document,
    "text-classification": _review,
    "text-generation": _asked,
    "token-classification": _tagged,
    "translation": _pair,
}
"""Task -> the n-th of its made-up rows: of unequal length, and to be learned in a few steps."""

KEYS: dict[str, dict[str, object]] = {"translation": {"source_lang": "en", "target_lang": "de"}}
"""Task -> what a recipe must say of it that made-up rows do not."""


def tiny_model(family: str, model_class: str, *, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A random model of some 50,000 parameters, in eval mode, the same for the same seed; touches no random state.

    `model_class` is a transformers Auto class by name; `config` overrides what its config says, under the common names
    (`hidden_size`, `num_hidden_layers` ...) or the family's own.
    """
    config_class = transformers.CONFIG_MAPPING[family]
    if config_class not in getattr(transformers, model_class)._model_mapping:
        what = f"a {family} model has no {model_class.removeprefix('AutoModelFor')}"
        raise RecipeError(what, where="model", hint="choose another model or task")
    keys = {config_class.attribute_map.get(key, key): value for key, value in _SIZES.items()}
    keys |= FAMILIES[family] | {config_class.attribute_map.get(key, key): value for key, value in config.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = getattr(transformers, model_class).from_config(config_class(**keys))
    model.eval()
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece over the words of the made-up rows, dressed as BERT's."""
    vocabulary = {word: index for index, word in enumerate((*_SPECIAL, *_WORDS, *_GOOD, *_BAD, _ENDING))}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"unk": "[UNK]", "pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]", "eos": "[SEP]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **{f"{name}_token": token for name, token in names.items()},
    )


@dataclass
class Case:
    """A technique applied to a tiny model of one family for one task, with encoded made-up rows. In fp32 on the CPU."""

    recipe: Recipe
    task: Task
    base: PreTrainedModel
    model: PreTrainedModel
    anatomy: Anatomy
    encoded: Encoded
    processor: Any

    @property
    def technique(self) -> Technique:
        """What is on trial."""
        assert isinstance(self.recipe.technique, Technique)
        return self.recipe.technique

    def answers(self, model: nn.Module) -> Tensor:
        """The model's outputs for all rows."""
        model.eval()
        with torch.no_grad():
            return self.task.forward(model, self._batch())

    def loss(self, model: nn.Module) -> float:
        """The loss over all rows."""
        model.eval()
        batch = self._batch()
        with torch.no_grad():
            return float(self.task.loss(model, batch, self.task.normalizers(batch)))

    def _batch(self) -> Batch:
        indices = np.arange(len(self.encoded))
        return self.task.draw(collate(self.encoded, indices), indices)

    def engine(self, model: PreTrainedModel | None = None, micro_batch: int = 8) -> loop.Engine:
        """A loop over this model."""
        model = model or self.model
        return loop.Engine(
            model=model,
            anatomy=self.anatomy,
            task=self.task,
            optimizer=optimizer.build(model, self.anatomy, self.technique, self.recipe.train),
            machine=Machine(torch.device("cpu"), None),
            limits=Limits(micro_batch, 2**40, NEVER_CUT),
            seed=self.recipe.train.seed,
            label_smoothing=self.recipe.train.label_smoothing,
        )

    def train(self, engine: loop.Engine, start: int, stop: int, total: int = 10) -> list[float]:
        """Losses of the steps from `start` to `stop`."""
        batches = Batches(self.encoded, 8, self.recipe.train.seed)
        factor = optimizer.schedule(self.recipe.train, total)
        self.technique.update_trainable(engine.model, self.anatomy, start / total)
        losses = []
        for step in loop.steps(engine, batches, factor, start=start, total=stop):
            losses.append(step.loss)
            self.technique.update_trainable(engine.model, self.anatomy, step.number / total)
        return losses


def case(
    technique: Any,
    task: Any,
    family: str,
    folder: Path,
    *,
    row: Callable[[int], dict[str, object]] | None = None,
    data: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    **train: Any,
) -> Case:
    """A technique on one task and family, encoded under `folder`, over 40 rows of `MADE_UP` or of `row`.

    `data` and `train` are keys of the recipe, `config` overrides what the tiny model's config says.
    """
    keys = {"train": "made-up.csv", "max_length": 32, **(data or {})}
    train = {"learning_rate": 5e-3, "warmup_ratio": 0.0, **train}
    train.setdefault("head_learning_rate", train["learning_rate"])
    task = {"name": task, **KEYS.get(task, {})} if isinstance(task, str) else task
    given = {"task": task, "model": "tiny", "technique": technique, "data": keys, "train": train}
    recipe = recipes.load(None, (), given)
    values = row or MADE_UP[recipe.task.name]
    rows = [Row(f"made-up:{number}", values(number)) for number in range(40)]
    assert isinstance(recipe.task, Task)
    fitted, read = recipe.task.fit([recipe.task.target(one) for one in rows], recipe.data, "made-up")
    models.config_class(family, fitted.model_class)
    kind = models.auto_class(family, fitted.model_class)
    processor = tiny_tokenizer()
    added_tokens.add(processor, fitted.added_tokens)
    base = tiny_model(family, kind, **fitted.head_config(), **(config or {}))
    added_tokens.extend(base, added_tokens.ids(processor, fitted.added_tokens))
    fitted = fitted.for_processor(processor, base.config)
    pieces = fitted.pieces(rows, processor, read)
    encoded = encode(pieces, lambda part: fitted.encode(part, processor, read), folder / "encoded")
    head = frozenset(name for name in _head_parameters(base))
    map_ = anatomy(base, new=head)
    model = copy.deepcopy(base)
    assert isinstance(recipe.technique, Technique)
    recipe.technique.apply(model, map_, processor)
    return Case(recipe.model_copy(update={"task": fitted, "data": read}), fitted, base, model, map_, encoded, processor)


def _head_parameters(model: PreTrainedModel) -> list[str]:
    """What lies outside of the backbone: new for a task that is not the model's own."""
    inside = {id(parameter) for parameter in model.base_model.parameters()}
    return [name for name, parameter in model.named_parameters() if id(parameter) not in inside]


def check(technique: str | Mapping[str, Any], task: str | Mapping[str, Any], family: str) -> None:
    """Hold a technique to its contract on one task and one family.

    Raises:
        RecipeError: the technique refuses this kind of model, with its reason.
        AssertionError: a promise is broken; says which.
    """
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as name:
        trial = case(technique, task, family, Path(name))
        _check_start(trial)
        _check_training(trial)
        _check_repetition(case(technique, task, family, Path(name)))
        _check_accumulation(case(technique, task, family, Path(name), optimizer="sgd"))


def _check_start(case: Case) -> None:
    if case.technique.starts_as_base:
        same = torch.allclose(case.answers(case.model), case.answers(case.base), atol=1e-5, rtol=1e-5)
        assert same, "says that it starts as the base model, and answers differently"
    learns = {name for name, parameter in case.model.named_parameters() if parameter.requires_grad}
    assert learns, "nothing learns"
    assert case.anatomy.always_trainable <= learns, "a new head does not learn"


def _check_training(case: Case) -> None:
    """The loss falls, what is frozen stays, the saved delta over the base is the trained model, merging is plain."""
    frozen = {name: p.detach().clone() for name, p in case.model.named_parameters() if not p.requires_grad}
    names = [name for name, parameter in case.model.named_parameters() if parameter.requires_grad]
    before_training = case.loss(case.model)
    steps = 30 if case.anatomy.always_trainable else 120  # without a new head what learns has further to go
    case.train(case.engine(), 0, steps, total=steps)
    after_training = case.loss(case.model)
    assert after_training < 0.98 * before_training, f"the loss does not fall: {before_training} to {after_training}"
    state = dict(case.model.named_parameters())
    for name, before in frozen.items():
        assert torch.equal(state[name], before), f"{name} is frozen and has changed"
    trained = case.answers(case.model)
    again = copy.deepcopy(case.base)
    case.technique.apply(again, case.anatomy, case.processor)
    if case.technique.artifact == "adapter":
        case.technique.load_adapter(again, dict(case.technique.adapter_tensors(case.model)))
    else:
        artefact.put(again, artefact.learned(case.model, names))
    assert torch.allclose(case.answers(again), trained, atol=1e-5), "base + what was saved is not the trained model"
    if case.technique.cannot_merge:
        return
    case.technique.merge(again)
    assert torch.allclose(case.answers(again), trained, atol=1e-4), "merging changes the answers"
    assert {name for name, _ in again.named_parameters()} == {name for name, _ in case.base.named_parameters()}
    for (name, own), plain in zip(again.named_modules(), case.base.modules(), strict=True):
        assert not isinstance(plain, LINEAR) or type(own) is type(plain), f"{name} is not plain after merging"


def _check_repetition(case: Case) -> None:
    """Ten steps, ten steps again, and five, resumed for five more: the same bits."""
    runs = []
    for stops in ((0, 10), (0, 10), (0, 5, 10)):
        model = copy.deepcopy(case.model)
        engine, losses = case.engine(model), []
        for start, stop in zip(stops[:-1], stops[1:], strict=True):
            losses += case.train(engine, start, stop)
            engine = _resumed(case, engine)
        runs.append((losses, {name: p.detach() for name, p in engine.model.named_parameters()}))
    (losses, weights), *others = runs
    for other_losses, other_weights in others:
        assert other_losses == losses, f"the same seed, other losses: {losses} {other_losses}"
        assert all(torch.equal(other_weights[name], weights[name]) for name in weights), "the same seed, other weights"


def _resumed(case: Case, engine: loop.Engine) -> loop.Engine:
    """A fresh engine with what a checkpoint holds put in."""
    fresh = case.engine(copy.deepcopy(case.model))
    names = [name for name, parameter in case.model.named_parameters() if parameter.requires_grad]
    artefact.put(fresh.model, artefact.learned(engine.model, names))
    state = {key: value.clone() for key, value in optimizer.state_tensors(engine.optimizer, engine.model).items()}
    optimizer.load_state_tensors(fresh.optimizer, fresh.model, state)
    return fresh


def _check_accumulation(case: Case) -> None:
    """One step of plain gradient descent on 8 rows at once, and in pieces of 4, 2 and 1."""
    before = {name: p.detach().clone() for name, p in case.model.named_parameters() if p.requires_grad}
    updates = []
    for micro_batch in (8, 4, 2, 1):
        engine = case.engine(copy.deepcopy(case.model), micro_batch)
        engine = replace(engine, max_grad_norm=None)
        case.train(engine, 0, 1)
        after = dict(engine.model.named_parameters())
        updates.append(torch.cat([(after[name] - before[name]).detach().flatten() for name in before]))
    for micro_batch, update in zip((4, 2, 1), updates[1:], strict=True):
        ratio = float(update.norm() / updates[0].norm())
        assert abs(ratio - 1) < 1e-4, f"accumulated over micro-batches of {micro_batch} the update is {ratio:.5f} times"
        assert torch.dist(update, updates[0]) < 1e-3 * updates[0].norm(), "accumulation turns the update"
