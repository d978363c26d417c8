"""Evaluation of a finished run: equal scores on its splits, scores on other files, and the base model."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from sklearn.metrics import accuracy_score, f1_score

import tunesmith
from tunesmith.console import Console
from tunesmith.errors import DataError, RecipeError
from tunesmith.testing import sample_row


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, reviews_csv: Path
) -> tuple[Path, dict[str, Any]]:
    """Folder and result of a LoRA run on data of its own that skips bad rows."""
    folder = tmp_path_factory.mktemp("score")
    given = {
        "task": "text-classification",
        "model": str(tiny_bert),
        "data": {"train": str(shutil.copy(reviews_csv, folder)), "validation": 0.2, "test": 0.2, "on_bad_row": "skip"},
        "technique": "lora",
        "train": {"max_steps": 4, "batch_size": 8, "precision": "fp32", "device": "cpu"},
        "output": str(folder / "run"),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_HOME", str(folder / "home"))
        return folder / "run", tunesmith.train(given, console=Console(level=-1))


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("split", ("validation", "test"))
def test_its_own_splits_score_as_they_did(split: str, finished: Any) -> None:
    folder, result = finished
    scored = tunesmith.evaluate(folder, split=split)
    assert scored["metrics"] == result["metrics"][split]
    assert (scored["run"], scored["split"], scored["examples"], scored["base"]) == (str(folder), split, 12, False)


def test_the_training_rows_can_be_scored_too(finished: Any) -> None:
    assert tunesmith.evaluate(finished[0], split="train")["examples"] == 36


def test_another_file_is_scored_by_its_labels(finished: Any, tmp_path: Path) -> None:
    rows = [sample_row("text-classification", number) for number in range(100, 117)]
    rows[3]["label"] = "positive"
    scored = tunesmith.evaluate(finished[0], data=_write(tmp_path / "other.csv", rows))
    said = [answer["label"] for answer in tunesmith.predict(finished[0], [str(row["text"]) for row in rows])]
    labels = [row["label"] for row in rows]
    assert scored["examples"] == 17 and scored["split"] == str(tmp_path / "other.csv")
    assert scored["metrics"]["accuracy"] == pytest.approx(accuracy_score(labels, said))
    assert scored["metrics"]["f1_macro"] == pytest.approx(f1_score(labels, said, average="macro"))


def test_a_folder_gives_its_file_of_the_split(finished: Any, tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\nthe film was great,positive\n")
    (tmp_path / "test.csv").write_text("text,label\nthe film was bad,negative\nit was great,positive\n")
    assert tunesmith.evaluate(finished[0], data=tmp_path)["examples"] == 2
    assert tunesmith.evaluate(finished[0], data=tmp_path, split="train")["examples"] == 1
    with pytest.raises(DataError, match=f"{tmp_path}: no validation file .*; .*--split test or train"):
        tunesmith.evaluate(finished[0], data=tmp_path, split="validation")


def test_a_limit_for_trials_is_none_of_another_file(finished: Any, tmp_path: Path) -> None:
    run = shutil.copytree(finished[0], tmp_path / "run")
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("  limit:\n", "  limit: 5\n"))
    assert (run / "recipe.yaml").read_text() != recipe
    rows = [sample_row("text-classification", number) for number in range(100, 117)]
    assert tunesmith.evaluate(run, data=_write(tmp_path / "other.csv", rows))["examples"] == 17


def test_rows_of_another_file_that_cannot_be_scored_are_left_out_and_said(
    finished: Any, command: Any, tmp_path: Path
) -> None:
    rows = [sample_row("text-classification", number) for number in range(10)]
    rows[2]["label"], rows[5]["text"] = "undecided", ""
    path = str(_write(tmp_path / "other.csv", rows))
    code, out, err = command("evaluate", str(finished[0]), "--data", path, "--json")
    assert code == 0 and json.loads(out)["examples"] == 8
    assert "undecided" not in err and "1 row (unusable label)" in err and "1 row (empty text)" in err


def test_a_class_that_another_file_lacks_has_no_say(finished: Any, tmp_path: Path) -> None:
    rows = [sample_row("text-classification", number) for number in range(1, 20, 2)]
    metrics = tunesmith.evaluate(finished[0], data=_write(tmp_path / "other.csv", rows))["metrics"]
    assert metrics["accuracy"] == metrics["balanced_accuracy"] and "auroc" not in metrics


def test_the_base_scores_the_same_whatever_was_trained(finished: Any, recipe_of: Any, tmp_path: Path) -> None:
    recipe = recipe_of("data.test=0.2", "train.max_steps=1", "train.epochs=null", "technique=full")
    tunesmith.train(recipe, console=Console(level=-1))
    by_lora = tunesmith.evaluate(finished[0], base=True)
    by_full = tunesmith.evaluate(tmp_path / "run", base=True)
    assert by_lora["metrics"] == by_full["metrics"] and by_lora["base"] is True
    assert by_lora["metrics"].keys() == finished[1]["metrics"]["test"].keys()
    assert by_lora["run_metrics"] == finished[1]["metrics"]["test"], "and the run's own stand beside it"


def test_what_the_command_prints(finished: Any, command: Any) -> None:
    folder, result = finished
    code, out, _ = command("evaluate", str(folder))
    accuracy = result["metrics"]["test"]["accuracy"]
    assert code == 0 and out.startswith(f"{folder} on test (12 examples): accuracy {accuracy:.4f}  ")
    code, out, _ = command("evaluate", str(folder), "--split", "validation", "--json")
    scored = json.loads(out)
    assert code == 0 and out.count("\n") == 1 and {"run", "split", "examples", "metrics"} <= scored.keys()
    assert scored["metrics"] == result["metrics"]["validation"]
    code, out, _ = command("evaluate", str(folder), "--base")
    before, own, baseline = out.splitlines()
    assert code == 0 and before.startswith("linear probe on the base model on test (12 examples): accuracy ")
    assert own.startswith(f"{folder} on test (12 examples): accuracy {accuracy:.4f}  ")
    assert baseline.startswith("majority-class baseline: accuracy 0.5000  ")


def test_a_run_without_a_test_split_is_scored_on_validation(recipe_of: Any, tmp_path: Path) -> None:
    folder = tunesmith.train(recipe_of(), "data.test=null", output=str(tmp_path / "no-test"))["run"]
    assert tunesmith.evaluate(folder)["split"] == "validation"


def test_a_split_that_the_run_lacks_is_refused(finished: Any) -> None:
    with pytest.raises(RecipeError, match="no dev split; .*test, train, validation.*--data"):
        tunesmith.evaluate(finished[0], split="dev")


def test_a_file_without_labels_is_refused(finished: Any, tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("text\na film\nanother\n")
    with pytest.raises(DataError, match="other.csv:1: no column for label"):
        tunesmith.evaluate(finished[0], data=tmp_path / "other.csv")


def test_data_that_changed_since_are_refused(finished: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished[0].parent, tmp_path / "copy"))
    recipe = folder / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(finished[0].parent), str(folder)))
    tunesmith.evaluate(folder / "run")
    with (folder / "reviews.csv").open("a") as file:
        file.write("one more film,positive\n")
    with pytest.raises(DataError, match="reviews.csv: .*changed since training; .*--data"):
        tunesmith.evaluate(folder / "run")
