"""The map of a model's parts: what makes a technique work on every model.

A technique asks the anatomy where things are (blocks in forward order, attention and MLP projections, norms,
embeddings, head), never a model's class name. Names are kept as data in `namings.py`, one row per way of naming; a
model is read by the row that finds most in it. A model that no row knows still has its structure: its blocks are the
longest `nn.ModuleList` of like modules, and its projections go by their module names.
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
"""What counts as a linear map. Exactly these: a subclass may use its weight without calling `forward`."""


@dataclass(frozen=True)
class Anatomy:
    """Where the parts of one model are, as module paths and parameter names of the untouched model."""

    family: str
    backbone: str
    """The path of the pretrained body inside the model; empty where the model is nothing but the body."""

    hidden_size: int
    embeddings: tuple[str, ...]
    """Modules of the backbone before the first block."""

    blocks: tuple[str, ...]
    """In forward order, all stacks in a row."""

    head: tuple[str, ...]
    """Modules outside the backbone. A language-modelling head is pretrained with the rest and is not among them."""

    new: frozenset[str]
    """Parameters that the checkpoint did not hold: initialised at load."""

    added: frozenset[str]
    """Parameters that are rows of tokens which the recipe has added."""

    fixed: frozenset[str]
    """Parameters that are computed, and learn under no technique: Marian's positions are sines."""

    unused: frozenset[str]
    """Tensors of the checkpoint that the model has no place for: another task's head."""

    roles: Mapping[str, tuple[str, ...]]
    """What a module does -> modules, in block order; a fused projection stands under each role it holds."""

    linears: tuple[str, ...]
    """Every linear map, in the model's order."""

    tied: frozenset[str]
    """Linear maps whose weight is another module's too."""

    parameters: tuple[str, ...]
    """Every parameter's name, a shared one once."""

    @property
    def always_trainable(self) -> frozenset[str]:
        """The parameters that every technique must train: those of the head, and those that nothing has trained yet."""
        nothing_has = self.new | self.added
        return frozenset(name for name in self.parameters if name in nothing_has or _within(name, self.head))

    def depth_of(self, name: str) -> int:
        """How far up a parameter stands: 0 embeddings, 1..n the blocks, n + 1 what comes after them.

        What ends one of several stacks (the last norm of T5's encoder) stands with the last block of its stack.
        """
        if _within(name, self.embeddings):
            return 0
        beside = 0
        for depth, block in enumerate(self.blocks, start=1):
            if _within(name, (block,)):
                return depth
            if name.startswith(f"{_stack_of(block)}."):
                beside = depth
        return beside if 0 < beside < len(self.blocks) else len(self.blocks) + 1

    def roles_in(self, block: str) -> dict[str, tuple[str, ...]]:
        """What the modules of one block do, by their paths inside it."""
        inside = f"{block}."
        own = {
            role: tuple(path.removeprefix(inside) for path in paths if path.startswith(inside))
            for role, paths in self.roles.items()
        }
        return {role: paths for role, paths in own.items() if paths}

    def targets(self, wanted: Sequence[str] | Literal["all-linear"]) -> tuple[str, ...]:
        """The linear maps that roles (`query`), module names (`q_proj`, `attention.self.query`) or `all-linear` mean.

        `all-linear` is every linear map inside the blocks. A head is never among them: it learns whole.

        Raises:
            RecipeError: a name matches nothing, or only what may not be adapted.
        """
        if wanted == "all-linear":
            found = {path for path in self.linears if _within(path, self.blocks)}
            if not found:
                raise _refused(f"this {self.family} model has no linear map inside a block", "use technique=full")
        else:
            found = {path for word in wanted for path in self._meant_by(word)}
        return tuple(path for path in self.linears if path in found)

    def _meant_by(self, word: str) -> set[str]:
        """The linear maps that one role or module name means."""
        named = self.roles.get(word) or [path for path in self.linears if f".{path}".endswith(f".{word}")]
        found = set(named) & set(self.linears)
        if not found:
            raise _refused(f"{shorten(word)} is no linear map of this {self.family} model", self._known(word))
        whole = {path for path in found if f"{path}.weight" in self.always_trainable}
        if whole == found:
            raise _refused(f"{shorten(word)} belongs to the head, which learns whole anyway", "leave it out")
        if shared := sorted(found & self.tied):
            raise _refused(
                f"'{shared[0]}' shares its weight with another module (an output tied to the input embedding): "
                "what is merged into one would change both",
                "leave it out",
            )
        return found - whole

    def _known(self, word: str) -> str:
        """What could have been meant instead of `word`."""
        inside = [path for path in self.linears if _within(path, self.blocks)]
        roles = sorted(role for role, paths in self.roles.items() if set(paths) & set(inside))
        suffixes = sorted({path.rpartition(".")[2] for path in inside})
        near = did_you_mean(word, [*roles, *suffixes])
        known = f"roles: {', '.join(roles) or 'none known'}; modules: {', '.join(suffixes) or 'none'}; or all-linear"
        return f"{near} {known}" if near.startswith("did") else known


def anatomy(model: nn.Module, *, new: frozenset[str] = frozenset(), unused: frozenset[str] = frozenset()) -> Anatomy:
    """Read a model's parts; `new` are the parameters that its checkpoint did not hold, `unused` what only it holds."""
    prefix = _backbone(model)
    paths = [path for path, _ in model.named_modules() if path]
    late, blocks, roles = max((_read(paths, prefix, row) for row in NAMINGS), key=lambda read: len(read[2]))
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


def _refused(what: str, hint: str) -> RecipeError:
    return RecipeError(what, where="technique.target_modules", hint=hint)


def _backbone(model: nn.Module) -> str:
    """The path of the pretrained body inside `model`; empty where the model is nothing but the body."""
    prefix = getattr(model, "base_model_prefix", "")
    return prefix if isinstance(getattr(model, prefix, None), nn.Module) else ""


def _stack_of(block: str) -> str:
    """The module whose list a block is in."""
    return block.rpartition(".")[0].rpartition(".")[0]


Read = tuple[tuple[str, ...], tuple[str, ...], dict[str, tuple[str, ...]]]


def _read(paths: list[str], prefix: str, naming: Naming) -> Read:
    """The late embeddings, the blocks and the roles that one row finds among all module paths."""
    stacks = [_matching(paths, prefix, pattern) for pattern in naming.blocks]
    if not all(stacks):
        return (), (), {}
    late = tuple(path for pattern in naming.embeddings for path in _matching(paths, prefix, pattern))
    blocks = tuple(path for stack in stacks for path in stack)
    known = set(paths)
    found = {
        role: tuple(path for block in blocks for part in parts if (path := f"{block}.{part}") in known)
        for role, parts in naming.roles.items()
    }
    found = {role: modules for role, modules in found.items() if modules}
    return (late, blocks, found) if 2 * len(found) > len(naming.roles) else ((), (), {})  # a few alike are chance


def _matching(paths: list[str], prefix: str, pattern: str) -> list[str]:
    full = re.escape(f"{prefix}.{pattern}" if prefix else pattern).replace(r"\*", r"[^.]+")
    return [path for path in paths if re.fullmatch(full, path)]


def _longest_list(model: nn.Module) -> tuple[str, ...]:
    """The members of the longest outermost list of like modules, the first of equals; empty where there is none."""
    lists: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not _within(path, lists):
            lists[path] = module
    alike = {path: members for path, members in lists.items() if len({type(member) for member in members}) == 1}
    longest = max(alike, key=lambda path: len(alike[path]), default=None)
    return () if longest is None else tuple(f"{longest}.{index}" for index in range(len(alike[longest])))


def _embeddings(model: nn.Module, blocks: tuple[str, ...], path: str) -> Iterator[str]:
    """What stands before the first block of each stack; a decoder's stack begins after an encoder's."""
    yield from _before(model, blocks, path)
    stacks = dict.fromkeys(block.rpartition(".")[0] for block in blocks)
    for stack in list(stacks)[1:]:
        within = stack.rpartition(".")[0]
        if not any(_within(other, (within,)) for other in stacks if other != stack):
            yield from _before(model, blocks, within)


def _before(model: nn.Module, blocks: tuple[str, ...], path: str) -> Iterator[str]:
    """The modules with parameters that stand before the first block: registration order is forward order."""
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
    """The modules beside the backbone, unless they make a language model, whose output is pretrained with the rest."""
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
    """The width between blocks: from the config, else of the first block's first weight."""
    config = getattr(model, "config", None)
    if config is not None:
        for candidate in (config, config.get_text_config()):
            widths = getattr(candidate, "hidden_sizes", None) or [0]  # those of the stages of a CNN
            if width := getattr(candidate, "hidden_size", None) or widths[-1]:
                return int(width)
    body = model.get_submodule(blocks[0]) if blocks else model
    return next((parameter.shape[-1] for parameter in body.parameters() if parameter.dim() > 1), 1)
