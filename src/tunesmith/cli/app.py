"""The command line: verbs that parse, call the Python API and print. Heavy imports happen inside the verbs.

tunesmith demo
tunesmith train recipe.yaml train.epochs=1
tunesmith predict runs/reviews "A lovely film."
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from typer.core import TyperGroup

from tunesmith.cli import about as about_verbs
from tunesmith.cli import data as data_verbs
from tunesmith.cli.options import (
    AllowPickle,
    Json,
    Offline,
    Pairs,
    Quiet,
    Verbose,
    Version,
    check_new,
    emit,
    new_talk,
    recipe_and_pairs,
    refuse_early,
    verb,
)
from tunesmith.errors import Interrupted, RecipeError, UserError, counted
from tunesmith.run_folder import check_run

if TYPE_CHECKING:
    from tunesmith.deploy.inputs import Asked


class Verbs(TyperGroup):
    """The verbs; who reads their output may leave before its end, as `head` does."""

    def invoke(self, ctx: Any) -> Any:
        """Run one of them."""
        try:
            result = super().invoke(ctx)
            if sys.stdout is not None:
                sys.stdout.flush()
            return result
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(141) from None


app = typer.Typer(
    name="tunesmith",
    cls=Verbs,
    help="Fine-tune any pretrained model on your own data. Start with: [bold]tunesmith demo[/bold]",
    epilog="Errors say where, what and the way out. Exit codes: 0 done, 2 usage or recipe, 3 data, 4 resources, "
    "5 numbers, 6 checkpoint, 75 interrupted and resumable, 1 a bug of ours.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.add_typer(data_verbs.app, name="data")

STOPS = (signal.SIGINT, signal.SIGTERM)
Run = Annotated[Path, typer.Argument(help="A run folder, e.g. runs/reviews.")]


def main() -> NoReturn:
    """Run a command; a user's error is one line and its exit code, ours ends with 1 and says so."""
    debug = "--debug" in sys.argv
    if "--offline" in sys.argv:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read by libraries when they are imported
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    warnings.showwarning = _say_warning
    before = {number: signal.getsignal(number) for number in STOPS if sys.argv[1:2] == ["train"]}
    for number in [number for number, was in before.items() if was is not signal.SIG_IGN]:  # nohup's wish
        signal.signal(number, _leave)
    try:
        sys.exit(app(prog_name="tunesmith", standalone_mode=False) or 0)
    except UserError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}" if error.exit_code != 75 else str(error), file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # noqa: BLE001 - the last resort: a bug, said to be one
        if hasattr(error, "format_message"):  # what was typed is no command
            _say_usage(error)
            sys.exit(2)
        if debug:
            traceback.print_exc()
        what = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        print(
            f"error: a bug in tunesmith, not in what you did ({what}); run again with --debug and report it",
            file=sys.stderr,
        )
        sys.exit(1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(number: int, frame: Any) -> NoReturn:
    """End at once; within a run that looks after signals itself. (An exception here, amid an import of compiled code,
    would abort.)
    """
    os.write(2, b"stopped outside of a run; go on with: the same command, with --resume RUN if there is one by now\n")
    os._exit(Interrupted.exit_code)


def _say_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    """What a library warns of, on one line: whose it is, not where in its code."""
    library = filename.rpartition(f"site-packages{os.sep}")[2].partition(os.sep)[0].removesuffix(".py")
    print(f"warning: {library}: {' '.join(str(message).split())}", file=sys.stderr)


def _say_usage(error: Any) -> None:
    """What is wrong with the words of a command, on one line; nothing where the help was printed in its place."""
    said = error.format_message().replace("Value error, ", "").rstrip(".")
    what, near, hint = said.partition(". Did you mean ")
    verb = error.ctx.command_path if error.ctx else "tunesmith"
    unknown = error.option_name.lstrip("-") if hasattr(error, "possibilities") else ""
    if near:
        hint = f"did you mean {hint}"
    elif unknown and error.possibilities:
        what, hint = what.partition(" (")[0], f"did you mean '{error.possibilities[0]}'?"
    elif unknown and verb.endswith(" train"):
        hint = f"a recipe's keys are given without dashes: {unknown}=VALUE"
    else:
        hint = f"`{verb} --help` shows what there is"
    if what:
        print(f"error: {what[0].lower()}{what[1:]}; {hint}", file=sys.stderr)


@app.callback()
def _root(version: Version = False) -> None: ...


@app.command(epilog="Example: tunesmith demo")
@verb
def demo(
    output: Annotated[Path, typer.Option(help="Where the run goes.")] = Path("runs/demo"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier demo.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    offline: Offline = False,
) -> None:
    """Fetch a small model and real film reviews, fine-tune in two minutes, show before and after."""
    from tunesmith.studies import demo as study

    result = study.demo(output, offline=offline, overwrite=overwrite, talk=new_talk(as_json, quiet, verbose))
    if as_json:
        emit(result)


@app.command(epilog="Example: tunesmith init text-classification --technique lora")
@verb
def init(
    task: Annotated[str, typer.Argument(help="e.g. text-classification; `tunesmith tasks` lists them.")],
    technique: Annotated[str, typer.Option(help="`tunesmith techniques` lists them.")] = "lora",
    output: Annotated[Path, typer.Option(help="The file to write.")] = Path("recipe.yaml"),
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write a commented starter recipe."""
    from tunesmith.recipe.starter import starter
    from tunesmith.talk import command
    from tunesmith.training.files import atomic_write

    text = starter(task, technique)
    check_new(output)
    atomic_write(output, text)
    talk = new_talk(as_json, quiet, verbose)
    talk.say(f"wrote {output}; put your data's name in it, then: {command('train', output)}")
    schema = shlex.quote(str(output.with_name("tunesmith.schema.json")))
    talk.say(f"for an editor that completes and checks its keys: {command('schema')} > {schema}")
    if as_json:
        emit({"recipe": str(output)})


@app.command(epilog="Example: tunesmith train recipe.yaml train.epochs=1 technique=full")
@verb
def train(
    words: Pairs = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with this run folder.")] = None,
    override: Annotated[list[str] | None, typer.Option(help="With --resume: a key that may differ.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run folder.")] = False,
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    offline: Offline = False,
) -> None:
    """Train one run, or the stages of a recipe."""
    from tunesmith import recipe as recipes

    recipe, pairs = recipe_and_pairs(words or [])
    if resume is None:
        refuse_early(recipe, pairs, overwrite=overwrite)
    from tunesmith.studies import stages

    try:
        result = stages.train(
            recipe,
            *pairs,
            resume=resume,
            override=override or (),
            overwrite=overwrite,
            allow_pickle=allow_pickle,
            offline=offline,
            talk=new_talk(as_json, quiet, verbose),
        )
    except UserError as error:
        raise recipes.located(error, recipe, pairs) from error
    if as_json:
        emit(result)


@app.command(epilog="Example: tunesmith evaluate runs/reviews --split validation")
@verb
def evaluate(
    run: Run,
    data: Annotated[
        Path | None, typer.Option(help="Another file to score on, or a folder with a file of the split.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="train, validation or test of the run; default: test, where it has one.")
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="Score the untouched base, by a probe or its own head.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Score a run."""
    check_run(run)
    from tunesmith.studies import score
    from tunesmith.talk import scores_line

    talk = new_talk(True, quiet)
    result = score.evaluate(
        run, data=data, split=split, base=base, device=device, offline=offline, allow_pickle=allow_pickle, talk=talk
    )
    for note in result["notes"]:
        talk.warn(note)
    if as_json:
        emit(result)
        return
    probe = {f"{'linear probe on ' * result['probe']}the untouched base": result["metrics"]} if base else {}
    for who, scores in (probe | {str(run): result["run_metrics" if base else "metrics"]}).items():
        on = f"{result['split']} ({counted(result['examples'], 'example')})"
        print(f"{who} on {on}: {scores_line(scores, result['metric'])}")
    if "baseline" in result:
        known = f"a guess that knows only the training {result['baseline_knows']}"
        print(f"{known}: {scores_line(result['baseline'], result['metric'])}")


@app.command(epilog="Example: tunesmith merge runs/a runs/b --weights 0.7,0.3 --method ties --output runs/merged")
@verb
def merge(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Runs over one base, with the same task and classes; one alone is merged into its base."),
    ],
    output: Annotated[Path, typer.Option(help="The new run's folder.")],
    weights: Annotated[str | None, typer.Option(help="One for each run, with commas; default: equal shares.")] = None,
    method: Annotated[Literal["linear", "ties", "dare"], typer.Option(help="How changes are summed.")] = "linear",
    density: Annotated[float | None, typer.Option(help="Share of entries kept; default: ties 0.2, dare 0.5.")] = None,
    seed: Annotated[int, typer.Option(help="Of what dare drops.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run in that folder.")] = False,
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
    offline: Offline = False,
) -> None:
    """Sum what several runs have learned into one plain model, or merge one run's adapter into its base."""
    from tunesmith.deploy import merging
    from tunesmith.talk import command

    try:
        shares = [float(share) for share in weights.split(",")] if weights else None
    except ValueError:
        raise RecipeError(f"--weights: {weights} are not numbers with commas", hint="--weights 0.7,0.3") from None
    result = merging.merge(
        runs,
        output,
        weights=shares,
        method=method,
        density=density,
        seed=seed,
        offline=offline,
        allow_pickle=allow_pickle,
        overwrite=overwrite,
    )
    if as_json:
        emit(result)
        return
    what = f"{len(runs)} runs" if len(runs) > 1 else f"what {runs[0]} has learned"
    print(f'merged {what} into {output}; ask it: {command("predict", output)} "..."')


@app.command(epilog='Example: tunesmith predict runs/reviews "A lovely film."')
@verb
def predict(
    run: Run,
    inputs: Annotated[list[str] | None, typer.Argument(help="Texts.")] = None,
    file: Annotated[
        Path | None, typer.Option("--input", help="A file with the task's columns, or a text a line.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write JSON lines here.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
    allow_pickle: AllowPickle = False,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object a row on stdout, all talk on stderr.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    offline: Offline = False,
) -> None:
    """Answer texts given on the command line, or every row of a file: a line for each."""
    if not inputs and file is None:
        raise RecipeError("nothing to answer", hint='give texts, or --input FILE: tunesmith predict RUN "A text."')
    if output is not None:
        check_new(output)
    check_run(run)
    from tunesmith.data.formats import Row
    from tunesmith.deploy.inputs import answer_rows, read_inputs
    from tunesmith.deploy.predict import load
    from tunesmith.training.files import atomic_write

    talk = new_talk(True, quiet, verbose)
    tuned = load(run, device=device, offline=offline, allow_pickle=allow_pickle)
    main_role = next(iter(tuned.task.columns))
    rows: list[Asked] = [Row(f"input {number}", {main_role: text}) for number, text in enumerate(inputs or [], start=1)]
    if file is not None:
        rows += read_inputs(file, tuned.task, tuned.data.columns)
    alone = rows[0] if len(rows) == 1 else None
    if isinstance(alone, Row) and tuned.writes and not as_json and output is None:
        tuned.stream(alone.values, lambda text: print(text, end="", flush=True))
        print()
        return
    with talk.progress(len(rows), of="answering", unit="row") as show:
        answers = answer_rows(tuned, rows, talk.warn, lambda done: show(done, "answering"))
    lines = _answer_lines(rows, answers, as_json or output is not None)
    if output is not None:
        atomic_write(output, "".join(f"{line}\n" for line in lines))
        talk.say(f"wrote {counted(len(answers), 'answer')} to {output}")
        if as_json:
            emit({"run": str(run), "output": str(output), "answers": len(answers)})
        return
    for line in lines:
        print(line)


@app.command(epilog="Example: tunesmith chat runs/alpaca-lora")
@verb
def chat(
    run: Run,
    system: Annotated[str | None, typer.Option(help="What the conversation begins with; default: the run's.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Of an answer at most.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token; above, drawn.", min=0)] = 0.0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Talk with a run of text-generation, line by line; /new begins anew, end of input (ctrl-D) ends it."""
    check_run(run)
    from tunesmith.deploy import chat as conversation
    from tunesmith.deploy.predict import load
    from tunesmith.recipe.fields import Generation

    how = Generation.model_validate({"max_new_tokens": max_new_tokens, "temperature": temperature})
    tuned = load(run, device=device, offline=offline, allow_pickle=allow_pickle)
    out = sys.stderr if as_json else sys.stdout
    prompt = "" if quiet or not sys.stdin.isatty() else "> "
    messages = conversation.chat(
        tuned, _typed(prompt), lambda text: print(text, end="", flush=True, file=out), how, system
    )
    if as_json:
        emit({"run": str(run), "messages": messages})


def _typed(prompt: str) -> Iterator[str]:
    """Lines from standard input, asked for where a person types them."""
    while True:
        try:
            yield input(prompt)
        except EOFError:
            return


def _answer_lines(rows: list[Asked], answers: list[dict[str, Any]], as_json: bool) -> Iterator[str]:
    from tunesmith.talk import answer_line

    for row, answer in zip(rows, answers, strict=True):
        values = {} if isinstance(row, UserError) else row.values
        as_line = json.dumps(values | answer, ensure_ascii=False) if as_json else ""
        yield as_line or answer_line(answer, next(iter(values.values()), ""))


app.add_typer(about_verbs.app)
