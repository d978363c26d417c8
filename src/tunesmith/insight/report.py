"""One static page of a run: curves, scores against the baseline, where it errs. No script, nothing loaded from outside."""

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

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ run.run }}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; } td, th { padding: .2rem .7rem; text-align: right; }
th { font-weight: 600; } td:first-child, th:first-child, td.text { text-align: left; } tr { border-bottom: 1px solid #ddd; }
svg { background: #fafafa; border: 1px solid #ddd; } .right { background: #e6f4ea; } .wrong { background: #fce8e6; }
small { color: #666; }
</style></head><body>
<h1>{{ run.run }}</h1>
<p>{{ run.task }} by {{ run.technique }} on {{ run.model.spec }}; {{ run.steps }} steps, {{ "%.0f"|format(run.seconds) }} s,
{{ "{:,}".format(run.trainable_parameters) }} of {{ "{:,}".format(run.total_parameters) }} parameters learned.</p>
<h2>Scores</h2>
{% if splits %}<table><tr><th></th>{% for s in splits %}<th>{{ s }}</th>{% endfor %}<th>guess by label frequency</th></tr>
{% for name in names %}<tr><td>{{ name }}</td>{% for s in splits %}<td>{{ number(run.metrics[s].get(name)) }}</td>{% endfor %}
<td>{{ number(run.metrics.baseline.get(name)) }}</td></tr>{% endfor %}</table>
{% else %}<p>No rows were held out, so there is no score.</p>{% endif %}
{% for curve in curves %}<h2>{{ curve.title }}</h2>
<svg viewBox="0 0 {{ width + 60 }} {{ height + 30 }}" width="{{ width + 60 }}" role="img" aria-label="{{ curve.title }}">
<polyline fill="none" stroke="#1a73e8" stroke-width="1.5" points="{{ curve.points }}"/>
<text x="{{ width + 4 }}" y="14" font-size="11">{{ curve.high }}</text>
<text x="{{ width + 4 }}" y="{{ height }}" font-size="11">{{ curve.low }}</text>
<text x="0" y="{{ height + 20 }}" font-size="11">step {{ curve.first }}</text>
<text x="{{ width - 60 }}" y="{{ height + 20 }}" font-size="11">step {{ curve.last }}</text></svg>
{% endfor %}
{% if confusion %}<h2>Which is taken for which <small>(rows: what it is; columns: what was said; {{ splits[-1] }})</small></h2>
<table><tr><th></th>{% for name in classes %}<th>{{ name }}</th>{% endfor %}</tr>
{% for name in classes %}{% set row = loop.index0 %}<tr><td>{{ name }}</td>{% for count in confusion[row] %}
<td class="{{ ('right' if loop.index0 == row else 'wrong') if count }}">{{ count }}</td>{% endfor %}</tr>{% endfor %}</table>{% endif %}
{% if worst %}<h2>Errors worth reading <small>(surest of what is wrong first; test)</small></h2>
<table><tr><th>row</th><th class="text">text</th><th>is</th><th>said</th><th>score</th></tr>
{% for e in worst %}<tr><td>{{ e.row }}</td><td class="text">{{ e.text[:300] }}</td><td>{{ e.label }}</td>
<td>{{ e.said }}</td><td>{{ number(e.score) }}</td></tr>{% endfor %}</table>{% endif %}
{% for note in run.data.notes %}<p>Note: {{ note }}</p>{% endfor %}
<p><small>{{ run.command }} &middot; seed {{ run.seed }} &middot; {{ run.hardware.name }}, {{ run.hardware.precision }} &middot;
{% for name, number in run.versions.items() %}{{ name }} {{ number }} {% endfor %}</small></p>
</body></html>
"""


def write(folder: Path) -> None:
    """Write `report.html` of a finished run from `run.json`, `metrics.jsonl` and the test predictions."""
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    splits = [name for name in ("validation", "test") if name in run["metrics"]]
    scores = run["metrics"][splits[-1]] if splits else {}
    confusion = scores.get("confusion_matrix", [])
    page = Environment(autoescape=True).from_string(_PAGE)
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
