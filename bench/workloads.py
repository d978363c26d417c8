"""Workloads of the speed benchmark: model, data, technique, peers and target ratios.

Each peer runs at its defaults and at best practice. All arms of a workload use the same initial weights, rows, epochs,
batch size and learning rate, with the model's dropout and no LoRA dropout (the default of PEFT and ours).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

Keys = Mapping[str, Any]


@dataclass(frozen=True)
class Peer:
    """Arm to compare with: its module in `bench.arms`, the target ratio (`wanted`) and additional job keys."""

    name: str
    arm: str
    wanted: float
    keys: Keys = field(default_factory=dict)


@dataclass(frozen=True)
class Workload:
    """Work of all arms. `technique` is ours; `theirs` is the peer's: a name in `peer_techniques` and keys of PEFT."""

    name: str
    about: str
    task: str
    model: str
    data: str
    rows: int
    technique: Keys
    theirs: Keys
    peers: tuple[Peer, ...]
    batch_size: int = 16
    epochs: int = 1
    max_length: int = 256
    learning_rate: float = 1e-3
    memory: bool = False
    """Compare peak memory, each in a fresh process, instead of time."""
    device: str = "cpu"
    """Target device type: "cpu" or "cuda"."""

    def job(self, peer: Peer | None, **where: Any) -> dict[str, Any]:
        """Return the job of a peer, or of ours if `peer` is None; `where`: model, data, device, precision."""
        shared = {key: getattr(self, key) for key in ("task", "batch_size", "epochs", "max_length", "learning_rate")}
        return {
            **shared,
            **where,
            **({"technique": self.theirs, **peer.keys} if peer else {"technique": self.technique}),
        }


TRAINER, SFT = "bench.arms.trainer", "bench.arms.sft"
DEFAULTS: Keys = {"best": False}
BEST: Keys = {"best": True}
COMPILED: Keys = {"best": True, "compiled": True}
PADDED: Keys = {"best": False, "pad_to": 128}
QUERY_VALUE: Keys = {"name": "lora", "r": 8, "target_modules": ["query", "value"]}
PLAIN_LORA: Keys = {"name": "lora", "lora_dropout": 0.0}
ALL_LINEAR: Keys = {"name": "lora", "r": 16, "target_modules": "all-linear"}


def _two(best: float, defaults: float, *, named: str = "Trainer", as_is: Keys = DEFAULTS) -> tuple[Peer, ...]:
    """Return the Trainer at best practice and at defaults."""
    return (Peer(f"{named}, best practice", TRAINER, best, BEST), Peer(f"{named}, defaults", TRAINER, defaults, as_is))


def _classify(name: str, about: str, technique: Keys, theirs: Keys, peers: tuple[Peer, ...], **more: Any) -> Workload:
    given: dict[str, Any] = {"model": "minilm", "data": "sst2", "rows": 640} | more
    return Workload(name, about, "text-classification", technique=technique, theirs=theirs, peers=peers, **given)


def _c1(blocks: int) -> Workload:
    about = f"{blocks}x768 BERT, LoRA r 8 query+value, 16 x 128 tokens"
    where = {"model": f"bert-{blocks}x768", "data": "medquad", "rows": 768 // blocks, "max_length": 128}
    return _classify(f"C1-{blocks}x768", about, QUERY_VALUE, PLAIN_LORA, _two(1.4, 2.4), **where)


def _chats(name: str, about: str, model: str, peers: tuple[Peer, ...], **more: Any) -> Workload:
    """Return an instruction-tuning workload on alpaca rows of natural length."""
    given: dict[str, Any] = {"technique": ALL_LINEAR, "theirs": {"name": "lora"}, "max_length": 512} | more
    return Workload(name, about, "text-generation", model=model, data="alpaca_en", peers=peers, **given)


def _sft(best: float, defaults: float, unsloth: float | None = None) -> tuple[Peer, ...]:
    """Return TRL at best practice and at defaults, with Unsloth between them if it has a target."""
    between = () if unsloth is None else (Peer("Unsloth", "bench.arms.unsloth", unsloth, BEST),)
    return (Peer("TRL, best practice", SFT, best, BEST), *between, Peer("TRL, defaults", SFT, defaults, DEFAULTS))


def _last_two(role: str) -> list[str]:
    return [f"encoder.layer.{block}.attention.self.{role}" for block in (4, 5)]


def _c7(name: str, technique: Keys, theirs: Keys) -> Workload:
    return Workload(
        f"C7-{name}",
        f"Marian 7.8M, {name}, multi30k_en_de",
        "translation",
        model="marian-en-de",
        data="multi30k_en_de",
        rows=1280,
        technique=technique,
        theirs=theirs,
        peers=_two(1.3, 2.5, named="Seq2SeqTrainer"),
        batch_size=64,
        max_length=64,
    )


def _c11(name: str, technique: Keys, theirs: Keys, wanted: float, **more: Any) -> Workload:
    """Return a workload on short texts, where the fixed cost of a step dominates."""
    about = f"MiniLM, {name}, questions of 13 tokens"
    given: dict[str, Any] = {"data": "medquad-questions", "rows": 1280, "max_length": 128} | more
    return _classify(f"C11-{name}", about, technique, theirs, _two(wanted, 2 * wanted), **given)


ON_HEAD = (
    Peer("Trainer, best practice", TRAINER, 9.0, BEST),
    Peer("encoded once, logistic head", "bench.arms.encode_once", 1.2),
    Peer("Trainer, defaults", TRAINER, 15.0, DEFAULTS),
)
SPEED = (
    _c1(6),
    _c1(12),
    _classify(
        "C2",
        "MiniLM, full, sst2",
        {"name": "full"},
        {"name": "full"},
        _two(1.4, 3.0, as_is=PADDED),
        rows=960,
        batch_size=32,
        learning_rate=1e-4,
    ),
    Workload(
        "C3",
        "MiniLM, entities, LoRA r 8 on all linear layers, wnut17",
        "token-classification",
        model="minilm",
        data="wnut17",
        rows=960,
        technique={"name": "lora", "r": 8, "target_modules": "all-linear"},
        theirs={**PLAIN_LORA, "target_modules": r".*encoder\.layer\..*(query|key|value|dense)"},
        peers=_two(1.5, 4.0, as_is=PADDED),
        batch_size=32,
    ),
    _classify(
        "C4",
        "MiniLM, freeze head_only, 10 epochs, sst2",
        {"name": "freeze", "head_only": True},
        {"name": "head"},
        ON_HEAD,
        rows=960,
        epochs=10,
        learning_rate=1e-1,
    ),
    _classify(
        "C5-freeze",
        "MiniLM, freeze last_n_blocks 2 of 6, 3 epochs, sst2",
        {"name": "freeze", "last_n_blocks": 2},
        {"name": "last-2"},
        _two(1.7, 3.0),
        epochs=3,
        learning_rate=2e-4,
    ),
    _classify(
        "C5-lora",
        "MiniLM, LoRA r 8 query+value in the last 2 of 6 blocks, 3 epochs, sst2",
        {"name": "lora", "r": 8, "target_modules": _last_two("query") + _last_two("value")},
        {**PLAIN_LORA, "layers_to_transform": [4, 5]},
        _two(1.7, 3.0),
        epochs=3,
    ),
    _chats(
        "C6",
        "SmolLM2-135M, instructions, LoRA r 16 on all linear layers, alpaca",
        "smollm2",
        _sft(1.5, 3.0, unsloth=1.2),
        rows=64,
        batch_size=8,
    ),
    _c7("full", {"name": "full"}, {"name": "full"}),
    _c7("lora", QUERY_VALUE, {**PLAIN_LORA, "target_modules": ["q_proj", "v_proj"]}),
    _classify(
        "C10",
        "MiniLM, prompt tuning with 20 virtual tokens, sst2",
        {"name": "prompt", "num_virtual_tokens": 20},
        {"name": "prompt"},
        _two(1.3, 2.0),
        learning_rate=1e-2,
    ),
    _c11("full", {"name": "full"}, {"name": "full"}, 1.5, learning_rate=1e-4),
    _c11("lora", QUERY_VALUE, PLAIN_LORA, 1.4),
)
ON_GPUS = (
    _classify(
        "G1",
        "12x768 BERT, LoRA r 8 query+value, 32 x 128 tokens",
        QUERY_VALUE,
        PLAIN_LORA,
        (
            Peer("Trainer, best practice, compiled", TRAINER, 2.0, COMPILED),
            Peer("Trainer, best practice", TRAINER, 2.0, BEST),
            Peer("Trainer, defaults", TRAINER, 4.0, DEFAULTS),
        ),
        model="bert-12x768",
        data="medquad",
        rows=6400,
        max_length=128,
        batch_size=32,
        device="cuda",
    ),
    _chats(
        "G2",
        "LLaMA 1.2B, LoRA r 16 on all linear layers, 64 alpaca rows per step (8,000 tokens)",
        "llama-1b",
        _sft(1.5, 2.2, unsloth=1.1),
        rows=1280,
        batch_size=64,
        device="cuda",
    ),
    _chats(
        "G3",
        "LLaMA 8B, LoRA r 16 on all linear layers, 64 alpaca rows per step (8,000 tokens)",
        "llama-8b",
        _sft(1.25, 1.8, unsloth=1.05),
        rows=640,
        batch_size=64,
        device="cuda",
    ),
    _chats(
        "G4",
        "Qwen2 0.5B, full, 128 alpaca rows per step (16,000 tokens)",
        "qwen-0.5b",
        _sft(1.25, 2.0),
        technique={"name": "full"},
        theirs={"name": "full"},
        rows=2560,
        batch_size=128,
        learning_rate=2e-5,
        device="cuda",
    ),
)
MEMORY = {"C1-6x768": 0.75, "C1-12x768": 0.75, "C2": 0.75, "C6": 0.75, "C11-full": 0.9, "C11-lora": 0.9}
"""Workload -> target ratio of peak memory to the peer at best practice."""


def _memory(workload: Workload) -> Workload:
    """Return the workload with its peers compared by peak memory."""
    best = MEMORY[workload.name]
    peers = tuple(replace(peer, wanted=best if peer.keys.get("best") else best - 0.15) for peer in workload.peers)
    return replace(workload, name=f"mem-{workload.name}", peers=peers, memory=True)


WORKLOADS = (*SPEED, *(_memory(workload) for workload in SPEED if workload.name in MEMORY), *ON_GPUS)


def chosen(names: Sequence[str], device: str = "cpu") -> list[Workload]:
    """Return the workloads selected by name or prefix (`C1`, `mem`), or all for the device if no name is given.

    Raises:
        ValueError: a name matches no workload.
    """
    found = {name: [w for w in WORKLOADS if w.name == name or w.name.startswith(f"{name}-")] for name in names}
    for name, meant in found.items():
        if not meant:
            raise ValueError(f"{name}: unknown workload; choose from {', '.join(w.name for w in WORKLOADS)}")
    wanted = [w for meant in found.values() for w in meant]
    return [w for w in WORKLOADS if (w in wanted if names else w.device == device)]
