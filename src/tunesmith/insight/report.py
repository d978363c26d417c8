"""The report of a run: one static HTML page with curves, scores and errors. No scripts, no external resources."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, Template

from tunesmith.data.columns import inputs_of, targets_of
from tunesmith.data.formats import Row
from tunesmith.errors import CONTROL, counted
from tunesmith.metrics import ERRORS, MEANINGS, side_by_side
from tunesmith.recipe import Recipe
from tunesmith.storage.files import atomic_write
from tunesmith.storage.run_folder import samples_in
from tunesmith.tasks import Task

WIDTH, HEIGHT = 560, 180
MAX_ERRORS_SHOWN = 20
MAX_CLASSES_SHOWN = 30
MAX_CHARS_SHOWN = 300

_PAGE = Path(__file__).with_name("report.html.jinja")


def write(folder: Path, recipe: Recipe) -> None:
    """Write `report.html` of a finished run from its recipe, `run.json`, `metrics.jsonl` and the test predictions."""
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    splits = [name for name in ("validation", "test") if name in run["metrics"]]
    scores = run["metrics"][splits[-1]] if splits else {}
    confusion = scores.get("confusion_matrix", [])
    html = _page().render(
        run=run,
        splits=splits,
        samples=samples_in(run),
        columns=side_by_side(run["metrics"]),
        names=[name for name, value in scores.items() if isinstance(value, float)],
        meanings=MEANINGS | ERRORS,
        number=lambda value: "" if value is None else f"{value:.4f}",
        curves=_curves(folder / "metrics.jsonl", ("loss", recipe.train.metric)),
        each=scores["f1"] if isinstance(scores.get("f1"), dict) else {},
        entities=scores.get("entities", {}),
        errors=scores.get("errors", {}),
        confusion=confusion if len(confusion) <= MAX_CLASSES_SHOWN else [],
        worst=_confident_errors(folder / "predictions-test.jsonl", recipe.task),
        baseline_name=recipe.task.baseline_name,
        chars=MAX_CHARS_SHOWN,
        counted=counted,
        width=WIDTH,
        height=HEIGHT,
    )
    atomic_write(folder / "report.html", html)


@cache
def _page() -> Template:
    """Compile the template."""
    return Environment(autoescape=True, finalize=_printable).from_string(_PAGE.read_text(encoding="utf-8"))


def _printable(value: object) -> object:
    """Replace control characters, which HTML does not allow."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", value) if isinstance(value, str) else value


def _curves(path: Path, validated: Collection[str | None]) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    named = {"loss": "Training loss", "learning_rate": "Learning rate"}
    named |= {f"validation/{name}": f"Validation {name}" for name in validated}
    curves = []
    for key, title in named.items():
        points = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), float)]
        if len(points) > 1:
            curves.append({"title": title, **_polyline(_smoothed(points) if key == "loss" else points)})
    return curves


def _smoothed(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return at most 200 points, each the mean of adjacent points."""
    size = max(1, len(points) // 200)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def _polyline(points: Sequence[tuple[int, float]]) -> dict[str, Any]:
    steps, values = [step for step, _ in points], [value for _, value in points]
    low, high = min(values), max(values)
    span, width = (high - low) or 1.0, (steps[-1] - steps[0]) or 1
    drawn = (
        f"{(step - steps[0]) / width * WIDTH:.1f},{HEIGHT - (value - low) / span * (HEIGHT - 10) - 5:.1f}"
        for step, value in points
    )
    return {"points": " ".join(drawn), "low": f"{low:.3g}", "high": f"{high:.3g}", "first": steps[0], "last": steps[-1]}


def _confident_errors(path: Path, task: Task) -> list[dict[str, Any]]:
    """Return the wrong predictions with the highest confidence, or the largest error."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    inputs, targets = inputs_of(task.columns), targets_of(task.columns)
    wrong = []
    for row in rows:
        if not any(column.name in row for column in targets):
            continue
        mistake = task.mistake(row["prediction"], task.parse_target(Row(row["row"], row)))
        if mistake is not None:
            texts = [_text(row[column.name])[:MAX_CHARS_SHOWN] for column in inputs if column.name in row]
            line = row["row"].rpartition(":")[2]
            wrong.append(
                {"row": line, "texts": texts, "true": mistake[0], "predicted": mistake[1], "score": mistake[2]}
            )
    return sorted(wrong, key=lambda row: -row["score"])[:MAX_ERRORS_SHOWN]


def _text(value: object) -> str:
    return " ".join(str(part) for part in value) if isinstance(value, list) else str(value)
