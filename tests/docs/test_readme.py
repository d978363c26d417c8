from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import tunesmith
from tunesmith import registry
from tunesmith.console import Console
from tunesmith.recipe import Recipe, to_yaml

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "README.zh-CN.md", ROOT / "docs" / "quickstart.md"]


def _blocks(page: Path, language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.S | re.M)
    return [code for name, code in found if name == language]


def _commands(page: Path) -> list[str]:
    """Return the commands on a page, without comments and with quoted texts replaced."""
    lines = "".join(_blocks(page, "")).replace("\\\n", " ").splitlines()
    return [re.sub(r'"[^"]*"', '"..."', line.partition("  #")[0].strip()) for line in lines]


@pytest.mark.parametrize("page", PAGES[:2], ids=lambda page: page.name)
def test_the_first_25_lines_show_a_run(page: Path) -> None:
    first = page.read_text(encoding="utf-8").splitlines()[:25]
    assert "make demo" in first
    assert any(line.startswith("tunesmith train ") for line in first)


def test_the_chinese_page_has_the_same_content() -> None:
    english, chinese = PAGES[:2]
    assert _commands(chinese) == _commands(english)
    assert _blocks(chinese, "python") == _blocks(english, "python")
    link = re.compile(r"\]\(([^)]+)\)")
    found = [sorted(set(link.findall(page.read_text(encoding="utf-8"))) - {p.name for p in PAGES}) for page in PAGES]
    assert found[0] == found[1]
    assert english.read_text(encoding="utf-8").count("\n## ") == chinese.read_text(encoding="utf-8").count("\n## ")


@pytest.mark.parametrize("page", PAGES[:2], ids=lambda page: page.name)
def test_the_table_has_every_task_and_technique(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for kind, folder in (("task", "tasks"), ("technique", "techniques")):
        for name in registry.names(kind):  # type: ignore[arg-type]
            assert f"](docs/{folder}/{name}.md)" in text, name


@pytest.mark.parametrize("name", registry.names("technique"))
def test_a_card_cites_the_papers_of_the_docstring(name: str) -> None:
    card = (ROOT / "docs" / "techniques" / f"{name}.md").read_text(encoding="utf-8")
    papers = re.findall(r"\d{4}\.\d{5}", inspect.getdoc(registry.get("technique", name)) or "")
    assert [paper for paper in papers if f"https://arxiv.org/abs/{paper}" not in card] == []


@pytest.mark.parametrize("name", registry.names("technique"))
def test_a_card_has_every_section(name: str) -> None:
    card = (ROOT / "docs" / "techniques" / f"{name}.md").read_text(encoding="utf-8")
    for section in ("Trained parameters", "Learning rate", "When to use", "Output"):
        assert f"**{section}**: " in card, f"{name}.md has no section {section}"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_on_the_page_runs(
    page: Path, recipe_of: Any, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = recipe_of("output=runs/reviews-lora", "technique=lora")
    assert isinstance(recipe, Recipe)
    Path("recipe.yaml").write_text(to_yaml(recipe.dump()), encoding="utf-8")
    if "train(" not in "".join(_blocks(page, "python")):
        tunesmith.train("recipe.yaml", console=Console(level=-1))
    printed: list[object] = []
    for code in _blocks(page, "python"):
        exec(code, {"print": printed.append, "BASE": str(tiny_bert)})
    assert Path("runs/reviews-lora/README.md").exists()
    if page.name != "quickstart.md":
        accuracy, answers = printed
        assert isinstance(accuracy, float) and isinstance(answers, list)
        assert answers[0]["label"] in ("negative", "positive")
