from __future__ import annotations

import pytest
import torch
from torch import nn

from tunesmith.kernels.edits import Edits
from tunesmith.kernels.ops.dropout import dropout_forward, keep_scale


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
@pytest.mark.parametrize("p", (0.1, 0.5))
def test_a_share_p_is_dropped_and_the_rest_scaled(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    scales = keep_scale(torch.ones(1001, 997, dtype=dtype), p)
    assert scales.dtype == dtype and scales.shape == (1001, 997)
    kept = scales != 0
    assert abs(kept.float().mean().item() - (1 - p)) < 5 * (p * (1 - p) / scales.numel()) ** 0.5
    assert torch.equal(scales[kept].unique(), torch.tensor([1 / (1 - p)], dtype=dtype))


def test_of_nothing_nothing_is_dropped() -> None:
    assert keep_scale(torch.ones(0, 3), 0.5).shape == (0, 3)


def test_the_seed_decides_the_draw() -> None:
    x = torch.ones(64, 64)
    torch.manual_seed(7)
    first, second = keep_scale(x, 0.5), keep_scale(x, 0.5)
    torch.manual_seed(7)
    assert torch.equal(keep_scale(x, 0.5), first) and not torch.equal(first, second)


def test_neighbours_are_independent() -> None:
    torch.manual_seed(0)
    kept = (keep_scale(torch.ones(2**20), 0.5) != 0).float() - 0.5
    for lag in (1, 2, 3, 4, 8, 384):
        assert abs((kept[:-lag] * kept[lag:]).mean().item()) < 0.25 * 5 / 2**10


def test_masks_one_after_another_are_independent() -> None:
    torch.manual_seed(0)
    x, p = torch.ones(2**12), 0.3
    dropped = torch.stack([keep_scale(x, p) == 0 for _ in range(512)]).double()
    counts = dropped.sum(1)
    assert abs(counts.mean().item() / len(x) - p) < 5 * (p * (1 - p) / dropped.numel()) ** 0.5
    assert 0.8 < counts.var().item() / (len(x) * p * (1 - p)) < 1.25  # of 512 counts: 4 standard errors
    both = ((dropped[:-1] - p) * (dropped[1:] - p)).mean().item()
    assert abs(both) < 5 * p * (1 - p) / dropped.numel() ** 0.5
    same = ((dropped - p)[:, None] * (dropped - p)).mean(2).fill_diagonal_(0.0)
    assert same.abs().max().item() < 6 * p * (1 - p) / len(x) ** 0.5  # of 130,000 pairs


def test_modules_are_replaced_in_place_and_eval_is_untouched() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Dropout(0.0))
    edits = Edits()
    edits.set_forward(model[1], dropout_forward)
    x = torch.randn(8, 4, requires_grad=True)
    assert torch.equal(model.eval()(x), model[0](x))
    model.train()
    (grad,) = torch.autograd.grad((dropped := model[1](x)).sum(), x)
    assert torch.equal(grad == 0, dropped == 0) and set(grad.unique().tolist()) == {0.0, 2.0}
