"""Models are loaded in their stored dtype, without running code that comes with them."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tunesmith.errors import RecipeError
from tunesmith.models import load
from tunesmith.models.sources import resolve
from tunesmith.testing import tiny_model, tiny_tokenizer

CLASSIFIER = "AutoModelForSequenceClassification"


@pytest.fixture
def model(tiny_bert: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny BERT for one test."""
    return Path(shutil.copytree(tiny_bert, tmp_path / "my-model"))


def _load(folder: Path, *, allow_pickle: bool = False, **config: Any) -> Any:
    source = resolve(str(folder), allow_pickle=allow_pickle)
    found, _ = load.load_model(source, model_class=CLASSIFIER, config={"num_labels": 2} | config, seed=0)
    return found


def _change_config(folder: Path, name: str = "config.json", **changes: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if not name.startswith("classifier")}


def test_weights_are_those_stored_and_the_new_head_is_known(model: Path) -> None:
    source = resolve(str(model))
    found, anatomy = load.load_model(source, model_class=CLASSIFIER, config={"num_labels": 3}, seed=0)
    stored = load_file(model / "model.safetensors")
    same = [torch.equal(value, stored[name]) for name, value in found.state_dict().items() if name in stored]
    assert len(same) > 20 and all(same)
    assert {"classifier.weight", "classifier.bias"} <= set(anatomy.always_trainable)
    assert found.classifier.weight.shape == (3, 32)


def test_the_new_head_is_drawn_from_the_seed_alone(model: Path) -> None:
    before = torch.get_rng_state()
    heads = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(heads))
        found, _ = load.load_model(resolve(str(model)), model_class=CLASSIFIER, config={"num_labels": 2}, seed=seed)
        heads.append(found.classifier.weight)  # type: ignore[union-attr]
    torch.set_rng_state(before)
    _load(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_a_head_of_another_size_is_replaced(tmp_path: Path) -> None:
    tiny_model("bert", CLASSIFIER, num_labels=5, id2label={n: f"old-{n}" for n in range(5)}).save_pretrained(tmp_path)
    config = {"num_labels": 2, "id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    found, anatomy = load.load_model(resolve(str(tmp_path)), model_class=CLASSIFIER, config=config, seed=0)
    assert found.config.id2label == {0: "no", 1: "yes"} and "classifier.weight" in anatomy.always_trainable  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
def test_the_stored_number_format_is_kept(dtype: torch.dtype, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = {name: value.to(dtype) for name, value in load_file(model / "model.safetensors").items()}
    save_file(stored, model / "model.safetensors", metadata={"format": "pt"})
    _change_config(model, dtype="float64", torch_dtype="float64")  # the dtype of the config is ignored
    assert load.stored_dtype(resolve(str(model))) == dtype
    assert {parameter.dtype for parameter in _load(model).parameters()} == {dtype}


def test_the_number_format_is_that_of_most_numbers(model: Path) -> None:
    stored = load_file(model / "model.safetensors")
    most = max(stored, key=lambda name: stored[name].numel())
    save_file(stored | {most: stored[most].bfloat16()}, model / "model.safetensors", metadata={"format": "pt"})
    expected = torch.bfloat16 if stored[most].numel() * 2 > sum(v.numel() for v in stored.values()) else torch.float32
    assert load.stored_dtype(resolve(str(model))) == expected


@pytest.mark.parametrize("content", (b"", b"12", struct.pack("<Q", 2**60), struct.pack("<Q", 5) + b"{}{}{", b"half"))
def test_broken_weights_are_said(content: bytes, model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(content if content != b"half" else weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(RecipeError, match="my-model: model: .*weights cannot be read"):
        _load(model)


def test_a_missing_shard_is_said(model: Path) -> None:
    transformers.AutoModel.from_pretrained(model).save_pretrained(model, max_shard_size="40KB")
    (model / "model.safetensors").unlink()
    shards = sorted(model.glob("model-*.safetensors"))
    assert len(shards) > 1 and _load(model) is not None
    shards[-1].unlink()
    with pytest.raises(RecipeError, match="weights cannot be read"):
        _load(model)


@pytest.mark.parametrize("kind", ("nonesuch", ["bert"], 7), ids=repr)
def test_a_kind_of_model_transformers_does_not_have(kind: Any, model: Path) -> None:
    _change_config(model, model_type=kind)
    with pytest.raises(RecipeError, match="transformers has no"):
        _load(model)


def test_a_kind_of_model_that_cannot_do_the_task(tmp_path: Path) -> None:
    transformers.ViTModel(transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=8, image_size=8, patch_size=4)).save_pretrained(tmp_path)  # fmt: skip
    with pytest.raises(RecipeError, match="vit .*SequenceClassification; .*another model"):
        _load(tmp_path)


@pytest.mark.parametrize("changes", ({"hidden_size": "x"}, {"num_attention_heads": 5}, {"hidden_act": "no"}), ids=str)
def test_a_config_that_does_not_make_a_model(changes: dict[str, Any], model: Path) -> None:
    _change_config(model, **changes)
    with pytest.raises(RecipeError, match="my-model: model: config.json.* cannot be read"):
        _load(model)


class _Evil:
    """Object that creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.mark}'",)


def test_allowed_pickles_are_read_as_weights(model: Path) -> None:
    before = _weights(_load(model))
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    after = _weights(_load(model, allow_pickle=True))
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("name", ("pytorch_model.bin", "model.pkl"))
@pytest.mark.parametrize("plain", (True, False), ids=("pickle", "torch"))
def test_a_pickle_with_code_does_not_run_it(name: str, plain: bool, model: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    evil = load_file(model / "model.safetensors") | {"evil": _Evil(mark)}
    (model / "model.safetensors").unlink()
    with (model / name).open("wb") as file:
        pickle.dump(evil, file) if plain else torch.save(evil, file)
    with pytest.raises(RecipeError, match="is a pickle"):
        _load(model)
    with pytest.raises(RecipeError, match="weights cannot be read"):
        _load(model, allow_pickle=True)
    assert not mark.exists()
    pickle.loads(pickle.dumps(_Evil(mark)))  # unpickling does create the file
    assert mark.exists()


def test_code_that_comes_with_a_model_does_not_run(model: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    code = f"open({str(mark)!r}, 'w').close()\nclass Model: ...\nclass Config: ...\nclass Tokenizer: ...\n"
    (model / "evil.py").write_text(code)
    parts = {"AutoConfig": "Config", CLASSIFIER: "Model", "AutoTokenizer": "Tokenizer"}
    names = {auto: f"evil.{name}" for auto, name in parts.items()}
    bad = {"auto_map": names, "trust_remote_code": True, "_attn_implementation_internal": "evil/kernel"}
    _change_config(model, **bad, _attn_implementation="evil/kernel", attn_implementation="evil/kernel")
    remote = {"AutoTokenizer": ["evil.Tokenizer", None]}
    _change_config(model, "tokenizer_config.json", auto_map=remote, trust_remote_code=True)
    before = _load(model)
    assert before.config._attn_implementation in ("sdpa", "eager") and not hasattr(before.config, "auto_map")
    assert len(load.load_processor(resolve(str(model)))) == len(tiny_tokenizer())
    before.save_pretrained(tmp_path / "saved")
    assert "evil" not in (tmp_path / "saved" / "config.json").read_text()
    assert not mark.exists()


def test_a_model_that_is_nothing_but_code_is_refused(model: Path, tmp_path: Path) -> None:
    _change_config(model, model_type="evil", auto_map={"AutoConfig": "evil.Config"})
    (model / "evil.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w').close()\n")
    with pytest.raises(RecipeError, match="transformers has no 'evil'"):
        _load(model)
    assert not (tmp_path / "mark").exists()


def test_the_tokenizer_pads(tiny_bert: Path, model: Path) -> None:
    assert load.load_processor(resolve(str(tiny_bert))).pad_token == "[PAD]"
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    tokenizer.save_pretrained(model)
    assert load.load_processor(resolve(str(model))).pad_token_id == 3


@pytest.mark.parametrize("content", ("", "{", "{}", "[]", '{"model": 1}', None), ids=repr)
def test_a_broken_tokenizer_is_said(content: str | None, model: Path) -> None:
    (model / "tokenizer.json").unlink() if content is None else (model / "tokenizer.json").write_text(content)
    with pytest.raises(RecipeError, match="my-model: model: its tokenizer"):
        load.load_processor(resolve(str(model)))


def test_a_tokenizer_larger_than_the_embedding_is_refused(model: Path) -> None:
    found, tokenizer = _load(model), tiny_tokenizer()
    load.check_vocabulary(found, tokenizer, "my-model")
    tokenizer.add_tokens([f"word{number}" for number in range(64 - len(tokenizer))])
    load.check_vocabulary(found, tokenizer, "my-model")
    tokenizer.add_tokens(["one-more"])
    with pytest.raises(RecipeError, match="my-model: model: .*tokenizer .*65 tokens.*embedding .*64"):
        load.check_vocabulary(found, tokenizer, "my-model")


@pytest.mark.parametrize(("family", "limit"), (("bert", 40), ("roberta", 38), ("distilbert", 40), ("gpt2", 40)))
def test_the_longest_text_by_positions(family: str, limit: int) -> None:
    pads = {"pad_token_id": 1} if family == "roberta" else {}
    model = tiny_model(family, CLASSIFIER, max_position_embeddings=40, **pads)
    tokenizer = tiny_tokenizer()
    assert load.length_limit(model, tokenizer) == limit
    with torch.no_grad():
        model(torch.full((1, limit), 5))
        with pytest.raises((IndexError, RuntimeError, ValueError)):
            model(torch.full((1, limit + 1), 5))
    tokenizer.model_max_length = 20
    assert load.length_limit(model, tokenizer) == 20


def test_hashes_tell_models_and_tokenizers_apart(tiny_bert: Path, model: Path) -> None:
    first, copy = load.base_hash(resolve(str(tiny_bert))), load.base_hash(resolve(str(model)))
    tiny_model("bert", "AutoModelForMaskedLM", seed=1).save_pretrained(model)
    assert first == copy != load.base_hash(resolve(str(model)))
    tokenizer, other = tiny_tokenizer(), tiny_tokenizer()
    tokenizer(
        "one text", truncation=True, max_length=4, padding=True
    )  # the settings of a call are not part of the tokenizer
    assert load.processor_hash(tokenizer) == load.processor_hash(other)
    other.chat_template = "{{ messages }}"
    assert load.tokenizer_hash(tokenizer) == load.tokenizer_hash(other) and load.template_hash(tokenizer) is None
    assert load.processor_hash(tokenizer) != load.processor_hash(other) and load.template_hash(other) is not None
    other.chat_template = None
    other.add_tokens(["more"])
    assert load.tokenizer_hash(tokenizer) != load.tokenizer_hash(other)
    assert load.processor_hash(tokenizer) != load.processor_hash(other)
