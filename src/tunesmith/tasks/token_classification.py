"""Token classification: a tag for each word, and the entities that the tags mark.

Loss: cross-entropy at the first sub-word of each word (Devlin et al. 2019, section 5.3), or at all sub-words. The
prediction of a word is taken at its first sub-word. Long sentences are read in windows; each word is predicted once.
"""

from __future__ import annotations

import contextlib
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn

from tunesmith.data import findings
from tunesmith.data.batches import Batch
from tunesmith.data.columns import Column
from tunesmith.data.encoded import Encoded, Fields
from tunesmith.data.formats import Row
from tunesmith.data.labels import class_weights
from tunesmith.data.preview import Preview
from tunesmith.data.text.spans import has_spans, read_tags, unknown_tag, words_of
from tunesmith.data.text.tags import (
    Scheme,
    TagSet,
    is_tag_of,
    row_faults,
    scheme_of,
    split_tag,
    tag_faults,
    tags_of_types,
)
from tunesmith.data.text.texts import inspect_texts, model_inputs, preview_tokens, token_costs
from tunesmith.data.text.words import encode_words, inner_marks, words_notes
from tunesmith.errors import DataError, counted, shorten
from tunesmith.metrics.entities import EntityMetrics
from tunesmith.recipe import Data
from tunesmith.tasks import Answer, Baseline, BoundTask, Inspection, Metrics, Task, _samples
from tunesmith.tasks._labels import LabelObjective

_WORD = zlib.crc32
MAX_ROWS_INSPECTED = 10_000
"""Maximum rows from which `inner_marks` is inferred."""

COLUMNS = (
    Column("text", "text", ("sentence", "content", "document", "body", "tweet", "文本", "内容"), required=False),
    Column("tokens", "words", ("words",), required=False),
    Column(
        "label",
        "tags",
        ("labels", "tags", "ner_tags", "ner", "spans", "entities", "标签", "实体"),
        target=True,
    ),
)


class TokenClassification(Task):
    """Finds the entities in a text and their types."""

    tags: list[str] | None = Field(None, description="tag names in the order of the outputs; default: from train")
    scheme: Literal["auto"] | Scheme = Field("auto", description="tagging scheme; auto: inferred from train")
    sub_words: Literal["first", "all"] = Field("first", description="sub-words of each word that have a loss")
    inner_marks: str | None = Field(
        None,
        description="intra-word punctuation, which does not split words of raw texts; default: from train",
    )

    auto_class: ClassVar[str] = "AutoModelForTokenClassification"
    data_keys: ClassVar[frozenset[str]] = frozenset({"max_length", "class_weights", "augment"})
    baseline_name: ClassVar[str] = "most-frequent-tag baseline"
    targets_need_fit: ClassVar[bool] = True

    @property
    def columns(self) -> Sequence[Column]:
        """Text or words, and a tag for each word (or spans)."""
        return COLUMNS

    @model_validator(mode="after")
    def _sane(self) -> Self:
        twice = [name for name, count in Counter(self.tags).items() if count > 1]
        if twice or self.tags == []:
            what = f"tags: {shorten(twice[0])} is given twice" if twice else "tags: the list is empty"
            raise ValueError(f"{what}; give each tag once, or leave the key out")
        return self

    def parse_target(self, row: Row) -> tuple[str, ...]:
        """Return the tag of each word. Once scheme and tags are known, check the tags against them."""
        tags = read_tags(row, self.tags)
        if self.scheme != "auto":
            for fault in tag_faults(tags, self.scheme):
                raise row.fault("label", fault.what, fault.hint, fault.index)
        if self.tags is not None:
            for index, tag in enumerate(tags):
                if tag not in self.tags:
                    raise unknown_tag(tag, index, row, self.tags)
        return tags

    def infer_from_rows(self, rows: Iterable[Row]) -> Self:
        """Infer the intra-word punctuation from rows that are given as words."""
        if self.inner_marks is not None:
            return self
        sentences = []
        for row in islice(rows, MAX_ROWS_INSPECTED):
            with contextlib.suppress(DataError):  # `parse_target` reports the fault
                sentences += [] if has_spans(row) else [words_of(row).words]
        return self.model_copy(update={"inner_marks": inner_marks(sentences)})

    def fit(self, targets: Sequence[tuple[str, ...]], data: Data) -> tuple[Self, Data]:
        """Fit the tagging scheme, the tags and their weights."""
        where = str(data.train)
        counts = Counter(tag for tags in targets for tag in tags)
        if len(targets) == 1 and len(targets[0]) > 50:
            what = f"all {len(targets[0])} words are in one sentence"
            raise DataError(what, where=where, hint="put a blank line after each sentence, or add more sentences")
        if (scheme := scheme_of(targets) if self.scheme == "auto" else self.scheme) is None or set(counts) == {"O"}:
            what = f"all {counts.total()} words have the tag O; there are no entities"
            raise DataError(what, where=where, hint="set data.columns.label=N if the tags are in another column")
        bare = scheme == "IO" and not any(tag.startswith("I-") for tag in counts)
        types = {split_tag(tag)[1] for tag in counts if tag != "O" and is_tag_of(tag, scheme)}
        if not types:
            fault = tag_faults([next(tag for tag in counts if tag != "O")], scheme)[0]
            raise DataError(f"label: {fault.what}, and no other tag is valid", where=where, hint=fault.hint)
        tags = self.tags or tags_of_types(types, scheme, bare)
        weights = class_weights(data.class_weights, "single", tags, counts)
        fitted = self.model_copy(update={"scheme": scheme, "tags": tags})
        return fitted, data.model_copy(update={"class_weights": weights})

    def head_config(self) -> dict[str, Any]:
        """Return head size and tag names."""
        assert self.tags is not None, "the task is fitted first"
        return {
            "num_labels": len(self.tags),
            "id2label": dict(enumerate(self.tags)),
            "label2id": {name: index for index, name in enumerate(self.tags)},
        }

    def sample_row(self, number: int) -> dict[str, object]:
        """Return a sentence with one entity."""
        words, tags = _samples.tagged(number)
        return {"tokens": words, "label": tags}

    def bind(self, processor: Any, config: Any, data: Data, label_smoothing: float = 0.0) -> BoundTask:
        """Return the bound task with an objective over the tags."""
        objective = LabelObjective("single", self.tags, field="tags")
        return BoundTokenClassification(self, processor, config, data, label_smoothing, objective=objective)

    def render(self, answer: Answer, row: Row) -> str:
        """Return the entities with labels and scores."""
        entities = (f"{entity['text']} ({entity['label']} {entity['score']:.3f})" for entity in answer["entities"])
        return ", ".join(entities) or "no entities"

    def mistake(self, answer: Answer, target: Any) -> tuple[str, str, float] | None:
        """Return true and predicted tags of the wrong words, and the highest confidence among them."""
        words = [n for n, (tag, other) in enumerate(zip(answer["tags"], target, strict=True)) if tag != other]
        sides = [", ".join(f"word {n + 1} {tags[n]}" for n in words) for tags in (target, answer["tags"])]
        return (sides[0], sides[1], max(answer["scores"][n] for n in words)) if words else None

    def faults(self, rows: Iterable[Row]) -> Iterator[findings.Fault]:
        """Yield invalid sequences of tags, then tags that train lacks.

        If the scheme is not known yet, it is the one that fits most sentences.
        """
        read = []
        for row in rows:
            with contextlib.suppress(DataError):  # unreadable rows are reported already
                read.append((row, read_tags(row, self.tags)))
        scheme = scheme_of(tags for _, tags in read) if self.scheme == "auto" else self.scheme
        if scheme is None:
            return
        for place, fault in row_faults(read, scheme):
            yield findings.Fault("tags", f"a tag is invalid in {scheme}", place, fault.what, fault.hint, "error")
        for row, tags in read:
            for index, tag in enumerate(tags):
                if self.tags and tag not in self.tags and is_tag_of(tag, scheme):
                    lacks = unknown_tag(tag, index, row, self.tags)
                    yield findings.Fault(
                        "unknown-label", "a tag is not in train", lacks.where, tag, lacks.hint, "error"
                    )


@dataclass(frozen=True, eq=False, kw_only=True)
class BoundTokenClassification(BoundTask):
    """Token classification bound to a tokenizer and a model config."""

    objective: LabelObjective

    def encode(self, rows: Sequence[Row]) -> list[Fields]:
        """Return the fields of the words (`encode_words`), a hash of each word, and its tag if there are labels."""
        assert self.data.max_length is not None, "the run resolves max_length"
        sentences = [words_of(row, self.task.inner_marks or "").words for row in rows]
        inside = self.task.sub_words == "all"
        fields = encode_words(sentences, self.processor, self.data.max_length, inside=inside)
        codes = {name: index for index, name in enumerate(self.objective.names)}
        weights = self.data.class_weights if isinstance(self.data.class_weights, dict) else {}
        for example, words, row in zip(fields, sentences, rows, strict=True):
            example["word"] = [_WORD(word.encode()) & 0x7FFFFFFF for word in words]
            if "label" in row.values:
                example |= self._labels(self.task.parse_target(row), example, codes, weights)
        return fields

    def _labels(
        self, tags: Sequence[str], fields: Fields, codes: dict[str, int], weights: dict[str, float]
    ) -> dict[str, list[Any]]:
        """Return a tag for each word and for each other sub-word with loss, and their weights if any."""
        labels: dict[str, list[Any]] = {"tags": [codes[tag] for tag in tags]}
        if self.task.sub_words == "all":
            labels["rest_tags"] = [codes[_inside(tags[word], codes)] for word in fields["owner"]]
        if weights:
            owners = [tags[word] for word in fields.get("owner", ())]  # all sub-words have the weight of the word's tag
            labels["weight"] = [weights.get(tag, 1.0) for tag in (*tags, *owners)]
        return labels

    def costs(self, encoded: Encoded) -> NDArray[np.int64]:
        """Return the number of tokens in all windows."""
        return token_costs(encoded)

    def notes(self, encoded: Encoded) -> list[str]:
        """Return notes on the scheme, windows, truncated or empty words, and unknown tokens above 5 %."""
        types = TagSet(self.objective.names).types
        shown = f"{', '.join(types[:10])}{' ...' if len(types) > 10 else ''}"
        return [
            f"tags are read as {self.task.scheme}, {counted(len(types), 'type')} ({shown})",
            *words_notes(encoded, self.processor),
        ]

    def model_inputs(self, batch: Batch) -> list[dict[str, Any]]:
        """Return the padded windows of all sentences."""
        return [model_inputs(batch, self.config.pad_token_id or 0)]

    def normalizers(self, batch: Batch) -> dict[str, Tensor]:
        """Return the sum of the weights of all sub-words with loss, or their number."""
        if "weight" in batch:
            return {"weight": batch.ragged("weight").values.sum()}
        count = len(batch.ragged("tags").values)
        return {"weight": torch.tensor(float(count + (len(batch.ragged("rest").values) if "rest" in batch else 0)))}

    def loss(self, model: nn.Module, batch: Batch, normalizers: dict[str, Tensor]) -> Tensor:
        """Return this batch's share of the weighted mean over all sub-words with loss in the step."""
        all_logits = self._logits(model, batch)
        logits, tags = _at(all_logits, batch, "first"), batch.ragged("tags").values
        if "rest" in batch:
            logits = torch.cat([logits, _at(all_logits, batch, "rest")])
            tags = torch.cat([tags, batch.ragged("rest_tags").values])
        losses = F.cross_entropy(logits, tags, reduction="none", label_smoothing=self.label_smoothing)
        if "weight" in batch:
            losses = losses * _weights(batch)
        return losses.sum() / normalizers["weight"]

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the fp32 logits of all words."""  # (words, tags)
        return _at(self._logits(model, batch), batch, "first")

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the logits of all tokens."""  # (windows, tokens, tags)
        (inputs,) = self.model_inputs(batch)
        logits: Tensor = model(**inputs).logits
        return logits

    def metrics(self) -> Metrics:
        """Return the entity metrics."""
        return EntityMetrics(self.objective.names)

    def baseline(self, train: Encoded) -> Baseline:
        """Return a predictor of the most frequent tag of each word in train, or of all words for an unknown word.

        Its outputs are log tag frequencies of the word, smoothed by one pseudo-count of the frequencies over all words.
        """
        words, tags, count = train.column("word"), train.column("tags"), len(self.objective.names)
        known, index = np.unique(words, return_inverse=True)
        table = np.bincount(index * count + tags, minlength=len(known) * count).reshape(len(known), count)
        shares = np.bincount(tags, minlength=count) / len(tags)
        table = np.concatenate([(table + shares) / (table.sum(1, keepdims=True) + 1), shares[None]])
        logs = torch.from_numpy(np.log(np.maximum(table, 1e-9))).float()  # (words + 1, tags)

        def outputs(batch: Batch) -> Tensor:
            words = batch.ragged("word").values.numpy()
            place = np.minimum(np.searchsorted(known, words), len(known) - 1)
            return logs[torch.from_numpy(np.where(known[place] == words, place, len(known)))]

        return outputs

    def predict(self, model: nn.Module, batch: Batch, outputs: Tensor | None = None) -> list[Answer]:
        """Return the tag of each word with its probability, for each sentence."""
        logits = self.outputs(model, batch) if outputs is None else outputs
        scores, tags = logits.softmax(-1).max(-1)
        lengths = batch.ragged("first").lengths.tolist()
        return [
            {
                "tags": [self.objective.names[tag] for tag in sentence.tolist()],
                "scores": [round(score, 6) for score in confidence.tolist()],
            }
            for sentence, confidence in zip(tags.cpu().split(lengths), scores.cpu().split(lengths), strict=True)
        ]

    def postprocess(self, answer: Answer, row: Row) -> Answer:
        """Return the answer with its entities, `text[start:end]`; their scores are means over the words."""
        sentence = words_of(row, self.task.inner_marks or "")
        entities = [
            {
                "text": sentence.text[sentence.offsets[first][0] : sentence.offsets[after - 1][1]],
                "start": sentence.offsets[first][0],
                "end": sentence.offsets[after - 1][1],
                "label": label,
                "score": sum(answer["scores"][first:after]) / (after - first),
            }
            for first, after, label in TagSet(self.objective.names).spans(answer["tags"])
        ]
        read = {"text": sentence.text, "tokens": sentence.words}
        return {name: value for name, value in read.items() if row.values.get(name) != value} | {
            "entities": entities,
            **answer,
        }

    def preview(self, fields: Fields) -> Preview:
        """Return the tokens, and the tag of each token with loss."""
        tags = dict(zip(fields["first"], fields.get("tags", ()), strict="tags" in fields))
        tags |= dict(zip(fields.get("rest", ()), fields.get("rest_tags", ()), strict=False))
        targets = [
            self.objective.names[tags[place]] if place in tags else None for place in range(len(fields["input_ids"]))
        ]
        return preview_tokens(fields, self.processor, targets=targets)

    def inspect(self, rows: Sequence[Row]) -> Inspection:
        """Return the number of tokens of each sentence; long sentences are read in windows."""
        words = [row.values.get("tokens") for row in rows]
        texts = [
            [" ".join(map(str, tokens)) if isinstance(tokens, list) else str(row.values.get("text", ""))]
            for row, tokens in zip(rows, words, strict=True)
        ]
        return Inspection(*inspect_texts(texts, self.processor), None, "data.max_length")


def _inside(tag: str, codes: dict[str, int]) -> str:
    """Return the tag of the other sub-words of a word: B- becomes I-."""
    part, type_ = split_tag(tag)
    return f"I-{type_}" if part == "B" and f"I-{type_}" in codes else tag


def _at(logits: Tensor, batch: Batch, name: str) -> Tensor:
    """Return the logits at the token positions in a field."""  # (places, tags)
    places, tokens, lengths = batch.ragged(name), batch.ragged("input_ids"), batch.ragged("windows").values
    flat = places.values + torch.repeat_interleave(tokens.offsets[:-1], places.lengths)
    ends = lengths.cumsum(0)
    window = torch.bucketize(flat, ends, right=True)
    return logits[window, flat - (ends - lengths)[window]].float()


def _weights(batch: Batch) -> Tensor:
    """Return the weights of all first sub-words, then those of the others."""
    weights, words = batch.ragged("weight"), batch.ragged("tags").lengths
    within = torch.arange(len(weights.values), device=words.device)
    within = within - torch.repeat_interleave(weights.offsets[:-1], weights.lengths)
    first = within < torch.repeat_interleave(words, weights.lengths)
    return torch.cat([weights.values[first], weights.values[~first]])
