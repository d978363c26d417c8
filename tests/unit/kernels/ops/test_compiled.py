"""Compiled ops, traced on the CPU: one graph for any number of tokens, with equal outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.kernels.ops import elementwise as module
from tunesmith.kernels.ops.elementwise import add_norm, add_rms_norm, glu, rms_norm, rope

WIDTH = 16


def _glu(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return glu(x, y, "silu")


def _add_norm(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    total, out = add_norm(x, y, weight, bias, 1e-5)
    return total.sin() + out


def _add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    total, out = add_rms_norm(x, y, weight, 1e-5)
    return total.sin() + out


def _rms_norm(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return rms_norm(x * y, weight, 1e-5)


def _rope(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    cos, sin = torch.linspace(-1, 1, len(x) * 8, dtype=x.dtype).view(len(x), 8).sin().chunk(2, 1)
    return rope(x, cos, sin) * y * weight * bias


pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo looks at it
WAYS = (_glu, _add_norm, _add_rms_norm, _rms_norm, _rope)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Compile on this machine as on a GPU; the list collects the names of the compiled functions."""
    seen: list[str] = []
    compiled: Callable[..., Any] = module._compiled.__wrapped__  # without its cache

    def note(formula: Callable[..., Any], backend: str) -> Callable[..., Any]:
        seen.append(formula.__name__)
        return compiled(formula, backend)

    torch.compiler.reset()
    monkeypatch.setattr(module, "COMPILED_DEVICES", ("cpu",))
    monkeypatch.setattr(module, "_has_compiler", lambda: True)
    monkeypatch.setattr(module, "COMPILE_BACKEND", "aot_eager")
    monkeypatch.setattr(module, "_compiled", note)
    return seen


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("dtype", "learns"), [(torch.float32, True), (torch.bfloat16, False)])
def test_formulas_trace_whole_and_give_what_the_functions_do(
    dtype: torch.dtype, way: Callable[..., Tensor], learns: bool, traced: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tolerance: dict[str, float] = (
        {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.05}
    )
    for tokens in (5, 9):
        torch.manual_seed(tokens)
        x, y = (torch.randn(tokens, WIDTH).to(dtype).requires_grad_() for _ in range(2))
        weight, bias = (torch.randn(WIDTH).requires_grad_(learns) for _ in range(2))
        wanted = [x, y, weight, bias] if learns else [x, y]

        def run(given: tuple[Tensor, ...] = (x, y, weight, bias), wanted: list[Tensor] = wanted) -> tuple[Any, ...]:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                out = way(*given)
            return (out, *torch.autograd.grad(out.float().sin().sum(), wanted, allow_unused=True))

        ours = run()
        with monkeypatch.context() as as_it_is:
            as_it_is.setattr(module, "COMPILED_DEVICES", ())
            plain = run()
        for one, other in zip(ours, plain, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                assert one.dtype == other.dtype
                torch.testing.assert_close(one, other, **tolerance)
    assert len(traced) == 2


def test_dropout_is_drawn_inside(traced: list[str]) -> None:
    x, weight, bias = torch.zeros(400, WIDTH), torch.ones(WIDTH), torch.zeros(WIDTH)
    y = torch.randn(400, WIDTH, requires_grad=True)
    for tokens in (400, 300):
        _, out = add_norm(x[:tokens], y[:tokens], weight, bias, 1e-5, 0.25)
        (grad,) = torch.autograd.grad(out.square().sum() + out.sin().sum(), y)
        assert 0.22 < grad[:tokens].eq(0).float().mean() < 0.28
    assert traced == ["plain_add_norm"] * 2
