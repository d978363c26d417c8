"""One static page of a run: curves, scores against the baseline, where it errs. No script, nothing from outside."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment

from tunesmith.training.files import atomic_write

WIDTH, HEIGHT = 560, 180
WORST_SHOWN = 20
COLUMNS_AT_MOST = 30

_PAGE = Path(__file__).with_name("report.html.jinja")


def write(folder: Path) -> None:
    """Write `report.html` of a finished run from `run.json`, `metrics.jsonl` and the test predictions."""
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    splits = [name for name in ("validation", "test") if name in run["metrics"]]
    scores = run["metrics"][splits[-1]] if splits else {}
    confusion = scores.get("confusion_matrix", [])
    page = Environment(autoescape=True).from_string(_PAGE.read_text(encoding="utf-8"))
    html = page.render(
        run=run,
        splits=splits,
        names=[name for name, value in scores.items() if isinstance(value, float)],
        number=lambda value: "" if value is None else f"{value:.4f}",
        curves=_curves(folder / "metrics.jsonl"),
        classes=list(scores.get("f1", {})),
        confusion=confusion if len(confusion) <= COLUMNS_AT_MOST else [],
        worst=_worst(folder / "predictions-test.jsonl"),
        width=WIDTH,
        height=HEIGHT,
    )
    atomic_write(folder / "report.html", html)


def _curves(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    named = {"loss": "Training loss", "learning_rate": "Learning rate"}
    named |= {
        key: f"Validation {key.partition('/')[2]}"
        for line in lines
        for key in line
        if key in ("validation/loss", "validation/accuracy")
    }
    curves = []
    for key, title in named.items():
        points = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), float)]
        if len(points) > 1:
            curves.append({"title": title, **_polyline(_smoothed(points) if key == "loss" else points)})
    return curves


def _smoothed(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most 200 means of neighbours."""
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


def _worst(path: Path) -> list[dict[str, Any]]:
    """The wrong answers the model was surest of."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    wrong = [
        {
            "row": row["row"].rpartition(":")[2],
            "text": row["text"],
            "label": row["label"],
            "said": said["label"],
            "score": said["score"],
        }
        for row in rows
        if "label" in (said := row["prediction"]) and str(row.get("label")) != said["label"]
    ]
    return sorted(wrong, key=lambda row: -row["score"])[:WORST_SHOWN]
