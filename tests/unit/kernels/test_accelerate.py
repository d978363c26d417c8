"""Fast paths of a model: chosen, reported when off, and undone."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from typing import Any

import pytest
import torch
from accelerating import accelerated
from torch import Tensor, nn

from tunesmith.data.batches import Ragged, host_lengths
from tunesmith.kernels import accelerate, chunked_loss, layout
from tunesmith.kernels.accelerate import PATHS, switched_off
from tunesmith.kernels.equality import Probe
from tunesmith.kernels.fast_path import FastPath, PathStatus, fast_path
from tunesmith.models.anatomy import anatomy
from tunesmith.testing import FAMILIES, tiny_model

CLASSIFIER = "AutoModelForSequenceClassification"


def _state(model: nn.Module) -> dict[str, Any]:
    """Return everything that replacing modules can change."""
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    return {
        name: (
            type(module),
            {key: value for key, value in vars(module).items() if callable(value) and not key.startswith("_")},
            [len(getattr(module, kind)) for kind in hooks],
        )
        for name, module in model.named_modules()
    }


def _batch() -> dict[str, Tensor]:
    mask = (torch.arange(9) < torch.tensor([9, 4, 6])[:, None]).long()
    return {"input_ids": torch.arange(5, 32).view(3, 9) * mask, "attention_mask": mask}


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lower the size limits so that tiny models qualify for every path."""
    monkeypatch.setattr(chunked_loss, "MIN_PARAMETERS", 1)
    monkeypatch.setattr(accelerate, "MIN_TABLE", 1)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("marian", "bart", "t5")])
def test_undo_puts_the_own_code_back(family: str, everything: None) -> None:
    model: Any = tiny_model(family, CLASSIFIER, num_labels=3)
    before, expected = _state(model), model(**_batch()).logits
    implementation = model.config._attn_implementation
    path = accelerated(model)
    assert fast_path(model) is path and _state(model) != before
    torch.testing.assert_close(model(**_batch()).logits, expected, atol=1e-5, rtol=1e-5)
    path.undo()
    assert _state(model) == before and model.config._attn_implementation == implementation
    assert torch.equal(model(**_batch()).logits, expected)
    assert not fast_path(model).unpadded and not any(status.on for status in path.statuses.values())


def test_every_path_has_a_status_and_a_reason_where_it_is_off(everything: None) -> None:
    path = accelerated(tiny_model("bert", "AutoModelForMaskedLM"))
    assert tuple(path.statuses) == PATHS
    assert all(status.on or status.reason for status in path.statuses.values())
    on = {name for name, status in path.statuses.items() if status.on}
    assert on >= {"unpadded", "fused_blocks", "last_block", "chunked_loss", "fast_dropout"}
    dump = json.loads(json.dumps(path.dump()))
    assert (
        dump["fused_blocks"] == {"on": True, "blocks": list(anatomy(tiny_model("bert", "AutoModel")).blocks)}
        or [name.startswith("bert.") for name in dump["fused_blocks"]["blocks"]] == [True] * 3
    )
    assert "\n" not in path.summary() and "fused blocks" in path.summary()


def test_off_is_off_throughout() -> None:
    path = switched_off("train.fast_path: off")
    assert not path.unpadded and path.lm_head is None and not path.looked_up
    assert {status.reason for status in path.statuses.values()} == {"train.fast_path: off"}


def test_some_blocks_are_fused_and_the_others_say_why() -> None:
    model: Any = tiny_model("bert", CLASSIFIER, num_labels=3)
    expected = model(**_batch()).logits
    blocks = anatomy(model).blocks
    model.get_submodule(blocks[1]).more = nn.Dropout(0.1)
    path = accelerated(model)
    status = path.statuses["fused_blocks"]
    assert status.on and status.blocks == (blocks[0], blocks[2]) and "more" in status.reason
    assert "2 of 3 blocks" in path.summary() and status.reason in path.summary()
    torch.testing.assert_close(model(**_batch()).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_probe_that_fails_is_reported_and_changes_nothing() -> None:
    model: Any = tiny_model("llama", CLASSIFIER, num_labels=3)

    def refuse(*_: Any) -> None:
        raise ValueError("no texts of this kind")

    handle = model.model.layers[0].register_forward_pre_hook(refuse)
    before = _state(model)
    path = accelerated(model)
    assert "no texts of this kind" in path.statuses["unpadded"].reason and "no texts" in path.summary()
    assert _state(model) == before
    handle.remove()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("what", ["output", "gradient", "training"])
def test_a_block_that_computes_otherwise_is_found(
    what: str, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three cases: wrong outputs, wrong gradients, and errors only in training mode."""
    model = tiny_model("bert", CLASSIFIER, num_labels=3)
    kind = accelerate.fused_blocks.PostNorm
    right = kind.__call__

    def wrong(self: Any, x: Tensor, inputs: Any) -> Tensor:
        y = right(self, x, inputs)
        if what == "gradient":
            return y.detach() + 0.5 * (y - y.detach())
        return y * 1.3 if what == "output" or self.block.training else y

    monkeypatch.setattr(kind, "__call__", wrong)
    path = accelerated(model, dtype)
    assert path.unpadded and not path.statuses["fused_blocks"].on
    assert "differs by" in path.statuses["fused_blocks"].reason


def test_gradients_and_modes_are_as_before_the_check() -> None:
    model: Any = tiny_model("bert", CLASSIFIER, num_labels=3, hidden_dropout_prob=0.1)
    model.bert.encoder.layer[1].train()
    model.bert.embeddings.requires_grad_(False)
    model(**_batch()).logits.sum().backward()
    modes = [module.training for module in model.modules()]
    grads = [None if one.grad is None else one.grad.clone() for one in model.parameters()]
    trainable, random = [one.requires_grad for one in model.parameters()], torch.get_rng_state()
    assert accelerated(model).statuses["fused_blocks"].on
    assert [module.training for module in model.modules()] == modes
    assert [one.requires_grad for one in model.parameters()] == trainable
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.0, 0.1}
    assert torch.equal(torch.get_rng_state(), random)
    for one, grad in zip(model.parameters(), grads, strict=True):
        assert (one.grad is None) == (grad is None) and (grad is None or torch.equal(one.grad, grad))


def test_every_kind_of_block_is_probed() -> None:
    model: Any = tiny_model("bert", CLASSIFIER)
    blocks = [model.get_submodule(name) for name in anatomy(model).blocks]
    assert Probe(model, blocks, None, 40).depth == 0
    blocks[2].attention.self.query = nn.Sequential(blocks[2].attention.self.query)
    assert Probe(model, blocks, None, 40).depth == 2


def test_a_copy_has_no_fast_path_and_a_model_that_is_gone_leaves_none() -> None:
    model = tiny_model("bert", CLASSIFIER)
    path, gone = accelerated(model), weakref.ref(model)
    assert not fast_path(copy.deepcopy(model)).unpadded
    del model
    gc.collect()
    assert gone() is None
    path.undo()


def test_what_is_off_for_no_reason_of_the_model_is_not_said() -> None:
    path = FastPath(
        {"unpadded": PathStatus(True), "cuda_graphs": PathStatus(False, reason="not on cpu", applies=False)}
    )
    assert path.summary() == "fast paths: unpadded"


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_lengths_that_a_batch_knows_are_not_read_from_its_mask(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model(family, CLASSIFIER, num_labels=3, pad_token_id=0)
    rows = Ragged(torch.arange(5, 24), torch.tensor([0, 9, 13, 19]))
    mask = rows.mask()
    known = host_lengths(mask)
    assert known is not None and known.tolist() == [9, 4, 6] and host_lengths(mask.clone()) is None
    inputs = {"input_ids": rows.padded(0), "attention_mask": mask}
    expected = model(**inputs).logits
    assert accelerated(model).unpadded
    seen, read = [], layout._lengths

    def watched(mask: Tensor, tokens: int) -> Any:
        seen.append(layout._KNOWN.get())
        return read(mask, tokens)

    monkeypatch.setattr(layout, "_lengths", watched)
    torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    assert seen and all(one is not None and one[9] is known for one in seen)
    assert layout._KNOWN.get() is None
