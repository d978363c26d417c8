"""Text metrics by hand; tests/oracle/test_written_texts.py compares them with rouge-score and sacrebleu."""

from __future__ import annotations

import sys

import pytest

from tunesmith.errors import RecipeError
from tunesmith.metrics.texts import TextMetrics, exact_match, rouge_l, words


def test_exact_match_sees_words_and_case_not_white_space() -> None:
    assert exact_match(" It is\n Paris. ", "It is Paris.") == 1.0
    assert exact_match("it is Paris.", "It is Paris.") == 0.0
    assert exact_match("", " ") == 1.0 and exact_match("", "a") == 0.0


def test_words_are_letters_and_digits_and_each_chinese_character() -> None:
    assert words("It's 3.5 km_long, naïve!") == ["it", "s", "3", "5", "km", "long", "naïve"]
    assert words("用LoRA微调模型。") == ["用", "lora", "微", "调", "模", "型"]


@pytest.mark.parametrize(
    ("text", "reference", "wanted"),
    [
        ("police killed the gunman", "police kill the gunman", 3 / 4),
        ("the gunman kill police", "police kill the gunman", 2 / 4),  # the same words in another order
        ("a b", "a x b y", 2 * 2 / 6),
        ("北京是首都", "首都是北京", 2 * 2 / 10),
        ("", "a", 0.0),
        ("...", "...", 0.0),  # no words
    ],
)
def test_rouge_l_by_hand(text: str, reference: str, wanted: float) -> None:
    assert rouge_l(text, reference) == pytest.approx(wanted)
    assert rouge_l(reference, text) == pytest.approx(wanted)


def test_scores_do_not_depend_on_the_cut_into_batches() -> None:
    texts, references = ["a b c", "d e", "f g h i"], ["a b c", "d x", "f h i"]
    together, apart = (TextMetrics(["exact_match", "rouge_l", "chrf", "bleu"]) for _ in range(2))
    together.update(texts, references)
    for pair in zip(texts, references, strict=True):
        apart.update([pair[0]], [pair[1]])
    assert together.compute() == apart.compute()
    assert together.compute()["exact_match"] == pytest.approx(1 / 3)
    assert together.compute()["bleu_signature"].startswith("nrefs:1|")
    assert TextMetrics(["rouge_l"]).compute() == {}


def test_without_sacrebleu_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
    with pytest.raises(RecipeError, match="chrf.*sacrebleu"):
        TextMetrics(["chrf"])
    assert TextMetrics(["rouge_l"]).compute() == {}
