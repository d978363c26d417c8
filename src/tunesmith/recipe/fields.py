"""Types of recipe values that several sections or tasks share: local paths, text augmentation, generation."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from tunesmith.registry import Keys


def local_path(path: str) -> str:
    """Return the path with `~` expanded.

    Environment variables are refused: their values may be secrets, and recipes are shared.

    Raises:
        ValueError: the path holds a variable, and no file has that name.
    """
    if (variable := re.search(r"\$(\w+|\{\w+\})", path)) and not Path(path).exists():
        what = f"{variable[0]} is not expanded in a recipe"
        raise ValueError(f"{what}; write the full path, or set the key on the command line, where the shell expands it")
    return os.path.expanduser(path)


LocalPath = Annotated[str, AfterValidator(local_path)]

General = Annotated[
    Literal["default", "none"] | LocalPath,
    Field(
        description="general-domain text scored before and after training, to measure forgetting: file, folder or none"
    ),
]


class Augmentation(Keys):
    """One augmentation of the training texts, drawn anew in each epoch."""

    name: Literal["word-dropout", "word-swap", "typos", "synonyms", "back-translation"] = Field(
        description="change to single words, or to a whole text (back-translation)"
    )
    probability: float = Field(
        0.1, gt=0, lt=1, description="probability for each word; back-translation: for each text"
    )
    file: LocalPath | None = Field(None, description="synonyms: file with lines such as `good, fine, nice`")
    runs: list[LocalPath] | None = Field(
        None,
        min_length=2,
        max_length=2,
        description="back-translation: two translation runs, into another language and back",
    )

    @model_validator(mode="before")
    @classmethod
    def _expand_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        for name, key, example in (
            ("synonyms", "file", "file: synonyms.txt"),
            ("back-translation", "runs", "runs: [runs/en-de, runs/de-en]"),
        ):
            if (self.name == name) != (getattr(self, key) is not None):
                what = f"{name} needs {key}" if self.name == name else f"{self.name} has no key {key}"
                raise ValueError(f"{what}; e.g. {{name: {name}, {example}}}")
        return self


class Generation(Keys):
    """Settings for generating text."""

    max_new_tokens: int = Field(128, ge=1, description="maximum tokens per generated text")
    num_beams: int = Field(1, ge=1, description="beam width; 1: no beam search")
    temperature: float = Field(0.0, ge=0, description="sampling temperature; 0: greedy decoding")
    top_p: float = Field(
        1.0, gt=0, le=1, description="nucleus sampling: cumulative probability of the tokens to sample from"
    )
    rows: int | None = Field(
        None, ge=1, description="rows of a split for which texts are generated and scored; null: all"
    )
