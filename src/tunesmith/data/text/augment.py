"""Texts changed a little, anew in each epoch: words dropped, swapped, misspelt, or replaced by synonyms; or whole texts
said paraphrases (`deploy/back_translation.py`).

"EDA: Easy Data Augmentation Techniques" (Wei and Zou 2019, arXiv 1901.11196). What is done to an example is a function
of (seed, epoch, index) alone, so that a resumed run and several processes see the same. All changes work on lists of
words and say from which word each came, so that tags can be carried along; words to be kept are never touched.
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
"""Of a synonym's other side: `put up with` is three."""
Random = np.random.Generator
Synonyms = Mapping[tuple[str, ...], Sequence[tuple[str, ...]]]
_CJK = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
"""Scripts that have no blanks between words."""
_WORD = re.compile(rf"([{_CJK}]|[^\s{_CJK}]+)(\s*)")
_PUNCTUATED_WORD = re.compile(r"^(\W*)(.*?)(\W*)$", re.DOTALL)
_KEY_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_ADJACENT_KEYS = {
    letter: "".join(row[max(at - 1, 0) : at + 2] for row in _KEY_ROWS[max(y - 1, 0) : y + 2]).replace(letter, "")
    for y, letters in enumerate(_KEY_ROWS)
    for at, letter in enumerate(letters)
}
"""Letter -> those beside it on a keyboard."""


@dataclass(frozen=True)
class Words:
    """Words, the number of the word that each came from, and which of them must stay as they are."""

    words: tuple[str, ...]
    origins: tuple[int, ...]
    keep: tuple[bool, ...]

    @classmethod
    def of(cls, words: Sequence[str], keep: Sequence[bool] | None = None) -> Words:
        """Words before any change."""
        return cls(tuple(words), tuple(range(len(words))), tuple(keep or [False] * len(words)))

    def at(self, positions: Sequence[int]) -> Words:
        """The words at some positions, in that order."""
        parts = ((self.words[at], self.origins[at], self.keep[at]) for at in positions)
        words, origins, keep = zip(*parts, strict=True)
        return Words(words, origins, keep)


def drop_words(words: Words, probability: float, draw: Random) -> Words:
    """Leave out words, but never all."""
    stays = [at for at, lot in enumerate(draw.random(len(words.words))) if words.keep[at] or lot >= probability]
    return words.at(stays or [int(draw.integers(len(words.words)))])


def swap_words(words: Words, probability: float, draw: Random) -> Words:
    """Exchange a word with the next one."""
    order = list(range(len(words.words)))
    for at, lot in enumerate(draw.random(max(len(order) - 1, 0))):
        if lot < probability and not (words.keep[order[at]] or words.keep[order[at + 1]]):
            order[at], order[at + 1] = order[at + 1], order[at]
    return words.at(order)


def misspell(words: Words, probability: float, draw: Random) -> Words:
    """One slip in a word of two letters or more: a key beside the right one, a letter left out, doubled, or exchanged
    with the next. A Chinese character is written twice.
    """
    lots = draw.random(len(words.words))
    changed = [
        word if kept or lot >= probability else _typo(word, draw)
        for word, kept, lot in zip(words.words, words.keep, lots, strict=True)
    ]
    return replace(words, words=tuple(changed))


def _typo(word: str, draw: Random) -> str:
    letters = [at for at, letter in enumerate(word) if letter.isalpha()]
    if not letters:
        return word
    at = letters[int(draw.integers(len(letters)))]
    how = int(draw.integers(4)) if len(letters) > 1 else 2
    if how == 0 and (near := _ADJACENT_KEYS.get(word[at].lower())):
        typed = near[int(draw.integers(len(near)))]
        return word[:at] + (typed.upper() if word[at].isupper() else typed) + word[at + 1 :]
    if how == 1:
        return word[:at] + word[at + 1 :]
    if how == 3 and at + 1 < len(word):
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return word[: at + 1] + word[at:]


def replace_synonyms(words: Words, probability: float, draw: Random, synonyms: Synonyms) -> Words:
    """Put another word, or several, of the same line of the user's list; what stands around a word stays."""
    found: list[tuple[str, int, bool]] = []
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
            found.extend((word, words.origins[at + size - 1], False) for word in chosen)
        else:
            found.extend(
                zip(words.words[at : at + size], words.origins[at : at + size], words.keep[at : at + size], strict=True)
            )
        at += size
    texts, origins, keep = zip(*found, strict=True)
    return Words(texts, origins, keep)


def _punctuation(word: str) -> tuple[str, str, str]:
    """What stands before a word, the word, what stands behind it."""
    match = _PUNCTUATED_WORD.match(word)
    assert match is not None, "it matches everything"
    return match[1], match[2], match[3]


def read_synonyms(path: str | Path) -> Synonyms:
    """A text of lines `good, fine, nice`: each stands for the others.

    Raises:
        DataError: it cannot be read, or a line has one word only.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise DataError(
            f"the synonyms cannot be read: {error.strerror}", where=str(path), hint="check data.augment"
        ) from None
    except UnicodeDecodeError:
        raise DataError("the synonyms are no UTF-8 text", where=str(path), hint="save them as UTF-8") from None
    found: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for number, line in enumerate(lines, start=1):
        group = [tuple(split_words(part.strip())) for part in re.split(r"[,，\t]", line) if part.strip()]
        if len(group) == 1 or any(len(words) > MAX_WORDS for words in group):
            what = "one word alone has no synonym" if len(group) == 1 else f"more than {MAX_WORDS} words"
            raise DataError(
                f"{what}: {line.strip()[:80]}", where=f"{path}:{number}", hint="write lines such as: good, fine"
            )
        for words in group:
            key = tuple(word.lower() for word in words)
            found.setdefault(key, []).extend(other for other in group if other != words)
    if not found:
        raise DataError("there are no synonyms in it", where=str(path), hint="write lines such as: good, fine")
    return found


def split_words(text: str) -> list[str]:
    """A text as words: between blanks, and each Chinese or Japanese character for itself."""
    return [match[1] for match in _WORD.finditer(text)]


@dataclass(frozen=True)
class Augmenter:
    """The changes that a recipe asks for, one after the other."""

    changes: tuple[Callable[[Words, Random], Words], ...]
    seed: int
    columns: Columns
    paraphrase_rate: float = 0.0
    """Of the texts that are said paraphrases, before anything else."""
    paraphrases: Mapping[str, str] = field(default_factory=dict)
    """Text -> what is said in its place."""

    @classmethod
    def of(
        cls, steps: Sequence[Augmentation], seed: int, columns: Columns, paraphrases: Mapping[str, str] | None = None
    ) -> Augmenter:
        """From `data.augment`, and the texts as back-translation has them.

        Raises:
            DataError: a list of synonyms cannot be read.
        """
        paraphrase_rate = next((step.probability for step in steps if step.name == "back-translation"), 0.0)
        words = tuple(_change(step) for step in steps if step.name != "back-translation")
        return cls(words, seed, columns, paraphrase_rate, paraphrases or {})

    def words(self, words: Words, epoch: int, index: int) -> Words:
        """Some words of the example at `index`, as they are in an epoch."""
        draw = np.random.default_rng([self.seed, epoch, index])
        for change in self.changes:
            if words.words:
                words = change(words, draw)
        return words

    def row(self, row: Row, epoch: int, index: int) -> Row:
        """A row with its texts changed; blanks between words that nothing has happened to stay as they are.

        Of words with tags only those outside of entities are changed, and the tags go along.

        Raises:
            RecipeError: the labels of words are no list of tags, so that they cannot go along.
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
            what = "data.augment: back-translation says a text paraphrases, and tags of words cannot go along"
            raise RecipeError(what, where=row.place, hint="leave it out")
        tokens, tags = row.values[words], row.values.get(label)
        assert isinstance(tokens, list), "the role holds lists"
        if not isinstance(tags, list) or len(tags) != len(tokens) or not all(isinstance(tag, str) for tag in tags):
            what = "data.augment: words can be changed where each has its tag, as a text"
            raise RecipeError(what, where=row.place, hint="give tokens and tags, or leave the key out")
        keep = [
            tag != "O" or _separates_entities(following) for tag, following in zip(tags, [*tags[1:], "O"], strict=True)
        ]
        after = self.words(Words.of([str(word) for word in tokens], keep), epoch, index)
        texts = dict(_texts(row, self.columns))  # they hold the words as they were
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
        places = sorted(after.origins)  # where nothing is dropped or put in, words change places and blanks do not
        joined = [f"{word}{_space_after(parts, places, at)}" for at, word in enumerate(after.words)]
        return "".join(joined).rstrip()


def _separates_entities(following: str) -> bool:
    """Whether a word in no entity is all that parts the next one, which no tag begins, from the one before (IO)."""
    return following != "O" and not following.startswith(("B-", "S-", "U-"))


def _space_after(parts: Sequence[tuple[str, str]], places: Sequence[int], at: int) -> str:
    """What stands behind a word: within a synonym of several words a blank, if they are not Chinese."""
    inside = at + 1 < len(places) and places[at + 1] == places[at]
    return ("" if re.match(f"[{_CJK}]", parts[places[at]][0]) else " ") if inside else parts[places[at]][1]


def _change(step: Augmentation) -> Callable[[Words, Random], Words]:
    if step.name == "synonyms":
        assert step.file is not None, "the recipe refuses that"
        synonyms = read_synonyms(step.file)
        return lambda words, draw: replace_synonyms(words, step.probability, draw, synonyms)
    change = {"word-dropout": drop_words, "word-swap": swap_words, "typos": misspell}[step.name]
    return lambda words, draw: change(words, step.probability, draw)


def synonym_hashes(steps: Sequence[Augmentation]) -> list[str]:
    """sha256 of the lists of synonyms."""
    return [file_sha256(Path(step.file)) for step in steps if step.file is not None]


def texts_of(rows: Iterable[Row], columns: Columns) -> Iterator[str]:
    """The texts that may be changed."""
    return (text for row in rows for _, text in _texts(row, columns))


def _texts(row: Row, columns: Columns) -> Iterator[tuple[str, str]]:
    """Name and value of each input that is a text."""
    for column in inputs_of(columns):
        if column.kind == "text" and isinstance(value := row.values.get(column.name), str):
            yield column.name, value
