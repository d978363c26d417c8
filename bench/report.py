"""Report of the speed benchmark: a table with one row per peer, the machine, the versions and the command."""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.conduct import OURS, Outcome
from bench.workloads import Peer

RESAMPLES = 10_000
FEWEST = 3
"""Minimum number of rounds for a verdict on the target."""

SAME_LOSS = 0.1
"""Relative difference of mean losses above which they are marked; seeds and batch order cause smaller differences."""

HEAD = (
    "| workload | peer | tokens/s peer | ours | ours / peer (95 %) | target | reached | CPU s peer | ours "
    "| peak MB peer | ours | share of floor peer | ours | loss peer | ours |\n" + "|---" * 15 + "|"
)
MEMORY_HEAD = (
    "| workload | peer | peak MB peer | ours | ours / peer (95 %) | target | reached | loss peer | ours |\n"
    + "|---" * 9
    + "|"
)


def command_line(module: str) -> str:
    """Return this command, with each path reduced to its last component."""
    said = ["python", "-m", module, *(Path(word).name if "/" in word else word for word in sys.argv[1:])]
    return " ".join(said)


def bootstrap(ratios: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the median ratio."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES))
    return medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES) - 1]


def reached(low: float, high: float, wanted: float, *, less: bool = False) -> str:
    """Return the verdict: "yes" or "**no**" if the whole interval is on one side of the target, else "open".

    `less`: lower values are better.
    """
    if less:
        low, high, wanted = -high, -low, -wanted
    return "yes" if low >= wanted else "**no**" if high < wanted else "open"


def rows(outcome: Outcome) -> list[str]:
    """Return one table row per peer that ran."""
    row = _memory_row if outcome.workload.memory else _speed_row
    return [row(outcome, peer) for peer in outcome.workload.peers if outcome.goes.get(peer.name)]


def _speed_row(outcome: Outcome, peer: Peer) -> str:
    cells = [outcome.workload.name, peer.name]
    both = (peer.name, OURS)
    pairs = zip(*(outcome.goes[name] for name in both), strict=True)
    ratios = [theirs["seconds"] / mine["seconds"] for theirs, mine in pairs]  # both do the same work
    cells += [f"{_median(outcome, name, lambda go: go['tokens'] / go['seconds']):.0f}" for name in both]
    cells += _ratio(ratios, peer.wanted)
    cells += [f"{_median(outcome, name, lambda go: go['cpu_seconds']):.3g}" for name in both]
    cells += [f"{outcome.peaks[name] / 1e6:.0f}" for name in both]
    seconds = outcome.multiply_adds / statistics.median(outcome.rates)
    cells += [f"{seconds / _median(outcome, name, lambda go: go['seconds']):.0%}" for name in both]
    return f"| {' | '.join(cells + _losses(outcome, peer))} |"


def _memory_row(outcome: Outcome, peer: Peer) -> str:
    theirs, ours = ([go["peak_bytes"] for go in outcome.goes[name]] for name in (peer.name, OURS))
    cells = [outcome.workload.name, peer.name, *(f"{statistics.median(peaks) / 1e6:.0f}" for peaks in (theirs, ours))]
    cells += _ratio([mine / other for other, mine in zip(theirs, ours, strict=True)], peer.wanted, less=True)
    return f"| {' | '.join(cells + _losses(outcome, peer))} |"


def _ratio(ratios: list[float], wanted: float, *, less: bool = False) -> list[str]:
    low, high = bootstrap(ratios)
    said = f"{statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})"
    return [said, f"{wanted:g}", reached(low, high, wanted, less=less) if len(ratios) >= FEWEST else "open"]


def _median(outcome: Outcome, name: str, value: Callable[[dict[str, Any]], float]) -> float:
    return statistics.median(value(go) for go in outcome.goes[name])


def _losses(outcome: Outcome, peer: Peer) -> list[str]:
    """Return the mean loss of both arms in bold if they differ, or the final losses if the peer has no mean."""
    key = "loss" if "loss" in outcome.goes[peer.name][0] else "last_loss"
    theirs, ours = (_median(outcome, name, lambda go: go[key]) for name in (peer.name, OURS))
    cells = [f"{theirs:.3f}", f"{ours:.3f}"]
    if key == "last_loss":
        return [f"{cell} at the end" for cell in cells]
    return [f"**{cell}**" for cell in cells] if abs(ours - theirs) > SAME_LOSS * theirs else cells


def text(outcomes: Sequence[Outcome], about: Sequence[str]) -> str:
    """Return a report section: run details, tables, workload descriptions and notes."""
    parts = ["\n".join(f"- {line}" for line in about)]
    for head, memory in ((HEAD, False), (MEMORY_HEAD, True)):
        lines = [line for outcome in outcomes if outcome.workload.memory == memory for line in rows(outcome)]
        parts += ["\n".join([head, *lines])] if lines else []
    parts.append("\n".join(f"- {outcome.workload.name}: {_described(outcome)}" for outcome in outcomes))
    notes = [note for outcome in outcomes for note in outcome.notes]
    parts += ["\n".join(f"- {note}" for note in notes)] if notes else []
    return "\n\n".join(parts) + "\n"


def _described(outcome: Outcome) -> str:
    workload, ours = outcome.workload, outcome.goes[OURS][0]
    said = f"{workload.about}; {ours['samples'] // workload.epochs} rows, batch {workload.batch_size}, "
    said += f"{ours['tokens']:,} non-padding tokens in total"
    if outcome.rates:
        peak = 2 * statistics.median(outcome.rates) / 1e9
        said += f"; floor {2 * outcome.multiply_adds / 1e9:,.0f} GFLOP at {peak:.0f} GFLOP/s"
    return said


def write(path: Path, title: str, section: str, body: str) -> None:
    """Append a section to the page; create the page if it does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    begun = path.read_text(encoding="utf-8") if path.exists() else f"# {title}\n"
    path.write_text(f"{begun}\n## {section}\n\n{body}", encoding="utf-8")
