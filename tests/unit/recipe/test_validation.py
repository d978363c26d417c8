"""An invalid value is one line: place, expected value, given value."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tunesmith.errors import RecipeError
from tunesmith.recipe import load

HEAD = "task: text-classification\nmodel: tiny\n"


@pytest.fixture
def refuse(tmp_path: Path) -> Callable[[str], str]:
    """`refuse(text)`: return the error of a recipe with `text` from the third line on."""

    def said(text: str) -> str:
        (tmp_path / "recipe.yaml").write_text(HEAD + text, encoding="utf-8")
        with pytest.raises(RecipeError) as caught:
            load(tmp_path / "recipe.yaml")
        return str(caught.value).replace(f"{tmp_path}/", "")

    return said


@pytest.mark.parametrize("text", (".nan", ".inf", "-.inf", "true", "'2e-4'", "[1]", "-1", "0"))
def test_invalid_learning_rates(text: str, refuse: Callable[[str], str]) -> None:
    assert "recipe.yaml:3: train.learning_rate: must be " in refuse(f"train: {{learning_rate: {text}}}\n")


@pytest.mark.parametrize(
    ("text", "said"),
    (
        (
            "train:\n  micro_batch_size: many\n",
            "4: train.micro_batch_size: must be an integer or 'auto', not 'many'",
        ),
        ("train:\n  evaluate_every: 0.5\n", "4: train.evaluate_every: must be an integer or 'epoch', not '0.5'"),
        (
            "train: {gradient_checkpointing: 1}\n",
            "3: train.gradient_checkpointing: must be true or false or 'auto', not '1'",
        ),
        ("data: {class_weights: 5}\n", "3: data.class_weights: must be 'balanced' or a mapping, not '5'"),
        ("data:\n  class_weights:\n    good: a\n", "5: data.class_weights.good: must be a number, not 'a'"),
        ("data:\n  columns:\n    text: 1.5\n", "5: data.columns.text: must be a string or an integer, not '1.5'"),
        ("data: {validation: [a]}\n", "3: data.validation: must be a string or a number, not '['a']'"),
        ("technique: {name: lora, r: 0}\n", "3: technique.r: must be at least 1, not '0'"),
        ("train: {schedule: linaer}\n", "3: train.schedule: must be 'linear', 'cosine' or 'constant', not 'linaer'"),
        ("train: {batch_size: true}\n", "3: train.batch_size: must be an integer, not 'true'"),
        ("train: {seed: 4294967296}\n", "3: train.seed: must be at most 4294967295, not '4294967296'"),
        ("train: {save_every: 0}\n", "3: train.save_every: must be at least 1 or 'epoch', not '0'"),
        ("train: {epochs: 1, max_steps: 2}\n", "3: train: epochs and max_steps "),
        (
            "data: {augment: [word_dropout]}\n",
            "3: data.augment: unknown name 'word_dropout'; did you mean 'word-dropout'?",
        ),
        ("data: {augment: [{name: typo}]}\n", "3: data.augment: unknown name 'typo'; did you mean 'typos'?"),
        ("data: {augment: [{nam: typos}]}\n", "3: data.augment: unknown key 'nam'; "),
        ("data: {augment: [{}]}\n", "3: data.augment: key 'name' is missing"),
        ("data: {augment: [5]}\n", "3: data.augment: must be a mapping, not '[5]'"),
        ("output: ''\n", "3: output: must be a non-empty string, not ''"),
        ("train: {optimzer: sgd}\n", "3: train.optimzer: unknown key; did you mean 'optimizer'?"),
        ("technique: {name: lora, rnk: 4}\n", "3: technique.rnk: unknown key; did you mean 'r'?"),
        (
            "technique: {name: bitfit, r: 4}\n",
            "3: technique.r: unknown key; it belongs to lora, not to bitfit: use technique=lora",
        ),
        ("technique: {name: bitfit, x: 4}\n", "3: technique.x: unknown key; bitfit has no keys"),
        ("lr: fast\n", "3: lr: must be a number, not 'fast'"),
        ("train:\n\n  lr: fast\n", "5: train.lr: must be a number, not 'fast'"),
        ("num_train_epochs: no\n", "3: num_train_epochs: must be a number, not 'no'"),
        ("bf16: maybe\n", "3: bf16: must be 'auto', 'fp32', 'bf16' or 'fp16', not 'maybe'"),
    ),
    ids=lambda text: text.split(": ", 1)[-1][:40].strip(),
)
def test_each_error_is_one_line_with_its_place(text: str, said: str, refuse: Callable[[str], str]) -> None:
    refusal = refuse(text)
    assert refusal.startswith(f"recipe.yaml:{said}") and "\n" not in refusal


def test_several_errors_are_reported_together(refuse: Callable[[str], str]) -> None:
    said = refuse("train:\n  epochs: -1\n  micro_batch_size: many\n  sede: 1\n").splitlines()
    assert [line.split(":")[1] for line in said] == ["4", "5", "6"] and len(said) == 3


def test_values_are_shortened_and_escaped(refuse: Callable[[str], str]) -> None:
    said = refuse(f'train: {{schedule: "{"x" * 500}\\e[31m"}}\n')
    assert len(said) < 300 and "\x1b" not in said
