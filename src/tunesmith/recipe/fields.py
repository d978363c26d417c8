"""Kinds of values that keys of a recipe take: paths of this machine, changes to texts, how a model writes."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from tunesmith.registry import Keys


def local_path(path: str) -> str:
    """`~` is the home folder. A variable is the shell's affair: its value may be a secret, and recipes are shared."""
    if (found := re.search(r"\$(\w+|\{\w+\})", path)) and not Path(path).exists():
        what = f"{found[0]} is not filled in here"
        raise ValueError(f"{what}; write it out, or give the key on the command line, where the shell fills it in")
    return os.path.expanduser(path)


Local = Annotated[str, AfterValidator(local_path)]

General = Annotated[
    Literal["default", "none"] | Local,
    Field(description="other text, scored before and after, to see what was forgotten: a file or folder, or none"),
]


class Augmentation(Keys):
    """One way to change the texts of train, anew in each epoch."""

    name: Literal["word-dropout", "word-swap", "typos", "synonyms", "back-translation"] = Field(
        description="what is done to words, or to a whole text"
    )
    probability: float = Field(0.1, gt=0, lt=1, description="of each word; of back-translation, of each text")
    file: Local | None = Field(None, description="for synonyms: lines such as `good, fine, nice`")
    runs: list[Local] | None = Field(
        None, min_length=2, max_length=2, description="for back-translation: two runs of translation, there and back"
    )

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, given: Any) -> Any:
        return {"name": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _with_what(self) -> Self:
        for name, key, example in (
            ("synonyms", "file", "file: synonyms.txt"),
            ("back-translation", "runs", "runs: [runs/en-de, runs/de-en]"),
        ):
            if (self.name == name) != (getattr(self, key) is not None):
                said = f"{name} needs {key}" if self.name == name else f"{self.name} has no {key}"
                raise ValueError(f"{said}; e.g. {{name: {name}, {example}}}")
        return self


class Generation(Keys):
    """How a model writes a text."""

    max_new_tokens: int = Field(128, ge=1, description="tokens of an answer at most")
    num_beams: int = Field(1, ge=1, description="beginnings that are followed at once; 1: no search")
    temperature: float = Field(0.0, ge=0, description="0: always the likeliest token; above, tokens are drawn")
    top_p: float = Field(1.0, gt=0, le=1, description="drawn from the likeliest tokens that make this share")
    rows: int | None = Field(None, ge=1, description="rows of a split for which texts are written to be scored")
