"""Console output: streams, verbosity, and its form on a terminal, in a file and in a notebook."""

from __future__ import annotations

import builtins
import contextlib
import io
import os
import pty
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tunesmith import console
from tunesmith.console import Console, command, scores_line


def _say_all(to: Console) -> None:
    to.detail("detail")
    to.say("news")
    to.warn("beware")


@pytest.mark.parametrize(
    ("level", "said"),
    ((-1, ["warning: beware"]), (0, ["news", "warning: beware"]), (1, ["detail", "news", "warning: beware"])),
    ids=("quiet", "normal", "verbose"),
)
@pytest.mark.parametrize("to_stderr", (False, True))
def test_levels_and_streams(level: int, said: list[str], to_stderr: bool, capsys: pytest.CaptureFixture[str]) -> None:
    _say_all(Console(level=level, to_stderr=to_stderr))
    out, err = capsys.readouterr()
    assert (err if to_stderr else out).splitlines() == said and not (out if to_stderr else err)


def test_the_other_processes_of_a_group_say_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    _say_all(Console(level=1))
    assert capsys.readouterr() == ("", "")


def test_a_warning_that_holds_for_several_runs_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(level=-1)
    for text in ("rows are cut", "rows repeat", "rows are cut"):
        console.warn(text)
    assert capsys.readouterr().out == "warning: rows are cut\nwarning: rows repeat\n"


def test_text_is_said_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["[bold]no markup[/bold] :smile: 'x' 1e-4 http://a/b", "long " * 100, "文本 🎉"]
    for line in lines:
        Console().say(line)
    assert capsys.readouterr().out.splitlines() == lines


def test_in_a_file_there_is_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    to = Console()
    with to.progress(2) as show:
        show(1, "loss 0.5")
        to.say("epoch 1")
        show(2, "loss 0.4")
    assert capsys.readouterr() == ("epoch 1\n", "")


def test_in_a_file_there_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = iter((0.0, 20.0, 30.0, 50.0, 90.0, 110.0, 230.0))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now))
    with Console(to_stderr=True).progress(6000, 100) as show:
        for step in range(101, 107):
            show(step, "loss 0.5")
    assert capsys.readouterr().err.splitlines() == [
        "step 102 of 6000  loss 0.5  24 h 34 min left",
        "step 104 of 6000  loss 0.5  36 h 51 min left",
        "step 106 of 6000  loss 0.5  62 h 46 min left",
    ]
    now = iter((0.0, 40.0))
    with Console().progress(100, of="scoring test", unit="example") as show:
        show(50, "scoring test")
    assert capsys.readouterr().out == "example 50 of 100  scoring test  40 s left\n"


def test_in_a_file_the_line_can_be_unwanted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "SILENCE_S", 0.0)
    with Console(level=-1).progress(10) as show:
        show(1, "loss 0.5")
    assert capsys.readouterr() == ("", "")


def test_what_takes_long_is_said_once_it_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Console().during("reading a little"):
        pass
    monkeypatch.setattr(console, "PATIENCE_S", 0.0)
    said = ""
    with Console().during("reading much"):
        while not said:
            said = capsys.readouterr().out
    assert said == "reading much\n"
    monkeypatch.setattr(console, "SILENCE_S", 0.01)
    with Console().during("reading more"):
        while "elapsed" not in said:
            said += capsys.readouterr().out
    assert "reading more\nreading more: 0 s elapsed\n" in said


@pytest.mark.parametrize(
    ("seconds", "said"),
    ((7.4, "7 s"), (99.0, "99 s"), (101.0, "2 min"), (3590.0, "1 h 0 min"), (12000.0, "3 h 20 min")),
)
def test_durations(
    seconds: float, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "SILENCE_S", 0.0)
    now = iter((0.0, seconds))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now))
    with Console().progress(2) as show:
        show(1, "loss 0.5")
    assert capsys.readouterr().out == f"step 1 of 2  loss 0.5  {said} left\n"


def _program(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("on_path", "here", "typed"),
    (
        ("it", "", "tunesmith predict 'my run'"),
        ("another", "", "'my env/bin/tunesmith' predict 'my run'"),
        ("nothing", "", "'my env/bin/tunesmith' predict 'my run'"),
        ("nothing", "elsewhere", "'{tmp}/my env/bin/tunesmith' predict 'my run'"),
    ),
)
def test_a_command_can_be_typed_as_it_is_said(
    on_path: str, here: str, typed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = _program(tmp_path / "my env" / "bin" / "tunesmith")
    (tmp_path / "bin").mkdir()
    (tmp_path / "elsewhere").mkdir()
    if on_path == "it":  # as pipx does
        (tmp_path / "bin" / "tunesmith").symlink_to(script)
    elif on_path == "another":
        _program(tmp_path / "bin" / "tunesmith")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(sys, "executable", str(script.with_name("python")))
    monkeypatch.chdir(tmp_path / here)
    assert command("predict", Path("my run")) == typed.format(tmp=tmp_path)


def test_without_a_script_the_interpreter_runs_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    assert command("train") == "bin/python -m tunesmith train"
    _program(tmp_path / "tunesmith")
    assert command("train") == "tunesmith train"


Written = Callable[[], str]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Written]]:
    """`written = terminal()`: make stdout a terminal; `written()` returns its output."""
    for name in ("NO_COLOR", "FORCE_COLOR", "CI", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    reader, writer = pty.openpty()
    os.set_blocking(reader, False)
    stream = os.fdopen(writer, "w", encoding="utf-8")

    def written() -> str:
        stream.flush()
        parts = []
        with contextlib.suppress(BlockingIOError):  # a terminal passes about 4 KB at a time
            while part := os.read(reader, 4096):
                parts.append(part)
        return b"".join(parts).decode()

    def begin() -> Written:  # called in the test: pytest replaces stdout after the fixtures
        monkeypatch.setattr(sys, "stdout", stream)
        return written

    yield begin
    stream.close()
    os.close(reader)


def test_on_a_terminal_a_warning_is_coloured(terminal: Callable[[], Written]) -> None:
    written = terminal()
    Console().warn("beware")
    assert written() == "\x1b[33mwarning: beware\x1b[0m\r\n"


def test_no_color_is_heeded(terminal: Callable[[], Written], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    written = terminal()
    Console().warn("beware")
    assert written() == "warning: beware\r\n"


def test_on_a_terminal_there_is_a_bar_that_leaves_no_trace(terminal: Callable[[], Written]) -> None:
    written, to = terminal(), Console()
    with to.progress(4, 1) as show:
        show(2, "loss 0.5")
        to.say("epoch 1")
    said = written()
    assert "2/4" in said and "loss 0.5" in said and "epoch 1" in said
    assert said.endswith("\x1b[2K") and said.rindex("epoch 1") < said.rindex("\x1b[2K")


@pytest.mark.parametrize(("level", "environment"), ((-1, ""), (0, "1")), ids=("quiet", "CI"))
def test_a_bar_can_be_unwanted(
    level: int, environment: str, terminal: Callable[[], Written], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", environment)
    written, to = terminal(), Console(level=level)
    with to.progress(4) as show:
        show(2, "loss 0.5")
    to.warn("beware")
    assert "loss" not in written()


class Cell(io.StringIO):
    """Output of a notebook cell; `seen` is the visible text."""

    @property
    def seen(self) -> list[str]:
        lines = []
        for line in self.getvalue().split("\n"):
            shown = ""
            for written in line.split("\r"):  # text after a carriage return overwrites the line
                shown = written + shown[len(written) :]
            lines.append(shown.rstrip())
        return lines


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Cell]:
    """`cell = notebook()`: simulate a notebook cell: `get_ipython` exists, and stdout is not a terminal."""

    def begin() -> Cell:
        cell, shell = Cell(), type("ZMQInteractiveShell", (), {})
        monkeypatch.delenv("CI", raising=False)
        monkeypatch.setattr(builtins, "get_ipython", shell, raising=False)
        monkeypatch.setattr(sys, "stdout", cell)
        return cell

    return begin


def test_in_a_notebook_the_last_line_is_written_over(
    notebook: Callable[[], Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "REWRITE_S", -1.0)
    cell, to = notebook(), Console()
    to.say("begins")
    with to.progress(10) as show:
        show(1, "loss 0.5000 and much more")
        show(2, "loss 0.4")
        assert cell.seen == ["begins", "step 2 of 10  loss 0.4"]
        to.say("epoch 1")
        show(3, "loss 0.3")
        to.warn("beware")
    to.say("ends")
    assert cell.seen == ["begins", "epoch 1", "warning: beware", "ends", ""]
    assert "\x1b" not in cell.getvalue()


def test_in_a_notebook_the_line_goes_with_an_error_too(notebook: Callable[[], Cell]) -> None:
    cell = notebook()
    with pytest.raises(KeyboardInterrupt), Console().progress(10) as show:
        show(1, "loss 0.5")
        assert cell.seen == ["step 1 of 10  loss 0.5"]
        raise KeyboardInterrupt
    assert cell.seen == [""]


def test_in_a_notebook_fast_steps_do_not_flood_the_cell(notebook: Callable[[], Cell]) -> None:
    cell = notebook()
    with Console().progress(10_000) as show:
        for step in range(10_000):
            show(step, "loss 0.5")
    assert cell.getvalue().count("step") < 1000


@pytest.mark.parametrize(("level", "rank"), ((-1, "0"), (0, "1")), ids=("quiet", "another process"))
def test_in_a_notebook_the_line_can_be_unwanted(
    level: int, rank: str, notebook: Callable[[], Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    cell = notebook()
    with Console(level=level).progress(10) as show:
        show(1, "loss 0.5")
    assert cell.getvalue() == ""


def test_scores_on_a_line() -> None:
    scores: dict[str, Any] = {"loss": 0.5, "accuracy": 1.0, "f1": {"a": 1.0}, "confusion_matrix": [[1]]}
    assert scores_line(scores, "accuracy") == "accuracy 1.0000  loss 0.5000"
