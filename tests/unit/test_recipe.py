"""A recipe says what it means in YAML 1.2, or is refused with the line, the value and the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tunesmith import recipe
from tunesmith.errors import RecipeError
from tunesmith.recipe import Recipe, load

HEAD = "task: text-classification\nmodel: tiny\n"
SOURCE = Path(recipe.__file__).parent


@pytest.fixture
def read(tmp_path: Path) -> Any:
    """`read(text, *overrides)`: a recipe of that text."""

    def of(text: str, *overrides: str) -> Recipe:
        (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
        return load(tmp_path / "recipe.yaml", overrides)

    return of


def _refusal(read: Any, text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        read(text, *overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    (
        ("2e-4", 2e-4),
        ("1e-5", 1e-5),
        ("2E+1", 20.0),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("3", 3.0),
        ("1.", 1.0),
        ("1.10", 1.1),
    ),
)
def test_numbers_are_numbers(text: str, value: float, read: Any) -> None:
    assert read(f"{HEAD}train: {{learning_rate: {text}}}\n").train.learning_rate == value
    assert load(None, [f"lr={text}"], {"task": "text-classification", "model": "m"}).train.learning_rate == value


@pytest.mark.parametrize(
    "text",
    ("no", "yes", "on", "off", "y", "NO", "12:30", "1:30:45", "2024-01-02", "2024-01-02T03:04:05", "~x", "1e", "v1.0"),
)
def test_what_yaml_1_1_took_for_something_else_is_a_text(text: str, read: Any) -> None:
    assert read(f"{HEAD}output: {text}\n").output == text
    assert read(f"{HEAD}data: {{train: {text}}}\n").data.train == text


@pytest.mark.parametrize(("text", "value"), (("010", 10), ("0o10", 8), ("0x1F", 31), ("+7", 7)))
def test_whole_numbers_are_those_of_yaml_1_2(text: str, value: int, read: Any) -> None:
    assert read(f"{HEAD}train: {{batch_size: {text}}}\n").train.batch_size == value


@pytest.mark.parametrize("text", (".nan", ".inf", "-.inf", "true", "'2e-4'", "[1]", "-1", "0"))
def test_what_is_no_rate_is_refused(text: str, read: Any) -> None:
    assert "recipe.yaml:3: train.learning_rate: must be " in _refusal(read, f"{HEAD}train: {{learning_rate: {text}}}\n")


def test_a_key_given_twice(read: Any) -> None:
    said = _refusal(read, f"{HEAD}train:\n  epochs: 1\n  seed: 0\n  epochs: 2\n")
    assert said.endswith("recipe.yaml:6: epochs: the key is given twice; keep one")


@pytest.mark.parametrize(
    ("text", "where"),
    (
        ("lr: 1e-3\ntrain:\n  learning_rate: 2e-3\n", "recipe.yaml:5: train.learning_rate"),
        ("train:\n  learning_rate: 2e-3\nlr: 1e-3\n", "recipe.yaml:5: lr"),
        ("batch_size: 8\nper_device_train_batch_size: 4\n", "recipe.yaml:4: per_device_train_batch_size"),
        ("per_device_train_batch_size: 4\nbatch_size: 8\n", "recipe.yaml:3: per_device_train_batch_size"),
        ("bf16: true\nfp16: true\n", "recipe.yaml:4: fp16"),
        ("output_dir: a\noutput: b\n", "recipe.yaml:4: output"),
    ),
)
def test_the_same_under_two_names(text: str, where: str, read: Any) -> None:
    assert f"{where}: given twice under two names; keep one" in _refusal(read, HEAD + text)


def test_yaml_aliases_are_read(read: Any) -> None:
    text = f"{HEAD}data: {{train: &file a.csv, test: *file}}\ntrain: {{<<: {{seed: 3}}, epochs: 2}}\n"
    assert (read(text).data.test, read(text).train.seed, read(text).train.epochs) == ("a.csv", 3, 2)


BOMB = "x: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"x{n}: &a{n} [{','.join([f'*a{n - 1 if n else str()}'] * 9)}]\n" for n in range(9)
)


@pytest.mark.parametrize(
    ("text", "said"),
    (
        (BOMB, "aliases unfold to more than 1,000 values"),
        ("x: &a 1\ny: [" + ", ".join(["*a"] * 101) + "]\n", "at most 100 YAML aliases"),
        ("x: [" + "1," * 1001 + "]", "1,000 values"),
        ("x: &a [*a]\n", "recipe.yaml:3: x: "),
        ("x: " + "[" * 30 + "]" * 30, "20 levels deep"),
        ("x: " + "[" * 5000, "recipe.yaml:3: a recipe is at most 20 levels deep"),
        ("x: " + "a" * 2**20, "at most 1 MiB"),
        ("x: [1\n", "recipe.yaml:4: not valid YAML"),
        ("\tx: 1\n", "recipe.yaml:3: not valid YAML"),
        ("x: 1\n---\ny: 2\n", "not valid YAML"),
        ("x: *nobody\n", "recipe.yaml:3: not valid YAML"),
    ),
    ids=lambda text: text[:12],
)
def test_hostile_and_broken_yaml(text: str, said: str, read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "MAX_YAML_VALUES", 1000)
    assert said in _refusal(read, HEAD + text)


@pytest.mark.parametrize("text", ("", "just words", "- a\n- list\n", "# nothing\n"))
def test_what_is_no_recipe(text: str, read: Any) -> None:
    assert "recipe.yaml:1: a recipe is a list of `key: value` lines" in _refusal(read, text)


def test_tags_make_no_objects(read: Any) -> None:
    assert "recipe.yaml:3: output: must be a text" in _refusal(
        read, f"{HEAD}output: !!python/object/apply:os.getcwd []\n"
    )


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("output: café".encode("latin-1"))
    for name, said in (("none.yaml", "`tunesmith init"), ("latin.yaml", "not UTF-8"), (".", "cannot read the recipe")):
        with pytest.raises(RecipeError, match=said):
            load(tmp_path / name)


def test_a_byte_order_mark_and_windows_lines(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"\xef\xbb\xbf" + HEAD.replace("\n", "\r\n").encode())
    assert load(tmp_path / "recipe.yaml").model == "tiny"


@pytest.mark.parametrize(
    ("text", "said"),
    (
        (
            "train:\n  micro_batch_size: many\n",
            "4: train.micro_batch_size: must be a whole number or 'auto', not 'many'",
        ),
        ("train:\n  evaluate_every: 0.5\n", "4: train.evaluate_every: must be a whole number or 'epoch', not '0.5'"),
        (
            "train: {gradient_checkpointing: 1}\n",
            "3: train.gradient_checkpointing: must be true or false or 'auto', not '1'",
        ),
        ("data: {class_weights: 5}\n", "3: data.class_weights: must be 'balanced' or a mapping, not '5'"),
        ("data:\n  class_weights:\n    good: a\n", "5: data.class_weights.good: must be a number, not 'a'"),
        ("data:\n  columns:\n    text: 1.5\n", "5: data.columns.text: must be a text or a whole number, not '1.5'"),
        ("data: {validation: [a]}\n", "3: data.validation: must be a text or a number, not '['a']'"),
        ("technique: {name: lora, r: 0}\n", "3: technique.r: must be at least 1, not '0'"),
        ("train: {schedule: linaer}\n", "3: train.schedule: must be 'linear', 'cosine' or 'constant', not 'linaer'"),
        ("train: {batch_size: true}\n", "3: train.batch_size: must be a whole number, not 'true'"),
        ("train: {seed: 4294967296}\n", "3: train.seed: must be at most 4294967295, not '4294967296'"),
        ("train: {save_every: 0}\n", "3: train.save_every: must be at least 1 or 'epoch', not '0'"),
        ("train: {epochs: 1, max_steps: 2}\n", "3: train: epochs and max_steps both say how long to train; keep one"),
        ("train: 5\n", "3: train: must be a section of keys, not '5'; e.g. train: {epochs: 3}"),
        ("data: a.csv\n", "3: data: must be a section of keys, not 'a.csv'; e.g. data: {train: reviews.csv}"),
        ("output: ''\n", "3: output: must be a text, not ''"),
        ("train: {optimzer: sgd}\n", "3: train.optimzer: unknown key; did you mean 'optimizer'?"),
        ("technique: {name: lora, rnk: 4}\n", "3: technique.rnk: unknown key; did you mean 'r'?"),
        ("technique: {name: lroa}\n", "3: technique: no technique is called 'lroa'; did you mean 'lora'?"),
        ("\nouptut: x\n", "4: ouptut: unknown key; did you mean 'output'?"),
        ("lr: fast\n", "3: lr: must be a number, not 'fast'"),
        ("train:\n\n  lr: fast\n", "5: train.lr: must be a number, not 'fast'"),
        ("num_train_epochs: no\n", "3: num_train_epochs: must be a number, not 'no'"),
        ("bf16: maybe\n", "3: bf16: must be 'auto', 'fp32', 'bf16' or 'fp16', not 'maybe'"),
        (
            "gradient_accumulation_steps: 4\n",
            "3: gradient_accumulation_steps: says nothing by itself; train.batch_size",
        ),
        (
            "per_device_train_batch_size: 0\n",
            "3: per_device_train_batch_size: must be a whole number of at least 1, not '0'",
        ),
    ),
    ids=lambda text: text.split(": ", 1)[-1][:40].strip(),
)
def test_each_mistake_is_one_line_with_its_place(text: str, said: str, read: Any, tmp_path: Path) -> None:
    refusal = _refusal(read, HEAD + text)
    assert refusal.startswith(f"{tmp_path}/recipe.yaml:{said}") and "\n" not in refusal


def test_several_mistakes_are_said_at_once(read: Any) -> None:
    said = _refusal(read, f"{HEAD}train:\n  epochs: -1\n  micro_batch_size: many\n  sede: 1\n").splitlines()
    assert [line.split(":")[1] for line in said] == ["4", "5", "6"] and len(said) == 3


def test_a_value_is_shortened_and_holds_no_control_characters(read: Any) -> None:
    said = _refusal(read, f'{HEAD}train: {{schedule: "{"x" * 500}\\e[31m"}}\n')
    assert len(said) < 300 and "\x1b" not in said


@pytest.mark.parametrize(
    ("missing", "said"), (("task", "task: missing; known: text-class"), ("model", "model: missing; "))
)
def test_what_must_be_said(missing: str, said: str, read: Any) -> None:
    kept = "".join(line for line in HEAD.splitlines(keepends=True) if not line.startswith(missing))
    assert _refusal(read, kept).startswith(said)


@pytest.mark.parametrize("word", ("lr", "=3", "--lr=3=", "lr=[1", "train.sede=1", "nonsense=1"))
def test_mistakes_on_the_command_line(word: str, read: Any) -> None:
    assert _refusal(read, HEAD, word).startswith("command line: ")
