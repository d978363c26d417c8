"""Load a model, its processor and its anatomy from a source with transformers, without remote code."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

from tunesmith.data.encoded import known_sha256
from tunesmith.errors import RecipeError, shorten
from tunesmith.models import added_tokens, gguf
from tunesmith.models.anatomy import Anatomy, anatomy
from tunesmith.models.quiet import quiet
from tunesmith.models.sources import Source, safe_config

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
UNBOUNDED = 10**9
FALLBACK_CLASSES = {"AutoModelForSeq2SeqLM": "AutoModelForCausalLM"}
"""Auto class -> the one that is used for model types without the first."""


ProcessorKind = Literal["tokenizer", "image_processor"]


def processor_kind(processor: Any) -> ProcessorKind:
    """Return the kind of a loaded processor."""
    return "tokenizer" if hasattr(processor, "get_vocab") else "image_processor"


def load_processor(
    source: Source,
    model_class: str | None = None,
    add_tokens: Sequence[str] = (),
    *,
    kind: ProcessorKind = "tokenizer",
) -> Any:
    """Load the tokenizer of a model and add tokens, or load its image processor.

    A tokenizer without a padding token uses its end-of-text token. Image processors use their PIL backend, so that
    preprocessing is the same with and without torchvision.

    Raises:
        RecipeError: the source has no processor, its model type does not support the task, or a token cannot be added.
    """
    if model_class is not None:
        config_class(str(safe_config(source)[0]["model_type"]), model_class, source.spec)
    if kind == "image_processor":
        with quiet(), _reading(source, "its image processor"):
            return transformers.AutoImageProcessor.from_pretrained(source.folder, backend="pil")
    with quiet(), _reading(source, "its tokenizer"):
        processor = transformers.AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False)
    if processor.pad_token_id is None:
        processor.pad_token = processor.eos_token or processor.unk_token
    added_tokens.add(processor, add_tokens)
    return processor


def load_model(
    source: Source,
    *,
    model_class: str,
    config: dict[str, Any],
    seed: int,
    pad_token_id: int | None = None,
    dtype: torch.dtype | None = None,
    added: range = range(0),
) -> tuple[nn.Module, Anatomy]:
    """Load a model by its Auto class in its stored dtype, with new parameters drawn from `seed`, and its anatomy.

    `added` are the ids of added tokens (`added_tokens.ids`).

    Raises:
        RecipeError: the model type does not support the task.
    """
    stored, _ = safe_config(source)
    config_type = config_class(str(stored["model_type"]), model_class, source.spec)
    settings = _config(source, stored, config_type, config, pad_token_id)
    loader = getattr(transformers, auto_class(str(stored["model_type"]), model_class))
    with quiet(), torch.random.fork_rng(devices=[]), _reading(source, "config.json and weights"):
        torch.manual_seed(seed)
        model, info = loader.from_pretrained(
            source.folder,
            config=settings,
            dtype=dtype or stored_dtype(source),
            use_safetensors=not source.allow_pickle or None,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=False,
        )
    mismatched = {entry[0] if isinstance(entry, tuple | list) else entry for entry in info["mismatched_keys"]}
    own = {name for name, _ in model.named_parameters()}
    new = frozenset((set(info["missing_keys"]) | mismatched) & own)
    added_tokens.extend(model, added)
    return model, anatomy(model, new=new, unused=frozenset(info["unexpected_keys"]))


def unused_parts(source: Source, model: Any, unused: Collection[str]) -> dict[str, Tensor]:
    """Return backbone tensors of the checkpoint that `model` does not use (BERT's pooler under a masked LM head).

    They are saved with the model, so that the next model can load them.
    """
    prefix = f"{model.base_model_prefix}."
    with torch.device("meta"), quiet():
        backbone = transformers.AutoModel.from_config(model.config)
    known = {name for name, _ in backbone.named_parameters()}
    wanted = {name: inside for name in unused if (inside := name.removeprefix(prefix)) in known}
    tensors: dict[str, Tensor] = {}
    for path in source.weights() if wanted else []:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                tensors |= {prefix + wanted[name]: file.get_tensor(name) for name in wanted.keys() & set(file.keys())}
    return tensors


def load_config(source: Source, model_class: str, processor: Any) -> Any:
    """Load the config of the model.

    Raises:
        RecipeError: the model type does not support the task.
    """
    stored, _ = safe_config(source)
    config_type = config_class(str(stored["model_type"]), model_class, source.spec)
    return _config(source, stored, config_type, {}, getattr(processor, "pad_token_id", None))


def load_shape(source: Source, model_class: str, processor: Any) -> nn.Module:
    """Return the model on the meta device, without weights.

    Raises:
        RecipeError: the model type does not support the task.
    """
    settings = load_config(source, model_class, processor)
    with quiet(), torch.device("meta"), _reading(source, "config.json"):
        loader = getattr(transformers, auto_class(settings.model_type, model_class))
        model: nn.Module = loader.from_config(settings)
    return model


def auto_class(model_type: str, model_class: str) -> str:
    """Return the Auto class that a `model_type` uses for a task."""
    supported = transformers.CONFIG_MAPPING[model_type] in getattr(transformers, model_class)._model_mapping
    return model_class if supported else FALLBACK_CLASSES.get(model_class, model_class)


def config_class(model_type: str, model_class: str, where: str = "") -> Any:
    """Return the config class of a `model_type` that supports an Auto class or its fallback.

    Raises:
        RecipeError: the model type does not support it.
    """
    if model_type not in transformers.CONFIG_MAPPING:
        what = f"model: this version of transformers has no '{model_type}'"
        raise RecipeError(what, where=where, hint="upgrade transformers")
    config_type, model_class = transformers.CONFIG_MAPPING[model_type], auto_class(model_type, model_class)
    if config_type not in getattr(transformers, model_class)._model_mapping:
        what = f"model: a {model_type} model has no {model_class.removeprefix('AutoModelFor')}"
        raise RecipeError(what, where=where, hint="choose another model or task")
    if model_class == "AutoModelForCausalLM" and getattr(config_type(), "is_encoder_decoder", False):
        what = f"model: a {model_type} model is an encoder-decoder and cannot continue a text"
        raise RecipeError(what, where=where, hint="use task=translation, or choose a decoder")
    if model_class == "AutoModelForCausalLM" and config_type in transformers.AutoModelForMaskedLM._model_mapping:
        what = f"model: a {model_type} model is a bidirectional encoder and cannot generate"
        raise RecipeError(what, where=where, hint="choose a decoder, such as GPT-2, LLaMA, Qwen or Gemma")
    if model_class == "AutoModelForMaskedLM" and getattr(config_type(), "is_encoder_decoder", False):
        what = f"model: a {model_type} model is an encoder-decoder and cannot fill masks in place"
        raise RecipeError(what, where=where, hint="choose an encoder")
    return config_type


def _config(
    source: Source, stored: dict[str, Any], config_type: Any, config: dict[str, Any], pad_token_id: int | None
) -> Any:
    own = ("model_type", "id2label", "label2id", "num_labels")
    values = {key: value for key, value in stored.items() if key not in own} | {
        key: value for key, value in config.items() if key != "num_labels" or "id2label" not in config
    }
    with _reading(source, "config.json"):
        settings = config_type(**values)
    if getattr(settings, "pad_token_id", None) is None and pad_token_id is not None:
        settings.pad_token_id = pad_token_id
    return settings


def stored_dtype(source: Source) -> torch.dtype:
    """Return the dtype of most weights, from the header of the first safetensors file."""
    first = source.weights()[0]
    if first.suffix != ".safetensors":
        return torch.float32
    counts: Counter[str] = Counter()
    with safe_open(first, "pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is not iterable
            tensor = file.get_slice(name)
            counts[tensor.get_dtype()] += math.prod(tensor.get_shape())
    return DTYPES.get(max(counts, key=counts.__getitem__, default="F32"), torch.float32)


def length_limit(model: nn.Module, processor: Any) -> int:
    """Return the maximum number of input tokens, by position embeddings and tokenizer."""
    config: Any = model.config
    limits = [getattr(config, "max_position_embeddings", None) or UNBOUNDED, processor.model_max_length or UNBOUNDED]
    limits += [positions.num_embeddings - positions.padding_idx - 1 for positions in _padded_positions(model)]
    return int(min(limits))


def first_position(model: nn.Module) -> int:
    """Return the first position id; RoBERTa starts after its padding index."""
    return next((positions.padding_idx + 1 for positions in _padded_positions(model)), 0)


def _padded_positions(model: nn.Module) -> Iterator[Any]:
    """Yield the position embeddings with a padding row."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings") and module.padding_idx is not None:
            yield module


def check_vocabulary(model: nn.Module, processor: Any, spec: str) -> None:
    """Check that the model has an embedding for every token of the tokenizer.

    Raises:
        RecipeError: it does not.
    """
    rows = added_tokens.rows(model)
    if len(processor) > rows:
        what = f"model: its tokenizer has {len(processor):,} tokens, its embedding {rows:,}"
        raise RecipeError(what, where=spec, hint="the tokenizer belongs to another model")


def weight_hashes(source: Source) -> dict[str, str]:
    """Return file name -> sha256 of the weight files; for a converted GGUF file its own sha256."""
    converted = gguf.origin(source.folder).get("sha256")
    return {"gguf": converted} if converted else {path.name: known_sha256(path) for path in source.weights()}


def base_hash(source: Source) -> str:
    """Return a sha256 over the weights, which identifies a base model."""
    return hashlib.sha256(json.dumps(list(weight_hashes(source).items())).encode()).hexdigest()


def processor_hash(processor: Any) -> str:
    """Return a sha256 over tokenizer and chat template, or over the settings of an image processor."""
    if processor_kind(processor) == "image_processor":
        return hashlib.sha256(json.dumps(processor.to_dict(), sort_keys=True, default=str).encode()).hexdigest()
    return hashlib.sha256(f"{tokenizer_hash(processor)}{template_hash(processor)}".encode()).hexdigest()


def template_hash(processor: Any) -> str | None:
    """Return a sha256 over the chat template; None if there is none."""
    text = processor.chat_template
    return None if text is None else hashlib.sha256(str(text).encode()).hexdigest()


def tokenizer_hash(processor: Any) -> str:
    """Return a sha256 over the tokenizer's rules and vocabulary."""
    if processor.is_fast:
        rules = json.loads(processor.backend_tokenizer.to_str())
        rules.pop("truncation", None), rules.pop("padding", None)  # set by each call
        text = json.dumps(rules, sort_keys=True)
    else:
        text = json.dumps(processor.get_vocab(), sort_keys=True)
    special = json.dumps(processor.special_tokens_map, sort_keys=True, default=str)
    return hashlib.sha256(f"{text}{special}".encode()).hexdigest()


@contextmanager
def _reading(source: Source, what: str) -> Iterator[None]:
    """Report any exception of the libraries as an error in the user's files."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        message = " ".join(str(error).split())
        text = f"model: {what} cannot be read ({type(error).__name__}: {shorten(message, 160)})"
        raise RecipeError(
            text, where=source.spec, hint="check that the download is complete and that it is a model folder"
        ) from error
