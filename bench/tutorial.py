"""Comparison of a typical tutorial script, run as written on the first 1000 rows of sst2, with tunesmith.

    python -m bench.tutorial --model FOLDER --data-root build/splits --output build/tutorial.json

Arms: `script` (as written), `script-sorted` (rows sorted by class, as film-review files often are, so that the first
1000 rows have one class), `ours`, `ours-sorted`. Values that the script does not print are measured afterwards:
accuracy, share of padding, trainable parameters, and whether the classifier changed. Feeds docs/tutorial-compared.md.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from bench.splits import Rows, read_rows, write_rows

FIRST = 1000
CLI = "import sys; from tunesmith.cli import main; sys.exit(main())"


class Reviews(Dataset[dict[str, torch.Tensor]]):
    """Dataset class of the tutorial."""

    def __init__(self, rows: Rows, tokenizer: Any) -> None:
        texts = [text for text, _ in rows]
        self.encodings = tokenizer(texts, truncation=True, padding="max_length", max_length=128)
        self.labels = [int(label) for _, label in rows]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        item = {key: torch.tensor(values[index]) for key, values in self.encodings.items()}
        return {**item, "labels": torch.tensor(self.labels[index])}


def as_written(model_name: str, rows: Rows, output: str) -> tuple[Any, Reviews]:
    """Run the code of the tutorial unchanged."""
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model = AutoModelForSequenceClassification.from_pretrained(model_name, num_labels=2)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], lora_dropout=0.1)
    model = get_peft_model(model, config)
    model.print_trainable_parameters()
    train_dataset = Reviews(rows[:FIRST], tokenizer)
    arguments = TrainingArguments(
        output_dir=output,
        num_train_epochs=3,
        per_device_train_batch_size=16,
        learning_rate=2e-5,
        logging_steps=50,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=train_dataset)
    trainer.train()
    return model, train_dataset


def script(given: argparse.Namespace, rows: Rows) -> dict[str, Any]:
    """Run the tutorial, capture its output and measure the values that it does not print."""
    torch.manual_seed(given.seed)
    before = AutoModelForSequenceClassification.from_pretrained(given.model, num_labels=2).classifier.weight.clone()
    torch.manual_seed(given.seed)  # same initial classifier weights
    said = io.StringIO()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as output, contextlib.redirect_stdout(said):
        model, data = as_written(given.model, rows, output)
    seconds = time.perf_counter() - begin
    mask = torch.tensor(data.encodings["attention_mask"])
    classifier = model.base_model.model.classifier.weight.detach().cpu()
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {
        "classes_in_training": sorted(set(data.labels)),
        "printed": said.getvalue(),
        "seconds": round(seconds, 1),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "padding_share": 1 - float(mask.float().mean()),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "classifier_learns": any("classifier" in name for name in learning),
        "classifier_changed": not torch.equal(before, classifier),
        **{f"{split}_accuracy": accuracy(model, given, split) for split in ("validation", "test")},
    }


@torch.inference_mode()
def accuracy(model: Any, given: argparse.Namespace, split: str) -> float:
    """Return the accuracy of the model on a split."""
    rows = read_rows(given.folder / f"{split}.csv")
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model.eval()
    right = 0
    for start in range(0, len(rows), 64):
        texts, labels = zip(*rows[start : start + 64], strict=True)
        inputs = tokenizer(list(texts), truncation=True, padding=True, max_length=128, return_tensors="pt")
        answers = model(**inputs.to(model.device)).logits.argmax(-1)
        right += int((answers.cpu() == torch.tensor([int(label) for label in labels])).sum())
    return right / len(rows)


def ours(given: argparse.Namespace, rows: Rows) -> dict[str, Any]:
    """Run `tunesmith train` on the same rows with default settings."""
    with tempfile.TemporaryDirectory() as output:
        train = Path(output) / "reviews.csv"
        write_rows(train, rows[:FIRST])
        words = ["train", "task=text-classification", f"model={given.model}", "technique=lora", f"data.train={train}"]
        words += [f"data.{split}={given.folder / split}.csv" for split in ("validation", "test")]
        words += [f"train.seed={given.seed}", f"output={output}/run", "--json", "--offline"]
        done = subprocess.run([sys.executable, "-c", CLI, *words], capture_output=True, text=True, check=False)
    said = done.stderr.replace(output, "").replace(given.model, Path(given.model).name)
    result = json.loads(done.stdout) if done.stdout.strip() else {}
    return {"exit_code": done.returncode, "printed": said, "result": result}


def by_class(rows: Rows) -> Rows:
    """Return the rows sorted by label, as film-review files often are."""
    return sorted(rows, key=lambda row: row[1])


ARMS: dict[str, Callable[[argparse.Namespace, Rows], dict[str, Any]]] = {
    "script": script,
    "script-sorted": lambda given, rows: script(given, by_class(rows)),
    "ours": ours,
    "ours-sorted": lambda given, rows: ours(given, by_class(rows)),
}


def main() -> None:
    """Run the selected arms and add each result to the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a pretrained BERT-like model")
    parser.add_argument("--data-root", default="build/splits", help="output folder of bench/splits.py")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=tuple(ARMS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("build/tutorial.json"))
    given = parser.parse_args()
    given.folder = Path(given.data_root) / "sst2"
    rows = read_rows(given.folder / "train.csv")
    found = json.loads(given.output.read_text(encoding="utf-8")) if given.output.exists() else {}
    for arm in given.arms:
        found[arm] = {"threads": torch.get_num_threads(), **ARMS[arm](given, rows)}
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        print(arm, json.dumps({key: value for key, value in found[arm].items() if key != "printed"}))


if __name__ == "__main__":
    main()
