"""ROUGE-L against rouge-score, chrF and BLEU against sacrebleu, on random texts."""

from __future__ import annotations

import random

import pytest

from tunesmith.metrics.texts import TextMetrics, rouge_l

rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
sacrebleu = pytest.importorskip("sacrebleu")

WORDS = "The the cat, sat on-a MAT. it's 3.5 km a_b the (cat) and 'dog' runs; runs! x2".split()


def _text(drawn: random.Random) -> str:
    return " ".join(drawn.choice(WORDS) for _ in range(drawn.randint(0, 40)))


def test_rouge_l_is_that_of_rouge_score() -> None:
    drawn, theirs = random.Random(0), rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    for _ in range(500):
        text, reference = _text(drawn), _text(drawn)
        assert rouge_l(text, reference) == pytest.approx(theirs.score(reference, text)["rougeL"].fmeasure, abs=1e-12)


@pytest.mark.parametrize("options", [{}, {"tokenize": "zh"}, {"lowercase": True}])
def test_bleu_and_chrf_are_those_of_sacrebleu(options: dict[str, object]) -> None:
    drawn = random.Random(1)
    texts, references = ([_text(drawn) for _ in range(50)] for _ in range(2))
    scores = TextMetrics(["bleu", "chrf"], **options)
    scores.update(texts, references)
    ours = scores.compute()
    assert ours["bleu"] == sacrebleu.corpus_bleu(texts, [references], **options).score
    assert ours["chrf"] == sacrebleu.corpus_chrf(texts, [references]).score
