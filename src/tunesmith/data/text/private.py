"""Detection of personal data (PII) in texts: numbers and addresses that have a fixed form.

If a kind has a checksum, it must be valid: Luhn for cards (ISO/IEC 7812), modulo 97 for IBANs (ISO 13616), modulo 11-2
for Chinese identity numbers (ISO 7064). Names and postal addresses have no fixed form and are not detected.
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from collections.abc import Callable, Iterator
from datetime import date

_QUICK_CHECK = re.compile(r"@|\d{3}|\d[ .-]\d|:[0-9a-fA-F]{0,4}:")
"""A text without a match has no personal data of any kind."""
_CARD_NUMBERS = re.compile(
    r"4\d{12}(?:\d{3}){0,2}|(?:5[1-5]|2[2-7]|35)\d{14}|3[47]\d{13}|3[068]\d{12}|6(?:011|5\d\d|4[4-9]\d|2\d\d)\d{12,15}"
)
"""Prefixes and lengths of card numbers: Visa, Mastercard, JCB, American Express, Diners, Discover and UnionPay."""


_TOLL_FREE = re.compile(r"18(?:00|33|44|55|66|77|88)[2-9]\d{6}")
"""Toll-free numbers of the United States without separators; in a Chinese text these digits are a mobile number."""
_HAN = re.compile("[\u4e00-\u9fff]")


def find_private(text: str) -> Iterator[tuple[str, str]]:
    """Yield (kind, masked value) of each match. A match of one kind is not reported as another kind too."""
    text = unicodedata.normalize("NFKC", text)  # full-width digits and @ become ASCII
    if not _QUICK_CHECK.search(text):
        return
    for kind, (pattern, is_valid) in KINDS.items():
        matches = [match for match in pattern.finditer(text) if is_valid(match)]
        for match in matches:
            yield kind, mask_value(match[0])
        for match in reversed(matches):
            text = f"{text[: match.start()]} # {text[match.end() :]}"


def mask_value(value: str) -> str:
    """Mask all letters and digits except the first two and, in long values, the last two."""
    places = [at for at, character in enumerate(value) if character.isalnum()]
    visible = {*places[:2], *(places[-2:] if len(places) > 8 else ())}
    return "".join("*" if at in places and at not in visible else character for at, character in enumerate(value))


def _digits(value: str) -> list[int]:
    return [int(character) for character in value if character.isdigit()]


def _is_card(match: re.Match[str]) -> bool:
    digits = _digits(match[0])
    doubled = [2 * digit if place % 2 else digit for place, digit in enumerate(reversed(digits))]
    issued = _CARD_NUMBERS.fullmatch("".join(map(str, digits)))
    return issued is not None and sum(digit - 9 if digit > 9 else digit for digit in doubled) % 10 == 0


def _is_iban(match: re.Match[str]) -> bool:
    plain = match[0].replace(" ", "")
    return 15 <= len(plain) <= 34 and int("".join(str(int(part, 36)) for part in plain[4:] + plain[:4])) % 97 == 1


def _is_chinese_id(match: re.Match[str]) -> bool:
    value = match[0]
    try:
        born = date(int(value[6:10]), int(value[10:12]), int(value[12:14]))
    except ValueError:
        return False
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
    rest = sum(weight * int(digit) for weight, digit in zip(weights, value, strict=False)) % 11
    return born.year >= 1900 and "10X98765432"[rest] == value[-1].upper()


def _is_chinese_mobile(match: re.Match[str]) -> bool:
    return not _TOLL_FREE.fullmatch(match[0]) or bool(_HAN.search(match.string))


def _is_ip(match: re.Match[str]) -> bool:
    try:
        address = ipaddress.ip_address(match[0])
    except ValueError:
        return False
    if address.version == 4:  # small numbers are probably a section number, as in 22.2.1.2
        *_, second, first = sorted(address.packed)
        return first >= 100 or second >= 20
    return any(len(part) == 4 for part in match[0].split(":"))  # else probably code, such as `a::b`


def _is_phone(match: re.Match[str]) -> bool:
    return 8 <= len(_digits(match[0])) <= 15 and len(set(_digits(match[0]))) > 2


def _form(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.ASCII)  # a word boundary may be next to a Chinese character


KINDS: dict[str, tuple[re.Pattern[str], Callable[[re.Match[str]], bool]]] = {
    "e-mail": (
        _form(r"[\w.+-]{1,64}@(?:[a-zA-Z0-9-]{1,63}\.){1,8}[a-zA-Z]{2,24}\b"),
        lambda match: True,
    ),
    "iban": (_form(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b"), _is_iban),
    "chinese-id": (_form(r"(?<![0-9A-Za-z])[1-9]\d{16}[0-9Xx](?![0-9A-Za-z])"), _is_chinese_id),
    "credit-card": (
        _form(
            r"(?<![\d.-])(?:\d{13,19}|\d{4}([ -])\d{4}\1\d{4}\1\d{1,4}(?:\1\d{1,3})?"
            r"|\d{4}([ -])\d{6}\2\d{4,5})(?![\d-])"
        ),
        _is_card,
    ),
    "chinese-mobile": (
        _form(r"(?<![0-9A-Za-z.])(?:(?:\+|00)?86[ -]?)?1[3-9]\d(?:\d{8}|[ -]\d{4}[ -]\d{4})(?![0-9A-Za-z])"),
        _is_chinese_mobile,
    ),
    "us-ssn": (
        _form(r"(?<![\w-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])"),
        lambda match: True,
    ),
    "ip": (
        _form(
            r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.]*\d)|(?<![\w:])[0-9a-fA-F]{0,4}(?::[0-9a-fA-F]{0,4}){2,7}(?![\w:])"
        ),
        _is_ip,
    ),
    "phone": (
        _form(
            r"(?<![\w.+-])(?<!\d )(?:\+\d{1,3}(?:[ .-]?\(?\d{1,4}\)?){2,6}"  # +44 20 7946 0958
            rf"|{_TOLL_FREE.pattern}"
            r"|(?:1[ .-])?\([2-9]\d{2}\) ?\d{3}[ .-]\d{4}|(?:1[ .-])?[2-9]\d{2}([.-])\d{3}\1\d{4}"  # (212) 555-0123
            r"|0\d{2,3}-\d{7,8}|0\d{2,4}(?: \d{3,4}){2}|0\d(?: \d{2}){4})(?! ?\d)(?![\w-])"  # 010-62345678
        ),
        _is_phone,
    ),
}
"""Kind -> its pattern and a further check; more specific kinds come first."""
