"""Documents become blocks: every token once, in order, with word boundaries in each script."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram, WordPiece
from transformers import PreTrainedTokenizerFast

from tunesmith.data.formats import Row
from tunesmith.data.text.blocks import make_blocks, pack_documents
from tunesmith.data.text.masking import MaskingVocabulary, choose_positions, mask_tokens
from tunesmith.recipe import Data
from tunesmith.tasks.fill_mask import FillMask
from tunesmith.testing import sample_row, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def _rows(*texts: str) -> list[Row]:
    return [Row(f"made-up:{number}", {"text": text}) for number, text in enumerate(texts, start=1)]


def _blocks(*texts: str, length: int = 8, tokenizer: Any = TOKENIZER, **how: Any) -> list[dict[str, Any]]:
    found = make_blocks(_rows(*texts), "text", tokenizer, length, **({"whole_words": True, "segment": None} | how))
    return [dict(row.values) for row in found]


@pytest.mark.parametrize("length", (4, 7, 32))
def test_no_token_is_lost_and_none_is_padding(length: int) -> None:
    texts = [str(sample_row("fill-mask", number)["text"]) for number in range(40)]
    found = _blocks(*texts, length=length)
    for one in found:
        assert one["input_ids"][0] == TOKENIZER.cls_token_id and one["input_ids"][-1] == TOKENIZER.sep_token_id
        assert len(one["input_ids"]) == len(one["words"]) and one["words"][0] == one["words"][-1] == -1
    lengths = [len(one["input_ids"]) for one in found]
    assert max(lengths) == length and sum(n < length - 2 for n in lengths[:-1]) == 0
    special = set(TOKENIZER.all_special_ids)
    said = [token for one in found for token in one["input_ids"] if token not in special]
    wanted = [token for text in texts for token in TOKENIZER(text, add_special_tokens=False)["input_ids"]]
    assert said == [token for token in wanted if token not in special]


def test_a_separator_stands_between_documents_and_never_at_an_end() -> None:
    (block,) = _blocks("the film", "was great", length=16)
    assert TOKENIZER.convert_ids_to_tokens(block["input_ids"]) == ("[CLS] the film [SEP] was great [SEP]".split())
    assert block["words"] == [-1, 0, 1, -1, 2, 3, -1]
    first, second = _blocks("the film was great it was", "not so bad", length=8)
    assert TOKENIZER.convert_ids_to_tokens(first["input_ids"]) == "[CLS] the film was great it was [SEP]".split()
    assert TOKENIZER.convert_ids_to_tokens(second["input_ids"]) == "[CLS] not so bad [SEP]".split()


def test_pieces_of_a_word_share_its_number_and_unknown_ones_have_none() -> None:
    (block,) = _blocks("a greatly dull xyz film", length=16)
    assert block["words"] == [-1, 0, 1, 1, 2, -1, 4, -1]
    (block,) = _blocks("a greatly dull film", length=16, whole_words=False)
    assert block["words"] == [-1, 0, 1, 2, 3, 4, -1]


def test_a_word_that_a_border_cuts_begins_anew() -> None:
    first, second = _blocks("the film was greatly fine", length=6)
    assert first["words"] == [-1, 0, 1, 2, 3, -1] and second["words"] == [-1, 0, 1, -1]
    assert TOKENIZER.convert_ids_to_tokens(second["input_ids"])[1] == "##ly"


def test_a_block_lies_where_its_first_token_does() -> None:
    rows = make_blocks(_rows("the film", "was great it was fine"), "text", TOKENIZER, 6, whole_words=True, segment=None)
    assert [row.place for row in rows] == ["made-up:1", "made-up:2"]


def _dressed(tokenizer: Tokenizer, **names: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def _bert_zh() -> PreTrainedTokenizerFast:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"今天气很好我们去北京大学,b", "##c"]
    tokenizer = Tokenizer(WordPiece({token: n for n, token in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()  # adds spaces around Chinese characters
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    names = {"unk": "[UNK]", "pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    return _dressed(tokenizer, **{f"{name}_token": token for name, token in names.items()})


def _sentencepiece() -> PreTrainedTokenizerFast:
    pieces = ["<pad>", "<unk>", "<s>", "</s>", "<mask>", "▁the", "▁fi", "lm", "▁", "今天", "天气", "很", "好", "气"]
    tokenizer = Tokenizer(Unigram([(piece, -float(n)) for n, piece in enumerate(pieces)], unk_id=1))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    names = {"unk": "<unk>", "pad": "<pad>", "bos": "<s>", "eos": "</s>", "mask": "<mask>"}
    return _dressed(tokenizer, **{f"{name}_token": token for name, token in names.items()})


def _byte_level() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: n for n, token in enumerate([*alphabet, "th", "the", "<s>", "</s>", "<mask>"])}
    tokenizer = Tokenizer(BPE(vocabulary, [("t", "h"), ("th", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return _dressed(tokenizer, cls_token="<s>", sep_token="</s>", mask_token="<mask>")


def test_words_of_byte_level_pieces() -> None:
    (block,) = _blocks("the cat, 今", length=32, tokenizer=_byte_level())
    assert block["words"][1:-1] == [0, 1, 1, 1, 1, 2, 3, 3, 3, 3], "a character is not torn, and has its blank"


def test_words_of_sentencepiece() -> None:
    (block,) = _blocks("the film the", length=32, tokenizer=_sentencepiece())
    assert block["words"][1:-1] == [0, 1, 1, 2]


@pytest.mark.parametrize("tokenizer", (_bert_zh(), _sentencepiece()), ids=("WordPiece", "SentencePiece"))
def test_without_a_segmenter_each_piece_of_chinese_is_a_word(tokenizer: Any) -> None:
    (block,) = _blocks("今天天气很好", length=32, tokenizer=tokenizer)
    words = [word for word in block["words"] if word >= 0]
    assert len(set(words)) >= 4 and len(words) - len(set(words)) <= 1, "a piece that is but a blank belongs to the next"


def test_a_segmenter_divides_chinese_into_words() -> None:
    def segment(text: str) -> list[str]:
        assert text == "今天天气很好bc"
        return ["今天", "天气", "很", "好", "bc"]

    (block,) = _blocks("今天天气很好bc", length=32, tokenizer=_bert_zh(), segment=segment)
    assert block["words"][1:-1][:6] == [0, 0, 1, 1, 2, 3]


WORDS = np.array([-1, 0, 1, 1, 1, 2, 3, 3, 4, -1, 5, 6, 7, 7, 8, -1])


def test_whole_words_are_chosen_up_to_the_share() -> None:
    for seed in range(200):
        chosen = choose_positions(WORDS, 0.3, np.random.default_rng(seed))
        assert 1 <= len(chosen) <= round(0.3 * 13) and -1 not in WORDS[chosen]
        for word in set(WORDS[chosen].tolist()):
            assert set(np.flatnonzero(WORDS == word)) <= set(chosen.tolist()), "a word is chosen whole"
    long = np.array([-1, 0, 0, 0, 0, -1])
    assert choose_positions(long, 0.1, np.random.default_rng(0)).tolist() == [1, 2, 3, 4], "one word at least"
    assert len(choose_positions(np.array([-1, -1]), 0.5, np.random.default_rng(0))) == 0


def test_every_token_is_chosen_as_often_as_the_share_says() -> None:
    words = np.arange(100)
    counts = np.zeros(100)
    for seed in range(2000):
        counts[choose_positions(words, 0.15, np.random.default_rng(seed))] += 1
    assert counts.sum() == 15 * 2000 and np.abs(counts / 2000 - 0.15).max() < 0.04


def test_eighty_ten_ten() -> None:
    tokens = MaskingVocabulary.of(TOKENIZER)
    ids, words = np.full(2000, 7), np.arange(2000)
    seen, places = mask_tokens(ids, words, 0.15, tokens, seed=0, epoch=0, index=0)
    assert len(places) == 300 and (np.delete(seen, places) == 7).all()
    kinds = seen[places]
    masked, kept = int((kinds == tokens.mask).sum()), int((kinds == 7).sum())
    assert abs(masked - 240) < 30 and abs(kept - 30) < 20 and abs(300 - masked - kept - 30) < 20
    assert not set(kinds.tolist()) & (set(TOKENIZER.all_special_ids) - {tokens.mask})


def test_what_is_hidden_hangs_on_seed_epoch_and_index_alone() -> None:
    tokens = MaskingVocabulary.of(TOKENIZER)
    ids, words = np.full(200, 7), np.arange(200)
    given = [{"seed": 0, "epoch": 0, "index": 0}, {"seed": 1, "epoch": 0, "index": 0},
             {"seed": 0, "epoch": 1, "index": 0}, {"seed": 0, "epoch": 0, "index": 1}]  # fmt: skip
    found = [mask_tokens(ids, words, 0.15, tokens, **one)[1].tolist() for one in given]
    assert found[0] == mask_tokens(ids, words, 0.15, tokens, **given[0])[1].tolist()
    assert len({tuple(places) for places in found}) == 4


def test_jieba_tells_chinese_words(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    jieba = pytest.importorskip("jieba")
    jieba.dt.initialized = False
    text = "我们去北京大学,好"
    bound = FillMask(segmenter="jieba").bind(_bert_zh(), None, Data(max_length=16))
    rows = list(bound.chunks(_rows(text)))
    assert [row.values["words"] for row in rows] == [[-1, 0, 0, 1, 2, 2, 2, 2, 3, 4, -1]]
    assert (home / "jieba.cache").exists(), "not in a folder that everybody may write to"
    assert capfd.readouterr().err == ""
    ids, words = (np.array(rows[0].values[name]) for name in ("input_ids", "words"))
    for epoch in range(20):
        _, hidden = mask_tokens(ids, words, 0.5, MaskingVocabulary.of(_bert_zh()), seed=0, epoch=epoch, index=0)
        assert len({4, 5, 6, 7} & set(hidden.tolist())) in (0, 4), "a word is hidden whole or not at all"


@pytest.mark.parametrize("length", (4, 5, 7, 32, 1000))
def test_packed_documents_keep_apart_and_each_token_is_learned_once(length: int) -> None:
    texts = [str(sample_row("fill-mask", number)["text"]) for number in range(20)]
    found = [dict(row.values) for row in pack_documents(_rows(*texts), "text", TOKENIZER, length, [2], [3])]
    pairs, firsts = [], []
    for block in found:
        assert sum(block["windows"]) == len(block["input_ids"]) <= length and min(block["windows"]) > 1
        start = 0
        for size in block["windows"]:
            window = block["input_ids"][start : start + size]
            firsts.append(window[0])
            pairs += zip(window[:-1], window[1:], strict=True)
            start += size
    documents = [[2, *TOKENIZER(text, add_special_tokens=False)["input_ids"], 3] for text in texts]
    assert pairs == [pair for one in documents for pair in zip(one[:-1], one[1:], strict=True)]
    assert firsts.count(2) == len(texts)
    assert all(len(block["input_ids"]) >= length - 1 for block in found[:-1])


def test_a_packed_block_has_the_place_of_the_document_it_begins_in_and_special_tokens_are_words() -> None:
    found = list(
        pack_documents(_rows("the film was great", "not so bad", "the [MASK] plot"), "text", TOKENIZER, 7, [], [3])
    )
    assert [row.place for row in found] == ["made-up:1", "made-up:2", "made-up:3"]
    assert TOKENIZER.mask_token_id not in [token for row in found for token in row.values["input_ids"]]  # type: ignore[attr-defined]
