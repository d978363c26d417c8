from __future__ import annotations

import copy

import pytest
import torch
from accelerating import accelerated
from torch import nn

from tunesmith.kernels import accelerate
from tunesmith.kernels.edits import Edits
from tunesmith.kernels.ops.grad_buffers import SparseEmbedding
from tunesmith.testing import tiny_model


@pytest.fixture(autouse=True)
def every_table_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerate, "MIN_TABLE", 1)


def _use_sparse_gradients(table: nn.Embedding) -> None:
    Edits().set_forward(table, SparseEmbedding(table))


@pytest.mark.parametrize("padding_idx", (None, 0))
def test_gradients_are_those_of_pytorch(padding_idx: int | None) -> None:
    torch.manual_seed(0)
    plain = nn.Embedding(12, 4, padding_idx=padding_idx)
    ours = copy.deepcopy(plain)
    _use_sparse_gradients(ours)
    for step in range(4):  # rows of an earlier step must not remain
        for _ in range(2):  # two micro-batches add up
            ids = torch.randint(0, 12, (3, 2))
            scale = torch.randn(3, 2, 4)
            for table in (plain, ours):
                (table(ids) * scale).sum().backward()
        assert plain.weight.grad is not None and torch.allclose(ours.weight.grad, plain.weight.grad, atol=1e-6)
        for table in (plain, ours):
            assert table.weight.grad is not None
            table.weight.grad.mul_(0.5)  # as clipping does
            with torch.no_grad():
                table.weight -= 0.1 * table.weight.grad
            table.zero_grad(set_to_none=step != 1)
    assert torch.allclose(ours.weight, plain.weight, atol=1e-6)


def test_a_step_zeroes_only_what_it_touched() -> None:
    table = nn.Embedding(1000, 4)
    _use_sparse_gradients(table)
    table(torch.tensor([3])).sum().backward()
    kept = table.weight.grad
    table.zero_grad()
    table(torch.tensor([5])).sum().backward()
    assert table.weight.grad is kept and kept is not None
    assert kept[3].eq(0).all() and kept[5].eq(1).all() and kept.sum() == 4


@pytest.mark.parametrize(("family", "taken"), (("bert", True), ("gpt2", False)))
def test_a_table_tied_to_an_output_is_left_alone(family: str, taken: bool) -> None:
    name = {"bert": "AutoModelForSequenceClassification", "gpt2": "AutoModelForCausalLM"}[family]
    model = tiny_model(family, name)
    assert (model.get_input_embeddings().weight in accelerated(model).looked_up) == taken


def test_a_frozen_table_and_a_look_without_gradients_stay_plain() -> None:
    table = nn.Embedding(12, 4).requires_grad_(False)
    _use_sparse_gradients(table)
    assert not table(torch.tensor([1])).requires_grad
    table.requires_grad_(True)
    with torch.no_grad():
        assert torch.equal(table(torch.tensor([1, 1])), table.weight[[1, 1]])
