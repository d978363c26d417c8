"""Rows that all arms of a workload train on: sampled once with seed 0 from public data, or synthetic rows of similar
length if the data is missing.
"""

from __future__ import annotations

import gzip
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.instructions import conversation
from bench.marian import lines
from bench.splits import ENTITIES, read_sentences, sst2, write_rows, write_sentences

CUT_AT = 128
WORDS = (
    "the of and a to in is was that for it with as his on be at by this had not are but from or have an they which one "
    "you were her all she there would their we him been has when who will more no if out so said what up its about into"
).split()
"""Common words, each a single token in any English tokenizer."""

Draw = Callable[[Path], list[Any]]
MakeUp = Callable[[random.Random], Any]


def write(kind: str, root: Path, count: int, folder: Path) -> tuple[Path, bool]:
    """Write `count` rows of a kind; return their path, and True if they are real data."""
    read, make_up, put = KINDS[kind]
    draw = random.Random(0)
    try:
        found, real = read(root), True
    except FileNotFoundError:
        found, real = [make_up(draw) for _ in range(count)], False
    folder.mkdir(parents=True, exist_ok=True)
    return put(folder, draw.sample(found, min(count, len(found)))), real


def _text(draw: random.Random, mean: float, least: int = 3) -> str:
    """Return random words; their number is log-normal, as in real texts."""
    spread = 0.5
    number = draw.lognormvariate(math.log(mean) - spread**2 / 2, spread)
    return " ".join(draw.choices(WORDS, k=max(least, round(number))))


def _reviews(root: Path) -> list[Any]:
    return list(sst2(root / "sst2")[0])


def _long_answers(root: Path) -> list[Any]:
    """Return the medquad answers that exceed the maximum length, each with its question type."""
    with gzip.open(root / "medquad" / "medquad_qa.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [(" ".join(row["answer"].split()), row["qtype"]) for row in map(json.loads, file)]
    return [(text, label) for text, label in rows if text.count(" ") >= CUT_AT]


def _questions(root: Path) -> list[Any]:
    """Return the medquad questions (13 tokens on average), each with its type."""
    with gzip.open(root / "medquad" / "medquad_qa.jsonl.gz", "rt", encoding="utf-8") as file:
        return sorted({(" ".join(row["question"].split()), row["qtype"]) for row in map(json.loads, file)})


def _sentences(root: Path) -> list[Any]:
    return list(read_sentences(root / "wnut17" / ENTITIES["wnut17"][0]))


def _conversations(root: Path) -> list[Any]:
    files = sorted((root / "alpaca_en").glob("*.json"))
    if not files:
        raise FileNotFoundError(root / "alpaca_en")
    rows = [row for file in files for row in json.loads(file.read_text(encoding="utf-8"))]
    return [conversation(row) for row in rows if row["instruction"].strip() and row["output"].strip()]


def _pairs(root: Path) -> list[Any]:
    english, german = (list(lines(root / "multi30k_en_de" / f"train.{language}")) for language in ("en", "de"))
    return list(zip(english, german, strict=True))


def _made_up_sentence(draw: random.Random) -> list[tuple[str, str]]:
    words, tags = _text(draw, 18).split(), list[str]()
    while len(tags) < len(words):
        tags += draw.choices((["O"], ["B-person", "I-person"], ["B-location", "I-location"]), (18, 1, 1))[0]
    return list(zip(words, tags, strict=False))


def _made_up_conversation(draw: random.Random) -> dict[str, Any]:
    return conversation({"instruction": _text(draw, 17), "input": "", "output": _text(draw, 60)})


def _put_texts(folder: Path, rows: list[Any]) -> Path:
    write_rows(folder / "train.csv", rows)
    return folder / "train.csv"


def _put_sentences(folder: Path, rows: list[Any]) -> Path:
    write_sentences(folder / "train.conll", rows)
    return folder / "train.conll"


def _put_conversations(folder: Path, rows: list[Any]) -> Path:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "train.jsonl").write_text(text, encoding="utf-8")
    return folder / "train.jsonl"


def _put_pairs(folder: Path, rows: list[Any]) -> Path:
    for language, side in zip(("en", "de"), zip(*rows, strict=True), strict=True):
        (folder / f"train.{language}").write_text("".join(f"{text}\n" for text in side), encoding="utf-8")
    return folder


KINDS: dict[str, tuple[Draw, MakeUp, Callable[[Path, list[Any]], Path]]] = {
    "sst2": (_reviews, lambda draw: (_text(draw, 19), draw.choice("01")), _put_texts),
    "medquad": (_long_answers, lambda draw: (_text(draw, 200, CUT_AT), draw.choice("abcdefgh")), _put_texts),
    "medquad-questions": (_questions, lambda draw: (_text(draw, 10), draw.choice("abcdefgh")), _put_texts),
    "wnut17": (_sentences, _made_up_sentence, _put_sentences),
    "alpaca_en": (_conversations, _made_up_conversation, _put_conversations),
    "multi30k_en_de": (_pairs, lambda draw: (_text(draw, 12), _text(draw, 11)), _put_pairs),
}
"""Kind of data -> functions that read the data, generate a synthetic row, and write rows."""
