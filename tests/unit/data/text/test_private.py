"""Personal data is found by pattern and checksum in linear time, and shown masked."""

from __future__ import annotations

import time

import pytest

from tunesmith.data.text.private import find_private, mask_value


@pytest.mark.parametrize(
    ("kind", "text"),
    (
        ("e-mail", "write to joe.bloggs+films@mail.example.co.uk today"),
        ("e-mail", "邮箱joe@example.com。"),
        ("iban", "pay to DE89 3704 0044 0532 0130 00 please"),
        ("iban", "GB82WEST12345698765432"),
        ("chinese-id", "身份证11010519491231002X。"),
        ("credit-card", "card 4111 1111 1111 1111."),
        ("credit-card", "378282246310005"),
        ("chinese-mobile", "电话13812345678打给我"),
        ("chinese-mobile", "+86 138-1234-5678"),
        ("chinese-mobile", "电话18004516434"),
        ("phone", "call 18004516434."),
        ("ip", "from 192.168.1.44, or so"),
        ("ip", "2001:db8::ff00:42:8329"),
        ("phone", "call (212) 555-0123"),
        ("phone", "212-555-0123"),
        ("phone", "+44 20 7946 0958"),
        ("phone", "座机010-62345678"),
        ("chinese-mobile", "电话１３８１２３４５６７８"),
        ("e-mail", "joe＠example.com"),
        ("us-ssn", "SSN 123-45-6789"),
        ("phone", "appelez le 01 23 45 67 89"),
    ),
)
def test_each_kind_is_found_once_and_masked(kind: str, text: str) -> None:
    ((found, value),) = find_private(text)
    assert found == kind
    assert "*" in value and value not in text


@pytest.mark.parametrize(
    "text",
    (
        "card 4111 1111 1111 1112",
        "DE89 3704 0044 0532 0130 01",
        "110105194912310021",
        "110105194913310020",
        "2019-03-04 12:30:45, 1999-2008",
        "section 2.3.1.4, 12.4.1.2 and 22.2.1.2, version 1.2.3.4.5",
        "999.300.1.1",
        "std::vector<int> and a::b at 12:30",
        "1,000,000,000 or 123456789012",
        "3.14159265358979",
        "ISBN 978-3-16-148410-0",
        "100-200-3000 and 900-12-3456",
        "@handle and #2024",
    ),
)
def test_what_only_looks_like_it_is_left_alone(text: str) -> None:
    assert list(find_private(text)) == []


def test_several_are_counted_each() -> None:
    text = "joe@example.com, jane@example.com, 13812345678 and 192.168.1.44"
    assert [kind for kind, _ in find_private(text)] == ["e-mail", "e-mail", "chinese-mobile", "ip"]


def test_masking_leaves_the_ends_of_what_is_long() -> None:
    assert mask_value("joe@mail.com") == "jo*@****.*om" and mask_value("1.2.3.44") == "1.2.*.**"


@pytest.mark.parametrize(
    "text", ("1" * 50_000, "1 " * 30_000, "a." * 30_000 + "@b", "a:" * 30_000, "+1" * 30_000, "@" * 50_000)
)
def test_hostile_texts_take_no_time(text: str) -> None:
    began = time.process_time()
    list(find_private(text))
    assert time.process_time() - began < 1
