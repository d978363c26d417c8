"""Bad inputs 1-16, any file: each is read, read with a note, or refused with file and row."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from messages import has_parts

from tunesmith.data.formats import read_table
from tunesmith.data.formats.recognize import UNSUPPORTED_FORMATS
from tunesmith.errors import DataError
from tunesmith.tasks.text_classification import TextClassification
from tunesmith.training.dataset import Examples

Refuse = Callable[..., str]
Read = Callable[..., Examples]
ROWS = [("the café was great", "pos"), ("the plot was bad", "neg"), ("so warm", "pos"), ("so dull", "neg")]
CSV = "text,label\n" + "".join(f"{text},{label}\n" for text, label in ROWS)
FORMATS = {
    "csv": CSV,
    "tsv": CSV.replace(",", "\t"),
    "jsonl": "".join(json.dumps({"text": text, "label": label}, ensure_ascii=False) + "\n" for text, label in ROWS),
    "json": json.dumps([{"text": text, "label": label} for text, label in ROWS], ensure_ascii=False, indent=1),
}
each_format = pytest.mark.parametrize("kind", FORMATS)


def _rows(read: Examples, split: str = "train") -> list[tuple[object, object]]:
    return [(row.values["text"], row.values["label"]) for row in read.splits[split].rows()]


def test_a7_01_a_missing_file_is_refused_with_the_nearest_name(refuse: Refuse, write: Any, tmp_path: Path) -> None:
    write(CSV, "reviews.csv")
    assert has_parts(refuse(tmp_path / "reveiws.csv"), "reveiws.csv: no such file; ", "did you mean 'reviews.csv'?")
    assert has_parts(refuse(tmp_path / "none" / "a.csv"), "none/a.csv: no such file; ", "path")
    said = refuse(CSV, f"data.validation={tmp_path / 'held-out.jsonl'}")
    assert has_parts(said, "held-out.jsonl: no such file; ", "path")


@pytest.mark.parametrize(
    ("name", "said"), (("a" * 300, "File name too long"), ("train.csv/rows.csv", "Not a directory"))
)
def test_a7_01_a_path_that_can_be_none_is_refused(
    name: str, said: str, refuse: Refuse, write: Any, tmp_path: Path
) -> None:
    write(CSV, "train.csv")
    line = refuse(tmp_path / name)
    assert has_parts(line, name[:9], f"({said}); ", "path") and len(line) < 300


def test_a7_02_a_folder_with_files_named_as_splits_is_read(read: Read, write: Any, tmp_path: Path) -> None:
    write(CSV, "train.csv")
    write(gzip.compress(CSV.replace("so", "very").encode()), "Dev.csv.gz")
    write(FORMATS["jsonl"].replace("so", "not"), "test.jsonl")
    for name in ("notes.md", "train.png", "._train.csv", "trains.csv"):
        write("?", name)
    found = read(tmp_path, validation=0.5)
    assert found.rows == {"train": 4, "validation": 4, "test": 4}
    assert _rows(found, "test")[3] == ("not dull", "neg") and _rows(found, "validation")[2] == ("very warm", "pos")


def test_a7_02_a_folder_that_does_not_tell_is_refused(refuse: Refuse, write: Any, tmp_path: Path) -> None:
    (tmp_path / "valid").mkdir()
    assert has_parts(refuse(CSV, f"data.validation={tmp_path / 'valid'}"), "valid: ", "folder", "; ")
    write(CSV, "train.tsv")
    assert has_parts(refuse(tmp_path), "", ": ", "train.csv and train.tsv", "; ", "data.train")
    assert has_parts(refuse(tmp_path / "valid"), "valid: ", "train file", "; ", "train.csv", "data.train")


@pytest.mark.parametrize(
    ("name", "hint"),
    (
        ("missing.csv", "check the path"),
        ("trainig.csv", "did you mean 'training.csv'?"),
        ("training.tsv", "did you mean 'training.csv'?"),
        ("reviews-01.csv", "did you mean 'reviews-1.csv'?"),
        ("data.csv", "check the path"),
    ),
)
def test_only_a_name_that_is_near_is_proposed(name: str, hint: str, refuse: Refuse, write: Any, tmp_path: Path) -> None:
    for there in ("training.csv", "training.jsonl.gz", "dates.txt", "reviews-1.csv"):
        write(CSV, there)
    assert refuse(tmp_path / name).startswith(f"{name}: no such file; {hint}")


@pytest.fixture
def locked() -> Iterator[Path]:
    """A folder and files without any permission, accessed as another user than root."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "inside").mkdir()
        for path in (folder / "train.csv", folder / "inside" / "train.csv"):
            path.write_text(CSV)
            path.chmod(0)
        (folder / "inside").chmod(0)
        folder.chmod(0o755)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            yield folder
        finally:
            os.seteuid(user)
            (folder / "inside").chmod(0o700)


@pytest.mark.parametrize("name", ("train.csv", "inside", "inside/train.csv"))
def test_a7_03_what_may_not_be_read_is_refused(name: str, locked: Path, read: Read) -> None:
    with pytest.raises(DataError) as caught:
        read(locked / name)
    assert has_parts(str(caught.value), f"{locked / name}: ", "(Permission denied); ", "permissions")


@pytest.mark.parametrize("content", (b"", b"\n", b" \r\n\t\n", b'""\n', gzip.compress(b"", mtime=0)))
def test_a7_04_an_empty_file_is_refused(content: bytes, refuse: Refuse) -> None:
    said = refuse(content)
    assert has_parts(said, "train.csv: ", "empty; ") or has_parts(said, "train.csv: ", "no values; ")


@pytest.mark.parametrize("mark", (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
def test_a7_05_a_byte_order_mark_alone_is_an_empty_file(mark: bytes, refuse: Refuse) -> None:
    assert has_parts(refuse(mark), "train.csv: ", "empty; ", "right file", "download")


@pytest.mark.parametrize("content", ("text,label", "text\tlabel\n", "\ufefftext,label\r\n\r\n", "[]", " [\n]\n"))
def test_a7_06_a_header_without_rows_is_refused(content: str, refuse: Refuse) -> None:
    said = refuse(content)
    assert has_parts(said, "train.csv: ", "no rows; ")


def test_a7_06_a_parquet_file_without_rows_is_refused(refuse: Refuse, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string()), "label": pa.array([], pa.string())}), tmp_path / "a")
    assert has_parts(refuse(tmp_path / "a"), "a: ", "no rows; ")


@each_format
def test_a7_07_a_utf_8_byte_order_mark_is_passed_over(kind: str, read: Read) -> None:
    assert _rows(read(codecs.BOM_UTF8 + FORMATS[kind].encode())) == ROWS


@each_format
@pytest.mark.parametrize("order", ("le", "be"))
def test_a7_08_utf_16_is_read(order: str, kind: str, read: Read) -> None:
    mark = {"le": codecs.BOM_UTF16_LE, "be": codecs.BOM_UTF16_BE}[order]
    assert _rows(read(mark + FORMATS[kind].encode(f"utf-16-{order}"))) == ROWS


@each_format
@pytest.mark.parametrize("encoding", ("utf-16-le", "utf-16-be", "utf-32"))
def test_a7_08_utf_16_without_its_mark_and_utf_32_are_refused(encoding: str, kind: str, refuse: Refuse) -> None:
    said = refuse(FORMATS[kind].encode(encoding))
    assert has_parts(said, "train.csv:1: ", "NUL bytes; ", "UTF-16", "save it as UTF-8")


def test_a7_08_damaged_utf_16_is_refused(refuse: Refuse) -> None:
    assert has_parts(refuse(CSV.encode("utf-16")[:-1]), "train.csv: ", "UTF-16", "truncated", "; save it as UTF-8")


SAVE_IT = "; ", "UTF-8", "iconv -f cp1252 -t utf-8", "iconv -f gb18030 -t utf-8", "data.on_bad_row=skip"


@each_format
def test_a7_09_latin_1_is_refused_by_row_and_byte(kind: str, refuse: Refuse) -> None:
    said = refuse(FORMATS[kind].encode("latin-1"))
    line = {"csv": 2, "tsv": 2}.get(kind, 1)
    assert has_parts(said, f"train.csv:{line}: byte 0xe9 ", "not UTF-8", "the caf? was great", *SAVE_IT), said


def test_a7_09_a_header_in_latin_1_is_refused(refuse: Refuse) -> None:
    said = refuse(CSV.replace("text", "critère").encode("latin-1"), "data.columns.text=critère")
    assert has_parts(said, "train.csv:1: byte 0xe8 ", "not UTF-8", "'crit?re,label'; ", "UTF-8")


@each_format
def test_a7_10_a_row_in_another_encoding_is_refused_or_skipped(kind: str, refuse: Refuse, read: Read) -> None:
    good = FORMATS[kind].encode()
    mixed = good.replace(b"so warm", "so cafÃ© é".encode("latin-1"))
    line = {"csv": 4, "tsv": 4}.get(kind, 3)
    assert has_parts(refuse(mixed), f"train.csv:{line}: byte 0xc3 ", "not UTF-8", "; ") or b"\xc3\xa9" in mixed
    found = read(mixed, on_bad_row="skip")
    assert _rows(found) == [ROWS[0], ROWS[1], ROWS[3]]
    assert found.notes == ["train: skipped 1 row (not UTF-8)"]


@pytest.mark.parametrize("kind", ("csv", "tsv", "jsonl"))
def test_a7_11_a_nul_byte_in_a_row_is_refused_or_skipped(kind: str, refuse: Refuse, read: Read) -> None:
    content = FORMATS[kind].replace("so warm", "so\0warm")
    line = 3 if kind == "jsonl" else 4
    said = refuse(content)
    assert said.startswith(f"train.csv:{line}: ") and "so\\x00warm" in said and "\0" not in said
    found = read(content, on_bad_row="skip")
    assert _rows(found) == [ROWS[0], ROWS[1], ROWS[3]] and len(found.notes) == 1


def test_a7_11_a_nul_byte_in_the_header_is_refused(refuse: Refuse) -> None:
    said = refuse(CSV.replace("text,", "text\0,"))
    assert has_parts(said, "train.csv:1: ", "NUL byte", "'text\\x00,label\\n'; ", "UTF-8")


@pytest.mark.parametrize("ends", (("\r\n",), ("\r",), ("\r\n", "\n", "\r"), ("\n", "\n\n", "\r\n\r\n")))
@pytest.mark.parametrize("kind", FORMATS)
def test_a7_12_all_line_ends_are_line_ends(ends: tuple[str, ...], kind: str, read: Read, refuse: Refuse) -> None:
    lines = FORMATS[kind].splitlines()
    content = "".join(line + ends[number % len(ends)] for number, line in enumerate(lines))
    assert _rows(read(content)) == ROWS
    if kind in ("csv", "tsv"):
        line = 1 + len(io.StringIO(content, newline=None).readlines())
        assert has_parts(refuse(f"{content}only one field"), f"train.csv:{line}: 1 field,", "header has 2", "; ")


def test_a7_12_line_ends_inside_quotes_stay_as_they_are(read: Read) -> None:
    assert _rows(read('text,label\r\n"so\r\nwarm",pos\r\n"so\rdull",neg\n'))[0][0] == "so\r\nwarm"


@each_format
def test_a7_13_a_compressed_file_is_read_whatever_its_name(kind: str, read: Read) -> None:
    assert _rows(read(gzip.compress(FORMATS[kind].encode()))) == ROWS


@pytest.mark.parametrize(
    "damage",
    (lambda data: data[:-20], lambda data: data[:-4] + b"oops", lambda data: data[:300] + b"?" * 50 + data[350:]),
    ids=("cut off", "wrong size", "overwritten"),
)
def test_a7_13_a_damaged_compressed_file_is_refused(damage: Callable[[bytes], bytes], refuse: Refuse) -> None:
    lines = "".join(f"{os.urandom(20).hex()},{'pos' if n % 2 else 'neg'}\n" for n in range(5000))
    said = refuse(damage(gzip.compress(f"text,label\n{lines}".encode())))
    assert has_parts(said, "train.csv: ", "gzip", "damaged (", "); ", "again")


def test_a7_14_an_excel_file_named_csv_is_refused(refuse: Refuse) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr("xl/workbook.xml", CSV)
    said = refuse(packed.getvalue())
    what, hint = UNSUPPORTED_FORMATS[b"PK\x03\x04"]
    assert has_parts(said, "train.csv: unsupported format", what, f"; {hint}") and "Excel" in what


@pytest.mark.parametrize("magic", UNSUPPORTED_FORMATS, ids=lambda magic: UNSUPPORTED_FORMATS[magic][0])
def test_a7_14_other_kinds_of_file_are_refused(magic: bytes, refuse: Refuse) -> None:
    what, hint = UNSUPPORTED_FORMATS[magic]
    said = refuse(magic + b"\n" + CSV.encode())
    assert has_parts(said, "train.csv: unsupported format", what, f"; {hint}")


def test_a7_14_a_page_in_place_of_a_download_is_refused(refuse: Refuse) -> None:
    assert has_parts(refuse("\n <HTML><body>log in</body>"), "train.csv: unsupported format", "HTML", "; ")


def test_a7_14_a_text_that_begins_like_a_kind_of_file_is_a_text(read: Read) -> None:
    rows = [("bzhang wrote this great plot", "1"), ("SQLite is so very bad", "0"), *((text, "1") for text, _ in ROWS)]
    assert _rows(read("".join(f"{text},{label}\n" for text, label in rows))) == rows


def test_a7_15_ten_gigabytes_of_nothing_are_refused_at_once(refuse: Refuse, tmp_path: Path) -> None:
    with (tmp_path / "huge.csv").open("wb") as file:
        file.write(CSV.encode() * 2000)
        file.truncate(10 * 2**30)  # a sparse file
    said = refuse(tmp_path / "huge.csv")
    assert has_parts(said, "huge.csv:10001: ", "16,777,216 characters", "'\\x00", "; ") and len(said) < 200


def test_a7_15_rows_are_read_one_after_the_other(tmp_path: Path) -> None:
    """The first rows can be read although the file is truncated."""
    whole = gzip.compress("".join([CSV, *(f"{os.urandom(20).hex()},pos\n" for _ in range(20_000))]).encode())
    (tmp_path / "cut.csv.gz").write_bytes(whole[:-50])
    rows = iter(read_table(tmp_path / "cut.csv.gz", TextClassification().columns))
    assert [next(rows).values["label"] for _ in range(10_000)][:4] == [label for _, label in ROWS]
    with pytest.raises(DataError, match="cut.csv.gz: .*gzip.* damaged .*; "):
        list(rows)


READ_IN_A_CHILD = r"""
import re, sys
from pathlib import Path
from tunesmith.recipe import Data
from tunesmith.tasks.text_classification import TextClassification
from tunesmith.training import dataset

def peak_mb():
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) // 1024

before = peak_mb()
read = dataset.read(TextClassification(), Data(train=sys.argv[1], validation=0.1), seed=0)
assert sum(1 for _ in read.splits["validation"].rows()) == read.rows["validation"]
print(sum(read.rows.values()), before, peak_mb())
"""


def _peak_mb(path: Path) -> tuple[int, int, int]:
    """Read a file in a process of its own; return its rows, and the memory before and at the peak."""
    done = subprocess.run(
        [sys.executable, "-c", READ_IN_A_CHILD, str(path)], capture_output=True, text=True, check=True, timeout=250
    )
    rows, before, peak = map(int, done.stdout.split())
    return rows, before, peak


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the peak of a process")
@pytest.mark.parametrize("kind", ("csv", "json"))
def test_a7_15_memory_does_not_grow_with_the_file(kind: str, tmp_path: Path) -> None:
    start, row, between, end = {
        "csv": ("text,label\n", '"{text}",{label}', "\n", "\n"),
        "json": ("[", '{{"text": "{text}", "label": "{label}"}}', ",\n", "]"),
    }[kind]
    with (tmp_path / "big").open("w") as file:
        for number in range(200_000):
            file.write(start if number == 0 else between)
            file.write(row.format(text=f"{number} {'very ' * 300}great", label=("neg", "pos")[number % 2]))
        file.write(end)
    assert (tmp_path / "big").stat().st_size > 3e8
    rows, before, peak = _peak_mb(tmp_path / "big")
    print(f"{before} MB before, {peak} MB at the peak")
    assert rows == 200_000 and peak < 500 and peak - before < 100


def test_a7_16_a_loop_of_links_is_refused(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "a.csv").symlink_to(tmp_path / "b.csv")
    (tmp_path / "b.csv").symlink_to(tmp_path / "a.csv")
    said = refuse(tmp_path / "a.csv")
    assert has_parts(said, "a.csv: ", "(Too many levels of symbolic links); ", "path")


def test_a7_16_a_link_to_a_file_is_read_and_one_to_nothing_is_refused(
    read: Read, refuse: Refuse, write: Any, tmp_path: Path
) -> None:
    (tmp_path / "link.csv").symlink_to(write(CSV, "a.csv"))
    assert _rows(read(tmp_path / "link.csv")) == ROWS
    (tmp_path / "a.csv").unlink()
    assert refuse(tmp_path / "link.csv").startswith("link.csv: no such file; ")


@pytest.mark.parametrize("kind", ("pipe", "device", "socket"))
@pytest.mark.parametrize("split", ("train", "validation"))
def test_a7_16_what_is_no_regular_file_is_refused_without_being_opened(
    split: str, kind: str, refuse: Refuse, tmp_path: Path
) -> None:
    path = tmp_path / "odd.csv"
    with socket.socket(socket.AF_UNIX) as listener:
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "device":
            path.symlink_to("/dev/zero")
        else:
            listener.bind(os.path.relpath(path))
        said = refuse(path) if split == "train" else refuse(CSV, f"data.validation={path}")
    assert has_parts(said, "odd.csv: not a regular file", "; ", "file")
