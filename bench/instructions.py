"""Instruction tuning with tunesmith or TRL's SFTTrainer: one run of one arm, evaluated by the same PyTorch code.

    python -m bench.instructions ours --model FOLDER --source DATA/alpaca_en --seed 0 --test
    python -m bench.instructions peer --model FOLDER --source DATA/alpaca_en --seed 0 --test --learning-rate 5e-4
    python -m bench.instructions mask --model FOLDER --source DATA/alpaca_en

Training: 600 alpaca rows, one epoch, batch size 8, LoRA r 16 on all linear layers, at most 512 tokens, bf16. Another
100 rows are for validation (choice of the learning rate) and 200 for test. Both arms use the same conversations and the
model's chat template. The loss is the mean over all answer tokens including the end-of-turn token, in fp32, with batch
size 1. `mask` compares our target tokens with those of TRL's `assistant_only_loss`. Only `peer` and `mask` need TRL.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import random
import resource
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
import transformers

from bench.peer import best_practice, work

ROWS = {"train": 600, "validation": 100, "test": 200}
MAX_LENGTH = 512
TURN = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
MARKED = (
    "{% if message['role'] == 'assistant' %}{{'<|im_start|>assistant\n'}}{% generation %}"
    "{{message['content'] + '<|im_end|>'}}{% endgeneration %}{{'\n'}}{% else %}" + TURN + "{% endif %}"
)
"""Turn of SmolLM2's chat template, and the same with the `generation` markers that TRL requires."""

ADAPTER: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
UNCHECKPOINTED = {"gradient_checkpointing": False}
"""TRL uses gradient checkpointing by default; here the activations fit in memory."""


def splits(source: Path) -> dict[str, list[dict[str, Any]]]:
    """Return random splits of single-turn conversations, with seed 0."""
    rows = [row for file in sorted(source.glob("*.json")) for row in json.loads(file.read_text(encoding="utf-8"))]
    rows = [row for row in rows if row["instruction"].strip() and row["output"].strip()]
    random.Random(0).shuffle(rows)
    drawn, begin = {}, 0
    for split, count in ROWS.items():
        drawn[split] = [conversation(row) for row in rows[begin : begin + count]]
        begin += count
    return drawn


def conversation(row: dict[str, str]) -> dict[str, Any]:
    """Return an alpaca row as a conversation of one question and one answer."""
    asked = "\n\n".join(part.strip() for part in (row["instruction"], row["input"]) if part.strip())
    answer = row["output"].strip()
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}


@torch.no_grad()
def answer_loss(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> float:
    """Return the mean cross-entropy (nats) of the answer tokens."""
    total, count = 0.0, 0
    for row in rows:
        messages = row["messages"]
        asked = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        prompt, answer = (
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (asked, messages[-1]["content"] + "<|im_end|>")
        )
        ids = torch.tensor([(prompt + answer)[:MAX_LENGTH]])
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
        total += F.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum").item()
        count += len(logits)
    return total / count


def train_ours(given: argparse.Namespace, rows: dict[str, list[dict[str, Any]]], output: Path) -> dict[str, Any]:
    """Train with tunesmith at its defaults, except for the settings shared by both arms."""
    import tunesmith

    for split in ("train", "validation"):
        lines = "".join(json.dumps(row) + "\n" for row in rows[split])
        (output / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    rate = {} if given.learning_rate is None else {"learning_rate": given.learning_rate}
    data = {split: str(output / f"{split}.jsonl") for split in ("train", "validation")}
    result = tunesmith.train(
        task={"name": "text-generation", "general": "none"},
        model=given.model,
        data={**data, "max_length": MAX_LENGTH},
        technique={"name": "lora", "r": 16, "target_modules": "all-linear"},
        train={"epochs": 1, "batch_size": 8, "seed": given.seed, "device": given.device, "precision": "bf16", **rate},
        output=str(output / "run"),
        offline=True,
    )
    (output / "run" / "adapter").rename(output / "adapter")
    return {key: result[key] for key in ("seconds", "trainable_parameters")}


def sft_trainer(model: Any, tokenizer: Any, rows: list[dict[str, Any]], settings: dict[str, Any], **more: Any) -> Any:
    """Return TRL's SFTTrainer on prompt-completion pairs, with the loss on completions only."""
    import datasets
    import trl

    parts = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows]
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(max_length=MAX_LENGTH, **settings),
        train_dataset=datasets.Dataset.from_list(parts),
        processing_class=tokenizer,
        **more,
    )


def train_peer(given: argparse.Namespace, rows: dict[str, list[dict[str, Any]]], output: Path) -> dict[str, Any]:
    """Train with TRL at best practice: length-grouped batches, fused AdamW, no gradient checkpointing."""
    asked = {key: getattr(given, key) for key in ("learning_rate", "seed", "device")}
    settings = work(epochs=1, batch_size=8, **asked) | best_practice("bf16") | UNCHECKPOINTED
    trainer = sft_trainer(
        transformers.AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32),
        transformers.AutoTokenizer.from_pretrained(given.model),
        rows["train"],
        {"output_dir": str(output / "trl"), **settings},
        peft_config=peft.LoraConfig(**ADAPTER),
    )
    begin = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begin
    trainer.model.save_pretrained(output / "adapter")
    learned = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    return {"seconds": round(seconds, 2), "trainable_parameters": learned}


def compare_masks(given: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare our target tokens with those of TRL and a marked template; joined chats add multi-turn cases."""
    import datasets
    import trl

    from tunesmith.data.text.chats import ChatEncoder

    tokenizer = transformers.AutoTokenizer.from_pretrained(given.model)
    chats = [row["messages"] for row in rows]
    chats += [one + two for one, two in zip(chats[::2], chats[1::2], strict=True)]
    ours = ChatEncoder.of(tokenizer, None, "answers", None).encode([("", chat) for chat in chats], MAX_LENGTH)
    tokenizer.chat_template = tokenizer.chat_template.replace(TURN, MARKED)
    assert "generation" in tokenizer.chat_template, "the chat template is not SmolLM2's"
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.SFTTrainer(
            model=transformers.AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32),
            args=trl.SFTConfig(
                folder, assistant_only_loss=True, max_length=MAX_LENGTH, use_cpu=True, bf16=False, report_to="none"
            ),
            train_dataset=datasets.Dataset.from_list([{"messages": chat} for chat in chats]),
            processing_class=tokenizer,
        )
    tokens = different = 0
    for mine, row in zip(ours, trainer.train_dataset, strict=True):
        labels = trainer.data_collator([row])["labels"][0].tolist()
        theirs = {place: token for place, token in enumerate(labels) if token >= 0}
        own = {place: mine["input_ids"][place] for place in mine["learned"]}
        tokens += len(theirs)
        different += len(theirs.items() ^ own.items())
    return {"chats": len(chats), "learned_tokens": tokens, "different": different}


def main() -> None:
    """Run one arm and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arm", choices=("ours", "peer", "mask"))
    parser.add_argument("--model", required=True, help="folder of SmolLM2")
    parser.add_argument("--source", type=Path, required=True, help="folder with alpaca's JSON files")
    parser.add_argument("--learning-rate", type=float, default=None, help="default for ours: tunesmith's default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--test", action="store_true", help="also evaluate on the test split")
    given = parser.parse_args()
    rows = splits(given.source)
    if given.arm == "mask":
        print(json.dumps(compare_masks(given, rows["test"])))
        return
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        result = {"ours": train_ours, "peer": train_peer}[given.arm](given, rows, Path(folder))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(given.model)
        model = peft.PeftModel.from_pretrained(model, Path(folder, "adapter")).eval()
        for split in ("validation", "test")[: 2 if given.test else 1]:
            result[f"{split}_loss"] = answer_loss(model, tokenizer, rows[split])
    libraries = ["torch", "transformers", "peft", "trl" if given.arm == "peer" else "tunesmith"]
    said = {"arm": given.arm, "seed": given.seed, "learning_rate": given.learning_rate, "peak_memory_bytes": peak}
    versions = {"python": platform.python_version(), **{name: version(name) for name in libraries}}
    print(json.dumps({**said, **result, "versions": versions, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
