"""YAML 1.2 with the line of each key; malformed YAML and YAML that would exhaust memory are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.errors import RecipeError
from tunesmith.recipe import yaml
from tunesmith.recipe.yaml import read_file, read_mapping, read_words, to_yaml


@pytest.fixture
def read(tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    """`read(text)`: return the values of a recipe with this text."""

    def of(text: str) -> dict[str, Any]:
        (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
        return read_file(tmp_path / "recipe.yaml")[0]

    return of


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
    for values in (read(f"train: {{rate: {text}}}\n"), read_words([f"train.rate={text}"])[0]):
        assert values == {"train": {"rate": value}} and type(values["train"]["rate"]) in (int, float)


@pytest.mark.parametrize(
    "text",
    ("no", "yes", "on", "off", "y", "NO", "12:30", "1:30:45", "2024-01-02", "2024-01-02T03:04:05", "~x", "1e", "v1.0"),
)
def test_yaml_1_1_literals_are_strings(text: str, read: Any) -> None:
    found = read(f"output: {text}\ndata: {{train: {text}}}\n")
    assert found == {"output": text, "data": {"train": text}} and type(found["output"]) is str


@pytest.mark.parametrize(("text", "value"), (("010", 10), ("0o10", 8), ("0x1F", 31), ("+7", 7)))
def test_integers_are_those_of_yaml_1_2(text: str, value: int, read: Any) -> None:
    found = read(f"seed: {text}\n")["seed"]
    assert found == value and type(found) is int


def test_duplicate_keys(read: Any) -> None:
    with pytest.raises(RecipeError, match=r"recipe.yaml:4: epochs: duplicate key; "):
        read("train:\n  epochs: 1\n  seed: 0\n  epochs: 2\n")


def test_yaml_aliases_are_read(read: Any) -> None:
    text = "data: {train: &file a.csv, test: *file}\ntrain: {<<: {seed: 3}, epochs: 2}\n"
    assert read(text) == {"data": {"train": "a.csv", "test": "a.csv"}, "train": {"seed": 3, "epochs": 2}}


BOMB = "x: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"x{n}: &a{n} [{','.join([f'*a{n - 1 if n else str()}'] * 9)}]\n" for n in range(9)
)


@pytest.mark.parametrize(
    ("text", "said"),
    (
        (BOMB, "1,000 values"),
        ("x: &a 1\ny: [" + ", ".join(["*a"] * 101) + "]\n", "at most 100 YAML aliases"),
        ("x: [" + "1," * 1001 + "]", "1,000 values"),
        ("x: " + "[" * 30 + "]" * 30, "at most 20 levels"),
        ("x: " + "[" * 5000, "recipe.yaml:1: .* at most 20 levels"),
        ("x: " + "a" * 2**20, "at most 1 MiB"),
        ("x: [1\n", "recipe.yaml:2: not valid YAML"),
        ("\tx: 1\n", "recipe.yaml:1: not valid YAML"),
        ("x: 1\n---\ny: 2\n", "not valid YAML"),
        ("x: *nobody\n", "recipe.yaml:1: not valid YAML"),
    ),
    ids=lambda text: text[:12],
)
def test_hostile_and_broken_yaml(text: str, said: str, read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yaml, "MAX_YAML_VALUES", 1000)
    with pytest.raises(RecipeError, match=said):
        read(text)


@pytest.mark.parametrize("text", ("", "just words", "- a\n- list\n", "# nothing\n", "{}\n"))
def test_files_that_are_not_recipes(text: str, read: Any) -> None:
    with pytest.raises(RecipeError, match="recipe.yaml:1: .*`key: value`"):
        read(text)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("output: café".encode("latin-1"))
    for name, said in (("none.yaml", "`tunesmith init"), ("latin.yaml", "not UTF-8"), (".", "cannot read the recipe")):
        with pytest.raises(RecipeError, match=said):
            read_file(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    (
        ("a.csv", "text,label\ngood,1\n", "1: .*data.train={}"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b"}\n', "not valid YAML: .*; .*data.train={}"),
        ("a.json", '[{"text": "a"}]', "1: .*data.train={}"),
        ("a.parquet", b"PAR1\x15\xff", "cannot read the recipe: not UTF-8; .*data.train={}"),
        ("a.tsv", "a\t1\n" * 2**19, "at most 1 MiB; .*data.train={}"),
        ("folder", None, "cannot read the recipe: Is a directory; .*data.train={} .*--resume {}"),
        ("a.yaml", "just words", "1: .*`tunesmith init TASK`"),
    ),
)
def test_data_given_as_a_recipe(name: str, text: str | bytes | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if text is None:
        path.mkdir()
    else:
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(RecipeError, match=said.replace("{}", str(path))):
        read_file(path)


WORDS = ("technique=lora", "technique.r=4", "train.epochs=2", "train={seed: 1}", "stages.2.technique.r=8")


@pytest.mark.parametrize("words", (WORDS, WORDS[::-1], WORDS[2:] + WORDS[:2]))
def test_the_order_of_words_does_not_matter(words: tuple[str, ...]) -> None:
    tree, where = read_words(words)
    technique, train = {"name": "lora", "r": 4}, {"epochs": 2, "seed": 1}
    assert tree == {"technique": technique, "train": train, "stages": {"2": {"technique": {"r": 8}}}}
    assert where(("technique", "r")) == "command line: technique.r"


def test_the_later_of_two_words_takes_precedence() -> None:
    assert read_words(["a.b=1", "a.b=2"])[0] == {"a": {"b": 2}} == read_words(["a={b: 1}", "a={b: 2}"])[0]
    with pytest.raises(RecipeError, match=r"command line: a.b: a is .*'3', .*; "):
        read_words(["a.b=1", "a=3"])


def test_byte_order_mark_and_crlf(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"\xef\xbb\xbftask: some\r\nmodel: tiny\r\n")
    assert read_file(tmp_path / "recipe.yaml")[0] == {"task": "some", "model": "tiny"}


def test_each_key_has_its_place(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: tiny\ntrain:\n  <<: {seed: 3}\n\n  epochs: 2\n", encoding="utf-8")
    places = [read_file(path)[1], read_mapping({"train": {"epochs": 2}})[1], read_words(["train.epochs=2"])[1]]
    key = ("train", "epochs")
    written = [place(key).removesuffix(": train.epochs") for place in places]
    assert written == [f"{path}:5", "recipe", "command line"]
    assert places[0](("train", "seed")) == f"{path}:2: train.seed", "merged in from elsewhere: the line of its section"


def test_to_yaml_round_trips(read: Any) -> None:
    tree = {"model": "no", "data": {"train": "1:30", "columns": None, "path": "a " * 99}, "list": ["a", 2e-5, True]}
    assert read(to_yaml(tree)) == tree
