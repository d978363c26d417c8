"""Quality of tunesmith at its default settings, compared with the peer at its best learning rate.

    python -m bench.quality --model FOLDER --jobs 2 --results build/quality.jsonl --report build/quality.md

For each data set and technique, the peer runs a grid of four learning rates (seed 0, validation only). Its best
learning rate and our default then run with five seeds and are evaluated on test once. The arm `plain` is ours without
the fast paths (`bench.ours --plain`) and must reach the same quality. Each run is a separate process. Finished runs are
stored in the JSONL file and not repeated, so an interrupted benchmark resumes; use a new file for a new machine or
version. Runs share the device, so their times are not comparable.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from bench.report import command_line
from bench.splits import ENTITIES
from tunesmith.training import machine

GRID = {
    "full": (2e-5, 5e-5, 1e-4, 2e-4),
    "lora": (5e-4, 1e-3, 2e-3, 4e-3),
    "head": (1e-2, 3e-2, 1e-1, 3e-1),
    "last-2": (5e-5, 1e-4, 2e-4, 5e-4),
    "adapter": (5e-4, 1e-3, 2e-3, 4e-3),
    "bitfit": (1e-3, 2e-3, 5e-3, 1e-2),
    "ia3": (5e-3, 1e-2, 2e-2, 5e-2),
    "prefix": (3e-3, 1e-2, 3e-2, 1e-1),
    "prompt": (3e-3, 1e-2, 3e-2, 1e-1),
}
ENTITY_GRID = {"full": (5e-5, 1e-4, 2e-4, 4e-4), "lora": (1e-3, 2e-3, 4e-3, 8e-3)}
"""Token classification needs higher learning rates: on WNUT the largest value of `GRID` was the best."""
EPOCHS = {
    **{("sst2", technique): 3 for technique in GRID},
    **{("symptom2disease", technique): 8 for technique in GRID},
    ("symptom2disease", "full"): 5,
    ("hotel_zh", "full"): 3,
    ("hotel_zh", "lora"): 3,
    ("wnut17", "full"): 3,
    ("wnut17", "lora"): 3,
    ("ncbi_disease", "full"): 2,
    ("ncbi_disease", "lora"): 2,
}
"""(data set, technique) -> epochs, for every comparison; small data sets need more epochs."""

ALLOWED_POINTS = 0.7


def peer_of(data: str) -> str:
    """Return the peer's module for a data set."""
    return "bench.peer_entities" if data in ENTITIES else "bench.peer_classification"


def scores_of(data: str) -> tuple[str, ...]:
    """Return the names of the compared scores; the first selects the peer's learning rate."""
    main = "f1" if data in ENTITIES else "accuracy"
    return (f"dev_{main}", f"test_{main}", "test_f1_macro")


@dataclass(frozen=True)
class Job:
    """One run; `learning_rate` None means our default, `test` also evaluates on the test split."""

    arm: str
    data: str
    technique: str
    learning_rate: float | None
    seed: int
    test: bool

    def command(self, given: argparse.Namespace) -> list[str]:
        """Return the command line of the run."""
        module = peer_of(self.data) if self.arm == "peer" else "bench.ours"
        words = [sys.executable, "-m", module, "--model", given.model, "--data-root", given.data_root]
        words += ["--data", self.data, "--technique", self.technique, "--seed", str(self.seed)]
        words += ["--epochs", str(EPOCHS[self.data, self.technique])]
        words += ["--device", given.device, "--precision", given.precision]
        words += ["--plain"] if self.arm == "plain" else []
        words += ["--learning-rate", str(self.learning_rate)] if self.learning_rate is not None else []
        return words + (["--test"] if self.test else [])


class Results:
    """JSONL file of finished runs."""

    def __init__(self, path: Path) -> None:
        self.path, self.lock, self.done = path, Lock(), {}
        path.parent.mkdir(parents=True, exist_ok=True)
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            record = json.loads(line)
            self.done[astuple(Job(**record["job"]))] = record

    def get(self, job: Job) -> dict[str, Any] | None:
        """Return the result of a run, or None if it is not finished."""
        return self.done.get(astuple(job))

    def add(self, job: Job, result: dict[str, Any]) -> None:
        """Store a finished run."""
        record = {"job": asdict(job), **result}
        with self.lock, self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            self.done[astuple(job)] = record

    def all_of(self, jobs: Sequence[Job]) -> list[dict[str, Any]] | None:
        """Return the results of all runs, or None if one is not finished."""
        found = [self.get(job) for job in jobs]
        return None if None in found else [run for run in found if run is not None]


def grid(arm: str, data: str, technique: str) -> list[Job]:
    """Return the runs of the learning-rate grid."""
    rates = (ENTITY_GRID if data in ENTITIES else GRID)[technique]
    return [Job(arm, data, technique, rate, 0, False) for rate in rates]


def finals(arm: str, data: str, technique: str, learning_rate: float | None, seeds: int) -> list[Job]:
    """Return the final runs that are compared, one per seed."""
    return [Job(arm, data, technique, learning_rate, seed, True) for seed in range(seeds)]


def best_rate(results: Results, data: str, technique: str) -> float | None:
    """Return the peer's best learning rate on validation (ties: the lower one), or None until its grid is finished."""
    runs = results.all_of(grid("peer", data, technique))
    if runs is None:
        return None
    best: float = max(runs, key=lambda run: run[scores_of(data)[0]])["job"]["learning_rate"]
    return best


def run_all(jobs: list[Job], results: Results, given: argparse.Namespace) -> int:
    """Run all unfinished jobs, several in parallel; return the number of failures."""
    jobs = [job for job in jobs if results.get(job) is None]
    threads = max(1, (os.cpu_count() or 1) // given.jobs)
    environment = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", **os.environ}

    def one(job: Job) -> int:
        if time.monotonic() > given.stop_at:
            return 0
        begin = time.monotonic()
        done = subprocess.run(job.command(given), env=environment, capture_output=True, text=True, check=False)
        label = f"{job.arm} {job.data} {job.technique} learning rate {job.learning_rate or 'default'} seed {job.seed}"
        if done.returncode != 0:
            print(f"FAILED ({done.returncode}) {label}\n{done.stderr[-1500:]}", flush=True)
            return 1
        result = json.loads(done.stdout.splitlines()[-1])
        results.add(job, result)
        print(f"{label}: dev {result[scores_of(job.data)[0]]:.4f}, {time.monotonic() - begin:.0f} s", flush=True)
        return 0

    with ThreadPoolExecutor(given.jobs) as pool:
        return sum(pool.map(one, jobs))


def percent(runs: list[dict[str, Any]], score: str) -> tuple[float, float]:
    """Return the mean and its standard error, in percentage points."""
    values = [100 * run[score] for run in runs]
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return statistics.mean(values), error


def compare(results: Results, pairs: list[tuple[str, str]], seeds: int, arms: Sequence[str]) -> str:
    """Return the comparison as Markdown: scores and differences, then the learning-rate grids."""
    lines = [
        "| data | technique | epochs | peer learning rate | our learning rate | score | peer | ours | difference "
        "| tolerance | within tolerance |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for data, technique in pairs:
        rate = best_rate(results, data, technique)
        peer = None if rate is None else results.all_of(finals("peer", data, technique, rate, seeds))
        ours = results.all_of(finals("ours", data, technique, None, seeds)) if "ours" in arms else None
        for score in scores_of(data) if peer or ours else ():
            lines.append(_row(data, technique, rate, score, peer, ours))
    lines += ["", "Learning-rate grids: validation accuracy (entities: F1), seed 0.", ""]
    lines += ["| data | technique | arm | learning rate: score |", "|---|---|---|---|"]
    for data, technique in pairs:
        for arm in arms:
            runs = [run for job in grid(arm, data, technique) if (run := results.get(job)) is not None]
            cells = [f"{run['job']['learning_rate']:g}: {100 * run[scores_of(data)[0]]:.1f}" for run in runs]
            if cells:
                lines.append(f"| {data} | {technique} | {arm} | {', '.join(cells)} |")
    return "\n".join(lines) + "\n"


def parity(results: Results, pairs: list[tuple[str, str]], seeds: int) -> str:
    """Return the comparison of ours with and without the fast paths as Markdown, for finished runs."""
    lines = ["| data | technique | score | plain | fast | difference | 2 standard errors | within tolerance |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for data, technique in pairs:
        sides = [results.all_of(finals(arm, data, technique, None, seeds)) for arm in ("plain", "ours")]
        for score in scores_of(data) if all(sides) else ():
            (plain, plain_error), (fast, fast_error) = (percent(runs, score) for runs in sides if runs)
            allowed = 2 * (plain_error**2 + fast_error**2) ** 0.5
            cells = [data, technique, score.replace("_", " "), *(_cell(runs, score) for runs in sides)]
            cells += [f"{fast - plain:+.2f}", f"{allowed:.2f}", "yes" if abs(fast - plain) <= allowed else "**no**"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def costs(results: Results, pairs: list[tuple[str, str]], seeds: int) -> str:
    """Return the scores and costs of each technique as Markdown, for the README."""
    lines = [
        "| data | technique | test score | peer test score | trainable parameters | CPU seconds | peak memory, MB "
        "| size on disk, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for data, technique in pairs:
        score, rate = scores_of(data)[1], best_rate(results, data, technique)
        peer = None if rate is None else results.all_of(finals("peer", data, technique, rate, seeds))
        if ours := results.all_of(finals("ours", data, technique, None, seeds)):
            cells = [data, technique, _cell(ours, score), _cell(peer, score), f"{ours[0]['trainable_parameters']:,}"]
            for key, unit in (("cpu_seconds", 1.0), ("peak_memory_bytes", 1e6), ("artefact_bytes", 1e6)):
                known = [run[key] / unit for run in ours if key in run]
                cells.append(f"{statistics.median(known):.3g}" if known else "-")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _row(data: str, technique: str, rate: float | None, score: str, peer: Any, ours: Any) -> str:
    cells = [data, technique, str(EPOCHS[data, technique]), "-" if rate is None else f"{rate:g}"]
    cells += [f"{ours[0]['learning_rate']:.2g}" if ours else "-", score.replace("_", " ")]
    cells += [_cell(runs, score) for runs in (peer, ours)]
    if not (peer and ours):
        return f"| {' | '.join([*cells, '-', '-', '-'])} |"
    (theirs, their_error), (own, own_error) = percent(peer, score), percent(ours, score)
    allowed = -max(ALLOWED_POINTS, 2 * (their_error**2 + own_error**2) ** 0.5)
    cells += [f"{own - theirs:+.2f}", f"{allowed:.2f}", "yes" if own - theirs >= allowed else "**no**"]
    return f"| {' | '.join(cells)} |"


def _cell(runs: list[dict[str, Any]] | None, score: str) -> str:
    return "{:.2f} ± {:.2f}".format(*percent(runs, score)) if runs else "-"


def write_report(results: Results, pairs: list[tuple[str, str]], given: argparse.Namespace) -> None:
    """Write the tables, with the devices, versions and command."""
    records = list(results.done.values())
    text = "# Quality compared with the peer\n\n"
    text += f"Mean ± standard error over {given.seeds} seeds, in percentage points. The peer uses the best of four "
    text += (
        "learning rates (chosen on validation with seed 0), ours its default. Difference = ours - peer; tolerance = "
    )
    text += f"-max({ALLOWED_POINTS}, 2 standard errors of the difference).\n\n"
    text += compare(results, pairs, given.seeds, given.arms)
    text += "\nScores and costs of ours (costs: medians over runs), with the peer's score:\n\n"
    text += costs(results, pairs, given.seeds)
    if "plain" in given.arms:
        text += "\nOurs with and without the fast paths, both at the default learning rate:\n\n"
        text += parity(results, pairs, given.seeds)
    for arm in given.arms:
        of_arm = [record for record in records if record["job"]["arm"] == arm]
        for key in ("device", "versions"):
            said = sorted({json.dumps(record[key]) for record in of_arm})
            text += f"\n- {arm}, {key}: {'; '.join(said)}"
    text += f"\n- batch 16, at most 256 tokens, {given.precision}\n- command: `{command_line('bench.quality')}`\n"
    Path(given.report).write_text(text, encoding="utf-8")


def main() -> int:
    """Run the grids and our final runs, then the peer's final runs, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a pretrained model")
    parser.add_argument("--data-root", default="build/splits", help="output folder of bench/splits.py")
    parser.add_argument("--only", nargs="*", default=[], help="data sets, techniques or both, for example: sst2 lora")
    parser.add_argument("--arms", nargs="*", default=["peer", "ours"], choices=("peer", "ours", "plain"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--our-grid", action="store_true", help="also run the learning-rate grid for ours, to choose a default"
    )
    parser.add_argument("--only-grids", action="store_true", help="skip the final runs; test is not read")
    parser.add_argument("--jobs", type=int, default=1, help="number of parallel runs")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="precision of all arms")
    parser.add_argument("--results", default="build/quality.jsonl")
    parser.add_argument("--report", default="build/quality.md")
    parser.add_argument(
        "--stop-after", type=float, default=float("inf"), metavar="SECONDS", help="start no run after this time"
    )
    given = parser.parse_args()
    given.precision = machine.find(given.device, given.precision).precision
    given.stop_at = time.monotonic() + given.stop_after
    results = Results(Path(given.results))
    pairs = [pair for pair in EPOCHS if _wanted(pair, set(given.only))]
    gridded = [arm for arm in given.arms if arm == "peer" or (arm == "ours" and given.our_grid)]
    first = [job for pair in pairs for arm in gridded for job in grid(arm, *pair)]
    if not given.only_grids:
        own = [arm for arm in given.arms if arm != "peer"]
        first += [job for pair in pairs for arm in own for job in finals(arm, *pair, None, given.seeds)]
    failed = run_all(first, results, given)
    rates = {pair: best_rate(results, *pair) for pair in pairs if "peer" in given.arms}
    chosen = {} if given.only_grids else {pair: rate for pair, rate in rates.items() if rate}
    second = [job for pair, rate in chosen.items() for job in finals("peer", *pair, rate, given.seeds)]
    failed += run_all(second, results, given)
    write_report(results, pairs, given)
    missing = [job for job in first + second if results.get(job) is None]
    print(f"{len(results.done)} runs finished, {len(missing)} selected runs missing, {failed} failed")
    return 1 if failed else 0


def _wanted(pair: tuple[str, str], only: set[str]) -> bool:
    data = only & {name for name, _ in EPOCHS}
    techniques = only & set(GRID)
    return (not data or pair[0] in data) and (not techniques or pair[1] in techniques)


if __name__ == "__main__":
    sys.exit(main())
