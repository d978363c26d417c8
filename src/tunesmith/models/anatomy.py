"""Anatomy of a model: the paths of its parts, so that a technique works on every model.

A technique finds parts (blocks in forward order, attention and MLP projections, norms, embeddings, head) through the
anatomy, never by a model's class name. Naming schemes are data in `namings.py`; the scheme with the most matches is
used. For an unknown model the blocks are the longest `nn.ModuleList` of modules of one class, and projections are
addressed by module names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from tunesmith.errors import RecipeError, did_you_mean, shorten
from tunesmith.models import added_tokens
from tunesmith.models.namings import NAMINGS, Naming

__all__ = ["LINEAR", "Anatomy", "anatomy"]

LINEAR = (nn.Linear, Conv1D)
"""Linear layers that may be adapted. Not their subclasses, which may use the weight without calling `forward`."""


@dataclass(frozen=True)
class Anatomy:
    """Module paths and parameter names of the parts of one unmodified model."""

    family: str
    backbone: str
    """Path of the pretrained backbone; empty if the model is the backbone."""

    hidden_size: int
    embeddings: tuple[str, ...]
    """Modules of the backbone before the first block."""

    blocks: tuple[str, ...]
    """Blocks of all stacks, in forward order."""

    head: tuple[str, ...]
    """Modules outside the backbone, except a language modeling head, which is pretrained."""

    new: frozenset[str]
    """Parameters that are missing in the checkpoint and initialized at random."""

    added: frozenset[str]
    """Parameters with the rows of added tokens."""

    fixed: frozenset[str]
    """Parameters that are never trained, such as Marian's sinusoidal positions."""

    unused: frozenset[str]
    """Tensors of the checkpoint that the model does not use, such as another task's head."""

    roles: Mapping[str, tuple[str, ...]]
    """Role -> module paths, in block order; a fused projection has several roles."""

    linears: tuple[str, ...]
    """Every linear layer, in the model's order."""

    tied: frozenset[str]
    """Linear layers that share their weight with another module."""

    parameters: tuple[str, ...]
    """Names of all parameters; a shared one once."""

    @property
    def always_trainable(self) -> frozenset[str]:
        """Parameters that every technique trains: those of the head, new ones, and rows of added tokens."""
        untrained = self.new | self.added
        return frozenset(name for name in self.parameters if name in untrained or _within(name, self.head))

    def depth_of(self, name: str) -> int:
        """Return the depth of a parameter: 0 for embeddings, 1..n for blocks, n + 1 after them.

        Modules at the end of one of several stacks (the last norm of T5's encoder) have the depth of its last block.
        """
        if _within(name, self.embeddings):
            return 0
        stack_depth = 0
        for depth, block in enumerate(self.blocks, start=1):
            if _within(name, (block,)):
                return depth
            if name.startswith(f"{_stack_of(block)}."):
                stack_depth = depth
        return stack_depth if 0 < stack_depth < len(self.blocks) else len(self.blocks) + 1

    def roles_in(self, block: str) -> dict[str, tuple[str, ...]]:
        """Return the roles of one block, with paths relative to it."""
        prefix = f"{block}."
        own = {
            role: tuple(path.removeprefix(prefix) for path in paths if path.startswith(prefix))
            for role, paths in self.roles.items()
        }
        return {role: paths for role, paths in own.items() if paths}

    def targets(self, wanted: Sequence[str] | Literal["all-linear"]) -> tuple[str, ...]:
        """Return the linear layers for roles (`query`), module names (`attention.self.query`) or `all-linear`.

        `all-linear` is every linear layer inside the blocks. The head is never included, as it is trained in full.

        Raises:
            RecipeError: a name matches nothing, or only layers that cannot be adapted.
        """
        if wanted == "all-linear":
            matches = {path for path in self.linears if _within(path, self.blocks)}
            if not matches:
                raise _target_error(f"this {self.family} model has no linear layer in a block", "use technique=full")
        else:
            matches = {path for word in wanted for path in self._matching_layers(word)}
        return tuple(path for path in self.linears if path in matches)

    def _matching_layers(self, word: str) -> set[str]:
        """Return the linear layers that match a role or module name."""
        named = self.roles.get(word) or [path for path in self.linears if f".{path}".endswith(f".{word}")]
        matches = set(named) & set(self.linears)
        if not matches:
            raise _target_error(
                f"{shorten(word)} matches no linear layer of this {self.family} model", self._hint(word)
            )
        head = {path for path in matches if f"{path}.weight" in self.always_trainable}
        if head == matches:
            raise _target_error(f"{shorten(word)} belongs to the head, which is already trained in full", "remove it")
        if shared := sorted(matches & self.tied):
            raise _target_error(
                f"'{shared[0]}' is tied to another module (such as the input embedding), so a merge would change both",
                "remove it",
            )
        return matches - head

    def _hint(self, word: str) -> str:
        """Return the valid targets, the nearest first."""
        candidates = [path for path in self.linears if _within(path, self.blocks)]
        roles = sorted(role for role, paths in self.roles.items() if set(paths) & set(candidates))
        suffixes = sorted({path.rpartition(".")[2] for path in candidates})
        near = did_you_mean(word, [*roles, *suffixes])
        known = f"roles: {', '.join(roles) or 'none known'}; modules: {', '.join(suffixes) or 'none'}; or all-linear"
        return f"{near} {known}" if near.startswith("did") else known


def anatomy(model: nn.Module, *, new: frozenset[str] = frozenset(), unused: frozenset[str] = frozenset()) -> Anatomy:
    """Return the anatomy of a model; `new` and `unused` are the missing and unexpected keys of its checkpoint."""
    prefix = _backbone(model)
    paths = [path for path, _ in model.named_modules() if path]
    late, blocks, roles = max((_match(paths, prefix, row) for row in NAMINGS), key=lambda match: len(match[2]))
    if not roles:
        late, blocks = (), _longest_list(model)
    config = getattr(model, "config", None)
    return Anatomy(
        family=getattr(config, "model_type", "") or type(model).__name__,
        backbone=prefix,
        hidden_size=_hidden_size(model, blocks),
        embeddings=(*_embeddings(model, blocks, prefix), *late),
        blocks=blocks,
        head=_head(model, prefix),
        new=new,
        added=frozenset(name for name, _ in model.named_parameters() if name.rpartition(".")[2] == added_tokens.ROWS),
        fixed=frozenset(getattr(model, "_keys_to_ignore_on_save", None) or ()),
        unused=unused,
        roles=roles,
        linears=tuple(path for path, module in model.named_modules() if type(module) in LINEAR),
        tied=_tied(model),
        parameters=tuple(name for name, _ in model.named_parameters()),
    )


def _within(name: str, modules: Iterable[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _target_error(what: str, hint: str) -> RecipeError:
    return RecipeError(what, where="technique.target_modules", hint=hint)


def _backbone(model: nn.Module) -> str:
    """Return the path of the pretrained backbone; empty if the model is the backbone."""
    prefix = getattr(model, "base_model_prefix", "")
    return prefix if isinstance(getattr(model, prefix, None), nn.Module) else ""


def _stack_of(block: str) -> str:
    """Return the path of the stack that a block belongs to."""
    return block.rpartition(".")[0].rpartition(".")[0]


Match = tuple[tuple[str, ...], tuple[str, ...], dict[str, tuple[str, ...]]]


def _match(paths: list[str], prefix: str, naming: Naming) -> Match:
    """Return the late embeddings, the blocks and the roles that a naming scheme matches."""
    stacks = [_matching(paths, prefix, pattern) for pattern in naming.blocks]
    if not all(stacks):
        return (), (), {}
    late = tuple(path for pattern in naming.embeddings for path in _matching(paths, prefix, pattern))
    blocks = tuple(path for stack in stacks for path in stack)
    known = set(paths)
    roles = {
        role: tuple(path for block in blocks for part in parts if (path := f"{block}.{part}") in known)
        for role, parts in naming.roles.items()
    }
    roles = {role: modules for role, modules in roles.items() if modules}
    return (late, blocks, roles) if 2 * len(roles) > len(naming.roles) else ((), (), {})  # fewer: coincidence


def _matching(paths: list[str], prefix: str, pattern: str) -> list[str]:
    full = re.escape(f"{prefix}.{pattern}" if prefix else pattern).replace(r"\*", r"[^.]+")
    return [path for path in paths if re.fullmatch(full, path)]


def _longest_list(model: nn.Module) -> tuple[str, ...]:
    """Return the members of the longest outermost list of modules of one class, or an empty tuple."""
    lists: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not _within(path, lists):
            lists[path] = module
    uniform = {path: members for path, members in lists.items() if len({type(member) for member in members}) == 1}
    longest = max(uniform, key=lambda path: len(uniform[path]), default=None)
    return () if longest is None else tuple(f"{longest}.{index}" for index in range(len(uniform[longest])))


def _embeddings(model: nn.Module, blocks: tuple[str, ...], path: str) -> Iterator[str]:
    """Yield the modules before the first block of each stack."""
    yield from _before(model, blocks, path)
    stacks = dict.fromkeys(block.rpartition(".")[0] for block in blocks)
    for stack in list(stacks)[1:]:
        within = stack.rpartition(".")[0]
        if not any(_within(other, (within,)) for other in stacks if other != stack):
            yield from _before(model, blocks, within)


def _before(model: nn.Module, blocks: tuple[str, ...], path: str) -> Iterator[str]:
    """Yield the modules with parameters before the first block, in registration order."""
    for name, child in model.get_submodule(path).named_children():
        child_path = f"{path}.{name}" if path else name
        if child_path in blocks:
            return
        if any(_within(block, (child_path,)) for block in blocks):
            yield from _before(model, blocks, child_path)
            return
        if blocks and next(child.parameters(), None) is not None:
            yield child_path


def _head(model: nn.Module, prefix: str) -> tuple[str, ...]:
    """Return the modules outside the backbone; none for a language model, whose head is pretrained."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if not prefix or output is not None:
        return ()
    return tuple(
        name for name, child in model.named_children() if name != prefix and next(child.parameters(), None) is not None
    )


def _tied(model: nn.Module) -> frozenset[str]:
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return frozenset(
        path for path, module in model.named_modules() if type(module) in LINEAR and uses[id(module.weight)] > 1
    )


def _hidden_size(model: nn.Module, blocks: tuple[str, ...]) -> int:
    """Return the hidden size: from the config, else from the first weight of the first block."""
    config = getattr(model, "config", None)
    if config is not None:
        for candidate in (config, config.get_text_config()):
            widths = getattr(candidate, "hidden_sizes", None) or [0]  # one per stage of a CNN
            if width := getattr(candidate, "hidden_size", None) or widths[-1]:
                return int(width)
    body = model.get_submodule(blocks[0]) if blocks else model
    return next((parameter.shape[-1] for parameter in body.parameters() if parameter.dim() > 1), 1)
