"""The command line: words of every verb, stdout, stderr and exit codes."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import typing
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import tunesmith
from tunesmith import recipe, registry
from tunesmith.cli import app as cli
from tunesmith.console import Console
from tunesmith.data.batches import Batches
from tunesmith.models.package_index import FETCHED
from tunesmith.recipe import starter
from tunesmith.studies import doctor

Command = Callable[..., tuple[int, str, str]]
QUICK = ("train.max_steps=2", "train.batch_size=8", "train.precision=fp32", "train.device=cpu")
EVERYWHERE = {"--json", "--quiet", "--verbose", "--debug", "--offline", "--version", "--help"}
RESULT = {
    "run", "task", "technique", "steps", "seconds", "examples_per_second", "tokens_per_second", "trainable_parameters",
    "total_parameters", "peak_memory_bytes", "metrics",
}  # fmt: skip


def _verbs(group: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Map the words of each command to the command."""
    for name, command in group.commands.items():
        yield (*words, name), command
        if hasattr(command, "commands"):
            yield from _verbs(command, (*words, name))


VERBS = dict(_verbs(typer.main.get_command(cli.app)))


@pytest.fixture
def words(tiny_bert: Path, reviews_csv: Path, tmp_path: Path) -> list[str]:
    """Command-line keys of a run of two steps."""
    given = {"task": "text-classification", "model": tiny_bert, "data.train": reviews_csv, "data.test": 0.2}
    return [*(f"{key}={value}" for key, value in given.items()), *QUICK, f"output={tmp_path / 'run'}"]


@pytest.fixture(scope="module")
def finished(tiny_bert: Path, reviews_csv: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    values = {"task": "text-classification", "model": str(tiny_bert), "data": {"train": str(reviews_csv), "test": 0.2}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_HOME", str(folder / "home"))
        tunesmith.train(values, *QUICK, f"output={folder / 'run'}", "limit=40", console=Console(level=-1))
    return folder / "run"


def test_the_verbs_are_those_of_the_interface() -> None:
    wanted = {
        "demo",
        "init",
        "train",
        "evaluate",
        "predict",
        "chat",
        "merge",
        "data",
        "techniques",
        "tasks",
        "models",
        "schema",
        "doctor",
    }
    assert {first for first, *_ in VERBS} == wanted and ("models", "path") in VERBS


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_every_verb_has_the_common_options_and_a_help(verb: tuple[str, ...], command: Command) -> None:
    options = {option for parameter in VERBS[verb].params for option in parameter.opts}
    assert options | {"--help"} >= EVERYWHERE
    code, out, err = command(*verb, "--help")
    assert code == 0 and err == "" and "Usage: tunesmith" in out
    assert "Example" in out and f"tunesmith {' '.join(verb)}" in out


def test_version(command: Command) -> None:
    assert command("--version") == (0, f"tunesmith {tunesmith.__version__}\n", "")


def test_no_arguments_print_the_help(command: Command) -> None:
    code, out, err = command()
    assert code == 2 and "tunesmith demo" in out and err == ""


@pytest.mark.parametrize(
    ("line", "said"),
    (
        ("trian", "no such command 'trian'; did you mean 'train'?"),
        ("models pth", "no such command 'pth'; did you mean 'path'?"),
        ("xyzzy", "no such command 'xyzzy'; see `tunesmith --help`"),
        ("train --jsn", "no such option: --jsn; did you mean '--json'?"),
        ("--hlp", "no such option: --hlp; did you mean '--help'?"),
        ("evaluate --xyzzy", "no such option: --xyzzy; see `tunesmith evaluate --help`"),
        ("train --learning_rate 1", "learning_rate=VALUE"),
        ("train --resume", "option '--resume' requires an argument; "),
        (
            "merge a --output b --method tie",
            "invalid value for '--method': 'tie' is not one of 'linear', 'ties', 'dare'",
        ),
        ("evaluate", "missing argument 'run'; see `tunesmith evaluate --help`"),
        ("train nonsense.yaml", "nonsense.yaml: cannot read the recipe: No such file or directory; "),
        ("train lr=1 nonsense", "'nonsense' is not KEY=VALUE"),
        ("train", "no recipe; "),
        ("train data.limit=9", "model: missing; "),
        ("init nonsense", "no task is called 'nonsense'; "),
        ("init text-classification --technique lroa", "no technique is called 'lroa'; did you mean 'lora'?"),
        ("predict runs/none x", "runs/none: not a run folder; `tunesmith train` creates one"),
        ("evaluate runs/none", "runs/none: not a run folder; `tunesmith train` creates one"),
        ("models path ./none", "./none: model: "),
        ("models path README.md", "README.md: model: "),
        ("train README.md", "; use data.train=README.md for data"),
    ),
)
def test_usage_errors_are_one_line(line: str, said: str, command: Command) -> None:
    code, out, err = command(*line.split())
    assert code == 2 and out == "" and err.count("\n") == 1 and said in err and err.startswith("error: ")


def test_train_as_json(command: Command, words: list[str], tmp_path: Path) -> None:
    code, out, err = command("train", *words, "--json")
    result = json.loads(out)
    assert code == 0 and out.count("\n") == 1 and set(result) >= RESULT
    assert set(result["metrics"]) == {"validation", "test", "baseline"} and result["steps"] == 2
    assert result["run"] == str(tmp_path / "run") and result["metrics"]["test"]["accuracy"] >= 0
    said = r"^epoch 0\.\d+  loss \d\.\d{4}  accuracy \d\.\d{4}  lr \d\.\de-\d\d  [\d.]+ examples/s$"
    assert re.search(said, err, re.M)


def test_train_as_text(command: Command, words: list[str], tmp_path: Path) -> None:
    code, out, err = command("train", *words)
    assert code == 0 and err == "" and not re.search(r"\x1b|\r|^step ", out, re.M)
    assert f": tunesmith train --resume {tmp_path / 'run'}\n" in out
    assert out.splitlines()[-1].endswith(f': tunesmith predict {tmp_path / "run"} "..."')


def test_quiet_and_verbose(command: Command, words: list[str]) -> None:
    assert command("train", *words, "-q") == (0, "", "")
    code, out, _ = command("train", *words, "-v", "--overwrite")
    assert code == 0 and re.findall(r"^step (\d)  loss ", out, re.M) == ["1", "2"]


def test_evaluate(command: Command, finished: Path) -> None:
    scores = {}
    for split, rows in (("train", 28), ("validation", 4), ("test", 8)):
        code, out, err = command("evaluate", str(finished), "--split", split, "--json")
        result = json.loads(out)
        assert code == 0 and err == "" and set(result) >= {"run", "split", "examples", "metrics"}
        assert (result["run"], result["split"], result["examples"]) == (str(finished), split, rows)
        scores[split] = result["metrics"]
    about = json.loads((finished / "run.json").read_text(encoding="utf-8"))
    assert scores["test"] == about["metrics"]["test"] and scores["validation"] == about["metrics"]["validation"]
    code, out, _ = command("evaluate", str(finished))
    assert code == 0 and out.startswith(f"{finished} on test (8 examples): accuracy {scores['test']['accuracy']:.4f}  ")


def test_evaluate_the_base_model(command: Command, finished: Path) -> None:
    code, out, _ = command("evaluate", str(finished), "--base", "--json")
    result = json.loads(out)
    assert code == 0 and result["examples"] == 8 and 0 <= result["metrics"]["accuracy"] <= 1
    own = json.loads(command("evaluate", str(finished), "--json")[1])
    assert result["metrics"]["loss"] != own["metrics"]["loss"]
    assert command("evaluate", str(finished), "--base")[1].startswith("linear probe on the base model on test (8 ")


def test_evaluate_on_another_file(command: Command, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("label,text\npositive,the film was great\nnegative,the film was bad\n")
    code, out, _ = command("evaluate", str(finished), "--data", str(tmp_path / "other.csv"), "--json")
    assert code == 0 and json.loads(out)["examples"] == 2 and json.loads(out)["split"] == str(tmp_path / "other.csv")
    (tmp_path / "other.csv").write_text("label,text\nawful,the film was great\n")
    code, out, err = command("evaluate", str(finished), "--data", str(tmp_path / "other.csv"))
    assert code == 3 and f"{tmp_path / 'other.csv'}:2: label: 'awful' " in err


def test_evaluate_on_a_missing_split(command: Command, finished: Path) -> None:
    code, out, err = command("evaluate", str(finished), "--split", "dev")
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith(f"error: {finished}: ")
    assert all(part in err for part in ("dev", "test, train, validation", "--data FILE"))


def test_evaluate_on_changed_data(command: Command, words: list[str], tmp_path: Path) -> None:
    data = shutil.copy(words[2].partition("=")[2], tmp_path / "mine.csv")
    assert command("train", *words, f"data.train={data}", "-q")[0] == 0
    with open(data, "a", encoding="utf-8") as file:
        file.write("the film was new,positive\n")
    code, _, err = command("evaluate", str(tmp_path / "run"))
    assert code == 3 and err.startswith(f"error: {data}: ") and "sha256" in err


def test_predict_texts(command: Command, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)  # a closed stdin
    texts = ["the film was great", "the plot was poor, 文本 🎉 'x'", "bad"]
    code, out, err = command("predict", str(finished), *texts, "--json")
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and err == "" and [answer["text"] for answer in answers] == texts
    for answer in answers:
        assert set(answer["probabilities"]) == {"negative", "positive"}
        assert answer["score"] == max(answer["probabilities"].values()) == answer["probabilities"][answer["label"]]
    code, out, err = command("predict", str(finished), *texts)
    lines = [f"{one['label']}  {one['score']:.3f}  {text}" for one, text in zip(answers, texts, strict=True)]
    assert code == 0 and err == "" and out.splitlines() == lines
    assert tunesmith.predict(finished, texts) == [
        {key: value for key, value in answer.items() if key != "text"} for answer in answers
    ]


TEXTS = ["the film was great", "bad, very bad", "so, so"]
FILES = {
    "labelled.csv": "label,text\n" + "".join(f'positive,"{text}"\n' for text in TEXTS),
    "unlabelled.csv": "text,id\n" + "".join(f'"{text}",{number}\n' for number, text in enumerate(TEXTS)),
    "rows.jsonl": "".join(json.dumps({"text": text}) + "\n" for text in TEXTS),
    "lines.txt": "\n".join([*TEXTS, ""]),
    "table.txt": "label\ttext\n" + "".join(f"\t{text}\n" for text in TEXTS),
}


@pytest.mark.parametrize("name", FILES)
def test_predict_a_file(name: str, command: Command, finished: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_text(FILES[name], encoding="utf-8")
    code, out, err = command("predict", str(finished), "--input", str(tmp_path / name), "--json")
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and err == "" and [answer["text"] for answer in answers] == TEXTS
    assert answers == [json.loads(line) for line in command("predict", str(finished), *TEXTS, "--json")[1].splitlines()]


GAPS = {
    "lines.txt": "great\n\n  \nbad\n\n",
    "rows.csv": 'text,text_pair\ngreat,so\n,so\n"",""\nbad,so\n" ",\n',
    "rows.jsonl": '{"text": "great"}\n{"text": ""}\n{"text": null, "id": 1}\n{"text": "bad"}\n{"id": 2}\n',
    "broken.jsonl": '{"text": "great"}\n{"text": \n[1]\n{"text": "bad"}\n{"text": ["a"]}\n',
}


@pytest.mark.parametrize("name", GAPS)
def test_predict_prints_a_line_for_each_row(name: str, command: Command, finished: Path, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text(GAPS[name], encoding="utf-8")
    code, out, err = command("predict", str(finished), "--input", str(file), "--json")
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and len(answers) == 5
    assert [answer.get("text") for answer in answers if "label" in answer] == ["great", "bad"]
    assert ["error" in answer for answer in answers] == [False, True, True, False, True]
    first = 3 if name == "rows.csv" else 2  # the header is not a row
    assert answers[1]["error"].startswith(f"{file}:{first}: ")
    assert err.startswith("warning: 3 of 5 rows ") and err.endswith(f" {answers[1]['error']}\n")
    code, out, _ = command("predict", str(finished), "--input", str(file))
    lines = out.splitlines()
    assert code == 0 and len(lines) == 5 and lines[1] == f"(no answer: {answers[1]['error']})"


def test_predict_reports_truncated_texts(command: Command, finished: Path, words: list[str], tmp_path: Path) -> None:
    assert command("train", *words, "max_length=4", "-q")[0] == 0
    run = str(tmp_path / "run")
    code, _, err = command("predict", run, "bad", "the film was great", "so very dull", "-q")
    assert code == 0 and re.fullmatch(r"warning: 2 of 3 texts .*4 tokens.*data\.max_length.*\n", err)


def test_predict_texts_and_a_file_into_a_file(command: Command, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("bad\n", encoding="utf-8")
    target = tmp_path / "answers.jsonl"
    given = ("predict", str(finished), "great", "--input", str(tmp_path / "lines.txt"), "--output", str(target))
    assert command(*given) == (0, "", f"wrote 2 lines to {target}\n")
    written = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    assert [answer["text"] for answer in written] == ["great", "bad"] and "probabilities" in written[0]
    code, out, err = command(*given)
    assert code == 2 and str(target) in err and "overwritten" in err
    target.unlink()
    code, out, err = command(*given, "--json", "-q")
    assert code == 0 and json.loads(out) == {"run": str(finished), "output": str(target), "answers": 2} and err == ""


@pytest.mark.parametrize(
    ("words", "code", "said"),
    (
        ((), 2, "--input FILE"),
        (("--input", "none.csv"), 3, "none.csv: no such file; "),
        (("--input", "none.txt"), 3, "none.txt: no such file; "),
        (("--input", "latin.txt"), 3, "latin.txt"),
        (("--input", "empty.txt"), 3, "empty.txt: "),
        (("--input", "other.csv"), 3, "other.csv"),
        ((" ",), 3, "input 1: text: "),
        (("--input", "gaps.csv"), 3, "gaps.csv:2: text: empty; "),
        (("x", "--output", "none/answers.jsonl"), 2, "none: there is no such folder; "),
        (("x", "--device", "gpu"), 2, "'gpu'; use auto, cpu, "),
    ),
)
def test_predict_refuses(
    words: tuple[str, ...],
    code: int,
    said: str,
    command: Command,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("latin.txt").write_bytes(b"caf\xe9\n")
    Path("empty.txt").write_bytes(b"\n")
    Path("gaps.csv").write_text("text,id\n,1\n,2\n")
    Path("other.csv").write_text("colour,size\nblue,3\nred,4\n")
    left, out, err = command("predict", str(finished), *words)
    assert left == code and out == "" and err.startswith("error: ") and said in err and err.count("\n") == 1


def test_the_lists(command: Command) -> None:
    for kind in typing.get_args(registry.Kind):
        code, out, err = command(f"{kind}s", "--json")
        assert code == 0 and err == "" and list(json.loads(out)) == [f"{kind}s"]
        rows = json.loads(out)[f"{kind}s"]
        assert [row["name"] for row in rows] == registry.names(kind)
        assert all(set(row) == {"name", "description", "keys"} for row in rows)
        said = command(f"{kind}s")[1]
        assert all(name in said for name in registry.names(kind))


def test_models(command: Command, home: Path, tiny_bert: Path) -> None:
    code, out, err = command("models", "--json")
    assert code == 0 and json.loads(out) == {"fetched": [], "converted": {}, "cache": str(home)}
    assert "Nothing fetched so far." in command("models")[1]
    about = {"project": "tiny-bert", "version": "1.0"}
    (home / "pypi" / "tiny-bert-1.0-wheel").mkdir(parents=True)
    (home / "pypi" / "tiny-bert-1.0-wheel" / FETCHED).write_text(json.dumps(about))
    assert json.loads(command("models", "--json")[1])["fetched"] == ["pypi:tiny-bert==1.0"]
    (home / "gguf" / "0123").mkdir(parents=True)
    (home / "gguf" / "0123" / "gguf.json").write_text(json.dumps({"file": "tiny.Q4_1.gguf"}))
    assert f"  tiny.Q4_1.gguf -> {home}/gguf/0123\n" in command("models")[1]
    (home / "gguf" / "0123" / "gguf.json").unlink()
    assert command("models", "path", str(tiny_bert)) == (0, f"{tiny_bert}\n", "")
    code, out, _ = command("models", "path", str(tiny_bert), "--json")
    assert json.loads(out) == {"model": str(tiny_bert), "folder": str(tiny_bert), "revision": None}


def test_schema(command: Command) -> None:
    code, out, err = command("schema")
    assert code == 0 and err == "" and json.loads(out) == starter.schema()
    assert json.loads(command("schema", "--json")[1]) == starter.schema()


def test_doctor(command: Command) -> None:
    code, out, err = command("doctor", "--json")
    report = json.loads(out)
    assert code == 0 and err == ""
    assert list(report) == ["device", "precision", "memory", "processors", "platform", "cache", *doctor.LIBRARIES]
    said = command("doctor")[1].splitlines()
    assert [line.split(maxsplit=1) for line in said] == [[name, value] for name, value in report.items()]


def test_doctor_shows_the_fast_paths_of_a_model(command: Command, tiny_bert: Path) -> None:
    code, out, _ = command("doctor", "--model", str(tiny_bert), "--json")
    paths = json.loads(out)["fast_path"]
    assert code == 0 and paths["unpadded"]["on"] and paths["cuda_graphs"]["reason"]
    lines = command("doctor", "--model", str(tiny_bert))[1].splitlines()
    assert [line.split()[:2] for line in lines[-len(paths) :]] == [
        [name, "on" if path["on"] else "off"] for name, path in paths.items()
    ]


def test_doctor_reports_missing_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LIBRARIES", ("torch", "no-such-library"))
    assert doctor.examine()["no-such-library"] == "not installed"


@pytest.mark.parametrize("technique", registry.names("technique"))
def test_init_writes_a_recipe_that_runs(
    technique: str,
    command: Command,
    tiny_bert: Path,
    reviews_csv: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = command("init", "text-classification", "--technique", technique)
    assert (code, err) == (0, "")
    then, editor = out.splitlines()
    assert then.endswith("then: tunesmith train recipe.yaml")
    assert editor.endswith(": tunesmith schema > tunesmith.schema.json")
    text = Path("recipe.yaml").read_text(encoding="utf-8")
    for key in (
        *recipe.Data.model_fields,
        *recipe.Train.model_fields,
        *registry.get("technique", technique).model_fields,
    ):
        assert re.search(rf"^  (# )?{key}: ", text, re.M), f"{key} is not in the starter"
    shutil.copy(reviews_csv, "train.csv")
    shrunk = (f"model={tiny_bert}", *QUICK)
    code, out, err = command("train", "recipe.yaml", *shrunk, "--json")
    assert code == 0 and json.loads(out)["run"] == f"runs/text-classification-{technique}", err


def test_init_does_not_overwrite(command: Command, tmp_path: Path) -> None:
    target = tmp_path / "mine.yaml"
    code, out, _ = command("init", "text-classification", "--output", str(target), "--json", "-q")
    assert code == 0 and json.loads(out) == {"recipe": str(target)}
    for place, said in ((target, "overwritten"), (tmp_path / "none" / "a.yaml", "there is no such folder")):
        code, out, err = command("init", "text-classification", "--output", str(place))
        assert code == 2 and out == "" and said in err and "; " in err
    assert target.read_text(encoding="utf-8") == starter.starter("text-classification", "lora")


def test_a_bug_exits_with_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def examine() -> None:
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr(doctor, "examine", examine)
    for words, shows in (([], False), (["--debug"], True)):
        monkeypatch.setattr(sys, "argv", ["tunesmith", "doctor", *words])
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capsys.readouterr()
        assert left.value.code == 1 and out == "" and ("Traceback" in err) == shows
        assert err.splitlines()[-1].startswith("error: a bug in tunesmith (ZeroDivisionError: by ")


def test_a_library_warns_on_one_line(
    monkeypatch: pytest.MonkeyPatch, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    def examine() -> dict[str, str]:
        place = "/somewhere/site-packages/library/module.py"
        warnings.warn_explicit("that is  old\nand slow", FutureWarning, place, 1)
        return {"device": "cpu"}

    monkeypatch.setattr(doctor, "examine", examine)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert command("doctor", "--json") == (0, '{"device": "cpu"}\n', "warning: library: that is old and slow\n")


def test_a_user_error_has_a_traceback_with_debug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tunesmith", "evaluate", "runs/none", "--debug"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    err = capsys.readouterr().err
    assert left.value.code == 2 and "Traceback" in err and err.splitlines()[-1].startswith("error: runs/none: ")


@pytest.mark.parametrize(
    ("change", "code", "said"),
    (
        ("train.sede=1", 2, "command line: train.sede: unknown key; did you mean 'seed'?"),
        ("data.train=none.csv", 3, "none.csv: no such file; "),
        ("train.device=cuda:99", 4, "command line: train.device: "),
        ("train.learning_rate=1e30", 5, "a learning rate below "),
    ),
)
def test_exit_codes(change: str, code: int, said: str, command: Command, words: list[str]) -> None:
    left, out, err = command("train", *words, "train.warmup_ratio=0", change, "--json")
    assert left == code and out == "" and said in err.splitlines()[-1]


def test_exit_code_of_a_resume_with_other_keys(command: Command, words: list[str], tmp_path: Path) -> None:
    assert command("train", *words, "-q")[0] == 0
    code, out, err = command("train", "--resume", str(tmp_path / "run"), "train.max_steps=3")
    assert code == 6 and "train.max_steps was '2', is '3'" in err and "--override train.max_steps" in err
    go_on = ("--resume", str(tmp_path / "run"), "train.max_steps=3", "--override", "train.max_steps", "--json")
    assert json.loads(command("train", *go_on)[1])["steps"] == 3
    code, out, err = command("train", "--resume", str(tmp_path / "none"))
    assert code == 6 and f"{tmp_path / 'none'}: " in err
    code, out, err = command("train", "--resume", str(tmp_path))
    assert code == 6 and err.endswith(f"use one of the runs in it: {tmp_path / 'run'}\n")


def test_a_stopped_run_prints_the_resume_command(
    command: Command, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = Batches.micro_batches

    def stopping(batches: Batches, step: int, limits: Any) -> Any:
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return cut(batches, step, limits)

    with monkeypatch.context() as patch:
        patch.setattr(Batches, "micro_batches", stopping)
        code, out, err = command("train", *words, "train.max_steps=5", "--json")
    assert code == 75 and out == "" and "error: " not in err
    found = re.search(r"stopped after step 2 of 5; .*: (tunesmith .*)$", err, re.M)
    assert found is not None and not (tmp_path / "run" / "README.md").exists()
    code, out, err = command(*shlex.split(found[1])[1:], "--json")
    assert code == 0 and json.loads(out)["steps"] == 5
    _, _, whole = command("train", *words, "train.max_steps=5", "--json", "--overwrite")
    losses = [re.findall(r"^epoch \S+  loss (\S+)", said, re.M) for said in (err, whole)]
    assert losses[0] == losses[1] and len(losses[0]) == 1, "the loss is that of all steps, not of those since"


def test_predict_refuses_an_unfinished_run(command: Command, words: list[str], tmp_path: Path) -> None:
    assert command("train", *words, "train.learning_rate=1e30", "train.warmup_ratio=0")[0] == 5
    code, out, err = command("predict", str(tmp_path / "run"), "x")
    assert code == 2 and f"`tunesmith train --resume {tmp_path / 'run'}`" in err


def test_a_closed_pipe_is_not_an_error(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", encoding="utf-8") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setattr(sys, "argv", ["tunesmith", "techniques"])
        with pytest.raises(SystemExit) as left:
            cli.main()
    assert left.value.code == 141 and capsys.readouterr().err == ""


def test_shell_completion(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tunesmith"])
    for shell, sign in (("bash", "complete -o default -F"), ("zsh", "#compdef tunesmith"), ("fish", "complete ")):
        monkeypatch.setenv("_TUNESMITH_COMPLETE", f"source_{shell}")
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert not left.value.code and sign in capsys.readouterr().out
    monkeypatch.setenv("_TUNESMITH_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "tunesmith t")
    monkeypatch.setenv("COMP_CWORD", "1")
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().out.split() == ["train", "techniques", "tasks"]


@pytest.mark.parametrize("verb", ("train", "predict"))
@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT))
def test_a_signal_before_the_run_starts(verb: str, number: signal.Signals) -> None:
    code = (
        "import os, signal, sys\nfrom tunesmith.cli import app as cli\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"cli.app = lambda **_: os.kill(os.getpid(), {int(number)}); sys.argv = ['tunesmith', '{verb}']; cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if verb == "train":
        assert (done.returncode, done.stdout) == (
            75,
            "",
        ) and "--resume RUN" in done.stderr
    else:
        assert done.returncode in (130, -signal.SIGTERM) and done.stderr == ""
