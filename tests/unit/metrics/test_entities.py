"""Entity metrics against seqeval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from seqeval.metrics import classification_report
from seqeval.metrics.sequence_labeling import get_entities, precision_recall_fscore_support
from seqeval.scheme import BILOU, IOB2, IOBES, Entities

from tunesmith.data.batches import Batch, Ragged
from tunesmith.data.text.tags import PREFIXES, Scheme, TagSet, split_tag, tags_of_types
from tunesmith.errors import NumericError
from tunesmith.metrics.entities import EntityMetrics

TYPES = ("LOC", "PER", "creative-work")
SETS = {scheme: tags_of_types(TYPES, scheme, bare=False) for scheme in PREFIXES} | {
    "bare": tags_of_types(TYPES, "IO", bare=True)
}


def _batch(tags: Sequence[Sequence[int]]) -> Batch:
    lengths = [len(one) for one in tags]
    flat = torch.tensor([tag for one in tags for tag in one])
    return Batch({"tags": Ragged(flat, torch.tensor([0, *np.cumsum(lengths)]))}, len(tags))


def _scored(names: list[str], true: Sequence[Sequence[int]], predicted: Sequence[Sequence[int]]) -> dict[str, Any]:
    scores = EntityMetrics(names)
    for start in range(0, len(true), 100):
        flat = torch.tensor([tag for one in predicted[start : start + 100] for tag in one])
        scores.update(_batch(true[start : start + 100]), torch.nn.functional.one_hot(flat, len(names)).float())
    return scores.compute()


def _as_seqeval(tag: str) -> str:
    part, type_ = split_tag(tag)
    return part if part == "O" else f"{part}-{type_}"


def _drawn(names: list[str], sentences: int, seed: int, noise: float) -> list[list[list[int]]]:
    """Return random tags, and noisy copies of them."""
    draw = np.random.default_rng(seed)
    true = [draw.integers(0, len(names), draw.integers(1, 12)) * (draw.random() < 0.9) for _ in range(sentences)]
    predicted = [np.where(draw.random(len(one)) < noise, draw.integers(0, len(names), len(one)), one) for one in true]
    return [[one.tolist() for one in side] for side in (true, predicted)]


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning")
@pytest.mark.parametrize("scheme", SETS)
def test_scores_are_seqevals(scheme: str) -> None:
    """10,000 random sentences over all schemes, valid and invalid."""
    names = SETS[scheme]
    for noise, sentences in ((0.05, 500), (0.4, 500), (1.0, 429)):
        true, predicted = _drawn(names, sentences, int(noise * 100), noise)
        ours = _scored(names, true, predicted)
        as_tags = [[[_as_seqeval(names[tag]) for tag in one] for one in side] for side in (true, predicted)]
        theirs = classification_report(*as_tags, output_dict=True, zero_division=0)
        for score, name in (("f1", "f1-score"), ("precision", "precision"), ("recall", "recall")):
            assert ours[score] == pytest.approx(theirs["micro avg"][name], abs=1e-9)
            for type_ in TYPES:
                assert ours["entities"][type_][score] == pytest.approx(theirs[type_][name], abs=1e-9)
        assert ours["f1_macro"] == pytest.approx(theirs["macro avg"]["f1-score"], abs=1e-9)
        assert [ours["entities"][type_]["support"] for type_ in TYPES] == [theirs[t]["support"] for t in TYPES]
        wrong = sum(ours["errors"][kind] for kind in ("type", "boundary", "boundary_and_type", "missed"))
        assert ours["errors"]["right"] + wrong == theirs["micro avg"]["support"]


@pytest.mark.parametrize("scheme", SETS)
def test_random_sentences_one_by_one(scheme: str) -> None:
    names = SETS[scheme]
    tag_set = TagSet(names)
    for one in _drawn(names, 300, 7, 0)[0]:
        tags = [names[tag] for tag in one]
        theirs = [(start, end + 1, type_) for type_, start, end in get_entities([_as_seqeval(tag) for tag in tags])]
        assert tag_set.spans(tags) == theirs


@pytest.mark.parametrize(("scheme", "strict"), (("BIO", IOB2), ("BIOES", IOBES), ("BILOU", BILOU)))
def test_sound_sentences_are_read_as_seqeval_reads_them_strictly(scheme: Scheme, strict: Any) -> None:
    draw, tag_set = np.random.default_rng(3), TagSet(SETS[scheme])
    for _ in range(200):
        tags: list[str] = []
        while len(tags) < 10:
            length, type_ = int(draw.integers(0, 4)), TYPES[draw.integers(3)]
            parts = {"BIO": "BIII", "BIOES": "BIIE", "BILOU": "BIIL"}[scheme]
            inside = parts[: length - 1] + parts[-1] if length > 1 else {"BIO": "B", "BIOES": "S", "BILOU": "U"}[scheme]
            tags += [f"{part}-{type_}" for part in inside] if length else ["O"]
        theirs = Entities([tags], strict).entities[0]
        assert tag_set.spans(tags) == [(one.start, one.end, one.tag) for one in theirs]


CASES = {
    "right": ("B-PER I-PER O", "B-PER I-PER O", {"right": 1}),
    "type": ("B-PER I-PER O", "B-LOC I-LOC O", {"type": 1}),
    "boundary": ("B-PER I-PER O", "B-PER O O", {"boundary": 1}),
    "boundary, two halves": ("B-PER I-PER O", "B-PER B-PER O", {"boundary": 1}),
    "both": ("B-PER I-PER O", "B-LOC O O", {"boundary_and_type": 1}),
    "missed": ("B-PER I-PER O", "O O O", {"missed": 1}),
    "spurious": ("O O O", "O B-PER O", {"spurious": 1}),
    "missed and spurious": ("B-PER O O", "O O B-PER", {"missed": 1, "spurious": 1}),
}


@pytest.mark.parametrize(("true", "predicted", "errors"), CASES.values(), ids=CASES)
def test_errors_of_boundaries_are_told_from_those_of_types(true: str, predicted: str, errors: dict[str, int]) -> None:
    names = SETS["BIO"]
    codes = [[[names.index(tag) for tag in side.split()]] for side in (true, predicted)]
    computed = _scored(names, *codes)["errors"]
    assert computed == dict.fromkeys(computed, 0) | errors


def test_an_entity_does_not_go_on_in_the_next_sentence() -> None:
    names = SETS["IO"]
    inside = names.index("I-PER")
    assert _scored(names, [[inside], [inside, 0]], [[inside], [inside, 0]])["errors"]["right"] == 2


def test_without_entities_there_is_nothing_to_find() -> None:
    scores = _scored(SETS["BIO"], [[0, 0]], [[0, 0]])
    assert scores["f1"] == scores["f1_macro"] == 0 and scores["accuracy"] == 1 and scores["entities"] == {}


def test_loss_and_accuracy_are_of_words() -> None:
    scores, logits = EntityMetrics(SETS["BIO"]), torch.randn(5, len(SETS["BIO"]), generator=torch.manual_seed(0))
    scores.update(_batch([[0, 1, 2], [3, 0]]), logits)
    wanted = torch.tensor([0, 1, 2, 3, 0])
    computed = scores.compute()
    assert computed["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, wanted)))
    assert computed["accuracy"] == pytest.approx(float((logits.argmax(1) == wanted).float().mean()))
    with pytest.raises(NumericError):
        scores.update(_batch([[0, 1, 2], [3, 0]]), logits * float("nan"))


def test_support_of_empty_types_is_left_out() -> None:
    theirs = precision_recall_fscore_support([["B-LOC"]], [["B-LOC"]], average="macro")
    ours = _scored(SETS["BIO"], [[1]], [[1]])
    assert list(ours["entities"]) == ["LOC"] and ours["f1_macro"] == theirs[2] == 1
