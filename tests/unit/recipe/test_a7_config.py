"""Twenty kinds of bad configuration: each works, or is refused with file, line, key, value and fix."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from messages import has_parts
from safetensors.torch import save_file

from tunesmith.training import machine

Refuse = Callable[..., str]
Run = Callable[..., Path]
QUICK = ("train.max_steps=2", "train.batch_size=8", "train.precision=fp32", "train.device=cpu", "data.limit=24")


@pytest.fixture
def refuse(command: Any, reviews_csv: Path, tmp_path: Path) -> Refuse:
    """Return the one-line error of `tunesmith train recipe.yaml` for a recipe with `text` from the second line on.

    By default the model does not exist, so an error shows that the recipe is checked before the model is resolved.
    """

    def said(text: str, *words: str, model: object = "org/none", code: int = 2) -> str:
        (tmp_path / "recipe.yaml").write_text(f"task: text-classification\n{text}", encoding="utf-8")
        given = {"output": tmp_path / "run", "data.train": reviews_csv}
        fill = [f"{key}={value}" for key, value in given.items() if f"{key.removeprefix('data.')}: " not in text]
        left, out, err = command("train", str(tmp_path / "recipe.yaml"), f"model={model}", *fill, *words)
        assert left == code and out == "" and err.count("\n") == 1, err
        assert not (tmp_path / "run" / "recipe.yaml").exists(), "refused before there is a run"
        return err.strip().removeprefix("error: ").replace(f"{tmp_path}/", "")

    return said


@pytest.fixture
def run(command: Any, tiny_bert: Path, reviews_csv: Path, tmp_path: Path) -> Run:
    """Return the folder of a finished run of two steps with these words."""

    def finished(*words: str) -> Path:
        given = ["task=text-classification", f"model={tiny_bert}", f"data.train={reviews_csv}", *QUICK]
        code, out, err = command("train", "--json", *given, f"output={tmp_path / 'run'}", *words)
        assert code == 0, err
        return Path(json.loads(out)["run"])

    return finished


def _logged(folder: Path, key: str) -> dict[int, Any]:
    """Map each step to its value of `key` in `metrics.jsonl`."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


@pytest.mark.parametrize("section", ("", "train", "data", "technique", "task"))
def test_c1_an_unknown_key(section: str, refuse: Refuse) -> None:
    text = f"{section}:\n  shade: blue\n" if section not in ("", "task") else "shade: blue\n"
    word = ("task.shade=blue",) if section == "task" else ()
    said = refuse(text if not word else "", *word)
    place = {"": "recipe.yaml:2: shade", "task": "command line: task.shade"}
    assert has_parts(said, f"{place.get(section, f'recipe.yaml:3: {section}.shade')}: ", "unknown key", "; known: ")


@pytest.mark.parametrize(
    ("text", "key", "meant"),
    (
        ("train: {epohcs: 1}\n", "train.epohcs", "epochs"),
        ("epohcs: 1\n", "epohcs", "epochs"),
        ("data: {max_lenght: 64}\n", "data.max_lenght", "max_length"),
        ("technique: {name: lora, rnk: 8}\n", "technique.rnk", "r"),
        ("technique: {name: lora, target_module: [query]}\n", "technique.target_module", "target_modules"),
        ("num_train_epoch: 1\n", "num_train_epoch", "num_train_epochs"),
        ("techniqe: lora\n", "techniqe", "technique"),
    ),
)
def test_c2_a_typo(text: str, key: str, meant: str, refuse: Refuse) -> None:
    assert has_parts(refuse(text), f"recipe.yaml:2: {key}: ", "unknown key", f"; did you mean '{meant}'?")


def test_c2_a_typo_in_a_name(refuse: Refuse) -> None:
    parts = "'lroa'", "; did you mean 'lora'?"
    assert has_parts(refuse("technique: lroa\n"), "recipe.yaml:2: technique: ", *parts)
    assert has_parts(refuse("", "technique=lroa"), "command line: technique: ", *parts)


def test_c3_an_exponent_is_a_number(run: Run) -> None:
    assert max(_logged(run("train.learning_rate=1e-4", "train.schedule=constant"), "learning_rate").values()) == 1e-4


def test_c3_in_quotes_it_is_a_text(refuse: Refuse) -> None:
    said = refuse("train:\n  learning_rate: '1e-4'\n")
    assert has_parts(said, "recipe.yaml:3: train.learning_rate: ", "number", "'1e-4'", "; ", "quotes")


@pytest.mark.parametrize(
    ("value", "wanted"),
    (
        (".nan", "a finite number, not 'nan'"),
        (".inf", "a finite number, not 'inf'"),
        ("-.inf", "a finite number, not '-inf'"),
        ("-1e-4", "above 0, not '-0.0001'"),
        ("0", "above 0, not '0'"),
        ("0.0", "above 0, not '0.0'"),
        ("1e999", "a finite number, not 'inf'"),
    ),
)
@pytest.mark.parametrize("key", ("learning_rate", "head_learning_rate"))
def test_c4_a_rate_that_is_none(key: str, value: str, wanted: str, refuse: Refuse) -> None:
    assert refuse(f"train:\n  {key}: {value}\n") == f"recipe.yaml:3: train.{key}: must be {wanted}"


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    (
        ("train.epochs", "true", "a number"),
        ("train.batch_size", "true", "an integer"),
        ("train.batch_size", "8.5", "an integer"),
        ("train.seed", "false", "an integer"),
        ("train.max_grad_norm", "true", "a number"),
        ("data.limit", "true", "an integer"),
        ("technique.r", "true", "an integer"),
        ("technique.dora", "1", "true or false"),
        ("technique.rslora", "yes", "true or false"),
        ("train.gradient_checkpointing", "0", "true or false or 'auto'"),
    ),
)
def test_c5_a_switch_is_no_number_and_a_number_no_switch(key: str, value: str, wanted: str, refuse: Refuse) -> None:
    section, name = key.split(".")
    assert refuse(f"{section}:\n  {name}: {value}\n") == f"recipe.yaml:3: {key}: must be {wanted}, not '{value}'"


def test_c6_steps_and_epochs(refuse: Refuse) -> None:
    said = refuse("train:\n  epochs: 1\n  max_steps: 100\n")
    assert said.startswith("recipe.yaml:3: train: epochs and max_steps ")
    assert "epochs and max_steps" in refuse("", "train.epochs=1", "max_steps=100")


def test_c6_one_of_them_can_be_dropped_on_the_command_line(run: Run) -> None:
    assert sorted(_logged(run("train.max_steps=null", "train.epochs=1"), "loss")) == [1, 2, 3]


@pytest.mark.parametrize("value", ("1", "1.5", "500"))
def test_c7_a_warm_up_longer_than_the_run(value: str, refuse: Refuse) -> None:
    said = refuse(f"train:\n  warmup_ratio: {value}\n")
    assert said == f"recipe.yaml:3: train.warmup_ratio: must be below 1, not '{value}'"


def test_c7_steps_of_warm_up_are_no_key(refuse: Refuse) -> None:
    said = refuse("warmup_steps: 500\n")
    assert has_parts(said, "recipe.yaml:2: warmup_steps: ", "unknown key", "; did you mean 'warmup_ratio'?")


def test_c7_a_warm_up_as_long_as_the_run_rises_to_its_end(run: Run) -> None:
    folder = run("train.warmup_ratio=0.99", "train.learning_rate=4e-4", "train.max_steps=4")
    assert list(_logged(folder, "learning_rate").values()) == pytest.approx([1e-4, 2e-4, 3e-4, 4e-4])


def test_c8_evaluation_and_saving_need_no_common_multiple(run: Run) -> None:
    folder = run("train.evaluate_every=3", "train.save_every=4", "train.keep_checkpoints=10", "train.max_steps=8")
    assert sorted(_logged(folder, "validation/loss")) == [3, 6, 8], "and the end is always scored"
    saved = {int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*")}
    best = json.loads((folder / "checkpoints" / "best.json").read_text())["step"]
    assert saved >= {4, 8, best} and best in (3, 6, 8), "the best is saved when it is found"


@pytest.mark.parametrize(
    ("target", "fix"),
    (
        (
            "qery",
            "did you mean 'query'? roles: attention_output, key, mlp_down, mlp_up, query, value; modules: dense, ",
        ),
        ("q_proj", "roles: attention_output, key, mlp_down, mlp_up, query, value; modules: dense, "),
        ("classifier", "remove it"),
    ),
)
def test_c9_a_target_that_matches_nothing(target: str, fix: str, refuse: Refuse, tiny_bert: Path) -> None:
    said = refuse(f"technique:\n  name: lora\n  target_modules: [value, {target}]\n", model=tiny_bert)
    assert said.startswith(f"recipe.yaml:4: technique.target_modules: '{target}' ") and f"; {fix}" in said


@pytest.mark.parametrize("value", ("[]", "null", "5"))
def test_c9_no_target_at_all(value: str, refuse: Refuse) -> None:
    said = refuse(f"technique:\n  name: lora\n  target_modules: {value}\n")
    assert said.startswith("recipe.yaml:4: technique.target_modules: must be ")


@pytest.mark.parametrize("value", ("0", "-8"))
def test_c10_a_rank_of_nothing(value: str, refuse: Refuse) -> None:
    said = refuse(f"technique:\n  name: lora\n  r: {value}\n")
    assert said == f"recipe.yaml:4: technique.r: must be at least 1, not '{value}'"


@pytest.mark.parametrize(
    ("keys", "parts"),
    (
        ("head_only: false", ("technique: ", "head_only: true", "last_n_blocks")),
        ("last_n_blocks: 0", ("technique.last_n_blocks: ", "at least 1", "'0'")),
    ),
)
def test_c11_nothing_that_would_learn(keys: str, parts: tuple[str, ...], refuse: Refuse) -> None:
    line = 4 if parts[0].startswith("technique.") else 3
    said = refuse(f"technique:\n  name: freeze\n  {keys}\n")
    assert has_parts(said, f"recipe.yaml:{line}: {parts[0]}", *parts[1:])


def test_c12_more_blocks_to_open_than_there_are(refuse: Refuse, tiny_bert: Path) -> None:
    said = refuse("technique:\n  name: freeze\n  last_n_blocks: 9\n", model=tiny_bert)
    assert said.startswith("recipe.yaml:4: technique.last_n_blocks: 9 ") and said.endswith("1 to 3")


def test_c13_fp16_on_a_cpu(refuse: Refuse) -> None:
    said = refuse("train:\n  precision: fp16\n  device: cpu\n")
    assert said.startswith("recipe.yaml:3: train.precision: fp16 ") and said.endswith("; use bf16, fp32 or auto")
    assert refuse("fp16: true\ntrain: {device: cpu}\n").startswith("recipe.yaml:2: fp16: fp16 ")


def test_c14_bf16_on_a_gpu_without_it(refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    said = refuse("train:\n  precision: bf16\n  device: cuda\n")
    assert said.startswith("recipe.yaml:3: train.precision: ") and said.endswith("bf16; use fp16, fp32 or auto")


def test_c14_bf16_on_a_cpu_that_is_slow_at_it_is_taken_only_when_asked_for(
    command: Any, tiny_bert: Path, reviews_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert machine.find("cpu", "auto").precision == "fp32"
    given = ["task=text-classification", f"model={tiny_bert}", f"data.train={reviews_csv}", *QUICK]
    code, _, err = command("train", "--json", *given, f"output={tmp_path / 'run'}", "train.precision=bf16")
    assert code == 0
    assert re.search(r"^warning: train\.precision: .*bf16.*; use auto$", err, re.M)
    about = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert about["hardware"]["precision"] == "bf16"


@pytest.mark.parametrize(
    ("kind", "parts"),
    (
        ("whisper", ("SequenceClassification", "; ", "another model")),
        ("nobody", ("transformers", "'nobody'", "; upgrade transformers")),
    ),
    ids=("a7_c15", "unknown"),
)
def test_c15_a_model_that_cannot_do_the_task(kind: str, parts: tuple[str, ...], refuse: Refuse, tmp_path: Path) -> None:
    assert has_parts(refuse("", model=_model_of_kind(kind, tmp_path)), f"command line: model: {kind}: ", *parts)


def test_c16_a_model_of_pictures(refuse: Refuse, tmp_path: Path) -> None:
    said = refuse("", model=_model_of_kind("vit", tmp_path))
    assert has_parts(said, "command line: model: vit: ", "SequenceClassification", "; ", "another model")


def _model_of_kind(kind: str, folder: Path) -> Path:
    """Write a folder with the config of that kind of model and weights that fit none."""
    (folder / kind).mkdir()
    (folder / kind / "config.json").write_text(json.dumps({"model_type": kind}))
    save_file({"weight": torch.zeros(1)}, folder / kind / "model.safetensors")
    return folder / kind


def test_c16_a_picture_as_data(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + bytes(range(256)))
    said = refuse("", f"data.train={tmp_path / 'photo.png'}", code=3)
    assert said.startswith("photo.png") and "; " in said


def test_c16_a_folder_of_pictures(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "pictures" / "cat").mkdir(parents=True)
    (tmp_path / "pictures" / "cat" / "1.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    said = refuse("", f"data.train={tmp_path / 'pictures'}", code=3)
    assert has_parts(said, "pictures: ", "train file", "; ", "train.csv")


def test_c17_a_folder_that_is_not_empty(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    said = refuse(f"output: {tmp_path / 'full'}\n")
    assert said.startswith("recipe.yaml:2: output: full: ")
    assert all(way in said for way in ("--resume full", "--overwrite", "output=DIR"))
    said = refuse(f"output: {tmp_path / 'full'}\n", "--overwrite")
    assert said.startswith("recipe.yaml:2: output: full: ") and "output=DIR" in said
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]


def test_c17_an_earlier_run_is_replaced_only_when_told_to(run: Run, command: Any) -> None:
    folder = run("train.seed=1")
    before = (folder / "recipe.yaml").read_bytes()
    words = ["task=text-classification", "model=org/none", f"output={folder}"]
    assert command("train", *words)[0] == 2 and (folder / "recipe.yaml").read_bytes() == before
    assert command("train", *words, "--overwrite")[0] == 2, "what is not found replaces nothing"
    assert (folder / "recipe.yaml").read_bytes() == before and (folder / "run.json").exists()
    assert "seed: 2" in (run("train.seed=2", "--overwrite") / "recipe.yaml").read_text(encoding="utf-8")


def test_c17_a_file_where_the_folder_should_be(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    said = refuse("", f"output={tmp_path / 'taken'}", code=4)
    assert said.startswith("taken: ") and "output=DIR" in said


@pytest.mark.parametrize("name", ('it\'s "a" $(b) ñ 文件 🎉 100%', "a=b"))
def test_c18_unusual_names_of_files_and_folders(
    name: str, command: Any, tiny_bert: Path, reviews_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    room = Path(name)
    room.mkdir()
    (room / "model").symlink_to(tiny_bert)
    (room / "data.csv").write_bytes(reviews_csv.read_bytes())
    recipe = {"task": "text-classification", "model": f"./{room}/model", "output": f"{room}/run"}
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in recipe.items()]
    lines.append(f"train_file: {json.dumps(f'{room}/data.csv', ensure_ascii=False)}\n")
    (room / "recipe.yaml").write_text("".join(lines), encoding="utf-8")
    code, out, err = command("train", str(room.absolute() / "recipe.yaml"), *QUICK)
    assert code == 0, err
    printed = [shlex.split(line[line.index("tunesmith ") :]) for line in out.splitlines() if "tunesmith " in line]
    assert ["tunesmith", "train", "--resume", f"{room}/run"] in printed
    assert ["tunesmith", "predict", f"{room}/run"] in [words[:3] for words in printed]
    card = (room / "run" / "README.md").read_text(encoding="utf-8")
    for lines in re.findall(r"^```python\n(.*?)^```$", card, re.S | re.M):
        named = {node.value for node in ast.walk(ast.parse(lines)) if isinstance(node, ast.Constant)}
        assert named & {f"{room}/run", f"{room}/run/base"}
    code, out, err = command("predict", "--", f"{room}/run", "the film was great")
    assert code == 0 and out.endswith("the film was great\n"), err


def test_c19_the_home_folder(run: Run, reviews_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.csv").write_bytes(reviews_csv.read_bytes())
    folder = run("data.train=~/mine.csv", "output=~/runs/a")
    assert folder == tmp_path / "runs" / "a" and (folder / "run.json").exists()
    assert f"train: {tmp_path}/mine.csv" in (folder / "recipe.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("value", ("$HOME/x", "${HOME}/x", "runs/$NOBODY"))
@pytest.mark.parametrize("key", ("output", "data.train", "data.validation", "data.test"))
def test_c19_a_variable_is_refused_rather_than_made_a_folder_of_that_name(key: str, value: str, refuse: Refuse) -> None:
    section, _, name = key.rpartition(".")
    text = f"{section}:\n  {name}: {value}\n" if section else f"{key}: {value}\n"
    name = value.partition("/")[0] if value.startswith("$") else "$NOBODY"
    said = refuse(text)
    assert has_parts(said, f"recipe.yaml:{3 if section else 2}: {key}: ", name, "not expanded", "; ")


def test_c19_a_file_of_such_a_name_is_read(run: Run, reviews_csv: Path, tmp_path: Path) -> None:
    (tmp_path / "in $US.csv").write_bytes(reviews_csv.read_bytes())
    assert (run(f"data.train={tmp_path / 'in $US.csv'}") / "run.json").exists()


def test_c20_a_seed_of_more_than_32_bits(refuse: Refuse) -> None:
    for value in ("4294967296", "-1", "18446744073709551616"):
        said = refuse(f"train:\n  seed: {value}\n")
        bound = "at least 0" if value == "-1" else "at most 4294967295"
        assert said == f"recipe.yaml:3: train.seed: must be {bound}, not '{value}'"


def test_c20_the_largest_seed_works(run: Run) -> None:
    folder = run("train.seed=4294967295")
    assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["seed"] == 2**32 - 1
