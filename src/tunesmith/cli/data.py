"""`tunesmith data`: what is wrong with the data, what a model sees of it, one format into another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from tunesmith.cli.options import (
    AllowPickle,
    Json,
    Offline,
    Quiet,
    check_new,
    emit,
    new_talk,
    recipe_and_pairs,
    refuse_early,
    verb,
)
from tunesmith.data.findings import SAID
from tunesmith.errors import CONTROL, counted

app = typer.Typer(help="Look at data before a run does. Example: tunesmith data check reviews.csv")

Words = Annotated[
    list[str],
    typer.Argument(
        help="A file, a folder, a recipe or a run, then KEY=VALUE.", metavar="PATH|RECIPE.yaml|RUN [KEY=VALUE ...]"
    ),
]
Stage = Annotated[
    int | None, typer.Option(help="Of a recipe with stages, the number of one; default: the last.", min=1)
]
Model = Annotated[str | None, typer.Option(help="Whose tokens to count; default: the recipe's.")]


@app.callback(invoke_without_command=True)
@verb
def data(context: typer.Context) -> None:
    """Look at data before a run does. Example: tunesmith data check reviews.csv"""  # noqa: D400
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


@app.command(epilog="Example: tunesmith data check reviews.csv --group author --model runs/reviews")
@verb
def check(
    words: Words,
    group: Annotated[str | None, typer.Option(help="A column whose values belong on one side of a split.")] = None,
    model: Model = None,
    stage: Stage = None,
    examples: Annotated[int, typer.Option("-n", help="Examples shown of each finding.", min=0)] = 3,
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Say what is wrong with data, row by row; exit code 3 where it would stop a run or falsify its scores."""
    target, pairs = _named(words, stage)
    from tunesmith.studies import data_check as study

    allowed = {"offline": offline, "allow_pickle": allow_pickle}
    report = study.check(target, pairs, group=group, model=model, stage=stage, **allowed)
    if as_json:
        emit(report)
    else:
        console = new_talk(False, quiet).console
        for line, style in _page(report, examples, quiet):
            console.print(line, style=style)
    if report["errors"]:
        raise typer.Exit(3)


def _named(words: list[str], stage: int | None) -> tuple[str | None, list[str]]:
    """A file, a folder, a recipe or a run, and the pairs behind it; what is not there is refused at once."""
    target, pairs = recipe_and_pairs(words)
    if target is None or target.lower().endswith((".yaml", ".yml")):
        refuse_early(target, pairs)
    elif stage is None:
        from tunesmith.data.formats import check_there

        check_there(Path(target))
    return target, pairs


def _page(report: dict[str, Any], examples: int, quiet: bool) -> Iterator[tuple[str, str]]:
    """Lines and their styles: the files, then finding by finding."""
    for note in report["notes"] if not quiet else ():
        yield f"note: {note}", ""
    if report["guessed"] and report["task"] and not quiet:
        yield f"taken as data for {report['task']}; task=NAME says otherwise", ""
    for name, split in report["splits"].items() if not quiet else ():
        yield f"{name}: {', '.join(_about(split))}", "bold"
    for number, finding in enumerate(report["findings"]):
        style = {"error": "bold red", "warning": "yellow"}[finding["level"]]
        if number or not quiet:
            yield "", ""
        yield f"{finding['level']}: {finding['kind']}, {finding['count']:,}: {finding['what']}", style
        shown, quote = finding["faults"][:examples], "" if finding["kind"] in SAID else "'"
        several = len({fault["fix"] for fault in shown}) > 1
        for fault in shown:
            place = fault["file"] if fault["line"] is None else f"{fault['file']}:{fault['line']}"
            value = f"  {quote}{fault['value']}{quote}" if fault["value"] else ""
            yield f"  {place}{value}{'  see ' + fault['see'] if 'see' in fault else ''}", ""
            if several:
                yield f"    way out: {fault['fix']}", ""
        if finding["count"] > examples > 0:
            yield f"  and {finding['count'] - examples:,} more (-n shows more, --json all)", "dim"
        if not several:
            yield f"  way out: {finding['fix']}", ""
    if quiet:
        return
    yield "", ""
    found = f"{counted(report['errors'], 'error')}, {counted(report['warnings'], 'warning')}"
    yield f"found in {report['seconds']:.1f} s: {found}", "bold"


def _about(split: dict[str, Any]) -> Iterator[str]:
    yield f"{counted(split['rows'], 'row')} of {split['file']}"
    if split["bad_rows"]:
        yield f"{counted(split['bad_rows'], 'bad one')}"
    yield from (f"{count:,} drawn for {name}" for name, count in split.get("drawn", {}).items())
    if classes := list(split["classes"].items()):
        few = [f"{name} {count:,}" for name, count in (classes if len(classes) < 5 else [classes[0], classes[-1]])]
        yield f"{counted(len(classes), 'class', 'classes')} ({(' to ' if len(classes) > 4 else ', ').join(few)})"
    if lengths := split["lengths"]:
        sizes = f"median {lengths['median']:g}, 95 % up to {lengths['p95']:g}, longest {lengths['longest']:,}"
        yield f"{lengths['unit']} a text: {sizes}"


@app.command(epilog="Example: tunesmith data convert reviews.csv reviews.parquet")
@verb
def convert(
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="A file in any format that is read.")],
    output: Annotated[Path, typer.Argument(help="The new file; .gz at the end compresses it.")],
    to: Annotated[
        str | None, typer.Option(help="csv, tsv, jsonl, json, parquet, conll; default: by OUTPUT's name.")
    ] = None,
    header: Annotated[
        bool | None, typer.Option("--header/--no-header", help="Whether the first line names columns; default: seen.")
    ] = None,
    spans: Annotated[
        bool, typer.Option("--spans", help="Entities as spans of a text instead of a tag for each word.")
    ] = False,
    skip: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Leave out and count rows that cannot be read.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the rows of a file in another format; nothing is overwritten."""
    from tunesmith.studies import data_convert as study

    result = study.convert(source, output, to=to, header=header, skip=skip, spans=spans)
    talk = new_talk(as_json, quiet)
    talk.say(
        f"wrote {counted(result['rows'], 'row')} as {result['format']} to {output}: {', '.join(result['columns'])}"
    )
    if result["left_out"]:
        talk.warn(f"left out, for want of a place beside the entities: {', '.join(result['left_out'])}")
    if result["skipped"]:
        talk.warn("skipped " + ", ".join(f"{count:,} ({reason})" for reason, count in result["skipped"].items()))
    if as_json:
        emit(result)


@app.command(epilog="Example: tunesmith data show reviews.csv --model runs/reviews -n 2")
@verb
def show(
    words: Words,
    model: Model = None,
    stage: Stage = None,
    rows: Annotated[int, typer.Option("-n", help="How many rows.", min=1)] = 5,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "train",
    row: Annotated[int | None, typer.Option(help="One row, counted from 1.", min=1)] = None,
    augmented: Annotated[bool, typer.Option("--augmented", help="And what data.augment makes of each.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page of HTML here.")] = None,
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Show what a model sees of rows, token by token, and what of it carries loss."""
    target, pairs = _named(words, stage)
    from tunesmith.studies import data_show as study
    from tunesmith.training.files import atomic_write

    if html is not None:
        check_new(html, "--html")
    found = study.show(
        target,
        pairs,
        model=model,
        split=split,
        rows=rows,
        row=row,
        augmented=augmented,
        stage=stage,
        offline=offline,
        allow_pickle=allow_pickle,
    )
    talk = new_talk(as_json, quiet)
    if html is not None:
        atomic_write(html, study.page(found, f"{target or 'the data'}: what a model sees of {split}"))
        talk.say(f"wrote {html}")
    if as_json:
        emit({"split": split, "rows": [one.dump() for one in found]})
    elif html is None:
        for one in found:
            _print_row(talk.console, one)


def _print_row(console: Any, row: Any) -> None:
    """One row in colour; without colour `<target>` behind a token tells what carries loss, or `[token]` its own."""
    from rich.text import Text

    console.print(row.place, style="bold")
    if row.target is not None:
        console.print(Text.assemble("  target: ", (row.target, "bold green"), " (carries the loss)"))
    for number, window in enumerate(row.windows, start=1):
        line = Text("  ")
        for token in window:
            style = "bold green" if token.target is not None else "dim" if token.special else ""
            itself = token.target == token.text
            line.append(CONTROL.sub("?", f"[{token.text}]" if itself else token.text), style=style)
            if token.target is not None and not itself:
                line.append(f"<{token.target}>", style="green")
            line.append(" ")
        cut = ", the rest is cut off" if row.cut and number == len(row.windows) else ""
        console.print(line.append(f"({counted(len(window), 'token')}{cut})", style="dim"))
