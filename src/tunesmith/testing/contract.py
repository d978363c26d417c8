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
from tunesmith.tasks import BoundTask, Task, _samples
from tunesmith.techniques import Technique
from tunesmith.training import loop, optimizer
from tunesmith.training.machine import NEVER_CUT, Machine

__all__ = [
    "FAMILIES",
    "IMAGE_FAMILIES",
    "Case",
    "case",
    "check",
    "sample_row",
    "tiny_image_processor",
    "tiny_model",
    "tiny_tokenizer",
]

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

IMAGE_FAMILIES: dict[str, dict[str, Any]] = {
    "vit": {"image_size": 16, "patch_size": 4, "intermediate_size": 64, "hidden_dropout_prob": 0.0},
}
"""The same for models of pictures."""

CLASSIFYING = tuple(family for family in FAMILIES if family != "marian")
"""The families of which transformers has a model that classifies texts."""

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def sample_row(task: str, number: int) -> dict[str, object]:
    """The made-up row of that number (from 0) of a task."""
    row: dict[str, object] = _task(task)().sample_row(number)
    return row


def _task(name: str) -> Any:
    return registry.get("task", name)


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
    keys |= (FAMILIES | IMAGE_FAMILIES)[family]
    keys |= {config_class.attribute_map.get(key, key): value for key, value in config.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = getattr(transformers, model_class).from_config(config_class(**keys))
    model.eval()
    return model


def tiny_image_processor() -> Any:
    """An image processor for pictures of 16 x 16 pixels, with the PIL back end."""
    return transformers.ViTImageProcessorPil(size={"height": 16, "width": 16})


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece over the words of the made-up rows, dressed as BERT's."""
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
    """A technique applied to a tiny model of one family for one task, with encoded made-up rows. In fp32 on the CPU."""

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
        """What is on trial."""
        assert isinstance(self.recipe.technique, Technique)
        return self.recipe.technique

    def answers(self, model: nn.Module) -> Tensor:
        """The model's outputs for all rows."""
        model.eval()
        with torch.no_grad():
            return self.bound.outputs(model, self._batch())

    def loss(self, model: nn.Module) -> float:
        """The loss over all rows."""
        model.eval()
        batch = self._batch()
        with torch.no_grad():
            return float(self.bound.loss(model, batch, self.bound.normalizers(batch)))

    def _batch(self) -> Batch:
        indices = np.arange(len(self.encoded))
        return self.bound.transform(collate(self.encoded, indices), indices)

    def engine(self, model: PreTrainedModel | None = None, micro_batch: int = 8) -> loop.Engine:
        """A loop over this model."""
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
    """A technique on one task and family, encoded under `folder`, over 40 rows of `Task.sample_row` or of `row`.

    `data` and `train` are keys of the recipe, `config` overrides what the tiny model's config says.
    """
    keys = {"train": "made-up.csv", **(data or {})}
    train = {"learning_rate": 5e-3, "warmup_ratio": 0.0, **train}
    train.setdefault("head_learning_rate", train["learning_rate"])
    task = {"name": task, **_task(task).sample_keys} if isinstance(task, str) else task
    given = {"task": task, "model": "tiny", "technique": technique, "data": keys, "train": train}
    recipe = recipes.load(None, (), given)
    task, reads = recipe.task, recipe.data
    assert isinstance(task, Task) and isinstance(recipe.technique, Technique)
    rows = [Row(f"made-up:{number}", (row or task.sample_row)(number)) for number in range(40)]
    if "max_length" in task.data_keys and reads.max_length is None:
        reads = reads.model_copy(update={"max_length": 32})
    fitted, read = task.fit([task.parse_target(one) for one in rows], reads)
    models.config_class(family, fitted.auto_class)
    kind = models.auto_class(family, fitted.auto_class)
    processor = tiny_tokenizer() if fitted.processor == "tokenizer" else tiny_image_processor()
    added_tokens.add(processor, fitted.added_tokens)
    base = tiny_model(family, kind, **fitted.head_config(), **(config or {}))
    added_tokens.extend(base, added_tokens.ids(processor, fitted.added_tokens))
    bound = fitted.bind(processor, base.config, read, recipe.train.label_smoothing)
    encoded = encode(bound.chunks(rows), bound.encode, folder / "encoded", bound.costs)
    head = frozenset(name for name in _head_parameters(base))
    map_ = anatomy(base, new=head)
    model = copy.deepcopy(base)
    recipe.technique.apply(model, map_, processor)
    return Case(recipe.model_copy(update={"task": bound.task, "data": read}), bound, base, model, map_, encoded)


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
        artefact.load_trained(again, artefact.trained_tensors(case.model, names))
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
    artefact.load_trained(fresh.model, artefact.trained_tensors(engine.model, names))
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
