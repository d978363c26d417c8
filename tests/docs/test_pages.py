from __future__ import annotations

import re
import runpy
import shlex
import typing
from pathlib import Path

import click
import pytest
import typer

from tunesmith import registry
from tunesmith.cli.app import app

ROOT = Path(__file__).parents[2]
PAGES = sorted(path for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")) if path.name != "CHANGELOG.md")


def _commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for block in re.findall(r"^```\w*\n(.*?)^```$", page.read_text(encoding="utf-8"), re.S | re.M):
            lines = re.sub(r"^torchrun .* -m ", "", block.replace("\\\n", " "), flags=re.M).splitlines()
            found += [(page.name, line.partition(" #")[0]) for line in lines if line.startswith("tunesmith ")]
    return found


@pytest.mark.parametrize(("page", "line"), _commands(), ids=lambda value: value[:60])
def test_every_command_on_a_page_parses(page: str, line: str) -> None:
    words = shlex.split(line)[1:]
    command: typing.Any = typer.main.get_command(app)
    context = click.Context(command)
    while isinstance(command, click.Group) or hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    command.make_context(command.name, words, parent=context)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_point_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_recipe_reference_is_up_to_date() -> None:
    generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    assert (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8") == generate["page"](), "run docs/generate.py"


@pytest.mark.parametrize(
    ("kind", "name"), [(k, n) for k in ("task", "technique") for n in registry.names(typing.cast(registry.Kind, k))]
)
def test_every_plug_in_has_a_card(kind: str, name: str) -> None:
    card = ROOT / "docs" / f"{kind}s" / f"{name}.md"
    text = card.read_text(encoding="utf-8")
    for key in registry.get(typing.cast(registry.Kind, kind), name).model_fields:
        assert key in text, f"{card.name} does not mention {key}"
