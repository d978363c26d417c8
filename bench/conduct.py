"""Scheduling of the arms of a workload: each has its own process, and only one works at a time."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.workloads import Peer, Workload

OURS = "ours"
INSTALLED_BY = {
    "trl": "python -m venv build/trl && build/trl/bin/pip install -e '.[dev]' trl",
    "unsloth": "build/trl/bin/pip install --no-deps unsloth unsloth_zoo",
}
"""Library -> command that installs it into the peers' environment; all others are in the `dev` extra."""

SAME_WORK = 0.005
"""Relative tolerance of token counts: ours are computed from rounded rates."""

Said = dict[str, Any]


class Missing(Exception):
    """Raised if an arm cannot run; the message states the cause."""


class Worker:
    """Process of one `bench.worker`; its stderr goes to a log file."""

    def __init__(self, arm: str, python: str, environment: Mapping[str, str], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.arm, self.log = arm, log
        pipe = subprocess.PIPE
        with log.open("w", encoding="utf-8") as errors:
            try:
                self.process = subprocess.Popen(
                    [python, "-m", "bench.worker", arm],
                    env=dict(environment),
                    stdin=pipe,
                    stdout=pipe,
                    stderr=errors,
                    text=True,
                )
            except FileNotFoundError:
                raise Missing(f"{python}: no such file; create it with: {INSTALLED_BY['trl']}") from None
        try:
            said = self._listen()
            if (name := said.get("missing")) is not None:
                how = INSTALLED_BY.get(name, "pip install -e '.[dev]'")
                raise Missing(f"{name} is not installed for {python}; install it with: {how}")
        except Missing:
            self.close()
            raise
        self.versions: dict[str, str] = said["versions"]

    def ask(self, job: Mapping[str, Any]) -> Said:
        """Run a job and return its result.

        Raises:
            Missing: the job failed.
        """
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = self._listen()
        if "error" in answer:
            raise Missing(f"{self.arm}: {answer['error']}; see {self.log}")
        return answer

    def _listen(self) -> Said:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise Missing(f"{self.arm}: the process ended unexpectedly; see {self.log}")
        said: Said = json.loads(line)
        return said

    def close(self) -> None:
        """Close the pipes and wait for the process to end."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


@dataclass(frozen=True)
class Setting:
    """Settings shared by all workers: interpreters, threads, number of rounds and log folder."""

    python: str
    peer_python: str
    threads: int
    pairs: int
    log: Path
    say: Callable[[str], None] = print

    def start(self, arm: str, apart: bool) -> Worker:
        """Start a worker; `apart`: in the separate environment of the peers."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        environment |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        return Worker(arm, self.peer_python if apart else self.python, environment, self.log / f"{arm}.log")


@dataclass
class Outcome:
    """Results of one workload: the runs of each arm, in the order of the rounds."""

    workload: Workload
    goes: dict[str, list[Said]] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    """Arm -> peak bytes above its imports, in its first run."""
    versions: dict[str, str] = field(default_factory=dict)
    multiply_adds: int = 0
    rates: list[float] = field(default_factory=list)
    """Multiply-adds per second, measured between rounds."""
    notes: list[str] = field(default_factory=list)


OURS_ARM, FLOOR_ARM = "bench.arms.ours", "bench.arms.floor"
APART = ("bench.arms.sft", "bench.arms.unsloth")


def run(workload: Workload, setting: Setting, where: Mapping[str, Any]) -> Outcome:
    """Run every arm once to warm up, then `pairs` rounds of all arms, in alternating order.

    Raises:
        Missing: the arm of tunesmith failed.
    """
    outcome = Outcome(workload)
    arms: dict[str, Peer | None] = {OURS: None, **{peer.name: peer for peer in workload.peers}}
    jobs = {name: workload.job(peer, **where) for name, peer in arms.items()}
    (_memory if workload.memory else _speed)(outcome, setting, arms, jobs)
    _compare_work(outcome)
    return outcome


def _start(setting: Setting, name: str, peer: Peer | None) -> Worker:
    module = OURS_ARM if peer is None else peer.arm
    return setting.start(module, module in APART)


def _speed(outcome: Outcome, setting: Setting, arms: Mapping[str, Peer | None], jobs: Mapping[str, Said]) -> None:
    """Measure speed with persistent workers, and the machine's rate with one more."""
    workers: dict[str, Worker] = {}
    floor = setting.start(FLOOR_ARM, False)
    try:
        for name, peer in arms.items():
            try:
                workers[name] = worker = _start(setting, name, peer)
                outcome.peaks[name] = worker.ask(jobs[name])["peak_bytes"]
                outcome.versions |= worker.versions
                outcome.goes[name] = []
            except Missing as problem:
                _leave_out(outcome, setting, name, problem)
        for number in range(setting.pairs):
            measured = floor.ask(jobs[OURS])
            outcome.multiply_adds = measured["multiply_adds"]
            outcome.rates.append(measured["rate"])
            for name in _in_turn(outcome, number):
                outcome.goes[name].append(workers[name].ask(jobs[name]))
            _say_round(outcome, setting, number)
    finally:
        for worker in (*workers.values(), floor):
            worker.close()


def _memory(outcome: Outcome, setting: Setting, arms: Mapping[str, Peer | None], jobs: Mapping[str, Said]) -> None:
    """Measure peak memory with a fresh worker for every run, so that runs do not affect each other."""
    outcome.goes = {name: [] for name in arms}
    for number in range(setting.pairs):
        for name in _in_turn(outcome, number):
            try:
                with _start(setting, name, arms[name]) as worker:
                    outcome.goes[name].append(worker.ask(jobs[name]))
                    outcome.versions |= worker.versions
            except Missing as problem:
                del outcome.goes[name]
                _leave_out(outcome, setting, name, problem)
        _say_round(outcome, setting, number)


def _in_turn(outcome: Outcome, number: int) -> list[str]:
    names = list(outcome.goes)
    return names if number % 2 == 0 else names[::-1]


def _leave_out(outcome: Outcome, setting: Setting, name: str, problem: Missing) -> None:
    if name == OURS:
        raise problem
    outcome.notes.append(f"{outcome.workload.name}: skipped {name}: {problem}")
    setting.say(outcome.notes[-1])


def _say_round(outcome: Outcome, setting: Setting, number: int) -> None:
    unit, scale = ("peak_bytes", 1e6) if outcome.workload.memory else ("seconds", 1.0)
    said = ", ".join(f"{name} {goes[-1][unit] / scale:.4g}" for name, goes in outcome.goes.items())
    what = "MB" if outcome.workload.memory else "seconds"
    setting.say(f"{outcome.workload.name} round {number + 1} of {setting.pairs}, {what}: {said}")


def _compare_work(outcome: Outcome) -> None:
    """Add a note for each arm whose rows, tokens or trainable parameters differ from ours."""
    if not outcome.goes[OURS]:
        return
    ours = outcome.goes[OURS][0]
    for name, goes in outcome.goes.items():
        different = [key for key in ("samples", "tokens") if abs(goes[0][key] / ours[key] - 1) > SAME_WORK]
        different += ["learned"] if goes[0].get("learned", ours["learned"]) != ours["learned"] else []
        for key in different:
            outcome.notes.append(f"{outcome.workload.name}: {key}: {name} {goes[0][key]:,}, {OURS} {ours[key]:,}")
