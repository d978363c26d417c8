"""Contract tests for third-party tasks and techniques, with tiny random models and synthetic rows.

`check(technique, task, family)` runs the contract tests of a technique on one task and one model family. The support
matrix is generated from it. The tests need no network and no GPU, and take a few seconds.

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
from tunesmith import registry
from tunesmith.data.batches import Batch, Batches, Limits, collate
from tunesmith.data.encoded import Encoded, encode
from tunesmith.data.formats import Row
from tunesmith.deploy import artifact as artefact
from tunesmith.errors import RecipeError
from tunesmith.models import added_tokens
from tunesmith.models import load as models
from tunesmith.models.anatomy import LINEAR, Anatomy, anatomy
from tunesmith.recipe import Recipe
from tunesmith.tasks import BoundTask, _samples
from tunesmith.techniques import Technique
from tunesmith.training import loop, optimizer
from tunesmith.training.machine import NEVER_CUT, Machine

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # with the default of 0.02 the outputs of a random model hardly depend on its inputs
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
"""Model family (`model_type` of the config) -> config keys of its tiny model besides the common sizes; no dropout."""

IMAGE_FAMILIES: dict[str, dict[str, Any]] = {
    "vit": {"image_size": 16, "patch_size": 4, "intermediate_size": 64, "hidden_dropout_prob": 0.0},
}
"""The same for image models."""

CLASSIFYING = tuple(family for family in FAMILIES if family != "marian")
"""Families that have a sequence-classification model in transformers."""

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def sample_row(task: str, number: int) -> dict[str, object]:
    """Return synthetic row `number` (from 0) of a task."""
    row: dict[str, object] = _task(task)().sample_row(number)
    return row


def _task(name: str) -> Any:
    return registry.get("task", name)


def tiny_model(family: str, model_class: str, *, seed: int = 0, **config: Any) -> PreTrainedModel:
    """Return a random model of about 50,000 parameters, in eval mode; the global random state is not changed.

    `model_class` is the name of a transformers Auto class. `config` overrides config keys, given by the common names
    (`hidden_size`, `num_hidden_layers` ...) or those of the family. The same seed gives the same weights.

    Raises:
        RecipeError: the family has no such model.
    """
    config_class = transformers.CONFIG_MAPPING[family]
    if config_class not in getattr(transformers, model_class)._model_mapping:
        what = f"a {family} model has no {model_class.removeprefix('AutoModelFor')}"
        raise RecipeError(what, where="model", hint="choose another model or task")
    keys = {config_class.attribute_map.get(key, key): value for key, value in _SIZES.items()}
    keys |= (FAMILIES | IMAGE_FAMILIES)[family]
    keys |= {config_class.attribute_map.get(key, key): value for key, value in config.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = getattr(transformers, model_class).from_config(config_class(**keys))
    model.eval()
    return model


def tiny_image_processor() -> Any:
    """Return an image processor for images of 16 x 16 pixels, with the PIL backend."""
    return transformers.ViTImageProcessorPil(size={"height": 16, "width": 16})


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a WordPiece tokenizer of the synthetic rows' words, with BERT's special tokens."""
    words = (*_samples.WORDS, *_samples.GOOD, *_samples.BAD, _samples.ENDING)
    vocabulary = {word: index for index, word in enumerate((*_SPECIAL, *words))}
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
    """A technique applied to a tiny model of one family for one task, with encoded rows; fp32 on the CPU."""

    recipe: Recipe
    bound: BoundTask
    base: PreTrainedModel
    model: PreTrainedModel
    anatomy: Anatomy
    encoded: Encoded

    @property
    def processor(self) -> Any:
        """The tokenizer or image processor."""
        return self.bound.processor

    @property
    def technique(self) -> Technique:
        """The technique under test."""
        return self.recipe.technique

    def answers(self, model: nn.Module) -> Tensor:
        """Return the model's outputs for all rows."""
        model.eval()
        with torch.no_grad():
            return self.bound.outputs(model, self._batch())

    def loss(self, model: nn.Module) -> float:
        """Return the loss over all rows."""
        model.eval()
        batch = self._batch()
        with torch.no_grad():
            return float(self.bound.loss(model, batch, self.bound.normalizers(batch)))

    def _batch(self) -> Batch:
        indices = np.arange(len(self.encoded))
        return self.bound.transform(collate(self.encoded, indices), indices)

    def engine(self, model: PreTrainedModel | None = None, micro_batch: int = 8) -> loop.Engine:
        """Return an engine for this model."""
        model = model or self.model
        return loop.Engine(
            model=model,
            anatomy=self.anatomy,
            task=self.bound,
            optimizer=optimizer.build(model, self.anatomy, self.technique, self.recipe.train),
            machine=Machine(torch.device("cpu"), None),
            limits=Limits(micro_batch, 2**40, NEVER_CUT),
            seed=self.recipe.train.seed,
        )

    def train(self, engine: loop.Engine, start: int, stop: int, total: int = 10) -> list[float]:
        """Train from step `start` to `stop`; return the losses."""
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
    """Return a technique applied to a tiny model, with 40 encoded rows of `Task.sample_row` or of `row`.

    The encoded rows are written under `folder`. `data` and `train` are recipe keys; `config` overrides config keys.
    """
    data_keys = {"train": "made-up.csv", **(data or {})}
    train = {"learning_rate": 5e-3, "warmup_ratio": 0.0, **train}
    train.setdefault("head_learning_rate", train["learning_rate"])
    task = {"name": task, **_task(task).sample_keys} if isinstance(task, str) else task
    keys = {"task": task, "model": "tiny", "technique": technique, "data": data_keys, "train": train}
    recipe = recipes.load(None, (), keys)
    task, recipe_data = recipe.task, recipe.data
    rows = [Row(f"made-up:{number}", (row or task.sample_row)(number)) for number in range(40)]
    if "max_length" in task.data_keys and recipe_data.max_length is None:
        recipe_data = recipe_data.model_copy(update={"max_length": 32})
    fitted, fitted_data = task.fit([task.parse_target(sample) for sample in rows], recipe_data)
    models.config_class(family, fitted.auto_class)  # raises if the family does not support the task
    model_class = models.auto_class(family, fitted.auto_class)
    processor = tiny_tokenizer() if fitted.processor == "tokenizer" else tiny_image_processor()
    added_tokens.add(processor, fitted.added_tokens)
    base = tiny_model(family, model_class, **fitted.head_config(), **(config or {}))
    added_tokens.extend(base, added_tokens.ids(processor, fitted.added_tokens))
    bound = fitted.bind(processor, base.config, fitted_data, recipe.train.label_smoothing)
    encoded = encode(bound.chunks(rows), bound.encode, folder / "encoded", bound.costs)
    parts = anatomy(base, new=frozenset(_head_parameters(base)))
    model = copy.deepcopy(base)
    recipe.technique.apply(model, parts, processor)
    return Case(recipe.model_copy(update={"task": bound.task, "data": fitted_data}), bound, base, model, parts, encoded)


def _head_parameters(model: PreTrainedModel) -> list[str]:
    """Return the names of the parameters outside the backbone: the new head."""
    backbone = {id(parameter) for parameter in model.base_model.parameters()}
    return [name for name, parameter in model.named_parameters() if id(parameter) not in backbone]


def check(technique: str | Mapping[str, Any], task: str | Mapping[str, Any], family: str) -> None:
    """Run the contract tests of a technique on one task and one model family.

    Raises:
        RecipeError: the technique does not support this kind of model; the message has the reason.
        AssertionError: a test fails; the message has the broken promise.
    """
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as name:
        tested = case(technique, task, family, Path(name))
        _check_start(tested)
        _check_training(tested)
        _check_repetition(case(technique, task, family, Path(name)))
        _check_accumulation(case(technique, task, family, Path(name), optimizer="sgd"))


def _check_start(case: Case) -> None:
    """Check that the untrained model equals the base model if the technique says so, and that it is trainable."""
    if case.technique.starts_as_base:
        same = torch.allclose(case.answers(case.model), case.answers(case.base), atol=1e-5, rtol=1e-5)
        assert same, "starts_as_base is set, but the outputs differ from those of the base model"
    trainable = {name for name, parameter in case.model.named_parameters() if parameter.requires_grad}
    assert trainable, "no parameter is trainable"
    assert case.anatomy.always_trainable <= trainable, "the new head is not trainable"


def _check_training(case: Case) -> None:
    """Check that the loss falls, frozen parameters stay, base + saved delta = trained model, and merging is exact."""
    frozen = {name: p.detach().clone() for name, p in case.model.named_parameters() if not p.requires_grad}
    names = [name for name, parameter in case.model.named_parameters() if parameter.requires_grad]
    before_training = case.loss(case.model)
    steps = 30 if case.anatomy.always_trainable else 120  # without a new head, the loss falls more slowly
    case.train(case.engine(), 0, steps, total=steps)
    after_training = case.loss(case.model)
    assert after_training < 0.98 * before_training, f"the loss does not fall: {before_training} to {after_training}"
    state = dict(case.model.named_parameters())
    for name, before in frozen.items():
        assert torch.equal(state[name], before), f"{name} is frozen but has changed"
    trained = case.answers(case.model)
    reloaded = copy.deepcopy(case.base)
    case.technique.apply(reloaded, case.anatomy, case.processor)
    if case.technique.artifact == "adapter":
        case.technique.load_adapter(reloaded, dict(case.technique.adapter_tensors(case.model)))
    else:
        artefact.load_trained(reloaded, artefact.trained_tensors(case.model, names))
    same = torch.allclose(case.answers(reloaded), trained, atol=1e-5)
    assert same, "base + saved parameters differ from the trained model"
    if case.technique.cannot_merge:
        return
    case.technique.merge(reloaded)
    assert torch.allclose(case.answers(reloaded), trained, atol=1e-4), "merging changes the outputs"
    assert {name for name, _ in reloaded.named_parameters()} == {name for name, _ in case.base.named_parameters()}
    for (name, merged), plain in zip(reloaded.named_modules(), case.base.modules(), strict=True):
        what = f"{name} is a {type(merged).__name__} after merging, not a {type(plain).__name__}"
        assert not isinstance(plain, LINEAR) or type(merged) is type(plain), what


def _check_repetition(case: Case) -> None:
    """Check that 10 steps, 10 steps again, and 5 steps resumed for 5 more give identical losses and weights."""
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
        assert other_losses == losses, f"the same seed gives different losses: {losses} and {other_losses}"
        same = all(torch.equal(other_weights[name], weights[name]) for name in weights)
        assert same, "the same seed gives different weights"


def _resumed(case: Case, engine: loop.Engine) -> loop.Engine:
    """Return a new engine with the weights and optimizer state of a checkpoint."""
    fresh = case.engine(copy.deepcopy(case.model))
    names = [name for name, parameter in case.model.named_parameters() if parameter.requires_grad]
    artefact.load_trained(fresh.model, artefact.trained_tensors(engine.model, names))
    state = {key: value.clone() for key, value in optimizer.state_tensors(engine.optimizer, engine.model).items()}
    optimizer.load_state_tensors(fresh.optimizer, fresh.model, state)
    return fresh


def _check_accumulation(case: Case) -> None:
    """Check that an SGD step on 8 rows equals the same step accumulated over micro-batches of 4, 2 and 1."""
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
        assert abs(ratio - 1) < 1e-4, f"with micro-batches of {micro_batch} the update is {ratio:.5f} times as large"
        same_direction = torch.dist(update, updates[0]) < 1e-3 * updates[0].norm()
        assert same_direction, "accumulation changes the direction of the update"
