"""GGUF files, llama.cpp's, as a transformers folder: converted once by transformers, kept by the sha256 of the file.

The copy holds the numbers of the file exactly: what is quantised there (a scale of 11 bits times a small integer, plus
a minimum) in fp32, what is bf16 there in bf16. Rounding SmolLM2-135M Q4_1 to bf16 would have halved its 538 MB, changed
0.07 % of greedy tokens (KL 9e-5), and every later merge of an adapter would have been rounded too.
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
"""In a converted folder: which file it was."""

DIGIT_BY_DIGIT = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
"""What llama.cpp calls the tokenizers that part digits before all else splits as GPT-2's does; transformers forgets the
digits, and would read a blank line and a number as other tokens than the model has learned.
"""

AS_GPT2 = ("default", "gpt-2", "mpt", "olmo", "jais")
AUTO = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModel")


def origin(folder: Path) -> dict[str, Any]:
    """What a folder says of the GGUF file that it was converted from; empty for any other folder."""
    with suppress(OSError, ValueError):
        about: dict[str, Any] = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
        return about
    return {}


def convert(file: Path, home: Path, *, where: str, say: Callable[[str], None]) -> Path:
    """The folder below `home` that a GGUF file was converted into, now or earlier.

    Raises:
        RecipeError: it is damaged, or of a kind that transformers does not know; or the extra is not installed.
        ResourceError: the copy cannot be written.
    """
    try:
        with file.open("rb") as opened:
            begins = opened.read(16)
        sha256 = known_sha256(file)
    except OSError as error:
        raise RecipeError(f"model: cannot be read ({error.strerror})", where=where) from None
    if not begins.startswith(MAGIC):
        what = f"model: not a GGUF file: it begins with {shorten(begins.decode('latin-1'))}"
        raise RecipeError(what, where=where, hint="is the download complete, or a page or a pointer in its place?")
    folder = home / sha256
    if not (folder / ORIGIN).exists():
        writing = home / f".tmp-{sha256[:16]}-{os.getpid()}"
        try:
            _convert(file, sha256, writing, where, say)
            publish(writing, folder)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            hint = "make room, or name another cache folder with TUNESMITH_HOME"
            raise ResourceError(f"cannot be written ({reason})", where=str(folder), hint=hint) from None
        finally:
            shutil.rmtree(writing, ignore_errors=True)
    return folder


def _convert(file: Path, sha256: str, folder: Path, where: str, say: Callable[[str], None]) -> None:
    try:
        import accelerate  # noqa: F401 - without it transformers refuses
        from gguf import GGUFReader
    except ImportError:
        what = "model: GGUF files need packages that are not installed"
        raise RecipeError(what, where=where, hint="pip install 'tunesmith[gguf]'") from None
    size = file.stat().st_size
    say(f"converting {file.name} ({size / 1e6:.0f} MB) to safetensors; once, later runs take the copy")
    try:
        with quiet(), redirect_stderr(StringIO()):  # a bar is drawn whatever transformers is told
            read = GGUFReader(file)
            formats = Counter[str]()
            for tensor in read.tensors:
                formats[tensor.tensor_type.name] += int(tensor.n_elements)
            about = {name: field.contents() if (field := read.get_field(key)) else None for name, key in _ABOUT.items()}
            dtype = torch.bfloat16 if max(formats, key=formats.__getitem__) == "BF16" else torch.float32
            model, processor = _load(file, dtype)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever the libraries raise over a file that is not ours
        said = " ".join(str(error).split())
        what = f"model: this GGUF file cannot be converted ({type(error).__name__}: {shorten(said, 160)[1:-1]})"
        damaged = "is the download complete? else give the safetensors of that model"
        hint = "give the safetensors of that model" if "not supported" in said else damaged
        raise RecipeError(what, where=where, hint=hint) from error
    _split_as_the_model(processor, about["pre_tokenizer"], say)
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
    """A plain model with nothing of GGUF left in it, and its tokenizer."""
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as alone:  # files beside it may be of another model
        (Path(alone) / "model.gguf").symlink_to(file.resolve())
        given = {"gguf_file": "model.gguf", "local_files_only": True, "trust_remote_code": False}
        processor = transformers.AutoTokenizer.from_pretrained(alone, **given)
        config = transformers.AutoConfig.from_pretrained(alone, **given)
        kinds = (getattr(transformers, name) for name in AUTO)
        auto = next(kind for kind in kinds if type(config) in kind._model_mapping)
        if hasattr(transformers, "GgufConfig"):  # newer ones may keep the weights packed
            given["quantization_config"] = transformers.GgufConfig(dequantize=True)
        loaded, info = auto.from_pretrained(alone, dtype=dtype, output_loading_info=True, **given)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"it lacks {len(missing)} weights, first {missing[0]}")
    processor.model_max_length = getattr(config, "max_position_embeddings", None) or processor.model_max_length
    config = loaded.config
    config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):  # transformers does not save what it loaded from a GGUF
        plain = type(loaded)(config)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = loaded.generation_config
    return plain, processor


def _split_as_the_model(processor: Any, name: str | None, say: Callable[[str], None]) -> None:
    """Cut a text into words as the model's own tokenizer does, where transformers knows it only by name."""
    found = processor.backend_tokenizer.pre_tokenizer
    if type(found) is not pre_tokenizers.ByteLevel or name in (None, *AS_GPT2):
        return
    if name in DIGIT_BY_DIGIT:
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        processor.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    else:
        say(f"its tokenizer cuts texts as '{name}' does, which is not known here; they are cut as GPT-2's are")
