"""GGUF files of llama.cpp: converted once to a transformers folder, which is cached by the sha256 of the file.

The copy has the exact values of the file: quantized tensors in fp32, bf16 tensors in bf16. For SmolLM2-135M Q4_1, bf16
would halve the 538 MB, but change 0.07 % of greedy tokens (KL 9e-5) and round every later merge of an adapter.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from tokenizers import pre_tokenizers

from tunesmith.data.encoded import known_sha256
from tunesmith.errors import RecipeError, ResourceError, shorten
from tunesmith.models.archives import publish
from tunesmith.models.quiet import quiet

SUFFIX, MAGIC = ".gguf", b"GGUF"
ORIGIN = "gguf.json"
"""File in a converted folder that describes the GGUF file."""

DIGIT_BY_DIGIT = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
"""llama.cpp's names of tokenizers that split off digits before GPT-2's rules; transformers omits that step, which would
change the tokens of blank lines and numbers.
"""

AS_GPT2 = ("default", "gpt-2", "mpt", "olmo", "jais")
AUTO = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModel")


def origin(folder: Path) -> dict[str, Any]:
    """Return the description of the GGUF file that a folder was converted from; empty for other folders."""
    with suppress(OSError, ValueError):
        about: dict[str, Any] = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
        return about
    return {}


def convert(file: Path, home: Path, *, where: str, say: Callable[[str], None]) -> Path:
    """Convert a GGUF file, unless `home` has it already, and return the folder.

    Raises:
        RecipeError: the file is damaged or not supported by transformers, or the extra `gguf` is not installed.
        ResourceError: the copy cannot be written.
    """
    try:
        with file.open("rb") as opened:
            header = opened.read(16)
        sha256 = known_sha256(file)
    except OSError as error:
        raise RecipeError(f"model: cannot be read ({error.strerror})", where=where) from None
    if not header.startswith(MAGIC):
        what = f"model: not a GGUF file (starts with {shorten(header.decode('latin-1'))})"
        raise RecipeError(
            what, where=where, hint="check that the download is complete, and not a web page or an LFS pointer"
        )
    folder = home / sha256
    if not (folder / ORIGIN).exists():
        temporary = home / f".tmp-{sha256[:16]}-{os.getpid()}"
        try:
            _convert(file, sha256, temporary, where, say)
            publish(temporary, folder)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            hint = "free some space, or set TUNESMITH_HOME to another folder"
            raise ResourceError(f"cannot be written ({reason})", where=str(folder), hint=hint) from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _convert(file: Path, sha256: str, folder: Path, where: str, say: Callable[[str], None]) -> None:
    try:
        import accelerate  # noqa: F401 - transformers requires it
        from gguf import GGUFReader
    except ImportError:
        what = "model: GGUF files need packages that are not installed"
        raise RecipeError(what, where=where, hint="pip install 'tunesmith[gguf]'") from None
    size = file.stat().st_size
    say(f"converting {file.name} ({size / 1e6:.0f} MB) to safetensors (once; later runs use the copy)")
    try:
        with quiet(), redirect_stderr(StringIO()):  # a progress bar ignores the verbosity
            reader = GGUFReader(file)
            formats = Counter[str]()
            for tensor in reader.tensors:
                formats[tensor.tensor_type.name] += int(tensor.n_elements)
            about = {
                name: field.contents() if (field := reader.get_field(key)) else None for name, key in _ABOUT.items()
            }
            dtype = torch.bfloat16 if max(formats, key=formats.__getitem__) == "BF16" else torch.float32
            model, processor = _load(file, dtype)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - the libraries raise anything for a bad file
        message = " ".join(str(error).split())
        what = f"model: this GGUF file cannot be converted ({type(error).__name__}: {shorten(message, 160)[1:-1]})"
        damaged = "check that the download is complete, or use the safetensors of that model"
        hint = "use the safetensors of that model" if "not supported" in message else damaged
        raise RecipeError(what, where=where, hint=hint) from error
    _set_pre_tokenizer(processor, about["pre_tokenizer"], say)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with quiet():
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    about |= {"file": file.name, "sha256": sha256, "size_bytes": size, "formats": dict(formats)}
    about["versions"] = {name: version(name) for name in ("transformers", "gguf")}
    (folder / ORIGIN).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


_ABOUT = {"architecture": "general.architecture", "license": "general.license", "pre_tokenizer": "tokenizer.ggml.pre"}


def _load(file: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return a plain model and its tokenizer."""
    # a link in an empty folder, because other files next to the GGUF may belong to another model
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as folder:
        (Path(folder) / "model.gguf").symlink_to(file.resolve())
        options = {"gguf_file": "model.gguf", "local_files_only": True, "trust_remote_code": False}
        processor = transformers.AutoTokenizer.from_pretrained(folder, **options)
        config = transformers.AutoConfig.from_pretrained(folder, **options)
        classes = (getattr(transformers, name) for name in AUTO)
        auto = next(auto_class for auto_class in classes if type(config) in auto_class._model_mapping)
        if hasattr(transformers, "GgufConfig"):  # newer versions may keep the weights quantized
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        loaded, info = auto.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{len(missing)} weights are missing, first {missing[0]}")
    processor.model_max_length = getattr(config, "max_position_embeddings", None) or processor.model_max_length
    config = loaded.config
    config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):  # transformers does not save a model loaded from GGUF
        plain = type(loaded)(config)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = loaded.generation_config
    return plain, processor


def _set_pre_tokenizer(processor: Any, name: str | None, say: Callable[[str], None]) -> None:
    """Set the pre-tokenizer that llama.cpp uses under this name, where transformers does not."""
    current = processor.backend_tokenizer.pre_tokenizer
    if type(current) is not pre_tokenizers.ByteLevel or name in (None, *AS_GPT2):
        return
    if name in DIGIT_BY_DIGIT:
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        processor.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    else:
        say(f"unknown pre-tokenizer '{name}'; using GPT-2's, so some tokens may differ")
