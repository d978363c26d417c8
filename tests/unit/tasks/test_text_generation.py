"""Text generation: loss masks of chats and raw text, metrics, generation, and the artifacts of a run."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerating import unpadded
from chatting import CHATML, CHATS, tokenizer
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import tunesmith
from tunesmith.console import Console
from tunesmith.data.batches import Batch, Limits, collate
from tunesmith.data.encoded import encode, encode_in_memory
from tunesmith.data.formats import Row
from tunesmith.errors import DataError, RecipeError
from tunesmith.models import snippets
from tunesmith.recipe import Data, load
from tunesmith.tasks import BoundTask, text_generation
from tunesmith.tasks.text_generation import TextGeneration
from tunesmith.testing import tiny_model
from tunesmith.training import evaluate
from tunesmith.training.machine import Machine

CPU = Machine(torch.device("cpu"), None)
QUIET = Console(level=-1)
DOCUMENTS = [
    "one two three",
    "four",
    "five six seven eight nine ten",
    "北京是首都。",
    "a b c d e f g h i j k l m n o p",
]


def _model(family: str = "llama", **config: Any) -> Any:
    vocabulary = len(tokenizer())
    return tiny_model(
        family, "AutoModelForCausalLM", **{"vocab_size": vocabulary, "max_position_embeddings": 512, **config}
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaMA with a ChatML template."""
    folder = tmp_path_factory.mktemp("base")
    _model(eos_token_id=2).save_pretrained(folder)
    tokenizer(template=CHATML).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    turns = [(f"say {n % 7}", f"{n % 7} {n}") for n in range(40)]
    rows = [{"conversations": [{"from": who, "value": said} for who, said in zip(("human", "gpt"), turn, strict=True)]}
            for turn in turns]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _recipe(base: Path, data: Path, output: Path, *words: str, **task: Any) -> Any:
    train = {"max_steps": 6, "batch_size": 8, "precision": "fp32", "device": "cpu", "learning_rate": 5e-3}
    given = {"task": {"name": "text-generation", **task}, "model": str(base), "technique": "lora", "train": train,
             "data": {"train": str(data), "validation": 0.2, "test": 0.1}, "output": str(output)}  # fmt: skip
    return load(None, words, given)


def _bind(task: TextGeneration, processor: Any = None, max_length: int = 512) -> BoundTask:
    return task.bind(processor or tokenizer(template=CHATML), _model().config, Data(max_length=max_length))  # type: ignore[call-arg]


def _encoded(rows: list[Row], task: TextGeneration, folder: Path, max_length: int = 512) -> tuple[Any, Any]:
    """A bound task and its examples."""
    fitted, _ = task.fit([task.parse_target(row) for row in rows], Data(max_length=max_length))  # type: ignore[call-arg]
    bound = _bind(fitted, max_length=max_length)
    return bound, encode(bound.chunks(rows), bound.encode, folder, bound.costs)


def _chat_rows() -> list[Row]:
    return [Row(f"chats:{number}", {"messages": chat}) for number, chat in enumerate(CHATS)]


def _text_rows() -> list[Row]:
    return [Row(f"texts:{number}", {"text": text}) for number, text in enumerate(DOCUMENTS)]


def _batch(encoded: Any, indices: list[int] | None = None) -> Batch:
    return collate(encoded, np.array(range(len(encoded)) if indices is None else indices))


def _loss(bound: BoundTask, model: Any, batch: Batch) -> Any:
    return bound.loss(model, batch, bound.normalizers(batch))


def test_the_loss_is_that_of_transformers(tmp_path: Path) -> None:
    bound, encoded = _encoded(_chat_rows(), TextGeneration(), tmp_path / "chats")
    model, batch = _model(), _batch(encoded)
    ids = batch.ragged("input_ids")
    labels = torch.full_like(ids.padded(0), -100)
    for row, (start, stop) in enumerate(zip(*_ends(batch, "learned"), strict=True)):
        places = batch.ragged("learned").values[start:stop]
        labels[row, places] = ids.padded(0)[row, places]
    with torch.no_grad():
        theirs = model(input_ids=ids.padded(0), attention_mask=ids.mask(), labels=labels)
        found = bound.outputs(model, batch)
    assert float(_loss(bound, model, batch).detach()) == pytest.approx(float(theirs.loss), abs=1e-5)
    scores = bound.metrics()
    scores.update(batch, found)
    wanted = theirs.logits[:, :-1][labels[:, 1:] != -100]
    meant = labels[:, 1:][labels[:, 1:] != -100]
    right = float((wanted.argmax(-1) == meant).float().mean())
    loss = float(theirs.loss)
    assert scores.compute() == pytest.approx({"loss": loss, "perplexity": math.exp(loss), "accuracy": right}, rel=1e-4)
    torch.testing.assert_close(found[:, 0], -F.cross_entropy(wanted, meant, reduction="none"), atol=1e-5, rtol=1e-5)


def _ends(batch: Batch, name: str) -> tuple[list[int], list[int]]:
    ends = batch.ragged(name).offsets.tolist()
    return ends[:-1], ends[1:]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
@pytest.mark.parametrize("rows", [_chat_rows, _text_rows])
def test_packed_padded_and_single_give_the_same_loss_tokens_and_gradients(
    rows: Any, family: str, tmp_path: Path
) -> None:
    bound, encoded = _encoded(rows(), TextGeneration(), tmp_path / "encoded", 24 if rows is _text_rows else 512)
    batch, padded = _batch(encoded), _model(family)
    packed, single = copy.deepcopy(padded), copy.deepcopy(padded)
    unpadded(packed)
    normalizers = bound.normalizers(batch)
    found = []
    for model in (padded, packed):
        loss = bound.loss(model, batch, normalizers)
        loss.backward()
        found.append(float(loss.detach()))
    total = 0.0
    for index in range(len(encoded)):
        loss = bound.loss(single, _batch(encoded, [index]), normalizers)
        loss.backward()
        total += float(loss.detach())
    assert found == pytest.approx([total, total], abs=1e-5)
    tokens = [bound.outputs(model, batch) for model in (padded, packed)]
    alone = torch.cat([bound.outputs(single, _batch(encoded, [index])) for index in range(len(encoded))])
    for one in tokens:
        torch.testing.assert_close(one, alone, atol=1e-5, rtol=1e-5)
    for name, parameter in single.named_parameters():
        for other in (padded, packed):
            torch.testing.assert_close(other.get_parameter(name).grad, parameter.grad, atol=1e-5, rtol=1e-4)


def test_nothing_attends_across_documents_of_a_block(tmp_path: Path) -> None:
    model, answers = _model(), []
    for first in ("one two three", "six nine four"):
        rows = [Row("texts:0", {"text": first}), *_text_rows()[1:]]
        bound, encoded = _encoded(rows, TextGeneration(), tmp_path / first)
        assert len(encoded) == 1
        answers.append(bound.outputs(model, _batch(encoded)))
    own = tokenizer()(DOCUMENTS[0], add_special_tokens=False)["input_ids"]
    other = tokenizer()("six nine four", add_special_tokens=False)["input_ids"]
    torch.testing.assert_close(answers[0][len(own) :], answers[1][len(other) :], atol=1e-6, rtol=1e-6)


def test_documents_of_unlike_length_are_read_in_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Row(f"x:{n}", {"text": " ".join(["one", "four", "x"] * (1 + 9 * (n % 4)))}) for n in range(12)]
    bound, encoded = _encoded(rows, TextGeneration(), tmp_path / "encoded", 128)
    model, batch = _model(), _batch(encoded)
    whole, together = bound.outputs(model, batch), _loss(bound, model, batch)
    monkeypatch.setattr(text_generation, "GROUPS", Limits(2**20, 2**40, 0))
    read: list[int] = []
    model.register_forward_pre_hook(lambda _, args, given: read.append(given["input_ids"].numel()), with_kwargs=True)
    torch.testing.assert_close(bound.outputs(model, batch), whole, atol=1e-5, rtol=1e-5)
    assert len(read) > 2 and sum(read) == len(batch.ragged("input_ids").values), "no padding is left"
    torch.testing.assert_close(_loss(bound, model, batch), together, atol=1e-5, rtol=1e-5)


def test_a_batch_without_anything_to_learn_has_no_loss_and_no_nan(tmp_path: Path) -> None:
    long = {"messages": [{"role": "user", "content": "zq" * 100}, {"role": "assistant", "content": "y"}]}
    rows = [Row("x:1", long), *_chat_rows()[:2]]
    bound, encoded = _encoded(rows, TextGeneration(), tmp_path / "encoded", 32)
    model, batch = _model(), _batch(encoded, [0])
    assert bound.outputs(model, batch).shape == (0, 2)
    loss = _loss(bound, model, batch)
    loss.backward()
    assert float(loss.detach()) == 0.0
    notes = bound.notes(encoded)
    assert len(notes) == 2 and all(note.startswith("1 of 3 ") and "data.max_length" in note for note in notes)
    assert encoded.costs.tolist() == encoded.lengths("input_ids").tolist() and encoded.costs.max() <= 32


def test_raw_text_that_no_run_would_take_has_its_tokens_counted_all_the_same() -> None:
    rows = [Row(f"a.txt:{n}", {"text": text}) for n, text in enumerate(DOCUMENTS)]
    found = _bind(TextGeneration.model_validate({}), tokenizer(), 64).inspect(rows)
    assert found is not None and len(found.sizes) == len(rows) and all(size > 0 for size in found.sizes)


def test_the_baseline_knows_the_frequencies_of_what_is_learned(tmp_path: Path) -> None:
    bound, encoded = _encoded(_chat_rows(), TextGeneration(), tmp_path / "chats")
    batch = _batch(encoded)
    found = evaluate.baseline(bound, encoded, encoded)
    ids, learned = batch.ragged("input_ids"), batch.ragged("learned")
    said = torch.cat([ids.values[a:b][learned.values[c:d]] for a, b, c, d in
                      zip(*_ends(batch, "input_ids"), *_ends(batch, "learned"), strict=True)])  # fmt: skip
    counts = torch.bincount(said, minlength=len(tokenizer())).double() + 1
    assert found["loss"] == pytest.approx(float(-(counts / counts.sum()).log()[said].mean()), abs=1e-5)
    assert found["accuracy"] == pytest.approx(float((said == counts.argmax()).double().mean()))


@pytest.fixture(scope="module")
def trained(base: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("runs") / "chat"
    general = folder.parent / "general.txt"
    general.write_text("\n\n".join(DOCUMENTS), encoding="utf-8")
    recipe = _recipe(
        base, chats, folder, general=str(general), generate={"max_new_tokens": 6, "rows": 3}, system="Say."
    )
    return folder, tunesmith.train(recipe, console=QUIET)


def test_a_run_on_chats(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, result = trained
    metrics = result["metrics"]
    assert metrics["validation"]["loss"] < metrics["before"]["validation"]["loss"]
    assert {"loss", "perplexity", "accuracy", "exact_match", "rouge_l", "chrf", "chrf_signature"} == set(
        metrics["test"]
    )
    assert set(metrics["before"]["validation"]) == set(metrics["test"])
    assert set(metrics["general"]) == {"loss", "perplexity", "accuracy"} == set(metrics["before"]["general"])
    rows = [json.loads(line) for line in (folder / "predictions-test.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and all(set(row["prediction"]) == {"generated_text"} for row in rows)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: text-generation" in card and "general before" in card
    samples = json.loads((folder / "run.json").read_text())["samples"]
    assert len(samples) == 3 and all(set(one) == {"row", "prompt", "reference", "before", "after"} for one in samples)
    assert "## Answers before and after" in card and f"| {samples[0]['prompt']} | {samples[0]['reference']} |" in card
    places = [one["row"] for one in samples]
    model = tunesmith.load(folder)
    assert [one["after"] for one in samples] == [
        one["generated_text"] for one in model.predict([one["prompt"] for one in samples])
    ]
    assert len(set(places)) == 3


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's
def test_a_run_answers_as_transformers_and_peft_would(trained: tuple[Path, dict[str, Any]], base: Path) -> None:
    folder, _ = trained
    asked = ["say 3", "say 5 please", "say"]
    found = [one["generated_text"] for one in tunesmith.load(folder).predict(asked)]
    own = AutoTokenizer.from_pretrained(folder / "base")
    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder / "adapter").eval()
    merged: Any = copy.deepcopy(model).merge_and_unload()
    for text, answer in zip(asked, found, strict=True):
        chat = [{"role": "system", "content": "Say."}, {"role": "user", "content": text}]
        ids = own.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        for one in (model, merged):
            written = one.generate(**ids, max_new_tokens=6, do_sample=False, eos_token_id=[2, 4], pad_token_id=2)
            assert own.decode(written[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip() == answer


def test_what_is_asked_may_be_a_text_or_a_conversation(trained: tuple[Path, dict[str, Any]], command: Any) -> None:
    model = tunesmith.load(trained[0])
    chat = [{"role": "user", "content": "say 3"}]
    answers = model.predict(["say 3", {"messages": chat}, {"prompt": "say 3"}, {"instruction": "say 3"},
                             {"messages": [*chat, {"role": "assistant", "content": "3"}]}][:3])  # fmt: skip
    assert answers[0] == answers[1] == answers[2]
    code, said, _ = command("predict", str(trained[0]), "say 3")
    assert code == 0 and said.strip() == answers[0]["generated_text"].strip()


def test_a_file_with_answers_is_asked_without_them(
    trained: tuple[Path, dict[str, Any]], chats: Path, command: Any
) -> None:
    code, said, _ = command("predict", str(trained[0]), "--input", str(chats), "--json")
    rows = [json.loads(line) for line in said.splitlines()]
    assert code == 0 and len(rows) == 40
    first = tunesmith.load(trained[0]).predict([rows[0]["messages"][0]["value"]])
    assert rows[0]["generated_text"] == first[0]["generated_text"] and len(rows[0]["messages"]) == 2


def test_a_run_on_raw_text_goes_on_with_it(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(DOCUMENTS * 3):
        (folder / f"{number}.txt").write_text(f"{number} {text}", encoding="utf-8")
    result = tunesmith.train(
        _recipe(base, folder, tmp_path / "run", "data.max_length=16", general="none"), console=QUIET
    )
    assert set(result["metrics"]["test"]) == {"loss", "perplexity", "accuracy"}
    (answer,) = tunesmith.load(tmp_path / "run").predict("one two")
    assert set(answer) == {"generated_text"}
    kept = load(tmp_path / "run" / "recipe.yaml").task
    assert isinstance(kept, TextGeneration) and kept.form == "text"


def test_the_metric_may_be_one_of_texts(base: Path, chats: Path, tmp_path: Path) -> None:
    words = ("train.metric=rouge_l", "train.max_steps=2", "train.evaluate_every=1")
    how = {"max_new_tokens": 4, "rows": 2}
    tunesmith.train(_recipe(base, chats, tmp_path / "run", *words, general="none", generate=how), console=QUIET)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum("validation/rouge_l" in line for line in lines) == 2
    with pytest.raises(RecipeError, match=r"^train\.metric: rouge_l .*; set task\.generate="):
        tunesmith.train(_recipe(base, chats, tmp_path / "other", *words, general="none"), console=QUIET)


def test_the_template_of_a_run_is_saved_with_it(base: Path, chats: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text(CHATML.replace("user", "you"))
    recipe = _recipe(base, chats, tmp_path / "run", "train.max_steps=1", general="none", chat_template=str(file))
    tunesmith.train(recipe, console=QUIET)
    file.unlink()
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "base").chat_template == CHATML.replace("user", "you")
    assert tunesmith.load(tmp_path / "run").predict("say 1")


def test_rows_that_cannot_be_learned_from_stop_a_run_or_are_counted(base: Path, chats: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(chats.read_text() + '{"conversations": [{"from": "human", "value": "x"}]}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:41: .*user"):
        tunesmith.train(_recipe(base, bad, tmp_path / "run", general="none"), console=QUIET)
    words = ("data.on_bad_row=skip", "train.max_steps=1")
    tunesmith.train(_recipe(base, bad, tmp_path / "run", *words, general="none"), console=QUIET)
    notes = json.loads((tmp_path / "run" / "run.json").read_text())["data"]["notes"]
    assert "train: skipped 1 row (unusable row)" in notes
    with pytest.raises(DataError, match=r"data\.max_length; raise data\.max_length"):
        tunesmith.train(_recipe(base, chats, tmp_path / "none", "data.max_length=8", general="none"), console=QUIET)


def test_chats_and_raw_text_are_not_mixed() -> None:
    task = TextGeneration()
    with pytest.raises(DataError, match="^here: 2 .* 1 .*task.form=text"):
        task.fit(["chat", "text", "chat"], Data(train="here"))  # type: ignore[call-arg]
    row = Row("x:1", {"prompt": "a", "answer": "b", "text": "c"})
    assert task.parse_target(row) == "chat" and TextGeneration(form="text").parse_target(row) == "text"  # type: ignore[call-arg]
    with pytest.raises(RecipeError, match=r"^task\.form: chat.*data\.columns\.prompt="):
        TextGeneration(form="chat").fit(["text"], Data(train="here"))  # type: ignore[call-arg]


def test_a_base_without_a_template_gets_the_plain_one_and_that_is_said(tmp_path: Path, chats: Path) -> None:
    bare = tmp_path / "bare"
    _model("gpt2").save_pretrained(bare)
    tokenizer().save_pretrained(bare)
    tunesmith.train(_recipe(bare, chats, tmp_path / "run", "train.max_steps=1", general="none"), console=QUIET)
    assert "Assistant:" in AutoTokenizer.from_pretrained(tmp_path / "run" / "base").chat_template
    bound = _bind(TextGeneration(form="chat"), tokenizer())  # type: ignore[call-arg]
    assert bound.task.chat_template == "plain" and "Assistant:" in bound.processor.chat_template
    encoded = encode_in_memory(_chat_rows(), bound.encode)
    assert "plain" in bound.notes(encoded)[0] and "task.chat_template" in bound.notes(encoded)[0]


def test_a_tokenizer_without_an_end_and_an_encoder_are_refused(tiny_bert: Path, chats: Path, tmp_path: Path) -> None:
    endless = tokenizer(template=CHATML)
    endless.eos_token = None
    with pytest.raises(RecipeError, match="^model: "):
        _bind(TextGeneration(form="text"), endless)  # type: ignore[call-arg]
    with pytest.raises(RecipeError, match="model: a bert model .*decoder"):
        tunesmith.train(_recipe(tiny_bert, chats, tmp_path / "run", general="none"), console=QUIET)


def test_what_was_forgotten_is_said_to_be_unknown_without_the_general_text(home: Path) -> None:
    task = TextGeneration()
    (note,) = task.fetch(print, offline=True)
    assert "general text" in note and task.extra_eval_sets() == {}
    home.mkdir(exist_ok=True)
    snippets.general_path().write_text("some text")
    assert task.fetch(print, offline=True) == [] and task.extra_eval_sets() == {"general": str(home / "general.txt")}
    assert TextGeneration(general="none").extra_eval_sets() == {}  # type: ignore[call-arg]


def test_of_several_choices_the_likeliest_is_answered(tmp_path: Path) -> None:
    questions = [
        {"prompt": f"say {n % 3}", "choices": ["one", "two or three", "no"], "answer": n % 3} for n in range(9)
    ]
    plain = {"prompt": "say", "answer": "two"}
    rows = [Row(f"x:{n}", values) for n, values in enumerate([*questions, plain])]
    bound, encoded = _encoded(rows, TextGeneration(generate={"max_new_tokens": 4}), tmp_path / "rows")  # type: ignore[call-arg, arg-type]
    model, processor = _model(), tokenizer(template=CHATML)
    with torch.no_grad():
        found = bound.generator.generate(model, _batch(encoded))
    for number, row in enumerate(rows[:9]):
        scores = []
        for choice in ("one", "two or three", "no"):
            asked = [{"role": "user", "content": row.values["prompt"]}]
            prompt = processor.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
            ids = torch.tensor([[*prompt, *processor(choice, add_special_tokens=False)["input_ids"], 4]])
            with torch.no_grad():
                said = model(input_ids=ids).logits[0].log_softmax(-1)
            scores.append(float(said[torch.arange(len(prompt) - 1, ids.shape[1] - 1), ids[0, len(prompt) :]].sum()))
        assert found[number] == ("one", "two or three", "no")[int(np.argmax(scores))]
    right = [text == ("one", "two or three", "no")[n % 3] for n, text in enumerate(found[:9])]
    scores_ = evaluate.scores(model, bound, encoded, CPU, answers=True)
    assert scores_["exact_match"] == pytest.approx((sum(right) + (found[9] == "two")) / 10)
    again = encode_in_memory([bound.as_prompt(row) for row in rows], bound.encode, bound.costs)
    answers = evaluate.answers(model, bound, again, CPU)
    assert [one["generated_text"] for one in answers] == found
    assert [bound.task.render(one, row) for one, row in zip(answers, rows, strict=True)] == found
    assert bound.generator.reference_pair(rows[9]) == ("say", "two")


def test_stages_first_the_language_of_a_field_then_its_answers(base: Path, chats: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(f"{n} one two three" for n in range(30)), encoding="utf-8")
    task = {"name": "text-generation", "general": "none"}
    given = {
        "model": str(base), "technique": "lora", "output": str(tmp_path / "out"), "task": task,
        "train": {"max_steps": 3, "batch_size": 8, "precision": "fp32", "device": "cpu"},
        "stages": [{"data": {"train": str(texts)}}, {"data": {"train": str(chats)}}],
    }  # fmt: skip
    tunesmith.train(given, console=QUIET)
    forms = [load(tmp_path / "out" / f"{n}-text-generation" / "recipe.yaml").task.form for n in (1, 2)]  # type: ignore[attr-defined]
    assert forms == ["text", "chat"]
    assert tunesmith.load(tmp_path / "out" / "2-text-generation").predict("say 1")


def test_a_preview_has_a_target_at_each_token_with_loss() -> None:
    bound = _bind(TextGeneration(form="chat"))  # type: ignore[call-arg]
    (fields,) = bound.encode(_chat_rows()[:1])
    (window,) = bound.preview(fields).windows
    assert [place for place, token in enumerate(window) if token.target] == fields["learned"]
    assert all(token.target in (None, token.text) for token in window)
    texts = _bind(TextGeneration(form="text"), max_length=24)  # type: ignore[call-arg]
    block = texts.encode(list(texts.chunks(_text_rows())))[0]
    assert [len(window) for window in texts.preview(block).windows] == block["windows"]


def test_a_text_is_streamed_piece_by_piece_and_is_the_generated_one() -> None:
    bound, model = _bind(TextGeneration(form="chat", generate={"max_new_tokens": 8})), _model()  # type: ignore[call-arg, arg-type]
    prompt = bound.as_prompt(Row("input 1", {"prompt": "Count"}))
    batch, said = _batch(encode_in_memory([prompt], bound.encode)), list[str]()
    assert bound.generator is not None
    with torch.no_grad():
        text = bound.generator.stream(model, batch, said.append)
        assert bound.generator.generate(model, batch) == [text]
    assert "".join(said).strip() == text
