"""Train, validation and test splits that all arms of `bench/` read: one folder per data set, as CSV (`text,label`) or,
for entities, CoNLL files with one word, a tab and its tag per line.

    python -m bench.splits --source DATA --output build/splits

Public splits are kept (sst2, wnut17, ncbi_disease); the others are stratified random splits with seed 0. Empty texts
are dropped and whitespace is normalized, so that all arms read identical rows.
"""

from __future__ import annotations

import argparse
import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from sklearn.model_selection import train_test_split

Rows = list[tuple[str, str]]
Sentences = list[list[tuple[str, str]]]
ENTITIES = {
    "wnut17": ("wnut17train.conll", "emerging.dev.conll", "emerging.test.annotated"),
    "ncbi_disease": ("train.tsv", "devel.tsv", "test.tsv"),
}
"""Entity data set -> its published files."""

SPLITS = ("train", "validation", "test")
SEED = 0


def write_all(source: Path, output: Path) -> None:
    """Write all data sets; skip classification sets that already exist."""
    for name, draw in {"sst2": sst2, "symptom2disease": symptom2disease, "hotel_zh": hotel_zh}.items():
        folder = output / name
        if all((folder / f"{split}.csv").exists() for split in SPLITS):
            continue
        folder.mkdir(parents=True, exist_ok=True)
        for split, rows in zip(SPLITS, draw(source / name), strict=True):
            write_rows(folder / f"{split}.csv", rows)
            classes = Counter(label for _, label in rows)
            majority = max(classes.values()) / len(rows)
            print(f"{name} {split}: {len(rows)} rows, {len(classes)} classes, majority {majority:.3f}")

    for name, files in ENTITIES.items():
        (output / name).mkdir(parents=True, exist_ok=True)
        for split, file in zip(SPLITS, files, strict=True):
            sentences = read_sentences(source / name / file)
            write_sentences(output / name / f"{split}.conll", sentences)
            print(f"{name} {split}: {len(sentences)} sentences, {sum(map(len, sentences))} words")


def read_sentences(path: Path) -> Sentences:
    """Read (word, tag) pairs by sentence; a blank line ends a sentence."""
    sentences: Sentences = [[]]
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line.strip():
            word, _, tag = line.rstrip("\r").rpartition("\t")
            sentences[-1].append((word, tag))
        elif sentences[-1]:
            sentences.append([])
    return [sentence for sentence in sentences if sentence]


def write_sentences(path: Path, sentences: Sentences) -> None:
    """Write one word, a tab and its tag per line, with an empty line between sentences."""
    lines = ("".join(f"{word}\t{tag}\n" for word, tag in sentence) for sentence in sentences)
    path.write_text("\n".join(lines), encoding="utf-8")


def write_rows(path: Path, rows: Rows) -> None:
    """Write a CSV file with the header `text,label`."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("text", "label"))
        writer.writerows(rows)


def read_rows(path: Path) -> Rows:
    """Read the (text, label) rows of a CSV file."""
    with path.open(encoding="utf-8", newline="") as file:
        return [(row["text"], row["label"]) for row in csv.DictReader(file)]


def sst2(source: Path) -> tuple[Rows, Rows, Rows]:
    """Return the published splits: 6920 / 872 / 1821 rows."""
    train, validation, test = (_clean(_tsv(source / f"{name}.tsv")) for name in ("train", "dev", "test"))
    return train, validation, test


def symptom2disease(source: Path) -> tuple[Rows, Rows, Rows]:
    """Return random splits: 20 % for test, then 10 % of the rest for validation."""
    rows = _clean((row["text"], row["label"]) for row in _table(source / "Symptom2Disease.csv"))
    rest, test = _stratified(rows, 0.2)
    train, validation = _stratified(rest, 0.1)
    return train, validation, test


def hotel_zh(source: Path) -> tuple[Rows, Rows, Rows]:
    """Return 400 / 200 / 600 of the 7765 rows: a small set of long texts."""
    rows = _clean((row["review"], row["label"]) for row in _table(source / "ChnSentiCorp_htl_all.csv"))
    rest, test = _stratified(rows, 600)
    rest, validation = _stratified(rest, 200)
    _, train = _stratified(rest, 400)
    return train, validation, test


def _tsv(path: Path) -> Iterator[tuple[str, str]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            text, _, label = line.rpartition("\t")
            yield text, label


def _table(path: Path) -> Iterator[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file)


def _clean(rows: Iterator[tuple[str, str]]) -> Rows:
    return [(" ".join(text.split()), label.strip()) for text, label in rows if text.strip()]


def _stratified(rows: Rows, share: float) -> tuple[Rows, Rows]:
    kept, drawn = train_test_split(rows, test_size=share, random_state=SEED, stratify=[label for _, label in rows])
    return kept, drawn


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder with sst2/, wnut17/ ...")
    parser.add_argument("--output", type=Path, default=Path("build/splits"))
    arguments = parser.parse_args()
    write_all(arguments.source, arguments.output)
