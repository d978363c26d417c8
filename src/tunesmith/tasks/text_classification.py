"""Text classification: one class of two or many, several labels at once, or a number (regression); texts or pairs.

Losses: cross-entropy, binary cross-entropy per label, squared error. Texts longer than the model reads are cut and
counted, or read in windows whose logits are averaged per document (`windows`).
"""

from __future__ import annotations

import ast
import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from tunesmith.data.batches import Batch, Ragged
from tunesmith.data.encoded import Encoded
from tunesmith.data.formats import Row
from tunesmith.errors import DataError, RecipeError, did_you_mean, shorten
from tunesmith.metrics.classification import ClassScores, LabelScores, NumberScores
from tunesmith.recipe import Data
from tunesmith.tasks import Metrics, Task

Target = str | tuple[str, ...] | float
MAX_CHARS_PER_TOKEN = 64
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")
_INVISIBLE = string.whitespace + "\u00a0\u3000\u200b\u2060\ufeff"


class TextClassification(Task):
    """Says which class a text (or a pair of texts) belongs to."""

    labels: Literal["auto", "single", "multi", "regression"] = Field(
        "auto", description="one class a text, several, or a number; auto: from the data"
    )
    classes: list[str] | None = Field(None, description="their names in the order of the outputs; default: from train")
    windows: int | None = Field(
        None, ge=2, description="read longer texts in up to this many windows, averaged; null: cut them"
    )

    model_class: ClassVar[str] = "AutoModelForSequenceClassification"
    columns: ClassVar[dict[str, tuple[str, ...]]] = {
        "text": (
            "text", "sentence", "sentence1", "text1", "review", "content", "premise", "question", "document", "body",
            "comment", "tweet", "message", "title", "input", "clause", "文本", "内容", "评论",
        ),
        "text_pair": ("text_pair", "sentence2", "text2", "hypothesis", "passage"),
        "label": (
            "label", "labels", "class", "category", "target", "sentiment", "score", "rating", "stars", "type", "y",
            "标签", "类别",
        ),
    }  # fmt: skip
    required: ClassVar[frozenset[str]] = frozenset({"text", "label"})

    @field_validator("classes", mode="before")
    @classmethod
    def _spelled_as_labels(cls, classes: Any) -> Any:
        """Numbers may be given bare, and are spelled as the labels of rows are."""
        if not isinstance(classes, list):
            return classes
        return [_name(one) if isinstance(one, str | int | float) else one for one in classes]

    @model_validator(mode="after")
    def _sane(self) -> Self:
        if self.classes is not None and self.labels == "regression":
            raise ValueError("a regression has no classes; leave classes out")
        twice = [name for name, count in Counter(self.classes).items() if count > 1]
        if twice or self.classes == []:
            what = f"classes: {shorten(twice[0])} is given twice" if twice else "classes: there is none in the list"
            raise ValueError(f"{what}; give each class once, or leave the key out")
        return self

    def target(self, row: Row) -> Target:
        """A class name, a tuple of them, or a number."""
        value = row.values["label"]
        if self.labels == "regression":
            return _number(value, row)
        parts = value if isinstance(value, list | tuple) else None
        if parts is None and self.labels != "multi":
            return self._known(_single(value, row, self.labels == "single"), row)
        if self.labels == "single":
            what = f"label: {shorten(value)} is a list, and the others are one class a text"
            raise DataError(what, where=row.place, hint="set task.labels=multi")
        names = [_name(part) for part in (_listed(str(value)) if parts is None else parts)]
        if len(names) > 2 and {"0", "1"}.issuperset(names):
            what = f"label: {shorten(value)} looks like a flag for each class, of which no name is known"
            raise DataError(what, where=row.place, hint="list the names of those that fit, such as ['a', 'c']")
        return tuple(sorted({self._known(name, row) for name in names if name}))

    def _known(self, name: str, row: Row) -> str:
        if self.classes is None or name in self.classes:
            return name
        raise DataError(
            f"label: {shorten(name)} is none of the {len(self.classes)} classes that are learned",
            where=row.place,
            hint=did_you_mean(name, self.classes[:20]),
        )

    def fit(self, targets: Sequence[Target], data: Data, where: str) -> tuple[Self, Data]:
        """Kind, classes and class weights from the training targets."""
        kind = self._kind(targets, where)
        if kind == "regression":
            if data.class_weights is not None:
                raise RecipeError("data.class_weights: a regression has no classes", hint="leave the key out")
            return self.model_copy(update={"labels": kind}), data
        several = kind == "multi"
        counts = Counter(name for target in targets for name in _names(target, several))
        classes = self.classes or sorted(counts, key=_natural)
        if self.labels == "auto" and self.classes is None:
            _check_joined(classes, where)
        _check_classes(classes, counts, len(targets), where, several)
        fitted = self.model_copy(update={"labels": kind, "classes": classes})
        return fitted, data.model_copy(update={"class_weights": _weights(data, classes, counts, kind)})

    def _kind(self, targets: Sequence[Target], where: str) -> str:
        if self.labels != "auto":
            return self.labels
        if any(isinstance(target, tuple) for target in targets):
            return "multi"
        return "single" if self.classes else _single_or_regression({str(target) for target in targets}, where)

    def strata(self, targets: Sequence[Target]) -> list[int] | None:
        """Classes as codes; combinations of labels count as classes, numbers have none."""
        if self.labels == "regression":
            return None
        codes: dict[Target, int] = {}
        return [codes.setdefault(target, len(codes)) for target in targets]

    def head_config(self) -> dict[str, Any]:
        """Head size, class names and transformers' name for the kind of problem."""
        if self.labels == "regression":
            return {"num_labels": 1, "problem_type": "regression"}
        assert self.classes is not None, "fit comes first"
        kind = "multi_label_classification" if self.labels == "multi" else "single_label_classification"
        return {
            "num_labels": len(self.classes),
            "id2label": dict(enumerate(self.classes)),
            "label2id": {name: index for index, name in enumerate(self.classes)},
            "problem_type": kind,
        }

    def encode(self, rows: Sequence[Row], processor: Any, data: Data) -> list[dict[str, Any]]:
        """input_ids (all windows of a document, flat), their lengths, whether words were cut, label and weight.

        Raises:
            DataError: a row's text is nothing to this tokenizer.
            RecipeError: this tokenizer cannot read in windows.
        """
        if self.windows and not processor.is_fast:
            what = f"task.windows: {type(processor).__name__} has no fast form, which alone gives what is left over"
            raise RecipeError(what, hint="leave the key out: longer texts are cut")
        encoded: dict[int, dict[str, Any]] = {}
        for roles in (("text",), ("text", "text_pair")):  # a row without a second text is read as a text alone
            part = {n: row for n, row in enumerate(rows) if ("text_pair" in row.values) == (len(roles) == 2)}
            if part:
                encoded |= zip(part, self._encode(list(part.values()), roles, processor, data), strict=True)
        return [encoded[number] for number in range(len(rows))]

    def _encode(self, rows: list[Row], roles: Sequence[str], processor: Any, data: Data) -> list[dict[str, Any]]:
        most = self._most_chars(data)
        texts = [[_head(str(row.values[role]), most) for row in rows] for role in roles]
        coded = processor(
            *texts, truncation=True, max_length=data.max_length, return_overflowing_tokens=bool(self.windows)
        )
        owner = coded.get("overflow_to_sample_mapping", range(len(rows)))
        windows: list[list[int]] = [[] for _ in rows]
        for index, row in enumerate(owner):
            windows[row].append(index)
        specials = processor.num_special_tokens_to_add(pair=len(roles) == 2)
        for row, mine in zip(rows, windows, strict=True):
            if sum(len(coded["input_ids"][index]) for index in mine) <= specials:
                raise DataError("text: nothing is left of it as tokens", where=row.place, hint="remove the row")
        fields = [self._fields(row, coded, mine, data) for row, mine in zip(rows, windows, strict=True)]
        if not processor.is_fast:  # such a tokenizer does not say what it has cut
            for one, *pieces in zip(fields, *texts, strict=True):
                full = len(one["input_ids"]) == data.max_length
                one["cut"] |= int(full and len(processor(*pieces)["input_ids"]) > len(one["input_ids"]))
        return fields

    def _most_chars(self, data: Data) -> int:
        """How much of a text is shown to the tokenizer, whose time grows with all of it."""
        assert data.max_length is not None, "the run resolves max_length"
        return data.max_length * (self.windows or 1) * MAX_CHARS_PER_TOKEN

    def _fields(self, row: Row, coded: Any, mine: list[int], data: Data) -> dict[str, Any]:
        kept = mine[: self.windows or 1]
        ids = [token for index in kept for token in coded["input_ids"][index]]
        full = len(coded["input_ids"][kept[-1]]) == data.max_length
        cut = len(mine) > len(kept) or (full and bool(coded.encodings and coded.encodings[kept[-1]].overflowing))
        cut = cut or len(str(row.values["text"]).strip()) > self._most_chars(data)
        fields: dict[str, Any] = {"input_ids": ids, "cut": int(cut)}
        if self.windows:
            fields["windows"] = [len(coded["input_ids"][index]) for index in kept]
        if "token_type_ids" in coded:
            fields["token_type_ids"] = [kind for index in kept for kind in coded["token_type_ids"][index]]
        return fields | self._target_fields(row, data)

    def _target_fields(self, row: Row, data: Data) -> dict[str, Any]:
        if "label" not in row.values:
            return {}
        target = self.target(row)
        if self.labels == "regression":
            return {"label": float(target)}  # type: ignore[arg-type]
        assert self.classes is not None, "fit comes first"
        weights = data.class_weights if isinstance(data.class_weights, dict) else {}
        if isinstance(target, tuple):
            return {"label": [float(name in target) for name in self.classes]}
        return {"label": self.classes.index(str(target)), "weight": float(weights.get(str(target), 1.0))}

    def notes(self, encoded: Encoded, processor: Any) -> list[str]:
        """Texts cut, and unknown tokens above 5 %."""
        notes = []
        cut = int(encoded.column("cut").sum())
        if cut:
            way_out = "task.windows=N reads more of them" if self.windows is None else "raise task.windows"
            notes.append(f"{cut} of {len(encoded)} texts are longer than is read and were cut ({way_out})")
        ids = encoded.column("input_ids")
        unknown = getattr(processor, "unk_token_id", None)
        if unknown is not None and len(ids) and (share := float(np.mean(ids == unknown))) > 0.05:
            notes.append(f"{share:.0%} of the tokens are unknown to this model: another model may fit the language")
        return notes

    def normalizers(self, batch: Batch) -> dict[str, Tensor]:
        """The sum of the examples' weights, else their number."""
        if "weight" in batch:
            return {"weight": batch.scalar("weight").sum()}
        return {"weight": torch.tensor(float(batch.size))}

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits in fp32, averaged over a document's windows."""  # (examples, classes)
        ids = batch.ragged("input_ids")
        offsets = ids.offsets
        if "windows" in batch:
            offsets = F.pad(batch.ragged("windows").values.cumsum(0), (1, 0))
        rows = Ragged(ids.values, offsets)
        config: Any = model.config
        inputs = {"input_ids": rows.padded(config.pad_token_id or 0), "attention_mask": rows.mask()}
        if "token_type_ids" in batch:
            inputs["token_type_ids"] = Ragged(batch.ragged("token_type_ids").values, offsets).padded(0)
        logits: Tensor = model(**inputs).logits.float()
        return _mean_of_windows(logits, batch.ragged("windows").lengths) if "windows" in batch else logits

    def loss(
        self, model: nn.Module, batch: Batch, normalizers: dict[str, Tensor], label_smoothing: float = 0.0
    ) -> Tensor:
        """This batch's share of the weighted mean over the step."""
        logits = self.forward(model, batch)
        return self._sum_of_losses(logits, batch, label_smoothing) / normalizers["weight"]

    def _sum_of_losses(self, logits: Tensor, batch: Batch, label_smoothing: float) -> Tensor:
        if self.labels == "regression":
            if label_smoothing:
                what = "train.label_smoothing: a regression has no classes to spread a target over"
                raise RecipeError(what, hint="leave the key out")
            return F.mse_loss(logits.squeeze(-1), batch.scalar("label").float(), reduction="sum")
        if self.labels == "multi":
            wanted = batch.ragged("label").values.view_as(logits)
            wanted = wanted * (1 - label_smoothing) + label_smoothing / 2
            return F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(1).sum()
        losses = F.cross_entropy(logits, batch.scalar("label"), reduction="none", label_smoothing=label_smoothing)
        return (losses * batch.scalar("weight")).sum()

    def metrics(self) -> Metrics:
        """Scores of the kind of problem this is."""
        if self.labels == "regression":
            return NumberScores()
        assert self.classes is not None, "fit comes first"
        return LabelScores(self.classes) if self.labels == "multi" else ClassScores(self.classes)

    def metric(self) -> str:
        """Accuracy; micro F1 for several labels; error for numbers."""
        return {"multi": "f1_micro", "regression": "rmse"}.get(self.labels, "accuracy")

    def prior(self, encoded: Encoded) -> Tensor:
        """Log frequency of each class, log odds of each label, or the mean."""  # (classes,)
        labels = torch.from_numpy(np.array(encoded.column("label")))
        if self.labels == "regression":
            return labels.mean()[None]
        assert self.classes is not None, "fit comes first"
        if self.labels == "multi":
            return torch.logit(labels.view(-1, len(self.classes)).mean(0), eps=1e-6)
        return (torch.bincount(labels.long(), minlength=len(self.classes)) / len(labels)).clamp_min(1e-9).log()

    def answers(self, outputs: Tensor) -> list[dict[str, Any]]:
        """Label, score and the probability of every class."""
        if self.labels == "regression":
            return [{"value": value} for value in outputs.squeeze(-1).tolist()]
        assert self.classes is not None, "fit comes first"
        if self.labels == "multi":
            rows = [dict(zip(self.classes, row, strict=True)) for row in outputs.sigmoid().tolist()]
            return [{"labels": [name for name in row if row[name] > 0.5], "probabilities": row} for row in rows]
        rows = [dict(zip(self.classes, row, strict=True)) for row in outputs.softmax(-1).tolist()]
        return [
            {"label": (best := max(row, key=row.__getitem__)), "score": row[best], "probabilities": row} for row in rows
        ]


def _head(text: str, most: int) -> str:
    return text if len(text) <= most else text.lstrip()[:most]


def _mean_of_windows(logits: Tensor, windows: Tensor) -> Tensor:
    owner = torch.repeat_interleave(torch.arange(len(windows), device=logits.device), windows)
    summed = logits.new_zeros(len(windows), logits.shape[1]).index_add(0, owner, logits)
    return summed / windows[:, None]


def _name(value: object) -> str:
    """One spelling for the labels 1, 1.0, "1" and " 1 ", and for accents coded in two ways."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    name = unicodedata.normalize("NFC", str(value)).strip(_INVISIBLE)
    return name[:-2] if name.endswith(".0") and name[:-2].lstrip("-").isdigit() else name


def _single(value: object, row: Row, brackets: bool) -> str:
    """A class name; one in brackets is more likely a list, unless one class a text is asked for."""
    name = _name(value)
    if not name:
        raise DataError("label: nothing but invisible characters", where=row.place, hint="fill it in or remove the row")
    if name.startswith("[") and name.endswith("]") and not brackets:
        raise DataError(
            f"label: {shorten(name)} is a list written as text", where=row.place, hint="set task.labels=multi"
        )
    return name


def _names(target: Target, several: bool) -> tuple[str, ...]:
    """The classes of a target; among lists, a text without one is a list too."""
    if isinstance(target, tuple):
        return target
    return tuple(name for part in _listed(str(target)) if (name := _name(part))) if several else (str(target),)


def _listed(text: str) -> list[str]:
    if text.startswith("["):
        try:
            return [str(part) for part in ast.literal_eval(text)]
        except (ValueError, SyntaxError):
            return [text]
    for separator in (";", "|", ","):
        if separator in text:
            return text.split(separator)
    return [text]


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _number(value: object, row: Row) -> float:
    if isinstance(value, bool) or not _is_number(str(value)):
        comma = _DECIMAL_COMMA.fullmatch(str(value).strip())
        instead = f" (write {comma[0].replace(',', '.')})" if comma else ""
        hint = f"mend it{instead}, or data.on_bad_row=skip"
        raise DataError(f"label: {shorten(value)} is not a finite number", where=row.place, hint=hint)
    number = float(str(value))
    if abs(number) > 1e9:
        raise DataError(
            f"label: {shorten(value)} is out of any scale", where=row.place, hint="mend it, or data.on_bad_row=skip"
        )
    return number


def _natural(name: str) -> tuple[int, float, str]:
    return (0, float(name), name) if _is_number(name) else (1, 0.0, name)


def _single_or_regression(distinct: set[str], where: str) -> str:
    """Many different numbers with fractions are no classes; a word among them is more likely a mistake than a class."""
    words = sorted(name for name in distinct if not _is_number(name))
    commas = [name for name in words if _DECIMAL_COMMA.fullmatch(name)]
    if len(distinct) > 10 and len(commas) > len(distinct) / 2:
        what = f"label: {shorten(commas[0])} has a decimal comma, as have {len(commas) - 1} others"
        hint = f"write {commas[0].replace(',', '.')}, or set task.labels=single if these are classes"
        raise DataError(what, where=where, hint=hint)
    fractions = any(not float(name).is_integer() for name in distinct.difference(words))
    if len(distinct) <= 10 or not fractions or len(words) > len(distinct) / 10:
        return "single"
    if words:
        what = f"label: {shorten(words[0])} stands among numbers ({len(distinct) - len(words)} different ones)"
        raise DataError(
            what, where=where, hint="set task.labels=regression to find its row, or single if all are classes"
        )
    return "regression"


def _check_joined(classes: list[str], where: str) -> None:
    """Refuse a class like "a;b" beside the classes "a" and "b": it is more likely two labels of one text."""
    known = set(classes)
    for name in classes:
        parts = [part.strip() for part in _listed(name)]
        if len(parts) > 1 and known.issuperset(parts):
            hint = "set task.labels=multi, or task.labels=single if it is a class of its own"
            raise DataError(f"label: {shorten(name)} joins classes that also stand alone", where=where, hint=hint)


def _check_classes(classes: list[str], counts: Counter[Any], rows: int, where: str, several: bool) -> None:
    if len(counts) < (1 if several else 2):
        only = f"every one of the {rows} rows is labelled {shorten(next(iter(counts), ''))}"
        hint = "a sorted file read in part does this: shuffle it, or read all of it"
        raise DataError(f"label: {only}; there is nothing to tell apart", where=where, hint=hint)
    if len(classes) > 50 and len(classes) > rows / 2:
        raise DataError(
            f"label: {len(classes)} classes in {rows} rows look like identifiers",
            where=where,
            hint="set data.columns.label",
        )


def _weights(data: Data, classes: list[str], counts: Counter[Any], kind: str) -> dict[str, float] | None:
    if data.class_weights is None:
        return None
    if kind == "multi":
        raise RecipeError("data.class_weights: only for one class a text", hint="leave the key out")
    if data.class_weights == "balanced":
        return {name: counts.total() / (len(classes) * max(counts[name], 1)) for name in classes}
    given = {_name(name): weight for name, weight in data.class_weights.items()}
    if unknown := sorted(given.keys() - set(classes)):
        raise RecipeError(f"data.class_weights: no class {shorten(unknown[0])}", hint=did_you_mean(unknown[0], classes))
    if wrong := next((name for name in classes if given.get(name, 1.0) <= 0), None):
        what = f"data.class_weights: {given[wrong]:g} for {shorten(wrong)}"
        raise RecipeError(what, hint="a weight is above 0; remove the rows of a class that is not to be learned")
    return {name: given.get(name, 1.0) for name in classes}
