"""From a source to a model, its tokenizer and its anatomy, by transformers, without any code of the model's own."""

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
INSTEAD = {"AutoModelForSeq2SeqLM": "AutoModelForCausalLM"}
"""Auto class -> the one that does the same in another way, for kinds of models that lack the first."""


ProcessorKind = Literal["tokenizer", "image_processor"]


def processor_kind(processor: Any) -> ProcessorKind:
    """The kind of a processor in hand."""
    return "tokenizer" if hasattr(processor, "get_vocab") else "image_processor"


def load_processor(
    source: Source,
    model_class: str | None = None,
    add_tokens: Sequence[str] = (),
    *,
    kind: ProcessorKind = "tokenizer",
) -> Any:
    """The tokenizer, with tokens added, or the image processor of a model.

    A tokenizer without a padding token pads with its end-of-text token. Image processors use their PIL back end, so
    that training and serving preprocess alike whether or not torchvision is installed.

    Raises:
        RecipeError: the source has none, its kind of model is not for this task, or a token cannot be added.
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
    """The model of an Auto class in its stored number format, its new parts drawn from `seed`, and its map.

    `added`: ids of tokens that the recipe adds (`added_tokens.ids`).

    Raises:
        RecipeError: this kind of model cannot do the task.
    """
    kept, _ = safe_config(source)
    found = config_class(str(kept["model_type"]), model_class, source.spec)
    settings = _config(source, kept, found, config, pad_token_id)
    loader = getattr(transformers, auto_class(str(kept["model_type"]), model_class))
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
    """What the checkpoint holds of the body and `model` has no use for (BERT's pooler, for a head that guesses words),
    under the names that the next model looks for.
    """
    prefix = f"{model.base_model_prefix}."
    with torch.device("meta"), quiet():
        body = transformers.AutoModel.from_config(model.config)
    known = {name for name, _ in body.named_parameters()}
    wanted = {name: inside for name in unused if (inside := name.removeprefix(prefix)) in known}
    found: dict[str, Tensor] = {}
    for path in source.weights() if wanted else []:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                found |= {prefix + wanted[name]: file.get_tensor(name) for name in wanted.keys() & set(file.keys())}
    return found


def load_config(source: Source, model_class: str, processor: Any) -> Any:
    """The config that the model will have.

    Raises:
        RecipeError: this kind of model cannot do the task.
    """
    kept, _ = safe_config(source)
    made_of = config_class(str(kept["model_type"]), model_class, source.spec)
    return _config(source, kept, made_of, {}, getattr(processor, "pad_token_id", None))


def load_shape(source: Source, model_class: str, processor: Any) -> nn.Module:
    """The model without weights: its modules and their sizes, for who asks what it can read.

    Raises:
        RecipeError: this kind of model cannot do the task.
    """
    settings = load_config(source, model_class, processor)
    with quiet(), torch.device("meta"), _reading(source, "config.json"):
        loader = getattr(transformers, auto_class(settings.model_type, model_class))
        model: nn.Module = loader.from_config(settings)
    return model


def auto_class(kind: str, model_class: str) -> str:
    """The Auto class that a kind of model (a config's `model_type`) does a task by."""
    has_it = transformers.CONFIG_MAPPING[kind] in getattr(transformers, model_class)._model_mapping
    return model_class if has_it else INSTEAD.get(model_class, model_class)


def config_class(kind: str, model_class: str, where: str = "") -> Any:
    """The config of a kind of model that has an Auto class, or one that does the same.

    Raises:
        RecipeError: it has none.
    """
    if kind not in transformers.CONFIG_MAPPING:
        raise RecipeError(f"model: transformers has no '{kind}'", where=where, hint="a newer transformers may have")
    found, model_class = transformers.CONFIG_MAPPING[kind], auto_class(kind, model_class)
    if found not in getattr(transformers, model_class)._model_mapping:
        what = f"model: a {kind} model has no {model_class.removeprefix('AutoModelFor')}"
        raise RecipeError(what, where=where, hint="choose another model or task")
    if model_class == "AutoModelForCausalLM" and getattr(found(), "is_encoder_decoder", False):
        what = f"model: a {kind} model writes one text from another, and does not write on from what stands before it"
        raise RecipeError(what, where=where, hint="task=translation, or choose a decoder")
    if model_class == "AutoModelForCausalLM" and found in transformers.AutoModelForMaskedLM._model_mapping:
        what = f"model: a {kind} model sees a word from both sides, and does not write on from what stands before it"
        raise RecipeError(what, where=where, hint="choose a decoder, such as GPT-2, LLaMA, Qwen or Gemma")
    if model_class == "AutoModelForMaskedLM" and getattr(found(), "is_encoder_decoder", False):
        what = f"model: a {kind} model writes a text anew, and fills in no masks in place"
        raise RecipeError(what, where=where, hint="choose an encoder")
    return found


def _config(
    source: Source, kept: dict[str, Any], made_of: Any, config: dict[str, Any], pad_token_id: int | None
) -> Any:
    own = ("model_type", "id2label", "label2id", "num_labels")
    kept = {key: value for key, value in kept.items() if key not in own} | {
        key: value for key, value in config.items() if key != "num_labels" or "id2label" not in config
    }
    with _reading(source, "config.json"):
        settings = made_of(**kept)
    if getattr(settings, "pad_token_id", None) is None and pad_token_id is not None:
        settings.pad_token_id = pad_token_id
    return settings


def stored_dtype(source: Source) -> torch.dtype:
    """The number format that most of the weights are stored in, from the header of the first safetensors file."""
    first = source.weights()[0]
    if first.suffix != ".safetensors":
        return torch.float32
    counts: Counter[str] = Counter()
    with safe_open(first, "pt") as file:
        for name in file.keys():  # noqa: SIM118 - it has no iterator
            tensor = file.get_slice(name)
            counts[tensor.get_dtype()] += math.prod(tensor.get_shape())
    return DTYPES.get(max(counts, key=counts.__getitem__, default="F32"), torch.float32)


def length_limit(model: nn.Module, processor: Any) -> int:
    """How many tokens the model can read at once: by its positions and by its tokenizer."""
    config: Any = model.config
    limits = [getattr(config, "max_position_embeddings", None) or UNBOUNDED, processor.model_max_length or UNBOUNDED]
    limits += [positions.num_embeddings - positions.padding_idx - 1 for positions in _padded_positions(model)]
    return int(min(limits))


def first_position(model: nn.Module) -> int:
    """Where positions are counted from: RoBERTa begins after its padding index."""
    return next((positions.padding_idx + 1 for positions in _padded_positions(model)), 0)


def _padded_positions(model: nn.Module) -> Iterator[Any]:
    """Position embeddings that keep a row for padding."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings") and module.padding_idx is not None:
            yield module


def check_vocabulary(model: nn.Module, processor: Any, spec: str) -> None:
    """Refuse a tokenizer that can give tokens the model has no embedding for.

    Raises:
        RecipeError: it can.
    """
    rows = added_tokens.rows(model)
    if len(processor) > rows:
        what = f"model: its tokenizer has {len(processor):,} tokens, its embedding {rows:,}"
        raise RecipeError(what, where=spec, hint="the tokenizer belongs to another model")


def weight_hashes(source: Source) -> dict[str, str]:
    """File name -> sha256 of what holds the weights: of a converted GGUF file that file, whatever it is called."""
    given = gguf.origin(source.folder).get("sha256")
    return {"gguf": given} if given else {path.name: known_sha256(path) for path in source.weights()}


def base_hash(source: Source) -> str:
    """One sha256 over the weights, to tell whether two bases are the same."""
    return hashlib.sha256(json.dumps(list(weight_hashes(source).items())).encode()).hexdigest()


def processor_hash(processor: Any) -> str:
    """A sha256 over what a tokenizer and its chat template do to a text, or over an image processor's settings."""
    if processor_kind(processor) == "image_processor":
        return hashlib.sha256(json.dumps(processor.to_dict(), sort_keys=True, default=str).encode()).hexdigest()
    return hashlib.sha256(f"{tokenizer_hash(processor)}{template_hash(processor)}".encode()).hexdigest()


def template_hash(processor: Any) -> str | None:
    """A sha256 over the chat template; None where there is none."""
    text = processor.chat_template
    return None if text is None else hashlib.sha256(str(text).encode()).hexdigest()


def tokenizer_hash(processor: Any) -> str:
    """A sha256 over what the tokenizer does to a text."""
    if processor.is_fast:
        kept = json.loads(processor.backend_tokenizer.to_str())
        kept.pop("truncation", None), kept.pop("padding", None)  # set by each call
        text = json.dumps(kept, sort_keys=True)
    else:
        text = json.dumps(processor.get_vocab(), sort_keys=True)
    special = json.dumps(processor.special_tokens_map, sort_keys=True, default=str)
    return hashlib.sha256(f"{text}{special}".encode()).hexdigest()


@contextmanager
def _reading(source: Source, what: str) -> Iterator[None]:
    """Whatever the libraries raise over a file that is not ours, as the user's error."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        said = " ".join(str(error).split())
        text = f"model: {what} cannot be read ({type(error).__name__}: {shorten(said, 160)})"
        raise RecipeError(
            text, where=source.spec, hint="is the download complete, and is it a model's folder?"
        ) from error
