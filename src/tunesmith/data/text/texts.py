"""Texts as what a model reads: tokens as ragged fields of examples, and a batch of them as padded inputs.

Longer texts are cut and counted, or read in windows, each a whole input, whose outputs are averaged per text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from tokenizers.decoders import ByteLevel
from torch import Tensor

from tunesmith.data.batches import Batch, Ragged
from tunesmith.data.encoded import Encoded
from tunesmith.data.formats import Row
from tunesmith.data.preview import Preview, Token
from tunesmith.errors import DataError, RecipeError
from tunesmith.recipe import Data

MAX_CHARS_PER_TOKEN = 64

MAX_BYTES = 4
"""Bytes of a character in UTF-8, at max_chars."""


def encode_texts(rows: Sequence[Row], processor: Any, data: Data, windows: int | None = None) -> list[dict[str, Any]]:
    """Each row's `text`, or `text` and `text_pair`: input_ids (all windows of a row, flat), whether words were cut,
    the windows' lengths where there are windows, token_type_ids where the model was made with them.

    Raises:
        DataError: a row's text is nothing to this tokenizer.
        RecipeError: this tokenizer cannot read in windows.
    """
    if windows and not processor.is_fast:
        what = f"task.windows: {type(processor).__name__} has no fast form, which alone gives what is left over"
        raise RecipeError(what, hint="leave the key out: longer texts are cut")
    encoded: dict[int, dict[str, Any]] = {}
    for columns in (("text",), ("text", "text_pair")):  # a row without a second text is read as a text alone
        part = {n: row for n, row in enumerate(rows) if ("text_pair" in row.values) == (len(columns) == 2)}
        if part:
            encoded |= zip(part, _encode(list(part.values()), columns, processor, data, windows), strict=True)
    return [encoded[number] for number in range(len(rows))]


def _encode(
    rows: list[Row], columns: Sequence[str], processor: Any, data: Data, windows: int | None
) -> list[dict[str, Any]]:
    assert data.max_length is not None, "the run resolves max_length"
    max_chars = (
        data.max_length * (windows or 1) * MAX_CHARS_PER_TOKEN
    )  # a tokenizer's time grows with all that it is shown
    texts = [[_head(str(row.values[role]), max_chars) for row in rows] for role in columns]
    coded = processor(*texts, truncation=True, max_length=data.max_length, return_overflowing_tokens=bool(windows))
    pieces: list[list[int]] = [[] for _ in rows]
    for index, row in enumerate(coded.get("overflow_to_sample_mapping", range(len(rows)))):
        pieces[row].append(index)
    specials = processor.num_special_tokens_to_add(pair=len(columns) == 2)
    for row, mine in zip(rows, pieces, strict=True):
        if sum(len(coded["input_ids"][index]) for index in mine) <= specials:
            raise row.fault("text", "nothing is left of it as tokens", "remove the row")
    fields = [_fields(coded, mine, data.max_length, windows) for mine in pieces]
    for one, row, *parts in zip(fields, rows, *texts, strict=True):
        one["cut"] |= int(len(str(row.values["text"]).strip()) > max_chars)
        if not processor.is_fast and len(one["input_ids"]) == data.max_length:  # it does not say what it has cut
            one["cut"] |= int(len(processor(*parts)["input_ids"]) > data.max_length)
    return fields


def _head(text: str, max_chars: int) -> str:
    return text if len(text) <= max_chars else text.lstrip()[:max_chars]


def _fields(coded: Any, pieces: list[int], max_length: int, windows: int | None) -> dict[str, Any]:
    """The fields of one row, of whose tokens `pieces` are the numbers in `coded`, in their order."""
    kept = pieces[: windows or 1]
    full = len(coded["input_ids"][kept[-1]]) == max_length
    cut = len(pieces) > len(kept) or (full and bool(coded.encodings and coded.encodings[kept[-1]].overflowing))
    fields: dict[str, Any] = {
        "input_ids": [token for index in kept for token in coded["input_ids"][index]],
        "cut": int(cut),
    }
    if windows:
        fields["windows"] = [len(coded["input_ids"][index]) for index in kept]
    if "token_type_ids" in coded:
        fields["token_type_ids"] = [kind for index in kept for kind in coded["token_type_ids"][index]]
    return fields


def as_bytes(text: str) -> list[int]:
    """A text as a field of numbers, whatever a tokenizer knows of it."""
    return list(text.encode())


def from_bytes(rows: Ragged) -> list[str]:
    """The texts of a field of bytes."""
    ends, values = rows.offsets.tolist(), bytes(rows.values.tolist())
    return [values[start:stop].decode() for start, stop in zip(ends[:-1], ends[1:], strict=True)]


def tokenize_truncated(
    texts: Sequence[str], processor: Any, max_length: int, role: str, places: Sequence[str], *, as_target: bool = False
) -> list[tuple[list[int], bool]]:
    """The tokens of each text, and whether it was cut to be `max_length` long; `written`: texts that a decoder writes.

    Raises:
        DataError: a text is nothing to this tokenizer.
    """
    max_chars = max_length * MAX_CHARS_PER_TOKEN
    shown = [_head(text, max_chars) for text in texts]

    def code(some: list[str], **options: Any) -> list[list[int]]:
        coded: Any = processor(**{"text_target" if as_target else "text": some}, verbose=False, **options)
        return [list(ids) for ids in coded["input_ids"]]

    found, specials = code(shown), set(processor.all_special_ids)
    long = [number for number, ids in enumerate(found) if len(ids) > max_length]
    cut = set(long) | {number for number, text in enumerate(texts) if len(text) > max_chars}
    for number, ids in zip(
        long, code([shown[n] for n in long], truncation=True, max_length=max_length) if long else (), strict=True
    ):
        found[number] = ids
    for ids, place in zip(found, places, strict=True):
        if specials.issuperset(ids):
            raise DataError(f"{role}: nothing is left of it as tokens", where=place, hint="remove the row")
    return [(ids, number in cut) for number, ids in enumerate(found)]


def token_costs(encoded: Encoded) -> NDArray[np.int64]:
    """Tokens of each example: its `length`, where it has one, else those of `input_ids`."""  # (examples,)
    if "length" in encoded:
        return np.asarray(encoded.column("length"), dtype=np.int64)
    return encoded.lengths("input_ids")


def inspect_texts(texts: Sequence[Sequence[str]], processor: Any) -> tuple[list[int], list[int]]:
    """Tokens and unknown tokens of each text, or of each pair."""
    return count_tokens([list(processor(*one, verbose=False)["input_ids"]) for one in texts], processor)


def count_tokens(ids: Sequence[Sequence[int]], processor: Any) -> tuple[list[int], list[int]]:
    """Tokens and unknown tokens of texts that are tokenized."""
    unknown = getattr(processor, "unk_token_id", None)
    return [len(one) for one in ids], [0 if unknown is None else list(one).count(unknown) for one in ids]


def preview_tokens(
    fields: dict[str, Any],
    processor: Any,
    *,
    targets: Sequence[str | None] | None = None,
    target: str | None = None,
) -> Preview:
    """The tokens of an example in its windows, with the target of each token or of the whole example."""
    ids, special = fields["input_ids"], set(processor.all_special_ids)
    labels = targets or [None] * len(ids)
    tokens = [
        Token(text, code in special, label)
        for text, code, label in zip(spell(ids, processor), ids, labels, strict=True)
    ]
    windows, start = [], 0
    for length in fields.get("windows") or [len(ids)]:
        windows.append(tokens[start : start + length])
        start += length
    return Preview(target, bool(fields.get("cut")), windows)


def spell(ids: Sequence[int], processor: Any) -> list[str]:
    """Tokens as a person reads them.

    Where a tokenizer spells bytes, a character of several tokens stands at the last of them, and `…` at the others.
    """
    names: list[str] = processor.convert_ids_to_tokens(list(ids))
    if all(name.isascii() for name in names) or not isinstance(
        getattr(getattr(processor, "backend_tokenizer", None), "decoder", None), ByteLevel
    ):
        return names
    spelled, waiting = list[str](), list[str]()
    for name in names:
        waiting.append(name)
        text = processor.convert_tokens_to_string(waiting)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(waiting) < MAX_BYTES:
            spelled.append("…")
            continue
        spelled.append(text if not text.isascii() and text.strip() == text else name)
        waiting = []
    return spelled


def text_notes(encoded: Encoded, processor: Any, windows: int | None = None) -> list[str]:
    """Texts cut, and unknown tokens above 5 %."""
    notes = []
    cut = int(encoded.column("cut").sum())
    if cut:
        way_out = "task.windows=N reads more of them" if windows is None else "raise task.windows"
        notes.append(f"{cut} of {len(encoded)} texts are longer than is read and were cut ({way_out})")
    return notes + unknown_notes(encoded, processor)


def unknown_notes(encoded: Encoded, processor: Any) -> list[str]:
    """Unknown tokens above 5 %."""
    ids = encoded.column("input_ids")
    unknown = getattr(processor, "unk_token_id", None)
    if unknown is not None and len(ids) and (share := float(np.mean(ids == unknown))) > 0.05:
        return [f"{share:.0%} of the tokens are unknown to this model: another model may fit the language"]
    return []


def model_inputs(batch: Batch, pad_token_id: int) -> dict[str, Tensor]:
    """A batch of texts, or of all their windows, as a model's arguments."""  # each (texts or windows, tokens)
    ids = batch.ragged("input_ids")
    offsets = ids.offsets
    if "windows" in batch:
        offsets = F.pad(batch.ragged("windows").values.cumsum(0), (1, 0))
    rows = Ragged(ids.values, offsets)
    inputs = {"input_ids": rows.padded(pad_token_id), "attention_mask": rows.mask()}
    if "token_type_ids" in batch:
        inputs["token_type_ids"] = Ragged(batch.ragged("token_type_ids").values, offsets).padded(0)
    return inputs


def mean_of_windows(outputs: Tensor, batch: Batch) -> Tensor:
    """What the model gave for each text or window as one output per text."""  # (texts, outputs)
    if "windows" not in batch:
        return outputs
    windows = batch.ragged("windows").lengths
    owner = torch.repeat_interleave(torch.arange(len(windows), device=outputs.device), windows)
    summed = outputs.new_zeros(len(windows), outputs.shape[1]).index_add(0, owner, outputs)
    return summed / windows[:, None]
