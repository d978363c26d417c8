"""Tagging schemes are recognized; exactly the planted errors are found."""

from __future__ import annotations

import numpy as np
import pytest

from tunesmith.data.formats import Row
from tunesmith.data.text.tags import PREFIXES, Scheme, TagSet, row_faults, scheme_of, tag_faults, tags_of_types

SENTENCES: dict[Scheme, list[str]] = {
    "BIO": ["B-A I-A O B-B", "B-A B-A I-A", "O O B-B"],
    "IO": ["I-A I-A O I-B", "O I-A"],
    "IOB1": ["I-A I-A B-A O", "O I-B I-A"],
    "BIOES": ["B-A E-A O S-B", "B-A I-A E-A S-A"],
    "BILOU": ["B-A L-A O U-B", "B-A I-A L-A U-A"],
    "BMES": ["B-A E-A O S-B", "B-A M-A M-A E-A"],
}


@pytest.mark.parametrize("scheme", PREFIXES)
def test_each_scheme_is_recognised_and_sound_in_itself(scheme: Scheme) -> None:
    sentences = [tags.split() for tags in SENTENCES[scheme]]
    assert scheme_of(sentences) == scheme
    assert [tag_faults(tags, scheme) for tags in sentences] == [[] for _ in sentences]


@pytest.mark.parametrize(("tags", "scheme"), (("PER PER O LOC", "IO"), ("O O", None), ("B-A O B-B", "BIO")))
def test_types_without_prefixes_single_words_and_nothing(tags: str, scheme: Scheme | None) -> None:
    assert scheme_of([tags.split()]) == scheme


def test_some_faults_do_not_make_another_scheme() -> None:
    sound = [tags.split() for tags in SENTENCES["BIO"]] * 10
    assert scheme_of([*sound, ["O", "I-A"], ["S-A", "O"], ["B_A", "O"], ["U-B"]]) == "BIO"


def test_a_misspelt_prefix_is_no_type_of_its_own() -> None:
    assert scheme_of([["B_A", "I-A"], ["B_A", "O"], ["O", "B_B"]]) == "BIO"
    assert scheme_of([["cell_line", "O"], ["DNA", "O"], ["S1", "O"]]) == "IO"
    (fault,) = tag_faults(["b:A"], "IO")
    assert fault.what == "'b:A' is not a tag of the IO scheme"


WRONG = {
    "I begins": ("BIO", "O I-A O", 1, "'I-A' after 'O': a BIO entity cannot begin like this", "begin it with B-A"),
    "I begins a sentence": ("BIO", "I-A O", 0, "'I-A' after 'O'", "B-A"),
    "another type": ("BIO", "B-A I-B O", 1, "'I-B' after 'B-A'", "B-B"),
    "typo": ("BIO", "O B_A O", 1, "'B_A' is not a tag of the BIO scheme", "did you mean 'B-A'?"),
    "small letter": ("BIO", "O b-A O", 1, "'b-A' is not a tag of the BIO scheme", "did you mean 'B-A'?"),
    "of another scheme": ("BIO", "O U-A O", 1, "'U-A' is not a tag of the BIO scheme", "use O or B-TYPE, I-TYPE"),
    "a type alone": ("BIO", "O A O", 1, "'A' is not a tag of the BIO scheme", "use O"),
    "B in IOB1": ("IOB1", "O B-A O", 1, "'B-A' after 'O': IOB1 uses B only after another A", "I-A"),
    "left open": ("BIOES", "B-A O O", 1, "'O' after 'B-A': unfinished entity", "in BIOES, end it"),
    "open at the end": ("BILOU", "O B-A", 1, "'O' after 'B-A': unfinished entity", "L-A"),
    "E begins": ("BIOES", "O E-A", 1, "'E-A' after 'O'", "B-A"),
    "S inside": ("BIOES", "B-A S-A", 1, "'S-A' after 'B-A': unfinished entity", "E-A"),
}


@pytest.mark.parametrize(("scheme", "tags", "index", "what", "hint"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_of_the_word(scheme: Scheme, tags: str, index: int, what: str, hint: str) -> None:
    (fault,) = tag_faults(tags.split(), scheme)
    assert fault.index == index and what in fault.what and hint in fault.hint


@pytest.mark.parametrize("scheme", ("BIO", "BIOES", "BILOU", "IOB1", "BMES"))
def test_every_planted_fault_is_found_by_its_line_and_nothing_else(scheme: Scheme) -> None:
    draw = np.random.default_rng(0)
    sound = [tags.split() for tags in SENTENCES[scheme]]
    rows, planted, line = [], set(), 1
    for number in range(600):
        tags = ["O", *sound[number % len(sound)], "O"]
        if number % 3 == 0:
            place = int(draw.integers(len(tags)))
            tags[place] = "B_A"
            planted.add(f"a.conll:{line + place}")
        rows.append((Row(f"a.conll:{line}", {}, by_line=True), tags))
        line += len(tags) + 1
    found = [place for place, fault in row_faults(rows, scheme) if "is not a tag" in fault.what]
    others = {place for place, fault in row_faults(rows, scheme) if "is not a tag" not in fault.what}
    assert set(found) == planted and len(found) == 200
    lines = {int(place.rpartition(":")[2]) for place in planted}
    assert all(int(place.rpartition(":")[2]) - 1 in lines for place in others), "only next to a planted one"


def test_a_tag_set_knows_all_parts_of_its_types() -> None:
    assert tags_of_types({"B", "A"}, "BILOU", bare=False) == ["O", *(f"{p}-{t}" for t in "AB" for p in "BILU")]
    assert tags_of_types({"PER"}, "IO", bare=True) == ["O", "PER"]
    assert TagSet(["O", "U-A", "L-A", "B-A"]).spans(["U-A", "B-A", "L-A", "O"]) == [(0, 1, "A"), (1, 3, "A")]
