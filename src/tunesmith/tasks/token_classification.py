"""Token classification: a tag for each word, and the entities that the tags mark.

Loss: cross-entropy at the first sub-word of each word (Devlin et al. 2019, section 5.3), or at all of them. A word is
answered at its first sub-word; sentences longer than the model reads are read in windows, each word answered once.
"""

from __future__ import annotations

import contextlib
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from tunesmith.data import findings
from tunesmith.data.batches import Batch
from tunesmith.data.encoded import Encoded
from tunesmith.data.formats import Row
from tunesmith.data.labels import class_weights
from tunesmith.data.spans import has_spans, read_tags, unknown_tag, words_of
from tunesmith.data.tags import Scheme, TagSet, belongs, faults, faults_of_rows, scheme_of, split_tag, tags_of_types
from tunesmith.data.texts import model_inputs
from tunesmith.data.words import Sentence, encode_words, inner_marks, words_notes
from tunesmith.errors import DataError, counted, shorten
from tunesmith.metrics.entities import EntityMetrics
from tunesmith.recipe import Data
from tunesmith.tasks import Metrics, Task

_WORD = zlib.crc32
LOOKED_AT = 10_000
"""Rows of which the words are looked at."""


class TokenClassification(Task):
    """Finds the entities in a text: which words belong to one, and of what type it is."""

    tags: list[str] | None = Field(None, description="their names in the order of the outputs; default: from train")
    scheme: Literal["auto"] | Scheme = Field("auto", description="how tags mark entities; auto: from train")
    sub_words: Literal["first", "all"] = Field("first", description="which sub-words of a word carry loss")
    inner_marks: str | None = Field(
        None, description="marks that part no word of a raw text that is asked; default: those inside words of train"
    )

    model_class: ClassVar[str] = "AutoModelForTokenClassification"
    columns: ClassVar[dict[str, tuple[str, ...]]] = {
        "text": ("text", "sentence", "content", "document", "body", "tweet", "文本", "内容"),
        "tokens": ("tokens", "words"),
        "label": ("label", "labels", "tags", "ner_tags", "ner", "spans", "entities", "标签", "实体"),
    }
    required: ClassVar[frozenset[str]] = frozenset({"label"})
    reads_again: ClassVar[bool] = True

    @model_validator(mode="after")
    def _sane(self) -> Self:
        twice = [name for name, count in Counter(self.tags).items() if count > 1]
        if twice or self.tags == []:
            what = f"tags: {shorten(twice[0])} is given twice" if twice else "tags: there is none in the list"
            raise ValueError(f"{what}; give each tag once, or leave the key out")
        return self

    @property
    def _names(self) -> list[str]:
        assert self.tags is not None, "fit comes first"
        return self.tags

    def target(self, row: Row) -> tuple[str, ...]:
        """The tag of each word; once the scheme is known, it must be sound, and of those that are learned."""
        tags = read_tags(row, self.tags)
        if self.scheme != "auto":
            for fault in faults(tags, self.scheme):
                raise row.fault("label", fault.what, fault.hint, fault.index)
        if self.tags is not None:
            for index, tag in enumerate(tags):
                if tag not in self.tags:
                    raise unknown_tag(tag, index, row, self.tags)
        return tags

    def seen(self, rows: Iterable[Row]) -> Self:
        """With the marks that stand inside words, of words that are given as such."""
        if self.inner_marks is not None:
            return self
        sentences = []
        for row in islice(rows, LOOKED_AT):
            with contextlib.suppress(DataError):  # one that cannot be read is told by its target
                sentences += [] if has_spans(row) else [words_of(row).words]
        return self.model_copy(update={"inner_marks": inner_marks(sentences)})

    def fit(self, targets: Sequence[tuple[str, ...]], data: Data, where: str) -> tuple[Self, Data]:
        """Scheme, tags and their weights from the training targets."""
        counts = Counter(tag for tags in targets for tag in tags)
        if len(targets) == 1 and len(targets[0]) > 50:
            what = f"all {len(targets[0])} words stand in one sentence"
            raise DataError(what, where=where, hint="put a blank line after each sentence, or give more of them")
        if (scheme := scheme_of(targets) if self.scheme == "auto" else self.scheme) is None or set(counts) == {"O"}:
            what = f"every one of the {counts.total()} words is tagged O; there is nothing to find"
            raise DataError(what, where=where, hint="data.columns.label=N if the tags stand in another column")
        bare = scheme == "IO" and not any(tag.startswith("I-") for tag in counts)
        types = {split_tag(tag)[1] for tag in counts if tag != "O" and belongs(tag, scheme)}
        if not types:
            fault = faults([next(tag for tag in counts if tag != "O")], scheme)[0]
            raise DataError(f"label: {fault.what}, nor is any other", where=where, hint=fault.hint)
        tags = self.tags or tags_of_types(types, scheme, bare)
        weights = class_weights(data.class_weights, "single", tags, counts)
        fitted = self.model_copy(update={"scheme": scheme, "tags": tags})
        return fitted, data.model_copy(update={"class_weights": weights})

    def head_config(self) -> dict[str, Any]:
        """Head size and names of the tags."""
        return {
            "num_labels": len(self._names),
            "id2label": dict(enumerate(self._names)),
            "label2id": {name: index for index, name in enumerate(self._names)},
        }

    def encode(self, rows: Sequence[Row], processor: Any, data: Data) -> list[dict[str, Any]]:
        """The fields of the words (`encode_words`), a number for each word, and where there are labels its tag."""
        assert data.max_length is not None, "the run resolves max_length"
        sentences = [self._words_of(row).words for row in rows]
        fields = encode_words(sentences, processor, data.max_length, inside=self.sub_words == "all")
        codes = {name: index for index, name in enumerate(self._names)}
        weights = data.class_weights if isinstance(data.class_weights, dict) else {}
        for one, words, row in zip(fields, sentences, rows, strict=True):
            one["word"] = [_WORD(word.encode()) & 0x7FFFFFFF for word in words]
            if "label" in row.values:
                one |= self._labels(self.target(row), one, codes, weights)
        return fields

    def tokens_read(self, processor: Any, max_length: int) -> int | None:
        """All: longer sentences are read in windows."""
        return None

    def _labels(
        self, tags: Sequence[str], fields: dict[str, Any], codes: dict[str, int], weights: dict[str, float]
    ) -> dict[str, list[Any]]:
        """A tag for each word, for each other sub-word that learns, and their weights where there are any."""
        found: dict[str, list[Any]] = {"tags": [codes[tag] for tag in tags]}
        inside = [_inside(tags[word], codes) for word in fields.get("owner", ())]
        if self.sub_words == "all":
            found["rest_tags"] = [codes[tag] for tag in inside]
        if weights:
            owners = [tags[word] for word in fields.get("owner", ())]  # a word counts by its own tag, in all its parts
            found["weight"] = [weights.get(tag, 1.0) for tag in (*tags, *owners)]
        return found

    def notes(self, encoded: Encoded, processor: Any) -> list[str]:
        """The scheme; windows, words cut or void, and unknown tokens above 5 %."""
        types = TagSet(self._names).types
        shown = f"{', '.join(types[:10])}{' ...' if len(types) > 10 else ''}"
        return [
            f"tags are read as {self.scheme}, {counted(len(types), 'type')} ({shown})",
            *words_notes(encoded, processor),
        ]

    def faults(self, rows: Iterable[Row]) -> Iterator[findings.Fault]:
        """Tags that cannot follow one another in the scheme, of which train is not known that of most sentences; then
        those that train lacks.
        """
        read = []
        for row in rows:
            with contextlib.suppress(DataError):  # one that cannot be read is told already
                read.append((row, read_tags(row, self.tags)))
        scheme = scheme_of(tags for _, tags in read) if self.scheme == "auto" else self.scheme
        if scheme is None:
            return
        for place, fault in faults_of_rows(read, scheme):
            yield findings.Fault("tags", f"a tag is unsound in {scheme}", place, fault.what, fault.hint, "error")
        for row, tags in read if self.tags else ():
            for index, tag in enumerate(tags):
                if tag not in self._names and belongs(tag, scheme):
                    lacks = unknown_tag(tag, index, row, self._names)
                    yield findings.Fault(
                        "unknown-label", "a tag is not in train", lacks.where, tag, lacks.hint, "error"
                    )

    def normalizers(self, batch: Batch) -> dict[str, Tensor]:
        """The sum of the weights of all that carries loss, else its number."""
        if "weight" in batch:
            return {"weight": batch.ragged("weight").values.sum()}
        count = len(batch.ragged("tags").values)
        return {"weight": torch.tensor(float(count + (len(batch.ragged("rest").values) if "rest" in batch else 0)))}

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits in fp32 of all words of the batch in a row."""  # (words, tags)
        return _at(self._logits(model, batch), batch, "first")

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Of every token of every window."""  # (windows, tokens, tags)
        config: Any = model.config
        logits: Tensor = model(**model_inputs(batch, config.pad_token_id or 0)).logits
        return logits

    def loss(
        self, model: nn.Module, batch: Batch, normalizers: dict[str, Tensor], label_smoothing: float = 0.0
    ) -> Tensor:
        """This batch's share of the weighted mean over all sub-words of the step that carry loss."""
        every = self._logits(model, batch)
        logits, tags = _at(every, batch, "first"), batch.ragged("tags").values
        if "rest" in batch:
            logits = torch.cat([logits, _at(every, batch, "rest")])
            tags = torch.cat([tags, batch.ragged("rest_tags").values])
        losses = F.cross_entropy(logits, tags, reduction="none", label_smoothing=label_smoothing)
        if "weight" in batch:
            losses = losses * _weights(batch)
        return losses.sum() / normalizers["weight"]

    def metrics(self) -> Metrics:
        """Scores of entities."""
        return EntityMetrics(self._names)

    def metric(self) -> str:
        """F1 of entities."""
        return "f1"

    def prior(self, encoded: Encoded) -> Tensor:
        """What training says of each of its words: its number, then the log share of each tag, mixed with one word's
        worth of the shares over all words; in the first row those alone, under a number that no word has.
        """  # (1 + words, 1 + tags), float64
        words, tags, count = encoded.column("word"), encoded.column("tags"), len(self._names)
        known, which = np.unique(words, return_inverse=True)
        table = np.bincount(which * count + tags, minlength=len(known) * count).reshape(len(known), count)
        shares = np.bincount(tags, minlength=count) / len(tags)
        table = np.concatenate([shares[None], (table + shares) / (table.sum(1, keepdims=True) + 1)])
        return torch.from_numpy(np.column_stack([[-1, *known], np.log(np.maximum(table, 1e-9))]))

    def num_outputs(self, batch: Batch) -> int:
        """One for each word."""
        return len(batch.ragged("first").values)

    def guess(self, prior: Tensor, batch: Batch) -> Tensor:
        """The tag that each word most often had in training, and of a word that it has not the commonest."""
        words = batch.ragged("word").values.to(prior.dtype)
        place = torch.searchsorted(prior[:, 0].contiguous(), words).clamp_max(len(prior) - 1)
        return prior[torch.where(prior[place, 0] == words, place, 0), 1:].float()

    def answers(self, outputs: Tensor, batch: Batch) -> list[dict[str, Any]]:
        """The tag of each word with its probability, sentence by sentence."""
        scores, tags = outputs.softmax(-1).max(-1)
        lengths = batch.ragged("first").lengths.tolist()
        return [
            {"tags": [self._names[tag] for tag in own.tolist()], "scores": [round(score, 6) for score in sure.tolist()]}
            for own, sure in zip(tags.cpu().split(lengths), scores.cpu().split(lengths), strict=True)
        ]

    def completed(self, answer: dict[str, Any], row: Row) -> dict[str, Any]:
        """With the entities as they stand in the text, `text[start:end]`; a score is the mean over the words."""
        sentence = self._words_of(row)
        entities = [
            {
                "text": sentence.text[sentence.offsets[first][0] : sentence.offsets[after - 1][1]],
                "start": sentence.offsets[first][0],
                "end": sentence.offsets[after - 1][1],
                "label": label,
                "score": sum(answer["scores"][first:after]) / (after - first),
            }
            for first, after, label in TagSet(self._names).spans(answer["tags"])
        ]
        read = {"text": sentence.text, "tokens": sentence.words}
        return {name: value for name, value in read.items() if row.values.get(name) != value} | {
            "entities": entities,
            **answer,
        }

    def _words_of(self, row: Row) -> Sentence:
        return words_of(row, self.inner_marks or "")


def _inside(tag: str, codes: dict[str, int]) -> str:
    """What the other sub-words of a word are taught: to go on with what it begins."""
    part, type_ = split_tag(tag)
    return f"I-{type_}" if part == "B" and f"I-{type_}" in codes else tag


def _at(logits: Tensor, batch: Batch, name: str) -> Tensor:
    """The logits at the places that a field names, which are counted in each example's tokens."""  # (places, tags)
    places, tokens, lengths = batch.ragged(name), batch.ragged("input_ids"), batch.ragged("windows").values
    flat = places.values + torch.repeat_interleave(tokens.offsets[:-1], places.lengths)
    ends = lengths.cumsum(0)
    window = torch.bucketize(flat, ends, right=True)
    return logits[window, flat - (ends - lengths)[window]].float()


def _weights(batch: Batch) -> Tensor:
    """Those of all first sub-words, then those of the others."""
    weights, words = batch.ragged("weight"), batch.ragged("tags").lengths
    within = torch.arange(len(weights.values), device=words.device)
    within = within - torch.repeat_interleave(weights.offsets[:-1], weights.lengths)
    first = within < torch.repeat_interleave(words, weights.lengths)
    return torch.cat([weights.values[first], weights.values[~first]])
