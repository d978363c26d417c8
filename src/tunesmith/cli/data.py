"""`tunesmith data`: check data, show model inputs, convert between formats."""

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
    new_console,
    refuse_early,
    split_words,
    verb,
)
from tunesmith.data.findings import ERROR_KINDS
from tunesmith.errors import CONTROL, counted

app = typer.Typer(help="Check, show and convert data before training. Example: tunesmith data check reviews.csv")

Words = Annotated[
    list[str],
    typer.Argument(
        help="File, folder, recipe or run, then recipe keys.", metavar="PATH|RECIPE.yaml|RUN [KEY=VALUE ...]"
    ),
]
Stage = Annotated[
    int | None, typer.Option(help="Number of a stage, for a recipe with stages; default: the last.", min=1)
]
Model = Annotated[str | None, typer.Option(help="Model whose tokenizer is used; default: the recipe's.")]


@app.callback(invoke_without_command=True)
@verb
def data(context: typer.Context) -> None:
    """Check, show and convert data before training. Example: tunesmith data check reviews.csv"""
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


@app.command(epilog="Example: tunesmith data check reviews.csv --group author --model runs/reviews")
@verb
def check(
    words: Words,
    group: Annotated[str | None, typer.Option(help="Column whose equal values must not be in two splits.")] = None,
    model: Model = None,
    stage: Stage = None,
    examples: Annotated[int, typer.Option("-n", help="Rows shown per finding.", min=0)] = 3,
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Report faulty rows; exit code 3 if one would stop a run or invalidate its scores."""
    target, pairs = _split_target(words, stage)
    from tunesmith.inspect_data import check as study

    allowed = {"offline": offline, "allow_pickle": allow_pickle}
    report = study.check(target, pairs, group=group, model=model, stage=stage, **allowed)
    if as_json:
        emit(report)
    else:
        console = new_console(False, quiet).rich
        for line, style in _page(report, examples, quiet):
            console.print(line, style=style)
    if report["errors"]:
        raise typer.Exit(3)


def _split_target(words: list[str], stage: int | None) -> tuple[str | None, list[str]]:
    """Return the target (file, folder, recipe or run) and the pairs after it; refuse missing files at once."""
    target, pairs = split_words(words)
    if target is None or target.lower().endswith((".yaml", ".yml")):
        from tunesmith.recipe import read

        refuse_early(read(target, pairs))
    elif stage is None:
        from tunesmith.data.formats import check_exists

        check_exists(Path(target))
    return target, pairs


def _page(report: dict[str, Any], examples: int, quiet: bool) -> Iterator[tuple[str, str]]:
    """Yield the lines of the report with their styles: the files, then the findings."""
    for note in report["notes"] if not quiet else ():
        yield f"note: {note}", ""
    if report["guessed"] and report["task"] and not quiet:
        yield f"assuming data for {report['task']}; set task=NAME if it is for another", ""
    for name, split in report["splits"].items() if not quiet else ():
        yield f"{name}: {', '.join(_summary(split))}", "bold"
    for number, finding in enumerate(report["findings"]):
        style = {"error": "bold red", "warning": "yellow"}[finding["level"]]
        if number or not quiet:
            yield "", ""
        yield f"{finding['level']}: {finding['kind']}, {finding['count']:,}: {finding['what']}", style
        shown, quote = finding["faults"][:examples], "" if finding["kind"] in ERROR_KINDS else "'"
        several = len({fault["fix"] for fault in shown}) > 1
        for fault in shown:
            place = fault["file"] if fault["line"] is None else f"{fault['file']}:{fault['line']}"
            value = f"  {quote}{fault['value']}{quote}" if fault["value"] else ""
            yield f"  {place}{value}{'  see ' + fault['see'] if 'see' in fault else ''}", ""
            if several:
                yield f"    fix: {fault['fix']}", ""
        if finding["count"] > examples > 0:
            yield f"  and {finding['count'] - examples:,} more (-n shows more, --json all)", "dim"
        if not several:
            yield f"  fix: {finding['fix']}", ""
    if quiet:
        return
    yield "", ""
    total = f"{counted(report['errors'], 'error')}, {counted(report['warnings'], 'warning')}"
    yield f"checked in {report['seconds']:.1f} s: {total}", "bold"


def _summary(split: dict[str, Any]) -> Iterator[str]:
    yield f"{counted(split['rows'], 'row')} of {split['file']}"
    if split["bad_rows"]:
        yield f"{counted(split['bad_rows'], 'bad row')}"
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
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="File in any supported format.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="New file; compressed if it ends in .gz.")],
    to: Annotated[
        str | None, typer.Option(help="csv, tsv, jsonl, json, parquet or conll; default: from the name of OUTPUT.")
    ] = None,
    header: Annotated[
        bool | None,
        typer.Option("--header/--no-header", help="The first line has column names, or not; default: detected."),
    ] = None,
    spans: Annotated[
        bool, typer.Option("--spans", help="Write entities as character spans instead of one tag per word.")
    ] = False,
    skip: Annotated[bool, typer.Option("--skip-bad-rows", help="Skip and count rows that cannot be read.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Convert a file to another format; an existing file is not overwritten."""
    from tunesmith.inspect_data import convert as study

    result = study.convert(source, output, to=to, header=header, skip=skip, spans=spans)
    console = new_console(as_json, quiet)
    console.say(
        f"wrote {counted(result['rows'], 'row')} as {result['format']} to {output}: {', '.join(result['columns'])}"
    )
    if result["left_out"]:
        console.warn(f"columns that this format cannot hold beside entities, left out: {', '.join(result['left_out'])}")
    if result["skipped"]:
        console.warn("skipped " + ", ".join(f"{count:,} ({reason})" for reason, count in result["skipped"].items()))
    if as_json:
        emit(result)


@app.command(epilog="Example: tunesmith data show reviews.csv --model runs/reviews -n 2")
@verb
def show(
    words: Words,
    model: Model = None,
    stage: Stage = None,
    rows: Annotated[int, typer.Option("-n", help="Number of rows.", min=1)] = 5,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "train",
    row: Annotated[int | None, typer.Option(help="Number of a single row, from 1.", min=1)] = None,
    augmented: Annotated[
        bool, typer.Option("--augmented", help="Also show each row as augmented by data.augment.")
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Write an HTML page to this file.")] = None,
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Show rows as the model reads them, token by token, with the targets of the loss."""
    target, pairs = _split_target(words, stage)
    from tunesmith.inspect_data import show as study
    from tunesmith.storage.files import atomic_write

    if html is not None:
        check_new(html, "--html")
    shown = study.show(
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
    console = new_console(as_json, quiet)
    if html is not None:
        atomic_write(html, study.page(shown, f"{target or 'data'}: model inputs of {split}"))
        console.say(f"wrote {html}")
    if as_json:
        emit({"split": split, "rows": [row.dump() for row in shown]})
    elif html is None:
        for row_shown in shown:
            _print_row(console.rich, row_shown)


def _print_row(console: Any, row: Any) -> None:
    """Print one row; `token<target>` carries loss, as does `[token]`, whose target is itself."""
    from rich.text import Text

    console.print(row.place, style="bold")
    if row.preview.target is not None:
        console.print(Text.assemble("  target: ", (row.preview.target, "bold green"), " (carries the loss)"))
    for line in row.preview.lines:
        console.print(Text(f"  {CONTROL.sub('?', line)}"))
    for number, window in enumerate(row.preview.windows, start=1):
        line = Text("  ")
        for token in window:
            style = "bold green" if token.target is not None else "dim" if token.special else ""
            is_own_target = token.target == token.text
            line.append(CONTROL.sub("?", f"[{token.text}]" if is_own_target else token.text), style=style)
            if token.target is not None and not is_own_target:
                line.append(f"<{token.target}>", style="green")
            line.append(" ")
        cut = ", truncated" if row.preview.cut and number == len(row.preview.windows) else ""
        console.print(line.append(f"({counted(len(window), 'token')}{cut})", style="dim"))
