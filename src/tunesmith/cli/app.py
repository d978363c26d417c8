"""The verbs of the command line: parse, call the Python API, print. Slow imports happen inside the verbs.

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
    Device,
    Json,
    Offline,
    Pairs,
    Quiet,
    Verbose,
    Version,
    check_new,
    emit,
    located,
    new_console,
    refuse_early,
    split_words,
    verb,
)
from tunesmith.errors import Interrupted, RecipeError, UserError, counted
from tunesmith.storage.run_folder import check_run

if TYPE_CHECKING:
    from tunesmith.deploy.inputs import Input
    from tunesmith.deploy.predict import FineTunedModel


class Verbs(TyperGroup):
    """Group of verbs; a reader that closes the pipe early, such as `head`, is not an error."""

    def invoke(self, ctx: Any) -> Any:
        """Run one verb."""
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
    epilog="Exit codes: 0 done, 1 a bug in tunesmith, 2 usage or recipe, 3 data, 4 memory, disk or network, "
    "5 NaN or divergence, 6 checkpoint or resume, 75 interrupted and resumable.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.add_typer(data_verbs.app, name="data")

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
Run = Annotated[Path, typer.Argument(help="Run folder, e.g. runs/reviews.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in the output folder.")]


def main() -> NoReturn:
    """Run the command line: a user's error ends with one line and its exit code, a bug with exit code 1."""
    debug = "--debug" in sys.argv
    if "--offline" in sys.argv:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read by libraries when they are imported
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    warnings.showwarning = _print_warning
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS if sys.argv[1:2] == ["train"]}
    for number in [number for number, handler in handlers.items() if handler is not signal.SIG_IGN]:  # nohup ignores
        signal.signal(number, _exit_at_once)
    try:
        sys.exit(app(prog_name="tunesmith", standalone_mode=False) or 0)
    except UserError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}" if error.exit_code != 75 else str(error), file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # noqa: BLE001 - the last resort: a bug
        if hasattr(error, "format_message"):  # click: the words are not a valid command
            _print_usage_error(error)
            sys.exit(2)
        if debug:
            traceback.print_exc()
        what = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        print(
            f"error: a bug in tunesmith ({what}); please report it with the output of --debug",
            file=sys.stderr,
        )
        sys.exit(1)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _exit_at_once(number: int, frame: Any) -> NoReturn:
    """Exit before a run handles signals itself; an exception during an import of compiled code would abort instead."""
    os.write(2, b"stopped; to resume: run the command again, with --resume RUN if the run folder exists\n")
    os._exit(Interrupted.exit_code)


def _print_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    """Print a library's warning on one line, with the library instead of the place in its code."""
    library = filename.rpartition(f"site-packages{os.sep}")[2].partition(os.sep)[0].removesuffix(".py")
    print(f"warning: {library}: {' '.join(str(message).split())}", file=sys.stderr)


def _print_usage_error(error: Any) -> None:
    """Print a usage error on one line; nothing where the help was printed instead."""
    message = error.format_message().replace("Value error, ", "").rstrip(".")
    what, near, hint = message.partition(". Did you mean ")
    verb = error.ctx.command_path if error.ctx else "tunesmith"
    unknown = error.option_name.lstrip("-") if hasattr(error, "possibilities") else ""
    if near:
        hint = f"did you mean {hint}"
    elif unknown and error.possibilities:
        what, hint = what.partition(" (")[0], f"did you mean '{error.possibilities[0]}'?"
    elif unknown and verb.endswith(" train"):
        hint = f"recipe keys have no dashes: {unknown}=VALUE"
    else:
        hint = f"see `{verb} --help`"
    if what:
        print(f"error: {what[0].lower()}{what[1:]}; {hint}", file=sys.stderr)


@app.callback()
def _root(version: Version = False) -> None: ...


@app.command(epilog="Example: tunesmith demo")
@verb
def demo(
    output: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/demo"),
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    offline: Offline = False,
) -> None:
    """Download a small model and film reviews, fine-tune in two minutes, compare before and after."""
    from tunesmith.studies import demo as study

    result = study.demo(output, offline=offline, overwrite=overwrite, console=new_console(as_json, quiet, verbose))
    if as_json:
        emit(result)


@app.command(epilog="Example: tunesmith init text-classification --technique lora")
@verb
def init(
    task: Annotated[str, typer.Argument(help="Task, e.g. text-classification; listed by `tunesmith tasks`.")],
    technique: Annotated[str, typer.Option(help="Fine-tuning technique; listed by `tunesmith techniques`.")] = "lora",
    output: Annotated[Path, typer.Option(help="File to write.")] = Path("recipe.yaml"),
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write a starter recipe with every key, its default and a comment."""
    from tunesmith.console import command
    from tunesmith.recipe.starter import starter
    from tunesmith.storage.files import atomic_write

    text = starter(task, technique)
    check_new(output)
    atomic_write(output, text)
    console = new_console(as_json, quiet, verbose)
    console.say(f"wrote {output}; set data.train in it, then: {command('train', output)}")
    schema = shlex.quote(str(output.with_name("tunesmith.schema.json")))
    console.say(f"for completion and validation in an editor: {command('schema')} > {schema}")
    if as_json:
        emit({"recipe": str(output)})


@app.command(epilog="Example: tunesmith train recipe.yaml train.epochs=1 technique=full")
@verb
def train(
    words: Pairs = None,
    resume: Annotated[Path | None, typer.Option(help="Run folder to resume.")] = None,
    override: Annotated[
        list[str] | None, typer.Option(help="With --resume: a key that may differ from the earlier run; repeatable.")
    ] = None,
    overwrite: Overwrite = False,
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    offline: Offline = False,
) -> None:
    """Train one run, or the stages of a recipe."""
    from tunesmith.recipe import read

    path, pairs = split_words(words or [])
    source = read(path, pairs)
    if resume is None:
        refuse_early(source, overwrite=overwrite)
    from tunesmith import api

    with located(source):
        result = api.train(
            source,
            resume=resume,
            override=override or (),
            overwrite=overwrite,
            allow_pickle=allow_pickle,
            offline=offline,
            console=new_console(as_json, quiet, verbose),
        )
    if as_json:
        emit(result)


@app.command(epilog="Example: tunesmith evaluate runs/reviews --split validation")
@verb
def evaluate(
    run: Run,
    data: Annotated[
        Path | None, typer.Option(help="Other data to score on: a file, or a folder with a file of the split.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="train, validation or test; default: test, or validation if the run has none.")
    ] = None,
    base: Annotated[
        bool, typer.Option("--base", help="Also score the base model: with its own head, or with a linear probe.")
    ] = False,
    device: Device = "auto",
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Compute the metrics of a run on a split or on other data."""
    check_run(run)
    from tunesmith.console import scores_line
    from tunesmith.studies import score

    console = new_console(True, quiet)
    result = score.evaluate(
        run,
        data=data,
        split=split,
        base=base,
        device=device,
        offline=offline,
        allow_pickle=allow_pickle,
        console=console,
    )
    for note in result["notes"]:
        console.warn(note)
    if as_json:
        emit(result)
        return
    probe = {"linear probe on the base model" if result["probe"] else "base model": result["metrics"]} if base else {}
    for name, scores in (probe | {str(run): result["run_metrics" if base else "metrics"]}).items():
        on = f"{result['split']} ({counted(result['examples'], 'example')})"
        print(f"{name} on {on}: {scores_line(scores, result['metric'])}")
    if "baseline" in result:
        print(f"{result['baseline_name']}: {scores_line(result['baseline'], result['metric'])}")


@app.command(epilog="Example: tunesmith merge runs/a runs/b --weights 0.7,0.3 --method ties --output runs/merged")
@verb
def merge(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Runs with the same base model, task and classes; one alone is merged into its base."),
    ],
    output: Annotated[Path, typer.Option(help="Folder of the new run.")],
    weights: Annotated[
        str | None, typer.Option(help="Weight of each run, comma-separated; default: equal weights.")
    ] = None,
    method: Annotated[Literal["linear", "ties", "dare"], typer.Option(help="Merging method.")] = "linear",
    density: Annotated[
        float | None, typer.Option(help="Fraction of entries kept; default: ties 0.2, dare 0.5.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the entries that dare drops.")] = 0,
    overwrite: Overwrite = False,
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
    offline: Offline = False,
) -> None:
    """Merge several runs into one plain model, or one run's adapter into its base model."""
    from tunesmith.console import command
    from tunesmith.deploy import merge as merging

    try:
        weight_list = [float(weight) for weight in weights.split(",")] if weights else None
    except ValueError:
        hint = "e.g. --weights 0.7,0.3"
        raise RecipeError(f"--weights: must be comma-separated numbers, not {weights}", hint=hint) from None
    result = merging.merge(
        runs,
        output,
        weights=weight_list,
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
    what = f"{len(runs)} runs" if len(runs) > 1 else f"the adapter of {runs[0]}"
    print(f'merged {what} into {output}; try it: {command("predict", output)} "..."')


@app.command(epilog='Example: tunesmith predict runs/reviews "A lovely film."')
@verb
def predict(
    run: Run,
    inputs: Annotated[list[str] | None, typer.Argument(help="Input texts.")] = None,
    file: Annotated[
        Path | None, typer.Option("--input", help="File with the task's columns, or one text per line.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write JSON lines to this file.")] = None,
    device: Device = "auto",
    allow_pickle: AllowPickle = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per input to stdout, all other output to stderr.")
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    offline: Offline = False,
) -> None:
    """Run inference on texts or on every row of a file, and print one line for each."""
    if not inputs and file is None:
        raise RecipeError("no input", hint='give texts or --input FILE, e.g. tunesmith predict RUN "A text."')
    if output is not None:
        check_new(output)
    check_run(run)
    from tunesmith.data.formats import Row
    from tunesmith.deploy.inputs import answer_rows, read_inputs
    from tunesmith.deploy.predict import load
    from tunesmith.storage.files import atomic_write

    console = new_console(True, quiet, verbose)
    tuned = load(run, device=device, offline=offline, allow_pickle=allow_pickle)
    main_role = tuned.task.columns[0].name
    rows: list[Input] = [Row(f"input {number}", {main_role: text}) for number, text in enumerate(inputs or [], start=1)]
    if file is not None:
        rows += read_inputs(file, tuned.task, tuned.data.columns)
    alone = rows[0] if len(rows) == 1 else None
    if isinstance(alone, Row) and tuned.generates and not as_json and output is None:
        tuned.stream(alone.values, lambda text: print(text, end="", flush=True))
        print()
        return
    with console.progress(len(rows), of="predicting", unit="row") as show:
        answers = answer_rows(tuned, rows, console.warn, lambda done: show(done, "predicting"))
    lines = _answer_lines(tuned, rows, answers, as_json or output is not None)
    if output is not None:
        atomic_write(output, "".join(f"{line}\n" for line in lines))
        console.say(f"wrote {counted(len(answers), 'line')} to {output}")
        if as_json:
            emit({"run": str(run), "output": str(output), "answers": len(answers)})
        return
    for line in lines:
        print(line)


@app.command(epilog="Example: tunesmith chat runs/alpaca-lora")
@verb
def chat(
    run: Run,
    system: Annotated[str | None, typer.Option(help="System message; default: the run's.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum tokens per answer.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0: greedy decoding.", min=0)] = 0.0,
    device: Device = "auto",
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Chat with a text-generation run; /new starts a new conversation, Ctrl-D quits."""
    check_run(run)
    from tunesmith.deploy import chat as conversation
    from tunesmith.deploy.predict import load
    from tunesmith.recipe.fields import Generation

    settings = Generation.model_validate({"max_new_tokens": max_new_tokens, "temperature": temperature})
    tuned = load(run, device=device, offline=offline, allow_pickle=allow_pickle)
    out = sys.stderr if as_json else sys.stdout
    prompt = "" if quiet or not sys.stdin.isatty() else "> "
    messages = conversation.chat(
        tuned, _typed(prompt), lambda text: print(text, end="", flush=True, file=out), settings, system
    )
    if as_json:
        emit({"run": str(run), "messages": messages})


def _typed(prompt: str) -> Iterator[str]:
    """Yield the lines of standard input, with a prompt."""
    while True:
        try:
            yield input(prompt)
        except EOFError:
            return


def _answer_lines(
    tuned: FineTunedModel, rows: list[Input], answers: list[dict[str, Any]], as_json: bool
) -> Iterator[str]:
    """Yield a line for each answer; a class or a number is followed by the start of its input."""
    for row, answer in zip(rows, answers, strict=True):
        values = {} if isinstance(row, UserError) else row.values
        if as_json:
            yield json.dumps(values | answer, ensure_ascii=False)
        elif isinstance(row, UserError) or "error" in answer:
            yield f"(no answer: {answer['error']})"
        else:
            shown = next(iter(values.values()), "")
            text = " ".join(map(str, shown)) if isinstance(shown, list) else str(shown)
            rendered = tuned.task.render(answer, row)
            yield rendered if tuned.generates else f"{rendered}  {text[:100]}"


app.add_typer(about_verbs.app)
