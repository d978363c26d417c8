"""Language codes, language names and scripts.

Each entry of the table has the code in ISO 639-1 (M2M-100), ISO 639-3 (Marian), mBART-50 and NLLB (which includes the
script), and the English name (T5). `-`: the model family does not support the language.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from tunesmith.errors import shorten

_TABLE = """
af afr af_ZA afr_Latn Afrikaans       | am amh -     amh_Ethi Amharic      | ar ara ar_AR arb_Arab Arabic
az aze az_AZ azj_Latn Azerbaijani     | be bel -     bel_Cyrl Belarusian   | bg bul -     bul_Cyrl Bulgarian
bn ben bn_IN ben_Beng Bengali         | bs bos -     bos_Latn Bosnian      | ca cat -     cat_Latn Catalan
cs ces cs_CZ ces_Latn Czech           | cy cym -     cym_Latn Welsh        | da dan -     dan_Latn Danish
de deu de_DE deu_Latn German          | el ell -     ell_Grek Greek        | en eng en_XX eng_Latn English
eo epo -     epo_Latn Esperanto       | es spa es_XX spa_Latn Spanish      | et est et_EE est_Latn Estonian
eu eus -     eus_Latn Basque          | fa fas fa_IR pes_Arab Persian      | fi fin fi_FI fin_Latn Finnish
fr fra fr_XX fra_Latn French          | ga gle -     gle_Latn Irish        | gl glg gl_ES glg_Latn Galician
gu guj gu_IN guj_Gujr Gujarati        | ha hau -     hau_Latn Hausa        | he heb he_IL heb_Hebr Hebrew
hi hin hi_IN hin_Deva Hindi           | hr hrv hr_HR hrv_Latn Croatian     | hu hun -     hun_Latn Hungarian
hy hye -     hye_Armn Armenian        | id ind id_ID ind_Latn Indonesian   | is isl -     isl_Latn Icelandic
it ita it_IT ita_Latn Italian         | ja jpn ja_XX jpn_Jpan Japanese     | ka kat ka_GE kat_Geor Georgian
kk kaz kk_KZ kaz_Cyrl Kazakh          | km khm km_KH khm_Khmr Khmer        | ko kor ko_KR kor_Hang Korean
lt lit lt_LT lit_Latn Lithuanian      | lv lav lv_LV lvs_Latn Latvian      | mk mkd mk_MK mkd_Cyrl Macedonian
ml mal ml_IN mal_Mlym Malayalam       | mn mon mn_MN khk_Cyrl Mongolian    | mr mar mr_IN mar_Deva Marathi
ms msa -     zsm_Latn Malay           | mt mlt -     mlt_Latn Maltese      | my mya my_MM mya_Mymr Burmese
ne nep ne_NP npi_Deva Nepali          | nl nld nl_XX nld_Latn Dutch        | no nor -     nob_Latn Norwegian
pl pol pl_PL pol_Latn Polish          | ps pus ps_AF pbt_Arab Pashto       | pt por pt_XX por_Latn Portuguese
ro ron ro_RO ron_Latn Romanian        | ru rus ru_RU rus_Cyrl Russian      | si sin si_LK sin_Sinh Sinhala
sk slk -     slk_Latn Slovak          | sl slv sl_SI slv_Latn Slovenian    | so som -     som_Latn Somali
sq sqi -     als_Latn Albanian        | sr srp -     srp_Cyrl Serbian      | sv swe sv_SE swe_Latn Swedish
sw swa sw_KE swh_Latn Swahili         | ta tam ta_IN tam_Taml Tamil        | te tel te_IN tel_Telu Telugu
th tha th_TH tha_Thai Thai            | tl tgl tl_XX tgl_Latn Tagalog      | tr tur tr_TR tur_Latn Turkish
uk ukr uk_UA ukr_Cyrl Ukrainian       | ur urd ur_PK urd_Arab Urdu         | vi vie vi_VN vie_Latn Vietnamese
xh xho xh_ZA xho_Latn Xhosa           | yo yor -     yor_Latn Yoruba       | zh zho zh_CN zho_Hans Chinese
zu zul -     zul_Latn Zulu
"""
_OTHER_NAMES = {
    "zh": ("cmn", "chs", "chinese (simplified)", "中文", "汉语"),
    "en": ("英文", "英语"),
    "ja": ("日文", "日语"),
    "no": ("nb", "nob"),
    "de": ("ger",),
    "fr": ("fre",),
}
_SCRIPTS = {
    "Latn": "LATIN", "Cyrl": "CYRILLIC", "Hans": "CJK", "Hant": "CJK", "Jpan": "CJK", "Hang": "HANGUL",
    "Arab": "ARABIC", "Deva": "DEVANAGARI", "Grek": "GREEK", "Hebr": "HEBREW", "Thai": "THAI", "Beng": "BENGALI",
    "Gujr": "GUJARATI", "Taml": "TAMIL", "Telu": "TELUGU", "Mlym": "MALAYALAM", "Sinh": "SINHALA", "Khmr": "KHMER",
    "Mymr": "MYANMAR", "Geor": "GEORGIAN", "Armn": "ARMENIAN", "Ethi": "ETHIOPIC",
}  # fmt: skip
"""NLLB's script code -> the script in Unicode character names. Japanese, including kana, is CJK."""

CODE = re.compile(r"[A-Za-z]{2,3}([-_][A-Za-z]{2,4})?")
"""Pattern of a language code that is not in the table."""

SCRIPT_SAMPLE_LETTERS = 64


@dataclass(frozen=True)
class Language:
    """Codes and name of one language."""

    two: str
    three: str
    mbart: str
    nllb: str
    name: str

    @property
    def codes(self) -> tuple[str, ...]:
        """All codes and names, the shortest first."""
        codes = (self.two, self.three, self.mbart, self.nllb, self.name)
        return (*(code for code in codes if code != "-"), *_OTHER_NAMES.get(self.two, ()))


LANGUAGES = [Language(*entry.split()) for line in _TABLE.strip().splitlines() for entry in line.split("|")]
_BY_CODE = {code.lower(): language for language in LANGUAGES for code in language.codes}


def language(code: str) -> Language | None:
    """Return the language of a code or name, with or without a region (`en-GB`); None if it is unknown."""
    plain = code.strip().lower().replace("-", "_")
    return _BY_CODE.get(plain) or _BY_CODE.get(plain.partition("_")[0])


def validate_code(code: str) -> str:
    """Return the code if it is known or has the form of a language code.

    Raises:
        ValueError: it has not.
    """
    if language(code) is None and not CODE.fullmatch(code):
        raise ValueError(f"unknown language {shorten(code)}; give a code such as en, deu or zh_CN, or its English name")
    return code


def same(one: str, other: str) -> bool:
    """Return whether two codes mean the same language."""
    known = language(one)
    return one == other or (known is not None and known is language(other))


def name_of(code: str) -> str:
    """Return the English name, or the code itself if it is unknown."""
    known = language(code)
    return known.name if known else code


def spellings(code: str) -> tuple[str, ...]:
    """Return the code and all other codes and names of the language."""
    known = language(code)
    return tuple(dict.fromkeys((code, *(known.codes if known else ()))))


def column_names(code: str) -> tuple[str, ...]:
    """Return names that a column of that language may have, in lower case with underscores."""
    plain = (name.lower().replace("-", "_").replace(" ", "_") for name in spellings(code))
    return tuple(dict.fromkeys(plain))


def script_of_language(code: str) -> str | None:
    """Return the Unicode name of the script of a language; None if it is unknown."""
    tail = code.rpartition("_")[2]
    known = language(code)
    return _SCRIPTS.get(tail) or (_SCRIPTS[known.nllb.rpartition("_")[2]] if known else None)


def script_of(text: str) -> str:
    """Return the Unicode name of the most frequent script in the first letters of a text; empty without letters."""
    letters = [character for character in text[: 4 * SCRIPT_SAMPLE_LETTERS] if character.isalpha()][
        :SCRIPT_SAMPLE_LETTERS
    ]
    scripts = Counter(map(_script, letters))
    return max(scripts, key=scripts.__getitem__, default="")


@lru_cache(maxsize=8192)
def _script(letter: str) -> str:
    first = unicodedata.name(letter, "UNKNOWN").split()[0]
    return "CJK" if first in ("HIRAGANA", "KATAKANA", "BOPOMOFO") else first.partition("-")[0]
