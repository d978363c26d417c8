"""Head training as in SetFit, in plain transformers: the texts are encoded once, then a logistic regression is fitted.

SetFit itself is not installed because its pinned dependencies conflict. The features use mean pooling (as
sentence-transformers does for MiniLM), in batches of 32 sorted by length, in bf16. The head is scikit-learn's
logistic regression.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from transformers import AutoModel, AutoTokenizer

from bench.arms.trainer import encoded
from bench.clock import Clock

LIBRARIES = ("transformers", "torch", "scikit-learn")
AT_ONCE = 32


def go(job: dict[str, Any]) -> dict[str, Any]:
    """Encode and fit once; samples and tokens are those of the epochs that this replaces."""
    rows, _ = encoded(job["task"], job["model"], job["data"], job["max_length"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    gpu = job["device"] != "cpu" and torch.cuda.is_available()
    model = AutoModel.from_pretrained(job["model"], dtype=torch.float32).eval().to("cuda" if gpu else "cpu")
    labels = np.array([row["labels"] for row in rows])
    clock = Clock()
    clock.start()
    features = _features(model, tokenizer, rows, job["precision"] == "bf16")
    head = LogisticRegression(max_iter=1000).fit(features, labels)
    clock.stop()
    return {
        "seconds": clock.seconds,
        "cpu_seconds": clock.cpu_seconds,
        "samples": len(rows) * job["epochs"],
        "tokens": sum(len(row["input_ids"]) for row in rows) * job["epochs"],
        "last_loss": float(log_loss(labels, head.predict_proba(features))),
    }


@torch.inference_mode()
def _features(model: Any, tokenizer: Any, rows: list[dict[str, Any]], bf16: bool) -> np.ndarray[Any, Any]:
    """Return the mean-pooled features of each row."""  # (rows, hidden)
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]["input_ids"]))
    found = np.empty((len(rows), model.config.hidden_size), dtype=np.float32)
    for start in range(0, len(order), AT_ONCE):
        chosen = order[start : start + AT_ONCE]
        batch = tokenizer.pad({"input_ids": [rows[row]["input_ids"] for row in chosen]}, return_tensors="pt")
        batch = batch.to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            states = model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"][..., None]
        found[chosen] = ((states * mask).sum(1) / mask.sum(1)).cpu().numpy()
    return found
