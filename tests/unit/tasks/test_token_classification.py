"""Token classification: head, loss, windows, predictions; against torch and transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import DataCollatorForTokenClassification, PreTrainedModel

import tunesmith
from tunesmith import recipe as recipes
from tunesmith.console import Console
from tunesmith.data.batches import Batch, collate
from tunesmith.data.encoded import Encoded, encode_in_memory
from tunesmith.data.formats import Row
from tunesmith.errors import DataError, RecipeError
from tunesmith.recipe import Data
from tunesmith.tasks import BoundTask
from tunesmith.tasks.token_classification import TokenClassification
from tunesmith.techniques.prefix import Prefix
from tunesmith.techniques.prompt import Prompt
from tunesmith.testing import case, sample_row, tiny_model, tiny_tokenizer
from tunesmith.training import evaluate

TOKENIZER = tiny_tokenizer()
SENTENCES = [
    ("the film was great", "O O O B-PRAISE"),
    ("a fine superb plot and bad acting", "O B-PRAISE I-PRAISE O O B-BLAME O"),
    ("dull", "B-BLAME"),
    ("it was not so lovely a story !", "O O O O B-PRAISE O O O"),
]


def _rows(sentences: Sequence[tuple[str, str]], labels: bool = True) -> list[Row]:
    return [
        Row(f"made-up:{n}", {"tokens": words.split()} | ({"label": tags.split()} if labels else {}))
        for n, (words, tags) in enumerate(sentences)
    ]


def _fit(rows: Sequence[Row], data: Data | None = None, /, **fields: Any) -> tuple[TokenClassification, Data]:
    task = TokenClassification(**fields)
    return task.fit([task.parse_target(row) for row in rows], data or Data(train="made-up", max_length=32))


def _bind(task: TokenClassification, data: Data, processor: Any = TOKENIZER, smoothing: float = 0.0) -> BoundTask:
    return task.bind(processor, tiny_model("bert", task.auto_class).config, data, smoothing)


@pytest.fixture
def fitted() -> Callable[..., tuple[BoundTask, PreTrainedModel, Encoded]]:
    """`fitted(data, sub_words="all")`: return the bound task, a tiny BERT with its head, and the encoded sentences."""

    def build(data: Data | None = None, /, rows: list[Row] | None = None, smoothing: float = 0.0, **fields: Any) -> Any:
        rows = rows or _rows(SENTENCES)
        task, data = _fit(rows, data, **fields)
        bound = _bind(task, data, smoothing=smoothing)
        encoded = encode_in_memory(bound.chunks(rows), bound.encode, bound.costs)
        return bound, tiny_model("bert", task.auto_class, **task.head_config()), encoded

    return build


def _all(encoded: Encoded) -> Batch:
    return collate(encoded, np.arange(len(encoded)))


def test_the_data_make_the_head() -> None:
    task, _ = _fit(_rows(SENTENCES))
    assert task.scheme == "BIO" and task.tags == ["O", "B-BLAME", "I-BLAME", "B-PRAISE", "I-PRAISE"]
    model = tiny_model("bert", task.auto_class, **task.head_config())
    assert model(torch.tensor([[2, 5, 3]])).logits.shape == (1, 3, 5)
    assert [model.config.id2label[n] for n in range(5)] == task.tags


@pytest.mark.parametrize(
    ("tags", "scheme", "names"),
    (
        ("I-A I-A O", "IO", ["O", "I-A"]),
        ("A A O", "IO", ["O", "A"]),
        ("B-A E-A S-A", "BIOES", ["O", "B-A", "I-A", "E-A", "S-A"]),
        ("B-A L-A U-A", "BILOU", ["O", "B-A", "I-A", "L-A", "U-A"]),
        ("I-A B-A O", "IOB1", ["O", "B-A", "I-A"]),
    ),
)
def test_every_scheme_is_learned_as_it_is_written(tags: str, scheme: str, names: list[str]) -> None:
    task, _ = _fit(_rows([("a b c", tags), ("a b c", "O O O")]))
    assert task.scheme == scheme and task.tags == names


def test_a_raw_text_is_split_as_the_words_of_train_are() -> None:
    rows = _rows([("Mary-Jane ran", "B-PER O"), ("he ran", "O O")])
    task = TokenClassification().infer_from_rows(rows)
    assert task.inner_marks == "-"
    bound = _bind(*task.fit([task.parse_target(row) for row in rows], Data(max_length=32)))
    asked = Row("a:1", {"text": "Ann-Lee ran."})
    assert len(bound.encode([asked])[0]["first"]) == 3
    answer = bound.postprocess({"tags": ["B-PER", "O", "O"], "scores": [1.0, 1.0, 1.0]}, asked)
    assert answer["entities"][0]["text"] == "Ann-Lee" and answer["tokens"] == ["Ann-Lee", "ran", "."]
    spans = [Row("a:1", {"text": "Ann-Lee ran", "label": [{"start": 0, "end": 3, "label": "PER"}]})]
    assert TokenClassification().infer_from_rows(spans).inner_marks == "", "a span may end at any mark"
    assert TokenClassification(inner_marks="'").infer_from_rows(rows).inner_marks == "'"


def test_the_scheme_is_said(fitted: Any) -> None:
    bound, _, encoded = fitted()
    (note,) = bound.notes(encoded)
    assert "BIO, 2 types (BLAME, PRAISE)" in note


def test_names_may_be_given_in_their_order_and_numbers_stand_for_them() -> None:
    rows = [Row("a:1", {"tokens": ["a", "b"], "label": [2, 1]}), Row("a:2", {"tokens": ["a"], "label": [0]})]
    task, _ = _fit(rows, tags=["O", "I-X", "B-X"])
    assert task.head_config()["id2label"] == {0: "O", 1: "I-X", 2: "B-X"} and task.scheme == "BIO"


@pytest.mark.parametrize("keys", ("tags: [O, A, O]", "tags: []", "scheme: BIX", "sub_words: last"))
def test_keys_that_cannot_be_meant_are_refused(keys: str) -> None:
    with pytest.raises(RecipeError):
        recipes.load(None, (f"task={{name: token-classification, {keys}}}", "model=tiny"))


def _transformers_loss(model: Any, task: TokenClassification, every: bool) -> torch.Tensor:
    """Return the loss of transformers' example scripts: other sub-words are -100."""
    features = []
    for row in _rows(SENTENCES):
        coded = TOKENIZER(row.values["tokens"], is_split_into_words=True)
        tags = [task.head_config()["label2id"][tag] for tag in task.parse_target(row)]
        labels, before = [], None
        for word in coded.word_ids():
            labels.append(-100 if word is None or (word == before and not every) else tags[word])
            before = word
        features.append({"input_ids": coded["input_ids"], "labels": labels})
    batch = DataCollatorForTokenClassification(TOKENIZER, return_tensors="pt")(features)
    loss: torch.Tensor = model(**batch).loss
    return loss


def test_the_loss_is_that_of_transformers(fitted: Any) -> None:
    bound, model, encoded = fitted()
    batch = _all(encoded)
    ours = bound.loss(model, batch, bound.normalizers(batch))
    torch.testing.assert_close(ours, _transformers_loss(model, bound.task, False))


@pytest.mark.parametrize("sub_words", ("first", "all"))
@pytest.mark.parametrize("weights", (None, {"B-PRAISE": 3.0, "O": 0.5}, "balanced"), ids=("even", "given", "balanced"))
@pytest.mark.parametrize("max_length", (32, 6))
def test_micro_batches_add_up_to_the_loss(sub_words: str, weights: Any, max_length: int, fitted: Any) -> None:
    bound, model, encoded = fitted(Data(max_length=max_length, class_weights=weights), sub_words=sub_words)
    batch = _all(encoded)
    whole = bound.loss(model, batch, bound.normalizers(batch))
    parts = [collate(encoded, np.array(rows)) for rows in ([2], [3, 1], [0])]
    weight = sum(float(bound.normalizers(part)["weight"]) for part in parts)
    normalizers = {"weight": torch.tensor(weight)}
    torch.testing.assert_close(sum(bound.loss(model, part, normalizers) for part in parts), whole)


def test_class_weights_and_smoothing_are_those_of_torch(fitted: Any) -> None:
    bound, model, encoded = fitted(Data(max_length=32, class_weights={"B-PRAISE": 3.0}))
    batch = _all(encoded)
    logits, tags = bound.outputs(model, batch), batch.ragged("tags").values
    weight = torch.tensor([3.0 if name == "B-PRAISE" else 1.0 for name in bound.task.tags])
    torch.testing.assert_close(
        bound.loss(model, batch, bound.normalizers(batch)), F.cross_entropy(logits, tags, weight)
    )
    bound, model, encoded = fitted(smoothing=0.1)
    plain = _all(encoded)
    assert "weight" not in plain and "weight" in batch
    logits = bound.outputs(model, plain)
    smooth = bound.loss(model, plain, bound.normalizers(plain))
    torch.testing.assert_close(smooth, F.cross_entropy(logits, tags, label_smoothing=0.1))


def test_other_sub_words_go_on_with_what_a_word_begins() -> None:
    task, data = _fit(_rows(SENTENCES), Data(max_length=32, class_weights="balanced"), sub_words="all")

    class Halves:
        unk_token_id = eos_token_id = pad_token_id = 1

        def __call__(self, texts: Any, add_special_tokens: bool = True) -> Any:
            one = isinstance(texts, str)
            ids = [[7, 8] for _ in ([texts] if one else texts)]
            return {"input_ids": ids[0] if one else ids}

    (fields,) = _bind(task, data, Halves()).encode(_rows([("fine film", "B-PRAISE O")]))
    names = [task.tags[tag] for tag in (*fields["tags"], *fields["rest_tags"])]  # type: ignore[index]
    assert names == ["B-PRAISE", "O", "I-PRAISE", "O"] and fields["first"] == [0, 2] and fields["rest"] == [1, 3]
    weights = fields["weight"]  # I-PRAISE is on no word; its weight would be the largest
    assert weights[2:] == weights[:2] and weights[0] != weights[1]


def test_words_in_windows_have_the_logits_of_their_window(fitted: Any) -> None:
    words = "the film was great and it was not so bad a plot with fine acting".split()[:14]
    rows = [Row("a:1", {"tokens": words, "label": ["B-X", *["O"] * (len(words) - 1)]}), *_rows(SENTENCES)]
    bound, model, encoded = fitted(Data(max_length=10), rows=rows)
    batch = _all(encoded)
    lengths = batch.ragged("windows").values.tolist()
    found = bound.outputs(model, batch)[: len(words)]
    ids, start, by_window = batch.ragged("input_ids").values, 0, []
    for length in lengths[: int(batch.ragged("windows").lengths[0])]:
        by_window.append(model(input_ids=ids[None, start : start + length]).logits[0])
        start += length
    expected = torch.cat(by_window)[batch.ragged("first").values[: len(words)]]
    assert len(by_window) > 1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    (note,) = bound.notes(encoded)[1:]
    assert " 1 additional window;" in note
    assert encoded.costs.tolist() == encoded.lengths("input_ids").tolist()


@pytest.mark.parametrize(
    "technique", (Prompt(num_virtual_tokens=5), Prefix(num_virtual_tokens=5)), ids=lambda t: t.name
)
@pytest.mark.parametrize("family", ("bert", "gpt2", "t5"))
def test_virtual_tokens_never_reach_the_outputs(technique: Any, family: str, tmp_path: Path) -> None:
    trial = case({"name": technique.name, **technique.model_dump()}, "token-classification", family, tmp_path)
    batch = _all(trial.encoded)
    every = trial.bound._logits(trial.model, batch)  # type: ignore[attr-defined]
    assert every.shape[1] == int(batch.ragged("windows").values.max())
    assert len(trial.answers(trial.model)) == len(batch.ragged("tags").values)


def test_the_baseline_knows_the_commonest_tag_of_each_word(fitted: Any) -> None:
    bound, _, encoded = fitted()
    predict = bound.baseline(encoded)
    found = predict(_all(encoded))
    assert [bound.task.tags[tag] for tag in found.argmax(-1)] == [tag for _, tags in SENTENCES for tag in tags.split()]
    torch.testing.assert_close(found.exp().sum(1), torch.ones(len(found)))
    rows = _rows([("unseen film", "B-PRAISE O")])
    other = predict(_all(encode_in_memory(rows, bound.encode)))
    assert [bound.task.tags[tag] for tag in other.argmax(-1)] == ["O", "O"]
    shares = torch.bincount(_all(encoded).ragged("tags").values, minlength=5) / found.shape[0]
    torch.testing.assert_close(other[0].exp(), shares)
    torch.testing.assert_close(other[1].exp(), (shares + torch.eye(5)[0]) / 2)
    assert evaluate.baseline(bound, encoded, encoded)["f1"] == 1


def test_answers_are_entities_with_their_place_in_the_text() -> None:
    bound = _bind(*_fit(_rows(SENTENCES)))
    text = "A superb-ly  fine film, bad."
    words = ["A", "superb", "-", "ly", "fine", "film", ",", "bad", "."]
    tags = "O B-PRAISE I-PRAISE I-PRAISE B-PRAISE O O I-BLAME O".split()
    answer = {"tags": tags, "scores": [1.0, 0.5, 0.7, 0.9, 0.8, 1.0, 1.0, 0.6, 1.0]}
    found = bound.postprocess(answer, Row("input 1", {"text": text}))
    assert found["tokens"] == words and "text" not in found and found["tags"] == tags
    assert [(one["text"], one["label"], round(one["score"], 6)) for one in found["entities"]] == [
        ("superb-ly", "PRAISE", 0.7),
        ("fine", "PRAISE", 0.8),
        ("bad", "BLAME", 0.6),
    ]
    assert all(text[one["start"] : one["end"]] == one["text"] for one in found["entities"])
    joined = bound.postprocess(answer, Row("input 1", {"tokens": words}))
    assert joined["text"] == " ".join(words) and joined["entities"][0]["text"] == "superb - ly"
    line = bound.task.render(found, Row("input 1", {"text": text}))
    assert line.split(", ") == ["superb-ly (PRAISE 0.700)", "fine (PRAISE 0.800)", "bad (BLAME 0.600)"]


def test_wrong_words_are_told_with_both_tags_and_the_highest_confidence() -> None:
    task, _ = _fit(_rows(SENTENCES))
    answer = {"tags": ["O", "B-PRAISE", "O", "O"], "scores": [0.9, 0.5, 0.7, 0.6]}
    assert task.mistake(answer, ("O", "B-PRAISE", "O", "O")) is None
    told = task.mistake(answer, ("O", "O", "B-BLAME", "O"))
    assert told == ("word 2 O, word 3 B-BLAME", "word 2 B-PRAISE, word 3 O", 0.7)


def test_a_preview_has_the_tag_at_each_token_with_loss() -> None:
    bound = _bind(*_fit(_rows(SENTENCES)))
    labeled, plain = (bound.preview(bound.encode(_rows(SENTENCES[:1], labels))[0]) for labels in (True, False))
    (window,) = labeled.windows
    assert [(token.text, token.target) for token in window] == [
        ("[CLS]", None), ("the", "O"), ("film", "O"), ("was", "O"), ("great", "B-PRAISE"), ("[SEP]", None),
    ]  # fmt: skip
    assert [token.target for token in plain.windows[0]] == [None] * 6


def test_inspection_counts_tokens_of_words_and_of_texts() -> None:
    found = _bind(*_fit(_rows(SENTENCES))).inspect([_rows(SENTENCES)[0], Row("a:2", {"text": "the zq"})])
    assert found is not None and (found.sizes, found.unknown, found.limit) == ([6, 4], [0, 1], None)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """train.conll, and the same sentences as JSON lines."""
    rows = [sample_row("token-classification", n) for n in range(60)]
    lines = (
        "\n".join(f"{w}\t{t}" for w, t in zip(row["tokens"], row["label"], strict=True))  # type: ignore[call-overload]
        for row in rows
    )
    (tmp_path / "train.conll").write_text("\n\n".join(lines) + "\n")
    (tmp_path / "train.jsonl").write_text(
        "".join(json.dumps({"tokens": r["tokens"], "tags": r["label"]}) + "\n" for r in rows)
    )
    return tmp_path


def _given(files: Path, name: str) -> dict[str, Any]:
    return {"task": "token-classification", "data": {"train": str(files / name), "validation": 0.2, "test": 0.2}}


def test_a_run_from_file_to_answers(files: Path, recipe_of: Any, tmp_path: Path) -> None:
    recipe = recipe_of("train.epochs=20", "train.learning_rate=5e-3", "technique=full", **_given(files, "train.conll"))
    result = tunesmith.train(recipe, console=Console(level=-1))
    scores = result["metrics"]["test"]
    assert scores["f1"] > 0.9 and set(scores["entities"]) == {"BLAME", "PRAISE"}
    assert result["metrics"]["baseline"]["f1"] <= 1 and scores["errors"]["right"] > 5
    made = sample_row("token-classification", 9)
    text = " ".join(made["tokens"])  # type: ignore[call-overload]
    one, other = tunesmith.load(tmp_path / "run").predict([text, made])
    assert one["entities"] == other["entities"] and one["tags"] == other["tags"] == made["label"]
    assert all(text[found["start"] : found["end"]] == found["text"] for found in one["entities"])
    lines = [json.loads(line) for line in (tmp_path / "run" / "predictions-test.jsonl").read_text().splitlines()]
    assert len(lines) == 12 and all(line["prediction"]["entities"] for line in lines)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "pipeline_tag: token-classification" in card and "AutoModelForTokenClassification" in card
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Scores by entity type" in page and "boundary_and_type" in page


def test_columns_and_json_lines_teach_the_same(files: Path, recipe_of: Any, tmp_path: Path) -> None:
    losses = []
    for name in ("train.conll", "train.jsonl"):
        recipe = recipe_of(
            "train.max_steps=3", "train.epochs=null", f"output={tmp_path / name}-run", **_given(files, name)
        )
        tunesmith.train(recipe, console=Console(level=-1))
        lines = [json.loads(line) for line in (tmp_path / f"{name}-run" / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert len(losses[0]) == 3 and losses[0] == losses[1]


def test_a_tag_that_train_lacks_is_refused_by_its_line(files: Path, recipe_of: Any) -> None:
    (files / "valid.conll").write_text("a\tO\nb\tB-PRASE\n")
    given = _given(files, "train.conll")
    given["data"] = {"train": given["data"]["train"], "validation": str(files / "valid.conll")}
    with pytest.raises(DataError, match=r"valid\.conll:2: label: 'B-PRASE' .* 5 tags.*'B-PRAISE'"):
        tunesmith.train(recipe_of(**given), console=Console(level=-1))
