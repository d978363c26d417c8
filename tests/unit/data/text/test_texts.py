"""Texts as tokens: truncation is counted and reported, windows lose nothing, pairs follow the tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import ByT5Tokenizer

from tunesmith.data.batches import Batch, Ragged, collate
from tunesmith.data.encoded import Encoded, encode
from tunesmith.data.formats import Row
from tunesmith.data.text.texts import (
    as_bytes,
    encode_texts,
    from_bytes,
    mean_of_windows,
    model_inputs,
    text_notes,
    token_costs,
)
from tunesmith.errors import RecipeError
from tunesmith.recipe import Data
from tunesmith.testing import tiny_tokenizer

TEXTS = ("the film was great", "bad", "a very very dull plot . not so", "lovely acting and a fine story !")
WORDS = "great lovely warm fine superb bad dull poor cold awful film plot story acting".split()
TOKENIZER = tiny_tokenizer()
LONG = [
    " ".join(WORDS[(start + step) % len(WORDS)] for step in range(length))
    for start, length in enumerate((3, 14, 15, 40))
]
"""Texts of 5, 16, 17 and 42 tokens, special tokens included."""


def _rows(texts: Sequence[str | tuple[str, str]]) -> list[Row]:
    roles = ("text", "text_pair")
    values = [{"text": text} if isinstance(text, str) else dict(zip(roles, text, strict=True)) for text in texts]
    return [Row(f"made-up:{number}", dict(value)) for number, value in enumerate(values)]


def _encode(
    texts: Sequence[Any], max_length: int, folder: Path, *, windows: int | None = None, tokenizer: Any = TOKENIZER
) -> Encoded:
    data = Data(max_length=max_length)
    return encode(
        _rows(texts), lambda rows: encode_texts(rows, tokenizer, data, windows), folder / "encoded", token_costs
    )


def _all(encoded: Encoded) -> Batch:
    return collate(encoded, np.arange(len(encoded)))


@pytest.mark.parametrize("tokenizer", (TOKENIZER, ByT5Tokenizer()), ids=("fast", "slow"))
def test_longer_texts_are_cut_counted_and_said(tokenizer: Any, tmp_path: Path) -> None:
    max_length = 16 if tokenizer.is_fast else len(LONG[1]) + 1
    encoded = _encode(LONG, max_length, tmp_path, tokenizer=tokenizer)
    assert encoded.costs.max() == max_length and encoded.column("cut").tolist() == [0, 0, 1, 1]
    (note,) = text_notes(encoded, tokenizer)
    assert note.startswith("2 of 4 texts ") and "task.windows=N" in note
    whole = _encode(LONG, 500, tmp_path / "whole", tokenizer=tokenizer)
    assert whole.column("cut").sum() == 0 and text_notes(whole, tokenizer) == []


def test_windows_lose_no_token(tmp_path: Path) -> None:
    encoded = _encode(LONG, 16, tmp_path, windows=3)
    for number, text in enumerate(LONG):
        taken = encoded.take([number])
        windows = np.split(taken["input_ids"][0], np.cumsum(taken["windows"][0])[:-1])
        assert all(len(window) <= 16 and (window[0], window[-1]) == (2, 3) for window in windows), (
            "each is a whole input"
        )
        inside = [token for window in windows for token in window[1:-1]]
        assert inside == TOKENIZER(text, add_special_tokens=False)["input_ids"]
        assert len(windows) == -(-len(inside) // 14)
    assert encoded.column("cut").sum() == 0 and text_notes(encoded, TOKENIZER, 3) == []


def test_what_the_windows_leave_is_counted_and_said(tmp_path: Path) -> None:
    encoded = _encode(LONG, 16, tmp_path, windows=2)
    assert encoded.column("cut").tolist() == [0, 0, 0, 1]
    (note,) = text_notes(encoded, TOKENIZER, 2)
    assert note.startswith("1 of 4 texts ") and "task.windows" in note and "=N" not in note


def test_windows_with_a_tokenizer_that_cannot_say_what_is_left_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="^task.windows: ByT5Tokenizer "):
        _encode(LONG, 32, tmp_path, windows=2, tokenizer=ByT5Tokenizer())


def test_a_text_is_read_the_same_whatever_stands_beside_it() -> None:
    rows, data = _rows([TEXTS[0], (TEXTS[0], TEXTS[1]), TEXTS[2], (TEXTS[3], TEXTS[2])]), Data(max_length=32)
    together = encode_texts(rows, TOKENIZER, data)
    assert together == [encode_texts([row], TOKENIZER, data)[0] for row in rows]
    assert together[0]["input_ids"] == TOKENIZER(TEXTS[0])["input_ids"], "without a second text, a text alone"


@pytest.mark.parametrize("second", ((), (TEXTS[::-1],)), ids=("texts", "pairs"))
def test_a_model_is_given_what_the_tokenizer_gives_it(second: Any, tmp_path: Path) -> None:
    texts = list(zip(TEXTS, *second, strict=True)) if second else TEXTS
    inputs = model_inputs(_all(_encode(texts, 32, tmp_path)), pad_token_id=0)
    theirs = TOKENIZER(list(TEXTS), *map(list, second), padding=True, return_tensors="pt")
    assert inputs.keys() == theirs.keys() and all(torch.equal(inputs[name], theirs[name]) for name in theirs)


def test_windows_are_rows_of_the_model_and_a_text_is_their_mean(tmp_path: Path) -> None:
    batch = _all(_encode(LONG, 16, tmp_path, windows=3))
    ids = model_inputs(batch, pad_token_id=0)["input_ids"]
    assert ids.shape == (1 + 1 + 2 + 3, 16) and ids[:, 0].tolist() == [2] * 7
    outputs = torch.arange(7.0)[:, None]
    assert mean_of_windows(outputs, batch).tolist() == [[0.0], [1.0], [2.5], [5.0]]
    assert mean_of_windows(outputs[:4], _all(_encode(LONG, 16, tmp_path / "cut"))).tolist() == outputs[:4].tolist()


def test_unknown_tokens_are_said_from_a_twentieth_on(tmp_path: Path) -> None:
    known = " ".join(WORDS + WORDS[:4])  # 18 words and two special tokens
    for strange, notes in (("", []), ("zzz", []), ("zzz yyy", ["9%"])):
        encoded = _encode([f"{known} {strange}"], 64, tmp_path / (strange or "none"))
        assert [note.partition(" of the tokens ")[0] for note in text_notes(encoded, TOKENIZER)] == notes


def test_texts_as_bytes_come_back_whole() -> None:
    texts = ["a film", "", "中文 \N{CLOWN FACE}", "x\x00y"]
    coded = [as_bytes(text) for text in texts]
    ends = torch.tensor([0, *(len(one) for one in coded)]).cumsum(0)
    assert from_bytes(Ragged(torch.tensor([byte for one in coded for byte in one]), ends)) == texts
