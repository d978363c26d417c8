"""Plant 200 faults into rows and report which of them `data check` finds. On real rows, from the command line:

python tests/unit/studies/planted.py TRAIN_FILE [SEED ...]
"""

from __future__ import annotations

import csv
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunesmith.inspect_data import check as data_check
from tunesmith.inspect_data.files import find_files, open_file, resolve_target

EACH = 50
TEST_SHARE = 0.2
KINDS = {
    "duplicate": {"duplicate"},
    "near": {"near-duplicate", "near-leak"},
    "leak": {"leak", "near-leak"},
    "conflict": {"label-conflict"},
}
Rows = list[tuple[str, str]]


def changed(text: str, draw: random.Random) -> str:
    """Return a text with a small edit: a word (in Chinese, a character) removed, doubled or misspelled."""
    parts = text.split() if len(text.split()) > 4 else list(text)
    joint = " " if len(text.split()) > 4 else ""
    at = draw.randrange(1, len(parts) - 1)
    how = draw.randrange(3)
    if how == 0:
        del parts[at]
    elif how == 1:
        parts.insert(at, parts[at])
    else:
        parts[at] = parts[at][1:] + parts[at][:1] if len(parts[at]) > 1 else parts[at - 1]
    return joint.join(parts)


def plant(rows: Rows, labels: Sequence[str], draw: random.Random) -> tuple[Rows, Rows, dict[str, set[tuple[str, int]]]]:
    """Return (train, test, kind -> planted (file, line)): 50 each of exact duplicates, near duplicates,
    leaks into test (half of them with a small edit) and texts with another label.
    """
    cut = int(len(rows) * (1 - TEST_SHARE))
    train, test = rows[:cut], rows[cut:]
    chosen = draw.sample([row for row in train if len(row[0]) >= 40], 4 * EACH)
    new: list[tuple[str, str, tuple[str, str]]] = []
    for number, (text, label) in enumerate(chosen):
        kind = list(KINDS)[number // EACH]
        other = draw.choice([one for one in labels if one != label])
        if kind == "duplicate":
            new.append((kind, "train", (f" {text.upper()} " if number % 2 else text, label)))
        elif kind == "near":
            new.append((kind, "train", (changed(text, draw), label)))
        elif kind == "leak":
            new.append((kind, "test", (changed(text, draw) if number % 2 else text, label)))
        else:
            new.append((kind, "train", (text, other)))
    draw.shuffle(new)
    planted: dict[str, set[tuple[str, int]]] = {kind: set() for kind in KINDS}
    for kind, name, row in new:
        target = train if name == "train" else test
        target.append(row)
        planted[kind].add((name, len(target) + 1))
    return train, test, planted


def outcome(train: Rows, test: Rows, planted: dict[str, set[tuple[str, int]]], folder: Path) -> dict[str, Any]:
    """Return how many faults of each kind were found, and how many other rows were reported."""
    for name, rows in (("train", train), ("test", test)):
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("text", "label"))
            writer.writerows(rows)
    report = data_check.check(str(folder))
    accused = {
        kind: {
            (Path(fault["file"]).stem, fault["line"])
            for finding in report["findings"]
            if finding["kind"] in kinds
            for fault in finding["faults"]
        }
        for kind, kinds in KINDS.items()
    }
    found = {kind: len(planted[kind] & accused[kind]) for kind in KINDS}
    innocent = set().union(*accused.values()) - set().union(*planted.values())
    return {
        "found": found,
        "share": sum(found.values()) / (len(KINDS) * EACH),
        "innocent": len(innocent),
        "false_alarms": len(innocent) / (len(innocent) + sum(found.values())),
        "errors": report["errors"],
        "seconds": report["seconds"],
    }


def clean_rows(path: str) -> Rows:
    """The rows of a real file of which the check says nothing."""
    recipe = resolve_target(path, (), None).recipe
    report = data_check.check(path)
    accused = {fault["line"] for finding in report["findings"] for fault in finding["faults"]}
    data, named, _ = find_files(recipe.data, recipe.task)  # type: ignore[arg-type]
    file = open_file("train", named["train"], recipe.task, data)  # type: ignore[arg-type]
    rows = [row for row in file.good_rows() if int(row.place.rpartition(":")[2]) not in accused]
    return [(str(row.values["text"]), str(row.values["label"])) for row in rows]


if __name__ == "__main__":
    real = clean_rows(sys.argv[1])
    for seed in map(int, sys.argv[2:] or ["0"]):
        draw = random.Random(seed)
        draw.shuffle(real)
        with tempfile.TemporaryDirectory() as name:
            print(seed, outcome(*plant(real, sorted({label for _, label in real}), draw), Path(name)))
