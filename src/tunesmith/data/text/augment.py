"""Text augmentation, drawn anew in each epoch: word dropout, swaps, typos, synonyms, and back-translation.

"EDA: Easy Data Augmentation Techniques" (Wei and Zou 2019, arXiv 1901.11196). The change of an example depends on
(seed, epoch, index) alone, so that a resumed run and several processes produce the same texts. All changes operate on
lists of words and record the origin of each word, so that its tag moves with it. Protected words are never changed.
Back-translated texts come from `deploy/back_translation.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from tunesmith.data.columns import Columns, inputs_of, of_kind
from tunesmith.data.encoded import file_sha256
from tunesmith.data.formats import Row
from tunesmith.errors import DataError, RecipeError
from tunesmith.recipe.fields import Augmentation

MAX_WORDS = 4
"""Maximum words of a synonym: `put up with` has three."""
Random = np.random.Generator
Synonyms = Mapping[tuple[str, ...], Sequence[tuple[str, ...]]]
_CJK = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
"""Characters of scripts without spaces between words."""
_WORD = re.compile(rf"([{_CJK}]|[^\s{_CJK}]+)(\s*)")
_PUNCTUATED_WORD = re.compile(r"^(\W*)(.*?)(\W*)$", re.DOTALL)
_KEY_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_ADJACENT_KEYS = {
    letter: "".join(row[max(at - 1, 0) : at + 2] for row in _KEY_ROWS[max(y - 1, 0) : y + 2]).replace(letter, "")
    for y, letters in enumerate(_KEY_ROWS)
    for at, letter in enumerate(letters)
}
"""Letter -> adjacent letters on a keyboard."""


@dataclass(frozen=True)
class Words:
    """Words, the index of the original word of each (`origins`), and which words must not be changed (`keep`)."""

    words: tuple[str, ...]
    origins: tuple[int, ...]
    keep: tuple[bool, ...]

    @classmethod
    def of(cls, words: Sequence[str], keep: Sequence[bool] | None = None) -> Words:
        """Wrap unchanged words."""
        return cls(tuple(words), tuple(range(len(words))), tuple(keep or [False] * len(words)))

    def at(self, positions: Sequence[int]) -> Words:
        """Return the words at the positions, in that order."""
        parts = ((self.words[at], self.origins[at], self.keep[at]) for at in positions)
        words, origins, keep = zip(*parts, strict=True)
        return Words(words, origins, keep)


def drop_words(words: Words, probability: float, draw: Random) -> Words:
    """Drop words at random, but never all."""
    kept = [at for at, number in enumerate(draw.random(len(words.words))) if words.keep[at] or number >= probability]
    return words.at(kept or [int(draw.integers(len(words.words)))])


def swap_words(words: Words, probability: float, draw: Random) -> Words:
    """Swap words with their successors at random."""
    order = list(range(len(words.words)))
    for at, number in enumerate(draw.random(max(len(order) - 1, 0))):
        if number < probability and not (words.keep[order[at]] or words.keep[order[at + 1]]):
            order[at], order[at + 1] = order[at + 1], order[at]
    return words.at(order)


def misspell(words: Words, probability: float, draw: Random) -> Words:
    """Put one typo into words at random: an adjacent key, or a letter omitted, doubled, or swapped with the next.

    A word of one letter, such as a Chinese character, is doubled.
    """
    numbers = draw.random(len(words.words))
    changed = [
        word if kept or number >= probability else _typo(word, draw)
        for word, kept, number in zip(words.words, words.keep, numbers, strict=True)
    ]
    return replace(words, words=tuple(changed))


def _typo(word: str, draw: Random) -> str:
    letters = [at for at, letter in enumerate(word) if letter.isalpha()]
    if not letters:
        return word
    at = letters[int(draw.integers(len(letters)))]
    kind = int(draw.integers(4)) if len(letters) > 1 else 2
    if kind == 0 and (adjacent := _ADJACENT_KEYS.get(word[at].lower())):
        typed = adjacent[int(draw.integers(len(adjacent)))]
        return word[:at] + (typed.upper() if word[at].isupper() else typed) + word[at + 1 :]
    if kind == 1:
        return word[:at] + word[at + 1 :]
    if kind == 3 and at + 1 < len(word):
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return word[: at + 1] + word[at:]


def replace_synonyms(words: Words, probability: float, draw: Random, synonyms: Synonyms) -> Words:
    """Replace words by synonyms at random; punctuation around a word is kept."""
    replaced: list[tuple[str, int, bool]] = []
    at, plain = 0, [_punctuation(word)[1].lower() for word in words.words]
    while at < len(words.words):
        for size in range(min(MAX_WORDS, len(words.words) - at), 0, -1):
            others = synonyms.get(tuple(plain[at : at + size]))
            if others and not any(words.keep[at : at + size]):
                break
        else:
            size, others = 1, None
        if others and draw.random() < probability:
            chosen = list(others[int(draw.integers(len(others)))])
            before, first, _ = _punctuation(words.words[at])
            chosen[0] = before + (chosen[0].capitalize() if first[:1].isupper() else chosen[0])
            chosen[-1] += _punctuation(words.words[at + size - 1])[2]
            replaced.extend((word, words.origins[at + size - 1], False) for word in chosen)
        else:
            replaced.extend(
                zip(words.words[at : at + size], words.origins[at : at + size], words.keep[at : at + size], strict=True)
            )
        at += size
    texts, origins, keep = zip(*replaced, strict=True)
    return Words(texts, origins, keep)


def _punctuation(word: str) -> tuple[str, str, str]:
    """Split a word into leading punctuation, the word, and trailing punctuation."""
    match = _PUNCTUATED_WORD.match(word)
    assert match is not None, "the pattern matches every text"
    return match[1], match[2], match[3]


def read_synonyms(path: str | Path) -> Synonyms:
    """Read a synonym list: each line, such as `good, fine, nice`, has words that replace each other.

    Raises:
        DataError: the file cannot be read, or a line has a single word.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise DataError(
            f"the synonym list cannot be read: {error.strerror}", where=str(path), hint="check data.augment"
        ) from None
    except UnicodeDecodeError:
        raise DataError("the synonym list is not UTF-8", where=str(path), hint="save it as UTF-8") from None
    synonyms: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for number, line in enumerate(lines, start=1):
        group = [tuple(split_words(part.strip())) for part in re.split(r"[,，\t]", line) if part.strip()]
        if len(group) == 1 or any(len(words) > MAX_WORDS for words in group):
            what = "a line with a single word" if len(group) == 1 else f"a synonym of more than {MAX_WORDS} words"
            raise DataError(
                f"{what}: {line.strip()[:80]}", where=f"{path}:{number}", hint="write lines such as: good, fine"
            )
        for words in group:
            key = tuple(word.lower() for word in words)
            synonyms.setdefault(key, []).extend(other for other in group if other != words)
    if not synonyms:
        raise DataError("the synonym list is empty", where=str(path), hint="write lines such as: good, fine")
    return synonyms


def split_words(text: str) -> list[str]:
    """Split a text at white space; each Chinese or Japanese character is a word."""
    return [match[1] for match in _WORD.finditer(text)]


@dataclass(frozen=True)
class Augmenter:
    """The changes of `data.augment`, applied one after the other."""

    changes: tuple[Callable[[Words, Random], Words], ...]
    seed: int
    columns: Columns
    paraphrase_rate: float = 0.0
    """Probability that a text is replaced by its paraphrase, before the other changes."""
    paraphrases: Mapping[str, str] = field(default_factory=dict)
    """Text -> its back-translation."""

    @classmethod
    def of(
        cls, steps: Sequence[Augmentation], seed: int, columns: Columns, paraphrases: Mapping[str, str] | None = None
    ) -> Augmenter:
        """Create an augmenter from `data.augment` and the back-translated texts.

        Raises:
            DataError: a synonym list cannot be read.
        """
        paraphrase_rate = next((step.probability for step in steps if step.name == "back-translation"), 0.0)
        words = tuple(_change(step) for step in steps if step.name != "back-translation")
        return cls(words, seed, columns, paraphrase_rate, paraphrases or {})

    def words(self, words: Words, epoch: int, index: int) -> Words:
        """Augment words of the example at `index` for an epoch."""
        draw = np.random.default_rng([self.seed, epoch, index])
        for change in self.changes:
            if words.words:
                words = change(words, draw)
        return words

    def row(self, row: Row, epoch: int, index: int) -> Row:
        """Augment the texts of a row; the spacing between unchanged words is kept.

        In a row with tags, only words outside entities are changed, and each tag moves with its word.

        Raises:
            RecipeError: the row has spans, or the augmentation is back-translation, so that tags cannot be assigned.
        """
        words = of_kind(self.columns, "words")
        if words is not None and words.name in row.values:
            tags = of_kind(self.columns, "tags")
            assert tags is not None, "words have tags"
            return self._tagged_row(row, words.name, tags.name, epoch, index)
        texts = {name: self._text(text, epoch, index) for name, text in _texts(row, self.columns)}
        return Row(row.place, row.values | texts)

    def _tagged_row(self, row: Row, words: str, label: str, epoch: int, index: int) -> Row:
        if self.paraphrase_rate:
            what = "data.augment: back-translation cannot carry tags of words over to the new text"
            raise RecipeError(what, where=row.place, hint="remove back-translation")
        tokens, tags = row.values[words], row.values.get(label)
        assert isinstance(tokens, list), "words are a list"
        if not isinstance(tags, list) or len(tags) != len(tokens) or not all(isinstance(tag, str) for tag in tags):
            what = "data.augment: words can be changed only if each has a tag that is a text"
            raise RecipeError(what, where=row.place, hint="give tokens and tags, or remove the key")
        keep = [
            tag != "O" or _separates_entities(following) for tag, following in zip(tags, [*tags[1:], "O"], strict=True)
        ]
        after = self.words(Words.of([str(word) for word in tokens], keep), epoch, index)
        texts = dict(_texts(row, self.columns))  # dropped: they contain the original words
        values = {name: value for name, value in row.values.items() if name not in texts}
        values |= {words: list(after.words), label: [tags[origin] for origin in after.origins]}
        return Row(row.place, values)

    def _text(self, text: str, epoch: int, index: int) -> str:
        if self.paraphrase_rate and np.random.default_rng([self.seed, epoch, index, 1]).random() < self.paraphrase_rate:
            text = self.paraphrases.get(text, text)
        parts = [(match[1], match[2]) for match in _WORD.finditer(text)]
        before = Words.of([word for word, _ in parts])
        after = self.words(before, epoch, index)
        if after == before:
            return text
        places = sorted(after.origins)  # swaps move words, not the space between them
        joined = [f"{word}{_space_after(parts, places, at)}" for at, word in enumerate(after.words)]
        return "".join(joined).rstrip()


def _separates_entities(following: str) -> bool:
    """Return whether an O word may separate two entities: the next tag is not O and does not mark a beginning (IO)."""
    return following != "O" and not following.startswith(("B-", "S-", "U-"))


def _space_after(parts: Sequence[tuple[str, str]], places: Sequence[int], at: int) -> str:
    """Return the space after a word: the original one, or one space inside a synonym that is not Chinese."""
    inside = at + 1 < len(places) and places[at + 1] == places[at]
    return ("" if re.match(f"[{_CJK}]", parts[places[at]][0]) else " ") if inside else parts[places[at]][1]


def _change(step: Augmentation) -> Callable[[Words, Random], Words]:
    if step.name == "synonyms":
        assert step.file is not None, "refused when the recipe is loaded"
        synonyms = read_synonyms(step.file)
        return lambda words, draw: replace_synonyms(words, step.probability, draw, synonyms)
    change = {"word-dropout": drop_words, "word-swap": swap_words, "typos": misspell}[step.name]
    return lambda words, draw: change(words, step.probability, draw)


def synonym_hashes(steps: Sequence[Augmentation]) -> list[str]:
    """Return the sha256 of each synonym list."""
    return [file_sha256(Path(step.file)) for step in steps if step.file is not None]


def texts_of(rows: Iterable[Row], columns: Columns) -> Iterator[str]:
    """Return the texts that may be augmented."""
    return (text for row in rows for _, text in _texts(row, columns))


def _texts(row: Row, columns: Columns) -> Iterator[tuple[str, str]]:
    """Yield column name and value of each text input."""
    for column in inputs_of(columns):
        if column.kind == "text" and isinstance(value := row.values.get(column.name), str):
            yield column.name, value
