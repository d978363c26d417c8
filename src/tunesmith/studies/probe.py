"""A linear probe: what a linear map can tell from the features of the untouched base (Alain & Bengio 2016).

Features are the last hidden states, in the number format that the machine is fast in, averaged over a text's tokens and
standardised; the probe is a logistic (or ridge) regression. It answers what fine-tuning was worth better than a
majority guess does.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from tunesmith.data.batches import collate
from tunesmith.data.encoded import Encoded
from tunesmith.deploy import predict
from tunesmith.errors import UserError
from tunesmith.models.sources import Source
from tunesmith.training import evaluate, machine

MAX_ROWS = 5000
LEAST_PROBABILITY = 1e-9
Array = NDArray[Any]


class _Features(nn.Module):
    """A model whose "logits" are its backbone's last hidden states, of each token or their mean."""

    def __init__(self, model: Any, each_token: bool) -> None:
        super().__init__()
        self.backbone, self.config, self.each_token = model.base_model, model.config, each_token

    def forward(self, **inputs: Tensor) -> SimpleNamespace:
        hidden = self.backbone(**inputs).last_hidden_state.float()  # (texts, tokens, hidden)
        if self.each_token:
            return SimpleNamespace(logits=hidden)
        mask = inputs.get("attention_mask")
        mask = hidden.new_ones(hidden.shape[:2]) if mask is None else mask
        return SimpleNamespace(logits=(hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True))


def scores(tuned: predict.FineTunedModel, base: Source, train: Encoded, encoded: Encoded) -> dict[str, Any]:
    """The task's scores of a probe on the features of `base`, fitted on at most `MAX_ROWS` of `train`.

    Raises:
        UserError: the task predicts no classes and no numbers.
    """
    objective = tuned.bound.objective
    if objective is None:
        raise UserError(f"--base: a linear probe predicts classes or numbers, and {tuned.task.name} does neither")
    model, _ = predict.base_of(tuned, base)
    field, each_token = objective.field, objective.field != "label"  # of each word, or of each example
    features = _Features(model, each_token).to(tuned.machine.device)
    shuffled = np.random.default_rng(0).permutation(len(train))
    known, labels = _features(features, tuned, train, np.sort(shuffled[:MAX_ROWS]), field)
    asked, _ = _features(features, tuned, encoded, np.arange(len(encoded)), field)
    scale = StandardScaler().fit(known)
    prior = torch.zeros(len(objective.names)) if each_token else objective.prior(train)
    fit = {"regression": _fit_number, "multi": _fit_several}.get(objective.kind, _fit_one)
    outputs = fit(prior, scale.transform(known), labels, scale.transform(asked))
    metrics = tuned.bound.metrics()
    metrics.update(collate(encoded, np.arange(len(encoded))), torch.from_numpy(outputs).float())
    return metrics.compute()


def _features(
    model: nn.Module, tuned: predict.FineTunedModel, encoded: Encoded, rows: Array, field: str
) -> tuple[Array, Array]:
    """(features, labels) of these rows, or of all their words."""
    fast = machine.find(str(tuned.machine.device))
    values: dict[int, Array] = {}
    for indices, output, batch in evaluate.outputs(model, tuned.bound, encoded, fast, rows):
        lengths = batch.ragged(field).lengths.tolist() if field != "label" else [1] * len(indices)
        values |= {index: one.cpu().numpy() for index, one in zip(indices.tolist(), output.split(lengths), strict=True)}
    labels, _ = encoded.take(rows)[field]
    return np.concatenate([values[int(row)] for row in rows]), np.asarray(labels).reshape(
        sum(map(len, values.values())), -1
    )


def _fit_number(prior: Tensor, known: Array, labels: Array, asked: Array) -> Array:
    """A number for each row."""  # (rows, 1)
    return np.asarray(Ridge(alpha=1.0).fit(known, labels[:, 0]).predict(asked)[:, None])


def _fit_one(prior: Tensor, known: Array, labels: Array, asked: Array) -> Array:
    """Log probabilities of the classes; of one that the probe has not seen, the least."""  # (rows, classes)
    if len(np.unique(labels)) < 2:
        return np.tile(prior.numpy(), (len(asked), 1))
    fitted = LogisticRegression(max_iter=2000, C=0.1).fit(known, labels[:, 0])
    probabilities = np.zeros((len(asked), len(prior)))
    probabilities[:, fitted.classes_.astype(int)] = fitted.predict_proba(asked)
    return np.log(np.maximum(probabilities, LEAST_PROBABILITY))


def _fit_several(prior: Tensor, known: Array, labels: Array, asked: Array) -> Array:
    """Log odds of each label; of one that is always or never there, those of its frequency."""  # (rows, labels)
    columns = []
    for wanted, odds in zip(labels.T > 0.5, prior.tolist(), strict=True):
        if wanted.all() or not wanted.any():
            columns.append(np.full(len(asked), odds))
        else:
            columns.append(LogisticRegression(max_iter=2000, C=0.1).fit(known, wanted).decision_function(asked))
    return np.stack(columns, axis=1)
