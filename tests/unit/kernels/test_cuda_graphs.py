"""CUDA graphs of whole passes, replayed on a CPU by a capture that mimics CUDA's memory reuse."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tunesmith.kernels import cuda_graphs
from tunesmith.kernels.cuda_graphs import CudaGraphs, why_no_graphs
from tunesmith.testing import tiny_model

LONGEST = 40


class Played:
    """Fake capture: a graph is bound to the sample's shapes and reuses the memory of the previous pass."""

    def __init__(self) -> None:
        self.captured: list[torch.Size] = []
        self.replayed = 0

    def __call__(self, module: nn.Module, sample: tuple[Tensor, ...]) -> Any:
        assert not torch.is_autocast_enabled("cpu") or not torch.is_autocast_cache_enabled()
        self.captured.append(sample[0].shape)
        learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
        places = [torch.zeros_like(parameter) for parameter in learning]
        played, shapes, answer = self, [x.shape for x in sample], torch.zeros_like(module(*sample))

        class Replay(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *given: Tensor) -> Tensor:
                assert [x.shape for x in given[: len(sample)]] == shapes
                played.replayed += 1
                with torch.enable_grad():
                    ctx.logits = module(*given[: len(sample)])
                return answer.copy_(ctx.logits).detach()

            @staticmethod
            def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
                found = torch.autograd.grad(ctx.logits, learning, grads, allow_unused=True)
                for place, gradient in zip(places, found, strict=True):
                    place.copy_(torch.zeros_like(place) if gradient is None else gradient)
                return (*[None] * len(sample), *(place.detach() for place in places))

        return lambda *given: Replay.apply(*given, *learning)  # type: ignore[no-untyped-call]


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "GRAPH_DEVICES", ("cpu",))


def _model(kind: str = "Sequence", **config: Any) -> Any:
    without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} | config
    return tiny_model("bert", f"AutoModelFor{kind}Classification", num_labels=3, **without).train()


def _with_graphs(model: Any, capture: Any) -> Any:
    model.forward = CudaGraphs(model, LONGEST, capture)
    return model


def _batches(lengths: list[int]) -> Iterator[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(0)
    for length in lengths:
        ids = torch.randint(5, 20, (4, length), generator=random)
        mask = (torch.arange(length) < torch.randint(2, length + 1, (4, 1), generator=random)).long()
        mask[0] = 1
        yield {"input_ids": ids * mask, "attention_mask": mask}


def _gradients(model: Any, *batches: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    for batch in batches:
        logits = model(**batch).logits.float()
        torch.nn.functional.cross_entropy(logits.flatten(0, -2), torch.arange(logits[..., 0].numel()) % 3).backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def _assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() >= expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected.get(name, torch.zeros_like(gradient)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["Sequence", "Token"])
def test_gradients_are_those_of_the_plain_pass(kind: str) -> None:
    played = Played()
    plain, ours = _model(kind), _with_graphs(_model(kind), played)
    for batch in _batches([9, 12, 16, 20, 11, 40, 31, 25, 33, 39]):
        _assert_alike(_gradients(ours, batch), _gradients(plain, batch))
    assert played.captured == [(4, 16), (4, 32), (4, 40)], "rounded up, and captured when it comes the third time"
    assert played.replayed == (2 + 1) + 2 + 2, "one of each is the comparison"


def test_lengths_never_exceed_what_the_model_reads() -> None:
    played = Played()
    ours = _with_graphs(_model(), played)
    for batch in _batches([39, 37, 40]):
        _gradients(ours, batch)
    assert played.captured == [(4, LONGEST)]


def test_gradients_of_several_batches_add_up() -> None:
    plain, ours = _model(), _with_graphs(_model(), Played())
    first, second, third = _batches([9, 12, 16])
    _gradients(ours, first, second, third)
    _assert_alike(_gradients(ours, first, second, third), _gradients(plain, first, second, third))


def test_a_second_pass_before_the_backward_pass_of_the_first() -> None:
    plain, ours = _model(), _with_graphs(_model(), Played())
    first, second, third = _batches([9, 12, 16])
    _gradients(ours, first, second, third)
    found = []
    for model in (plain, ours):
        model.zero_grad(set_to_none=True)
        both = model(**first).logits, model(**second).logits
        (both[0] * both[1]).sum().backward()
        found.append({name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None})
    _assert_alike(found[1], found[0])


def test_other_parameters_learn_by_other_graphs() -> None:
    played = Played()
    ours = _with_graphs(_model(), played)
    batches = list(_batches([9, 12, 16]))
    _gradients(ours, *batches)
    for parameter in ours.bert.parameters():
        parameter.requires_grad_(False)
    found = _gradients(ours, *batches)
    assert found.keys() == {"classifier.weight", "classifier.bias"} and len(played.captured) == 2


def test_passes_that_are_computed_twice_go_the_plain_way() -> None:
    played = Played()
    ours = _with_graphs(_model(), played)
    enable = getattr(ours, "activation_checkpointing_enable", None) or ours.gradient_checkpointing_enable
    enable()
    _gradients(ours, *_batches([9, 12, 16]))
    assert not played.captured


def test_evaluation_goes_the_plain_way() -> None:
    played = Played()
    ours, plain = _with_graphs(_model(), played), _model()
    batches = list(_batches([9, 12, 16]))
    _gradients(ours, *batches)
    with torch.no_grad():
        for batch in batches:
            torch.testing.assert_close(ours.eval()(**batch).logits, plain.eval()(**batch).logits)
            ours.train()(**batch)
    assert played.replayed == 2


def test_dropout_draws_what_it_would_have_drawn() -> None:
    dropout = {"hidden_dropout_prob": 0.3}
    losses = []
    for capture in (Played(), None):
        model, seen = _with_graphs(_model(**dropout), capture), []
        for number, batch in enumerate(_batches([9, 12, 16, 13])):
            torch.manual_seed(number)
            seen.append(float(model(**batch).logits.detach().sum()))
            model.forward.waiting = False
        losses.append(seen)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and len({round(loss, 4) for loss in losses[0]}) == 4


def test_a_mask_that_the_model_leaves_out_where_nothing_is_padded() -> None:
    model = _model()
    plain, seen = model.forward, []

    def forward(**inputs: Tensor) -> Any:
        seen.append(bool(inputs["attention_mask"].all()))
        return plain(**inputs)

    model.forward = forward
    ours = _with_graphs(model, Played())
    ids = torch.full((4, 16), 7)
    for _ in range(3):
        _gradients(ours, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert seen == [True, True, True, False, False, True], "captured, compared twice, used"


@pytest.mark.parametrize("fault", ["refuses", "stale"])
def test_a_model_that_no_graph_takes_goes_on_without(fault: str) -> None:
    def capture(module: Any, sample: tuple[Tensor, ...]) -> Any:
        if fault == "refuses":
            raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors ...")
        logits = module(*sample).detach()
        return lambda *given: module(*given) * 0 + logits  # always the sample's output

    plain, ours = _model(), _with_graphs(_model(), capture)
    batches = list(_batches([9, 12, 16, 10]))
    with pytest.warns(UserWarning, match="CUDA graphs are off, .*(captur|differ by)"):
        found = _gradients(ours, *batches)
    _assert_alike(found, _gradients(plain, *batches))


def test_where_a_graph_does_not_fit_there_are_none() -> None:
    """A smaller batch would need more graphs."""

    def capture(module: Any, sample: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    expected = _gradients(_model(), *_batches([9, 12, 16]))
    ours = _with_graphs(_model(), capture)
    with pytest.warns(UserWarning, match="CUDA graphs are off, .* out of memory"):
        found = _gradients(ours, *_batches([9, 12, 16]))
    assert ours.forward.capture is None and ours.forward.graphs == {}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "kind", "taken"),
    [
        ("bert", "AutoModelForSequenceClassification", True),
        ("bert", "AutoModelForMaskedLM", False),
        ("llama", "AutoModelForCausalLM", False),
        ("marian", "AutoModelForSeq2SeqLM", False),
    ],
)
def test_a_map_over_a_vocabulary_is_left_alone(family: str, kind: str, taken: bool) -> None:
    assert bool(why_no_graphs(tiny_model(family, kind))) is not taken
