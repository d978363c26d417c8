"""Every key of the recipe is read: changing it changes the outcome of a run."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tunesmith import registry
from tunesmith.console import Console
from tunesmith.data.columns import of_kind
from tunesmith.data.formats import Row
from tunesmith.errors import UserError
from tunesmith.recipe import Data, Recipe, Train, load
from tunesmith.run import train as run
from tunesmith.run.prepare import Prepared
from tunesmith.run.signals import Signals
from tunesmith.testing import sample_row, tiny_model, tiny_tokenizer
from tunesmith.training import machine

LORA = "technique={name: lora, r: 4, target_modules: [query]}"
BLOCKS = "technique={name: freeze, last_n_blocks: 2}"
WORDS = ("task=fill-mask", "technique=full", "data.train=documents.csv")
PROMPT, PREFIX = "technique={name: prompt, num_virtual_tokens: 3}", "technique={name: prefix, num_virtual_tokens: 3}"
ENTITIES = ("task=token-classification", "data.train=entities.jsonl")
CHATS = ("task=text-generation", "technique=full", "model=decoder", "data.train=chats.jsonl")
LOHA = "technique={name: peft, type: LOHA}"
EACH_STEP = ("train.evaluate_every=1", "train.save_every=1")
DIVERGES = ("train.learning_rate=1e30", "train.warmup_ratio=0", BLOCKS, "train.max_steps=4")
PAIRS = ("task={name: translation, source_lang: en, target_lang: de}", "technique=full", "model=translator",
         "data.train=pairs.tsv", "data.max_length=16")  # fmt: skip
Change = tuple[tuple[str, ...], str, str]

KEYS: dict[str, Change] = {
    "task": ((), "task=nothing", "error"),
    "model": ((), "model=other", "losses"),
    "technique": ((), "technique=full", "parameters"),
    "data.train": ((), "data.train=turned.csv", "losses"),
    "data.validation": ((), "data.validation=0.4", "rows"),
    "data.test": ((), "data.test=0.4", "rows"),
    "data.columns": ((), "data.columns={text: turned}", "losses"),
    "data.max_length": ((), "data.max_length=6", "losses"),
    "data.group": ((), "data.group=label", "rows"),
    "data.limit": ((), "data.limit=12", "rows"),
    "data.on_bad_row": (("data.train=bad.csv",), "data.on_bad_row=skip", "error"),
    "data.class_weights": ((), "data.class_weights={positive: 3}", "losses"),
    "data.augment": ((), "data.augment=[{name: word-dropout, probability: 0.5}]", "losses"),
    "train.epochs": (("train.max_steps=null",), "train.epochs=0.5", "losses"),
    "train.max_steps": ((), "train.max_steps=1", "losses"),
    "train.batch_size": ((), "train.batch_size=4", "losses"),
    "train.micro_batch_size": ((), "train.micro_batch_size=2", "weights"),
    "train.learning_rate": ((), "train.learning_rate=1e-3", "rates"),
    "train.head_learning_rate": ((), "train.head_learning_rate=1e-2", "weights"),
    "train.weight_decay": ((), "train.weight_decay=0.9", "weights"),
    "train.warmup_ratio": ((), "train.warmup_ratio=0.9", "rates"),
    "train.schedule": ((), "train.schedule=constant", "rates"),
    "train.optimizer": ((), "train.optimizer=sgd", "weights"),
    "train.max_grad_norm": ((), "train.max_grad_norm=1e-6", "weights"),
    "train.precision": ((), "train.precision=bf16", "losses"),
    "train.seed": ((), "train.seed=1", "losses"),
    "train.evaluate_every": ((), "train.evaluate_every=1", "scored"),
    "train.save_every": ((), "train.save_every=1", "saved"),
    "train.keep_checkpoints": (EACH_STEP, "train.keep_checkpoints=1", "saved"),
    "train.metric": (EACH_STEP, "train.metric=ece", "said"),
    "train.early_stopping_patience": (
        (*EACH_STEP, "train.learning_rate=1e-12"),
        "train.early_stopping_patience=1",
        "losses",
    ),
    "train.gradient_checkpointing": ((), "train.gradient_checkpointing=true", "checkpointing"),
    "train.label_smoothing": ((), "train.label_smoothing=0.3", "losses"),
    "train.on_nan": (DIVERGES, "train.on_nan=skip", "error"),
    "train.max_skips": ((*DIVERGES, "train.on_nan=skip"), "train.max_skips=1", "error"),
    "train.device": ((), "train.device=cuda:99", "error"),
    "train.fast_path": ((), "train.fast_path=off", "fast_path"),
    "task.text-classification.labels": ((), "task.labels=multi", "losses"),
    "task.text-classification.classes": ((), "task.classes=[positive, negative]", "classes"),
    "task.text-classification.windows": (("data.max_length=6",), "task.windows=3", "losses"),
    "task.fill-mask.mask_share": ((*WORDS,), "task.mask_share=0.5", "losses"),
    "task.fill-mask.whole_words": ((*WORDS,), "task.whole_words=false", "losses"),
    "task.fill-mask.segmenter": ((*WORDS,), "task.segmenter=jieba", "error"),
    "task.fill-mask.head_warmup": ((*WORDS, "model=headless"), "task.head_warmup=0.5", "weights"),
    "task.fill-mask.general": ((*WORDS,), "task.general=turned.csv", "rows"),
    "task.text-generation.form": (CHATS, "task.form=text", "error"),
    "task.text-generation.train_on": (CHATS, "task.train_on=all", "losses"),
    "task.text-generation.chat_template": (CHATS, "task.chat_template=alpaca", "losses"),
    "task.text-generation.system": (CHATS, "task.system=great", "losses"),
    "task.text-generation.general": (CHATS, "task.general=turned.csv", "rows"),
    "task.text-generation.add_tokens": (CHATS, "task.add_tokens=[the film]", "losses"),
    "task.text-generation.generate": (CHATS, "task.generate={max_new_tokens: 2}", "said"),
    "task.token-classification.tags": (ENTITIES, "task.tags=[B-PRAISE, I-PRAISE, B-BLAME, I-BLAME, O]", "classes"),
    "task.token-classification.scheme": (ENTITIES, "task.scheme=BIOES", "error"),
    "task.token-classification.sub_words": (ENTITIES, "task.sub_words=all", "losses"),
    "task.token-classification.inner_marks": (ENTITIES, "task.inner_marks='-'", "asked"),
    "task.translation.source_lang": (PAIRS, "task.source_lang=fr", "error"),
    "task.translation.target_lang": (PAIRS, "task.target_lang=fr", "error"),
    "task.translation.prefix": (PAIRS, "task.prefix='great '", "losses"),
    "task.translation.num_beams": (PAIRS, "task.num_beams=1", "said"),
    "task.translation.max_new_tokens": (PAIRS, "task.max_new_tokens=2", "said"),
    "task.translation.scored_rows": (PAIRS, "task.scored_rows=1", "said"),
    "task.translation.chat_template": ((*PAIRS, "model=decoder"), "task.chat_template=alpaca", "losses"),
    "technique.full.layer_lr_decay": (("technique=full",), "technique.layer_lr_decay=0.5", "weights"),
    "technique.freeze.last_n_blocks": ((BLOCKS,), "technique.last_n_blocks=1", "parameters"),
    "technique.freeze.head_only": ((BLOCKS,), "technique={name: freeze, head_only: true}", "parameters"),
    "technique.freeze.gradual": ((BLOCKS,), "technique.gradual=true", "weights"),
    "technique.freeze.layer_lr_decay": ((BLOCKS,), "technique.layer_lr_decay=0.5", "weights"),
    "technique.lora.bits": ((LORA,), "technique.bits=8", "losses"),
    "technique.lora.r": ((LORA,), "technique.r=2", "parameters"),
    "technique.lora.alpha": ((LORA,), "technique.alpha=64", "losses"),
    "technique.lora.dropout": ((LORA,), "technique.dropout=0.5", "weights"),
    "technique.lora.target_modules": ((LORA,), "technique.target_modules=[mlp_up]", "parameters"),
    "technique.lora.rslora": ((LORA, "technique.alpha=8"), "technique.rslora=true", "losses"),
    "technique.lora.dora": ((LORA,), "technique.dora=true", "parameters"),
    "technique.lora.init": ((LORA,), "technique.init=pissa", "losses"),
    "technique.lora.lora_plus_ratio": ((LORA,), "technique.lora_plus_ratio=8", "losses"),
    "technique.adapter.kind": (("technique=adapter",), "technique.kind=parallel", "parameters"),
    "technique.adapter.reduction_factor": (("technique=adapter",), "technique.reduction_factor=4", "parameters"),
    "technique.ia3.target_modules": (("technique=ia3",), "technique.target_modules=[query]", "parameters"),
    "technique.ia3.feedforward_modules": (("technique=ia3",), "technique.feedforward_modules=[]", "parameters"),
    "technique.prompt.num_virtual_tokens": ((PROMPT,), "technique.num_virtual_tokens=4", "parameters"),
    "technique.prompt.init_text": (
        ("technique={name: prompt, init_text: great}",),
        "technique.init_text=bad",
        "losses",
    ),
    "technique.prefix.num_virtual_tokens": ((PREFIX,), "technique.num_virtual_tokens=4", "parameters"),
    "technique.prefix.reparameterize": ((PREFIX,), "technique.reparameterize=8", "parameters"),
    "technique.peft.type": ((LOHA,), "technique.type=LOKR", "parameters"),
    "technique.peft.config": ((LOHA,), "technique.config={r: 2}", "parameters"),
}
"""Key -> overrides of the reference run, the override that changes the key, and the changed part of the outcome."""


def _keys() -> Iterator[str]:
    """Return every key of a recipe but `output`, which is tested by whole runs."""
    yield from (name for name in Recipe.model_fields if name not in ("data", "train", "output"))
    yield from (f"data.{name}" for name in Data.model_fields)
    yield from (f"train.{name}" for name in Train.model_fields)
    for kind in typing.get_args(registry.Kind):
        for name in registry.names(kind):
            yield from (f"{kind}.{name}.{field}" for field in registry.get(kind, name).model_fields)


def test_each_key_has_a_change() -> None:
    assert set(KEYS) == set(_keys())


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models and files of data."""
    folder = tmp_path_factory.mktemp("room")
    for seed, name in enumerate(("model", "other")):
        tiny_model("bert", "AutoModelForMaskedLM", seed=seed).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    tiny_model("bert", "AutoModel").save_pretrained(folder / "headless")
    tiny_tokenizer().save_pretrained(folder / "headless")
    tiny_model("llama", "AutoModelForCausalLM").save_pretrained(folder / "decoder")
    tiny_model("marian", "AutoModelForSeq2SeqLM").save_pretrained(folder / "translator")
    tiny_tokenizer().save_pretrained(folder / "translator")
    tiny_tokenizer().save_pretrained(folder / "decoder")
    rows = [sample_row("text-classification", number) for number in range(24)]
    turned = [" ".join(reversed(str(row["text"]).split())) for row in rows]
    files = {
        "reviews.csv": [(row["text"], other, row["label"]) for row, other in zip(rows, turned, strict=True)],
        "turned.csv": [(other, other, row["label"]) for row, other in zip(rows, turned, strict=True)],
        "bad.csv": [(row["text"], "", row["label"] if number else "") for number, row in enumerate(rows)],
        "documents.csv": [(sample_row("fill-mask", number)["text"], "", "") for number in range(24)],
    }
    for name, lines in files.items():
        with (folder / name).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("text", "turned", "label"), *lines])
    tagged = [sample_row("token-classification", number) for number in range(24)]
    for row in tagged:  # the tokenizer splits it into two words
        row["tokens"] = [f"{word}!" for word in typing.cast(list[str], row["tokens"])]
    (folder / "entities.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tagged), encoding="utf-8")
    pairs = [sample_row("translation", number) for number in range(24)]
    lines = ["en\tde", *(f"{pair['source']}\t{pair['target']}" for pair in pairs)]
    (folder / "pairs.tsv").write_text("\n".join(lines), encoding="utf-8")
    chats = "".join(json.dumps(sample_row("text-generation", number)) + "\n" for number in range(24))
    (folder / "chats.jsonl").write_text(chats, encoding="utf-8")
    return folder


Outcome = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def known() -> dict[tuple[str, ...], dict[str, Any]]:
    """Results of the reference runs, each run once."""
    return {}


@pytest.fixture
def outcome(room: Path, known: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Outcome:
    """Return the result of a run with these overrides, without times."""

    def of(*words: str) -> dict[str, Any]:
        if words not in known:
            monkeypatch.chdir(room)
            monkeypatch.setitem(sys.modules, "jieba", None)  # not installed
            monkeypatch.setenv("TUNESMITH_HOME", str(room / "home"))
            (tmp_path / str(len(known))).mkdir()
            known[words] = _trained(tmp_path / str(len(known)), *words)
            known[words]["said"] = re.sub(r"[\d.]+ examples/s", "", capsys.readouterr().out)
        return dict(known[words])

    return of


def _trained(folder: Path, *words: str) -> dict[str, Any]:
    """Run a recipe up to its last step; the rest reads no keys and takes most of the time."""
    given = {
        "task": "text-classification",
        "model": "model",
        "data": {"train": "reviews.csv", "validation": 0.25},
        "technique": {"name": "freeze"},
        "train": {"max_steps": 3, "batch_size": 8, "learning_rate": 5e-3, "precision": "fp32", "device": "cpu"},
    }
    try:
        recipe, console = load(None, words, given), Console()
        found = machine.find(recipe.train.device, recipe.train.precision)
        prepared = run.prepare(recipe, found, offline=True, allow_pickle=False, console=console)
        engine = run._engine(prepared, console)
        run._fit(run.Run(prepared, engine, run.TrainState(), folder, console), Signals())
    except UserError as error:
        return {"error": str(error)}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "loss" in line]
    state = prepared.model.state_dict()
    weights = b"".join(value.float().numpy().tobytes() for value in state.values())
    return {
        "error": None,
        "parameters": {name: state[name].shape for name in prepared.learned},
        "rows": prepared.examples.rows,
        "classes": prepared.model.config.id2label,
        "losses": [line["loss"] for line in steps],
        "rates": [line["learning_rate"] for line in steps],
        "scored": [line["step"] for line in lines if "validation/loss" in line],
        "saved": sorted(path.name for path in folder.glob("checkpoints/step-*")),
        "weights": hashlib.sha256(weights).hexdigest(),
        "checkpointing": engine.checkpointing,
        "fast_path": prepared.fast_path.dump(),
        "asked": _asked(prepared),
    }


def _asked(prepared: Prepared) -> list[dict[str, Any]] | None:
    """Return the encoding of a raw text, for tasks on words."""
    if of_kind(prepared.task.columns, "words") is None:
        return None
    return prepared.bound.encode([Row("x:1", {"text": "a great-film"})])


@pytest.mark.parametrize("key", KEYS)
def test_a_change_of_the_key_is_a_change_of_the_outcome(key: str, outcome: Outcome) -> None:
    base, word, what = KEYS[key]
    before, after = outcome(*base), outcome(*base, word)
    assert before.get(what) != after.get(what), f"{word} changes nothing"
