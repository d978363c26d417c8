"""Metrics that accumulate batch by batch, and their definitions."""

from __future__ import annotations

from typing import Any

MEANINGS = {
    "accuracy": "fraction of correct predictions (per row or per word; multi-label: exact match of all labels)",
    "f1": "harmonic mean of entity precision and recall; boundaries and type must match exactly",
    "precision": "fraction of predicted entities that are correct",
    "recall": "fraction of true entities that are predicted correctly",
    "f1_macro": "unweighted mean of the F1 scores of all classes",
    "f1_micro": "F1 score over all rows and labels together",
    "balanced_accuracy": "unweighted mean of the recall of each class",
    "loss": "mean loss; lower is better",
    "perplexity": "exp(mean token loss); lower is better",
    "exact_match": "fraction of generated texts equal to the reference, ignoring white space",
    "rouge_l": "ROUGE-L F1, the longest common subsequence of words; 1 is best",
    "chrf": "chrF, the F-score of character n-grams; 100 is best",
    "bleu": "BLEU, the precision of word n-grams up to 4 with a brevity penalty; 100 is best",
    "ece": "expected calibration error, the mean gap between confidence and accuracy; 0 is best",
    "auroc": "area under the ROC curve; 0.5 is chance, 1 is best",
    "rmse": "root mean squared error, in the unit of the label; lower is better",
    "mae": "mean absolute error, in the unit of the label; lower is better",
    "r2": "coefficient of determination; 1 is best, 0 is as good as predicting the mean",
    "pearson": "Pearson correlation of predictions and labels; 1 is best",
    "spearman": "Spearman rank correlation of predictions and labels; 1 is best",
}
"""Definition of each metric, one short line each."""

ERRORS = {
    "right": "correct boundaries and type",
    "type": "correct boundaries, wrong type",
    "boundary": "wrong boundaries, correct type",
    "boundary_and_type": "wrong boundaries and type",
    "missed": "true entity without an overlapping prediction",
    "spurious": "predicted entity without an overlapping true entity",
}
"""Definition of each kind of entity error."""


def side_by_side(metrics: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return (title, scores) for each evaluated split, test last; scores of the base model come before each."""
    before = metrics.get("before", {})
    extra = [name for name in before if name not in ("validation", "test")]
    columns = []
    for name in (*extra, "validation", "test"):
        columns += [(f"{name} before", before[name])] if name in before else []
        columns += [(name, metrics[name])] if name in metrics else []
    return columns
