"""Metrics of generated texts against references: exact match, ROUGE-L, chrF and BLEU.

    exact_match   fraction of texts equal to the reference, ignoring white space
    rouge_l       mean over the texts of 2PR / (P + R), where P and R are the fractions of the words of the text and of
                  the reference in their longest common subsequence                           (Lin 2004, W04-1013)
    chrf, bleu    sacrebleu's, over the corpus, from 0 to 100                   (Popović 2015, Papineni 2002, Post 2018)

ROUGE-L splits words as Google's `rouge-score` does (lower case, no stemming) and equals it on English; letters of other
scripts count too, and each Chinese character or kana is a word.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from tunesmith.data.text.blocks import UNSPACED
from tunesmith.errors import RecipeError

SACREBLEU = ("chrf", "bleu")
_WORD = re.compile(rf"{UNSPACED.pattern}|(?:(?!{UNSPACED.pattern})[^\W_])+")


class TextMetrics:
    """Metrics of generated texts by name, accumulated text by text."""

    def __init__(self, names: Sequence[str], **options: Any) -> None:
        """Set up the metrics in `names`; `options` (such as `tokenize`) go to sacrebleu's BLEU.

        Raises:
            RecipeError: a metric needs sacrebleu, which is not installed.
        """
        self.names = names
        self._corpus = {name: _sacrebleu(name, options) for name in names if name in SACREBLEU}
        self._texts: list[str] = []
        self._references: list[str] = []

    def update(self, texts: Sequence[str], references: Sequence[str]) -> None:
        """Add texts and their references."""
        assert len(texts) == len(references)
        self._texts += texts
        self._references += references

    def compute(self) -> dict[str, Any]:
        """Return the metrics so far and sacrebleu's signatures; empty without texts."""
        if not self._texts:
            return {}
        scores: dict[str, Any] = {}
        for name in self.names:
            if name in self._corpus:
                scores[name] = float(self._corpus[name].corpus_score(self._texts, [self._references]).score)
                scores[f"{name}_signature"] = str(self._corpus[name].get_signature())
            else:
                pairs = zip(self._texts, self._references, strict=True)
                scores[name] = sum(_PER_TEXT[name](*pair) for pair in pairs) / len(self._texts)
        return scores


def exact_match(text: str, reference: str) -> float:
    """Return 1 if text and reference are equal, ignoring white space, else 0."""
    return float(text.split() == reference.split())


def rouge_l(text: str, reference: str) -> float:
    """Return the F1 of the longest common subsequence of words."""
    text_words, reference_words = words(text), words(reference)
    common = _longest_common(text_words, reference_words)
    return 2 * common / (len(text_words) + len(reference_words)) if common else 0.0


def words(text: str) -> list[str]:
    """Return the words that ROUGE-L compares."""
    return _WORD.findall(text.lower())


def _longest_common(one: list[str], other: list[str]) -> int:
    """Return the length of the longest common subsequence, by bit-parallel rows (Hyyrö 2004)."""
    positions: dict[str, int] = {}
    for index, word in enumerate(other):
        positions[word] = positions.get(word, 0) | 1 << index
    full = (1 << len(other)) - 1
    row = full
    for word in one:
        here = row & positions.get(word, 0)
        row = (row + here | row - here) & full
    return len(other) - row.bit_count()


_PER_TEXT: dict[str, Callable[[str, str], float]] = {"exact_match": exact_match, "rouge_l": rouge_l}


def _sacrebleu(name: str, options: dict[str, Any]) -> Any:
    try:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
    except ImportError:
        what = f"metric {name} needs sacrebleu, which is not installed"
        raise RecipeError(what, hint="pip install 'tunesmith[text]'") from None
    return CHRF() if name == "chrf" else BLEU(**options)
