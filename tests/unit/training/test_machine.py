"""Device, precision and micro-batch size by the recipe, and the dtype of weights and states."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tunesmith.data.batches import Batches
from tunesmith.errors import RecipeError, ResourceError
from tunesmith.models.anatomy import anatomy
from tunesmith.testing import case, tiny_model
from tunesmith.training import machine
from tunesmith.training.machine import Machine

CPU = torch.device("cpu")


@pytest.mark.parametrize(("precision", "dtype"), (("fp32", None), ("bf16", torch.bfloat16)))
def test_the_recipes_words_for_a_number_format(precision: str, dtype: torch.dtype | None) -> None:
    found = machine.find("cpu", precision)
    assert found == Machine(CPU, dtype) and found.precision == precision
    with found.autocast():
        product = torch.ones(4, 4) @ torch.ones(4, 4)
    assert product.dtype == (dtype or torch.float32)


def _processor(monkeypatch: pytest.MonkeyPatch, *, has_bf16: bool) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


@pytest.mark.parametrize("has_it", (True, False))
def test_auto_takes_bf16_where_the_processor_has_it(has_it: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    _processor(monkeypatch, has_bf16=has_it)
    assert machine.find("cpu").precision == ("bf16" if has_it else "fp32")
    assert machine.find("cpu", "bf16").is_slow is not has_it and not machine.find("cpu", "fp32").is_slow


@pytest.mark.parametrize(
    ("stored", "has_bf16", "answers_in"),
    (
        (torch.bfloat16, False, torch.float32),
        (torch.bfloat16, True, torch.bfloat16),
        (torch.float16, True, torch.float32),
        (torch.float64, False, torch.float64),
    ),
)
def test_answers_are_computed_in_fp32_where_the_stored_format_is_only_emulated(
    stored: torch.dtype, has_bf16: bool, answers_in: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    _processor(monkeypatch, has_bf16=has_bf16)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).to(stored)
    before = model[0].weight.clone()
    machine.store_for_inference(model, Machine(CPU, None))
    assert {one.dtype for one in model.state_dict().values()} - {torch.int64} == {answers_in}
    assert torch.equal(model[0].weight.to(stored), before)


def test_a_model_that_would_not_fit_in_fp32_stays_as_it_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    _processor(monkeypatch, has_bf16=False)
    monkeypatch.setattr(Machine, "memory_bytes", 2 * 4 * 8)
    model = nn.Linear(3, 2).bfloat16()
    machine.store_for_inference(model, Machine(CPU, None))
    assert model.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("device", ("mps", "cuda"))
def test_only_a_cpu_emulates_bf16(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _gpus(monkeypatch, 1)
    assert not Machine(torch.device(device), torch.bfloat16).is_slow


def test_fp16_does_not_train_on_a_cpu() -> None:
    with pytest.raises(RecipeError, match=r"train\.precision: fp16 .*CPU; .*bf16, fp32 or auto"):
        machine.find("cpu", "fp16")


def _gpus(monkeypatch: pytest.MonkeyPatch, count: int, capability: tuple[int, int] = (8, 0)) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.parametrize(("device", "gpus"), (("cuda", 0), ("cuda:0", 0), ("cuda:2", 2), ("mps", 1), ("cpu:3", 0)))
def test_a_device_that_is_not_there(device: str, gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _gpus(monkeypatch, gpus)
    with pytest.raises(ResourceError, match=rf"train\.device: .*no {device}\b.*; .*auto or cpu") as refused:
        machine.find(device)
    assert refused.value.exit_code == 4


@pytest.mark.parametrize("device", ("gpu", "cuda:x", "cuda:-1", "meta", "xla", ""))
def test_a_word_that_is_no_device_we_train_on(device: str) -> None:
    with pytest.raises(RecipeError, match=rf"train\.device: unknown device '{device}'; use auto") as refused:
        machine.find(device)
    assert refused.value.exit_code == 2
    with pytest.raises(RecipeError, match=rf"^--device: unknown device '{device}'"):
        machine.find(device, named="--device")


@pytest.mark.parametrize("device", ("auto", "cuda"))
def test_each_process_has_its_own_gpu(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _gpus(monkeypatch, 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert machine.find(device, "fp32").device == torch.device("cuda:1")
    assert machine.find("cuda:0", "fp32").device == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ResourceError, match="no cuda:2"):
        machine.find(device)
    monkeypatch.setenv("LOCAL_RANK", "x")
    with pytest.raises(RecipeError, match="LOCAL_RANK=x"):
        machine.find(device)


def test_an_old_gpu_has_no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    _gpus(monkeypatch, 1, (7, 5))
    assert machine.find("cuda").precision == "fp32" and machine.find("cuda", "fp16").precision == "fp16"
    with pytest.raises(RecipeError, match=r"train\.precision: .*GPU .*bf16; "):
        machine.find("cuda", "bf16")


# --- what fits


def _sizes(tmp_path: Path, micro: int | str, **changes: Any) -> list[int]:
    trial = case("full", "text-classification", "bert", tmp_path)
    limits = Machine(CPU, None).limits(trial.anatomy, micro, 16, **changes)
    parts = Batches(trial.encoded, 16, 0).micro_batches(0, limits)
    assert sorted(np.concatenate(parts)) == sorted(Batches(trial.encoded, 16, 0).indices(0)), "each example once"
    return [len(part) for part in parts]


@pytest.mark.parametrize("micro", (1, 3, 16))
def test_a_given_micro_batch_is_the_most_at_once(micro: int, tmp_path: Path) -> None:
    sizes = _sizes(tmp_path, micro)
    assert max(sizes) == micro and len(sizes) == -(-16 // micro), "and no step is cut finer than it says"


def test_auto_takes_what_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _sizes(tmp_path, "auto", padding_free=True) == [16]
    counts = []
    for size_bytes in (2**24, 2**21, 1):
        monkeypatch.setattr(Machine, "memory_bytes", property(lambda _, size=size_bytes: size))
        counts.append(len(_sizes(tmp_path, "auto", padding_free=True)))
    assert counts == sorted(counts) and counts[0] == 1 and counts[-1] == 16, "one at a time where nothing fits"


def test_a_larger_model_leaves_room_for_less() -> None:
    small, large = (
        anatomy(tiny_model("bert", "AutoModelForSequenceClassification", num_hidden_layers=n)) for n in (2, 6)
    )
    tokens = [Machine(CPU, None).limits(found, "auto", 16).max_cost for found in (small, large)]
    assert tokens[0] // tokens[1] == 3


def test_memory_is_counted() -> None:
    found = Machine(CPU, None)
    assert 2**20 < found.peak_memory_bytes() <= found.memory_bytes


# --- running out of it


def test_torch_says_so_on_a_cpu_and_numpy_too() -> None:
    with pytest.raises(RuntimeError) as said:
        torch.empty(2**60, dtype=torch.uint8)
    assert machine.is_out_of_memory(said.value)
    with pytest.raises(MemoryError) as numpy_said:
        np.empty(2**60, dtype=np.uint8)
    assert machine.is_out_of_memory(numpy_said.value)
    assert machine.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))


@pytest.mark.parametrize("error", (RuntimeError("shapes differ"), ValueError("memory"), OSError(12, "memory")))
def test_other_errors_are_no_lack_of_memory(error: Exception) -> None:
    assert not machine.is_out_of_memory(error)


# --- formats


@pytest.mark.parametrize("dtype", (torch.bfloat16, None))
def test_frozen_matrices_are_kept_as_they_are_multiplied(dtype: torch.dtype | None, tmp_path: Path) -> None:
    model = case({"name": "lora", "r": 2}, "text-classification", "bert", tmp_path).model.bfloat16()
    machine.store_frozen(model, dtype)
    for name, parameter in model.named_parameters():
        frozen_matrix = not parameter.requires_grad and parameter.ndim > 1
        assert parameter.dtype == (dtype if frozen_matrix and dtype else torch.float32), name


def test_run_json_can_hold_its_description() -> None:
    about = machine.describe(machine.find("cpu", "bf16"))
    assert json.loads(json.dumps(about)) == about
    assert about["device"] == "cpu" and about["precision"] == "bf16" and about["threads"] == torch.get_num_threads()
