"""Scores of written texts against what was meant: exact match, ROUGE-L, chrF and BLEU.

    exact_match   share of texts that are the reference, white space aside
    rouge_l       mean over the texts of 2PR / (P + R), P and R the shares of words, of the text and of the reference,
                  in their longest common subsequence                                         (Lin 2004, W04-1013)
    chrf, bleu    sacrebleu's, over all texts together, from 0 to 100           (Popović 2015, Papineni 2002, Post 2018)

Words of ROUGE-L are those of Google's `rouge-score` (lower case, without stemming), equal to it on English; letters of
other scripts count too, and each Chinese character or kana is a word.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from tunesmith.data.blocks import UNSPACED
from tunesmith.errors import RecipeError

SACREBLEU = ("chrf", "bleu")
_WORD = re.compile(rf"{UNSPACED.pattern}|(?:(?!{UNSPACED.pattern})[^\W_])+")


class TextScores:
    """Scores of texts by name, built up text by text."""

    def __init__(self, names: Sequence[str], **options: Any) -> None:
        """`options` go to sacrebleu's BLEU, such as `tokenize`.

        Raises:
            RecipeError: sacrebleu is wanted and not installed.
        """
        self.names = names
        self._corpus = {name: _sacrebleu(name, options) for name in names if name in SACREBLEU}
        self._texts: list[str] = []
        self._references: list[str] = []

    def update(self, texts: Sequence[str], references: Sequence[str]) -> None:
        """Take in some texts and, for each, what was meant."""
        assert len(texts) == len(references)
        self._texts += texts
        self._references += references

    def compute(self) -> dict[str, Any]:
        """The scores so far, and sacrebleu's signatures; nothing where there is no text."""
        if not self._texts:
            return {}
        scores: dict[str, Any] = {}
        for name in self.names:
            if name in self._corpus:
                scores[name] = float(self._corpus[name].corpus_score(self._texts, [self._references]).score)
                scores[f"{name}_signature"] = str(self._corpus[name].get_signature())
            else:
                pairs = zip(self._texts, self._references, strict=True)
                scores[name] = sum(_EACH[name](*pair) for pair in pairs) / len(self._texts)
        return scores


def exact_match(text: str, reference: str) -> float:
    """1 where they are the same, white space aside."""
    return float(text.split() == reference.split())


def rouge_l(text: str, reference: str) -> float:
    """F1 of the longest common subsequence of words."""
    said, meant = words(text), words(reference)
    common = _longest_common(said, meant)
    return 2 * common / (len(said) + len(meant)) if common else 0.0


def words(text: str) -> list[str]:
    """What ROUGE-L compares."""
    return _WORD.findall(text.lower())


def _longest_common(one: list[str], other: list[str]) -> int:
    """The length of the longest common subsequence, a row of bits for each word (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for index, word in enumerate(other):
        places[word] = places.get(word, 0) | 1 << index
    full = (1 << len(other)) - 1
    row = full
    for word in one:
        here = row & places.get(word, 0)
        row = (row + here | row - here) & full
    return len(other) - row.bit_count()


_EACH: dict[str, Callable[[str, str], float]] = {"exact_match": exact_match, "rouge_l": rouge_l}


def _sacrebleu(name: str, options: dict[str, Any]) -> Any:
    try:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
    except ImportError:
        what = f"{name}: sacrebleu, which computes it, is not installed"
        raise RecipeError(what, hint="pip install 'tunesmith[text]'") from None
    return CHRF() if name == "chrf" else BLEU(**options)
