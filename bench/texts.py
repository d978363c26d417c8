"""Data of the text-generation recipes, sampled once with seed 0 from public data sets.

python -m bench.texts --source DATA --output .

questions.jsonl        500 medquad questions with answers of at most 600 characters: question, answer, focus
dialogues.jsonl        200 diseases, each a dialogue of two to four such questions: messages
instructions.jsonl     500 alpaca rows and all self-instruct seed tasks, each in its original format
instructions-zh.jsonl  300 Chinese alpaca rows and 300 huatuo rows (medicine): instruction, input, output
contracts/             16 CUAD contracts of at most 40 kB, about 90,000 tokens
spoken/                the first 8,000 multi30k training pairs and the held-out pairs, with the English in the format of
                       a speech recognizer: lowercase, no punctuation
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import shutil
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]
LONGEST_ANSWER = 600
SPOKEN_PAIRS = 8000


def questions(source: Path) -> Rows:
    """Return the medquad questions with short answers."""
    with gzip.open(source / "medquad" / "medquad_qa.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = map(json.loads, file)
        kept = [row for row in rows if row["question"].strip() and 0 < len(row["answer"].strip()) <= LONGEST_ANSWER]
    return [{key: row[key] for key in ("question", "answer", "focus")} for row in kept]


def dialogues(rows: Rows) -> Rows:
    """Return conversations of two to four questions about one disease."""
    about = defaultdict(list)
    for row in rows:
        about[row["focus"]].append(row)
    return [
        {
            "messages": [
                {"role": role, "content": row[column]}
                for row in group[:4]
                for role, column in (("user", "question"), ("assistant", "answer"))
            ]
        }
        for group in about.values()
        if len(group) > 1
    ]


def spoken(text: str) -> str:
    """Return the text in the format of a speech recognizer: lowercase, no punctuation."""
    return " ".join("".join(c for c in word if c.isalnum() or c == "'").lower() for word in text.split())


def write_spoken(source: Path, folder: Path) -> None:
    """Write the pairs with spoken English, under the original file names."""
    folder.mkdir(exist_ok=True)
    for path in sorted(source.glob("*.??.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = file.read().splitlines()[:SPOKEN_PAIRS]
        lines = list(map(spoken, lines)) if path.stem.endswith(".en") else lines
        (folder / path.stem).write_text("\n".join(lines) + "\n", encoding="utf-8")


def read(*paths: Path) -> Rows:
    """Read rows from JSON and JSONL files."""
    rows: Rows = []
    for path in paths:
        text = path.read_text(encoding="utf-8")
        rows += json.loads(text) if text.startswith("[") else map(json.loads, text.splitlines())
    return rows


def some(rows: Rows, number: int) -> Rows:
    """Return a random sample with seed 0."""
    return random.Random(0).sample(rows, number)


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSONL."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Write all files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder with medquad/, alpaca_en/ ...")
    parser.add_argument("--output", type=Path, default=Path())
    given = parser.parse_args()
    source, output = given.source, given.output
    output.mkdir(parents=True, exist_ok=True)
    medical = questions(source)
    write(output / "questions.jsonl", some(medical, 500))
    write(output / "dialogues.jsonl", some(dialogues(medical), 200))
    english = read(*sorted((source / "alpaca_en").glob("*.json")))
    seeds = read(source / "self_instruct" / "seed_tasks.jsonl")
    write(output / "instructions.jsonl", [*some(english, 500), *seeds])
    chinese = (read(source / "alpaca_zh" / "alpaca_zh_0_3252.json"), read(source / "huatuo_zh" / "llama_data.json"))
    write(output / "instructions-zh.jsonl", [row for rows in chinese for row in some(rows, 300)])
    write_spoken(source / "multi30k_en_de", output / "spoken")
    contracts = sorted(path for path in (source / "cuad" / "contracts").glob("*.txt") if path.stat().st_size <= 40_000)
    (output / "contracts").mkdir(exist_ok=True)
    for path in random.Random(0).sample(contracts, 16):
        shutil.copy(path, output / "contracts" / path.name)


if __name__ == "__main__":
    main()
