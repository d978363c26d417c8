"""Messages of a run: the summary before training, scores during training, the summary at the end."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from tunesmith.console import command, scores_line
from tunesmith.errors import counted
from tunesmith.insight import hints
from tunesmith.kernels.ops.quantized import numbers_in
from tunesmith.run import record
from tunesmith.run.state import Run
from tunesmith.tasks import LOWER_IS_BETTER
from tunesmith.training import loop


def introduce(run: Run) -> None:
    """Print model, technique, rows, new head, trainable parameters, fast paths and the resuming command."""
    prepared, recipe, console = run.prepared, run.recipe, run.console
    counts = sorted(prepared.examples.rows.items(), reverse=True)
    rows = "  ".join(f"{name} {count:,}" for name, count in counts) + " rows"
    if not prepared.bound.rows_are_examples:
        rows = "  ".join(
            f"{name} {counted(count, 'text')} in {counted(len(prepared.encoded[name]), 'block')}"
            for name, count in counts
        )
    console.say(f"model {recipe.model}  technique {recipe.technique.name}  {rows}")
    _introduce_head(run)
    trainable = sum(parameter.numel() for parameter in prepared.model.parameters() if parameter.requires_grad)
    total = numbers_in(prepared.model)
    rate = f"learning rate {recipe.train.learning_rate:.1e}"
    steps = counted(prepared.total_steps, "step")
    where = f"on {prepared.machine.device} in {prepared.machine.precision}"
    console.say(f"trainable parameters: {trainable:,} of {total:,} ({trainable / total:.2%}), {rate}, {steps} {where}")
    console.say(prepared.fast_path.summary())
    console.say(f"to resume: {record.resume_command(run.folder)}")


def _introduce_head(run: Run) -> None:
    """Print added tokens, a new head, and the checkpoint weights that the model does not use."""
    prepared, console = run.prepared, run.console
    if prepared.anatomy.added:
        added = counted(len(prepared.task.added_tokens), "token")
        console.say(f"{added} added, initialized with the mean embedding, trainable")
    new, unused = (_modules(names) for names in (prepared.anatomy.new, prepared.anatomy.unused))
    if new and prepared.continued is None:
        warmup = f", head-only warmup: {counted(count, 'step')}" if (count := prepared.head_warmup_steps) else ""
        dropped = f"; unused checkpoint weights: {', '.join(unused)}" if unused else ""
        console.say(f"new head ({', '.join(new)}){warmup}{dropped}")


def _modules(parameters: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[0] for name in parameters})


def before_training(run: Run) -> str:
    """Return when the base was scored: before training, or after the head-only warmup."""
    return f"after the head-only warmup ({counted(run.state.step, 'step')})" if run.state.step else "before training"


def epoch_line(steps: Sequence[loop.Step], loss: float, score: str) -> str:
    """Return the line of one evaluation: epoch, mean loss, score, learning rate and speed."""
    last = steps[-1]
    rate = sum(step.examples for step in steps) / sum(step.seconds for step in steps)
    words = [f"epoch {last.epoch:.3g}", f"loss {loss:.4f}", score, f"lr {last.learning_rate:.1e}"]
    return "  ".join([*filter(None, words), f"{rate:.{0 if rate >= 10 else 1}f} examples/s"])


def conclude(run: Run, metrics: dict[str, Any]) -> None:
    """Print the final scores, the baseline, hints, and the next command."""
    prepared, metric, console = run.prepared, run.metric, run.console
    before = metrics.get("before", {})
    for name in (*prepared.task.extra_eval_sets(), "validation", "test"):
        if name in metrics:
            console.say(f"{name}: {scores_line(metrics[name], metric, before.get(name))}")
    gain, sign = math.inf, -1 if metric in LOWER_IS_BETTER else 1
    was, now = (scores.get("validation", {}).get(metric, math.nan) for scores in (before, metrics))
    if sign * now < sign * was:
        hint = f"try a train.learning_rate below {run.recipe.train.learning_rate:.1e}"
        console.warn(f"validation {metric} is worse than before training ({now:.4f}, before: {was:.4f}); {hint}")
    if metric in (baseline := metrics.get("baseline", {})):
        gain = (metrics[baseline["split"]][metric] - baseline[metric]) * sign
        score = f"{metric} {baseline[metric]:.4f} on {baseline['split']}"
        verdict = " (the run is no better)" if gain <= 0 else ""
        console.say(f"{prepared.task.baseline_name}: {score}{verdict}")
    if (hint_text := hints.longer(run.folder / "metrics.jsonl", run.recipe.train, gain)) is not None:
        console.say(hint_text)
    console.say(f'written to {run.folder}; next: {command("predict", run.folder)} "..."')
