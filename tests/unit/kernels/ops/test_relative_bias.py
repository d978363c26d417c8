"""Biases by distance equal biases by pair, and so do their gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerating import unpadded
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from tunesmith.kernels.layout import Layout
from tunesmith.kernels.ops.attention import attend, bias_index, has_relative_bias, relative_bias
from tunesmith.testing import tiny_model


def _attentions() -> list[Any]:
    model = tiny_model("t5", "AutoModelForSeq2SeqLM")
    return [module for module in model.modules() if has_relative_bias(module)]


def test_the_number_of_a_pair_is_that_of_its_distance() -> None:
    encoder, decoder = _attentions()
    for attention in (encoder, decoder):
        found = relative_bias(attention, 40)
        assert found.shape == (4, 79) and len(found[0].unique()) > 10
        for longest in (1, 7, 40):
            assert torch.equal(found[:, bias_index(found, longest)][None], attention.compute_bias(longest, longest))


def test_a_module_gives_pairs_where_distances_are_not_wanted() -> None:
    model: Any = tiny_model("t5", "AutoModelForSeq2SeqLM")
    encoder = next(module for module in model.modules() if has_relative_bias(module))
    expected, path = encoder.compute_bias(5, 5), unpadded(model)
    assert torch.equal(encoder.compute_bias(5, 5), relative_bias(encoder, 5))
    with path.with_padding(model):
        assert torch.equal(encoder.compute_bias(5, 5), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_and_its_gradients_are_those_of_torch(causal: bool) -> None:
    lengths, function = [5, 3, 8], causal_mask_function if causal else bidirectional_mask_function
    layout = Layout((torch.arange(8) < torch.tensor(lengths)[:, None]).long(), 3, 8, function)
    torch.manual_seed(0)
    q, k, v = (torch.randn(layout.total, 16, dtype=torch.float64, requires_grad=True) for _ in range(3))
    distances = torch.randn(4, 31, dtype=torch.float64, requires_grad=True)
    ours = attend(q, k, v, layout.attention_groups, width=4, scaling=1.0, bias=distances)
    plain = []
    for start, length in zip(layout.starts, lengths, strict=False):
        queries, keys, values = (x[start : start + length].view(length, 4, 4).transpose(0, 1) for x in (q, k, v))
        bias = distances[:, bias_index(distances, length)]
        bias = bias.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -torch.inf) if causal else bias
        plain.append(F.scaled_dot_product_attention(queries, keys, values, bias, scale=1.0).transpose(0, 1).flatten(1))
    expected = torch.cat(plain)
    torch.testing.assert_close(ours[: len(expected)], expected)
    weight, learned = torch.randn_like(expected), [q, k, v, distances]
    for mine, theirs in zip(
        torch.autograd.grad((ours[: len(expected)] * weight).sum(), learned),
        torch.autograd.grad((expected * weight).sum(), learned),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)
