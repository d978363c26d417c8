"""What the speed bench writes down: a table with a row for each peer, and where, with what and by which command."""

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
"""Rounds below which nothing is said to be reached."""

SAME_LOSS = 0.1
"""Mean losses further apart than this share are marked: seeds and the order of batches move them less."""

HEAD = (
    "| workload | peer | tokens/s peer | ours | ours / peer (95 %) | wanted | reached | CPU s peer | ours "
    "| peak MB peer | ours | share of floor peer | ours | loss peer | ours |\n" + "|---" * 15 + "|"
)
MEMORY_HEAD = (
    "| workload | peer | peak MB peer | ours | ours / peer (95 %) | wanted | reached | loss peer | ours |\n"
    + "|---" * 9
    + "|"
)


def command_line(module: str) -> str:
    """This command with folders cut to their names: where they lie says nothing to others."""
    said = ["python", "-m", module, *(Path(word).name if "/" in word else word for word in sys.argv[1:])]
    return " ".join(said)


def bootstrap(ratios: Sequence[float]) -> tuple[float, float]:
    """The interval that 95 % of the medians of resampled ratios lie in."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES))
    return medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES) - 1]


def reached(low: float, high: float, wanted: float, *, less: bool = False) -> str:
    """Whether a whole interval is where it is wanted, above or (`less`) below."""
    if less:
        low, high, wanted = -high, -low, -wanted
    return "yes" if low >= wanted else "**no**" if high < wanted else "open"


def rows(outcome: Outcome) -> list[str]:
    """One for each peer that ran."""
    row = _memory_row if outcome.workload.memory else _speed_row
    return [row(outcome, peer) for peer in outcome.workload.peers if outcome.goes.get(peer.name)]


def _speed_row(outcome: Outcome, peer: Peer) -> str:
    cells = [outcome.workload.name, peer.name]
    both = (peer.name, OURS)
    pairs = zip(*(outcome.goes[name] for name in both), strict=True)
    ratios = [theirs["seconds"] / mine["seconds"] for theirs, mine in pairs]  # the work is the same
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
    """Both sides' mean over the run, or at its end where the peer has only that; marked where they differ."""
    key = "loss" if "loss" in outcome.goes[peer.name][0] else "last_loss"
    theirs, ours = (_median(outcome, name, lambda go: go[key]) for name in (peer.name, OURS))
    cells = [f"{theirs:.3f}", f"{ours:.3f}"]
    if key == "last_loss":
        return [f"{cell} at the end" for cell in cells]
    return [f"**{cell}**" for cell in cells] if abs(ours - theirs) > SAME_LOSS * theirs else cells


def text(outcomes: Sequence[Outcome], about: Sequence[str]) -> str:
    """A section: what was asked, the tables, what each workload is, what was left out."""
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
    said += f"{ours['tokens']:,} valid tokens in all"
    if outcome.rates:
        peak = 2 * statistics.median(outcome.rates) / 1e9
        said += f"; floor {2 * outcome.multiply_adds / 1e9:,.0f} GFLOP at {peak:.0f} GFLOP/s"
    return said


def write(path: Path, title: str, section: str, body: str) -> None:
    """Append a section to the page, which is begun where it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    begun = path.read_text(encoding="utf-8") if path.exists() else f"# {title}\n"
    path.write_text(f"{begun}\n## {section}\n\n{body}", encoding="utf-8")
