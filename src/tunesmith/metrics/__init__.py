"""Scores that are built up batch by batch, what each says, and how those of a run stand side by side."""

from __future__ import annotations

from typing import Any

MEANINGS = {
    "accuracy": "share of rows (or words, tagged or hidden) answered right; of several labels a row, all of them",
    "f1": "how well entities are found, hits against misses and false alarms; only exact ones are hits",
    "precision": "share of the entities that were said that are right",
    "recall": "share of the entities that are there that were found",
    "f1_macro": "how well each class is found, hits against misses and false alarms, all classes counting alike",
    "f1_micro": "how well labels are found, hits against misses and false alarms, all rows and labels together",
    "balanced_accuracy": "share answered right within each class, averaged: a rare class counts as a common one",
    "loss": "what training makes small; less is better",
    "perplexity": "among how many words, so to speak, the model wavers for each one that is missing; less is better",
    "exact_match": "share of the written texts that are word for word what was meant",
    "rouge_l": "how many words of what was written and of what was meant stand in both in the same order; 1 is best",
    "chrf": "how many short runs of characters are in both what was written and what was meant; 100 is best",
    "bleu": "how many runs of up to four words of what was written are in what was meant too; 100 is best",
    "ece": "gap between how sure the model is and how often it is right (expected calibration error); 0 is best",
    "auroc": "how often a row of a class gets a higher score for it than a row of another; 0.5 is chance, 1 is best",
    "rmse": "typical error, large ones weighing more; in the units of the label, less is better",
    "mae": "mean error; in the units of the label, less is better",
    "r2": "share of the labels' variance that is explained; 1 is best, 0 is as good as their mean",
    "pearson": "how straight a line answers and labels make; 1 is best",
    "spearman": "how well the answers put the rows into the order of the labels; 1 is best",
}
"""What each score says, in plain words."""


def side_by_side(metrics: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(title, scores) of what a run was scored on: splits last, each behind what the base scored on it before."""
    before = metrics.get("before", {})
    others = [name for name in before if name not in ("validation", "test")]
    found = []
    for name in (*others, "validation", "test"):
        found += [(f"{name} before", before[name])] if name in before else []
        found += [(name, metrics[name])] if name in metrics else []
    return found


ERRORS = {
    "right": "the same words, the same type",
    "type": "the same words, another type",
    "boundary": "other words, the same type",
    "boundary_and_type": "other words, another type",
    "missed": "nothing was said there",
    "spurious": "said where there is nothing",
}
"""What becomes of the entities that are there, and of those that are not, in plain words."""
