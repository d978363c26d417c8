"""Linear probe: a linear model on the features of the base model (Alain & Bengio 2016, arXiv 1610.01644).

Features are the last hidden states, averaged over the tokens of a text and standardized; the probe is a logistic (or
ridge) regression. It is a stronger reference for fine-tuning than the majority-class baseline.
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
MIN_PROBABILITY = 1e-9
Array = NDArray[Any]


class _Features(nn.Module):
    """A model whose "logits" are the last hidden states of its backbone, for each token or averaged."""

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
    """Return the task's scores of a probe on the features of `base`, fitted on at most `MAX_ROWS` of `train`.

    Raises:
        UserError: the task predicts no classes and no numbers.
    """
    objective = tuned.bound.objective
    if objective is None:
        raise UserError(
            f"--base: a linear probe predicts classes or numbers, but {tuned.task.name} predicts neither",
            hint="leave --base out",
        )
    model, _ = predict.base_of(tuned, base)
    field, each_token = objective.field, objective.field != "label"  # per word or per example
    features = _Features(model, each_token).to(tuned.machine.device)
    shuffled = np.random.default_rng(0).permutation(len(train))
    train_x, train_y = _features(features, tuned, train, np.sort(shuffled[:MAX_ROWS]), field)
    eval_x, _ = _features(features, tuned, encoded, np.arange(len(encoded)), field)
    scale = StandardScaler().fit(train_x)
    prior = torch.zeros(len(objective.names)) if each_token else objective.prior(train)
    fit = {"regression": _fit_number, "multi": _fit_labels}.get(objective.kind, _fit_class)
    outputs = fit(prior, scale.transform(train_x), train_y, scale.transform(eval_x))
    metrics = tuned.bound.metrics()
    metrics.update(collate(encoded, np.arange(len(encoded))), torch.from_numpy(outputs).float())
    return metrics.compute()


def _features(
    model: nn.Module, tuned: predict.FineTunedModel, encoded: Encoded, rows: Array, field: str
) -> tuple[Array, Array]:
    """Return (features, targets) of these rows, or of all their words."""
    target = machine.find(str(tuned.machine.device))
    values: dict[int, Array] = {}
    for indices, output, batch in evaluate.outputs(model, tuned.bound, encoded, target, rows):
        lengths = batch.ragged(field).lengths.tolist() if field != "label" else [1] * len(indices)
        values |= {index: one.cpu().numpy() for index, one in zip(indices.tolist(), output.split(lengths), strict=True)}
    labels, _ = encoded.take(rows)[field]
    return np.concatenate([values[int(row)] for row in rows]), np.asarray(labels).reshape(
        sum(map(len, values.values())), -1
    )


def _fit_number(prior: Tensor, train_x: Array, train_y: Array, eval_x: Array) -> Array:
    """Predict a number for each row."""  # (rows, 1)
    return np.asarray(Ridge(alpha=1.0).fit(train_x, train_y[:, 0]).predict(eval_x)[:, None])


def _fit_class(prior: Tensor, train_x: Array, train_y: Array, eval_x: Array) -> Array:
    """Predict log probabilities of the classes; a class without training rows has the minimum."""  # (rows, classes)
    if len(np.unique(train_y)) < 2:
        return np.tile(prior.numpy(), (len(eval_x), 1))
    fitted = LogisticRegression(max_iter=2000, C=0.1).fit(train_x, train_y[:, 0])
    probabilities = np.zeros((len(eval_x), len(prior)))
    probabilities[:, fitted.classes_.astype(int)] = fitted.predict_proba(eval_x)
    return np.log(np.maximum(probabilities, MIN_PROBABILITY))


def _fit_labels(prior: Tensor, train_x: Array, train_y: Array, eval_x: Array) -> Array:
    """Predict log odds of each label; a label with constant training targets has its prior."""  # (rows, labels)
    columns = []
    for wanted, odds in zip(train_y.T > 0.5, prior.tolist(), strict=True):
        if wanted.all() or not wanted.any():
            columns.append(np.full(len(eval_x), odds))
        else:
            columns.append(LogisticRegression(max_iter=2000, C=0.1).fit(train_x, wanted).decision_function(eval_x))
    return np.stack(columns, axis=1)
