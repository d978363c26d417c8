"""Tokenization of texts into ragged fields, and batches of them as padded model inputs.

Texts beyond `max_length` are truncated and counted, or encoded in several windows whose outputs are averaged.
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
"""Texts are cut to this many characters per token of `max_length` before they are tokenized."""

MAX_BYTES = 4
"""Maximum bytes of a character in UTF-8."""


def encode_texts(rows: Sequence[Row], processor: Any, data: Data, windows: int | None = None) -> list[dict[str, Any]]:
    """Encode each row's `text`, or `text` and `text_pair`.

    Fields: `input_ids` (all windows of a row, flat), `cut` (1 if the text is truncated), `windows` (the lengths of the
    windows), and `token_type_ids` if the tokenizer returns them.

    Raises:
        DataError: a text has no tokens.
        RecipeError: the tokenizer does not support windows.
    """
    if windows and not processor.is_fast:
        what = f"task.windows: {type(processor).__name__} is not a fast tokenizer and returns no overflowing tokens"
        raise RecipeError(what, hint="remove the key: longer texts are then truncated")
    encoded: dict[int, dict[str, Any]] = {}
    for columns in (("text",), ("text", "text_pair")):  # a row without a second text is encoded as a single text
        part = {n: row for n, row in enumerate(rows) if ("text_pair" in row.values) == (len(columns) == 2)}
        if part:
            encoded |= zip(part, _encode(list(part.values()), columns, processor, data, windows), strict=True)
    return [encoded[number] for number in range(len(rows))]


def _encode(
    rows: list[Row], columns: Sequence[str], processor: Any, data: Data, windows: int | None
) -> list[dict[str, Any]]:
    assert data.max_length is not None, "the run resolves max_length"
    max_chars = data.max_length * (windows or 1) * MAX_CHARS_PER_TOKEN  # limits the tokenizer's time
    texts = [[_head(str(row.values[role]), max_chars) for row in rows] for role in columns]
    coded = processor(*texts, truncation=True, max_length=data.max_length, return_overflowing_tokens=bool(windows))
    windows_of: list[list[int]] = [[] for _ in rows]  # row -> indices of its windows in `coded`
    for index, row in enumerate(coded.get("overflow_to_sample_mapping", range(len(rows)))):
        windows_of[row].append(index)
    specials = processor.num_special_tokens_to_add(pair=len(columns) == 2)
    for row, indices in zip(rows, windows_of, strict=True):
        if sum(len(coded["input_ids"][index]) for index in indices) <= specials:
            raise row.fault("text", "the text has no tokens", "remove the row")
    encoded = [_fields(coded, indices, data.max_length, windows) for indices in windows_of]
    for fields, row, *parts in zip(encoded, rows, *texts, strict=True):
        fields["cut"] |= int(len(str(row.values["text"]).strip()) > max_chars)
        if not processor.is_fast and len(fields["input_ids"]) == data.max_length:  # slow tokenizers do not report cuts
            fields["cut"] |= int(len(processor(*parts)["input_ids"]) > data.max_length)
    return encoded


def _head(text: str, max_chars: int) -> str:
    return text if len(text) <= max_chars else text.lstrip()[:max_chars]


def _fields(coded: Any, indices: list[int], max_length: int, windows: int | None) -> dict[str, Any]:
    """Return the fields of one row; `indices` are those of its windows in `coded`."""
    kept = indices[: windows or 1]
    full = len(coded["input_ids"][kept[-1]]) == max_length
    cut = len(indices) > len(kept) or (full and bool(coded.encodings and coded.encodings[kept[-1]].overflowing))
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
    """Encode a text as a field of UTF-8 bytes, independent of a tokenizer."""
    return list(text.encode())


def from_bytes(rows: Ragged) -> list[str]:
    """Decode the texts of a field of bytes."""
    ends, values = rows.offsets.tolist(), bytes(rows.values.tolist())
    return [values[start:stop].decode() for start, stop in zip(ends[:-1], ends[1:], strict=True)]


def tokenize_truncated(
    texts: Sequence[str], processor: Any, max_length: int, role: str, places: Sequence[str], *, as_target: bool = False
) -> list[tuple[list[int], bool]]:
    """Tokenize texts, truncated to `max_length`; return the tokens of each, and True if it was truncated.

    `as_target`: tokenize as decoder targets.

    Raises:
        DataError: a text has no tokens.
    """
    max_chars = max_length * MAX_CHARS_PER_TOKEN
    heads = [_head(text, max_chars) for text in texts]

    def tokenize(texts: list[str], **options: Any) -> list[list[int]]:
        coded: Any = processor(**{"text_target" if as_target else "text": texts}, verbose=False, **options)
        return [list(ids) for ids in coded["input_ids"]]

    coded, specials = tokenize(heads), set(processor.all_special_ids)
    long = [number for number, ids in enumerate(coded) if len(ids) > max_length]
    cut = set(long) | {number for number, text in enumerate(texts) if len(text) > max_chars}
    truncated = tokenize([heads[n] for n in long], truncation=True, max_length=max_length) if long else ()
    for number, ids in zip(long, truncated, strict=True):
        coded[number] = ids
    for ids, place in zip(coded, places, strict=True):
        if specials.issuperset(ids):
            raise DataError(f"{role}: the text has no tokens", where=place, hint="remove the row")
    return [(ids, number in cut) for number, ids in enumerate(coded)]


def token_costs(encoded: Encoded) -> NDArray[np.int64]:
    """Count the tokens of each example: the field `length` if it exists, else `input_ids`."""  # (examples,)
    if "length" in encoded:
        return np.asarray(encoded.column("length"), dtype=np.int64)
    return encoded.lengths("input_ids")


def inspect_texts(texts: Sequence[Sequence[str]], processor: Any) -> tuple[list[int], list[int]]:
    """Count tokens and unknown tokens of each text or pair of texts."""
    return count_tokens([list(processor(*parts, verbose=False)["input_ids"]) for parts in texts], processor)


def count_tokens(ids: Sequence[Sequence[int]], processor: Any) -> tuple[list[int], list[int]]:
    """Count tokens and unknown tokens of tokenized texts."""
    unknown = getattr(processor, "unk_token_id", None)
    return [len(text) for text in ids], [0 if unknown is None else list(text).count(unknown) for text in ids]


def preview_tokens(
    fields: dict[str, Any],
    processor: Any,
    *,
    targets: Sequence[str | None] | None = None,
    target: str | None = None,
) -> Preview:
    """Preview an example: its tokens by window, with the target of each token or of the whole example."""
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
    """Return tokens in readable form.

    With a byte-level tokenizer, a character of several tokens is shown at the last of them, and `…` at the others.
    """
    names: list[str] = processor.convert_ids_to_tokens(list(ids))
    if all(name.isascii() for name in names) or not isinstance(
        getattr(getattr(processor, "backend_tokenizer", None), "decoder", None), ByteLevel
    ):
        return names
    spelled, pending = list[str](), list[str]()
    for name in names:
        pending.append(name)
        text = processor.convert_tokens_to_string(pending)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(pending) < MAX_BYTES:
            spelled.append("…")
            continue
        spelled.append(text if not text.isascii() and text.strip() == text else name)
        pending = []
    return spelled


def text_notes(encoded: Encoded, processor: Any, windows: int | None = None) -> list[str]:
    """Return notes on truncated texts, and on more than 5 % unknown tokens."""
    notes = []
    cut = int(encoded.column("cut").sum())
    if cut:
        hint = "set task.windows=N to read more" if windows is None else "raise task.windows to read more"
        notes.append(f"{cut} of {len(encoded)} texts are truncated ({hint})")
    return notes + unknown_notes(encoded, processor)


def unknown_notes(encoded: Encoded, processor: Any) -> list[str]:
    """Return a note if more than 5 % of the tokens are unknown."""
    ids = encoded.column("input_ids")
    unknown = getattr(processor, "unk_token_id", None)
    if unknown is not None and len(ids) and (share := float(np.mean(ids == unknown))) > 0.05:
        return [f"{share:.0%} of the tokens are unknown to this tokenizer; another model may fit the language better"]
    return []


def model_inputs(batch: Batch, pad_token_id: int) -> dict[str, Tensor]:
    """Return a batch of texts, or of all their windows, as model arguments."""  # each (texts or windows, tokens)
    ids = batch.ragged("input_ids")
    offsets, on_host = ids.offsets, ids.host_offsets
    if "windows" in batch:
        on_host = None
        offsets = F.pad(batch.ragged("windows").values.cumsum(0), (1, 0))
    rows = Ragged(ids.values, offsets, on_host)
    inputs = {"input_ids": rows.padded(pad_token_id), "attention_mask": rows.mask()}
    if "token_type_ids" in batch:
        inputs["token_type_ids"] = Ragged(batch.ragged("token_type_ids").values, offsets, on_host).padded(0)
    return inputs


def mean_of_windows(outputs: Tensor, batch: Batch) -> Tensor:
    """Average the outputs of windows per text."""  # (texts, outputs)
    if "windows" not in batch:
        return outputs
    windows = batch.ragged("windows").lengths
    owner = torch.repeat_interleave(torch.arange(len(windows), device=outputs.device), windows)
    summed = outputs.new_zeros(len(windows), outputs.shape[1]).index_add(0, owner, outputs)
    return summed / windows[:, None]
