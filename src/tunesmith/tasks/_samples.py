"""Synthetic rows for the contract tests of text tasks, of different lengths and learned in a few steps.

Their words are in the vocabulary of `tunesmith.testing.tiny_tokenizer`.
"""

from __future__ import annotations

WORDS = "the film plot was and very acting story it this . ! a not so".split()
ENDING = "##ly"
GOOD, BAD = "great lovely warm fine superb".split(), "bad dull poor cold awful".split()


def review(number: int) -> str:
    """Return one sentence on a film, alternately negative and positive."""
    word = (BAD, GOOD)[number % 2][number // 2 % 5]
    filler = " ".join(WORDS[(number + k) % len(WORDS)] for k in range(number % 7))
    return f"the film was {word} {filler}".strip()


def document(number: int) -> str:
    """Return several reviews as one text."""
    reviews = [review(number + k) for k in range(2 + number % 4)]
    return " . ".join([*reviews, f"very {(BAD, GOOD)[number % 2][number % 5]}ly"])


def tagged(number: int) -> tuple[list[str], list[str]]:
    """Return words and tags of a sentence with one entity, of type BLAME or PRAISE."""
    kind, words = ("BLAME", "PRAISE")[number % 2], (BAD, GOOD)[number % 2]
    before = [WORDS[(number + k) % len(WORDS)] for k in range(number % 4)]
    marked = [words[(number // 2 + k) % len(words)] for k in range(1 + number % 2)]
    after = WORDS[: number % 7]
    tags = [f"{'BI'[k]}-{kind}" for k in range(len(marked))]
    return [*before, *marked, *after], ["O"] * len(before) + tags + ["O"] * len(after)


def conversation(number: int) -> list[dict[str, str]]:
    """Return one or two turns whose answers repeat a word of the question."""
    words = (BAD, GOOD)[number % 2]
    turns = [
        (f"was the {WORDS[1 + k]} {words[(number + k) % 5]}", f"it was {words[(number + k) % 5]}") for k in range(2)
    ]
    return [
        {"role": role, "content": text}
        for turn in turns[: 1 + number % 3 // 2]
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def pair(number: int) -> tuple[str, str]:
    """Return a review, and its words in reverse order, each replaced by the preceding word of the vocabulary."""
    words = review(number).split()
    known = [*WORDS, *GOOD, *BAD]
    return " ".join(words), " ".join(known[known.index(word) - 1] for word in reversed(words))
