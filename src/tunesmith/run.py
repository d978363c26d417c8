"""One run, from recipe to a scored artefact on disk, as a straight line:

recipe -> data -> model -> technique -> loop (evaluate, checkpoint) -> artefact -> final scores -> card and report.

    tunesmith.train("recipe.yaml", "train.epochs=1")
    tunesmith.train(task="text-classification", model="runs/base", data={"train": "reviews.csv"})
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from tunesmith import recipe as recipes
from tunesmith import record
from tunesmith.deploy import artefact, card, predict
from tunesmith.errors import CheckpointError, Interrupted, NumericError, RecipeError, ResourceError, UserError, counted
from tunesmith.insight import hints, report
from tunesmith.kernels.ops.quantized import numbers_in
from tunesmith.prepare import Prepared, prepare
from tunesmith.recipe import Recipe, Train
from tunesmith.record import Progress
from tunesmith.run_folder import claim, clear, runs_in
from tunesmith.talk import Talk, command, scores_line
from tunesmith.tasks import LOW_IS_GOOD, WritingTask, guess_knows
from tunesmith.training import checkpoint, evaluate, files, loop, machine, optimizer, parallel
from tunesmith.training.machine import Machine
from tunesmith.training.run_lock import RunLock
from tunesmith.training.signals import Signals, Stopped


def train(
    recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
    *overrides: str,
    resume: str | Path | None = None,
    overwrite: bool = False,
    override: Collection[str] = (),
    offline: bool = False,
    allow_pickle: bool = False,
    talk: Talk | None = None,
    **values: Any,
) -> dict[str, Any]:
    """Run a recipe and return what `tunesmith train --json` prints.

    `resume` continues an earlier run's folder; `override` names the keys that may differ from it.

    Raises:
        UserError: what the user can mend, each with its exit code.
    """
    talk = talk or Talk()
    if override and resume is None:
        raise RecipeError("--override: names what may differ from an earlier run", hint="give --resume RUN with it")
    wanted = _recipe(recipe, overrides, values, resume)
    folder = Path(resume or wanted.output)
    found = machine.find(wanted.train.device, wanted.train.precision)
    found.take()
    if found.is_slow:
        talk.warn(
            f"train.precision: this processor only emulates {found.precision}, many times slower than fp32; use auto"
        )
    with parallel.group(found.device.type), RunLock(folder, enabled=parallel.rank() == 0):
        if parallel.rank() == 0:
            needed = (recipe if isinstance(recipe, str | Path) else None, *recipes.paths_needed(wanted))
            claim(folder, resume=resume is not None, overwrite=overwrite, needed=needed)
            files.sweep(folder)
        parallel.barrier()
        begun = resume is not None
        try:
            with Signals() as signals:
                prepared = prepare(wanted, found, offline=offline, allow_pickle=allow_pickle, talk=talk)
                begun = True
                return _run(prepared, folder, resume is not None, override, signals, talk)
        except (UserError, Stopped, MemoryError, RuntimeError, OSError, SafetensorError) as error:
            told = _told(error, folder, begun)
            if begun:  # what lies there else is an earlier run's
                record.ended(folder, f"{type(told).__name__}: {told}")
            if told is error:
                raise
            raise told from error


def _told(error: BaseException, folder: Path, begun: bool) -> BaseException:
    """What the machine or a signal did, as the user's error."""
    if isinstance(error, Stopped):
        again = record.resume_command(folder) if begun and (folder / "recipe.yaml").exists() else "the same command"
        return Interrupted(f"stopped by {error}; go on with: {again}")
    if isinstance(error, OSError | SafetensorError):
        return files.out_of_space(error, Path(getattr(error, "filename", None) or folder))
    if machine.is_out_of_memory(error):
        hint = "use technique=lora or freeze, a smaller model, or device=cpu"
        return ResourceError(f"out of memory ({error})", hint=hint)
    return error


def _recipe(given: Any, overrides: Collection[str], values: Mapping[str, Any], resume: str | Path | None) -> Recipe:
    if isinstance(given, Recipe):
        given = given.dump()
    if given is None and resume is not None:
        kept = Path(resume) / "recipe.yaml"
        if not kept.exists() and not (overrides or values):
            hint = runs_in(Path(resume)) or "leave --resume out"
            raise CheckpointError("no run to resume in this folder", where=str(resume), hint=hint)
        given = kept if kept.exists() else None  # killed before it wrote its recipe, a run begins again
    if isinstance(given, Mapping):
        return recipes.load(None, overrides, {**given, **values})
    return recipes.load(given, overrides, values)


def _run(
    prepared: Prepared, folder: Path, resumed: bool, override: Collection[str], signals: Signals, talk: Talk
) -> dict[str, Any]:
    recipe = prepared.recipe
    engine = _engine(prepared, talk)
    progress = _restore(prepared, engine, folder, override, talk) if resumed else Progress()
    torch.set_num_threads(progress.threads or torch.get_num_threads())
    progress.threads = torch.get_num_threads()
    if parallel.rank() == 0:
        if not resumed:
            clear(folder)
        files.atomic_write(folder / "recipe.yaml", recipes.to_yaml(recipe.dump() | {"output": str(folder)}))
        record.write_run(folder, prepared, progress, {"outcome": "running"})
    _introduce(prepared, folder, talk)
    progress.seconds += prepared.keep_features(talk)
    _fit(prepared, engine, progress, folder, signals, talk)
    return _finish(prepared, engine, progress, folder, talk)


def _engine(prepared: Prepared, talk: Talk) -> loop.Engine:
    train = prepared.recipe.train
    engine = loop.Engine(
        model=prepared.model,
        anatomy=prepared.anatomy,
        task=prepared.task,
        optimizer=optimizer.build(prepared.model, prepared.anatomy, prepared.technique, train),
        machine=prepared.machine,
        limits=prepared.machine.limits(
            prepared.anatomy, train.micro_batch_size, train.batch_size, padding_free=prepared.fast_path.unpadded
        ),
        seed=train.seed,
        max_grad_norm=train.max_grad_norm,
        label_smoothing=train.label_smoothing,
        may_checkpoint=train.gradient_checkpointing == "auto",
        say=talk.warn,
    )
    if train.gradient_checkpointing is True:
        loop.checkpoint_activations(engine)
    return engine


def _introduce(prepared: Prepared, folder: Path, talk: Talk) -> None:
    recipe = prepared.recipe
    learns = sum(parameter.numel() for parameter in prepared.model.parameters() if parameter.requires_grad)
    total = numbers_in(prepared.model)
    counts = sorted(prepared.examples.rows.items(), reverse=True)
    rows = "  ".join(f"{name} {count:,}" for name, count in counts) + " rows"
    if not prepared.task.rows_are_examples:
        rows = "  ".join(
            f"{name} {counted(count, 'text')} in {counted(len(prepared.encoded[name]), 'block')}"
            for name, count in counts
        )
    talk.say(f"model {recipe.model}  technique {recipe.technique.name}  {rows}")
    _say_head(prepared, talk)
    where = f"on {prepared.machine.device} in {prepared.machine.precision}"
    rate = f"learning rate {recipe.train.learning_rate:.1e}"
    steps = counted(prepared.total_steps, "step")
    talk.say(f"{learns:,} of {total:,} parameters learn ({learns / total:.2%}), {rate}, {steps} {where}")
    talk.say(prepared.fast_path.summary())
    talk.say(f"if stopped, go on with: {record.resume_command(folder)}")


def _say_head(prepared: Prepared, talk: Talk) -> None:
    """What of the model nothing has trained yet, and what of the checkpoint another head was."""
    if prepared.anatomy.added:
        added = counted(len(prepared.task.added_tokens), "token")
        talk.say(f"{added} added, beginning as the mean of all others, and learned")
    new, unused = (
        sorted({name.rpartition(".")[0] for name in names}) for names in (prepared.anatomy.new, prepared.anatomy.unused)
    )
    if new and prepared.continued is None:
        alone = f", which learns alone for {counted(count, 'step')}" if (count := prepared.head_alone_steps) else ""
        dropped = f"; without use here: {', '.join(unused)}" if unused else ""
        talk.say(f"a new head ({', '.join(new)}){alone}{dropped}")


def _fit(
    prepared: Prepared, engine: loop.Engine, progress: Progress, folder: Path, signals: Signals, talk: Talk
) -> None:
    """The loop, and around it: logging, evaluation, saving, stopping."""
    batches, total, train = prepared.batches, prepared.total_steps, prepared.recipe.train
    factor = optimizer.schedule(train, total)
    since: list[loop.Step] = []
    prepared.thaw(progress.step)
    _score_before(prepared, progress, folder, talk)
    if _enough(train, progress):  # killed after it had stopped early
        return
    with signals.deferred(), talk.progress(total, progress.step) as show:
        for step in loop.steps(engine, batches, factor, start=progress.step, total=total):
            _count(progress, engine, step)
            _log(folder, _step_line(step, prepared.machine))
            if not step.finite:
                _not_finite(prepared, engine, progress, step, folder, talk)
            since.append(step)
            show(step.number, f"loss {step.loss:.4f}")
            talk.detail(f"step {step.number}  loss {step.loss:.4f}  gradient norm {step.grad_norm:.3g}")
            last = step.number == total
            improved = False
            if last or _due(train.evaluate_every, step.number, batches.steps_per_epoch):
                improved = _evaluate(prepared, progress, since, folder, talk)
                since = []
            # scores may differ in their last bits: what all have to do alike is decided by all
            state = improved, _enough(train, progress), signals.requested is not None
            improved, stop, asked = parallel.any_of(state, prepared.machine.device)
            _score_before(prepared, progress, folder, talk)
            prepared.thaw(step.number)
            if last or stop or asked or improved or _due(train.save_every, step.number, batches.steps_per_epoch):
                _save(prepared, engine, progress, folder)
            if asked:
                again = record.resume_command(folder)
                raise Interrupted(f"stopped after step {step.number} of {total}; go on with: {again}")
            if stop:
                since_best = f"no better {train.metric} in {counted(progress.stale, 'evaluation')}"
                talk.say(f"{since_best}: stopped at step {step.number} of {total}")
                return


def _score_before(prepared: Prepared, progress: Progress, folder: Path, talk: Talk) -> None:
    """What a base scores at a task that it can do, as soon as it has a head that can speak for it."""
    if not prepared.task.base_has_head or progress.before is not None or progress.step != prepared.head_alone_steps:
        return
    model, task, metric = prepared.model, prepared.task, prepared.recipe.train.metric
    assert metric is not None, "_resolve fills it in"
    held_out = [name for name in ("validation", *task.others()) if name in prepared.encoded]
    unlearned = "anything but a head" if progress.step else "anything"
    saying = talk.during(f"scoring {' and '.join(held_out)} before {unlearned} has learned")
    with saying, prepared.technique.absent(model):
        scored = {name: evaluate.scored(model, task, prepared.encoded[name], prepared.machine) for name in held_out}
    progress.before = {name: scores for name, (scores, _) in scored.items()}
    progress.said_before = record.first_said(scored["validation"][1]) if "validation" in scored else {}
    alone = f"its new head alone has learned, for {counted(progress.step, 'step')}"
    head = alone if progress.step else "nothing has learned"
    for name, scores in progress.before.items():
        numbers = {score: value for score, value in scores.items() if isinstance(value, float)}
        line = {f"before/{name}/{score}": _plain(value) for score, value in numbers.items()}
        _log(folder, {"step": progress.step, **line})
        talk.say(f"{name} before ({head}): {scores_line(scores, metric)}")


def _enough(train: Train, progress: Progress) -> bool:
    return train.early_stopping_patience is not None and progress.stale >= train.early_stopping_patience


def _due(every: int | str, step: int, steps_per_epoch: int) -> bool:
    return step % (steps_per_epoch if every == "epoch" else int(every)) == 0


def _count(progress: Progress, engine: loop.Engine, step: loop.Step) -> None:
    progress.step = step.number
    progress.seconds += step.seconds
    progress.examples += step.examples
    progress.tokens += step.tokens
    if step.finite:
        progress.loss_sum += step.loss
        progress.loss_steps += 1
    progress.max_examples = engine.limits.max_examples
    progress.checkpointing = engine.checkpointing
    progress.fp16_scale, progress.fp16_good_steps = engine.fp16_scale, engine.fp16_good_steps


def _not_finite(
    prepared: Prepared, engine: loop.Engine, progress: Progress, step: loop.Step, folder: Path, talk: Talk
) -> None:
    """The step was not taken. Stop, or leave it out, or go back to the last checkpoint and leave it out."""
    train = prepared.recipe.train
    indices = prepared.batches.indices(step.number - 1)
    rows = f"examples {', '.join(map(str, indices[:16]))} of the training text"
    if prepared.task.rows_are_examples:
        rows = prepared.examples.splits["train"].places(indices)
    what = f"step {step.number}: loss {step.loss}, gradient norm {step.grad_norm} ({rows})"
    progress.skips += 1
    if train.on_nan == "stop" or progress.skips > train.max_skips:
        hint = f"a lower learning rate than {step.learning_rate:.1e}, precision=fp32, or on_nan=skip"
        raise NumericError(what, hint=hint)
    with parallel.first_alone():  # it sets damaged ones aside before the others look
        saved = checkpoint.newest(folder / "checkpoints", talk.warn) if train.on_nan == "rollback" else None
    if saved is not None:
        _put(prepared, engine, saved.tensors)
        talk.warn(f"{what}: went back to the weights of step {saved.step}, left this step out")
        return
    talk.warn(f"{what}: left out ({progress.skips} of at most {train.max_skips})")


def _step_line(step: loop.Step, found: Machine) -> dict[str, Any]:
    return {
        "step": step.number,
        "epoch": round(step.epoch, 6),
        "loss": _plain(step.loss),
        "learning_rate": step.learning_rate,
        "grad_norm": _plain(step.grad_norm),
        "examples_per_s": round(step.examples / step.seconds, 2),
        "tokens_per_s": round(step.tokens / step.seconds, 2),
        "memory_bytes": found.peak_memory_bytes(),
    }


def _plain(value: float) -> float | str:
    """JSON has no NaN and no infinity: they are written as words."""
    return value if math.isfinite(value) else str(value)


def _log(folder: Path, line: dict[str, Any]) -> None:
    if parallel.rank() == 0:
        files.append_line(folder / "metrics.jsonl", line)


def _evaluate(prepared: Prepared, progress: Progress, since: list[loop.Step], folder: Path, talk: Talk) -> bool:
    """Score the validation split, say the epoch line; whether this is the best so far."""
    metric = prepared.recipe.train.metric
    assert metric is not None, "_resolve fills it in"
    step = since[-1]
    loss = progress.loss_sum / progress.loss_steps if progress.loss_steps else math.nan
    progress.loss_sum, progress.loss_steps = 0.0, 0
    words = [f"epoch {step.epoch:.3g}", f"loss {loss:.4f}"]
    better = False
    if "validation" in prepared.encoded:
        with talk.during("scoring validation"):
            split, task = prepared.encoded["validation"], prepared.task
            write = isinstance(task, WritingTask) and metric in task.text_scores
            scores = evaluate.scores(prepared.model, task, split, prepared.machine, write=write)
        score = float(scores.get(metric, math.nan))  # a correlation of answers that are all the same is none
        sign = -1 if metric in LOW_IS_GOOD else 1
        higher = math.isfinite(score) and (progress.best is None or sign * score > sign * progress.best)
        tied = score == progress.best and progress.best_loss is not None and scores["loss"] < progress.best_loss
        better = higher or tied
        progress.stale = 0 if higher else progress.stale + 1
        if better:
            progress.best, progress.best_loss, progress.best_step = score, scores["loss"], step.number
        line = {f"validation/{name}": _plain(value) for name, value in scores.items() if isinstance(value, float)}
        _log(folder, {"step": step.number, "epoch": round(step.epoch, 6), **line})
        words.append(f"{'validation ' if metric == 'loss' else ''}{metric} {score:.4f}")
    seconds = sum(one.seconds for one in since)
    words.append(f"lr {step.learning_rate:.1e}")
    rate = sum(one.examples for one in since) / seconds
    words.append(f"{rate:.{0 if rate >= 10 else 1}f} examples/s")
    talk.say("  ".join(words))
    return better


def _save(prepared: Prepared, engine: loop.Engine, progress: Progress, folder: Path) -> None:
    if parallel.rank() == 0:
        where = folder / "checkpoints"
        tensors = {
            "learned": artefact.learned(prepared.model, prepared.learned),
            "optimizer": optimizer.state_tensors(engine.optimizer, prepared.model),
        }
        saved = checkpoint.save(where, progress.step, tensors, asdict(progress), prepared.identity())
        checkpoint.point(where, "last", saved)
        if progress.best_step == progress.step:
            checkpoint.point(where, "best", saved)
        checkpoint.rotate(where, prepared.recipe.train.keep_checkpoints)
    parallel.barrier()


def _restore(prepared: Prepared, engine: loop.Engine, folder: Path, override: Collection[str], talk: Talk) -> Progress:
    """Put the newest checkpoint that can be trusted back; an empty folder starts from the beginning."""
    where = folder / "checkpoints"
    with parallel.first_alone():
        saved = checkpoint.newest(where, talk.warn)
    if saved is None:
        talk.say("no checkpoint yet: starting from the beginning")
        files.truncate_metrics(folder / "metrics.jsonl", -1)
        return Progress()
    read = {f"data_sha256.{name}": str(split.table.path) for name, split in prepared.examples.splits.items()}
    known = read | {"base_sha256": prepared.source.spec}
    overridden = checkpoint.check_same_run(saved.identity, prepared.identity(), override, known)
    checkpoint.check_fits(artefact.learned(prepared.model, prepared.learned), saved.tensors["learned"], overridden)
    progress = Progress(**saved.state)
    if any(key == "train.metric" or key.startswith("data") for key in overridden):  # scores are of something else now
        progress.best = progress.best_loss = progress.best_step = None
        progress.stale = 0
    progress.overridden += [key for key in overridden if key not in progress.overridden]
    _put(prepared, engine, saved.tensors)
    engine.limits = replace(engine.limits, max_examples=min(progress.max_examples, engine.limits.max_examples))
    engine.fp16_scale, engine.fp16_good_steps = progress.fp16_scale, progress.fp16_good_steps
    if progress.checkpointing and not engine.checkpointing:
        loop.checkpoint_activations(engine)
    if parallel.rank() == 0:
        files.truncate_metrics(folder / "metrics.jsonl", saved.step)
        for name, step in (("last", saved.step), ("best", progress.best_step)):  # a kill came before they were set
            if step is not None and checkpoint.place(where, step).exists():
                checkpoint.point(where, name, checkpoint.place(where, step))
    talk.say(f"resumed after step {saved.step} of {prepared.total_steps}")
    if progress.threads != torch.get_num_threads():
        talk.say(f"on {progress.threads} threads, as before: another number would not give the same bits")
    return progress


def _put(prepared: Prepared, engine: loop.Engine, tensors: dict[str, dict[str, Tensor]]) -> None:
    artefact.put(prepared.model, tensors["learned"])
    optimizer.load_state_tensors(engine.optimizer, prepared.model, tensors["optimizer"])


def _finish(prepared: Prepared, engine: loop.Engine, progress: Progress, folder: Path, talk: Talk) -> dict[str, Any]:
    """The artefact of the best step, reloaded from disk and scored as it will be shipped."""
    engine.optimizer.state.clear()  # what is reloaded takes its place in memory
    best = checkpoint.best(folder / "checkpoints", talk.warn) if progress.best_step is not None else None
    if best is not None:
        artefact.put(prepared.model, best.tensors["learned"])
        if best.step < progress.step:
            talk.say(f"kept: step {best.step} of {progress.step}, the best on validation")
    if parallel.rank() == 0:
        _write_artefact(prepared, folder)
    parallel.barrier()
    pickled, device = prepared.source.allow_pickle, str(prepared.machine.device)
    others = prepared.task.others()
    held_out = [name for name in (*others, "validation", "test") if name in prepared.encoded]
    tuned = predict.load(folder, device=device, offline=True, allow_pickle=pickled)
    metrics: dict[str, Any] = {} if progress.before is None else {"before": progress.before}
    said: list[dict[str, Any]] = []
    samples: list[dict[str, str]] = []
    for name in held_out:
        split = prepared.encoded[name]
        with talk.during(f"scoring what was saved on {name}"):
            if tuned.task.rows_are_examples:
                metrics[name], said = evaluate.scores_and_answers(tuned.model, tuned.task, split, tuned.machine)
            else:
                metrics[name] = evaluate.scores(tuned.model, tuned.task, split, tuned.machine)
            samples = record.samples(prepared, progress, said) if name == "validation" else samples
        guess = evaluate.baseline(prepared.task, prepared.encoded["train"], split)
        metrics["baseline"] = {"split": name, **guess}
    result = record.result(prepared, progress, folder, metrics)
    if parallel.rank() == 0:
        if "test" in prepared.examples.splits and prepared.task.rows_are_examples and any(said):
            record.write_predictions(prepared, said, folder)
        record.write_run(folder, prepared, progress, {"outcome": "done", **result, "samples": samples})
        card.write(folder)
        report.write(folder)
    parallel.barrier()
    _conclude(prepared, metrics, folder, talk)
    return result


def _write_artefact(prepared: Prepared, folder: Path) -> None:
    if prepared.technique.artefact == "adapter":
        shutil.rmtree(folder / "model", ignore_errors=True)  # of a run before, merged for another to start from
        artefact.write_adapter(
            folder, prepared.model, prepared.anatomy, prepared.technique, prepared.source, prepared.processor
        )
        return
    state = artefact.learned(prepared.model, prepared.learned)
    artefact.write_model(folder, prepared.recipe, prepared.source, prepared.processor, state)


def _conclude(prepared: Prepared, metrics: dict[str, Any], folder: Path, talk: Talk) -> None:
    metric = prepared.recipe.train.metric
    assert metric is not None, "_resolve fills it in"
    for name in (*prepared.task.others(), "validation", "test"):
        if name in metrics:
            talk.say(f"{name}: {scores_line(metrics[name], metric, metrics.get('before', {}).get(name))}")
    gain, sign = math.inf, -1 if metric in LOW_IS_GOOD else 1
    was, now = (part.get("validation", {}).get(metric, math.nan) for part in (metrics.get("before", {}), metrics))
    if sign * now < sign * was:
        lower = f"a lower train.learning_rate than {prepared.recipe.train.learning_rate:.1e}"
        talk.warn(f"validation {metric} is worse than before the run: {now:.4f}, {was:.4f} before; {lower} may help")
    if metric in (guess := metrics.get("baseline", {})):
        gain = (metrics[guess["split"]][metric] - guess[metric]) * sign
        score = f"{metric} {guess[metric]:.4f} on {guess['split']}"
        known = f"a guess that knows only the training {guess_knows(prepared.task)}"
        talk.say(f"{known}: {score}" + (", no worse" if gain <= 0 else ""))
    if (hint := hints.longer(folder / "metrics.jsonl", prepared.recipe.train, gain)) is not None:
        talk.say(hint)
    talk.say(f'written to {folder}; ask it: {command("predict", folder)} "..."')
