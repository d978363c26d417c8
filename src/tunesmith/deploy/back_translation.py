"""Texts said otherwise: translated into another language and back by two runs of the user's own.

The other wording of a text is what `data.augment`'s back-translation puts in its place (Sennrich 2016, arXiv
1511.06709; for classes Xie 2020, 1904.12848). It is made once for all texts and kept, so that each epoch, a resumed run
and other processes see the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from tunesmith.data.encoded import file_sha256, fingerprint
from tunesmith.deploy import predict
from tunesmith.errors import DataError, RecipeError, counted
from tunesmith.recipe.fields import Augmentation
from tunesmith.storage.files import atomic_write


def translated_back(
    texts: Iterable[str],
    steps: Sequence[Augmentation],
    cache: Path,
    *,
    device: str = "auto",
    offline: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, str]:
    """Text -> the same by way of another language, read from `cache` where it was made before; empty where no step
    asks for it.

    Raises:
        RecipeError: a run is not there, not finished, or does not translate.
    """
    step = next((one for one in steps if one.runs is not None), None)
    if step is None:
        return {}
    assert step.runs is not None, "chosen by it"
    wanted = sorted(set(texts))
    kept = cache / f"{fingerprint(wanted, fingerprints(steps))}.json"
    if not kept.exists():
        said = wanted
        for run in step.runs:
            tuned = predict.load(run, device=device, offline=offline)
            if tuned.task.name != "translation":
                what = f"data.augment: {run} is a run of {tuned.task.name}, and a text is translated there and back"
                raise RecipeError(what, hint="name two runs of translation")
            say(f"translating {counted(len(said), 'text')} by {run}")
            said = [answer["translation"] or text for answer, text in zip(_ask(tuned, said), said, strict=True)]
        kept.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(kept, json.dumps(dict(zip(wanted, said, strict=True)), ensure_ascii=False))
    found: dict[str, str] = json.loads(kept.read_text(encoding="utf-8"))
    return found


def _ask(tuned: predict.Tuned, texts: Sequence[str]) -> list[dict[str, str]]:
    """A translation for each; of a text that is nothing to the tokenizer, none."""
    try:
        return tuned.predict(texts)
    except DataError:
        return [_ask(tuned, [text])[0] for text in texts] if len(texts) > 1 else [{"translation": ""}]


def fingerprints(steps: Sequence[Augmentation]) -> list[str]:
    """sha256 of what the runs say of themselves.

    Raises:
        RecipeError: there is no run.
    """
    found = []
    for run in (run for step in steps for run in step.runs or ()):
        about = Path(run) / "run.json"
        if not about.is_file():
            raise RecipeError(f"data.augment: no run in {run}", hint="`tunesmith train task=translation ...` makes one")
        found.append(file_sha256(about))
    return found
