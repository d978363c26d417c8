from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tunesmith.kernels.ops.grad_buffers import GradBuffers
from tunesmith.kernels.ops.linear import apply_linears


def _buffers(linear: nn.Linear) -> GradBuffers:
    return GradBuffers(linear.parameters(), min_elements=1)


@pytest.mark.parametrize("half", (False, True))
def test_gradients_are_those_without(half: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(6, 5)
    ours = copy.deepcopy(plain)
    buffers = _buffers(ours)
    where = set()
    for step in range(3):
        xs = [torch.randn(4, 6) for _ in range(2)]  # two micro-batches add up
        for linear in (plain, ours):
            for x in xs:
                with torch.autocast("cpu", torch.bfloat16, enabled=half):
                    apply_linears(x, linear, buffers=buffers)[0].float().square().sum().backward()
        assert ours.weight.grad is not None and plain.weight.grad is not None
        torch.testing.assert_close(ours.weight.grad, plain.weight.grad)
        where.add(ours.weight.grad.data_ptr())
        for linear in (plain, ours):
            assert linear.weight.grad is not None
            with torch.no_grad():
                linear.weight -= 0.1 * linear.weight.grad
            linear.zero_grad(set_to_none=step != 1)
    assert torch.equal(ours.weight, plain.weight) and len(where) == 1


def test_a_changed_weight_is_cast_anew_and_what_needs_the_old_one_says_so() -> None:
    linear = nn.Linear(6, 5)
    buffers = _buffers(linear)
    x = torch.randn(4, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        first, same = apply_linears(x, linear, buffers=buffers)[0], apply_linears(x, linear, buffers=buffers)[0]
        same.sum().backward()
        first.sum().backward()  # nothing has changed since
        old = apply_linears(x, linear, buffers=buffers)[0]
        with torch.no_grad():
            linear.weight.mul_(2.0)
            linear.bias.zero_()
        torch.testing.assert_close(
            apply_linears(x, linear, buffers=buffers)[0], (x.bfloat16() @ linear.weight.bfloat16().t())
        )
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            old.sum().backward()
        linear.weight.data.zero_()  # does not increase the version counter
        assert apply_linears(x, linear, buffers=buffers)[0].eq(0).all()


def test_what_was_scored_before_the_first_step_learns() -> None:
    linear, x = nn.Linear(6, 5), torch.randn(4, 6)
    buffers = _buffers(linear)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.inference_mode():
            apply_linears(x, linear, buffers=buffers)
        apply_linears(x, linear, buffers=buffers)[0].sum().backward()
        with torch.inference_mode():
            apply_linears(x, linear, buffers=buffers)
        apply_linears(x, linear, buffers=buffers)[0].sum().backward()
    assert linear.weight.grad is not None and linear.weight.grad.ne(0).any()


def test_what_does_not_learn_keeps_nothing() -> None:
    linear = nn.Linear(6, 5)
    buffers = _buffers(linear)
    linear.weight.requires_grad_(False)
    assert buffers.of(linear.weight) is None and buffers.of(linear.bias) is None and buffers.of(None) is None
    linear.weight.requires_grad_(True)
    assert buffers.of(linear.weight) is not None and buffers.of(linear.weight.t()) is None
