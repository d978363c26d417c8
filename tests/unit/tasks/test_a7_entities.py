"""Bad inputs of entity recognition: exit code 3 with file, line, value and fix, or a counted skip; never silent."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from messages import has_parts

from tunesmith.data.formats import Row
from tunesmith.errors import DataError
from tunesmith.recipe import Data
from tunesmith.tasks.token_classification import TokenClassification
from tunesmith.testing import tiny_tokenizer
from tunesmith.training import dataset

Command = Callable[..., tuple[int, str, str]]
SOUND = "\n\n".join(
    f"the\tO\nfilm\tO\nwas\tO\n{word}\tB-X\n{word}\tI-X\nso\tO" for word in ("great", "bad", "dull") * 4
)
OTHERS = "\n\n".join(f"a{n}\tO\nfilm\tB-X" for n in range(20))


def _text(label: Any, text: str = "Zoë lives in Köln") -> str:
    rows = [{"text": f"{n} film great", "spans": [[n // 10 + 2, n // 10 + 6, "X"]]} for n in range(10)]
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in [*rows, {"text": text, "spans": label}]) + "\n"


BAD: dict[str, tuple[str, tuple[str, ...], int]] = {
    "81 one giant sentence": (
        SOUND.replace("\n\n", "\n") + "\n",
        ("all 72 words ", "one sentence; ", "blank line"),
        0,
    ),
    "82 I without B": (
        f"{OTHERS}\n\nx\tO\ny\tI-X\n",
        ("train.any:62: label: 'I-X' after 'O'", "BIO entity", "; "),
        1,
    ),
    "82 I of another type": (f"{OTHERS}\n\nx\tB-Y\ny\tI-X\n", ("train.any:62: label: 'I-X' after 'B-Y'", "; "), 1),
    "82 BIOES, no end": (
        OTHERS.replace("B-X", "S-X") + "\n\nx\tB-X\ny\tO\n",
        ("train.any:62: label: 'O' after 'B-X'", "unfinished entity", "; "),
        1,
    ),
    "83 another scheme": (
        f"{OTHERS}\n\nx\tO\ny\tU-X\n",
        ("train.any:62: label: 'U-X' ", "BIO scheme", "; "),
        1,
    ),
    "83 a type alone": (f"{OTHERS}\n\nx\tO\ny\tX\n", ("train.any:62: label: 'X' ", "BIO scheme", "; "), 1),
    "84 a tag on a blank line": (f"{OTHERS}\n\nx\tO\n\tO\n", ("train.any:62: ", "tag without a word", "; "), 1),
    "85 three columns": (f"{OTHERS}\n\nx\tO\ny\tNN\tO\n", ("train.any:62: 3 columns,", "have 2", "; "), 1),
    "86 blanks among tabs": (f"{OTHERS}\n\nx\tO\nNew B-X\n", ("train.any:62: 1 column", "; "), 1),
    "88 a typo": (
        f"{OTHERS}\n\nx\tO\ny\tB_X\n",
        ("train.any:62: label: 'B_X' ", "BIO scheme; did you mean 'B-X'?"),
        1,
    ),
    "91 unaligned": (_text([[1, 3, "X"]]), ("train.any:11: spans: ", "1-3 'oë'", "the word 'Zoë'", "; "), 1),
    "92 overlap": (_text([[0, 3, "X"], [0, 9, "X"]]), ("train.any:11: spans: ", "0-3 'Zoë' and 0-9", "; "), 1),
    "93 beyond": (_text([[0, 99, "X"]]), ("train.any:11: spans: ", "0-99 ", "the text of 17", "; "), 1),
    "94 bytes": (_text([[14, 19, "X"]]), ("train.any:11: spans: ", "14-19 ", "the text", "; "), 1),
    "94 UTF-16": (_text([[3, 6, "X"]], "👋 Zoë lives"), ("spans", "UTF-16 units", "count characters"), 1),
    "nothing to find": (OTHERS.replace("B-X", "O"), ("all 40 words ", "tag O; ", "no entities"), 0),
    "tags of numbers": ('{"tokens": ["a", "b"], "ner_tags": [0, 1]}\n' * 3, ("task.tags=[O, B-PER, ...]",), 0),
    "a table of texts": (
        "text,label\nlovely,good\nawful,bad\n",
        ("train.any:2: label: 'good' ", "list of tags", "; "),
        0,
    ),
}
"""Content of the file, parts of the error, and number of rows that a skip leaves out (0: it does not help)."""


@pytest.mark.parametrize(("content", "parts", "skipped"), BAD.values(), ids=BAD)
def test_bad_inputs(content: str, parts: tuple[str, ...], skipped: int, command: Command, tmp_path: Path) -> None:
    path = tmp_path / "train.any"
    path.write_text(content, encoding="utf-8")
    words = (
        "task=token-classification",
        "model=./none",
        f"data.train={path}",
        "device=cpu",
        f"output={tmp_path / 'run'}",
    )
    code, _, err = command("train", *words)
    assert code == 3 and has_parts(err, "", *parts) and err.count("\n") <= 2 and not (tmp_path / "run").exists(), err
    if skipped:
        data = Data(train=str(path), validation=0.2, on_bad_row="skip")
        found = dataset.read(TokenClassification(), data, seed=0)
        assert any(note.startswith(f"train: skipped {skipped} row") for note in found.notes), found.notes


def test_87_documents_and_83_schemes_are_read(tmp_path: Path) -> None:
    for scheme, tags in {
        "BIO": "B-X I-X",
        "IOB1": "I-X B-X",
        "IO": "I-X I-X",
        "BIOES": "B-X E-X",
        "BILOU": "B-X L-X",
    }.items():
        first, second = tags.split()
        body = "\n\n".join(f"a{n} O\nx {first}\ny {second}" for n in range(10))
        path = tmp_path / f"{scheme}.conll"
        path.write_text(f"-DOCSTART- O\n\n{body}\n")
        found = dataset.read(TokenClassification(), Data(train=str(path), validation=0.2), seed=0)
        assert (found.task.scheme, sum(found.rows.values())) == (scheme, 10)  # type: ignore[attr-defined]


def test_89_and_90_words_of_nothing_and_long_sentences_are_counted(tmp_path: Path) -> None:
    task = TokenClassification(tags=["O", "B-X"], scheme="BIO")
    words = ["film", "\u200b", *["great"] * 40]
    row = Row("a:1", {"tokens": words, "label": ["O"] * len(words)})
    (fields,) = task.bind(tiny_tokenizer(), None, Data(max_length=16)).encode([row])
    assert len(fields["first"]) == len(fields["tags"]) == 42 and fields["void"] == 1 and len(fields["windows"]) > 2


def test_a_row_without_words_is_refused_where_it_stands() -> None:
    bound = TokenClassification(tags=["O", "B-X"]).bind(tiny_tokenizer(), None, Data(max_length=9))
    with pytest.raises(DataError, match="^input 1: "):
        bound.encode([Row("input 1", {"text": " "})])
