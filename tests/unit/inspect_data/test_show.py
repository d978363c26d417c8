"""`data show` prints the encoded examples: special tokens, truncation, windows, and targets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import BertConfig, PreTrainedTokenizerFast

from tunesmith.data.formats import Row
from tunesmith.data.text.texts import spell
from tunesmith.inspect_data import show as data_show
from tunesmith.recipe import Data
from tunesmith.tasks.token_classification import TokenClassification
from tunesmith.testing import tiny_tokenizer

Show = Callable[..., tuple[int, str, str]]


@pytest.fixture
def show(command: Any, tiny_bert: Path, reviews_csv: Path) -> Show:
    """`show("-n", "2")`: exit code, stdout and stderr for the sixty reviews."""
    return lambda *words: command("data", "show", str(reviews_csv), "--model", str(tiny_bert), *words)


def test_tokens_and_target_of_each_row(show: Show, reviews_csv: Path) -> None:
    code, out, _ = show("-n", "2", "--json")
    first, second = json.loads(out)["rows"]
    assert code == 0 and first["place"] == f"{reviews_csv}:2" and second["place"] == f"{reviews_csv}:3"
    (tokens,) = first["windows"]
    assert [token["text"] for token in tokens if token["special"]] == ["[CLS]", "[SEP]"]
    assert first["target"] in ("positive", "negative") and all(token["target"] is None for token in tokens)
    code, out, _ = show("--row", "3")
    assert code == 0 and out.startswith(f"{reviews_csv}:4\n  target: ") and " (carries the loss)\n  [CLS] the " in out
    assert "\x1b" not in out


def test_what_is_cut_and_what_is_read_in_windows(show: Show) -> None:
    out = show("--row", "1", "data.max_length=5")[1]
    assert "(5 tokens, truncated)" in out
    rows = json.loads(show("--row", "1", "data.max_length=5", "task.windows=3", "--json")[1])["rows"]
    assert len(rows[0]["windows"]) > 1 and all(len(window) <= 5 for window in rows[0]["windows"])
    assert [window[0]["text"] for window in rows[0]["windows"]] == ["[CLS]"] * len(rows[0]["windows"])


def test_targets_of_tokens_are_marked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    task = TokenClassification(tags=["O", "B-FILM"])
    bound = task.bind(tiny_tokenizer(), BertConfig(), Data(max_length=8))
    monkeypatch.setattr(type(bound), "encode", lambda self, rows: [fields for _ in rows])
    fields = {"input_ids": [2, 5, 6, 3], "windows": [4], "first": [1], "tags": [1]}
    (shown,) = data_show.encode_rows([(0, Row("x:1", {"text": "the film"}))], bound, 0)
    preview = shown.preview
    assert [token.target for token in preview.windows[0]] == [None, "B-FILM", None, None] and preview.target is None
    page = data_show.page([shown], "a <title>")
    assert "a &lt;title&gt;" in page and 'class="token loss"' in page and "B-FILM" in page


def test_the_page_is_escaped_and_not_overwritten(command: Any, tiny_bert: Path, tmp_path: Path) -> None:
    data, page = tmp_path / "train.csv", tmp_path / "page.html"
    data.write_text("text,label\n<script>alert(1)</script> {{ 7 * 7 }},<b>\nfine film,b\n")
    words = ("data", "show", str(data), "--model", str(tiny_bert), "--html", str(page))
    code, out, err = command(*words)
    source = page.read_text(encoding="utf-8")
    assert code == 0 and "wrote" in out and "<script" not in source and "&lt;b&gt;" in source and "http" not in source
    assert command(*words)[0] == 2


def test_colour_only_where_it_is_wanted(show: Show, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[" in show("-n", "1")[1]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[3" not in show("-n", "1")[1]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    ((("--row", "999"), 2, "train has no row 999"), (("--split", "test"), 2, "there is no test split; known: train")),
)
def test_what_cannot_be_shown(words: tuple[str, ...], code: int, said: str, show: Show) -> None:
    found, out, err = show(*words)
    assert found == code and out == "" and said in err


def test_a_model_is_needed(command: Any, reviews_csv: Path) -> None:
    code, _, err = command("data", "show", str(reviews_csv))
    assert code == 2 and "--model NAME" in err


def test_hidden_words_of_fill_mask_are_shown_with_what_stood_there(
    command: Any, tiny_bert: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"the film was great and {'very ' * number}dull .\n" for number in range(12)))
    words = (
        "data",
        "show",
        str(text),
        "task=fill-mask",
        "task.mask_share=0.4",
        "--model",
        str(tiny_bert),
        "-n",
        "1",
        "--json",
    )
    code, out, _ = command(*words)
    (block,) = json.loads(out)["rows"]
    told = [token for token in block["windows"][0] if token["target"] is not None]
    assert code == 0 and block["target"] is None and len(told) == pytest.approx(0.4 * 62, abs=3)
    assert sum(token["text"] == "[MASK]" for token in told) > len(told) / 2
    assert json.loads(command(*words)[1]) == json.loads(out)


def test_tags_stand_at_first_sub_words_and_go_along(command: Any, tiny_bert: Path, tmp_path: Path) -> None:
    data = tmp_path / "train.conll"
    data.write_text("the\tO\ngreat\tB-FILM\nfilm\tI-FILM\nwas\tO\nvery\tO\ndull\tO\n\na\tO\nplot\tO\n\n")
    words = ("data", "show", str(data), "--model", str(tiny_bert), "--row", "1")
    code, out, _ = command(*words)
    assert code == 0 and "[CLS] the<O> great<B-FILM> film<I-FILM> was<O> very<O> dull<O> [SEP]" in out
    code, out, _ = command(*words, "--augmented", "data.augment=[{name: word-dropout, probability: 0.6}]")
    assert code == 0 and out.count("great<B-FILM> film<I-FILM>") == 4 and out.count("very<O>") < 4


@pytest.mark.parametrize(
    ("row", "task"),
    (({"text": "a great film", "spans": [[2, 7, "X"]]}, "token-classification"), ("a great film", "fill-mask")),
)
def test_what_a_run_would_not_change_is_not_shown_changed(
    row: Any, task: str, command: Any, tiny_bert: Path, tmp_path: Path
) -> None:
    data = tmp_path / ("train.txt" if isinstance(row, str) else "train.jsonl")
    other = "the plot" if isinstance(row, str) else json.dumps({"text": "the plot", "spans": []})
    data.write_text(f"{row if isinstance(row, str) else json.dumps(row)}\n\n{other}\n" * 30)
    words = ("--augmented", f"task={task}", "data.augment=[{name: typos, probability: 0.5}]")
    code, out, err = command("data", "show", str(data), "--model", str(tiny_bert), *words)
    assert (code, out) == (2, ""), err
    assert "data.augment" in err and ("data convert" in err) is (task == "token-classification")


def test_a_character_of_several_tokens_stands_at_the_last_of_them() -> None:
    vocabulary = {character: number for number, character in enumerate(sorted(ByteLevel.alphabet()))}
    backend = Tokenizer(BPE(vocabulary, []))
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    processor = PreTrainedTokenizerFast(tokenizer_object=backend)
    ids = processor("ab 我é", add_special_tokens=False)["input_ids"]
    assert spell(ids, processor) == ["a", "b", "Ġ", "…", "…", "我", "…", "é"]
    assert spell(ids[3:5], processor) == ["…", "…"], "a character that is cut in two"
    plain = tiny_tokenizer()
    assert spell(plain("the film")["input_ids"], plain) == ["[CLS]", "the", "film", "[SEP]"]


def test_a_run_that_left_an_adapter_has_a_tokenizer(
    command: Any, tiny_bert: Path, reviews_csv: Path, tmp_path: Path
) -> None:
    run = str(tmp_path / "lora")
    words = ("technique=lora", "train.max_steps=1", f"output={run}", "--offline", "-q")
    given = ("task=text-classification", f"model={tiny_bert}", f"data.train={reviews_csv}")
    code, _, err = command("train", *given, *words)
    assert code == 0, err
    found = [command("data", "show", str(reviews_csv), "--model", model) for model in (run, str(tiny_bert))]
    assert found[0] == found[1] and found[0][0] == 0
    code, out, _ = command("data", "check", str(reviews_csv), "--model", run, "--json")
    assert code == 0 and json.loads(out)["splits"]["train"]["lengths"]["unit"] == "tokens"


def test_both_sides_of_a_pair_are_shown_and_the_target_is_learned(tiny_marian: Path, tmp_path: Path) -> None:
    (tmp_path / "train.en").write_text("the film was great\nthe plot was bad\n")
    (tmp_path / "train.de").write_text("a great film\na very bad plot\n")
    words = ("task={name: translation, target_lang: de}", "technique=full")
    first, second = data_show.show(str(tmp_path / "train"), words, model=str(tiny_marian))
    source, target = second.preview.windows
    assert len(source) == len(target) and [token.target for token in source] == [None] * 6
    source, target = first.preview.windows
    assert [token.text for token in source] == ["[CLS]", "the", "film", "was", "great", "[SEP]"]
    assert [token.target for token in source] == [None] * 6
    assert [token.target for token in target] == ["[CLS]", "a", "great", "film", "[SEP]"]
