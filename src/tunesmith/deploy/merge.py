"""Merging of several runs with the same base into one model: a weighted sum of their weight changes.

With the change d_i = W_i - W of run i, and weights a_i:

    linear   W + sum_i a_i d_i                                    (task arithmetic, Ilharco 2023, arXiv 2212.04089)
    dare     each entry of d_i is kept with probability p and divided by p, then linear (Yu 2024, arXiv 2311.03099)
    ties     each d_i keeps the fraction p of its entries with the largest magnitude; the sign of sum_i a_i d_i is
             elected for each entry; the weighted mean of the d_i of that sign is added (Yadav 2023, arXiv 2306.01708)

Sums are in fp32. The result is a plain transformers folder. Heads, which the base does not have, are averaged.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tunesmith import recipe as recipes
from tunesmith.deploy import artifact, card, predict
from tunesmith.errors import RecipeError, UserError, counted
from tunesmith.models import added_tokens, sources
from tunesmith.models import load as models
from tunesmith.storage import files
from tunesmith.storage.run_folder import claim, clear
from tunesmith.storage.run_lock import RunLock
from tunesmith.training.task_model import load_task_model

Method = Literal["linear", "ties", "dare"]
DENSITY = {"linear": 1.0, "ties": 0.2, "dare": 0.5}
"""Default fraction of entries kept: 20 % as in the TIES paper; half for DARE, harmless for LoRA in its paper."""


@torch.no_grad()
def merge(
    runs: Sequence[str | Path],
    output: str | Path,
    *,
    weights: Sequence[float] | None = None,
    method: Method = "linear",
    density: float | None = None,
    seed: int = 0,
    offline: bool = False,
    allow_pickle: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a run folder whose `model/` is the merged model; use it like any other run.

    A single run is merged into its base. `weights` default to equal weights with the sum 1; `density` is p in the
    formulas.

    Raises:
        UserError: the runs differ in base, task or classes, or the number of weights is wrong.
        RecipeError: a run is not finished, or its technique cannot be merged.
    """
    shares = list(weights) if weights is not None else [1 / len(runs)] * len(runs)
    if len(shares) != len(runs):
        what = f"--weights: {counted(len(shares), 'weight')} for {counted(len(runs), 'run')}"
        raise UserError(what, hint="give one for each run")
    if not all(map(math.isfinite, shares)) or sum(shares) == 0:
        hint = "heads are averaged with these weights, e.g. 0.7,0.3"
        given = ", ".join(f"{share:g}" for share in shares)
        raise UserError(f"--weights: {given}: not finite, or with the sum 0", hint=hint)
    kept = DENSITY[method] if density is None else density
    if method == "linear" and kept != 1:
        raise UserError("--density: linear keeps all entries", hint="leave it out, or use --method ties or dare")
    if not 0 < kept <= 1:
        raise UserError(f"--density: must be above 0 and at most 1, not {kept:g}", hint="e.g. --density 0.2")
    if Path(output).resolve() in [Path(run).resolve() for run in runs]:
        raise UserError("--output: this is one of the runs to merge", where=str(output), hint="name another folder")
    if not overwrite and Path(output).exists() and any(Path(output).iterdir()):
        hint = "replace the run with --overwrite, or choose another folder with --output"
        raise UserError("--output: the folder is not empty", where=str(output), hint=hint)
    folders = [Path(run) for run in runs]
    parts = [_merged(folder, offline, allow_pickle, exact=True) for folder in folders]
    first, source = parts[0]
    _check_alike(folders, parts)
    base, anatomy = _base(first, source)
    start = {name: parameter.float() for name, parameter in base.named_parameters()}
    changed: dict[str, list[Tensor]] = {}
    for tuned, _ in parts:
        state = dict(tuned.model.named_parameters())
        for name, before in start.items():
            changed.setdefault(name, []).append(state[name].float() - before)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in base.named_parameters():
        if name in anatomy.always_trainable:
            total = sum(shares)
            added = sum(a / total * d for a, d in zip(shares, changed[name], strict=True))
        else:
            added = combine(changed[name], shares, method, kept, generator)
        parameter.copy_(start[name] + added)
    how = {"runs": [str(folder) for folder in folders], "weights": shares, "method": method, "density": kept}
    about = json.loads((folders[0] / "run.json").read_text(encoding="utf-8"))
    about = {key: about[key] for key in ("model", "data")} | {"merged": how | {"seed": seed}}
    _write(Path(output), base, first, about, overwrite)
    return {"run": str(output), **how}


def combine(
    changes: Sequence[Tensor], shares: Sequence[float], method: Method, density: float, generator: torch.Generator
) -> Tensor:
    """Return the change of one parameter of the base."""
    if method == "dare":
        drawn = [torch.rand(change.shape, generator=generator) < density for change in changes]
        changes = [change * keep / density for change, keep in zip(changes, drawn, strict=True)]
    if method != "ties":
        return sum((a * change for a, change in zip(shares, changes, strict=True)), torch.zeros_like(changes[0]))
    trimmed = torch.stack([a * _largest(change, density) for a, change in zip(shares, changes, strict=True)])
    elected = trimmed.sum(0).sign()
    agree = (trimmed.sign() == elected) & (trimmed != 0)
    share = torch.tensor(shares).view(-1, *[1] * changes[0].ndim).abs()
    return (trimmed * agree).sum(0) / (share * agree).sum(0).clamp_min(1e-12)


def _largest(change: Tensor, density: float) -> Tensor:
    """Return the change with only the entries of largest magnitude, the others set to zero."""
    count = max(1, round(density * change.numel()))
    kept = change.flatten().abs().topk(count).indices
    trimmed = torch.zeros(change.numel(), dtype=change.dtype)
    trimmed[kept] = change.flatten()[kept]
    return trimmed.view_as(change)


def merge_adapter(run: Path, *, offline: bool = False, allow_pickle: bool = False) -> None:
    """Write `model/` of a run with an adapter, so that other runs can start from it.

    Raises:
        RecipeError: the technique cannot be merged.
    """
    tuned, source = _merged(run, offline, allow_pickle)
    unused = models.unused_parts(source, tuned.model, tuned.anatomy.unused)
    artifact.save(run / "model", tuned.model, tuned.processor, unused)


def _merged(
    folder: Path, offline: bool, allow_pickle: bool = False, *, exact: bool = False
) -> tuple[predict.FineTunedModel, sources.Source]:
    """Return a run's model on the CPU with its adapter merged, and the source of its base; `exact`: in fp32."""
    tuned = predict.load(folder, device="cpu", offline=offline, allow_pickle=allow_pickle, to_merge=True)
    technique = tuned.recipe.technique
    source = sources.resolve(tuned.recipe.model, offline=offline, allow_pickle=allow_pickle)
    if exact:
        tuned.model.float()
    if (folder / "adapter").exists():
        try:
            technique.merge(tuned.model)
        except RecipeError as error:
            raise RecipeError(str(error), where=str(folder)) from error
    added_tokens.fold(tuned.model)
    return tuned, source


def _check_alike(folders: Sequence[Path], parts: Sequence[tuple[predict.FineTunedModel, sources.Source]]) -> None:
    (first, base), *others = parts
    for folder, (tuned, source) in zip(folders[1:], others, strict=True):
        if models.base_hash(source) != models.base_hash(base):
            hint = "merge runs with the same base model"
            raise UserError(f"its base model {source.spec} is not {base.spec}", where=str(folder), hint=hint)
        if _signature(tuned) != _signature(first):
            hint = "merge runs of the same task with the same classes and tokens"
            raise UserError(f"its task, classes or tokens are not those of {folders[0]}", where=str(folder), hint=hint)


def _signature(tuned: predict.FineTunedModel) -> tuple[str, dict[str, Any], list[str]]:
    return tuned.task.name, tuned.task.head_config(), list(tuned.task.added_tokens)


def _base(first: predict.FineTunedModel, source: sources.Source) -> tuple[nn.Module, Any]:
    model, anatomy = load_task_model(first.task, source, first.processor, first.recipe.train.seed)
    added_tokens.fold(model)
    return model, anatomy


def _write(
    output: Path, model: nn.Module, first: predict.FineTunedModel, about: dict[str, Any], overwrite: bool
) -> None:
    with RunLock(output):
        claim(output, resume=False, overwrite=overwrite)
        clear(output)
        artifact.save(output / "model", model, first.processor)
        recipe = first.recipe.model_copy(update={"output": str(output)})
        files.atomic_write(output / "recipe.yaml", recipes.to_yaml(recipe.dump()))
        done = {"outcome": "done", "run": str(output), "task": first.task.name, "technique": "merge", "metrics": {}}
        files.atomic_write(output / "run.json", json.dumps(done | about, indent=1, ensure_ascii=False) + "\n")
        card.write(output, recipe)
