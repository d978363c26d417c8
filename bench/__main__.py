"""Speed benchmark of tunesmith and its peers. Each arm has its own process; one arm runs at a time.

    python -m bench                            # all workloads whose models and peers are installed: hours
    python -m bench C1 C2 mem --pairs 7 --threads 2
    python -m bench C5-lora --rows 32 --pairs 1 --output build/trial.md

Prints a table and appends it to bench/results/DATE-DEVICE.md. The machine must be idle; the report shows its load.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import LOAD, conduct, models, report, rows
from bench.workloads import WORKLOADS, Workload, chosen
from tunesmith.errors import UserError, counted
from tunesmith.training import machine

PEERS = Path("build/trl/bin/python")
QUIET_LOAD = 0.3
"""Load average above which the machine counts as busy."""


def main() -> int:
    """Run the selected workloads and write the report."""
    given = arguments()
    if given.list:
        print("\n".join(f"{workload.name:12} {workload.about}" for workload in WORKLOADS))
        return 0
    busy = f"load before the first run {LOAD:.2f}" + (": the machine was busy" if LOAD > QUIET_LOAD else "")
    print(busy if LOAD <= QUIET_LOAD else f"warning: {busy}; times are not comparable", flush=True)
    found = machine.find(given.device)
    wanted = chosen(given.names, found.device.type)
    setting = conduct.Setting(
        sys.executable, str(given.peer_python), given.threads, given.pairs, models.BUILD / "bench", _say
    )
    outcomes = [outcome for workload in wanted if (outcome := measured(workload, setting, given, found)) is not None]
    if not outcomes:
        return 1
    about = [f"`{report.command_line('bench')}`, commit {_commit()}", *_machine(found, given), busy]
    about.append(", ".join(f"{name} {number}" for name, number in _versions(outcomes).items()))
    body = report.text(outcomes, about)
    print(f"\n{body}")
    day = time.strftime("%Y-%m-%d")
    device = found.device.type
    path = given.output or Path(__file__).parent / "results" / f"{day}-{device}.md"
    title = f"{day}, {device.upper() if device == 'cpu' else device}: speed compared with the peers"
    names = ", ".join(outcome.workload.name for outcome in outcomes)
    report.write(path, title, f"{names} ({time.strftime('%H:%M')})", body)
    return 0 if len(outcomes) == len(wanted) else 1


def measured(
    workload: Workload, setting: conduct.Setting, given: argparse.Namespace, found: machine.Machine
) -> conduct.Outcome | None:
    """Run a workload and return its outcome; if it cannot run, print the cause and return None."""
    if workload.device == "cuda" != found.device.type:
        _say(f"{workload.name}: skipped: needs a GPU (device: {found.device.type})")
        return None
    if given.rows:
        workload = replace(workload, rows=given.rows)
    try:
        model = models.folder_of(workload.model, given.data)
        path, real = rows.write(workload.data, given.data, workload.rows, models.BUILD / "bench" / workload.name)
        where: dict[str, Any] = {"model": str(model), "data": str(path.absolute())}
        outcome = conduct.run(workload, setting, where | {"device": found.device.type, "precision": found.precision})
    except (conduct.Missing, UserError) as problem:
        _say(f"{workload.name}: skipped: {problem}")
        return None
    if not real:
        missing = f"{workload.data} not found in {given.data.name}"
        outcome.notes.append(f"{workload.name}: {missing}; used synthetic texts of similar length")
    return outcome


def _say(text: str) -> None:
    print(text, flush=True)


def _machine(found: machine.Machine, given: argparse.Namespace) -> list[str]:
    about = machine.describe(found)
    memory = about["memory_bytes"] / 2**30
    threads, rounds = counted(given.threads, "thread"), counted(given.pairs, "round")
    where = f"{about['name']}, {about['cpus']} CPUs, {memory:.0f} GiB, {threads}, {about['precision']}"
    return [where, f"medians of {rounds} after one warmup run; peaks are from the first run of a fresh process"]


def _versions(outcomes: list[conduct.Outcome]) -> dict[str, str]:
    found = {"Python": platform.python_version()}
    for outcome in outcomes:
        found |= outcome.versions
    return found


def _commit() -> str:
    words = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return done.stdout.strip() or "unknown"


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser("bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="workload names or prefixes: C1, C5-lora, mem")
    parser.add_argument("--list", action="store_true", help="list the workloads and exit")
    parser.add_argument("--pairs", type=int, default=7, help="number of measured rounds")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rows", type=int, default=None, help="number of training rows, for quick trials")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with the public data sets")
    parser.add_argument("--peer-python", type=Path, default=PEERS, help="Python of the environment with TRL")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=None, help="default: bench/results/DATE-DEVICE.md")
    given = parser.parse_args()
    try:
        chosen(given.names)
    except ValueError as error:
        parser.error(str(error))
    return given


if __name__ == "__main__":
    sys.exit(main())
