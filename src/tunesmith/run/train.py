"""One run, from a recipe to a scored artifact on disk:

recipe -> data -> model -> technique -> loop (evaluate, checkpoint) -> artifact -> final scores -> card and report.

    tunesmith.train("recipe.yaml", "train.epochs=1")
    tunesmith.train(task="text-classification", model="runs/base", data={"train": "reviews.csv"})
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Collection
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from tunesmith import recipe as recipes
from tunesmith.console import Console, scores_line
from tunesmith.deploy import artifact, card, predict
from tunesmith.errors import Interrupted, NumericError, ResourceError, UserError, counted
from tunesmith.insight import report
from tunesmith.recipe import Recipe, Train
from tunesmith.run import messages, record
from tunesmith.run.prepare import Prepared, prepare
from tunesmith.run.signals import Signals, Stopped
from tunesmith.run.state import Run, TrainState
from tunesmith.storage import files
from tunesmith.storage.run_folder import claim, clear
from tunesmith.storage.run_lock import RunLock
from tunesmith.tasks import LOWER_IS_BETTER
from tunesmith.training import checkpoint, evaluate, loop, machine, optimizer, parallel


def train(
    recipe: Recipe,
    *,
    resume: str | Path | None = None,
    overwrite: bool = False,
    override: Collection[str] = (),
    offline: bool = False,
    allow_pickle: bool = False,
    console: Console | None = None,
    recipe_file: Path | None = None,
) -> dict[str, Any]:
    """Train one run and return its result, the object that `tunesmith train --json` prints.

    `resume` is the folder of an earlier run to continue, `override` the keys that may differ from it. `recipe_file` is
    protected from `overwrite`.

    Raises:
        UserError: the user can fix it; it has an exit code.
    """
    console = console or Console()
    folder = Path(resume or recipe.output)
    target = machine.find(recipe.train.device, recipe.train.precision)
    target.select()
    if target.is_slow:
        console.warn(f"train.precision: this CPU emulates {target.precision}, many times slower than fp32; use auto")
    with parallel.group(target.device.type), RunLock(folder, enabled=parallel.rank() == 0):
        if parallel.rank() == 0:
            needed = (recipe_file, *recipes.paths_needed(recipe))
            claim(folder, resume=resume is not None, overwrite=overwrite, needed=needed)
            files.remove_leftovers(folder)
        parallel.barrier()
        begun = resume is not None
        try:
            with Signals() as signals:
                prepared = prepare(recipe, target, offline=offline, allow_pickle=allow_pickle, console=console)
                begun = True
                run = Run(prepared, _engine(prepared, console), TrainState(), folder, console)
                return _run(run, resume is not None, override, signals)
        except (UserError, Stopped, MemoryError, RuntimeError, OSError, SafetensorError) as error:
            reported = _as_user_error(error, folder, begun)
            if begun:  # otherwise the folder holds an earlier run
                record.ended(folder, f"{type(reported).__name__}: {reported}")
            if reported is error:
                raise
            raise reported from error


def _as_user_error(error: BaseException, folder: Path, begun: bool) -> BaseException:
    """Return a `UserError` for an error caused by a signal, the disk or a lack of memory; else the error itself."""
    if isinstance(error, Stopped):
        resumable = begun and (folder / "recipe.yaml").exists()
        again = record.resume_command(folder) if resumable else "run the command again"
        return Interrupted(f"stopped by {error}; to resume: {again}")
    if isinstance(error, OSError | SafetensorError):
        return files.disk_error(error, Path(getattr(error, "filename", None) or folder))
    if machine.is_out_of_memory(error):
        hint = "use technique=lora or technique=freeze, a smaller model, or device=cpu"
        return ResourceError(f"out of memory ({error})", hint=hint)
    return error


def _run(run: Run, resumed: bool, override: Collection[str], signals: Signals) -> dict[str, Any]:
    if resumed:
        _restore(run, override)
    torch.set_num_threads(run.state.threads or torch.get_num_threads())
    run.state.threads = torch.get_num_threads()
    if parallel.rank() == 0:
        if not resumed:
            clear(run.folder)
        written = run.recipe.dump() | {"output": str(run.folder)}
        files.atomic_write(run.folder / "recipe.yaml", recipes.to_yaml(written))
        record.write_run(run.folder, run.prepared, run.state, {"outcome": "running"})
    messages.introduce(run)
    run.state.seconds += run.prepared.cache_features(run.console)
    _fit(run, signals)
    return _finish(run)


def _engine(prepared: Prepared, console: Console) -> loop.Engine:
    train = prepared.recipe.train
    engine = loop.Engine(
        model=prepared.model,
        anatomy=prepared.anatomy,
        task=prepared.bound,
        optimizer=optimizer.build(prepared.model, prepared.anatomy, prepared.technique, train),
        machine=prepared.machine,
        limits=prepared.machine.limits(
            prepared.anatomy, train.micro_batch_size, train.batch_size, padding_free=prepared.fast_path.unpadded
        ),
        seed=train.seed,
        max_grad_norm=train.max_grad_norm,
        draws=prepared.draws,
        may_checkpoint=train.gradient_checkpointing == "auto",
        say=console.warn,
    )
    if train.gradient_checkpointing is True:
        loop.checkpoint_activations(engine)
    return engine


def _fit(run: Run, signals: Signals) -> None:
    """Run the loop with logging, evaluation, checkpoints and early stopping."""
    prepared, engine, state, folder, console = run.prepared, run.engine, run.state, run.folder, run.console
    batches, total, train = prepared.batches, prepared.total_steps, prepared.recipe.train
    factor = optimizer.schedule(train, total)
    since_evaluation: list[loop.Step] = []
    prepared.update_trainable(state.step)
    _score_base(run)
    if _patience_exhausted(train, state):  # it was killed after early stopping
        return
    with signals.deferred(), console.progress(total, state.step) as show:
        for step in loop.steps(engine, batches, factor, start=state.step, total=total):
            _update_state(run, step)
            record.log(folder, record.step_metrics(step, prepared.machine, prepared.task.unit))
            if not step.finite:
                _handle_non_finite(run, step)
            since_evaluation.append(step)
            show(step.number, f"loss {step.loss:.4f}")
            console.detail(f"step {step.number}  loss {step.loss:.4f}  gradient norm {step.grad_norm:.3g}")
            last = step.number == total
            improved = False
            if last or _due(train.evaluate_every, step.number, batches.steps_per_epoch):
                improved = _evaluate(run, since_evaluation)
                since_evaluation = []
            # scores may differ in their last bits between processes, so that all decide together
            flags = improved, _patience_exhausted(train, state), signals.requested is not None
            improved, stop, signaled = parallel.all_reduce_any(flags, prepared.machine.device)
            _score_base(run)
            prepared.update_trainable(step.number)
            if last or stop or signaled or improved or _due(train.save_every, step.number, batches.steps_per_epoch):
                _save(run)
            if signaled:
                again = record.resume_command(folder)
                raise Interrupted(f"stopped after step {step.number} of {total}; to resume: {again}")
            if stop:
                why = f"{train.metric} has not improved in {counted(state.stale, 'evaluation')}"
                console.say(f"early stopping at step {step.number} of {total}: {why}")
                return


def _score_base(run: Run) -> None:
    """Score the base before training, for a task whose head it has; a new head is warmed up first."""
    prepared, state, folder, console = run.prepared, run.state, run.folder, run.console
    if not prepared.task.base_has_head or state.before is not None or state.step != prepared.head_warmup_steps:
        return
    model, bound, metric = prepared.model, prepared.bound, run.metric
    held_out = [name for name in ("validation", *prepared.task.extra_eval_sets()) if name in prepared.encoded]
    when = messages.before_training(run)
    scored = {}
    with console.during(f"scoring {' and '.join(held_out)} {when}"), prepared.technique.disabled(model):
        for name in held_out:
            scored[name] = evaluate.scores_and_answers(model, bound, prepared.encoded[name], prepared.machine)
    state.before = {name: scores for name, (scores, _) in scored.items()}
    if bound.generator is not None and bound.rows_are_examples and "validation" in scored:
        state.said_before = record.first_answers(prepared, scored["validation"][1])
    for name, scores in state.before.items():
        numbers = {score: value for score, value in scores.items() if isinstance(value, float)}
        line = {f"before/{name}/{score}": record.json_number(value) for score, value in numbers.items()}
        record.log(folder, {"step": state.step, **line})
        console.say(f"{name} {when}: {scores_line(scores, metric)}")


def _patience_exhausted(train: Train, state: TrainState) -> bool:
    return train.early_stopping_patience is not None and state.stale >= train.early_stopping_patience


def _due(every: int | str, step: int, steps_per_epoch: int) -> bool:
    return step % (steps_per_epoch if every == "epoch" else int(every)) == 0


def _update_state(run: Run, step: loop.Step) -> None:
    engine, state = run.engine, run.state
    state.step = step.number
    state.seconds += step.seconds
    state.examples += step.examples
    state.cost += step.cost
    if step.finite:
        state.loss_sum += step.loss
        state.loss_steps += 1
    state.max_examples = engine.limits.max_examples
    state.checkpointing = engine.checkpointing
    state.fp16_scale, state.fp16_good_steps = engine.fp16_scale, engine.fp16_good_steps


def _handle_non_finite(run: Run, step: loop.Step) -> None:
    """Handle a non-finite loss or gradient by `train.on_nan`: stop, skip the step, or restore the last checkpoint."""
    prepared, state, folder, console = run.prepared, run.state, run.folder, run.console
    train = prepared.recipe.train
    indices = prepared.batches.indices(step.number - 1)
    rows = f"training blocks {', '.join(map(str, indices[:16]))}"
    if prepared.bound.rows_are_examples:
        rows = prepared.examples.splits["train"].places(indices)
    what = f"step {step.number}: loss {step.loss}, gradient norm {step.grad_norm} ({rows})"
    state.skips += 1
    if train.on_nan == "stop" or state.skips > train.max_skips:
        hint = f"use a learning rate below {step.learning_rate:.1e}, precision=fp32, or on_nan=skip"
        raise NumericError(what, hint=hint)
    with parallel.main_process_first():  # rank 0 renames damaged checkpoints before the others read
        saved = checkpoint.newest(folder / "checkpoints", console.warn) if train.on_nan == "rollback" else None
    if saved is not None:
        _load_tensors(run, saved.tensors)
        console.warn(f"{what}: skipped; restored the weights of step {saved.step}")
        return
    console.warn(f"{what}: skipped ({state.skips} of at most {train.max_skips})")


def _evaluate(run: Run, steps: list[loop.Step]) -> bool:
    """Score the validation split and print the epoch line; return True for the best score so far."""
    prepared, state, folder, console = run.prepared, run.state, run.folder, run.console
    metric = run.metric
    step = steps[-1]
    loss = state.loss_sum / state.loss_steps if state.loss_steps else math.nan
    state.loss_sum, state.loss_steps = 0.0, 0
    shown, better = "", False
    if "validation" in prepared.encoded:
        with console.during("scoring validation"):
            split, bound = prepared.encoded["validation"], prepared.bound
            answers = metric in bound.metrics().of_answers
            scores = evaluate.scores(prepared.model, bound, split, prepared.machine, answers=answers)
        score = float(scores.get(metric, math.nan))  # a correlation of constant answers is undefined
        sign = -1 if metric in LOWER_IS_BETTER else 1
        higher = math.isfinite(score) and (state.best is None or sign * score > sign * state.best)
        tied = score == state.best and state.best_loss is not None and scores["loss"] < state.best_loss
        better = higher or tied
        state.stale = 0 if higher else state.stale + 1
        if better:
            state.best, state.best_loss, state.best_step = score, scores["loss"], step.number
        line = {
            f"validation/{name}": record.json_number(value)
            for name, value in scores.items()
            if isinstance(value, float)
        }
        record.log(folder, {"step": step.number, "epoch": round(step.epoch, 6), **line})
        shown = f"{'validation ' if metric == 'loss' else ''}{metric} {score:.4f}"
    console.say(messages.epoch_line(steps, loss, shown))
    return better


def _save(run: Run) -> None:
    prepared, engine, state, folder = run.prepared, run.engine, run.state, run.folder
    if parallel.rank() == 0:
        where = folder / "checkpoints"
        tensors = {
            "learned": artifact.trained_tensors(prepared.model, prepared.learned),
            "optimizer": optimizer.state_tensors(engine.optimizer, prepared.model),
        }
        saved = checkpoint.save(where, state.step, tensors, asdict(state), prepared.identity())
        checkpoint.write_pointer(where, "last", saved)
        if state.best_step == state.step:
            checkpoint.write_pointer(where, "best", saved)
        checkpoint.rotate(where, prepared.recipe.train.keep_checkpoints)
    parallel.barrier()


def _restore(run: Run, override: Collection[str]) -> None:
    """Restore the newest intact checkpoint; without one, training starts from the beginning."""
    prepared, engine, folder, console = run.prepared, run.engine, run.folder, run.console
    where = folder / "checkpoints"
    with parallel.main_process_first():
        saved = checkpoint.newest(where, console.warn)
    if saved is None:
        console.say("no checkpoint: starting from the beginning")
        files.truncate_metrics(folder / "metrics.jsonl", -1)
        return
    read = {f"data_sha256.{name}": str(split.table.path) for name, split in prepared.examples.splits.items()}
    known = read | {"base_sha256": prepared.base.source.spec}
    overridden = checkpoint.check_same_run(saved.identity, prepared.identity(), override, known)
    checkpoint.check_fits(
        artifact.trained_tensors(prepared.model, prepared.learned), saved.tensors["learned"], overridden
    )
    run.state = state = TrainState(**saved.state)
    if any(key == "train.metric" or key.startswith("data") for key in overridden):  # earlier scores are not comparable
        state.best = state.best_loss = state.best_step = None
        state.stale = 0
    state.overridden += [key for key in overridden if key not in state.overridden]
    _load_tensors(run, saved.tensors)
    engine.limits = replace(engine.limits, max_examples=min(state.max_examples, engine.limits.max_examples))
    engine.fp16_scale, engine.fp16_good_steps = state.fp16_scale, state.fp16_good_steps
    if state.checkpointing and not engine.checkpointing:
        loop.checkpoint_activations(engine)
    if parallel.rank() == 0:
        files.truncate_metrics(folder / "metrics.jsonl", saved.step)
        for name, step in (("last", saved.step), ("best", state.best_step)):  # the process may have been killed before
            if step is not None and checkpoint.path_of(where, step).exists():
                checkpoint.write_pointer(where, name, checkpoint.path_of(where, step))
    console.say(f"resumed after step {saved.step} of {prepared.total_steps}")
    if state.threads != torch.get_num_threads():
        console.say(f"using {state.threads} threads, as before, so that results are identical")


def _load_tensors(run: Run, tensors: dict[str, dict[str, Tensor]]) -> None:
    prepared, engine = run.prepared, run.engine
    artifact.load_trained(prepared.model, tensors["learned"])
    optimizer.load_state_tensors(engine.optimizer, prepared.model, tensors["optimizer"])


def _finish(run: Run) -> dict[str, Any]:
    """Write the artifact of the best step, reload it from disk, and score it."""
    prepared, engine, state, folder, console = run.prepared, run.engine, run.state, run.folder, run.console
    engine.optimizer.state.clear()  # frees its memory for the reloaded model
    best = checkpoint.best(folder / "checkpoints", console.warn) if state.best_step is not None else None
    if best is not None:
        artifact.load_trained(prepared.model, best.tensors["learned"])
        if best.step < state.step:
            console.say(f"best step on validation: {best.step} of {state.step}")
    if parallel.rank() == 0:
        _write_artifact(run)
    parallel.barrier()
    allow_pickle, device = prepared.base.source.allow_pickle, str(prepared.machine.device)
    extra = prepared.task.extra_eval_sets()
    held_out = [name for name in (*extra, "validation", "test") if name in prepared.encoded]
    tuned = predict.load(folder, device=device, offline=True, allow_pickle=allow_pickle)
    metrics: dict[str, Any] = {} if state.before is None else {"before": state.before}
    answers: list[dict[str, Any]] = []
    samples: list[dict[str, str]] = []
    for name in held_out:
        split = prepared.encoded[name]
        with console.during(f"scoring the saved artifact on {name}"):
            metrics[name], answers = evaluate.scores_and_answers(tuned.model, tuned.bound, split, tuned.machine)
            samples = record.samples(prepared, state, answers) if name == "validation" else samples
        baseline = evaluate.baseline(prepared.bound, prepared.encoded["train"], split)
        metrics["baseline"] = {"split": name, **baseline}
    result = record.result(prepared, state, folder, metrics)
    if parallel.rank() == 0:
        if "test" in prepared.examples.splits and prepared.bound.rows_are_examples and any(answers):
            record.write_predictions(prepared, answers, folder)
        record.write_run(folder, prepared, state, {"outcome": "done", **result, "samples": samples})
        card.write(folder, tuned.recipe)
        report.write(folder, tuned.recipe)
    parallel.barrier()
    messages.conclude(run, metrics)
    return result


def _write_artifact(run: Run) -> None:
    prepared, folder = run.prepared, run.folder
    if prepared.technique.artifact == "adapter":
        shutil.rmtree(folder / "model", ignore_errors=True)  # an earlier run's merged model
        artifact.write_adapter(
            folder, prepared.model, prepared.anatomy, prepared.technique, prepared.base.source, prepared.base.processor
        )
        return
    state = artifact.trained_tensors(prepared.model, prepared.learned)
    artifact.write_model(folder, prepared.recipe, prepared.base.source, prepared.base.processor, state)
