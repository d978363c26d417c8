"""CoNLL: one word and tag per line, separated by tab or spaces; a blank line between sentences.

The word is in the first column and its tag in the last; the tag may come first, or a number before the word.
`-DOCSTART-` lines, comments before a sentence (`# id = 1`) and a header line are skipped. A row is a sentence; its
line is that of its first word.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from tunesmith.data import columns as schema
from tunesmith.data.formats.raw import BadRow, OpenedFile, RawRow, Rows, check_line, lines, open_text
from tunesmith.errors import DataError, RecipeError, counted, did_you_mean, shorten

TAG = re.compile(r"O|[BIESLUM]-\S+")
MAX_WORDS = 5000
"""Maximum words of a sentence; in a longer one, blank lines between sentences are probably missing."""

SAMPLE_CHARS = 65536
_CHARACTER_WITH_DIGIT = re.compile(r"\D[0-9]")
_LINE_ENDS = re.compile(r"\r\n|\r|\n")
_WORD_NAMES = {"word", "words", "token", "tokens", "text", "form"}
_TAG_NAMES = {"tag", "tags", "label", "labels", "ner", "ner_tag", "ner_tags", "entity"}
DOCUMENT_MARK = "-DOCSTART-"
_BLANKS = re.compile(r"[ \t]+")
ColumnMap = dict[str, str | int]


def looks_tagged(sample: str) -> bool:
    """Return whether the beginning of a file looks like one word and tag per line."""
    if sample.lstrip("\ufeff\n\r\t ").startswith(DOCUMENT_MARK):
        return True
    text = _LINE_ENDS.split(sample)
    text = text[:-1] if len(text) > 2 and len(sample) >= SAMPLE_CHARS else text
    words = [line for line in text if line.strip() and not line.startswith(("#", DOCUMENT_MARK))]
    rows = [_fields(line, "\t" in line) for line in words]
    last = Counter(row[-1] for row in rows if len(row) > 1 and row[0] and not _BLANKS.search(row[0]))
    if len(rows) > 1 and _are_tags([row[0] for row in rows if len(row) == 2 and not _BLANKS.search(row[1])], len(rows)):
        return True
    if "O" not in last or sum(last.values()) < 0.9 * len(rows):
        return False
    if _are_tags(list(last.elements()), len(rows)):
        return True
    blank = any(not line.strip() for line in text[:-1])
    return blank and last["O"] >= 0.3 * len(rows) and len(last) <= 50  # types without prefixes


def _are_tags(values: Sequence[str], count: int) -> bool:
    """Return whether nearly all of `count` values are O or tags with a prefix, and some are O."""
    return "O" in values and sum(bool(TAG.fullmatch(value)) for value in values) >= 0.9 * count


def open_rows(path: Path) -> OpenedFile:
    """Open a file: its columns are numbers, and each row maps a column to a list with one element per word."""
    with open_text(path) as file:
        sample = file.read(SAMPLE_CHARS)
    text = [line for line in _LINE_ENDS.split(sample) if line.strip() and not line.startswith(("#", DOCUMENT_MARK))]
    tabs = sum("\t" in line for line in text) > len(text) / 2
    widths = Counter(len(_fields(line, tabs)) for line in text[:1000])
    width = max((count for count in widths if count > 1), key=widths.__getitem__, default=0)
    if not width:
        what = "the file has no words with tags"
        raise DataError(what, where=str(path), hint="write one word and its tag per line")
    return OpenedFile([str(number) for number in range(width)], lambda: _rows(path, tabs, width))


def find_columns(
    path: Path, opened: OpenedFile, columns: schema.Columns, chosen: ColumnMap
) -> tuple[ColumnMap, str | None]:
    """Return role -> column number, from `data.columns` or else `_positions`, and a note for the user.

    Raises:
        RecipeError: the task has no such column.
        DataError: the file has no such column.
    """
    width, known = len(opened.names), schema.names_of(columns)
    for role, column in chosen.items():
        if role not in known:
            raise RecipeError(f"data.columns.{role}: the task has no such column", hint=did_you_mean(role, known))
        if not isinstance(column, int) or not 0 <= column < width:
            what = f"data.columns.{role}: no column {shorten(column)}"
            raise DataError(what, where=str(path), hint=f"CoNLL columns are numbers: 0 to {width - 1}")
    positions = _positions(opened)
    names = {column.kind: column.name for column in columns if column.kind in positions}
    mapping: ColumnMap = {names[kind]: column for kind, column in positions.items() if kind in names}
    mapping |= chosen
    listed = " and ".join(f"{kind} from column {mapping[name]}" for kind, name in names.items())
    is_standard = width == 2 and positions["words"] == 0
    notes = [f"{width} columns: {listed}, counted from 0"] if not is_standard and not chosen else []
    if (words := mapping.get(names.get("words", ""))) is not None and _have_position_digits(opened, words):
        what = "each character is followed by a digit, which is read as part of the word; inputs to predict lack it"
        notes.append(rf"{what}. To remove it: sed -E 's/^(.)[0-9]/\1/'")
    return mapping, f"{path}: {'; '.join(notes)}" if notes else None


def _positions(opened: OpenedFile) -> dict[schema.Kind, int]:
    """Locate words and tags: first and last column, except for tags before words, or word numbers in column 0."""
    last = len(opened.names) - 1
    sample = [raw.values for raw in islice(opened.rows(), 20) if isinstance(raw, RawRow)]
    first = [value for values in sample for value in values[0]]
    if last == 1 and _are_tags(first, len(first)) and not any(_are_tags(row[1], len(row[1])) for row in sample):
        return {"words": 1, "tags": 0}
    numbered = last > 1 and len(first) > 1 and all(_is_numbering(values[0]) for values in sample)
    return {"words": 1 if numbered else 0, "tags": last}


def _is_numbering(values: Sequence[str]) -> bool:
    """Return whether values are 1, 2, 3 ... (CoNLL-U)."""
    return list(values) == [str(number) for number in range(1, len(values) + 1)]


def _have_position_digits(opened: OpenedFile, column: str | int) -> bool:
    """Return whether words are single characters with a digit: the position within a word (Weibo NER)."""
    first = (raw.values[column] for raw in islice(opened.rows(), 100) if isinstance(raw, RawRow))
    words = [word for sentence in first for word in sentence]
    return sum(bool(_CHARACTER_WITH_DIGIT.fullmatch(word)) for word in words) > 0.9 * len(words)


def with_names(opened: OpenedFile) -> tuple[list[str | int], Rows]:
    """Return the columns with names (`tokens`, `tags`, `column_2` ...) and a reader of rows under these names."""
    known = {column: {"words": "tokens", "tags": "tags"}[kind] for kind, column in _positions(opened).items()}
    names: list[str | int] = [known.get(number, f"column_{number}") for number in range(len(opened.names))]

    def rows() -> Iterator[RawRow | BadRow]:
        for raw in opened.rows():
            if isinstance(raw, RawRow):
                raw = RawRow(raw.line, {names[column]: value for column, value in raw.values.items()})
            yield raw

    return names, rows


def _fields(line: str, tabs: bool) -> list[str]:
    """Split a line into values, without trailing spaces or one trailing tab."""
    if not tabs:
        return _BLANKS.split(line.strip(" \t\r\n"))
    fields = [field.strip(" \r\n") for field in line.split("\t")]
    return fields[:-1] if len(fields) > 2 and not fields[-1] else fields


def _rows(path: Path, tabs: bool, width: int) -> Iterator[RawRow | BadRow]:
    with open_text(path) as file:
        begin, words, bad = 0, list[list[str]](), None
        for number, line in enumerate(lines(file), start=1):
            line = line.rstrip("\r\n")
            fields = _fields(line, tabs)
            if not line.strip() or line.startswith(DOCUMENT_MARK):
                if words or bad:
                    yield bad or _sentence(begin, words, width)
                words, bad = [], None
            elif line.startswith("#") and not (words or bad) and not _is_word(fields, width, tabs):
                continue
            elif not begin and fields[0].lower() in _WORD_NAMES and fields[-1].lower() in _TAG_NAMES:
                continue
            else:
                begin = begin if words else number
                bad = bad or _line_fault(line, fields, number, width)
                words.append(fields)
                if len(words) > MAX_WORDS:
                    bad, words = bad or _endless(begin), words[:1]
        if words or bad:
            yield bad or _sentence(begin, words, width)


def _is_word(fields: list[str], width: int, tabs: bool) -> bool:
    """Return whether a line that begins with # is a word rather than a comment."""
    return len(fields) == width and (tabs or bool(TAG.fullmatch(fields[-1])))


def _sentence(begin: int, words: list[list[str]], width: int) -> RawRow:
    return RawRow(begin, {column: [fields[column] for fields in words] for column in range(width)})


def _endless(begin: int) -> BadRow:
    what = f"more than {MAX_WORDS:,} words without a blank line between sentences"
    return BadRow(begin, what, "add a blank line after each sentence", "sentence too long")


def _line_fault(line: str, fields: list[str], number: int, width: int) -> BadRow | None:
    """Return the line of a word as a bad row if it is invalid, else None."""
    if (bad := check_line(line, number)) is not None:
        return bad
    if "\0" in line:
        return BadRow(number, f"contains a NUL byte: {shorten(line[:100])}", "save the file as UTF-8 text", "NUL byte")
    if line.startswith("#") and len(fields) != width:
        return BadRow(number, f"a comment inside a sentence: {shorten(line)}", "move it above", "comment in a sentence")
    if len(fields) != width:
        other = len(_BLANKS.split(line.strip())) == width or len(line.strip().split("\t")) == width
        hint = "separate it like the other lines, by tab or by spaces" if other else "write one word and tag per line"
        return BadRow(
            number,
            f"{counted(len(fields), 'column')}, but the other lines have {width}: {shorten(line)}",
            hint,
            "wrong number of columns",
        )
    if not fields[0]:
        return BadRow(number, f"a tag without a word: {shorten(line)}", "remove the line", "tag without a word")
    if not fields[-1].strip():
        return BadRow(number, f"a word without a tag: {shorten(line)}", "use O for a word outside entities", "no tag")
    return None
