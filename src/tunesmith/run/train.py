"""One run, from recipe to a scored artefact on disk, as a straight line:

recipe -> data -> model -> technique -> loop (evaluate, checkpoint) -> artefact -> final scores -> card and report.

    tunesmith.train("recipe.yaml", "train.epochs=1")
    tunesmith.train(task="text-classification", model="runs/base", data={"train": "reviews.csv"})
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from tunesmith import recipe as recipes
from tunesmith.console import Talk, command, scores_line
from tunesmith.deploy import artifact as artefact
from tunesmith.deploy import card, predict
from tunesmith.errors import Interrupted, NumericError, ResourceError, UserError, counted
from tunesmith.insight import hints, report
from tunesmith.kernels.ops.quantized import numbers_in
from tunesmith.recipe import Recipe, Train
from tunesmith.run import record
from tunesmith.run.prepare import Prepared, prepare
from tunesmith.run.record import Progress
from tunesmith.run.signals import Signals, Stopped
from tunesmith.storage import files
from tunesmith.storage.run_folder import claim, clear
from tunesmith.storage.run_lock import RunLock
from tunesmith.tasks import LOWER_IS_BETTER
from tunesmith.training import checkpoint, evaluate, loop, machine, optimizer, parallel
from tunesmith.training.machine import Machine


def train(
    recipe: Recipe,
    *,
    resume: str | Path | None = None,
    overwrite: bool = False,
    override: Collection[str] = (),
    offline: bool = False,
    allow_pickle: bool = False,
    talk: Talk | None = None,
    recipe_file: Path | None = None,
) -> dict[str, Any]:
    """Train one run and return its result, the object that `tunesmith train --json` prints.

    `resume` is the folder of an earlier run to continue, `override` the keys that may differ from it. `recipe_file` is
    kept from being overwritten with the run folder.

    Raises:
        UserError: what the user can fix, with its exit code.
    """
    talk = talk or Talk()
    folder = Path(resume or recipe.output)
    found = machine.find(recipe.train.device, recipe.train.precision)
    found.select()
    if found.is_slow:
        talk.warn(f"train.precision: this CPU emulates {found.precision}, many times slower than fp32; use auto")
    with parallel.group(found.device.type), RunLock(folder, enabled=parallel.rank() == 0):
        if parallel.rank() == 0:
            needed = (recipe_file, *recipes.paths_needed(recipe))
            claim(folder, resume=resume is not None, overwrite=overwrite, needed=needed)
            files.remove_leftovers(folder)
        parallel.barrier()
        begun = resume is not None
        try:
            with Signals() as signals:
                prepared = prepare(recipe, found, offline=offline, allow_pickle=allow_pickle, talk=talk)
                begun = True
                run = Run(prepared, _engine(prepared, talk), Progress(), folder, talk)
                return _run(run, resume is not None, override, signals)
        except (UserError, Stopped, MemoryError, RuntimeError, OSError, SafetensorError) as error:
            reported = _as_user_error(error, folder, begun)
            if begun:  # otherwise the folder holds an earlier run
                record.ended(folder, f"{type(reported).__name__}: {reported}")
            if reported is error:
                raise
            raise reported from error


def _as_user_error(error: BaseException, folder: Path, begun: bool) -> BaseException:
    """The error as one of the user's, where the machine or a signal caused it."""
    if isinstance(error, Stopped):
        resumable = begun and (folder / "recipe.yaml").exists()
        again = record.resume_command(folder) if resumable else "run the command again"
        return Interrupted(f"stopped by {error}; to resume: {again}")
    if isinstance(error, OSError | SafetensorError):
        return files.disk_error(error, Path(getattr(error, "filename", None) or folder))
    if machine.is_out_of_memory(error):
        hint = "use technique=lora or freeze, a smaller model, or device=cpu"
        return ResourceError(f"out of memory ({error})", hint=hint)
    return error


@dataclass
class Run:
    """One run while it goes on: what is trained, how far it has come, where it is written."""

    prepared: Prepared
    engine: loop.Engine
    progress: Progress
    folder: Path
    talk: Talk

    @property
    def recipe(self) -> Recipe:
        """The recipe with every value filled in."""
        return self.prepared.recipe

    @property
    def metric(self) -> str:
        """The metric by which `best` is chosen."""
        assert self.recipe.train.metric is not None, "assemble fills it in"
        return self.recipe.train.metric


def _run(run: Run, resumed: bool, override: Collection[str], signals: Signals) -> dict[str, Any]:
    if resumed:
        run.progress = _restore(run, override)
    torch.set_num_threads(run.progress.threads or torch.get_num_threads())
    run.progress.threads = torch.get_num_threads()
    if parallel.rank() == 0:
        if not resumed:
            clear(run.folder)
        written = run.recipe.dump() | {"output": str(run.folder)}
        files.atomic_write(run.folder / "recipe.yaml", recipes.to_yaml(written))
        record.write_run(run.folder, run.prepared, run.progress, {"outcome": "running"})
    _introduce(run)
    run.progress.seconds += run.prepared.cache_features(run.talk)
    _fit(run, signals)
    return _finish(run)


def _engine(prepared: Prepared, talk: Talk) -> loop.Engine:
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
        say=talk.warn,
    )
    if train.gradient_checkpointing is True:
        loop.checkpoint_activations(engine)
    return engine


def _introduce(run: Run) -> None:
    prepared, folder, talk = run.prepared, run.folder, run.talk
    recipe = prepared.recipe
    trainable = sum(parameter.numel() for parameter in prepared.model.parameters() if parameter.requires_grad)
    total = numbers_in(prepared.model)
    counts = sorted(prepared.examples.rows.items(), reverse=True)
    rows = "  ".join(f"{name} {count:,}" for name, count in counts) + " rows"
    if not prepared.bound.rows_are_examples:
        rows = "  ".join(
            f"{name} {counted(count, 'text')} in {counted(len(prepared.encoded[name]), 'block')}"
            for name, count in counts
        )
    talk.say(f"model {recipe.model}  technique {recipe.technique.name}  {rows}")
    _say_head(run)
    where = f"on {prepared.machine.device} in {prepared.machine.precision}"
    rate = f"learning rate {recipe.train.learning_rate:.1e}"
    steps = counted(prepared.total_steps, "step")
    talk.say(f"trainable parameters: {trainable:,} of {total:,} ({trainable / total:.2%}), {rate}, {steps} {where}")
    talk.say(prepared.fast_path.summary())
    talk.say(f"to resume: {record.resume_command(folder)}")


def _say_head(run: Run) -> None:
    """What of the model nothing has trained yet, and what of the checkpoint another head was."""
    prepared, talk = run.prepared, run.talk
    if prepared.anatomy.added:
        added = counted(len(prepared.task.added_tokens), "token")
        talk.say(f"{added} added, initialized with the mean embedding, trainable")
    new, unused = (
        sorted({name.rpartition(".")[0] for name in names}) for names in (prepared.anatomy.new, prepared.anatomy.unused)
    )
    if new and prepared.continued is None:
        warmup = f", head-only warmup: {counted(count, 'step')}" if (count := prepared.head_warmup_steps) else ""
        dropped = f"; unused checkpoint weights: {', '.join(unused)}" if unused else ""
        talk.say(f"new head ({', '.join(new)}){warmup}{dropped}")


def _fit(run: Run, signals: Signals) -> None:
    """The loop, and around it: logging, evaluation, saving, stopping."""
    prepared, engine, progress, folder, talk = run.prepared, run.engine, run.progress, run.folder, run.talk
    batches, total, train = prepared.batches, prepared.total_steps, prepared.recipe.train
    factor = optimizer.schedule(train, total)
    since: list[loop.Step] = []
    prepared.thaw(progress.step)
    _score_before(run)
    if _enough(train, progress):  # killed after it had stopped early
        return
    with signals.deferred(), talk.progress(total, progress.step) as show:
        for step in loop.steps(engine, batches, factor, start=progress.step, total=total):
            _count(run, step)
            _log(folder, _step_line(step, prepared.machine, prepared.task.unit))
            if not step.finite:
                _not_finite(run, step)
            since.append(step)
            show(step.number, f"loss {step.loss:.4f}")
            talk.detail(f"step {step.number}  loss {step.loss:.4f}  gradient norm {step.grad_norm:.3g}")
            last = step.number == total
            improved = False
            if last or _due(train.evaluate_every, step.number, batches.steps_per_epoch):
                improved = _evaluate(run, since)
                since = []
            # scores may differ in their last bits: what all have to do alike is decided by all
            state = improved, _enough(train, progress), signals.requested is not None
            improved, stop, asked = parallel.all_reduce_any(state, prepared.machine.device)
            _score_before(run)
            prepared.thaw(step.number)
            if last or stop or asked or improved or _due(train.save_every, step.number, batches.steps_per_epoch):
                _save(run)
            if asked:
                again = record.resume_command(folder)
                raise Interrupted(f"stopped after step {step.number} of {total}; go on with: {again}")
            if stop:
                since_best = f"no better {train.metric} in {counted(progress.stale, 'evaluation')}"
                talk.say(f"{since_best}: stopped at step {step.number} of {total}")
                return


def _score_before(run: Run) -> None:
    """What a base scores at a task that it can do, as soon as it has a head that can speak for it."""
    prepared, progress, folder, talk = run.prepared, run.progress, run.folder, run.talk
    if not prepared.task.base_has_head or progress.before is not None or progress.step != prepared.head_warmup_steps:
        return
    model, bound, metric = prepared.model, prepared.bound, run.metric
    held_out = [name for name in ("validation", *prepared.task.extra_eval_sets()) if name in prepared.encoded]
    when = f"after {counted(progress.step, 'step')} of its new head alone" if progress.step else "before training"
    scored = {}
    with talk.during(f"scoring {' and '.join(held_out)} {when}"), prepared.technique.disabled(model):
        for name in held_out:
            scored[name] = evaluate.scores_and_answers(model, bound, prepared.encoded[name], prepared.machine)
    progress.before = {name: scores for name, (scores, _) in scored.items()}
    if bound.generator is not None and bound.rows_are_examples and "validation" in scored:
        progress.said_before = record.first_answers(prepared, scored["validation"][1])
    for name, scores in progress.before.items():
        numbers = {score: value for score, value in scores.items() if isinstance(value, float)}
        line = {f"before/{name}/{score}": _plain(value) for score, value in numbers.items()}
        _log(folder, {"step": progress.step, **line})
        talk.say(f"{name} {when}: {scores_line(scores, metric)}")


def _enough(train: Train, progress: Progress) -> bool:
    return train.early_stopping_patience is not None and progress.stale >= train.early_stopping_patience


def _due(every: int | str, step: int, steps_per_epoch: int) -> bool:
    return step % (steps_per_epoch if every == "epoch" else int(every)) == 0


def _count(run: Run, step: loop.Step) -> None:
    engine, progress = run.engine, run.progress
    progress.step = step.number
    progress.seconds += step.seconds
    progress.examples += step.examples
    progress.cost += step.cost
    if step.finite:
        progress.loss_sum += step.loss
        progress.loss_steps += 1
    progress.max_examples = engine.limits.max_examples
    progress.checkpointing = engine.checkpointing
    progress.fp16_scale, progress.fp16_good_steps = engine.fp16_scale, engine.fp16_good_steps


def _not_finite(run: Run, step: loop.Step) -> None:
    """The step was not taken. Stop, or leave it out, or go back to the last checkpoint and leave it out."""
    prepared, progress, folder, talk = run.prepared, run.progress, run.folder, run.talk
    train = prepared.recipe.train
    indices = prepared.batches.indices(step.number - 1)
    rows = f"examples {', '.join(map(str, indices[:16]))} of the training text"
    if prepared.bound.rows_are_examples:
        rows = prepared.examples.splits["train"].places(indices)
    what = f"step {step.number}: loss {step.loss}, gradient norm {step.grad_norm} ({rows})"
    progress.skips += 1
    if train.on_nan == "stop" or progress.skips > train.max_skips:
        hint = f"a lower learning rate than {step.learning_rate:.1e}, precision=fp32, or on_nan=skip"
        raise NumericError(what, hint=hint)
    with parallel.main_process_first():  # it sets damaged ones aside before the others look
        saved = checkpoint.newest(folder / "checkpoints", talk.warn) if train.on_nan == "rollback" else None
    if saved is not None:
        _put(run, saved.tensors)
        talk.warn(f"{what}: went back to the weights of step {saved.step}, left this step out")
        return
    talk.warn(f"{what}: left out ({progress.skips} of at most {train.max_skips})")


def _step_line(step: loop.Step, machine: Machine, unit: str) -> dict[str, Any]:
    return {
        "step": step.number,
        "epoch": round(step.epoch, 6),
        "loss": _plain(step.loss),
        "learning_rate": step.learning_rate,
        "grad_norm": _plain(step.grad_norm),
        "examples_per_s": round(step.examples / step.seconds, 2),
        f"{unit}_per_s": round(step.cost / step.seconds, 2),
        "memory_bytes": machine.peak_memory_bytes(),
    }


def _plain(value: float) -> float | str:
    """JSON has no NaN and no infinity: they are written as words."""
    return value if math.isfinite(value) else str(value)


def _log(folder: Path, line: dict[str, Any]) -> None:
    if parallel.rank() == 0:
        files.append_line(folder / "metrics.jsonl", line)


def _evaluate(run: Run, since: list[loop.Step]) -> bool:
    """Score the validation split, say the epoch line; whether this is the best so far."""
    prepared, progress, folder, talk = run.prepared, run.progress, run.folder, run.talk
    metric = run.metric
    step = since[-1]
    loss = progress.loss_sum / progress.loss_steps if progress.loss_steps else math.nan
    progress.loss_sum, progress.loss_steps = 0.0, 0
    words = [f"epoch {step.epoch:.3g}", f"loss {loss:.4f}"]
    better = False
    if "validation" in prepared.encoded:
        with talk.during("scoring validation"):
            split, bound = prepared.encoded["validation"], prepared.bound
            answers = metric in bound.metrics().of_answers
            scores = evaluate.scores(prepared.model, bound, split, prepared.machine, answers=answers)
        score = float(scores.get(metric, math.nan))  # a correlation of answers that are all the same is none
        sign = -1 if metric in LOWER_IS_BETTER else 1
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


def _save(run: Run) -> None:
    prepared, engine, progress, folder = run.prepared, run.engine, run.progress, run.folder
    if parallel.rank() == 0:
        where = folder / "checkpoints"
        tensors = {
            "learned": artefact.learned(prepared.model, prepared.learned),
            "optimizer": optimizer.state_tensors(engine.optimizer, prepared.model),
        }
        saved = checkpoint.save(where, progress.step, tensors, asdict(progress), prepared.identity())
        checkpoint.write_pointer(where, "last", saved)
        if progress.best_step == progress.step:
            checkpoint.write_pointer(where, "best", saved)
        checkpoint.rotate(where, prepared.recipe.train.keep_checkpoints)
    parallel.barrier()


def _restore(run: Run, override: Collection[str]) -> Progress:
    """Put the newest checkpoint that can be trusted back; an empty folder starts from the beginning."""
    prepared, engine, folder, talk = run.prepared, run.engine, run.folder, run.talk
    where = folder / "checkpoints"
    with parallel.main_process_first():
        saved = checkpoint.newest(where, talk.warn)
    if saved is None:
        talk.say("no checkpoint yet: starting from the beginning")
        files.truncate_metrics(folder / "metrics.jsonl", -1)
        return Progress()
    read = {f"data_sha256.{name}": str(split.table.path) for name, split in prepared.examples.splits.items()}
    known = read | {"base_sha256": prepared.base.source.spec}
    overridden = checkpoint.check_same_run(saved.identity, prepared.identity(), override, known)
    checkpoint.check_fits(artefact.learned(prepared.model, prepared.learned), saved.tensors["learned"], overridden)
    run.progress = progress = Progress(**saved.state)
    if any(key == "train.metric" or key.startswith("data") for key in overridden):  # scores are of something else now
        progress.best = progress.best_loss = progress.best_step = None
        progress.stale = 0
    progress.overridden += [key for key in overridden if key not in progress.overridden]
    _put(run, saved.tensors)
    engine.limits = replace(engine.limits, max_examples=min(progress.max_examples, engine.limits.max_examples))
    engine.fp16_scale, engine.fp16_good_steps = progress.fp16_scale, progress.fp16_good_steps
    if progress.checkpointing and not engine.checkpointing:
        loop.checkpoint_activations(engine)
    if parallel.rank() == 0:
        files.truncate_metrics(folder / "metrics.jsonl", saved.step)
        for name, step in (("last", saved.step), ("best", progress.best_step)):  # a kill came before they were set
            if step is not None and checkpoint.path_of(where, step).exists():
                checkpoint.write_pointer(where, name, checkpoint.path_of(where, step))
    talk.say(f"resumed after step {saved.step} of {prepared.total_steps}")
    if progress.threads != torch.get_num_threads():
        talk.say(f"on {progress.threads} threads, as before: another number would not give the same bits")
    return progress


def _put(run: Run, tensors: dict[str, dict[str, Tensor]]) -> None:
    prepared, engine = run.prepared, run.engine
    artefact.put(prepared.model, tensors["learned"])
    optimizer.load_state_tensors(engine.optimizer, prepared.model, tensors["optimizer"])


def _finish(run: Run) -> dict[str, Any]:
    """The artefact of the best step, reloaded from disk and scored as it will be shipped."""
    prepared, engine, progress, folder, talk = run.prepared, run.engine, run.progress, run.folder, run.talk
    engine.optimizer.state.clear()  # what is reloaded takes its place in memory
    best = checkpoint.best(folder / "checkpoints", talk.warn) if progress.best_step is not None else None
    if best is not None:
        artefact.put(prepared.model, best.tensors["learned"])
        if best.step < progress.step:
            talk.say(f"kept: step {best.step} of {progress.step}, the best on validation")
    if parallel.rank() == 0:
        _write_artefact(run)
    parallel.barrier()
    pickled, device = prepared.base.source.allow_pickle, str(prepared.machine.device)
    others = prepared.task.extra_eval_sets()
    held_out = [name for name in (*others, "validation", "test") if name in prepared.encoded]
    tuned = predict.load(folder, device=device, offline=True, allow_pickle=pickled)
    metrics: dict[str, Any] = {} if progress.before is None else {"before": progress.before}
    said: list[dict[str, Any]] = []
    samples: list[dict[str, str]] = []
    for name in held_out:
        split = prepared.encoded[name]
        with talk.during(f"scoring what was saved on {name}"):
            metrics[name], said = evaluate.scores_and_answers(tuned.model, tuned.bound, split, tuned.machine)
            samples = record.samples(prepared, progress, said) if name == "validation" else samples
        baseline = evaluate.baseline(prepared.bound, prepared.encoded["train"], split)
        metrics["baseline"] = {"split": name, **baseline}
    result = record.result(prepared, progress, folder, metrics)
    if parallel.rank() == 0:
        if "test" in prepared.examples.splits and prepared.bound.rows_are_examples and any(said):
            record.write_predictions(prepared, said, folder)
        record.write_run(folder, prepared, progress, {"outcome": "done", **result, "samples": samples})
        card.write(folder)
        report.write(folder)
    parallel.barrier()
    _conclude(run, metrics)
    return result


def _write_artefact(run: Run) -> None:
    prepared, folder = run.prepared, run.folder
    if prepared.technique.artifact == "adapter":
        shutil.rmtree(folder / "model", ignore_errors=True)  # of a run before, merged for another to start from
        artefact.write_adapter(
            folder, prepared.model, prepared.anatomy, prepared.technique, prepared.base.source, prepared.base.processor
        )
        return
    state = artefact.learned(prepared.model, prepared.learned)
    artefact.write_model(folder, prepared.recipe, prepared.base.source, prepared.base.processor, state)


def _conclude(run: Run, metrics: dict[str, Any]) -> None:
    prepared, folder, talk = run.prepared, run.folder, run.talk
    metric = run.metric
    for name in (*prepared.task.extra_eval_sets(), "validation", "test"):
        if name in metrics:
            talk.say(f"{name}: {scores_line(metrics[name], metric, metrics.get('before', {}).get(name))}")
    gain, sign = math.inf, -1 if metric in LOWER_IS_BETTER else 1
    was, now = (part.get("validation", {}).get(metric, math.nan) for part in (metrics.get("before", {}), metrics))
    if sign * now < sign * was:
        lower = f"a lower train.learning_rate than {prepared.recipe.train.learning_rate:.1e}"
        talk.warn(f"validation {metric} is worse than before the run: {now:.4f}, {was:.4f} before; {lower} may help")
    if metric in (baseline := metrics.get("baseline", {})):
        gain = (metrics[baseline["split"]][metric] - baseline[metric]) * sign
        score = f"{metric} {baseline[metric]:.4f} on {baseline['split']}"
        verdict = " (the run is no better)" if gain <= 0 else ""
        talk.say(f"{prepared.task.baseline_name}: {score}{verdict}")
    if (hint := hints.longer(folder / "metrics.jsonl", prepared.recipe.train, gain)) is not None:
        talk.say(hint)
    talk.say(f'written to {folder}; next: {command("predict", folder)} "..."')
