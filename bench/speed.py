"""How fast tunesmith trains beside the peer at its best practice: whole runs, alternately, one at a time.

    python bench/speed.py --model FOLDER --only sst2 lora --pairs 3 --threads 2

Both train the same rows for one epoch at the same batch size in the same number format; the seconds are those of
training alone (no start-up, evaluation or saving). Printed: examples per second of each run, the median of the pair
ratios with its spread, CPU seconds, and peak memory. The machine must be quiet: the bench says how busy it was.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from quality import EPOCHS, GRID, peer_of

HERE = Path(__file__).parent


def run(arm: str, data: str, technique: str, given: argparse.Namespace) -> dict[str, Any]:
    """One process: what it printed, and the CPU seconds it took in all."""
    script = HERE / (peer_of(data) if arm == "peer" else "ours.py")
    words = [sys.executable, str(script), "--model", given.model, "--data-root", given.data_root, "--data", data]
    words += ["--technique", technique, "--epochs", "1", "--learning-rate", str(GRID[technique][2])]
    words += ["--device", given.device]
    environment = {**os.environ, "OMP_NUM_THREADS": str(given.threads), "TOKENIZERS_PARALLELISM": "false"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    result["cpu_seconds"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return result


def compare(data: str, technique: str, given: argparse.Namespace) -> str:
    """One row of the table."""
    pairs = []
    for number in range(given.pairs):
        order = ("peer", "ours") if number % 2 == 0 else ("ours", "peer")
        pair = {arm: run(arm, data, technique, given) for arm in order}
        pairs.append(pair)
        rates = ", ".join(f"{arm} {pair[arm]['examples_per_second']:.1f} examples/s" for arm in ("peer", "ours"))
        print(f"{data} {technique} pair {number + 1}: {rates}", flush=True)
    ratios = sorted(pair["ours"]["examples_per_second"] / pair["peer"]["examples_per_second"] for pair in pairs)
    cells = [data, technique]
    for key, scale in (("examples_per_second", 1.0), ("cpu_seconds", 1.0), ("peak_memory_bytes", 1e6)):
        cells += [f"{statistics.median(pair[arm][key] for pair in pairs) / scale:.0f}" for arm in ("peer", "ours")]
    cells += [f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """All that was asked for, as a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a pretrained model")
    parser.add_argument("--data-root", default="build/splits", help="what bench/splits.py wrote")
    parser.add_argument("--only", nargs=2, action="append", metavar=("DATA", "TECHNIQUE"))
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    busy = os.getloadavg()[0]
    rows = [compare(data, technique, given) for data, technique in given.only or EPOCHS]
    print(f"\n{time.strftime('%Y-%m-%d')}, {given.threads} threads, load before the first run {busy:.2f}\n")
    print("| data | technique | examples/s peer | ours | CPU s peer | ours | peak MB peer | ours | ours / peer |")
    print("|---|---|---|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
