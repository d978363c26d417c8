"""Loss masks of chats: exactly the answers and their end tokens, for any template that can be split."""

from __future__ import annotations

import time
from typing import Any

import pytest
from chatting import CHATML, CHATS, tokenizer

from tunesmith.data.text.chats import ALL_CUT, NOT_CUT, SOME_CUT, TEMPLATE_REFUSED, ChatEncoder, TrainOn, first_token
from tunesmith.data.text.templates import TEMPLATES, template_text
from tunesmith.errors import DataError, RecipeError

FITTING = ("plain", "alpaca", "vicuna", "zephyr", "llama2", "chatml")
"""Templates whose special tokens are in the tokenizers here."""

PLACED = [(f"chats:{number}", chat) for number, chat in enumerate(CHATS)]
GENERATION = CHATML.replace(
    "{{ message['content'] }}<|im_end|>",
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}\n",  # Jinja removes one newline after a block
)
THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _chats(kind: str, template: str | None, train_on: TrainOn = "answers") -> ChatEncoder:
    return ChatEncoder.of(tokenizer(kind), template, train_on, None)


def _answers(chat: list[dict[str, str]]) -> list[str]:
    return [message["content"] for message in chat if message["role"] == "assistant"]


def _said(chats: ChatEncoder, fields: dict[str, Any]) -> list[str]:
    """Return each contiguous span of tokens with loss, as text."""
    runs: list[list[int]] = []
    for last, place in zip([-2, *fields["learned"]], fields["learned"], strict=False):
        runs += [[]] if place != last + 1 else []
        runs[-1].append(fields["input_ids"][place])
    return [chats.processor.decode(run, skip_special_tokens=False) for run in runs]


@pytest.mark.parametrize("kind", ["byte-level", "metaspace"])
@pytest.mark.parametrize("template", FITTING)
def test_what_is_learned_is_the_answers_and_their_end(template: str, kind: str) -> None:
    chats = _chats(kind, template)
    (end,) = chats.processor.convert_ids_to_tokens(list(chats.end_ids))
    for chat, fields in zip(CHATS, chats.encode(PLACED, 4096), strict=True):
        found, wanted = _said(chats, fields), [answer + end for answer in _answers(chat)]
        if fields["has_special_tokens"]:  # LLaMA's puts a blank before each piece of a text
            found, wanted = (["".join(text.split()) for text in texts] for texts in (found, wanted))
        assert [text.strip(" ") for text in found] == wanted
        assert fields["cut"] == NOT_CUT and fields["input_ids"][-1] in chats.end_ids


@pytest.mark.parametrize("kind", ["byte-level", "metaspace"])
@pytest.mark.parametrize("template", FITTING)
def test_an_answer_is_learned_behind_exactly_what_a_model_is_asked_with(template: str, kind: str) -> None:
    chats = _chats(kind, template)
    plain = tokenizer(kind)
    for chat, fields in zip(CHATS, chats.encode(PLACED, 4096), strict=True):
        if fields["has_special_tokens"]:
            continue
        asked = plain.apply_chat_template(
            chat[:-1], chat_template=chats.template, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert fields["input_ids"][: fields["prompt"]] == asked == chats.encode_prompt(chat[:-1])["input_ids"]
        text = plain.apply_chat_template(chat, chat_template=chats.template, tokenize=True, return_dict=False)
        assert text[: len(fields["input_ids"])] == fields["input_ids"]


@pytest.mark.parametrize("kind", ["byte-level", "metaspace"])
def test_it_is_the_mask_of_transformers_where_a_template_marks_its_answers(kind: str) -> None:
    chats, plain = _chats(kind, GENERATION), tokenizer(kind)
    for chat, fields in zip(CHATS, chats.encode(PLACED, 4096), strict=True):
        if fields["has_special_tokens"]:
            continue
        theirs = plain.apply_chat_template(
            chat, chat_template=GENERATION, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        assert [place for place, one in enumerate(theirs["assistant_masks"]) if one] == fields["learned"]
        assert theirs["input_ids"][: len(fields["input_ids"])] == fields["input_ids"]


def test_the_last_answer_alone_or_all() -> None:
    last, all_ = _chats("byte-level", "chatml", "last_answer"), _chats("byte-level", "chatml", "all")
    for chat, one, every in zip(CHATS, last.encode(PLACED, 4096), all_.encode(PLACED, 4096), strict=True):
        assert _said(last, one) == [_answers(chat)[-1] + "<|im_end|>"]
        assert every["learned"] == list(range(1, len(every["input_ids"]))) and every["prompt"] == one["prompt"]


def test_special_tokens_that_somebody_said_are_words() -> None:
    chats = _chats("byte-level", "chatml")
    found = chats.encode(PLACED, 4096)
    assert [n for n, fields in enumerate(found) if fields["has_special_tokens"]] == [12, 13]
    for number in (12, 13):
        chat, ids = CHATS[number], found[number]["input_ids"]
        assert sum(token in chats.end_ids for token in ids) == len(chat), "one end for each message"
        text = tokenizer().apply_chat_template(chat, chat_template=CHATML, tokenize=False)
        assert chats.processor.decode(ids) == text.rstrip("\n")
    asked = chats.encode_prompt(CHATS[13][:1])["input_ids"]
    assert sum(token in chats.end_ids for token in asked) == 1


def test_the_token_that_begins_a_text_stands_there_once() -> None:
    assert first_token(tokenizer("metaspace")) == 1 and first_token(tokenizer("byte-level")) is None
    for template in FITTING:
        for fields in _chats("metaspace", template).encode(PLACED[:3], 4096):
            assert fields["input_ids"][0] == 1 != fields["input_ids"][1]


def test_what_lies_beyond_the_limit_is_cut_and_counted() -> None:
    chats = _chats("byte-level", "chatml")
    whole = chats.encode(PLACED, 4096)[3]
    stops = [place + 1 for place in whole["learned"] if whole["input_ids"][place] in chats.end_ids]
    for limit in range(4, len(whole["input_ids"]) + 2):
        (fields,) = chats.encode(PLACED[3:4], limit)
        assert fields["learned"] == [place for place in whole["learned"] if place < limit]
        if fields["learned"]:
            assert len(fields["input_ids"]) == fields["learned"][-1] + 1, "nothing is read behind what is learned"
        assert len(fields["input_ids"]) <= limit
        kept = sum(stop <= limit for stop in stops)
        assert fields["cut"] == (NOT_CUT if kept == 3 else SOME_CUT if fields["learned"] else ALL_CUT)
        assert fields["prompt"] == (whole["prompt"] if whole["prompt"] < limit else 0)


def test_a_chat_of_ten_thousand_turns_takes_no_longer_than_what_is_read_of_it() -> None:
    chat = [{"role": ("user", "assistant")[n % 2], "content": f"say {n}"} for n in range(10_000)]
    chats, began = _chats("byte-level", "chatml"), time.process_time()
    (fields,) = chats.encode([("x:1", chat)], 128)
    assert time.process_time() - began < 5
    assert len(fields["input_ids"]) <= 128 and fields["cut"] == SOME_CUT and fields["prompt"] == 0
    (first,) = chats.encode([("x:1", chat[:30])], 128)
    assert first["learned"] == fields["learned"]


def test_an_answer_that_a_token_would_reach_into_is_split_there() -> None:
    glued = (
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}\n"
    )
    glued += "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    chats = ChatEncoder.of(tokenizer(), glued, "answers", None)
    vocabulary = chats.processor.get_vocab()
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": ":::"}]
    (fields,) = chats.encode([("x:1", chat)], 128)
    assert _said(chats, fields) == [":::</s>"] and vocabulary
    assert fields["input_ids"][: fields["prompt"]] == chats.encode_prompt(chat[:1])["input_ids"]


REFUSED = {
    "an earlier answer changes": (
        THOUGHTS,
        r"its rendering of earlier messages changes when a message is added .*think",
    ),
    "the system message comes last": (
        "{% for m in messages %}{% if m['role'] != 'system' %}<|im_start|>{{ m['content'] }}<|im_end|>{% endif %}"
        "{% endfor %}{{ messages|length }}",
        "its rendering of earlier messages changes",
    ),
    "no beginning of an answer": (
        CHATML.partition("{% if add")[0],
        r"its generation prompt lacks '<\|im_start\|>assistant",
    ),
    "no end of an answer": (
        CHATML.replace("<|im_end|>", ""),
        r"ends an answer with '\\n', which is no special token of this model, so the model would not learn to stop",
    ),
    "a token of another model": (
        TEMPLATES["llama3"],
        r"ends an answer with '<\|eot_id\|>', which is no special token of this model",
    ),
    "a prompt that ends within a token": (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        "an answer begins inside a token, after",
    ),
    "it raises": ("{{ raise_exception('only for experts') }}", "task.chat_template: only for experts"),
    "it is none": ("{% for m in messages %}", "task.chat_template: .*endfor"),
    "it reaches out": ("{{ messages.__class__.__mro__ }}", "task.chat_template: .*unsafe"),
    "it changes what is said": (
        CHATML.replace("{{ message['content'] }}", "{{ message['content']|upper }}"),
        r"it renders the answer 'It is.' as 'IT IS",
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_template_that_cannot_be_split_is_refused_with_the_reason(why: str) -> None:
    template, said = REFUSED[why]
    with pytest.raises(RecipeError, match=said) as caught:
        ChatEncoder.of(tokenizer(), template, "answers", None)
    assert "set task.chat_template to one of plain, alpaca" in str(caught.value) and len(str(caught.value)) < 500


def test_where_only_earlier_answers_change_the_last_can_be_learned() -> None:
    with pytest.raises(RecipeError, match="task.train_on=last_answer"):
        ChatEncoder.of(tokenizer(), THOUGHTS, "answers", None)
    chats = ChatEncoder.of(tokenizer(), THOUGHTS, "last_answer", None)
    (fields,) = chats.encode(PLACED[1:2], 4096)
    assert _said(chats, fields) == ["<think>\n\n</think>\n\nFine, and you?<|im_end|>"]


def test_a_conversation_that_the_template_refuses_is_named() -> None:
    strict = "{% if messages|length > 4 %}{{ raise_exception('at most two turns') }}{% endif %}" + CHATML
    chats = ChatEncoder.of(tokenizer(), strict, "answers", None)
    with pytest.raises(DataError, match=r"chats:3: .*chat template .*: at most two turns"):
        chats.encode(PLACED, 4096)
    found = chats.encode(PLACED, 4096, skip=True)
    assert [n for n, fields in enumerate(found) if fields["cut"] == TEMPLATE_REFUSED] == [3, 6, 8, 10, 17]
    assert all(
        fields["learned"] == [] and fields["prompt"] == 0 for fields in found if fields["cut"] == TEMPLATE_REFUSED
    )
    assert found[0] == chats.encode(PLACED[:1], 4096)[0]


def test_a_template_without_a_place_for_the_system_message_is_refused_if_there_is_one() -> None:
    deaf = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHATML
    assert ChatEncoder.of(tokenizer(), deaf, "answers", None).template == deaf
    with pytest.raises(RecipeError, match="task.chat_template: no system here"):
        ChatEncoder.of(tokenizer(), deaf, "answers", "Be short.")


def test_the_models_own_template_comes_first_and_of_several_the_one_for_chats() -> None:
    own = tokenizer(template=CHATML)
    assert ChatEncoder.of(own, None, "answers", None).template == CHATML
    own.chat_template = {"default": CHATML, "tool_use": "x"}
    assert ChatEncoder.of(own, None, "answers", None).template == CHATML
    assert ChatEncoder.of(tokenizer(), None, "answers", None).template == TEMPLATES["plain"]
    assert ChatEncoder.of(own, "alpaca", "answers", None).template == TEMPLATES["alpaca"]


def test_a_template_is_a_name_a_file_or_itself(tmp_path: Any) -> None:
    file = tmp_path / "own.jinja"
    file.write_text(CHATML)
    assert template_text(str(file)) == template_text(CHATML) == CHATML and template_text("plain") == "plain"
    with pytest.raises(ValueError, match=r"'chatlm' .*file .*plain, alpaca, .*chatml"):
        template_text("chatlm")
    file.write_text("hello")
    with pytest.raises(ValueError, match="no Jinja template"):
        template_text(str(file))
    file.write_text("{{ x }}" * 10_000)
    with pytest.raises(ValueError, match="over 65,536 characters"):
        template_text(str(file))
